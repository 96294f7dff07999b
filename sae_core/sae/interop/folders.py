"""The formats of other libraries by name, and the folder in which an autoencoder is.

A training writes several autoencoders, each into a folder of its own, so the folder that a user has downloaded may hold
one at its top, one further below, or several. `find_foreign` looks at names of files only; nothing is read.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sae_core.checkpoint_files import digest_files
from sae_core.errors import CheckpointError
from sae_core.sae.interop import dictionary_learning, saelens, sparsify
from sae_core.sae.interop.conversion import ForeignSAE
from sae_core.sae.interop.dictionary_learning import read_dictionary_learning, write_dictionary_learning
from sae_core.sae.interop.saelens import read_saelens, write_saelens
from sae_core.sae.interop.sparsify import read_sparsify, write_sparsify

MAX_DEPTH = 6
"""Folders below the one that is given in which an autoencoder is looked for."""
_SHOWN = 9


@dataclass(frozen=True, kw_only=True)
class ForeignFormat:
    """How a folder of another library is recognised, read and written."""

    files: tuple[str, str]
    """The names of the JSON file and the weights file; a folder that has both is of this format."""
    read: Callable[..., ForeignSAE]
    """(folder, input_scale=) -> the autoencoder."""
    write: Callable[..., None]
    """(sae, folder, origin=)."""
    loaded_by: str
    """The call of the library that loads a folder; {} stands for the folder."""


FOREIGN_FORMATS = {
    "saelens": ForeignFormat(
        files=(saelens.HEADER, saelens.WEIGHTS),
        read=read_saelens,
        write=write_saelens,
        loaded_by="sae_lens.SAE.load_from_disk({!r})",
    ),
    "sparsify": ForeignFormat(
        files=(sparsify.HEADER, sparsify.WEIGHTS),
        read=read_sparsify,
        write=write_sparsify,
        loaded_by="sparsify.SparseCoder.load_from_disk({!r})",
    ),
    "dictionary_learning": ForeignFormat(
        files=(dictionary_learning.HEADER, dictionary_learning.WEIGHTS),
        read=read_dictionary_learning,
        write=write_dictionary_learning,
        loaded_by="dictionary_learning.utils.load_dictionary({!r}, 'cpu')",
    ),
}


class ForeignFolder(NamedTuple):
    """A folder that holds one autoencoder, and its format."""

    folder: Path
    format: str

    @property
    def sha256(self) -> str:
        """Digest of the two files of the autoencoder, with their names; about 1 GB/s."""
        return digest_files([self.folder / name for name in FOREIGN_FORMATS[self.format].files])

    def read(self, *, input_scale: float | None = None) -> ForeignSAE:
        """The autoencoder. Errors as from the reader of its format."""
        return FOREIGN_FORMATS[self.format].read(self.folder, input_scale=input_scale)


def find_foreign(folder: str | Path, *, format: str | None = None, pick: str | None = None) -> ForeignFolder:
    """The one autoencoder in a folder, or in a folder below it, recognised by the names of its files.

    Args:
        folder: what another library has written or published.
        format: a key of `FOREIGN_FORMATS`; None takes the one whose files are there.
        pick: path below `folder` of the autoencoder that is meant, where there are several.

    Raises:
        CheckpointError: there is no such folder, it has the files of no format, or of two, or several autoencoders; the
            message says what was found, and what to add.
    """
    top = Path(folder)
    if not top.is_dir():
        raise CheckpointError(f"{top} is not a folder; give the folder in which the files of the autoencoder are")
    target = top if pick is None else top / pick
    if pick is not None and (not target.is_dir() or not target.resolve().is_relative_to(top.resolve())):
        below = ", ".join(sorted(_below(top, format))) or "none"
        raise CheckpointError(f"{top} has no folder {pick!r} (--pick) below it; those with an autoencoder: {below}")
    names = sorted(path.name for path in target.iterdir())
    known = _formats_of(set(names), format)
    if len(known) == 1:
        return ForeignFolder(target, known[0])
    if len(known) > 1:
        raise CheckpointError(
            f"{target} holds the files of {' and '.join(known)}; say which is meant with --format {known[0]}"
        )
    found = _below(target, format)
    if len(found) == 1:
        ((name, of),) = found.items()
        if len(of) == 1:
            return ForeignFolder(target / name, of[0])
    if found:
        prefix = "" if pick is None else f"{pick.rstrip('/')}/"
        several = [f"{prefix}{name}" for name in sorted(found)]
        raise CheckpointError(
            f"{target} holds {len(found)} autoencoders: {_shown(several)}; name the one that is meant, "
            f"e.g. --pick {several[0]}"
        )
    allowed = "; ".join(f"{name}: {' and '.join(record.files)}" for name, record in FOREIGN_FORMATS.items())
    raise CheckpointError(
        f"{target} holds {_shown(names) or 'nothing'}, the files of no "
        f"{'known format' if format is None else f'autoencoder of {format}'}; allowed is one of {allowed}. Read a "
        "folder of `scsae train` with load_sae."
    )


def read_foreign(
    folder: str | Path, *, format: str | None = None, pick: str | None = None, input_scale: float | None = None
) -> ForeignSAE:
    """The autoencoder in a folder of one of `FOREIGN_FORMATS` (`find_foreign`); it takes raw activations.

    `save_sae` saves it like our own. Most folders with thresholds do not state k; the configuration then has k = 1,
    which has no effect on codes and has to be replaced before a new calibration.

    Args:
        folder: what another library has written or published.
        format: a key of `FOREIGN_FORMATS`; None takes the one whose files are there.
        pick: path below `folder` of the autoencoder that is meant, where there are several.
        input_scale: the number by which activations were multiplied before training, where the weights do not hold it.

    Raises:
        UnknownScaleError: the folder states that there is such a number, and it was not given.
        CheckpointError: as from `find_foreign`, or something in the files has no exact counterpart here.
    """
    return find_foreign(folder, format=format, pick=pick).read(input_scale=input_scale)


def _formats_of(files: set[str], format: str | None) -> list[str]:
    """The formats both of whose files are among the names; only `format` where one is named."""
    if format is not None and format not in FOREIGN_FORMATS:
        raise CheckpointError(f"the format was {format!r}; allowed: {', '.join(FOREIGN_FORMATS)}")
    return [
        name for name, record in FOREIGN_FORMATS.items() if format in (None, name) and files.issuperset(record.files)
    ]


def _below(folder: Path, format: str | None) -> dict[str, list[str]]:
    """The folders below a folder that hold an autoencoder, by their path, and the formats of each."""
    found = {}
    for place, folders, files in os.walk(folder):
        path = Path(place).relative_to(folder)
        if len(path.parts) >= MAX_DEPTH:
            folders.clear()
        if path.parts and (known := _formats_of(set(files), format)):
            found[path.as_posix()] = known
    return found


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
