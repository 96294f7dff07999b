"""Parquet with a list of genes and a list of counts in each row, as Tahoe-100M is published; a folder of such parts.

    FOLDER/*.parquet               a row for each cell: genes, expressions and obs columns; or FOLDER/data/*.parquet
    FOLDER/gene_metadata.parquet   a row for each gene: token_id, gene_symbol, ensembl_id; or in FOLDER/metadata, or
                                   beside FOLDER

The genes of a list are ids of the gene table, numbers or texts, in any order. A list may begin with a marker, whose
value is negative: it stands for the cell, and is left out. Rows are read in ranges (`list_parts`), obs columns part by
part. The names of the cells are the column that is called so (`obs_table`), else the numbers of the rows.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.cells.annotations import ObsColumn
from feature_store.cells.files.cell_file import OneMatrixFile, named_or_only
from feature_store.cells.list_parts import Lists, OpenParts
from feature_store.cells.matrices import CSRRows, concat_rows, sort_rows
from feature_store.cells.obs_table import NAME_COLUMNS, plain_column, read_table
from feature_store.errors import InputError
from feature_store.storage.data_files import refuse_unfetched

GENE_LISTS = ("genes", "gene_ids", "gene_tokens", "token_ids", "gene_idx")
VALUE_LISTS = ("expressions", "counts", "expression", "values", "umis")
GENE_TABLES = ("gene_metadata", "genes", "gene_table", "var")
OBS_TABLES = ("obs_metadata", "obs", "obs_table", "cell_metadata")
ID_COLUMNS = ("token_id", "gene_token", "gene_idx", "gene_id", "id", "ensembl_id", "gene_symbol", "index")
_SUFFIXES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")
_TABLES = frozenset(f"{name}.parquet" for name in (*GENE_TABLES, *OBS_TABLES))


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def parts_in(folder: Path) -> list[Path]:
    """The Parquet files of a folder, or of `data` in it, by name, without its tables of genes and cells."""
    for inside in (folder, folder / "data"):
        if found := sorted(path for path in inside.glob("*.parquet") if path.name not in _TABLES):
            return found
    return []


def open_gene_lists(path: Path, *, matrix: str | None = None) -> OneMatrixFile:
    """Open a folder of Parquet parts, or one part; its matrix has the name of its column of counts.

    InputError for parts that differ in their columns or have no two lists, for a gene table that is missing or does not
    have the genes, and as from `OneMatrixFile`.
    """
    parts = parts_in(path) if path.is_dir() else [path]
    for part in parts:
        refuse_unfetched(part)
    schemas = [_schema(part) for part in parts]
    genes, values = _lists(schemas[0], parts[0])
    for part, schema in zip(parts, schemas, strict=True):
        names = dict.fromkeys([*schemas[0].names, *schema.names])
        odd = [one for one in names if one not in schema.names or one not in schemas[0].names]
        odd = odd or [one for one in (genes, values) if schema.field(one).type != schemas[0].field(one).type]
        if odd:
            raise InputError(
                f"{part} has other columns than {parts[0]} ({', '.join(odd[:5])}); give a folder of parts of one table"
            )
    name = named_or_only([values], matrix, path)
    table_path = _beside(path, GENE_TABLES)
    if table_path is None:
        raise InputError(
            f"{path} has lists of genes, but no gene table beside it: put one, with the columns {ID_COLUMNS[0]}, "
            f"gene_symbol and ensembl_id, into the folder as {GENE_TABLES[0]}.parquet"
        )
    ids, var = _gene_table(table_path, schemas[0].field(genes).type.value_type)
    n_rows = [pq.read_metadata(part).num_rows for part in parts]
    rows = GeneListRows(OpenParts(parts, n_rows, genes=genes, values=values), ids, table_path)
    columns = [one for one in schemas[0].names if one not in (genes, values)]
    index = _name_column(columns)
    obs = ObsColumns(parts, rows.first)
    other = _beside(path, OBS_TABLES)
    return OneMatrixFile(
        path,
        format=f"Parquet with lists of genes, which {table_path.name} names",
        name=name,
        rows=rows,
        var=var,
        index=ObsColumn(n_cells=rows.shape[0], read=_row_names if index is None else partial(obs.read_names, index)),
        obs={one: ObsColumn(n_cells=rows.shape[0], read=partial(obs.read, one)) for one in columns if one != index},
        content=(*parts, table_path),
        ignored=[] if other is None else [f"the table of cells {other}: join it with --obs {other}"],
        reason="the only lists of values",
        close=rows.close,
    )


def _schema(part: Path) -> Any:
    try:
        return pq.read_schema(part)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{part} cannot be read as Parquet ({error}); it is damaged: fetch or write it again"
        ) from error


def _lists(schema: Any, part: Path) -> tuple[str, str]:
    """The columns that hold lists of genes and of values."""
    found = [field.name for field in schema if pa.types.is_list(field.type) or pa.types.is_large_list(field.type)]
    genes = next((name for name in GENE_LISTS if name in found), None)
    values = next((name for name in VALUE_LISTS if name in found), None)
    if genes is None or values is None:
        raise InputError(
            f"{part} has no list of genes ({', '.join(GENE_LISTS)}) and list of counts ({', '.join(VALUE_LISTS)}) in "
            f"each row; its lists are {', '.join(found) or 'none'}; rename them, or give the cells as an .h5ad file"
        )
    kind = schema.field(values).type.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(f"{part}: the lists of {values} hold {kind}, not numbers; give a part with counts")
    return genes, values


def _beside(path: Path, names: Sequence[str]) -> Path | None:
    """The first table of one of these names in the folder or in `metadata` in it; of the first name, beside it too."""
    folder = path if path.is_dir() else path.parent
    inside = [place / name for place in (folder, folder / "metadata") for name in names]
    # careful: a table beside the folder may be of other data, whose ids are the same numbers
    beside = [place / names[0] for place in (folder.parent, folder.parent / "metadata")]
    files = (table.with_name(f"{table.name}{suffix}") for table in (*inside, *beside) for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _gene_table(path: Path, kind: Any) -> tuple[Any, Any]:
    """The ids of the genes as an Arrow array of type `kind`, and the table as the var frame of an AnnData."""
    frame = read_table(path, "the gene table")
    columns = {name.lower(): name for name in reversed(frame.columns)}
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    fitting = [
        columns[name] for name in ID_COLUMNS if name in columns and frame[columns[name]].dtype.is_integer() != is_text
    ]
    if not fitting:
        raise InputError(
            f"the gene table {path} has no column of ids that are {'texts' if is_text else 'whole numbers'} "
            f"({', '.join(ID_COLUMNS)}); it has {', '.join(frame.columns)}"
        )
    ids = frame[fitting[0]]
    if ids.null_count() or not ids.is_unique().all():
        raise InputError(f"the gene table {path} has an id missing or twice in its column {fitting[0]!r}; repair it")
    import pandas as pd

    names = [name for name in frame.columns if name != fitting[0] or name.lower() in ("ensembl_id", "gene_symbol")]
    var = pd.DataFrame({name: frame[name].to_list() for name in names}, index=ids.cast(pl.String).to_list())
    return pa.array(ids.to_list(), type=kind), var


def _name_column(columns: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(columns)}
    named = [lower[name] for name in NAME_COLUMNS if name in lower]
    return next(iter([*named, *(name for name in columns if "barcode" in name.lower())]), None)


def _row_names(start: int, stop: int) -> pl.Series:
    return pl.int_range(start, stop, dtype=pl.Int64, eager=True).cast(pl.String)


class GeneListRows:
    """The lists as rows of a matrix, whose columns are the genes of the gene table: a `matrices.RowMatrix`.

    Attributes:
        shape: numbers of cells and of genes.
        first: the first row of each part among all rows, and at the end the number of rows.
    """

    by_column = None

    def __init__(self, parts: OpenParts, ids: Any, table: Path) -> None:
        self._parts, self._ids, self._table = parts, ids, table
        self.first = parts.first
        self.shape = (int(parts.first[-1]), len(ids))

    def read(self, start: int, stop: int) -> CSRRows:
        """Rows [start, stop), with ascending columns. InputError names part and row of a gene that has no name, of one
        that is there twice, and of lists of different lengths.
        """
        return concat_rows([self._rows(*found) for found in self._parts.read(start, stop)])

    def close(self) -> None:
        """Close the part that is open."""
        self._parts.close()

    def _rows(self, part: Path, start: int, lists: Lists) -> CSRRows:
        values = np.asarray(lists.values)
        first = lists.indptr[:-1][np.diff(lists.indptr) > 0]
        is_kept = np.ones(len(values), dtype=np.bool_)
        is_kept[first] = ~(values[first] < 0)
        before = np.concatenate([[0], np.cumsum(is_kept)])
        genes = lists.genes if is_kept.all() else lists.genes.filter(pa.array(is_kept))
        columns = pc.index_in(genes, value_set=self._ids)
        indptr = before[lists.indptr].astype(np.int64)
        if columns.null_count:
            place = int(np.argmax(np.asarray(columns.is_null())))
            row = start + int(np.searchsorted(indptr, place, side="right")) - 1
            raise InputError(
                f"{part}, row {row}: the gene {genes[place].as_py()} is not in the gene table {self._table}; fetch the "
                "gene table of these parts"
            )
        with np.errstate(over="ignore"):
            kept = values[is_kept].astype(np.float32)
        rows = CSRRows(indptr=indptr, indices=np.array(columns, dtype=np.int32), data=kept)
        return sort_rows(rows, where=str(part), start=start)


class ObsColumns:
    """The obs columns of parts, of which the row groups that a range needs are in memory."""

    def __init__(self, parts: Sequence[Path], first: Any) -> None:
        self._parts, self._first = parts, first.tolist()

    def read(self, name: str, start: int, stop: int) -> pl.Series:
        """The values of a column of the cells [start, stop)."""
        found = list(self._of_parts(name, start, stop))
        return (pl.concat(found) if found else self._of_part(name, 0, 0, 0)).rename(name)

    def read_names(self, name: str, start: int, stop: int) -> pl.Series:
        """The texts of a column of the cells [start, stop); "" where missing."""
        return self.read(name, start, stop).cast(pl.String).fill_null("")

    def _of_parts(self, name: str, start: int, stop: int) -> Iterator[pl.Series]:
        while start < stop:
            place = bisect_right(self._first, start) - 1
            before, end = self._first[place], min(stop, self._first[place + 1])
            yield self._of_part(name, place, start - before, end - before)
            start = end

    def _of_part(self, name: str, place: int, start: int, stop: int) -> pl.Series:
        """The values of the rows [start, stop) of a part."""
        with pq.ParquetFile(self._parts[place]) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            first = np.cumsum([0, *sizes]).tolist()
            groups = [g for g in range(len(sizes)) if first[g] < stop and start < first[g + 1]]
            column = file.read_row_groups(groups, columns=[name], use_threads=False).column(0)
        series = pl.from_arrow(column)
        assert isinstance(series, pl.Series)
        skipped = start - first[groups[0]] if groups else 0
        return plain_column(series.slice(skipped, stop - start).rename(name))
