"""What `FeatureStore.to_anndata` puts beside the codes: expression of genes, the map, and vectors of the model.

Expression comes from the table that associations store by gene, where it has all the cells; else the files of the data
set are read again, which gives the same values (`feature_store.cells.read_again`). Counts are in the files alone.
"""

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.activations import ActivationReader, cell_means
from feature_store.cells import ExpressionReader, counts_matrix, expression_matrix, read_again, read_panel
from feature_store.errors import InputError, QueryError
from feature_store.query.suggestions import did_you_mean
from feature_store.storage.commit import Run, is_intact
from feature_store.storage.layout import Layout
from feature_store.storage.plans import ActivationsPlan, CellsPlan, SAEPlan

ExpressionValues = Literal["lognorm", "counts"]
Cells = npt.NDArray[np.int64]


def gene_matrix(layout: Layout, dataset: str, cells: Cells, values: ExpressionValues) -> Any:
    """The expression of all genes in some cells (cell_idx, in any order): CSR float32 [n_cells n_genes].

    Raises:
        QueryError: `values` is neither, the data hold no counts, or their files cannot be read again.
    """
    if values not in get_args(ExpressionValues):
        hint = did_you_mean(str(values), get_args(ExpressionValues))
        raise QueryError(f"X was {values!r}{hint}; it is 'lognorm', 'counts' or None")
    wanted, place = np.unique(cells, return_inverse=True)
    found = _stored(layout, dataset, wanted) if values == "lognorm" else None
    matrix = _read_again(layout, dataset, wanted, values) if found is None else found
    return matrix if np.array_equal(wanted, cells) else matrix[place]


def _stored(layout: Layout, dataset: str, wanted: Cells) -> Any:
    """log1p(CP10k) as associations stored it; None where it was not made, or not of all these cells."""
    if not is_intact(layout.expression_dir(dataset)):
        return None
    panel = read_panel(layout.cells_dir(dataset))
    if not np.isin(wanted, panel).all():
        return None
    return ExpressionReader(Run.open(layout.expression_dir(dataset)), panel).rows(np.searchsorted(panel, wanted))


def _read_again(layout: Layout, dataset: str, wanted: Cells, values: ExpressionValues) -> Any:
    """The values as the files of the data set have them. QueryError with what can be done where they cannot be read."""
    plan = CellsPlan.of(Run.open(layout.cells_dir(dataset)))
    if values == "counts" and plan.value_kind != "counts":
        raise QueryError(
            f"X was 'counts', but the matrix that data set {dataset} was read from ({plan.matrix}) holds "
            "log-normalised values; take X='lognorm'"
        )
    try:
        with read_again(layout, dataset) as source:
            return counts_matrix(source, wanted) if values == "counts" else expression_matrix(source, wanted)
    except InputError as error:
        raise QueryError(f"{error}; or leave the expression out with X=None") from error


def map_of_cells(places: pl.DataFrame, cells: Cells) -> npt.NDArray[np.float32]:
    """The place of each cell on the map of the codes [n_cells 2], NaN for a cell that it lacks."""
    order = pl.DataFrame({"cell_idx": cells})
    found = order.join(places, on="cell_idx", how="left", maintain_order="left")
    return found.select(pl.col("x", "y").cast(pl.Float32).fill_null(float("nan"))).to_numpy()


def vectors_of_model(layout: Layout, sae: str | None, dataset: str, cells: Cells) -> npt.NDArray[np.float32] | None:
    """The mean activation of each cell [n_cells d_model], NaN for a cell outside the stored sample.

    None where the store has no activations of these cells: it has no SAE, another data set was encoded, or they were
    deleted.
    """
    if sae is None or not is_intact(layout.saes_dir(sae)):
        return None
    folder = layout.activations_dir(SAEPlan.of(Run.open(layout.saes_dir(sae))).activations)
    if not is_intact(folder) or ActivationsPlan.of(Run.open(folder)).dataset != dataset:
        return None
    return cell_means(ActivationReader(Run.open(folder)), cells)
