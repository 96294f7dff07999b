"""The options of encoding activations, or other cells, with a sparse autoencoder."""

from typing import Literal

import pydantic
from pydantic import Field

from pipelines.config.extract import ForwardOptions, Vectors
from pipelines.config.options import ActorOptions, CellOptions, Files, GeneOptions


class EncodeOptions(CellOptions, GeneOptions, ForwardOptions):
    """Compute the sparse codes of cells and the statistics of tokens.

    The activations are the stored ones, or, with --fused or --data, or if a sample of the cells is stored, those of a
    new forward pass.
    """

    sae: str | None = None
    """SAE run to encode with; default: the newest."""
    pooling: Literal["max", "mean"] = "max"
    """How the codes of the tokens of a cell are combined into the code of the cell."""
    level: Literal["cell", "token"] = "cell"
    """Store the codes of cells, or of every token, which is larger by the number of tokens in a cell."""
    keep: int = Field(default=256, ge=1)
    """Largest codes kept of each cell outside the panel (see `extract --panel`), of which everything is kept."""
    fused: bool = False
    """Run the foundation model again over all cells and encode its activations directly; only codes are stored."""
    data: Files = ()
    """Encode the cells of other files (of any format, as in extract), with --fused implied; may be repeated. Files of
    the SAE's own data set, given without other options of data, tell where it is now."""
    matrix: str | None = None
    """Matrix of `data` to read: X, raw or layers/NAME; default: as in extract."""
    vectors: Vectors = None
    """Vectors of the cells of `data`, as in extract, for an SAE of given vectors; default: the same obsm/KEY of
    `data`. Without `data`, those of the SAE's own cells: other vectors, or the new place of the same."""

    @pydantic.model_validator(mode="after")
    def _fused_options(self) -> "EncodeOptions":
        """Refuse options that need a forward pass or other data."""
        fields = type(self).model_fields
        given = {name for name, field in fields.items() if getattr(self, name) != field.default}
        of_data = sorted(given & {"matrix", *CellOptions.model_fields, *GeneOptions.model_fields})
        if of_data and not self.data:
            raise ValueError(f"{', '.join(of_data)} apply to other data only; give data, or leave them out")
        of_forward = sorted(given & (set(ForwardOptions.model_fields) - set(ActorOptions.model_fields)))
        if of_forward and not (self.fused or self.data):
            raise ValueError(f"{', '.join(of_forward)} apply to a forward pass only; give fused, or leave them out")
        return self
