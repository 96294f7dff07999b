"""Checkpoint folders: which family a folder holds, and its model.

A family is one record of `FAMILIES`; nothing else names it. The shipped `mini` model is an ordinary scGPT folder inside
this package; its weights are stored as float16 and widened to float32 on loading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sae_core.checkpoint_files import digest_files, read_json, read_weights
from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm import geneformer_files, scfoundation_files
from sae_core.scfm.foundation import FoundationModel
from sae_core.scfm.scgpt import ScGPT, ScGPTConfig, scgpt_from_weights
from sae_core.scfm.vocabulary import Vocabulary, read_vocabulary

MINI = Path(__file__).parent / "mini"
_SCGPT_WEIGHTS = ("model.safetensors", "best_model.pt")
_SCGPT_SPECIAL = ("<pad>", "<cls>", "<eoc>")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's folder is known and read; `files` is for people. `load` sets everything but the name."""

    name: str
    files: str
    matches: Callable[[Path], bool]
    load: Callable[[Path], FoundationModel]


def load_model(
    path: str | Path = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    random_init: bool = False,
    seed: int = 0,
) -> FoundationModel:
    """Model in a checkpoint folder, ready to be run; "mini" is the shipped one ("./mini" a folder of that name).

    >>> model = load_model("path/to/scGPT_human", device="cuda")
    >>> match = model.match_genes(["CD79A", "MS4A1"])

    `dtype`: of weights and activations, None is float32. `autocast` torch.bfloat16: matrix products in bfloat16;
    weights, norms and residual stream in float32. That is several times faster on hardware that has it, at the error
    that `sae_core.scfm.precision_error` measures. `random_init` keeps the architecture and vocabulary and draws the
    weights from `seed`: the control for whatever a pretrained model is said to show.

    Raises:
        CheckpointError: no folder, no known family, or files that do not fit together.
        ConfigError: an autocast dtype that is none.
    """
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ConfigError(f"autocast was {autocast}; allowed: torch.bfloat16, torch.float16, None")
    folder = MINI if str(path) == "mini" else Path(path)
    family = next((family for family in FAMILIES if family.matches(folder)), None)
    if family is None and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; allowed: 'mini' or a checkpoint folder. {_known()}")
    if family is None:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} is the folder of no known family; it holds {held}. {_known()}")
    try:
        model = family.load(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model.name = "mini" if folder == MINI else folder.resolve().name
    if random_init:
        model.reset_weights(seed=seed)
        model.digest = hashlib.sha256(f"{model.digest} random:{seed}".encode()).hexdigest()
    model.autocast = autocast
    return model.to(device=device, dtype=dtype or torch.float32).eval().requires_grad_(False)


def _load_scgpt(folder: Path) -> ScGPT:
    weights_path = next(folder / name for name in _SCGPT_WEIGHTS if (folder / name).is_file())
    ensembl_path = folder / "vocab_ensembl.json"
    ensembl = ensembl_path if ensembl_path.is_file() else None
    weights = read_weights(weights_path)
    vocabulary = _with_special(read_vocabulary(folder / "vocab.json", ensembl_path=ensembl))
    model = scgpt_from_weights(ScGPTConfig.from_args(read_json(folder / "args.json")), vocabulary, weights)
    files = [folder / "args.json", folder / "vocab.json", *([ensembl] if ensembl else []), weights_path]
    model.digest = digest_files(files)
    return model


def _with_special(vocabulary: Vocabulary) -> Vocabulary:
    """Special tokens that the file leaves out follow the genes, in upstream's order."""
    missing = tuple(token for token in _SCGPT_SPECIAL if token not in vocabulary)
    return replace(vocabulary, tokens=vocabulary.tokens + missing) if "<cls>" in missing else vocabulary


def _is_scgpt(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("args.json", "vocab.json")) and any(
        (folder / name).is_file() for name in _SCGPT_WEIGHTS
    )


def _known() -> str:
    return "Known folders: " + "; ".join(f"{family.name}: {family.files}" for family in FAMILIES)


FAMILIES = (
    Family(
        name="scgpt",
        files="args.json, vocab.json and best_model.pt (or model.safetensors)",
        matches=_is_scgpt,
        load=_load_scgpt,
    ),
    Family(
        name="geneformer",
        files=geneformer_files.FILES,
        matches=geneformer_files.is_geneformer,
        load=geneformer_files.load_geneformer,
    ),
    Family(
        name="scfoundation",
        files=scfoundation_files.FILES,
        matches=scfoundation_files.is_scfoundation,
        load=scfoundation_files.load_scfoundation,
    ),
)
