"""What a run holds, without the time at which its manifests were created: that differs from one making to the next."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def bytes_of(path: Path) -> bytes:
    """The bytes of a file; of a manifest or its place on the list of commits, without the time and the hash over it."""
    if path.name != "MANIFEST.json" and path.parent.name != "commits":
        return path.read_bytes()
    content = json.loads(path.read_bytes())
    return json.dumps({key: value for key, value in content.items() if key not in ("created", "check")}).encode()


def contents_of(folder: Path) -> dict[str, bytes]:
    """`bytes_of` each file below a folder, by its path from there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): bytes_of(path) for path in files}


def hashes_of(folder: Path) -> dict[str, str]:
    """Sha256 of `bytes_of` each file below a folder, by its path from there."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents_of(folder).items()}
