"""The excess of an SAE over its baselines, for each target and over all targets.

A target is a label (cell type, batch, condition, ...) or a gene. The best feature of each representation (the SAE, the
neurons, the components, ...) is chosen by the same rule on `select` cells: for a label the feature with AUROC above .5
and the smallest p; for a gene the feature with the largest |Pearson| of cell code and expression, and that with the
largest F1 of firing at the gene's tokens (2 precision recall / (precision + recall)). It is reported with its value on
`test` cells.
    excess = test value of the SAE - test value of the baseline
The headline is the excess over the BEST baseline of the target. That baseline is also chosen by its value on `select`
cells, so no choice uses the cells of the report.

Uncertainty. The excess of a label is paired, because both features read the same cells. The two AUROCs are compared
within each replicate unit (donor, else batch) of the `test` cells that has MIN_CELLS cells of the label and of the
rest. This gives `n_better` of `n_units` and, for at least 3 units, the 95 % t interval [low, high] of the mean
difference. Cells are never the replicates. The interval in `summarise` is over targets, which share cells and are not
independent: it shows how much the excess varies among targets, not how certain it is.
Limits. A representation with more features has more to choose from. This inflates its values on `select` cells, not
those on `test` cells. Only pairs of feature and gene that the store keeps (`AssociationConfig`) can be chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from scipy import sparse
from scipy.special import stdtrit

from feature_store.associations.auroc import auroc
from feature_store.associations.claims import holds_on_test, is_significant
from feature_store.associations.classes import CLASSES
from feature_store.associations.inputs import Bools, Floats, Labels, Strata
from feature_store.storage import schemas

STRONG = 0.5
"""A feature whose |rank-biserial| is above this counts as a marker of a label."""
MIN_CELLS = 5
"""Least number of cells of the label, and of the rest, in a unit for which the AUROC is computed."""
MIN_UNITS = 3
KEYS = ("target_kind", "target", "statistic")
IDENTITY = "identity_f1"
TABLES = ("features", "feature_label", "feature_gene", "feature_geneset", "cells", "codes")
"""The tables that are read of a representation."""


@dataclass(frozen=True, kw_only=True)
class Representation:
    """One representation of the cells: its name, its associations run, its tables by name (TABLES), and the l0, fvu and
    recovery of its SAE.
    """

    name: str
    run: str
    tables: Mapping[str, pl.LazyFrame]
    figures: Mapping[str, float | None] = field(default_factory=dict)


def compare(reference: Representation, baselines: Sequence[Representation]) -> pl.DataFrame:
    """The table `comparison`, with one row per target, statistic and representation.

    The column `excess`, the reference's value minus the baseline's, and the columns after it are null for the
    reference; `best` marks the baseline that the headline of the target compares with. feature_id is null where the
    feature is not significant for the target on `test` cells (`claims`), or has the other sign there: its value is
    compared, and it is not named.
    The firing on a gene's tokens is not tested, so a feature is named there for its share alone.
    """
    rows = pl.concat([_best_features(one) for one in (reference, *baselines)])
    own = rows.filter(pl.col("representation") == reference.name)
    others = rows.filter(pl.col("representation") != reference.name)
    others = others.join(own.select(*KEYS, pl.col("test").alias("own")), on=KEYS, how="left").with_columns(
        excess=pl.col("own") - pl.col("test"),
        best=(pl.col("select").rank("ordinal", descending=True).over(KEYS) == 1) & pl.col("own").is_not_null(),
    )
    others = others.join(_by_unit(reference, baselines, rows), on=[*KEYS, "representation"], how="left")
    table = pl.concat([own, others.drop("own")], how="diagonal").with_columns(pl.col("best").fill_null(False))
    first = pl.col("representation") != reference.name
    kept_sign = pl.col("test") > pl.when(pl.col("statistic") == "auroc").then(0.5).otherwise(0.0)
    named = (is_significant() & kept_sign) | (pl.col("statistic") == IDENTITY)
    table = table.sort(*KEYS, first, "representation").with_columns(pl.when(named).then("feature_id"))
    return schemas.conform("comparison", table)


def describe(representations: Sequence[Representation]) -> pl.DataFrame:
    """The table `representation`, with one row per representation: the numbers of features that mark a label, a batch
    or a gene set, and of each class.
    """
    rows = []
    for one in representations:
        features = one.tables["features"].select("class", "dead").collect()
        counts = dict(features["class"].value_counts().iter_rows())
        significant = holds_on_test()
        strong = significant & (pl.col("rank_biserial").abs() > STRONG)
        rows.append(
            {
                "representation": one.name,
                "run": one.run,
                "n_features": features.height,
                "n_dead": int(features["dead"].sum()),
                **{name: one.figures.get(name) for name in ("l0", "fvu", "recovery")},
                "n_label": _n_features(one, "feature_label", strong & (pl.col("label_kind") != "batch")),
                "n_batch": _n_features(one, "feature_label", strong & (pl.col("label_kind") == "batch")),
                "n_gene_set": _n_features(one, "feature_geneset", significant & (pl.col("overlap") > 0)),
                **{_column(name): counts.get(name, 0) for name in CLASSES},
            }
        )
    return schemas.conform("representation", pl.DataFrame(rows, infer_schema_length=None))


def summarise(comparison: pl.DataFrame) -> pl.DataFrame:
    """The headline: for each kind of target and statistic, the mean test value of the reference and of the best
    baselines, and the mean excess with its 95 % t interval over targets (null for fewer than 3).
    """
    best = comparison.filter(pl.col("best")).with_columns(own=pl.col("test") + pl.col("excess"))
    found = best.group_by("target_kind", "statistic").agg(
        n=pl.len(),
        reference=pl.col("own").mean(),
        best_baseline=pl.col("test").mean(),
        mean_excess=pl.col("excess").mean(),
        se=pl.col("excess").std() / pl.len().sqrt(),
        share_better=(pl.col("excess") > 0).mean(),
        most_often=pl.col("representation").mode().sort().first(),
    )
    quantile = pl.Series(stdtrit(np.maximum(found["n"].to_numpy(), 2) - 1, 0.975))
    half = pl.when(pl.col("n") >= MIN_UNITS).then(quantile * pl.col("se"))
    return (
        found.with_columns(low=pl.col("mean_excess") - half, high=pl.col("mean_excess") + half)
        .select(*found.columns[:6], "low", "high", "share_better", "most_often")
        .sort("target_kind", "statistic")
    )


def _best_features(one: Representation) -> pl.DataFrame:
    """The best feature of each target, chosen on `select` cells, with its values on `test` cells."""
    genes = one.tables["feature_gene"].with_columns(label_kind=pl.lit("gene"), label=pl.col("gene"))
    precision, recall = pl.col("identity_precision"), pl.col("identity_recall")
    identity = genes.with_columns(identity_f1=2 * precision * recall / (precision + recall)).filter(
        precision + recall > 0
    )
    labels = one.tables["feature_label"]
    frames = [
        _chosen(labels.filter((pl.col("auroc") > 0.5) | (pl.col("split") == "test")), "auroc", by="p"),
        _chosen(genes, "pearson", signed=True),
        _chosen(identity, IDENTITY),
    ]
    return pl.concat(frames, how="diagonal").with_columns(representation=pl.lit(one.name))


def _chosen(rows: pl.LazyFrame, statistic: str, *, by: str | None = None, signed: bool = False) -> pl.DataFrame:
    """The best feature of each target on `select` (smallest `by`, then largest |statistic|), with its value on `test`.

    If `signed`, the value on `test` is multiplied by the sign of the value on `select`, so that a reversal is negative.
    """
    target = ["label_kind", "label"]
    # a feature has no test value if no test cell has a token of the gene; the inner join below leaves the target out
    known = rows.drop_nulls(statistic).with_columns(strength=pl.col(statistic).abs())
    order = [*target, *([by] if by else []), "strength", "feature_id"]
    down = [name == "strength" for name in order]
    select = known.filter(pl.col("split") == "select").sort(order, descending=down, nulls_last=True)
    select = select.unique(target, keep="first", maintain_order=True).select(
        *target, "feature_id", "strength", sign=pl.col(statistic).sign()
    )
    test = known.filter(pl.col("split") == "test").select(
        *target, "feature_id", statistic, *(("rank_biserial", "f1") if statistic == "auroc" else ()), "p", "q"
    )
    found = select.join(test, on=[*target, "feature_id"], how="inner").with_columns(
        test=pl.col(statistic) * (pl.col("sign") if signed else 1.0)
    )
    return (
        found.rename({"label_kind": "target_kind", "label": "target", "strength": "select"})
        .drop("sign", statistic)
        # gene identity is not tested for significance, so it has no p and q
        .with_columns(pl.lit(statistic).alias("statistic"), *([] if statistic != IDENTITY else _NO_P))
        .collect()
    )


_NO_P = [pl.lit(None, dtype=pl.Float64).alias(name) for name in ("p", "q")]


def _by_unit(reference: Representation, baselines: Sequence[Representation], rows: pl.DataFrame) -> pl.DataFrame:
    """Paired differences of AUROC within the units of the test cells, for every label and baseline."""
    cells = reference.tables["cells"].filter(pl.col("split") == "test").collect()
    kind = next((name for name in ("donor", "batch") if cells[name].null_count() < cells.height), None)
    labels = rows.filter(pl.col("statistic") == "auroc")
    out: list[dict[str, object]] = []
    if kind is not None and not cells.is_empty():
        values = {one.name: _values(one, cells, labels) for one in (reference, *baselines)}
        for target_kind, target in labels.select("target_kind", "target").unique().sort(pl.all()).iter_rows():
            of_target = labels.filter((pl.col("target_kind") == target_kind) & (pl.col("target") == target))
            chosen = dict(of_target.select("representation", "feature_id").iter_rows())
            areas = {
                name: _auroc_by_unit(values[name][feature], cells, target_kind, target, unit=kind)
                for name, feature in chosen.items()
            }
            for one in baselines:
                if one.name in areas and reference.name in areas:
                    row = {"target_kind": target_kind, "target": target, "representation": one.name}
                    out.append({**row, **_interval(areas[reference.name] - areas[one.name])})
    schema = {
        **dict.fromkeys(("target_kind", "target", "representation"), pl.String),
        **dict.fromkeys(("n_units", "n_better"), pl.Int64),
        **dict.fromkeys(("low", "high"), pl.Float64),
    }
    return pl.DataFrame(out, schema=schema).with_columns(statistic=pl.lit("auroc"))


def _values(one: Representation, cells: pl.DataFrame, labels: pl.DataFrame) -> dict[int, Floats]:
    """The code [n_cells] of each chosen feature of a representation, 0 where the feature is not active."""
    wanted = labels.filter(pl.col("representation") == one.name)["feature_id"].unique().to_list()
    codes = (
        one.tables["codes"]
        .filter(pl.col("feature_id").is_in(wanted) & pl.col("cell_idx").is_in(cells["cell_idx"].to_list()))
        .group_by("feature_id", "cell_idx")
        .agg(pl.col("value").max())
        .collect()
    )
    place = cells["cell_idx"].to_numpy()
    out = {feature: np.zeros(cells.height) for feature in wanted}
    for (feature,), rows in codes.group_by("feature_id"):
        out[int(str(feature))][np.searchsorted(place, rows["cell_idx"].to_numpy())] = rows["value"].to_numpy()
    return out


def _auroc_by_unit(code: Floats, cells: pl.DataFrame, kind: str, name: str, *, unit: str) -> Floats:
    """The AUROC of a code for a label within each unit [n_units], for a batch within cell types; NaN if a unit has too
    few cells with or without the label.
    """
    labels, units = (Labels.from_values(column, cells[column]) for column in (kind, unit))
    within = Labels.from_values("cell_type", cells["cell_type"]) if kind == "batch" else None
    mine: Bools = labels.known & (labels.codes == labels.names.index(name))
    areas = np.full(len(units.names), np.nan)
    for at in range(len(units.names)):
        here = labels.known & units.known & (units.codes == at)
        if min(int(mine[here].sum()), int((~mine[here]).sum())) < MIN_CELLS:
            continue
        strata = None if within is None else Strata.of(int(here.sum()), within.take(here))
        indicator = sparse.csr_array(mine[here].astype(np.float64)[:, None])
        areas[at] = auroc(sparse.csr_array(code[here][:, None]), indicator, strata)[0, 0]
    return areas


def _interval(difference: Floats) -> dict[str, float | int | None]:
    """The numbers of units and of those in which the reference is better, and the 95 % t interval of the mean."""
    known = difference[np.isfinite(difference)]
    found: dict[str, float | int | None] = {"n_units": known.size, "n_better": int((known > 0).sum())}
    if known.size < MIN_UNITS:
        return {**found, "low": None, "high": None}
    half = float(stdtrit(known.size - 1, 0.975) * known.std(ddof=1) / known.size**0.5)
    return {**found, "low": float(known.mean()) - half, "high": float(known.mean()) + half}


def _n_features(one: Representation, table: str, rule: pl.Expr) -> int:
    return int(one.tables[table].filter(rule).select(pl.col("feature_id").n_unique()).collect().item())


def _column(name: str) -> str:
    return f"class_{name.replace('-', '_')}"
