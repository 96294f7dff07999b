"""`scsae plot KIND`: the pictures of `feature_store.plots` as files, without Python code."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.query.suggestions import did_you_mean
from pipelines.errors import UsageError
from pipelines.runtime.progress import activity

if TYPE_CHECKING:
    from feature_store import FeatureStore
    from feature_store.plots import ImageFile

RUNS = ("associations", "codes")
"""The options of every plot that name the runs of the store to read."""


@dataclass(frozen=True, kw_only=True)
class PlotRequest:
    """The kind and the options of a `scsae plot` command; an option that was not given is None or empty."""

    kind: str
    feature: Sequence[int]
    label: Sequence[str]
    split: str | None
    n: int | None
    save: Path
    steering: str | None = None
    gene: str | None = None
    dpi: int | None = None
    size: str | None = None
    associations: str | None = None
    codes: str | None = None

    def given(self) -> set[str]:
        """Names of the options that were given."""
        values = {
            "feature": self.feature,
            "label": self.label,
            "split": self.split,
            "n": self.n,
            "steering": self.steering,
            "gene": self.gene,
        }
        return {name for name, value in values.items() if value not in (None, [], ())}

    def shown(self) -> str | None:
        """The split to show, `test` by default; None shows all cells."""
        return None if self.split == "all" else self.split or "test"

    def options(self, *names: str) -> dict[str, object]:
        """The keyword arguments of a plot: `save`, and those of the named options that were given."""
        return {"save": self.file(), **{name: getattr(self, name) for name in names if name in self.given()}}

    def command(self) -> str:
        """What was typed, less the store and the file, whose places are of one machine."""
        options = {"feature": self.feature, "label": self.label}
        options |= {name: [getattr(self, name)] for name in ("gene", "split", "n", "steering", *RUNS, "dpi", "size")}
        given = [(name, value) for name, values in options.items() for value in values if value is not None]
        return shlex.join(
            ["scsae", "plot", self.kind, *(word for name, value in given for word in (f"--{name}", str(value)))]
        )

    def file(self) -> "ImageFile":
        """The file to save to. UsageError for a size that is not WIDTHxHEIGHT."""
        from feature_store.plots import ImageFile

        given = {} if self.dpi is None else {"dpi": self.dpi}
        return ImageFile(path=self.save, size=self.inches(), command=self.command(), **given)

    def inches(self) -> tuple[float, float] | None:
        """The width and height of `size`, None where it was not given. UsageError if they cannot be told."""
        if self.size is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)[x×,](\d+(?:\.\d+)?)", self.size.strip())
        if found is None or min(float(found[1]), float(found[2])) == 0:
            raise UsageError(f"--size was {self.size!r}; give width x height in inches, such as 8x5")
        return float(found[1]), float(found[2])


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of plot: what it shows, how it is drawn, which options it takes, and how many features it needs."""

    about: str
    draw: "Callable[[FeatureStore, PlotRequest], object]"
    takes: frozenset[str] = frozenset()
    features: tuple[int, int | None] = (0, None)
    """The smallest and the largest number of --feature; None sets no largest."""


def _umap(store: "FeatureStore", request: PlotRequest) -> None:
    from feature_store import plots
    from feature_store.maps.cells import cell_map, has_cell_map

    codes = store.lineage.codes
    for feature in request.feature:
        store.check_feature(feature)
    if codes is not None and not has_cell_map(store.layout, codes):
        with activity("umap", "computes the map of the cells, once for these codes"):
            cell_map(store.layout, codes)
    plots.umap(store, [*request.label, *request.feature] or ["cell_type"], split=request.shown(), save=request.file())


def _violin(store: "FeatureStore", request: PlotRequest) -> None:
    from feature_store import plots

    plots.violin(store, request.feature[0], list(request.label) or None, split=request.shown(), save=request.file())


def _dotplot(store: "FeatureStore", request: PlotRequest) -> None:
    from feature_store import plots

    if len(request.label) > 1:
        raise UsageError(f"--label was given {len(request.label)} times, and a dotplot has one label; give it once")
    by = request.label[0] if request.label else "cell_type"
    plots.dotplot(store, list(request.feature) or None, by, **request.options("split"))  # type: ignore[arg-type]


def _of_one_feature(name: str) -> "Callable[[FeatureStore, PlotRequest], object]":
    """What draws a plot of one feature, which takes --n and, for some, --split."""

    def draw(store: "FeatureStore", request: PlotRequest) -> None:
        from feature_store import plots

        getattr(plots, name)(store, request.feature[0], **request.options("split", "n"))

    return draw


def _gene_features(store: "FeatureStore", request: PlotRequest) -> None:
    from feature_store import plots

    plots.gene_features(store, str(request.gene), **request.options("split", "n"))  # type: ignore[arg-type]


def _probe_lines(store: "FeatureStore", request: PlotRequest) -> None:
    from feature_store import plots

    if len(request.label) > 1:
        raise UsageError(f"--label was given {len(request.label)} times, and probe-lines shows one label; give it once")
    plots.probe_lines(store, label_kind=request.label[0] if request.label else None, save=request.file())


def _of_store(name: str) -> "Callable[[FeatureStore, PlotRequest], object]":
    """What draws a plot of the whole store."""

    def draw(store: "FeatureStore", request: PlotRequest) -> None:
        from feature_store import plots

        getattr(plots, name)(store, save=request.file())

    return draw


def _of_run(name: str) -> "Callable[[FeatureStore, PlotRequest], object]":
    """What draws a plot of one steering run, which takes --steering and, for some, --n."""

    def draw(store: "FeatureStore", request: PlotRequest) -> None:
        from feature_store import plots

        run = {} if request.steering is None else {"run": request.steering}
        getattr(plots, name)(store, **run, **request.options("n"))

    return draw


_CELLS = frozenset({"feature", "label", "split"})
_ONE = frozenset({"feature", "split", "n"})
_RUN = frozenset({"steering"})
KINDS: Mapping[str, Kind] = {
    "umap": Kind(about="features and labels on a map of the cells", draw=_umap, takes=_CELLS),
    "violin": Kind(about="the code of a feature by label and by batch", draw=_violin, takes=_CELLS, features=(1, 1)),
    "dotplot": Kind(about="features by label, with significant effects marked", draw=_dotplot, takes=_CELLS),
    "gene-bars": Kind(about="the genes of a feature", draw=_of_one_feature("gene_bars"), takes=_ONE, features=(1, 1)),
    "gene-features": Kind(about="the features of a gene", draw=_gene_features, takes=frozenset({"gene", "split", "n"})),
    "geneset-bars": Kind(
        about="the gene sets of a feature", draw=_of_one_feature("geneset_bars"), takes=_ONE, features=(1, 1)
    ),
    "effect-bars": Kind(
        about="what a feature does to predictions of genes, beside its null",
        draw=_of_one_feature("effect_bars"),
        takes=frozenset({"feature", "n"}),
        features=(1, 1),
    ),
    "edge-graph": Kind(
        about="the features of other layers that change a feature, and those that it changes",
        draw=_of_one_feature("edge_graph"),
        takes=frozenset({"feature", "n"}),
        features=(1, 1),
    ),
    "input-bars": Kind(
        about="which genes make a feature fire, from their own token and from others",
        draw=_of_one_feature("input_bars"),
        takes=frozenset({"feature", "n"}),
        features=(1, 1),
    ),
    "probe-lines": Kind(
        about="how well few features tell labels, for the SAE and what it is held against",
        draw=_probe_lines,
        takes=frozenset({"label"}),
    ),
    "density-histogram": Kind(about="how often features fire", draw=_of_store("density_histogram")),
    "batch-quadrant": Kind(
        about="the batch effect of features against their cell-context effect", draw=_of_store("batch_quadrant")
    ),
    "steering-all": Kind(about="every plot of a steering run, in a folder", draw=_of_run("steering_all"), takes=_RUN),
    "steering-bars": Kind(
        about="the effect of an intervention beside its nulls", draw=_of_run("steering_bars"), takes=_RUN
    ),
    "steering-curve": Kind(
        about="a metric along doses and numbers of features", draw=_of_run("steering_curve"), takes=_RUN
    ),
    "steering-pareto": Kind(
        about="the gain of an intervention against its cost", draw=_of_run("steering_pareto"), takes=_RUN
    ),
    "steering-distances": Kind(
        about="distances before and after steering, by cell type", draw=_of_run("steering_distances"), takes=_RUN
    ),
    "steering-map": Kind(about="cells before and after steering, on a map", draw=_of_run("steering_map"), takes=_RUN),
    "steering-head": Kind(
        about="masked-gene predictions in steered cells", draw=_of_run("steering_head"), takes=_RUN | {"n"}
    ),
}


def plot(request: PlotRequest, store: Path) -> None:
    """Draw one plot of a store into a file.

    Raises:
        UsageError: there is no such kind, or it does not take an option that was given; nothing is drawn.
        InputError, QueryError, NotFoundError: as the plot itself, and `FeatureStore.open`.
    """
    chosen = check_request(request, store)
    from feature_store import FeatureStore

    runs = {name: getattr(request, name) for name in RUNS}
    chosen.draw(FeatureStore.open(store, **runs), request)


def check_request(request: PlotRequest, store: Path) -> Kind:
    """Return the kind of plot that was asked for. UsageError as from `plot`."""
    kind = request.kind
    chosen = KINDS.get(kind.replace("_", "-"))
    if chosen is None:
        raise UsageError(f"there is no plot {kind!r}{did_you_mean(kind, list(KINDS))}; plots are {', '.join(KINDS)}")
    if unused := sorted(request.given() - chosen.takes):
        of_every_plot = "no option but --save, --dpi, --size, --associations, --codes and --store"
        takes = ", ".join(f"--{name}" for name in sorted(chosen.takes)) or of_every_plot
        raise UsageError(f"the plot {kind} does not take {', '.join(f'--{name}' for name in unused)}; it takes {takes}")
    least, most = chosen.features
    if len(request.feature) < least or (most is not None and len(request.feature) > most):
        from feature_store.storage.layout import Layout

        raise UsageError(
            f"the plot {kind} shows {most} feature, and --feature was given {len(request.feature)} times; give it once "
            f"(`scsae features --label LABEL {Layout(store).store_option}` lists features)"
        )
    if "gene" in chosen.takes and request.gene is None:
        raise UsageError(f"the plot {kind} shows one gene, and --gene was not given; give it, such as --gene MS4A1")
    request.inches()
    return chosen
