"""Recognises files that are not what their name says: pointers, web pages, empty files and half downloads.

These are the commonest accidents with checkpoints, and the readers of the formats answer them with messages about
headers and pickles. The first bytes and the size tell them apart, so a check reads a few kilobytes whatever the size of
the file. Damage inside a file of the right size is not found here.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from sae_core.errors import CheckpointError

_HEAD = 4096
_BINARY = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".torch", ".h5")
_MAX_HEADER = 100_000_000  # safetensors' own limit
_AGAIN = "fetch the file again"
_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_PAGES = ("<!doctype", "<html", "<head", "<body", "<?xml", "<error")


def check_complete(path: Path) -> None:
    """Check by first bytes and size that a file is whole and no pointer or page in the place of the file.

    Raises:
        CheckpointError: it is a pointer of Git LFS or git-annex, a page or message of a server, compressed, empty, or
            shorter than its own header says; the message says which, and how many bytes there are.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        size = path.stat().st_size
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link to {path.readlink()}, which is not there; {_AGAIN}") from error
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if (found := _replacement(path, head, size)) or (found := _shortfall(path, head, size)):
        raise CheckpointError(f"{path} {found}")


def _replacement(path: Path, head: bytes, size: int) -> str | None:
    """What lies in the place of the file, if it is something else."""
    if size == 0:
        return f"is empty (0 bytes); {_AGAIN}"
    if head.startswith(_LFS):
        stated = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        whole = f"a file of {int(stated[1]):,} bytes" if stated else "the file"
        return (
            f"is a Git LFS pointer of {size} bytes in the place of {whole}; fetch the file with `git lfs pull` in its "
            "repository, or download it again"
        )
    if b"/annex/objects/" in head[:256]:
        return f"is a git-annex pointer of {size} bytes in the place of the file; fetch the file with `git annex get`"
    if not head.strip(b"\0"):
        return f"begins with {len(head)} zero bytes: the download was not finished ({size:,} bytes); {_AGAIN}"
    for start, name in _COMPRESSED.items():
        if head.startswith(start) and path.suffix != ".safetensors":
            return f"is compressed with {name}; decompress it first"
    text = _as_text(head)
    if text is None:
        return None
    if text.lstrip("\ufeff \t\r\n").lower().startswith(_PAGES):
        return f"is a web page of {size:,} bytes in the place of the file ({_start(text)}); {_AGAIN}"
    if path.suffix in _BINARY and not (path.suffix == ".pkl" and _may_be_pickle(head)):
        return f"holds text in the place of the file ({_start(text)}, {size:,} bytes); {_AGAIN}"
    return None


def _shortfall(path: Path, head: bytes, size: int) -> str | None:
    """By how much the file is shorter, or longer, than its own header says."""
    if path.suffix == ".safetensors":
        return _safetensors_shortfall(path, head, size)
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"is incomplete: it has {size:,} bytes, and the table of contents at its end is missing; {_AGAIN}"
    return None


def _safetensors_shortfall(path: Path, head: bytes, size: int) -> str | None:
    length = int.from_bytes(head[:8], "little")
    if size < 8 or (length <= _MAX_HEADER and 8 + length > size):
        return f"is incomplete: it has {size:,} bytes, and its header alone takes {8 + max(length, 2):,}; {_AGAIN}"
    if length > _MAX_HEADER:
        return f"is no safetensors file: its first bytes are {head[:8]!r}; {_AGAIN}"
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return f"is no safetensors file: its header is not as the format has it; {_AGAIN}"
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"is incomplete: {size:,} of {whole:,} bytes; {_AGAIN}"
    if size > whole:
        return f"has {size:,} bytes and its header describes {whole:,}; {_AGAIN}"
    return None


def _as_text(head: bytes) -> str | None:
    """The first bytes as text; None if they are not text."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < _HEAD:
            return None
        text = head[: error.start].decode("utf-8-sig")
    return text if all(char.isprintable() or char in "\t\r\n" for char in text) else None


def _may_be_pickle(head: bytes) -> bool:
    """Whether text may be a pickle of protocol 0, which is text and opens a container or an object first."""
    return head[:1] in b"(]}cIFVS" and b"\n" in head


def _start(text: str) -> str:
    return repr(text.strip()[:40])
