"""Exactly once behind the extraction: codes, merged statistics, expression and associations of a data set with a panel
end in the bytes of undisturbed ones, though actors, raylets and drivers are killed in each.
"""

import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from killed_commands import KilledCommand
from stored_bytes import hashes_of

from pipelines.config import ExtractOptions, TrainOptions
from pipelines.extract import extract
from pipelines.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

N_CELLS, N_PANEL, SHARD = 960, 480, 16
# the driver begins the runs, and actors keep the bounds of runs that were begun
SMALL_RANGES = "import feature_store.codes.codes_run as codes_run; codes_run.MERGE_ROWS = 1000"
STAGES = {
    "encode": (
        ["encode", "--fused", "--keep", "5", "--num-actors", "2", "--shard-cells", str(SHARD)],
        ["codes/*/by_cell", "codes/*/compact", "codes/*/stats/*", "codes/*/merged/*"],
    ),
    "associate": (
        ["associate", "--num-actors", "2", "--range-size", "1KB"],
        ["cells/*/expression", "associations/*/measured/*", "associations/*/feature_gene"],
    ),
}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory, module_without_actors):
    """A store with a panel of half the cells and an SAE."""
    folder, rng = tmp_path_factory.mktemp("panel"), np.random.default_rng(7)
    kind = np.tile(["A", "B"], N_CELLS // 2)
    rate = np.full((N_CELLS, 30), 0.6)
    rate[kind == "A", :10] = 4.0
    obs = pd.DataFrame(
        {"type": kind, "donor": [f"D{i // 2 % 6}" for i in range(N_CELLS)]}, index=[f"cell{i}" for i in range(N_CELLS)]
    )
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    cells = anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(30)]))
    cells.write_h5ad(folder / "cells.h5ad")
    options = ExtractOptions(
        data=folder / "cells.h5ad",
        model=str(tiny_model),
        layer=("1",),
        donor="donor",
        cell_type="type",
        panel=N_PANEL,
        cells=200,
        dtype="f32",
    )
    extract(options, folder / "store")
    train(TrainOptions(n_features=48, k=4, n_steps=30, batch_size=64, num_workers=0), folder / "store")
    return folder / "store"


@pytest.fixture
def started(trained, tmp_path):
    """Make a stage of a copy of the store; each copy has a name."""
    (tmp_path / "home").mkdir()
    made = []

    def make(name, stage):
        store = tmp_path / name
        if not store.exists():
            shutil.copytree(trained, store)
        command, tables = STAGES[stage]
        made.append(KilledCommand(command, store, tmp_path / "home", tables=tables, before=SMALL_RANGES))
        return made[-1]

    yield make
    for command in made:
        command.end()


def results(store):
    """The bytes of what the stages write."""
    return {
        f"{kind}/{name}": sha
        for kind in ("cells", "codes", "associations")
        for name, sha in hashes_of(store / kind).items()
    }


def n_merged(store):
    """The parts that are committed of the three merged tables, which have 16 each."""
    return len(list(store.glob("codes/*/merged/*/part-*.json")))


def test_codes_merged_statistics_and_associations_are_written_once_whatever_is_killed(started, tmp_path):
    for stage in STAGES:
        started("calm", stage).finish()
    rng = np.random.default_rng(0)
    encoding = started("own", "encode")
    for kind in ("actor", "driver", "raylet", "actor"):
        # shards have ten tables
        encoding.go_on_until(int(rng.integers(10, 60)))
        encoding.strike(kind, rng)
    merging = KilledCommand(
        STAGES["encode"][0], encoding.store, tmp_path / "home", tables=["codes/*/merged/*"], before=SMALL_RANGES
    )
    if encoding.alive:
        # what is killed next is the merging, in the command that runs
        merging.driver, merging.mark, merging.log = encoding.driver, encoding.mark, encoding.log
        merging.environment = encoding.environment
    merging.go_on_until(1)
    merging.strike("driver", rng)
    assert 0 < n_merged(encoding.store) < 3 * 16, "over before the kill, which would show nothing"
    merging.finish()
    encoding.assert_written_once()
    merging.assert_written_once()
    associating = started("own", "associate")
    for kind in ("actor", "driver", "raylet"):
        associating.go_on_until(int(rng.integers(1, 5)))
        associating.strike(kind, rng)
    associating.finish()
    associating.assert_written_once()
    assert results(tmp_path / "own") == results(tmp_path / "calm")
