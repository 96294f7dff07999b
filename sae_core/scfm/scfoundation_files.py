"""Reader of scFoundation's files: `models.ckpt` with its three parts, and the gene list in the folder or its parent.

The path chooses a part: FOLDER/cell, FOLDER/rde or FOLDER/gene. FOLDER alone is `cell`, the part for cell embeddings,
or the first part that the file holds. The gene list is a table of two columns, gene_name and index, tab- or
comma-separated, named *gene_index*.tsv or .csv. With an optional vocab_ensembl.json {Ensembl id: symbol} in the folder,
genes also match by Ensembl id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_core.checkpoint_files import digest_files, read_json, read_torch_with_settings
from sae_core.errors import CheckpointError
from sae_core.scfm.scfoundation import (
    SOURCE,
    TARGET,
    ScFoundation,
    ScFoundationConfig,
    scfoundation_from_weights,
)
from sae_core.scfm.vocabulary import Vocabulary

FILES = "models.ckpt and OS_scRNA_gene_index.19264.tsv"
PARTS = ("cell", "rde", "gene")
_WEIGHTS = "models.ckpt"


def is_scfoundation(folder: Path) -> bool:
    """Whether `models.ckpt` lies in the folder, or in its parent where the path names a part."""
    return (_home(folder) / _WEIGHTS).is_file()


def load_scfoundation(path: Path) -> ScFoundation:
    """Model in a folder, or the part of it that the path names.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
    """
    folder = _home(path)
    parts = read_torch_with_settings(folder / _WEIGHTS)
    name = path.name if folder != path else None
    part_name, part = _part(parts, name)
    config = ScFoundationConfig.from_checkpoint(part["config"])
    genes_path = _gene_list(folder)
    ensembl_path = folder / "vocab_ensembl.json"
    ensembl = read_json(ensembl_path) if ensembl_path.is_file() else {}
    vocabulary = read_gene_list(genes_path, n_genes=config.n_genes, ensembl=ensembl)
    model = scfoundation_from_weights(config, vocabulary, part["state_dict"])
    files = [folder / _WEIGHTS, genes_path, *([ensembl_path] if ensembl else [])]
    model.digest = digest_files(files, salt=f"{part_name}\n")
    return model


def read_gene_list(path: Path, *, n_genes: int, ensembl: Mapping[str, str] | None = None) -> Vocabulary:
    """Vocabulary from the gene list: the genes, then T and S.

    Raises:
        CheckpointError: the file is no such table, or does not hold `n_genes` genes numbered from 0.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [line.replace(",", "\t").split("\t") for line in lines[1:]]
    try:
        index = {row[0].strip(): int(row[1]) for row in rows}
    except (IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); allowed: a table of two columns, gene_name and index"
        ) from error
    if sorted(index.values()) != list(range(n_genes)):
        raise CheckpointError(
            f"{path} names {len(index)} genes and the model has {n_genes}; allowed: one gene for each index from 0"
        )
    genes = sorted(index, key=lambda name: index[name])
    return Vocabulary(tokens=(*genes, TARGET, SOURCE), special=frozenset({TARGET, SOURCE}), ensembl=dict(ensembl or {}))


def _home(path: Path) -> Path:
    return path.parent if path.name in PARTS and not path.exists() else path


def _part(parts: Any, name: str | None) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(parts, dict) or not (held := [part for part in PARTS if part in parts]):
        raise CheckpointError(
            f"{_WEIGHTS} holds none of the parts {', '.join(PARTS)}; give the official file of scFoundation"
        )
    chosen = name or held[0]
    if chosen not in held:
        raise CheckpointError(f"{_WEIGHTS} has no part {chosen!r}; allowed: {', '.join(held)}")
    part = parts[chosen]
    tensors = part.get("state_dict") if isinstance(part, dict) else None
    if not isinstance(tensors, dict) or not isinstance(part.get("config"), dict):
        raise CheckpointError(f"part {chosen!r} of {_WEIGHTS} lacks its config or state_dict; give the official file")
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(
            f"part {chosen!r} of {_WEIGHTS} holds other objects than tensors in its state_dict; give the official file"
        )
    return chosen, part


def _gene_list(folder: Path) -> Path:
    for place in (folder, folder.resolve().parent):
        found = sorted([*place.glob("*gene_index*.tsv"), *place.glob("*gene_index*.csv")])
        if found:
            return found[0]
    raise CheckpointError(
        f"{folder} holds {_WEIGHTS} but no gene list; put OS_scRNA_gene_index.19264.tsv into it or into its parent"
    )
