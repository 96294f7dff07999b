"""Planted cells: donors, types whose share differs by donor, genes that follow types, and features of known meaning."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from scipy import sparse
from toy_plans import toy_plan

from feature_store.associations import (
    CellInputs,
    FeatureRange,
    GeneTiles,
    Labels,
    MeasuredRun,
    TokenStatistics,
    assemble_measured,
    measure,
)
from feature_store.associations.gene_correlation import CellBlocks
from feature_store.storage.plans import AssociationsPlan

N_DONORS, CELLS_PER_DONOR, N_GENES = 8, 75, 40


@dataclass(frozen=True, kw_only=True)
class Planted:
    """codes [n_cells n_features]; meaning[f] in type / not-type / batch / gene / confounded / noise / dead."""

    codes: sparse.csr_array
    expression: sparse.csr_array
    genes: list[str]
    cell_type: Labels
    donor: Labels
    batch: Labels
    split: list[str]
    meaning: list[str]
    target: list[int]
    tokens: TokenStatistics


def sparse_gamma(rng, fires):
    return np.where(fires, rng.gamma(2.0, 1.0, fires.shape) + 0.1, 0.0).astype(np.float32)


def make_planted(seed=0, copies=6):
    rng = np.random.default_rng(seed)
    n = N_DONORS * CELLS_PER_DONOR
    donor = np.repeat(np.arange(N_DONORS), CELLS_PER_DONOR)
    # donor 0 is nearly all of type 0: whoever marks the type seems to mark the donor
    share = np.array([[0.8, 0.1, 0.1] if d == 0 else [0.25, 0.4, 0.35] for d in range(N_DONORS)])
    cell_type = np.array([rng.choice(3, p=share[d]) for d in donor])
    rate = np.full((n, N_GENES), 0.25)
    for g in range(12):
        rate[:, g] = np.where(cell_type == g % 3, 0.8, 0.05)
    expressed = rng.random((n, N_GENES)) < rate
    expression = sparse_gamma(rng, expressed)

    columns, meaning, target = [], [], []
    fired = np.zeros((0, N_GENES))
    gene_tokens = expressed.sum(axis=0)

    def add(kind, which, on, off=0.02, where=None):
        nonlocal fired
        fires = rng.random(n) < np.where(where, on, off)
        columns.append(sparse_gamma(rng, fires))
        meaning.append(kind)
        target.append(which)
        fired = np.vstack([fired, rng.binomial(gene_tokens, 0.05)])

    for i in range(copies):
        add("type", i % 3, 0.7, where=cell_type == i % 3)
        add("not-type", i % 3, 0.02, off=0.7, where=cell_type == i % 3)
        add("batch", i % N_DONORS, 0.7, where=donor == i % N_DONORS)
        add("confounded", 0, 0.7, where=cell_type == 0)
        g = 20 + i
        add("gene", g, 1.0, off=0.0, where=expressed[:, g])
        fired[-1] = rng.binomial(gene_tokens, 0.01)
        fired[-1, g] = gene_tokens[g]
        add("noise", -1, 0.1, off=0.1, where=np.zeros(n, bool))
        columns.append(np.zeros(n, np.float32))
        meaning.append("dead")
        target.append(-1)
        fired = np.vstack([fired, np.zeros(N_GENES)])
    donors = np.array([f"d{d}" for d in donor])
    split = np.array(["train", "select", "test"])[np.array([0, 0, 1, 1, 1, 2, 2, 2])[(donor * 3) % N_DONORS]]
    return Planted(
        codes=sparse.csr_array(np.stack(columns, axis=1)),
        expression=sparse.csr_array(expression),
        genes=[f"G{g}" for g in range(N_GENES)],
        cell_type=Labels.from_values("cell_type", np.array(["A", "B", "C"])[cell_type]),
        donor=Labels.from_values("donor", donors),
        batch=Labels.from_values("batch", donors),
        split=split.tolist(),
        meaning=meaning,
        target=target,
        tokens=TokenStatistics(fired=sparse.csr_array(fired.astype(np.int64)), gene_tokens=gene_tokens),
    )


@pytest.fixture(scope="session")
def planted():
    return make_planted()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def messy(rng):
    """Codes with ties, zeros, negatives, a constant and an empty column; four labels; three uneven blocks."""
    n = 90
    codes = rng.integers(0, 4, (n, 8)).astype(float) * (rng.random((n, 8)) < 0.5)
    codes[:, 3] = rng.normal(size=n)
    codes[:, 4] = 0.0
    codes[:, 5] = 2.5
    codes[:, 6] = rng.integers(-2, 3, n)
    label = rng.integers(0, 4, n)
    block = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    return codes, label, block


@pytest.fixture(scope="session")
def plant():
    """`make_planted(seed, copies)`, for tests that need more than one data set."""
    return make_planted


@pytest.fixture(scope="session")
def permute_within():
    """A permutation of the cells that moves none out of its block."""

    def permute(block, rng):
        order = np.arange(block.size)
        for b in np.unique(block):
            rows = np.flatnonzero(block == b)
            order[rows] = rng.permutation(rows)
        return order

    return permute


@pytest.fixture(scope="session")
def correlate():
    """Every feature with every gene over all cells given, as one tile; `within` is a label such as the cell type."""

    def correlations(codes, expression, units=None, within=None):
        blocks = CellBlocks.of(np.ones(codes.shape[0], dtype=bool), units, within)
        return blocks.correlate(blocks.side(codes.tocsc()), blocks.side(expression.tocsc()).by_cell())

    return correlations


@pytest.fixture(scope="session")
def measure_ranges(tmp_path_factory):
    """Measure ranges of features and commit them: `cells` is a CellInputs or the arguments of one, `bounds` are those
    of the ranges.
    """

    def measured(cells, codes, expression, config, *, tokens=None, top_tokens=None, bounds=None):
        cells = cells if isinstance(cells, CellInputs) else CellInputs(**cells)
        bounds = bounds or [0, codes.shape[1]]
        by_gene = expression.tocsc()
        tiles = GeneTiles(lambda start, stop: by_gene[:, start:stop], [0, by_gene.shape[1]], cells.blocks())
        run = MeasuredRun.create(tmp_path_factory.mktemp("measured"), toy_plan(AssociationsPlan), bounds=bounds)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            features = FeatureRange(
                first=start,
                codes=codes[:, start:stop],
                tokens={
                    name: TokenStatistics(fired=counts.fired[start:stop], gene_tokens=counts.gene_tokens)
                    for name, counts in (tokens or {}).items()
                },
                top_tokens=None
                if top_tokens is None
                else top_tokens.filter(pl.col("feature_id").is_between(start, stop, closed="left")),
            )
            run.commit(number, measure(features, cells, tiles, config))
        run.finalize()
        return run

    return measured


@pytest.fixture(scope="session")
def tables_of(measure_ranges):
    """The five tables of ranges of features, by way of the ranges on disk; arguments as `measure_ranges`."""

    def tables(cells, codes, expression, config, **more):
        cells = cells if isinstance(cells, CellInputs) else CellInputs(**cells)
        run = measure_ranges(cells, codes, expression, config, **more)
        return assemble_measured(MeasuredRun.open(run.folder), cells.genes, cells.gene_sets, config)

    return tables
