"""scGPT: gene identity plus binned value, a post-norm encoder, `<cls>` as the cell token.

    x = LN(Emb(gene)) + LN(W2 relu(W1 min(v, 512)));    n_layers encoder blocks;    no positions, no final norm

Heads of its pretraining, kept because the checkpoint has them and because training needs them:

    decoder      v_hat = MLP(x_gene)                              masked-value prediction from a gene's own token
    mvc_decoder  v_hat = (W sigmoid(W_q Emb(gene))) . x_cls       masked-value prediction from the cell token

Module names are those of the official checkpoints (flash-attention naming), so a state dict loads without a table;
torch's `in_proj_` naming and an `_impl.` level are renamed. Weights of an unused part (`cls_decoder.`, `flag_encoder.`)
are listed in `ignored_weights`; any other surplus or missing weight is an error.

Cui et al. 2024, scGPT, 10.1038/s41592-024-02201-0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm.binning import TieBreak
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.foundation import FoundationModel, Readout, masked_mean
from sae_core.scfm.scgpt_tokenizer import ScGPTTokenizer
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

_RENAMES = ((re.compile(r"self_attn\._impl\."), "self_attn."), (re.compile(r"self_attn\.in_proj_"), "self_attn.Wqkv."))
_UNUSED = ("cls_decoder.", "flag_encoder.")
_HEADS = ("decoder.", "mvc_decoder.")


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
        if self.tie_break not in get_args(TieBreak):
            raise ConfigError(f"tie_break {self.tie_break!r}; allowed: {', '.join(get_args(TieBreak))}")

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
        )


class _GeneEncoder(nn.Module):
    def __init__(self, *, n_tokens: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_model, _weight=torch.empty(n_tokens, d_model))
        self.enc_norm = nn.LayerNorm(d_model)

    def forward(self, gene_id: Tensor) -> Tensor:
        return cast("Tensor", self.enc_norm(self.embedding(gene_id)))


class _ValueEncoder(nn.Module):
    def __init__(self, *, d_model: int, clamp: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, d_model)
        self.linear2 = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.clamp = clamp

    def forward(self, value: Tensor) -> Tensor:
        hidden = F.relu(self.linear1(value.clamp(max=self.clamp)[..., None]))
        return cast("Tensor", self.norm(self.linear2(hidden)))


class _TransformerEncoder(nn.Module):
    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        block = {"d_model": config.d_model, "n_heads": config.n_heads, "d_hidden": config.d_hidden}
        self.layers = nn.ModuleList(EncoderBlock(**block) for _ in range(config.n_layers))


class ExpressionDecoder(nn.Module):
    """Head `decoder`: binned value of a gene from its own output token."""

    def __init__(self, *, d_model: int) -> None:
        super().__init__()
        linear = [nn.Linear(d_model, d_model), nn.LeakyReLU(), nn.Linear(d_model, d_model), nn.LeakyReLU()]
        self.fc = nn.Sequential(*linear, nn.Linear(d_model, 1))

    def forward(self, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position"]:
        """Predicted value per position."""
        return cast("Tensor", self.fc(x)).squeeze(-1)


class CellValueDecoder(nn.Module):
    """Head `mvc_decoder`: binned value of a gene from the cell token and the gene's vector ("inner product" style)."""

    def __init__(self, *, d_model: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, cell: Float[Tensor, "row d_model"], gene: Float[Tensor, "row position d_model"]
    ) -> Float[Tensor, "row position"]:
        """Predicted value per gene of the row."""
        query = self.W(torch.sigmoid(self.gene2query(gene)))
        return torch.einsum("rpd,rd->rp", query, cell)


class ScGPT(FoundationModel):
    """The network with its tokenizer; made by `load_model` or, without weights, by `ScGPT.empty`."""

    family = "scgpt"

    def __init__(
        self, config: ScGPTConfig, vocabulary: Vocabulary, *, n_tokens: int, heads: Sequence[str] = _HEADS
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.name, self.digest = "scgpt", ""
        self.d_model, self.n_layers = config.d_model, config.n_layers
        self.ignored_weights: tuple[str, ...] = ()
        self.encoder = _GeneEncoder(n_tokens=n_tokens, d_model=config.d_model)
        self.value_encoder = _ValueEncoder(d_model=config.d_model, clamp=config.value_clamp)
        self.transformer_encoder = _TransformerEncoder(config)
        self.decoder = ExpressionDecoder(d_model=config.d_model) if "decoder." in heads else None
        self.mvc_decoder = CellValueDecoder(d_model=config.d_model) if "mvc_decoder." in heads else None
        self.tokenizer = ScGPTTokenizer(
            cls_id=vocabulary.id_of("<cls>"),
            cls_value=config.cls_value,
            n_bins=config.n_bins,
            max_seq_len=config.max_seq_len,
            tie_break=config.tie_break,
        )

    @classmethod
    def empty(
        cls, config: ScGPTConfig, vocabulary: Vocabulary, *, n_tokens: int, heads: Sequence[str] = _HEADS
    ) -> ScGPT:
        """A network whose weights are still to be set.

        torch's modules draw their own first weights; the global generator is put back. (The meta device would draw
        none, but its first use imports sympy and dynamo: 1 to 2 s.)
        """
        with torch.random.fork_rng(devices=[]):
            return cls(config, vocabulary, n_tokens=n_tokens, heads=heads).eval()

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.transformer_encoder.layers))

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """LN(Emb(gene)) + LN(W2 relu(W1 min(v, 512)))."""
        return cast("Tensor", self.encoder(gene_id) + self.value_encoder(value))

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
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: Readout
    ) -> Float[Tensor, "row d_model"]:
        """Mean over gene tokens (upstream's avg-pool also averages padding; this does not), or `<cls>`, L2-normalised.

        Raises:
            ConfigError: another readout.
        """
        if readout not in get_args(Readout):
            raise ConfigError(f"unknown readout {readout!r}; allowed: {', '.join(get_args(Readout))}")
        return masked_mean(x, is_gene) if readout == "mean" else F.normalize(x[:, 0], dim=-1)


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
    model = ScGPT.empty(config, vocabulary, n_tokens=len(rows), heads=heads)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    problems = [f"missing {key}" for key in expected if key not in used]
    problems += [f"unexpected {key}" for key in used if key not in expected]
    problems += [
        f"{key} is {tuple(value.shape)} instead of {expected[key]}"
        for key, value in used.items()
        if key in expected and tuple(value.shape) != expected[key]
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"the weights do not fit args.json: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(used)
    model.ignored_weights = tuple(sorted(key for key in named if key.startswith(_UNUSED)))
    return model


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
    for name, parameter in model.named_parameters():
        if "norm" in name:
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
