"""scGPT: gene identity plus binned value, a post-norm encoder, `<cls>` as the cell token.

    x = LN(Emb(gene)) + LN(W2 relu(W1 min(v, 512)));    n_layers encoder blocks;    no positions, no final norm

Heads of its pretraining, kept because the checkpoint has them and because training needs them:

    decoder      v_hat = MLP(x_gene)                              masked-value prediction from a gene's own token
    mvc_decoder  v_hat = (W sigmoid(W_q Emb(gene))) . x_cls       masked-value prediction from the cell token

A fine-tuned checkpoint may add batch labels, which only the heads read (`batch_encoder`), and a batch norm of the
input, common (`bn`) or one per batch (`dsbn`); which batch is asked for is `batch_label` in args.json.

Module names are those of the official checkpoints (flash-attention naming), so a state dict loads without a table;
torch's `in_proj_` naming and an `_impl.` or `module.` level are renamed. Weights of an unused part (`cls_decoder.`,
`flag_encoder.`, adversarial and zero-inflation heads) are listed in `ignored_weights`; any other surplus or missing
weight is an error.

Cui et al. 2024, scGPT, 10.1038/s41592-024-02201-0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights
from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm.batches import Batch
from sae_core.scfm.binning import TieBreak
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, sample_masked_genes
from sae_core.scfm.scgpt_parts import (
    BatchNorm,
    CellValueDecoder,
    DomainNorm,
    ExpressionDecoder,
    GeneEncoder,
    InputNorm,
    ValueEncoder,
)
from sae_core.scfm.scgpt_tokenizer import ScGPTTokenizer
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

_RENAMES = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"self_attn\._impl\."), "self_attn."),
    (re.compile(r"self_attn\.in_proj_"), "self_attn.Wqkv."),
)
_UNUSED = (
    "cls_decoder.",
    "flag_encoder.",
    "grad_reverse_discriminator.",
    "decoder.zero_logit.",
    "mvc_decoder.W_zero_logit.",
)
_HEADS = ("decoder.", "mvc_decoder.")

Objective = Literal["masked", "query"]


@dataclass(frozen=True, kw_only=True)
class ScGPTConfig:
    """What network and tokenizer take from `args.json`; `cls_value` and `tie_break` are additions of this project."""

    n_layers: int
    n_heads: int
    d_model: int
    d_hidden: int
    n_bins: int = 51
    max_seq_len: int = 1200
    pad_value: float = -2.0
    mask_value: float = -1.0
    value_clamp: float = 512.0
    """Values are cut here before they are embedded."""
    cls_value: float = -2.0
    """Value of the `<cls>` token: upstream's embedding code gives it pad_value, its tokenizer code 0."""
    tie_break: TieBreak = "random"
    """A tied count gets a random digit among those it spans (upstream), or their midpoint (deterministic)."""
    objective: Objective = "masked"
    """Pretraining: "masked" values are seen as such by all tokens, a "query" asks without being seen."""
    batch_label: int | None = None
    """Which batch of a fine-tuned checkpoint the cells are taken for, where it has batches."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ConfigError: a size that is not positive, heads that do not divide d_model, an unknown tie break.
        """
        sizes = {"n_layers": self.n_layers, "n_heads": self.n_heads, "d_model": self.d_model, "d_hidden": self.d_hidden}
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ConfigError(f"sizes must be at least 1, got {wrong}")
        if self.d_model % self.n_heads or self.n_bins < 3 or self.max_seq_len < 2:
            raise ConfigError(
                f"n_heads {self.n_heads} must divide d_model {self.d_model}, n_bins {self.n_bins} must be at least 3, "
                f"max_seq_len {self.max_seq_len} at least 2"
            )
        choices = (("tie_break", self.tie_break, TieBreak), ("objective", self.objective, Objective))
        for name, value, allowed in choices:
            if value not in get_args(allowed):
                raise ConfigError(f"{name} {value!r}; allowed: {', '.join(get_args(allowed))}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> ScGPTConfig:
        """Config of an `args.json`; keys of upstream's training run that the network does not need are passed over.

        Raises:
            CheckpointError: a key is missing, or the value embedding is another than the continuous one.
        """
        if missing := [key for key in ("nlayers", "nheads", "embsize", "d_hid") if key not in args]:
            raise CheckpointError(f"args.json lacks {', '.join(missing)}; allowed: an scGPT args.json with all of them")
        if (style := args.get("input_emb_style", "continuous")) != "continuous":
            raise CheckpointError(f"args.json has input_emb_style {style!r}; supported: 'continuous'")
        pad_value = float(args.get("pad_value", -2))
        return cls(
            n_layers=int(args["nlayers"]),
            n_heads=int(args["nheads"]),
            d_model=int(args["embsize"]),
            d_hidden=int(args["d_hid"]),
            n_bins=int(args.get("n_bins", 51)),
            max_seq_len=int(args.get("max_seq_len", 1200)),
            pad_value=pad_value,
            mask_value=float(args.get("mask_value", -1)),
            cls_value=float(args.get("cls_value", pad_value)),
            tie_break=args.get("tie_break", "random"),
            # the mini model's record of its own training says that it was asked by queries
            objective=args.get("objective", "query" if "n_queries" in args.get("pretraining", {}) else "masked"),
            batch_label=None if (label := args.get("batch_label")) is None else int(label),
        )


class _TransformerEncoder(nn.Module):
    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        block = {"d_model": config.d_model, "n_heads": config.n_heads, "d_hidden": config.d_hidden}
        self.layers = nn.ModuleList(EncoderBlock(**block) for _ in range(config.n_layers))


class ScGPT(FoundationModel):
    """The network with its tokenizer; made by `load_model` or, without weights, by `ScGPT.empty`."""

    family = "scgpt"
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
        """A network whose weights are still to be set.

        torch's modules draw their own first weights; the global generator is put back. (The meta device would draw
        none, but its first use imports sympy and dynamo: 1 to 2 s.)
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
        """LN(Emb(gene)) + LN(W2 relu(W1 min(v, 512))), batch-normed where the checkpoint does so."""
        x: Tensor = self.encoder(gene_id) + self.value_encoder(value)
        if self.dsbn is not None:
            x = self.dsbn.bns[cast("int", self.config.batch_label)](x)
        return x if self.bn is None else self.bn(x)

    def tokenize(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        seed: int,
        max_tokens: int | None = None,
    ) -> Tokens:
        """`<cls>` and the binned nonzero genes of each cell (`ScGPTTokenizer`)."""
        return self.tokenizer(indptr, indices, data, match, seed=seed, max_tokens=max_tokens)

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row d_model"]:
        """`<cls>`, L2-normalised; or the mean over gene tokens (upstream's avg-pool also averages padding)."""
        return masked_mean(x, is_gene) if readout == "mean" else F.normalize(x[:, 0], dim=-1)

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Bins of hidden genes: their value is `mask_value`, and queries are seen by no other token."""
        hidden = sample_masked_genes(tokens, seed=seed, fraction=fraction)
        value = np.where(hidden, np.float32(self.config.mask_value), tokens.value)
        return MaskedGeneTask(
            tokens=replace(tokens, value=value),
            cell=tokens.cell_of_token()[hidden],
            gene_id=tokens.gene_id[hidden],
            target=tokens.value[hidden],
            position=np.flatnonzero(hidden),
            is_query_only=hidden if self.config.objective == "query" else None,
        )

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, asked: MaskedGeneBatch
    ) -> Float[Tensor, " asked"]:
        """Bin of each hidden gene by `decoder`, from the gene's own token; `mvc_decoder` has no say."""
        if self.decoder is None:
            raise ConfigError(f"{self.name} has no decoder weights, so it has no pretraining loss and no answers")
        found: Tensor = self.decoder(self._of_batch(x[asked.row, asked.column])[None])[0]
        return found

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, asked: MaskedGeneBatch
    ) -> Float[Tensor, " asked"]:
        """Squared error in bins of `decoder`, plus that of `mvc_decoder` where the checkpoint has one."""
        error = (self.predict_masked(x, batch, asked) - asked.target) ** 2
        if self.mvc_decoder is not None:
            by_cell = self.mvc_decoder(self._of_batch(x[asked.row, 0]), self.encoder(asked.gene_id)[:, None])[:, 0]
            error = error + (by_cell - asked.target) ** 2
        return error

    def _of_batch(self, x: Float[Tensor, "asked d_model"]) -> Float[Tensor, "asked d_head"]:
        """What a head reads: activations, and beside them the batch's vector where the checkpoint has batches."""
        if self.batch_encoder is None:
            return x
        if self.config.batch_label is None:
            raise ConfigError(_which_batch(self.name, self.batch_encoder.embedding.num_embeddings))
        label = torch.full((len(x),), self.config.batch_label, device=x.device)
        return torch.cat([x, self.batch_encoder(label)], dim=-1)

    def reset_weights(self, *, seed: int) -> None:
        """Fresh weights (`init_weights`)."""
        init_weights(self, seed=seed)


def scgpt_from_weights(config: ScGPTConfig, vocabulary: Vocabulary, weights: Mapping[str, Tensor]) -> ScGPT:
    """Network with the given weights, every one accounted for; float32 whatever the file holds.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape (the message names them).
    """
    named = {_canonical(key): value for key, value in weights.items()}
    used = {key: value.float() for key, value in named.items() if not key.startswith(_UNUSED)}
    rows = used.get("encoder.embedding.weight")
    if rows is None:
        raise CheckpointError(
            "the weights lack encoder.embedding.weight; allowed: the state dict of an scGPT checkpoint"
        )
    if len(rows) < len(vocabulary):
        raise CheckpointError(f"the weights embed {len(rows)} tokens but vocab.json names {len(vocabulary)}")
    heads = [head for head in _HEADS if any(key.startswith(head) for key in used)]
    batches = used.get("batch_encoder.embedding.weight")
    norm = _input_norm(used)
    if norm is not None and norm.n_batches is not None and config.batch_label not in range(norm.n_batches):
        raise CheckpointError(_which_batch("the checkpoint", norm.n_batches))
    model = ScGPT.empty(
        config,
        vocabulary,
        n_tokens=len(rows),
        heads=heads,
        norm=norm,
        n_batches=0 if batches is None else len(batches),
    )
    load_weights(model, used, what="args.json")
    model.ignored_weights = tuple(sorted(key for key in named if key.startswith(_UNUSED)))
    return model


def _input_norm(weights: Mapping[str, Tensor]) -> InputNorm | None:
    n_batches = sum(bool(re.fullmatch(r"dsbn\.bns\.\d+\.running_mean", key)) for key in weights)
    if n_batches:
        return InputNorm(n_batches, affine="dsbn.bns.0.weight" in weights)
    return InputNorm(None, affine="bn.weight" in weights) if "bn.running_mean" in weights else None


def _which_batch(name: str, n_batches: int) -> str:
    return (
        f"{name} was fine-tuned with {n_batches} batches and does not say which one to take: add "
        f'"batch_label": I to args.json, with I from 0 to {n_batches - 1}'
    )


def _canonical(key: str) -> str:
    for pattern, name in _RENAMES:
        key = pattern.sub(name, key)
    return key


@torch.no_grad()
def init_weights(model: ScGPT, *, seed: int) -> None:
    """Fresh weights from `seed`: unit normal gene vectors, Xavier attention, uniform 1/sqrt(fan_in) elsewhere.

    The first value layer is scaled so that its kinks cover the bins: relu(w v + b), |b| < 1, |w| < 4 / n_bins.
    With a plain init all kinks sit near zero and the norm behind it removes the size of the value.
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
            # a dot product with a normed vector: a plain init starts ten times too large
            parameter.uniform_(-0.01, 0.01, generator=generator)
        else:
            bound = float(np.sqrt(6 / sum(parameter.shape))) if "Wqkv" in name else parameter.shape[1] ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
