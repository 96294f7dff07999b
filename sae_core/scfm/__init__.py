"""Single-cell foundation models as plain torch modules.

The room turns cells into activations and cell embeddings: a checkpoint folder becomes a `FoundationModel`, its
tokenizer turns counts in CSR form into ragged `Tokens`, and the network gives activations at named sites, where patches
may replace them. Nothing in this package knows of autoencoders or files of cells. The door is `load_model`:

>>> model = load_model("mini")
>>> match = model.match_genes(symbols)
>>> tokens = model.tokenize(indptr, indices, data, match, seed=0)
>>> x = model.activations(tokens, ["layer.2"])

Each family has a folder: a module for its network, one for its tokenizer and one for its files;
docs/how-to-add-a-model.md says how to add a family, here or from another package.
"""

from sae_core.scfm.checkpoint import FAMILIES, load_model
from sae_core.scfm.coverage import Coverage
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.foundation import CachedActivations, FoundationModel
from sae_core.scfm.gene_names import likely_mismatch
from sae_core.scfm.geneformer.network import Geneformer, GeneformerConfig
from sae_core.scfm.nicheformer.network import Nicheformer, NicheformerConfig
from sae_core.scfm.pretraining import MaskedGenePrediction, MaskedGeneTask, PretrainingLoss
from sae_core.scfm.scfoundation.network import ScFoundation, ScFoundationConfig
from sae_core.scfm.scgpt.network import ScGPT, ScGPTConfig
from sae_core.scfm.sites import Patch, Site, TokenInfo
from sae_core.scfm.tahoe.network import Tahoe, TahoeConfig
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.transcriptformer.network import TranscriptFormer, TranscriptFormerConfig
from sae_core.scfm.uce.network import UCE, UCEConfig
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

__all__ = [
    "FAMILIES",
    "UCE",
    "CachedActivations",
    "Coverage",
    "Family",
    "FoundationModel",
    "GeneMatch",
    "Geneformer",
    "GeneformerConfig",
    "MaskedGenePrediction",
    "MaskedGeneTask",
    "ModelOption",
    "Nicheformer",
    "NicheformerConfig",
    "Patch",
    "PretrainingLoss",
    "ScFoundation",
    "ScFoundationConfig",
    "ScGPT",
    "ScGPTConfig",
    "Site",
    "Tahoe",
    "TahoeConfig",
    "TokenInfo",
    "Tokens",
    "TranscriptFormer",
    "TranscriptFormerConfig",
    "UCEConfig",
    "Vocabulary",
    "likely_mismatch",
    "load_model",
]
