"""Ray is started when something needs it, once, and stopped; what does not fit, answer or live on is said."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime import cluster
from pipelines.runtime.cluster import Session, actors_that_fit, check_address, ray_session

SESSIONS = """
import sys
from pipelines.runtime.cluster import one_ray_session, ray_session
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


@pytest.mark.ray
@pytest.mark.slow
def test_sessions_inside_one_block_are_one_and_none_is_started_for_nothing(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def nodes(monkeypatch):
    """Pretend that the cluster has nodes with these CPUs and GPUs."""

    def pretend(*resources):
        found = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in resources]
        monkeypatch.setattr("ray.nodes", lambda: [*found, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])

    return pretend


@pytest.mark.parametrize(
    ("resources", "num_cpus", "num_gpus", "room"),
    [
        ([(2.0, 0.0)], 1, 0, 2),
        ([(3.0, 0.0), (3.0, 0.0)], 2, 0, 2),  # 6 cores, but a core is left over on each node
        ([(16.0, 0.0), (4.0, 2.0)], 1, 1, 2),  # the cores of the node without a GPU are of no use
        ([(8.0, 1.0), (1.0, 4.0)], 2, 1, 1),
        ([(32.0, 2.0)], 1, 0.6, 2),  # a share of a GPU does not span two
        ([(32.0, 1.0)], 1, 0.1, 10),
        ([(0.0, 0.0), (4.0, 0.0)], 1, 0, 4),
    ],
)
def test_actors_are_counted_node_by_node(nodes, resources, num_cpus, num_gpus, room):
    nodes(*resources)
    assert actors_that_fit(None, num_cpus=num_cpus, num_gpus=num_gpus, n_tasks=100) == room


def test_there_are_never_more_actors_than_tasks_or_than_wanted(nodes):
    nodes((8.0, 0.0))
    assert actors_that_fit(None, num_cpus=1, num_gpus=0, n_tasks=3) == 3
    assert actors_that_fit(2, num_cpus=1, num_gpus=0, n_tasks=3) == 2


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "words"),
    [
        (5, 0, "5 CPUs and 0 GPUs .*--num-cpus.*: 4 CPUs and 0 GPUs; 2 CPUs and 2 GPUs"),
        (1, 3, "1 CPUs and 3 GPUs .*--num-gpus.*: 4 CPUs and 0 GPUs; 2 CPUs and 2 GPUs"),
        (3, 1, "3 CPUs and 1 GPUs"),  # each is there, but not on one node
        (1, 1.5, r"--num-gpus was 1\.5"),
    ],
)
def test_an_actor_that_fits_on_no_node_is_refused_with_what_the_nodes_have(nodes, num_cpus, num_gpus, words):
    nodes((4.0, 0.0), (2.0, 2.0))
    with pytest.raises(UsageError, match=words):
        actors_that_fit(None, num_cpus=num_cpus, num_gpus=num_gpus, n_tasks=100)


@pytest.fixture
def session(ray_local):
    found = Session()
    found.raise_if_lost()
    return found


@pytest.fixture
def deaf_port():
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("name", ["raylet", "head"])
def test_a_session_whose_raylet_or_head_is_gone_from_this_machine_is_lost_at_once(session, deaf_port, name):
    session._ports[name] = session._ports["raylet"][0], deaf_port
    with pytest.raises(RunFailedError, match=f"{name} at .*:{deaf_port}.*run the same command again"):
        session.raise_if_lost()


def test_the_head_on_another_machine_may_be_silent_for_a_while(session, deaf_port, monkeypatch):
    head = session._ports["head"]
    session._ports["head"] = "127.0.0.1", deaf_port
    session.raise_if_lost()
    assert session._silent.keys() == {"head"}
    session._ports["head"] = head
    session.raise_if_lost()
    assert not session._silent
    session._ports["head"] = "127.0.0.1", deaf_port
    monkeypatch.setattr(cluster, "HEAD_SILENCE_S", 0.0)
    with pytest.raises(RunFailedError, match=r"head at 127\.0\.0\.1:"):
        session.raise_if_lost()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::ffff:127.0.0.1]:{}"])
def test_an_address_at_which_nothing_listens_is_refused_at_once(monkeypatch, deaf_port, form):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_options: pytest.fail("Ray would wait for minutes"))
    address = form.format(deaf_port)
    with pytest.raises(UsageError, match=rf"{re.escape(address)}.*--address"), ray_session(address=address):
        pass
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=rf"{re.escape(address)}.*--address"):
        check_address(None)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", r"scsae submit.*HOST:6379"),
        ("head", "HOST:6379"),
        ("head:port", "HOST:6379"),
        ("127.0.0.1:70000", "70000"),
        ("no-such-host.invalid:6379", "no-such-host"),
    ],
)
def test_an_address_of_another_kind_is_refused_with_the_kinds_there_are(monkeypatch, address, words):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UsageError, match=words) as refused:
        check_address(address)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("ray://10.0.0.1:10001", UsageError, r"ray://10\.0\.0\.1:10001.*--address"),
        (None, RunFailedError, "run the same command again"),
    ],
)
def test_a_cluster_that_does_not_answer_is_an_error_of_whoever_named_it(monkeypatch, address, error, words):
    def refuse(**_options):
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr(cluster, "_connection_error", lambda _address: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(error, match=words), ray_session(address=address):
        pass


def test_an_open_session_is_used_and_left_open(ray_local):
    import ray

    with ray_session() as session:
        session.raise_if_lost()
    assert ray.is_initialized()


def test_sigterm_interrupts_like_ctrl_c_while_a_session_is_used(ray_local):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ray_session():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
