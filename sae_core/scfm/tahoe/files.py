"""Reader of Tahoe-x1's files: two settings, vocabulary and weights in one folder, such as `70m-model` of the hub.

    model_config.yml       sizes and form of the network                        needed
    collator_config.yml    settings of the tokenizer                            needed
    vocab.json             Ensembl id or special token -> row of the embedding  needed
    model.safetensors      weights, also in parts with an index                 needed
    drug_to_id_pad.json    drug -> row of the drug encoder (3B)                 needed if the model is given a drug

The other form of the weights, `best-model.pt`, is a checkpoint of a training run, which the authors open by running the
pickled code in it; it is refused with the way to safetensors. Genes are matched by Ensembl id, without its version.

The rows of the embedding are looked up by the vocabulary, so it must name as many tokens. The authors' script for
publishing a model does not write the token `<drug>` that their training appends: if the vocabulary lacks it and is one
token short, the last row is its. The network never reads that row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sae_core.checkpoint_files import (
    INDEX,
    digest_files,
    read_json,
    read_weights,
    read_yaml,
    weight_files,
    wrong_rows,
)
from sae_core.errors import CheckpointError, ConfigError
from sae_core.json_fields import JsonFields
from sae_core.scfm.cell_context import OF_CELLS
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.tahoe.network import (
    EMBEDDING,
    FINGERPRINTS,
    Tahoe,
    TahoeConfig,
    canonical_name,
    tahoe_from_weights,
)
from sae_core.scfm.tahoe.tokenizer import NO_DRUG, Drugs
from sae_core.scfm.vocabulary import Vocabulary, read_vocabulary

MODEL, COLLATOR, VOCABULARY = "model_config.yml", "collator_config.yml", "vocab.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}")
FILES = f"{MODEL}, {COLLATOR}, {VOCABULARY} and model.safetensors"
_PICKLED = "best-model.pt"
_DRUG, _DRUGS = "<drug>", "drug_to_id_pad.json"
_CONVERT = (
    "import torch; from safetensors.torch import save_file; save_file("
    f"torch.load('{_PICKLED}', map_location='cpu', weights_only=False)['state']['model'], '{WEIGHTS[0]}')"
)


def is_tahoe(folder: Path) -> bool:
    """Whether a folder holds settings of Tahoe-x1, and weights in one of the two forms."""
    has_weights = _weights_file(folder) is not None or (folder / _PICKLED).is_file()
    return has_weights and any((folder / name).is_file() for name in (MODEL, COLLATOR))


def load_tahoe(
    folder: Path,
    *,
    drug: str = "none",
    drugs: Path | None = None,
    keep_first: str = "special",
    attention: str | None = None,
    max_length: str | None = None,
) -> Tahoe:
    """Model in a folder; the options are those of `FAMILY`.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
        ConfigError: an option has a value that is not allowed.
    """
    weights_path = _weights_file(folder)
    if weights_path is None:
        raise CheckpointError(
            f"{_PICKLED} runs code when it is opened, so it is not read; put the published {WEIGHTS[0]} beside it, or, "
            f'where you trust the file, write it: python -c "{_CONVERT}"'
        )
    for name in (MODEL, COLLATOR, VOCABULARY):
        if not (folder / name).exists():
            raise CheckpointError(f"{name} is missing; a Tahoe-x1 folder holds {FILES}")
    model_fields = JsonFields(read_yaml(folder / MODEL), file=MODEL)
    collator_fields = JsonFields(read_yaml(folder / COLLATOR), file=COLLATOR)
    in_files = TahoeConfig.from_fields(model_fields, collator_fields)
    config = _with_options(in_files, attention=attention, max_length=max_length)
    weights = {canonical_name(name): value for name, value in read_weights(weights_path).items()}
    vocabulary = _vocabulary(folder / VOCABULARY, weights, model_fields, collator_fields, config)
    drugs_path, chosen = None, None
    if drug != "none":
        drugs_path = _drugs_file(folder, drugs, collator_fields, config)
        chosen, vocabulary = _drugs(drugs_path, drug, vocabulary, weights)
    n_raw = _n_raw(keep_first, config, n_special=1 if chosen is None else 2)
    model = tahoe_from_weights(config, vocabulary, weights, drugs=chosen, n_raw=n_raw)
    files = [folder / MODEL, folder / COLLATOR, folder / VOCABULARY, *weight_files(weights_path)]
    changed = {"drug": "" if drug == "none" else drug, "n_raw": n_raw or ""}
    changed |= {
        name: value
        for name, value in (("attention", config.use_attn_mask), ("max_length", config.max_length))
        if config != in_files
    }
    salt = "".join(f"{name} {value}\n" for name, value in changed.items() if value != "")
    model.digest = digest_files([*files, *([] if drugs_path is None else [drugs_path])], salt=salt)
    model.notes = (*model_fields.notes, *collator_fields.notes, *_notes(model, model_fields, n_raw, drugs_path))
    return model


def _notes(model: Tahoe, fields: JsonFields, n_raw: int, drugs_path: Path | None) -> Iterator[str]:
    """What a user should know of the checkpoint."""
    config = model.config
    if (stated := fields.whole("vocab_size")) != model.n_rows:
        yield f"{fields.file} has vocab_size {stated}: the {model.n_rows} rows of the embedding were taken"
    if drugs_path is not None and model.drugs is not None:
        n_names = len(model.drugs.token_id)
        source = f"{n_names} drugs of {drugs_path.name}"
        if model.drugs.chosen.startswith(OF_CELLS):
            yield (
                f"the drug of each cell is in {model.drugs.chosen}; a missing name, and one that is not among the "
                f"{source}, is {NO_DRUG!r} (no known drug), as in the authors' code"
            )
        else:
            yield f"every cell is given the drug {model.drugs.chosen!r}, one of the {source}"
    elif config.drug_activation is not None:
        yield (
            "cells have no token for a drug, as the authors' loaders have it; --model-option drug=NAME or "
            f"drug=obs:COLUMN gives one, and drug={NO_DRUG} that of no known drug"
        )
    if n_raw:
        yield (
            f"the first {n_raw} expressed columns of a cell keep their raw values and are never left out, as in the "
            "authors' code, so the order of the columns changes the cells"
        )
    elif model.drugs is None and config.keep_first > 1:
        yield (
            f"all genes are binned; the authors' code keeps {config.keep_first} first tokens without a drug too, so "
            "the first expressed column of a cell keeps its raw value: --model-option keep_first=official does the same"
        )
    yield (
        f"a cell has at most {config.max_length} tokens, and a longer one keeps a seeded sample of its genes; that of "
        "the authors has no seed, and their scripts choose the length (--model-option max_length=N)"
    )
    precision = fields.values.get("precision")
    if precision not in (None, "fp32"):
        yield f"the authors run it with precision {precision}; here the products are in float32 unless bf16 is chosen"
    if model.expression_decoder is None:
        yield "without an expression decoder, so without a pretraining loss and masked-gene prediction"
    elif config.use_attn_mask:
        yield (
            "in the pretraining task no other token attends to a hidden gene (use_attn_mask); "
            "--model-option attention=full lets all attend to all"
        )


def _weights_file(folder: Path) -> Path | None:
    # a link to a file that is gone is taken too, so that the reader names it
    return next((path for name in WEIGHTS if (path := folder / name).is_file() or path.is_symlink()), None)


def _with_options(config: TahoeConfig, *, attention: str | None, max_length: str | None) -> TahoeConfig:
    """The settings, with those that options replace.

    Raises:
        ConfigError: a value that is not allowed.
    """
    if attention is not None:
        if attention not in ("full", "masked"):
            raise ConfigError(f"attention was {attention!r}; allowed: full, masked")
        config = replace(config, use_attn_mask=attention == "masked")
    if max_length is not None:
        if not max_length.isdecimal() or not 3 <= int(max_length) < 2**31:
            raise ConfigError(f"max_length was {max_length!r}; allowed: a whole number of 3 or more")
        config = replace(config, max_length=int(max_length))
    return config


def _n_raw(keep_first: str, config: TahoeConfig, *, n_special: int) -> int:
    """Number of genes of a cell that keep their raw value.

    Raises:
        ConfigError: `keep_first` is not one of its two values.
    """
    if keep_first not in ("special", "official"):
        raise ConfigError(f"keep_first was {keep_first!r}; allowed: special, official")
    return max(0, config.keep_first - n_special) if keep_first == "official" else 0


def _vocabulary(
    path: Path, weights: Mapping[str, Tensor], model: JsonFields, collator: JsonFields, config: TahoeConfig
) -> Vocabulary:
    """Vocabulary of the embedding's rows.

    Raises:
        CheckpointError: it has another size, lacks a special token, or another one is that of padding.
    """
    found = read_vocabulary(path)
    tokens = found.tokens
    n_rows = len(weights.get(EMBEDDING, ()))
    lacks_drug = config.drug_activation is not None and _DRUG not in found
    if lacks_drug and n_rows == len(tokens) + 1:
        tokens = (*tokens, _DRUG)
    if n_rows and n_rows != len(tokens):
        raise wrong_rows(
            f"model.{EMBEDDING}",
            n_rows,
            path.name,
            len(tokens),
            what="tokens",
            likely=f"the {path.name} that was published with this checkpoint",
        )
    # without <drug>, which the authors' script for publishing does not count
    if n_rows and model.whole("vocab_size") not in (n_rows, len(found)):
        raise model.wrong("vocab_size", f"the number of rows of the embedding, {n_rows}")
    for token in ("<pad>", "<cls>"):
        if token not in found:
            raise CheckpointError(f"{path.name} lacks the token {token!r}; give the one that has the special tokens")
    if collator.whole("pad_token_id", found.id_of("<pad>"), at_least=0) != found.id_of("<pad>"):
        raise collator.wrong("pad_token_id", f"that of '<pad>' in {path.name}, {found.id_of('<pad>')}")
    special = frozenset(token for token in tokens if token.startswith("<"))
    return Vocabulary(tokens=tokens, special=special, genes_are="ids")


def _drugs_file(folder: Path, given: Path | None, collator: JsonFields, config: TahoeConfig) -> Path:
    """The file of the drugs' rows: the one given, or the one of `drug_to_id_path` in the folder.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: the model takes no drug.
    """
    if config.drug_activation is None:
        raise ConfigError(
            f"drug was given, but {folder} has no chemical_encoder in {MODEL}: the model takes no drug; allowed: none"
        )
    if given is None:
        local = collator.table("drug_to_id_path").get("local")
        given = folder / (Path(local).name if isinstance(local, str) and Path(local).name else _DRUGS)
    if not given.exists() and not given.is_symlink():
        raise CheckpointError(
            f"{given} is not there, which names the drugs of the model (drug_to_id_path of {COLLATOR}); the authors' "
            f"repository has {_DRUGS} in scripts/inference: put it there, or name it with --model-option drugs=FILE"
        )
    return given


def _drugs(path: Path, chosen: str, vocabulary: Vocabulary, weights: Mapping[str, Tensor]) -> tuple[Drugs, Vocabulary]:
    """The drugs, and the vocabulary with a special token for each, `<drug:NAME>`, behind the rows of the embedding.

    Raises:
        CheckpointError: the file does not name rows of the drug encoder, each at most once, row 0 as `NO_DRUG`.
        ConfigError: it lacks the drug that was chosen.
    """
    row_of, rows = read_json(path), weights.get(FINGERPRINTS)
    n_drugs = 0 if rows is None else len(rows)
    for name, row in row_of.items():
        if type(row) is not int or not 0 <= row < n_drugs:
            raise CheckpointError(
                f"{path.name} has {name!r}: {row!r}; allowed: a row of model.{FINGERPRINTS}, which has {n_drugs}"
            )
    if row_of.get(NO_DRUG) != 0 or len(set(row_of.values())) != len(row_of):
        raise CheckpointError(f"{path.name} has to give {NO_DRUG!r} the row 0 and each drug a row of its own")
    if not chosen.startswith(OF_CELLS) and chosen not in row_of:
        close = [name for name in row_of if chosen.lower() in name.lower()][:5]
        raise ConfigError(
            f"drug was {chosen!r}, which is not among the {len(row_of)} names of {path.name}"
            + (f"; similar: {', '.join(close)}" if close else f", such as {', '.join(list(row_of)[:4])}")
            + f"; for cells without a known drug give {NO_DRUG}"
        )
    names = {row: name for name, row in row_of.items()}
    tokens = tuple(f"<drug:{names.get(row, row)}>" for row in range(n_drugs))
    known = replace(vocabulary, tokens=(*vocabulary.tokens, *tokens), special=vocabulary.special | frozenset(tokens))
    first = len(vocabulary)
    return Drugs(token_id={name: first + row for name, row in row_of.items()}, chosen=chosen), known


FAMILY = Family(
    name="tahoe",
    files=FILES,
    matches=is_tahoe,
    load=load_tahoe,
    options=(
        ModelOption(
            name="drug",
            help="Drug that the 3B model is given: a name of its list, obs:COLUMN for that of each cell, <pad> for no "
            "known drug, or none (the default), which leaves the drug's token out as the authors' loaders do.",
            of_cells=True,
        ),
        ModelOption(
            name="drugs",
            help="JSON file from drug to row; default: drug_to_id_path of collator_config.yml, in the folder.",
            is_path=True,
        ),
        ModelOption(
            name="keep_first",
            help="Genes whose values are not binned: special (the default) for none, official for those that the "
            "authors' code leaves out by keep_first_n_tokens: without a drug, the first expressed column of a cell.",
        ),
        ModelOption(
            name="attention",
            help="In the pretraining task: masked, where no other token attends to a hidden gene, or full; default: "
            "use_attn_mask of model_config.yml, masked where it says nothing.",
        ),
        ModelOption(
            name="max_length",
            help="Tokens of a cell, special ones included; default: that of collator_config.yml.",
        ),
    ),
    genes="human Ensembl ids",
    length="max_length of collator_config.yml (1,024 or 2,048 tokens); a random sample of the genes of longer cells",
    licence="stated on the card of the published weights; the authors' code is Apache-2.0",
)
