"""`scsae plot KIND`: the pictures of `feature_store.plots` as files, for those who write no Python."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.query.suggestions import did_you_mean
from pipelines.errors import UsageError
from pipelines.runtime.progress import stderr_console

if TYPE_CHECKING:
    from feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was given on the command line; None and empty where it was not."""

    feature: Sequence[int]
    label: Sequence[str]
    split: str | None
    n: int | None
    save: Path
    steering: str | None = None

    def given(self) -> set[str]:
        """Names of the options that were given."""
        values = {
            "feature": self.feature,
            "label": self.label,
            "split": self.split,
            "n": self.n,
            "steering": self.steering,
        }
        return {name for name, value in values.items() if value not in (None, [], ())}

    def shown(self) -> str | None:
        """The split of a plot that can show all cells too."""
        return None if self.split == "all" else self.split or "test"

    def options(self, *names: str) -> dict[str, object]:
        """The keyword arguments of a plot: `save`, and those of the named options that were given."""
        return {"save": self.save, **{name: getattr(self, name) for name in names if name in self.given()}}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One plot: what it shows, which options it takes, how many features it needs, and how it is drawn."""

    about: str
    draw: "Callable[[FeatureStore, Asked], object]"
    takes: frozenset[str] = frozenset()
    features: tuple[int, int | None] = (0, None)
    """The least and the largest number of --feature; None: any."""


def _umap(store: "FeatureStore", asked: Asked) -> None:
    from feature_store import plots
    from feature_store.maps.cells import has_umap

    codes = store.lineage.codes
    if codes is not None and not has_umap(store.layout, codes):
        stderr_console().print("umap         lays the cells out, once for these codes: 10 s or more")
    plots.umap(store, [*asked.label, *asked.feature] or ["cell_type"], split=asked.shown(), save=asked.save)


def _violin(store: "FeatureStore", asked: Asked) -> None:
    from feature_store import plots

    plots.violin(store, asked.feature[0], list(asked.label) or None, split=asked.shown(), save=asked.save)


def _dotplot(store: "FeatureStore", asked: Asked) -> None:
    from feature_store import plots

    if len(asked.label) > 1:
        raise UsageError(f"--label was given {len(asked.label)} times; a dotplot is by one label: give it once")
    by = asked.label[0] if asked.label else "cell_type"
    plots.dotplot(store, list(asked.feature) or None, by, **asked.options("split"))  # type: ignore[arg-type]


def _of_one(name: str) -> "Callable[[FeatureStore, Asked], object]":
    """A plot of one feature with the options split and n."""

    def draw(store: "FeatureStore", asked: Asked) -> None:
        from feature_store import plots

        getattr(plots, name)(store, asked.feature[0], **asked.options("split", "n"))

    return draw


def _of_all(name: str) -> "Callable[[FeatureStore, Asked], object]":
    """A plot of the whole store."""

    def draw(store: "FeatureStore", asked: Asked) -> None:
        from feature_store import plots

        getattr(plots, name)(store, save=asked.save)

    return draw


def _of_run(name: str) -> "Callable[[FeatureStore, Asked], object]":
    """A plot of one steering run with the options steering and n."""

    def draw(store: "FeatureStore", asked: Asked) -> None:
        from feature_store import plots

        run = {} if asked.steering is None else {"run": asked.steering}
        getattr(plots, name)(store, **run, **asked.options("n"))

    return draw


_CELLS = frozenset({"feature", "label", "split"})
_ONE = frozenset({"feature", "split", "n"})
_RUN = frozenset({"steering"})
KINDS: Mapping[str, Kind] = {
    "umap": Kind(about="features and labels on a map of the cells", draw=_umap, takes=_CELLS),
    "violin": Kind(about="a feature by label and by batch", draw=_violin, takes=_CELLS, features=(1, 1)),
    "dotplot": Kind(about="features by label, with what is significant", draw=_dotplot, takes=_CELLS),
    "gene-bars": Kind(about="the genes of a feature", draw=_of_one("gene_bars"), takes=_ONE, features=(1, 1)),
    "geneset-bars": Kind(about="its gene sets", draw=_of_one("geneset_bars"), takes=_ONE, features=(1, 1)),
    "density-histogram": Kind(about="how often features fire", draw=_of_all("density_histogram")),
    "batch-quadrant": Kind(about="batch against cell context", draw=_of_all("batch_quadrant")),
    "steering-all": Kind(about="every plot of a steering run, in a folder", draw=_of_run("steering_all"), takes=_RUN),
    "steering-bars": Kind(about="an intervention beside its nulls", draw=_of_run("steering_bars"), takes=_RUN),
    "steering-curve": Kind(about="along doses and numbers of features", draw=_of_run("steering_curve"), takes=_RUN),
    "steering-pareto": Kind(about="what is gained against what it costs", draw=_of_run("steering_pareto"), takes=_RUN),
    "steering-distances": Kind(about="before and after by type", draw=_of_run("steering_distances"), takes=_RUN),
    "steering-map": Kind(about="cells before and after on a map", draw=_of_run("steering_map"), takes=_RUN),
    "steering-head": Kind(about="what the model now says of genes", draw=_of_run("steering_head"), takes=_RUN | {"n"}),
}


def plot(kind: str, asked: Asked, store: Path) -> None:
    """Draw one plot of a store into a file.

    Raises:
        UsageError: no such kind, or options that it does not take; nothing was drawn.
        InputError, QueryError, NotFoundError: as the plot itself, and `FeatureStore.open`.
    """
    chosen = KINDS.get(kind.replace("_", "-"))
    if chosen is None:
        raise UsageError(f"no plot of kind {kind!r}{did_you_mean(kind, list(KINDS))}; kinds are {', '.join(KINDS)}")
    if unused := sorted(asked.given() - chosen.takes):
        takes = ", ".join(f"--{name}" for name in sorted(chosen.takes)) or "no options but --save and --store"
        raise UsageError(f"{kind} takes no {' and no '.join(f'--{name}' for name in unused)}; it takes {takes}")
    least, most = chosen.features
    if len(asked.feature) < least or (most is not None and len(asked.feature) > most):
        raise UsageError(
            f"{kind} is of {most} feature; got {len(asked.feature)}: give --feature N once "
            f"(`scsae features --label LABEL --store {store}` finds some)"
        )
    from feature_store import FeatureStore

    chosen.draw(FeatureStore.open(store), asked)
