"""The matrix that says most about the counts of all genes is taken, and the others are passed over with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pytest
from scipy import sparse

from feature_store.cells import open_source
from feature_store.cells.value_kinds import values_of
from feature_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from feature_store.cells import CSRRows, Source

N_CELLS, N_GENES, N_SELECTED = 80, 40, 12


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    depth = rng.lognormal(0, 0.5, (N_CELLS, 1)) * rng.lognormal(0, 1, (1, N_GENES))
    return rng.poisson(depth).astype(np.float32)


def log_cp10k(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1))).astype(np.float32)


def without_ambient(counts: np.ndarray) -> np.ndarray:
    """Counts minus a tenth of the cell's total spread by the genes' totals, as SoupX leaves them."""
    soup = counts.sum(0) / counts.sum()
    return np.where(counts > 0, np.maximum(counts - 0.1 * counts.sum(1, keepdims=True) * soup, 0), 0)


def by_share(counts: np.ndarray) -> np.ndarray:
    """Each count times a share of its own, as DecontX leaves them."""
    return counts * np.random.default_rng(1).beta(8, 2, counts.shape)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    """Open a file with X, layers, and a raw of all genes (`raw`); matrices of fewer genes are the first of them."""

    def open_it(x: Any, *, layers: Mapping[str, Any] | None = None, raw: Any = None, **options: Any) -> Source:
        adata = anndata.AnnData(x, layers=layers)
        adata.var_names = [f"G{i}" for i in range(adata.n_vars)]
        if raw is not None:
            whole = anndata.AnnData(raw, obs=adata.obs)
            whole.var_names = [f"G{i}" for i in range(whole.n_vars)]
            adata.raw = whole
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.h5ad"
        adata.write_h5ad(path)
        return open_source(path, **options)

    return open_it


@pytest.mark.parametrize("name", ["raw_counts", "umi", "anything"])
def test_counts_are_found_in_a_layer_of_any_name(opened: Callable[..., Source], counts: np.ndarray, name: str) -> None:
    source = opened(log_cp10k(counts), layers={"binary": (counts > 0).astype(np.float32), name: counts})
    assert (source.matrix, source.value_kind) == (f"layers/{name}", "counts")
    assert set(source.choices[0].passed_over) == {"X", "layers/binary"}


def test_all_genes_are_preferred_to_a_selection_of_them(opened: Callable[..., Source], counts: np.ndarray) -> None:
    source = opened(counts[:, :N_SELECTED], raw=counts)
    assert (source.matrix, source.n_genes) == ("raw", N_GENES)
    assert f"{N_SELECTED} genes" in source.choices[0].passed_over["X"]
    log = opened(log_cp10k(counts)[:, :N_SELECTED], layers={"counts": counts[:, :N_SELECTED]}, raw=log_cp10k(counts))
    assert (log.matrix, log.value_kind) == ("raw", "lognorm")


def test_counts_are_preferred_to_logarithms_with_a_few_more_genes(
    opened: Callable[..., Source], counts: np.ndarray
) -> None:
    counts[:, -2:] = 0
    counts[0, -2:] = 1
    assert opened(counts[:, :-2], raw=log_cp10k(counts)).matrix == "X"


@pytest.mark.parametrize("how", ["NaN", "negative"])
def test_a_matrix_that_cannot_be_used_does_not_stop_one_that_can(
    opened: Callable[..., Source], counts: np.ndarray, how: str
) -> None:
    bad: Any = {
        "NaN": np.where(counts > 2, np.nan, counts),
        "negative": counts - counts.mean(0),
    }[how]
    source = opened(bad, raw=counts)
    assert source.matrix == "raw"
    assert {"NaN": "nan", "negative": "negative"}[how] in source.choices[0].passed_over["X"]
    with pytest.raises(InputError, match="X of"):
        opened(bad, raw=counts, matrix="X")


@pytest.mark.parametrize("corrected", [without_ambient, by_share])
def test_decontaminated_counts_are_no_logarithms(
    opened: Callable[..., Source], counts: np.ndarray, corrected: Callable[[np.ndarray], np.ndarray]
) -> None:
    values = corrected(counts)
    assert values.max() < 20
    source = opened(values, layers={"before": counts})
    assert source.matrix == "layers/before"
    assert "decontaminated" in source.choices[0].passed_over["X"]
    for named in (None, "X"):
        with pytest.raises(InputError, match="decontaminated"):
            opened(values, matrix=named)


@pytest.mark.parametrize(
    ("transform", "kind", "is_exact"),
    [
        (lambda x: x, "counts", True),
        (log_cp10k, "lognorm", True),
        (lambda x: log_cp10k(x)[:, :N_SELECTED], "lognorm", True),
        (lambda x: np.log1p(x / 7), "lognorm", True),
        (lambda x: np.log2(1 + x * 1e6 / np.maximum(x.sum(1, keepdims=True), 1)), "lognorm", False),
        (lambda x: log_cp10k(by_share(x)), "lognorm", False),
        (lambda x: log_cp10k(without_ambient(x)), "lognorm", False),
        (lambda x: x / np.maximum(x.sum(1, keepdims=True), 1), "unlogged", False),
        (lambda x: x * 1e4 / np.maximum(x.sum(1, keepdims=True), 1), "unlogged", False),
        (by_share, "corrected", False),
        (without_ambient, "corrected", False),
        (np.sqrt, "corrected", False),
        (lambda x: x - 1, "scaled", False),
        (np.zeros_like, "empty", False),
    ],
)
def test_the_kind_of_values_is_told_from_their_levels_and_totals(
    counts: np.ndarray, transform: Callable[[np.ndarray], np.ndarray], kind: str, is_exact: bool
) -> None:
    values = values_of(InMemory(transform(counts)), "X")
    assert (values.kind, values.is_exact) == (kind, is_exact)


class InMemory:
    """A matrix in memory, read as one on disk."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = sparse.csr_array(values.astype(np.float32))
        self.shape = values.shape

    def read(self, start: int, stop: int) -> CSRRows:
        from feature_store.cells import CSRRows

        rows = self.values[start:stop]
        return CSRRows(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data)


def test_real_values_have_their_kind_also_when_shallow(scsae_data: Path) -> None:
    cells = anndata.read_h5ad(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad")[:150]
    deep = cells.X.toarray()
    shallow = np.random.default_rng(0).binomial(deep.astype(int), 0.01).astype(np.float32)
    for counts in (deep, shallow):
        assert values_of(InMemory(log_cp10k(counts)), "X").kind == "lognorm"
        for correct in (without_ambient, by_share):
            assert values_of(InMemory(correct(counts)), "X").kind == "corrected"


def test_files_take_the_kind_that_all_of_them_have(tmp_path: Path, counts: np.ndarray) -> None:
    a, b = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    anndata.AnnData(counts).write_h5ad(a)
    adata = anndata.AnnData(counts[:, :N_SELECTED], layers={"log": log_cp10k(counts)[:, :N_SELECTED]})
    adata.raw = anndata.AnnData(log_cp10k(counts + 1), obs=adata.obs)
    adata.write_h5ad(b)
    with open_source(b) as alone:
        assert alone.matrix == "raw"
    with open_source([a, b]) as both:
        assert (both.matrix, both.value_kind) == ("X", "counts")
