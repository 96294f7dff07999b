"""A file is hashed unless its digest is known for the state that it has."""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pytest

from feature_store.cells import open_source
from feature_store.cells.file_digests import file_digest, file_state

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "a.zarr"
    for name in ("zarr.json", "X/data/0", "X/data/1", "obs/zarr.json"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 3)
    return root


def test_the_digest_of_a_file_is_its_sha256_and_the_blocks_add_up(tmp_path: Path) -> None:
    path, seen = tmp_path / "a", []
    path.write_bytes(b"x" * 5_000_000)
    assert file_digest(path, seen.append) == sha256(path.read_bytes()).hexdigest()
    assert len(seen) == 2
    assert sum(seen) == 5_000_000


def test_the_state_of_a_folder_is_the_sum_over_its_files(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4
    state = file_state(folder)
    assert state.size_bytes == sum(path.stat().st_size for path in files)
    assert state.mtime_ns == sum(path.stat().st_mtime_ns for path in files)
    assert state == tuple(sum(column) for column in zip(*map(file_state, files), strict=True))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def overwrite(path: Path) -> None:
    """Other bytes of the same number, with the old time of change."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file in its place, with its size and time of change."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [append, touch, overwrite, replace, lambda path: path.unlink()])
def test_every_change_of_one_file_of_a_folder_is_another_state(folder: Path, change) -> None:
    before = file_state(folder)
    assert file_state(folder) == before
    change(folder / "X/data/1")
    assert file_state(folder) != before


def test_a_source_hashes_only_the_files_whose_digests_are_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.h5ad")
        counts = np.random.default_rng(i).poisson(1.0, (20, 3)).astype(np.float32)
        anndata.AnnData(counts, var=pd.DataFrame(index=list("ABC"))).write_h5ad(paths[-1])
    wanted = open_source(paths).digests
    hashed = []

    def digest(path, on_bytes):
        hashed.append(path)
        return file_digest(path, on_bytes)

    monkeypatch.setattr("feature_store.cells.source.file_digest", digest)
    known = {(paths[0], file_state(paths[0])): wanted[0], (paths[2], file_state(paths[2])): wanted[2]}
    source = open_source(paths, known_digest=lambda path, state: known.get((path, state)))
    assert source.digests == wanted
    assert hashed == [paths[1]]
    assert source.states == tuple(map(file_state, paths))
    assert source.digest == open_source(paths).digest
