"""Reader of UCE's files, as the authors' code has them in its folder `model_files`; there are no settings.

    4layer_model.torch        state dict of the small model, the table of tokens in it; or 33l_8ep_1024t_1280.torch, the
                              large one, or another *.torch
    species_chrom.csv         species, gene_symbol, chromosome, start
    species_offsets.pkl       species -> row of its first gene in the table; or .json
    protein_embeddings/*.pt   symbol -> vector, a file a species, of which that of the data is needed; the symbols are
                              in the order of the rows, and the vectors are not read
    all_tokens.torch          optional: the table, where the weights have none or for a species that was added
    new_species_protein_embeddings.csv    optional: species, path; the .pt of a species that was added
    vocab_ensembl.json        optional: Ensembl id -> symbol

The table is that of the weights. As in the authors' code, one of all_tokens.torch takes its place only if it has
another number of rows than theirs, which is how they add a species. The row of a chromosome is its rank among all
"species_chromosome" of the csv, behind the rows of the genes; so a csv with another species moves the chromosomes of
all later ones.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sae_core.checkpoint_files import digest_files, digest_names, read_dictionary, read_text, read_torch, read_weights
from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm.families import Family, ModelOption
from sae_core.scfm.uce.network import TABLE, UCE, UCEConfig, canonical_weights, uce_from_weights
from sae_core.scfm.uce.table import N_CHROMOSOMES, N_PROTEIN_ROWS, TokenTable, drawn_chromosomes
from sae_core.scfm.uce.tokenizer import N_SPECIAL, UCETokenizer
from sae_core.scfm.vocabulary import Vocabulary, read_ensembl

FILES = (
    "4layer_model.torch (or 33l_8ep_1024t_1280.torch), species_chrom.csv, species_offsets.pkl, protein_embeddings/*.pt"
)
_TOKENS, _CHROMOSOMES, _PROTEINS = "all_tokens.torch", "species_chrom.csv", "protein_embeddings"
_OFFSETS = ("species_offsets.pkl", "species_offsets.json")
_NEW_SPECIES = "new_species_protein_embeddings.csv"
_COLUMNS = ("species", "gene_symbol", "chromosome", "start")
_SPECIAL_NAMES = ("<pad>", "<open>", "<end>", "<cls>")
_GENE_FILES = {
    species: f"{assembly}.gene_symbol_to_embedding_ESM2.pt"
    for species, assembly in {
        "human": "Homo_sapiens.GRCh38",
        "mouse": "Mus_musculus.GRCm39",
        "frog": "Xenopus_tropicalis.Xenopus_tropicalis_v9.1",
        "zebrafish": "Danio_rerio.GRCz11",
        "mouse_lemur": "Microcebus_murinus.Mmur_3.0",
        "pig": "Sus_scrofa.Sscrofa11.1",
        "macaca_fascicularis": "Macaca_fascicularis.Macaca_fascicularis_6.0",
        "macaca_mulatta": "Macaca_mulatta.Mmul_10",
    }.items()
}
"""The official file of each species."""


class Place(NamedTuple):
    """Where a gene is: the name of its chromosome, as the csv and the species give it, and its first base."""

    chromosome: str
    start: float


@dataclass(frozen=True, kw_only=True)
class Genome:
    """Content of the csv: the chromosomes of all species in the order of their rows, and the genes of one species."""

    chromosomes: tuple[str, ...]
    places: Mapping[str, Place]
    n_repeated: int
    """Rows of the species whose symbol came before."""


def is_uce(folder: Path) -> bool:
    """Whether a folder holds weights named *.torch, as only UCE's are, or its table of chromosomes."""
    return any(_torch_files(folder)) or (folder / _CHROMOSOMES).is_file()


def load_uce(folder: Path, *, species: str | None = None, weights: str | None = None) -> UCE:
    """Model in a folder, for data of a species (None: human).

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit the others; the message names it.
        ConfigError: the folder has no such species, or no such file of weights.
    """
    species = species or "human"
    weights_path, offsets_path = _weights_file(folder, weights), _offsets_file(folder)
    offsets = read_offsets(offsets_path)
    if species not in offsets:
        raise ConfigError(
            f"species was {species!r}; allowed: {', '.join(sorted(offsets))}, which {offsets_path.name} names; another "
            "one needs files of its own, which a notebook of the authors makes"
        )
    genome = read_genome(_needed(folder, _CHROMOSOMES), species)
    symbols = read_symbols(_gene_file(folder, species))
    held = canonical_weights(read_weights(weights_path))
    config = UCEConfig.from_weights(held)
    table, tokens_path = _table(folder, held, config)
    first_chromosome = _first_chromosome(len(table), len(genome.chromosomes))
    n_left = _n_rows_left(offsets, species, len(symbols), first_chromosome, offsets_path.name)
    _check_finite(table, offsets[species], len(symbols), first_chromosome)
    ensembl_path = folder / "vocab_ensembl.json"
    ensembl = read_ensembl(ensembl_path) if ensembl_path.is_file() else {}
    placed = [symbol if symbol in genome.places else None for symbol in symbols]
    model = uce_from_weights(
        config,
        _vocabulary(placed, offsets[species], genome.chromosomes, first_chromosome, len(table), ensembl),
        table,
        _tokenizer(placed, offsets[species], genome, first_chromosome, len(table), config),
        held,
    )
    optional = [path for path in (tokens_path, ensembl_path if ensembl else None) if path is not None]
    # of the file of genes only the order of its symbols counts, and of a table of tokens only one that is used
    model.digest = digest_files(
        [weights_path, folder / _CHROMOSOMES, offsets_path, *optional],
        salt=f"uce {species} {digest_names(symbols)}\n",
    )
    model.notes = tuple(_notes(model, species, genome, placed, n_left, weights_path, tokens_path))
    return model


def _notes(
    model: UCE,
    species: str,
    genome: Genome,
    placed: Sequence[str | None],
    n_left: int,
    weights: Path,
    tokens: Path | None,
) -> Iterator[str]:
    """What a user should know of the checkpoint."""
    n_draws, n_placed = model.config.n_draws, sum(symbol is not None for symbol in placed)
    yield (
        f"weights {weights.name}, genes of {species} ({n_placed:,}); symbols match in upper case, so those of another "
        "species may too: give --model-option species=NAME for its data"
    )
    yield (
        f"{n_draws:,} genes of a cell are drawn with replacement, in proportion to log1p of their counts and from the "
        "seed and the cell; the authors' code draws anew in each run"
    )
    yield (
        "all cells, and all genes with a protein vector, are taken; the authors' code first drops genes in fewer than "
        "10 cells and cells with fewer than 25 genes, so that there a cell depends on the others of its file"
    )
    yield (
        "padding is left out of the attention, as in the authors' code with one cell a batch; with more, padded "
        "positions there are keys, and a cell depends on the longest sentence of its batch"
    )
    if tokens is not None:
        yield f"the rows of the tokens are those of {tokens.name} ({len(model.table):,})"
    if model.table.drawn is not None:
        yield f"{tokens and tokens.name} has no rows of chromosomes: they are drawn as in the authors' code (seed 23)"
    if len(model.table) == N_PROTEIN_ROWS + N_CHROMOSOMES and len(genome.chromosomes) != N_CHROMOSOMES:
        yield (
            f"{_CHROMOSOMES} has {len(genome.chromosomes):,} chromosomes and the table rows for {N_CHROMOSOMES:,}; the "
            "row of a chromosome is its rank in the file, so give the authors' file if this one was changed"
        )
    if len(placed) > n_placed:
        yield (
            f"{len(placed) - n_placed:,} genes with a protein vector are no tokens, because {_CHROMOSOMES} does not "
            "say where they are; the authors' code fails on data that have them"
        )
    if n_left:
        yield f"{n_left:,} rows behind those of {species} are of no gene; all files must be of one release"
    if genome.n_repeated:
        yield (
            f"{genome.n_repeated:,} rows of {_CHROMOSOMES} repeat a symbol of {species}: the first one holds; in the "
            "authors' code each moves the places of all later genes of the data by one"
        )


def _torch_files(folder: Path) -> list[Path]:
    # a link to a file that is gone is taken too, so that the reader names it
    return sorted(path for path in folder.glob("*.torch") if path.name != _TOKENS)


def _weights_file(folder: Path, name: str | None) -> Path:
    found = _torch_files(folder)
    names = ", ".join(path.name for path in found)
    if not found:
        raise CheckpointError(f"4layer_model.torch or 33l_8ep_1024t_1280.torch is missing; a UCE folder holds {FILES}")
    if name is not None:
        chosen = next((path for path in found if path.name == name), None)
        if chosen is None:
            raise ConfigError(f"weights was {name!r}; allowed: {names}")
        return chosen
    if len(found) > 1:
        raise CheckpointError(f"which of {names} is the model? Name it with --model-option weights={found[0].name}")
    return found[0]


def _needed(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{name} is missing; a UCE folder holds {FILES}")
    return path


def _offsets_file(folder: Path) -> Path:
    found = next((folder / name for name in _OFFSETS if (folder / name).is_file()), None)
    return _needed(folder, _OFFSETS[0]) if found is None else found


def _gene_file(folder: Path, species: str) -> Path:
    """The file whose keys are the genes of a species: the official one, or the one that the csv of new species names.

    Raises:
        CheckpointError: it is not there; the message names it.
    """
    own, name = folder / _NEW_SPECIES, _GENE_FILES.get(species)
    if own.is_file():
        added = {row.get("species"): row.get("path") or "" for row in csv.DictReader(io.StringIO(read_text(own)))}
        name = Path(added[species]).name if added.get(species) else name
    if name is None:
        raise CheckpointError(
            f"no file is known for the genes of {species}; write a line {species},FILE.pt into {own}, under the line "
            f"species,path, and put FILE.pt into {folder / _PROTEINS}"
        )
    if (path := folder / _PROTEINS / name).exists() or path.is_symlink():
        return path
    packed = " (unpack protein_embeddings.tar.gz)" if (folder / f"{_PROTEINS}.tar.gz").is_file() else ""
    raise CheckpointError(f"{_PROTEINS}/{name} is missing{packed}; the order of its genes gives the rows of {species}")


def read_offsets(path: Path) -> dict[str, int]:
    """The first row of the genes of each species.

    Raises:
        CheckpointError: the file cannot be read, or a value is no row behind those of the special tokens.
    """
    offsets = read_dictionary(path)
    for species, row in offsets.items():
        if type(row) is not int or row < N_SPECIAL:
            raise CheckpointError(
                f"{path.name} has {species!r}: {row!r}; allowed: a whole number of {N_SPECIAL} or more"
            )
    return offsets


def read_symbols(path: Path) -> tuple[str, ...]:
    """The genes of a file from symbols to protein vectors, in its order and in upper case; no vector is read.

    Symbols that differ in case alone are one gene at the place of the first, as in the authors' table.

    Raises:
        CheckpointError: the file cannot be read or holds other things.
    """
    content = read_torch(path)
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path.name} holds no symbols with their vectors; give the authors' file")
    return tuple(dict.fromkeys(key.upper() for key in content))


def read_genome(path: Path, species: str) -> Genome:
    """The chromosomes of all species, and the places of the genes of one.

    Raises:
        CheckpointError: the file cannot be read, lacks a column or the species, or a start is no number.
    """
    rows = csv.DictReader(io.StringIO(read_text(path)))
    if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
        raise CheckpointError(f"{path.name} lacks the column {missing[0]}; allowed: a table of {', '.join(_COLUMNS)}")
    names: set[str] = set()
    places: dict[str, Place] = {}
    n_repeated = 0
    for number, row in enumerate(rows, start=2):
        if not row["chromosome"] or not row["species"]:
            raise CheckpointError(f"{path.name} has no chromosome or species in line {number}; give the authors' file")
        names.add(name := f"{row['species']}_{row['chromosome']}")
        if row["species"] != species:
            continue
        if row["gene_symbol"] in places:
            n_repeated += 1
            continue
        places[row["gene_symbol"]] = Place(name, _start(row["start"], path, number))
    if not places:
        raise CheckpointError(f"{path.name} has no gene of the species {species!r}; give the file that has its genes")
    return Genome(chromosomes=tuple(sorted(names)), places=places, n_repeated=n_repeated)


def _start(text: str | None, path: Path, number: int) -> float:
    try:
        start = float(text or "")
    except ValueError:
        start = math.nan
    if not math.isfinite(start):
        raise CheckpointError(f"{path.name} has start {text!r} in line {number}; allowed: a number of bases")
    return start


def _table(folder: Path, weights: Mapping[str, Tensor], config: UCEConfig) -> tuple[TokenTable, Path | None]:
    """The table of tokens, and the file of its own that it was taken from; None where it is that of the weights.

    Raises:
        CheckpointError: there is none, or its rows have another length than the weights take.
    """
    held, path = weights.get(TABLE), folder / _TOKENS
    given = None
    if path.exists() or path.is_symlink():
        given = read_torch(path)
        if not isinstance(given, Tensor):
            raise CheckpointError(f"{_TOKENS} holds a {type(given).__name__}; allowed: one tensor, the table of tokens")
        _check_table(given, config, _TOKENS)
    if held is not None:
        _check_table(held, config, TABLE)
        # as upstream: a table of the usual size is that of the weights, whose chromosomes were trained with
        usual = {len(held), N_PROTEIN_ROWS, N_PROTEIN_ROWS + N_CHROMOSOMES}
        if given is None or len(given) in usual:
            return TokenTable(rows=held), None
    if given is None:
        raise CheckpointError(f"the weights lack {TABLE}, and {_TOKENS} is missing; put it into {folder}")
    drawn = drawn_chromosomes(config.d_token) if len(given) == N_PROTEIN_ROWS else None
    return TokenTable(rows=given, drawn=drawn), path


def _check_table(table: Tensor, config: UCEConfig, name: str) -> None:
    if table.ndim != 2 or table.shape[1] != config.d_token or not table.is_floating_point():
        raise CheckpointError(
            f"{name} is {tuple(table.shape)} of {table.dtype}; allowed: rows of {config.d_token} numbers, which "
            "encoder.0.weight takes"
        )


def _first_chromosome(n_rows: int, n_chromosomes: int) -> int:
    """The row of the first chromosome: the authors' constant for a table of their size, else behind all other rows."""
    return N_PROTEIN_ROWS if n_rows == N_PROTEIN_ROWS + N_CHROMOSOMES else n_rows - n_chromosomes


def _n_rows_left(
    offsets: Mapping[str, int], species: str, n_genes: int, first_chromosome: int, offsets_name: str
) -> int:
    """The number of rows of a species that are of no gene; only before the chromosomes there may be such.

    Raises:
        CheckpointError: the species has another number of rows than genes; the message has both.
    """
    first = offsets[species]
    next_species = min((row for row in offsets.values() if row > first), default=None)
    behind = first_chromosome if next_species is None else next_species
    left = behind - first - n_genes
    if left < 0 or (left > 0 and next_species is not None) or behind > first_chromosome:
        raise CheckpointError(
            f"{offsets_name} and the table have {behind - first} rows for {species}, from {first} on, but its file in "
            f"{_PROTEINS} names {n_genes} genes, so genes would get the rows of others; give {_CHROMOSOMES}, "
            f"{offsets_name}, {_PROTEINS} and {_TOKENS} of one release"
        )
    return left


def _check_finite(table: TokenTable, first: int, n_genes: int, first_chromosome: int) -> None:
    """Check the rows that can be read: those of special tokens, of the species and of chromosomes."""
    for start, stop in ((0, N_SPECIAL), (first, first + n_genes), (first_chromosome, len(table.rows))):
        part = table.rows[start:stop]
        if part.numel() and not all(limit.isfinite() for limit in part.aminmax()):
            raise CheckpointError(
                f"the table of tokens holds values that are not finite in rows {start} to {stop - 1}; fetch it again"
            )


def _vocabulary(
    placed: Sequence[str | None],
    first: int,
    chromosomes: Sequence[str],
    first_chromosome: int,
    n_rows: int,
    ensembl: Mapping[str, str],
) -> Vocabulary:
    """Names of all rows of the table; those of other species, and of genes without a place, match no gene."""
    names = [f"<row {row}>" for row in range(n_rows)]
    names[:N_SPECIAL] = _SPECIAL_NAMES
    names[first_chromosome : first_chromosome + len(chromosomes)] = (f"<chromosome {name}>" for name in chromosomes)
    for row, symbol in enumerate(placed, start=first):
        names[row] = symbol or names[row]
    genes = {symbol for symbol in placed if symbol is not None}
    return Vocabulary(tokens=tuple(names), special=frozenset(names) - genes, ensembl=ensembl)


def _tokenizer(
    placed: Sequence[str | None], first: int, genome: Genome, first_chromosome: int, n_rows: int, config: UCEConfig
) -> UCETokenizer:
    row_of = {name: row for row, name in enumerate(genome.chromosomes, start=first_chromosome)}
    chromosome, start = np.full(n_rows, -1, dtype=np.int64), np.zeros(n_rows)
    for row, symbol in enumerate(placed, start=first):
        if symbol is not None:
            place = genome.places[symbol]
            chromosome[row], start[row] = row_of[place.chromosome], place.start
    return UCETokenizer(chromosome=chromosome, start=start, n_draws=config.n_draws, max_positions=config.n_positions)


FAMILY = Family(
    name="uce",
    files=FILES,
    matches=is_uce,
    load=load_uce,
    options=(
        ModelOption(name="species", help="Species of the data, one of species_offsets.pkl; default: human."),
        ModelOption(
            name="weights", help="File of the model, such as 4layer_model.torch; default: the only one of the folder."
        ),
    ),
    genes="gene symbols of the species (human by default), in any case",
    length="1,024 genes drawn with replacement, by log1p of their counts",
    licence="not stated in the authors' repository; see the page of the files on figshare (the code is MIT)",
)
