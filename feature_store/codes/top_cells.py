"""The tokens, in the order of the input, of the cell in which each feature fires most, with its code at each of them.

    top_cells/    top_cell_token: a row a feature and token

Codes of tokens are pooled to codes of cells as they come, and which cell is a feature's first is known once all are
encoded, so these cells, one a feature, are encoded again (`Pieces`). The table is beside those that a codes run has to
have: of a run without it, encoding again makes this table alone. Memory: some 20 bytes a token and feature of a range.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.codes.codes_run import CodesRun
from feature_store.codes.cut import Cells
from feature_store.storage import schemas
from feature_store.storage.commit import Run, read_table, write_frame
from feature_store.storage.plans import TopCellsPlan

FOLDER = "top_cells"
FEATURES_AT_ONCE = 4096
"""Features of a part, whose cells are encoded together."""
NO_CELL = -1


class TokenPiece(NamedTuple):
    """Some tokens: cell_idx, position and gene_id of each; and their codes: token (its place among them), feature_id
    and value of each nonzero.
    """

    cell_idx: npt.NDArray[np.int64]
    token_pos: npt.NDArray[np.int32]
    gene_id: npt.NDArray[np.int32]
    token: npt.NDArray[np.int64]
    feature_id: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]


Pieces = Callable[[Cells], Iterable[TokenPiece]]
"""All tokens of some cells (ascending cell_idx), in order."""


class TopCells:
    """The run top_cells/ of a codes folder, whose parts any number of processes may write.

    IncompleteRunError if the statistics of the codes are not merged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.codes = CodesRun.open(folder)
        self._strongest = Run.open(self.codes.folder / "merged" / "feature_cell")
        plan = TopCellsPlan(codes=self.codes.plan.id, made_of=self._strongest.manifest().sha, at_once=FEATURES_AT_ONCE)
        n_parts = -(-self.codes.n_features // FEATURES_AT_ONCE)
        self.run = Run.create(self.codes.folder / FOLDER, plan.table("top_cell_token", n_shards=n_parts))

    def pending(self) -> list[int]:
        """The parts that are not committed, ascending."""
        return self.run.pending()

    def write(self, number: int, pieces: Pieces, gene_of: Mapping[int, str]) -> int:
        """Encode the cells of one range of features and commit its part; return the number of cells.

        gene_of: the gene of each gene_id; other tokens, such as special ones, have none.
        """
        start = number * FEATURES_AT_ONCE
        stop = min(start + FEATURES_AT_ONCE, self.codes.n_features)
        cell_of = self._cells(start, stop)
        cells = np.unique(cell_of[cell_of != NO_CELL])
        if self.run.committed(number) is None:
            frame = _rows(pieces(cells) if cells.size else (), cell_of, start, gene_of)
            self.run.commit_shard(number, partial(write_frame, frame=frame), start=start, stop=stop)
        return int(cells.size)

    def finalize(self) -> None:
        """Finish the run. IncompleteRunError names missing parts."""
        self.run.finalize()

    def _cells(self, start: int, stop: int) -> Cells:
        """The cell in which each feature of a range fires most, the first one of equals; NO_CELL where it fires in
        none.
        """
        rows = read_table(self._strongest.path).filter(pl.col("feature_id").is_between(start, stop, closed="left"))
        first = rows.filter(pl.col("value") > 0).group_by("feature_id", maintain_order=True).first()
        cell_of = np.full(stop - start, NO_CELL, dtype=np.int64)
        cell_of[first["feature_id"].to_numpy() - start] = first["cell_idx"].to_numpy()
        return cell_of


def _rows(pieces: Iterable[TokenPiece], cell_of: Cells, start: int, gene_of: Mapping[int, str]) -> pl.DataFrame:
    """The table `top_cell_token` of the features whose cells are `cell_of`, from `start` on."""
    tokens, codes = [schemas.empty("top_cell_token").select("cell_idx", "token_pos", gene_id="feature_id")], []
    for piece in pieces:
        keys = {"cell_idx": piece.cell_idx, "token_pos": piece.token_pos, "gene_id": piece.gene_id}
        tokens.append(pl.DataFrame(keys))
        place = piece.feature_id.astype(np.int64) - start
        inside = np.flatnonzero((place >= 0) & (place < cell_of.size))
        own = inside[cell_of[place[inside]] == piece.cell_idx[piece.token[inside]]]
        found = {"feature_id": piece.feature_id[own], "token_pos": piece.token_pos[piece.token[own]]}
        codes.append(pl.DataFrame({**found, "value": piece.value[own]}))
    feature = np.flatnonzero(cell_of != NO_CELL)
    of_feature = pl.DataFrame({"feature_id": (feature + start).astype(np.int32), "cell_idx": cell_of[feature]})
    rows = of_feature.join(pl.concat(tokens), on="cell_idx", how="inner")
    if codes:
        rows = rows.join(pl.concat(codes), on=["feature_id", "token_pos"], how="left")
    else:
        rows = rows.with_columns(value=pl.lit(None, pl.Float32))
    rows = rows.with_columns(
        pl.col("value").fill_null(0.0),
        gene=pl.col("gene_id").replace_strict(gene_of, default=None, return_dtype=pl.String),
    )
    return schemas.conform("top_cell_token", rows.drop("gene_id").sort("feature_id", "token_pos"))
