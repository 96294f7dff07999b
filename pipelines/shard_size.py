"""The number of cells in a shard of an extraction or of an encoding."""

from pipelines.config import ForwardOptions, parse_size

ACTIVATIONS_SHARD = "256MB"
ITEMSIZE = {"f16": 2, "bf16": 2, "f32": 4}
"""Bytes of a number of the activations."""
SHARDS, LEAST_CELLS = 16, 32
"""By default a data set is divided into at least SHARDS shards, of at least LEAST_CELLS cells each."""


def cells_per_shard(
    options: ForwardOptions,
    *,
    mean_tokens: float,
    n_cells: int,
    default: str,
    row_bytes: float,
    rows_per_cell: int | None,
) -> int:
    """Return the number of cells of one shard of `n_cells`: `shard_cells` if given, else as many as fill `shard_size`
    bytes.

    Without either option a shard fills `default` bytes but holds at most a 16th of the cells, so that several actors
    share a small data set too and an interruption loses little. The number never depends on the number of actors,
    because a run must be the same wherever it is made. A cell has `mean_tokens` rows, but `rows_per_cell` at most
    (None: all its tokens), and each row takes `row_bytes`.
    """
    if options.shard_cells is not None:
        return options.shard_cells
    rows = max(min(mean_tokens, rows_per_cell or mean_tokens), 1.0)
    fitting = max(1, int(parse_size(options.shard_size or default) // (rows * row_bytes)))
    if options.shard_size is not None:
        return fitting
    return min(fitting, max(LEAST_CELLS, -(-n_cells // SHARDS)))
