"""The options of encoding activations, or other cells, with a sparse autoencoder."""

from typing import Literal

import pydantic

from pipelines.config.extract import ForwardOptions
from pipelines.config.options import ActorOptions, CellOptions, Files


class EncodeOptions(CellOptions, ForwardOptions):
    """Turn activations into sparse codes and token statistics: stored ones, or fused with the forward pass."""

    sae: str | None = None
    """SAE run to encode with; default: the newest."""
    pooling: Literal["max", "mean"] = "max"
    """How the codes of a cell's tokens become the cell's code."""
    level: Literal["cell", "token"] = "cell"
    """Store the codes of cells, or of every token (as many times larger as a cell has tokens)."""
    fused: bool = False
    """Run the foundation model again over all cells and encode at once; nothing but codes is stored."""
    data: Files = ()
    """Encode the cells of another .h5ad or .zarr instead (fused); may be repeated."""
    matrix: str | None = None
    """Matrix of `data` to read: X, raw or layers/NAME; default as in extract."""

    @pydantic.model_validator(mode="after")
    def _fused_options(self) -> "EncodeOptions":
        """Options that only a forward pass, or only other data, can follow."""
        fields = type(self).model_fields
        given = {name for name, field in fields.items() if getattr(self, name) != field.default}
        of_data = sorted(given & {"matrix", *CellOptions.model_fields})
        if of_data and not self.data:
            raise ValueError(f"{', '.join(of_data)} describe other data; give data, or leave them out")
        of_forward = sorted(given & (set(ForwardOptions.model_fields) - set(ActorOptions.model_fields)))
        if of_forward and not (self.fused or self.data):
            raise ValueError(f"{', '.join(of_forward)} need a forward pass; give fused, or leave them out")
        return self
