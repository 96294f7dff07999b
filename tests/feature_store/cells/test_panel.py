"""The panel: exactly as many cells as wanted, rare groups whole, the rest in proportion, the same at every call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from cell_tables import written_cells

from feature_store.cells import PANEL_CELLS, open_source, read_cells, read_panel
from feature_store.cells.panel import draw_panel, panel_counts
from feature_store.storage.commit import Run
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan
from pipelines.config import CellOptions

if TYPE_CHECKING:
    from pathlib import Path

    from feature_store.cells import Source


def of_sizes(*sizes: int) -> np.ndarray:
    """Codes of cells whose values have these numbers of cells, in a fixed disorder."""
    codes = np.repeat(np.arange(len(sizes)), sizes)
    return codes[np.random.default_rng(9).permutation(len(codes))]


def counts_of(codes: np.ndarray, drawn: np.ndarray) -> list[int]:
    return np.bincount(codes[drawn], minlength=codes.max() + 1).tolist()


def test_the_counts_are_those_computed_by_hand() -> None:
    # floors: the largest t with min(9000, t) + min(1000, t) + 10 <= 1000 / 16 is 26
    # the 938 that are left go over 8,974 : 974 : 0 as 846.16 : 91.84
    sizes, values = np.array([9000, 1000, 10]), np.arange(3)[:, None]
    floors = np.array([26, 26, 10])
    shares = np.array([26 + 846, 26 + 92, 10])
    assert panel_counts(sizes, values[:, :0], 1000).tolist() == shares.tolist()
    assert shares.sum() == floors.sum() + 938
    # the largest t with min(9000, t) + min(1000, t) + 10 <= 500 is 245, of which the second lacks 127
    # it gets 1000 / 16 of them, so 180, and 784 are left for 8,974 : 820 as 718.36 : 65.64
    assert panel_counts(sizes, values, 1000).tolist() == [26 + 718, 180 + 66, 10]


def test_a_panel_has_exactly_the_wanted_cells_and_is_the_same_at_every_call() -> None:
    columns = [of_sizes(50_000, 25_000, 25_000), of_sizes(*[1000] * 100), of_sizes(90_000, 9_990, 10)]
    drawn = draw_panel(columns, 100_000, n_wanted=7_001, seed=3)
    assert drawn.sum() == 7_001
    assert np.array_equal(drawn, draw_panel(columns, 100_000, n_wanted=7_001, seed=3))
    other = draw_panel(columns, 100_000, n_wanted=7_001, seed=4)
    assert other.sum() == 7_001
    assert 0.05 < (drawn & other).sum() / 7_001 < 0.15


def test_rare_strata_are_whole_and_the_others_are_drawn_in_proportion() -> None:
    split, kind = of_sizes(50_000, 25_000, 25_000), of_sizes(80_000, 19_000, 900, 99, 1)
    drawn = draw_panel([split, kind], 100_000, n_wanted=20_000, seed=0)
    stratum = split * 5 + kind
    sizes, counts = np.bincount(stratum), np.bincount(stratum[drawn], minlength=15)
    rare = sizes <= 100
    assert (counts[rare] == sizes[rare]).all()
    assert counts_of(kind, drawn)[2:] == [900, 99, 1]
    large = sizes > 1000
    share = (counts[large] - 100) / (sizes[large] - 100)
    assert np.ptp(share) < 1e-3


def test_strata_beyond_the_wanted_number_leave_splits_and_donors_their_share() -> None:
    split, donor = of_sizes(10_000, 5_000, 5_000), of_sizes(*[2_000] * 10)
    own = np.random.default_rng(1).permutation(20_000) // 2
    drawn = draw_panel([split, donor, own], 20_000, n_wanted=400, seed=0)
    assert drawn.sum() == 400
    assert counts_of(split, drawn) == [200, 100, 100]
    joint = split * 10 + donor
    exact = np.bincount(joint) * 400 / 20_000
    assert np.abs(np.bincount(joint[drawn], minlength=30) - exact).max() < 1
    assert counts_of(own, drawn) != counts_of(own, draw_panel([split, donor, own], 20_000, n_wanted=400, seed=1))


def test_cells_of_a_stratum_are_drawn_evenly() -> None:
    codes = np.zeros(50, dtype=np.int64)
    times = sum(draw_panel([codes], 50, n_wanted=10, seed=seed).astype(int) for seed in range(2_000))
    # 2,000 draws of a fifth: 400 each, with a standard deviation of 18
    assert abs(times.mean() - 400) < 1e-9
    assert np.abs(times - 400).max() < 90


@pytest.mark.parametrize("n_wanted", [100, 101, 5_000])
def test_of_no_more_cells_than_wanted_all_are_in_the_panel(n_wanted: int) -> None:
    assert draw_panel([of_sizes(60, 40)], 100, n_wanted=n_wanted, seed=0).all()


def test_a_panel_of_one_cell_and_one_without_columns_are_drawn() -> None:
    assert draw_panel([of_sizes(60, 40)], 100, n_wanted=1, seed=0).sum() == 1
    assert draw_panel([], 100, n_wanted=30, seed=0).sum() == 30


def test_more_combinations_than_fit_in_a_table_are_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [of_sizes(500, 250, 250), of_sizes(*[10] * 100), of_sizes(*[100] * 10)]
    drawn = draw_panel(columns, 1_000, n_wanted=200, seed=0)
    monkeypatch.setattr("feature_store.cells.factors._MOST_PAIRS", 5)
    monkeypatch.setattr("feature_store.cells.factors.BLOCK_CELLS", 64)
    assert np.array_equal(drawn, draw_panel(columns, 1_000, n_wanted=200, seed=0))


def test_every_value_of_a_column_has_its_least_number_of_cells() -> None:
    # 2,000 strata of two columns; a value of the second has 900 of 200,000 cells in many strata
    donor, kind = of_sizes(*[2_000] * 100), of_sizes(*[9_955] * 20, 900)
    drawn = draw_panel([donor, kind], 200_000, n_wanted=20_000, seed=0)
    # the largest t with sum(min(size, t)) <= 10,000 over 21 values is 476
    assert counts_of(kind, drawn)[-1] >= 476
    assert drawn.sum() == 20_000


N_CELLS = 60


@pytest.fixture
def obs() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": pd.Categorical([f"p{i % 4}" for i in range(N_CELLS)]),
            "label": pd.Categorical([None if i == 3 else "B" if i % 2 else "T" for i in range(N_CELLS)]),
            "doublet": [i % 7 == 0 for i in range(N_CELLS)],
            "panel": ["mine"] * N_CELLS,
        },
        index=[f"cell-{i}" for i in range(N_CELLS)],
    )


def source_of(obs: pd.DataFrame, path: Path) -> Source:
    counts = np.random.default_rng(0).poisson(0.8, (len(obs), 20)).astype(np.float32) + 1
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(20)])).write_h5ad(path)
    return open_source(path)


def test_the_cell_table_and_its_plan_hold_the_panel(obs: pd.DataFrame, tmp_path: Path) -> None:
    layout, source = Layout(tmp_path / "store"), source_of(obs, tmp_path / "a.h5ad")
    columns = {"donor": "patient", "cell_type": "label", "labels": ["doublet", "label", "panel"]}
    dataset = str(written_cells(layout, source, panel=12, **columns)["dataset"][0])
    folder = layout.cells_dir(dataset)
    cells, panel = read_cells(folder), CellsPlan.of(Run.open(folder)).panel
    assert cells.columns[3:5] == ["split", "panel"]
    assert cells["obs_panel"].unique().to_list() == ["mine"]
    assert cells.filter("panel")["cell_idx"].to_list() == read_panel(folder).tolist()
    assert read_panel(folder).dtype == np.int64
    assert len(read_panel(folder)) == panel.n_cells == panel.wanted == 12
    assert panel.strata == ("split", "donor", "cell_type", "doublet", "obs_panel")
    named = [
        str(written_cells(layout, source, panel=n, **columns)["dataset"][0]) for n in (13, source.n_cells, PANEL_CELLS)
    ]
    assert len({dataset, *named}) == 3
    assert named[1] == named[2]
    whole = CellsPlan.of(Run.open(layout.cells_dir(named[1]))).panel
    assert (whole.n_cells, whole.wanted, whole.sha256) == (source.n_cells, None, None)
    assert read_panel(layout.cells_dir(named[1])).tolist() == list(range(source.n_cells))


def test_a_missing_value_is_a_stratum(obs: pd.DataFrame, tmp_path: Path) -> None:
    obs["rare"] = pd.array([None, *["common"] * (len(obs) - 1)], dtype=object)
    layout, source = Layout(tmp_path / "store"), source_of(obs, tmp_path / "a.h5ad")
    cells = written_cells(layout, source, cell_type="rare", panel=20)
    assert cells.filter(pl.col("cell_type").is_null())["panel"].to_list() == [True]


def test_the_option_has_the_default_of_the_panel() -> None:
    assert CellOptions.model_fields["panel"].default == PANEL_CELLS
