"""Facts of a cell that go into a model beside its genes (`FoundationModel.context`): one value, or each cell's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sae_core.errors import TokenizationError

OF_CELLS = "obs:"
"""What a fact begins with that each cell has its own of; the name of a column of obs follows."""


def values_of_cells(field: str, chosen: str, n_cells: int, obs: Mapping[str, Sequence[str]] | None) -> Sequence[str]:
    """The value of a fact in each of `n_cells` cells: `chosen`, or those of the column of obs that it names.

    Raises:
        TokenizationError: `obs` lacks the column, or has not one value for each cell.
    """
    if not chosen.startswith(OF_CELLS):
        return [chosen] * n_cells
    column = chosen.removeprefix(OF_CELLS)
    values = () if obs is None else obs.get(column, ())
    if len(values) != n_cells:
        raise TokenizationError(
            f"the {field} of each cell comes from the obs column {column!r}, of which {len(values)} values were given "
            f"for {n_cells} cells; pass obs={{{column!r}: [the {field} of each cell]}}, or load the model with one "
            f"{field} for all cells"
        )
    return values
