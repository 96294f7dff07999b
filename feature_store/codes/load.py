"""Codes and token statistics of a finished run, loaded into memory."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.codes.codes_run import CodesRun
from feature_store.codes.cut import Cells
from feature_store.codes.parquet import read_row_groups
from feature_store.errors import InputError
from feature_store.storage import schemas
from feature_store.storage.commit import Run, read_part

if TYPE_CHECKING:
    from scipy import sparse

Bools = npt.NDArray[np.bool_]


class TokenCounts(NamedTuple):
    """The tables token_feature_gene, for some features, and token_gene; both may have several rows of the same key."""

    feature_gene: pl.DataFrame
    gene: pl.DataFrame


def load_cell_codes(codes: CodesRun, cells: Cells) -> "sparse.csr_array":
    """Codes of some cells (cell_idx, in any order) as CSR float32 [len(cells) n_features], indices sorted.

    Of a cell outside the panel they are its largest. Codes of tokens are max-pooled. Parts without any of the cells are
    not read. InputError for a cell that the run does not have.
    """
    # not above: a look-up of a table needs no matrix, and the import takes .3 s
    from scipy import sparse

    wanted, place = np.unique(cells, return_inverse=True)
    if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < codes.cut.n_cells:
        raise InputError(
            f"{codes.folder} has codes of {codes.cut.n_cells} cells; cell {int(wanted[0])} to {int(wanted[-1])} were "
            "asked for"
        )
    found = [
        _codes_of_part(run, shard, low, high, wanted)
        for run in (codes.by_cell, codes.compact)
        if run is not None
        for shard, low, high in _parts_with(run, wanted)
    ]
    row = np.concatenate([np.empty(0, np.int64), *(part[0] for part in found)])
    feature = np.concatenate([np.empty(0, np.int32), *(part[1] for part in found)])
    value = np.concatenate([np.empty(0, np.float32), *(part[2] for part in found)])
    # the rows of a cell are together and in the order of its features
    loaded = sparse.coo_array((value, (row, feature)), shape=(len(wanted), codes.n_features)).tocsr()
    return loaded if np.array_equal(wanted, cells) else loaded[place]


def load_feature_codes(codes: CodesRun, panel: Cells, start: int, stop: int) -> "sparse.csr_array":
    """Codes of the features [start, stop) of the panel's cells as CSR float32 [n_panel stop - start], indices sorted.

    Codes of tokens are max-pooled. Each part gives its row groups of these features. InputError for another panel than
    that of the run. Peak memory: 32 bytes a nonzero.
    """
    from scipy import sparse

    if len(panel) != codes.cut.n_panel:
        raise InputError(f"{codes.folder} has a panel of {codes.cut.n_panel} cells; {len(panel)} were given")
    rows, columns, values = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    # every read checks its pages, so only the footers need a check here
    for path in codes.by_feature.checked_parts(max_bytes=0):
        frame, _ = read_row_groups(path, "feature_id", start, stop)
        cell, feature, value = (frame[name].to_numpy() for name in ("cell_idx", "feature_id", "value"))
        if codes.plan.level == "token":
            cell, feature, value = _pooled(cell, feature, value)
        place = np.searchsorted(panel, cell)
        if len(cell) and not (place[-1] < len(panel) and (panel[np.minimum(place, len(panel) - 1)] == cell).all()):
            raise InputError(f"{codes.folder} has codes of cells that are not in the panel that was given")
        rows.append(place.astype(np.int32))
        columns.append(feature.astype(np.int32) - np.int32(start))
        values.append(value)
    shape = (len(panel), stop - start)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    loaded = sparse.coo_array(entries, shape=shape).tocsr()
    loaded.sort_indices()
    return loaded


def load_token_counts(codes: CodesRun, start: int, stop: int) -> TokenCounts:
    """On how many tokens of each gene the features [start, stop) fire in the panel's cells, and how many tokens there
    are; the sums over rows of the same key are the counts.
    """
    paths = codes.tables["stats/feature_gene"].checked_parts(max_bytes=0)
    fired = [read_row_groups(path, "feature_id", start, stop)[0] for path in paths]
    gene = [read_part(path) for path in codes.tables["stats/gene"].checked_parts()]
    return TokenCounts(
        schemas.conform("token_feature_gene", pl.concat(fired)), schemas.conform("token_gene", pl.concat(gene))
    )


def load_top_tokens(codes: CodesRun, start: int, stop: int) -> pl.DataFrame:
    """The table token_top of the features [start, stop), over all cells, the largest first."""
    run = Run.open(codes.folder / "merged" / "feature_token")
    markers = [marker for marker in run.manifest().shards if marker.start < stop and start < marker.stop]
    paths = run.checked_parts(markers, max_bytes=0)
    return pl.concat([schemas.empty("token_top"), *(read_row_groups(p, "feature_id", start, stop)[0] for p in paths)])


def panel_firing(codes: CodesRun) -> npt.NDArray[np.int64]:
    """In how many cells of the panel each feature fires [n_features]."""
    n_cells = np.zeros(codes.n_features, np.int64)
    for path in _of_panel(codes, "stats/firing"):
        frame = read_part(path, ["feature_id", "n_cells"])
        np.add.at(n_cells, frame["feature_id"].to_numpy(), frame["n_cells"].to_numpy())
    return n_cells


def panel_with_tokens(codes: CodesRun, panel: Cells) -> Bools:
    """Whether each cell of the panel [n_panel] has a token; a cell without a gene that the model knows, such as an
    empty droplet, has none, and takes part in no statistic.
    """
    return panel_tokens(codes, panel) > 0


def panel_tokens(codes: CodesRun, panel: Cells) -> npt.NDArray[np.int64]:
    """The number of tokens of each cell of the panel [n_panel]."""
    n_tokens = np.zeros(len(panel), dtype=np.int64)
    for path in _of_panel(codes, "stats/cell"):
        frame = read_part(path, ["cell_idx", "n_tokens"])
        n_tokens[np.searchsorted(panel, frame["cell_idx"].to_numpy())] = frame["n_tokens"].to_numpy()
    return n_tokens


def n_without_tokens(codes: CodesRun) -> int:
    """Number of cells, of all, that have no token."""
    return codes.cut.n_cells - codes.tables["stats/cell"].manifest().rows


def _of_panel(codes: CodesRun, table: str) -> list[Any]:
    """The parts of the panel's shards of a table of all cells."""
    run = codes.tables[table]
    return run.checked_parts(run.manifest().shards[: codes.cut.n_panel_shards])


def _parts_with(run: Run, cells: Cells) -> list[tuple[int, int, int]]:
    """The parts whose range holds any of the ascending cells, and which of these: shard, first, one after the last."""
    shards = run.manifest().shards
    found = np.searchsorted(cells, [edge for marker in shards for edge in (marker.start, marker.stop)])
    spans = found.reshape(-1, 2).tolist()
    return [(marker.shard, low, high) for marker, (low, high) in zip(shards, spans, strict=True) if low < high]


def _codes_of_part(
    run: Run, shard: int, low: int, high: int, cells: Cells
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Row, feature and value of the codes of `cells[low:high]` in one part; a row is the place in `cells`."""
    (path,) = run.checked_parts([run.manifest().shards[shard]], max_bytes=0)
    frame, _ = read_row_groups(path, "cell_idx", int(cells[low]), int(cells[high - 1]) + 1)
    cell, feature, value = (frame[name].to_numpy() for name in ("cell_idx", "feature_id", "value"))
    row = low + np.searchsorted(cells[low:high], cell)
    inside = cells[np.minimum(row, high - 1)] == cell
    row, feature, value = row[inside], feature[inside].astype(np.int32), value[inside]
    if "token_pos" in frame.columns and len(row):
        order = np.lexsort((feature, row))
        row, feature, value = _pooled(row[order], feature[order], value[order])
    return row, feature, value


def _pooled(cell: Any, feature: Any, value: Any) -> tuple[Any, Any, Any]:
    """One row a (cell, feature), with its largest value, of rows in which those of the same pair are together."""
    if not len(cell):
        return cell, feature, value
    new = (np.diff(cell, prepend=-1) != 0) | (np.diff(feature.astype(np.int64), prepend=-1) != 0)
    first = np.flatnonzero(new)
    return cell[first], feature[first], np.maximum.reduceat(value, first)
