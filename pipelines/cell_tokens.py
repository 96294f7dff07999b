"""The tokens of cells of a data set: their values, and the columns of obs that the model needs of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from feature_store.cells import StoredObs, canonical_text
from feature_store.query.suggestions import closest_names, join_names
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from feature_store.cells import Source
    from sae_core.scfm import FoundationModel, GeneMatch, Tokens


def tokens_of_cells(
    model: "FoundationModel",
    source: "Source",
    match: "GeneMatch",
    cells: npt.NDArray[np.int64],
    *,
    seed: int,
    stored: StoredObs | None = None,
) -> "Tokens":
    """Return the tokens of the given cells (ascending indices), with columns of obs from the store or from the data.

    Raises:
        UsageError: a column of obs that the model needs is not there.
        InputError, TokenizationError: as from `Source.read_cells` and `FoundationModel.tokenize`.
    """
    rows = source.read_cells(cells)
    obs = None
    if model.obs_columns:
        known = list(source.obs_schema) if stored is None else stored.columns
        _refuse_missing(model, source, known)
        read = source.obs_of_cells if stored is None else stored.read
        frame = read(cells, model.obs_columns)
        obs = {name: canonical_text(frame[name]).fill_null("").to_list() for name in model.obs_columns}
    return model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=seed, obs=obs)


def _refuse_missing(model: "FoundationModel", source: "Source", known: Sequence[str]) -> None:
    for field, value in model.context.items():
        column = value.removeprefix("obs:")
        if value.startswith("obs:") and column not in known:
            close = closest_names(column, known, n=1)
            raise UsageError(
                f"{model.name} takes the {field} of each cell from the obs column {column!r}, which "
                f"{', '.join(map(str, source.paths))} lacks"
                + (f" (did you mean {close[0]!r}?)" if close else f"; it has {join_names(known) or 'no columns'}")
                + f"; give --model-option {field}=obs:COLUMN, or one value for all cells, --model-option {field}=VALUE"
            )
