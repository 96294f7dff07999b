"""Measures of `findings_study`: a feature is chosen on `select` cells, and every reported figure is of `test` cells.

Each figure says how well one column of numbers separates two groups of cells: the AUROC inside strata (cell types), so
that groups of different composition are not separated by their composition. The same code measures the features of an
SAE, single genes and sequencing depth; a feature is worth what it has above the other two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store import FeatureStore
from feature_store.associations import Labels, Strata, auroc, blocked_rank_test
from feature_store.associations.gene_sets import canonical_immune
from feature_store.cells import expression_matrix
from feature_store.codes import CodesRun, load_cell_codes
from pipelines.inputs import load_recorded_source

N_PERMUTATIONS = 999
Q = 0.05
"""False discovery rate at which a feature counts as one of a batch or a cell type."""
MIN_CELLS = 5
"""Least cells on each side for a figure of a donor or a cell type."""
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Columns = sparse.csr_array
"""Cells by the numbers that may separate them: features, genes, or one covariate."""


@dataclass(frozen=True, kw_only=True)
class CellMatrices:
    """Cells with their codes and their expression as matrices, both [n_cells ...]."""

    store: FeatureStore
    cells: pl.DataFrame
    codes: Columns
    expression: Columns
    genes: tuple[str, ...]

    @classmethod
    def open(cls, store: FeatureStore) -> "CellMatrices":
        """The cells of the store's association run, their codes and their log1p(CP10k)."""
        dataset, codes = store.lineage.dataset, store.lineage.codes
        assert dataset is not None
        assert codes is not None
        cells = store.frame("cells").sort("cell_idx").collect()
        with load_recorded_source(store.layout, dataset) as source:
            expression, genes = expression_matrix(source), tuple(source.gene_symbols)
        run = CodesRun.open(store.layout.codes_dir(codes))
        return cls(
            store=store,
            cells=cells,
            codes=load_cell_codes(run, cells["cell_idx"].to_numpy()),
            expression=expression,
            genes=genes,
        )

    def split(self, name: str) -> Bools:
        """The cells of a split [n_cells]."""
        return (self.cells["split"] == name).to_numpy()

    def is_label(self, kind: str, label: str) -> Bools:
        """The cells of a label [n_cells]."""
        return (self.cells[kind].cast(pl.String) == label).fill_null(value=False).to_numpy()

    def strata(self, *kinds: str) -> Labels | None:
        """One label of several columns, None of none."""
        if not kinds:
            return None
        return Labels.from_values(
            "strata", self.cells.select(pl.concat_str(kinds, separator="|")).to_series().to_list()
        )


def separation(columns: Columns, positive: Bools, cells: Bools, within: Labels | None = None) -> Floats:
    """AUROC of each column [n_columns] for `positive` among `cells` (masks [n_cells]), inside the strata given."""
    rows = np.flatnonzero(cells)
    indicator = sparse.csr_array(positive[rows, None].astype(np.float64))
    strata = Strata.of(rows.size, None if within is None else within.take(cells))
    found: Floats = auroc(columns[rows], indicator, strata)[:, 0]
    return found


def permuted(
    column: Columns, positive: Bools, cells: Bools, within: Labels, blocks: Labels, *, seed: int = 0
) -> Floats:
    """The same AUROC of one column under N_PERMUTATIONS shufflings of `positive` inside `blocks`."""
    rows = np.flatnonzero(cells)
    rng = np.random.default_rng(seed)
    block = Strata.of(rows.size, blocks.take(cells)).codes
    order = np.argsort(block, kind="stable")
    drawn = np.empty((rows.size, N_PERMUTATIONS))
    for i in range(N_PERMUTATIONS):
        # sorting by (block, noise) shuffles inside blocks
        drawn[order, i] = positive[rows][np.lexsort((rng.random(rows.size), block))]
    strata = Strata.of(rows.size, within.take(cells))
    found: Floats = auroc(column[rows], sparse.csr_array(drawn), strata)[0]
    return found


def best_by_p(columns: Columns, positive: Bools, cells: Bools, blocks: Labels | None) -> int:
    """The column that is higher in `positive` with the smallest p, blocked by donor."""
    rows = np.flatnonzero(cells)
    strata = Strata.of(rows.size, None if blocks is None else blocks.take(cells))
    z, p = blocked_rank_test(columns[rows], sparse.csr_array(positive[rows, None].astype(np.float64)), strata)
    return int(np.lexsort((-z[:, 0], np.where(z[:, 0] > 0, p[:, 0], 2.0)))[0])


def feature_of_gene_set(store: FeatureStore, gene_set: str) -> int:
    """The first answer of `scsae features --gene-set`: the smallest p of over-representation on `select` cells."""
    return int(store.features_for(gene_set=gene_set)["feature_id"][0])


def genes_inside_types(store: FeatureStore, feature: int, n: int = 10) -> list[str]:
    """Genes that correlate most with a feature inside cell types, on `select` cells."""
    genes = _genes(store, feature).sort("pearson_within_type", descending=True, nulls_last=True)
    return genes["gene"].head(n).to_list()


def firing_on(store: FeatureStore, feature: int, gene_set: str) -> float:
    """The share of a feature's firing, on tokens of `select` cells, that falls on genes of a set."""
    return float(
        _genes(store, feature).filter(pl.col("gene").is_in(_genes_of_set(gene_set)))["identity_precision"].sum()
    )


def _genes(store: FeatureStore, feature: int) -> pl.DataFrame:
    chosen = (pl.col("feature_id") == feature) & (pl.col("split") == "select")
    return store.frame("feature_gene").filter(chosen).collect()


def _genes_of_set(name: str) -> list[str]:
    sets = canonical_immune()
    return list(sets.genes[sets.names.index(name)])


def n_of_set(genes: Sequence[str], gene_set: str) -> int:
    """How many of the genes are in a set of the shipped file."""
    return len(set(genes) & set(_genes_of_set(gene_set)))


def cell_type_table(
    matrices: CellMatrices, kinds: Sequence[tuple[str, str, str]], baselines: Mapping[str, FeatureStore]
) -> pl.DataFrame:
    """A row for each (label kind, label, name of a set of textbook markers): the feature of smallest p on `select`
    cells, its figures on `test` cells, the markers among its ten genes (chosen on `select`), and what the same choice
    is worth among single genes and among the features of each baseline.
    """
    features = matrices.store.frame("features").select("feature_id", "class", "top_genes").collect()
    donors = matrices.strata("donor")
    select, test = matrices.split("select"), matrices.split("test")
    rows = []
    for kind, label, marker_set in kinds:
        chosen, here = _best_feature(matrices.store, kind, label)
        about = features.filter(pl.col("feature_id") == chosen["feature_id"]).row(0, named=True)
        genes = (about["top_genes"] or "").split()
        positive = matrices.is_label(kind, label)
        gene = best_by_p(matrices.expression, positive, select, donors)
        others = {name: _best_feature(store, kind, label)[1]["auroc"] for name, store in baselines.items()}
        rows.append(
            {
                "label": label,
                "feature": chosen["feature_id"],
                "class": about["class"],
                "n": here["n_label"],
                "select AUROC": chosen["auroc"],
                "test AUROC": here["auroc"],
                "test q": here["q"],
                "genes": " ".join(genes[:6]),
                "markers of 10": n_of_set(genes, marker_set),
                "best gene": matrices.genes[gene],
                "gene": float(separation(matrices.expression[:, [gene]], positive, test)[0]),
                **others,
            }
        )
    return pl.DataFrame(rows)


def _best_feature(store: FeatureStore, kind: str, label: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of `feature_label` of smallest p on `select`, positive, and the same feature's on `test`."""
    mine = store.frame("feature_label").filter((pl.col("label_kind") == kind) & (pl.col("label") == label)).collect()
    candidates = mine.filter((pl.col("split") == "select") & (pl.col("auroc") > 0.5))
    chosen = candidates.sort("p", "feature_id").row(0, named=True)
    same = (pl.col("split") == "test") & (pl.col("feature_id") == chosen["feature_id"])
    return chosen, mine.filter(same).row(0, named=True)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How one column of numbers, chosen on `select` donors, separates stimulated from control cells of `test` donors.

    Attributes:
        name: feature id, gene or covariate.
        select, test: AUROC inside cell types.
        pooled: AUROC of all test cells together.
        by_type, by_donor: AUROC of each cell type, and of each donor inside cell types, that has cells enough.
        p_permutation, highest_permuted: of the test AUROC, labels shuffled inside donor and cell type.
    """

    name: str
    select: float
    test: float
    pooled: float
    by_type: dict[str, float]
    by_donor: dict[str, float]
    p_permutation: float
    highest_permuted: float


def detect(
    matrices: CellMatrices, columns: Columns, names: Sequence[str], *, kind: str, label: str, chosen: int | None = None
) -> Detection:
    """Test a column for a label: the one `chosen`, else the one that is highest inside cell types on `select`."""
    positive, types = matrices.is_label(kind, label), matrices.strata("cell_type")
    select, test = matrices.split("select"), matrices.split("test")
    assert types is not None
    on_select = separation(columns, positive, select, types)
    if chosen is None:
        chosen = int(np.nanargmax(on_select))
    column = columns[:, [chosen]].tocsr()
    here = float(separation(column, positive, test, types)[0])
    blocks = matrices.strata("donor", "cell_type")
    assert blocks is not None
    null = permuted(column, positive, test, types, blocks)
    return Detection(
        name=names[chosen],
        select=float(on_select[chosen]),
        test=here,
        pooled=float(separation(column, positive, test)[0]),
        by_type=_each(matrices, column, positive, test, "cell_type", None),
        by_donor=_each(matrices, column, positive, test, "donor", types),
        p_permutation=float((1 + (null >= here).sum()) / (1 + null.size)),
        highest_permuted=float(null.max()),
    )


def _each(
    matrices: CellMatrices, column: Columns, positive: Bools, cells: Bools, kind: str, within: Labels | None
) -> dict[str, float]:
    """AUROC among the cells of each value of `kind` that has MIN_CELLS on both sides."""
    found = {}
    for value in sorted(set(matrices.cells[kind].to_list())):
        here = cells & matrices.is_label(kind, value)
        if min((here & positive).sum(), (here & ~positive).sum()) >= MIN_CELLS:
            found[value] = float(separation(column, positive, here, within)[0])
    return found


@dataclass(frozen=True, kw_only=True)
class BatchAndTypeTests:
    """How features separate a batch and cell types, and how sequencing depth alone separates the batch.

    Attributes:
        batch: a row a feature: q on `select`, p on `test`, AUROC of the batch inside types on both, and inside type and
            quartile of detected genes on `test`.
        type: the type of smallest q on `select`, that q, its p on `test`, and its AUROC inside batches on both.
        depth: test AUROC of the batch inside types, by covariate of the cell table.
        pairs_at_depth: pairs of a cell of the batch and another in the same type and quartile, and in the same type.
        gene: the best single gene for the batch on `select`, and its test AUROC.
    """

    batch: pl.DataFrame
    type: pl.DataFrame
    depth: dict[str, float]
    pairs_at_depth: tuple[int, int]
    gene: tuple[str, float]

    def of_batch(self) -> Bools:
        """Features that separate the batch on `select` at q <= Q."""
        return (self.batch["q"] <= Q).to_numpy()

    def of_type(self) -> Bools:
        """Features that separate some cell type on `select` at q <= Q."""
        return (self.type["q"] <= Q).to_numpy()


def batch_and_type_tests(
    matrices: CellMatrices, batch: str, covariates: Sequence[str] = ("n_counts", "n_genes")
) -> BatchAndTypeTests:
    """How features separate one batch inside cell types, and cell types inside batches."""
    positive, types, batches = matrices.is_label("batch", batch), matrices.strata("cell_type"), matrices.strata("batch")
    select, test = matrices.split("select"), matrices.split("test")
    assert types is not None
    n_genes = matrices.cells["n_genes"].to_numpy()
    quartile = np.digitize(n_genes, np.quantile(n_genes, [0.25, 0.5, 0.75]), right=True)
    at_depth = Labels.from_values(
        "depth", [f"{a}|{b}" for a, b in zip(matrices.cells["cell_type"], quartile, strict=True)]
    )
    tests = matrices.store.frame("feature_label").collect()
    of_batch = label_of_smallest_q(tests.filter((pl.col("label_kind") == "batch") & (pl.col("label") == batch)))
    of_type = label_of_smallest_q(tests.filter(pl.col("label_kind") == "cell_type"))
    names = of_type["label"].to_list()
    inside = {
        (name, part): separation(matrices.codes, matrices.is_label("cell_type", name), mask, batches)
        for name in set(names)
        for part, mask in (("select", select), ("test", test))
    }
    gene = int(np.nanargmax(np.abs(separation(matrices.expression, positive, select, types) - 0.5)))
    return BatchAndTypeTests(
        batch=of_batch.with_columns(
            select=separation(matrices.codes, positive, select, types),
            test=separation(matrices.codes, positive, test, types),
            at_depth=separation(matrices.codes, positive, test, at_depth),
        ),
        type=of_type.with_columns(
            pl.Series(part, [float(inside[name, part][i]) for i, name in enumerate(names)])
            for part in ("select", "test")
        ),
        depth={
            name: float(separation(_as_column(matrices.cells[name]), positive, test, types)[0]) for name in covariates
        },
        pairs_at_depth=(n_pairs(positive, test, at_depth), n_pairs(positive, test, types)),
        gene=(matrices.genes[gene], float(separation(matrices.expression[:, [gene]], positive, test, types)[0])),
    )


def label_of_smallest_q(tests: pl.DataFrame) -> pl.DataFrame:
    """A row a feature: its label of smallest q (then p) on `select`, and that label's p on `test`."""
    select = tests.filter(pl.col("split") == "select").sort("feature_id", "q", "p", "label")
    chosen = select.unique("feature_id", keep="first", maintain_order=True).select("feature_id", "label", "q")
    test = tests.filter(pl.col("split") == "test").select("feature_id", "label", p_test="p")
    return chosen.join(test, on=["feature_id", "label"], how="left", maintain_order="left")


def holds_on_test(table: pl.DataFrame) -> Bools:
    """Whether the association of each feature is on the same side on `test` as on `select`, with p <= Q."""
    same = (pl.col("select") - 0.5) * (pl.col("test") - 0.5) > 0
    found: Bools = table.select(same & (pl.col("p_test") <= Q)).to_series().to_numpy()
    return found


def n_pairs(positive: Bools, cells: Bools, within: Labels) -> int:
    """Pairs of a positive cell and another of its stratum among `cells`: what an AUROC inside strata compares."""
    stratum = Strata.of(int(cells.sum()), within.take(cells)).codes
    with_label = np.bincount(stratum[positive[cells]], minlength=stratum.max() + 1)
    return int((with_label * (np.bincount(stratum) - with_label)).sum())


def _as_column(values: pl.Series) -> Columns:
    return sparse.csr_array(values.to_numpy().astype(np.float64)[:, None])
