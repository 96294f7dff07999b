"""The table `feature_gene`: a row a feature, gene and split, of the pairs that somebody could ask for.

q is over all features x genes of a split; the rest of the pairs would make gigabytes of noise in the store of an atlas.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from feature_store.associations.claims import are_significant
from feature_store.associations.config import AssociationConfig
from feature_store.associations.gene_correlation import METHOD, Expression, GeneTiles
from feature_store.associations.gene_identity import Identity, identity
from feature_store.associations.inputs import Bools, Floats, Ints
from feature_store.associations.multiple_testing import q_lookup
from feature_store.associations.range_inputs import FeatureRange
from feature_store.associations.ranges import MeasuredRun
from feature_store.associations.sorted_columns import SortedColumns
from feature_store.associations.split_facts import SplitFacts, split_columns, with_split
from feature_store.associations.top_names import largest, top_names
from feature_store.errors import InputError


class GeneStatistics(NamedTuple):
    """The gene associations of one split, each [n_features n_genes], and the number of its cells that express each gene
    [n_genes].
    """

    expression: Expression
    identity: Identity | None
    n_cells: Ints


def measure_genes(features: FeatureRange, tiles: GeneTiles) -> dict[str, GeneStatistics]:
    """The gene associations of a range of features, by split. InputError for token counts of another gene axis."""
    shape = (features.codes.shape[1], tiles.n_genes)
    columns = SortedColumns.of(features.codes)
    sides = {name: b.side(columns.split(b.rows)) for name, b in tiles.blocks.items()}
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
            raise InputError(f"the token counts of {name!r} have shape {tokens.fired.shape}; expected {shape}")
    known = {name: identity(features.tokens[name]) for name in results if name in features.tokens}
    return {name: GeneStatistics(result, known.get(name), n_cells[name]) for name, result in results.items()}


def pair_rows(genes: Mapping[str, GeneStatistics], first: int, config: AssociationConfig) -> pl.DataFrame:
    """The pairs that can still get into `feature_gene`, or among a feature's genes, once q is known (q >= p).

    Columns: feature_id, gene_idx, split, `kept` (the pair is kept whatever its q is), then those of `feature_gene`.
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
            with_split(
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


def split_rows(genes: Mapping[str, GeneStatistics], tiles: GeneTiles) -> pl.DataFrame:
    """A row a split: n, n_donors and n_cells, the number of cells that express each gene (`SplitFacts`)."""
    frames = [
        with_split(
            name,
            n=[tiles.blocks[name].n],
            n_donors=pl.Series([tiles.blocks[name].n_units], dtype=pl.Int64),
            n_cells=[split.n_cells.tolist()],
        )
        for name, split in genes.items()
    ]
    return pl.concat(frames)


class RangeGenes(NamedTuple):
    """Of a range of features: its rows of `feature_gene`; the columns feature_id and top_genes, which are chosen on
    `select` cells and significant on `test` cells; and the genes of each feature by split [n_features n_genes].
    """

    rows: pl.DataFrame
    top_genes: pl.DataFrame
    genes_of_feature: dict[str, Bools]


class GeneTable:
    """The rows of `feature_gene` with their q, and the genes of each feature, range by range."""

    def __init__(
        self,
        measured: MeasuredRun,
        splits: Mapping[str, SplitFacts],
        genes: Sequence[str],
        config: AssociationConfig,
    ) -> None:
        self._measured, self._splits, self._genes, self._config = measured, splits, genes, config
        self._names = pl.Series("gene", genes, dtype=pl.String)
        # a gene's place among the names in order, as rows are sorted by name
        self._rank = np.argsort(np.argsort(np.array(genes, dtype=object), kind="stable"), kind="stable")
        self._q = {split: q_lookup(_tests(measured, split)) for split in splits}

    def read(self, number: int) -> RangeGenes:
        """The rows that are kept of one range, and the genes of its features."""
        bounds, alpha = self._measured.bounds, self._config.alpha
        first, n_features = bounds[number], bounds[number + 1] - bounds[number]
        shape = (n_features, len(self._genes))
        pairs = self._measured.read("pairs", number)
        parts = {
            split: part.with_columns(q=q_of(part["p"].to_numpy()))
            for split, q_of in self._q.items()
            for part in [pairs.filter(pl.col("split") == split)]
        }
        kept, confirmed = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        best, chosen = np.zeros(shape), {}
        for split, part in parts.items():
            place, found = (part["feature_id"].to_numpy() - first, part["gene_idx"].to_numpy()), part["q"] <= alpha
            score = np.zeros(shape)
            score[place] = np.where(found & (part["spearman"] > 0), part["pearson"], 0.0)
            chosen[split] = largest(score, self._config.n_genes)
            if split == "select":
                kept[place] = found | part["kept"]
                best = np.where(chosen[split], score, 0.0)
            if split == "test":
                positive = (part["spearman"] > 0) & (part["pearson"] > 0)
                confirmed[place] = are_significant(part["q"].to_numpy()) & positive.to_numpy()
        names = pl.DataFrame(
            {
                "feature_id": pl.Series(np.arange(first, first + n_features), dtype=pl.Int32),
                "top_genes": pl.Series(top_names(np.where(confirmed, best, 0.0), self._genes, 10), dtype=pl.String),
            }
        )
        return RangeGenes(self._rows(parts, kept, first), names, chosen)

    def _rows(self, parts: Mapping[str, pl.DataFrame], kept: Bools, first: int) -> pl.DataFrame:
        """The rows of the pairs that are kept, sorted by feature, gene and split."""
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
            self._names.gather(rows["gene_idx"]), *split_columns(self._splits), pl.lit(METHOD).alias("method")
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


def _tests(measured: MeasuredRun, split: str) -> list[Floats]:
    """All p of features x genes of a split, an array for each range."""
    tables = (measured.read("tests", number) for number in range(len(measured.bounds) - 1))
    return [table.filter(pl.col("split") == split)["p"].to_numpy() for table in tables]
