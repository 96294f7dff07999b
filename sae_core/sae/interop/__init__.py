"""Reading and writing the autoencoders of other libraries, with equal codes and reconstructions or an error.

A folder of another library goes in and a `SparseAutoencoder` comes out, or the reverse; the doors are `read_foreign`
and the three `write_*` functions.

| format | files | read | written |
|---|---|---|---|
| saelens | cfg.json, sae_weights.safetensors | six architectures | all (batchtopk, matryoshka as jumprelu) |
| sparsify | cfg.json, sae.safetensors | topk | topk |
| dictionary_learning | config.json, ae.pt | seven classes | all |

No format holds everything that ours does, and some hold more (transcoders, per-token normalisation). Whatever has no
exact counterpart is an error and is never approximated. `conversion` has the equations, and the module of each format
has its details.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sae_core.errors import CheckpointError
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.interop import dictionary_learning, saelens, sparsify
from sae_core.sae.interop.dictionary_learning import read_dictionary_learning, write_dictionary_learning
from sae_core.sae.interop.saelens import read_saelens, write_saelens
from sae_core.sae.interop.sparsify import read_sparsify, write_sparsify

__all__ = [
    "FOREIGN_FORMATS",
    "ForeignFormat",
    "read_dictionary_learning",
    "read_foreign",
    "read_saelens",
    "read_sparsify",
    "write_dictionary_learning",
    "write_saelens",
    "write_sparsify",
]


@dataclass(frozen=True, kw_only=True)
class ForeignFormat:
    """How a folder of another library is recognised, read and written."""

    files: tuple[str, str]
    """The names of the JSON file and the weights file; a folder that has both is of this format."""
    read: Callable[[Path], SparseAutoencoder]
    write: Callable[[SparseAutoencoder, Path], None]


FOREIGN_FORMATS = {
    "saelens": ForeignFormat(files=(saelens.HEADER, saelens.WEIGHTS), read=read_saelens, write=write_saelens),
    "sparsify": ForeignFormat(files=(sparsify.HEADER, sparsify.WEIGHTS), read=read_sparsify, write=write_sparsify),
    "dictionary_learning": ForeignFormat(
        files=(dictionary_learning.HEADER, dictionary_learning.WEIGHTS),
        read=read_dictionary_learning,
        write=write_dictionary_learning,
    ),
}


def read_foreign(folder: str | Path) -> SparseAutoencoder:
    """The autoencoder in a folder of one of `FOREIGN_FORMATS`, which is recognised by its files.

    The autoencoder takes raw activations, and `save_sae` saves it like our own. Most folders with thresholds do not
    state k; the configuration then has k = 1, which has no effect on codes and has to be replaced before a new
    calibration.

    Raises:
        CheckpointError: there is no such folder, it has the files of no format or of two, or something in it has no
            exact counterpart here.
    """
    folder = Path(folder)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = [name for name, record in FOREIGN_FORMATS.items() if found.issuperset(record.files)]
    if len(known) != 1:
        allowed = "; ".join(f"{name}: {' and '.join(record.files)}" for name, record in FOREIGN_FORMATS.items())
        raise CheckpointError(
            f"{folder} holds {sorted(found)[:9]}, the files of {' and '.join(known) or 'no known format'}; allowed is "
            f"one of {allowed}. Read a folder of `scsae train` with load_sae."
        )
    return FOREIGN_FORMATS[known[0]].read(folder)
