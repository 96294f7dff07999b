"""Programs that write or record tokens, killed with SIGKILL at a file operation, resume to the bytes of a calm one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from stored_bytes import hashes_of

if TYPE_CHECKING:
    from pathlib import Path

# For n = step, 2 * step, ... a fork runs the program on a store of its own and kills itself at its n-th file operation
# there, with half of the file that was to get its name; another fork resumes it. The last store is one without a kill.
# The parent starts no thread, which a fork would not have.
CRASH = """
import os, signal, sys
from pathlib import Path

import anndata, numpy as np, torch

import pipelines.external.recording, pipelines.external.writer, scsae
from feature_store.errors import InputError

how, data, root, step = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
OPTIONS = {"name": "net", "dtype": "f32", "shard_cells": 16, "buffer_size": "200B", "donor": "donor"}

def write(store):
    cells = anndata.read_h5ad(data) if how == "in-memory" else data
    rng = np.random.default_rng(3)
    gene = [rng.permutation(30)[:n] for n in rng.integers(3, 9, 72)]
    x = [rng.normal(size=(len(one), 6)) for one in gene]
    with scsae.ActivationWriter(store, cells, d_model=6, **OPTIONS) as writer:
        for block in np.split(rng.permutation(72), range(9, 72, 9)):
            names = np.repeat(block, [len(gene[cell]) for cell in block])
            writer.write(names, np.concatenate([gene[c] for c in block]), np.concatenate([x[c] for c in block]))

def record(store):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, 6), torch.nn.Linear(6, 6))
    genes = np.stack([np.random.default_rng(cell).permutation(30)[:5] for cell in range(72)])
    with scsae.record(model, "1", store, data, d_model=6, **OPTIONS) as recording, torch.no_grad():
        for cells in np.split(np.random.default_rng(1).permutation(72), range(9, 72, 9)):
            # the batches are always the same, because rounding depends on them
            if np.isin(cells, recording.missing).any():
                recording.batch(cells, genes[cells])
                model(torch.from_numpy(genes[cells]))

def forked(work, *arguments):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        work(*arguments)
        code = 0
    except InputError as error:
        # killed after the last commit
        code = 0 if "is complete" in str(error) else 1
        print(error, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)

def crashing(program, store, n):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir") and str(args[0]).startswith(str(store)):
            seen += 1
            if seen == n:
                if event in ("os.rename", "os.link") and os.path.isfile(args[0]):
                    os.truncate(args[0], os.path.getsize(args[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    program(store)

program = record if how == "record" else write
for n in range(step, 10_000, step):
    store = root / f"{n:04d}"
    status = forked(crashing, program, store, n)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert forked(program, store) == 0, f"the resumption of {n}"
print(n // step)
"""
PROGRAMS = ("write", "in-memory", "record")


def contents(store: Path) -> dict[str, str]:
    """The hashes of the files of a store, without the place of cells that lie in the store itself."""
    is_own = (store / "data").is_dir()
    return {name: one for name, one in hashes_of(store).items() if not (is_own and name.endswith("source.json"))}


def killed_and_resumed(how: str, data: Path, root: Path, *, step: int, timeout_s: float) -> None:
    """Kill the program at every `step`-th file operation; what is stored in the end is always the same."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CRASH, how, str(data), str(root), str(step)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stores = sorted(root.iterdir())
    assert len(stores) == int(done.stdout.split()[-1]) > 5
    undisturbed = contents(stores[-1])
    assert sum(name.startswith("activations/") and name.endswith(".parquet") for name in undisturbed) >= 5
    for store in stores:
        assert contents(store) == undisturbed, f"killed at operation {store.name}"
        assert not list(store.rglob(".tmp-*"))


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[] if how == "record" else pytest.mark.slow) for how in PROGRAMS]
)
def test_a_program_killed_at_some_file_operations_resumes_to_the_same_bytes(tiny_data, tmp_path, how):
    killed_and_resumed(how, tiny_data, tmp_path, step=47, timeout_s=280)


@pytest.mark.slow
@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_killed_at_any_file_operation_resumes_to_the_same_bytes(tiny_data, tmp_path, how):
    killed_and_resumed(how, tiny_data, tmp_path, step=1, timeout_s=290)
