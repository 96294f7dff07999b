"""A steering whose driver is killed again and again ends in the bytes of an undisturbed one, logged once."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from stored_bytes import contents_of

from feature_store.storage import commit
from feature_store.storage.layout import MANIFEST, Layout
from pipelines.tracking import Tracking

STEER = "steer --kind batch --target b0 --toward b1 --by both --n-nulls 2 --num-actors 1"
STEER += " --n-features 2 --n-features 4 --dose 0.5 --dose 1.0"
IN_SMALL_SHARDS = """
from pipelines.steering import evaluators, shards, token_sample
shards.SHARD_CELLS = shards.TOKEN_SHARD_CELLS = evaluators.MIN_CELLS = 2
"""
KILLS = {
    "survey": ("survey/codes/part-00001.json", f"survey/codes/{MANIFEST}"),
    "search": ("search/part-00001.json", f"search/{MANIFEST}"),
    "per_cell": ("per_cell/part-00001.json", f"per_cell/{MANIFEST}"),
    "results": (f"per_cell/{MANIFEST}", f"results/{MANIFEST}"),
}
"""What is there, and what is not there yet, when the driver is killed."""


def committed(folder):
    """When each part of a run was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("part-*") if path.with_suffix(".json").exists()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_steering_whose_driver_is_killed_at_every_step_ends_in_the_bytes_of_an_undisturbed_one_logged_once(
    own_store, killable, tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    broken, rng = Path(shutil.copytree(own_store, tmp_path / "broken")), np.random.default_rng(0)

    def start(store):
        killable.start(*STEER.split(), "--store", str(store), first=IN_SMALL_SHARDS)

    start(own_store)
    assert killable.driver.wait() == 0, killable.said
    calm = Layout(own_store).latest("steering").path
    folder, seen = broken / "steering" / calm.name, {}
    for there, not_yet in KILLS.values():
        start(broken)
        killable.wait_until((folder / there).exists)
        time.sleep(rng.uniform(0, 0.05))
        killable.kill()
        assert not (folder / not_yet).exists(), "killed too late, which would show nothing"
        assert {path: when for path, when in committed(folder).items() if path in seen} == seen, "written again"
        seen = committed(folder)
    start(broken)
    tracking = Tracking.existing(Layout(broken))
    killable.wait_until(lambda: tracking.logged(calm.name))
    killable.kill()
    assert [run.info.status for run in tracking.logged(calm.name)] == ["RUNNING"], "killed too late"
    start(broken)
    assert killable.driver.wait() == 0, killable.said
    assert {path: when for path, when in committed(folder).items() if path in seen} == seen, "written again"
    assert contents_of(folder) == contents_of(calm)
    for plan in folder.rglob("plan.json"):
        assert commit.Run.open(plan.parent).verify() == []
    assert [run.info.status for run in tracking.logged(calm.name)] == ["FINISHED"]
    (ours,), (theirs,) = (Tracking(Layout(store)).logged(calm.name) for store in (broken, own_store))
    assert ours.data.metrics == theirs.data.metrics
