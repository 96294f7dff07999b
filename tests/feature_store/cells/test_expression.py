"""Expression by gene: the columns of the matrix, normalised, whatever the cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from cell_tables import written_cells

from feature_store.cells import (
    ExpressionReader,
    Source,
    expression_matrix,
    open_source,
    plan_expression,
    write_expression_part,
)
from feature_store.errors import IncompleteRunError, IntegrityError, PlanMismatchError
from feature_store.storage import commit
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

N_CELLS, N_GENES = 50, 11


@pytest.fixture
def counts() -> np.ndarray:
    """Counts with an empty cell, an empty gene and a gene in every cell."""
    matrix = np.random.default_rng(0).poisson(0.7, (N_CELLS, N_GENES)).astype(np.float32)
    matrix[7], matrix[:, 4], matrix[:, 9] = 0, 0, 3
    return matrix


def open_with(path: Path, matrix: np.ndarray) -> Source:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(len(matrix))])
    var = pd.DataFrame(index=[f"G{i}" for i in range(matrix.shape[1])])
    anndata.AnnData(X=sp.csr_matrix(matrix), obs=obs, var=var).write_h5ad(path)
    return open_source(path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts and ranges of genes of so few cells."""
    monkeypatch.setattr("feature_store.cells.expression.PART_NONZEROS", 80)
    monkeypatch.setattr("feature_store.cells.expression.RANGE_NONZEROS", 75)
    monkeypatch.setattr("feature_store.cells.expression.RANGE_GENES", 4)


EVERY_CELL = np.arange(N_CELLS)
PANEL = np.array([0, 3, 4, 5, 7, 11, 19, 20, 31, 33, 34, 48])


def write_expression(root: Path, source: Source, panel: np.ndarray = EVERY_CELL) -> commit.Run:
    layout = Layout(root)
    dataset = str(written_cells(layout, source)["dataset"][0])
    genes = commit.read_table(layout.genes_dir(dataset))
    plan = plan_expression(dataset, source, genes, panel)
    run = commit.Run.create(root / "expression", plan.table("expression", n_shards=plan.n_shards))
    for shard in run.pending():
        write_expression_part(run, shard, source, panel)
    run.finalize()
    return run


def log_cp10k(matrix: np.ndarray) -> np.ndarray:
    total = matrix.astype(np.float64).sum(axis=1, keepdims=True)
    return np.log1p(matrix * 1e4 / np.maximum(total, 1))


@pytest.mark.usefixtures("small")
def test_any_range_of_genes_is_log1p_of_counts_per_ten_thousand_of_all_cells(tmp_path, counts):
    source = open_with(tmp_path / "x.h5ad", counts)
    run = write_expression(tmp_path, source)
    assert run.n_shards > 2
    assert len(run.plan["bounds"]) > 4
    expected = log_cp10k(counts)
    reader = ExpressionReader(run, EVERY_CELL)
    np.testing.assert_allclose(expression_matrix(source).toarray(), expected, rtol=1e-6)
    for start, stop in ((0, N_GENES), (2, 9), (4, 5), *zip(reader.bounds[:-1], reader.bounds[1:], strict=True)):
        found = reader.read(start, stop)
        assert found.dtype == np.float32
        assert found.has_sorted_indices
        assert (found.data != 0).all()
        np.testing.assert_allclose(found.toarray(), expected[:, start:stop], rtol=1e-6)


@pytest.mark.usefixtures("small")
def test_the_rows_are_the_panel_and_the_parts_name_the_cells_of_the_data_set(tmp_path, counts, monkeypatch):
    monkeypatch.setattr("feature_store.cells.expression.PART_NONZEROS", 30)
    run = write_expression(tmp_path, open_with(tmp_path / "x.h5ad", counts), PANEL)
    assert run.n_shards > 1
    reader = ExpressionReader(run, PANEL)
    for start, stop in ((0, N_GENES), (2, 9), (4, 5)):
        found = reader.read(start, stop)
        assert (found.dtype, found.shape) == (np.float32, (len(PANEL), stop - start))
        assert found.has_sorted_indices
        np.testing.assert_allclose(found.toarray(), log_cp10k(counts)[PANEL, start:stop], rtol=1e-6)
    stored = commit.read_table(run.path)
    assert sorted(set(stored["cell_idx"])) == PANEL.tolist()
    shards = run.manifest().shards
    assert [shard.start for shard in shards[1:]] == [shard.stop for shard in shards[:-1]]
    assert shards[-1].stop == len(PANEL)
    with pytest.raises(IntegrityError, match="panel"):
        ExpressionReader(run, EVERY_CELL)


@pytest.mark.usefixtures("small")
def test_log_normalised_values_are_kept_as_they_are(tmp_path, counts):
    values = log_cp10k(counts).astype(np.float32)
    source = open_with(tmp_path / "x.h5ad", values)
    assert source.value_kind == "lognorm"
    reader = ExpressionReader(write_expression(tmp_path, source), EVERY_CELL)
    np.testing.assert_array_equal(reader.read(0, N_GENES).toarray(), values)


@pytest.mark.usefixtures("small")
def test_row_groups_end_at_the_same_genes_in_every_part(tmp_path, counts):
    run = write_expression(tmp_path, open_with(tmp_path / "x.h5ad", counts))
    bounds = run.plan["bounds"]
    for path in run.parts():
        file = pq.ParquetFile(path)
        spans = [file.metadata.row_group(i).column(0).statistics for i in range(file.metadata.num_row_groups)]
        places = [np.searchsorted(bounds, [span.min, span.max], side="right") for span in spans]
        assert all(first == last for first, last in places)
        assert len({first for first, _ in places}) == len(places)
        gene, cell = (file.read()[name].to_numpy() for name in ("gene_idx", "cell_idx"))
        assert (np.lexsort((cell, gene)) == np.arange(gene.size)).all()


@pytest.mark.usefixtures("small")
def test_a_resumed_run_has_the_same_bytes_and_another_data_set_is_refused(tmp_path, counts):
    source = open_with(tmp_path / "x.h5ad", counts)
    run = write_expression(tmp_path, source)
    calm = run.manifest()
    for shard in (0, 2):
        run.part(shard).unlink()
    (run.path / "MANIFEST.json").unlink()
    with pytest.raises(IncompleteRunError):
        ExpressionReader(run, EVERY_CELL)
    assert run.pending() == [0, 2]
    assert write_expression(tmp_path, source).manifest() == calm
    other = counts.copy()
    other[0, 0] += 1
    with pytest.raises(PlanMismatchError, match="digest"):
        write_expression(tmp_path, open_with(tmp_path / "y.h5ad", other))


def test_a_damaged_part_is_named(tmp_path, counts):
    run = write_expression(tmp_path, open_with(tmp_path / "x.h5ad", counts))
    part = run.part(0)
    content = bytearray(part.read_bytes())
    content[40] ^= 255
    part.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="part-00000"):
        ExpressionReader(run, EVERY_CELL).read(0, N_GENES)
