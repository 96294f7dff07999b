"""What `--vectors SOURCE` names: `obsm/KEY` of the data files, or a file of vectors, perhaps with a key in it."""

import re
from pathlib import Path
from typing import NamedTuple

from feature_store.storage.addresses import is_address

OBSM = "obsm/"
SUFFIXES = (".npy", ".parquet", ".safetensors", ".pt", ".pth")
KEYED = (".safetensors", ".pt", ".pth")
"""Files that may hold several arrays, of which `FILE:KEY` names one."""
_KEY = re.compile(rf"(.+(?:{'|'.join(map(re.escape, KEYED))})):(.+)", re.DOTALL)


class VectorsPlace(NamedTuple):
    """Where vectors are: a file (None: the obsm of the data files), and the key of the array in it."""

    file: Path | None
    key: str | None

    @classmethod
    def parse(cls, text: str) -> "VectorsPlace":
        """The place that `--vectors` names. ValueError for anything else than the forms that it takes."""
        if text.startswith(OBSM) and len(text) > len(OBSM):
            return cls(None, text.removeprefix(OBSM))
        if is_address(text):
            raise ValueError(f"{text!r} is an address, at which vectors are not read; download them, and give the file")
        keyed = _KEY.fullmatch(text)
        file, key = (keyed[1], keyed[2]) if keyed else (text, None)
        if not file.endswith(SUFFIXES):
            raise ValueError(
                f"{text!r} names no vectors; give obsm/KEY of the data, FILE.npy, FILE.parquet, FILE.safetensors or "
                "FILE.pt, the last two as FILE.safetensors:KEY if they hold several arrays"
            )
        return cls(Path(file), key)

    def __str__(self) -> str:
        if self.file is None:
            return f"{OBSM}{self.key}"
        return f"{self.file}" if self.key is None else f"{self.file}:{self.key}"

    def absolute(self) -> "VectorsPlace":
        """The same place in a form that other processes and machines can use."""
        return self if self.file is None else self._replace(file=self.file.resolve())

    @property
    def name(self) -> str:
        """The name of the vectors where the user gives none: the key, or the file without its suffix."""
        if self.file is None:
            return str(self.key)
        return self.file.stem if self.key is None else f"{self.file.stem}:{self.key}"
