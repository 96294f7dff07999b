"""What every job of steering needs, loaded together: the SAE, and the model with the tokens of any cells.

Where the SAE was trained on given vectors of cells there is no model: the vectors themselves are edited, and what comes
out of an edit is its result (`sae_core.steering.SteeredVectors`). The two contexts have the same methods.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.cells import StoredObs
from feature_store.storage import commit
from feature_store.storage.layout import Layout, as_path
from pipelines.cell_tokens import tokens_of_cells
from pipelines.encode import activations_of
from pipelines.external.vector_files import READ_ROWS
from pipelines.external.vectors import NO_GENE, VectorsJob
from pipelines.forward import BLOCK_TOKENS, cut_cells
from pipelines.genes import recorded_match
from pipelines.inputs import load_recorded_model, load_recorded_source, load_stored_sae

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.sae import SparseAutoencoder
    from sae_core.scfm import Tokens
    from sae_core.steering import SteeredModel, SteeredVectors
    from sae_core.steering.masks import MaskedPatch

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
        stage: the command that reads the data set again, which errors name.
        vectors: the given vectors that are steered: the folder of an activations run that holds those of all cells, or
            where to read them; None if a model is steered.
    """

    activations: str
    sae: str
    store: str
    dataset: str
    site: str
    seed: int
    device: str
    stage: str
    vectors: str | VectorsJob | None


class Block(NamedTuple):
    """A block of cells of bounded size: their cell_idx [n], ascending, their tokens, and the activations of these, if
    they are given and not computed [n_tokens d_model].
    """

    cells: Cells
    tokens: "Tokens"
    given: "Tensor | None" = None


class SteeringContext:
    """The model, data and SAE of a `SteeringPaths`, loaded once in each actor.

    Attributes:
        sae: the autoencoder.
        device: where it runs.
    """

    def __init__(self, paths: SteeringPaths) -> None:
        from sae_core.scfm import Site

        layout = Layout(paths.store)
        activations = commit.Run.open(paths.activations)
        self.device, self._seed = paths.device, paths.seed
        self.model = load_recorded_model(activations, device=paths.device)
        self.source = load_recorded_source(layout, paths.dataset, stage=paths.stage)
        self.match = recorded_match(activations, self.model, self.source)
        self._stored_obs = StoredObs(layout.cells_dir(paths.dataset))
        self.sae: SparseAutoencoder = load_stored_sae(as_path(paths.sae), device=paths.device)
        self.site = Site.parse(paths.site)

    def blocks(self, cells: Cells) -> Iterator[Block]:
        """The tokens of the cells (ascending cell_idx), in blocks of at most BLOCK_TOKENS tokens, or of one cell."""
        for chosen in np.split(cells, np.flatnonzero(np.diff(cells) > _GAP_CELLS) + 1):
            if not len(chosen):
                continue
            tokens = tokens_of_cells(
                self.model, self.source, self.match, chosen, seed=self._seed, stored=self._stored_obs
            )
            for low, high in cut_cells(tokens.lengths, BLOCK_TOKENS):
                yield Block(chosen[low:high], tokens.cells(low, high))

    def activations(self, block: Block) -> "Tensor":
        """The activations of the tokens of a block at the site, float32 [n_tokens d_model], in host memory."""
        return self.model.activations(block.tokens, [self.site])[self.site].float()

    def running(self, block: Block) -> "SteeredModel":
        """The model with the cells of a block, encoded at the site."""
        from sae_core.steering import SteeredModel

        return SteeredModel(self.model, block.tokens, self.sae, self.site, is_part=True)

    def embeddings(
        self, running: "SteeredModel | SteeredVectors", steering: "MaskedPatch | None", readout: str | None
    ) -> npt.NDArray[np.float32]:
        """The embeddings of the cells of `running` under `steering` [n_cells width]; None leaves them unsteered."""
        from sae_core.steering import SteeredModel

        assert isinstance(running, SteeredModel)
        assert readout is not None
        site = self.model.readout_site(self.site)
        embedded: npt.NDArray[np.float32] = running.embeddings(steering, [site], readout=readout)[site].float().numpy()
        return embedded


class VectorsContext:
    """The given vectors and the SAE of a `SteeringPaths`, with the methods of `SteeringContext`.

    Attributes:
        sae: the autoencoder.
        device: where it runs.
    """

    def __init__(self, paths: SteeringPaths) -> None:
        assert paths.vectors is not None
        self.device = paths.device
        self.sae: SparseAutoencoder = load_stored_sae(as_path(paths.sae), device=paths.device)
        self._vectors = activations_of(paths.vectors)

    def blocks(self, cells: Cells) -> Iterator[Block]:
        """The vectors of the cells (ascending cell_idx), as the one token of each cell, in blocks of READ_ROWS."""
        import torch

        from sae_core.scfm import Tokens

        for low in range(0, len(cells), READ_ROWS):
            chosen = cells[low : low + READ_ROWS]
            x = np.concatenate([block.act_f32() for block in self._vectors.blocks(chosen)])
            tokens = Tokens(
                offsets=np.arange(len(chosen) + 1),
                gene_id=np.full(len(chosen), NO_GENE, np.int64),
                value=np.zeros(len(chosen), np.float32),
                is_special=np.zeros(len(chosen), dtype=bool),
            )
            yield Block(chosen, tokens, torch.from_numpy(x))

    def activations(self, block: Block) -> "Tensor":
        """The vectors of a block, float32 [n_cells d_model]."""
        assert block.given is not None
        return block.given

    def running(self, block: Block) -> "SteeredVectors":
        """The encoded vectors of a block."""
        from sae_core.steering import SteeredVectors

        return SteeredVectors(self.activations(block), self.sae)

    def embeddings(
        self, running: "SteeredModel | SteeredVectors", steering: "MaskedPatch | None", readout: str | None
    ) -> npt.NDArray[np.float32]:
        """The steered vectors, which are their own output."""
        from sae_core.steering import SteeredVectors

        assert isinstance(running, SteeredVectors)
        assert readout is None
        steered: npt.NDArray[np.float32] = running.steered(steering).numpy()
        return steered


def open_context(paths: SteeringPaths) -> SteeringContext | VectorsContext:
    """Load what `paths` name: a model, or given vectors."""
    return SteeringContext(paths) if paths.vectors is None else VectorsContext(paths)
