"""The comparison of an SAE with its baselines: this module finds the runs that belong together and writes the tables
`comparison` and `representation` (`feature_store.associations.comparison` computes the statistics).

A baseline of an SAE encodes the same cells in the same way (data set, pooling, level, fused or stored), is associated
with the same gene sets, and was fitted to the same activations at the same k. The SAE of a random model has the same
configuration and training, on activations that differ only in the weights of the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from feature_store import FeatureStore
from feature_store.associations import claims, comparison
from feature_store.associations.comparison import TABLES, Representation, compare, describe, summarise
from feature_store.errors import NotFoundError, OutdatedRunError
from feature_store.query.html_table import html_table
from feature_store.query.runs import RunChain, resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import SUMMARY, Layout
from feature_store.storage.plans import ActivationsPlan, AssociationsPlan, CodesPlan, ComparisonPlan, constants_of
from pipelines.baseline import chain_of_sae
from pipelines.errors import UsageError
from pipelines.runtime.progress import progress_bar, stderr_console

SAE = "sae"
"""Name of the SAE among its representations."""
FIGURES = {"l0": "select_l0", "fvu": "select_fvu", "recovery": "select_recovery"}


class Comparison(NamedTuple):
    """A comparison: the name of its run, and its two tables."""

    run: str
    comparison: pl.DataFrame
    representation: pl.DataFrame

    def _repr_html_(self) -> str:
        said = html_table(f"comparisons/{self.run}", [(sentence,) for sentence in verdicts(self)])
        return f"{said}{self.representation._repr_html_()}{self.comparison._repr_html_()}"


def compare_with_baselines(store: Path, run: str | None = None) -> Comparison:
    """Compare the SAE of an associations run with all its baselines in the store, or read an existing comparison.

    Raises:
        NotFoundError: there are no associations.
        UsageError: the run is a baseline itself, or it has no baseline in the store.
    """
    layout = Layout(store)
    info = resolve_run(layout, "associations", run, option="--associations")
    chain = chain_of_sae(layout, info, option="--associations")
    found = baselines_of(layout, chain)
    if not found:
        raise UsageError(f"associations/{chain.run} have no baseline to compare with; {how_to_make(store, chain.run)}")
    plan = ComparisonPlan(associations=chain.run, baselines=found, constants=constants_of((claims, comparison)))
    folder = layout.comparisons_dir(plan.id)

    def tables() -> dict[str, pl.DataFrame]:
        with progress_bar("compare", len(found) + 1, "representations") as report:
            own, *others = [_opened(layout, name, one) for name, one in {SAE: chain.run, **found}.items()]
            made = {"comparison": compare(own, others), "representation": describe([own, *others])}
            report(len(found) + 1)
        return made

    if not all(commit.is_intact(folder / name) for name in ("comparison", "representation")):
        for name, frame in tables().items():
            commit.write_table(folder / name, frame, plan.table(name))
    return Comparison(
        folder.name, commit.read_table(folder / "comparison"), commit.read_table(folder / "representation")
    )


def baselines_of(layout: Layout, chain: RunChain) -> dict[str, str]:
    """Return the newest associations run of each baseline of the chain's SAE in the store, by name."""
    found: dict[str, str] = {}
    for name, other in _controls(layout):
        if name not in found and _belongs(chain, other):
            found[name] = other.run
    return dict(sorted(found.items()))


def excess_in_words(store: Path, run: str) -> str:
    """Return a line on the excess of an SAE over its baselines, or on the command that makes them."""
    layout = Layout(store)
    chain = RunChain.of(layout, run)
    if control := chain.associations.control_of:
        return f"this is a control ({control}): commands take it only where it is named"
    if not baselines_of(layout, chain):
        return f"no baseline to hold this against: {how_to_make(store, run)}"
    return in_words(compare_with_baselines(store, run))


def in_words(found: Comparison) -> str:
    """Return the mean excess over the best baseline as one line of text."""
    parts = [
        f"{row['target_kind']} {row['statistic']} {row['mean_excess']:+.3f} ({row['reference']:.3f}, "
        f"{row['n']} targets)"
        for row in summarise(found.comparison).iter_rows(named=True)
    ]
    names = ", ".join(name for name in found.representation["representation"] if name != SAE)
    return f"mean excess over the best baseline ({names}), on test cells: {'; '.join(parts) or 'no target in common'}"


def verdicts(found: Comparison) -> list[str]:
    """Return a sentence for each kind of target: whether the SAE is above its best baseline, by how much, how often.

    "Above" and "below" are said where the 95 % interval of the mean excess over targets leaves out 0. Targets share
    cells, so the interval says how the excess varies among targets, not how certain it is.
    """
    return [_verdict(row) for row in summarise(found.comparison).iter_rows(named=True)]


def _verdict(row: Mapping[str, Any]) -> str:
    name = f"{row['target_kind']}, {row['statistic']}"
    means = f"{row['reference']:.3f} against {row['best_baseline']:.3f} of the best baseline of each target"
    n_better = round(row["share_better"] * row["n"])
    counted = f"better for {n_better} of {row['n']} targets; most often the best baseline: {row['most_often']}"
    if row["low"] is None:
        return f"{name}: {means} ({counted}); {row['n']} targets are too few for a verdict"
    if row["low"] > 0:
        place = "the SAE is above its baselines"
    elif row["high"] < 0:
        place = "the SAE is below its baselines"
    else:
        place = "the SAE and its baselines do not differ"
    interval = (
        f"difference {row['mean_excess']:+.3f}, 95 % interval over targets {row['low']:+.3f} to {row['high']:+.3f}"
    )
    return f"{name}: {place}, {means} ({interval}; {counted})"


def how_to_make(store: Path, run: str) -> str:
    """Return a sentence with the command that makes the baselines of an associations run."""
    command = f"scsae baseline --associations {run} {Layout(store).store_option}"
    return f"`{command}` makes neurons, PCA, ICA and random directions"


def _controls(layout: Layout) -> Iterator[tuple[str, RunChain]]:
    """Yield name and chain of the controls' complete associations, newest first; warn of each with a missing run."""
    for info in layout.runs("associations"):
        if info.complete:
            try:
                chain = RunChain.of(layout, info.run)
            except (NotFoundError, OutdatedRunError) as error:
                text = f"warning: associations/{info.run} is left out of the comparison: {error}"
                stderr_console().print(text, style="yellow", soft_wrap=True)
                continue
            if chain.associations.control_of is not None:
                yield chain.associations.control_of, chain


def _belongs(chain: RunChain, other: RunChain) -> bool:
    """Return whether `other` is a baseline of `chain`; see the module."""
    one, two = chain.associations, other.associations
    same_tables = all(
        getattr(one, name) == getattr(two, name) for name in ("dataset", "gene_sets", "config", "constants")
    )
    if not same_tables or _reading(chain.codes) != _reading(other.codes):
        return False
    fit = other.sae.baseline
    if fit is not None and _digest_read(chain.codes) != _digest_read(other.codes):
        # given vectors of the same cells are as many codes as there are vectors
        return False
    if fit is None:
        same_sae = (chain.sae.sae, chain.sae.train, chain.sae.site) == (other.sae.sae, other.sae.train, other.sae.site)
        is_trained = chain.sae.imported is None and other.sae.imported is None
        return is_trained and same_sae and _without_model(chain.activations) == _without_model(other.activations)
    return (
        other.sae.activations == chain.sae.activations
        and (fit.d_model, fit.k) == (chain.sae.d_model, chain.sae.k)
        and fit.n_features in (None, chain.sae.n_features)
    )


def _reading(codes: CodesPlan) -> CodesPlan:
    """Return the plan of codes without the entries that depend on the SAE, on the model's weights or on the shards."""
    fused = None if codes.fused is None else replace(codes.fused, model_digest="")
    cut = replace(codes.cut, panel_cells=1, other_cells=1)
    return replace(codes, fused=fused, cut=cut, control_of=None, sae="", sae_manifest="", activations="", n_features=0)


def _digest_read(codes: CodesPlan) -> str | None:
    """Return the digest of the model, or of the given vectors, that codes were made of; None for stored activations."""
    return None if codes.fused is None else codes.fused.model_digest


def _without_model(activations: ActivationsPlan) -> ActivationsPlan:
    return replace(activations, control_of=None, model_digest="")


def _opened(layout: Layout, name: str, run: str) -> Representation:
    """Return a representation with the metrics in the summary of its SAE."""
    store = FeatureStore.open(layout.root, associations=run)
    plan = AssociationsPlan.of(commit.Run.open(layout.associations_dir(run) / "features"))
    summary = commit.Run.open(layout.saes_dir(plan.sae)).read_json(SUMMARY)
    return Representation(
        name=name,
        run=run,
        tables={table: store.panel_cells() if table == "cells" else store.frame(table) for table in TABLES},
        figures={key: summary.get(entry) for key, entry in FIGURES.items()},
    )
