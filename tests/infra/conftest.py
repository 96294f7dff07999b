"""The checkout's root and what the files of infra/ have to agree with."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def manifest():
    """Reads one YAML document of infra/."""
    return lambda name: yaml.safe_load((ROOT / "infra" / name).read_text())


@pytest.fixture(scope="session")
def pinned():
    """Version of each package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.fullmatch(r"(\S+)==(\S+)", line).groups() for line in lines if line and not line.startswith("#"))
