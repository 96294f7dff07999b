"""The class of a feature: gene-identity, cell-context, batch, mixed or dead, with a bootstrap confidence.

The class follows from four measures. The effects are shares of variance explained (0 by chance, 1 at most), adjusted
for the number of groups like adjusted R^2:
- gene_precision: the share of a feature's firing that falls on the tokens of its most frequent gene;
- gene_effect: the share of token firing (0 / 1) that the token's gene explains; it is 1 for a feature that is a
  function of the gene alone;
- context_effect: the share of the cell code's rank variance that cell type or another label explains within batches, so
  that a batch is not taken for a type;
- batch_effect: the share of the rank variance that batch explains within cell types (and within labels that whole
  batches carry, such as disease by donor).
The context and batch effects are the larger of two shares. The first is the share that all values of the label explain.
The second is D^2 / (4 + D^2), the share that the most distinct value would explain if half of the cells carried it; D
is its distance from the rest in standard deviations of a cell, less three standard errors because it is the best of
many. The second share is for rare types: if 5 % of the cells are of a type and a feature fires in 95 % of them and in
half of the others, the type explains less than a tenth of the variance, and nothing else explains it. Without it, 8 of
18 + 18 planted features of such a type (and a background that fires in half of the cells) were classified as mixed.
With three standard errors, at most 2 % of pure noise is taken for a context (features that fire in 6 cells, labels of 3
to 5 cells), and .3 % for labels of 10 cells.

The class is the first of these that holds:
- dead: the feature never fires;
- gene-identity: gene_precision >= 0.5, the feature reads one gene;
- cell-context: context_effect >= 0.1 and at least twice batch_effect; batch: the mirror image; mixed: both are >= 0.1;
- gene-identity: gene_effect >= 0.5, the feature reads a family of genes in any cell;
- mixed: none of these explains the feature.
Cell context comes before gene families because nearly every feature of a gene-token model follows its gene (median
gene_effect .89 in an SAE of the mini model's third block): a feature that reads B-cell genes and marks B cells is
cell-context, and its gene_effect shows that it does so by the genes present. A design of one batch per type cannot
separate the two and gives mixed.
Limits. Features with a weak effect are also called mixed: planted features that fire on a tenth of all tokens and on
two to four tenths of their target's tokens keep the right class in 7 of 10 cases. With few donors, differences between
donors can be taken for the effect of a label that whole donors carry; the confidence, which resamples donors, and
`p_donor` of the label show this.

The confidence is the share of resamples with the same class. The Bayesian bootstrap (exponential weights, Rubin 1981,
doi:10.1214/aos/1176345338), which drops no batch, resamples units if there are at least 5, else cells; for gene_effect,
the firing is redrawn token by token.
Cost: 7 s on one core for 50k cells, 4096 features (1.6 million values) and 30 resamples; linear in values x resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations.batch_statistics import batch_strata
from feature_store.associations.inputs import Bools, Floats, Ints, Labels, Sparse, Strata
from feature_store.associations.moments import cross_product, power_sums, sum_rows
from feature_store.associations.rank_tests import varies_within
from feature_store.associations.ranks import column_ranks, scale_rows
from feature_store.associations.sorted_columns import Codes, SortedColumns
from feature_store.associations.token_statistics import TokenStatistics
from feature_store.errors import InputError

CLASSES = ("gene-identity", "cell-context", "batch", "mixed", "dead")
MIN_UNITS_RESAMPLED = 5


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """Thresholds of the class rule."""

    gene_precision: float = 0.5
    """Least share of the firing on one gene that makes a feature gene-identity, whatever the cells."""
    gene_effect: float = 0.5
    """Least share of token firing that the gene explains in a gene-identity feature that no cell label explains."""
    cell_effect: float = 0.1
    """Least share of the cell code's rank variance at which a context or a batch counts."""
    ratio: float = 2.0
    """Least ratio of the larger to the smaller of the context and batch effects that decides between them."""
    n_bootstrap: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.gene_precision, self.gene_effect, self.cell_effect)
        if not (all(0 < share <= 1 for share in shares) and self.ratio >= 1 and self.n_bootstrap >= 1):
            raise InputError(f"class rule {self}: precision and effects are in (0, 1], ratio >= 1, n_bootstrap >= 1")


class _GeneMeasures(NamedTuple):
    """precision and effect, each [1 + n_resamples, n_features]; the first row holds the observed values."""

    precision: Floats
    effect: Floats


class _Contrast(NamedTuple):
    """The sums from which one effect is computed: of the rank scores and their squares in each part, the cells of one
    group (a label's cells in a stratum) that are resampled together [n_parts n_features]; the number of cells of each
    part and what they are resampled with (`cluster`); indicators of groups and of strata [n_groups or n_strata,
    n_parts], and the groups of each label and stratum.
    """

    kind: str
    scores: Floats | Sparse
    squares: Floats | Sparse
    n_cells: Floats
    cluster: Ints
    group: Sparse
    stratum: Sparse
    label_groups: Sparse
    stratum_of: Ints

    def effect(self, weight: Floats) -> Floats:
        """The effect [n_features] of the label under the weights of what is resampled [n_clusters]: of all its values,
        or of the best one.
        """
        w = weight[self.cluster]
        n = w * self.n_cells
        n_group, n_stratum = self.group @ n, self.stratum @ n
        in_group, in_stratum = (_sums(by * w, self.scores) for by in (self.group, self.stratum))
        means = _square_over(in_stratum, n_stratum)
        total = _sums(sparse.csr_array(w[None, :]), self.squares)[0] - means
        residual_df = n.sum() - (n_group > 0).sum()
        if residual_df <= 0:
            return np.zeros(total.shape)
        alive, total_df = total > 1e-12, n.sum() - (n_stratum > 0).sum()
        share = np.divide(_square_over(in_group, n_group) - means, total, out=np.zeros_like(total), where=alive)
        overall = 1 - (1 - share) * total_df / residual_df
        # one value of the label against the rest: its sum above expectation, and the effective number of cells
        per_cell = np.maximum(n_stratum, 1e-12)
        above = self.label_groups @ (in_group - n_group[:, None] * (in_stratum / per_cell[:, None])[self.stratum_of])
        n_compared = (self.label_groups @ (n_group * (1 - n_group / per_cell[self.stratum_of])))[:, None]
        explained = np.divide(above**2, n_compared, out=np.zeros_like(above), where=n_compared > 0.5)
        noise = np.maximum(total - explained, 1e-12) / max(total_df - 1, 1)
        # in units of the noise of a cell, three standard errors below the estimate
        distance = np.maximum(np.sqrt(explained / noise) - 3, 0) / np.sqrt(np.maximum(n_compared, 0.5))
        balanced = distance**2 / (4 + distance**2)
        return np.where(alive, np.maximum(np.maximum(overall, 0.0), balanced.max(axis=0)), 0.0)


def classify(
    codes: Codes,
    contexts: Sequence[Labels],
    batch: Labels | None,
    tokens: TokenStatistics | None,
    *,
    units: Labels | None,
    dead: Bools,
    config: ClassConfig,
    first_feature: int = 0,
) -> pl.DataFrame:
    """One row per feature: class, class_confidence, the four measures, and context_kind, the label behind the context.

    codes: CSR [n_cells n_features] of cells that are not test cells; contexts: labels of the cell's state, kind
    cell_type among them where known; tokens: if None, the gene measures are null; dead: bool [n_features];
    first_feature: the id of the first column. A feature's row is the same whatever other features are in the call.
    """
    n_features = codes.shape[1]
    clusters = _clusters(codes.shape[0], units)
    context, by_batch = _contrasts(SortedColumns.of(codes), contexts, batch, clusters)
    resampled: list[Floats] = []
    for weight in [np.ones(clusters.n_strata), *_weights(clusters, config)]:
        c = [contrast.effect(weight) for contrast in context] or [np.zeros(n_features)]
        b = by_batch.effect(weight) if by_batch else np.zeros(n_features)
        resampled.append(np.stack([np.max(c, axis=0), b, np.argmax(c, axis=0).astype(np.float64)]))
    context_effect, batch_effect, winner = np.stack(resampled, axis=1)
    genes = _GeneMeasures(np.zeros_like(context_effect), np.zeros_like(context_effect))
    if tokens is not None:
        genes = _gene_measures(tokens, config, first_feature)
    classes = _rule(genes, context_effect, batch_effect, dead, config)
    kinds = np.array([contrast.kind for contrast in context] or [""], dtype=object)
    return pl.DataFrame(
        {
            "feature_id": pl.Series(np.arange(first_feature, first_feature + n_features), dtype=pl.Int32),
            "class": pl.Series(np.array(CLASSES, dtype=object)[classes[0]].tolist(), dtype=pl.String),
            "class_confidence": (classes[1:] == classes[0]).mean(axis=0),
            "gene_precision": pl.Series(genes.precision[0] if tokens else [None] * n_features, dtype=pl.Float64),
            "gene_effect": pl.Series(genes.effect[0] if tokens else [None] * n_features, dtype=pl.Float64),
            "context_effect": context_effect[0],
            "context_kind": pl.Series(kinds[winner[0].astype(np.int64)].tolist(), dtype=pl.String),
            "batch_effect": batch_effect[0],
        }
    )


def _rule(genes: _GeneMeasures, context: Floats, batch: Floats, dead: Bools, config: ClassConfig) -> Sparse:
    """Index into CLASSES [n_resamples n_features]."""
    strong = np.maximum(context, batch) >= config.cell_effect
    chosen = [
        (np.broadcast_to(dead, context.shape), "dead"),
        (genes.precision >= config.gene_precision, "gene-identity"),
        (strong & (context >= config.ratio * batch), "cell-context"),
        (strong & (batch >= config.ratio * context), "batch"),
        (strong, "mixed"),
        (genes.effect >= config.gene_effect, "gene-identity"),
    ]
    return np.select(
        [holds for holds, _ in chosen], [CLASSES.index(name) for _, name in chosen], CLASSES.index("mixed")
    )


def _contrasts(
    codes: SortedColumns, contexts: Sequence[Labels], batch: Labels | None, clusters: Strata
) -> tuple[list[_Contrast], _Contrast | None]:
    """The context contrasts and the batch contrast, each within strata of the labels that could be mistaken for it."""
    n_cells = codes.shape[0]
    cell_type = next((labels for labels in contexts if labels.kind == "cell_type"), None)
    if batch is None:
        return [_contrast(codes, labels, None, clusters) for labels in contexts], None
    in_batches = Strata.of(n_cells, batch)
    aliased = [labels for labels in contexts if not varies_within(labels.one_hot(), in_batches).any()]
    contrasts = []
    for labels in contexts:
        other = batch if all(labels is not a for a in aliased) else cell_type
        contrasts.append(
            _contrast(codes, labels, None if other is None or other is labels else Strata.of(n_cells, other), clusters)
        )
    return contrasts, _contrast(codes, batch, batch_strata(n_cells, cell_type, *aliased), clusters)


def _contrast(codes: SortedColumns, labels: Labels, strata: Strata | None, clusters: Strata) -> _Contrast:
    """The contrast of a label by ranks within the strata that hold at least two of its values; if there are none, all
    cells are one stratum.
    """
    strata = strata or Strata.single(labels.n_cells)
    present = (strata.indicator() @ labels.one_hot()).toarray() > 0
    cells = (present.sum(axis=1) >= 2)[strata.codes] & labels.known
    if not cells.any():
        strata, cells = Strata.single(labels.n_cells), labels.known
    kept = labels.take(cells)
    inside = Strata(
        codes=np.unique(strata.codes[cells], return_inverse=True)[1], n_strata=np.unique(strata.codes[cells]).size
    )
    crossed, group = np.unique(inside.codes * len(kept.names) + kept.codes, return_inverse=True)
    place = (crossed % len(kept.names), np.arange(crossed.size))
    label_groups = sparse.csr_array((np.ones(crossed.size), place), shape=(len(kept.names), crossed.size))
    scores = column_ranks(codes.take(cells), inside).scores
    weight = (1.0 / (inside.sizes() + 1.0))[inside.codes]
    stratum_of = crossed // len(kept.names)
    if clusters.n_strata < clusters.codes.size:
        part, part_of = np.unique(group * clusters.n_strata + clusters.codes[cells], return_inverse=True)
        group_of, cluster = np.divmod(part, clusters.n_strata)
        parts = Strata(codes=part_of, n_strata=part.size)
        sums, squares, _ = power_sums(scores, parts, weight=weight)
        n_cells = parts.sizes()
    else:
        group_of, cluster, n_cells = group, np.flatnonzero(cells), np.ones(group.size)
        sums = sparse.csc_array(sparse.csr_array(scale_rows(scores, weight)))
        squares = sums.power(2)
    return _Contrast(
        kind=labels.kind,
        scores=sums,
        squares=squares,
        n_cells=n_cells,
        cluster=cluster,
        group=Strata(codes=group_of, n_strata=crossed.size).indicator(),
        stratum=Strata(codes=stratum_of[group_of], n_strata=inside.n_strata).indicator(),
        label_groups=label_groups,
        stratum_of=stratum_of,
    )


def _clusters(n_cells: int, units: Labels | None) -> Strata:
    """The cells that are resampled together: those of a unit if there are enough units, else each alone."""
    by_unit = Strata.of(n_cells, units)
    if by_unit.n_strata >= MIN_UNITS_RESAMPLED:
        return by_unit
    return Strata(codes=np.arange(n_cells), n_strata=n_cells)


def _weights(clusters: Strata, config: ClassConfig) -> list[Floats]:
    """Bayesian bootstrap weights [n_clusters], which sum to the number of cells over the cells."""
    rng = np.random.default_rng(config.seed)
    drawn = [rng.standard_exponential(clusters.n_strata) for _ in range(config.n_bootstrap)]
    return [weight * (clusters.codes.size / weight[clusters.codes].sum()) for weight in drawn]


def _gene_measures(tokens: TokenStatistics, config: ClassConfig, first_feature: int) -> _GeneMeasures:
    """The gene measures of each feature: the observed ones, then n_bootstrap ones with the firing redrawn."""
    fired = sparse.csr_array(tokens.fired)
    count = tokens.gene_tokens[fired.indices]
    feature_of = sparse.csr_array((np.ones(fired.nnz), np.arange(fired.nnz), fired.indptr), (fired.shape[0], fired.nnz))
    # a feature fires at most once on a token, so larger counts mean a wrong gene axis, which the shapes cannot show
    if (fired.data > count).any():
        raise InputError("token counts: a feature fired on more tokens of a gene than there are; check the gene axis")
    draws = np.empty((fired.nnz, 1 + config.n_bootstrap))
    draws[:, 0] = fired.data
    for feature in np.flatnonzero(np.diff(fired.indptr)):
        # the seed holds the feature, so that its redraws do not depend on the other features of the call
        rng = np.random.default_rng([config.seed, 1, first_feature + int(feature)])
        mine = slice(fired.indptr[feature], fired.indptr[feature + 1])
        rate = fired.data[mine] / count[mine]
        draws[mine, 1:] = rng.binomial(count[mine, None], rate[:, None], (rate.size, config.n_bootstrap))
    mean = (feature_of @ draws) ** 2 / max(tokens.n_tokens, 1)
    total = feature_of @ draws - mean
    between = feature_of @ (draws**2 / count[:, None]) - mean
    share = np.divide(between, total, out=np.zeros_like(total), where=total > 1e-12)
    n_genes = int((tokens.gene_tokens > 0).sum())
    effect = 1 - (1 - share) * (tokens.n_tokens - 1) / max(tokens.n_tokens - n_genes, 1)
    largest = np.zeros_like(total)
    alive = np.diff(fired.indptr) > 0
    if alive.any():
        largest[alive] = np.maximum.reduceat(draws, fired.indptr[:-1][alive], axis=0)
    precision = largest / np.maximum(feature_of @ draws, 1)
    return _GeneMeasures(precision.T, np.where(total > 1e-12, np.maximum(effect, 0.0), 0.0).T)


def _sums(by: Sparse, values: Floats | Sparse) -> Floats:
    """The weighted sums [n_rows n_features] of values [n_parts n_features] by a sparse matrix [n_rows n_parts]."""
    return by @ values if isinstance(values, np.ndarray) else cross_product(values, by.T).T


def _square_over(sums: Floats, n: Floats) -> Floats:
    """The sum over rows of sums^2 / n [n_features]."""
    return sum_rows(sums**2 / np.maximum(n, 1)[:, None])
