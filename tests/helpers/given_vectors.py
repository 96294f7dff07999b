"""Vectors of the tiny cells that follow their labels and counts, and what the command line says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from typer.testing import CliRunner

from pipelines.cli import app

if TYPE_CHECKING:
    import anndata

WIDTH = 12
COLUMNS = {"donor": "donor", "batch": "batch", "cell_type": "type"}
COLUMN_OPTIONS = ("--donor", "donor", "--batch", "batch", "--cell-type", "type")


def vectors_of(cells: anndata.AnnData) -> np.ndarray:
    """Vectors that follow the type, the batch and the counts of cells, as those of a model would."""
    rng = np.random.default_rng(5)
    kind, batch = (cells.obs["type"] == "A").to_numpy(), (cells.obs["batch"] == "b0").to_numpy()
    design = np.column_stack([kind, ~kind, batch, ~batch, np.log1p(cells.X.toarray())]).astype(np.float64)
    return (design @ rng.normal(size=(design.shape[1], WIDTH))).astype(np.float32)


def said_by(*words: object) -> str:
    """What a command prints; it has to end well."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.exception
    return done.output


def refused_by(*words: object) -> str:
    """The error of a command that has to be refused."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code != 0
    return str(done.exception)
