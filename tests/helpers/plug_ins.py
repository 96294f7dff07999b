"""Packages that register entry points, as pip would leave them on the search path of Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def install(patch: pytest.MonkeyPatch, folder: Path, package: str, version: str, **points: str) -> None:
    """Install a package without code until the end of a test; `points` are the objects of `scsae.models` by name."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {place}" for name, place in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[scsae.models]", *lines, ""]))
    patch.syspath_prepend(folder)
