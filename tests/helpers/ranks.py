"""Two processes of one process group over gloo, each of which runs the same code as its own rank."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MEET = """
import os, sys
from torch import distributed
from sae_core.sae.parallel import TorchCommunicator
rank, meet = int(sys.argv.pop(1)), sys.argv.pop(1)
distributed.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
ranks = TorchCommunicator()
"""
_PART = """
distributed.barrier()
sys.stderr.flush()
os._exit(0)
"""
"""A rank that has done its work leaves without taking Python down.

A thread of gloo that lets go of its last tensor while the interpreter ends is unwound and takes the process with it
("terminate called without an active exception"); that happened once in some hundred runs, after the work was done.
"""


def on_two_ranks(code: str, *arguments: object, meet: Path, timeout_s: int = 240) -> None:
    """Run `code` in two processes, which find `rank`, `ranks` (a communicator) and `sys.argv[1:]` (`arguments`).

    `meet` is a file that does not exist yet, at which the ranks meet. An error of either rank is an AssertionError with
    what both wrote.
    """
    whole = _MEET + code + _PART
    commands = [[sys.executable, "-c", whole, str(rank), str(meet), *map(str, arguments)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
