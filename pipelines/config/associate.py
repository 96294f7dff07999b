"""The options of associating features with labels, batches, genes and gene sets."""

from pathlib import Path

import pydantic

from pipelines.config.extract import ForwardOptions
from pipelines.config.options import ActorOptions, CellOptions, Files, parse_size


class AssociateOptions(CellOptions, ForwardOptions):
    """Associate features with labels, batches, genes and gene sets."""

    codes: str | None = None
    """Codes run to associate; default: the newest. With `data` give `sae` instead."""
    sae: str | None = None
    """SAE run that encodes `data`; default: the newest. Without `data` give `codes` instead."""
    gmt: tuple[Path, ...] = ()
    """Gene sets as GMT files; may be repeated. Default: the small file of canonical immune programs."""
    data: Files = ()
    """Encode the cells of another .h5ad or .zarr with a trained SAE first (fused) and associate its features with them;
    may be repeated."""
    matrix: str | None = None
    """Matrix of `data` to read: X, raw or layers/NAME; default as in extract."""
    range_size: str = "600MB"
    """Memory of an actor for the codes of a range of features. Each range goes over the expression of all cells once,
    so where codes are larger than this by far, more memory is less work."""

    @pydantic.field_validator("range_size")
    @classmethod
    def _a_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @pydantic.model_validator(mode="after")
    def _of_other_data(self) -> "AssociateOptions":
        """Options that only other data can follow, and the one that they replace."""
        if self.data and self.codes is not None:
            raise ValueError(f"codes was {self.codes!r}, but data are encoded first; name their SAE with sae")
        if self.sae is not None and not self.data:
            raise ValueError(
                f"sae was {self.sae!r}, but it only encodes data; name a codes run with codes, or give data"
            )
        fields = type(self).model_fields
        of_data = {"matrix", *CellOptions.model_fields, *ForwardOptions.model_fields} - set(ActorOptions.model_fields)
        given = sorted(name for name in of_data if getattr(self, name) != fields[name].default)
        if given and not self.data:
            raise ValueError(f"{', '.join(given)} describe how other data are encoded; give data, or leave them out")
        return self
