"""Everything that can be said of a range of features without the other features.

Ranks need all cells of a feature, so the codes are not cut by cells; but no statistic of a feature needs another
feature, until it is corrected for how many were tested (`assemble`). So the work is cut into ranges of features: a
range holds its own codes for all cells, and walks over the expression one range of genes at a time. What a feature gets
is the same to the bit however the ranges are cut.

What leaves a range is small: rows of labels, classes and gene sets; all p of features x genes as bare numbers, as the
correction is over all tests; and of the pairs themselves those that somebody could still ask for.
Cost: 256 features with 400 thousand nonzeros in 50 thousand cells, 2,000 genes and 46 labels take 7.5 CPU seconds;
codes that fire everywhere take 3.7 seconds a million nonzeros. Memory: 140 bytes a nonzero of the range's codes, 80
bytes a pair of a feature and a gene (two splits), and the expression that is kept (`genes.KEPT_BYTES`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from feature_store.associations.batch import associate_batch
from feature_store.associations.classes import ClassConfig, classify
from feature_store.associations.enrichment import rank_enrichment
from feature_store.associations.familywise import Replicates, merge_minima
from feature_store.associations.gene_sets import GeneSets
from feature_store.associations.genes import CellBlocks, Expression, GeneTiles, Identity, identity
from feature_store.associations.inputs import Bools, Floats, Ints, Labels, Sparse
from feature_store.associations.labels import LabelRows, associate_labels
from feature_store.associations.tokens import TokenStatistics
from feature_store.errors import InputError
from feature_store.storage import schemas

REPORTED = ("select", "test")


@dataclass(frozen=True, kw_only=True)
class AssociationConfig:
    """What is kept and how a feature's genes are defined."""

    alpha: float = 0.05
    """False discovery rate at which a gene counts as associated and a pair is kept."""
    n_genes: int = 30
    """A feature's genes: at most so many, positively correlated, q <= alpha on the split, by Pearson."""
    n_kept: int = 20
    """Pairs of a feature kept whatever their q: the strongest correlations, and the genes it fires on most."""
    n_tokens: int = 20
    """Top-activating tokens kept per feature."""
    classes: ClassConfig = field(default_factory=ClassConfig)
    replicates: Replicates = field(default_factory=Replicates)
    """Permutations of the labels behind p_max."""

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and min(self.n_genes, self.n_kept, self.n_tokens) >= 1):
            raise InputError(f"{self}: alpha is in (0, 1), the counts are at least 1")


@dataclass(frozen=True, kw_only=True)
class CellInputs:
    """What every range of features shares: the cells with their labels, the genes and the gene sets.

    split [n_cells] of train / select / test; labels of any kinds, where "batch" is tested within "cell_type"; units:
    the replicate unit (donor, else batch); genes: the names of the columns of the expression.
    """

    split: Sequence[str]
    genes: Sequence[str]
    labels: Sequence[Labels] = ()
    units: Labels | None = None
    gene_sets: Sequence[GeneSets] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.split) - set(schemas.SPLITS))
        if unknown or "select" not in self.split:
            raise InputError(
                f"associations: splits are {sorted(set(self.split))}; allowed are {schemas.SPLITS}, and some cells "
                "have to be `select`, as thresholds and genes are chosen there"
            )
        for labels in (*self.labels, *([self.units] if self.units else [])):
            if labels.n_cells != self.n_cells:
                raise InputError(f"labels {labels.kind!r}: {labels.n_cells} cells, the codes have {self.n_cells}")

    @property
    def n_cells(self) -> int:
        """Cells of all splits."""
        return len(self.split)

    def label(self, kind: str) -> Labels | None:
        """The labels of a kind, None where there are none."""
        return next((labels for labels in self.labels if labels.kind == kind), None)

    def masks(self) -> dict[str, Bools]:
        """Cells of each reported split that has any."""
        split = np.asarray(self.split, dtype=object)
        return {name: mask for name in REPORTED if (mask := split == name).any()}

    def blocks(self) -> dict[str, CellBlocks]:
        """The cells of each reported split as the correlations want them."""
        return {name: CellBlocks.of(mask, self.units, self.label("cell_type")) for name, mask in self.masks().items()}


@dataclass(frozen=True, kw_only=True)
class FeatureRange:
    """The features [first, first + n): codes CSR [n_cells n], token counts by split [n n_genes], and top-activating
    tokens with the columns of `feature_token`.
    """

    first: int
    codes: Sparse
    tokens: Mapping[str, TokenStatistics] = field(default_factory=dict)
    top_tokens: pl.DataFrame | None = None


class Measured(NamedTuple):
    """The tables of one range.

    features: classes, densities, scales, top_identity_genes; labels: rows of `feature_label` without q and p_max;
    minima: of p under permuted labels (`familywise`); pairs: candidates of `feature_gene` (`_pair_rows`); tests: split,
    p of all features x genes, ascending; sets: feature_id, collection, gene_set (places), split, rank_biserial, p_rank;
    tokens: `feature_token`; splits: a row a split: n, n_donors, n_cells (expressing each gene), the same in all ranges.
    """

    features: pl.DataFrame
    labels: pl.DataFrame
    minima: pl.DataFrame
    pairs: pl.DataFrame
    tests: pl.DataFrame
    sets: pl.DataFrame
    tokens: pl.DataFrame
    splits: pl.DataFrame


class _GeneSplit(NamedTuple):
    """Gene associations of one split, each [n n_genes], and how many of its cells express each gene [n_genes]."""

    expression: Expression
    identity: Identity | None
    n_cells: Ints


def measure(
    features: FeatureRange, cells: CellInputs, tiles: GeneTiles, config: AssociationConfig | None = None
) -> Measured:
    """Measure one range of features. Raises InputError for token counts of another gene axis."""
    config = config or AssociationConfig()
    genes = _gene_splits(features, cells, tiles)
    first = features.first
    labels = _label_rows(features, cells, config.replicates)
    return Measured(
        features=_feature_rows(features, cells, genes["select"].identity, config),
        labels=labels.table,
        minima=labels.minima,
        pairs=_pair_rows(genes, first, config),
        tests=pl.concat([_split_frame(name, p=np.sort(s.expression.p, axis=None)) for name, s in genes.items()]),
        sets=_set_rows(genes, cells, first),
        tokens=_token_rows(features.top_tokens, config),
        splits=_split_rows(genes, tiles),
    )


def _gene_splits(features: FeatureRange, cells: CellInputs, tiles: GeneTiles) -> dict[str, _GeneSplit]:
    shape = (features.codes.shape[1], tiles.n_genes)
    by_feature = features.codes.tocsc()
    sides = {name: b.side(by_feature[np.flatnonzero(b.rows)]) for name, b in tiles.blocks.items()}
    results, n_cells = {}, {}
    for name, blocks in tiles.blocks.items():
        within = None if blocks.inside is None else np.zeros(shape)
        results[name] = Expression(np.zeros(shape), np.zeros(shape), within, np.ones(shape), np.zeros(shape))
        n_cells[name] = np.zeros(tiles.n_genes, dtype=np.int64)
    for tile in tiles:
        for name, blocks in tiles.blocks.items():
            found = blocks.correlate(sides[name], tile.sides[name])
            for whole, part in zip(results[name], found, strict=True):
                if whole is not None:
                    whole[:, tile.genes] = part
            n_cells[name][tile.genes] = tile.n_cells[name]
    for name, tokens in features.tokens.items():
        if tokens.fired.shape != shape:
            raise InputError(f"tokens of {name!r}: {tokens.fired.shape}, expected {shape}")
    known = {name: identity(features.tokens[name]) for name in results if name in features.tokens}
    return {name: _GeneSplit(result, known.get(name), n_cells[name]) for name, result in results.items()}


def _pair_rows(genes: Mapping[str, _GeneSplit], first: int, config: AssociationConfig) -> pl.DataFrame:
    """Pairs that may be in `feature_gene`, or among a feature's genes, whatever q will be (q >= p).

    feature_id, gene_idx, split, `kept` (kept whatever its q), then the columns of `feature_gene`.
    """
    chosen = genes["select"]
    kept = largest(np.abs(chosen.expression.pearson), config.n_kept)
    if chosen.identity is not None:
        kept |= largest(chosen.identity.precision, config.n_kept)
    pairs = kept | (chosen.expression.p <= config.alpha)
    frames = []
    for name, split in genes.items():
        found = split.expression
        positive = (found.p <= config.alpha) & (found.spearman > 0) & (found.pearson > 0)
        feature, gene = np.nonzero(pairs | positive)
        values = {f: None if split.identity is None else getattr(split.identity, f) for f in Identity._fields}
        columns = {
            "identity_precision": values["precision"],
            "identity_recall": values["recall"],
            "lift": values["lift"],
            "pearson": found.pearson,
            "pearson_within_type": found.within,
            "spearman": found.spearman,
            "nnz": found.n_both,
            "p": found.p,
        }
        frames.append(
            _split_frame(
                name,
                feature_id=(feature + first).astype(np.int32),
                gene_idx=gene.astype(np.int32),
                kept=kept[feature, gene],
                **{
                    column: pl.Series([None], dtype=pl.Float64).new_from_index(0, feature.size)
                    if matrix is None
                    else matrix[feature, gene]
                    for column, matrix in columns.items()
                },
            )
        )
    return pl.concat(frames)


def _label_rows(features: FeatureRange, cells: CellInputs, replicates: Replicates) -> LabelRows:
    codes, masks, first = features.codes, cells.masks(), features.first
    found = []
    for labels in cells.labels:
        if labels.kind == "batch":
            cell_type = cells.label("cell_type")
            rows = associate_batch(
                codes, labels, masks, cell_type, units=cells.units, first_feature=first, replicates=replicates
            )
        else:
            rows = associate_labels(codes, labels, masks, cells.units, first_feature=first, replicates=replicates)
        found += [rows] if rows.table.height else []
    if not found:
        return LabelRows(pl.DataFrame(), pl.DataFrame())
    return LabelRows(pl.concat(rows.table for rows in found), merge_minima([rows.minima for rows in found]))


def _set_rows(genes: Mapping[str, _GeneSplit], cells: CellInputs, first: int) -> pl.DataFrame:
    """Rows of all features x sets; `gene_set` is the place of the set in its collection."""
    frames = []
    for name, split in genes.items():
        for place, sets in enumerate(cells.gene_sets):
            ranks = rank_enrichment(split.expression.pearson, sets.membership(cells.genes), split.n_cells > 0)
            n_features, n_sets = ranks.p.shape
            frames.append(
                _split_frame(
                    name,
                    feature_id=np.repeat(np.arange(first, first + n_features, dtype=np.int32), n_sets),
                    collection=np.full(ranks.p.size, place, dtype=np.int32),
                    gene_set=np.tile(np.arange(n_sets, dtype=np.int32), n_features),
                    rank_biserial=pl.Series(ranks.rank_biserial.ravel()).fill_nan(None),
                    p_rank=ranks.p.ravel(),
                )
            )
    return pl.concat(frames) if frames else pl.DataFrame()


def _token_rows(top: pl.DataFrame | None, config: AssociationConfig) -> pl.DataFrame:
    if top is None:
        return pl.DataFrame()
    by = ["feature_id", "value", "cell_idx", "token_pos"]
    # special tokens are no gene's
    ranked = top.drop_nulls("gene").sort(by, descending=[False, True, False, False])
    return ranked.group_by("feature_id", maintain_order=True).head(config.n_tokens)


def _split_rows(genes: Mapping[str, _GeneSplit], tiles: GeneTiles) -> pl.DataFrame:
    frames = [
        _split_frame(
            name,
            n=[tiles.blocks[name].n],
            n_donors=pl.Series([tiles.blocks[name].n_units], dtype=pl.Int64),
            n_cells=[split.n_cells.tolist()],
        )
        for name, split in genes.items()
    ]
    return pl.concat(frames)


def _split_frame(split: str, **columns: Any) -> pl.DataFrame:
    frame = pl.DataFrame(columns)
    return frame.insert_column(0, pl.repeat(split, frame.height, eager=True).alias("split"))


def _feature_rows(
    features: FeatureRange, cells: CellInputs, known: Identity | None, config: AssociationConfig
) -> pl.DataFrame:
    """The columns of `features` that need no correction."""
    codes, split = features.codes, np.asarray(cells.split, dtype=object)
    tokens = list(features.tokens.values())
    fired = sum(t.feature_tokens for t in tokens) if tokens else None
    n_tokens = sum(t.n_tokens for t in tokens)
    n_fires = np.bincount(codes.indices, minlength=codes.shape[1])
    cell_density = n_fires / max(codes.shape[0], 1)
    density = cell_density if fired is None else np.asarray(fired) / max(n_tokens, 1)
    dead = (n_fires == 0) & (density == 0)
    open_cells = split != "test"
    merged = None
    for t in (t for name, t in features.tokens.items() if name != "test"):
        merged = t if merged is None else merged + t
    classes = classify(
        codes[np.flatnonzero(open_cells)],
        [x.take(open_cells) for x in cells.labels if x.kind != "batch"],
        b.take(open_cells) if (b := cells.label("batch")) else None,
        merged,
        units=cells.units.take(open_cells) if cells.units else None,
        dead=dead,
        config=config.classes,
        first_feature=features.first,
    )
    basics = pl.DataFrame({"density": density, "cell_density": cell_density, "dead": dead})
    return (
        classes.hstack(basics)
        .hstack(_scales(codes[np.flatnonzero(split == "train")]))
        .with_columns(
            pl.Series(
                "top_identity_genes",
                [None] * dead.size if known is None else names_of(known.precision, cells.genes, 5),
                dtype=pl.String,
            )
        )
    )


def _scales(train: Sparse) -> pl.DataFrame:
    """Mean over all train cells, max, and 99th percentile of the nonzero codes; null where a feature never fires
    there.
    """
    columns = train.tocsc()
    values = [columns.data[a:b] for a, b in zip(columns.indptr[:-1], columns.indptr[1:], strict=True)]
    n = train.shape[0]
    return pl.DataFrame(
        {
            "mean": [float(v.sum(dtype=np.float64) / n) if n else None for v in values],
            "max": [float(v.max()) if v.size else None for v in values],
            "p99": [float(np.percentile(v.astype(np.float64), 99)) if v.size else None for v in values],
        },
        schema={"mean": pl.Float64, "max": pl.Float64, "p99": pl.Float64},
    )


def largest(score: Floats, n: int) -> Bools:
    """Mask of the n largest positive scores of each row; equal scores go to the lower column."""
    n = min(n, score.shape[1])
    out = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(out, np.argsort(-score, axis=1, kind="stable")[:, :n], True, axis=1)
    answer: Bools = out & (score > 0)
    return answer


def names_of(score: Floats, names: Sequence[str], n: int) -> list[str | None]:
    """The names of the n largest positive scores of each row as text, null where there is none."""
    order = np.argsort(-score, axis=1, kind="stable")[:, :n]
    return [" ".join(names[j] for j in row if s[j] > 0) or None for row, s in zip(order, score, strict=True)]
