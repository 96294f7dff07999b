"""Plots of steering runs, on a run made by hand: four types of 30 cells, two labels, a grid, nulls and a baseline."""

import shutil

import numpy as np
import polars as pl
import pytest
from figures import collisions, unkeyed_colours
from sampled import sampled
from toy_plans import toy_table

from feature_store import FeatureStore, plots
from feature_store.errors import InputError
from feature_store.plots import canvas
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringResultsPlan

TYPES = ["B", "CD14 Mono", "NK", "CD4 T"]
DOSES, COUNTS = [0.0, 0.5, 1.0, 1.5, 2.0], [5, 10, 20, 50]
NULLS = ["random features", "random direction", "shuffled labels"]
PLAN = {"kind": "condition", "target": "stim", "toward": "ctrl", "sae": None}
WIDTH = 6


@pytest.fixture(autouse=True)
def _no_display():
    import matplotlib as mpl

    before = mpl.get_backend()
    mpl.use("Agg")
    yield
    mpl.use(before)


def remaining(n_features, dose):
    return 1 - 0.55 * min(n_features / 20, 1) * dose / (0.6 + 0.3 * dose) + 0.04 * max(0, dose - 1.5)


def result(condition, role, metric, value, base, *, group="all", n=None, dose=None, half=0.03, chosen=False):
    effect = value - base
    own = role in ("grid", "baseline")
    return {
        "split": "test", "condition": condition, "role": role, "intervention": "shift" if role == "grid" else None,
        "n_features": n, "dose": dose, "metric": metric, "group": group, "n_draws": 20 if role == "null" else 1,
        "n_cells": 120, "value": value, "effect": effect, "low": effect - half, "high": effect + half,
        "p_random_features": 0.048 if own else None, "p_random_direction": 0.048 if own else None,
        "p_shuffled_labels": 0.048 if own else None, "chosen": chosen,
    }  # fmt: skip


def results(x="type_accuracy", y="remaining"):
    """The cross-sections of a grid through 20 features at dose 1, with the distances by type."""
    rows = [result("unsteered", "unsteered", y, 1.0, 1.0, half=0.0), result("unsteered", "unsteered", x, 0.95, 0.95)]
    for n, dose in [(20, d) for d in DOSES] + [(n, 1.0) for n in COUNTS if n != 20]:
        chosen = (n, dose) == (20, 1.0)
        for metric, value, base in ((y, remaining(n, dose), 1.0), (x, 0.95 - 0.01 * dose * n / 20, 0.95)):
            rows.append(result("shift", "grid", metric, value, base, n=n, dose=dose, chosen=chosen))
    for i, null in enumerate(NULLS):
        rows.append(result(null, "null", y, 0.99 + 0.03 * i, 1.0, n=20, dose=1.0, half=0.01))
        rows.append(result(null, "null", x, 0.94 - 0.01 * i, 0.95, n=20, dose=1.0, half=0.004))
    for name, role, value in (("mean difference", "baseline", 0.41), ("floor", "floor", 0.15)):
        rows.append(result(name, role, y, value, 1.0))
        rows.append(result(name, role, x, 0.93, 0.95))
    for i, group in enumerate(TYPES):
        before = 2.0 - 0.3 * i
        conditions = {"unsteered": ("unsteered", 1.0), "shift": ("grid", 0.4 + 0.05 * i), "floor": ("floor", 0.15)}
        conditions |= {null: ("null", 0.98 + 0.02 * j) for j, null in enumerate(NULLS)}
        for condition, (role, share) in conditions.items():
            chosen = condition == "shift"
            rows.append(
                result(condition, role, "distance", before * share, before, group=group, n=20, dose=1.0, chosen=chosen)
            )
    return schemas.conform("steering", pl.DataFrame(rows, infer_schema_length=None))


def cell_table(n=120):
    return pl.DataFrame(
        {
            "cell_idx": np.arange(n), "cell_id": [f"c{i}" for i in range(n)], "dataset": "toy", "split": "test",
            "panel": True,
            "donor": [f"d{i % 3}" for i in range(n)], "batch": [f"b{i % 2}" for i in range(n)],
            "cell_type": [TYPES[i % 4] for i in range(n)],
            "condition": [["ctrl", "stim"][i // 4 % 2] for i in range(n)],
        }
    )  # fmt: skip


def embeddings(cells):
    """Unsteered cells by type and condition; steered ones (variant 7) with half of the condition's difference."""
    rng = np.random.default_rng(0)
    centre = {name: rng.normal(0, 3, WIDTH) for name in TYPES}
    place = np.stack([centre[name] for name in cells["cell_type"]]) + rng.normal(0, 0.5, (cells.height, WIDTH))
    stim = (cells["condition"] == "stim").to_numpy()
    gap = np.array([0, 0, 3, 0, 0, 1.5])
    parts = []
    for variant, share in ((0, 1.0), (7, 0.4)):
        embedded = (place + share * gap * stim[:, None]).astype(np.float32)
        parts.append(
            pl.DataFrame(
                {"cell_idx": cells["cell_idx"], "variant": pl.Series([variant] * cells.height, dtype=pl.Int32),
                 "embedding": embedded},
                schema_overrides={"embedding": pl.Array(pl.Float32, WIDTH)},
            ).filter(pl.lit(variant == 0) | (cells["condition"] == "stim"))
        )  # fmt: skip
    return pl.concat(parts)


def answers(n=60):
    rng = np.random.default_rng(1)
    real = rng.normal(0, 1, n)
    frames = []
    for condition, slope, draw in (("shift", 0.3, 0), ("random features", 0.0, 0), ("random features", 0.0, 1)):
        change = slope * real + rng.normal(0, 0.08, n)
        frames.append(
            pl.DataFrame(
                {"condition": condition, "draw": draw, "gene": [f"GENE{i}" for i in range(n)], "n_cells": 30,
                 "change": change, "difference": real}
            )
        )  # fmt: skip
    return schemas.conform("steering_head", pl.concat(frames))


def write_run(root, run, plan, tables):
    for name, frame in tables.items():
        commit.write_table(Layout(root).steering_dir(run) / name, frame, toy_table(SteeringResultsPlan, **plan))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("steered") / "store"
    cells = cell_table()
    commit.write_table(Layout(root).cells_dir("toy"), schemas.conform("cells", cells), {"dataset": "toy"})
    variants = pl.DataFrame({"variant": [0, 7], "role": ["unsteered", "grid"], "chosen": [False, True]}).cast(
        {"variant": pl.Int32}
    )
    move = {"results": results(), "variants": variants, "per_cell": embeddings(cells), "head": answers()}
    write_run(root, "a0ve", PLAN, move)
    few = results().filter((pl.col("role") != "grid") | pl.col("chosen")).filter(pl.col("group") == "all")
    write_run(root, "b00c", {"kind": "cell_type", "target": "B"}, {"results": few})
    mix = results("label_conservation", "batch_mixing").filter(pl.col("group") == "all")
    write_run(root, "c1x", {"kind": "batch", "target": "all"}, {"results": mix})
    return root


@pytest.fixture
def store(template, tmp_path):
    return FeatureStore.open(shutil.copytree(template, tmp_path / "store"))


MOVE = "a0"
DRAW = {
    "steering_bars": plots.steering_bars,
    "steering_curve": plots.steering_curve,
    "steering_pareto": plots.steering_pareto,
    "steering_distances": plots.steering_distances,
    "steering_map": plots.steering_map,
    "steering_head": plots.steering_head,
}


def labels_of(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("name", sampled(DRAW, keep=[*DRAW][:2]))
def test_a_picture_is_the_same_bytes_twice_and_its_text_is_readable(store, name, tmp_path):
    from matplotlib.text import Text

    for again in "ab":
        drawn = DRAW[name](store, MOVE, save=tmp_path / again / f"{name}.png")
    assert (tmp_path / "a" / f"{name}.png").read_bytes() == (tmp_path / "b" / f"{name}.png").read_bytes()
    figure = (drawn[0] if isinstance(drawn, list) else drawn).figure
    said = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in said) >= 7
    written = " ".join(" ".join(text.get_text() for text in said).split())
    assert "Steering 20 features of condition stim toward ctrl, test cells" in written


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("run", ["a0", "b00c", "c1x"])
def test_no_text_covers_another_and_every_colour_has_a_key(store, name, run):
    try:
        drawn = DRAW[name](store, run)
    except InputError:
        assert run != MOVE
        return
    figure = (drawn[0] if isinstance(drawn, list) else drawn).figure
    assert collisions(figure) == []
    assert unkeyed_colours(figure) - {canvas.PALE.lower()} == set()  # lines at zero


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_draws_into_the_axes_it_is_given(store, name):
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    more = {"over": "dose"} if name == "steering_curve" else {}
    drawn = DRAW[name](store, MOVE, ax=ax, **more)
    assert (drawn[0] if isinstance(drawn, list) else drawn) is ax
    assert ax.has_data()


def test_the_curve_is_the_cross_section_through_the_chosen_point_on_both_axes(store):
    by_dose, by_count = plots.steering_curve(store, MOVE)
    line = by_dose.get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), DOSES)
    np.testing.assert_allclose(line.get_ydata(), [remaining(20, dose) for dose in DOSES])
    line = by_count.get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), [0, *COUNTS])
    np.testing.assert_allclose(line.get_ydata(), [1.0, *(remaining(n, 1.0) for n in COUNTS)])
    band = by_dose.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(min(remaining(20, d) for d in DOSES) - 0.03)
    assert legend_of(by_count) == [
        "shift",
        "its 95 % interval",
        "chosen on select cells",
        *NULLS,
        "mean difference",
        "floor",
    ]


@pytest.mark.parametrize(("intervention", "first"), [("shift", 0), ("add", 0), ("clamp", 0.5), ("scale", 0.5)])
def test_unsteered_cells_are_dose_zero_only_where_that_changes_nothing(store, intervention, first):
    rows = results().filter((pl.col("dose") != 0).fill_null(True))
    grid = pl.col("role") == "grid"
    rows = rows.with_columns(intervention=pl.when(grid).then(pl.lit(intervention)).otherwise("intervention"))
    write_run(store.layout.root, "e2a", {"kind": "cell_type", "target": "B"}, {"results": rows})
    by_dose, by_count = plots.steering_curve(FeatureStore.open(store.layout.root), "e2a")
    assert by_dose.get_lines()[0].get_xdata()[0] == first
    assert by_count.get_lines()[0].get_xdata()[0] == 0


def test_the_pareto_plot_trades_the_metrics_of_the_question(store):
    move, mix = plots.steering_pareto(store, MOVE), plots.steering_pareto(store, "c1x")
    assert (move.get_xlabel(), move.get_ylabel()) == (
        "kNN accuracy of the steered cells' types",
        "share of the distance that remains",
    )
    assert (mix.get_xlabel(), mix.get_ylabel()) == ("conservation of labels", "mixing of batches within types")
    assert set(NULLS) < set(legend_of(mix))


def test_the_pareto_plot_draws_one_type_and_the_doses_of_the_mean_difference(store):
    rows = results().filter(pl.col("group") == "all")
    more = [
        result("mean difference", role, metric, value, base, dose=dose)
        for role, dose, left, drift in (("baseline_dose", 0.5, 0.6, 0.2), ("baseline_dose", 1.5, 0.3, 0.9))
        for metric, value, base in (("remaining", left, 1.0), ("type_accuracy", 0.95 - drift / 10, 0.95))
    ]
    rows = rows.with_columns(dose=pl.when(pl.col("role") == "baseline").then(pl.lit(1.0)).otherwise("dose"))
    every = pl.concat([rows, schemas.conform("steering", pl.DataFrame(more, infer_schema_length=None))])
    both = pl.concat([every, every.with_columns(group=pl.lit("B"), value=pl.col("value") / 2)])
    write_run(store.layout.root, "e3d", PLAN, {"results": both})
    store = FeatureStore.open(store.layout.root)
    ax = plots.steering_pareto(store, "e3d", group="B")
    line = next(line for line in ax.get_lines() if line.get_linestyle() == "-.")
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.3, 0.205, 0.15])
    np.testing.assert_allclose(line.get_xdata(), [0.475, 0.465, 0.465, 0.43])
    assert "mean difference, by dose" in legend_of(ax)
    assert " ".join(ax.get_title().split()).endswith("test cells, B")
    bars = plots.steering_bars(store, "e3d")
    assert labels_of(bars.yaxis).count("mean difference") == 1
    with pytest.raises(InputError, match=r"'Bb'.*'B'.*B, all"):
        plots.steering_pareto(store, "e3d", group="Bb")


@pytest.mark.parametrize(
    ("n_draws", "ps", "faces", "keyed"),
    [
        (10, (1 / 11, 1 / 11, 1 / 11), "hatched", ["ahead of every draw; with 10 draws of each, p is 0.091 at best"]),
        (10, (1 / 11, 2 / 11, 1 / 11), "hollow", ["p > 0.05 against a null"]),
        (19, (0.05, 0.05, 0.05), "solid", []),
        (20, (1 / 21, 2 / 21, 1 / 21), "hollow", ["p > 0.05 against a null"]),
    ],
)
def test_a_bar_that_draws_are_too_few_to_judge_is_not_drawn_as_one_that_failed(store, n_draws, ps, faces, keyed):
    named = zip(("random_features", "random_direction", "shuffled_labels"), ps, strict=True)
    given = {f"p_{name}": pl.when(pl.col("chosen")).then(p) for name, p in named}
    rows = results().with_columns(n_draws=pl.when(pl.col("role") == "null").then(n_draws).otherwise(1), **given)
    write_run(store.layout.root, "f4e", PLAN, {"results": schemas.conform("steering", rows)})
    ax = plots.steering_bars(FeatureStore.open(store.layout.root), "f4e")
    bar = ax.patches[0]
    hatched, filled = bool(bar.get_hatch()), bar.get_facecolor()[3] == 1
    assert {(True, False): "hatched", (False, False): "hollow", (False, True): "solid"}[hatched, filled] == faces
    assert [" ".join(name.split()) for name in legend_of(ax) if "null" in name[4:] or "ahead" in name] == keyed


def test_the_line_of_a_type_runs_from_its_distance_before_to_that_after(store):
    ax = plots.steering_distances(store, MOVE)
    assert labels_of(ax.yaxis) == TYPES
    segments = np.array(ax.collections[0].get_segments())[:, :, 0]
    np.testing.assert_allclose(segments, [[2 - 0.3 * i, (2 - 0.3 * i) * (0.4 + 0.05 * i)] for i in range(4)])
    assert legend_of(ax) == ["before", "after (shift)", "floor", *NULLS]


def test_the_map_is_fitted_on_unsteered_cells_and_steered_ones_are_projected(store):
    from sklearn.decomposition import PCA

    cells = cell_table()
    stored = embeddings(cells)
    before, moved = (stored.filter(pl.col("variant") == v)["embedding"].to_numpy().astype(float) for v in (0, 7))
    after = before.copy()
    after[(cells["condition"] == "stim").to_numpy()] = moved
    pca = PCA(2).fit(before)
    for panel, embedded in zip(plots.steering_map(store, MOVE), (before, after), strict=True):
        drawn = np.abs(panel.collections[0].get_offsets())
        wanted = np.abs(pca.transform(embedded))
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(wanted, axis=0), atol=1e-6)
    marks = ["mean of a type, before to after", "mean of its ctrl cells"]
    assert legend_of(panel) == ["stim", "ctrl", *marks, *sorted(TYPES)]
    arrows = [text for text in panel.texts if text.arrow_patch is not None]
    assert len(arrows) == 4
    # each number stands at an arrow and at a cross
    numbers = [text.get_text() for text in panel.texts if text not in arrows]
    assert sorted(numbers) == sorted(2 * ["1", "2", "3", "4"])


def test_the_key_of_a_map_says_which_types_have_too_few_cells_for_a_cross(template, tmp_path):
    root = shutil.copytree(template, tmp_path / "store")
    is_ctrl_nk = (pl.col("cell_type") == "NK") & (pl.col("condition") == "ctrl")
    cells = cell_table().with_columns(
        condition=pl.when(is_ctrl_nk & (is_ctrl_nk.cum_sum() > 9)).then(pl.lit("other")).otherwise("condition")
    )
    shutil.rmtree(Layout(root).cells_dir("toy"))
    commit.write_table(Layout(root).cells_dir("toy"), schemas.conform("cells", cells), {"dataset": "toy"})
    panel = plots.steering_map(FeatureStore.open(root), MOVE)[-1]
    assert legend_of(panel)[-4:] == ["B", "CD14 Mono", "CD4 T", "NK (no cross: 9 ctrl)"]
    crosses = [dots for dots in panel.collections if dots.get_paths()[0].vertices.shape[0] == 4]
    assert sum(len(dots.get_offsets()) for dots in crosses) == 3


def test_the_head_is_correlated_with_the_real_difference_and_its_nulls_beside(store):
    ax = plots.steering_head(store, MOVE, n=5)
    table = answers()
    genes = table.filter(pl.col("condition") == "shift")
    r = np.corrcoef(genes["change"], genes["difference"])[0, 1]
    assert f"r = {r:.2f} over 60 genes (random features " in ax.get_title().replace("\n", " ")
    assert {text.get_text() for text in ax.texts} == set(genes.top_k(5, by=pl.col("change").abs())["gene"])


def test_all_plots_of_a_run_are_those_that_it_has_tables_for(store, tmp_path):
    made = [
        [path.stem for path in plots.steering_all(store, run, save=tmp_path / run)] for run in (MOVE, "b00c", "c1x")
    ]
    assert made == [
        ["bars", "curve", "pareto", "distances", "map", "head"],
        ["bars", "pareto"],
        ["bars", "curve", "pareto"],
    ]
    assert sorted(path.name for path in (tmp_path / "b00c").iterdir()) == ["bars.png", "pareto.png"]


REFUSED = {
    "one point": (lambda s: plots.steering_curve(s, "b00c"), "b00c.*--dose"),
    "nothing moved": (lambda s: plots.steering_distances(s, "c1x"), "c1x.*'distance_corrected'"),
    "no embeddings": (lambda s: plots.steering_map(s, "c1x"), "c1x.*scsae steer"),
    "no predictions": (lambda s: plots.steering_head(s, "c1x"), "c1x.*--head"),
    "no such run": (lambda s: plots.steering_all(s, "ffff", save="x"), "'ffff'.*a0ve"),
    "no such metric": (lambda s: plots.steering_pareto(s, MOVE, x="remainin"), "'remainin'.*'remaining'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_has_no_table_for_is_refused_with_the_run_and_what_to_do(store, case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call(store)
