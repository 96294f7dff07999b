"""Reader of TranscriptFormer's folders: settings, weights, and the names of assays and genes.

    config.json                 model.{model_config, data_config, loss_config}            needed
    model_weights.pt            state dict                                                needed
    vocabs/assay_vocab.json     assay -> row of aux_embeddings.assay                      needed
    vocabs/SPECIES_gene.h5      `keys`: the genes; one file for each of esm2_mappings     needed

The rows of the gene table are the special tokens of the settings, then the keys of the h5 files in the order in which
the settings list them, repeats left out. The vectors of the genes are in the weights too, so that of the h5 files the
keys alone are read. The settings that the authors' inference command overrides (normalize_to_scale, sort_genes,
randomize_genes and filters of cells) are not read; clip_counts is 30, as there, where the settings have none.

With the option `embeddings`, genes of another species take the place of the checkpoint's: the vectors of a further
SPECIES_gene.h5, `arrays`, one dataset for each key, follow the rows of the special tokens. The count head has a bias
for each gene of the checkpoint and therefore goes (upstream keeps it, so that genes get the biases of others).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_core.checkpoint_files import digest_files, digest_names, read_json, read_weights, wrong_rows
from sae_core.errors import CheckpointError, ConfigError
from sae_core.incomplete_files import check_complete
from sae_core.json_fields import JsonFields
from sae_core.scfm.cell_context import OF_CELLS
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.transcriptformer.network import (
    ASSAYS,
    TABLE,
    TranscriptFormer,
    TranscriptFormerConfig,
    canonical_weights,
    transcriptformer_from_weights,
)
from sae_core.scfm.transcriptformer.tokenizer import UNKNOWN, TranscriptFormerTokenizer
from sae_core.scfm.vocabulary import Vocabulary

if TYPE_CHECKING:
    import h5py

FILES = "config.json, model_weights.pt, and vocabs with assay_vocab.json and SPECIES_gene.h5"
CONFIG, WEIGHTS, VOCABS, ASSAY_VOCAB = "config.json", "model_weights.pt", "vocabs", "assay_vocab.json"
SPECIAL = (UNKNOWN, "[START]", "[END]", "[RD]", "[CELL]", "[PAD]", "[MASK]")
"""The special tokens of settings that list none."""
START = "[START]"
_TABLES = ("model_config", "data_config")


def is_transcriptformer(folder: Path) -> bool:
    """Whether the folder holds TranscriptFormer's weights, and settings of its form."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    # a link to a file that is gone is taken too, so that the reader names it
    if not (weights.is_file() or weights.is_symlink()) or not config.is_file():
        return False
    model = read_json(config).get("model")
    return isinstance(model, dict) and all(isinstance(model.get(name), dict) for name in _TABLES)


def load_transcriptformer(
    folder: Path, *, assay: str = f"{OF_CELLS}assay", embeddings: Path | None = None
) -> TranscriptFormer:
    """Model in a folder; `assay` is that of all cells or "obs:COLUMN", `embeddings` an h5 file of another species.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
        ConfigError: the checkpoint does not know the assay.
    """
    tables = {name: _table(folder, name) for name in (*_TABLES, "loss_config")}
    data = tables["data_config"]
    config = TranscriptFormerConfig.from_fields(*tables.values())
    weights = canonical_weights(read_weights(folder / WEIGHTS))
    special = _special_tokens(data)
    genes = _genes(folder, data, n_special=len(special), n_rows=len(weights[TABLE]))
    if embeddings is not None:
        genes, vectors = read_vectors(embeddings, d_protein=weights[TABLE].shape[1])
        weights[TABLE] = torch.cat([weights[TABLE][: len(special)], vectors])
    head = {key: weights.pop(key) for key in list(weights) if embeddings is not None and key.startswith("mu.")}
    n_rows, assays = len(weights[TABLE]), _assays(folder / VOCABS / ASSAY_VOCAB, n_rows=len(weights[ASSAYS]))
    rows = {row: name for name, row in reversed(assays.items())}
    assay_tokens = [f"[assay] {rows.get(row, f'without a name, {row}')}" for row in range(len(weights[ASSAYS]))]
    vocabulary = Vocabulary(
        tokens=(*special, *genes, *assay_tokens), special=frozenset({*special, *assay_tokens}), genes_are="ids"
    )
    tokenizer = TranscriptFormerTokenizer(
        start_id=special.index(START),
        assay_ids={name: n_rows + row for name, row in assays.items()},
        assay=_known_assay(assay, assays),
        seq_len=config.seq_len,
        clip_counts=config.clip_counts,
    )
    model = transcriptformer_from_weights(config, vocabulary, tokenizer, weights)
    model.ignored_weights = tuple(sorted((*model.ignored_weights, *head)))
    files = [folder / CONFIG, folder / WEIGHTS, folder / VOCABS / ASSAY_VOCAB]
    # of the h5 files in the folder the names alone are read; the table itself is in the weights
    model.digest = digest_files(
        [*files, *([] if embeddings is None else [embeddings])],
        salt=f"transcriptformer\nassay {tokenizer.assay}\ngenes {digest_names(genes)}\n",
    )
    noted = (note for fields in tables.values() for note in fields.notes)
    model.notes = (*noted, *_notes(model, assays=len(assays), embeddings=embeddings))
    return model


def _table(folder: Path, name: str) -> JsonFields:
    file = f"{CONFIG}, model.{name}"
    model = JsonFields(read_json(folder / CONFIG), file=CONFIG).table("model")
    return JsonFields(JsonFields(model, file=f"{CONFIG}, model").table(name), file=file)


def _texts(fields: JsonFields, name: str, default: Sequence[str] | None = None) -> list[str]:
    """A list of different texts; a text alone is a list of one."""
    value: Any = fields.values.get(name)
    value = list(default or ()) if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise fields.wrong(name, "a list of names")
    if len(set(value)) < len(value):
        raise fields.wrong(name, "each name once")
    return value


def _special_tokens(data: JsonFields) -> list[str]:
    special = _texts(data, "special_tokens", SPECIAL)
    if START not in special:
        raise data.wrong("special_tokens", f"a list with {START!r}")
    if _texts(data, "aux_cols", ["assay"]) != ["assay"]:
        raise data.wrong("aux_cols", "'assay'")
    return special


def _genes(folder: Path, data: JsonFields, *, n_special: int, n_rows: int) -> list[str]:
    """The genes of the rows of the table behind the special tokens."""
    names = _texts(data, "esm2_mappings")
    if wrong := [name for name in names if Path(name).name != name]:
        raise data.wrong("esm2_mappings", f"names of files in {VOCABS}, not {wrong[0]!r}")
    genes = list(dict.fromkeys(gene for name in names for gene in read_keys(folder / VOCABS / name)))
    if n_special + len(genes) != n_rows:
        raise wrong_rows(
            TABLE,
            n_rows,
            " and ".join(names),
            n_special + len(genes),
            what=f"genes and special tokens ({n_special} special tokens, those of {data.file})",
            likely="the files of esm2_mappings and the special_tokens that were saved with this checkpoint",
        )
    return genes


def _assays(path: Path, *, n_rows: int) -> dict[str, int]:
    """The row of each assay.

    Raises:
        CheckpointError: the file is missing, or its rows are not those of the table of assays.
    """
    assays = read_json(path)
    for name, row in assays.items():
        if type(row) is not int or not 0 <= row < n_rows:
            raise CheckpointError(
                f"{path.name} has {name!r}: {row!r}; allowed: a row of {ASSAYS}, from 0 to {n_rows - 1}"
            )
    if UNKNOWN not in assays:
        raise CheckpointError(f"{path.name} lacks {UNKNOWN!r}, the assay of cells of another; give the official file")
    if len(assays) != n_rows:
        raise wrong_rows(
            ASSAYS, n_rows, path.name, len(assays), what="assays", likely=f"the {ASSAY_VOCAB} of this checkpoint"
        )
    return assays


def _known_assay(assay: str, assays: Mapping[str, int]) -> str:
    if assay.startswith(OF_CELLS) or assay in assays:
        return assay
    close = get_close_matches(assay, assays, n=5, cutoff=0.4) or sorted(assays)[:5]
    raise ConfigError(
        f"assay was {assay!r}; allowed: obs:COLUMN, or one of the {len(assays)} assays of {ASSAY_VOCAB}, such as "
        f"{', '.join(map(repr, close))}; {UNKNOWN!r} is for all others"
    )


def read_keys(path: Path) -> list[str]:
    """The names of genes in an h5 file of TranscriptFormer.

    Raises:
        CheckpointError: the file is missing, cannot be read, or has no such names.
    """
    return _read(path)[0]


def read_vectors(path: Path, *, d_protein: int) -> tuple[list[str], Tensor]:
    """The genes of an h5 file, each once, and their vectors [gene d_protein].

    Raises:
        CheckpointError: the file is missing, cannot be read, or has other vectors than the checkpoint.
    """
    return _read(path, d_protein=d_protein)


def _read(path: Path, *, d_protein: int | None = None) -> tuple[list[str], Tensor]:
    import h5py  # takes .1 s, and only this family needs it

    check_complete(path)
    try:
        with h5py.File(path, "r") as file:
            keys = _keys(path, file)
            vectors = torch.empty(0, 0) if d_protein is None else _vectors(path, file, keys, d_protein)
            return keys, vectors
    except (OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as HDF5 ({error}); fetch the file again") from error


def _keys(path: Path, file: h5py.File) -> list[str]:
    import h5py

    held = file.get("keys")
    if not isinstance(held, h5py.Dataset) or held.ndim != 1 or held.dtype.kind not in "SO":
        raise CheckpointError(
            f"{path} has {', '.join(sorted(file)) or 'nothing'}; allowed: a dataset `keys` with the names of the genes"
        )
    return list(dict.fromkeys(held.asstr()[:].tolist()))


def _vectors(path: Path, file: h5py.File, keys: Sequence[str], d_protein: int) -> Tensor:
    import h5py

    table, arrays = torch.empty(len(keys), d_protein), file.get("arrays")
    for row, key in enumerate(keys):
        held = arrays.get(key) if isinstance(arrays, h5py.Group) else None
        if not isinstance(held, h5py.Dataset) or held.shape != (d_protein,):
            what = "no dataset" if held is None else f"the shape {getattr(held, 'shape', '')}"
            raise CheckpointError(
                f"{path} has {what} at arrays/{key}; allowed: {d_protein} numbers, as many as the checkpoint's vectors"
            )
        table[row] = torch.from_numpy(held[:].astype("float32"))
    return table


def _notes(model: TranscriptFormer, *, assays: int, embeddings: Path | None) -> Iterator[str]:
    """What a user should know of the checkpoint."""
    tokenizer = model.tokenizer
    unknown = "the assay counts as unknown, to which no gene attends"
    if tokenizer.assay.startswith(OF_CELLS):
        yield (
            f"assay of each cell from the obs column {tokenizer.assay.removeprefix(OF_CELLS)!r}; where it is missing "
            f"or not among the {assays} of {ASSAY_VOCAB}, {unknown}"
        )
    else:
        yield f"assay of all cells: {tokenizer.assay}" + (f" ({unknown})" if tokenizer.assay == UNKNOWN else "")
    yield (
        "genes are in the order of the checkpoint's vocabulary, so that the order of the data's columns does not "
        "matter; the authors' code takes that of the columns, on which its embeddings depend"
    )
    yield f"counts above {tokenizer.clip_counts:g} are set to it"
    yield "the official cell embedding is a sum over [START] and the genes, divided by " + str(tokenizer.seq_len)
    if embeddings is not None:
        yield f"genes and protein vectors of {embeddings.name}; without the count head, whose biases are of other genes"
    elif model.mu is None:
        yield "without a count head, so without a pretraining loss and masked-gene prediction"


FAMILY = Family(
    name="transcriptformer",
    files=FILES,
    matches=is_transcriptformer,
    load=load_transcriptformer,
    options=(
        ModelOption(
            name="assay",
            help='Assay of the cells: obs:COLUMN (default: obs:assay), or one for all cells, such as "10x 3\' v3" or '
            "unknown.",
            of_cells=True,
        ),
        ModelOption(
            name="embeddings",
            help="Protein vectors of the genes of another species, SPECIES_gene.h5 of the authors, in the place of "
            "the checkpoint's genes; default: none.",
            is_path=True,
        ),
    ),
    genes="Ensembl ids of the species of the checkpoint (Sapiens: human; Exemplar: 5; Metazoa: 12)",
    length="seq_len - 1 of config.json, 2,046 in the official models; the first genes of longer cells by vocabulary",
    licence="MIT by the authors' model card; the repository names none for weights",
)
