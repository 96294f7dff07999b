"""Reader of Geneformer's files: a Hugging Face folder, and the dictionaries in it or beside it.

The official repository has the dictionaries in its folder `geneformer` (those of V1 in the subfolder
`gene_dictionaries_30m`) and checkpoints beside that folder, fine-tuned ones in `fine_tuned_models`. So dictionaries are
searched in FOLDER and the three folders above it, in the folder `geneformer` of each, and in `gene_dictionaries_30m` of
all these. The first token dictionary with as many entries as the model's embedding is used, so V1 and V2 files can lie
side by side. Where a folder of dictionaries is named, only that one and its two subfolders are searched. The names are:

    token_dictionary*     Ensembl id or special token -> token id       needed
    gene_median*          Ensembl id -> median                          needed
    gene_name_id*         symbol -> Ensembl id                          optional: without it only Ensembl ids match
    ensembl_mapping*      any name, upper case -> current Ensembl id    optional: V2 maps outdated ids to current ones

Each may be .json or .pkl; .json is preferred where both exist. Files of different releases have many genes in common,
and would give wrong ranks without an error: each is checked against the others and against the sizes of official ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.checkpoint_files import (
    INDEX,
    digest_files,
    digest_names,
    read_dictionary,
    read_json,
    read_weights,
    weight_files,
)
from sae_core.errors import CheckpointError
from sae_core.json_fields import JsonFields
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.geneformer.network import (
    NEEDED,
    Geneformer,
    GeneformerConfig,
    canonical_weights,
    geneformer_from_weights,
)
from sae_core.scfm.vocabulary import Vocabulary, ensembl_id

WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
FILES = "config.json (model_type bert), model.safetensors (or pytorch_model.bin), and Geneformer's dictionaries"
_SPECIAL = frozenset({"<pad>", "<mask>", "<cls>", "<eos>"})
_KINDS = ("token_dictionary", "gene_median", "gene_name_id", "ensembl_mapping")
_MIN_MAPPED = 0.95
"""Share of the model's genes that a mapping must lead to; that of V2 leads to 87 % of the genes of V1."""


class Release(NamedTuple):
    """The official dictionaries of one release, by which those of another are recognised."""

    name: str
    sizes: Mapping[str, int]
    """Number of entries by kind."""
    tail: str
    """End of the files' names."""
    folder: str
    """Where they lie in the official repository."""
    in_order: tuple[str, str]
    """Digests of the tokens, sorted by name and in the order of their ids."""


RELEASES = (
    Release(
        name="V1",
        sizes={"token_dictionary": 25_426, "gene_median": 25_424, "gene_name_id": 40_248},
        tail="gc30M",
        folder="geneformer/gene_dictionaries_30m",
        in_order=("70f670e98b7aa229", "f5170dbe675da42c"),
    ),
    Release(
        name="V2",
        sizes={
            "token_dictionary": 20_275,
            "gene_median": 42_005,
            "gene_name_id": 63_675,
            "ensembl_mapping": 173_697,
        },
        tail="gc104M",
        folder="geneformer",
        in_order=("aa942dc4d688ce0c", "d51cb0ff2b42693b"),
    ),
)


class Dictionaries(NamedTuple):
    """Content of the dictionaries, and the files that it was read from."""

    vocabulary: Vocabulary
    medians: Mapping[str, float]
    paths: tuple[Path, ...]


def is_geneformer(folder: Path) -> bool:
    """Whether the folder holds a Hugging Face checkpoint of a BERT model."""
    path = folder / "config.json"
    if not path.is_file() or _weights_file(folder) is None:
        return False
    config = read_json(path)
    kind = config.get("model_type")
    is_bert = kind == "bert" or (kind is None and all(name in config for name in NEEDED))
    return is_bert and "bin_num" not in config  # which AIDO.Cell has


def load_geneformer(folder: Path, *, dictionaries: Path | None = None) -> Geneformer:
    """Model in a folder, with the dictionaries in the folder `dictionaries` or, without it, in or near its own.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
    """
    weights_path = _weights_file(folder)
    assert weights_path is not None
    fields = JsonFields(read_json(folder / "config.json"), file="config.json")
    config = GeneformerConfig.from_fields(fields)
    weights = canonical_weights(read_weights(weights_path))
    n_rows = len(weights.get("embedding.word.weight", ())) or config.n_tokens
    if n_rows != config.n_tokens:
        raise CheckpointError(
            f"word_embeddings has {n_rows} rows but config.json has vocab_size {config.n_tokens}; give the config.json "
            f"of {_release_of(n_rows) or 'this checkpoint'}"
        )
    found = find_dictionaries(folder, n_tokens=n_rows, dictionaries=dictionaries)
    model = geneformer_from_weights(config, found.vocabulary, found.medians, weights)
    model.digest = digest_files([folder / "config.json", *found.paths, *weight_files(weights_path)])
    model.notes = (*fields.notes, *_notes(model, found))
    return model


def _weights_file(folder: Path) -> Path | None:
    # a link to a file that is gone is taken too, so that the reader names it
    return next((path for name in WEIGHTS if (path := folder / name).is_file() or path.is_symlink()), None)


def _notes(model: Geneformer, found: Dictionaries) -> Iterator[str]:
    """What a user should know of the checkpoint."""
    yield f"dictionaries: {', '.join(path.name for path in found.paths)} in {found.paths[0].parent}"
    if "cls" in model.readouts:
        yield (
            "official cell embedding (V2, the authors' current release): <cls> after layer "
            f"{model.default_site.index}; mean over the genes is that of V1 and of the first release of V2"
        )


def _release_of(n_tokens: int) -> str:
    return next((f"Geneformer {r.name}" for r in RELEASES if r.sizes["token_dictionary"] == n_tokens), "")


def find_dictionaries(folder: Path, *, n_tokens: int, dictionaries: Path | None = None) -> Dictionaries:
    """Dictionaries of a model of `n_tokens` tokens, searched in the folders that the module docstring lists.

    Raises:
        CheckpointError: no token dictionary has that many tokens, or its companions are missing or not of its release.
    """
    if dictionaries is not None and not dictionaries.is_dir():
        raise CheckpointError(f"dictionaries is {dictionaries}, which is no folder; give the folder that holds them")
    found, places = [], list(dict.fromkeys(_places(folder, dictionaries)))
    for place in places:
        for path in _named(place, "token_dictionary"):
            ids = read_dictionary(path)
            found.append(f"{path} ({len(ids)} tokens{_named_release(len(ids))})")
            if len(ids) == n_tokens:
                return _dictionaries(place, path, ids)
    release = next((r for r in RELEASES if r.sizes["token_dictionary"] == n_tokens), None)
    likely = "token_dictionary*.pkl (or .json) and its companions"
    if release is not None:
        likely = f"token_dictionary_{release.tail}.pkl and its companions ({release.folder} in the official repository)"
    raise CheckpointError(
        f"no token dictionary has the {n_tokens} tokens of this model{_named_release(n_tokens)}; found: "
        f"{', '.join(found) or 'none'}; put {likely} into {places[0]}, or name their folder with "
        "--model-option dictionaries=DIR"
    )


def _named_release(n_tokens: int) -> str:
    name = _release_of(n_tokens)
    return f", as {name}" if name else ""


def _places(folder: Path, dictionaries: Path | None) -> Iterator[Path]:
    if dictionaries is not None:
        bases = [dictionaries, dictionaries / "geneformer"]
    else:
        homes = [*_and_above(folder.absolute()), *_and_above(folder.resolve())]
        bases = [place for home in homes for place in (home, home / "geneformer")]
    for base in bases:
        yield base
        yield base / "gene_dictionaries_30m"


def _and_above(folder: Path) -> list[Path]:
    return [folder, *list(folder.parents)[:3]]


def _named(place: Path, kind: str) -> list[Path]:
    return [path for suffix in ("json", "pkl") for path in sorted(place.glob(f"{kind}*.{suffix}"))]


def _dictionaries(place: Path, token_path: Path, ids: Mapping[str, Any]) -> Dictionaries:
    # dictionaries of one version share the end of their names: token_dictionary_gc104M, gene_median_dictionary_gc104M
    version = token_path.stem.partition("_gc")[2]
    paths, read = [token_path], {}
    for kind in _KINDS[1:]:
        candidates = [path for path in _named(place, kind) if path.stem.partition("_gc")[2] == version]
        candidates = candidates or _named(place, kind)
        if candidates:
            paths.append(candidates[0])
            read[kind] = read_dictionary(candidates[0])
    if "gene_median" not in read:
        raise CheckpointError(f"{place} holds {token_path.name} but no gene_median*.pkl or .json; copy it there")
    if wrong := [f"{name!r}: {i!r}" for name, i in ids.items() if type(i) is not int]:
        raise CheckpointError(f"{token_path} has {wrong[0]}; allowed: whole numbers")
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(
            f"the ids of the {len(tokens)} tokens in {token_path} are not the numbers 0 to {len(tokens) - 1}"
        )
    _check_release(tokens, token_path, {kind: len(content) for kind, content in read.items()}, paths)
    for path, (kind, content) in zip(paths[1:], read.items(), strict=True):
        is_text = [isinstance(value, str) for value in content.values()]
        if wrong := [n for n, text in zip(content, is_text, strict=True) if text == (kind == "gene_median")]:
            raise CheckpointError(f"{path} has {wrong[0]!r}: {str(content[wrong[0]])[:40]!r}; give the official file")
    _check_genes(set(tokens) - _SPECIAL, token_path, read, paths)
    medians = {name: float(value) for name, value in read["gene_median"].items() if name in ids}
    special = _SPECIAL & set(tokens)
    vocabulary = Vocabulary(
        tokens=tuple(tokens),
        special=special,
        genes_are="ids",
        **_names(read.get("gene_name_id", {}), read.get("ensembl_mapping", {}), set(tokens) - special),
    )
    return Dictionaries(vocabulary, medians, tuple(paths))


def _check_release(tokens: Sequence[str], token_path: Path, sizes: Mapping[str, int], paths: Sequence[Path]) -> None:
    """Check that no dictionary is that of another release than the tokens, and that official tokens are in order.

    Raises:
        CheckpointError: one is; the message has both sizes and the file that is probably right.
    """
    own = next((r for r in RELEASES if r.sizes["token_dictionary"] == len(tokens)), None)
    for kind, size in sizes.items():
        of = next((r for r in RELEASES if r.sizes.get(kind) == size), own)
        if own is not None and of is not None and of is not own:
            path = next(path for path in paths if path.name.startswith(kind))
            raise CheckpointError(
                f"{path} has {size} entries, as that of {of.name}, but {token_path.name} has the {len(tokens)} tokens "
                f"of {own.name}; give {kind}*_{own.tail}.pkl ({own.folder} in the official repository)"
            )
    for release in RELEASES:
        by_name, by_id = release.in_order
        if digest_names(sorted(tokens)) == by_name and digest_names(tokens) != by_id:
            raise CheckpointError(
                f"{token_path} has the tokens of {release.name} with other ids, so genes would get the vectors of "
                f"others; give token_dictionary_{release.tail}.pkl"
            )


def _check_genes(
    genes: Set[str], token_path: Path, read: Mapping[str, Mapping[str, Any]], paths: Sequence[Path]
) -> None:
    """Check that every gene of the tokens has a median, and that a mapping leads to them.

    Raises:
        CheckpointError: the dictionaries are not of one release; the message names two of them and the numbers.
    """
    medians, mapping = read["gene_median"], read.get("ensembl_mapping")
    if lacking := sorted(genes - medians.keys()):
        raise CheckpointError(
            f"{len(lacking)} of the {len(genes)} genes of {token_path.name} have no median among the {len(medians)} of "
            f"{paths[1]}, e.g. {lacking[0]}; give the medians of the same release"
        )
    n_mapped = 0 if mapping is None else len(genes & (set(mapping.values()) | (genes - mapping.keys())))
    if mapping is not None and n_mapped < _MIN_MAPPED * len(genes):
        raise CheckpointError(
            f"{paths[-1]} leads to {n_mapped} of the {len(genes)} genes of {token_path.name}; give the mapping of the "
            "same release, or take it away"
        )


def _names(id_of_symbol: Mapping[str, str], current: Mapping[str, str], genes: Set[str]) -> dict[str, dict[str, str]]:
    """Ensembl ids and aliases (symbols and other names) that lead to a gene of the model."""
    names = {name: current.get(name.upper(), gene) for name, gene in id_of_symbol.items()}
    names = {**current, **{name: current.get(gene, gene) for name, gene in names.items()}}
    known = {name: gene for name, gene in names.items() if gene in genes}
    return {
        "ensembl": {name: gene for name, gene in known.items() if ensembl_id(name)},
        "aliases": {name: gene for name, gene in known.items() if name and not ensembl_id(name)},
    }


FAMILY = Family(
    name="geneformer",
    files=FILES,
    matches=is_geneformer,
    load=load_geneformer,
    options=(
        ModelOption(
            name="dictionaries",
            help="Folder of the dictionaries; default: searched in the checkpoint's folder and those above it.",
            is_path=True,
        ),
    ),
    genes="human Ensembl ids, or symbols through its dictionary of names",
    length="2,048 (V1) or 4,096 (V2) places; the genes of the highest ranks of longer cells",
    licence="Apache-2.0",
)
