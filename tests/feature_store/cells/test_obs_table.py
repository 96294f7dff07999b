"""Annotations from a table beside the data are joined by the names of the cells."""

from __future__ import annotations

import gzip
import warnings
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from cell_tables import written_cells

from feature_store.cells import open_source, read_cells, what_changed, write_cells
from feature_store.errors import InputError, NotFoundError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N = 12
NAMES = [f"AAA{i}-1" for i in range(N)]


@pytest.fixture
def save(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    def save(name: str, names: list[str], **obs: list[object]) -> Path:
        counts = rng.poisson(2.0, (len(names), 20)).astype(np.float32)
        # anndata warns about names that are there twice
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            anndata.AnnData(counts, obs=pd.DataFrame(obs, index=names)).write_h5ad(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def table() -> pd.DataFrame:
    """A table in another order than the cells: without three of them, with two others."""
    names = [*NAMES[3:][::-1], "other1", "other2"]
    return pd.DataFrame(
        {
            "donor": [f"{i % 3:03d}" for i in range(len(names))],
            "age": np.arange(len(names)) + 20,
            "score": [np.nan if i == 2 else i / 4 for i in range(len(names))],
            "treated": [i % 2 == 0 for i in range(len(names))],
        },
        index=names,
    )


def write(table: pd.DataFrame, path: Path, how: str) -> Path:
    if how == "csv":
        table.to_csv(path)
    elif how == "csv of R":
        # write.table gives the names of rows no header
        lines = table.to_csv(sep="\t").splitlines()
        path.write_text("\n".join([lines[0].lstrip("\t"), *lines[1:]]) + "\n")
    elif how == "tsv.gz":
        path.write_bytes(gzip.compress(table.to_csv(sep="\t", index_label="barcode").encode()))
    elif how == "named last":
        table.assign(cell_id=table.index).to_csv(path, index=False)
    elif how == "parquet":
        table.assign(donor=pd.Categorical(table["donor"])).to_parquet(path)
    return path


@pytest.mark.parametrize("how", ["csv", "csv of R", "tsv.gz", "named last", "parquet"])
def test_a_table_is_joined_by_the_names_of_the_cells(
    how: str, save: Callable[..., Path], table: pd.DataFrame, tmp_path: Path
) -> None:
    path = write(table, tmp_path / "table", how)
    with open_source(save("a.h5ad", NAMES, donor=["x"] * N, note=["n"] * N), obs=[path]) as source:
        wanted = table.reindex(NAMES)
        obs = source.obs()
        assert set(obs.columns) == {"donor", "note", "age", "score", "treated"}
        assert obs["donor"].to_list() == [None if pd.isna(name) else name for name in wanted["donor"]]
        assert obs["age"].to_list() == [None] * 3 + wanted["age"][3:].astype(int).tolist()
        assert obs["score"].fill_null(-1.0).to_list() == wanted["score"].fillna(-1.0).tolist()
        assert obs["note"].to_list() == ["n"] * N
        assert source.obs(4, 7, ["age", "note"]).equals(obs[["age", "note"]][4:7])
        (said,) = source.obs_facts
        assert "9 of 12 cells" in said
        assert "2 rows" in said
        assert said.endswith("from the file: donor")
        cells = written_cells(Layout(tmp_path / "store"), source, donor="donor", labels=["treated"])
    assert cells["donor"].null_count() == 3
    assert cells.filter(pl.col("donor").is_not_null())["donor"].unique().sort().to_list() == ["000", "001", "002"]


def test_a_table_is_part_of_what_a_data_set_is(save: Callable[..., Path], table: pd.DataFrame, tmp_path: Path) -> None:
    layout, path = Layout(tmp_path / "store"), save("a.h5ad", NAMES)
    names = []
    for shift in (0, 1):
        table["donor"] = np.roll(table["donor"], shift)
        file = write(table, tmp_path / f"{shift}.csv", "csv")
        names.append(write_cells(layout, open_source(path, obs=[file]), donor="donor"))
    assert len(set(names)) == 2
    plan = CellsPlan.of(commit.Run.open(layout.cells_dir(names[0])))
    assert plan.obs_columns == ("donor", "age", "score", "treated")
    # the file itself is the same, and what is joined is not missed in it
    with open_source(path) as source:
        assert plan.digest == source.digest
        assert what_changed(layout, names[0], source).startswith("values of the matrix")
    # the same table elsewhere is the same data set
    copy = write(table, tmp_path / "copy.csv", "csv")
    assert write_cells(layout, open_source(path, obs=[copy]), donor="donor") == names[1]
    assert read_cells(layout.cells_dir(names[1])).height == N


def test_several_files_take_one_table_or_one_each(save: Callable[..., Path], tmp_path: Path) -> None:
    first, second = save("a.h5ad", NAMES), save("b.h5ad", [f"B{name}" for name in NAMES])
    every = [*NAMES, *(f"B{name}" for name in NAMES)]
    both = write(pd.DataFrame({"n": range(24)}, index=every), tmp_path / "both.csv", "csv")
    assert open_source([first, second], obs=[both]).obs()["n"].to_list() == list(range(24))
    same = save("c.h5ad", NAMES)
    own = [write(pd.DataFrame({"n": [i] * N}, index=NAMES), tmp_path / f"{i}.csv", "csv") for i in (1, 2)]
    assert open_source([first, same], obs=own).obs()["n"].to_list() == [1] * N + [2] * N
    with pytest.raises(InputError, match=r"several cells of .*a\.h5ad, .*c\.h5ad have the name 'AAA0-1'.*--obs FIRST"):
        open_source([first, same], obs=[own[0]])
    with pytest.raises(InputError, match="--obs was given 2 times for 3 files"):
        open_source([first, second, same], obs=own)


def test_the_column_that_names_most_cells_is_taken(save: Callable[..., Path], tmp_path: Path) -> None:
    names = [f"s1_{name}" for name in NAMES]
    table = pd.DataFrame({"barcode": [f"Z{name}" for name in NAMES], "n": range(N)}, index=names)
    path = write(table, tmp_path / "t.csv", "csv")
    source = open_source(save("a.h5ad", names), obs=[path])
    assert source.obs()["n"].to_list() == list(range(N))
    assert "'cell_id'" in source.obs_facts[0]


def test_a_table_that_cannot_be_joined_is_refused(
    save: Callable[..., Path], table: pd.DataFrame, tmp_path: Path
) -> None:
    cells = save("a.h5ad", NAMES)
    others = write(table.set_axis([f"x{name}" for name in table.index]), tmp_path / "others.csv", "csv")
    with pytest.raises(InputError, match=r"others\.csv has none of the cells of .*xAAA11-1.*AAA0-1"):
        open_source(cells, obs=[others])
    twice = write(pd.concat([table, table[:2]]), tmp_path / "twice.csv", "csv")
    with pytest.raises(InputError, match=r"twice\.csv has the cell 'AAA10-1' 2 times .*\(2 cells more than once\)"):
        open_source(cells, obs=[twice])
    doubled = save("b.h5ad", [*NAMES[:-1], NAMES[-2]])
    with pytest.raises(InputError, match=r"have the name 'AAA10-1'.*unique"):
        open_source(doubled, obs=[write(table, tmp_path / "t.csv", "csv")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"cell_id\nA\n", "needs the names of the cells and at least one other column"),
        (b"cell_id,n\n", "0 rows"),
        (b"cell_id,n\nA,1\nB,1,2\n", "cannot be read"),
        (b"cell_id,n,n\nA,1,2\n", "'n' is there twice"),
        (b"PAR1 no", "cannot be read"),
        (b"\x1f\x8b\x08\x00cut", "cannot be read"),
        (b"<html><body>Sign in</body></html>", "web page"),
        (b"\xff\xfe\x00\x00", "cannot be read"),
    ],
)
def test_what_is_no_table_is_refused(content: bytes, words: str, save: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        open_source(save("a.h5ad", NAMES), obs=[tmp_path / "t"])
    assert "\n" not in str(error.value)
    assert str(tmp_path / "t") in str(error.value)


def test_a_table_that_is_not_there_is_named(save: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no file .*gone\.csv"):
        open_source(save("a.h5ad", NAMES), obs=[tmp_path / "gone.csv"])
