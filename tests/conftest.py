"""Shape checks for the mathematics, the folder of real data, a tiny data set and checkpoint, a small Ray session, and a
browser with an atlas to look at.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from in_process import replace_actors
from shape_checks import check_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import anndata
    from playwright.sync_api import Browser

    from feature_store import FeatureStore

# has to run before anything imports sae_core: its signatures are then checked at every call
check_shapes("sae_core")


STARTS_RAY = {"ray_local", "killable"}
"""Fixtures that start Ray."""
MARKS = {"ray": STARTS_RAY, "browser": {"browser"}}
"""Marks, and the fixtures that give them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses a fixture that starts Ray or a browser, directly or through other fixtures.

    A test that starts Ray itself, in a process of its own, carries the mark in its module. `make test` looks for tests
    with Ray in one folder alone.
    """
    folder = Path(__file__).parent / "pipelines"
    for item in items:
        for mark, fixtures in MARKS.items():
            if isinstance(item, pytest.Function) and fixtures & set(item.fixturenames):
                item.add_marker(mark)
        if {"ray", "slow"} & set(item.keywords) == {"ray"} and folder not in item.path.parents:
            raise pytest.UsageError(f"{item.nodeid} starts Ray; put it into {folder.name}, or mark it slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let no test start Ray that does not carry the mark: those run beside each other."""

    from pipelines.runtime import cluster

    connect = cluster._connect

    def refuse_to_start(known: str | None, num_cpus: int | None) -> None:
        import ray

        # a test may have put something else into the place of ray.init
        if known is None and ray.init.__module__.startswith("ray."):
            raise AssertionError("this test starts Ray; let it use without_actors, or ray_local, which marks it")
        connect(known, num_cpus)

    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("ray") is None:
            patch.setattr(cluster, "_connect", refuse_to_start)
        return (yield)


@pytest.fixture(scope="session")
def scsae_data() -> Path:
    folder = os.environ.get("SCSAE_DATA")
    if not folder:
        pytest.skip("SCSAE_DATA is not set: it names the folder of real .h5ad files that this test reads")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"SCSAE_DATA={folder} is no folder")
    return path.resolve()


N_CELLS, N_GENES = 72, 30
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
ARGS = {"nlayers": 3, "nheads": 2, "embsize": 16, "d_hid": 24, "n_bins": 51, "max_seq_len": 64, "tie_break": "midpoint"}
ARGS |= {"pad_value": -2, "mask_value": -1, "input_emb_style": "continuous", "dropout": 0.2, "n_layers_cls": 3}


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory):
    """Two cores of Ray on this machine, for the whole session."""
    from pipelines.runtime.cluster import ray_session

    with pytest.MonkeyPatch.context() as patch:
        home, token = tmp_path_factory.mktemp("home"), Path.home() / ".ray"
        if token.is_dir():
            # a session before this one may have read the token, which Ray then writes nowhere again
            shutil.copytree(token, home / ".ray")
        patch.setenv("HOME", str(home))
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(num_cpus=2):
            yield


@pytest.fixture(scope="session", autouse=True)
def migrated_databases(tmp_path_factory) -> Iterator[None]:
    """Databases of MLflow begin as copies of one whose tables were made once, which takes 1.6 s of a core."""
    from pipelines.tracking.runs import TrackingStore

    select, template = TrackingStore._select, tmp_path_factory.mktemp("mlflow") / "mlflow.db"

    def select_with_tables(self: TrackingStore) -> None:
        select(self)
        scheme, _, place = self.uri.partition(":///")
        file = Path(place)
        if scheme == "sqlite" and "?" not in place and file.parent.is_dir() and not file.exists():
            if not template.exists():
                self._mlflow.MlflowClient(f"sqlite:///{template}", f"sqlite:///{template}").search_experiments()
            shutil.copyfile(template, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrackingStore, "_select", select_with_tables)
        yield


@pytest.fixture(scope="session")
def tiny_cells() -> anndata.AnnData:
    """Counts of 72 cells of 6 donors, 2 batches and 2 types, all crossed; genes 0-9 are high in type A, 10-19 in B."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    kind = np.tile(["A", "B"], N_CELLS // 2)
    rate = np.full((N_CELLS, N_GENES), 0.6)
    rate[kind == "A", :10] = 4.0
    rate[kind == "B", 10:20] = 4.0
    obs = pd.DataFrame(
        {
            "type": kind,
            "donor": [f"D{i // 2 % 6}" for i in range(N_CELLS)],
            "batch": [f"b{i // 12 % 2}" for i in range(N_CELLS)],
        },
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    return anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=SYMBOLS))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, tiny_cells) -> Path:
    """The tiny cells as an .h5ad file."""
    file = tmp_path_factory.mktemp("data") / "tiny.h5ad"
    tiny_cells.write_h5ad(file)
    return file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A scGPT checkpoint folder with random weights, which knows the tiny genes but two."""
    from safetensors.torch import save_file

    from sae_core.scfm import ScGPT, ScGPTConfig, Vocabulary
    from sae_core.scfm.scgpt.network import init_weights

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    tokens = (*SYMBOLS[2:], "<pad>", "<cls>", "<eoc>")
    model = ScGPT.empty(ScGPTConfig.from_args(ARGS), Vocabulary(tokens=tokens), n_tokens=len(tokens))
    init_weights(model, seed=3)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "args.json").write_text(json.dumps(ARGS))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


@pytest.fixture
def toy_plug_in(monkeypatch, tmp_path) -> None:
    """The package `scsae-toy`, whose entry point is the family of `toy_family`."""
    from plug_ins import install

    install(monkeypatch, tmp_path / "site-packages", "scsae-toy", "0.3", toy="toy_family:FAMILY")


@pytest.fixture(scope="session")
def shards_here():
    """`do_shards` without Ray, whatever number of actors is asked for."""
    from pipelines.runtime.actor_pool import do_shards as compute

    def do_shards(worker, work, shards, options, *, title, note, address=None):
        # the last bits of activations depend on the number of threads
        one = options.model_copy(update={"num_actors": 0, "num_cpus": 1})
        return compute(worker, work, shards, one, title=title, note=note)

    return do_shards


@pytest.fixture
def without_actors(monkeypatch, shards_here):
    """Start no actor in any stage."""
    replace_actors(monkeypatch, shards_here)


@pytest.fixture(scope="module")
def module_without_actors(shards_here):
    """Start no actor in any stage of a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        replace_actors(patch, shards_here)
        yield


@pytest.fixture(scope="session")
def serving() -> Callable[[FeatureStore], str]:
    """Serve a store on a free local port; its address."""

    def start(store: FeatureStore) -> str:
        from feature_store.atlas import serve

        said: list[str] = []
        answers = threading.Event()

        def ready(address: str) -> None:
            said.append(address)
            answers.set()

        threading.Thread(target=serve, args=(store,), kwargs={"port": 0, "ready": ready}, daemon=True).start()
        assert answers.wait(30)
        return said[0]

    return start


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, headless. Skipped where there is none, but never in continuous integration.

    One a module: while it is there an event loop of Playwright's runs, in which other tests could not run theirs.
    """
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium to test the atlas in; install it: apt-get install chromium")
        pytest.skip("no Chromium is installed, which the pages of the atlas are tested in")
    from playwright.sync_api import sync_playwright

    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    arguments = [*quiet.split(), "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=arguments)
        yield started
        started.close()
