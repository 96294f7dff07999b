"""The forward pass of the foundation model over some cells, in blocks of bounded memory.

A block holds whole cells of at most BLOCK_TOKENS tokens together (or one cell), so an actor holds one block
of activations per site however large its shard is: 67 MB at d_model 512. The blocks depend on the cells of the shard
alone, so a resumed shard runs the same batches as an undisturbed one and gives the same bits. If memory runs out, the
batch is halved and the number of halvings is reported; such a shard agrees with an undisturbed one to rounding (1e-5),
not to the bit. Extraction stores the blocks; fused encoding encodes them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feature_store.cells import StoredObs, open_source
from feature_store.storage.addresses import RemotePath
from pipelines.cell_tokens import tokens_of_cells
from pipelines.errors import RunFailedError

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.scfm import FoundationModel, Site, Tokens

Cells = npt.NDArray[np.int64]
READ_CELLS = 256
BLOCK_TOKENS = 32_768


@dataclass(frozen=True, kw_only=True)
class ForwardJob:
    """The data set, the model and the options of a forward pass; it holds plain values, so it can be pickled.

    Attributes:
        data, matrix, where: files of the data set, the matrix in them, and the condition by which cells are taken.
        rows: folders of those matrices that were turned (`Source.rows`).
        model, model_options, random_init: the model, and the options of its family.
        precision, device: the dtype of the model's matrix products and where it runs.
        tokens_per_cell: gene tokens kept of each cell, drawn from (seed, cell); None keeps all.
        genes: the model's tokens of the genes that go in; None: all that it knows.
        readout: None keeps tokens; otherwise one vector per cell is kept, by this readout of the model.
        batch_tokens: most tokens of one forward pass.
        cells: folder of the cell table, of which a model takes columns of obs; None: those of the files.
    """

    data: tuple[str | RemotePath, ...]
    matrix: str
    where: str | None
    rows: tuple[str, ...]
    model: str
    model_options: Mapping[str, str]
    random_init: bool
    precision: str
    device: str
    tokens_per_cell: int | None
    readout: str | None
    seed: int
    batch_tokens: int
    genes: tuple[int, ...] | None = None
    cells: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """Activations of some cells, a row per token (or cell); float32 `act[site]` [n_tokens d_model] in RAM."""

    cell_idx: npt.NDArray[np.int64]
    token_pos: npt.NDArray[np.int32]
    gene_id: npt.NDArray[np.int32]
    act: dict["Site", npt.NDArray[np.float32]] = field(repr=False)

    @property
    def n_tokens(self) -> int:
        """Number of rows."""
        return len(self.cell_idx)


class Forward:
    """A data set and a model that are opened once and run over any ranges of cells.

    Attributes:
        halvings: how often memory has run out and the batch was halved.
    """

    def __init__(self, job: ForwardJob) -> None:
        from sae_core.scfm import load_model

        self.job = job
        self.model: FoundationModel = load_model(
            job.model,
            device=job.device,
            autocast=autocast_of(job.precision),
            random_init=job.random_init,
            options=job.model_options,
        )
        self.source = open_source(job.data, matrix=job.matrix, where=job.where, rows=job.rows)
        self.match = self.model.match_genes(self.source.gene_symbols, self.source.ensembl_ids)
        if job.genes is not None:
            self.match = self.match.only(np.array(job.genes, dtype=np.int64))
        self._stored_obs = StoredObs(job.cells) if self.model.obs_columns and job.cells is not None else None
        self.batch_tokens = job.batch_tokens
        self.halvings = 0

    def blocks(self, cells: Cells, sites: "tuple[Site, ...]") -> Iterator[Block]:
        """Yield the activations of the cells (ascending cell_idx) in order; cells without a gene known to the model
        have no rows.

        Raises:
            RunFailedError: one cell alone does not fit into memory.
        """
        for low in range(0, len(cells), READ_CELLS):
            read = cells[low : low + READ_CELLS]
            tokens = tokens_of_cells(
                self.model, self.source, self.match, read, seed=self.job.seed, stored=self._stored_obs
            )
            for first, last in cut_cells(tokens.lengths, BLOCK_TOKENS):
                yield self._block(tokens.cells(first, last), read[first:last], sites)

    def _block(self, tokens: "Tokens", cells: Cells, sites: "tuple[Site, ...]") -> Block:
        if self.job.readout is not None:
            return self._pooled_block(tokens, cells, sites, self.job.readout)
        chosen = choose_tokens(tokens, self.job.tokens_per_cell, cells=cells, seed=self.job.seed)
        cell = tokens.cell_of_token()[chosen]
        found = self._within_memory(
            tokens, lambda: self.model.activations(tokens, sites, max_batch_tokens=self.batch_tokens)
        )
        return Block(
            cell_idx=cells[cell],
            token_pos=(chosen - tokens.offsets[cell]).astype(np.int32),
            gene_id=tokens.gene_id[chosen].astype(np.int32),
            act={site: act[chosen].float().numpy() for site, act in found.items()},
        )

    def _pooled_block(self, tokens: "Tokens", cells: Cells, sites: "tuple[Site, ...]", readout: str) -> Block:
        found = self._within_memory(
            tokens,
            lambda: self.model.embeddings(tokens, sites, readout=readout, max_batch_tokens=self.batch_tokens),
        )
        cell = np.flatnonzero(np.bincount(tokens.cell_of_token()[~tokens.is_special], minlength=tokens.n_cells))
        return Block(
            cell_idx=cells[cell],
            token_pos=np.zeros(len(cell), np.int32),
            # careful: a row for a whole cell has no gene; an id past the vocabulary's end matches none
            gene_id=np.full(len(cell), len(self.model.vocabulary.tokens), np.int32),
            act={site: act[cell].float().numpy() for site, act in found.items()},
        )

    def _within_memory(self, tokens: "Tokens", run: Any) -> "dict[Site, Tensor]":
        """Call `run`, halving the batch each time that memory runs out."""
        while True:
            try:
                found: dict[Site, Tensor] = run()
                return found
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                longest = int(tokens.lengths.max())
                if self.batch_tokens <= longest:
                    raise RunFailedError(
                        f"memory ran out on a batch of one cell ({longest} tokens, on {self.job.device}): {error}; "
                        "give the actors more memory, fewer --num-actors on a node, or --precision bf16, and run again"
                    ) from error
            self.batch_tokens = max(self.batch_tokens // 2, longest)
            self.halvings += 1


def cut_cells(lengths: npt.NDArray[np.int64], max_tokens: int) -> list[tuple[int, int]]:
    """Return ranges [first, last) of consecutive cells, of at most `max_tokens` tokens each or of one cell."""
    ranges, first, total = [], 0, 0
    for cell, length in enumerate(lengths.tolist()):
        if cell > first and total + length > max_tokens:
            ranges.append((first, cell))
            first, total = cell, 0
        total += length
    return [*ranges, (first, len(lengths))] if len(lengths) else []


def choose_tokens(tokens: "Tokens", per_cell: int | None, *, cells: Cells, seed: int) -> npt.NDArray[np.int64]:
    """Return the positions of the gene tokens to keep, ascending: all, or `per_cell` drawn from (seed, cell_idx)."""
    genes = np.flatnonzero(~tokens.is_special)
    if per_cell is None:
        return genes
    kept = []
    cell = tokens.cell_of_token()[genes]
    bounds = np.searchsorted(cell, np.arange(tokens.n_cells + 1))
    for i in range(tokens.n_cells):
        own = genes[bounds[i] : bounds[i + 1]]
        if len(own) > per_cell:
            own = np.sort(np.random.default_rng([seed, int(cells[i])]).choice(own, per_cell, replace=False))
        kept.append(own)
    return np.concatenate(kept) if kept else genes


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or in host memory."""
    import torch

    # careful: torch has a class for GPU memory alone; the host allocator raises a bare RuntimeError
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text


def autocast_of(precision: str) -> Any:
    """Return the torch dtype of `--precision`, or None for that of the weights."""
    import torch

    return {"f32": None, "bf16": torch.bfloat16}[precision]


def rate(total: Mapping[str, int], seconds: float) -> str:
    """Return the text beside the progress bar: cells/s, tokens/s, GB written, and halvings if memory ran out."""
    per_second = f"{total['cells'] / seconds:,.0f} cells/s {total['tokens'] / seconds:,.0f} tokens/s"
    halved = f" (out of memory: batch halved {total['halvings']} times)" if total["halvings"] else ""
    return f"{per_second} {total['bytes'] / 1e9:,.2f} GB{halved}"


def out_of_memory_fact(total: Mapping[str, int]) -> dict[str, str]:
    """Return a line of the result with the number of halvings, or nothing if memory never ran out."""
    n = total.get("halvings", 0)
    return {"out of memory": f"the batch was halved {n} times; --batch-tokens starts lower"} if n else {}
