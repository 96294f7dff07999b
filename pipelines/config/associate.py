"""The options of associating features with labels, batches, genes and gene sets."""

from pathlib import Path

import pydantic

from pipelines.config.extract import ForwardOptions, Vectors
from pipelines.config.options import ActorOptions, CellOptions, Files, GeneOptions, parse_size


class AssociateOptions(CellOptions, GeneOptions, ForwardOptions):
    """Associate features with labels, batches, genes and gene sets."""

    codes: str | None = None
    """Codes run to associate; default: the newest. With other `data` give `sae` instead."""
    sae: str | None = None
    """SAE run that encodes `data`; default: the newest. Without `data` give `codes` instead."""
    gmt: tuple[Path, ...] = ()
    """GMT file of gene sets, which may be compressed (.gz, .bz2, .xz); may be repeated. Default: the canonical immune
    programs of the project."""
    data: Files = ()
    """First encode the cells of other files (of any format, as in extract) with a trained SAE, then associate its
    features with these cells; may be repeated. Files of the data set of the codes, given without other options of data,
    tell where it is now."""
    matrix: str | None = None
    """Matrix of `data` to read: X, raw or layers/NAME; default: as in extract."""
    vectors: Vectors = None
    """Vectors of the cells of `data`, as in extract, for an SAE of given vectors; default: the same obsm/KEY of
    `data`."""
    range_size: str = "600MB"
    """Memory of an actor for the codes of a range of features. Every range reads the expression of all cells once, so
    that more memory is less work if the codes are much larger than this."""

    @pydantic.field_validator("range_size")
    @classmethod
    def _a_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @pydantic.model_validator(mode="after")
    def _of_other_data(self) -> "AssociateOptions":
        """Refuse options that need other data, and a codes run together with other data."""
        if self.codes is not None and any(one is not None for one in (self.sae, self.matrix, self.vectors)):
            raise ValueError(f"codes was {self.codes!r}, but codes of other data are made anew; give sae without codes")
        if self.sae is not None and not self.data:
            raise ValueError(
                f"sae was {self.sae!r}, but it only encodes data; name a codes run with codes, or give data"
            )
        fields = type(self).model_fields
        of_data = {"matrix", "vectors", *CellOptions.model_fields, *GeneOptions.model_fields}
        of_data |= set(ForwardOptions.model_fields) - set(ActorOptions.model_fields)
        given = sorted(name for name in of_data if getattr(self, name) != fields[name].default)
        if given and not self.data:
            raise ValueError(f"{', '.join(given)} apply to other data only; give data, or leave them out")
        return self
