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
from sae_core.errors import CheckpointError
from sae_core.json_fields import JsonFields
from sae_core.scfm.families import Family
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


def load_scgpt(folder: Path) -> ScGPT:
    """Model in a folder.

    Raises:
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
    in_file = read_vocabulary(vocab_path, ensembl_path=ensembl)
    vocabulary = _with_special(in_file)
    _check_vocabulary(vocabulary, vocab_path, n_rows, n_in_file=len(in_file), own=fields.flag("own_vocabulary", False))
    genes_path = _input_genes_file(folder, fields)
    if genes_path is not None:
        vocabulary = _restricted(vocabulary, genes_path)
    model = scgpt_from_weights(ScGPTConfig.from_fields(fields), vocabulary, weights)
    optional = [path for path in (ensembl, genes_path) if path is not None]
    model.digest = digest_files([args_path, vocab_path, *optional, *weight_files(weights_path)])
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
    if is_tuned or has_choice:
        of = " of input_genes" if has_choice else ""
        fed = f"all genes{of} in every cell, zeros included" if config.include_zeros else f"nonzero genes{of} alone"
        yield f"fed to it here: {fed}; <cls> has the value {config.cls_value:g}"
    if is_tuned and includes_zeros is not False and not config.include_zeros:
        yield (
            "to feed the genes of the tuning with their zeros, write their symbols into a file of this folder, one a "
            f'line, and add "input_genes": FILE and "include_zero_gene": true to {fields.file}'
        )
    if model.dsbn is not None:
        yield (
            f"of the norms for {len(model.dsbn.bns)} batches, all cells are given that of batch {config.batch_label}, "
            f"which batch_label in {fields.file} chooses; batches of the data are not taken from a column"
        )


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
    genes="human gene symbols (Ensembl ids with a vocab_ensembl.json)",
    length="max_seq_len of args.json, 1,200 in the official model; a random sample of the genes of longer cells",
    licence="MIT",
)
