"""scFoundation: values embedded by soft bins, a post-norm encoder over the expressed genes, a final norm.

    x = SoftBins(value) + Pos(gene)                               (`soft_bins`)
    n_layers post-norm ReLU blocks, then the final norm (site "final")

T and S are the target and source total counts (`tokenizer`). The cell embedding is [S, T, max over genes,
mean over genes] of the final norm's output, 4 d_model numbers, where genes exclude T and S. Module names are those of
the checkpoint without the prefix `model.`. The Performer decoder (`decoder`) is needed by the pretraining
loss, not by activations.

Hao et al. 2024, scFoundation, 10.1038/s41592-024-02305-7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights
from sae_core.json_fields import JsonFields
from sae_core.scfm.batches import Batch
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.foundation import FINAL, FoundationModel, masked_mean
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, sample_masked_genes
from sae_core.scfm.scfoundation.decoder import Performer
from sae_core.scfm.scfoundation.tokenizer import T4, Resolution, ScFoundationTokenizer
from sae_core.scfm.soft_bins import SoftBins
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

TARGET, SOURCE = "<T>", "<S>"
_ENCODER = ("token_emb.", "pos_emb.", "encoder.")
_DECODER = ("decoder.", "decoder_embed.", "norm.", "to_final.")
_SIZES = ("hidden_dim", "depth", "heads")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the Performer decoder."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int


@dataclass(frozen=True, kw_only=True)
class ScFoundationConfig:
    """Settings of the network, from the checkpoint's config."""

    n_layers: int
    n_heads: int
    d_model: int
    n_genes: int
    n_bins: int
    bin_alpha: float
    pad_value: float
    mask_value: float
    decoder: DecoderConfig | None

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> ScFoundationConfig:
        """Config from one part of `models.ckpt`: the model's config, overridden by the data set's.

        Raises:
            CheckpointError: the config is of another model or encoder, or a key is missing.
        """
        fields = JsonFields(config, file="the checkpoint's config")
        name = fields.choice("model", None, ["mae_autobin"])
        model = _inner(fields, "model_config", name)
        merged = JsonFields({**model, **_inner(fields, "dataset_config", "rnaseq")}, file=fields.file)
        encoder = JsonFields(merged.table("encoder"), file=f"{fields.file}, encoder")
        encoder.choice("module_type", "transformer", ["transformer"])
        d_model, n_layers, n_heads = (encoder.whole(size) for size in _SIZES)
        if d_model % n_heads:
            raise encoder.wrong("heads", f"a divisor of hidden_dim {d_model}")
        return cls(
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_genes=merged.whole("seq_len", at_least=3) - 2,
            n_bins=merged.whole("bin_num"),
            bin_alpha=merged.number("bin_alpha"),
            pad_value=merged.number("pad_token_id"),
            mask_value=merged.number("mask_token_id"),
            decoder=_decoder_config(merged) if merged.has("decoder") else None,
        )


def _inner(fields: JsonFields, name: str, key: str) -> Mapping[str, Any]:
    """Table `key` in table `name`."""
    return JsonFields(fields.table(name), file=f"{fields.file}, {name}").table(key)


def _decoder_config(merged: JsonFields) -> DecoderConfig | None:
    fields = JsonFields(merged.table("decoder"), file=f"{merged.file}, decoder")
    if fields.values.get("module_type", "performer") != "performer":
        return None
    d_model, n_layers, n_heads = (fields.whole(size) for size in _SIZES)
    return DecoderConfig(d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_head=fields.whole("dim_head", 64))


class _Encoder(nn.Module):
    def __init__(self, c: ScFoundationConfig) -> None:
        super().__init__()
        self.transformer_encoder = nn.ModuleList(
            EncoderBlock(d_model=c.d_model, n_heads=c.n_heads, d_hidden=4 * c.d_model) for _ in range(c.n_layers)
        )
        self.norm = nn.LayerNorm(c.d_model)


class ScFoundation(FoundationModel):
    """The scFoundation network with its tokenizer; `load_model` builds it from a checkpoint folder."""

    family = "scfoundation"
    readouts = ("all", "mean", "max", "source", "target")
    mask_fraction = 0.3

    def __init__(
        self,
        config: ScFoundationConfig,
        vocabulary: Vocabulary,
        *,
        with_decoder: bool = True,
        resolution: Resolution = T4,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.name, self.digest = "scfoundation", ""
        self.d_model, self.n_layers = config.d_model, config.n_layers
        self.token_emb = SoftBins(
            n_bins=config.n_bins,
            d_model=config.d_model,
            alpha=config.bin_alpha,
            pad_value=config.pad_value,
            mask_value=config.mask_value,
        )
        self.pos_emb = nn.Embedding(config.n_genes + 3, config.d_model)
        self.encoder = _Encoder(config)
        self.decoder: Performer | None = None
        if with_decoder and (c := config.decoder) is not None:
            self.decoder = Performer(n_layers=c.n_layers, d_model=c.d_model, n_heads=c.n_heads, d_head=c.d_head)
            self.decoder_embed = nn.Linear(config.d_model, c.d_model)
            self.norm, self.to_final = nn.LayerNorm(c.d_model), nn.Linear(c.d_model, 1)
        self.tokenizer = ScFoundationTokenizer(
            target_id=vocabulary.id_of(TARGET), source_id=vocabulary.id_of(SOURCE), resolution=resolution
        )

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.encoder.transformer_encoder))

    @property
    def final_norm(self) -> nn.Module:
        """The encoder's norm after the last block."""
        return self.encoder.norm

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Value embedding (soft bins) plus gene embedding."""
        return cast("Tensor", self.token_emb(value) + self.pos_emb(gene_id))

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
        """Expressed genes of each cell, then T and S (`ScFoundationTokenizer`)."""
        return self.tokenizer(indptr, indices, data, match, seed=seed, max_tokens=max_tokens)

    def width(self, readout: str) -> int:
        """Length of the cell embedding: 4 d_model for "all", else d_model."""
        return self.d_model * (4 if readout == "all" else 1)

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row width"]:
        """Readout "all" gives [S, T, max over genes, mean over genes], the official cell embedding; others one part."""
        row, n_genes = torch.arange(len(x), device=x.device), is_gene.sum(1)
        # a cell's tokens are its genes, then T, then S
        part = {
            "source": x[row, n_genes + 1],
            "target": x[row, n_genes],
            "max": x.masked_fill(~is_gene[:, :, None], -torch.inf).amax(1),
            "mean": masked_mean(x, is_gene),
        }
        return torch.cat([part[name] for name in part], dim=1) if readout == "all" else part[readout]

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Mask expressed genes by taking them out of the encoder's input; their log1p CP10k is to be predicted."""
        is_masked = sample_masked_genes(tokens, seed=seed, fraction=fraction)
        n_masked = np.bincount(tokens.cell_of_token()[is_masked], minlength=tokens.n_cells)
        offsets = np.concatenate([[0], np.cumsum(tokens.lengths - n_masked)]).astype(np.int64)
        unmasked = Tokens(
            offsets=offsets,
            gene_id=tokens.gene_id[~is_masked],
            value=tokens.value[~is_masked],
            is_special=tokens.is_special[~is_masked],
        )
        return MaskedGeneTask(
            tokens=unmasked,
            cell=tokens.cell_of_token()[is_masked],
            gene_id=tokens.gene_id[is_masked],
            target=tokens.value[is_masked],
        )

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """log1p CP10k of each masked gene by the decoder, whose input has zeros for genes that are not expressed."""
        if self.decoder is None:
            raise self._lacks_head("the decoder")
        mask_vector = self.token_emb(x.new_full((1,), self.config.mask_value))[0]
        found = torch.zeros_like(masked.target)
        for row in range(len(x)):
            here, real = masked.row == row, batch.is_real[row]
            hidden = masked.gene_id[here]
            decoded = self._decoded(x[row][real], batch.gene_id[row][real], (hidden, mask_vector))
            found[here] = self.to_final(decoded[hidden])[:, 0]
        return found

    def _decoded(
        self,
        x: Float[Tensor, "token d_model"],
        gene_id: Int64[Tensor, " token"],
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "vocabulary d_decoder"]:
        """The decoder's vectors of all genes, T and S, given the encoder's of a cell's own tokens.

        `masked` are the genes that are hidden from the encoder, and the vector in their place.
        """
        assert self.decoder is not None
        places = self.pos_emb.weight[: self.config.n_genes + 2]
        full = self.token_emb(x.new_zeros(1)).expand(len(places), -1).clone()
        if masked is not None:
            full[masked[0]] = masked[1]
        full[gene_id] = x.to(full.dtype)
        return cast("Tensor", self.norm(self.decoder(self.decoder_embed(full + places))))

    @torch.no_grad()
    def gene_embeddings(self, tokens: Tokens, *, max_batch_tokens: int = 8192) -> Float[Tensor, "cell gene d_decoder"]:
        """Vector of every gene of the model in each cell, from the decoder: upstream's output type "gene".

        The part "gene" of the checkpoint is meant for it. A full-size cell takes about 20 s on one core and 40 MB; a
        cell without tokens has NaN.

        Raises:
            ConfigError: the checkpoint has no weights of the decoder.
        """
        if self.decoder is None or self.config.decoder is None:
            raise self._lacks_head("the decoder")
        n_genes = self.config.n_genes
        out = torch.full((tokens.n_cells, n_genes, self.config.decoder.d_model), torch.nan)
        encoded = self.activations(tokens, ["final"], max_batch_tokens=max_batch_tokens)[FINAL]
        device = self.pos_emb.weight.device
        for cell in np.flatnonzero(tokens.lengths):
            here = slice(*tokens.offsets[cell : cell + 2].tolist())
            ids = torch.from_numpy(tokens.gene_id[here]).to(device)
            out[cell] = self._decoded(encoded[here].to(device), ids)[:n_genes].float().cpu()
        return out

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Squared error of each prediction, in squared log1p CP10k."""
        return (self.predict_masked(x, batch, masked) - masked.target) ** 2

    @torch.no_grad()
    def reset_weights(self, *, seed: int) -> None:
        """Torch's initialisation of linear and embedding modules, and new random features of the decoder."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            elif "emb" in name.partition(".")[0] and "mlp" not in name and "decoder" not in name:
                parameter.normal_(generator=generator)
            else:
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
        for name, buffer in self.named_buffers():
            if name.endswith("projection_matrix"):
                buffer.normal_(generator=generator)


def scfoundation_from_weights(
    config: ScFoundationConfig,
    vocabulary: Vocabulary,
    weights: Mapping[str, Tensor],
    *,
    resolution: Resolution = T4,
) -> ScFoundation:
    """Model with the weights of one part of `models.ckpt`, whose names may have the prefix `model.`.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape, or an adapter is among them.
    """
    named = {_canonical(key): value.float() for key, value in weights.items()}
    has_decoder = any(key.startswith(_DECODER) for key in named)
    network = _ENCODER if config.decoder is None else (*_ENCODER, *_DECODER)
    ignored = tuple(sorted(key for key in named if not key.startswith(network)))
    with torch.random.fork_rng(devices=[]):
        model = ScFoundation(config, vocabulary, with_decoder=has_decoder, resolution=resolution).eval()
    load_weights(
        model, {key: value for key, value in named.items() if key not in ignored}, what="the config", official=_official
    )
    model.ignored_weights = ignored
    return model


def _official(name: str) -> str:
    """Name of a weight in the official files, for error messages."""
    return "model." + name.replace(".self_attn.Wqkv.", ".self_attn.in_proj_")


def _canonical(key: str) -> str:
    name = key.split("model.")[1] if "model." in key else key
    return name.replace(".self_attn.in_proj_", ".self_attn.Wqkv.")
