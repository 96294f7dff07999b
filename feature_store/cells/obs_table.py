"""Obs columns from a table beside the data (`--obs`): CSV, TSV or Parquet, joined by the names of the cells.

The names are the column that is called so (`cell_id`, `barcode`, `index`, or any column with "barcode" in its name) or
the first one; where there are several, the one that names most of the cells. Cells that the table does not have get
null; a table that has none of them, or a cell twice, is refused. A column that the file has as well is taken from the
table. Texts stay texts, and a column of numbers without leading zeros becomes numbers. The table is held in memory:
16 bytes a cell and column, and the names.
"""

import csv
import gzip
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.errors import InputError, NotFoundError
from feature_store.storage.addresses import DataPath, RemotePath
from feature_store.storage.data_files import HEAD_BYTES, refuse_unfetched_head
from feature_store.storage.remote_protocols import read_whole

NAME_COLUMNS = ("cell_id", "cell_ids", "barcode", "barcodes", "index", "__index_level_0__")
MISSING = ("", "NA", "nan", "NaN", "NaT", "<NA>")
"""What R and pandas write for a missing value."""
WANTED = "a table with a row for each cell: .csv, .tsv or .parquet, which may be compressed (.gz)"
MOST_BYTES = 10**10
"""Largest size of a table that is fetched from an address."""
_UNNAMED = "cell_id"


@dataclass(frozen=True)
class ObsTable:
    """A table of cells.

    Attributes:
        path: its file.
        frame: its columns, all of them.
        sha256: that of its file.
    """

    path: DataPath
    frame: pl.DataFrame
    sha256: str

    @cached_property
    def name_columns(self) -> list[str]:
        """The columns that may hold the names of the cells, the likeliest first."""
        columns = {name.lower(): name for name in reversed(self.frame.columns)}
        named = [columns[name] for name in NAME_COLUMNS if name in columns]
        named += [name for name in self.frame.columns if "barcode" in name.lower()]
        return list(dict.fromkeys([*named, self.frame.columns[0]]))


class JoinedObs(NamedTuple):
    """The columns of a table for the cells of one file.

    Attributes:
        table: the table.
        by: its column of the names of cells.
        row: the row of each cell in the table, -1 where it has none [n_cells].
        columns: its other columns.
    """

    table: ObsTable
    by: str
    row: npt.NDArray[np.int64]
    columns: tuple[str, ...]

    @property
    def n_matched(self) -> int:
        """Number of cells that the table has."""
        return int((self.row >= 0).sum())

    def read(self, start: int, stop: int, names: Sequence[str]) -> list[pl.Series]:
        """The columns of these names for the cells [start, stop), null where the table does not have the cell."""
        row = pl.Series(self.row[start:stop])
        row = row.set(row < 0, None)
        # careful: methods of a series fail where its name is a pattern
        return [self.table.frame[name].rename("").gather(row).rename(name) for name in names]


def read_obs_table(path: DataPath) -> ObsTable:
    """Read a table of cells. NotFoundError; InputError for what is no table, has no row, or a column twice."""
    content = _content(path, "the obs table")
    frame = _table(content, path, "the obs table")
    if frame.height == 0 or frame.width < 2:
        raise InputError(
            f"the obs table {path} has {frame.height} rows and {frame.width} columns; it needs the names of the cells "
            "and at least one other column, with a header"
        )
    return ObsTable(path, frame, hashlib.sha256(content).hexdigest())


def read_table(path: DataPath, what: str) -> pl.DataFrame:
    """The table in a CSV, TSV or Parquet file, `what` in errors. NotFoundError; InputError for what is no table."""
    return _table(_content(path, what), path, what)


def _content(path: DataPath, what: str) -> bytes:
    if isinstance(path, RemotePath):
        return read_whole(path, most_bytes=MOST_BYTES)
    if not path.exists():
        raise NotFoundError(f"there is no file {path} for {what}; give {WANTED}")
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give {WANTED}")
    return path.read_bytes()


def _table(content: bytes, path: DataPath, what: str) -> pl.DataFrame:
    refuse_unfetched_head(path, content[:HEAD_BYTES])
    try:
        if content[:4] == b"PAR1":
            return pl.DataFrame([plain_column(column) for column in pl.read_parquet(io.BytesIO(content))])
        return _of_text(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except (pl.exceptions.PolarsError, OSError, EOFError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what} {path} cannot be read ({reason}); give {WANTED}") from error


def _of_text(content: bytes) -> pl.DataFrame:
    text = content.decode("utf-8-sig")
    first, _, rest = text.replace("\r\n", "\n").partition("\n")
    separator = max("\t,;", key=first.count)
    names = next(csv.reader([first], delimiter=separator), [])
    second = next(csv.reader(io.StringIO(rest), delimiter=separator), [])
    if len(second) == len(names) + 1:
        # R's write.table gives the names of rows no header
        names = [_UNNAMED, *names]
    names = [name if name.strip() else (_UNNAMED if i == 0 else f"column {i}") for i, name in enumerate(names)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the column {twice[0]!r} is there twice")
    if not rest.strip():
        return pl.DataFrame(schema=dict.fromkeys(names, pl.String))
    frame = pl.read_csv(
        rest.encode(),
        has_header=False,
        schema=dict.fromkeys(names, pl.String),
        separator=separator,
        null_values=list(MISSING),
    )
    return pl.DataFrame([_typed(column) for column in frame])


def _typed(column: pl.Series) -> pl.Series:
    """A column of texts as numbers, if all of them are the numbers' usual texts: 007 is a text."""
    some = column.drop_nulls().str.strip_chars()
    if some.is_empty() or some.str.contains(r"^[+-]?0\d").any():
        return column
    for dtype in (pl.Int64, pl.Float64):
        try:
            return column.str.strip_chars().cast(dtype)
        except pl.exceptions.PolarsError:
            continue
    return column


def plain_column(column: pl.Series) -> pl.Series:
    """A column of Parquet as one of obs: categories and nested values as text, NaN as null; anything else stays."""
    dtype = column.dtype
    if dtype.is_float():
        return column.fill_nan(None)
    if dtype.is_numeric() or dtype.is_temporal() or dtype in (pl.Boolean, pl.String):
        return column
    if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
        return canonical_text(column)
    return column.cast(pl.String)


def join_tables(tables: Sequence[ObsTable], names: Sequence[pl.Series], files: Sequence[str]) -> list[JoinedObs]:
    """Join one table with the cells of all files, or one table with those of each, by the names of their cells.

    Raises:
        InputError: there is neither one table nor one for each file; a table has none of the cells, or a cell twice; or
            cells have the same name, so that it is not known which of them a row of the table is.
    """
    if len(tables) not in (1, len(files)):
        raise InputError(
            f"--obs was given {len(tables)} times for {len(files)} files; give one table for all of them, or one for "
            "each, in the order of the files"
        )
    if len(tables) == len(files):
        return [
            _join(table, own, [file])[0]
            for table, own, file in zip(tables, ([one] for one in names), files, strict=True)
        ]
    return _join(tables[0], list(names), files)


def _join(table: ObsTable, names: Sequence[pl.Series], files: Sequence[str]) -> list[JoinedObs]:
    wanted = pl.concat([canonical_text(one).rename("name") for one in names])
    by, keys, n = "", pl.Series("name", [], dtype=pl.String), 0
    for column in table.name_columns:
        found = canonical_text(table.frame[column].rename("name"))
        n_found = wanted.to_frame().join(found.to_frame().drop_nulls().unique(), on="name", how="semi").height
        if n_found > n:
            by, keys, n = column, found, n_found
    where = ", ".join(files)
    if n == 0:
        shown = table.name_columns[0]
        raise InputError(
            f"the obs table {table.path} has none of the cells of {where}: its column {shown!r} has "
            f"{_few(table.frame[shown])}, and the cells are {_few(wanted)}; write the names of the cells into its "
            "first column"
        )
    twice = keys.drop_nulls().value_counts().filter(pl.col("count") > 1)
    if twice.height:
        name, count = twice.sort("name").row(0)
        raise InputError(
            f"the obs table {table.path} has the cell {name!r} {count} times in its column {by!r} "
            f"({twice.height:,} cells more than once); give a row for each cell"
        )
    rows = keys.to_frame().with_row_index("row").drop_nulls()
    joined = wanted.to_frame().join(rows, on="name", how="left", maintain_order="left")
    _refuse_same_names(joined, table, where, n_files=len(files))
    row = joined["row"].cast(pl.Int64).fill_null(-1).to_numpy()
    bounds = np.cumsum([0, *map(len, names)]).tolist()
    columns = tuple(name for name in table.frame.columns if name != by)
    return [JoinedObs(table, by, row[a:b], columns) for a, b in pairwise(bounds)]


def _refuse_same_names(joined: pl.DataFrame, table: ObsTable, where: str, *, n_files: int) -> None:
    matched = joined.drop_nulls("row")
    if matched["row"].is_unique().all():
        return
    name = matched.filter(matched["row"].is_duplicated())["name"][0]
    advice = (
        "give one obs table for each file, in their order: --obs FIRST --obs SECOND"
        if n_files > 1
        else "make the names of the cells unique in both (a.obs_names_make_unique())"
    )
    raise InputError(
        f"several cells of {where} have the name {name!r}, so it is not known which of them the row of the obs table "
        f"{table.path} is; {advice}"
    )


def _few(names: pl.Series) -> str:
    return ", ".join(map(str, names.head(3).to_list())) + (", ..." if len(names) > 3 else "")


def obs_facts(joined: Sequence[JoinedObs], own: Sequence[Sequence[str]]) -> list[str]:
    """What was joined, in words, a line for each table; `own` are the obs columns of each file without the tables."""
    lines = []
    for table in dict.fromkeys(id(one.table) for one in joined):
        parts = [(one, columns) for one, columns in zip(joined, own, strict=True) if id(one.table) == table]
        first = parts[0][0]
        n_cells, n_matched = sum(len(one.row) for one, _ in parts), sum(one.n_matched for one, _ in parts)
        text = f"{first.table.path.name}: {n_matched:,} of {n_cells:,} cells, by its column {first.by!r}"
        if n_matched < n_cells:
            text += f"; the other {n_cells - n_matched:,} have no value"
        if unused := first.table.frame.height - n_matched:
            text += f"; {unused:,} rows are of no cell"
        if replaced := [name for name in first.columns if any(name in columns for _, columns in parts)]:
            text += f"; taken from the table and not from the file: {', '.join(replaced)}"
        lines.append(text)
    return lines
