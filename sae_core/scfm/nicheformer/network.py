"""Nicheformer: genes of dissociated and spatial cells ranked within their technology, behind three tokens of context.

    x_p = Emb(token_p) + Pos_p;    n_layers post-norm ReLU blocks, eps 1e-12;    no norm before or after them
    logits = W x + b               head of the masked-gene prediction, over all tokens

The network is equal to 1e-5 to torch's stock `nn.TransformerEncoderLayer`s on the same weights, at all layers, padding
included (tested). Only the rank of a gene enters.

The official embedding of a cell is the mean over the places from the fourth to the last of 1,500, those of the padding
among them: padding attends to the cell, and is never attended to. So it depends on how many genes a cell has, and costs
1,500 places. "mean" is that over the genes alone. The first three places are left out whether or not a context is
there. The table of tokens has five rows that no token uses, and `pos`, `pooler_head`, `cls_head` and a
thirteenth layer, `encoder_layer`, from which upstream copies the others, are in the files and never run.

Tejada-Lapuerta, Schaar et al. 2024, Nicheformer, 10.1101/2024.04.15.589472.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights, refuse_adapters, renamed
from sae_core.errors import VocabularyError
from sae_core.json_fields import JsonFields
from sae_core.scfm.batches import Batch, Padding
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.nicheformer.context import FIELDS
from sae_core.scfm.nicheformer.tokenizer import N_AUXILIARY, NicheformerTokenizer
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, log_probability, replace_genes
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary, ensembl_id

NEEDED = ("dim_model", "nheads", "dim_feedforward", "nlayers", "n_tokens", "context_length")
"""Fields of a `config.json`, or of a Lightning checkpoint's hyper-parameters, that tell the sizes of the network."""
MASK_ID, PAD_ID = 0, 1
OFFICIAL = "mean-with-padding"
N_SPARE = 5
"""Rows of the table of tokens behind the last token."""
_POOLED_FROM = 3
_FIRST_RANDOM = 10
_MASK_FRACTION = 0.15
_MOUSE = "ENSMUSG"
_USED = re.compile(r"^(token_embedding|position_embedding|layers|classifier_head)\.")
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^((module|_orig_mod|model|backbone|nicheformer)\.)+", ""),
        (r"^embeddings\.", "token_embedding."),
        (r"^positional_embedding\.", "position_embedding."),
        (r"^encoder\.layers\.", "layers."),
        (r"^(layers\.\d+\.self_attn)\.in_proj_", r"\1.Wqkv."),
    )
)
_OFFICIAL = (
    ("token_embedding.", "embeddings."),
    ("position_embedding.", "positional_embedding."),
    ("layers.", "encoder.layers."),
    (".Wqkv.", ".in_proj_"),
)


@dataclass(frozen=True, kw_only=True)
class NicheformerConfig:
    """Settings of the network and the tokenizer, from a `config.json` or a checkpoint's hyper-parameters."""

    n_layers: int
    n_heads: int
    d_model: int
    d_hidden: int
    n_tokens: int
    """Number of tokens: those before the genes, and the genes."""
    max_positions: int
    mask_fraction: float = _MASK_FRACTION
    has_token_of: Mapping[str, bool]
    """Whether a field of the context is a token, by field."""

    @classmethod
    def from_fields(cls, fields: JsonFields) -> NicheformerConfig:
        """Config from the fields of a file.

        Raises:
            CheckpointError: a field is missing or wrong, or stands for another network than this one.
        """
        n_heads, d_model = fields.whole("nheads"), fields.whole("dim_model")
        if d_model % n_heads:
            raise fields.wrong("nheads", f"a divisor of dim_model {d_model}")
        for name, needed in (("learnable_pe", True), ("batch_first", True), ("autoregressive", False)):
            if fields.flag(name, needed) != needed:
                raise fields.wrong(name, f"{str(needed).lower()}, as in the published model")
        mask_fraction = fields.number("masking_p", _MASK_FRACTION)
        if not 0 < mask_fraction < 1:
            fields.notes.append(f"{fields.file} has masking_p {mask_fraction:g}: {_MASK_FRACTION} was taken")
            mask_fraction = _MASK_FRACTION
        return cls(
            n_layers=fields.whole("nlayers"),
            n_heads=n_heads,
            d_model=d_model,
            d_hidden=fields.whole("dim_feedforward"),
            n_tokens=fields.whole("n_tokens", at_least=N_AUXILIARY + 1),
            max_positions=fields.whole("context_length", at_least=_POOLED_FROM + 1),
            mask_fraction=mask_fraction,
            has_token_of={name: fields.flag({"species": "specie"}.get(name, name), True) for name in FIELDS},
        )


class Nicheformer(FoundationModel):
    """The Nicheformer network with its tokenizer; `load_model` builds it from a checkpoint folder."""

    family = "nicheformer"
    predicts_in_place = True
    readouts = (OFFICIAL, "mean")
    kept_of_long_cells = "the genes of their highest ranks"

    def __init__(
        self,
        config: NicheformerConfig,
        vocabulary: Vocabulary,
        tokenizer: NicheformerTokenizer,
        *,
        pad_id: int = PAD_ID,
        head: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary, self.tokenizer, self.pad_id = config, vocabulary, tokenizer, pad_id
        self.name, self.digest = "nicheformer", ""
        self.d_model, self.n_layers = config.d_model, config.n_layers
        self.mask_fraction, self.max_genes = config.mask_fraction, tokenizer.max_genes(None)
        self.context = {name: getattr(tokenizer.context, name) for name in FIELDS}
        self.token_embedding = nn.Embedding(config.n_tokens + N_SPARE, config.d_model)
        self.position_embedding = nn.Embedding(config.max_positions, config.d_model)
        self.layers = nn.ModuleList(
            EncoderBlock(d_model=config.d_model, n_heads=config.n_heads, d_hidden=config.d_hidden, eps=1e-12)
            for _ in range(config.n_layers)
        )
        self.classifier_head = nn.Linear(config.d_model, config.n_tokens) if head else None

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.layers))

    def match_genes(self, symbols: Sequence[str], ensembl_ids: Sequence[str] | None = None) -> GeneMatch:
        """Token of each gene of a data set (`Vocabulary.match`).

        Raises:
            VocabularyError: no gene is in the vocabulary, or most genes have ids of the mouse, of which the reference
                has next to none: a mouse has to be given by the human orthologues of its genes.
        """
        match = super().match_genes(symbols, ensembl_ids)
        names = symbols if ensembl_ids is None else [a or b for a, b in zip(ensembl_ids, symbols, strict=True)]
        of_mouse = np.array([(ensembl_id(str(name)) or "").startswith(_MOUSE) for name in names])
        if 2 * of_mouse.sum() > len(of_mouse):
            n_own = sum(token.startswith(_MOUSE) for token in self.vocabulary.tokens)
            first = names[int(of_mouse.argmax())]
            raise VocabularyError(
                f"{int(of_mouse.sum())} of the {len(names)} genes have ids of the mouse ({first}, ...), and "
                f"{int((match.matched & of_mouse).sum())} of these are among the {n_own} that {self.name} knows beside "
                f"{self.vocabulary.n_genes - n_own} human genes; it was trained on mice whose genes were mapped to "
                "their human orthologues: map them (Ensembl BioMart lists them), name them ENSG... in var, and give "
                "--model-option species=mouse"
            )
        return match

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Emb(token) + Pos. The position is the rank of the gene; the value is not used."""
        return cast("Tensor", self.token_embedding(gene_id)) + self.position_embedding.weight[: gene_id.shape[1]]

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
        """Context and genes by falling score (`NicheformerTokenizer`); `seed` is not used."""
        return self.tokenizer(indptr, indices, data, match, max_tokens=max_tokens, obs=obs)

    def padding(self, readout: str) -> Padding | None:
        """All places of the model for the official readout; padding is invisible to the mean over the genes."""
        return Padding(self.config.max_positions, self.pad_id) if readout == OFFICIAL else None

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row d_model"]:
        """Mean over the gene tokens; or over all places but the first three, padding included (official)."""
        return masked_mean(x, is_gene) if readout == "mean" else x[:, _POOLED_FROM:].mean(1)

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Mask genes as upstream does: 81 % become the mask, 10 % another token (from 10 on), 9 % stay.

        Upstream hides tokens of the context too, except that of dissociated cells; here genes alone are to be
        predicted, and the context stays.
        """

        def replacement(rng: np.random.Generator, gene_id: np.ndarray) -> np.ndarray:
            draw = rng.random(len(gene_id))
            other = rng.integers(_FIRST_RANDOM, self.config.n_tokens, size=len(gene_id))
            return np.where(draw < 0.1, other, np.where(draw < 0.19, gene_id, MASK_ID))

        return replace_genes(tokens, seed=seed, fraction=fraction, replacement=replacement)

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Log probability, in nats, of each masked gene at its rank."""
        if self.classifier_head is None:
            raise self._lacks_head("classifier_head")
        return log_probability(self.classifier_head, x, masked)

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Cross-entropy of each masked gene, in nats."""
        return -self.predict_masked(x, batch, masked)

    @torch.no_grad()
    def reset_weights(self, *, seed: int) -> None:
        """Upstream's initialisation: Xavier-normal matrices (uniform for query, key and value), normal embeddings.

        Biases are 0, norms 1, and so is upstream's vector of the padding 0.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "embedding" in name:
                parameter.normal_(generator=generator)
            elif "Wqkv" in name:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.xavier_normal_(parameter, generator=generator)
        self.token_embedding.weight[PAD_ID] = 0.0


def nicheformer_from_weights(
    config: NicheformerConfig,
    vocabulary: Vocabulary,
    tokenizer: NicheformerTokenizer,
    weights: Mapping[str, Tensor],
    *,
    pad_id: int,
    file: str,
) -> Nicheformer:
    """Model with the weights of an official checkpoint, or of one that was tuned from it; `file` has the settings.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape.
    """
    refuse_adapters(weights)
    named = {renamed(key, _RENAMES): value for key, value in weights.items()}
    used = {key: value.float() for key, value in named.items() if _USED.match(key)}
    has_head = any(key.startswith("classifier_head.") for key in used)
    with torch.random.fork_rng(devices=[]):
        model = Nicheformer(config, vocabulary, tokenizer, pad_id=pad_id, head=has_head).eval()
    load_weights(model, used, what=file, official=_official)
    model.ignored_weights = tuple(sorted(key for key in named if key not in used))
    return model


def _official(name: str) -> str:
    """Name of a weight in the official files, for error messages."""
    for own, official in _OFFICIAL:
        name = name.replace(own, official)
    return name
