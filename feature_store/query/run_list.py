"""What a store holds: every run with its kind, its state, what it was made of, when, and how large it is."""

from collections.abc import Mapping

import polars as pl

from feature_store.errors import NotFoundError, OutdatedRunError, StoreError
from feature_store.query.runs import plan_of
from feature_store.storage.commit import Run
from feature_store.storage.layout import KINDS, Layout, RunInfo

MADE_OF: Mapping[str, tuple[str, ...]] = {
    "activations": ("dataset",),
    "saes": ("activations",),
    "codes": ("sae", "dataset"),
    "associations": ("codes",),
    "matches": ("saes",),
    "comparisons": ("associations",),
}
"""Kind of run: the fields of its plan that name what it was made of; of all other kinds it is the SAE."""
SCHEMA = {
    "kind": pl.String,
    "run": pl.String,
    "state": pl.String,
    "control": pl.String,
    "made_of": pl.String,
    "created": pl.String,
    "bytes": pl.Int64,
}


def run_list(layout: Layout, kind: str | None = None) -> pl.DataFrame:
    """The runs of a store, by kind in the order in which stages make them, the newest of each first.

    state: "complete", "incomplete" (the same command resumes it), "lost" (its tables were committed and are gone),
    "damaged", or "of another version". control: what control the run is, or descends from. bytes: of its tables, as far
    as their manifests can be read.
    """
    rows = []
    for name in KINDS if kind is None else (kind,):
        tables = layout.committed(name)
        for info in layout.runs(name):
            state, control, made_of = _about(layout, info)
            rows.append(
                {
                    "kind": name,
                    "run": info.run,
                    "state": state,
                    "control": control,
                    "made_of": made_of,
                    "created": None if info.created is None else f"{info.created:%Y-%m-%d %H:%M:%S}",
                    "bytes": _size(info, tables.get(info.run, set())),
                }
            )
    return pl.DataFrame(rows, schema=SCHEMA)


def _about(layout: Layout, info: RunInfo) -> tuple[str, str | None, str | None]:
    """State, control, and what the run was made of."""
    if info.lost:
        return "lost", None, None
    state = "complete" if info.complete else "incomplete"
    try:
        plan = plan_of(layout, info.kind, info.run)
    except OutdatedRunError:
        return "of another version", None, None
    except NotFoundError:
        return state, None, None
    except StoreError:
        return "damaged", None, None
    control = getattr(plan, "control_of", None)
    if info.kind == "cells":
        return state, control, None
    values = [getattr(plan, field, None) for field in MADE_OF.get(info.kind, ("sae",))]
    texts = [" ".join(value) if isinstance(value, tuple) else str(value) for value in values if value is not None]
    return state, control, " ".join(texts) or None


def _size(info: RunInfo, tables: set[str]) -> int | None:
    """The bytes of the committed tables; None where none can be read."""
    found = []
    for table in tables:
        try:
            found.append(Run.open(info.path / table).manifest().bytes)
        except StoreError:
            continue
    return sum(found) if found else None
