"""scFoundation's files: `models.ckpt` with its three parts, and the list of genes in the folder or its parent.

A part is chosen by the path, FOLDER/cell, FOLDER/rde or FOLDER/gene; FOLDER alone is `cell`, the one for cell
embeddings, or the only part there is. The gene list is a table of two columns, gene_name and index, tab- or
comma-separated, named *gene_index*.tsv or .csv. An optional vocab_ensembl.json {Ensembl id: symbol} beside it lets
Ensembl ids match.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_core.checkpoint_files import digest_files, read_json, read_torch
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
    """Whether the folder, or the folder of which the path names a part, holds `models.ckpt`."""
    return (_home(folder) / _WEIGHTS).is_file()


def load_scfoundation(path: Path) -> ScFoundation:
    """Model of a folder or of the part that the path names. CheckpointError naming what does not fit."""
    folder = _home(path)
    parts = read_torch(folder / _WEIGHTS)
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
    """Vocabulary of the gene list, T and S behind the genes.

    Raises:
        CheckpointError: unreadable, or not `n_genes` genes numbered from 0.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [line.replace(",", "\t").split("\t") for line in lines[1:]]
    try:
        index = {row[0].strip(): int(row[1]) for row in rows}
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{path} is no table of gene_name and index: {error}") from error
    if sorted(index.values()) != list(range(n_genes)):
        raise CheckpointError(
            f"{path} names {len(index)} genes, the model has {n_genes}; allowed: one gene for each index from 0"
        )
    genes = sorted(index, key=lambda name: index[name])
    return Vocabulary(tokens=(*genes, TARGET, SOURCE), special=frozenset({TARGET, SOURCE}), ensembl=dict(ensembl or {}))


def _home(path: Path) -> Path:
    return path.parent if path.name in PARTS and not path.exists() else path


def _part(parts: Any, name: str | None) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(parts, dict) or not (held := [part for part in PARTS if part in parts]):
        raise CheckpointError(f"{_WEIGHTS} holds none of {', '.join(PARTS)}; allowed: scFoundation's official file")
    chosen = name or held[0]
    if chosen not in held:
        raise CheckpointError(f"{_WEIGHTS} holds {', '.join(held)} and not {chosen!r}")
    part = parts[chosen]
    tensors = part.get("state_dict") if isinstance(part, dict) else None
    if not isinstance(tensors, dict) or not isinstance(part.get("config"), dict):
        raise CheckpointError(f"part {chosen!r} of {_WEIGHTS} is not {{'config', 'state_dict'}}")
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"part {chosen!r} of {_WEIGHTS} holds more than tensors in its state_dict")
    return chosen, part


def _gene_list(folder: Path) -> Path:
    for place in (folder, folder.resolve().parent):
        found = sorted([*place.glob("*gene_index*.tsv"), *place.glob("*gene_index*.csv")])
        if found:
            return found[0]
    raise CheckpointError(
        f"{folder} holds {_WEIGHTS} but no gene list; put OS_scRNA_gene_index.19264.tsv into it or into its parent"
    )
