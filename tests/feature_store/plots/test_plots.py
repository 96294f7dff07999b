import shutil
import subprocess
import sys
from functools import partial
from inspect import signature
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from figures import collisions, texts_of, unkeyed_colours
from PIL import Image
from planted_effects import STRONG, edge_tables, probe_tables
from sampled import sampled
from scipy import sparse
from token_codes import TokenCodes, cut_of, toy_codes, write_codes
from toy_plans import toy_table

from feature_store import FeatureStore, plots
from feature_store.errors import InputError, NotFoundError, QueryError
from feature_store.plots import canvas
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.plans import (
    AssociationsPlan,
    CircuitPlan,
    EffectsPlan,
    InputsPlan,
    ProbePlan,
    SteeringResultsPlan,
)

N_CELLS, N_FEATURES = 72, 6
SPLITS = ["train", "select", "test"]
HOSTILE = [
    "$\\alpha_1$ cells",
    "_NK",
    "<b>T & B</b>",
    "50 % $",
    "two\nlines",
    "x" * 90,
    "Zelle β",
    "'q' \"q\"",
    "{}",
    "\\",
]


@pytest.fixture(autouse=True)
def _no_display():
    import matplotlib as mpl

    before = mpl.get_backend()
    mpl.use("Agg")
    yield
    mpl.use(before)


@pytest.fixture(name="dense")
def _dense():
    return dense_codes()


def dense_codes():
    """Codes [n_cells n_features]: 0 is of B cells, 1 fires in a third of all, 4 never, 5 in a single cell."""
    rng = np.random.default_rng(0)
    codes = np.where(rng.random((N_CELLS, N_FEATURES)) < 0.35, rng.gamma(2, 1, (N_CELLS, N_FEATURES)), 0)
    codes[:36, 0] = rng.gamma(9, 1, 36)
    codes[:, 4:] = 0
    codes[2, 5] = 1
    return codes.astype(np.float32)


@pytest.fixture(name="cells")
def _cells():
    return cell_table()


def cell_table():
    return pl.DataFrame(
        {
            "cell_idx": np.arange(N_CELLS),
            "cell_id": [f"c{i}" for i in range(N_CELLS)],
            "dataset": "toy",
            "split": [SPLITS[i % 3] for i in range(N_CELLS)],
            "panel": True,
            "donor": [f"d{i % 3}" for i in range(N_CELLS)],
            "batch": [f"b{i % 2}" for i in range(N_CELLS)],
            "cell_type": ["B cell"] * 36 + ["NK"] * 33 + [None] * 3,
            "n_counts": np.arange(N_CELLS) * 10.0,
            "empty": pl.Series([None] * N_CELLS, dtype=pl.String),
        }
    )


def tables():
    """The association tables; what is not named is null."""
    rng = np.random.default_rng(1)
    ids = np.arange(N_FEATURES)
    label = pl.DataFrame(
        [
            {"feature_id": f, "label_kind": "cell_type", "label": label, "split": split, "auroc": (b + 1) / 2,
             "rank_biserial": b, "p": p, "q": None if p is None else p * 2}
            for split, shift in (("select", 0.0), ("test", 0.1))
            for f, label, b, p in [
                (0, "B cell", 0.8 + shift, 1e-6), (0, "NK", -0.8 - shift, 1e-6), (1, "B cell", 0.3, 0.2),
                (1, "NK", 0.4 + shift, 0.01), (2, "B cell", -0.9, 1e-9), (4, "NK", 0.0, 1.0), (5, "B cell", 0.1, None),
            ]
        ]
    )  # fmt: skip
    gene = pl.DataFrame(
        [
            {"feature_id": 0, "gene": g, "split": s, "pearson": r, "q": q}
            for s, rs in (("select", [0.8, 0.6, -0.5, 0.1]), ("test", [0.7, 0.65, -0.4, 0.9]))
            for g, r, q in zip(["CD79A", "MS4A1", "CD3D", "LATE"], rs, [1e-6, 0.01, None, 1e-9], strict=True)
        ]
    )
    geneset = pl.DataFrame(
        [
            {"feature_id": 0, "collection": c, "gene_set": name, "split": s, "overlap": k, "n_set": 10, "p": p, "q": q}
            for s, shift in (("select", 1.0), ("test", 10.0))
            for c, name, k, p, q in [
                ("immune", "B_CELL", 8, 1e-9 * shift, 1e-8 * shift), ("immune", "T_CELL", 1, 0.2, 0.5),
                ("other", "CYCLE", 0, 1.0, 1.0), ("other", "ZERO", 2, 1e-12, 0.0),
            ]
        ]
    )  # fmt: skip
    features = pl.DataFrame(
        {
            "feature_id": ids,
            "density": [0.1, 0.01, 0.003, 0.5, 0.0, 1e-6],
            "class": ["cell-context", "batch", "gene-identity", "mixed", "dead", "some new class"],
            "dead": ids == 4,
            "top_genes": ["CD79A MS4A1 BANK1 CD19", "MALAT1", None, "A, B, C, D", None, ""],
            "top_label": ["B cell", "NK", None, "NK", None, None],
            "context_effect": [*rng.beta(0.5, 2, 5).tolist(), None],
            "batch_effect": rng.beta(0.5, 4, N_FEATURES),
        }
    )
    return {"features": features, "feature_label": label, "feature_gene": gene, "feature_geneset": geneset,
            **{name: schemas.empty(name) for name in ("feature_token", "feature_number", "gene_sets")}}  # fmt: skip


def steering():
    rows = [("unsteered", "unsteered", 0.0, 0.0, 0.0), ("random features", "null", -0.02, -0.05, 0.01),
            ("reconstruction", "reconstruction", 0.0, None, None), ("ablate", "grid", -0.6, -0.8, -0.4)]  # fmt: skip
    frame = pl.DataFrame(
        [
            {"split": "test", "condition": name, "role": role, "metric": "target_votes", "group": "all", "n_draws": 1,
             "n_features": 2, "value": 0.9 + e, "effect": e, "low": low, "high": high, "chosen": role == "grid"}
            for name, role, e, low, high in rows
        ]
    )  # fmt: skip
    return whole("steering", frame)


def effects():
    """Two genes whose predictions feature 0 changes beyond its null, and one that it does not."""
    rows = [
        ("CD79A", -0.8, 0.0, 0.1, 1e-9, 1e-6),
        ("MS4A1", 0.4, 0.1, 0.1, 1e-3, 0.03),
        ("CD3D", 0.2, 0.0, 0.3, 0.4, 0.9),
    ]
    frame = pl.DataFrame(
        [
            {"feature_id": 0, "intervention": way, "gene": gene, "split": "test", "effect": effect * turn, "n_cells": 9,
             "null": "mixture", "null_mean": mean * turn, "null_sd": sd, "z": (effect - mean) / sd * turn,
             "p": p, "q": q}
            for way, turn in (("ablate", 1), ("boost", -1)) for gene, effect, mean, sd, p, q in rows
        ]
    )  # fmt: skip
    return whole("feature_effect", frame)


def inputs():
    """Genes of feature 0: one by both paths, one by other tokens, one that lowers it there, one that does nothing."""
    rows = [
        ("CD79A", (0.5, 1e-9, 1e-6), (0.2, 1e-9, 1e-6)),
        ("MS4A1", (0.0, 1.0, 1.0), (0.3, 1e-4, 0.01)),
        ("CD3D", (0.1, 1e-3, 0.03), (-0.25, 1e-3, 0.02)),
        ("ACTB", (0.01, 0.5, 0.9), (0.02, 0.4, 0.9)),
    ]
    frame = pl.DataFrame(
        [
            {"feature_id": 0, "gene": gene, "path": path, "split": "test", "change": 8 * share, "share": share,
             "null": "genes", "null_mean": -0.02, "null_sd": 0.05, "p": p, "q": q, "n_cells": 9}
            for gene, *both in rows for path, (share, p, q) in zip(["own token", "other tokens"], both, strict=True)
        ]
    )  # fmt: skip
    return whole("feature_input", frame)


def whole(name, frame):
    """A table with a null in every column that the frame does not have."""
    absent = {column: pl.lit(None) for column in schemas.TABLES[name].columns if column not in frame.columns}
    return schemas.conform(name, frame.with_columns(**absent))


def write_store(root, cells, dense, frames=None, steering=None):
    """A store of these cells, codes and tables, opened."""
    layout = Layout(root)
    commit.write_table(layout.cells_dir("toy"), schemas.conform("cells", cells), {"dataset": "toy"})
    n = len(dense)
    plan = toy_codes(cut_of(n, n), n_features=dense.shape[1], dataset="toy", sae="5ae")
    zeros = np.zeros(n, dtype=np.int32)
    tokens = TokenCodes(cell_idx=np.arange(n), token_pos=zeros, gene_id=zeros, codes=sparse.csr_array(dense))
    write_codes(layout.codes_dir("c0de"), plan, [tokens], cells["split"].to_numpy())
    for name, frame in (frames or {}).items():
        folder, of = (
            layout.associations_dir("a550c") / name,
            toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae"),
        )
        commit.write_table(folder, whole(name, frame), of)
    if steering is not None:
        plan = toy_table(SteeringResultsPlan, sae="5ae", kind="cell_type", target="B cell", features=(0, 1))
        commit.write_table(layout.steering_dir("57ee4") / "results", steering, plan)
        plan = toy_table(EffectsPlan, sae="5ae", dataset="toy")
        commit.write_table(layout.effects_dir("effec") / "feature_effect", effects(), plan)
        summary = schemas.empty("feature_effect_summary")
        commit.write_table(layout.effects_dir("effec") / "feature_effect_summary", summary, plan)
        plan = toy_table(CircuitPlan, sae="5ae", to_sae="1a7e")
        for name, frame in edge_tables([STRONG], from_sae="5ae", to_sae="1a7e").items():
            commit.write_table(layout.circuits_dir("c1rc") / name, frame, plan)
        plan = toy_table(InputsPlan, sae="5ae", dataset="toy")
        commit.write_table(layout.inputs_dir("1nput") / "feature_input", inputs(), plan)
        summary = schemas.empty("feature_input_summary")
        commit.write_table(layout.inputs_dir("1nput") / "feature_input_summary", summary, plan)
        plan = toy_table(ProbePlan, sae="5ae", dataset="toy")
        for name, frame in probe_tables(range(N_FEATURES), ["B cell", "T cell"]).items():
            commit.write_table(layout.probes_dir("9robe") / name, frame, plan)
    return FeatureStore.open(layout.root)


@pytest.fixture
def make(tmp_path):
    return partial(write_store, tmp_path / "store")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("plots") / "store"
    write_store(root, cell_table(), dense_codes(), tables(), steering())
    return root


@pytest.fixture
def store(template, tmp_path, laid_out):
    return FeatureStore.open(shutil.copytree(template, tmp_path / "whole"))


@pytest.fixture
def laid_out(monkeypatch):
    """The map without UMAP: a cell's place is made of its number. Returns how often it was made."""
    made = []

    def lay_out(codes, config):
        made.append(codes.shape)
        return np.stack([np.arange(codes.shape[0]) % 9, np.arange(codes.shape[0]) // 9], axis=1).astype(np.float32)

    monkeypatch.setattr("feature_store.maps.cells.lay_out", lay_out)
    return made


DRAW = {
    "dotplot": plots.dotplot,
    "gene_bars": partial(plots.gene_bars, feature=0),
    "gene_features": partial(plots.gene_features, gene="CD79A"),
    "geneset_bars": partial(plots.geneset_bars, feature=0),
    "density_histogram": plots.density_histogram,
    "batch_quadrant": plots.batch_quadrant,
    "umap": partial(plots.umap, color=["cell_type", 0]),
    "violin": partial(plots.violin, feature=0),
    "steering_bars": plots.steering_bars,
    "effect_bars": partial(plots.effect_bars, feature=0),
    "probe_lines": plots.probe_lines,
    "edge_graph": partial(plots.edge_graph, feature=STRONG),
    "input_bars": partial(plots.input_bars, feature=0),
}


def labels_of(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def overlaps(boxes):
    """Whether any two boxes, sorted along an axis, cover each other."""
    return any(a.overlaps(b) for a, b in pairwise(boxes))


@pytest.mark.parametrize("name", sampled(DRAW, keep=[*DRAW][::4]))
def test_a_plot_is_saved_twice_with_the_same_bytes_and_opens_no_figure_of_pyplots(store, name, tmp_path):
    import matplotlib.pyplot as plt

    for again in "ab":
        DRAW[name](store, save=tmp_path / again / f"{name}.png")
    image = plt.imread(tmp_path / "a" / f"{name}.png")
    assert image.std() > 0.03
    assert min(image.shape[:2]) > 300
    assert (tmp_path / "a" / f"{name}.png").read_bytes() == (tmp_path / "b" / f"{name}.png").read_bytes()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_vector_files_do_not_hold_their_time_of_making(store, suffix, tmp_path):
    for again in "ab":
        plots.gene_bars(store, 0, save=tmp_path / f"{again}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("name", [name for name in DRAW if name not in ("umap", "violin")])
def test_a_plot_draws_into_the_axes_it_is_given(store, name):
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert DRAW[name](store, ax=ax) is ax
    assert ax.has_data()
    assert ax.get_title() or ax.get_title("left")


def test_a_panel_draws_into_the_axes_it_is_given(store):
    from matplotlib.figure import Figure

    for draw in (partial(plots.umap, color=0), partial(plots.violin, feature=0, groupby="batch")):
        ax = Figure().add_subplot()
        assert draw(store, ax=ax) == [ax]
        assert ax.get_title()
        with pytest.raises(InputError, match=r"2 panels.*ax="):
            plots.violin(store, 0, ax=ax)


@pytest.mark.parametrize("name", DRAW)
def test_text_has_at_least_seven_points(store, name):
    drawn = DRAW[name](store)
    figure = (drawn[0] if isinstance(drawn, list) else drawn).figure
    assert min(text.get_fontsize() for text in texts_of(figure)) >= 7


@pytest.mark.parametrize("name", DRAW)
def test_no_text_covers_another_and_every_colour_has_a_key(store, name):
    figure = figure_of(DRAW[name](store))
    assert collisions(figure) == []
    assert unkeyed_colours(figure) == set()


def figure_of(drawn):
    return (drawn[0] if isinstance(drawn, list) else drawn).figure


def test_long_names_many_labels_and_missing_values_collide_with_nothing(make, cells, dense, laid_out):
    names = [f"{'a very long name of a cell type ' * (i % 3)}{i % 60:02d}" for i in range(N_CELLS)]
    hard = make(
        cells.with_columns(
            cell_type=pl.Series(names), void=pl.lit(None, pl.Float64), score=pl.Series([None, *range(71)])
        ),
        dense,
        tables(),
    )
    drawn = plots.umap(hard, ["cell_type", "batch", "void", "score", "empty", 0, 4], split=None)
    for figure in (figure_of(drawn), figure_of(plots.violin(hard, 0, ["cell_type", "batch"]))):
        assert collisions(figure) == []
        assert unkeyed_colours(figure) == set()
    keys = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in drawn[2:]]
    assert keys == [["missing (72)"], ["missing (1)"], ["missing (72)"], ["does not fire (28)"], ["does not fire (72)"]]


def test_many_panels_go_on_in_another_row(store):
    drawn = plots.umap(store, [0, 1, 2, 3, 4])
    bounds = [ax.get_subplotspec() for ax in drawn]
    assert [(spec.rowspan.start, spec.colspan.start) for spec in bounds] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert max(figure_of(drawn).get_size_inches()) <= 16


def test_text_of_an_svg_is_text_and_its_metadata_name_store_run_date_and_command(store, tmp_path):
    created = store.layout.latest("associations").created.isoformat(timespec="seconds")
    files = {
        suffix: plots.ImageFile(path=tmp_path / f"a{suffix}", command="scsae plot gene-bars --feature 0")
        for suffix in (".svg", ".png", ".pdf")
    }
    for file in files.values():
        plots.gene_bars(store, 0, save=file)
    svg = files[".svg"].path.read_text()
    assert ">CD79A</text>" in svg
    for fact in ("Genes of feature 0", "store whole, associations a550c", created, files[".svg"].command):
        assert f">{fact}</" in svg
    with Image.open(files[".png"].path) as image:
        assert image.info["Source"] == "store whole, associations a550c"
        assert image.info["Creation Time"] == created
        assert image.info["Comment"] == files[".png"].command
        assert image.info["Title"] == "Genes of feature 0"
    pdf = files[".pdf"].path.read_bytes()
    assert b"/Subject (store whole, associations a550c)" in pdf
    assert f"/CreationDate (D:{created[:10].replace('-', '')}".encode() in pdf


def test_the_metadata_of_a_steering_plot_name_its_own_run_and_no_path(store, tmp_path):
    plots.steering_bars(store, save=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Source"] == "store whole, steering 57ee4"
    assert str(store.layout.root.parent).encode() not in (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("name", sampled(DRAW, keep=[*DRAW][1::4]))
def test_a_file_has_the_size_that_is_asked_for(store, name, tmp_path):
    DRAW[name](store, save=plots.ImageFile(path=tmp_path / "a.png", size=(12, 8), dpi=50))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (600, 400)


def test_what_is_not_significant_against_a_null_is_a_hollow_bar_with_a_key(make, cells, dense):
    unsure = steering().with_columns(p_random_features=pl.when(pl.col("role") == "grid").then(0.2), n_draws=20)
    ax = plots.steering_bars(make(cells, dense, tables(), unsure))
    assert [bar.get_facecolor()[3] for bar in ax.patches] == [0, 1, 1]
    assert "p > 0.05 against a null" in legend_of(ax)
    assert unkeyed_colours(ax.figure) == set()


def test_the_features_of_a_gene_are_chosen_on_select_and_shown_on_test_under_any_name_of_it(make, cells, dense):
    rows = [(f, s, r, q) for s, rs in (("select", [0.5, -0.9, 0.1]), ("test", [0.4, -0.7, 0.99]))
            for f, r, q in zip((0, 1, 2), rs, (1e-4, 0.3, 1e-9), strict=True)]  # fmt: skip
    gene = pl.DataFrame([{"feature_id": f, "gene": "MS4A1", "split": s, "pearson": r, "q": q} for f, s, r, q in rows])
    ax = plots.gene_features(make(cells, dense, {**tables(), "feature_gene": gene}), "CD20", n=2)
    assert labels_of(ax.yaxis) == ["0: CD79A MS4A1 BANK1", "1: MALAT1"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.4, -0.7])
    assert [colour_of(bar) for bar in ax.patches] == [canvas.BLUE, canvas.GREY]
    assert (ax.get_title(), ax.get_xlabel()) == ("Features of MS4A1", "Pearson with expression of MS4A1, test cells")


def test_dots_are_effects_and_shares_of_firing_on_test_cells(store, cells, dense):
    ax = plots.dotplot(store, [0, 1])
    test = (cells["split"] == "test").to_numpy()
    kinds = cells["cell_type"].to_numpy()
    shares = [[(dense[test & (kinds == k)][:, f] != 0).mean() for f in (0, 1)] for k in ("B cell", "NK")]
    dots = ax.collections[0]
    np.testing.assert_allclose(dots.get_array().reshape(2, 2), [[0.9, 0.3], [-0.9, 0.5]])
    np.testing.assert_allclose(dots.get_sizes().reshape(2, 2), 16 + 170 * np.array(shares))
    assert labels_of(ax.yaxis) == ["B cell (12)", "NK (11)"]
    assert labels_of(ax.xaxis) == ["0: CD79A MS4A1 BANK1", "1: MALAT1"]
    assert ax.get_title("left") == "Features by cell type, drawn on test cells"
    assert "pale: below 5 cells" not in legend_of(ax)


def test_dots_have_a_black_rim_where_significant_and_none_is_drawn_where_nothing_was_tested(store):
    ax = plots.dotplot(store, [0, 1, 2, 5])
    places = [tuple(place) for place in ax.collections[0].get_offsets().tolist()]
    assert places == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1)]
    black = [tuple(rim[:3]) == (0, 0, 0) for rim in ax.collections[0].get_edgecolors()]
    assert black == [True, False, True, False, True, True]  # a q of null is not significant


def test_features_of_a_dotplot_are_the_best_positive_ones_on_select_cells(store):
    best = plots.best_features(store)
    assert best.select("label", "feature_id").rows() == [("B cell", 0), ("NK", 1)]
    assert labels_of(plots.dotplot(store).xaxis) == ["0: CD79A MS4A1 BANK1", "1: MALAT1"]
    assert plots.best_features(store, "batch").is_empty()


def test_no_plot_names_a_feature_or_gene_that_is_not_significant_on_test_cells(make, cells, dense):
    weak = {
        name: frame.with_columns(q=pl.lit(0.06)) if "q" in frame.columns else frame for name, frame in tables().items()
    }
    other = make(cells, dense, weak)
    assert plots.best_features(other).is_empty()
    with pytest.raises(InputError, match=r"'cell_type'.*0\.05.*--feature"):
        plots.dotplot(other)
    for drawn in (plots.gene_bars(other, 0), plots.geneset_bars(other, 0)):
        assert "q ≤ 0.05" in drawn.get_title("left") + drawn.get_title()


def test_a_dotplot_names_the_labels_that_the_split_lacks(make, cells, dense):
    lacking = cells.with_columns(
        cell_type=pl.when((pl.col("cell_type") == "NK") & (pl.col("split") == "test")).then(None).otherwise("cell_type")
    )
    ax = plots.dotplot(make(lacking, dense, tables()))
    assert labels_of(ax.yaxis) == ["B cell (12)"]
    title = ax.get_title("left")
    assert title.endswith("\nNo test cells of NK")
    assert "None for" not in title


def test_a_dotplot_names_the_labels_without_a_confirmed_feature_and_the_features_without_a_gene(make, cells, dense):
    weak = tables()
    is_nk = (pl.col("label") == "NK") & (pl.col("split") == "test")
    weak["feature_label"] = weak["feature_label"].with_columns(q=pl.when(is_nk).then(0.06).otherwise("q"))
    weak["features"] = weak["features"].with_columns(top_genes=pl.lit(None, pl.String))
    ax = plots.dotplot(make(cells, dense, weak))
    title = " ".join(ax.get_title("left").split())
    assert title == (
        "The feature with the smallest p for each cell type on select cells, drawn on test cells "
        "None for NK: not confirmed at q ≤ 0.05"
    )
    assert labels_of(ax.xaxis) == ["0 (no gene)"]


def test_the_dots_of_a_label_with_few_cells_are_pale_and_the_key_says_so(make, cells, dense):
    nk = (pl.col("cell_type") == "NK") & (pl.col("split") == "test")
    few = cells.with_columns(cell_type=pl.when(nk & (nk.cum_sum() > 4)).then(None).otherwise("cell_type"))
    ax = plots.dotplot(make(few, dense, tables()), [0, 1])
    assert labels_of(ax.yaxis) == ["B cell (12)", "NK (4)"]
    dots = ax.collections[0]
    assert np.asarray(dots.get_alpha()).tolist() == [1, 1, 0.2, 0.2]
    assert "pale: below 5 cells" in legend_of(ax)


def test_genes_are_chosen_on_select_and_shown_on_test_with_grey_for_what_is_not_significant(store):
    ax = plots.gene_bars(store, 0, n=3)
    assert labels_of(ax.yaxis) == ["MS4A1", "CD79A", "CD3D"] or labels_of(ax.yaxis) == ["CD79A", "MS4A1", "CD3D"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.7, 0.65, -0.4])
    blue, grey = canvas.BLUE, canvas.GREY
    assert [colour_of(bar) for bar in ax.patches] == [blue, blue, grey]  # a q of null is not significant
    assert "test cells" in ax.get_xlabel()


def test_effects_are_drawn_before_the_band_of_their_null_with_grey_for_what_is_not_significant(store):
    ax = plots.effect_bars(store, 0)
    assert labels_of(ax.yaxis) == ["MS4A1", "CD3D", "CD79A"]
    bands, bars = ax.patches[:3], ax.patches[3:]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.4, 0.2, -0.8])
    assert [(band.get_x(), band.get_width()) for band in bands] == [
        pytest.approx(own) for own in ((-0.1, 0.4), (-0.6, 1.2), (-0.2, 0.4))
    ]
    assert [colour_of(bar) for bar in bars] == [canvas.BLUE, canvas.GREY, canvas.ORANGE]
    assert "Ablating feature 0: CD79A" in ax.get_title()
    boosted = plots.effect_bars(store, 0, intervention="boost", n=2)
    assert [bar.get_width() for bar in boosted.patches[2:]] == pytest.approx([0.8, -0.4])


def test_inputs_are_stacked_by_path_with_the_null_of_other_tokens_behind_them(store):
    ax = plots.input_bars(store, 0)
    assert labels_of(ax.yaxis) == ["CD79A", "MS4A1", "ACTB", "CD3D"]
    bands, own, other = ax.patches[:4], ax.patches[4:8], ax.patches[8:]
    assert [bar.get_width() for bar in own] == pytest.approx([0.5, 0, 0.01, 0.1])
    assert [(bar.get_x(), bar.get_width()) for bar in other] == [
        pytest.approx(part) for part in ((0.5, 0.2), (0, 0.3), (0.01, 0.02), (0, -0.25))
    ]
    assert [(band.get_x(), band.get_width()) for band in bands] == [
        pytest.approx((start - 0.12, 0.2)) for start in (0.5, 0, 0.01, 0)
    ]
    blue, orange, grey = canvas.BLUE, canvas.ORANGE, canvas.GREY
    assert [colour_of(bar) for bar in own] == [blue, grey, grey, blue]
    assert [colour_of(bar) for bar in other] == [orange, orange, grey, orange]
    assert labels_of(plots.input_bars(store, 0, n=2).yaxis) == ["CD79A", "MS4A1"]


def colour_of(patch):
    from matplotlib.colors import to_hex

    return to_hex(patch.get_facecolor()).upper()


def test_gene_sets_are_chosen_on_select_and_shown_with_q_and_overlap_on_test(store):
    ax = plots.geneset_bars(store, 0)
    assert labels_of(ax.yaxis) == ["ZERO (other)", "B CELL (immune)", "T CELL (immune)"]
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [300, 7, -np.log10(0.5)])
    assert [text.get_text() for text in ax.texts] == ["2/10", "8/10", "1/10"]
    assert [colour_of(bar) for bar in ax.patches] == [canvas.BLUE, canvas.BLUE, canvas.GREY]
    assert labels_of(plots.geneset_bars(store, 0, collection="immune", n=1).yaxis) == ["B CELL"]


def test_violins_are_by_cell_type_and_batch_side_by_side_highest_mean_first(store, cells, dense):
    by_type, by_batch = plots.violin(store, 0)
    assert [ax.get_title("left") for ax in (by_type, by_batch)] == ["by cell type (1 cell without one)", "by batch"]
    assert labels_of(by_type.yaxis) == ["B cell (12)", "NK (11)"]
    test = (cells["split"] == "test").to_numpy()
    nk = dense[test & (cells["cell_type"] == "NK").fill_null(False).to_numpy(), 0]
    assert [text.get_text() for text in by_type.texts] == ["100%", f"{(nk != 0).mean():.0%}", "cells\nfiring"]
    assert by_type.get_xlim() == by_batch.get_xlim()
    assert "test cells" in by_type.get_xlabel()
    assert "0: CD79A MS4A1 BANK1" in by_type.figure.get_suptitle()


def test_few_firing_cells_are_drawn_one_by_one(store, dense):
    from matplotlib.collections import PathCollection, PolyCollection

    few = plots.violin(store, 0, "cell_type")[0].collections
    many = plots.violin(store, 0, "cell_type", split=None)[0].collections
    assert [type(c) for c in few] == [PathCollection, PathCollection]
    assert sorted(np.asarray(few[0].get_offsets())[:, 0]) == pytest.approx(sorted(dense[2:36:3, 0]))
    assert isinstance(many[0], PolyCollection)


def test_a_map_shows_the_codes_of_test_cells_and_the_others_pale(store, cells, dense):
    (ax,) = plots.umap(store, 0)
    outside, silent, fires = ax.collections[:3]
    test = np.flatnonzero((cells["split"] == "test").to_numpy())
    value = dense[test, 0]
    assert (len(outside.get_offsets()), len(silent.get_offsets())) == (N_CELLS - test.size, (value == 0).sum())
    np.testing.assert_allclose(fires.get_array(), np.sort(value[value > 0]))
    strongest = test[value.argmax()]
    assert fires.get_offsets()[-1].tolist() == [strongest % 9, strongest // 9]
    assert ax.get_title() == f"0: CD79A MS4A1 BANK1\nfires in {(value > 0).sum()} of {test.size} test cells"
    everything = plots.umap(store, 0, split=None)[0].collections
    assert [len(c.get_offsets()) for c in everything[:3]] == [0, (dense[:, 0] == 0).sum(), (dense[:, 0] > 0).sum()]


def test_a_map_of_labels_has_a_legend_with_counts(store):
    (ax,) = plots.umap(store, "cell_type")
    assert legend_of(ax) == ["B cell (12)", "NK (11)", "missing (1)", "cells of other splits (48)"]
    assert [len(c.get_offsets()) for c in ax.collections] == [48, 1, 0, 12, 11]


def test_a_map_of_a_number_is_continuous(store):
    (ax,) = plots.umap(store, "n_counts")
    assert ax.collections[2].get_array().max() == 710
    assert ax.get_title() == "n counts\ntest cells"


def test_the_map_is_laid_out_once_and_kept_in_the_store(store, laid_out):
    for _ in range(2):
        plots.umap(store, "batch")
    assert laid_out == [(N_CELLS, N_FEATURES)]
    assert commit.verify(store.layout.umap_dir("c0de")) == []
    kept = commit.read_table(store.layout.umap_dir("c0de"))
    schemas.check("umap", kept)
    assert kept["cell_idx"].to_list() == list(range(N_CELLS))


def test_own_coordinates_need_no_map_and_leave_out_cells_without_a_place(store, laid_out):
    own = np.stack([np.arange(N_CELLS), np.zeros(N_CELLS)], axis=1).astype(float)
    own[2] = np.nan  # a test cell
    (ax,) = plots.umap(store, "batch", coordinates=own)
    assert laid_out == []
    assert sum(len(c.get_offsets()) for c in ax.collections) == N_CELLS - 1
    assert legend_of(ax) == ["b1 (12)", "b0 (11)", "cells of other splits (48)"]


def test_a_map_of_a_signed_number_is_coloured_about_zero_and_grey_where_it_is_unknown(make, cells, dense, laid_out):
    score = pl.Series([None, *np.linspace(-1, 2, N_CELLS - 1)])
    (ax,) = plots.umap(make(cells.with_columns(score=score), dense), "score", split=None)
    assert ax.collections[2].get_clim() == (-2, 2)
    assert [len(c.get_offsets()) for c in ax.collections[:3]] == [0, 1, N_CELLS - 1]


def test_the_histogram_counts_every_feature_that_fires(store):
    ax = plots.density_histogram(store)
    tops = {}
    for bar in ax.patches:
        x = round(bar.get_x(), 6)
        tops[x] = max(tops.get(x, 0), bar.get_y() + bar.get_height())
    assert sum(tops.values()) == 5
    assert ax.get_title() == "6 features, 1 dead"
    assert "some new class (1)" in legend_of(ax)


def test_the_quadrant_has_a_dot_per_feature_that_is_measured(store):
    ax = plots.batch_quadrant(store)
    features = tables()["features"]
    shown = {tuple(place) for c in ax.collections for place in np.asarray(c.get_offsets()).round(9).tolist()}
    wanted = features.filter(~pl.col("dead") & pl.col("context_effect").is_not_null())
    assert shown == set(wanted.select(pl.col("context_effect", "batch_effect").round(9)).rows())
    assert "train and select cells" in ax.get_title()


def test_steering_shows_effects_with_intervals_and_nulls_in_grey(store):
    ax = plots.steering_bars(store)
    assert labels_of(ax.yaxis) == ["ablate", "random features", "reconstruction"]
    assert [bar.get_width() for bar in ax.patches] == [-0.6, -0.02, 0]
    assert [colour_of(bar) for bar in ax.patches][:2] == [canvas.BLUE, canvas.GREY]
    assert ax.get_title() == "Steering 2 features of cell type B cell, test cells"
    (whiskers,) = (c for c in ax.collections if len(c.get_segments()) == 2)
    np.testing.assert_allclose(whiskers.get_segments()[0][:, 0], [-0.8, -0.4])


def test_hostile_names_are_drawn_as_they_stand(make, cells, dense, laid_out, tmp_path):
    names = [HOSTILE[i // 3 % len(HOSTILE)] for i in range(N_CELLS)]
    store = make(cells.with_columns(cell_type=pl.Series(names)), dense)
    (ax,) = plots.umap(store, "cell_type", save=tmp_path / "map.png")
    (by_type,) = plots.violin(store, 0, "cell_type", save=tmp_path / "violin.png")
    for drawn in (legend_of(ax), labels_of(by_type.yaxis)):
        # matplotlib draws \$ as $, and takes nothing for a formula
        plain = {text.replace(r"\$", "$").rsplit(" (", 1)[0] for text in drawn}
        assert {"_NK", "<b>T & B</b>", "50 % $", "two lines", "$\\alpha_1$ cells", "{}", "\\"} <= plain
        assert any("…" in text for text in plain)
        assert max(map(len, plain)) <= 42


@pytest.mark.parametrize(
    ("given", "drawn"),
    [("a$b$", r"a\$b\$"), (" a \n b ", "a b"), ("abcdefghij", "abc…hij"), (7, "7"), ("", "")],
)
def test_plain_text_is_one_short_line_without_formulas(given, drawn):
    assert canvas.plain(given, 7) == drawn


@pytest.mark.slow
def test_sixty_labels_are_told_apart_and_do_not_cover_each_other(make, cells, dense, laid_out):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"a rather long name of cell type {i % 70:02d}" for i in range(N_CELLS)]
    test_all = cells.with_columns(cell_type=pl.Series(names), split=pl.lit("test"))
    label = pl.DataFrame(
        [
            {"feature_id": f, "label_kind": "cell_type", "label": name, "split": "test", "rank_biserial": 0.1, "q": 1.0}
            for f in range(5)
            for name in sorted(set(names))
        ]
    )
    store = make(test_all, dense, {**tables(), "feature_label": label})
    dots, (violins,), (ax,) = plots.dotplot(store, range(5)), plots.violin(store, 0, "cell_type"), plots.umap(
        store, "cell_type"
    )  # fmt: skip
    for panel in (dots, violins, ax):
        FigureCanvasAgg(panel.figure).draw()
        own = panel.yaxis.get_ticklabels() if panel is not ax else panel.get_legend().get_texts()
        assert not overlaps([text.get_window_extent() for text in own])
    styles = {(tuple(c.get_facecolor()[0]), tuple(c.get_paths()[0].vertices[0])) for c in ax.collections[3:]}
    assert len(styles) == 63
    assert legend_of(ax)[-1] == "other labels (7)"
    assert legend_of(ax)[0].endswith("00 (2)")


def test_a_feature_that_never_fires_is_drawn_all_the_same(store):
    assert "fires in 0 of 24 test cells" in plots.umap(store, 4)[0].get_title()
    assert [text.get_text() for text in plots.violin(store, 4, "batch")[0].texts][:2] == ["0%", "0%"]
    assert plots.dotplot(store, [4]).collections[0].get_sizes().tolist() == [16]


def test_a_store_without_a_living_feature_has_an_empty_histogram(make, cells, dense):
    features = tables()["features"].with_columns(density=pl.lit(0.0), dead=True)
    ax = plots.density_histogram(make(cells, dense, {**tables(), "features": features}))
    assert ax.get_title() == "6 features, 6 dead"
    assert ax.texts[0].get_text() == "no feature fires"


REFUSED = {
    "no such feature": (lambda s: plots.violin(s, 9), QueryError, r"\b9\b.* 0 to 5"),
    "no such column": (lambda s: plots.umap(s, "cel_type"), InputError, "'cel_type'.*'cell_type'"),
    "an empty column": (lambda s: plots.violin(s, 0, "empty"), InputError, "'empty'"),
    "nothing to colour by": (lambda s: plots.umap(s, []), InputError, "'cell_type'"),
    "no such split": (lambda s: plots.gene_bars(s, 0, split="tes"), InputError, "'tes'.*'test'"),
    "no such kind": (lambda s: plots.dotplot(s, groupby="celltype"), InputError, "'celltype'.*'cell_type'"),
    "no tested feature": (lambda s: plots.dotplot(s, [3]), InputError, r"\[3\].*cell_type"),
    "no effects": (lambda s: plots.effect_bars(s, 3), InputError, "feature 3.*scsae effects --feature 3"),
    "no inputs": (lambda s: plots.input_bars(s, 3), InputError, "feature 3.*scsae inputs --feature 3"),
    "no genes": (lambda s: plots.gene_bars(s, 3), InputError, "feature 3.*'test'.*scsae sql"),
    "no such collection": (lambda s: plots.geneset_bars(s, 0, collection="imune"), InputError, "'imune'.*'immune'"),
    "no such metric": (lambda s: plots.steering_bars(s, metric="votes"), InputError, "'votes'.*target_votes"),
    "no such run": (lambda s: plots.steering_bars(s, "ffff"), InputError, "'ffff'.*57ee4"),
    "other coordinates": (lambda s: plots.umap(s, 0, coordinates=np.zeros((3, 2))), InputError, r"\(3, 2\).*\(72, 2\)"),
    "no room": (
        lambda s: plots.gene_bars(s, 0, save=plots.ImageFile(path="never.png", size=(0.3, 0.3))),
        InputError,
        r"0\.3 x 0\.3 inches.*larger",
    ),
    "no room for dots": (
        lambda s: plots.dotplot(s, save=plots.ImageFile(path="dots.png", size=(2, 2))),
        InputError,
        "2 x 2 inches.*2 features by 2 labels; give",
    ),
    "no file is so large": (
        lambda s: plots.gene_bars(s, 0, save=plots.ImageFile(path="a.png", size=(900, 5))),
        InputError,
        "900 x 5 inches at 200 dpi.*below 328 inches",
    ),
    "no gene": (lambda s: plots.gene_features(s, "CD79"), QueryError, "'CD79'.*CD79A"),
    "no such format": (lambda s: plots.umap(s, 0, save="map.bmp"), InputError, r"map\.bmp.*\.png, \.pdf, \.svg"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_refused_with_the_value_and_what_is_allowed(store, case, laid_out):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(store)
    assert laid_out == []


@pytest.mark.parametrize("batch", ["b0", None])
def test_a_data_set_of_one_batch_has_no_quadrant(make, cells, dense, batch):
    store = make(cells.with_columns(batch=pl.lit(batch, dtype=pl.String)), dense, tables())
    with pytest.raises(InputError, match="--batch COLUMN"):
        plots.batch_quadrant(store)


def test_a_store_without_codes_or_tables_says_what_makes_them(make, cells, dense, tmp_path):
    store = make(cells, dense)
    with pytest.raises(QueryError, match="scsae associate"):
        plots.gene_bars(store, 0)
    layout = Layout(tmp_path / "bare")
    commit.write_table(layout.cells_dir("toy"), schemas.conform("cells", cells), {"dataset": "toy"})
    with pytest.raises(NotFoundError, match="scsae encode"):
        plots.umap(FeatureStore.open(layout.root), "batch")


def test_a_notebook_shows_a_picture_and_a_script_does_not(store, monkeypatch):
    import matplotlib.pyplot as plt

    plots.gene_bars(store, 0)
    assert plt.get_fignums() == []
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    ax = plots.gene_bars(store, 0)
    assert plt.get_fignums() == [ax.figure.number]
    plt.close("all")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.get_fignums()))
    plots.gene_bars(store, 0, show=True)
    assert len(shown[0]) == 1
    assert plt.get_fignums() == []


def test_importing_plots_does_not_import_matplotlib():
    code = "import feature_store.plots, sys; print({'matplotlib', 'umap', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_plot_can_be_shown_and_saved():
    for name in set(plots.__all__) - {"CLASS_COLOURS", "ImageFile", "best_features"}:
        assert {"show", "save"} <= signature(getattr(plots, name)).parameters.keys(), name


def test_probe_lines_are_the_scores_of_each_representation_and_refuse_what_was_not_probed(store):
    ax = plots.probe_lines(store)
    rows = store.frame("probe_score").filter(pl.col("label").is_null()).sort("k").collect()
    for line, name in zip(ax.get_lines(), ("sae", "genes", "permuted labels"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), rows.filter(representation=name)["macro_f1"])
    one = plots.probe_lines(store, label="B cell")
    assert one.get_ylabel() == "AUROC, test cells"
    for options, words in (
        ({"label": "Z cell"}, "cell_type has B cell, T cell"),
        ({"label_kind": "donor"}, "scsae probe --label donor --store"),
        ({"label": "B cell", "measure": "macro_f1"}, "allowed here are balanced_accuracy, auroc"),
    ):
        with pytest.raises(InputError, match=words):
            plots.probe_lines(store, **options)
