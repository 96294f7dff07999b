"""What every foundation model promises, as tests: for authors of a model in a package of their own.

`scsae.testing.conformance` holds one class, whose subclass runs under pytest on their model. It is imported by tests
alone and needs pytest, which `pip install 'scsae[testing]'` brings.
"""

import pytest

pytest.register_assert_rewrite("scsae.testing.conformance")
