"""Names of obs columns: none breaks a stage, a query, a page or a plot, also not those of the tables' columns."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest

from feature_store import FeatureStore, plots
from feature_store.atlas.resources import ROUTES, Resources
from feature_store.errors import InputError
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.obs_columns import KEYS, OWN, TAKEN, column_of, columns_of_cells, find_column, shown_name
from pipelines.associate import associate
from pipelines.cli.lookups import Lookup
from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, SteerOptions, TrainOptions
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.steering.run import steer
from pipelines.train import train

mpl.use("Agg")
pytestmark = pytest.mark.slow
ODD = (
    *("*", "^.*$", "^gene$", "a b", 'say "no"', "it's", "a.b", "a=b", "`x`", "[x]", "日本", "Naïve\ttab", "x" * 300),
    *("Gene", "GENE", "obs_gene", "obs_obs_gene", "obs_", "_draw", "len", "count", "literal", "index", "constructor"),
    *("__proto__", "SELECT", "null", "0", "1", "<b>bold", "embedding", "key", "stratum", "file"),
)
ALL = sorted(TAKEN.union(*(table.columns for table in schemas.TABLES.values())) - {"cell_type"})
NAMES = tuple(dict.fromkeys((*ALL, *ODD)))
LABELS = ("gene", "value", "donor", "obs_gene", "^.*$", "__proto__")
VALUES = ("TP53", "NT", "IRF1")


@dataclass(frozen=True, kw_only=True)
class Named:
    """A store of cells whose obs has a column of each name."""

    store: Path
    values: dict[str, list[str]]
    steered: str


@pytest.fixture(scope="module")
def named(tiny_cells, tiny_model, tmp_path_factory, module_without_actors):
    folder = tmp_path_factory.mktemp("named")
    cells, n = tiny_cells.copy(), tiny_cells.n_obs
    # careful: every name has values of its own, so that a column taken for another shows
    values = {name: [f"{VALUES[(i // 2 + k) % 3]}-{k}" for i in range(n)] for k, name in enumerate(NAMES)}
    # the gene of a cell follows its type, so that features tell it apart
    values["gene"] = ["TP53" if kind == "A" else "NT" for kind in cells.obs["type"]]
    cells.obs = cells.obs[["type"]].join(pl.DataFrame(values).to_pandas().set_index(cells.obs.index))
    cells.write_h5ad(folder / "cells.h5ad")
    options = ExtractOptions(
        data=folder / "cells.h5ad", model=str(tiny_model), layer=("1",), cell_type="type", label=LABELS, shard_cells=24
    )
    store = folder / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.steering.evaluators.MIN_CELLS", 2)
        patch.setattr("pipelines.steering.run.drawings_of", lambda *_: {})
        extract(options, store)
        train(TrainOptions(n_features=16, k=4, n_steps=10, batch_size=128, num_workers=0), store)
        encode(EncodeOptions(), store)
        associate(AssociateOptions(), store)
        result = steer(
            SteerOptions(
                kind="gene", target="TP53", n_features=2, n_nulls=2, max_cells=24, cells=("a=b=" + values["a=b"][0],)
            ),
            store,
        )
    layout = Layout(store)
    found = FeatureStore.open(store)
    points = found.frame("cells").select("cell_idx", x=pl.col("cell_idx") % 9, y=pl.col("cell_idx") // 9).collect()
    commit.write_table(layout.umap_dir(found.lineage.codes), schemas.conform("umap", points), {"table": "umap"})
    return Named(store=store, values=values, steered=result.run)


@pytest.fixture(scope="module")
def resources(named):
    return Resources(FeatureStore.open(named.store))


@pytest.fixture
def store(named):
    return FeatureStore.open(named.store)


def test_names_become_columns_one_to_one():
    columns = [column_of(name) for name in NAMES]
    assert len(set(columns)) == len(NAMES)
    assert not set(columns) & TAKEN
    for name, column in zip(NAMES, columns, strict=True):
        assert shown_name(column) == (f"obs_{name}" if name in OWN else name)
        assert find_column(name, columns) == column
        assert find_column(column, [column]) == column
    assert [column_of(name) for name in ("condition", "", "obs_x")] == ["condition", "obs_", "obs_obs_x"]


def test_every_obs_column_is_in_the_cells_with_its_values(store, named):
    for name, values in named.values.items():
        column = column_of(name).replace('"', '""')
        found = store.sql(f'SELECT c."{column}" AS found FROM cells AS c ORDER BY c.cell_idx')
        assert found["found"].to_list() == values, name


def test_no_other_table_has_a_column_of_that_name(store, named):
    of_obs = {column_of(name) for name in named.values}
    of_tables = {table: set(store.frame(table).collect_schema()) for table in store.tables() if table != "cells"}
    of_tables = {table: names for table, names in of_tables.items() if names & KEYS}
    assert {"features", "codes", "feature_label", "steering_scores", "umap"} <= of_tables.keys()
    assert {table: names & of_obs for table, names in of_tables.items() if names & of_obs} == {}
    # what tables have beyond their schemas is known, too
    assert sorted(set().union(*of_tables.values()) - TAKEN) == []


def test_a_join_over_all_columns_keeps_the_columns_of_both(store):
    joined = store.sql("SELECT * FROM codes JOIN cells USING (cell_idx) LIMIT 5")
    assert set(store.frame("cells").collect_schema()) | {"feature_id", "value"} == {*joined.columns} - {
        "cell_idx:cells"
    }
    assert {"value", "obs_value", "obs_feature_id"} <= set(store.top_cells(3).columns)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.pattern)
def test_every_page_of_the_atlas_answers(resources, route):
    for path in islice(route.paths(resources.data), 1):
        assert resources.get(path) is not None, path


def test_pages_and_options_use_the_names_that_the_data_have(store, named):
    run = named.steered
    page = Resources(store).get(f"steering/{run}.json").body.decode()
    assert "--kind gene " in page
    assert "obs_gene" not in page
    assert store.features_for(label="TP53", kind="gene").equals(store.features_for(label="TP53", kind="obs_gene"))
    assert Lookup(label="TP53", kind="gene").answer(store).height > 0
    for wrong in ("gen", "cell_id", "obs_q_"):
        with pytest.raises(UsageError, match=f"--kind was '{wrong}'.*cell_type, gene, .*obs_gene"):
            steer(SteerOptions(kind=wrong, target="TP53"), named.store)
    with pytest.raises(UsageError, match="'nothing=1'"):
        steer(SteerOptions(kind="gene", target="TP53", cells=("nothing=1",)), named.store)


@pytest.mark.parametrize("name", ["gene", "value", "x", "count", "^.*$", "*", "a.b", "obs_gene", "donor"])
def test_a_plot_takes_the_name_that_the_data_have(store, named, name):
    (panel,) = plots.umap(store, name, coordinates=np.random.default_rng(0).normal(size=(72, 2)), show=False)
    values = {
        value
        for value, split in zip(
            named.values[name], store.frame("cells").select("split").collect()["split"], strict=True
        )
        if split == "test"
    }
    legend = [text.get_text().rpartition(" (")[0] for text in panel.get_legend().get_texts()]
    assert set(legend) == values
    plots.violin(store, 3, name, show=False)


def test_a_dotplot_takes_the_name_that_the_data_have(store):
    plots.dotplot(store, [3], "gene", show=False)
    with pytest.raises(InputError, match=r"'x'.* kinds are .*cell_type, .*gene"):
        plots.dotplot(store, [3], "x", show=False)


def test_cells_with_such_columns_are_written_as_anndata(store, named, tmp_path):
    adata = store.to_anndata()
    adata.write_h5ad(tmp_path / "codes.h5ad")
    assert adata.obs["obs_gene"].tolist() == named.values["gene"]


def test_an_unknown_column_names_the_one_that_holds_it(store):
    from feature_store.errors import QueryError

    with pytest.raises(QueryError, match=r"'token_pos'.*obs_token_pos \(cells\)"):
        store.sql("SELECT token_pos FROM cells")


def test_an_own_column_without_a_value_gives_way_to_that_of_the_data(store):
    columns = columns_of_cells(store.frame("cells"))
    assert "donor" not in columns
    assert find_column("donor", columns) == "obs_donor"
    assert find_column("split", columns) == "split"
