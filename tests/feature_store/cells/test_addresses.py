"""Data at an address give what the local file gives, are read in ranges, and are of one version."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
from typing import TYPE_CHECKING, Any

import anndata
import cell_files
import h5py
import numpy as np
import polars as pl
import pytest
from cell_tables import written_cells
from scipy import sparse
from served_files import Bucket, ServedFolder, bucket, forget_connections, served_folder

from feature_store.cells import Source, open_source, turn_matrices
from feature_store.errors import InputError, NotFoundError
from feature_store.storage import range_file, remote_objects
from feature_store.storage.addresses import RemotePath, data_path
from feature_store.storage.layout import Layout
from feature_store.storage.range_file import RangeFile, open_object

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COLUMNS = {"donor": "donor", "batch": "batch", "cell_type": "type"}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedFolder]:
    (tmp_path / "served").mkdir()
    with served_folder(tmp_path / "served") as found:
        yield found


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch, bucket(patch, "cells") as made:
        yield made


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are repeated without a wait."""
    monkeypatch.setattr(remote_objects, "WAIT_S", 0.0)


@pytest.fixture
def cells(tiny_cells: anndata.AnnData) -> anndata.AnnData:
    adata = tiny_cells.copy()
    adata.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    adata.obs["age"] = np.arange(adata.n_obs) % 7 + 0.5
    return adata


def rows_of(source: Source) -> np.ndarray[Any, Any]:
    rows = source.read_rows(0, source.n_cells)
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(source.n_cells, source.n_genes)).toarray()


def same(address: str, path: Path) -> None:
    with open_source(address) as there, open_source(path) as here:
        np.testing.assert_array_equal(rows_of(there), rows_of(here))
        assert there.obs().equals(here.obs())
        assert there.obs_names().equals(here.obs_names())
        assert (there.gene_symbols, there.ensembl_ids) == (here.gene_symbols, here.ensembl_ids)
        assert (there.formats, there.matrix, there.value_kind) == (here.formats, here.matrix, here.value_kind)


FORMATS = {
    "h5ad": cell_files.h5ad,
    "h5ad, dense": lambda adata, folder: cell_files.h5ad(adata, folder, convert=lambda counts: counts.toarray()),
    "10x, 3": cell_files.tenx_3,
    "zarr, 2": lambda adata, folder: cell_files.zarr_folder(adata, folder, version=2),
    "zarr, 3": cell_files.zarr_folder,
    "zarr, sharded": lambda adata, folder: cell_files.zarr_folder(adata, folder, sharded=True),
}


@pytest.mark.parametrize("what", FORMATS)
def test_data_of_the_web_give_what_the_local_file_gives(what, cells, served):
    path = FORMATS[what](cells, served.folder)
    same(f"{served.address}/{path.name}", path)


@pytest.mark.parametrize("what", FORMATS)
def test_data_of_a_bucket_give_what_the_local_file_gives(what, cells, s3, tmp_path):
    path = FORMATS[what](cells, tmp_path)
    same(s3.put(path, f"{what.replace(', ', '-')}/{path.name}"), path)


def test_the_tables_made_of_an_address_are_those_of_the_local_file(cells, served, tmp_path):
    path = cell_files.h5ad(cells, served.folder)
    frames = []
    for place, store in ((path, "local"), (f"{served.address}/{path.name}", "remote")):
        with open_source(place) as source:
            layout = Layout(tmp_path / store)
            frames.append(written_cells(layout, source, **COLUMNS).drop("dataset"))
    assert frames[0].equals(frames[1])


def test_a_matrix_at_an_address_that_does_not_lie_cell_by_cell_is_turned(cells, served, tmp_path):
    path = cell_files.h5ad(cells, served.folder, convert=sparse.csc_matrix)
    with open_source(f"{served.address}/{path.name}") as source:
        turn_matrices(Layout(tmp_path / "store"), source)
        np.testing.assert_array_equal(rows_of(source), cells.X.toarray())


def test_a_table_of_annotations_is_read_at_an_address(cells, served):
    cells.obs.assign(stage=np.arange(cells.n_obs)).to_csv(served.folder / "obs.csv")
    path = cell_files.tenx_3(cells, served.folder)
    with (
        open_source(path, obs=[f"{served.address}/obs.csv"]) as there,
        open_source(path, obs=[served.folder / "obs.csv"]) as here,
    ):
        assert there.obs().equals(here.obs())
        assert there.obs_digests == here.obs_digests


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .h5ad of 6 MB whose arrays lie in chunks that are compressed."""
    rng = np.random.default_rng(0)
    counts = sparse.random(4000, 1000, density=0.5, format="csr", random_state=rng, dtype=np.float32)
    counts.data = rng.integers(1, 60_000, counts.nnz).astype(np.float32)
    path = tmp_path_factory.mktemp("large") / "large.h5ad"
    anndata.AnnData(counts).write_h5ad(path, compression="gzip")
    return path


def test_every_byte_is_fetched_about_once_in_few_requests_and_memory_is_bounded(large, served, monkeypatch):
    size = large.stat().st_size
    shutil.copy(large, served.folder / "large.h5ad")
    # blocks that are as small against this file as the real ones are against a large one
    monkeypatch.setattr(range_file, "BLOCK_BYTES", 1 << 14)
    with open_source(f"{served.address}/large.h5ad") as source:
        served.asked.clear()
        for start in range(0, source.n_cells, 500):
            source.read_rows(start, start + 500)
    assert size / 2 < served.n_bytes < 1.15 * size
    assert max(n for _, n in served.asked) <= range_file.MOST_BLOCKS << 14
    assert len(served.asked) < 1.6 * size / (range_file.MOST_BLOCKS << 14) + 20


def test_a_range_file_is_the_file(rng):
    content = rng.bytes(5_000_000)
    asked = []

    def fetch(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return content[start:stop]

    file = RangeFile(fetch, len(content))
    for start, n in [(0, 8), (4_999_990, 100), (300_000, 2_000_000), (5_000_000, 10), (100, 0)]:
        file.seek(start)
        assert file.read(n) == content[start : start + n]
    file.seek(-5, 2)
    assert file.read() == content[-5:]
    for start in rng.integers(0, len(content), 200).tolist():
        file.seek(start)
        assert file.read(3000) == content[start : start + 3000]
    assert all(0 <= start < stop <= len(content) for start, stop in asked)


def test_a_range_file_keeps_a_bounded_number_of_blocks(monkeypatch):
    monkeypatch.setattr(range_file, "BLOCK_BYTES", 64)
    monkeypatch.setattr(range_file, "CACHED_BLOCKS", 32)
    file = RangeFile(lambda start, stop: bytes(stop - start), 1 << 20)
    while file.read(1000):
        assert len(file._blocks) <= 32


def change(path: Path) -> None:
    """Write other values of the same size."""
    before = path.stat()
    with h5py.File(path, "r+") as file:
        file["X/data"][:] = file["X/data"][:] + 1
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.mark.parametrize(
    "server", [{}, {"conditions": False}, {"etags": False}], ids=["etags", "no conditions", "times"]
)
def test_a_file_of_the_web_that_changes_while_it_is_read_is_refused(server, large, served, monkeypatch):
    vars(served).update(server)
    monkeypatch.setattr(range_file, "CACHED_BLOCKS", 16)
    shutil.copy(large, served.folder / "large.h5ad")
    with open_source(f"{served.address}/large.h5ad") as source:
        source.read_rows(0, 100)
        change(served.folder / "large.h5ad")
        with pytest.raises(InputError, match=r"large\.h5ad changed while it was in use .*run the command again"):
            source.read_rows(100, source.n_cells)


def test_an_object_that_changes_or_goes_while_it_is_read_is_refused(large, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(range_file, "CACHED_BLOCKS", 16)
    path = tmp_path / "large.h5ad"
    shutil.copy(large, path)
    address = s3.put(path, "changing/large.h5ad")
    with open_source(address) as source, open_source(address) as other:
        change(path)
        s3.put(path, "changing/large.h5ad")
        with pytest.raises(InputError, match=r"large\.h5ad changed while it was in use"):
            source.read_rows(100, source.n_cells)
        s3.fs.rm("cells/changing/large.h5ad")
        with pytest.raises(InputError, match=r"changed while it was in use .*not there any more"):
            other.read_rows(100, other.n_cells)


@pytest.mark.parametrize("where", ["web", "bucket"])
def test_an_actor_opens_the_version_of_the_plan_alone(where, cells, served, s3, tmp_path):
    path = cell_files.h5ad(cells, served.folder)
    address = f"{served.address}/{path.name}" if where == "web" else s3.put(path, "planned/cells.h5ad")
    with open_source(address) as source:
        places = pickle.loads(pickle.dumps(source.places))
        digest, states = source.digest, source.states
    with open_source(places) as again:
        assert (again.digest, again.states) == (digest, states)
    change(path)
    if where == "bucket":
        s3.put(path, "planned/cells.h5ad")
    with pytest.raises(InputError, match=r"cells\.h5ad changed while it was in use \(now it is ETag"):
        open_source(places)
    with open_source(address) as now:
        assert now.digest != digest


@pytest.mark.parametrize("where", ["web", "bucket"])
def test_a_zarr_folder_that_changes_is_refused(where, cells, served, s3):
    path = cell_files.zarr_folder(cells, served.folder)
    address = f"{served.address}/{path.name}" if where == "web" else s3.put(path, "changing/cells.zarr")
    with open_source(address) as source, open_source(address) as begun:
        begun.read_rows(0, 10)
        for part in ("X/data/c/0", "zarr.json"):
            (path / part).write_bytes((path / part).read_bytes())
            os.utime(path / part, ns=(0, 10**9))
        if where == "bucket":
            cells.X.data[0] += 1
            shutil.rmtree(path)
            s3.put(cell_files.zarr_folder(cells, served.folder), "changing")
        with pytest.raises(InputError, match="changed while it was in use"):
            open_source(source.places)
        with pytest.raises(InputError, match="changed while it was in use"):
            begun.read_rows(0, 10)


def test_metadata_of_a_zarr_folder_of_the_web_are_asked_for_again(cells, served, monkeypatch):
    monkeypatch.setattr("feature_store.cells.files.remote_zarr.CHECK_S", 0.0)
    path = cell_files.zarr_folder(cells, served.folder)
    with open_source(f"{served.address}/{path.name}") as source:
        os.utime(path / "zarr.json", ns=(0, 10**9))
        with pytest.raises(InputError, match=r"zarr\.json was"):
            source.read_rows(0, 10)


@pytest.mark.parametrize("where", ["web", "bucket"])
def test_a_missing_chunk_of_values_is_no_zeros(where, cells, served, s3):
    path = cell_files.zarr_folder(cells, served.folder)
    (path / "X/data/c/0").unlink()
    address = f"{served.address}/{path.name}" if where == "web" else s3.put(path, "missing/cells.zarr")
    with pytest.raises(InputError, match=r"missing; the file is damaged|missing; the folder was copied in part"):
        open_source(address)


def test_a_zarr_folder_of_the_web_needs_consolidated_metadata(cells, served):
    import zarr

    path = cell_files.zarr_folder(cells, served.folder, version=2)
    (path / ".zmetadata").unlink()
    with pytest.raises(NotFoundError, match="there is nothing at"):
        open_source(f"{served.address}/{path.name}")
    path = cell_files.zarr_folder(cells, served.folder, name="three.zarr")
    group = zarr.open_group(path, use_consolidated=False)
    group.attrs["touched"] = True
    with pytest.raises(InputError, match=r"no consolidated metadata.*zarr\.consolidate_metadata\('three\.zarr'\)"):
        open_source(f"{served.address}/three.zarr")


def test_the_digest_is_that_of_the_version_and_not_of_the_address(cells, served, s3):
    path = cell_files.h5ad(cells, served.folder)
    shutil.copy2(path, served.folder / "copy.h5ad")
    web = [open_source(f"{served.address}/{name}") for name in ("cells.h5ad", "cells.h5ad?signature=a", "copy.h5ad")]
    assert len({one.digest for one in web}) == 1
    served.etags = False
    times = [open_source(f"{served.address}/{name}") for name in ("cells.h5ad", "cells.h5ad?signature=a", "copy.h5ad")]
    assert times[0].digest == times[1].digest != times[2].digest
    assert times[0].versions[0].startswith("last change ")
    served.times = False
    with open_source(f"{served.address}/cells.h5ad") as size:
        assert size.versions == (f"{path.stat().st_size:,} bytes",)
    objects = [open_source(s3.put(path, name)) for name in ("one.h5ad", "other.h5ad")]
    assert objects[0].digest == objects[1].digest != web[0].digest


def test_a_query_is_sent_and_not_shown(cells, served):
    seen = []
    served.before = seen.append
    path = cell_files.h5ad(cells, served.folder)
    with open_source(f"{served.address}/{path.name}?X-Amz-Signature=secret") as source:
        assert str(source.paths[0]) == f"{served.address}/{path.name}?..."
    path.unlink()
    with pytest.raises(NotFoundError) as error:
        open_source(f"{served.address}/{path.name}?X-Amz-Signature=secret")
    assert "secret" not in str(error.value)


def test_one_address_twice_is_refused(cells, served):
    path = cell_files.h5ad(cells, served.folder)
    address = f"{served.address}/{path.name}"
    with pytest.raises(InputError, match="was given twice"):
        open_source([address, f"{address}?signature=b"])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"statuses": [404] * 9}, r"there is nothing at .*check the address"),
        ({"statuses": [403]}, r"may not be read \(the server answers 403\); .*netrc"),
        ({"statuses": [503] * 9}, r"cannot be reached \(the server answers 503, 4 tries\)"),
        ({"ranges": False}, r"does not answer requests for a range of bytes.*download it"),
        ({"ranges": False, "kind": "text/html"}, r"with a web page; give the address of the file itself"),
    ],
)
def test_what_a_server_of_the_web_refuses_is_said(server, words, cells, served):
    path = cell_files.h5ad(cells, served.folder)
    vars(served).update(server)
    with pytest.raises((InputError, NotFoundError), match=words):
        open_source(f"{served.address}/{path.name}")
    assert served.n_bytes <= path.stat().st_size


@pytest.mark.usefixtures("at_once")
def test_requests_that_fail_for_a_moment_are_repeated(cells, served):
    path = cell_files.h5ad(cells, served.folder)
    served.statuses = [503, 429, 500]
    same(f"{served.address}/{path.name}", path)


@pytest.mark.usefixtures("at_once")
def test_a_server_that_is_not_there_is_one_error(s3, monkeypatch):
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/cells\.h5ad cannot be reached .*check the address"):
        open_source("http://127.0.0.1:9/cells.h5ad")


def test_what_a_bucket_lacks_or_forbids_is_said(s3, monkeypatch):
    for address in ("s3://cells/nothing.h5ad", "s3://cells/nothing.zarr", "s3://no-such-bucket/cells.h5ad"):
        with pytest.raises(NotFoundError, match="there is nothing at s3://"):
            open_source(address)
    monkeypatch.setattr(
        "s3fs.S3FileSystem.call_s3", lambda *_args, **_options: (_ for _ in ()).throw(PermissionError("Forbidden"))
    )
    with pytest.raises(InputError, match=r"may not be read \(Forbidden\); set AWS_ACCESS_KEY_ID"):
        open_source("s3://cells/some.h5ad")


def test_credentials_that_are_missing_are_said(s3, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    forget_connections()
    with pytest.raises(InputError, match=r"may not be read .*set AWS_ACCESS_KEY_ID"):
        open_source("s3://cells/some.h5ad")
    s3fs.S3FileSystem.clear_instance_cache()
    forget_connections()


@pytest.mark.parametrize(
    ("address", "module", "extra"),
    [("s3://b/a.h5ad", "s3fs", "s3"), ("gs://b/a.h5ad", "gcsfs", "gs"), ("https://h/a.h5ad", "aiohttp", "https")],
)
def test_a_missing_package_is_named_with_its_command(address, module, extra, monkeypatch):
    found = remote_objects.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == module else found(name))
    with pytest.raises(InputError, match=rf"needs more packages: pip install 'scsae\[{extra}\]'"):
        open_source(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/a.h5ad", r"data are read at s3://, gs://, https://, http://, or from a file"),
        ("https://user:word@host/a.h5ad", r"holds a user.*netrc"),
        ("s3://bucket", r"give one with a host or bucket"),
        ("https:///a.h5ad", r"give one with a host or bucket"),
    ],
)
def test_an_address_that_is_not_taken_is_refused(address, words):
    with pytest.raises(InputError, match=words):
        data_path(address)


def test_the_parts_of_an_address():
    path = data_path("https://host/a%20b/cells.zarr?token=1")
    assert isinstance(path, RemotePath)
    assert (path.parts, path.name, path.stem, path.suffix) == (
        ("host", "a b", "cells.zarr"), "cells.zarr", "cells", ".zarr"
    )  # fmt: skip
    assert (path / "X/.zarray").address == "https://host/a%20b/cells.zarr/X/.zarray?token=1"
    assert data_path("s3://bucket/a?b/").parts == ("bucket", "a?b")
    assert data_path("a/b.h5ad").name == "b.h5ad"


class OfGenerations:
    """The calls of gcsfs that are used, for files of a folder, with the time of a file as its generation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def info(self, path: str) -> dict[str, Any]:
        file = self.folder / path.removeprefix("gs://")
        if not file.exists():
            raise FileNotFoundError(path)
        found = file.stat()
        kind = "directory" if file.is_dir() else "file"
        return {"size": found.st_size, "type": kind, "generation": str(found.st_mtime_ns)}

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        name, _, generation = path.partition("#")
        if self.info(name)["generation"] != generation:
            raise FileNotFoundError(path)
        return (self.folder / name.removeprefix("gs://")).read_bytes()[start:end]

    def find(self, path: str, *, detail: bool) -> dict[str, dict[str, Any]]:
        assert detail
        files = [file for file in (self.folder / path).rglob("*") if file.is_file()]
        return {file.relative_to(self.folder).as_posix(): self.info(str(file)) for file in files}


@pytest.fixture
def generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder behind `gs://bucket`, without gcsfs."""
    module = types.ModuleType("gcsfs")
    module.__spec__ = types.SimpleNamespace(name="gcsfs")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "gcsfs", module)
    monkeypatch.setattr("fsspec.filesystem", lambda *_args, **_options: OfGenerations(tmp_path))
    forget_connections()
    (tmp_path / "bucket").mkdir()
    yield tmp_path / "bucket"
    forget_connections()


@pytest.mark.parametrize("what", ["h5ad", "zarr, 3"])
def test_generations_of_google_are_read_as_versions(what, cells, generations):
    path = FORMATS[what](cells, generations)
    address = f"gs://bucket/{path.name}"
    same(address, path)
    with open_source(address) as source:
        places = source.places
    os.utime(path if path.is_file() else path / "zarr.json", ns=(0, 10**9))
    with pytest.raises(InputError, match="changed while it was in use"):
        open_source(places)
    with pytest.raises(NotFoundError):
        open_source("gs://bucket/nothing.h5ad")


def test_what_is_no_data_file_at_an_address_is_named(served):
    for name, content, words in [
        ("page.h5ad", b"<!doctype html><html></html>", "web page"),
        ("cells.h5ad", b"PAR1 and more", "not an HDF5 file"),
        ("half.h5ad", b"\x89HDF\r\n\x1a\n" + bytes(5) + b"\x08\x08" + bytes(81), "incomplete|damaged"),
    ]:
        (served.folder / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            open_source(f"{served.address}/{name}")
    (served.folder / "empty.h5ad").write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        open_source(f"{served.address}/empty.h5ad")


def test_a_closed_source_of_an_address_can_be_opened_again(cells, served):
    path = cell_files.h5ad(cells, served.folder)
    file, content = open_object(RemotePath(f"{served.address}/{path.name}"))
    assert file.read() == path.read_bytes()
    assert content.size_bytes == path.stat().st_size
    assert isinstance(open_source(f"{served.address}/{path.name}").obs(), pl.DataFrame)
