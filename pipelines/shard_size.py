"""How many cells make a shard of an extraction or of an encoding."""

from pipelines.config import ForwardOptions, parse_size
from pipelines.inputs import LoadedInputs

SHARDS, LEAST_CELLS = 16, 32
"""By default a data set makes at least so many shards, of at least so many cells."""


def cells_per_shard(
    options: ForwardOptions, inputs: LoadedInputs, *, default: str, row_bytes: float, rows_per_cell: int | None
) -> int:
    """Return the cells of one shard: as given, or as many as make `shard_size` bytes.

    Where neither is given, as many as make `default` bytes, but no more than a 16th of the cells, so that a small data
    set, too, is shared by several actors and loses little when it is interrupted; never by the number of actors, as the
    run is the same wherever it is made. `rows_per_cell`: the most rows kept of a cell (None: all its tokens), each of
    `row_bytes`.
    """
    if options.shard_cells is not None:
        return options.shard_cells
    rows = max(min(inputs.mean_tokens, rows_per_cell or inputs.mean_tokens), 1.0)
    fitting = max(1, int(parse_size(options.shard_size or default) // (rows * row_bytes)))
    if options.shard_size is not None:
        return fitting
    return min(fitting, max(LEAST_CELLS, -(-inputs.source.n_cells // SHARDS)))
