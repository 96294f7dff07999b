"""Reader of scFoundation's files: `models.ckpt` with its three parts, and the gene list in the folder or its parent.

`part` chooses a part, and so does the path FOLDER/cell, FOLDER/rde or FOLDER/gene. FOLDER alone is `cell`, the part for
cell embeddings, or the first part that the file holds. A file that holds config and state_dict themselves (upstream's
"noversion") has no parts; it is named models.ckpt, or is the path itself. The gene list is a table of two columns,
gene_name and index, tab- or comma-separated, named *gene_index*.tsv or .csv; its lines are the rows of pos_emb. With an
optional vocab_ensembl.json {Ensembl id: symbol} in the folder, genes also match by Ensembl id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_core.checkpoint_files import digest_files, digest_names, read_text, read_torch_with_settings
from sae_core.errors import CheckpointError
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.scfoundation.network import (
    SOURCE,
    TARGET,
    ScFoundation,
    ScFoundationConfig,
    scfoundation_from_weights,
)
from sae_core.scfm.scfoundation.tokenizer import T4, Resolution
from sae_core.scfm.vocabulary import Vocabulary, read_ensembl

FILES = "models.ckpt and OS_scRNA_gene_index.19264.tsv"
PARTS = ("cell", "rde", "gene")
_WEIGHTS = "models.ckpt"
_OFFICIAL_LIST = "OS_scRNA_gene_index.19264.tsv"
_BY_NAME, _BY_INDEX = "e5322ead657fa5ac", "6037e1bc9b3b48a5"
"""Digests of the genes of the official list, sorted by name and by index."""


def is_scfoundation(path: Path) -> bool:
    """Whether `models.ckpt` lies in the folder or, where the path names a part, in its parent; or it is a .ckpt."""
    return _weights_file(path).is_file()


def load_scfoundation(path: Path, *, part: str | None = None, resolution: str | None = None) -> ScFoundation:
    """Model in a folder, or the part of it that `part` or the path names.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
        ConfigError: no such resolution.
    """
    depth = T4 if resolution is None else Resolution.parse(resolution)
    weights_path = _weights_file(path)
    folder = weights_path.parent
    named = path.name if _names_part(path) else None
    if part is not None and named is not None and part != named:
        raise CheckpointError(f"the path names part {named!r} and the option part {part!r}; give one of them")
    content = read_torch_with_settings(weights_path)
    part_name, chosen = _part(content, part or named, weights_path.name)
    config = ScFoundationConfig.from_checkpoint(chosen["config"])
    genes_path = find_gene_list(folder)
    ensembl_path = folder / "vocab_ensembl.json"
    ensembl = read_ensembl(ensembl_path) if ensembl_path.is_file() else {}
    tensors = {str(name): value for name, value in chosen["state_dict"].items()}
    vocabulary = read_gene_list(genes_path, n_genes=_n_genes(tensors, config), ensembl=ensembl)
    model = scfoundation_from_weights(config, vocabulary, tensors, resolution=depth)
    files = [weights_path, genes_path, *([ensembl_path] if ensembl else [])]
    model.digest = digest_files(files, salt=f"{part_name}\n" + ("" if depth == T4 else f"{depth}\n"))
    model.notes = (f"part {part_name}", f"T (read depth of the prediction): {depth}")
    return model


def _n_genes(tensors: Mapping[str, Tensor], config: ScFoundationConfig) -> int:
    """Number of genes by the rows of pos_emb: genes, T, S and padding."""
    rows = next((len(value) for name, value in tensors.items() if name.endswith("pos_emb.weight")), None)
    if rows is not None and rows != config.n_genes + 3:
        raise CheckpointError(
            f"pos_emb has {rows} rows but the config has seq_len {config.n_genes + 2}, which needs "
            f"{config.n_genes + 3}; give the file as its authors publish it"
        )
    return config.n_genes


def read_gene_list(path: Path, *, n_genes: int, ensembl: Mapping[str, str] | None = None) -> Vocabulary:
    """Vocabulary from the gene list: the genes, then T and S.

    Raises:
        CheckpointError: the file is no such table, or does not hold `n_genes` genes numbered from 0.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    rows = [line.replace(",", "\t").split("\t") for line in lines[1:]]
    try:
        index = {row[0].strip(): int(row[1]) for row in rows}
    except (IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); allowed: a table of two columns, gene_name and index"
        ) from error
    if len(index) != len(rows):
        raise CheckpointError(f"{path} names {len(rows) - len(index)} genes twice; give {_OFFICIAL_LIST}")
    if sorted(index.values()) != list(range(n_genes)):
        raise CheckpointError(
            f"{path} names {len(index)} genes, and pos_emb has rows for {n_genes} genes (and T, S and padding); "
            f"allowed: one gene for each index from 0; give {_OFFICIAL_LIST}, or the list of this checkpoint"
        )
    genes = sorted(index, key=lambda name: index[name])
    if digest_names(sorted(genes)) == _BY_NAME and digest_names(genes) != _BY_INDEX:
        raise CheckpointError(
            f"{path} names the {n_genes} genes of the official list with other indices, so genes would get the rows of "
            f"others; give {_OFFICIAL_LIST}"
        )
    return Vocabulary(tokens=(*genes, TARGET, SOURCE), special=frozenset({TARGET, SOURCE}), ensembl=dict(ensembl or {}))


def _names_part(path: Path) -> bool:
    return path.name in PARTS and not path.exists()


def _weights_file(path: Path) -> Path:
    if path.suffix == ".ckpt" and not path.is_dir():
        return path
    return (path.parent if _names_part(path) else path) / _WEIGHTS


def _part(content: Any, name: str | None, file: str) -> tuple[str, Mapping[str, Any]]:
    held = [part for part in PARTS if part in content] if isinstance(content, dict) else []
    if isinstance(content, dict) and not held and {"config", "state_dict"} <= content.keys():
        if name is not None:
            raise CheckpointError(f"{file} is one model without parts, so it has no part {name!r}; leave out the part")
        held, content = ["noversion"], {"noversion": content}
    if not held:
        raise CheckpointError(
            f"{file} holds none of the parts {', '.join(PARTS)}, nor a config and state_dict; give the official file "
            "of scFoundation"
        )
    chosen = name or held[0]
    if chosen not in held:
        raise CheckpointError(f"{file} has no part {chosen!r}; allowed: {', '.join(held)}")
    part = content[chosen]
    tensors = part.get("state_dict") if isinstance(part, dict) else None
    if not isinstance(tensors, dict) or not isinstance(part.get("config"), dict):
        raise CheckpointError(f"part {chosen!r} of {file} lacks its config or state_dict; give the official file")
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(
            f"part {chosen!r} of {file} holds other objects than tensors in its state_dict; give the official file"
        )
    return chosen, part


def find_gene_list(folder: Path) -> Path:
    """The gene list in a folder or in the one above it.

    Raises:
        CheckpointError: there is none.
    """
    for place in (folder, folder.resolve().parent):
        found = sorted([*place.glob("*gene_index*.tsv"), *place.glob("*gene_index*.csv")])
        if found:
            return found[0]
    raise CheckpointError(
        f"{folder} holds the weights but no gene list; put {_OFFICIAL_LIST} into it or into its parent"
    )


FAMILY = Family(
    name="scfoundation",
    files=FILES,
    matches=is_scfoundation,
    load=load_scfoundation,
    options=(
        ModelOption(
            name="part",
            help="Part of models.ckpt: cell (the default), rde (read depth enhancement) or gene.",
        ),
        ModelOption(
            name="resolution",
            help="Read depth at which the model predicts: t4 (the default) is log10 of the depth, a0.5 adds to that of "
            "the cell, f2 multiplies the cell's depth.",
        ),
    ),
    genes="human gene symbols of its list of 19,264",
    length="all genes with counts",
    licence="non-commercial, not to be passed on",
)
