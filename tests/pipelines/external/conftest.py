"""Stages that start no Ray: every actor and the training run in this process, and nothing is logged to MLflow."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def without_ray(module_without_actors):
    """Start no actor in any stage, and no Ray Train."""


@pytest.fixture(scope="module")
def without_mlflow():
    """Register no SAE and log no evaluation, which take longer than all stages on the tiny cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.train.register_sae", lambda *_, **__: "nowhere")
        patch.setattr("pipelines.steering.run.log_evaluation", lambda *_: "nowhere")
        for stage in ("train", "steering.run"):
            patch.setattr(f"pipelines.{stage}.check_tracking", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def few_cells():
    """Steer few cells, and draw nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.steering.evaluators.MIN_CELLS", 2)
        patch.setattr("pipelines.steering.run.drawings_of", lambda *_: {})
        yield
