"""Everything that needs a GPU, in one run of at most eight minutes; on a CPU, or with --dry-run, in small sizes.

    infra/gpu/check.sh [--out FOLDER] [--only SECTION ...] [--dry-run]

Each section is a process of its own with a limit of time, so that a failing one neither ends nor disturbs the others.
In a dry run all are functions of one process. FOLDER gets check.json and check.md, the tables for docs/measured.md. The
exit status is 1 if a section failed. A section whose packages are not installed is skipped, with the reason.

tests       the tests marked gpu (a dry run collects them and runs none)
families    activations of a tiny checkpoint of each model family, float32 and bfloat16, against float32 on the CPU
kernels     values and gradients of the device's sparse products against the dense ones
sae_step    time and peak memory of a training step against a dense one, and the steps of other packages
extraction  cells/s of a model of scGPT's size: the bare loop, and with codes and statistics on the device (fused)
training    three steps through Ray Train and its process group, nccl on a GPU, against a trainer alone
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks"), str(ROOT / "tests/helpers")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from machine import as_markdown, machine_facts  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

GPU_TESTS = ("sae/test_kernels.py", "sae/test_reductions.py", "scfm/conformance", "steering/test_forward.py")
PACKAGES = ("triton", "ray", "eai-sparsify", "dictionary-learning", "sae-lens")


class Row(NamedTuple):
    """One figure of a section."""

    what: str
    value: float | str
    unit: str = ""
    is_wrong: bool = False


class SkippedError(Exception):
    """A section cannot run here; its text is the reason."""


class Run(NamedTuple):
    """Where and in which size the sections run."""

    device: str
    is_dry: bool
    with_ray: bool


def tests(run: Run) -> list[Row]:
    """Run the tests marked gpu, or collect them."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("the package pytest is not installed")
    paths = [str(ROOT / "tests/sae_core" / name) for name in GPU_TESTS]
    dry = ["--collect-only"] if run.is_dry else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=", *dry]
    command += ["--import-mode=importlib", "-q", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    rows = [Row("collected" if run.is_dry else "result", last, is_wrong=done.returncode != 0)]
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, flags=re.MULTILINE)
    return rows + [Row("failed", name, is_wrong=True) for name in failed]


def families(run: Run) -> list[Row]:
    """Compare the activations of every site on the device with those on the CPU."""
    import tiny_checkpoints

    from sae_core.scfm import load_model
    from scsae.testing.conformance import random_counts, relative_error, tokens_of

    rows = []
    for kind in tiny_checkpoints.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            path = tiny_checkpoints.write_tiny(Path(folder), kind)
            exact = load_model(path)
            tokens = tokens_of(exact, random_counts(tiny_checkpoints.N_GENES), tiny_checkpoints.SYMBOLS)
            wanted = exact.activations(tokens, exact.sites)
            same = load_model(path, device=run.device).activations(tokens, exact.sites)
            rough = load_model(path, device=run.device, autocast=torch.bfloat16)
            site = exact.default_site
            error = max(float((same[one] - wanted[one]).abs().max()) for one in exact.sites)
            coarse = relative_error(rough.activations(tokens, [site])[site], wanted[site])
        rows.append(Row(f"{kind}, float32", error, "largest difference", not error < 1e-4))
        rows.append(Row(f"{kind}, bfloat16", coarse, "relative error", not coarse < 0.05))
    return rows


def kernels(run: Run) -> list[Row]:
    """Compare the sparse products of the device with the dense ones."""
    from sae_core.sae.codes import SparseCodes
    from sae_core.sae.kernels import DENSE, kernel_for

    n_tokens, d_model, n_features, k = (64, 24, 96, 4) if run.is_dry else (1024, 768, 4096, 32)
    generator = torch.Generator().manual_seed(0)
    shapes = [(n_tokens, d_model), (n_features, d_model), (n_features,), (n_features, d_model)]
    weights = [torch.randn(s, generator=generator).to(run.device).requires_grad_() for s in shapes]
    x, W_enc, b_enc, W_dec = weights
    with torch.no_grad():
        pre = torch.addmm(b_enc, x, W_enc.T)
        mask = torch.zeros_like(pre, dtype=torch.bool).scatter(1, pre.topk(k, dim=1).indices, True)
    codes = SparseCodes.from_mask(pre, mask)
    found: list[list[Tensor]] = []
    for kernel in (kernel_for(torch.device(run.device)), DENSE):
        value = kernel.encode(x, W_enc, b_enc, codes)
        x_hat = kernel.decode(codes.with_value(value), W_dec)
        loss = (x_hat - x).square().mean()
        found.append([value.detach(), x_hat.detach(), *torch.autograd.grad(loss, weights)])
    names = ("values", "x_hat", "gradient of x", "gradient of W_enc", "gradient of b_enc", "gradient of W_dec")
    rows = []
    for name, fast, dense in zip(names, *found, strict=True):
        error = float((fast - dense).abs().max() / dense.abs().max())
        rows.append(Row(name, error, "largest difference / largest value", not error < 1e-4))
    return rows


def sae_step(run: Run) -> list[Row]:
    """Time a step against a dense one and against other packages, and measure its peak memory."""
    import bench_peers
    import bench_sae_step as own

    shape = (256, 32, 256, 4) if run.is_dry else (16384, 768, 32768, 64)
    clock = own.device_clock if run.device == "cuda" else time.perf_counter
    steps, missing = bench_peers.tried(run.device, [] if run.is_dry else None)
    rows = [Row(label, f"left out: {reason}") for label, reason in missing.items()]
    x = own.planted(*shape).to(run.device)
    dense = own.dense_step(x, *shape[2:])
    dense()
    turns = own.in_turn([dense], 3, clock)[0]
    what = "bfloat16" if run.device == "cuda" else "float32"
    rows.append(Row(f"dense, {what}", statistics.median(turns), "ms"))
    if run.device == "cuda":
        rows.append(Row(f"dense, {what}", own.peak_gib(lambda: own.dense_step(x, *shape[2:])), "peak GiB"))
    del dense
    result = bench_peers.time_shape(shape, steps, run.device, 3, clock)
    rows += [Row(label, statistics.median(ms), "ms") for label, ms in result["ms"].items()]
    rows += [Row(label, gib, "peak GiB") for label, gib in result.get("peak_gib", {}).items()]
    return rows


def extraction(run: Run) -> list[Row]:
    """Time a model's forward pass alone, and with codes and statistics of the shard on the device."""
    from sae_core.sae import SAEConfig, SparseAutoencoder
    from sae_core.sae.reductions import ShardReduction
    from sae_core.scfm import ScGPT, ScGPTConfig, Vocabulary

    n_cells, n_genes, d_model, n_layers = (24, 60, 32, 2) if run.is_dry else (2048, 2000, 512, 12)
    symbols = [f"GENE{i}" for i in range(n_genes)]
    vocabulary = Vocabulary(tokens=(*symbols, "<pad>", "<cls>", "<eoc>"))
    config = ScGPTConfig(n_layers=n_layers, n_heads=8, d_model=d_model, d_hidden=d_model, max_seq_len=1200)
    model = ScGPT.empty(config, vocabulary, n_tokens=len(vocabulary)).requires_grad_(False)
    model.reset_weights(seed=0)
    model.to(run.device)
    model.autocast = torch.bfloat16
    sae = SparseAutoencoder(SAEConfig(d_model=d_model, n_features=16 * d_model, k=16, arch="topk"))
    sae.requires_grad_(False).to(run.device)
    rng = np.random.default_rng(0)
    n_expressed = n_genes // 3
    col = np.concatenate([np.sort(rng.choice(n_genes, n_expressed, replace=False)) for _ in range(n_cells)])
    counts = rng.poisson(2.0, len(col)).astype(np.float32) + 1
    tokens = model.tokenize(
        np.arange(n_cells + 1) * n_expressed, col, counts, model.match_genes(symbols), seed=0, obs=None
    )
    site, block = model.sites[n_layers // 2], 8 if run.is_dry else 64

    def blocks() -> Iterator[tuple[int, Any, Tensor]]:
        for first in range(0, n_cells, block):
            part = tokens.cells(first, min(first + block, n_cells))
            yield first, part, model.activations(part, [site], max_batch_tokens=65_536)[site]

    def bare() -> None:
        for _ in blocks():
            pass

    def fused() -> None:
        shard = ShardReduction(
            n_features=sae.config.n_features,
            pooling="max",
            keep=256,
            level="cell",
            n_top_cells=20,
            n_top_tokens=20,
            by_gene=True,
        )
        for first, part, act in blocks():
            cell = part.cell_of_token()
            shard.add(
                sae.encode(act.float().to(run.device)),
                cell_idx=first + cell,
                token_pos=(np.arange(part.n_tokens) - part.offsets[cell]).astype(np.int32),
                gene_id=part.gene_id.astype(np.int32),
                split=np.zeros(part.n_tokens, np.uint8),
            )
        shard.finish()

    import bench_sae_step as own

    clock = own.device_clock if run.device == "cuda" else time.perf_counter
    bare()
    fused()
    with gpu_use(run) as busy:
        loop, whole = (min(times) for times in own.in_turn([bare, fused], 1 if run.is_dry else 3, clock))
    rows = [
        Row("tokens a cell", tokens.n_tokens / n_cells),
        Row("bare loop", 1e3 * n_cells / loop, "cells/s"),
        Row("fused encoding", 1e3 * n_cells / whole, "cells/s"),
        Row("fused encoding / bare loop", loop / whole),
    ]
    return rows + ([Row("utilisation of the GPU", statistics.mean(busy), "%")] if busy else [])


@contextlib.contextmanager
def gpu_use(run: Run) -> Iterator[list[float]]:
    """Fill a list, until the block ends, with the utilisation of the first GPU every tenth of a second."""
    found: list[float] = []
    if run.device != "cuda":
        yield found
        return
    query = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            yield found
        finally:
            watcher.terminate()
            text, _ = watcher.communicate()
            found += [float(line) for line in text.split() if line.replace(".", "").isdigit()]


def steps_of_training(config: dict[str, Any]) -> list[float]:
    """The losses of three steps, with the process group that is open, or alone."""
    from torch import distributed

    from sae_core.sae import Normaliser, SAEConfig, TrainConfig, Trainer
    from sae_core.sae.parallel import TorchCommunicator

    device = config["device"]
    together = distributed.is_initialized()
    x = torch.randn(3, 256, 32, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        SAEConfig(d_model=32, n_features=128, k=4),
        TrainConfig(n_steps=3, batch_size=256),
        Normaliser.fit(list(x)),
        device=device,
        communicator=TorchCommunicator(device) if together else None,
    )
    losses = [trainer.step(batch.to(device)).loss for batch in x]
    if config.get("file") and together:
        Path(config["file"]).write_text(json.dumps([distributed.get_backend(), losses]))
    return losses


def training(run: Run) -> list[Row]:
    """Train through Ray Train, or in a dry run in a process group of this process, and compare with a trainer alone."""
    from torch import distributed

    alone = steps_of_training({"device": run.device})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.json"
        config = {"device": run.device, "file": str(file)}
        if run.with_ray:
            train_by_ray(config, folder)
        else:
            store = distributed.FileStore(str(Path(folder) / "store"), 1)
            backend = "nccl" if run.device == "cuda" else "gloo"
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            try:
                steps_of_training(config)
            finally:
                distributed.destroy_process_group()
        backend, losses = json.loads(file.read_text())
    difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
    how = "Ray Train" if run.with_ray else "a process group"
    return [
        Row("process group", f"{backend}, by {how}"),
        Row("largest difference of a loss", difference, is_wrong=not difference < 1e-5),
    ]


def train_by_ray(config: dict[str, Any], folder: str) -> None:
    """Run the steps in one worker of Ray Train."""
    if importlib.util.find_spec("ray") is None:
        raise SkippedError("the package ray is not installed")
    # workers import what this process can import
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    from pipelines.runtime.cluster import ray_session

    with ray_session():
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            # by value, as the workers do not import this file
            lambda config, steps=steps_of_training: steps(config) and None,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=1, use_gpu=config["device"] == "cuda"),
            run_config=RunConfig(name="check", storage_path=folder),
        ).fit()


SECTIONS: dict[str, tuple[Callable[[Run], list[Row]], int]] = {
    "kernels": (kernels, 45),
    "families": (families, 60),
    "sae_step": (sae_step, 110),
    "extraction": (extraction, 75),
    "training": (training, 90),
    "tests": (tests, 100),
}
"""A function and its limit in seconds, together eight minutes; the tests come last, because they take longest."""


def report(name: str, run: Run) -> dict[str, Any]:
    """The outcome of one section: its rows, or why it has none."""
    began = time.perf_counter()
    try:
        rows = SECTIONS[name][0](run)
        outcome = {"state": "failed" if any(row.is_wrong for row in rows) else "done", "rows": rows}
    except (SkippedError, ModuleNotFoundError) as error:
        outcome = {"state": "skipped", "reason": str(error), "rows": []}
    except Exception as error:  # noqa: BLE001  the other sections have to run
        traceback.print_exc()
        outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}", "rows": []}
    rows = [row._asdict() for row in outcome["rows"]]
    return {"section": name, **outcome, "rows": rows, "seconds": round(time.perf_counter() - began, 1)}


def report_by_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The outcome of one section in a process of its own, which ends after the section's limit of time."""
    file, limit = options.out / f"{name}.json", SECTIONS[name][1]
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--section", name, "--out", str(options.out)]
    reason = ""
    try:
        done = subprocess.run(command, check=False, timeout=limit)
        reason = f"the process ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it took longer than {limit} s"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    return {"section": name, "state": "failed", "reason": reason, "rows": [], "seconds": limit}


def as_table(facts: dict[str, Any], reports: list[dict[str, Any]]) -> str:
    """The outcomes as Markdown."""
    lines = ["| section | what | value | unit |", "|---|---|---|---|"]
    for one in reports:
        reason = f": {one['reason']}" if one.get("reason") else ""
        lines.append(f"| **{one['section']}** | {one['state']} in {one['seconds']:.1f} s{reason} | | |")
        for row in one["rows"]:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.4g}"
            wrong = " **wrong**" if row["is_wrong"] else ""
            lines.append(f"| {one['section']} | {row['what']} | {value}{wrong} | {row['unit']} |")
    return "\n".join([*lines, "", as_markdown(facts)])


def main() -> int:
    """Run the sections, write the tables and say by the exit status whether one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for check.json and check.md; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="run these sections; default: all")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU; automatic without a GPU")
    parser.add_argument("--ray", action="store_true", help="start Ray in a dry run too")
    parser.add_argument(
        "--section", choices=SECTIONS, help="run one section in this process and write its JSON to --out"
    )
    options = parser.parse_args()
    options.out = options.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    options.out.mkdir(parents=True, exist_ok=True)
    is_dry = options.dry_run or not torch.cuda.is_available()
    run = Run(device="cpu" if is_dry else "cuda", is_dry=is_dry, with_ray=options.ray or not is_dry)
    if options.section:
        outcome = report(options.section, run)
        (options.out / f"{options.section}.json").write_text(json.dumps(outcome))
        return int(outcome["state"] == "failed")
    print("a dry run on the CPU" if is_dry else torch.cuda.get_device_name(), flush=True)
    reports = []
    for name in options.only or SECTIONS:
        reports.append(report(name, run) if is_dry else report_by_process(name, options))
        print(f"{name}: {reports[-1]['state']} in {reports[-1]['seconds']:.1f} s", flush=True)
    facts = machine_facts(*PACKAGES)
    table = as_table(facts, reports)
    print(table)
    result = {"machine": facts, "is_dry_run": is_dry, "sections": reports}
    (options.out / "check.json").write_text(json.dumps(result, indent=1))
    (options.out / "check.md").write_text(table + "\n")
    print(f"written to {options.out}")
    return int(any(one["state"] == "failed" for one in reports))


if __name__ == "__main__":
    sys.exit(main())
