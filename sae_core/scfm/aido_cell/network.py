"""AIDO.Cell: soft bins of all genes of a cell, zeros too, pre-norm blocks with a gated feed-forward part, a final norm.

    x = SoftBins(value) + Pos(gene)
    x = x + A(N x);   x = x + W_down (silu(W_gate N x) * W_up N x);   n_layers blocks with attention A
    N x                                                               site "final"
    v_hat = w . N(gelu(W x)) + b                                      head: log1p CP10k of the gene

N is an RMSNorm or a LayerNorm, as the config says. Everything attends to everything: the authors' code takes an
attention mask and never uses it. The cell embedding is the mean of the final norm's output over the genes that the data
measure and the two depth places.

With 19,266 places a cell, one block takes 8 s of two CPU threads at d_model 128 and 36 s at 640: on a CPU the model
runs in miniature, or on chosen genes (`GeneMatch.only`), which leaves the other places out and is not the authors'.

Ho et al. 2024, Scaling Dense Representations for Single Cell Gene Expression with Transcriptome-Scale Context, AI for
New Drug Modalities (NeurIPS workshop). The published files were not seen: what they may differ in is taken from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights, refuse_adapters, renamed
from sae_core.errors import CheckpointError
from sae_core.json_fields import JsonFields
from sae_core.scfm.aido_cell.tokenizer import N_DEPTH, AIDOCellTokenizer
from sae_core.scfm.batches import Batch
from sae_core.scfm.encoder import EncoderBlock, Norm, stack_query_key_value
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, hide_values, sample_masked_genes
from sae_core.scfm.soft_bins import SoftBins
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

_NORMS: dict[str, Norm] = {"RMSNorm": "rms", "LayerNorm": "layer"}
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^((module|_orig_mod|model)\.)+", ""),
        (r"^bert\.", ""),
        (r"^gene_embedding\.linear1\.", "values.mlp."),
        (r"^gene_embedding\.linear2\.", "values.mlp2."),
        (r"^gene_embedding\.lookup_table\.", "values.emb."),
        (r"^gene_embedding\.mask_embedding\.", "values.emb_mask."),
        (r"^gene_embedding\.pad_embedding\.", "values.emb_pad."),
        (r"^position_embedding\.", "position."),
        (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layer\.", "layers."),
        (r"^(layers\.\d+)\.attention\.ln\.", r"\1.norm1."),
        (r"^(layers\.\d+)\.attention\.self\.", r"\1.self_attn."),
        (r"^(layers\.\d+)\.attention\.output\.dense\.", r"\1.self_attn.out_proj."),
        (r"^(layers\.\d+)\.ln\.", r"\1.norm2."),
        (r"^(layers\.\d+)\.mlp\.gate_proj\.", r"\1.gate."),
        (r"^(layers\.\d+)\.mlp\.up_proj\.", r"\1.linear1."),
        (r"^(layers\.\d+)\.mlp\.down_proj\.", r"\1.linear2."),
        (r"^cls\.predictions\.transform\.dense\.", "head.dense."),
        (r"^cls\.predictions\.transform\.LayerNorm\.", "head.norm."),
        (r"^cls\.predictions\.decoder\.weight$", "head.decoder.weight"),
        (r"^cls\.predictions\.(decoder\.)?bias$", "head.decoder.bias"),
    )
)
_OFFICIAL = (
    (r"^values\.mlp\.", "bert.gene_embedding.linear1."),
    (r"^values\.mlp2\.", "bert.gene_embedding.linear2."),
    (r"^values\.emb\.", "bert.gene_embedding.lookup_table."),
    (r"^values\.emb_(mask|pad)\.", r"bert.gene_embedding.\1_embedding."),
    (r"^position\.", "bert.position_embedding."),
    (r"^norm\.", "bert.encoder.ln."),
    (r"^layers\.", "bert.encoder.layer."),
    (r"\.norm1\.", ".attention.ln."),
    (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
    (r"\.self_attn\.Wqkv\.(.*)", r".attention.self.query.\1 (or its key or value)"),
    (r"\.self_attn\.", ".attention.self."),
    (r"\.norm2\.", ".ln."),
    (r"\.gate\.", ".mlp.gate_proj."),
    (r"\.linear1\.", ".mlp.up_proj."),
    (r"\.linear2\.", ".mlp.down_proj."),
    (r"^head\.dense\.", "cls.predictions.transform.dense."),
    (r"^head\.norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^head\.decoder\.", "cls.predictions.decoder."),
)
_UNUSED = re.compile(r"^(?!values\.|position\.|layers\.|norm\.|head\.|gene_embedding\.|encoder\.)")
"""Weights that neither activations nor the pretraining loss need: whatever lies outside encoder and head."""


@dataclass(frozen=True, kw_only=True)
class AIDOCellConfig:
    """Settings of the network, from a Hugging Face `config.json`."""

    n_layers: int
    n_heads: int
    d_model: int
    d_hidden: int
    n_genes: int
    n_bins: int
    bin_alpha: float
    eps: float
    norm: Norm
    has_bias: bool
    mask_value: float
    pad_value: float
    init_std: float

    @classmethod
    def from_fields(cls, fields: JsonFields) -> AIDOCellConfig:
        """Config from the fields of a `config.json`.

        Raises:
            CheckpointError: a field is missing or wrong, or activation or positions are not AIDO.Cell's.
        """
        fields.choice("hidden_act", "swiglu", ["swiglu"])
        fields.choice("position_embedding_type", "absolute", ["absolute"])
        n_heads, d_model = fields.whole("num_attention_heads"), fields.whole("hidden_size")
        if d_model % n_heads:
            raise fields.wrong("num_attention_heads", f"a divisor of hidden_size {d_model}")
        return cls(
            n_layers=fields.whole("num_hidden_layers"),
            n_heads=n_heads,
            d_model=d_model,
            d_hidden=fields.whole("intermediate_size"),
            n_genes=fields.whole("max_position_embeddings"),
            n_bins=fields.whole("bin_num"),
            bin_alpha=fields.number("bin_alpha"),
            eps=fields.number("layer_norm_eps", 1e-5),
            norm=_NORMS[fields.choice("normalization_type", None, list(_NORMS))],
            has_bias=fields.flag("add_linear_bias"),
            mask_value=fields.number("mask_token_id", -1.0),
            pad_value=fields.number("pad_token_id", -2.0),
            init_std=fields.number("initializer_range", 0.02),
        )


def _norm(c: AIDOCellConfig, *, is_layer: bool | None = None) -> nn.Module:
    as_layer = c.norm == "layer" if is_layer is None else is_layer
    return (nn.LayerNorm if as_layer else nn.RMSNorm)(c.d_model, eps=c.eps)


class ValueHead(nn.Module):
    """Pretraining head: the value of a gene from the encoder's output at its place."""

    def __init__(self, c: AIDOCellConfig, *, has_layer_norm: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(c.d_model, c.d_model)
        self.norm = _norm(c, is_layer=has_layer_norm)
        self.decoder = nn.Linear(c.d_model, 1)

    def forward(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
        """log1p CP10k."""
        found: Tensor = self.decoder(self.norm(F.gelu(self.dense(x))))[:, 0]
        return found


class AIDOCell(FoundationModel):
    """The AIDO.Cell network with its tokenizer; `load_model` builds it from a checkpoint folder."""

    family = "aido-cell"
    predicts_in_place = True
    readouts = ("measured", "mean")
    mask_fraction = 0.3

    def __init__(
        self,
        config: AIDOCellConfig,
        vocabulary: Vocabulary,
        *,
        has_head: bool = True,
        has_value_bias: bool = True,
        head_has_layer_norm: bool = False,
    ) -> None:
        super().__init__()
        c = self.config = config
        self.vocabulary = vocabulary
        self.name, self.digest = "aido-cell", ""
        self.d_model, self.n_layers = c.d_model, c.n_layers
        self.values = SoftBins(
            n_bins=c.n_bins,
            d_model=c.d_model,
            alpha=c.bin_alpha,
            pad_value=c.pad_value,
            mask_value=c.mask_value,
            bias=has_value_bias,
        )
        self.position = nn.Embedding(c.n_genes + N_DEPTH, c.d_model)
        self.layers = nn.ModuleList(
            EncoderBlock(
                d_model=c.d_model,
                n_heads=c.n_heads,
                d_hidden=c.d_hidden,
                eps=c.eps,
                norm_place="pre",
                norm=c.norm,
                activation="silu",
                is_gated=True,
                attention_bias=c.has_bias,
                mlp_bias=c.has_bias,
            )
            for _ in range(c.n_layers)
        )
        self.norm = _norm(c)
        self.head = ValueHead(c, has_layer_norm=head_has_layer_norm) if has_head else None
        self.tokenizer = AIDOCellTokenizer(n_genes=c.n_genes)

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.layers))

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self.norm

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Value embedding (soft bins) plus the vector of the gene, or of the depth's place."""
        return cast("Tensor", self.values(value) + self.position(gene_id))

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
        """All genes of the model, then the depth twice (`AIDOCellTokenizer`)."""
        return self.tokenizer(indptr, indices, data, match, seed=seed, max_tokens=max_tokens)

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row d_model"]:
        """Mean over the measured genes, with ("measured", the official one) or without ("mean") the depth places."""
        if readout == "mean":
            return masked_mean(x, is_gene)
        # the depth is at the last places of a cell, and all cells of a batch are of one length (`AIDOCellTokenizer`)
        with_depth = is_gene.clone()
        with_depth[:, -N_DEPTH:] = True
        return masked_mean(x, with_depth)

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Hide the values of expressed genes; zeros stay, because most places are zeros."""
        expressed = replace(tokens, is_special=tokens.is_special | (tokens.value == 0))
        is_masked = sample_masked_genes(expressed, seed=seed, fraction=fraction)
        return hide_values(tokens, is_masked, value=self.config.mask_value)

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """log1p CP10k of each hidden gene, from its own place."""
        if self.head is None:
            raise self._lacks_head("the head")
        found: Tensor = self.head(x[masked.row, masked.column])
        return found

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Squared error of each prediction, in squared log1p CP10k."""
        return (self.predict_masked(x, batch, masked) - masked.target) ** 2

    @torch.no_grad()
    def reset_weights(self, *, seed: int) -> None:
        """BERT's initialisation: normal weights of `initializer_range`, zero biases, unit norms."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=self.config.init_std, generator=generator)


def aido_cell_from_weights(config: AIDOCellConfig, vocabulary: Vocabulary, weights: Mapping[str, Tensor]) -> AIDOCell:
    """Model with the weights of a checkpoint; heads of other tasks are not read.

    Whether the value embedding has biases, and which norm the head has, the weights tell.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape, an adapter is among them, or the two
            stored biases of the head differ.
    """
    refuse_adapters(weights)
    named = _canonical_weights(weights)
    ignored = tuple(sorted(key for key in named if _UNUSED.search(key)))
    used = {key: value for key, value in named.items() if key not in ignored}
    position = used.get("position.weight")
    if position is not None and len(position) != config.n_genes + N_DEPTH:
        raise CheckpointError(
            f"bert.position_embedding.weight has {len(position)} rows and config.json max_position_embeddings "
            f"{config.n_genes}, which needs {config.n_genes + N_DEPTH}; give the config.json of this checkpoint"
        )
    with torch.random.fork_rng(devices=[]):
        model = AIDOCell(
            config,
            vocabulary,
            has_head=any(key.startswith("head.") for key in used),
            has_value_bias="values.mlp.bias" in used,
            head_has_layer_norm="head.norm.bias" in used,
        ).eval()
    load_weights(model, used, what="config.json", official=_official)
    model.ignored_weights = ignored
    return model


def _canonical_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float32 by the names of the modules here, with query, key and value in one matrix."""
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = renamed(key, _RENAMES)
        if name == "head.decoder.bias" and name in named and not torch.equal(named[name], value.float()):
            raise CheckpointError("cls.predictions.bias and cls.predictions.decoder.bias differ; allowed: one bias")
        named[name] = value.float()
    return stack_query_key_value(named)


def _official(name: str) -> str:
    """Name of a weight in the official files, for error messages."""
    for own, official in _OFFICIAL:
        name = re.sub(own, official, name)
    return name
