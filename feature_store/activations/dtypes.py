"""The dtypes in which activations are stored, and exact conversion to float32.

Parquet has no bfloat16: its 16 bits are stored as uint16, and the file names the dtype.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.errors import InputError

STORED: Mapping[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
}
"""Name of each dtype: the numpy dtype of its values on disk."""


def to_float32(act: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Stored activations (f16, f32, or uint16 bits of bf16) as float32; exact, as float32 holds every value of each."""
    if act.dtype == np.uint16:
        return (act.astype(np.uint32) << 16).view(np.float32)
    return act.astype(np.float32, copy=False)


def to_stored(act: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Float activations rounded to `dtype` ("f16", "f32", "bf16"), to nearest with ties to even.

    uint16 activations are the bits of bf16. InputError for a value that is not finite, or that the dtype cannot hold
    (f16 ends at 65504): an infinity is never stored.
    """
    if dtype not in STORED:
        raise InputError(f"unknown activation dtype {dtype!r}; it is one of {', '.join(STORED)}")
    if act.dtype == np.uint16 and dtype != "bf16":
        raise InputError(f"uint16 activations are the bits of bf16; they cannot be stored as {dtype}")
    if act.dtype != np.uint16 and not np.issubdtype(act.dtype, np.floating):
        raise InputError(f"activations are float arrays or uint16 bits of bf16; got {act.dtype}")
    with np.errstate(over="ignore"):
        if act.dtype == np.uint16:
            stored = act
        else:
            stored = _bf16_bits(act) if dtype == "bf16" else act.astype(STORED[dtype], copy=False)
    stored = np.ascontiguousarray(stored)
    if not _all_finite(stored):
        _refuse_non_finite(act, stored, dtype)
    return stored


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
    why = "the model gave a value that is not finite; give a checkpoint that is whole, or --precision f32"
    if np.isfinite(value):
        why = f"{dtype} cannot hold this value (f16 ends at 65504); use --dtype bf16 or --dtype f32"
    raise InputError(f"activation {value:g} of token {token}, dimension {column}: {why}")
