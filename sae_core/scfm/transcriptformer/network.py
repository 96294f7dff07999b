"""TranscriptFormer: a causal transformer over genes and counts, with protein vectors of ESM-2 as genes.

    x = W2 LN(relu(W1 esm(gene)))          of a gene or [START];  a row of a table for the assay, which comes first
    h = LN1 x,  z = LN2(h + A(h)),  x = z + V2 gelu(V1 z)          n_layers blocks, eps 1e-5: the norm carries on
    A: score = 10 tanh((q k / sqrt(d_head) + log1p(count_k + 1e-6)) / 10)        keys up to the query, no padding
    cell = (sum of x over [START] and the genes) / seq_len

There are no positions, no final norm, and no biases in the blocks unless the settings say so. Counts enter as a bias of
the keys alone. The cell embedding is not a mean: its norm grows with the number of genes. An unknown assay is no key,
and its own row attends to nothing. The masks need the scores of a cell, [head place place], in memory (`encoder`).

The head predicts the count of every gene from the place before it, where neither the gene nor its count is known:

    mu_g = total softmax_g(b_g + mlp([x_before, W2 LN(relu(W1 esm(g)))]))           over the genes of the cell
    loss = log norm(mu_g) - c_g log(mu_g) + log c_g!                                zero-truncated Poisson, nats
    log norm(mu) = max(mu - softplus(-mu), 0) if softplus_approx, else mu           as the authors have it

`total` is the sum of the clipped counts, so that the rates of a cell add up to it. The exact normaliser would be
log(exp(mu) - 1); the first form exceeds it by .15 at a rate of 1 and by .002 at 3, and the second is that of a Poisson
without truncation, because the authors' log1p(expm1(mu)) is mu. In training the bias of a key counts for later
queries only, in the authors' inference for the key's own query too: activations have the latter, the pretraining loss
and predictions the former (the authors' likelihoods of cells have the latter). The second head, which predicts the next
gene, is not read: the order that it predicts is that of the data's columns.

Names of modules are those of the checkpoint, with query, key and value of a block in one matrix. The network is equal
to 1e-5 to an implementation written for the tests from these equations with torch's stock layers.

Pearce et al. 2025, TranscriptFormer, 10.1101/2025.04.25.650731.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.checkpoint_files import load_weights, refuse_adapters
from sae_core.errors import CheckpointError, VocabularyError
from sae_core.json_fields import JsonFields
from sae_core.scfm.batches import Batch
from sae_core.scfm.encoder import Activation, EncoderBlock
from sae_core.scfm.foundation import FoundationModel, masked_mean
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGeneTask, sample_masked_genes
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.transcriptformer.tokenizer import TranscriptFormerTokenizer
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

TABLE = "gene_embeddings.embedding.weight"
ASSAYS = "aux_embeddings.assay.weight"
_USED = ("gene_embeddings.", "aux_embeddings.", "transformer_encoder.", "mu.")
_PREFIX = re.compile(r"^((module|_orig_mod|model)\.)+")
_LAYER = re.compile(r"^transformer_encoder\.encoder_layers\.(\d+)\.")
_FIRST = "transformer_encoder.encoder_layers.0."


@dataclass(frozen=True, kw_only=True)
class TranscriptFormerConfig:
    """Settings of the network and the tokenizer, from `config.json`."""

    n_layers: int
    n_heads: int
    d_model: int
    d_hidden: int
    seq_len: int
    """Number of places behind the assay: `[START]` and seq_len - 1 genes."""
    softcap: float = 10.0
    count_eps: float = 1e-6
    activation: Activation = "gelu"
    attention_bias: bool = False
    mlp_bias: bool = False
    clip_counts: float = 30.0
    softplus_approx: bool = True
    """Which normaliser the loss of a count has (module docstring)."""

    @classmethod
    def from_fields(cls, model: JsonFields, data: JsonFields, loss: JsonFields) -> TranscriptFormerConfig:
        """Config from the tables model_config, data_config and loss_config of a `config.json`.

        Raises:
            CheckpointError: a field is missing or has a value that is not allowed; the message names field and value.
        """
        n_heads, d_model = model.whole("num_heads"), model.whole("embed_dim")
        if d_model % n_heads:
            raise model.wrong("num_heads", f"a divisor of embed_dim {d_model}")
        model.choice("mu_link_fn", "softmax", ["softmax"])
        if model.whole("aux_len", 1, at_least=0) != 1:
            raise model.wrong("aux_len", "1, the assay")
        if not data.flag("pad_zeros", True):
            raise data.wrong("pad_zeros", "true: genes without counts are no tokens")
        softcap, clip_counts = model.number("softcap", 10.0), data.number("clip_counts", 30.0)
        if softcap <= 0:
            raise model.wrong("softcap", "a number above 0")
        if clip_counts < 1:
            raise data.wrong("clip_counts", "a number of 1 or more")
        return cls(
            n_layers=model.whole("num_layers"),
            n_heads=n_heads,
            d_model=d_model,
            d_hidden=model.whole("model_dim"),
            seq_len=model.whole("seq_len", at_least=2),
            softcap=softcap,
            count_eps=model.number("log_counts_eps", 1e-6),
            activation=cast("Activation", model.choice("activation", "gelu", get_args(Activation))),
            attention_bias=model.flag("attn_bias", False),
            mlp_bias=model.flag("fw_bias", False),
            clip_counts=clip_counts,
            softplus_approx=loss.flag("softplus_approx", True),
        )


class _MLP(nn.Module):
    """Linear, ReLU, LayerNorm, Linear; the fourth place is that of the dropout of training."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(d_in, d_hidden), nn.ReLU(), nn.LayerNorm(d_hidden), nn.Identity(), nn.Linear(d_hidden, d_out)
        )

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        return cast("Tensor", self.layers(x))


class GeneEmbedding(nn.Module):
    """The frozen vectors of proteins, and the layers that bring them to the width of the model."""

    def __init__(self, *, n_rows: int, d_protein: int, d_model: int) -> None:
        super().__init__()
        # the table may take gigabytes: without values of its own, its memory is taken when the checkpoint's are copied
        self.embedding = nn.Embedding(n_rows, d_protein, _weight=torch.empty(n_rows, d_protein))
        self.mlp = _MLP(d_protein, d_model, d_model)

    def forward(self, gene_id: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        """Vector of each gene; a gene that occurs several times is computed once."""
        different, place = torch.unique(gene_id, return_inverse=True)
        return cast("Tensor", self.mlp(self.embedding(different))[place])


class CountHead(nn.Module):
    """Pretraining head: the logit of each gene's share of the counts."""

    def __init__(self, *, n_rows: int, d_model: int) -> None:
        super().__init__()
        self.gene_embedding = nn.Embedding(n_rows, 1)
        self.mlp = _MLP(2 * d_model, d_model // 2, 1)

    def forward(
        self,
        gene_id: Int64[Tensor, " gene"],
        before: Float[Tensor, "gene d_model"],
        own: Float[Tensor, "gene d_model"],
    ) -> Float[Tensor, " gene"]:
        """b_g + mlp([x_before, vector of g])."""
        found: Tensor = self.gene_embedding(gene_id) + self.mlp(torch.cat([before, own], dim=-1))
        return found[:, 0]


class _Encoder(nn.Module):
    def __init__(self, c: TranscriptFormerConfig) -> None:
        super().__init__()
        self.encoder_layers = nn.ModuleList(
            EncoderBlock(
                d_model=c.d_model,
                n_heads=c.n_heads,
                d_hidden=c.d_hidden,
                norm_place="carried",
                activation=c.activation,
                attention_bias=c.attention_bias,
                mlp_bias=c.mlp_bias,
                softcap=c.softcap,
                is_causal=True,
            )
            for _ in range(c.n_layers)
        )


class TranscriptFormer(FoundationModel):
    """The TranscriptFormer network with its tokenizer; `load_model` builds it from a checkpoint folder.

    The tokens of assays follow the rows of the gene table: assay i is token n_rows + i.
    """

    family = "transcriptformer"
    readouts = ("sum", "mean")
    kept_of_long_cells = "the first genes in the order of the checkpoint's vocabulary"
    is_causal = True
    # training predicts every gene; a share leaves tokens that can be steered, as those that predict are not
    mask_fraction = 0.3

    def __init__(
        self,
        config: TranscriptFormerConfig,
        vocabulary: Vocabulary,
        tokenizer: TranscriptFormerTokenizer,
        *,
        n_rows: int,
        n_assays: int,
        d_protein: int,
        head: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary, self.tokenizer = config, vocabulary, tokenizer
        self.name, self.digest = "transcriptformer", ""
        self.d_model, self.n_layers, self.n_rows = config.d_model, config.n_layers, n_rows
        self.max_genes = tokenizer.max_genes(None)
        self.context = {"assay": tokenizer.assay}
        self.gene_embeddings = GeneEmbedding(n_rows=n_rows, d_protein=d_protein, d_model=config.d_model)
        self.aux_embeddings = nn.ModuleDict({"assay": nn.Embedding(n_assays, config.d_model)})
        self.transformer_encoder = _Encoder(config)
        self.mu = CountHead(n_rows=n_rows, d_model=config.d_model) if head else None

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""
        return cast("tuple[EncoderBlock, ...]", tuple(self.transformer_encoder.encoder_layers))

    def match_genes(self, symbols: Sequence[str], ensembl_ids: Sequence[str] | None = None) -> GeneMatch:
        """Token of each gene of a data set, found by its Ensembl id without version (`Vocabulary.match`).

        Raises:
            VocabularyError: no gene is in the vocabulary, or the two sequences differ in length.
        """
        try:
            return super().match_genes(symbols, ensembl_ids)
        except VocabularyError as error:
            raise VocabularyError(
                f"{error}; or give the protein vectors of the species of the data, which the authors publish: "
                "--model-option embeddings=SPECIES_gene.h5"
            ) from error

    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Vector of the assay, then those of `[START]` and the genes; the counts do not enter here."""
        table: Tensor = self.aux_embeddings["assay"].weight  # type: ignore[assignment]  # of an nn.Embedding
        is_assay = gene_id >= self.n_rows
        x = self.gene_embeddings(gene_id.masked_fill(is_assay, self.tokenizer.start_id)).to(table.dtype)
        x[is_assay] = table[gene_id[is_assay] - self.n_rows]
        return cast("Tensor", x)

    def key_mask(self, batch: Batch) -> Bool[Tensor, "row position"]:
        """All real tokens but an unknown assay."""
        return batch.is_real & (batch.gene_id != self.tokenizer.unknown_assay)

    def key_bias(self, batch: Batch) -> Float[Tensor, "row position"] | Float[Tensor, "row position key"]:
        """log1p(count + eps) of every key; where counts are predicted, for later queries only, as in training."""
        bias = torch.log1p(batch.value + self.config.count_eps)
        if not batch.is_task:
            return bias
        n = bias.shape[1]
        return bias[:, None, :] * torch.ones(n, n, dtype=bias.dtype, device=bias.device).tril(-1)

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
        """Assay, `[START]` and the expressed genes of each cell (`TranscriptFormerTokenizer`); `seed` is not used."""
        return self.tokenizer(indptr, indices, data, match, max_tokens=max_tokens, obs=obs)

    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row d_model"]:
        """Sum over `[START]` and the genes divided by seq_len, the official cell embedding; or mean over the genes."""
        if readout == "mean":
            return masked_mean(x, is_gene)
        return (x[:, 1] + (x * is_gene.to(x.dtype)[:, :, None]).sum(1)) / self.config.seq_len

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """Choose genes whose counts are to be predicted, each from the place before it; nothing is hidden."""
        chosen = np.flatnonzero(sample_masked_genes(tokens, seed=seed, fraction=fraction))
        return MaskedGeneTask(
            tokens=tokens,
            cell=tokens.cell_of_token()[chosen],
            gene_id=tokens.gene_id[chosen],
            target=tokens.value[chosen],
            token_rows=chosen - 1,
        )

    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Rate of the count of each chosen gene, in counts; the rates of all genes of a cell add up to its counts."""
        if self.mu is None:
            raise self._lacks_head("the count head (mu)")
        is_gene, gene_id = batch.is_gene[:, 1:], batch.gene_id[:, 1:]
        ids = gene_id[is_gene]
        logit = x.new_full(is_gene.shape, -torch.inf)
        logit[is_gene] = self.mu(ids, x[:, :-1][is_gene], self.gene_embeddings(ids))
        total = (batch.value * batch.is_gene).sum(1, keepdim=True)
        # the logit of a gene stands at the place before it, as does `column`
        return (logit.softmax(1) * total)[masked.row, masked.column]

    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Negative log likelihood of each count, in nats, with the authors' normaliser (module docstring)."""
        return self.count_error(self.predict_masked(x, batch, masked), masked.target)

    def count_error(self, rate: Float[Tensor, " gene"], count: Float[Tensor, " gene"]) -> Float[Tensor, " gene"]:
        """Negative log likelihood of counts of 1 or more under these rates, in nats."""
        rate = rate + self.config.count_eps
        log_norm = (rate - F.softplus(-rate)).clamp(min=0) if self.config.softplus_approx else rate
        return log_norm - count * rate.log() + torch.lgamma(count + 1)

    @torch.no_grad()
    def reset_weights(self, *, seed: int) -> None:
        """Torch's initialisation of linear layers and the table of assays, no bias of a gene in the head.

        The vectors of proteins stay: they are ESM-2's, and no training of TranscriptFormer changes them.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif name == "aux_embeddings.assay":
                cast("nn.Embedding", module).weight.normal_(generator=generator)
            elif name == "mu.gene_embedding":
                cast("nn.Embedding", module).weight.zero_()


def transcriptformer_from_weights(
    config: TranscriptFormerConfig,
    vocabulary: Vocabulary,
    tokenizer: TranscriptFormerTokenizer,
    weights: Mapping[str, Tensor],
) -> TranscriptFormer:
    """Model with the weights (`canonical_weights`) of a checkpoint; those that nothing here needs are not read.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape, or sizes are not those of the config.
    """
    ignored = tuple(sorted(key for key in weights if not key.startswith(_USED)))
    used = {key: value for key, value in weights.items() if key not in ignored}
    _check_sizes(config, used)
    with torch.random.fork_rng(devices=[]):
        model = TranscriptFormer(
            config,
            vocabulary,
            tokenizer,
            n_rows=len(used[TABLE]),
            n_assays=len(used[ASSAYS]),
            d_protein=used[TABLE].shape[1],
            head=any(key.startswith("mu.") for key in used),
        ).eval()
    load_weights(model, _stacked(used), what="config.json", official=_official)
    model.ignored_weights = ignored
    return model


def canonical_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a checkpoint in float32, without the prefixes of training scripts.

    Raises:
        CheckpointError: an adapter is among them, or one of the tables of genes and assays is missing or no table.
    """
    refuse_adapters(weights)
    named = {_PREFIX.sub("", key): value.float() for key, value in weights.items()}
    for table in (TABLE, ASSAYS):
        if table not in named or named[table].ndim != 2:
            raise CheckpointError(f"the weights lack {table}; give the model_weights.pt of a TranscriptFormer folder")
    return named


def _check_sizes(config: TranscriptFormerConfig, weights: Mapping[str, Tensor]) -> None:
    """Check that sizes are those of the weights, before a network is built that may not fit into memory."""
    n_layers = 1 + max((int(found[1]) for key in weights if (found := _LAYER.match(key))), default=-1)
    hidden = weights.get(f"{_FIRST}linear1.weight")
    sizes = [("num_layers", config.n_layers, n_layers), ("embed_dim", config.d_model, weights[ASSAYS].shape[1])]
    sizes += [] if hidden is None else [("model_dim", config.d_hidden, len(hidden))]
    wrong = [
        f"{name} is {stated} in config.json and {size} in the weights" for name, stated, size in sizes if stated != size
    ]
    if wrong:
        raise CheckpointError(
            f"the weights do not fit config.json: {'; '.join(wrong)}; give the config.json of this checkpoint"
        )


def _stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of each block in one matrix; an incomplete triple stays, so that `load_weights` names it."""
    for key in [key for key in weights if ".self_attn.linears.0." in key]:
        names = [key.replace(".linears.0.", f".linears.{part}.") for part in range(3)]
        if all(name in weights for name in names):
            weights[key.replace(".linears.0.", ".Wqkv.")] = torch.cat([weights.pop(name) for name in names])
    return {key.replace(".self_attn.linears.3.", ".self_attn.out_proj."): value for key, value in weights.items()}


def _official(name: str) -> str:
    """Name of a weight in the official files, for error messages."""
    name = name.replace(".self_attn.out_proj.", ".self_attn.linears.3.")
    return re.sub(r"\.self_attn\.Wqkv\.(.*)", r".self_attn.linears.0.\1 (or its linears.1 or linears.2)", name)
