"""What a feature may be named after: a label, batch, gene or gene set whose association has q <= ALPHA on `test` cells.

The candidate is chosen on `select` cells, and named only if the test on `test` cells, which had no part in the choice,
is significant. Candidates are ranked by the lower bound of the interval over donors and not by their effect, because
the noise of rare labels wins any ranking by effect: of 1,024 features of 8,684 real cells, 562 had their largest AUROC
for a type of 12 `select` cells. Tables, plots and pages all ask this module, so that none of them names what
another does not.
"""

import polars as pl

from feature_store.associations.inputs import Bools, Floats

ALPHA = 0.05
"""The largest q at which a feature is named after something."""
NAMED_AT = f"q <= {ALPHA:g}"
"""The rule in words, for messages: `no label at q <= 0.05`."""
ENOUGH_DRAWS = round(1 / ALPHA) - 1
"""The smallest number of draws of a null with which p can be ALPHA."""


def is_significant(q: str = "q") -> pl.Expr:
    """An expression: whether q is at most ALPHA; False where there is no q."""
    return (pl.col(q) <= ALPHA).fill_null(value=False)


def keeps_side(chosen: str, measured: str, chance: float) -> pl.Expr:
    """An expression: whether the value by which a row was chosen and the one measured of it are on one side of chance;
    False where either is missing or is chance.
    """
    sides = (pl.col(chosen) - chance).sign() * (pl.col(measured) - chance).sign()
    return (sides.fill_nan(None) > 0).fill_null(value=False)


def are_significant(q: Floats) -> Bools:
    """Whether each q of an array is at most ALPHA; False where it is NaN."""
    found: Bools = q <= ALPHA
    return found


def least_p(n_draws: int) -> float:
    """The smallest p that a comparison with draws of a null can give: 1 / (1 + n_draws)."""
    return 1 / (1 + n_draws)


def too_few_draws(n_draws: int, alpha: float = ALPHA) -> str | None:
    """A text for draws of each null that are too few for p <= alpha, with the smallest p; None where they suffice."""
    least = least_p(n_draws)
    drawn = f"{n_draws} draw{'' if n_draws == 1 else 's'}"
    return f"with {drawn} of each, p is {least:.2g} at best" if least > alpha else None


def rank_order() -> list[pl.Expr]:
    """The expressions by which rows of `select` cells are ranked, each the largest first and nulls last: significance,
    the lower bound of the interval over donors, and, where too few donors give an interval, the AUROC.
    """
    return [is_significant(), pl.col("low"), pl.col("auroc")]


def holds_on_test(q: str = "q") -> pl.Expr:
    """An expression for tables with a column `split`: whether a row is of `test` cells and significant."""
    return (pl.col("split") == "test") & is_significant(q)
