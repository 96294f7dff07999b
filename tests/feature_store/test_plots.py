import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from feature_store import plots
from feature_store.associations import CLASSES, Labels
from feature_store.errors import InputError

N_CELLS, N_FEATURES = 60, 5


@pytest.fixture(scope="module", autouse=True)
def _no_display():
    import matplotlib as mpl

    before = mpl.get_backend()
    mpl.use("Agg")
    yield
    mpl.use(before)


@pytest.fixture
def codes():
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((N_CELLS, N_FEATURES)) < 0.4, rng.gamma(2, 1, (N_CELLS, N_FEATURES)), 0)
    dense[:30, 0] += 2
    dense[:, 4] = 0
    return sparse.csr_array(dense)


@pytest.fixture
def labels():
    return Labels.from_values("cell_type", ["B cell"] * 30 + ["NK"] * 25 + [None] * 5)


@pytest.fixture
def features():
    rng = np.random.default_rng(1)
    n = 40
    return pl.DataFrame(
        {
            "feature_id": pl.Series(np.arange(n), dtype=pl.Int32),
            "density": np.where(np.arange(n) % 5 == 4, 0, 10 ** rng.uniform(-4, -1, n)),
            "class": [CLASSES[i % 5] for i in range(n)],
            "dead": [i % 5 == 4 for i in range(n)],
            "context_effect": rng.beta(0.5, 2, n),
            "batch_effect": rng.beta(0.5, 4, n),
            "top_label": [None if i % 3 else "B cell" for i in range(n)],
        }
    )


@pytest.fixture
def feature_gene():
    genes, pearson = ["CD79A", "MS4A1", "CD3D"], [0.8, 0.6, -0.4]
    one = pl.DataFrame({"feature_id": [0] * 3, "gene": genes, "pearson": pearson, "q": [1e-6, 0.01, 0.3]})
    return pl.concat([one.with_columns(split=pl.lit(s)) for s in ("select", "test")])


@pytest.fixture
def steering():
    return pl.DataFrame(
        {
            "name": ["ablate", "random features", "reconstruction"],
            "effect": [0.4, 0.02, 0.0],
            "low": [0.3, -0.05, None],
            "high": [0.5, 0.08, None],
            "is_null": [False, True, True],
        }
    )


@pytest.fixture
def draw(codes, labels, features, feature_gene, steering):
    coordinates = np.random.default_rng(2).normal(size=(N_CELLS, 2))
    return {
        "dotplot": lambda **kw: plots.dotplot(codes, labels, [0, 1, 4], **kw),
        "gene_bars": lambda **kw: plots.gene_bars(feature_gene, 0, **kw),
        "density_histogram": lambda **kw: plots.density_histogram(features, **kw),
        "batch_quadrant": lambda **kw: plots.batch_quadrant(features, **kw),
        "embedding": lambda **kw: plots.embedding(coordinates, codes, 0, **kw),
        "violin": lambda **kw: plots.violin(codes, labels, 0, **kw),
        "steering_bars": lambda **kw: plots.steering_bars(steering, **kw),
    }


NAMES = ["dotplot", "gene_bars", "density_histogram", "batch_quadrant", "embedding", "violin", "steering_bars"]


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_is_saved_and_leaves_no_figure_open(draw, name, tmp_path):
    import matplotlib.pyplot as plt

    ax = draw[name](save=tmp_path / "new" / f"{name}.png")
    image = plt.imread(tmp_path / "new" / f"{name}.png")
    assert image.std() > 0.05
    assert min(image.shape[:2]) > 300
    assert ax.get_title()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_draws_into_the_axes_it_is_given_and_leaves_them_open(draw, name):
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert draw[name](ax=ax) is ax
    assert ax.has_data()
    assert plt.get_fignums() == [figure.number]
    plt.close(figure)


def closed(ax):
    import matplotlib.pyplot as plt

    plt.close(ax.figure)
    return ax


def test_dots_are_means_and_shares_of_firing_by_label(codes, labels):
    ax = closed(plots.dotplot(codes, labels, [0, 1], names=["B", "other"]))
    dots = ax.collections[0]
    dense = codes.toarray()
    means = np.stack([dense[:30, :2].mean(axis=0), dense[30:55, :2].mean(axis=0)])
    shares = np.stack([(dense[:30, :2] > 0).mean(axis=0), (dense[30:55, :2] > 0).mean(axis=0)])
    np.testing.assert_allclose(dots.get_array().reshape(2, 2), (means - means.min(axis=0)) / np.ptp(means, axis=0))
    np.testing.assert_allclose(dots.get_sizes().reshape(2, 2), 8 + 210 * shares)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["B cell", "NK"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["B", "other"]


def test_gene_bars_show_the_split_and_grey_what_is_not_significant(feature_gene):
    ax = closed(plots.gene_bars(feature_gene, 0))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["CD3D", "MS4A1", "CD79A"]
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[0] != colours[1] == colours[2]
    assert "test cells" in ax.get_xlabel()


def test_gene_bars_pick_their_genes_on_select(feature_gene):
    swapped = feature_gene.with_columns(
        pearson=pl.when((pl.col("split") == "test") & (pl.col("gene") == "CD3D")).then(0.99).otherwise("pearson")
    )
    ax = closed(plots.gene_bars(swapped, 0, n=2))
    assert {t.get_text() for t in ax.get_yticklabels()} == {"CD79A", "MS4A1"}


def test_violins_are_ordered_by_mean_and_say_how_many_cells_fire(codes, labels):
    ax = closed(plots.violin(codes, labels, 0))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["B cell (30)", "NK (25)"]
    assert ax.texts[0].get_text() == "100%"


def test_a_feature_that_never_fires_is_drawn_all_the_same(codes, labels):
    assert closed(plots.violin(codes, labels, 4)).get_title() == "Feature 4 by cell type"
    coordinates = np.zeros((N_CELLS, 2))
    assert "fires in 0 of 60 cells" in closed(plots.embedding(coordinates, codes, 4)).get_title()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, ls, g, s: plots.dotplot(c, ls, [0, 9]), r"no feature \[9\]; the codes have features 0\.\.4"),
        (lambda c, ls, g, s: plots.dotplot(c, ls, []), "no feature"),
        (lambda c, ls, g, s: plots.gene_bars(g, 3), "no row of feature 3 on split 'test'"),
        (lambda c, ls, g, s: plots.embedding(np.zeros((3, 2)), c, 0), r"coordinates are \(3, 2\), expected \(60, 2\)"),
        (lambda c, ls, g, s: plots.steering_bars(s.drop("low")), r"no column \['low'\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(codes, labels, feature_gene, steering, call, message):
    with pytest.raises(InputError, match=message):
        call(codes, labels, feature_gene, steering)


def test_importing_plots_does_not_import_matplotlib():
    code = "import feature_store.plots, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
