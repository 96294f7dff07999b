"""Summary of one task over several SAEs: the mean with its 95 % interval, and the number better than their nulls.

The SAE is the replicate, because an SAE of another seed has other features: each SAE has its own chosen point, searched
on `select` cells, and its own nulls. Student's t over SAEs covers the variation between training runs on the same
cells; at least three SAEs are needed, and their interval is wide (t = 4.3). An SAE is better than a null if its rank p
against that null is at most .05, in the metric's direction, which takes 19 draws or more.
"""

from collections.abc import Sequence

import polars as pl

from feature_store.query.steering import Role
from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import student
from pipelines.steering.plan import Null

MIN_SEEDS = 3
"""Least number of SAEs behind an interval."""
P_LEVEL = 0.05
"""Largest rank p at which an SAE counts as better than a null."""
_P = [null.column for null in Null]
_POOLED = [role.value for role in Role if role not in (Role.GRID, Role.BASELINE_DOSE)]


def over_seeds(frames: Sequence[pl.DataFrame], *, split: str = "test") -> pl.DataFrame:
    """Summarise the results of several SAEs.

    Args:
        frames: the tables `results` of the same task, one for each SAE.
        split: the split whose cells are summarised.

    Returns:
        condition ("chosen" for what each SAE's search chose, whatever its number of features and dose), role, metric,
        group, n_seeds (SAEs that have a value), mean, low, high (of the value), effect, effect_low, effect_high (of the
        value minus the unsteered one), and for each null n_better_NULL, the SAEs whose p against it is at most .05, of
        n_compared_NULL.

    Raises:
        UsageError: there are fewer than 3 tables, or a table has no chosen point.
    """
    if len(frames) < MIN_SEEDS:
        raise UsageError(
            f"there are {len(frames)} results, and an interval over SAEs needs at least {MIN_SEEDS}; train SAEs with "
            "other seeds by `scsae train --seed N`, and steer with each"
        )
    parts = []
    for seed, frame in enumerate(frames):
        own = frame.filter(pl.col("split") == split)
        if not own["chosen"].any():
            raise UsageError(f"results {seed} have no chosen point on {split} cells; run `scsae steer` again")
        kept = own.filter(pl.col("chosen") | pl.col("role").is_in(_POOLED))
        chosen = pl.when("chosen").then(pl.lit("chosen"))
        kept = kept.with_columns(
            condition=chosen.when(pl.col("role") == Role.TREND.value)
            .then(pl.lit("chosen"))
            .otherwise(_no_intervention()),
            role=chosen.otherwise("role"),
        )
        parts.append(kept.with_columns(seed=seed))
    rows: list[dict[str, object]] = []
    keys = ["condition", "role", "metric", "group"]
    for names, frame in pl.concat(parts).group_by(keys, maintain_order=True):
        values, effects = (frame[name].drop_nulls().to_list() for name in ("value", "effect"))
        whole, change = student(values), student(effects)
        rows.append(
            {
                **dict(zip(keys, names, strict=True)),
                "n_seeds": len(values),
                "mean": sum(values) / len(values) if values else None,
                "low": whole.low,
                "high": whole.high,
                "effect": sum(effects) / len(effects) if effects else None,
                "effect_low": change.low,
                "effect_high": change.high,
                **{f"n_better{p[1:]}": int((frame[p] <= P_LEVEL).sum()) for p in _P},
                **{f"n_compared{p[1:]}": frame[p].drop_nulls().len() for p in _P},
            }
        )
    return pl.DataFrame(rows, schema=_SCHEMA)


def _no_intervention() -> pl.Expr:
    """The condition, with `shift, replace` renamed `replace`, because the intervention is the same for all SAEs."""
    return pl.when(pl.col("role") == Role.REPLACE.value).then(pl.lit("replace")).otherwise("condition")


_SCHEMA: dict[str, type[pl.DataType]] = {
    **dict.fromkeys(("condition", "role", "metric", "group"), pl.String),
    "n_seeds": pl.Int64,
    **dict.fromkeys(("mean", "low", "high", "effect", "effect_low", "effect_high"), pl.Float64),
    **{f"n_better{p[1:]}": pl.Int64 for p in _P},
    **{f"n_compared{p[1:]}": pl.Int64 for p in _P},
}
