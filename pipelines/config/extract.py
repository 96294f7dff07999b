"""The options of reading cells and of running the foundation model over them."""

from typing import Literal

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, CellOptions, Files, Options, parse_size


class ForwardOptions(ActorOptions):
    """How much of each cell the foundation model's forward pass gives, and how it is cut into shards."""

    tokens_per_cell: int | None = Field(default=None, ge=1)
    """Keep a seeded sample of this many tokens of each cell; default: all of them."""
    shard_cells: int | None = Field(default=None, ge=1)
    """Cells per shard."""
    shard_size: str | None = None
    """Size of a shard, e.g. 256MB, turned into cells per shard; default: 256MB, or a 16th of the cells if less."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Most tokens of one forward pass; halved by itself where memory runs out."""

    @pydantic.model_validator(mode="after")
    def _one_shard_rule(self) -> "ForwardOptions":
        if self.shard_cells is not None and self.shard_size is not None:
            raise ValueError("shard_cells and shard_size were both given; give one of them")
        if self.shard_size is not None:
            parse_size(self.shard_size)
        return self


class DataOptions(Options):
    """Which cells, and how they are read."""

    data: Files = Field(min_length=1)
    """The .h5ad files (or AnnData .zarr folders) that hold the cells. Several are one data set, in the order given:
    their genes are joined, obs gets a column `file`, and a donor of the same name is one donor in all of them."""
    matrix: str | None = None
    """Matrix to read: X, raw or layers/NAME; of several files one for all, or one for each, comma-separated. Default:
    the one that holds counts, else log-normalised values."""
    model: str = "mini"
    """Foundation model: a checkpoint folder, or `mini`, the one the project ships."""
    random_init: bool = False
    """Draw the model's weights at random instead of loading them: the control."""
    precision: Literal["f32", "bf16"] = "f32"
    """Matrix products of the model: f32, or bf16 (autocast), which is several times faster where there is hardware."""


class ExtractOptions(DataOptions, CellOptions, ForwardOptions):
    """Run the foundation model over the cells and keep the activations of its tokens."""

    layer: tuple[str, ...] = Field(default=(), min_length=0)
    """Where to read: a layer index (0 is the first block's output) or a site such as attention.2; may be repeated."""
    readout: str | None = None
    """Keep one vector a cell instead of its tokens: a readout of the model, such as mean or cls."""
    dtype: Literal["f16", "bf16", "f32"] = "f16"
    """Storage type of the activations."""
    seed: int = Field(default=0, ge=0)
    """Seed of splits, token samples and ties."""

    @pydantic.model_validator(mode="after")
    def _tokens_or_cells(self) -> "ExtractOptions":
        if self.readout is not None and self.tokens_per_cell is not None:
            raise ValueError("readout keeps one vector a cell and tokens_per_cell some of its tokens; give one of them")
        return self
