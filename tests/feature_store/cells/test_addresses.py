"""Data at an address give what the local file gives, and are fetched in ranges."""

from __future__ import annotations

import os
import shutil

import cell_files
import numpy as np
import pytest
from address_cells import FORMATS, rows_of, same
from cell_tables import written_cells
from scipy import sparse
from served_files import emulated_google, forget_connections

from feature_store.cells import open_source, turn_matrices
from feature_store.errors import InputError, NotFoundError
from feature_store.storage import range_file
from feature_store.storage.addresses import RemotePath, data_path
from feature_store.storage.layout import Layout
from feature_store.storage.range_file import RangeFile, open_object

COLUMNS = {"donor": "donor", "batch": "batch", "cell_type": "type"}


@pytest.mark.parametrize("what", FORMATS)
def test_data_of_the_web_give_what_the_local_file_gives(what, cells_with_ids, served):
    path = FORMATS[what](cells_with_ids, served.folder)
    same(f"{served.address}/{path.name}", path)


@pytest.mark.parametrize("what", FORMATS)
def test_data_of_a_bucket_give_what_the_local_file_gives(what, cells_with_ids, s3, tmp_path):
    path = FORMATS[what](cells_with_ids, tmp_path)
    same(s3.put(path, f"{what.replace(', ', '-')}/{path.name}"), path)


def test_the_tables_made_of_an_address_are_those_of_the_local_file(cells_with_ids, served, tmp_path):
    path = cell_files.h5ad(cells_with_ids, served.folder)
    frames = []
    for place, store in ((path, "local"), (f"{served.address}/{path.name}", "remote")):
        with open_source(place) as source:
            layout = Layout(tmp_path / store)
            frames.append(written_cells(layout, source, **COLUMNS).drop("dataset"))
    assert frames[0].equals(frames[1])


def test_a_matrix_at_an_address_that_does_not_lie_cell_by_cell_is_turned(cells_with_ids, served, tmp_path):
    path = cell_files.h5ad(cells_with_ids, served.folder, convert=sparse.csc_matrix)
    with open_source(f"{served.address}/{path.name}") as source:
        turn_matrices(Layout(tmp_path / "store"), source)
        np.testing.assert_array_equal(rows_of(source), cells_with_ids.X.toarray())


def test_a_table_of_annotations_is_read_at_an_address(cells_with_ids, served):
    cells_with_ids.obs.assign(stage=np.arange(cells_with_ids.n_obs)).to_csv(served.folder / "obs.csv")
    path = cell_files.tenx_3(cells_with_ids, served.folder)
    with (
        open_source(path, obs=[f"{served.address}/obs.csv"]) as there,
        open_source(path, obs=[served.folder / "obs.csv"]) as here,
    ):
        assert there.obs().equals(here.obs())
        assert there.obs_digests == here.obs_digests


def test_every_byte_is_fetched_about_once_in_few_requests_and_memory_is_bounded(large, served, monkeypatch):
    size = large.stat().st_size
    shutil.copy(large, served.folder / "large.h5ad")
    # blocks that are as small against this file as the real ones are against a large one
    monkeypatch.setattr(range_file, "BLOCK_BYTES", 1 << 12)
    with open_source(f"{served.address}/large.h5ad") as source:
        served.asked.clear()
        for start in range(0, source.n_cells, 500):
            source.read_rows(start, start + 500)
    assert size / 2 < served.n_bytes < 1.15 * size
    assert max(n for _, n in served.asked) <= range_file.MOST_BLOCKS << 12
    assert len(served.asked) < 1.6 * size / (range_file.MOST_BLOCKS << 12) + 40


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


def test_a_query_is_sent_and_not_shown(cells_with_ids, served):
    seen = []
    served.before = seen.append
    path = cell_files.h5ad(cells_with_ids, served.folder)
    with open_source(f"{served.address}/{path.name}?X-Amz-Signature=secret") as source:
        assert str(source.paths[0]) == f"{served.address}/{path.name}?..."
    path.unlink()
    with pytest.raises(NotFoundError) as error:
        open_source(f"{served.address}/{path.name}?X-Amz-Signature=secret")
    assert "secret" not in str(error.value)


def test_the_parts_of_an_address():
    path = data_path("https://host/a%20b/cells.zarr?token=1")
    assert isinstance(path, RemotePath)
    assert (path.parts, path.name, path.stem, path.suffix) == (
        ("host", "a b", "cells.zarr"), "cells.zarr", "cells", ".zarr"
    )  # fmt: skip
    assert (path / "X/.zarray").address == "https://host/a%20b/cells.zarr/X/.zarray?token=1"
    assert data_path("s3://bucket/a?b/").parts == ("bucket", "a?b")
    assert data_path("a/b.h5ad").name == "b.h5ad"


@pytest.mark.parametrize("what", ["h5ad", "zarr, 3"])
def test_data_of_google_give_what_the_local_file_gives(what, cells_with_ids, tmp_path, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install 'scsae[gs]'")
    (tmp_path / "bucket").mkdir()
    path = FORMATS[what](cells_with_ids, tmp_path / "bucket")
    with emulated_google(tmp_path) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        monkeypatch.setattr("fsspec.config.conf", {"gs": {"token": "anon"}})
        gcsfs.GCSFileSystem.clear_instance_cache()
        forget_connections()
        same(f"gs://bucket/{path.name}", path)
        a_file = path if path.is_file() else path / "zarr.json"
        begun, _ = open_object(RemotePath(f"gs://bucket/{a_file.relative_to(tmp_path / 'bucket').as_posix()}"))
        with open_source(f"gs://bucket/{path.name}") as source, open_source(source.places) as again:
            assert again.digest == source.digest
            for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
                os.utime(file, ns=(0, 10**9))
            with pytest.raises(InputError, match="changed while it was in use"):
                open_source(source.places)
            with pytest.raises(InputError, match="changed while it was in use"):
                begun.read()
        with pytest.raises(NotFoundError, match="there is nothing at gs://bucket/nothing"):
            open_source("gs://bucket/nothing.h5ad")
    forget_connections()
