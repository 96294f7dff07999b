"""Reader of scGPT's files: settings, vocabulary and weights in one folder, under official names or those of mirrors.

    args.json            sizes and settings; mirrors call it config.json             needed
    vocab.json           token -> row of the embedding; else the only *vocab*.json   needed
    best_model.pt        state dict; or one of `WEIGHTS`                             needed
    vocab_ensembl.json   Ensembl id -> token                                         optional
    input_genes          in args.json: a file with a symbol a line, the genes fed    optional

The rows of the embedding are looked up by the vocabulary, so the two must be of one checkpoint. As the authors' loader
does, special tokens that the vocabulary lacks are appended to it; then it must have exactly as many tokens as there are
rows. The genes of the official vocabulary are also refused in another order than its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sae_core.checkpoint_files import (
    digest_files,
    digest_names,
    read_json,
    read_text,
    read_weights,
    weight_files,
    weight_names,
    wrong_rows,
)
from sae_core.errors import CheckpointError, ConfigError
from sae_core.json_fields import JsonFields
from sae_core.scfm.cell_context import OF_CELLS
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.scgpt.network import ScGPT, ScGPTConfig, canonical_name, scgpt_from_weights, sizes_of
from sae_core.scfm.vocabulary import Vocabulary, read_vocabulary

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "best_model.pt",
    "model.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FILES = "args.json, vocab.json and best_model.pt (or model.safetensors)"
SPECIAL = ("<pad>", "<cls>", "<eoc>")
_OF_TUNING = ("include_zero_gene", "explicit_zero_prob", "n_hvg", "DSBN", "GEPC", "ecs_thres", "dab_weight")
"""Fields of args.json that tuning has, and pretraining has not."""
_TUNING = (*_OF_TUNING, "max_seq_len", "input_style", "use_batch_labels", "per_seq_batch_sample")
"""Fields of args.json that tell how a checkpoint was tuned."""
_ENSEMBL = "vocab_ensembl.json"
_LIKELY = {
    60697: "the vocab.json of the official whole-human folder (default_census_vocab.json and the special tokens)",
    48295: "default_gene_vocab.json of the scgpt package",
    36574: "the vocab.json of the official folder of the earlier release",
}
"""Vocabularies of the official checkpoints, by the rows of their embedding."""
_OFFICIAL = {"4c95895d6c288eb8": "0fa06ff254247c8d", "86ece9c048955a37": "86ece9c048955a37"}
"""Digests of the genes of official vocabularies: sorted by name -> in the order of their rows."""


def is_scgpt(folder: Path) -> bool:
    """Whether a folder holds weights and settings of scGPT, or, without settings, weights that are scGPT's by name."""
    weights = _weights_file(folder)
    if weights is None or _args_file(folder) is not None:
        return weights is not None
    if (folder / "config.json").exists():
        return False
    return any(canonical_name(name).startswith("value_encoder.") for name in weight_names(weights))


def load_scgpt(folder: Path, *, include_zeros: str | None = None, batch_label: str | None = None) -> ScGPT:
    """Model in a folder; the options are those of `FAMILY`.

    Raises:
        ConfigError: an option has a value that is not allowed.
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
    """
    weights_path, args_path = _weights_file(folder), _args_file(folder)
    assert weights_path is not None
    weights = {canonical_name(name): value for name, value in read_weights(weights_path).items()}
    n_rows = len(weights.get("encoder.embedding.weight", ()))
    if args_path is None:
        raise CheckpointError(
            f"args.json is missing; an scGPT folder holds {FILES}. Write {folder / 'args.json'}: "
            f"{json.dumps(_written_args(weights))} (nheads and the settings after it are those of the official models; "
            "the weights do not tell them)"
        )
    fields = JsonFields(read_json(args_path), file=args_path.name)
    vocab_path = _vocabulary_file(folder, n_rows)
    ensembl = folder / _ENSEMBL if (folder / _ENSEMBL).is_file() else None
    named = read_vocabulary(vocab_path, ensembl_path=ensembl)
    vocabulary = _with_special(named)
    _check_vocabulary(vocabulary, vocab_path, n_rows, n_in_file=len(named), own=fields.flag("own_vocabulary", False))
    genes_path = _input_genes_file(folder, fields)
    if genes_path is not None:
        vocabulary = _restricted(vocabulary, genes_path)
    in_file = ScGPTConfig.from_fields(fields)
    zeros, label, column = _zeros_of(include_zeros), *_batch_of(batch_label)
    config = ScGPTConfig.from_fields(fields, include_zeros=zeros, batch_label=label)
    model = scgpt_from_weights(config, vocabulary, weights, batch_column=column)
    if label is not None and label not in range(_n_batches(model)):
        raise ConfigError(
            f"batch_label was {label}, but the checkpoint has {_n_batches(model)} batches; allowed: a number below that"
        )
    optional = [path for path in (ensembl, genes_path) if path is not None]
    changed = {
        "include_zeros": config.include_zeros if config.include_zeros != in_file.include_zeros else None,
        "batch_label": column or (label if label != in_file.batch_label else None),
    }
    salt = "".join(f"{name} {value}\n" for name, value in changed.items() if value is not None)
    model.digest = digest_files([args_path, vocab_path, *optional, *weight_files(weights_path)], salt=salt)
    notes = tuple(_notes(fields, model, vocab_path))
    model.notes = (*fields.notes, *notes)
    return model


def _notes(fields: JsonFields, model: ScGPT, vocab_path: Path) -> Iterator[str]:
    """What a user should know of the checkpoint."""
    if vocab_path.name != "vocab.json":
        yield f"{vocab_path.name} is taken as its vocabulary"
    if model.decoder is None:
        yield "without a decoder that can be run, so without a pretraining loss and masked-gene prediction"
    if absent := [name for name in ("n_bins", "max_seq_len") if name not in fields.values]:
        yield (
            f"{fields.file} lacks {' and '.join(absent)}: n_bins {model.config.n_bins} and max_seq_len "
            f"{model.config.max_seq_len} were taken"
        )
    yield from _tuning_notes(fields, model)


def _tuning_notes(fields: JsonFields, model: ScGPT) -> Iterator[str]:
    """What settings and weights tell of the cells on which a checkpoint was tuned, and what is fed to it here."""
    config, has_choice = model.config, fields.has("input_genes")
    includes_zeros = fields.flag("include_zero_gene", False) if fields.has("include_zero_gene") else None
    told = [f"{name} {json.dumps(fields.values[name])}" for name in _TUNING if fields.values.get(name)]
    is_tuned = any(entry.split()[0] in _OF_TUNING for entry in told)
    if model.dsbn is not None or any("zero_logit" in name for name in model.ignored_weights):
        told.append("a norm for each batch" if model.dsbn is not None else "heads for the probability of zeros")
        is_tuned = True
    if is_tuned and includes_zeros is False:
        yield f"tuned on cells of chosen genes without their zeros ({', '.join(told)})"
    elif is_tuned:
        yield (
            f"tuned as in the authors' integration tutorial ({', '.join(told)}): there every cell has all of the "
            "chosen genes as tokens, zeros included, and <cls> has the value 0"
        )
    if is_tuned or has_choice or config.include_zeros:
        of = " of input_genes" if has_choice else ""
        fed = f"all genes{of} in every cell, zeros included" if config.include_zeros else f"nonzero genes{of} alone"
        more = f", a random {model.max_genes:,} of them where there are more" if config.include_zeros else ""
        yield f"fed to it here: {fed}{more}; <cls> has the value {config.cls_value:g}"
    if is_tuned and includes_zeros is not False and not config.include_zeros:
        yield (
            "to feed the genes of the tuning with their zeros, give --model-option include_zeros=true and the genes: "
            "extract --genes FILE, with the symbols of those of the tuning, one a line (or a file of this folder: "
            f'"input_genes": FILE and "include_zero_gene": true in {fields.file})'
        )
    if _n_batches(model):
        yield from _batch_notes(model, _n_batches(model))


def _n_batches(model: ScGPT) -> int:
    """Number of batches of the tuning of which the model has norms or vectors."""
    if model.dsbn is not None:
        return len(model.dsbn.bns)
    return 0 if model.batch_encoder is None else model.batch_encoder.embedding.num_embeddings


def _batch_notes(model: ScGPT, n_batches: int) -> Iterator[str]:
    """What the batches of a tuning change, and which batch the cells are given."""
    if model.dsbn is not None:
        what = "the norm of its batch"
        what += "" if model.batch_encoder is None else ", and its heads the vector of the batch"
    else:
        what = "the vector of its batch, in the heads alone"
    if model.batch_labels is not None:
        given = f"the batch of each cell is in {model.batch_labels.chosen}"
    elif model.config.batch_label is None:
        given = "no batch is chosen, so that the heads cannot be run"
    else:
        given = f"all cells are given batch {model.config.batch_label}"
    yield (
        f"tuned with {n_batches} batches: a cell gets {what}; {given}; --model-option batch_label=obs:COLUMN takes the "
        f"number of each cell's batch in the tuning from a column, batch_label=I gives all cells one (0 to "
        f"{n_batches - 1})"
    )


def _zeros_of(given: str | None) -> bool | None:
    """What the option include_zeros says; None where it says nothing."""
    if given is not None and given not in ("true", "false"):
        raise ConfigError(f"include_zeros was {given!r}; allowed: true, false")
    return None if given is None else given == "true"


def _batch_of(given: str | None) -> tuple[int | None, str | None]:
    """What the option batch_label says: the batch of all cells, or the column of obs with that of each."""
    if given is None:
        return None, None
    if given.startswith(OF_CELLS) and given != OF_CELLS:
        return None, given
    if not given.isdecimal():
        raise ConfigError(
            f"batch_label was {given!r}; allowed: the number of a batch of the tuning, from 0 on, or obs:COLUMN"
        )
    return int(given), None


def _weights_file(folder: Path) -> Path | None:
    # a link to a file that is gone is taken too, so that the reader names it
    paths = (folder / name for name in WEIGHTS)
    return next((path for path in paths if path.is_file() or path.is_symlink()), None)


def _args_file(folder: Path) -> Path | None:
    if (folder / "args.json").is_file():
        return folder / "args.json"
    config = folder / "config.json"
    return config if config.is_file() and "embsize" in read_json(config) else None


def _vocabularies(folder: Path) -> list[Path]:
    """Files that may be the vocabulary: vocab.json alone where it is there."""
    if (folder / "vocab.json").is_file():
        return [folder / "vocab.json"]
    return sorted(path for path in folder.glob("*vocab*.json") if path.name != _ENSEMBL)


def _vocabulary_file(folder: Path, n_rows: int) -> Path:
    found = _vocabularies(folder)
    if len(found) > 1:
        found = [path for path in found if _n_tokens(path) == n_rows] or found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"which of {names} is the vocabulary of this checkpoint? Call it vocab.json")
    raise CheckpointError(
        f"vocab.json is missing; an scGPT folder holds {FILES}. It has to name the {n_rows} rows of the embedding"
        + (f": {_LIKELY[n_rows]}" if n_rows in _LIKELY else ", as JSON from token to row")
    )


def _n_tokens(path: Path) -> int:
    """Number of tokens of a vocabulary, with the special ones that it lacks."""
    return len({*read_json(path), *SPECIAL})


def _with_special(vocabulary: Vocabulary) -> Vocabulary:
    """Vocabulary in which special tokens that the file lacks follow the others, in upstream's order."""
    missing = tuple(token for token in SPECIAL if token not in vocabulary)
    return replace(vocabulary, tokens=vocabulary.tokens + missing) if missing else vocabulary


def _input_genes_file(folder: Path, fields: JsonFields) -> Path | None:
    name = fields.values.get("input_genes")
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise fields.wrong("input_genes", "the name of a file in this folder with one gene symbol a line")
    return folder / name


def _restricted(vocabulary: Vocabulary, path: Path) -> Vocabulary:
    """Vocabulary in which genes of the data match only the genes that a file lists.

    Raises:
        CheckpointError: the file lists a gene that the vocabulary lacks, or none.
    """
    genes = {line.strip() for line in read_text(path).splitlines() if line.strip()}
    if unknown := sorted(gene for gene in genes if gene not in vocabulary):
        raise CheckpointError(f"{path.name} lists {len(unknown)} genes that the vocabulary lacks, e.g. {unknown[0]!r}")
    if not genes:
        raise CheckpointError(f"{path.name} lists no gene; write one gene symbol a line")
    others = (token for token in vocabulary.tokens if token not in genes)
    return replace(vocabulary, special=vocabulary.special | frozenset(others))


def _check_vocabulary(vocabulary: Vocabulary, path: Path, n_rows: int, *, n_in_file: int, own: bool) -> None:
    """Check that the vocabulary is that of the embedding's rows.

    Raises:
        CheckpointError: it has another size, or the official genes in another order.
    """
    if len(vocabulary) != n_rows:
        raise wrong_rows(
            "encoder.embedding.weight",
            n_rows,
            path.name,
            len(vocabulary),
            what=f"tokens, <pad>, <cls> and <eoc> included ({n_in_file} in the file)",
            likely=_likely_vocabulary(path, n_rows),
        )
    genes = [token for token in vocabulary.tokens if token not in SPECIAL]
    in_order = _OFFICIAL.get(digest_names(sorted(genes)))
    if in_order is not None and digest_names(genes) != in_order and not own:
        raise CheckpointError(
            f"{path.name} names the {len(genes)} genes of an official vocabulary in another order than that has, so "
            'genes would get the rows of others; give the official file, or add "own_vocabulary": true to args.json if '
            "this checkpoint was trained with this order"
        )


def _likely_vocabulary(path: Path, n_rows: int) -> str:
    """The file near a vocabulary that has the right number of tokens, or else what is known of that number."""
    for place in (path.parent, path.resolve().parent.parent):
        for other in sorted(place.glob("*vocab*.json")):
            try:
                if other != path and other.name != _ENSEMBL and _n_tokens(other) == n_rows:
                    return str(other)
            except CheckpointError:
                continue
    return _LIKELY.get(n_rows, "the vocab.json that was saved with this checkpoint")


def _written_args(weights: Mapping[str, Tensor]) -> dict[str, object]:
    """Content of an args.json for these weights, with the official settings where the weights tell nothing."""
    official = {"nheads": 8, "n_bins": 51, "max_seq_len": 1200, "pad_value": -2, "mask_value": -1}
    return {**sizes_of(weights), **official, "input_emb_style": "continuous"}


FAMILY = Family(
    name="scgpt",
    files=FILES,
    matches=is_scgpt,
    load=load_scgpt,
    options=(
        ModelOption(
            name="include_zeros",
            help="true: every gene that may go in and that the data have is a token of each cell, zeros included, as "
            "in the authors' fine-tuning; false: those that the cell expresses. Default: include_zero_gene of "
            "args.json where input_genes names the genes, else false.",
        ),
        ModelOption(
            name="batch_label",
            help="Batch of a fine-tuned model that the cells are given: obs:COLUMN, a column with the number of each "
            "cell's batch in the tuning, or such a number for all cells; default: batch_label of args.json.",
            of_cells=True,
        ),
    ),
    genes="human gene symbols (Ensembl ids with a vocab_ensembl.json)",
    length="max_seq_len of args.json, 1,200 in the official model; a random sample of the genes of longer cells",
    licence="MIT",
)
