"""Reader of Nicheformer's files: the hub's folder or a Lightning checkpoint, and what lies beside the authors' code.

    config.json, model.safetensors          the hub's folder: settings and weights; or
    *.ckpt                                  a Lightning checkpoint with hyper_parameters and state_dict; a config.json
                                            beside it comes first, as a fine-tuned one has no sizes of the network
    model.h5ad                              its var names are the genes of the reference, in the order of their tokens;
                                            without it, those of vocab.json, if they are there
    *_mean_script.npy                       technology means: dissociated, merfish, cosmx, xenium
    vocab_ensembl.json                      optional, {Ensembl id: symbol}: genes also match by symbol

The path is the folder or the .ckpt itself. model.h5ad and the means are searched there and in its subfolder
`model_means`, as the official repository has them (data/model_means); `means` names another file or folder of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from sae_core.checkpoint_files import (
    INDEX,
    digest_files,
    read_json,
    read_torch_with_settings,
    read_weights,
    weight_files,
    wrong_rows,
)
from sae_core.errors import CheckpointError, ConfigError
from sae_core.incomplete_files import check_complete
from sae_core.json_fields import JsonFields
from sae_core.scfm.cell_context import OF_CELLS
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.nicheformer.context import BY_ASSAY, FIELDS, NONE, Context
from sae_core.scfm.nicheformer.network import (
    NEEDED,
    OFFICIAL,
    PAD_ID,
    Nicheformer,
    NicheformerConfig,
    nicheformer_from_weights,
)
from sae_core.scfm.nicheformer.tokenizer import (
    N_AUXILIARY,
    NicheformerTokenizer,
    Precision,
    TechnologyMeans,
    Ties,
    prepared_mean,
)
from sae_core.scfm.vocabulary import Vocabulary, read_ensembl

WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}")
FILES = "config.json and model.safetensors, or a Lightning .ckpt; with model.h5ad and *_mean_script.npy"
_REFERENCE = "model.h5ad"
_MEANS = "_mean_script.npy"
_SUBFOLDER = "model_means"
_OFFICIAL_PLACE = "data/model_means of the official repository"
_PADS = {"1": PAD_ID, "0": 0}
_AUXILIARY = (
    "<mask> <pad> <cls> <dissociated> <spatial> <human> <mouse> <merfish> <cosmx> <xenium> <10x_5v2> <10x_3v3> "
    "<10x_3v2> <10x_5v1> <10x_3v1> <10x_3> <10x_5> <cite-seq> <smart-seq_v4>"
).split()


class Checkpoint(NamedTuple):
    """Settings and weights, and the files that they were read from."""

    fields: JsonFields
    weights: Mapping[str, Tensor]
    paths: tuple[Path, ...]


class Reference(NamedTuple):
    """The genes of the reference, and the files that they were read from."""

    genes: tuple[str, ...]
    aliases: Mapping[str, str]
    paths: tuple[Path, ...]


class Means(NamedTuple):
    """The technology means, the files that they were read from, and the number of genes with a negative mean."""

    means: TechnologyMeans
    paths: tuple[Path, ...]
    n_negative: int


def is_nicheformer(path: Path) -> bool:
    """Whether the folder has the hub's config.json and weights, or a .ckpt beside model.h5ad or technology means."""
    return _weights_file(path) is not None


def load_nicheformer(
    path: Path,
    *,
    species: str | None = None,
    assay: str | None = None,
    modality: str | None = None,
    means: Path | None = None,
    ties: str = "id",
    precision: str = "float64",
    pads: str = "1",
) -> Nicheformer:
    """Model in a folder or a Lightning checkpoint; the options are those of `FAMILY`.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
        ConfigError: an option has a value that is not allowed.
    """
    _check_choice("ties", ties, get_args(Ties))
    _check_choice("precision", precision, get_args(Precision))
    _check_choice("pads", pads, tuple(_PADS))
    weights_path = _weights_file(path)
    assert weights_path is not None
    folder = weights_path.parent
    checkpoint = _read_checkpoint(weights_path)
    config = NicheformerConfig.from_fields(checkpoint.fields)
    reference = read_reference(folder, n_genes=config.n_tokens - N_AUXILIARY)
    given = {"species": species, "assay": assay, "modality": modality}
    left_out = {name: NONE for name in FIELDS if not config.has_token_of[name]}
    context = Context(**(left_out | {name: value for name, value in given.items() if value is not None}))
    found = read_means(folder, context, n_genes=len(reference.genes), means=means)
    model = nicheformer_from_weights(
        config,
        _vocabulary(reference),
        NicheformerTokenizer(
            context=context,
            means=found.means,
            max_positions=config.max_positions,
            ties=cast("Ties", ties),
            precision=cast("Precision", precision),
        ),
        checkpoint.weights,
        pad_id=_PADS[pads],
        file=checkpoint.fields.file,
    )
    salt = "\n".join([context.salt, "one mean" if means is not None else "", ties, precision, pads])
    model.digest = digest_files([*checkpoint.paths, *reference.paths, *found.paths], salt=salt)
    defaults = [name for name in FIELDS if given[name] is None and name not in left_out]
    model.notes = (*checkpoint.fields.notes, *_notes(model, defaults, found))
    return model


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} was {value!r}; allowed: {', '.join(allowed)}")


def _read_checkpoint(path: Path) -> Checkpoint:
    settings = path.parent / "config.json"
    if path.suffix != ".ckpt":
        fields = JsonFields(read_json(settings), file=settings.name)
        return Checkpoint(fields, read_weights(path), (settings, *weight_files(path)))
    content = read_torch_with_settings(path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{path.name} holds no state_dict of tensors; allowed: a Lightning checkpoint of Nicheformer"
        )
    named = {str(name): value for name, value in weights.items()}
    if _is_config(settings):
        return Checkpoint(JsonFields(read_json(settings), file=settings.name), named, (settings, path))
    stated = content.get("hyper_parameters")
    if not isinstance(stated, dict) or (lacking := [name for name in NEEDED if name not in stated]):
        what = f"no {', '.join(lacking)} in its hyper_parameters" if isinstance(stated, dict) else "no hyper_parameters"
        raise CheckpointError(
            f"{path.name} has {what}, as a fine-tuned model; put the config.json of the model that it was tuned from "
            f"(fields {', '.join(NEEDED)}) beside it"
        )
    return Checkpoint(JsonFields(stated, file=f"hyper_parameters of {path.name}"), named, (path,))


def _weights_file(path: Path) -> Path | None:
    """The file of weights in a folder, or the .ckpt that the path is; None if they are not Nicheformer's."""
    if path.suffix == ".ckpt" and not path.is_dir():
        is_ours = path.name != "models.ckpt" and (path.is_file() or path.is_symlink()) and _has_companions(path.parent)
        return path if is_ours else None
    if _is_config(path / "config.json"):
        # a link to a file that is gone is taken too, so that the reader names it
        named = (file for name in WEIGHTS if (file := path / name).is_file() or file.is_symlink())
        if (found := next(named, None)) is not None:
            return found
    checkpoints = sorted(file for file in path.glob("*.ckpt") if file.name != "models.ckpt")
    if not checkpoints or not _has_companions(path):
        return None
    if len(checkpoints) > 1:
        names = ", ".join(file.name for file in checkpoints)
        raise CheckpointError(f"{path} holds several checkpoints ({names}); give the path of one")
    return checkpoints[0]


def _is_config(path: Path) -> bool:
    if not path.is_file():
        return False
    config = read_json(path)
    kind = config.get("model_type")
    return kind == "nicheformer" or (kind is None and all(name in config for name in NEEDED))


def _has_companions(folder: Path) -> bool:
    places = _places(folder)
    beside = any((place / _REFERENCE).is_file() or any(place.glob(f"*{_MEANS}")) for place in places)
    return beside or _is_config(folder / "config.json")


def _places(folder: Path) -> tuple[Path, ...]:
    return folder, folder / _SUBFOLDER


def read_reference(folder: Path, *, n_genes: int) -> Reference:
    """The genes of the reference from model.h5ad, or from vocab.json where it names them, and their symbols.

    Raises:
        CheckpointError: there is neither, they differ, or they are not `n_genes` different genes.
    """
    stored = next((file for place in _places(folder) if (file := place / _REFERENCE).is_file()), None)
    vocabulary = folder / "vocab.json"
    listed = _genes_of_vocabulary(vocabulary) if vocabulary.is_file() else ()
    if stored is None and not listed:
        also = f", and {vocabulary.name} names no genes" if vocabulary.is_file() else ""
        raise CheckpointError(
            f"{folder} holds no {_REFERENCE}{also}, so the genes of the tokens are unknown; copy it there from "
            f"{_OFFICIAL_PLACE} or from the model's folder on the hub"
        )
    genes = listed if stored is None else _var_names(stored)
    path = vocabulary if stored is None else stored
    if stored is not None and listed and listed != genes:
        raise CheckpointError(
            f"{vocabulary.name} gives genes other tokens than {path.name} does (token {N_AUXILIARY} is {listed[0]} and "
            f"{genes[0]}); keep the file that belongs to the weights"
        )
    if len(genes) != n_genes:
        raise wrong_rows(
            "the table of tokens",
            n_genes,
            path.name,
            len(genes),
            what="genes",
            likely=f"the {_REFERENCE} of this model",
        )
    if repeated := [gene for gene, n in Counter(genes).items() if n > 1]:
        raise CheckpointError(
            f"{path.name} names {repeated[0]!r} more than once; give the file as its authors publish it"
        )
    symbols = folder / "vocab_ensembl.json"
    paths = (path, *([symbols] if symbols.is_file() else []))
    return Reference(genes, _aliases(symbols, genes), paths)


def _genes_of_vocabulary(path: Path) -> tuple[str, ...]:
    """The genes of a vocab.json in the order of their tokens; empty if it names tokens of the context alone."""
    rows: dict[int, str] = {}
    for token, row in read_json(path).items():
        if type(row) is not int or row < 0:
            raise CheckpointError(f"{path.name} has {token!r}: {row!r}; allowed: the row of each token, a whole number")
        if row >= N_AUXILIARY:
            if row in rows:
                raise CheckpointError(f"{path.name} gives row {row} to {rows[row]!r} and {token!r}; give each row once")
            rows[row] = token
    if rows and sorted(rows) != list(range(N_AUXILIARY, N_AUXILIARY + len(rows))):
        raise CheckpointError(
            f"{path.name} names {len(rows)} genes up to row {max(rows)}; allowed: one for each row from {N_AUXILIARY}"
        )
    return tuple(rows[row] for row in sorted(rows))


def _var_names(path: Path) -> tuple[str, ...]:
    """The names of var of an .h5ad, read as the plain HDF5 file that it is."""
    import h5py

    check_complete(path)
    try:
        with h5py.File(path, "r") as file:
            var = file["var"]
            names = var[var.attrs.get("_index", "_index")] if isinstance(var, h5py.Group) else var["index"]
            names = names["values"] if isinstance(names, h5py.Group) else names
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names[:])
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as an .h5ad with names of var ({type(error).__name__}: {error}); fetch the file "
            "again"
        ) from error


def _aliases(path: Path, genes: Sequence[str]) -> dict[str, str]:
    """Gene of each symbol in an optional {Ensembl id: symbol}; a symbol of two genes leads to neither."""
    if not path.is_file():
        return {}
    known = set(genes)
    symbols = {gene: symbol for gene, symbol in read_ensembl(path).items() if gene in known and symbol}
    n_of = Counter(symbols.values())
    return {symbol: gene for gene, symbol in symbols.items() if n_of[symbol] == 1}


def _vocabulary(reference: Reference) -> Vocabulary:
    unused = (f"<unused{i}>" for i in range(len(_AUXILIARY), N_AUXILIARY))
    auxiliary = (*_AUXILIARY, *unused)
    return Vocabulary(
        tokens=(*auxiliary, *reference.genes),
        special=frozenset(auxiliary),
        aliases=reference.aliases,
        genes_are="ids",
    )


def read_means(folder: Path, context: Context, *, n_genes: int, means: Path | None) -> Means:
    """The means of the technologies that the context may need, from the folder or as the option `means` says.

    Raises:
        CheckpointError: a file is missing, cannot be read or has not one number for each gene.
    """
    if means is not None and not means.is_dir():
        raw = _read_mean(means, n_genes)
        return Means(TechnologyMeans({}, prepared_mean(raw)), (means,), int((raw < 0).sum()))
    places = _places(folder) if means is None else (means,)
    of_cells = context.assay.startswith(OF_CELLS)
    if not context.technologies:
        raise CheckpointError(
            f"there are no technology means of assay {context.assay!r}; give a file for all cells: --model-option "
            "means=FILE.npy"
        )
    paths = {
        name: file
        for name in context.technologies
        if (file := next((p / f"{name}{_MEANS}" for p in places if (p / f"{name}{_MEANS}").is_file()), None))
    }
    if not paths:
        wanted = f"{context.technologies[0]}{_MEANS}" if not of_cells else f"files *{_MEANS}"
        raise CheckpointError(
            f"{places[0]} holds no {wanted}, by which expression is divided; copy it there from {_OFFICIAL_PLACE}, or "
            "name a file or their folder with --model-option means=PATH"
        )
    raw_of = {name: _read_mean(path, n_genes) for name, path in paths.items()}
    n_negative = sum(int((raw < 0).sum()) for raw in raw_of.values())
    return Means(
        TechnologyMeans({name: prepared_mean(raw) for name, raw in raw_of.items()}), tuple(paths.values()), n_negative
    )


def _read_mean(path: Path, n_genes: int) -> Float64[np.ndarray, " gene"]:
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"means is {path}, which is not there; allowed: a file *{_MEANS} or a folder of them")
    check_complete(path)
    try:
        found: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as an array of numpy ({error}); fetch the file again") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.shape != (n_genes,):
        what = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise CheckpointError(f"{path} holds {what}; allowed: one number for each of the {n_genes} genes of the model")
    mean = found.astype(np.float64)
    if np.isinf(mean).any():
        raise CheckpointError(
            f"{path} holds {int(np.isinf(mean).sum())} infinite means; allowed: numbers, or NaN for 0"
        )
    return mean


def _notes(model: Nicheformer, defaults: Sequence[str], found: Means) -> Iterator[str]:
    """What a user should know of the checkpoint."""
    shown = [f"{name} {value}{' (default)' * (name in defaults)}" for name, value in model.context.items()]
    by_assay = " (spatial for MERFISH, CosMx, Xenium, Visium)" if BY_ASSAY in model.context.values() else ""
    yield f"context of a cell: {', '.join(shown)}{by_assay}; --model-option assay=VALUE or assay=obs:COLUMN changes it"
    if model.context["assay"].startswith(OF_CELLS) or model.tokenizer.context.technologies == ("xenium",):
        yield "Xenium and Visium share token 9, as of two official tables each has one; means are those of Xenium alone"
    if lacking := [name for name in model.tokenizer.context.technologies if name not in found.means.of]:
        if found.means.of_all is None:
            yield f"no technology means of {', '.join(lacking)}, so cells of them are refused"
    yield (
        f"technology means: {', '.join(path.name for path in found.paths)}, NaN to 0, rounded half up, 0 to 1, as in "
        "the authors' tokenization notebooks; their embedding notebook and the tokenizer on the hub differ from these"
        + (f"; genes with a negative mean, which rank last: {found.n_negative}" if found.n_negative else "")
    )
    yield f"ties of scores: {model.tokenizer.ties}; scores in {model.tokenizer.precision}"
    yield (
        f"official cell embedding ({OFFICIAL}): mean over places 4 to {model.config.max_positions}, padding included, "
        "so every cell takes all places; mean over the genes is another one, and cheaper"
    )
    n_mouse = sum(token.startswith("ENSMUSG") for token in model.vocabulary.tokens)
    yield (
        f"genes: {model.vocabulary.n_genes - n_mouse} human ids and {n_mouse} of the mouse; data of mice need human "
        "orthologues"
    )


FAMILY = Family(
    name="nicheformer",
    files=FILES,
    matches=is_nicheformer,
    load=load_nicheformer,
    options=(
        ModelOption(
            name="species",
            help="Species of the cells: human (the default), mouse, none, or obs:COLUMN.",
            of_cells=True,
        ),
        ModelOption(
            name="assay",
            help='Assay of the cells, such as "10x 3\' v3", MERFISH, CosMx, Xenium, none, or obs:COLUMN; default: 10x '
            "3' transcription profiling, a version of 10x that is not known.",
            of_cells=True,
        ),
        ModelOption(
            name="modality",
            help="Modality of the cells: dissociated, spatial, none, or obs:COLUMN; default: that of the assay.",
            of_cells=True,
        ),
        ModelOption(
            name="means",
            help="File of technology means for all cells, or a folder with those of each technology; default: searched "
            "in the checkpoint's folder by assay.",
            is_path=True,
        ),
        ModelOption(
            name="ties",
            help="Order of genes of equal scores: id (the default), or upstream, the order of the authors' code.",
        ),
        ModelOption(
            name="precision",
            help="Precision of the scores: float64 (the default), or float32, the authors' code on a float32 matrix.",
        ),
        ModelOption(
            name="pads",
            help="Token of the padding in the official embedding: 1 (the default), or 0, that of the tokenizer on the "
            "hub.",
        ),
    ),
    genes="human Ensembl ids (20,159) and 151 of the mouse; mice by human orthologues",
    length="1,500 places, 3 of them context; the genes of the highest ranks of longer cells",
    licence="as stated on Mendeley Data and on the hub",
)
