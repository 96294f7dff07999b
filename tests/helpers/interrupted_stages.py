"""A stage that measures features, interrupted when half of its shards were there, and called again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from feature_store.storage import commit
from pipelines.effects import shards

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.runtime.stage import StageResult


def resumed(call: Callable[[], StageResult]) -> StageResult:
    """The result of a call after one that was interrupted."""
    do_shards = shards.do_shards

    def half(worker: type, job: Any, pending: Sequence[int], *args: Any, **options: Any) -> None:
        do_shards(worker, job, pending[: len(pending) // 2], *args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "do_shards", half)
        with pytest.raises(KeyboardInterrupt):
            call()
    result = call()
    assert result.reused > 0, "nothing was there from the interrupted call"
    return result


def assert_same_bytes(result: StageResult, other: StageResult, tables: Sequence[str]) -> None:
    """Check that two results are of one plan, and that their draws and tables have the same bytes."""
    assert result.run == other.run
    for name in ("draws", *tables):
        own, theirs = (commit.Run.open(made.path / name).manifest().sha for made in (result, other))
        assert own == theirs, name
