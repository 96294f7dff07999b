"""Small files of a store with other content: their hash of themselves is made anew, so that they are no damage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from feature_store.storage.hashing import sealed

if TYPE_CHECKING:
    from pathlib import Path


def rewrite_sealed(file: Path, /, **changes: Any) -> None:
    """Change fields of a file that carries a hash of itself."""
    content = {key: value for key, value in json.loads(file.read_text()).items() if key != "check"}
    file.write_text(sealed({**content, **changes}))
