"""Geneformer: genes ranked by expression relative to their median, a BERT encoder, masked-gene prediction.

    x_p = LN(Emb(gene_p) + Pos_p + Type_0);    n_layers post-norm ReLU blocks, eps 1e-12;    no final norm
    logits = Emb . LN(relu(W x)) + b           head of the masked-gene prediction, tied to the embedding

The network is equal to 1e-5 (tested) to `transformers.BertForMaskedLM`, from which the official checkpoints were saved.
Only the rank of a gene enters: its expression determines its position, not its vector. V1 (10M, 12L-30M) has neither
`<cls>` nor `<eos>`; V2 (104M, 316M) has both, and its token dictionary names them.

Theodoris et al. 2023, Geneformer, 10.1038/s41586-023-06139-9; V2: Chen et al. 2024, 10.1101/2024.08.16.608180.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights, refuse_adapters, renamed
from sae_core.errors import CheckpointError
from sae_core.json_fields import JsonFields
from sae_core.scfm.batches import Batch
from sae_core.scfm.encoder import EncoderBlock, stack_query_key_value
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.geneformer.tokenizer import GeneformerTokenizer
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, log_probability, replace_genes
from sae_core.scfm.sites import Site
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields of a `config.json` that tell the sizes of the network."""
_UNUSED = re.compile(r"^embeddings\.position_ids$|^(?!embeddings?\.|embedding\.|encoder\.|layers\.|head\.)")
"""Weights that neither activations nor the pretraining loss need: whatever lies outside embedding, blocks and head."""
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^((module|_orig_mod|model)\.)+", ""),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"^bert\.", ""),
        (r"^embeddings\.word_embeddings\.", "embedding.word."),
        (r"^embeddings\.position_embeddings\.", "embedding.position."),
        (r"^embeddings\.token_type_embeddings\.", "embedding.token_type."),
        (r"^embeddings\.LayerNorm\.", "embedding.norm."),
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.self\.", ".self_attn."),
        (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
        (r"\.attention\.output\.LayerNorm\.", ".norm1."),
        (r"\.intermediate\.dense\.", ".linear1."),
        (r"^(layers\.\d+)\.output\.dense\.", r"\1.linear2."),
        (r"^(layers\.\d+)\.output\.LayerNorm\.", r"\1.norm2."),
        (r"^cls\.predictions\.transform\.dense\.", "head.dense."),
        (r"^cls\.predictions\.transform\.LayerNorm\.", "head.norm."),
        (r"^cls\.predictions\.(decoder\.)?bias$", "head.bias"),
        (r"^cls\.predictions\.decoder\.weight$", "head.tied"),
    )
)

_OFFICIAL = (
    (r"^embedding\.(word|position|token_type)\.", r"bert.embeddings.\1_embeddings."),
    (r"^embedding\.norm\.", "bert.embeddings.LayerNorm."),
    (r"^layers\.", "bert.encoder.layer."),
    (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
    (r"\.self_attn\.Wqkv\.(.*)", r".attention.self.query.\1 (or its key or value)"),
    (r"\.self_attn\.", ".attention.self."),
    (r"\.norm1\.", ".attention.output.LayerNorm."),
    (r"\.linear1\.", ".intermediate.dense."),
    (r"\.linear2\.", ".output.dense."),
    (r"\.norm2\.", ".output.LayerNorm."),
    (r"^head\.dense\.", "cls.predictions.transform.dense."),
    (r"^head\.norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^head\.bias$", "cls.predictions.bias"),
)


@dataclass(frozen=True, kw_only=True)
class GeneformerConfig:
    """Settings of the network and the tokenizer, from a Hugging Face `config.json`."""

    n_layers: int
    n_heads: int
    d_model: int
    d_hidden: int
    n_tokens: int
    max_positions: int
    n_types: int = 2
    eps: float = 1e-12
    init_std: float = 0.02

    @classmethod
    def from_fields(cls, fields: JsonFields) -> GeneformerConfig:
        """Config from the fields of a `config.json`.

        Raises:
            CheckpointError: a field is missing or wrong, or the activation or the positions are not Geneformer's.
        """
        if missing := [name for name in NEEDED if name not in fields.values]:
            raise CheckpointError(
                f"{fields.file} lacks {', '.join(missing)}; give the config.json of a Geneformer model"
            )
        fields.choice("hidden_act", "relu", ["relu"])
        fields.choice("position_embedding_type", "absolute", ["absolute"])
        n_heads, d_model = fields.whole("num_attention_heads"), fields.whole("hidden_size")
        if d_model % n_heads:
            raise fields.wrong("num_attention_heads", f"a divisor of hidden_size {d_model}")
        return cls(
            n_layers=fields.whole("num_hidden_layers"),
            n_heads=n_heads,
            d_model=d_model,
            d_hidden=fields.whole("intermediate_size"),
            n_tokens=fields.whole("vocab_size"),
            max_positions=fields.whole("max_position_embeddings"),
            n_types=fields.whole("type_vocab_size", 2),
            eps=fields.number("layer_norm_eps", 1e-12),
            init_std=fields.number("initializer_range", 0.02),
        )


class _Embedding(nn.Module):
    def __init__(self, c: GeneformerConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(c.n_tokens, c.d_model, _weight=torch.empty(c.n_tokens, c.d_model))
        self.position = nn.Embedding(c.max_positions, c.d_model)
        self.token_type = nn.Embedding(c.n_types, c.d_model)
        self.norm = nn.LayerNorm(c.d_model, eps=c.eps)

    def forward(self, gene_id: Tensor) -> Tensor:
        places = self.position.weight[: gene_id.shape[1]] + self.token_type.weight[0]
        return cast("Tensor", self.norm(self.word(gene_id) + places))


class MaskedGeneHead(nn.Module):
    """Pretraining head: logits over the vocabulary, through the transposed token embedding."""

    def __init__(self, c: GeneformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.d_model, c.d_model)
        self.norm = nn.LayerNorm(c.d_model, eps=c.eps)
        self.bias = nn.Parameter(torch.zeros(c.n_tokens))

    def forward(
        self, x: Float[Tensor, "token d_model"], word: Float[Tensor, "vocabulary d_model"]
    ) -> Float[Tensor, "token vocabulary"]:
        """Logits of each token."""
        return F.linear(self.norm(F.relu(self.dense(x))), word, self.bias)


class Geneformer(FoundationModel):
    """The Geneformer network with its tokenizer; `load_model` builds it from a checkpoint folder."""

    family = "geneformer"
    predicts_in_place = True
    mask_fraction = 0.15
    kept_of_long_cells = "the genes of their highest ranks"

    def __init__(
        self, config: GeneformerConfig, vocabulary: Vocabulary, medians: Mapping[str, float], *, head: bool = True
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.name, self.digest = "geneformer", ""
        self.d_model, self.n_layers = config.d_model, config.n_layers
        self.embedding = _Embedding(config)
        self.layers = nn.ModuleList(
            EncoderBlock(d_model=config.d_model, n_heads=config.n_heads, d_hidden=config.d_hidden, eps=config.eps)
            for _ in range(config.n_layers)
        )
        self.head = MaskedGeneHead(config) if head else None
        has_cls_eos = "<cls>" in vocabulary and "<eos>" in vocabulary
        self.tokenizer = GeneformerTokenizer.of(
            vocabulary, medians, max_positions=config.max_positions, has_cls_eos=has_cls_eos
        )
        self.max_genes = self.tokenizer.max_genes(None)
        self.readouts = ("cls", "mean") if has_cls_eos else ("mean",)

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.layers))

    @property
    def default_site(self) -> Site:
        """Output of the second-to-last block, as in the official embedding extractor."""
        return Site(kind="layer", index=self.n_layers - 2) if self.n_layers > 1 else Site(kind="embedding")

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """LN(Emb(gene) + Pos + Type_0). The position is the rank of the gene; the value is not used."""
        return cast("Tensor", self.embedding(gene_id))

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
        """Genes by falling expression relative to their median (`GeneformerTokenizer`); `seed` is not used."""
        return self.tokenizer(indptr, indices, data, match, max_tokens=max_tokens)

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row d_model"]:
        """Mean over the gene tokens, without `<cls>` and `<eos>`; or the `<cls>` token (V2)."""
        return masked_mean(x, is_gene) if readout == "mean" else x[:, 0]

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Mask genes as BERT does: 80 % become `<mask>`, 10 % another gene, 10 % stay; the gene is to be predicted."""
        genes, mask_id = self.tokenizer.gene_ids, self.vocabulary.id_of("<mask>")

        def replacement(rng: np.random.Generator, gene_id: np.ndarray) -> np.ndarray:
            draw = rng.random(len(gene_id))
            other = genes[rng.integers(len(genes), size=len(gene_id))]
            return np.where(draw < 0.8, mask_id, np.where(draw < 0.9, other, gene_id))

        return replace_genes(tokens, seed=seed, fraction=fraction, replacement=replacement)

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Log probability, in nats, of each masked gene at its rank."""
        if self.head is None:
            raise self._lacks_head("the masked-gene head")
        return log_probability(partial(self.head, word=self.embedding.word.weight), x, masked)

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Cross-entropy of each masked gene, in nats."""
        return -self.predict_masked(x, batch, masked)

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


def geneformer_from_weights(
    config: GeneformerConfig, vocabulary: Vocabulary, medians: Mapping[str, float], weights: Mapping[str, Tensor]
) -> Geneformer:
    """Model with the weights (`canonical_weights`) of a `BertForMaskedLM`, or of another model on a `BertModel`.

    A model that was tuned for other tasks has no masked-gene head; its classifiers and poolers are not read.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape, or the head is not tied to the embedding.
    """
    ignored = tuple(sorted(key for key in weights if _UNUSED.search(key)))
    used = stack_query_key_value({key: value for key, value in weights.items() if key not in ignored})
    tied, word = used.pop("head.tied", None), used.get("embedding.word.weight")
    if tied is not None and word is not None and not torch.equal(tied, word):
        raise CheckpointError(
            "cls.predictions.decoder.weight differs from word_embeddings; allowed: a decoder tied to it"
        )
    with torch.random.fork_rng(devices=[]):
        model = Geneformer(config, vocabulary, medians, head=any(key.startswith("head.") for key in used)).eval()
    load_weights(model, used, what="config.json", official=_official)
    model.ignored_weights = ignored
    return model


def canonical_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a checkpoint in float32, by the names of the modules here.

    Raises:
        CheckpointError: an adapter is among them.
    """
    refuse_adapters(weights)
    return {renamed(key, _RENAMES): value.float() for key, value in weights.items()}


def _official(name: str) -> str:
    """Name of a weight in the official files, for error messages."""
    for own, official in _OFFICIAL:
        name = re.sub(own, official, name)
    return name
