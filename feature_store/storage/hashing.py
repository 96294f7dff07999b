"""The hash of a plan, which names its run: canonical JSON, its sha256, and the run id."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from feature_store.errors import InputError


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
