"""UCE: sentences of genes by chromosome, protein vectors as input, a post-norm encoder, a decoder on the cell token.

    t = row of the token / |row|;   x = sqrt(d) LN(gelu(W t + b)) + sinusoid(position)
    n_layers post-norm ReLU blocks (eps 1e-5), no final norm
    decoder(x) = W4 h3 + b4, h_i = gelu(LN(W_i h_(i-1) + b_i)), h_0 = x;   cell = decoder(x_cls) / |decoder(x_cls)|

Nothing of the input depends on a count but which genes are drawn (`tokenizer`). GELU is the exact one. The rows come
from a frozen table (`table`). As the projection of a row is the same wherever it stands, each distinct row of a batch
is fetched and projected once. Attention leaves padding out; upstream adds 1 - mask to the scores as a number, so there
a padded position is a key with a bonus of 1, and a cell depends on the longest sentence of its batch. At batch size 1
upstream has no padding, and agrees with this module.

Module names are those of the official files, but for torch's `in_proj_` in the blocks. `binary_decoder` and
`gene_embedding_layer` predict whether a gene is expressed, given a cell. The authors publish no code that trains or
uses them, so it is not known how genes were hidden; they are not read, and there is no masked-gene prediction.

Equal to torch's own encoder layers to 1e-5 at every site, alone and in batches, and so is the cell (tested).
Rosen et al. 2023, Universal Cell Embeddings, 10.1101/2023.11.28.568918.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights
from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm.batches import Batch
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.uce.table import TokenTable
from sae_core.scfm.uce.tokenizer import UCETokenizer
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

N_HEADS = 20
"""Attention heads of both official models; the weights do not tell the number."""
N_DRAWS, N_POSITIONS = 1_024, 1_536
"""Genes drawn of a cell, and positions, of both official models."""
TABLE = "pe_embedding.weight"
_LAYER = re.compile(r"^transformer_encoder\.layers\.(\d+)\.")
_UNUSED = re.compile(r"^gene_embedding_layer\.|^(?!decoder\.|\w*(encoder|embed|norm))")
"""Weights that no activation needs: heads, but no unknown norm or part of the input embedding."""
_SIZES = {
    "d_model": ("encoder.0.weight", 0),
    "d_token": ("encoder.0.weight", 1),
    "n_positions": ("pos_encoder.pe", 0),
    "d_hidden": ("transformer_encoder.layers.0.linear1.weight", 0),
    "d_first": ("decoder.0.0.weight", 0),
    "d_output": ("decoder.3.weight", 0),
}
"""The tensor, and its axis, from which each size is taken."""


@dataclass(frozen=True, kw_only=True)
class UCEConfig:
    """Sizes of the network; the official files have no settings, so all are those of the weights."""

    n_layers: int
    d_model: int
    d_token: int
    d_hidden: int
    d_first: int
    """Width of the first layer of the decoder; the others have `d_output`."""
    d_output: int
    n_positions: int

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> UCEConfig:
        """Sizes of a state dict, by official names.

        Raises:
            CheckpointError: a tensor that tells a size is missing or has too few axes, or the width of the model is no
                multiple of the number of heads.
        """
        sizes = {}
        for name, (key, axis) in _SIZES.items():
            tensor = weights.get(key)
            if tensor is None or tensor.ndim <= axis:
                state = "lack" if tensor is None else f"have in shape {tuple(tensor.shape)}"
                raise CheckpointError(f"the weights {state} {key}; give the state dict of a UCE model")
            sizes[name] = tensor.shape[axis]
        layers = {int(found[1]) for key in weights if (found := _LAYER.match(key))}
        if sizes["d_model"] % N_HEADS:
            raise CheckpointError(
                f"encoder.0.weight has {sizes['d_model']} outputs, the width of the model; allowed: a multiple of "
                f"{N_HEADS}, the number of attention heads in the authors' code"
            )
        return cls(n_layers=max(layers) + 1, **sizes)

    @property
    def n_draws(self) -> int:
        """Genes drawn of a cell: 1,024; of a model with fewer positions (a miniature) in proportion to these."""
        return max(1, min(N_DRAWS, self.n_positions * N_DRAWS // N_POSITIONS))


class _Positions(nn.Module):
    """Sinusoids of the positions, as the checkpoint has them."""

    pe: Float[Tensor, "position 1 d_model"]

    def __init__(self, c: UCEConfig) -> None:
        super().__init__()
        self.register_buffer("pe", torch.empty(c.n_positions, 1, c.d_model))


class _TransformerEncoder(nn.Module):
    def __init__(self, c: UCEConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderBlock(d_model=c.d_model, n_heads=N_HEADS, d_hidden=c.d_hidden) for _ in range(c.n_layers)
        )


def _decoder_layer(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_out), nn.LayerNorm(d_out), nn.GELU())


class UCE(FoundationModel):
    """The UCE network with its tokenizer; `load_model` builds it from a checkpoint folder.

    Attributes:
        table: the rows of the tokens, in host memory.
    """

    family = "uce"
    readouts = ("cls", "mean")
    # careful: nothing is hidden in this family (`mask_genes`), so the share is that of no task
    mask_fraction = 0.0
    kept_of_long_cells = "genes that are drawn with replacement, in proportion to log1p of their counts"

    def __init__(self, config: UCEConfig, vocabulary: Vocabulary, table: TokenTable, tokenizer: UCETokenizer) -> None:
        super().__init__()
        self.config, self.vocabulary, self.table, self.tokenizer = config, vocabulary, table, tokenizer
        self.name, self.digest = "uce", ""
        self.d_model, self.n_layers, self.max_genes = config.d_model, config.n_layers, tokenizer.n_draws
        self.encoder = nn.Sequential(nn.Linear(config.d_token, config.d_model), nn.GELU(), nn.LayerNorm(config.d_model))
        self.pos_encoder = _Positions(config)
        self.transformer_encoder = _TransformerEncoder(config)
        self.decoder = nn.Sequential(
            _decoder_layer(config.d_model, config.d_first),
            _decoder_layer(config.d_first, config.d_output),
            _decoder_layer(config.d_output, config.d_output),
            nn.Linear(config.d_output, config.d_output),
        )

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.transformer_encoder.layers))

    def match_genes(self, symbols: Sequence[str], ensembl_ids: Sequence[str] | None = None) -> GeneMatch:
        """Token of each gene of a data set; symbols match in upper case, as upstream compares them.

        Raises:
            VocabularyError: no gene is in the vocabulary, or the two sequences differ in length.
        """
        upper = ((symbol, str(symbol).upper()) for symbol in symbols)
        return self.vocabulary.match([u if u in self.vocabulary else s for s, u in upper], ensembl_ids)

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """sqrt(d) LN(gelu(W t + b)) + sinusoid of the position; the value is not used."""
        distinct, where = torch.unique(gene_id, return_inverse=True)
        weight = cast("Tensor", self.encoder[0].weight)
        rows = self.table[distinct.cpu()].to(device=weight.device, dtype=weight.dtype)
        projected = self.encoder(F.normalize(rows, dim=-1)) * self.d_model**0.5
        x: Tensor = projected[where] + self.pos_encoder.pe[: gene_id.shape[1], 0]
        return x

    def tokenize(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        seed: int,
        max_tokens: int | None = None,
        obs: Mapping[str, Sequence[str]] | None = None,
    ) -> Tokens:
        """A sentence of drawn genes for each cell (`UCETokenizer`)."""
        return self.tokenizer(indptr, indices, data, match, seed=seed, max_tokens=max_tokens)

    def width(self, readout: str) -> int:
        """Length of the cell embedding: that of the decoder for "cls", else d_model."""
        return self.config.d_output if readout == "cls" else self.d_model

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row width"]:
        """The decoder's output at `<cls>`, L2-normalised (official); or the mean over the gene tokens.

        In the mean a gene counts as often as it was drawn.
        """
        return masked_mean(x, is_gene) if readout == "mean" else F.normalize(self.decoder(x[:, 0]), dim=-1)

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Refused, as there is no masked-gene task (module docstring).

        Raises:
            ConfigError: always.
        """
        raise self._no_task()

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Refused, as there is no masked-gene task.

        Raises:
            ConfigError: always.
        """
        raise self._no_task()

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Refused, as there is no masked-gene task.

        Raises:
            ConfigError: always.
        """
        raise self._no_task()

    def _no_task(self) -> ConfigError:
        return ConfigError(
            f"{self.name} is a UCE model, whose authors publish no way to hide and predict genes, so it has no "
            "pretraining loss and no masked-gene prediction; take a model of another family for it, e.g. scGPT"
        )

    @torch.no_grad()
    def reset_weights(self, *, seed: int) -> None:
        """Torch's initialisation of linear layers and unit norms; the table and the sinusoids stay as they are."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)


def canonical_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by official names, without the prefix that training on several devices adds."""
    return {key.removeprefix("module."): value for key, value in weights.items()}


def uce_from_weights(
    config: UCEConfig,
    vocabulary: Vocabulary,
    table: TokenTable,
    tokenizer: UCETokenizer,
    weights: Mapping[str, Tensor],
) -> UCE:
    """Model with the weights of a state dict (`canonical_weights`); its table is not among what is copied.

    Raises:
        CheckpointError: a weight is missing, unexpected, of another shape or not finite.
    """
    ignored = tuple(sorted(key for key in weights if _UNUSED.match(key)))
    used = {
        key.replace(".self_attn.in_proj_", ".self_attn.Wqkv."): value.float()
        for key, value in weights.items()
        if key not in ignored and key != TABLE
    }
    with torch.random.fork_rng(devices=[]):
        model = UCE(config, vocabulary, table, tokenizer).eval()
    load_weights(model, used, what="the sizes of its other weights", official=_official)
    model.ignored_weights = ignored
    return model


def _official(name: str) -> str:
    """Name of a weight in the official files, for error messages."""
    return name.replace(".self_attn.Wqkv.", ".self_attn.in_proj_")
