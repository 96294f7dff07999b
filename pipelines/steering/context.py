"""The model, data and SAE that every job of steering needs, loaded together, with the tokens of any cells."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_store.storage import commit
from feature_store.storage.layout import Layout, as_path
from pipelines.forward import BLOCK_TOKENS, cut_cells
from pipelines.inputs import load_recorded_model, load_recorded_source, load_stored_sae

if TYPE_CHECKING:
    from sae_core.scfm import Tokens

_GAP_CELLS = 16
"""Gaps of up to this number of cells between two chosen ones are read too: a read costs as much as about 16 rows."""
Cells = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SteeringPaths:
    """The paths of model, data and SAE, as plain values that Ray can send to an actor.

    Attributes:
        activations, sae: the folders of the runs.
        store, dataset: the root of the store, and the data set in it.
        site: the activation point that the SAE reads.
        seed: the seed of the tokens, as in the extraction.
        device: "cpu" or "cuda".
    """

    activations: str
    sae: str
    store: str
    dataset: str
    site: str
    seed: int
    device: str


class Block(NamedTuple):
    """A block of cells of bounded size: their cell_idx [n], ascending, and their tokens."""

    cells: Cells
    tokens: "Tokens"


class SteeringContext:
    """The model, data and SAE of a `SteeringPaths`, loaded once in each actor."""

    def __init__(self, paths: SteeringPaths) -> None:
        from sae_core.scfm import Site

        self.paths = paths
        layout = Layout(paths.store)
        self.model = load_recorded_model(commit.Run.open(paths.activations), device=paths.device)
        self.source = load_recorded_source(layout, paths.dataset, stage="steer")
        self.match = self.model.match_genes(self.source.gene_symbols, self.source.ensembl_ids)
        self.sae = load_stored_sae(as_path(paths.sae), device=paths.device)
        self.site = Site.parse(paths.site)

    def blocks(self, cells: Cells) -> Iterator[Block]:
        """The tokens of the cells (ascending cell_idx), in blocks of at most BLOCK_TOKENS tokens, or of one cell."""
        for chosen in np.split(cells, np.flatnonzero(np.diff(cells) > _GAP_CELLS) + 1):
            if not len(chosen):
                continue
            start, stop = int(chosen[0]), int(chosen[-1]) + 1
            rows = self.source.read_rows(start, stop)
            shape = (stop - start, self.source.n_genes)
            own = sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=shape)[chosen - start]
            tokens = self.model.tokenize(own.indptr, own.indices, own.data, self.match, seed=self.paths.seed)
            for low, high in cut_cells(tokens.lengths, BLOCK_TOKENS):
                yield Block(chosen[low:high], tokens.cells(low, high))
