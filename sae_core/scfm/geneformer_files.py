"""Reader of Geneformer's files: a Hugging Face folder, and the dictionaries in it or beside it.

Dictionaries are searched, in this order, in FOLDER, FOLDER/geneformer, FOLDER/.., FOLDER/../geneformer, and in the
subfolder gene_dictionaries_30m of each (the layout of the official repository). The first folder whose token dictionary
has as many entries as the model's embedding is used, so V1 and V2 files can lie side by side. Their names are:

    token_dictionary*     Ensembl id or special token -> token id       needed
    gene_median*          Ensembl id -> median                          needed
    gene_name_id*         symbol -> Ensembl id                          optional: without it only Ensembl ids match
    ensembl_mapping*      any name, upper case -> current Ensembl id    optional: V2 maps outdated ids to current ones

Each may be .json or .pkl; .json is preferred where both exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.checkpoint_files import digest_files, read_dictionary, read_json, read_weights
from sae_core.errors import CheckpointError
from sae_core.scfm.geneformer import Geneformer, GeneformerConfig, geneformer_from_weights
from sae_core.scfm.vocabulary import Vocabulary, ensembl_id

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FILES = "config.json (model_type bert), model.safetensors (or pytorch_model.bin), and Geneformer's dictionaries"
_SPECIAL = frozenset({"<pad>", "<mask>", "<cls>", "<eos>"})
_KINDS = ("token_dictionary", "gene_median", "gene_name_id", "ensembl_mapping")


class Dictionaries(NamedTuple):
    """Content of the dictionaries, and the files that it was read from."""

    vocabulary: Vocabulary
    medians: Mapping[str, float]
    paths: tuple[Path, ...]


def is_geneformer(folder: Path) -> bool:
    """Whether the folder holds a Hugging Face checkpoint of a BERT model."""
    config = folder / "config.json"
    if not config.is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        return False
    return read_json(config).get("model_type") == "bert"


def load_geneformer(folder: Path) -> Geneformer:
    """Model in a folder.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
    """
    weights_path = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    config = GeneformerConfig.from_json(read_json(folder / "config.json"))
    found = find_dictionaries(folder, n_tokens=config.n_tokens)
    model = geneformer_from_weights(config, found.vocabulary, found.medians, read_weights(weights_path))
    model.digest = digest_files([folder / "config.json", *found.paths, weights_path])
    return model


def find_dictionaries(folder: Path, *, n_tokens: int) -> Dictionaries:
    """Dictionaries of a model of `n_tokens` tokens, searched in the folders that the module docstring lists.

    Raises:
        CheckpointError: no token dictionary has that many tokens, or no medians lie beside it.
    """
    found = []
    for place in _places(folder):
        for path in _named(place, "token_dictionary"):
            ids = read_dictionary(path)
            found.append(f"{path} ({len(ids)} tokens)")
            if len(ids) == n_tokens:
                return _dictionaries(place, path, ids)
    raise CheckpointError(
        f"no token dictionary has the {n_tokens} tokens of this model; found: {', '.join(found) or 'none'}; put "
        f"token_dictionary*.pkl (or .json) and its companions into one of {', '.join(map(str, _places(folder)))}"
    )


def _places(folder: Path) -> Iterator[Path]:
    folder = folder.resolve()
    for base in (folder, folder / "geneformer", folder.parent, folder.parent / "geneformer"):
        yield base
        yield base / "gene_dictionaries_30m"


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
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(
            f"the ids of the {len(tokens)} tokens in {token_path} are not the numbers 0 to {len(tokens) - 1}"
        )
    medians = {name: float(value) for name, value in read["gene_median"].items() if name in ids}
    # a token without a median cannot be ranked, so no gene may match it
    special = _SPECIAL & set(tokens) | {token for token in tokens if token not in medians}
    vocabulary = Vocabulary(
        tokens=tuple(tokens),
        special=frozenset(special),
        genes_are="ids",
        **_names(read.get("gene_name_id", {}), read.get("ensembl_mapping", {}), set(tokens) - special),
    )
    return Dictionaries(vocabulary, medians, tuple(paths))


def _names(id_of_symbol: Mapping[str, str], current: Mapping[str, str], genes: set[str]) -> dict[str, dict[str, str]]:
    """Ensembl ids and aliases (symbols and other names) that lead to a gene of the model."""
    names = {name: current.get(name.upper(), gene) for name, gene in id_of_symbol.items()}
    names = {**current, **{name: current.get(gene, gene) for name, gene in names.items()}}
    known = {name: gene for name, gene in names.items() if gene in genes}
    return {
        "ensembl": {name: gene for name, gene in known.items() if ensembl_id(name)},
        "aliases": {name: gene for name, gene in known.items() if name and not ensembl_id(name)},
    }
