"""Installs scsae with all that its tests need into the environment of this interpreter (the Makefile does it).

uv takes a fifth of the time of pip. It does not read the configuration of pip, so the places where pip looks for
packages are passed on to it. Where uv cannot be had, or does not find a package, pip installs.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
CONSTRAINTS = ["-c", str(ROOT / "constraints.txt")]
PACKAGES = ["-e", f"{ROOT}[dev]"]
PLACES = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
}
"""Options of pip that may hold several addresses or paths, and what they are called in uv."""


def configuration(listed: str) -> dict[str, str]:
    """The options of pip by name, from what `pip config list` prints: files first, then the environment."""
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    own = sorted(lines, key=lambda line: line[0].startswith(":env:"))
    return {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, _, value in own}


def places(options: Mapping[str, str]) -> Iterator[str]:
    """The options of uv for the places where pip looks for packages, and for what limits their versions."""
    for name, option in PLACES.items():
        for place in options.get(name, "").split():
            yield from (option, place)


def main() -> None:
    """Install with uv, else with pip."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    options = configuration(listed)
    certificates = {"SSL_CERT_FILE": options["cert"]} if "cert" in options else {}
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", sys.executable]
    # pip takes the best version of all places, too
    uv += ["--index-strategy", "unsafe-best-match", *places(options)]
    has_uv = subprocess.run([*PIP, "install", "--quiet", *CONSTRAINTS, "uv"], check=False).returncode == 0
    environment = {**os.environ, **certificates}
    if has_uv and subprocess.run([*uv, *CONSTRAINTS, *PACKAGES], env=environment, check=False).returncode == 0:
        return
    print("uv did not install the packages; pip does, which takes minutes", file=sys.stderr)
    # first, because a looser request may take a build for GPUs
    subprocess.run([*PIP, "install", "--quiet", *CONSTRAINTS, "torch==2.13.0"], check=True)
    subprocess.run([*PIP, "install", "--quiet", *CONSTRAINTS, *PACKAGES], check=True)


if __name__ == "__main__":
    main()
