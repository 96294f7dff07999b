"""A small Ray session for the tests that need one; nothing of it lands in the user's home."""

import pytest


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory):
    """Two cores of Ray on this machine, for the whole session."""
    from pipelines.cluster import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(num_cpus=2):
            yield
