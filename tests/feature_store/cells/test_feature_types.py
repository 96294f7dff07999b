"""Only features of gene expression are genes: antibodies, guides and peaks are in no matrix, total or gene table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pytest
from cell_tables import written_cells
from scipy import sparse

from feature_store.cells import expression_matrix, open_source
from feature_store.cells.gene_table import matrix_tables
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan

if TYPE_CHECKING:
    from pathlib import Path

N_CELLS = 30
GENES, OTHERS = ["CD4", "LYZ", "FTL", "MS4A1"], ["CD8A", "CD19"]


def write(path: Path, counts: np.ndarray, var: pd.DataFrame) -> Path:
    adata = anndata.AnnData(sparse.csr_matrix(counts), var=var)
    adata.raw = adata
    adata.write_h5ad(path)
    return path


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(2.0, (N_CELLS, len(GENES) + len(OTHERS))).astype(np.float32) + 1


def var_of(column: str, gene: str, other: str | None) -> pd.DataFrame:
    # an antibody between the genes, so that columns move
    names = [*GENES[:2], OTHERS[0], *GENES[2:], OTHERS[1]]
    types = [gene, gene, other, gene, gene, other]
    return pd.DataFrame({column: types}, index=names)


@pytest.mark.parametrize("matrix", ["X", "raw"])
@pytest.mark.parametrize(
    ("column", "gene", "other"),
    [
        ("feature_types", "Gene Expression", "Antibody Capture"),
        ("feature_types", "Gene Expression", "CRISPR Guide Capture"),
        ("feature_types", "GeneExpression", "Peaks"),
        ("feature_type", "Gene Expression", "Multiplexing Capture"),
        ("modality", "rna", "protein"),
        ("Modality", "RNA", "ADT"),
        ("feature_biotype", "gene", "spike-in"),
        ("feature_types", "Gene Expression", None),
    ],
)
def test_features_that_are_no_genes_are_in_no_matrix_and_no_total(
    tmp_path: Path, counts: np.ndarray, matrix: str, column: str, gene: str, other: str | None
) -> None:
    of_genes = counts[:, [0, 1, 3, 4]]
    alone = open_source(write(tmp_path / "genes.h5ad", of_genes, pd.DataFrame(index=GENES)))
    both = open_source(write(tmp_path / "both.h5ad", counts, var_of(column, gene, other)), matrix=matrix)
    assert both.gene_symbols == GENES
    assert both.left_out == {other or "without a type": 2}
    for mine, wanted in zip(both.read_rows(3, 20), alone.read_rows(3, 20), strict=True):
        assert (mine == wanted).all()
    assert (expression_matrix(both) != expression_matrix(alone)).nnz == 0
    assert matrix_tables(both).genes.equals(matrix_tables(alone).genes)


@pytest.mark.parametrize("column", ["feature_type", "chromosome"])
def test_a_column_of_something_else_leaves_every_gene(tmp_path: Path, counts: np.ndarray, column: str) -> None:
    var = var_of(column, "protein_coding", "lncRNA")
    var.index = [f"G{i}" for i in range(len(var))]
    source = open_source(write(tmp_path / "a.h5ad", counts, var))
    assert (source.n_genes, source.left_out) == (len(var), {})


def test_antibodies_alone_are_refused(tmp_path: Path, counts: np.ndarray) -> None:
    path = write(tmp_path / "a.h5ad", counts, var_of("feature_types", "Antibody Capture", "Antibody Capture"))
    with pytest.raises(InputError, match=r"feature_types.*a\.h5ad.*Antibody Capture.*gene expression"):
        open_source(path)


def test_antibodies_that_are_no_counts_do_not_decide_about_the_genes(tmp_path: Path, counts: np.ndarray) -> None:
    counts[:, [2, 5]] -= 3.5
    source = open_source(write(tmp_path / "a.h5ad", counts, var_of("feature_types", "Gene Expression", "ADT")))
    assert source.value_kind == "counts"


def test_the_plan_of_the_cells_holds_the_matrix_and_what_was_left_out(tmp_path: Path, counts: np.ndarray) -> None:
    path = write(tmp_path / "a.h5ad", counts, var_of("feature_types", "Gene Expression", "Antibody Capture"))
    layout = Layout(tmp_path / "store")
    with open_source(path) as source:
        cells = written_cells(layout, source)
    plan = CellsPlan.of(commit.Run.open(layout.cells_dir(cells["dataset"][0])))
    assert (plan.matrix, plan.value_kind, plan.left_out) == ("X", "counts", {"Antibody Capture": 2})
