"""Reading and writing the autoencoders of other libraries, with equal codes and reconstructions or an error.

A folder of another library goes in and a `SparseAutoencoder` of raw activations comes out, with what the folder says
about its origin (`ForeignSAE`); or the reverse. The doors are `read_foreign`, `find_foreign` and the three `write_*`
functions.

| format | files | read | written |
|---|---|---|---|
| saelens | cfg.json, sae_weights.safetensors | six architectures | all (batchtopk, matryoshka as jumprelu) |
| sparsify | cfg.json, sae.safetensors | topk | topk |
| dictionary_learning | config.json, ae.pt | seven classes | all |

No format holds everything that ours does, and some hold more (transcoders, per-token normalisation). Whatever has no
exact counterpart is an error and is never approximated. `conversion` has the equations, the module of each format has
its details, and `folders` finds the autoencoder in a folder.
"""

from sae_core.sae.interop.conversion import ForeignSAE, Origin
from sae_core.sae.interop.dictionary_learning import read_dictionary_learning, write_dictionary_learning
from sae_core.sae.interop.folders import FOREIGN_FORMATS, ForeignFolder, ForeignFormat, find_foreign, read_foreign
from sae_core.sae.interop.saelens import read_saelens, write_saelens
from sae_core.sae.interop.sparsify import read_sparsify, write_sparsify

__all__ = [
    "FOREIGN_FORMATS",
    "ForeignFolder",
    "ForeignFormat",
    "ForeignSAE",
    "Origin",
    "find_foreign",
    "read_dictionary_learning",
    "read_foreign",
    "read_saelens",
    "read_sparsify",
    "write_dictionary_learning",
    "write_saelens",
    "write_sparsify",
]
