"""The comparison of an SAE with its baselines: which runs belong together, and the tables `comparison` and
`representation` of them (`feature_store.associations.comparison` has the statistics).

A baseline of an SAE reads the same cells in the same way (data set, pooling, level, fused or stored), stands in tables
about the same gene sets, and was fitted to the same activations at the same k; a random model's SAE has the same
configuration and training on activations that differ in nothing but the model's weights.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from feature_store import FeatureStore
from feature_store.associations.comparison import TABLES, Representation, compare, describe, summarise
from feature_store.errors import NotFoundError
from feature_store.query.runs import control_of
from feature_store.storage import commit
from feature_store.storage.layout import SUMMARY, Layout, run_id
from pipelines.baseline import Reference
from pipelines.errors import UsageError
from pipelines.runtime.progress import progress_bar
from pipelines.runtime.stage import FORMAT_VERSION, parent_run

SAE = "sae"
"""Name of the SAE among its representations."""
FIGURES = {"l0": "select_l0", "fvu": "select_fvu", "recovery": "select_recovery"}


class Comparison(NamedTuple):
    """The run that holds it, and its tables."""

    run: str
    comparison: pl.DataFrame
    representation: pl.DataFrame


def compare_with_baselines(store: Path, run: str | None = None) -> Comparison:
    """Compare the SAE of an associations run with all its baselines in the store; read back where it was done.

    Raises:
        NotFoundError: there are no associations.
        UsageError: the run is a baseline itself, or there is none of it.
    """
    layout = Layout(store)
    reference = Reference.of(layout, parent_run(layout, "associations", run, option="--associations"))
    found = baselines_of(layout, reference)
    if not found:
        raise UsageError(
            f"associations/{reference.run} have no baseline to compare with; {how_to_make(store, reference.run)}"
        )
    plan = {"format": FORMAT_VERSION, "associations": reference.run, "baselines": found}
    folder = layout.comparisons_dir(run_id(plan))

    def tables() -> dict[str, pl.DataFrame]:
        with progress_bar("compare", len(found) + 1, "representations") as report:
            own, *others = [_opened(layout, name, one) for name, one in {SAE: reference.run, **found}.items()]
            made = {"comparison": compare(own, others), "representation": describe([own, *others])}
            report(len(found) + 1)
        return made

    if any(commit.verify(folder / name) for name in ("comparison", "representation")):
        for name, frame in tables().items():
            commit.write_table(folder / name, frame, {**plan, "table": name})
    return Comparison(
        folder.name, commit.read_table(folder / "comparison"), commit.read_table(folder / "representation")
    )


def baselines_of(layout: Layout, reference: Reference) -> dict[str, str]:
    """The newest associations run of each baseline of the reference in the store, by name."""
    found: dict[str, str] = {}
    for name, other in _controls(layout):
        if name not in found and _belongs(reference, other):
            found[name] = other.run
    return dict(sorted(found.items()))


def excess_in_words(store: Path, run: str) -> str:
    """The line below the associations of an SAE: its excess over the baselines, or the command that makes them."""
    layout = Layout(store)
    if control := control_of(layout, "associations", run):
        return f"this is a control ({control}): commands take it only where it is named"
    reference = Reference.chain(layout, run)
    if not baselines_of(layout, reference):
        return f"no baseline to hold this against: {how_to_make(store, run)}"
    return in_words(compare_with_baselines(store, run))


def in_words(found: Comparison) -> str:
    """The headline as one line."""
    parts = [
        f"{row['target_kind']} {row['statistic']} {row['mean_excess']:+.3f} ({row['reference']:.3f}, "
        f"{row['n']} targets)"
        for row in summarise(found.comparison).iter_rows(named=True)
    ]
    names = ", ".join(name for name in found.representation["representation"] if name != SAE)
    return f"mean excess over the best baseline ({names}), on test cells: {'; '.join(parts) or 'no target in common'}"


def how_to_make(store: Path, run: str) -> str:
    """The command that makes the baselines of an associations run."""
    return f"`scsae baseline --associations {run} --store {store}` makes neurons, PCA, ICA and random directions"


def _controls(layout: Layout) -> Iterator[tuple[str, Reference]]:
    """Name and chain of the complete associations of controls, newest first, unless a part of the chain is gone."""
    for info in layout.runs("associations"):
        if info.complete and (control := control_of(layout, "associations", info.run)):
            with contextlib.suppress(NotFoundError):
                yield control, Reference.chain(layout, info.run)


def _belongs(reference: Reference, other: Reference) -> bool:
    """Whether the second is a baseline of the first; see the module."""
    same_tables = all(reference.associations[key] == other.associations[key] for key in ("dataset", "gene_sets"))
    same_codes = _reading(reference.codes) == _reading(other.codes)
    if other.sae.get("control") is None:
        of_model = {"model_digest", "control", "format_version"}
        return (
            same_tables
            and same_codes
            and all(reference.sae[key] == other.sae[key] for key in ("sae", "train", "site"))
            and _without(reference.activations.plan, of_model) == _without(other.activations.plan, of_model)
        )
    shape = other.sae["shape"]
    return (
        same_tables
        and same_codes
        and other.sae["activations"] == reference.sae["activations"]
        and shape == {key: reference.sae["sae"][key] for key in shape}
    )


def _reading(codes: dict[str, Any]) -> dict[str, Any]:
    """How cells were read, whatever the SAE."""
    fused = None if codes["fused"] is None else _without(codes["fused"], {"model_digest"})
    return {"fused": fused, **{key: codes[key] for key in ("dataset", "pooling", "level")}}


def _without(plan: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key not in keys}


def _opened(layout: Layout, name: str, run: str) -> Representation:
    """A representation with the figures that its SAE was committed with."""
    store = FeatureStore.open(layout.root, associations=run)
    plan = commit.Run.open(layout.associations_dir(run) / "features").plan
    summary = json.loads((layout.saes_dir(plan["sae"]) / SUMMARY).read_text())
    return Representation(
        name=name,
        run=run,
        tables={table: store.frame(table) for table in TABLES},
        figures={key: summary.get(entry) for key, entry in FIGURES.items()},
    )
