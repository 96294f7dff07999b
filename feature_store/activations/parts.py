"""Token activations as Parquet: one fixed-size binary value a token, read back as numpy without a copy a value.

A column of fixed-size binary holds a row group of activations as one contiguous block; a list column pays repetition
levels for every element. Measured at d_model 512, f16: FixedSizeBinary is 3-10x faster to write and to read than lists
(1.2 GB/s cold). Activations are not compressed (noise in the mantissa: nothing to win), have no dictionary and carry
page checksums, which every read verifies. Parquet has no bfloat16: its 16 bits are stored as they are, with a tag.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import InputError, IntegrityError
from feature_store.storage import filesystem
from feature_store.storage.commit import Run

ROW_GROUP_ROWS = 8192
KEYS = ("cell_idx", "token_pos", "gene_id")
_STORED: Mapping[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
}
DTYPES = tuple(_STORED)


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Where a row group lies and how many tokens it holds."""

    shard: int
    group: int
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class ActivationBlock:
    """The tokens of one row group; `act` [n_tokens d_model] is f16, f32, or the uint16 bits of bf16, read-only."""

    cell_idx: npt.NDArray[np.int64]
    token_pos: npt.NDArray[np.int32]
    gene_id: npt.NDArray[np.int32]
    act: npt.NDArray[Any]

    def act_f32(self) -> npt.NDArray[np.float32]:
        """Activations as float32 [n_tokens d_model], writable (torch takes no other without a warning)."""
        return np.require(to_float32(self.act), requirements="W")


def to_float32(act: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Stored activations (f16, f32, or uint16 bits of bf16) as float32; exact, as all are subsets of it."""
    if act.dtype == np.uint16:
        return (act.astype(np.uint32) << 16).view(np.float32)
    return act.astype(np.float32, copy=False)


def to_stored(act: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Round float activations to what `dtype` ("f16", "f32", "bf16") stores, to nearest with ties to even.

    uint16 is taken as bf16 bits. InputError for a value that is not finite, or that f16 cannot hold (over 65504): an
    infinity is never stored.
    """
    if dtype not in _STORED:
        raise InputError(f"unknown activation dtype {dtype!r}; it is one of {', '.join(DTYPES)}")
    if act.dtype == np.uint16 and dtype != "bf16":
        raise InputError(f"uint16 activations are the bits of bf16; they cannot be stored as {dtype}")
    if act.dtype != np.uint16 and not np.issubdtype(act.dtype, np.floating):
        raise InputError(f"activations are float arrays, or uint16 bits of bf16; got {act.dtype}")
    with np.errstate(over="ignore"):
        if act.dtype == np.uint16:
            stored = act
        else:
            stored = _bf16_bits(act) if dtype == "bf16" else act.astype(_STORED[dtype], copy=False)
    stored = np.ascontiguousarray(stored)
    if not _all_finite(stored):
        _refuse_non_finite(act, stored, dtype)
    return stored


class ActivationWriter:
    """Writes one part row group by row group, so that memory holds one of them and not the part; a context manager
    that leaves no file behind when it is left by an error.

    `metadata` has `dtype` (f16, f32 or bf16), `site` and `plan_sha`; `d_model` is added. However the tokens arrive, the
    row groups have `row_group_rows` each and the bytes are the same.
    """

    def __init__(
        self, path: str | Path, d_model: int, metadata: Mapping[str, str], *, row_group_rows: int = ROW_GROUP_ROWS
    ) -> None:
        missing = {"dtype", "site", "plan_sha"} - set(metadata)
        if missing:
            raise InputError(f"activation metadata lacks {', '.join(sorted(missing))}; got {dict(metadata)}")
        if metadata["dtype"] not in _STORED:
            raise InputError(f"unknown activation dtype {metadata['dtype']!r}; it is one of {', '.join(DTYPES)}")
        self.n_tokens = 0
        self._path = Path(path)
        self._dtype = metadata["dtype"]
        self._d_model = d_model
        self._width = d_model * _STORED[self._dtype].itemsize
        self._row_group_rows = row_group_rows
        self._waiting: list[tuple[npt.NDArray[Any], ...]] = []
        self._n_waiting = 0
        schema = pa.schema(
            [
                pa.field("cell_idx", pa.int64(), nullable=False),
                pa.field("token_pos", pa.int32(), nullable=False),
                pa.field("gene_id", pa.int32(), nullable=False),
                pa.field("act", pa.binary(self._width), nullable=False),
            ],
            metadata={**metadata, "d_model": str(d_model)},
        )
        self._file = pq.ParquetWriter(
            path,
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=list(KEYS),
            write_page_checksum=True,
        )

    def __enter__(self) -> "ActivationWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._file.close()
            if kind is not None:
                self._path.unlink(missing_ok=True)

    def write(
        self,
        cell_idx: npt.NDArray[np.integer[Any]],
        token_pos: npt.NDArray[np.integer[Any]],
        gene_id: npt.NDArray[np.integer[Any]],
        act: npt.NDArray[Any],
    ) -> None:
        """Add tokens: keys [n_tokens] each, `act` [n_tokens d_model], float or the uint16 bits of bf16.

        Raises InputError as `to_stored` does, and for arrays of another length or width.
        """
        if act.shape != (len(cell_idx), self._d_model) or {len(token_pos), len(gene_id)} != {len(act)}:
            raise InputError(
                f"activations are [n_tokens {self._d_model}] with one key a token; got act {act.shape}, cell_idx "
                f"{len(cell_idx)}, token_pos {len(token_pos)}, gene_id {len(gene_id)}"
            )
        self._waiting.append((cell_idx, token_pos, gene_id, to_stored(act, self._dtype)))
        self._n_waiting += len(act)
        self.n_tokens += len(act)
        if self._n_waiting >= self._row_group_rows:
            self._flush(whole_groups=True)

    def _flush(self, *, whole_groups: bool = False) -> None:
        """Write what waits; with `whole_groups`, keep the tokens that do not fill a row group."""
        columns = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
        n_rows = self._n_waiting - self._n_waiting % self._row_group_rows if whole_groups else self._n_waiting
        if n_rows:
            schema = self._file.schema
            *keys, act = (np.ascontiguousarray(column[:n_rows]) for column in columns)
            values = pa.FixedSizeBinaryArray.from_buffers(pa.binary(self._width), n_rows, [None, pa.py_buffer(act)])
            arrays = [pa.array(column, field.type) for column, field in zip(keys, schema, strict=False)]
            table = pa.Table.from_arrays([*arrays, values], schema=schema)
            self._file.write_table(table, row_group_size=self._row_group_rows)
        # careful: a copy, or the view would keep the block alive
        self._waiting = [tuple(column[n_rows:].copy() for column in columns)] if n_rows < self._n_waiting else []
        self._n_waiting -= n_rows


def write_part(
    path: str | Path,
    cell_idx: npt.NDArray[np.integer[Any]],
    token_pos: npt.NDArray[np.integer[Any]],
    gene_id: npt.NDArray[np.integer[Any]],
    act: npt.NDArray[Any],
    metadata: Mapping[str, str],
    *,
    row_group_rows: int = ROW_GROUP_ROWS,
) -> int:
    """Write one part that is in memory and return its rows: what `Run.commit_shard` wants written.

    Arguments and errors as those of `ActivationWriter` and its `write`.
    """
    if act.ndim != 2:
        raise InputError(f"activations are [n_tokens d_model]; got act {act.shape}")
    with ActivationWriter(path, act.shape[1], metadata, row_group_rows=row_group_rows) as writer:
        writer.write(cell_idx, token_pos, gene_id, act)
    return writer.n_tokens


class ActivationReader:
    """Random access to the row groups of a complete activations run; opens only what its manifest lists.

    Attributes:
        d_model, dtype, site: of every part, from the first.
        row_groups: all of them, by shard and then by group.
        n_tokens: tokens of the run.

    Opening reads every footer (.3 ms a part). IncompleteRunError without a manifest, IntegrityError for a damaged part.
    Safe to use from several threads: no file stays open between reads.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._paths = run.parts()
        self._footers = [_footer(path) for path in self._paths]
        tags = {key.decode(): value.decode() for key, value in (self._footers[0].metadata or {}).items()}
        self.dtype: str = tags["dtype"]
        self.site: str = tags["site"]
        self.d_model = int(tags["d_model"])
        self.row_groups = tuple(
            RowGroup(shard=shard, group=group, n_tokens=footer.row_group(group).num_rows)
            for shard, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        )
        self.n_tokens: int = sum(group.n_tokens for group in self.row_groups)

    def read(self, shard: int, group: int) -> ActivationBlock:
        """One row group; checksums verified. IntegrityError if its bytes are not what was written."""
        table = self._table(shard, group, [*KEYS, "act"])
        keys = {name: table.column(name).to_numpy() for name in KEYS}
        return ActivationBlock(**keys, act=self._matrix(table.column("act")))

    def cells(self, shard: int, group: int) -> npt.NDArray[np.int64]:
        """The cell_idx column alone of one row group: 8 bytes a token instead of d_model * itemsize."""
        column: npt.NDArray[np.int64] = self._table(shard, group, ["cell_idx"]).column("cell_idx").to_numpy()
        return column

    def _table(self, shard: int, group: int, columns: list[str]) -> Any:
        path = self._paths[shard]
        try:
            with (
                filesystem.parquet_source(path) as source,
                pq.ParquetFile(source, metadata=self._footers[shard], page_checksum_verification=True) as file,
            ):
                return file.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise IntegrityError(
                f"{path}, row group {group} cannot be read: {error}; `scsae verify {self.run.path.name}` names what is "
                "damaged, and running `scsae extract` again repairs it"
            ) from error

    def _matrix(self, column: Any) -> npt.NDArray[Any]:
        dtype = _STORED[self.dtype]
        width = self.d_model * dtype.itemsize
        blocks = [
            np.frombuffer(chunk.buffers()[1], np.uint8, count=len(chunk) * width, offset=chunk.offset * width)
            for chunk in column.chunks
            if len(chunk)
        ]
        flat = blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, np.uint8), *blocks])
        return flat.view(dtype).reshape(-1, self.d_model)


def _footer(path: Path) -> Any:
    try:
        with filesystem.parquet_source(path) as source:
            return pq.read_metadata(source)
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} is no whole Parquet file ({error}); run `scsae extract` again") from error


def _bf16_bits(act: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(act, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _all_finite(stored: npt.NDArray[Any]) -> bool:
    if not stored.size:
        return True
    if stored.dtype.itemsize == 2:
        # numpy compares halves one by one (.2 GB/s); their exponent bits as integers go at 6 GB/s
        exponent = 0x7F80 if stored.dtype == np.uint16 else 0x7C00
        return bool((stored.view(np.uint16) & 0x7FFF).max() < exponent)
    return bool(np.isfinite(stored.max()) and np.isfinite(stored.min()))


def _refuse_non_finite(act: npt.NDArray[Any], stored: npt.NDArray[Any], dtype: str) -> None:
    token, column = np.argwhere(~np.isfinite(to_float32(stored)))[0]
    given = to_float32(act[token]) if act.dtype == np.uint16 else act[token]
    value = float(given[column])
    why = "the model gave no finite value"
    if np.isfinite(value):
        why = f"{dtype} does not hold it (f16 ends at 65504); store another: --dtype bf16 or --dtype f32"
    raise InputError(f"activation {value:g} of token {token}, dimension {column}: {why}")
