"""Mean codes of groups of cells by gene, and their differences, by which `shift` and `toward` change codes.

Let m(side, type, gene) be the mean code of the tokens of a gene in the sampled cells of a side (a label) and a type:
    move    the difference m(toward, type, gene) - m(target, type, gene), for the cells of `target`, by type
    mix     the difference mean_b' m(b', type, gene) - m(b, type, gene), for the cells of batch b
The mean of few tokens is uncertain, so the difference d of a type is shrunk toward D, the mean over types weighted by
their tokens: d' = w d + (1 - w) D with w = n / (n + 5), where n is the number of tokens of the side with fewer tokens.
The difference is shrunk and not the two means, because sides with unequal n would add the difference between types. D
compares sides within types, so that it holds no difference of composition. A (type, gene) without tokens on both sides
has no row, and its codes are not changed.

`by` is the grouping of codes: both (type and gene), gene (D alone), cell_type, none, or other_types; the last three do
not separate genes. With other_types the difference of a type is the mean D over the other types, so that it is also
defined for a type that has cells of one side alone, or none. The mean-difference vector at the SAE's site, which needs
no SAE, is computed in the same way with mean activations instead of codes.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from pipelines.steering.labels import CellLabels, Texts
from pipelines.steering.plan import InterventionType, SteeringTask, Task
from pipelines.steering.token_sample import TokenSample

By = Literal["cell_type", "gene", "both", "none", "other_types"]
_BY_TYPE = ("cell_type", "both", "other_types")
PRIOR_TOKENS = 5.0
"""The weight of the mean over types, as a number of tokens."""
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class MeansTable(NamedTuple):
    """A table with one row per (group, gene), sorted: the group of the cell [row], the vocabulary id of the gene [row]
    (None: one row for all genes), and values [row n_values] in the order of the features.
    """

    group: Texts
    gene_id: Ints | None
    values: npt.NDArray[np.float32]


class _Rows(NamedTuple):
    """Differences by (side, type, gene): codes of side, type and gene [row], tokens of the side with fewer [row]."""

    side: Ints
    kind: Ints
    gene: Ints
    n: Floats
    origin: Floats
    difference: Floats


def default_grouping(task: SteeringTask) -> By:
    """The grouping if the options give none: without genes, so that the mean also reflects which genes a cell has.

    On `select` donors of Kang et al. .41 of the distance to control remained by cell type, and .46 by type and gene.
    """
    return "none" if task.type is Task.MIX else "cell_type"


def group_of_cells(labels: CellLabels, task: SteeringTask, by: By) -> Texts:
    """The group of each cell in `MeansTable` [n_cells], which is its type, its batch, both, or ""."""
    kinds = labels.cell_type if by in _BY_TYPE else np.full(len(labels.label), "", dtype=object)
    if task.type is not Task.MIX:
        return kinds
    return np.array([_group(batch, kind) for batch, kind in zip(labels.label, kinds, strict=True)], dtype=object)


def code_group_means(
    sample: TokenSample,
    labels: CellLabels,
    task: SteeringTask,
    features: Sequence[int],
    *,
    by: By,
    cells: npt.NDArray[np.bool_],
    types: Collection[str] = (),
) -> MeansTable:
    """The rows that `shift` adds to the codes of `features`, or that `toward` moves them to, at dose 1.

    Args:
        sample: the sample of token codes.
        labels: the labels of its cells.
        task: the task, move or mix; its intervention determines whether the rows hold differences or means.
        features: the features, in the order of the columns.
        by: the grouping of codes.
        cells: the sampled cells that may be used [n_cells].
        types: further types that get a row if `by` is other_types; those of the sampled cells always do.
    """
    codes = sample.codes

    def column(j: int) -> tuple[Ints, Floats]:
        low, high = codes.indptr[features[j]], codes.indptr[features[j] + 1]
        return codes.indices[low:high].astype(np.int64), codes.data[low:high].astype(np.float64)

    gene = sample.gene_id if by in ("gene", "both") else np.zeros_like(sample.gene_id)
    return _table(
        column,
        len(features),
        labels,
        task,
        by=by,
        cells=cells,
        types=types,
        cell_of_unit=sample.cell,
        gene_of_unit=gene,
    )


def mean_differences(
    sample: TokenSample,
    labels: CellLabels,
    task: SteeringTask,
    *,
    by: By,
    cells: npt.NDArray[np.bool_],
    types: Collection[str] = (),
) -> MeansTable:
    """The mean-difference vectors of activations [group d_model], from the mean activation of each cell.

    The arguments are those of `code_group_means`.
    """
    mean = sample.mean.astype(np.float64)
    units = np.flatnonzero(sample.n_tokens > 0)

    def column(j: int) -> tuple[Ints, Floats]:
        return np.arange(len(units)), mean[units, j]

    coarse: By = {"both": "cell_type", "gene": "none"}.get(by, by)  # type: ignore[assignment]
    return _table(
        column,
        mean.shape[1],
        labels,
        replace(task, intervention=InterventionType.SHIFT),
        by=coarse,
        cells=cells,
        types=types,
        cell_of_unit=units,
        gene_of_unit=np.zeros(len(units), dtype=np.int64),
    )


def means_frame(table: MeansTable) -> pl.DataFrame:
    """The rows as they are stored: group, gene_id (null if genes are not separated), value."""
    n = len(table.group)
    gene_id = pl.Series(table.gene_id, dtype=pl.Int64) if table.gene_id is not None else pl.Series([None] * n)
    return pl.DataFrame(
        {"group": table.group.tolist(), "gene_id": gene_id.cast(pl.Int64), "value": table.values},
        schema_overrides={"group": pl.String, "value": pl.Array(pl.Float32, table.values.shape[1])},
    )


def _group(batch: str, kind: str) -> str:
    return f"{batch} | {kind}" if kind else str(batch)


def _table(
    column: Callable[[int], tuple[Ints, Floats]],
    n_columns: int,
    labels: CellLabels,
    task: SteeringTask,
    *,
    by: By,
    cells: npt.NDArray[np.bool_],
    types: Collection[str],
    cell_of_unit: Ints,
    gene_of_unit: Ints,
) -> MeansTable:
    """The table of the units (tokens or cells) of the chosen cells; `column(j)` gives units and their values."""
    kinds = sorted({*labels.cell_type, *types})
    sides = [task.target, str(task.toward)] if task.type is Task.MOVE else sorted(set(labels.label[cells]) - {""})
    side_of = {name: i for i, name in enumerate(sides)}
    side = np.array([side_of.get(name, -1) for name in labels.label])
    side[~cells] = -1
    kind = np.array([kinds.index(name) for name in labels.cell_type])
    used = side[cell_of_unit] >= 0
    own = cell_of_unit[used]
    genes, gene = np.unique(gene_of_unit[used], return_inverse=True)
    key = (side[own] * len(kinds) + kind[own]) * max(len(genes), 1) + gene
    keys, row = np.unique(key, return_inverse=True)
    place = np.full(len(cell_of_unit), -1)
    place[used] = row
    n = np.bincount(row, minlength=len(keys)).astype(np.float64)
    mean = np.zeros((len(keys), n_columns))
    for j in range(n_columns):
        unit, value = column(j)
        at = place[unit]
        mean[:, j] = np.bincount(at[at >= 0], weights=value[at >= 0], minlength=len(keys)) / n
    cell_kind, gene_code = keys // max(len(genes), 1), keys % max(len(genes), 1)
    side_code, kind_code = cell_kind // len(kinds), cell_kind % len(kinds)
    differ = _of_move if task.type is Task.MOVE else _of_mix
    rows = differ(side_code, kind_code, gene_code, n, mean)
    # `toward` goes to the mean of the other side, which is the origin and the difference
    wanted = rows.origin + rows.difference if task.intervention == "toward" else rows.difference
    if by == "other_types":
        placed = _over_other_types(rows, wanted, len(kinds))
    else:
        placed = _shrunk(rows, wanted) if by in _BY_TYPE else _over_types(rows, wanted)
    names = [kinds[k] if by in _BY_TYPE else "" for k in placed.kind]
    group = np.array(
        names if task.type is Task.MOVE else [_group(sides[s], k) for s, k in zip(placed.side, names, strict=True)],
        dtype=object,
    )
    gene_id = genes[placed.gene] if len(placed.gene) else np.empty(0, np.int64)
    order = np.lexsort((gene_id, group.astype(str))) if len(group) else np.empty(0, np.int64)
    return MeansTable(
        group[order],
        gene_id[order].astype(np.int64) if by in ("gene", "both") else None,
        placed.values[order].astype(np.float32).reshape(len(order), n_columns),
    )


def _of_move(side: Ints, kind: Ints, gene: Ints, n: Floats, mean: Floats) -> _Rows:
    """Side 1 minus side 0, for each (type, gene) that both sides have."""
    place = kind * (gene.max(initial=0) + 1) + gene
    _, a, b = np.intersect1d(place[side == 0], place[side == 1], return_indices=True)
    a, b = np.flatnonzero(side == 0)[a], np.flatnonzero(side == 1)[b]
    return _Rows(np.zeros(len(a), np.int64), kind[a], gene[a], np.minimum(n[a], n[b]), mean[a], mean[b] - mean[a])


def _of_mix(side: Ints, kind: Ints, gene: Ints, n: Floats, mean: Floats) -> _Rows:
    """The mean over batches minus each batch, for each (type, gene) that at least two batches have."""
    _, place = np.unique(kind * (gene.max(initial=0) + 1) + gene, return_inverse=True)
    n_sides = np.bincount(place)
    pool = sparse.csr_array((np.ones(len(place)), (place, np.arange(len(place)))), shape=(len(n_sides), len(place)))
    middle = np.asarray(pool @ mean) / n_sides[:, None]
    kept = n_sides[place] > 1
    difference = middle[place[kept]] - mean[kept]
    return _Rows(side[kept], kind[kept], gene[kept], n[kept], mean[kept], difference)


class _Placed(NamedTuple):
    """The values of the rows of a table [row n_values], with side, type (0 if types are not separated) and gene."""

    side: Ints
    kind: Ints
    gene: Ints
    values: Floats


def _over_types(rows: _Rows, values: Floats) -> _Placed:
    """The mean of the rows of each (side, gene) over types, weighted by tokens."""
    n_genes = int(rows.gene.max(initial=0)) + 1
    keys, place = np.unique(rows.side * n_genes + rows.gene, return_inverse=True)
    pool = sparse.csr_array((rows.n, (place, np.arange(len(place)))), shape=(len(keys), len(place)))
    weight = np.maximum(np.bincount(place, weights=rows.n, minlength=len(keys)), 1.0)[:, None]
    return _Placed(keys // n_genes, np.zeros(len(keys), np.int64), keys % n_genes, np.asarray(pool @ values) / weight)


def _shrunk(rows: _Rows, values: Floats) -> _Placed:
    """The values of the rows, shrunk toward their mean over types."""
    n_genes = int(rows.gene.max(initial=0)) + 1
    coarse = _over_types(rows, values)
    place = np.searchsorted(coarse.side * n_genes + coarse.gene, rows.side * n_genes + rows.gene)
    weight = (rows.n / (rows.n + PRIOR_TOKENS))[:, None]
    shrunk = weight * values + (1 - weight) * coarse.values[place]
    return _Placed(rows.side, rows.kind, rows.gene, shrunk)


def _over_other_types(rows: _Rows, values: Floats, n_kinds: int) -> _Placed:
    """For every type, the mean over the rows of the other types; a type without other types has no row."""
    parts = []
    for kind in range(n_kinds):
        kept = rows.kind != kind
        others = _Rows(*(column[kept] for column in rows))
        mean = _over_types(others, values[kept])
        parts.append(mean._replace(kind=np.full(len(mean.side), kind)))
    return _Placed(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
