"""`scsae inspect --vectors` says what extract would take, refuses what it would refuse, and writes nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
import torch
from given_vectors import WIDTH, refused_by, said_by, vectors_of
from safetensors.numpy import save_file

import scsae
from feature_store.errors import InputError
from pipelines.config import ExtractOptions
from pipelines.extract import extract

if TYPE_CHECKING:
    from pathlib import Path

N = 72


@pytest.fixture
def folder(tiny_cells, tmp_path, monkeypatch) -> Path:
    """A working folder with the tiny cells, whose obsm has vectors, a map, a cube and a table."""
    cells = tiny_cells.copy()
    cells.obsm["X_emb"] = vectors_of(cells)
    cells.obsm["X_umap"] = vectors_of(cells)[:, :2].astype(np.float64)
    cells.obsm["X_cube"] = vectors_of(cells)[:, :, None]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vectors(tiny_cells) -> np.ndarray:
    return vectors_of(tiny_cells)


def facts_of(*words: object) -> dict[str, str]:
    said = said_by("inspect", "cells.h5ad", *words)
    lines = [line for line in said.splitlines() if not line.startswith("next: ")]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if line.strip())


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_obsm_is_described_with_its_shape_and_numbers_and_nothing_is_written(folder, vectors):
    before = files_in(folder)
    facts = facts_of("--vectors", "obsm/X_emb")
    assert files_in(folder) == before
    assert facts["vectors"] == "72 x 12 of float32, obsm/X_emb"
    assert facts["read"] == "in ranges of rows"
    assert facts["joined with the cells"] == "by their order: row i is cell i, 72 of 72"
    assert facts["finite"] == "yes, of all 72"
    norms = np.linalg.norm(vectors, axis=1)
    low, middle, high = np.percentile(norms, [1, 50, 99])
    assert facts["lengths"] == f"median {middle:.4g}, 1st and 99th percentile {low:.4g} and {high:.4g}"
    assert facts["largest number"] == f"{np.abs(vectors).max():.4g}"
    assert facts["said to be of"].startswith("X_emb, unless --source-name")
    assert (facts["cells"], facts["matrix"]) == ("72", "X (counts)")
    assert "model" not in facts


def npy(vectors: np.ndarray) -> str:
    np.save("emb.npy", vectors.astype(np.float16))
    return "emb.npy"


def tensors(vectors: np.ndarray) -> str:
    save_file({"other": vectors[:, 0], "emb": vectors}, "emb.safetensors")
    return "emb.safetensors:emb"


def pickled(vectors: np.ndarray) -> str:
    torch.save(torch.from_numpy(vectors), "emb.pt", _use_new_zipfile_serialization=False)
    return "emb.pt"


def shuffled(vectors: np.ndarray) -> str:
    order = np.random.default_rng(0).permutation(N)
    ids = pl.Series("cell_id", [f"cell{i}" for i in order] + ["another"])
    rows = pl.DataFrame(np.concatenate([vectors[order], vectors[:1]]), [f"d{i}" for i in range(WIDTH)])
    rows.insert_column(0, ids).write_parquet("emb.parquet")
    return "emb.parquet"


@pytest.mark.parametrize(
    ("form", "dtype", "way", "joined"),
    [
        (npy, "float16", "memory-mapped", "by their order: row i is cell i, 72 of 72"),
        (tensors, "F32", "memory-mapped", "by their order"),
        (pickled, "torch.float32", "read whole, as a file of torch before 1.6", "by their order"),
        (shuffled, "float", "a row group at a time, into a temporary", "72 of 72 cells by cell_id; 1 rows of other"),
    ],
)
def test_a_file_is_described_with_how_it_is_read_and_joined(folder, vectors, form, dtype, way, joined):
    facts = facts_of("--vectors", form(vectors))
    assert facts["vectors"].startswith(f"72 x 12 of {dtype}, ")
    assert facts["read"].startswith(way)
    assert facts["joined with the cells"].startswith(joined)
    assert facts["lengths"].startswith(f"median {np.median(np.linalg.norm(vectors, axis=1)):.3g}"[:10])


def test_zeros_and_numbers_that_f16_cannot_hold_are_told(folder, vectors):
    changed = vectors.copy()
    changed[[3, 5]] = 0
    changed[7, 2] = 1e5
    np.save("emb.npy", changed)
    facts = facts_of("--vectors", "emb.npy")
    assert facts["ALL ZERO"] == "2 of the vectors"
    assert facts["REFUSED BY EXTRACT"] == "f16 ends at 65504: give --dtype bf16 or --dtype f32"
    with pytest.raises(InputError, match="f16 ends at 65504"):
        extract(ExtractOptions(data="cells.h5ad", vectors="emb.npy"), folder / "store")


@pytest.mark.parametrize("place", ["obsm/X_em", "obsm/X_cube", "none.npy", "short.npy", "nan.npy", "emb.csv"])
def test_what_extract_refuses_is_refused_in_the_same_words(folder, vectors, place):
    np.save("short.npy", vectors[:-1])
    changed = vectors.copy()
    changed[5, 2] = np.nan
    np.save("nan.npy", changed)
    before = files_in(folder)
    said = refused_by("inspect", "cells.h5ad", "--vectors", place)
    assert files_in(folder) == before
    of_extract = refused_by("extract", "cells.h5ad", "--vectors", place, "--store", "store")
    assert said.replace("inspect", "extract") == of_extract.replace(f"{folder}/", "")
    if place == "obsm/X_em":
        assert "its obsm has X_cube, X_emb, X_umap; did you mean 'X_emb'?" in said
    if place == "obsm/X_cube":
        assert said.endswith("such arrays are X_emb, X_umap")


def test_options_of_a_model_are_refused_beside_vectors(folder):
    said = refused_by("inspect", "cells.h5ad", "--vectors", "obsm/X_emb", "--model", "mini")
    assert "no model runs, so that model would change nothing" in said


def test_of_many_vectors_a_sample_of_ranges_is_read(folder, vectors, monkeypatch):
    monkeypatch.setattr("pipelines.external.inspection.READ_ROWS", 4)
    monkeypatch.setattr("pipelines.external.inspection.SAMPLE_RANGES", 3)
    facts = facts_of("--vectors", "obsm/X_emb")
    assert facts["finite"] == "yes, of 12 of 72, in 3 ranges; extract checks all"
    rows = [*range(4), *range(34, 38), *range(68, 72)]
    assert facts["lengths"].startswith(f"median {np.median(np.linalg.norm(vectors[rows], axis=1)):.4g},")


def test_arrays_of_obsm_that_could_be_vectors_are_named_beside_a_model(folder, tiny_model, tiny_data, tiny_cells):
    facts = facts_of("--model", tiny_model)
    assert facts["vectors in obsm"].startswith("X_emb (12), X_umap (2) numbers a cell: `scsae inspect DATA --vectors")
    assert scsae.inspect("cells.h5ad", vectors="obsm/X_emb")["vectors"] == "72 x 12 of float32, obsm/X_emb"
    assert "vectors in obsm" not in scsae.inspect(tiny_data, model=str(tiny_model))
    other = tiny_cells.copy()
    other.obs_names = [f"new{i}" for i in range(N)]
    other.obsm["X_umap"], other.obsm["X_emb"] = np.zeros((N, 2)), np.zeros((N, 5))
    other.write_h5ad("other.h5ad")
    both = scsae.inspect(("cells.h5ad", "other.h5ad"), model=str(tiny_model))
    assert both["vectors in obsm"].startswith("X_umap (2) numbers"), "X_emb has another width in the other file"
