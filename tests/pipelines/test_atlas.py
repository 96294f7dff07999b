"""The maps that an atlas makes first, and the two commands that show it."""

import http.client
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys

import polars as pl
import pytest
from toy_plans import toy_table

from feature_store import FeatureStore
from feature_store.atlas import bundles, server
from feature_store.errors import InputError
from feature_store.maps.features import nearest, unit_rows
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringResultsPlan
from pipelines.atlas import export_atlas, missing_maps, prepare_atlas, serve_atlas
from pipelines.cli import queries
from pipelines.match import decoder_rows

MAPS = ("umap", "feature_umap", "feature_neighbour", "profile_umap")


def content(store):
    """Every file of a store with its time."""
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_maps_that_a_store_lacks_are_made_once_and_named(own_store, capsys):
    store = FeatureStore.open(own_store)
    assert not set(MAPS) & set(store.tables())
    ready = prepare_atlas(store)
    said = capsys.readouterr().err
    assert ready.lineage == store.lineage
    assert set(MAPS) <= set(ready.tables())
    assert ready.frame("umap").collect().height == 72
    assert ready.frame("feature_umap").collect()["feature_id"].to_list() == list(range(48))
    living = ready.sql("SELECT feature_id FROM features WHERE NOT dead ORDER BY feature_id")["feature_id"]
    assert ready.frame("profile_umap").collect()["feature_id"].to_list() == living.to_list()
    for name in ("cells", "features", "features by their labels"):
        assert f"making the map of the {name}, once\n" in said
        assert f"made the map of the {name} in " in said
    before = content(own_store)
    assert prepare_atlas(ready).tables() == ready.tables()
    assert capsys.readouterr().err == ""
    assert content(own_store) == before


def test_neighbours_of_features_are_those_of_the_saes_decoder(own_store, capsys):
    store = prepare_atlas(FeatureStore.open(own_store))
    first = store.sql("SELECT other_feature_id, cosine FROM feature_neighbour WHERE rank = 1 ORDER BY feature_id")
    found = nearest(unit_rows(decoder_rows(Layout(own_store).saes_dir(store.lineage.sae))), 1)
    assert first["other_feature_id"].to_list() == found.feature_id[:, 0].tolist()
    assert first["cosine"].to_numpy() == pytest.approx(found.similarity[:, 0])


def test_a_store_that_cannot_be_written_costs_the_maps_and_not_the_time_to_make_them(own_store, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: (path, mode) != (own_store, os.W_OK))
    monkeypatch.setattr("feature_store.maps.cells.lay_out", lambda *_: pytest.fail("a map was made"))
    store = FeatureStore.open(own_store)
    assert prepare_atlas(store).tables() == store.tables()
    names = "the map of the cells, the map of the features, the map of the features by their labels"
    said = capsys.readouterr().err
    assert str(own_store) in said
    assert said.endswith(f"{names}\n")


def test_a_folder_that_cannot_be_written_costs_its_map_and_not_the_atlas(own_store, capsys):
    store = FeatureStore.open(own_store)
    layout = store.layout
    # what forbids writing to everybody, the administrator too: a file in the folder's place
    lineage = store.lineage
    maps = (
        layout.umap_dir(lineage.codes),
        layout.feature_map_dir(lineage.sae),
        layout.profile_map_dir(lineage.associations),
    )
    for folder in maps:
        folder.write_text("in the way")
    ready = prepare_atlas(store)
    assert ready.tables() == store.tables()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the atlas goes without")]
    assert len(said) == 3
    assert said[0].startswith(
        f"the atlas goes without the map of the cells: cannot write in {layout.codes_dir('x').parent}"
    )
    assert said[1].startswith(f"the atlas goes without the map of the features: cannot write in {layout.root}/saes")
    assert said[2].startswith(
        f"the atlas goes without the map of the features by their labels: cannot write in {layout.root}"
    )


def test_a_steering_run_has_a_map_made_if_it_kept_its_embeddings(own_store):
    layout, table = Layout(own_store), pl.DataFrame({"variant": [0]})
    plan = toy_table(SteeringResultsPlan, sae=FeatureStore.open(own_store).lineage.sae)
    for run, names in {"aaaa": ("results", "variants"), "bbbb": ("results", "variants", "per_cell")}.items():
        for name in names:
            commit.write_table(layout.steering_dir(run) / name, table, plan)
    missing = [missing.name for missing in missing_maps(FeatureStore.open(own_store))]
    assert missing[-1] == "the map of steering run bbbb"
    commit.write_table(layout.steering_dir("bbbb") / "map", table, plan)
    assert [missing.name for missing in missing_maps(FeatureStore.open(own_store))] == missing[:-1]


def test_a_store_without_an_sae_lacks_no_map_of_features(chain, tmp_path):
    layout = Layout(tmp_path / "half")
    (dataset,) = (info.run for info in Layout(chain.store).runs("cells"))
    layout.kind_dir("cells").mkdir(parents=True)
    layout.cells_dir(dataset).symlink_to(Layout(chain.store).cells_dir(dataset))
    assert list(missing_maps(FeatureStore.open(layout.root))) == []


def test_the_browser_is_opened_where_asked_for_and_an_open_address_is_warned_of(ready, capsys, monkeypatch):
    opened = queue.Queue()
    monkeypatch.setattr("webbrowser.open", opened.put)

    def serve(store, *, host, port, listening, ready):
        assert (listening.getsockname()[0], port) == (host, 0)
        ready(f"http://{host}:8301")
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serve", serve)
    serve_atlas(ready, associations=None, codes=None, host="127.0.0.1", port=0, open_browser=True)
    assert opened.get(timeout=100) == "http://127.0.0.1:8301"
    assert capsys.readouterr().err == ""
    serve_atlas(ready, associations=None, codes=None, host="0.0.0.0", port=0, open_browser=False)
    assert "0.0.0.0 can read this store" in capsys.readouterr().err
    assert opened.empty()


@pytest.mark.parametrize("host", ["127.0.0.1", "no such host", "256.0.0.1", "a" * 70])
def test_an_address_is_refused_before_a_map_is_made(own_store, monkeypatch, host):
    monkeypatch.setattr("pipelines.atlas.prepare_atlas", lambda _: pytest.fail("a map was made"))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match=rf"{host}:\d+\b.*--port"),
    ):
        serve_atlas(
            own_store, associations=None, codes=None, host=host, port=taken.getsockname()[1], open_browser=False
        )


def test_a_folder_of_something_else_is_refused_before_a_map_is_made(own_store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.atlas.prepare_atlas", lambda _: pytest.fail("a map was made"))
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        export_atlas(own_store, tmp_path, associations=None, codes=None)


def test_the_command_and_the_server_name_one_address():
    assert (queries.HOST, queries.PORT) == ("127.0.0.1", server.PORT)


@pytest.fixture(scope="module")
def ready(chain, tmp_path_factory):
    """A copy of the chain's store that has its maps."""
    copy = shutil.copytree(chain.store, tmp_path_factory.mktemp("ready") / "store")
    prepare_atlas(FeatureStore.open(copy))
    return copy


class Served:
    """`scsae serve` as a process of its own, once it has said where it is."""

    def __init__(self, *arguments, home):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_", "MLFLOW_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "serve", *map(str, arguments)],
            env={**kept, "HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said = self.process.stdout.readline()

    @property
    def address(self):
        return self.said.split("http://")[1].split()[0]

    def get(self, path, *, method="GET"):
        connection = http.client.HTTPConnection(self.address, timeout=100)
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body

    def interrupt(self):
        """Press Ctrl-C; the exit code and what it said after its address."""
        os.killpg(self.process.pid, signal.SIGINT)
        said = self.process.communicate(timeout=100)
        return self.process.returncode, *said


@pytest.fixture
def serve(ready, tmp_path):
    started = []

    def start(*arguments):
        started.append(Served(*arguments, "--store", ready, home=tmp_path))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.communicate()


def test_serve_says_where_the_atlas_is_answers_there_and_ends_quietly_with_ctrl_c(serve, ready):
    before = content(ready)
    served = serve("--port", 0)
    assert served.said.startswith(f"the atlas of {ready} is at http://127.0.0.1:"), served.process.stderr.read()
    answer, body = served.get("/")
    assert answer.status == 200
    assert b"<!doctype html>" in body.lower()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    _, body = served.get("/data/atlas.json")
    assert json.loads(body)["runs"]["associations"] == Layout(ready).latest("associations").run
    assert served.get("/data/atlas.json", method="POST")[0].status == 405
    assert served.interrupt() == (0, "", "")
    assert content(ready) == before


def test_a_port_that_is_taken_is_one_clear_error(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        served = serve("--port", port)
        _, error = served.process.communicate(timeout=240)
    assert (served.process.returncode, served.said) == (2, "")
    assert error.startswith(f"error: cannot listen at 127.0.0.1:{port}: Address already in use; name another with")
    assert error.count("\n") == 1


def test_the_atlas_is_that_of_the_run_that_is_named(serve, ready):
    run = Layout(ready).latest("codes").run
    served = serve("--port", 0, "--codes", run[:6])
    assert json.loads(served.get("/data/atlas.json")[1])["runs"]["codes"] == run


def test_an_export_says_what_it_does_before_its_first_bundle(ready, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipelines.runtime.progress.SHOW_AFTER_S", 0.0)
    export_atlas(ready, tmp_path / "atlas", associations=None, codes=None)
    lines = capsys.readouterr().err.splitlines()
    assert "reads the tables and makes the first bundles" in lines[0]
    assert all("reads the tables" not in line for line in lines[1:])


def test_the_page_is_told_which_map_is_made(own_store):
    told = []
    ready = prepare_atlas(FeatureStore.open(own_store), told.append)
    assert told[0] == "the map of the cells"
    prepare_atlas(ready, lambda name: pytest.fail(f"{name} was made again"))


def test_an_export_says_how_to_look_at_it_and_can_be_made_again(ready, tmp_path, capsys):
    folder = tmp_path / "an atlas"
    for _ in range(2):
        export_atlas(ready, folder, associations=None, codes=None)
        said = capsys.readouterr()
        assert f"python -m http.server --bind 127.0.0.1 --directory '{folder}'\n" in said.out
        assert "bundles" in said.err
        assert (folder / "index.html").is_file()
        first = bundles.unpacked((folder / "data" / "first-0.gz").read_bytes())
        assert json.loads(first["atlas.json"])["n_features"] == 48
    assert FeatureStore.open(ready).frame("features").collect().height == 48


def test_a_folder_of_something_else_is_not_written_over(ready, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        export_atlas(ready, tmp_path, associations=None, codes=None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
