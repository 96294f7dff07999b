"""Hashes of small content: canonical JSON, its sha256, the run id of a plan, and JSON files that carry their hash."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from feature_store.errors import InputError

CHECK = "check"


def canonical_json(content: Mapping[str, Any]) -> str:
    """The one JSON text of a mapping: sorted keys, no spaces, no NaN. InputError for what JSON cannot hold."""
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"a plan holds only JSON values (str, int, float, bool, None, list, dict): {error}") from error


def content_sha(content: Mapping[str, Any]) -> str:
    """Sha256 (64 hex digits) of `canonical_json(content)`."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def run_id(content: Mapping[str, Any]) -> str:
    """The name of a run: the first 12 hex digits of `content_sha` of whatever determines the run's content."""
    return content_sha(content)[:12]


def sealed(content: Mapping[str, Any]) -> str:
    """Return the JSON text of a small file of the store, with a hash of its content under `check`."""
    return canonical_json({**content, CHECK: content_sha(content)[:16]})


def unsealed(data: bytes) -> dict[str, Any]:
    """Return the content of what `sealed` made. ValueError, which says what is wrong, if a byte changed."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"it is not JSON any more ({error})") from error
    except RecursionError as error:
        raise ValueError("it is not JSON any more (too deeply nested)") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not an object")
    noted = content.pop(CHECK, None)
    try:
        expected = content_sha(content)[:16]
    except InputError as error:
        raise ValueError(f"it holds what no file of the store holds ({error})") from error
    if noted != expected:
        what = "has no hash of itself, as an older version wrote it" if noted is None else "does not have its hash"
        raise ValueError(f"its content {what}")
    return content
