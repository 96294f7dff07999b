"""Stages that compute their shards in this process, which saves the start of actors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def replace_actors(patch: pytest.MonkeyPatch, do_shards: Callable[..., Any]) -> None:
    """Let `do_shards` take the place of the actors of every stage, and the plain loop that of Ray Train."""
    from pipelines.training_loop import fit

    reading = ("extract", "external.extraction", "encode", "genes", "matrix_tables")
    stages = (*reading, "associate", "probe", "effects.shards", "steering.shards")
    for stage in stages:
        patch.setattr(f"pipelines.{stage}.do_shards", do_shards)
    # Ray Train runs this loop too where there is no worker
    patch.setattr("pipelines.train._run_job", lambda job, *_arguments, **_options: fit(job))
