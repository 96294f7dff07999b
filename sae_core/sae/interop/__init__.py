"""Autoencoders of other libraries, read and written: the same codes and reconstructions, or a refusal that says why.

| format | files | read | written |
|---|---|---|---|
| saelens | cfg.json, sae_weights.safetensors | six architectures | all (batchtopk, matryoshka as jumprelu) |
| sparsify | cfg.json, sae.safetensors | topk | topk |
| dictionary_learning | config.json, ae.pt | seven classes | all |

None says everything that ours does, and some say more (transcoders, per-token normalisation): what has no exact
counterpart is never approximated. `parts` has the equations, each format's module what is particular to it.
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
    """How a library's folder is known, read and written."""

    files: tuple[str, str]
    """The JSON and the weights; a folder that has both is of this format."""
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
    """The autoencoder in a folder of any of `FOREIGN_FORMATS`, known by its files.

    It takes raw activations and is saved by `save_sae` like our own. Where a folder does not say k, as most do not that
    have thresholds, the configuration has k = 1: without effect on a code, to be replaced before a new calibration.

    Raises:
        CheckpointError: no such folder, the files of none or of two formats, or something without exact counterpart.
    """
    folder = Path(folder)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = [name for name, record in FOREIGN_FORMATS.items() if found.issuperset(record.files)]
    if len(known) != 1:
        allowed = "; ".join(f"{name}: {' and '.join(record.files)}" for name, record in FOREIGN_FORMATS.items())
        raise CheckpointError(
            f"{folder} holds {sorted(found)[:9]}, the files of {' and '.join(known) or 'no known format'}; allowed is "
            f"one of {allowed}. A folder of `scsae train` is read by load_sae."
        )
    return FOREIGN_FORMATS[known[0]].read(folder)
