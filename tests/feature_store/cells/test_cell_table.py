"""The cell table is made in ranges of cells: its values are those of pandas, however long the ranges are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from cell_tables import written_cells
from stored_bytes import hashes_of

from feature_store.cells import (
    StoredObs,
    make_splits,
    open_source,
    read_cells,
    read_panel,
    read_split_numbers,
    write_cells,
)
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.schemas import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

REAL = {
    "kang18_ctrl_8684x2511_counts": {"donor": "donor", "batch": "batch", "cell_type": "cell_type"},
    "kang18_ifnb_2000x9015_counts": {"donor": "donor", "cell_type": "cell_type", "labels": ["condition", "n_counts"]},
    "glioblastoma_panobinostat_5000x300_counts": {"donor": "patient_id", "batch": "treatment_id", "labels": ["age"]},
    "scmixology_5lines_5batches_counts": {"batch": "batch", "cell_type": "cell_line_demuxlet", "labels": ["outlier"]},
}
WHOLE = {"age": {f"{age}.0": str(age) for age in (56, 61, 65, 68, 69)}}
"""Values of labels whose canonical text is another."""


def texts(column: pd.Series) -> list[Any]:
    return [None if pd.isna(value) else value for value in column.astype(object)]


@pytest.fixture(params=[None, 700])
def ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Parts, and ranges in which obs is read, of so many cells; None leaves them as they are."""
    if request.param is not None:
        for name in ("cell_table.PART_CELLS", "label_columns.OBS_CELLS", "source.OBS_CELLS", "factors.BLOCK_CELLS"):
            monkeypatch.setattr(f"feature_store.cells.{name}", request.param)
    return request.param


@pytest.mark.parametrize("name", REAL)
def test_the_values_of_real_cells_are_those_that_pandas_reads(
    name: str, scsae_data: Path, tmp_path: Path, ranges: int | None
) -> None:
    path, options = scsae_data / f"{name}.h5ad", REAL[name]
    obs = anndata.read_h5ad(path).obs
    layout = Layout(tmp_path)
    with open_source(path) as source:
        dataset = write_cells(layout, source, panel=500, **options)
    cells = read_cells(layout.cells_dir(dataset))
    assert cells["cell_idx"].to_list() == list(range(len(obs)))
    assert cells["cell_id"].to_list() == obs.index.tolist()
    assert cells["dataset"].unique().to_list() == [dataset]
    for role in ("donor", "batch", "cell_type"):
        wanted = texts(obs[options[role]]) if role in options else [None] * len(obs)
        assert cells[role].to_list() == wanted, role
    donor, batch = (texts(obs[options[role]]) if role in options else None for role in ("donor", "batch"))
    assert cells["split"].to_list() == make_splits(len(obs), donor=donor, batch=batch)[0].tolist()
    for column in obs.columns:
        found = cells[next(one for one in (f"obs_{column}", column) if one in cells.columns)]
        if obs[column].dtype.kind == "f":
            assert found.dtype == pl.Float32
            np.testing.assert_array_equal(found.to_numpy(), obs[column].to_numpy())
        else:
            names = WHOLE.get(column, {}) if column in options.get("labels", ()) else {}
            assert found.to_list() == [names.get(value, value) for value in texts(obs[column])], column
    assert len(read_panel(layout.cells_dir(dataset))) == 500
    assert [SPLITS[i] for i in read_split_numbers(layout.cells_dir(dataset))] == cells["split"].to_list()
    n_parts = -(-len(obs) // ranges) if ranges else 1
    assert commit.Run.open(layout.cells_dir(dataset)).n_shards == n_parts
    digests = commit.read_table(layout.digests_dir(dataset))
    assert digests["cell_idx"].to_list() == list(range(len(obs)))


@pytest.mark.parametrize("n", [1, 7, 40])
def test_length_of_ranges_changes_no_value(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for file, n_cells in (("a", 23), ("b", 17)):
        obs = pd.DataFrame(
            {
                "donor": pd.array(rng.integers(1, 6, n_cells), dtype="Int64" if file == "a" else "int32"),
                "kind": pd.Categorical([None if i == 4 else "BT"[i % 2] for i in range(n_cells)]),
                "flag": pd.array([None if i == 2 else bool(i % 3) for i in range(n_cells)], dtype="boolean"),
                "score": rng.normal(size=n_cells),
                **({"^own$": [f"t{i}" for i in range(n_cells)]} if file == "b" else {}),
            },
            index=[f"{file}{i}" for i in range(n_cells)],
        )
        counts = rng.poisson(1.0, (n_cells, 12)).astype(np.float32) + 1
        var = pd.DataFrame(index=[f"GENE{i}" for i in range(12)])
        paths.append(tmp_path / f"{file}.h5ad")
        anndata.AnnData(counts, obs=obs, var=var).write_h5ad(paths[-1])
    options = {"donor": "donor", "batch": "file", "cell_type": "kind", "labels": ["score", "flag"], "panel": 25}
    source = open_source(paths)
    whole = written_cells(Layout(tmp_path / "whole"), source, **options)
    for name in ("cell_table.PART_CELLS", "label_columns.OBS_CELLS", "source.OBS_CELLS", "factors.BLOCK_CELLS"):
        monkeypatch.setattr(f"feature_store.cells.{name}", n)
    parts = written_cells(Layout(tmp_path / "parts"), source, **options)
    assert parts.equals(whole)
    assert whole.get_column("obs_^own$").null_count() == 23
    assert whole["flag"].null_count() == 2
    assert whole["obs_score"].dtype == pl.Float64


def test_parts_that_are_lacking_are_written_again_and_the_others_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.cell_table.PART_CELLS", 10)
    counts = np.random.default_rng(0).poisson(1.0, (35, 12)).astype(np.float32) + 1
    anndata.AnnData(counts, var=pd.DataFrame(index=[f"GENE{i}" for i in range(12)])).write_h5ad(tmp_path / "a.h5ad")
    layout, source = Layout(tmp_path / "store"), open_source(tmp_path / "a.h5ad")
    folder = layout.cells_dir(write_cells(layout, source))
    before, run = hashes_of(folder), commit.Run.open(folder)
    assert run.n_shards == 4
    run.part(2).unlink()
    write_cells(layout, source)
    assert hashes_of(folder) == before


def test_a_column_that_cannot_be_read_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    import h5py

    counts = np.ones((9, 12), dtype=np.float32)
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b", "c"] * 3)}, index=[f"c{i}" for i in range(9)])
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(12)])).write_h5ad(
        tmp_path / "a.h5ad"
    )
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["obs/kind/codes"][4] = 7
    layout = Layout(tmp_path / "store")
    with pytest.raises(InputError, match="obs column 'kind'"):
        write_cells(layout, open_source(tmp_path / "a.h5ad"))
    assert not list((tmp_path / "store" / "cells").glob("*/plan.json"))


def test_stored_obs_are_read_by_the_names_of_the_data_in_whichever_parts_they_lie(
    scsae_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.cell_table.PART_CELLS", 700)
    path, layout = scsae_data / "kang18_ifnb_2000x9015_counts.h5ad", Layout(tmp_path)
    obs = anndata.read_h5ad(path).obs
    with open_source(path) as source:
        folder = layout.cells_dir(write_cells(layout, source, donor="donor", panel=500))
    stored = StoredObs(folder)
    assert {"donor", "condition", "n_counts"} <= set(stored.columns)
    for cells in ([0, 3, 699, 700, 1999], [1400], list(range(650, 1420)), []):
        found = stored.read(np.array(cells, dtype=np.int64), ["condition", "donor"])
        assert found.columns == ["condition", "donor"]
        assert found["condition"].to_list() == texts(obs["condition"].iloc[cells])
        assert found["donor"].to_list() == texts(obs["donor"].astype(str).iloc[cells])
    with pytest.raises(InputError, match=r"no column 'donr'.*donor"):
        stored.read(np.array([0]), ["donr"])
