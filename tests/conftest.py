"""Shape checks for the mathematics, and the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# has to run before anything imports sae_core: its signatures are then checked at every call
install_import_hook("sae_core", "beartype.beartype")


@pytest.fixture(scope="session")
def scsae_data() -> Path:
    folder = os.environ.get("SCSAE_DATA")
    if not folder:
        pytest.skip("SCSAE_DATA is not set: it names the folder of real .h5ad files that this test reads")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"SCSAE_DATA={folder} is no folder")
    return path.resolve()
