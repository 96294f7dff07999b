"""The associations of one codes run as the five tables of the store, in one call.

Everything is chosen on `select` and reported on `select` and `test`: thresholds, the genes of a feature (for its text
and its gene sets), its top label. Classes and scales use the cells that are not test cells (`train` cells were seen
by the SAE, without labels).
q is Benjamini-Hochberg over ALL tests of a table and split, also of pairs that are not
stored: of features x genes and features x sets only pairs that somebody could ask for are kept (`AssociationConfig`),
or the table of an atlas would be gigabytes of noise.
Cost: 1024 features, 765 genes, 700 cells, 14 labels, 20 gene sets, two splits: 4.5 s on one core.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from feature_store import schemas
from feature_store.associations.batch import associate_batch
from feature_store.associations.classes import ClassConfig, classify
from feature_store.associations.enrichment import METHOD as SET_METHOD
from feature_store.associations.enrichment import over_representation, rank_enrichment
from feature_store.associations.genes import METHOD as GENE_METHOD
from feature_store.associations.genes import Expression, Identity, associate_expression, identity
from feature_store.associations.inputs import Bools, Floats, Labels, Sparse, Strata, as_csr
from feature_store.associations.labels import associate_labels
from feature_store.associations.pvalues import benjamini_hochberg
from feature_store.associations.tokens import TokenStatistics
from feature_store.errors import InputError
from feature_store.genesets import GeneSets

REPORTED = ("select", "test")
MIN_LABEL_CELLS = 5


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

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and min(self.n_genes, self.n_kept, self.n_tokens) >= 1):
            raise InputError(f"{self}: alpha is in (0, 1), the counts are at least 1")


@dataclass(frozen=True, kw_only=True)
class AssociationInputs:
    """Arrays of one codes run; rows are the cells in one order throughout.

    codes CSR [n_cells n_features]; split [n_cells] of train / select / test; labels of any kinds, where "batch" is
    tested within "cell_type"; units: the replicate unit (donor, else batch); expression CSR [n_cells n_genes] of
    log1p(CP10k); token counts by split on the same gene axis; top_tokens with the columns of `feature_token`.
    """

    codes: Sparse
    split: Sequence[str]
    expression: Sparse
    genes: Sequence[str]
    labels: Sequence[Labels] = ()
    units: Labels | None = None
    tokens: Mapping[str, TokenStatistics] = field(default_factory=dict)
    top_tokens: pl.DataFrame | None = None
    gene_sets: Sequence[GeneSets] = ()

    def __post_init__(self) -> None:
        n_cells, n_features = self.codes.shape
        if len(self.split) != n_cells or self.expression.shape != (n_cells, len(self.genes)):
            raise InputError(
                f"associations: codes have {n_cells} cells, split {len(self.split)}, "
                f"expression {self.expression.shape}, genes {len(self.genes)}; cells and genes have to agree"
            )
        unknown = sorted(set(self.split) - set(schemas.SPLITS))
        if unknown or "select" not in self.split:
            raise InputError(
                f"associations: splits are {sorted(set(self.split))}; allowed are {schemas.SPLITS}, and some cells "
                "have to be `select`, as thresholds and genes are chosen there"
            )
        for labels in (*self.labels, *([self.units] if self.units else [])):
            if labels.n_cells != n_cells:
                raise InputError(f"labels {labels.kind!r}: {labels.n_cells} cells, the codes have {n_cells}")
        for name, tokens in self.tokens.items():
            if tokens.fired.shape != (n_features, len(self.genes)):
                raise InputError(f"tokens of {name!r}: {tokens.fired.shape}, expected {(n_features, len(self.genes))}")

    def label(self, kind: str) -> Labels | None:
        """The labels of a kind, None where there are none."""
        return next((labels for labels in self.labels if labels.kind == kind), None)

    def masks(self) -> dict[str, Bools]:
        """Cells of each reported split that has any."""
        split = np.asarray(self.split, dtype=object)
        return {name: mask for name in REPORTED if (mask := split == name).any()}


@dataclass(frozen=True, kw_only=True)
class _GeneSplit:
    """Gene associations of one split with q."""

    expression: Expression
    q: Floats
    identity: Identity | None
    n: int
    n_units: int | None
    detected: Bools


def assemble(inputs: AssociationInputs, config: AssociationConfig | None = None) -> dict[str, pl.DataFrame]:
    """The tables features, feature_label, feature_gene, feature_geneset, feature_token, sorted and conformed to their
    schemas.

    Raises InputError for arrays that do not fit together or are not finite.
    """
    config = config or AssociationConfig()
    codes = as_csr(inputs.codes, "codes")
    expression = as_csr(inputs.expression, "expression")
    labels = _label_table(codes, inputs)
    genes = {name: _gene_split(codes, expression, inputs, name, mask) for name, mask in inputs.masks().items()}
    chosen = {name: _genes_of(split, config) for name, split in genes.items()}
    tables = {
        "features": _features_table(codes, inputs, labels, genes["select"], chosen["select"], config),
        "feature_label": labels,
        "feature_gene": _gene_table(genes, inputs.genes, config),
        "feature_geneset": _geneset_table(genes, chosen, inputs, config),
        "feature_token": _token_table(inputs.top_tokens, config),
    }
    return {
        name: schemas.conform(name, frame) if frame.width else schemas.empty(name) for name, frame in tables.items()
    }


def _label_table(codes: Sparse, inputs: AssociationInputs) -> pl.DataFrame:
    frames = []
    for labels in inputs.labels:
        if labels.kind == "batch":
            frame = associate_batch(codes, labels, inputs.masks(), inputs.label("cell_type"), units=inputs.units)
        else:
            frame = associate_labels(codes, labels, inputs.masks(), inputs.units)
        frames += [frame] if frame.height else []
    if not frames:
        return pl.DataFrame()
    table = pl.concat(frames)
    q = pl.col("p").map_batches(_q, return_dtype=pl.Float64).over("split")
    return table.with_columns(q=q).sort("feature_id", "label_kind", "label", "split")


def _gene_split(codes: Sparse, expression: Sparse, inputs: AssociationInputs, name: str, mask: Bools) -> _GeneSplit:
    rows = np.flatnonzero(mask)
    units, cell_type = inputs.units, inputs.label("cell_type")
    here = expression[rows]
    result = associate_expression(
        codes[rows], here, units.take(mask) if units else None, within=cell_type.take(mask) if cell_type else None
    )
    return _GeneSplit(
        expression=result,
        q=benjamini_hochberg(result.p),
        identity=identity(inputs.tokens[name]) if name in inputs.tokens else None,
        n=rows.size,
        n_units=Strata.of(rows.size, units.take(mask)).n_strata if units else None,
        detected=np.asarray((here > 0).sum(axis=0)).ravel() > 0,
    )


def _genes_of(split: _GeneSplit, config: AssociationConfig) -> Bools:
    """A feature's genes [n_features n_genes]: positively correlated, q <= alpha, the n_genes of largest Pearson."""
    score = np.where((split.q <= config.alpha) & (split.expression.spearman > 0), split.expression.pearson, 0.0)
    return _largest(score, config.n_genes)


def _largest(score: Floats, n: int) -> Bools:
    """Mask of the n largest positive scores of each row; equal scores go to the lower column."""
    n = min(n, score.shape[1])
    out = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(out, np.argsort(-score, axis=1, kind="stable")[:, :n], True, axis=1)
    answer: Bools = out & (score > 0)
    return answer


def _gene_table(genes: Mapping[str, _GeneSplit], names: Sequence[str], config: AssociationConfig) -> pl.DataFrame:
    chosen = genes["select"]
    keep = (chosen.q <= config.alpha) | _largest(np.abs(chosen.expression.pearson), config.n_kept)
    if chosen.identity is not None:
        keep |= _largest(chosen.identity.precision, config.n_kept)
    feature, gene = np.nonzero(keep)
    frames = []
    for name, split in genes.items():
        values = {f: getattr(split.identity, f)[feature, gene] if split.identity else None for f in Identity._fields}
        inner = split.expression.within
        frames.append(
            pl.DataFrame(
                {
                    "feature_id": feature,
                    "gene": pl.Series(names, dtype=pl.String).gather(gene),
                    "split": pl.repeat(name, feature.size, eager=True),
                    "identity_precision": values["precision"],
                    "identity_recall": values["recall"],
                    "lift": values["lift"],
                    "pearson": split.expression.pearson[feature, gene],
                    "pearson_within_type": None if inner is None else inner[feature, gene],
                    "spearman": split.expression.spearman[feature, gene],
                    "n": pl.repeat(split.n, feature.size, dtype=pl.Int64, eager=True),
                    "n_donors": pl.repeat(split.n_units, feature.size, dtype=pl.Int64, eager=True),
                    "nnz": split.expression.n_both[feature, gene],
                    "p": split.expression.p[feature, gene],
                    "q": split.q[feature, gene],
                    "method": pl.repeat(GENE_METHOD, feature.size, eager=True),
                }
            ).with_columns(
                pl.col("identity_precision", "identity_recall", "lift", "pearson_within_type").cast(pl.Float64)
            )
        )
    return pl.concat(frames).sort("feature_id", "gene", "split")


def _geneset_table(
    genes: Mapping[str, _GeneSplit], chosen: Mapping[str, Bools], inputs: AssociationInputs, config: AssociationConfig
) -> pl.DataFrame:
    frames = []
    for name, split in genes.items():
        for sets in inputs.gene_sets:
            membership = sets.membership(inputs.genes)
            over = over_representation(chosen[name], membership, split.detected)
            ranks = rank_enrichment(split.expression.pearson, membership, split.detected)
            n_set = np.asarray(membership[np.flatnonzero(split.detected)].sum(axis=0)).ravel()
            shape = over.p.shape
            frames.append(
                pl.DataFrame(
                    {
                        "feature_id": np.repeat(np.arange(shape[0]), shape[1]),
                        "collection": pl.repeat(sets.collection, over.p.size, eager=True),
                        "gene_set": pl.Series(sets.names).gather(np.tile(np.arange(shape[1]), shape[0])),
                        "split": pl.repeat(name, over.p.size, eager=True),
                        "overlap": over.overlap.ravel(),
                        "n_set": np.tile(n_set, shape[0]).astype(np.int64),
                        "n_genes": np.repeat((chosen[name] & split.detected).sum(axis=1), shape[1]),
                        "odds_ratio": over.odds_ratio.ravel(),
                        "rank_biserial": pl.Series(ranks.rank_biserial.ravel()).fill_nan(None),
                        "n": pl.repeat(int(split.detected.sum()), over.p.size, dtype=pl.Int64, eager=True),
                        "n_donors": pl.repeat(split.n_units, over.p.size, dtype=pl.Int64, eager=True),
                        "p": over.p.ravel(),
                        "p_rank": ranks.p.ravel(),
                        "method": pl.repeat(SET_METHOD, over.p.size, eager=True),
                    }
                )
            )
    if not frames:
        return pl.DataFrame()
    table = pl.concat(frames).with_columns(
        q=pl.col("p").map_batches(_q, return_dtype=pl.Float64).over("split"),
        q_rank=pl.col("p_rank").map_batches(_q, return_dtype=pl.Float64).over("split"),
    )
    keys = ["feature_id", "collection", "gene_set"]
    wanted = pl.any_horizontal(pl.col("overlap") > 0, pl.col("q_rank") <= config.alpha).any().over(keys)
    return table.filter(wanted).sort(*keys, "split")


def _token_table(top: pl.DataFrame | None, config: AssociationConfig) -> pl.DataFrame:
    if top is None:
        return pl.DataFrame()
    by = ["feature_id", "value", "cell_idx", "token_pos"]
    # special tokens are no gene's
    ranked = top.drop_nulls("gene").sort(by, descending=[False, True, False, False])
    return ranked.group_by("feature_id", maintain_order=True).head(config.n_tokens)


def _features_table(
    codes: Sparse,
    inputs: AssociationInputs,
    labels: pl.DataFrame,
    select: _GeneSplit,
    chosen: Bools,
    config: AssociationConfig,
) -> pl.DataFrame:
    split = np.asarray(inputs.split, dtype=object)
    tokens = list(inputs.tokens.values())
    fired = sum(t.feature_tokens for t in tokens) if tokens else None
    n_tokens = sum(t.n_tokens for t in tokens)
    n_fires = np.asarray((codes != 0).sum(axis=0)).ravel()
    cell_density = n_fires / max(codes.shape[0], 1)
    density = cell_density if fired is None else np.asarray(fired) / max(n_tokens, 1)
    dead = (n_fires == 0) & (density == 0)
    open_cells = split != "test"
    open_tokens = [t for name, t in inputs.tokens.items() if name != "test"]
    merged = None
    for t in open_tokens:
        merged = t if merged is None else merged + t
    classes = classify(
        codes[np.flatnonzero(open_cells)],
        [x.take(open_cells) for x in inputs.labels if x.kind != "batch"],
        b.take(open_cells) if (b := inputs.label("batch")) else None,
        merged,
        units=inputs.units.take(open_cells) if inputs.units else None,
        dead=dead,
        config=config.classes,
    )
    basics = pl.DataFrame({"density": density, "cell_density": cell_density, "dead": dead}).hstack(
        _scales(codes[np.flatnonzero(split == "train")])
    )
    texts = pl.DataFrame(
        {
            "top_genes": _names(np.where(chosen, select.expression.pearson, 0.0), inputs.genes, 10),
            "top_identity_genes": _names(
                select.identity.precision if select.identity else np.zeros(chosen.shape), inputs.genes, 5
            ),
        },
        schema={"top_genes": pl.String, "top_identity_genes": pl.String},
    )
    return classes.hstack(basics).hstack(texts).join(_top_label(labels), on="feature_id", how="left").sort("feature_id")


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


def _names(score: Floats, names: Sequence[str], n: int) -> list[str | None]:
    """The names of the n largest positive scores of each row as text, null where there is none."""
    order = np.argsort(-score, axis=1, kind="stable")[:, :n]
    return [" ".join(names[j] for j in row if s[j] > 0) or None for row, s in zip(order, score, strict=True)]


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
