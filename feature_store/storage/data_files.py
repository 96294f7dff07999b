"""Files that are not what their name says: pointers, web pages, archives and half downloads, told by their first bytes.

The commonest accident with data is that the file was never fetched: Git LFS and git-annex leave a small text in its
place, a server answers with a page or an error, and a download that was cut off leaves the beginning. An HDF5 file says
how long it is. One read of `HEAD_BYTES` tells these apart, and each is answered with what to do.
"""

import re
from pathlib import Path

from feature_store.errors import InputError
from feature_store.storage.addresses import DataPath

HEAD_BYTES = 4096
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ARCHIVES = {
    b"\x1f\x8b": ("gzip", "gunzip -c"),
    b"BZh": ("bzip2", "bunzip2 -c"),
    b"\xfd7zXZ\x00": ("xz", "unxz -c"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd -c"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_TABLES = {".csv": ",", ".tsv": "\\t", ".txt": "\\t"}


def refuse_unfetched(path: Path) -> None:
    """Raise InputError for a file that is empty, a pointer to the real one, a web page or an error of a server, or only
    zeros at its beginning.
    """
    with path.open("rb") as file:
        refuse_unfetched_head(path, file.read(HEAD_BYTES))


def refuse_unfetched_head(path: DataPath, head: bytes) -> None:
    """Do what `refuse_unfetched` does for a file whose first HEAD_BYTES, or all bytes of a smaller one, were read."""
    if not head:
        raise InputError(f"{path} is empty (0 bytes); fetch it again")
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        of = f" of {int(size[1]):,} bytes" if size else ""
        raise InputError(
            f"{path} is a Git LFS pointer, not the file{of}; fetch it with `git lfs pull --include {path.name}` in its "
            "repository, or download it"
        )
    if b"/annex/objects/" in head[:512]:
        raise InputError(f"{path} is a git-annex pointer, not the file; fetch it with `git annex get {path.name}`")
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")):
        raise InputError(f"{path} is a web page (HTML) saved under this name; download the file itself")
    if start.startswith((b"<?xml", b"<error")):
        raise InputError(f"{path} is an answer of a server (XML) saved under this name; download the file itself")
    if len(head) == HEAD_BYTES and not any(head):
        raise InputError(f"{path} begins with zeros, as a download that was not finished; fetch it again")


def refuse_unfetched_below(folder: Path) -> None:
    """Raise InputError for the first file of a folder that is none of its own; only small files are looked at."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < HEAD_BYTES:
            refuse_unfetched(path)


def refuse_archive(path: Path, *, suffix: str) -> None:
    """Raise InputError for a file that is compressed or an archive, with the command that unpacks it to `suffix`."""
    with path.open("rb") as file:
        _refuse_archive_head(path, file.read(8), suffix=suffix)


def _refuse_archive_head(path: DataPath, head: bytes, *, suffix: str) -> None:
    for magic, (kind, command) in _ARCHIVES.items():
        if head.startswith(magic):
            to = "" if kind == "zip" else f" > {path.name.split('.')[0]}-unpacked{suffix}"
            raise InputError(f"{path} is compressed ({kind}); unpack it first: {command} {path}{to}")


def refuse_other_than_hdf5(path: Path) -> None:
    """Raise InputError for a file that is not HDF5, or shorter than its own header says, with what it is instead."""
    with path.open("rb") as file:
        refuse_other_than_hdf5_head(path, file.read(HEAD_BYTES), path.stat().st_size)


def refuse_other_than_hdf5_head(path: DataPath, head: bytes, size: int) -> None:
    """Do what `refuse_other_than_hdf5` does for a file of `size` bytes whose first HEAD_BYTES were read."""
    refuse_unfetched_head(path, head)
    length = _hdf5_length(head)
    if length is None:
        _refuse_archive_head(path, head, suffix=".h5ad")
        if separator := _TABLES.get(path.suffix.lower()):
            read = f"pd.read_csv({str(path)!r}, sep='{separator}', index_col=0)"
            command = f"import anndata, pandas as pd; anndata.AnnData({read}).write_h5ad({path.stem + '.h5ad'!r})"
            raise InputError(f'{path} is not an HDF5 file; convert it once, with a row a cell: python -c "{command}"')
        raise InputError(f"{path} is not an HDF5 file, or is damaged; give an .h5ad file or an AnnData .zarr folder")
    if size < length:
        raise InputError(
            f"{path} is an incomplete HDF5 file: {size:,} of {length:,} bytes ({size / length:.0%}); fetch it again"
        )


def _hdf5_length(head: bytes) -> int | None:
    """The number of bytes that an HDF5 file says it has, at least; None if it is no HDF5 file."""
    # a block of the user's own may come first; its length is a power of 2
    start = next((at for at in (0, 512, 1024, 2048) if head[at : at + 8] == _HDF5), None)
    if start is None:
        return None
    block = head[start:]
    version = block[8] if len(block) > 8 else 0
    at, width = (13, {0: 24, 1: 28}.get(version, 24)) if version < 2 else (9, 12)
    n = block[at] if len(block) > at else 8
    # base address, another address, then the end of the file
    end = block[width + 2 * n : width + 3 * n]
    if len(end) < n:
        return len(head) + 1
    return 0 if end == b"\xff" * n else int.from_bytes(end, "little")
