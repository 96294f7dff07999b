"""Reader of AIDO.Cell's files: the folder of the hub and the list of its genes.

    config.json            sizes and form of the network                              needed
    model.safetensors      weights, also in parts with an index                       needed
    *gene_index*.tsv       gene_name and index: the 19,264 genes in their order       needed; scFoundation's list
    vocab_ensembl.json     Ensembl id -> symbol: genes also match by id               optional

The gene list is not in the folder of the hub: it is the list of scFoundation, which goes into the folder or the one
above it, or is named by the option `gene_list`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sae_core.checkpoint_files import INDEX, digest_files, read_json, read_weights, weight_files
from sae_core.errors import CheckpointError
from sae_core.json_fields import JsonFields
from sae_core.scfm.aido_cell.network import AIDOCell, AIDOCellConfig, aido_cell_from_weights
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.scfoundation.files import find_gene_list, read_gene_list
from sae_core.scfm.vocabulary import Vocabulary, read_ensembl

WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}")
FILES = "config.json (with bin_num), model.safetensors, and the gene list OS_scRNA_gene_index.19264.tsv"
DEPTHS = ("<depth>", "<depth 2>")
_MARKS = ("bin_num", "num_hidden_layers")
"""Fields of a `config.json` that tell the family: no other one has soft bins in it."""


def is_aido_cell(folder: Path) -> bool:
    """Whether the folder holds a Hugging Face checkpoint with soft bins."""
    path = folder / "config.json"
    if not path.is_file() or _weights_file(folder) is None:
        return False
    config = read_json(path)
    return all(name in config for name in _MARKS)


def load_aido_cell(folder: Path, *, gene_list: Path | None = None) -> AIDOCell:
    """Model in a folder.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
    """
    weights_path = _weights_file(folder)
    assert weights_path is not None
    fields = JsonFields(read_json(folder / "config.json"), file="config.json")
    config = AIDOCellConfig.from_fields(fields)
    genes_path = find_gene_list(folder) if gene_list is None else gene_list
    if not genes_path.exists() and not genes_path.is_symlink():
        raise CheckpointError(f"gene_list is {genes_path}, which is not there; give OS_scRNA_gene_index.19264.tsv")
    ensembl_path = folder / "vocab_ensembl.json"
    ensembl = read_ensembl(ensembl_path) if ensembl_path.is_file() else {}
    genes = read_gene_list(genes_path, n_genes=config.n_genes, ensembl=ensembl)
    names = genes.tokens[: config.n_genes]
    vocabulary = Vocabulary(tokens=(*names, *DEPTHS), special=frozenset(DEPTHS), ensembl=genes.ensembl)
    model = aido_cell_from_weights(config, vocabulary, read_weights(weights_path))
    files = [folder / "config.json", *weight_files(weights_path), genes_path, *([ensembl_path] if ensembl else [])]
    model.digest = digest_files(files)
    model.notes = (*fields.notes, *_notes(model))
    return model


def _notes(model: AIDOCell) -> Iterator[str]:
    """What a user should know of the checkpoint."""
    n = model.config.n_genes + len(DEPTHS)
    yield (
        f"every cell takes {n:,} places, genes without counts too, and every place attends to all: with all 19,264 "
        "genes, seconds to minutes a cell and block on a CPU; --genes hvg:N leaves the other places out, which the "
        "authors do not do"
    )
    yield "columns of one gene are added; the authors take the first"
    yield f"hidden in the pretraining task: {model.mask_fraction:g} of the expressed genes; no file states the share"
    if model.head is None:
        yield "without a head, so without a pretraining loss and masked-gene prediction"


def _weights_file(folder: Path) -> Path | None:
    # a link to a file that is gone is taken too, so that the reader names it
    return next((path for name in WEIGHTS if (path := folder / name).is_file() or path.is_symlink()), None)


FAMILY = Family(
    name="aido-cell",
    files=FILES,
    matches=is_aido_cell,
    load=load_aido_cell,
    options=(
        ModelOption(
            name="gene_list",
            help="Table of gene_name and index; default: *gene_index*.tsv in the checkpoint's folder or the one above.",
            is_path=True,
        ),
    ),
    genes="human gene symbols of the list of 19,264 (Ensembl ids with a vocab_ensembl.json)",
    length="all 19,264 genes, zeros too",
    licence="GenBio AI Community License: non-commercial, outputs included",
)
