"""`scsae plot`: what reaches the plots, what is refused, and that every kind draws a store made by the stages."""

import inspect
import shlex
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from feature_store import FeatureStore, plots
from feature_store.errors import InputError, NotFoundError, QueryError
from feature_store.storage.layout import Layout
from pipelines.cli import app
from pipelines.errors import UsageError, exit_code
from pipelines.plot import KINDS


@pytest.fixture
def scsae_plot(tmp_path, monkeypatch):
    """Run the command in an empty folder; its error, raised on purpose, is raised here."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        done = CliRunner().invoke(app, ["plot", *shlex.split(line)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return run


@pytest.fixture
def called(monkeypatch):
    """The calls of plots, by name and arguments, in place of drawing."""
    calls = []
    store = SimpleNamespace(lineage=SimpleNamespace(codes=None), check_feature=lambda feature: None)
    monkeypatch.setattr(FeatureStore, "open", lambda root, **runs: store)

    def record(name, signature, *args, **kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        assert bound.pop("store") is store
        calls.append((name, {key: str(value.path) if key == "save" else value for key, value in bound.items()}))

    for name in plots.__all__:
        function = getattr(plots, name)
        if inspect.isfunction(function):
            monkeypatch.setattr(plots, name, partial(record, name, inspect.signature(function)))
    return calls


PNG = {"save": "a.png"}
REACHES = {
    "umap": ("umap", {"color": ["cell_type"], "split": "test"}),
    "umap --feature 3 --label batch --feature 4 --split all": ("umap", {"color": ["batch", 3, 4], "split": None}),
    "violin --feature 3": ("violin", {"feature": 3, "groupby": None, "split": "test"}),
    "violin --feature 3 --label donor --split select": (
        "violin",
        {"feature": 3, "groupby": ["donor"], "split": "select"},
    ),
    "dotplot": ("dotplot", {"features": None, "groupby": "cell_type"}),
    "dotplot --feature 1 --feature 2 --label batch --split select": (
        "dotplot",
        {"features": [1, 2], "groupby": "batch", "split": "select"},
    ),
    "gene-bars --feature 7 --n 4": ("gene_bars", {"feature": 7, "n": 4}),
    "gene-features --gene CD20 --n 4 --split select": ("gene_features", {"gene": "CD20", "n": 4, "split": "select"}),
    "effect-bars --feature 7 --n 4": ("effect_bars", {"feature": 7, "n": 4}),
    "input-bars --feature 7 --n 4": ("input_bars", {"feature": 7, "n": 4}),
    "geneset_bars --feature 7": ("geneset_bars", {"feature": 7}),
    "density-histogram": ("density_histogram", {}),
    "batch-quadrant": ("batch_quadrant", {}),
    "steering-bars": ("steering_bars", {}),
    "steering-all --steering 5a": ("steering_all", {"run": "5a"}),
    "steering-curve --steering 5a": ("steering_curve", {"run": "5a"}),
    "steering_pareto": ("steering_pareto", {}),
    "steering-distances": ("steering_distances", {}),
    "steering-map": ("steering_map", {}),
    "steering-head --n 5": ("steering_head", {"n": 5}),
}


@pytest.mark.parametrize("line", REACHES)
def test_options_reach_the_plot(scsae_plot, called, line):
    name, wanted = REACHES[line]
    assert scsae_plot(f"{line} --save a.png --store s").stdout == "a.png\n"
    assert called == [(name, {**wanted, **PNG})]


def test_a_size_and_the_pixels_per_inch_are_those_of_the_file_and_what_was_typed_is_its_comment(
    scsae_plot, monkeypatch
):
    saved = []
    monkeypatch.setattr(FeatureStore, "open", lambda root, **runs: None)
    monkeypatch.setattr(plots, "density_histogram", lambda store, save: saved.append(save))
    scsae_plot("density-histogram --size 8x4.5 --dpi 100 --save a.png --store s")
    scsae_plot("density_histogram --save a.svg --store s")
    assert [(file.size, file.dpi) for file in saved] == [((8.0, 4.5), 100), (None, 200)]
    assert saved[0].command == "scsae plot density-histogram --dpi 100 --size 8x4.5"


def test_the_associations_and_codes_that_are_named_are_read_and_are_in_the_comment_of_the_file(scsae_plot, monkeypatch):
    opened, saved = [], []
    monkeypatch.setattr(FeatureStore, "open", lambda root, **runs: opened.append(runs))
    monkeypatch.setattr(plots, "density_histogram", lambda store, save: saved.append(save))
    scsae_plot("density-histogram --associations 4f2a --codes 81c0 --save a.png --store s")
    assert opened == [{"associations": "4f2a", "codes": "81c0"}]
    assert saved[0].command == "scsae plot density-histogram --associations 4f2a --codes 81c0"


def test_every_plot_has_its_kind():
    functions = {name for name in plots.__all__ if name.islower() and name != "best_features"}
    assert {name.replace("-", "_") for name in KINDS} == functions


REFUSED = {
    "violn": "'violn'.*'violin'.*umap, violin",
    "violin": "violin .*--feature .*0.*scsae features --label LABEL --store s",
    "gene-bars --feature 1 --feature 2": "gene-bars .*--feature .*2",
    "density-histogram --feature 1 --n 3": (
        "density-histogram .*--feature, --n; .*--save, --dpi, --size, --associations, --codes and --store"
    ),
    "umap --steering 5a": "umap .*--steering; .*--feature, --label, --split",
    "umap --n 3": "umap .*--n; .*--feature, --label, --split",
    "dotplot --label a --label b": "--label .*2",
    "gene-features --n 3": "gene-features .*--gene MS4A1",
    "gene-bars --gene CD20 --feature 1": "gene-bars .*--gene; .*--feature, --n, --split",
    "umap --size 8": "--size was '8'.*8x5",
    "umap --size 0x5": "--size was '0x5'.*8x5",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_kind_does_not_take_is_refused_and_nothing_is_written(scsae_plot, called, tmp_path, line):
    with pytest.raises(UsageError, match=REFUSED[line]) as refused:
        scsae_plot(f"{line} --save new/a.png --store s")
    assert exit_code(refused.value) == 2
    assert called == []
    assert not list(tmp_path.iterdir())


def test_a_plot_without_a_file_is_refused(scsae_plot):
    done = scsae_plot("umap")
    assert done.exit_code == 2
    assert "--save" in done.stderr


def test_an_unknown_feature_is_refused_before_the_map_of_the_cells_is_made(scsae_plot, own_store, monkeypatch):
    monkeypatch.setattr("feature_store.maps.cells.cell_map", lambda *_: pytest.fail("the map is made"))
    monkeypatch.setattr("feature_store.maps.cells.has_cell_map", lambda *_: False)
    with pytest.raises(QueryError, match=r"no feature 48 .*0 to 47") as refused:
        scsae_plot(f"umap --feature 48 --save a.png --store {own_store}")
    assert exit_code(refused.value) == 2


def test_every_kind_draws_a_store_that_the_stages_made(scsae_plot, own_store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "feature_store.maps.cells.lay_out",
        lambda codes, _: np.random.default_rng(0).normal(size=(codes.shape[0], 2)).astype(np.float32),
    )
    store = FeatureStore.open(own_store)
    feature = store.sql("SELECT feature_id FROM feature_geneset WHERE split = 'select' AND overlap > 0 LIMIT 1")
    gene = store.sql("SELECT feature_id FROM feature_gene WHERE split = 'test' LIMIT 1").item()
    drawn = [
        "umap --feature 3 --label cell_type",
        "violin --feature 3",
        "dotplot --feature 3",
        f"gene-bars --feature {gene}",
    ]
    drawn += ["density-histogram", "batch-quadrant"]
    drawn += [f"geneset-bars --feature {feature.item()}"] if feature.height else []
    for line in drawn:
        done = scsae_plot(f"{line} --save {line.split()[0]}.svg --store {own_store}")
        assert (tmp_path / done.stdout.strip()).stat().st_size > 5_000
    with pytest.raises(QueryError, match="scsae steer --store"):
        scsae_plot(f"steering-bars --save s.svg --store {own_store}")
    with pytest.raises(QueryError, match=r"9999.* 0 to 47"):
        scsae_plot(f"violin --feature 9999 --save v.svg --store {own_store}")
    run = Layout(own_store).latest("associations").run
    scsae_plot(f"density-histogram --associations {run[:8]} --save named.svg --store {own_store}")
    with pytest.raises(NotFoundError, match=r"'zzz'.*associations"):
        scsae_plot(f"density-histogram --associations zzz --save z.svg --store {own_store}")
    with pytest.raises(InputError, match=r"q\.jpeg.*\.png, \.pdf, \.svg"):
        scsae_plot(f"batch-quadrant --save q.jpeg --store {own_store}")
    assert {path.name for path in tmp_path.glob("*.*")} >= {"umap.svg", "dotplot.svg", "named.svg"}
    assert not {"s.svg", "v.svg", "z.svg", "q.jpeg"} & {path.name for path in tmp_path.iterdir()}
