"""What a figure was measured on: processor, its matrix instructions, versions, load, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # which decide the speed of products


def machine_facts(*packages: str) -> dict[str, Any]:
    """The facts of this process on this machine, and the versions of torch and of the `packages` that are installed."""
    cpu = _cpu()
    known = set(cpu.get("flags", "").split())
    facts = {
        "processor": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in known],
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions("torch", *packages),
        "command": " ".join(["python", *sys.argv]),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def as_markdown(facts: dict[str, Any]) -> str:
    """The facts as one line of prose under a table."""
    where = f"{facts['gpu']}, CUDA {facts['cuda']}; " if "gpu" in facts else ""
    what = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{where}{facts['processor']}, {facts['cores']} cores ({', '.join(facts['flags']) or 'no flags known'}), "
        f"{facts['threads']} threads, load {facts['load'][0]}; {what}; `{facts['command']}`"
    )


def _cpu() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo, or none where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
