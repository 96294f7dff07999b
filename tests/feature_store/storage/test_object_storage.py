"""The store on object storage, against two servers.

`swift` is a real object store with its S3 interface (OpenStack Swift: proxy, account, container and object server, one
replica on this disk); it does not settle conditional puts of one moment and has no If-Match. `moto` is an emulation, in
this process; one request at a time makes its conditional puts atomic, as those of AWS are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from served_files import emulated_s3
from stored_bytes import bytes_of

from feature_store import FeatureStore
from feature_store.activations import ActivationReader, TokenStream
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.errors import BusyError, InputError, IntegrityError, NotFoundError, StoreWriteError
from feature_store.storage import commit, filesystem, object_storage, run_lock
from feature_store.storage.layout import Layout, as_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

START_S = 200.0


@contextmanager
def moto(_folder: Path) -> Iterator[dict[str, str]]:
    """An emulation of S3 in a thread, one request at a time."""
    with emulated_s3() as address:
        yield {"port": address.rpartition(":")[2], "id": "emulated", "key": "emulated"}


RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *servers = sys.argv[1:]
for server in servers:
    kind, port = server.split("=")
    builder = RingBuilder(2, 1, 1)
    place = {"ip": "127.0.0.1", "port": int(port), "replication_ip": "127.0.0.1", "replication_port": int(port)}
    builder.add_dev({**place, "id": 0, "region": 1, "zone": 1, "device": "disk", "weight": 1, "meta": ""})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""
SERVE = """
import sys
from swift.common import utils
from swift.common.utils import config
utils.SWIFT_CONF_FILE = config.SWIFT_CONF_FILE = sys.argv[1]
from swift.common.wsgi import run_wsgi
sys.exit(run_wsgi(sys.argv[2], sys.argv[3]))
"""
SWIFT = "[swift-hash]\nswift_hash_path_suffix = tests\n[storage-policy:0]\nname = one\ndefault = yes\n"
COMMON = """[DEFAULT]
devices = {folder}/devices
swift_dir = {folder}
log_address = {folder}/nowhere
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
"""
BACK = "[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
FRONT = """[pipeline:main]
pipeline = catch_errors s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
[filter:slo]
use = egg:swift#slo
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
"""


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def swift(folder: Path) -> Iterator[dict[str, str]]:
    """OpenStack Swift with its S3 interface, four processes that keep their objects in `folder`."""
    if importlib.util.find_spec("swift") is None:
        pytest.skip("OpenStack Swift is not installed: pip install swift (it is among the extra `dev`)")
    kinds = ("account", "container", "object", "proxy")
    ports = dict(zip(kinds, free_ports(4), strict=True))
    (folder / "devices" / "disk").mkdir(parents=True)
    try:
        os.setxattr(folder, "user.scsae", b"")
    except OSError as error:
        pytest.skip(f"OpenStack Swift needs extended attributes, which {folder} does not have: {error}")
    (folder / "swift.conf").write_text(SWIFT)
    backs = [f"{kind}={ports[kind]}" for kind in kinds[:3]]
    subprocess.run([sys.executable, "-c", RINGS, folder, *backs], check=True, capture_output=True)
    with ExitStack() as stack:
        for kind, port in ports.items():
            config = folder / f"{kind}.conf"
            user = os.environ.get("USER", "root") if os.geteuid() else "root"
            common = COMMON.format(folder=folder, port=port, user=user)
            config.write_text(common + (FRONT if kind == "proxy" else BACK.format(kind=kind)))
            command = [sys.executable, "-c", SERVE, folder / "swift.conf", config, f"{kind}-server"]
            log = stack.enter_context((folder / f"{kind}.log").open("wb"))
            server = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(server.wait)
            stack.callback(server.terminate)
        for kind, port in ports.items():
            wait_for(port, folder / f"{kind}.log")
        yield {"port": str(ports["proxy"]), "id": "test:tester", "key": "testing"}


def wait_for(port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, f"no answer after {START_S} s: {log.read_text()[-2000:]}"
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="module", params=[moto, pytest.param(swift, marks=pytest.mark.slow)], ids=["moto", "swift"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with an empty bucket of its name, in the environment."""
    import s3fs

    name = request.param.__name__
    with request.param(tmp_path_factory.mktemp(name)) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found['port']}")
        patch.setenv("AWS_ACCESS_KEY_ID", found["id"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", found["key"])
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().call_s3("create_bucket", Bucket=name)
        yield name
        s3fs.S3FileSystem.clear_instance_cache()


# claims of atomic conditional puts, and what costs many requests and has nothing to do with the server
EMULATED = pytest.mark.parametrize("server", [moto], ids=["moto"], indirect=True)


@pytest.fixture
def root(server: str, request: pytest.FixtureRequest) -> Path:
    """A store of its own for each test."""
    return as_path(f"s3://{server}/{abs(hash(request.node.name))}/store")


def content(shard: int) -> bytes:
    return f"content of {shard} ".encode() * 1000


def fill(run: commit.Run, shards: list[int] | None = None) -> None:
    for shard in run.pending() if shards is None else shards:
        run.commit_shard(shard, lambda path, shard=shard: path.write_bytes(content(shard)), start=shard, stop=shard + 1)


@pytest.fixture
def finished(root: Path) -> commit.Run:
    run = commit.Run.create(root / "activations" / "run", {"n_shards": 3, "seed": 7})
    fill(run)
    run.finalize()
    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_threads(n: int, work: Callable[[int], Any]) -> list[Any]:
    barrier, results = threading.Barrier(n), [None] * n

    def started(i: int) -> None:
        barrier.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=started, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_run_on_object_storage_has_the_bytes_of_one_in_a_folder(finished: commit.Run, tmp_path: Path) -> None:
    local = commit.Run.create(tmp_path / "run", finished.plan)
    fill(local)
    local.finalize()
    assert names(finished.path) == names(local.path)
    for name in names(local.path):
        assert bytes_of(finished.path / name) == bytes_of(local.path / name)
    assert finished.verify() == []


@EMULATED
def test_nothing_but_the_run_is_left_on_the_store_and_on_the_disk(
    finished: commit.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (finished.path / "part-00001.json").unlink()
    fill(finished)
    assert names(tmp_path) == []
    parts = [f"part-0000{shard}.{kind}" for shard in range(3) for kind in ("json", "parquet")]
    assert names(finished.path) == sorted([*parts, "plan.json", "MANIFEST.json"])


def test_a_conditional_put_is_refused_and_changes_nothing(root: Path) -> None:
    assert object_storage.create(root / "claimed", "first")
    assert not object_storage.create(root / "claimed", "second")
    assert (root / "claimed").read_text() == "first"


@EMULATED
def test_of_writers_of_one_moment_one_is_told_that_it_made_the_object(root: Path) -> None:
    for n in range(5):
        won = in_threads(6, lambda i, n=n: object_storage.create(root / f"claimed-{n}", f"writer {i}"))
        assert sum(won) == 1
        assert (root / f"claimed-{n}").read_text() == f"writer {won.index(True)}"


@EMULATED
def test_a_put_in_place_of_a_version_is_refused_once_there_is_another(root: Path) -> None:
    object_storage.create(root / "lease", "one")
    seen = object_storage.head(root / "lease")
    assert seen is not None
    assert object_storage.replace(root / "lease", "two", etag=seen.etag)
    assert not object_storage.replace(root / "lease", "three", etag=seen.etag)
    assert (root / "lease").read_text() == "two"


def test_writers_racing_for_the_same_shards_and_the_manifest_end_in_one_intact_run(root: Path) -> None:
    plan = {"n_shards": 4, "seed": 1}

    def work(i: int) -> str:
        run = commit.Run.create(root / "run", plan)
        fill(run, np.random.default_rng(i).permutation(4).tolist())
        return run.finalize().sha

    assert len(set(in_threads(3, work))) == 1
    assert commit.verify(root / "run") == []


@EMULATED
def test_a_committed_shard_is_not_written_again(finished: commit.Run) -> None:
    def never(_: Path) -> int:
        raise AssertionError("a retry has to find the marker")

    assert finished.commit_shard(1, never, start=1, stop=2) == finished.committed(1)


@EMULATED
def test_a_lost_marker_is_made_again_by_its_shard_alone(finished: commit.Run) -> None:
    before = finished.manifest().sha
    (finished.path / "part-00001.json").unlink()
    assert "part-00001.json: missing" in finished.verify()[0]
    assert finished.pending() == [1]
    fill(finished)
    assert finished.finalize().sha == before
    assert finished.verify() == []


@EMULATED
def test_a_start_of_a_finished_run_takes_as_many_requests_for_many_shards_as_for_few(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    requests: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        requests.append(method)
        return await call(self, method, *arguments, **options)

    taken = []
    for n_shards in (2, 12):
        run = commit.Run.create(root / f"run{n_shards}", {"n_shards": n_shards})
        fill(run, list(range(n_shards)))
        with monkeypatch.context() as patch:
            patch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
            requests.clear()
            run.finalize()
            ending = len(requests)
            requests.clear()
            assert commit.Run.open(run.path).pending() == []
            assert commit.is_intact(run.path)
            taken.append((ending, len(requests)))
    (few, start_of_few), (many, start_of_many) = taken
    assert many - few == 10, "a request for a marker"
    assert start_of_many == start_of_few


def test_damaged_objects_are_named_and_repaired_by_running_again(finished: commit.Run) -> None:
    before = {each: (finished.path / each).read_bytes() for each in names(finished.path)}
    damaged = ["part-00000.parquet", "part-00001.json", "MANIFEST.json"]
    for name in damaged:
        data = bytearray(before[name])
        data[len(data) // 2] ^= 1
        (finished.path / name).write_bytes(bytes(data))
    problems = commit.verify(finished.path)
    assert all(any(name in problem for problem in problems) for name in damaged)
    (finished.path / "plan.json").write_bytes(before["plan.json"].replace(b"7", b"8"))
    assert "plan.json was damaged" in commit.verify(finished.path)[0]
    run = commit.Run.create(finished.path, {"n_shards": 3, "seed": 7})
    fill(run)
    run.finalize()
    assert commit.verify(finished.path) == []
    assert {each: (finished.path / each).read_bytes() for each in names(finished.path)} == before


@EMULATED
def test_a_table_comes_back_as_it_was_written(root: Path) -> None:
    frame = pl.DataFrame({"b": ["x", None, "z"], "a": [1.5, 2.5, None]})
    commit.write_table(root / "t", frame, {"k": 1})
    assert commit.read_table(root / "t").equals(frame)


def test_activations_are_read_by_row_group_and_streamed_as_from_a_folder(
    root: Path, store_activations: Callable[..., Any]
) -> None:
    local = store_activations()
    run = commit.Run.create(root / "activations" / "run", local.run.plan)
    for marker in local.run.manifest().shards:
        source = local.run.part(marker.shard)

        def copied(path: Path, source: Path = source, rows: int = marker.rows) -> int:
            shutil.copyfile(source, path)
            return rows

        run.commit_shard(marker.shard, copied, start=marker.start, stop=marker.stop)
    run.finalize()
    here, there = (ActivationReader(each) for each in (local.run, run))
    assert there.row_groups == here.row_groups
    assert np.array_equal(there.read(1, 0).act, here.read(1, 0).act)
    batches = [list(TokenStream(reader, batch_tokens=16, seed=3, n_epochs=1)) for reader in (here, there)]
    assert all(np.array_equal(a, b) for a, b in zip(*batches, strict=True))
    part = run.part(1)
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=r"part-00001\.parquet.*scsae extract"):
        ActivationReader(run)


def test_a_store_is_queried_on_object_storage(root: Path, small_store: Any) -> None:
    local = small_store.layout.root
    root.fs.put(f"{local}/", f"{root.path}/", recursive=True)  # type: ignore[attr-defined]
    here, there = FeatureStore.open(local), FeatureStore.open(str(root))
    assert there.lineage == here.lineage
    for query in (
        "SELECT split, COUNT(*) AS n FROM cells GROUP BY split ORDER BY split",
        "SELECT feature_id, COUNT(*) AS n, MAX(value) AS top FROM codes GROUP BY feature_id ORDER BY feature_id",
        "SELECT * FROM feature_label WHERE split = 'test' ORDER BY auroc DESC",
    ):
        assert there.sql(query).equals(here.sql(query))
    assert there.top_cells(3).equals(here.top_cells(3))
    assert there.features_of(7).equals(here.features_of(7))
    codes = CodesRun.open(Layout(root).codes_dir("c0de"))
    cells = np.arange(40)
    assert (load_cell_codes(codes, cells) != load_cell_codes(small_store.codes, cells)).nnz == 0
    assert [info.run for info in Layout(root).runs("codes")] == ["c0de"]
    assert Layout(root).latest("associations").run == "a550c"


@pytest.mark.parametrize("server", [moto], ids=["moto"], indirect=True)
def test_a_matrix_stored_by_column_is_turned_into_a_store_on_object_storage(root: Path, tmp_path: Path) -> None:
    import anndata
    from scipy import sparse

    from feature_store.cells import open_source, turn_matrices

    counts = sparse.csc_matrix(np.random.default_rng(0).poisson(1.0, (60, 9)).astype(np.float32))
    anndata.AnnData(counts).write_h5ad(tmp_path / "a.h5ad")
    said: list[str] = []
    for _ in range(2):
        with open_source(tmp_path / "a.h5ad") as source:
            turn_matrices(Layout(root), source, said.append)
            rows = source.read_rows(0, 60)
            assert (np.repeat(np.arange(60), np.diff(rows.indptr)) == counts.tocsr().nonzero()[0]).all()
            assert rows.data.tolist() == counts.tocsr().data.tolist()
            folders = source.rows
    assert len(said) == 2
    assert folders[0].startswith("s3://")
    # a process that is given the folders
    with open_source(tmp_path / "a.h5ad", rows=folders) as source:
        assert source.read_rows(7, 9).data.tolist() == counts.tocsr()[7:9].data.tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("without_actors")
@pytest.mark.parametrize("server", [moto, swift], ids=["moto", "swift"], indirect=True)
def test_every_stage_runs_on_object_storage_and_a_second_time_does_nothing(
    root: Path,
    tiny_data: Path,
    tiny_model: Path,
    ray_local: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipelines.config import Recipe, check
    from pipelines.recipe import run_recipe
    from pipelines.verify import verify_run

    monkeypatch.chdir(tmp_path)
    stages = {
        "extract": {
            "data": str(tiny_data),
            "model": str(tiny_model),
            "layer": ["1"],
            "cell_type": "type",
            "donor": "donor",
            "shard_cells": 36,
        },
        "train": {"n_features": 8, "k": 4, "n_steps": 6, "batch_size": 64, "checkpoint_steps": 2, "num_workers": 0},
        "encode": {},
        "associate": {},
    }
    recipe = check(Recipe, stages, "test")
    first = run_recipe(recipe, root)
    assert [result.kind for result in first] == ["activations", "saes", "codes", "associations"]
    assert all(result.done for result in first)
    answer = FeatureStore.open(root).sql("SELECT COUNT(*) AS n FROM features")
    assert answer["n"].item() == 8
    assert verify_run(first[1].run, root) == 0
    assert names(first[1].path / "checkpoints") == ["step-00000002", "step-00000004"]
    assert (tmp_path / "scsae-local").is_dir(), "MLflow's database lies beside"
    assert not any(result.done for result in run_recipe(recipe, root))


def test_the_second_driver_is_told_who_drives_and_the_third_comes_after_the_first(finished: commit.Run) -> None:
    with finished.exclusive():
        with pytest.raises(BusyError, match=f"process {os.getpid()}, since .*what is committed is kept .*free in"):
            finished.exclusive().__enter__()
    with finished.exclusive():
        pass
    assert run_lock.DRIVER not in names(finished.path)


@EMULATED
def test_a_lease_that_was_not_renewed_is_taken_over(finished: commit.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = {"host": "gone", "pid": 1, "since": "2026-01-01", "token": "of a killed driver"}
    (finished.path / run_lock.DRIVER).write_text(json.dumps(killed))
    with pytest.raises(BusyError, match="host gone, process 1"):
        finished.exclusive().__enter__()
    monkeypatch.setattr(run_lock, "LAPSE_S", -5.0)
    with finished.exclusive():
        assert f'"pid": {os.getpid()}' in (finished.path / run_lock.DRIVER).read_text()


@EMULATED
def test_a_lease_is_renewed_while_its_driver_works_and_left_to_who_took_it_over(
    finished: commit.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "RENEW_S", 0.05)
    lease = finished.path / run_lock.DRIVER
    with finished.exclusive():
        end = time.monotonic() + 120
        while json.loads(filesystem.read_bytes(lease))["beat"] < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        lease.write_text('{"token": "of another"}')
    assert lease.read_text() == '{"token": "of another"}'


@EMULATED
def test_a_bucket_that_is_not_there_is_said_with_what_to_set(server: str) -> None:
    with pytest.raises(NotFoundError, match=r"'no-such-bucket' cannot be reached: .*AWS_ENDPOINT_URL"):
        Layout("s3://no-such-bucket/store")


@EMULATED
def test_a_key_that_may_not_write_is_a_clear_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(root.fs), "call_s3", refused)  # type: ignore[attr-defined]
    with pytest.raises(StoreWriteError, match=r"cannot write in s3://.*Access Denied"):
        commit.Run.create(root / "run", {"n_shards": 1})


@EMULATED
def test_a_store_that_ignores_conditions_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = root.fs.call_s3  # type: ignore[attr-defined]

    def ignoring(_: Any, method: str, **given: Any) -> Any:
        given.pop("IfNoneMatch", None)
        return put(method, **given)

    monkeypatch.setattr(object_storage, "_CONDITIONAL", set())
    monkeypatch.setattr(type(root.fs), "call_s3", ignoring)  # type: ignore[attr-defined]
    with pytest.raises(StoreWriteError, match="ignores conditional puts"):
        commit.Run.create(root / "run", {"n_shards": 1})


@pytest.mark.parametrize("uri", ["gs://bucket/store", "s3://", "https://bucket/x"])
def test_another_protocol_is_refused_with_what_is_allowed(uri: str) -> None:
    with pytest.raises(InputError, match="s3://BUCKET/PREFIX"):
        as_path(uri)


def test_without_the_extra_a_uri_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"pip install 'scsae\[s3\]'"):
        as_path("s3://bucket/store")


def test_a_store_in_a_folder_imports_nothing_of_object_storage(tmp_path: Path) -> None:
    code = (
        "import sys; from feature_store.storage import commit; from feature_store.query.store import FeatureStore; "
        f"commit.Run.create({str(tmp_path / 'run')!r}, {{'n_shards': 1}}).pending(); "
        "assert not {'s3fs', 'fsspec', 'upath', 'botocore'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
