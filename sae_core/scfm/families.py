"""A family of foundation models: how its checkpoint folders are recognised and read; and families of other packages.

Another package adds a family by an entry point of the group `scsae.models`, whose object is a `Family`:

    [project.entry-points."scsae.models"]
    my-family = "my_package:FAMILY"

Plug-ins are looked up, and imported, only for a folder that is of no family here. One that cannot be imported is
therefore an error where its family may be the one that is needed, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.errors import CheckpointError, SaeCoreError
from sae_core.scfm.foundation import FoundationModel

GROUP = "scsae.models"
"""The group of entry points in which packages register families."""


@dataclass(frozen=True, kw_only=True)
class ModelOption:
    """An option that one family of models has: a keyword of `load_model`, and NAME=VALUE of `--model-option`."""

    name: str
    help: str
    """What it does and its default, in a sentence."""
    is_path: bool = False
    """Whether the value is a path."""
    of_cells: bool = False
    """Whether each cell may have a value of its own, which "obs:COLUMN" says (`FoundationModel.context`)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a checkpoint folder of one family is recognised and read."""

    name: str
    files: str
    """The files of a folder, for error messages."""
    matches: Callable[[Path], bool]
    """Whether a path is a folder of this family."""
    load: Callable[..., FoundationModel]
    """The model in a folder, given the options that the family takes; `load_model` adds name, dtype and device."""
    options: tuple[ModelOption, ...] = ()
    """The options of `load_model` for this family alone; `load` takes their values as text, or a Path."""
    genes: str = ""
    """How data sets have to name their genes."""
    length: str = ""
    """How many genes of a cell go in."""
    licence: str = ""
    """The licence of the weights, as their publishers state it."""


class PlugIns(NamedTuple):
    """The families of other packages, and a sentence for each that cannot be used."""

    families: tuple[Family, ...]
    """Their errors name the package: whatever `matches` or `load` raises is a `CheckpointError`."""
    problems: tuple[str, ...]


def plug_ins() -> PlugIns:
    """The families that installed packages register, by name; all of them are imported."""
    families: list[Family] = []
    problems: list[str] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        where = f"the family {point.name!r} of the package {_package(point)}"
        try:
            family = point.load()
        except Exception as error:  # noqa: BLE001  the import of a package may raise anything
            problems.append(f"{where} cannot be imported ({_told(error)}); repair or uninstall the package")
            continue
        if isinstance(family, Family):
            named = replace(family, name=f"{family.name} ({_package(point)})")
            families.append(
                replace(named, matches=partial(_matches, family, where), load=partial(_load, family, where))
            )
        else:
            problems.append(f"{where} is a {type(family).__name__} and no sae_core.scfm.Family; {_ADVICE}")
    return PlugIns(tuple(families), tuple(problems))


_ADVICE = "tell the authors of the package, or uninstall it"


def _matches(family: Family, where: str, folder: Path) -> bool:
    try:
        return bool(family.matches(folder))
    except Exception as error:
        raise CheckpointError(f"{where} failed to look at {folder} ({_told(error)}); {_ADVICE}") from error


def _load(family: Family, where: str, folder: Path, **options: Any) -> FoundationModel:
    try:
        model = family.load(folder, **options)
    except (SaeCoreError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{where} failed to load it ({_told(error)}); {_ADVICE}") from error
    if not isinstance(model, FoundationModel) or not getattr(model, "digest", ""):
        what = "a model without a digest" if isinstance(model, FoundationModel) else f"a {type(model).__name__}"
        raise CheckpointError(f"{where} gave {what}; allowed: a FoundationModel with a digest; {_ADVICE}")
    return model


def _package(point: Any) -> str:
    # careful: once importlib_metadata, the backport, is loaded, entry points are of its class
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
