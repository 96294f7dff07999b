"""Data at an address are of one version: what changes is refused, and never read beside what was there before."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
from typing import TYPE_CHECKING, Any

import cell_files
import pytest
from served_files import forget_connections

from feature_store.cells import open_source
from feature_store.errors import InputError, NotFoundError
from feature_store.storage import range_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

from address_cells import FORMATS, change, same


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
def test_an_actor_opens_the_version_of_the_plan_alone(where, cells_with_ids, served, s3, tmp_path):
    path = cell_files.h5ad(cells_with_ids, served.folder)
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
def test_a_zarr_folder_that_changes_is_refused(where, cells_with_ids, served, s3):
    path = cell_files.zarr_folder(cells_with_ids, served.folder)
    address = f"{served.address}/{path.name}" if where == "web" else s3.put(path, "changing/cells.zarr")
    with open_source(address) as source, open_source(address) as begun:
        begun.read_rows(0, 10)
        for part in ("X/data/c/0", "zarr.json"):
            (path / part).write_bytes((path / part).read_bytes())
            os.utime(path / part, ns=(0, 10**9))
        if where == "bucket":
            cells_with_ids.X.data[0] += 1
            shutil.rmtree(path)
            s3.put(cell_files.zarr_folder(cells_with_ids, served.folder), "changing")
        with pytest.raises(InputError, match="changed while it was in use"):
            open_source(source.places)
        with pytest.raises(InputError, match="changed while it was in use"):
            begun.read_rows(0, 10)


def test_metadata_of_a_zarr_folder_of_the_web_are_asked_for_again(cells_with_ids, served, monkeypatch):
    monkeypatch.setattr("feature_store.cells.files.remote_zarr.CHECK_S", 0.0)
    path = cell_files.zarr_folder(cells_with_ids, served.folder)
    with open_source(f"{served.address}/{path.name}") as source:
        os.utime(path / "zarr.json", ns=(0, 10**9))
        with pytest.raises(InputError, match=r"zarr\.json was"):
            source.read_rows(0, 10)


def test_the_digest_is_that_of_the_version_and_not_of_the_address(cells_with_ids, served, s3):
    path = cell_files.h5ad(cells_with_ids, served.folder)
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
def test_generations_of_google_are_read_as_versions(what, cells_with_ids, generations):
    path = FORMATS[what](cells_with_ids, generations)
    address = f"gs://bucket/{path.name}"
    same(address, path)
    with open_source(address) as source:
        places = source.places
    os.utime(path if path.is_file() else path / "zarr.json", ns=(0, 10**9))
    with pytest.raises(InputError, match="changed while it was in use"):
        open_source(places)
    with pytest.raises(NotFoundError):
        open_source("gs://bucket/nothing.h5ad")
