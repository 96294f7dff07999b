"""What the samples of the cells allow: how many donors (else batches) `test` cells have, the least p of them, and which
labels cannot be told from a batch.

The tests of labels, genes and numbers take the donors as given, so that their q speaks of these donors. A claim about
other donors needs a p across donors, which with n of them is never below 2^(1 - n) (`donor_agreement`). The page
Controls, the stages and the look-ups all ask this module, so that they say the same.
"""

import math
from collections.abc import Sequence

import polars as pl

from feature_store.associations.claims import ALPHA

UNITS = {"donor": "donors", "batch": "batches"}
"""Columns of the cell table that are taken as replicate units, in order, and the plural of each."""
ENOUGH_UNITS = math.ceil(1 - math.log2(ALPHA))
"""The smallest number of donors with which a sign test can reach p <= ALPHA: 6."""


def unit_column(cells: pl.DataFrame) -> str | None:
    """Return the column of a cell table with the replicate units: donor, else batch; None where neither is known."""
    return next((name for name in UNITS if cells[name].null_count() < cells.height), None)


def units_by_split(cells: pl.DataFrame) -> dict[str, int]:
    """The number of replicate units of the cells of each split; empty where none is known."""
    if (unit := unit_column(cells)) is None:
        return {}
    counts = cells.drop_nulls(unit).group_by("split").agg(pl.col(unit).n_unique())
    return dict(counts.sort("split").rows())


def limit_of_claims(cells: pl.DataFrame) -> str | None:
    """Why no claim about `test` cells is one about other donors, as a sentence; None where there are enough donors.

    `cells`: the columns split, donor and batch of the panel's cells.
    """
    unit = unit_column(cells)
    if unit is None:
        return (
            "neither the donor nor the batch of a cell is known, so all cells count as one sample and no claim is "
            "about donors; name the column with scsae extract DATA --donor COLUMN"
        )
    n = units_by_split(cells).get("test", 0)
    if n >= ENOUGH_UNITS:
        return None
    instead = " (no donor is known, so batches are used)" if unit == "batch" else ""
    units, least = UNITS[unit], 2.0 ** (1 - max(1, n))
    return (
        f"the test cells are of {n} {unit if n == 1 else units}{instead}, with which no p across {units} can be below "
        f"{least:.3g}: no claim can be generalised to other {units}, whatever its q"
    )


def labels_within_batches(cells: pl.DataFrame, kinds: Sequence[str]) -> list[str]:
    """Those of the label columns `kinds` that a cell's batch determines: no batch has cells of two labels.

    There is no such kind where fewer than two labels are known.
    """
    found = []
    for kind in kinds:
        pairs = cells.select("batch", kind).drop_nulls().unique()
        if pairs[kind].n_unique() > 1 and not pairs["batch"].is_duplicated().any():
            found.append(kind)
    return found


def confounded_labels(cells: pl.DataFrame, kinds: Sequence[str]) -> str | None:
    """Why a feature of some labels cannot be told from one of a batch, as a sentence; None where no label is so.

    `cells`: the column batch of the panel's cells, and those of the labels.
    """
    if not (found := labels_within_batches(cells, kinds)):
        return None
    names = " and ".join(found)
    return (
        f"every batch has cells of one {' and one '.join(found)} alone, so a feature of {names} also differs between "
        f"batches and may be classed as batch: name as --batch a column that varies within {names}, or none"
    )
