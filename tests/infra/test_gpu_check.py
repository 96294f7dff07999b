"""The check of a GPU runs on a CPU in small sizes, so that it works on the day when there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_checkpoints import KINDS

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture
def check(root, monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the script adds
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # what lies in infra/ is listed in its README
    spec = importlib.util.spec_from_file_location("gpu_check", root / "infra/gpu/check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def run(check, monkeypatch, tmp_path, *arguments: str) -> tuple[int, dict, str]:
    """The exit status, the content of check.json, and the table."""
    monkeypatch.setattr(sys, "argv", ["check.py", "--dry-run", "--out", str(tmp_path), *arguments])
    status = check.main()
    return status, json.loads((tmp_path / "check.json").read_text()), (tmp_path / "check.md").read_text()


def test_every_section_runs_on_a_cpu_and_finds_nothing_wrong(check, monkeypatch, tmp_path):
    names = [name for name in check.SECTIONS if name != "tests"]  # which this run of the tests does itself
    status, result, table = run(check, monkeypatch, tmp_path, "--only", *names)
    assert status == 0, table
    assert [(one["section"], one["state"]) for one in result["sections"]] == [(name, "done") for name in names]
    assert all(one["rows"] for one in result["sections"])
    families = {row["what"].split(",")[0] for row in result["sections"][names.index("families")]["rows"]}
    assert families == set(KINDS)
    assert "cells/s" in table
    assert result["machine"]["versions"]["torch"] == torch.__version__


def test_a_section_that_fails_is_reported_and_the_others_run(check, monkeypatch, tmp_path):
    def broken(_) -> list:
        raise RuntimeError("no memory")

    def wrong(_) -> list:
        return [check.Row("error", 2.0, is_wrong=True)]

    def without(_) -> list:
        raise check.SkippedError("the package x is not installed")

    sections = {
        "broken": (broken, 9),
        "wrong": (wrong, 9),
        "without": (without, 9),
        "kernels": check.SECTIONS["kernels"],
    }
    monkeypatch.setattr(check, "SECTIONS", sections)
    status, result, table = run(check, monkeypatch, tmp_path)
    assert status == 1
    assert [one["state"] for one in result["sections"]] == ["failed", "failed", "skipped", "done"]
    assert "RuntimeError: no memory" in table
    assert "| wrong | error | 2 **wrong** |" in table
    assert "the package x is not installed" in table


def test_a_process_that_ends_without_a_result_or_too_late_is_a_failed_section(check, monkeypatch, tmp_path):
    options = check.argparse.Namespace(out=tmp_path)
    monkeypatch.setattr(check, "SECTIONS", {"kernels": (None, 60), "late": (None, 0.01)})
    monkeypatch.setattr(check, "__file__", str(tmp_path / "no-such-file.py"))
    ended = check.report_by_process("kernels", options)
    assert (ended["state"], ended["reason"]) == ("failed", "the process ended with status 2")
    assert check.report_by_process("late", options)["reason"] == "it took longer than 0.01 s"


def test_the_limits_of_the_sections_add_up_to_at_most_eight_minutes(check):
    assert sum(limit for _, limit in check.SECTIONS.values()) <= 480
