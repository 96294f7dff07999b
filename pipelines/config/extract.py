"""The options of reading cells and of running the foundation model over them."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import (
    ActorOptions,
    CellOptions,
    Files,
    GeneOptions,
    NamedValues,
    ObsOptions,
    parse_size,
)
from pipelines.config.vectors import VectorsPlace

OF_MODEL = frozenset(
    "model model_option random_init precision min_matched_share layer readout tokens_per_cell "
    "batch_tokens genes".split()
)
"""Options of the forward pass of a model, which given vectors have none of."""

VARIABLE = "hvg:"
"""What a choice of the most variable genes begins with."""


class ForwardOptions(ActorOptions):
    """The tokens taken from the forward pass of the foundation model, and the size of its shards."""

    tokens_per_cell: int | None = Field(default=None, ge=1)
    """Number of tokens kept of each cell, a seeded sample; default: all of them."""
    shard_cells: int | None = Field(default=None, ge=1)
    """Number of cells in a shard; give this or the shard size."""
    shard_size: str | None = None
    """Size of a shard, e.g. 256MB, from which the cells in a shard follow; default: 256MB (encode: 512MB), or a 16th of
    the cells if that is less."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Number of tokens in one forward pass at most; it is halved automatically when memory runs out."""

    @pydantic.model_validator(mode="after")
    def _one_shard_rule(self) -> "ForwardOptions":
        if self.shard_cells is not None and self.shard_size is not None:
            raise ValueError("shard_cells and shard_size were both given; give one of them")
        if self.shard_size is not None:
            parse_size(self.shard_size)
        return self


class DataOptions(GeneOptions, ObsOptions):
    """The cells, how they are read, and the foundation model."""

    data: Files = Field(min_length=1)
    """The files of the cells: .h5ad, AnnData .zarr, 10x .h5, the folder of a matrix.mtx or of a SOMA experiment
    (docs/files.md lists all), or addresses of the first three (s3://, https://, gs://), which are read in ranges.
    Several files are one data set in the order given: their genes are joined, obs gets a column `file` (for samples:
    --batch file), and a donor of the same name is the same donor in all of them."""
    matrix: str | None = None
    """Matrix to read: X, raw or layers/NAME of an AnnData, the genome of an old 10x .h5 file, LAYER or
    MEASUREMENT/LAYER of a SOMA experiment. For several files give one for all, or one for each, comma-separated.
    Default: the one that says most about the counts of all genes; `scsae inspect` says which and why."""
    model: str = "mini"
    """Foundation model: a checkpoint folder, or `mini`, the small model of the project."""
    model_option: NamedValues = ()
    """Option of the model's family, as NAME=VALUE; may be repeated. What a cell has of its own is taken from a column:
    NAME=obs:COLUMN. `scsae models-supported` lists the options of every family."""
    random_init: bool = False
    """Use random weights instead of the trained ones, as a control."""
    precision: Literal["f32", "bf16"] = "f32"
    """Precision of the matrix products: f32, or bf16 (autocast), which is several times faster on hardware for it."""

    @property
    def model_options(self) -> dict[str, str]:
        """The options of the model's family by their names."""
        return {name: value for name, _, value in (text.partition("=") for text in self.model_option)}


def _names_vectors(text: str | None) -> str | None:
    if text is not None:
        VectorsPlace.parse(text)
    return text


Vectors = Annotated[str | None, pydantic.AfterValidator(_names_vectors)]
"""What `VectorsPlace.parse` takes."""


def _refuse_options_of_model(options: DataOptions, vectors: str | None) -> None:
    """Raise ValueError for options of the forward pass of a model with given vectors."""
    given = sorted(options.model_fields_set & OF_MODEL)
    if vectors is not None and given:
        raise ValueError(
            f"vectors was {vectors!r}, and no model runs, so that {', '.join(given)} would change nothing; "
            "give vectors without them"
        )


class InspectOptions(DataOptions):
    """Report what the data and the model have in common, or what given vectors are."""

    vectors: Vectors = None
    """Say what these vectors of the cells are instead of what a model makes of them; as in extract."""

    @pydantic.model_validator(mode="after")
    def _vectors_or_model(self) -> "InspectOptions":
        _refuse_options_of_model(self, self.vectors)
        return self


class ExtractOptions(DataOptions, CellOptions, ForwardOptions):
    """Run the foundation model over cells and store the activations of their tokens.

    With --vectors no model runs: vectors that you have already, one for each cell, are stored in their place.
    """

    layer: tuple[str, ...] = Field(default=(), min_length=0)
    """Activations to store: a layer index (0 is the output of the first block) or a site such as attention.2; may be
    repeated."""
    readout: str | None = None
    """Store one vector for each cell instead of its tokens: a readout of the model, such as mean or cls."""
    vectors: Vectors = None
    """Vectors to store instead of running a model, one for each cell: obsm/KEY of the data, FILE.npy, FILE.parquet,
    FILE.safetensors or FILE.pt. The rows of a file are the cells in their order; a Parquet file may have a column
    cell_id, by which it is joined. FILE.safetensors:KEY names one of several arrays."""
    source_name: str | None = None
    """Name and version of the model that `vectors` are of, e.g. UCE-33l; default: the KEY, or the name of the file."""
    cells: int | None = Field(default=None, ge=3)
    """Number of cells whose activations are stored, a seeded sample in which rare groups are kept (as in the panel):
    enough to train on part of an atlas. Default: all cells."""
    genes: str | None = None
    """Genes that go into the model: hvg:N, the N most variable ones of the `train` cells, by batch (it needs counts),
    or a file with a symbol or an Ensembl id a line. Later stages use the same genes, also of other data. Default: all
    that the model knows, of which it takes a part where a cell has more than fit."""
    dtype: Literal["f16", "bf16", "f32"] = "f16"
    """Number type in which the activations are stored."""
    seed: int = Field(default=0, ge=0)
    """Seed of the splits, the token samples and the order of ties."""

    @property
    def n_variable_genes(self) -> int | None:
        """The N of `--genes hvg:N`; None if genes are not chosen by their variance."""
        return int(self.genes.removeprefix(VARIABLE)) if self.genes and self.genes.startswith(VARIABLE) else None

    @pydantic.field_validator("genes")
    @classmethod
    def _number_or_file(cls, value: str | None) -> str | None:
        if value is not None and value.startswith(VARIABLE):
            number = value.removeprefix(VARIABLE)
            if not (number.isascii() and number.isdigit() and int(number) > 0):
                raise ValueError("give hvg:N with a number of genes, such as hvg:1200, or a file of names")
        return value

    @pydantic.model_validator(mode="after")
    def _tokens_or_cells(self) -> "ExtractOptions":
        if self.readout is not None and self.tokens_per_cell is not None:
            raise ValueError(
                "readout stores one vector for each cell, and tokens_per_cell some of its tokens; give one of them"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _vectors_or_model(self) -> "ExtractOptions":
        """Refuse the options of a model with given vectors, and a name of vectors without any."""
        _refuse_options_of_model(self, self.vectors)
        if self.source_name is not None and self.vectors is None:
            raise ValueError(
                f"source_name was {self.source_name!r}, which names given vectors; give vectors too, or leave it out"
            )
        if self.source_name is not None and not (self.source_name.strip() and self.source_name.isprintable()):
            raise ValueError(f"source_name was {self.source_name!r}; give a name of printable characters")
        return self
