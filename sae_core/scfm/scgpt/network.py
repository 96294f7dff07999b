"""scGPT: the sum of a gene and a binned-value embedding, a post-norm encoder, `<cls>` as the cell token.

    x = LN(Emb(gene)) + LN(W2 relu(W1 min(v, 512)));    n_layers encoder blocks;    no positions, no final norm

The pretraining heads predict the value of a masked gene:

    decoder      v_hat = MLP(x_gene)                              from the gene's own token
    mvc_decoder  v_hat = (W sigmoid(W_q Emb(gene))) . x_cls       from the cell token

A fine-tuned checkpoint may add batch labels, which only the heads use (`batch_encoder`), and a batch norm of the input,
common (`bn`) or one per batch (`dsbn`). The batch is that of all cells (`batch_label` in args.json, or the option of
this name), or each cell's own by a column of obs (`BatchLabels`).

Module names are those of the official checkpoints (flash-attention naming), so a state dict loads without renaming;
torch's `in_proj_` naming and the levels `_impl.` and `module.` are renamed. Weights that no activation needs are not
read and listed in `ignored_weights`: classifiers, adversarial and zero-inflation heads, and a `decoder` or
`mvc_decoder` of another form than above ("concat query", "sum query", several modalities). Any other unexpected or
missing weight is an error.

Cui et al. 2024, scGPT, 10.1038/s41592-024-02201-0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights, refuse_adapters
from sae_core.errors import CheckpointError, ConfigError
from sae_core.json_fields import JsonFields
from sae_core.scfm.batches import Batch
from sae_core.scfm.binning import TieBreak
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, hide_values, sample_masked_genes
from sae_core.scfm.scgpt.parts import (
    BatchNorm,
    CellValueDecoder,
    DomainNorm,
    ExpressionDecoder,
    GeneEncoder,
    InputNorm,
    ValueEncoder,
)
from sae_core.scfm.scgpt.tokenizer import BatchLabels, ScGPTTokenizer
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

_RENAMES = (
    (re.compile(r"^((module|model|scgpt|_orig_mod)\.)+"), ""),
    # names of a mirror on the Hugging Face hub
    (re.compile(r"^gene_encoder\."), "encoder."),
    (re.compile(r"^transformer\."), "transformer_encoder."),
    (re.compile(r"^expr_decoder\."), "decoder."),
    (re.compile(r"self_attn\._impl\."), "self_attn."),
    (re.compile(r"self_attn\.in_proj_"), "self_attn.Wqkv."),
)
_UNUSED = re.compile(
    r"^(flag_encoder|mod_encoder|decoder\.zero_logit|mvc_decoder\.W_zero_logit)\."
    r"|^(?!(decoder|mvc_decoder|transformer_encoder|dsbn|bn)\.|\w*(encoder|embed|norm))"
)
"""Weights that neither activations nor the pretraining loss need: heads, but no unknown norm or input embedding."""
_LAYER = re.compile(r"^transformer_encoder\.layers\.(\d+)\.")
_SIZES = ("nlayers", "nheads", "embsize", "d_hid")
_TUTORIAL_NAMES = {"nheads": "nhead", "embsize": "layer_size", "d_hid": "layer_size"}
"""Names of sizes in the settings of the authors' tutorials of fine-tuning."""
_HEADS = ("decoder.", "mvc_decoder.")

Objective = Literal["masked", "query"]


@dataclass(frozen=True, kw_only=True)
class ScGPTConfig:
    """Settings of the network and the tokenizer, from `args.json`.

    `cls_value`, `tie_break`, `objective`, `batch_label` and `input_genes` (a file of the folder with the symbols of the
    genes that are fed) are keys that upstream's `args.json` does not have.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_hidden: int
    n_bins: int = 51
    max_seq_len: int = 1200
    pad_value: float = -2.0
    mask_value: float = -1.0
    value_clamp: float = 512.0
    """Larger values are set to this one before they are embedded."""
    cls_value: float = -2.0
    """Value of the `<cls>` token; upstream's embedding code gives it `pad_value`, upstream's tokenizer 0."""
    tie_break: TieBreak = "random"
    """Tied counts get a random bin among those that they span (upstream), or the midpoint of these (deterministic)."""
    objective: Objective = "masked"
    """Pretraining: other tokens attend to "masked" genes, and never attend to a "query" gene."""
    include_zeros: bool = False
    """Every gene that may go in and that the data has is a token of each cell, zeros included (fine-tuned)."""
    batch_label: int | None = None
    """Batch of a fine-tuned checkpoint to which the cells are assigned, where the checkpoint has batches."""

    def __post_init__(self) -> None:
        """Check sizes and choices.

        Raises:
            ConfigError: a size is not positive, n_heads does not divide d_model, or a choice is unknown.
        """
        sizes = {"n_layers": self.n_layers, "n_heads": self.n_heads, "d_model": self.d_model, "d_hidden": self.d_hidden}
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ConfigError(f"sizes were {wrong}; allowed: 1 or more")
        if self.d_model % self.n_heads or self.n_bins < 3 or self.max_seq_len < 2:
            raise ConfigError(
                f"n_heads was {self.n_heads} for d_model {self.d_model}, n_bins {self.n_bins}, max_seq_len "
                f"{self.max_seq_len}; allowed: n_heads a divisor of d_model, n_bins 3 or more, max_seq_len 2 or more"
            )
        choices = (("tie_break", self.tie_break, TieBreak), ("objective", self.objective, Objective))
        for name, value, allowed in choices:
            if value not in get_args(allowed):
                raise ConfigError(f"{name} was {value!r}; allowed: {', '.join(get_args(allowed))}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> ScGPTConfig:
        """Config from the content of an `args.json` (`from_fields`)."""
        return cls.from_fields(JsonFields(args, file="args.json"))

    @classmethod
    def from_fields(
        cls, fields: JsonFields, *, include_zeros: bool | None = None, batch_label: int | None = None
    ) -> ScGPTConfig:
        """Config from the fields of an `args.json`; those that the network does not need are ignored.

        `include_zeros` and `batch_label` take the place of what the file says of zeros and of the batch of all cells.

        Raises:
            CheckpointError: a field is missing or has a value that is not allowed, or the network is of another form
                than the one here; the message names field and value.
        """
        named = {name: fields.values[other] for name, other in _TUTORIAL_NAMES.items() if other in fields.values}
        fields.values = {**named, **fields.values}
        if missing := [name for name in _SIZES if name not in fields.values]:
            raise CheckpointError(f"{fields.file} lacks {', '.join(missing)}; give the args.json of an scGPT model")
        _check_form(fields)
        n_layers, n_heads, d_model, d_hidden = (fields.whole(name) for name in _SIZES)
        if d_model % n_heads:
            raise fields.wrong("nheads", f"a divisor of embsize {d_model}")
        pad_value = fields.number("pad_value", -2.0)
        # zeros of all genes of the data would not fit into a cell's input, so the choice of genes comes first
        of_file = fields.flag("include_zero_gene", False) and fields.has("input_genes")
        include_zeros = of_file if include_zeros is None else include_zeros
        if batch_label is None and fields.has("batch_label"):
            batch_label = fields.whole("batch_label", at_least=0)
        # the mini model records in args.json that it was trained with query genes
        objective = "query" if "n_queries" in fields.table("pretraining") else "masked"
        return cls(
            n_layers=n_layers,
            n_heads=n_heads,
            d_model=d_model,
            d_hidden=d_hidden,
            n_bins=fields.whole("n_bins", 51, at_least=3),
            max_seq_len=fields.whole("max_seq_len", 1200, at_least=2),
            pad_value=pad_value,
            mask_value=fields.number("mask_value", -1.0),
            cls_value=fields.number("cls_value", 0.0 if include_zeros else pad_value),
            tie_break=cast("TieBreak", fields.choice("tie_break", "random", get_args(TieBreak))),
            objective=cast("Objective", fields.choice("objective", objective, get_args(Objective))),
            include_zeros=include_zeros,
            batch_label=batch_label,
        )


def _check_form(fields: JsonFields) -> None:
    """Check the fields that say that values enter, or blocks are built, in another way than here."""
    fields.choice("input_emb_style", "continuous", ["continuous"])
    fields.choice("input_style", "binned", ["binned"])
    fields.choice("norm_scheme", "post", ["post"])
    if fields.flag("pre_norm", False):
        raise fields.wrong("pre_norm", "false")


class _TransformerEncoder(nn.Module):
    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderBlock(d_model=config.d_model, n_heads=config.n_heads, d_hidden=config.d_hidden)
            for _ in range(config.n_layers)
        )


class ScGPT(FoundationModel):
    """The scGPT network with its tokenizer; `load_model` builds it from a checkpoint, `ScGPT.empty` without weights.

    Attributes:
        batch_labels: where the batch of each cell comes from; None: all cells have that of the config, if any.
    """

    family = "scgpt"
    predicts_in_place = True
    readouts = ("cls", "mean")
    mask_fraction = 0.4

    def __init__(
        self,
        config: ScGPTConfig,
        vocabulary: Vocabulary,
        *,
        n_tokens: int,
        heads: Sequence[str] = _HEADS,
        norm: InputNorm | None = None,
        n_batches: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.batch_labels: BatchLabels | None = None
        self.max_genes = config.max_seq_len - 1
        self.name, self.digest = "scgpt", ""
        self.d_model, self.n_layers = config.d_model, config.n_layers
        self.encoder = GeneEncoder(n_tokens=n_tokens, d_model=config.d_model)
        self.value_encoder = ValueEncoder(d_model=config.d_model, clamp=config.value_clamp)
        self.transformer_encoder = _TransformerEncoder(config)
        d_model, with_batch = config.d_model, n_batches > 0
        self.decoder = ExpressionDecoder(d_model=d_model, with_batch=with_batch) if "decoder." in heads else None
        self.mvc_decoder = CellValueDecoder(d_model=d_model, with_batch=with_batch) if "mvc_decoder." in heads else None
        self.batch_encoder = GeneEncoder(n_tokens=n_batches, d_model=config.d_model) if n_batches else None
        self.bn = self.dsbn = None
        if norm is not None and norm.n_batches is None:
            self.bn = BatchNorm(config.d_model, affine=norm.affine)
        elif norm is not None:
            self.dsbn = DomainNorm(norm.n_batches or 0, d_model=config.d_model, affine=norm.affine)
        self.tokenizer = ScGPTTokenizer(
            cls_id=vocabulary.id_of("<cls>"),
            cls_value=config.cls_value,
            n_bins=config.n_bins,
            max_seq_len=config.max_seq_len,
            tie_break=config.tie_break,
            include_zeros=config.include_zeros,
        )

    @classmethod
    def empty(
        cls,
        config: ScGPTConfig,
        vocabulary: Vocabulary,
        *,
        n_tokens: int,
        heads: Sequence[str] = _HEADS,
        norm: InputNorm | None = None,
        n_batches: int = 0,
    ) -> ScGPT:
        """Model whose weights are still to be set, with `n_tokens` gene vectors and, if any, `n_batches` batch vectors.

        torch initialises its modules at random; the state of the global generator is restored. (The meta device would
        avoid this, but its first use imports sympy and dynamo: 1 to 2 s.)
        """
        with torch.random.fork_rng(devices=[]):
            return cls(config, vocabulary, n_tokens=n_tokens, heads=heads, norm=norm, n_batches=n_batches).eval()

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.transformer_encoder.layers))

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """LN(Emb(gene)) + LN(W2 relu(W1 min(v, 512))), then the checkpoint's batch norm where it has one."""
        genes = gene_id
        if (labels := self.batch_labels) is not None:
            genes = gene_id.masked_fill(gene_id >= labels.first_token, self.tokenizer.cls_id)
        x: Tensor = self.encoder(genes) + self.value_encoder(value)
        if self.dsbn is not None:
            x = self._normed_by_batch(x, gene_id)
        return x if self.bn is None else self.bn(x)

    def _normed_by_batch(
        self, x: Float[Tensor, "row position d_model"], gene_id: Int64[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Input normed by the batch of its cell: with statistics of the tuning, so that cells do not meet."""
        norms, label = cast("DomainNorm", self.dsbn).bns, self._label_of_cell(gene_id)
        normed = torch.empty_like(x)
        for batch in sorted(set(label.tolist())):
            own = label == batch
            normed[own] = norms[batch](x[own])
        return normed

    def _label_of_cell(self, gene_id: Int64[Tensor, "row position"]) -> Int64[Tensor, " row"]:
        """Batch of each cell: that which its first token tells, or that of all cells."""
        if self.batch_labels is None:
            return gene_id.new_full((len(gene_id),), cast("int", self.config.batch_label))
        return gene_id[:, 0] - self.batch_labels.first_token

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
        """`<cls>` and the genes of each cell with binned values (`ScGPTTokenizer`)."""
        cls = None if self.batch_labels is None else self.batch_labels.cls_of_cells(len(indptr) - 1, obs)
        return self.tokenizer(indptr, indices, data, match, seed=seed, max_tokens=max_tokens, cls=cls)

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row d_model"]:
        """The `<cls>` token, L2-normalised; or the mean over gene tokens (upstream's avg-pool includes padding)."""
        return masked_mean(x, is_gene) if readout == "mean" else F.normalize(x[:, 0], dim=-1)

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Mask genes by `mask_value`; their bin is to be predicted. No token attends to them where they are queries."""
        is_masked = sample_masked_genes(tokens, seed=seed, fraction=fraction)
        return hide_values(
            tokens, is_masked, value=self.config.mask_value, is_query_only=self.config.objective == "query"
        )

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Bin of each masked gene, predicted by `decoder` from the gene's own token."""
        if self.decoder is None:
            raise self._lacks_head("the decoder")
        own = self._with_batch_vector(x[masked.row, masked.column], batch, masked)
        found: Tensor = self.decoder(own[None])[0]
        return found

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Squared error of `decoder`, plus that of `mvc_decoder` where the checkpoint has one, in squared bins."""
        error = (self.predict_masked(x, batch, masked) - masked.target) ** 2
        if self.mvc_decoder is not None:
            cell = self._with_batch_vector(x[masked.row, 0], batch, masked)
            by_cell = self.mvc_decoder(cell, self.encoder(masked.gene_id)[:, None])[:, 0]
            error = error + (by_cell - masked.target) ** 2
        return error

    def _with_batch_vector(
        self, x: Float[Tensor, "masked_gene d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, "masked_gene d_head"]:
        """Input of a head: activations, followed by the vector of the cell's batch where the checkpoint has batches."""
        if self.batch_encoder is None:
            return x
        if self.config.batch_label is None and self.batch_labels is None:
            raise ConfigError(_which_batch(self.name, self.batch_encoder.embedding.num_embeddings, None))
        label = self._label_of_cell(batch.gene_id)[masked.row]
        return torch.cat([x, self.batch_encoder(label)], dim=-1)

    def reset_weights(self, *, seed: int) -> None:
        """Draw all weights anew (`init_weights`)."""
        init_weights(self, seed=seed)


def scgpt_from_weights(
    config: ScGPTConfig, vocabulary: Vocabulary, weights: Mapping[str, Tensor], *, batch_column: str | None = None
) -> ScGPT:
    """Model with the given weights, in float32 whatever dtype they have; the batch of each cell is in `batch_column`.

    Raises:
        ConfigError: a batch is chosen, and the checkpoint has none, or not that one.
        CheckpointError: a weight is missing, unexpected or of another shape, an adapter is among them, or there are
            more or fewer gene vectors than tokens; the message names it.
    """
    named = {canonical_name(key): value for key, value in weights.items()}
    refuse_adapters(named)
    if any(key.startswith("pert_encoder.") for key in named):
        raise CheckpointError(
            "the weights hold pert_encoder: a checkpoint tuned to predict perturbations, whose input marks the "
            "perturbed genes and takes values that are not binned; give a checkpoint of the encoder without it"
        )
    rows = named.get("encoder.embedding.weight")
    if rows is None or rows.ndim != 2:
        raise CheckpointError("the weights lack encoder.embedding.weight; give the state dict of an scGPT checkpoint")
    if len(rows) != len(vocabulary):
        raise CheckpointError(
            f"the weights have vectors of {len(rows)} tokens but vocab.json names {len(vocabulary)}; give this "
            "checkpoint's vocab.json"
        )
    _check_sizes(config, named)
    heads, n_batches, ignored = _heads(config, named)
    used = {key: value.float() for key, value in named.items() if key not in ignored}
    norm = _input_norm(used)
    n_norms = 0 if norm is None else norm.n_batches or 0
    if batch_column is not None:
        if not (n_norms or n_batches):
            raise ConfigError(
                f"batch_label was {batch_column}, but the checkpoint has neither a norm nor a vector of each batch; "
                "leave batch_label out"
            )
    elif n_norms and config.batch_label not in range(n_norms):
        raise CheckpointError(_which_batch("the checkpoint", n_norms, config.batch_label))
    model = ScGPT.empty(config, vocabulary, n_tokens=len(rows), heads=heads, norm=norm, n_batches=n_batches)
    load_weights(model, used, what="args.json")
    if batch_column is not None:
        _take_batches_of_cells(model, batch_column, n_norms or n_batches)
    model.ignored_weights = tuple(sorted(ignored))
    return model


def _take_batches_of_cells(model: ScGPT, column: str, n_batches: int) -> None:
    """Give a model the batch of each cell, with a special token for the `<cls>` of each batch behind its vocabulary."""
    first, tokens = len(model.vocabulary), tuple(f"<cls:batch {i}>" for i in range(n_batches))
    model.vocabulary = replace(
        model.vocabulary,
        tokens=(*model.vocabulary.tokens, *tokens),
        special=model.vocabulary.special | frozenset(tokens),
    )
    model.batch_labels = BatchLabels(chosen=column, n_batches=n_batches, first_token=first)
    model.context = MappingProxyType({"batch_label": column})


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The fields of `args.json` that weights tell, by canonical names: nlayers, embsize and d_hid."""
    sizes = {"nlayers": 1 + max((int(m[1]) for key in weights if (m := _LAYER.match(key))), default=-1)}
    tensors = {"embsize": ("encoder.embedding.weight", 1), "d_hid": ("transformer_encoder.layers.0.linear1.weight", 0)}
    found = {name: (weights.get(key), axis) for name, (key, axis) in tensors.items()}
    return sizes | {name: t.shape[axis] for name, (t, axis) in found.items() if t is not None and t.ndim == 2}


def _check_sizes(config: ScGPTConfig, weights: Mapping[str, Tensor]) -> None:
    """Check that no size is larger than the weights have it, before a network is built that may not fit into memory."""
    stated = {"nlayers": config.n_layers, "embsize": config.d_model, "d_hid": config.d_hidden}
    wrong = {name: size for name, size in sizes_of(weights).items() if stated[name] > size}
    if wrong:
        each = "; ".join(
            f"{name} is {stated[name]} in args.json and {size} in the weights" for name, size in wrong.items()
        )
        raise CheckpointError(f"the weights do not fit args.json: {each}; give the args.json of this checkpoint")


def _heads(config: ScGPTConfig, weights: Mapping[str, Tensor]) -> tuple[list[str], int, set[str]]:
    """The heads that can be run, the number of batches whose vectors they take, and the weights that are not needed."""
    ignored = {key for key in weights if _UNUSED.search(key)}
    batches = weights.get("batch_encoder.embedding.weight")
    n_batches = 0 if batches is None else len(batches)
    heads = []
    for name, head in (("decoder.", ExpressionDecoder), ("mvc_decoder.", CellValueDecoder)):
        own = {key for key in weights if key.startswith(name)} - ignored
        shapes = {key.removeprefix(name): tuple(weights[key].shape) for key in own}
        with torch.random.fork_rng(devices=[]):
            state = head(d_model=config.d_model, with_batch=n_batches > 0).state_dict()
        if shapes == {key: tuple(value.shape) for key, value in state.items()}:
            heads.append(name)
        else:
            ignored |= own
    if not heads:
        ignored |= {key for key in weights if key.startswith("batch_encoder.")}
        n_batches = 0
    return heads, n_batches, ignored


def _input_norm(weights: Mapping[str, Tensor]) -> InputNorm | None:
    n_batches = sum(bool(re.fullmatch(r"dsbn\.bns\.\d+\.running_mean", key)) for key in weights)
    if n_batches:
        return InputNorm(n_batches, affine="dsbn.bns.0.weight" in weights)
    return InputNorm(None, affine="bn.weight" in weights) if "bn.running_mean" in weights else None


def _which_batch(name: str, n_batches: int, label: int | None) -> str:
    return (
        f"{name} was fine-tuned with {n_batches} batches, and its batch_label ({label}) is none of them: give "
        "--model-option batch_label=obs:COLUMN, a column with the number of each cell's batch in the tuning, or "
        f"batch_label=I for all cells, with I from 0 to {n_batches - 1} (or add it to args.json)"
    )


def canonical_name(key: str) -> str:
    """Name of a weight as the official checkpoints have it."""
    for pattern, name in _RENAMES:
        key = pattern.sub(name, key)
    return key


@torch.no_grad()
def init_weights(model: ScGPT, *, seed: int) -> None:
    """Draw weights from `seed`: unit normal gene vectors, Xavier attention, uniform 1/sqrt(fan_in) elsewhere.

    The first layer of the value encoder is scaled so that the kinks of relu(w v + b) cover the bins: |b| < 1,
    |w| < 4 / n_bins. With a plain initialisation all kinks lie near zero, and the layer norm after it removes the size
    of the value.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    for name, parameter in model.named_parameters():
        if "norm" in name or ".bns." in name or name.startswith("bn."):
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name == "encoder.embedding.weight":
            parameter.normal_(generator=generator)
        elif name.startswith("value_encoder.linear1"):
            bound = 4.0 / model.config.n_bins if name.endswith("weight") else 1.0
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        elif name == "mvc_decoder.W.weight":
            # the product with a normed vector would be ten times too large with a plain initialisation
            parameter.uniform_(-0.01, 0.01, generator=generator)
        else:
            bound = float(np.sqrt(6 / sum(parameter.shape))) if "Wqkv" in name else parameter.shape[1] ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
