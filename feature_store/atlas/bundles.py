"""Bundles: many resources of an export in one compressed file, because thousands of small files are slow to copy.

    data/index.gz            JSON: {"bundles": [{"file", "paths"}, ...]}
    data/<name>-<i>.gz       u32 H (little endian), H bytes of JSON [[path, bytes], ...], then the resources in order

Every file is gzip, which a browser unpacks by itself, whatever the host. A bundle holds neighbouring resources of one
kind, so that what a page needs next is often there already. The bytes follow from the resources alone.
"""

import gzip
import json
from collections.abc import Iterator, Sequence

INDEX = "index.gz"
MOST_IN_BUNDLE = 64
"""Resources of a kind in one bundle: 64 documents of features take .3 MB."""
LEVEL = 4
"""Level 6 takes twice the time for a tenth less."""


def planned(kinds: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, list[str]]]:
    """The name of each bundle and the paths in it; kinds: the pattern of each kind of resource, and its paths.

    Resources that are alone of their kind share a bundle, which a browser reads first.
    """
    alone = [paths[0] for _, paths in kinds if len(paths) == 1]
    if alone:
        yield "first-0.gz", alone
    for pattern, paths in kinds:
        name = pattern.split(".")[0].replace("/", "_").replace("{", "").replace("}", "")
        suffix = pattern.rsplit(".", 1)[1]
        for i, start in enumerate(range(0, len(paths) if len(paths) > 1 else 0, MOST_IN_BUNDLE)):
            yield f"{name}_{suffix}-{i}.gz", list(paths[start : start + MOST_IN_BUNDLE])


def packed(resources: Sequence[tuple[str, bytes]]) -> bytes:
    """A bundle of (path, bytes)."""
    header = json.dumps([[path, len(body)] for path, body in resources], separators=(",", ":")).encode()
    whole = b"".join([len(header).to_bytes(4, "little"), header, *(body for _, body in resources)])
    return gzip.compress(whole, LEVEL, mtime=0)


def unpacked(bundle: bytes) -> dict[str, bytes]:
    """The resources of a bundle by path."""
    whole = memoryview(gzip.decompress(bundle))
    size = int.from_bytes(whole[:4], "little")
    at, found = 4 + size, {}
    for path, n in json.loads(bytes(whole[4:at])):
        found[path] = bytes(whole[at : at + n])
        at += n
    return found


def index(bundles: Sequence[tuple[str, Sequence[str]]]) -> bytes:
    """The list of all bundles, with the paths in each."""
    listed = {"bundles": [{"file": name, "paths": list(paths)} for name, paths in bundles]}
    return gzip.compress(json.dumps(listed, separators=(",", ":")).encode(), LEVEL, mtime=0)
