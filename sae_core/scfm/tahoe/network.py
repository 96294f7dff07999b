"""Tahoe-x1: the sum of a gene and a binned-value embedding, pre-norm blocks, a final norm, `<cls>` as the cell token.

    x = LN(Emb(gene)) + LN(W2 act(W1 min(v, 512)))               no positions
    x = x + A(LN x);   x = x + W_down act(W_up LN x);            n_layers blocks with attention A
    LN x                                                         site "final"

A hidden gene has a vector of its own (row 1 of `flag_encoder`) in the place of its value's. The input of the token of a
drug (3B) is LN(proj(act(fc(fingerprint)))). The cell embedding is the output of the final norm at `<cls>`,
L2-normalised. The pretraining heads predict the value of a hidden gene, and the loss is the mean of their errors:

    expression_decoder   v_hat = W_out act(W x_gene)                                       from the gene's own token
    mvc_decoder          v_hat = (W sigmoid(W_q LN(Emb(gene)))) . x_cls / sqrt(d_model)    from the cell token

In pretraining with `use_attn_mask` (70M, 1.3B) every position attends to the visible tokens, and a hidden gene to
itself too; without it (3B) all tokens attend to all. With nothing hidden the two are the same. Each activation function
is that of its part of model_config.yml.

Module names are those of the checkpoint without the prefix `model.`, but for `up_proj` and `down_proj` of a block,
which are `linear1` and `linear2` here. Weights that no activation needs are not read and listed in `ignored_weights`:
the drug encoder where no drug is given, and heads other than the two above. Any other unexpected or missing weight is
an error. All sites, both heads and the drug's token are equal to 1e-5 to an implementation in torch's stock layers.

Gandhi et al. 2025, Tahoe-x1: Scaling Perturbation-Trained Single-Cell Foundation Models to 3 Billion Parameters,
10.1101/2025.10.23.683759.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights, refuse_adapters
from sae_core.errors import CheckpointError
from sae_core.json_fields import JsonFields
from sae_core.scfm.batches import Batch
from sae_core.scfm.encoder import Activation, EncoderBlock
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, hide_values, sample_masked_genes
from sae_core.scfm.tahoe.parts import (
    ACTIVATIONS,
    CellValueDecoder,
    DrugEncoder,
    ExpressionDecoder,
    GeneEncoder,
    ValueEncoder,
)
from sae_core.scfm.tahoe.tokenizer import Drugs, TahoeTokenizer
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

EMBEDDING = "gene_encoder.embedding.weight"
FINGERPRINTS = "chem_encoder.embedding.weight"
_PREFIX = re.compile(r"^((module|model|_orig_mod)\.)+")
_RENAMES = ((".up_proj.", ".linear1."), (".down_proj.", ".linear2."))
_UNUSED = re.compile(r"^(?!(expression_decoder|mvc_decoder)\.|\w*(encoder|embed|norm))")
"""Weights that neither activations nor the pretraining loss need: heads, but no unknown norm or input embedding."""
_LAYER = re.compile(r"^transformer_encoder\.layers\.(\d+)\.")
_LARGE = 100_000_000
"""Number of weights above which the network is built without memory of its own, which costs a second or more."""


@dataclass(frozen=True, kw_only=True)
class TahoeConfig:
    """Settings of the network and the tokenizer, from `model_config.yml` and `collator_config.yml`."""

    n_layers: int
    n_heads: int
    d_model: int
    d_hidden: int
    activation: Activation
    eps: float
    gene_norm: bool
    value_norm: bool
    value_activation: str
    max_value: float
    """Larger values are set to this one before they are embedded."""
    head_layers: int
    head_activation: str
    is_mvc_scaled: bool | None
    """Whether `mvc_decoder` divides by sqrt(d_model); None: the model has no such head."""
    drug_activation: str | None
    """Activation of the drug encoder; None: the model has none."""
    use_attn_mask: bool
    """Whether no other position attends to a hidden gene in the pretraining task."""
    n_bins: int
    right_binning: bool
    max_length: int
    """Tokens of a cell, special ones included."""
    pad_value: float
    mask_value: float
    mask_fraction: float
    keep_first: int
    """Number of first tokens that the authors' collator neither bins nor leaves out."""

    @classmethod
    def from_fields(cls, model: JsonFields, collator: JsonFields) -> TahoeConfig:
        """Config from the two files; fields that the network does not need are ignored.

        A field that is absent has the default of the authors' code.

        Raises:
            CheckpointError: a field is missing or has a value that is not allowed, or the network is of another form
                than the one here; the message names file, field and value.
        """
        attention, norm, value, gene, head, mvc, drug = (
            _part(model, name)
            for name in (
                "attn_config",
                "norm_config",
                "expression_encoder",
                "gene_encoder",
                "expression_decoder",
                "mvc",
                "chemical_encoder",
            )
        )
        n_heads, d_model = model.whole("n_heads"), model.whole("d_model")
        if d_model % n_heads:
            raise model.wrong("n_heads", f"a divisor of d_model {d_model}")
        _check_form(model, attention, norm, value, gene, head, mvc, collator, n_heads=n_heads)
        fraction = collator.number("mlm_probability", 0.5)
        if not 0 < fraction < 1:
            raise collator.wrong("mlm_probability", "a number between 0 and 1")
        pad_value, mask_value = collator.number("pad_value"), collator.number("mask_value")
        if mask_value >= 0 or mask_value == pad_value:
            raise collator.wrong("mask_value", f"a number below 0 that is not the pad_value {pad_value:g}")
        return cls(
            n_layers=model.whole("n_layers"),
            n_heads=n_heads,
            d_model=d_model,
            d_hidden=int(d_model * model.number("expansion_ratio")),
            activation=cast("Activation", model.choice("transformer_activation", "gelu", get_args(Activation))),
            eps=norm.number("eps", 1e-5),
            gene_norm=gene.flag("use_norm", False),
            value_norm=value.flag("use_norm", False),
            value_activation=value.choice("activation", "relu", list(ACTIVATIONS)),
            max_value=value.number("max_value", 512.0),
            head_layers=head.whole("n_layers", 2),
            head_activation=head.choice("activation", "leaky_relu", list(ACTIVATIONS)),
            is_mvc_scaled=mvc.flag("scaled_dot_product", False) if model.has("mvc") else None,
            drug_activation=drug.choice("activation", "leaky_relu", list(ACTIVATIONS))
            if model.has("chemical_encoder")
            else None,
            use_attn_mask=attention.flag("use_attn_mask", True),
            n_bins=collator.whole("num_bins", 51, at_least=3),
            right_binning=collator.flag("right_binning", False),
            max_length=collator.whole("max_length", at_least=2),
            pad_value=pad_value,
            mask_value=mask_value,
            mask_fraction=fraction,
            keep_first=collator.whole("keep_first_n_tokens", 1),
        )


def _part(fields: JsonFields, name: str) -> JsonFields:
    """The fields of a table, whose notes are those of the file."""
    part = JsonFields(fields.table(name), file=f"{fields.file}, {name}")
    part.notes = fields.notes
    return part


def _check_form(
    model: JsonFields,
    attention: JsonFields,
    norm: JsonFields,
    value: JsonFields,
    gene: JsonFields,
    head: JsonFields,
    mvc: JsonFields,
    collator: JsonFields,
    *,
    n_heads: int,
) -> None:
    """Check the fields that say that the network or its input is of another form than here."""
    model.choice("norm_scheme", "pre", ["pre"])
    model.choice("cell_emb_style", "cls", ["cls"])
    for fields, name, needed in (
        (model, "use_glu", False),
        (model, "standard_scale_outputs", False),
        (collator, "do_binning", True),
        (collator, "log_transform", False),
        (collator, "sampling", True),
    ):
        if fields.flag(name, needed) is not needed:
            raise fields.wrong(name, str(needed).lower())
    if attention.whole("kv_n_heads", n_heads) != n_heads:
        raise attention.wrong("kv_n_heads", f"the n_heads of the model, {n_heads}")
    if str(norm.values.get("norm_type", "layernorm")).lower() not in ("layernorm", "low_precision_layernorm"):
        raise norm.wrong("norm_type", "'layernorm' or 'low_precision_layernorm'")
    value.choice("input_emb_style", "continuous", ["continuous"])
    if gene.values.get("embeddings"):
        raise gene.wrong("embeddings", "none: only a network without further gene embeddings can be read")
    if head.whole("n_outputs", 1) != 1:
        raise head.wrong("n_outputs", "1")
    if model.has("mvc"):
        mvc.choice("arch_style", "inner product", ["inner product"])
        mvc.choice("query_activation", "sigmoid", ["sigmoid"])


class _TransformerEncoder(nn.Module):
    def __init__(self, c: TahoeConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderBlock(
                d_model=c.d_model,
                n_heads=c.n_heads,
                d_hidden=c.d_hidden,
                eps=c.eps,
                norm_place="pre",
                activation=c.activation,
            )
            for _ in range(c.n_layers)
        )
        self.norm = nn.LayerNorm(c.d_model, eps=c.eps)


class Tahoe(FoundationModel):
    """The Tahoe-x1 network with its tokenizer; `load_model` builds it from a checkpoint folder.

    Attributes:
        drugs: the drug that each cell is given; None: the input has no token for it.
    """

    family = "tahoe"
    predicts_in_place = True
    readouts = ("cls", "mean")

    def __init__(
        self,
        config: TahoeConfig,
        vocabulary: Vocabulary,
        *,
        n_rows: int,
        has_decoder: bool = True,
        has_mvc: bool = True,
        drugs: Drugs | None = None,
        fingerprints: tuple[int, int] = (1, 1),
        n_raw: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary, self.drugs, self.n_rows = config, vocabulary, drugs, n_rows
        self.mask_fraction = config.mask_fraction
        self.max_genes = config.max_length - (1 if drugs is None else 2)
        self.name, self.digest = "tahoe", ""
        self.d_model, self.n_layers = config.d_model, config.n_layers
        d_model = config.d_model
        self.gene_encoder = GeneEncoder(n_tokens=n_rows, d_model=d_model, with_norm=config.gene_norm)
        self.flag_encoder = nn.Embedding(2, d_model)
        self.expression_encoder = ValueEncoder(
            d_model=d_model,
            activation=config.value_activation,
            max_value=config.max_value,
            with_norm=config.value_norm,
        )
        self.chem_encoder: DrugEncoder | None = None
        if drugs is not None:
            n_drugs, n_bits = fingerprints
            self.chem_encoder = DrugEncoder(
                n_drugs=n_drugs, n_bits=n_bits, d_model=d_model, activation=config.drug_activation or "leaky_relu"
            )
            self.context = MappingProxyType({"drug": drugs.chosen})
        self.transformer_encoder = _TransformerEncoder(config)
        self.expression_decoder: ExpressionDecoder | None = None
        if has_decoder:
            self.expression_decoder = ExpressionDecoder(
                d_model=d_model, n_layers=config.head_layers, activation=config.head_activation
            )
        self.mvc_decoder: CellValueDecoder | None = None
        if has_mvc and config.is_mvc_scaled is not None:
            self.mvc_decoder = CellValueDecoder(d_model=d_model, is_scaled=config.is_mvc_scaled)
        self.tokenizer = TahoeTokenizer(
            cls_id=vocabulary.id_of("<cls>"),
            special_value=config.pad_value,
            n_bins=config.n_bins,
            right_binning=config.right_binning,
            max_length=config.max_length,
            n_raw=n_raw,
        )

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.transformer_encoder.layers))

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self.transformer_encoder.norm

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Gene embedding plus that of the value, or of "hidden"; the drug's vector at the place of the drug."""
        is_drug = gene_id >= self.n_rows
        genes = self.gene_encoder(gene_id if self.chem_encoder is None else gene_id.masked_fill(is_drug, 0))
        is_hidden = (value == self.config.mask_value)[..., None]
        x: Tensor = genes + torch.where(is_hidden, self.flag_encoder.weight[1], self.expression_encoder(value))
        if self.chem_encoder is not None:
            drug = self.chem_encoder(gene_id[is_drug] - self.n_rows)
            x = x.index_put((is_drug,), drug.to(x.dtype))
        return x

    def key_mask(self, batch: Batch) -> Bool[Tensor, "row position"] | Bool[Tensor, "row position key"] | None:
        """A hidden gene attends to itself, though no other position does where `use_attn_mask` is set."""
        is_hidden = batch.value == self.config.mask_value
        if not self.config.use_attn_mask or batch.key_mask is None or not is_hidden.any():
            return batch.key_mask
        itself = torch.eye(is_hidden.shape[1], dtype=torch.bool, device=is_hidden.device)
        mask: Tensor = batch.key_mask[:, None] | (is_hidden[:, :, None] & itself)
        return mask

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
        """`<cls>`, the drug where the model is given one, and the genes of each cell (`TahoeTokenizer`)."""
        drug = None if self.drugs is None else self.drugs.of_cells(len(indptr) - 1, obs)
        return self.tokenizer(indptr, indices, data, match, seed=seed, max_tokens=max_tokens, drug=drug)

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row d_model"]:
        """The `<cls>` token, L2-normalised; or the mean over gene tokens."""
        return masked_mean(x, is_gene) if readout == "mean" else F.normalize(x[:, 0], dim=-1)

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Hide the values of genes; with `use_attn_mask` no other token attends to a hidden gene."""
        is_masked = sample_masked_genes(tokens, seed=seed, fraction=fraction)
        return hide_values(tokens, is_masked, value=self.config.mask_value, is_query_only=self.config.use_attn_mask)

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Bin of each hidden gene, predicted by `expression_decoder` from the gene's own token."""
        if self.expression_decoder is None:
            raise self._lacks_head("the expression decoder")
        found: Tensor = self.expression_decoder(x[masked.row, masked.column])
        return found

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Squared error of `expression_decoder`, or the mean with that of `mvc_decoder` if any, in squared bins."""
        error: Tensor = (self.predict_masked(x, batch, masked) - masked.target) ** 2
        if self.mvc_decoder is None:
            return error
        by_cell = self.mvc_decoder(x[masked.row, 0], self.gene_encoder(masked.gene_id))
        both: Tensor = (error + (by_cell - masked.target) ** 2) / 2
        return both

    @torch.no_grad()
    def reset_weights(self, *, seed: int) -> None:
        """Draw all weights but the drugs' fingerprints as the authors do: normal with variance 2 / fan-in, biases 0.

        The output projection of the attention is divided by sqrt(2 n_layers).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name == FINGERPRINTS:
                continue
            if "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                parameter.normal_(0.0, math.sqrt(2 / parameter.shape[1]), generator=generator)
                if "self_attn.out_proj" in name:
                    parameter.div_(math.sqrt(2 * self.n_layers))


def canonical_name(key: str) -> str:
    """Name of a weight in this package."""
    key = _PREFIX.sub("", key)
    for theirs, ours in _RENAMES:
        key = key.replace(theirs, ours)
    return key


def _official_name(key: str) -> str:
    """Name of a weight in the official files, for error messages."""
    for theirs, ours in _RENAMES:
        key = key.replace(ours, theirs) if key.startswith("transformer_encoder.") else key
    return f"model.{key}"


def tahoe_from_weights(
    config: TahoeConfig,
    vocabulary: Vocabulary,
    weights: Mapping[str, Tensor],
    *,
    drugs: Drugs | None = None,
    n_raw: int = 0,
) -> Tahoe:
    """Model with the given weights (by `canonical_name`), in float32 whatever dtype they have.

    Float32 weights are taken as they are and not copied.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape, or an adapter is among them; the message
            names it.
    """
    refuse_adapters(weights)
    _check_sizes(config, weights)
    ignored = {key for key in weights if _UNUSED.search(key)}
    if drugs is None and config.drug_activation is not None:
        ignored |= {key for key in weights if key.startswith("chem_encoder.")}
    if config.is_mvc_scaled is None:
        ignored |= {key for key in weights if key.startswith("mvc_decoder.")}
    n_rows, fingerprints = len(weights[EMBEDDING]), weights.get(FINGERPRINTS)
    is_large = sum(value.numel() for value in weights.values()) > _LARGE
    with torch.device("meta") if is_large else nullcontext(), torch.random.fork_rng(devices=[]):
        model = Tahoe(
            config,
            vocabulary,
            n_rows=n_rows,
            has_decoder=any(key.startswith("expression_decoder.") for key in weights),
            has_mvc=any(key.startswith("mvc_decoder.") for key in weights),
            drugs=drugs,
            fingerprints=(1, 1) if fingerprints is None else (len(fingerprints), fingerprints.shape[-1]),
            n_raw=n_raw,
        ).eval()
    used = {key: value.float() for key, value in weights.items() if key not in ignored}
    load_weights(model, used, what="model_config.yml", official=_official_name, assign=True)
    model.ignored_weights = tuple(sorted(_official_name(key) for key in ignored))
    return model


def _check_sizes(config: TahoeConfig, weights: Mapping[str, Tensor]) -> None:
    """Check the sizes that the weights tell, before a network is built that may not fit into memory.

    Raises:
        CheckpointError: there is no embedding, or a size is another one; the message names it.
    """
    rows = weights.get(EMBEDDING)
    if rows is None or rows.ndim != 2:
        raise CheckpointError(f"the weights lack model.{EMBEDDING}; give the weights of a Tahoe-x1 model")
    layers = [int(layer[1]) for key in weights if (layer := _LAYER.match(key))]
    up = weights.get("transformer_encoder.layers.0.linear1.weight")
    sizes = (
        ("d_model", config.d_model, rows.shape[1]),
        ("n_layers", config.n_layers, 1 + max(layers, default=-1)),
        ("d_model times expansion_ratio", config.d_hidden, config.d_hidden if up is None else len(up)),
    )
    if wrong := [f"{name} is {a} in model_config.yml and {b} in the weights" for name, a, b in sizes if a != b]:
        raise CheckpointError(
            f"the weights do not fit model_config.yml: {'; '.join(wrong)}; give this checkpoint's own"
        )
