"""From a checkpoint folder to a model: `load_model` recognises the family of the folder and builds its model.

Each family is one record of `FAMILIES`; other packages add theirs (`sae_core.scfm.families`). The shipped `mini` model
is an ordinary scGPT folder inside this package; its weights are stored as float16 and converted to float32 on loading.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sae_core.checkpoint_files import read_json
from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm.aido_cell import files as aido_cell
from sae_core.scfm.cell_context import OF_CELLS
from sae_core.scfm.families import Family, plug_ins
from sae_core.scfm.foundation import FoundationModel
from sae_core.scfm.geneformer import files as geneformer
from sae_core.scfm.nicheformer import files as nicheformer
from sae_core.scfm.scfoundation import files as scfoundation
from sae_core.scfm.scgpt import files as scgpt
from sae_core.scfm.tahoe import files as tahoe
from sae_core.scfm.transcriptformer import files as transcriptformer
from sae_core.scfm.uce import files as uce

MINI = Path(__file__).parent / "mini"


def load_model(
    path: str | Path = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    random_init: bool = False,
    seed: int = 0,
    options: Mapping[str, str | Path] | None = None,
) -> FoundationModel:
    """Model in a checkpoint folder, in evaluation mode and without gradients.

    >>> model = load_model("path/to/scGPT_human", device="cuda")
    >>> match = model.match_genes(["CD79A", "MS4A1"])

    Args:
        path: a checkpoint folder, or "mini" for the shipped model ("./mini" is a folder of that name).
        device: where the model runs.
        dtype: of weights and activations; None is float32.
        autocast: dtype of the matrix products; weights, norms and the residual stream keep `dtype`. torch.bfloat16 is
            several times faster on hardware that supports it, at a relative error of the activations of .004 (layer 6
            of a scGPT of 12 layers).
        random_init: keep architecture and vocabulary and draw the weights from `seed`, as a control for the
            pretrained weights.
        seed: of the random weights.
        options: those of one family (`Family.options`) by name, such as {"part": "rde"} of scFoundation.

    Raises:
        CheckpointError: no folder, no known family, or files that cannot be read or do not fit together.
        ConfigError: an autocast dtype that is not allowed, or an option that the family does not have.
    """
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ConfigError(f"autocast was {autocast}; allowed: torch.bfloat16, torch.float16, None")
    folder = MINI if str(path) == "mini" else Path(path)
    _refuse_adapter_folder(folder)
    family = _family_of(folder)
    checked = {name: _checked_option(family, folder, name, value) for name, value in (options or {}).items()}
    try:
        model = family.load(folder, **checked)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model.name = "mini" if folder == MINI else folder.resolve().name
    model.notes = (*model.notes, *_unread(model.ignored_weights))
    if random_init:
        model.reset_weights(seed=seed)
        model.digest = hashlib.sha256(f"{model.digest} random:{seed}".encode()).hexdigest()
    model.autocast = autocast
    return model.to(device=device, dtype=dtype or torch.float32).eval().requires_grad_(False)


def _unread(names: Sequence[str]) -> Iterator[str]:
    """The note that names the modules whose weights were not read."""
    modules = sorted({re.sub(r"^((module|_orig_mod|model)\.)+", "", name).partition(".")[0] for name in names})
    if modules:
        yield f"not read, taken for heads that no activation needs: {', '.join(modules)}"


def _checked_option(family: Family, folder: Path, name: str, value: str | Path) -> str | Path:
    """The value of an option as the family's reader takes it.

    Raises:
        ConfigError: the family has no such option, or not one that each cell has its own value of.
    """
    own = {option.name: option for option in family.options}
    if name not in own:
        takes = [other.name for other in FAMILIES if name in {option.name for option in other.options}]
        raise ConfigError(
            f"{name} was {str(value)!r}, but {folder} is a {family.name} model; "
            + (f"only {' and '.join(takes)} has it" if takes else f"it has {', '.join(own) or 'no options'}")
        )
    if str(value).startswith(OF_CELLS) and not own[name].of_cells:
        raise ConfigError(f"{name} was {str(value)!r}; it is one for all cells, so give its value")
    return Path(value) if own[name].is_path else str(value)


def _family_of(folder: Path) -> Family:
    """The family of a checkpoint folder: one of `FAMILIES`, else the one of another package that recognises it.

    Raises:
        CheckpointError: there is no such folder, or it is of no family, or of two of other packages.
    """
    family = next((one for one in FAMILIES if one.matches(folder)), None)
    if family is not None:
        return family
    if not folder.is_dir():
        raise CheckpointError(
            f"the model {str(folder)!r} is not a folder; give 'mini', or the folder of a checkpoint of "
            f"{', '.join(family.name for family in FAMILIES)}: `scsae models-supported` lists the files of each"
        )
    found = plug_ins()
    matching = [one for one in found.families if one.matches(folder)]
    if len(matching) > 1:
        names = " and ".join(one.name for one in matching)
        raise CheckpointError(f"{folder} is recognised by the families {names}; uninstall the package that is wrong")
    if not matching:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} holds no checkpoint of a known family, but {held}. "
            + "; ".join((_known_folders((*FAMILIES, *found.families)), *found.problems))
        )
    return matching[0]


def _refuse_adapter_folder(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = read_json(path).get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder} holds an adapter (adapter_config.json) of the model {base!r}, which is no model of its own; merge "
        "it: in peft, PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(OTHER), and give OTHER"
    )


def _known_folders(families: Iterable[Family]) -> str:
    return "Known checkpoints: " + "; ".join(f"{family.name}: {family.files}" for family in families)


FAMILIES = (
    scgpt.FAMILY,
    geneformer.FAMILY,
    # careful: Nicheformer is asked before scFoundation, which takes any path of a .ckpt
    nicheformer.FAMILY,
    scfoundation.FAMILY,
    tahoe.FAMILY,
    transcriptformer.FAMILY,
    uce.FAMILY,
    aido_cell.FAMILY,
)
