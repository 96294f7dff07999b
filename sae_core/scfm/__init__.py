"""Single-cell foundation models as plain torch modules, with their tokenizers, vocabularies and checkpoint readers.

Usage: `model = load_model("mini")` (or a checkpoint folder), `match = model.match_genes(symbols)`,
`tokens = model.tokenize(indptr, indices, data, match, seed=0)`, `model.activations(tokens, ["layer.2"])`.
"""

from sae_core.scfm.checkpoint import load_model
from sae_core.scfm.coverage import Coverage
from sae_core.scfm.foundation import CachedActivations, FoundationModel
from sae_core.scfm.geneformer import Geneformer, GeneformerConfig
from sae_core.scfm.precision import precision_error
from sae_core.scfm.pretraining import MaskedGenePrediction, MaskedGeneTask, PretrainingLoss
from sae_core.scfm.scfoundation import ScFoundation, ScFoundationConfig
from sae_core.scfm.scgpt import ScGPT, ScGPTConfig
from sae_core.scfm.sites import Patch, Site, TokenInfo
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

__all__ = [
    "CachedActivations",
    "Coverage",
    "FoundationModel",
    "GeneMatch",
    "Geneformer",
    "GeneformerConfig",
    "MaskedGenePrediction",
    "MaskedGeneTask",
    "Patch",
    "PretrainingLoss",
    "ScFoundation",
    "ScFoundationConfig",
    "ScGPT",
    "ScGPTConfig",
    "Site",
    "TokenInfo",
    "Tokens",
    "Vocabulary",
    "load_model",
    "precision_error",
]
