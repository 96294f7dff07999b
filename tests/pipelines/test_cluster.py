"""Ray is started when something needs it, once, and stopped."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

SESSIONS = """
import sys
from pipelines.cluster import one_ray_session, ray_session
with one_ray_session():
    pass
assert "ray" not in sys.modules, "nothing asked for Ray"
with one_ray_session():
    with ray_session(num_cpus=1):
        import ray
        first = ray.get_runtime_context().get_node_id()
    assert ray.is_initialized(), "the block has not ended"
    with ray_session(num_cpus=1):
        assert ray.get_runtime_context().get_node_id() == first, "another session was started"
assert not ray.is_initialized(), "the block has ended"
with ray_session(num_cpus=1):
    pass
assert not ray.is_initialized(), "a session outside the block ends with itself"
"""


def test_sessions_inside_one_block_are_one_and_none_is_started_for_nothing(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
