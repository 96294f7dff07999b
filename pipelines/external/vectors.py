"""The vectors of a data set's cells: they are found, checked and hashed in one pass, and found again by later stages.

The digest is of the numbers as float32, in the order of the cells, and not of a file: the same vectors in another
format, or joined by cell ids, are the same vectors. Where they are is written beside the run that was made of them
(`model.json`), and they are compared by their digest when they are read again. A pass costs about 1 GB/s.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.activations import ActivationBlock, to_stored
from feature_store.cells import Source, open_source
from feature_store.errors import InputError
from feature_store.storage import filesystem
from feature_store.storage.addresses import RemotePath
from feature_store.storage.hashing import sealed
from feature_store.storage.layout import MODEL_FILE, Layout
from pipelines.config.vectors import VectorsPlace
from pipelines.errors import UsageError
from pipelines.external.vector_files import READ_ROWS, Vectors, open_vector_file
from pipelines.inputs import load_recorded_source
from pipelines.runtime.progress import delayed_progress_bar

if TYPE_CHECKING:
    from feature_store.query.runs import RunChain

SITE = "vectors"
"""The site of given vectors: they are no point inside a model."""
NO_GENE = 0
"""The gene_id of a row for a whole cell; the table of the genes' tokens knows none, so that it matches no gene."""
LARGEST = {"f16": 65504.0, "bf16": float(np.finfo(np.float32).max), "f32": float(np.finfo(np.float32).max)}
Cells = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class VectorsJob:
    """The data set and its vectors, as plain values that can be pickled, and the dtype that they are rounded to."""

    data: tuple[str | RemotePath, ...]
    matrix: str
    where: str | None
    vectors: str
    dtype: str


class GivenVectors:
    """The vectors of a `VectorsJob`, opened once and read for any cells, as a forward pass would give them.

    Attributes:
        width: length of a vector.
        halvings: how often memory ran out: never.
    """

    halvings = 0

    def __init__(self, job: VectorsJob) -> None:
        self._dtype = job.dtype
        self._vectors = open_vectors(job.vectors, open_source(job.data, matrix=job.matrix, where=job.where))
        self.width = self._vectors.width

    def blocks(self, cells: Cells) -> Iterator[ActivationBlock]:
        """The vectors of the cells (ascending cell_idx) in order, one row a cell."""
        for low in range(0, len(cells), READ_ROWS):
            chosen = cells[low : low + READ_ROWS]
            yield ActivationBlock(
                cell_idx=chosen,
                token_pos=np.zeros(len(chosen), np.int32),
                gene_id=np.full(len(chosen), NO_GENE, np.int32),
                act=to_stored(self._vectors.read_cells(chosen), self._dtype),
            )


class VectorsLocation(NamedTuple):
    """Where vectors were when they were last used, and their digest."""

    vectors: str
    digest: str


def open_vectors(text: str, source: Source) -> Vectors:
    """Open the vectors of the cells of `source` that `--vectors` names.

    Raises:
        InputError: see `open_vector_file` and `Source.obsm`; or there is another number of vectors than of cells.
    """
    place = VectorsPlace.parse(text)
    if place.file is None:
        array = source.obsm(str(place.key))
        vectors = Vectors(
            where=text,
            n_rows=array.shape[0],
            width=array.shape[1],
            dtype=array.dtype,
            way="in ranges of rows",
            rows=array.read,
        )
        if not vectors.width:
            raise InputError(f"--vectors was {text!r}, which has no column")
    else:
        vectors = open_vector_file(place.file, place.key, source)
    if vectors.n_rows != source.n_cells:
        raise InputError(
            f"{vectors.where} has {vectors.n_rows:,} vectors, and {', '.join(map(str, source.paths))} "
            f"{'has' if len(source.paths) == 1 else 'have'} {source.n_cells:,} cells; give one vector for each cell, "
            "in their order, or a Parquet file with a column cell_id"
        )
    return vectors


def checked_digest(vectors: Vectors, source: Source, *, dtype: str) -> str:
    """The sha256 of shape and numbers, after a check of every number.

    Raises:
        InputError: a number is not finite, or the dtype cannot hold it; the row and its cell are named.
    """
    digest = sha256(f"vectors {vectors.n_rows} {vectors.width}\n".encode())
    with delayed_progress_bar("check vectors", vectors.n_rows, "cells") as report:
        for start in range(0, vectors.n_rows, READ_ROWS):
            block = vectors.read(start, min(start + READ_ROWS, vectors.n_rows))
            check_numbers(block, start, vectors, source, dtype=dtype)
            digest.update(block.astype("<f4", copy=False).tobytes())
            report(start + len(block))
    return digest.hexdigest()


def check_numbers(block: npt.NDArray[np.float32], start: int, vectors: Vectors, source: Source, *, dtype: str) -> None:
    """Check the vectors of the cells from `start` on, float32 [n d_model].

    Raises:
        InputError: a number is not finite, or the dtype cannot hold it; the row and its cell are named.
    """
    if np.abs(block).max() <= LARGEST[dtype]:
        return
    with np.errstate(invalid="ignore"):
        row, column = np.argwhere(~(np.abs(block) <= LARGEST[dtype]))[0].tolist()
    value, cell = block[row, column], source.obs_names(start + row, start + row + 1)[0]
    advice = (
        "take the cell out of the data, or compute its vector again"
        if not np.isfinite(value)
        else f"{dtype} ends at {LARGEST[dtype]:g}: use --dtype bf16 or --dtype f32"
    )
    raise InputError(f"{vectors.where}, row {start + row} (cell {cell!r}), dimension {column} is {value:g}; {advice}")


def save_vectors_location(folder: Path, place: VectorsLocation) -> None:
    """Write beside a run of activations or codes where its vectors are now."""
    filesystem.replace_text(folder / MODEL_FILE, sealed(place._asdict()))


def load_vectors_location(folder: Path) -> VectorsLocation:
    """Return what `save_vectors_location` wrote. IntegrityError."""
    return VectorsLocation(**filesystem.read_required(folder / MODEL_FILE))


def missing_file(folder: Path) -> Path | None:
    """Return the file of the vectors that the run in `folder` was made of, if it is not where it was."""
    file = VectorsPlace.parse(load_vectors_location(folder).vectors).file
    return None if file is None or file.exists() else file


def refuse_changed(folder: Path, source: Source, *, dtype: str) -> None:
    """Raise UsageError unless the vectors that the run in `folder` was made of have the digest that they had.

    Raises:
        UsageError: they are not there, or changed; it names the command that takes their new place, or others.
        InputError: they cannot be read as vectors of these cells.
    """
    run, place = f"{folder.parent.name}/{folder.name}", load_vectors_location(folder)
    if (file := missing_file(folder)) is not None:
        raise UsageError(
            f"the vectors of {run} are read again, but {file} is not there; if it was moved, name its new place with "
            "`scsae encode --vectors PATH/vectors.npy` and the options that the codes were made with"
        )
    now = checked_digest(open_vectors(place.vectors, source), source, dtype=dtype)
    if now != place.digest:
        raise UsageError(
            f"the vectors in {place.vectors} changed since {run} was made of them (sha256 {now[:12]}, was "
            f"{place.digest[:12]}); put the former ones back, or run its stage again with the new ones"
        )


def refuse_changed_of_codes(layout: Layout, chain: "RunChain", *, stage: str) -> None:
    """Raise UsageError if the given vectors of the codes of a chain are read again and moved or changed.

    Codes of stored activations read none. InputError: see `refuse_changed`.
    """
    if chain.activations.origin == "vectors" and chain.codes.fused is not None:
        with load_recorded_source(layout, chain.codes.dataset, stage=stage) as source:
            refuse_changed(layout.codes_dir(chain.associations.codes), source, dtype=chain.activations.dtype)
