# %% [markdown]
# # A cluster
#
# A recipe holds the options of all stages, and `scsae submit` runs it on a Ray cluster as a job. Here the cluster is
# one machine with two cores, this one, so that all commands really run; with more machines they are the same. This page
# uses the cells of [PBMC in ten minutes](pbmc.py).

# %%
import atexit
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import anndata
import yaml
from ray.job_submission import JobSubmissionClient

import scsae

shared = Path("shared").resolve()
shared.mkdir(exist_ok=True)
anndata.read_h5ad("data/pbmc68k_reduced.h5ad")[::3].copy().write_h5ad(shared / "cells.h5ad")

# %% [markdown]
# ## The recipe
#
# The job runs on the head and its actors on every node, so all paths are absolute and lie in a folder that every
# machine sees, or the store is `s3://BUCKET/PREFIX`. Every key is an option of the command of its stage.

# %%
recipe = {
    "store": str(shared / "store"),
    "extract": {"data": str(shared / "cells.h5ad"), "layer": [2], "cell_type": "cell_type", "shard_cells": 80},
    "train": {"n_features": 256, "k": 16, "n_steps": 100, "recovery_cells": 0, "num_workers": 0},
    "encode": {},
    "associate": {},
}
Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
print(Path("recipe.yaml").read_text().replace(str(shared), "/shared"))

# %% [markdown]
# ## A head
#
# On a machine of your own this is `ray start --head --include-dashboard true`. `--block` keeps the head in one process,
# which is ended at the end of this page and nothing else with it: `ray stop` would end every Ray of the machine. Jobs
# run the `scsae` that the head finds on its PATH.


# %%
def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


scripts, folder = Path(sys.executable).parent, tempfile.mkdtemp(prefix="head")
dashboard, agent = free_port(), free_port()
options = f"--head --block --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port {dashboard}"
options += (
    f" --node-ip-address 127.0.0.1 --port {free_port()} --dashboard-agent-listen-port {agent} --temp-dir {folder}"
)
log = Path("head.log").open("w")
head = subprocess.Popen(
    [scripts / "ray", "start", *options.split(), "--num-cpus", "2", "--disable-usage-stats"],
    env={**os.environ, "RAY_AUTH_MODE": "disabled", "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
    stdout=log,
    stderr=subprocess.STDOUT,
)
atexit.register(head.terminate)
address = f"http://127.0.0.1:{dashboard}"


def is_up(url: str) -> bool:
    """Whether something answers there."""
    try:
        return bool(urllib.request.urlopen(url, timeout=5))
    except OSError:
        return False


while not (is_up(f"{address}/api/version") and is_up(f"http://127.0.0.1:{agent}/api/local_raylet_healthz")):
    assert head.poll() is None, Path("head.log").read_text()
    time.sleep(0.5)

# %% [markdown]
# The Jobs API runs any command that it receives, so the dashboard listens at this machine alone; Ray's tokens
# (`RAY_AUTH_MODE=token`) are left out here. The dashboard of a cluster is reached through a forwarded port:
# `ray dashboard infra/ray-cluster-aws.yaml`, or `kubectl port-forward service/scsae-head-svc 8265`.
#
# ## Submit
#
# The text of the recipe goes to the head, and the log of the job comes back. The exit code is the job's outcome: 0
# done, 1 failed (submit again, and it resumes), 2 a wrong recipe. Ctrl-C leaves the job running.


# %%
def submit() -> subprocess.CompletedProcess[str]:
    """What `scsae submit recipe.yaml --address http://HEAD:8265` says."""
    command = [scripts / "scsae", "submit", "recipe.yaml", "--address", address]
    return subprocess.run(command, capture_output=True, text=True, check=False)


done = submit()
assert done.returncode == 0, done.stderr
# a bar of progress overwrites its line
begun = re.findall(r"stage \d of \d: \w+", done.stdout)
{"exit code": done.returncode, "log": begun}

# %% [markdown]
# ## The job
#
# Recipe, store and variables name the job. Submitting the same again follows it, and starts no other.

# %%
again = submit()
[(job.submission_id, job.status.value) for job in JobSubmissionClient(address).list_jobs()], again.returncode

# %% [markdown]
# ## The store
#
# It is read where it lies, also while a job writes: a table is there once it is whole.

# %%
store = scsae.open(shared / "store")
store.features_for(label="CD19+ B").select("feature_id", "select_auroc", "auroc", "q", "top_genes").head(3)

# %%
head.terminate()
head.wait()
log.close()
shutil.rmtree(folder, ignore_errors=True)

# %% [markdown]
# ## More machines
#
# What changes is how the head and its workers start; replace what is in CAPITALS in the files first, and set
# `num_actors` in the recipe where machines start on demand. None of this runs on this page:
#
# | where | command |
# |---|---|
# | your machines, by ssh | `ray up infra/ray-cluster-onprem.yaml` |
# | AWS, spot GPUs | `ray up infra/ray-cluster-aws.yaml` |
# | Kubernetes | `kubectl apply -f infra/kuberay/ray-job.yaml` |
# | Slurm | `sbatch --nodes=4 --gpus-per-node=1 infra/slurm/extract.sbatch RECIPE.yaml` |
#
# `infra/README.md` says what each needs and what of it was tested, and [many cells, many machines](../machines.md) what
# is computed of an atlas.
