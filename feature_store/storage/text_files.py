"""Text files that a user hands over (gene sets, recipes): one reader, which says in one line what is wrong with a file.

A file may be compressed (.gz, .bz2, .xz, recognised by its first bytes) and may begin with a byte order mark. Texts are
UTF-8; where `latin1` is allowed, bytes that are no UTF-8 are read as Latin-1, in which names of genes are the same.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from feature_store.errors import InputError, NotFoundError
from feature_store.storage.data_files import HEAD_BYTES, refuse_unfetched_head

MOST_BYTES = 1_000_000_000
"""Largest size of a text, uncompressed."""
_COMPRESSED: Mapping[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
}
_MARKS: Mapping[bytes, str] = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ARCHIVE = b"PK\x03\x04"


def read_text(path: str | Path, what: str, *, wanted: str, latin1: bool = False) -> str:
    """The text of a file, with all ends of lines as newlines; `what` and `wanted` name the file and
    its kind in errors, such as "the recipe" and "a YAML file".

    Raises:
        NotFoundError: there is no such file.
        InputError: it is a folder, was never fetched (`refuse_unfetched`), cannot be opened, is damaged, too large, an
            archive of files, or no text.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give {wanted}")
    if not path.exists():
        raise NotFoundError(f"{what} {path} does not exist; give {wanted}")
    content = _content(path, what)
    if content.startswith(_ARCHIVE):
        raise InputError(f"{what} {path} is a zip archive; unpack it, and give the file inside")
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in content[:65_536]:
        raise InputError(f"{what} {path} is a binary file; give {wanted}")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if not latin1 or encoding != "utf-8":
            raise InputError(
                f"{what} {path} is no {encoding} text: byte {error.start} is 0x{content[error.start]:02x}; save it as "
                "UTF-8"
            ) from None
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def plain_stem(path: str | Path) -> str:
    """The name of a file without its suffix, and without that of the compression before it."""
    path = Path(path)
    return Path(path.stem).stem if path.suffix.lower() in (".gz", ".bz2", ".xz") else path.stem


def _content(path: Path, what: str) -> bytes:
    kind = "file"
    try:
        # careful: a pipe such as /dev/stdin can be read only once
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        refuse_unfetched_head(path, content[:HEAD_BYTES])
        kind, opened = next((found for mark, found in _COMPRESSED.items() if content.startswith(mark)), ("file", None))
        if opened is not None:
            with opened(io.BytesIO(content)) as file:
                content = file.read(MOST_BYTES + 1)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{what} {path} is damaged or incomplete ({kind}: {error}); fetch it again") from None
    except OSError as error:
        if kind == "bzip2":
            raise InputError(f"{what} {path} is damaged or incomplete ({kind}: {error}); fetch it again") from None
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    if len(content) > MOST_BYTES:
        raise InputError(f"{what} {path} has more than {MOST_BYTES:,} bytes of text; give a smaller file")
    return content
