"""The five tables of the store from what was measured of each range of features.

Everything is chosen on `select` and reported on `select` and `test`: thresholds, the genes of a feature (for its text
and its gene sets), its top label. Classes and scales use the cells that are not test cells (`train` cells were seen
by the SAE, without labels).
q is Benjamini-Hochberg over ALL tests of a table and split, also of pairs that are not stored: of features x genes and
features x sets only pairs that somebody could ask for are kept (`AssociationConfig`), or the table of an atlas would be
gigabytes of noise. q is a step function of p, so all p are sorted once and each stored pair looks its q up.
Cost: 16 bytes a test of features x genes of each split (4096 x 2000: 131 MB), the pairs of one range, and the other
tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import polars as pl

from feature_store.associations.enrichment import METHOD as SET_METHOD
from feature_store.associations.enrichment import over_representation
from feature_store.associations.familywise import family_wise, merge_minima
from feature_store.associations.gene_sets import GeneSets
from feature_store.associations.genes import METHOD as GENE_METHOD
from feature_store.associations.genes import GeneTiles
from feature_store.associations.inputs import Bools, Floats, Sparse, as_csr
from feature_store.associations.measure import (
    AssociationConfig,
    CellInputs,
    FeatureRange,
    Measured,
    largest,
    measure,
    names_of,
)
from feature_store.associations.pvalues import benjamini_hochberg
from feature_store.associations.tokens import TokenStatistics
from feature_store.errors import InputError
from feature_store.storage import schemas

MIN_LABEL_CELLS = 5


class MeasuredRanges(Protocol):
    """What was measured, range by range: a run on disk, or `InMemory`."""

    @property
    def bounds(self) -> Sequence[int]:
        """Where the ranges of features begin, and the number of features."""

    def read(self, table: str, number: int) -> pl.DataFrame:
        """One table of `Measured` of one range."""


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """Measured ranges that are held in memory."""

    bounds: Sequence[int]
    ranges: Sequence[Measured]

    def read(self, table: str, number: int) -> pl.DataFrame:
        """See MeasuredRanges."""
        frame: pl.DataFrame = getattr(self.ranges[number], table)
        return frame


@dataclass(frozen=True, kw_only=True)
class AssociationInputs(CellInputs):
    """Everything of one codes run in memory; rows are the cells in one order throughout.

    codes CSR [n_cells n_features]; expression CSR [n_cells n_genes] of log1p(CP10k); token counts by split on the same
    gene axis; top_tokens with the columns of `feature_token`.
    """

    codes: Sparse
    expression: Sparse
    tokens: Mapping[str, TokenStatistics] = field(default_factory=dict)
    top_tokens: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        n_cells, n_features = self.codes.shape
        if len(self.split) != n_cells or self.expression.shape != (n_cells, len(self.genes)):
            raise InputError(
                f"associations: codes have {n_cells} cells, split {len(self.split)}, "
                f"expression {self.expression.shape}, genes {len(self.genes)}; cells and genes have to agree"
            )
        super().__post_init__()
        for name, tokens in self.tokens.items():
            if tokens.fired.shape != (n_features, len(self.genes)):
                raise InputError(f"tokens of {name!r}: {tokens.fired.shape}, expected {(n_features, len(self.genes))}")


def assemble(
    inputs: AssociationInputs, config: AssociationConfig | None = None, *, bounds: Sequence[int] | None = None
) -> dict[str, pl.DataFrame]:
    """The tables features, feature_label, feature_gene, feature_geneset, feature_token, sorted and conformed to their
    schemas: measured in memory, as one range of features or as those that `bounds` cuts.

    Raises InputError for arrays that do not fit together or are not finite.
    """
    codes = as_csr(inputs.codes, "codes").tocsc()
    expression = as_csr(inputs.expression, "expression").tocsc()
    bounds = bounds or [0, codes.shape[1]]
    tiles = GeneTiles(lambda start, stop: expression[:, start:stop], [0, expression.shape[1]], inputs.blocks())
    ranges = []
    for start, stop in pairwise(bounds):
        own = FeatureRange(
            first=start,
            codes=codes[:, start:stop].tocsr(),
            tokens={name: tokens.of_features(start, stop) for name, tokens in inputs.tokens.items()},
            top_tokens=None
            if inputs.top_tokens is None
            else inputs.top_tokens.filter(pl.col("feature_id").is_between(start, stop, closed="left")),
        )
        ranges.append(measure(own, inputs, tiles, config))
    return assemble_measured(InMemory(bounds=bounds, ranges=ranges), inputs.genes, inputs.gene_sets, config)


def assemble_measured(
    measured: MeasuredRanges,
    genes: Sequence[str],
    gene_sets: Sequence[GeneSets] = (),
    config: AssociationConfig | None = None,
    *,
    keep_pairs: Callable[[int, pl.DataFrame], object] | None = None,
) -> dict[str, pl.DataFrame]:
    """The same tables from measured ranges of features.

    keep_pairs(number, rows) takes the rows of `feature_gene` of each range in order, and the table is left out: it is
    the largest by far, as the genes of a cell go together.
    """
    config = config or AssociationConfig()
    splits = {row["split"]: _Split.of(row) for row in measured.read("splits", 0).iter_rows(named=True)}
    labels = _label_table(measured)
    genes_of = _Genes(measured, splits, genes, config)
    texts, sets = [], _Sets(gene_sets, genes, splits, config)
    pairs: list[pl.DataFrame] = []
    for number in range(len(measured.bounds) - 1):
        found = genes_of.read(number)
        rows = schemas.conform("feature_gene", found.rows)
        if keep_pairs is None:
            pairs.append(rows)
        else:
            keep_pairs(number, rows)
        texts.append(found.texts)
        sets.add(measured.read("sets", number), found.chosen, measured.bounds[number])
    tables = {
        "features": _features_table(measured, pl.concat(texts), labels),
        "feature_label": labels,
        "feature_geneset": sets.table(),
        "feature_token": _all(measured, "tokens"),
    }
    finished = {
        name: schemas.conform(name, frame) if frame.width else schemas.empty(name) for name, frame in tables.items()
    }
    return finished | ({"feature_gene": pl.concat(pairs)} if keep_pairs is None else {})


class _Split(NamedTuple):
    """What the rows of a split share."""

    n: int
    n_donors: int | None
    n_cells: Floats

    @classmethod
    def of(cls, row: Mapping[str, object]) -> "_Split":
        return cls(row["n"], row["n_donors"], np.array(row["n_cells"], dtype=np.float64))  # type: ignore[arg-type]

    @property
    def detected(self) -> Bools:
        """Genes that any cell expresses [n_genes]."""
        answer: Bools = self.n_cells > 0
        return answer


class _RangeGenes(NamedTuple):
    """Rows of `feature_gene` of a range of features, the texts of its features, and their genes by split
    [n_features n_genes].
    """

    rows: pl.DataFrame
    texts: pl.DataFrame
    chosen: dict[str, Bools]


class _Genes:
    """Pairs of features and genes with their q."""

    def __init__(
        self,
        measured: MeasuredRanges,
        splits: Mapping[str, _Split],
        genes: Sequence[str],
        config: AssociationConfig,
    ) -> None:
        self._measured, self._splits, self._genes, self._config = measured, splits, genes, config
        self._names = pl.Series("gene", genes, dtype=pl.String)
        # a gene's place among the names in order, as rows are sorted by name
        self._rank = np.argsort(np.argsort(np.array(genes, dtype=object), kind="stable"), kind="stable")
        self._q = {split: _q_of_all(measured, split) for split in splits}

    def read(self, number: int) -> _RangeGenes:
        """What is kept of one range."""
        bounds, alpha = self._measured.bounds, self._config.alpha
        first, n_features = bounds[number], bounds[number + 1] - bounds[number]
        shape = (n_features, len(self._genes))
        pairs = self._measured.read("pairs", number)
        parts = {
            split: part.with_columns(q=q_of(part["p"].to_numpy()))
            for split, q_of in self._q.items()
            for part in [pairs.filter(pl.col("split") == split)]
        }
        kept, best, chosen = np.zeros(shape, dtype=bool), np.zeros(shape), {}
        for split, part in parts.items():
            place, found = (part["feature_id"].to_numpy() - first, part["gene_idx"].to_numpy()), part["q"] <= alpha
            score = np.zeros(shape)
            score[place] = np.where(found & (part["spearman"] > 0), part["pearson"], 0.0)
            chosen[split] = largest(score, self._config.n_genes)
            if split == "select":
                kept[place] = found | part["kept"]
                best = np.where(chosen[split], score, 0.0)
        texts = pl.DataFrame(
            {
                "feature_id": pl.Series(np.arange(first, first + n_features), dtype=pl.Int32),
                "top_genes": pl.Series(names_of(best, self._genes, 10), dtype=pl.String),
            }
        )
        return _RangeGenes(self._rows(parts, kept, first), texts, chosen)

    def _rows(self, parts: Mapping[str, pl.DataFrame], kept: Bools, first: int) -> pl.DataFrame:
        """The rows of kept pairs, by feature, gene and split."""
        wanted = []
        for part in parts.values():
            place = part["feature_id"].to_numpy() - first, part["gene_idx"].to_numpy()
            wanted.append(part.filter(pl.Series(kept[place])))
        rows = pl.concat(wanted)
        # names are slow to sort by: the places of feature, gene and split as one number
        split = np.repeat(np.argsort(np.argsort(list(parts))), [part.height for part in wanted])
        gene = self._rank[rows["gene_idx"].to_numpy()]
        order = np.argsort(
            ((rows["feature_id"].to_numpy() - first) * self._rank.size + gene) * len(parts) + split, kind="stable"
        )
        rows = rows[order]
        named = rows.with_columns(
            self._names.gather(rows["gene_idx"]), *_of_split(self._splits), pl.lit(GENE_METHOD).alias("method")
        )
        return named.select(
            "feature_id",
            "gene",
            "split",
            "identity_precision",
            "identity_recall",
            "lift",
            "pearson",
            "pearson_within_type",
            "spearman",
            "n",
            "n_donors",
            "nnz",
            "p",
            "q",
            "method",
        )


def _q_of_all(measured: MeasuredRanges, split: str) -> Callable[[Floats], Floats]:
    """Benjamini-Hochberg's q as a function of p, over all features x genes tests of a split."""
    parts = [
        measured.read("tests", number).filter(pl.col("split") == split)["p"].to_numpy()
        for number in range(len(measured.bounds) - 1)
    ]
    p = np.concatenate(parts)
    p.sort()
    q = p.copy()
    for start in range(0, q.size, 1 << 20):
        stop = min(start + (1 << 20), q.size)
        q[start:stop] = q[start:stop] * q.size / np.arange(start + 1, stop + 1)
    backwards = q[::-1]
    np.minimum.accumulate(backwards, out=backwards)
    np.minimum(q, 1.0, out=q)

    def look_up(values: Floats) -> Floats:
        # searching in order is 4 times as fast; equal p share the q of the last of them
        order = np.argsort(values)
        found = np.empty(values.size)
        found[order] = q[np.searchsorted(p, values[order])]
        return found

    return look_up


def _all(measured: MeasuredRanges, table: str) -> pl.DataFrame:
    """A table of all ranges, one below the other; without columns where no range has any."""
    parts = _parts(measured, table)
    return pl.concat(parts) if parts else pl.DataFrame()


def _parts(measured: MeasuredRanges, table: str) -> list[pl.DataFrame]:
    """A table of each range that has it."""
    parts = (measured.read(table, number) for number in range(len(measured.bounds) - 1))
    return [part for part in parts if part.width]


def _label_table(measured: MeasuredRanges) -> pl.DataFrame:
    table = _all(measured, "labels")
    if not table.width:
        return table
    table = family_wise(table, merge_minima(_parts(measured, "minima")))
    q = pl.col("p").map_batches(_q, return_dtype=pl.Float64).over("split")
    return table.with_columns(q=q).sort("feature_id", "label_kind", "label", "split")


def _of_split(splits: Mapping[str, _Split]) -> list[pl.Expr]:
    """The columns n and n_donors from the column split."""
    return [
        pl.col("split")
        .replace_strict(list(splits), [getattr(s, name) for s in splits.values()], return_dtype=pl.Int64)
        .alias(name)
        for name in ("n", "n_donors")
    ]


class _Sets:
    """Gene sets of all features: the rows that may be kept, and every p for the corrections."""

    def __init__(
        self,
        gene_sets: Sequence[GeneSets],
        genes: Sequence[str],
        splits: Mapping[str, _Split],
        config: AssociationConfig,
    ) -> None:
        self._sets, self._splits, self._config = gene_sets, splits, config
        self._membership = [sets.membership(genes) for sets in gene_sets]
        self._frames: list[pl.DataFrame] = []

    def add(self, ranks: pl.DataFrame, chosen: Mapping[str, Bools], first: int) -> None:
        """Test the genes of a range's features; `ranks` has its rank tests."""
        for split, shared in self._splits.items():
            mine = chosen[split]
            n_mine = (mine & shared.detected).sum(axis=1)
            for place, membership in enumerate(self._membership):
                over = over_representation(mine, membership, shared.detected, shared.n_cells)
                n_set = np.asarray(membership[np.flatnonzero(shared.detected)].sum(axis=0)).ravel()
                rows = ranks.filter((pl.col("split") == split) & (pl.col("collection") == place))
                self._frames.append(
                    rows.with_columns(
                        overlap=over.overlap.ravel(),
                        n_set=np.tile(n_set, mine.shape[0]).astype(np.int64),
                        n_genes=np.repeat(n_mine, n_set.size),
                        odds_ratio=over.odds_ratio.ravel(),
                        p=over.p.ravel(),
                        p_matched=over.p_matched.ravel(),
                    )
                )

    def table(self) -> pl.DataFrame:
        """The rows of `feature_geneset`: of a pair with an overlap, or ranks that stand out, on any split."""
        if not self._frames:
            return pl.DataFrame()
        table = pl.concat(self._frames).with_columns(
            q=pl.col("p").map_batches(_q, return_dtype=pl.Float64).over("split"),
            q_matched=pl.col("p_matched").map_batches(_q, return_dtype=pl.Float64).over("split"),
            q_rank=pl.col("p_rank").map_batches(_q, return_dtype=pl.Float64).over("split"),
        )
        keys = ["feature_id", "collection", "gene_set"]
        wanted = pl.any_horizontal(pl.col("overlap") > 0, pl.col("q_rank") <= self._config.alpha).any().over(keys)
        named = pl.DataFrame(
            {
                "collection": pl.Series([c for c, s in enumerate(self._sets) for _ in s.names], dtype=pl.Int32),
                "gene_set": pl.Series([i for s in self._sets for i, _ in enumerate(s.names)], dtype=pl.Int32),
                "collection_name": pl.Series([s.collection for s in self._sets for _ in s.names], dtype=pl.String),
                "set_name": pl.Series([name for s in self._sets for name in s.names], dtype=pl.String),
            }
        )
        kept = table.filter(wanted).join(named, on=["collection", "gene_set"], how="left")
        return kept.select(
            "feature_id",
            pl.col("collection_name").alias("collection"),
            pl.col("set_name").alias("gene_set"),
            "split",
            "overlap",
            "n_set",
            "n_genes",
            "odds_ratio",
            "rank_biserial",
            pl.col("split")
            .replace_strict(
                list(self._splits), [int(s.detected.sum()) for s in self._splits.values()], return_dtype=pl.Int64
            )
            .alias("n"),
            _of_split(self._splits)[1],
            "p",
            "p_matched",
            "p_rank",
            pl.lit(SET_METHOD).alias("method"),
            "q",
            "q_matched",
            "q_rank",
        ).sort(*keys, "split")


def _features_table(measured: MeasuredRanges, texts: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    table = _all(measured, "features").join(texts, on="feature_id", how="left")
    # genes by expression before genes by identity
    table = table.select(pl.exclude("top_identity_genes"), "top_identity_genes")
    return table.join(_top_label(labels), on="feature_id", how="left").sort("feature_id")


def _top_label(labels: pl.DataFrame) -> pl.DataFrame:
    """Per feature the label (not a batch) with the largest select AUROC among labels with enough cells, and its test
    AUROC.
    """
    columns = {"top_label": pl.String, "top_label_kind": pl.String, "top_label_auroc_select": pl.Float64}
    if labels.is_empty():
        return pl.DataFrame(schema={"feature_id": pl.Int32, **columns, "top_label_auroc": pl.Float64})
    keys = ["feature_id", "label_kind", "label"]
    usable = (pl.col("n_label") >= MIN_LABEL_CELLS) & (pl.col("label_kind") != "batch") & (pl.col("auroc") > 0.5)
    best = (
        labels.filter((pl.col("split") == "select") & usable)
        .sort("feature_id", "auroc", "label_kind", "label", descending=[False, True, False, False])
        .unique("feature_id", keep="first", maintain_order=True)
    )
    test = labels.filter(pl.col("split") == "test").select(*keys, pl.col("auroc").alias("top_label_auroc"))
    return best.join(test, on=keys, how="left").select(
        "feature_id",
        pl.col("label").alias("top_label"),
        pl.col("label_kind").alias("top_label_kind"),
        pl.col("auroc").alias("top_label_auroc_select"),
        "top_label_auroc",
    )


def _q(p: pl.Series) -> pl.Series:
    return pl.Series(benjamini_hochberg(p.to_numpy()))
