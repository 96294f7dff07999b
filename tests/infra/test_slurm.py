"""The Slurm script: by a linter, against stand-ins for `srun` and `scontrol` with real Ray, and on a real Slurm if any.

The stand-in for `srun` runs its command here, so the two "nodes" of the dry run are two of Ray's on one machine.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from feature_store.storage.commit import Run
from feature_store.storage.layout import Layout

SCRIPTS = Path(sys.executable).parent
STANDINS = {
    "srun": 'echo "srun $*" >> "$CALLS"\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"\n[ "$1" != show ] || printf "first\\nsecond\\n"\n',
}
# Ray and scsae that only wait, for what the script does with signals
WAITING = """echo "{0} started" >> "$CALLS"
trap 'echo "{0} ended" >> "$CALLS"; exit 1' TERM
sleep 60 > /dev/null 2>&1 &
wait
"""
FAKES = {"ray": WAITING.format("ray"), "scsae": WAITING.format("scsae"), "python": "echo 127.0.0.1\n"}


@pytest.fixture
def script(root):
    return root / "infra/slurm/extract.sbatch"


@pytest.fixture
def short():
    """A folder with a short path: sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def job(script, short):
    """Starts the script as Slurm would, on stand-ins."""

    def start(*arguments, fakes=(), nodes=1, **variables):
        for name, body in {**STANDINS, **{name: FAKES[name] for name in fakes}}.items():
            (short / name).write_text(f"#!/bin/sh\n{body}")
            (short / name).chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_", "SLURM_"))}
        environment = kept | {
            "PATH": f"{short}:{SCRIPTS}:{kept['PATH']}",
            "HOME": str(short),
            "CALLS": str(short / "calls"),
            "SCSAE_TMP": str(short),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "[first-second]",
            **variables,
        }
        return subprocess.Popen(
            ["bash", script, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def calls(folder):
    return (folder / "calls").read_text() if (folder / "calls").exists() else ""


def wait_for(folder, words):
    deadline = time.monotonic() + 60
    while words not in calls(folder):
        assert time.monotonic() < deadline, calls(folder)
        time.sleep(0.05)


def test_without_a_recipe_or_outside_slurm_it_says_how_to_call_it(script, short):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    bare = subprocess.run(["bash", script], env=clean, capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert "sbatch [options] extract.sbatch RECIPE.yaml" in bare.stderr
    outside = subprocess.run(["bash", script, "r.yaml"], env=clean, capture_output=True, text=True, check=False)
    assert outside.returncode == 1
    assert "scsae run r.yaml" in outside.stderr


def test_near_its_time_limit_it_ends_scsae_then_ray_and_goes_back_into_the_queue(job, short):
    process = job("r.yaml", fakes=FAKES)
    wait_for(short, "scsae started")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    said = calls(short)
    assert 0 < said.index("scsae ended") < said.index("ray ended") < said.index(f"scontrol requeue {os.getpid()}")
    assert f"rm -rf {short}/scsae-{os.getpid()}" in said


def test_after_too_many_restarts_it_gives_up_instead(job, short):
    process = job("r.yaml", fakes=FAKES, SLURM_RESTART_COUNT="3", SCSAE_MAX_RESTARTS="3")
    wait_for(short, "scsae started")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "gave up after 3 restarts" in output
    assert "requeue" not in calls(short)


def test_cancelled_it_ends_everything_and_stays_out_of_the_queue(job, short):
    process = job("r.yaml", fakes=FAKES)
    wait_for(short, "scsae started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    said = calls(short)
    assert "scsae ended" in said
    assert "ray ended" in said
    assert "requeue" not in said


@pytest.mark.ray
@pytest.mark.slow
def test_on_two_nodes_it_runs_a_recipe_to_its_end_on_real_ray_and_leaves_nothing_behind(
    job, short, tmp_path, tiny_data, tiny_model
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extract: {{data: {tiny_data}, model: {tiny_model}, layer: [1], shard_cells: 36}}\n")
    process = job(recipe, "--store", tmp_path / "store", nodes=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "Ray on 2 nodes" in output
    assert Run.open(Layout(tmp_path / "store").latest("activations").path).verify() == []
    assert not list(short.glob("scsae-*"))
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(short) not in left


def test_a_recipe_that_is_wrong_gives_the_job_its_exit_code_2(job, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extrac: {}\n")
    process = job(recipe, fakes=("ray", "python"))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "'extrac'" in output


CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node.pid
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def slurm(short):
    """A Slurm of one node on this machine; calls its commands."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "srun", "scontrol"))) or os.geteuid() != 0:
        pytest.skip("no Slurm here to start: Debian's packages slurmctld, slurmd and slurm-client, and root")
    host = socket.gethostname().partition(".")[0]
    (short / "slurm.conf").write_text(CONFIG.format(folder=short, host=host, controller=free_port(), node=free_port()))
    for name in ("state", "spool"):
        (short / name).mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_", "SLURM_"))}
    environment = kept | {"SLURM_CONF": str(short / "slurm.conf"), "HOME": str(short), "SCSAE_BIN": str(SCRIPTS)}
    environment["SCSAE_TMP"] = str(short)

    def call(*command):
        done = subprocess.run(
            [*map(str, command)], env=environment, cwd=short, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    daemons = []
    for name in ("slurmctld", "slurmd"):
        log = (short / f"{name}.log").open("w")
        daemons.append(subprocess.Popen([name, "-D"], env=environment, stdout=log, stderr=log))
        log.close()
    try:
        yield call
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_real_slurm_it_requeues_itself_when_told_of_its_time_limit_and_then_ends_the_recipe(
    slurm, script, short, tmp_path, tiny_data, tiny_model
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extract: {{data: {tiny_data}, model: {tiny_model}, layer: [1], shard_cells: 36}}\n")
    assert wait_until(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T"), 60), slurm("sinfo")
    options = ("--cpus-per-task=1", "--mem=100", "--time=10", "--output=job.log", "--begin=now")
    job = slurm("sbatch", "--parsable", *options, script, recipe, "--store", tmp_path / "store").strip()
    log = short / "job.log"

    def field(name):
        found = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", job))
        return found and found[1]

    assert wait_until(lambda: log.exists() and "Ray on 1 nodes" in log.read_text(), 120), log.read_text()
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert wait_until(lambda: field("Restarts") == "1", 90), log.read_text()
    # Slurm holds a requeued job back for two minutes, so that its processes may end
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert wait_until(lambda: field("JobState") in ("COMPLETED", "FAILED"), 240), slurm("scontrol", "show", "job", job)
    assert (field("JobState"), field("ExitCode")) == ("COMPLETED", "0:0"), log.read_text()
    assert "out of time; back into the queue to resume" in log.read_text()
    assert Run.open(Layout(tmp_path / "store").latest("activations").path).verify() == []
    assert not list(short.glob("scsae-*"))
