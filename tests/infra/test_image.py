"""The image's recipe, by a linter and by what it copies and pins. It was not built: that takes a container engine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def dockerfile(root):
    """Instructions of the Dockerfile, continuation lines joined."""
    text = re.sub(r"\\\n", " ", (root / "infra/image/Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, rest in lines]


def test_the_linter_finds_nothing(root):
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install -e '.[infra]'")
    done = subprocess.run([hadolint, root / "infra/image/Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_everything_copied_exists_and_is_let_through_by_the_ignore_file(root, dockerfile):
    copied = [word for name, rest in dockerfile if name == "COPY" for word in rest.split()[:-1]]
    ignore = (root / "infra/image/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert set(copied) == allowed
    assert not [path for path in copied if not (root / path).exists()]


def test_the_packages_of_the_distribution_are_the_ones_copied(root, dockerfile):
    copied = {word for name, rest in dockerfile if name == "COPY" for word in rest.split()[:-1]}
    packages = {path.parent.name for path in root.glob("*/__init__.py")} - {"tests"}
    assert packages <= copied


def test_every_install_is_held_to_the_pinned_versions(dockerfile, pinned):
    arguments = dict(rest.split("=", 1) for name, rest in dockerfile if name == "ARG" and "=" in rest)
    installs = re.findall(r"pip install ([^;&]*)", " ".join(rest for name, rest in dockerfile if name == "RUN"))
    assert len(installs) == 3
    assert all("-c constraints.txt" in words or '"torch==$TORCH"' in words for words in installs)
    assert arguments["TORCH"] == pinned["torch"]
    assert arguments["DEVICE"] in ("gpu", "cpu")


def test_it_runs_as_a_user_of_its_own_and_holds_no_secret(dockerfile):
    users = [rest for name, rest in dockerfile if name == "USER"]
    assert users[-1:] == ["1000"]
    words = " ".join(f"{name} {rest}" for name, rest in dockerfile)
    assert not re.search(r"(?i)password|secret|token|api_key|aws_access", words)


def test_python_is_the_one_that_the_versions_are_known_for(root, dockerfile):
    known = re.search(r"Python (\d\.\d+)", (root / "constraints.txt").read_text())[1]
    assert dockerfile[0] == ("FROM", f"python:{known}-slim-bookworm")
