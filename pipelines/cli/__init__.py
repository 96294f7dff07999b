"""The command line `scsae`: a module for each group of commands, `app` is its door.

The options of a stage's command are the fields of its options class in `pipelines.config`, and the docstrings of the
fields are the help. A command imports its stage when it is called, so that `scsae --help` takes less than a second.
"""

from pipelines.cli.app import app, main

__all__ = ["app", "main"]
