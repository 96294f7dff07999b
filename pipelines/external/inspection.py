"""`scsae inspect --vectors`: what given vectors are, how they are read, and whether a sample of them is usable.

Vectors are opened as `extract` opens them, so that what it refuses is refused here in the same words. Of the numbers a
sample is read: all, or SAMPLE_RANGES ranges of rows at equal distances, of READ_ROWS each (0.3 GB at a width of 1,280).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.cells import Source, open_source
from pipelines.config import InspectOptions
from pipelines.config.vectors import VectorsPlace
from pipelines.external.vector_files import READ_ROWS, Vectors
from pipelines.external.vectors import LARGEST, check_numbers, open_vectors
from pipelines.runtime.progress import delayed_progress_bar

SAMPLE_RANGES = 16
Floats = npt.NDArray[np.float64]


def inspect_vectors(options: InspectOptions, *, facts_of: Callable[[Source], Mapping[str, Any]]) -> dict[str, Any]:
    """Return facts about a data set (`facts_of`) and the vectors of its cells; nothing is written.

    Raises:
        InputError: see `open_vectors`; or a number of the sample is not finite.
    """
    source = open_source(options.data, matrix=options.matrix, progress=delayed_progress_bar, obs=options.obs)
    place = VectorsPlace.parse(str(options.vectors))
    vectors = open_vectors(str(place), source)
    in_order = f"by their order: row i is cell i, {vectors.n_rows:,} of {source.n_cells:,}"
    return {
        **facts_of(source),
        "vectors": f"{vectors.n_rows:,} x {vectors.width:,} of {vectors.dtype}, {vectors.where}",
        "read": vectors.way,
        "joined with the cells": vectors.joined or in_order,
        **_numbers(vectors, source),
        "said to be of": f"{place.name}, unless --source-name names the model and its version",
        "activations, f16": f"{vectors.n_rows * vectors.width * 2 / 1e9:.2f} GB",
    }


def _numbers(vectors: Vectors, source: Source) -> dict[str, str]:
    """Return the length of the vectors of a sample, and the largest number. InputError if one is not finite."""
    lengths: list[Floats] = []
    largest = 0.0
    starts = _starts(vectors.n_rows)
    for start in starts:
        block = vectors.read(start, min(start + READ_ROWS, vectors.n_rows))
        check_numbers(block, start, vectors, source, dtype="f32")
        lengths.append(np.linalg.norm(block.astype(np.float64), axis=1))
        largest = max(largest, float(np.abs(block).max()))
    norms = np.concatenate(lengths)
    sample = f"all {len(norms):,}"
    if len(norms) < vectors.n_rows:
        sample = f"{len(norms):,} of {vectors.n_rows:,}, in {len(starts)} ranges; extract checks all"
    low, middle, high = np.quantile(norms, [0.01, 0.5, 0.99])
    facts = {
        "finite": f"yes, of {sample}",
        "lengths": f"median {middle:.4g}, 1st and 99th percentile {low:.4g} and {high:.4g}",
        "largest number": f"{largest:.4g}",
    }
    if n_zero := int((norms == 0).sum()):
        facts["ALL ZERO"] = f"{n_zero:,} of the vectors"
    if largest > LARGEST["f16"]:
        facts["REFUSED BY EXTRACT"] = f"f16 ends at {LARGEST['f16']:g}: give --dtype bf16 or --dtype f32"
    return facts


def _starts(n_rows: int) -> list[int]:
    """Return where the ranges of the sample start: all of READ_ROWS rows each, or SAMPLE_RANGES at equal distances."""
    if n_rows <= SAMPLE_RANGES * READ_ROWS:
        return list(range(0, n_rows, READ_ROWS))
    found: list[int] = np.linspace(0, n_rows - READ_ROWS, SAMPLE_RANGES).astype(int).tolist()
    return found
