"""The options of steering: which features are changed, in which cells, and how."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, FeatureId, MovedDataOptions, Positive, as_tuple

Dose = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SteerOptions(ActorOptions, MovedDataOptions):
    """Edit features inside the running model and measure how its cells change.

    There are three tasks. --target LABEL edits the features of a label in all cells. --target LABEL --toward OTHER
    moves the cells of one label to another, e.g. from stimulated to control, and leaves all other cells unchanged.
    --target all edits the features that distinguish the labels of a kind (such as batches) inside cell types, so that
    the labels mix. Features, and the best of several numbers of features and doses, are chosen on `select` cells; the
    results are of `test` cells, next to nulls and baselines.
    """

    associations: str | None = None
    """Associations run that describes the features; default: the newest."""
    kind: str = "cell_type"
    """Kind of the target label: cell_type, batch or another label column."""
    target: str | None = None
    """The label whose features are edited, or whose cells are moved; `all` is every label of the kind. Default: the
    label with the best feature on `select` cells."""
    toward: str | None = None
    """The label that the cells of `target` are moved to."""
    feature: Annotated[tuple[FeatureId, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Id of a feature to edit, instead of a choice on `select` cells; may be repeated."""
    n_features: Annotated[tuple[Positive, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=(10,), min_length=1)
    """Number of features to edit, the best ones on `select` cells. May be repeated: the best number is then
    searched."""
    intervention: Literal["ablate", "clamp", "add", "scale", "toward", "shift"] | None = None
    """How the features are edited: ablate, clamp, add or scale; or, by the mean codes of labels, toward (replace a code
    by the mean of the other label) or shift (add the difference of the means). Default: ablate; shift with --toward;
    and with --target all the best of ablate, scale, toward and shift on `select` cells, each of which is reported."""
    dose: Annotated[tuple[Dose, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=(1.0,), min_length=1)
    """Dose of the edit: for clamp and add in units of the 99th percentile of a feature, for scale the factor, for
    toward and shift the share of the way; ablate has no dose. May be repeated: the best dose is then searched."""
    by: Literal["cell_type", "gene", "both", "none", "other_types"] | None = None
    """Groups of the mean codes of toward and shift: cell_type, gene (of the token), both, none, or other_types, which
    takes for each type the mean over the other types, so that a type without cells of the other label is moved too.
    Default: cell_type, and none with --target all."""
    gene: Annotated[tuple[str, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Edit only the tokens of this gene; may be repeated."""
    cells: Annotated[tuple[str, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Edit only the cells with COLUMN=VALUE, e.g. cell_type=B. May be repeated for cells with any of the values."""
    n_nulls: int = Field(default=20, ge=2)
    """Number of draws of each null: random features of matched density, random directions, and shuffled labels where
    mean codes of labels or a choice by displacement are used."""
    readout: str = "mean"
    """The cell embedding used to evaluate steering: the mean over gene tokens, or another readout of the model (cls,
    all)."""
    max_cells: int = Field(default=5000, ge=4)
    """Number of cells of each split at most; of more cells a seeded sample with the same proportions of labels and
    types is taken."""
    head: bool = False
    """Also measure how the model's own predictions of masked genes change, gene by gene."""
    scib: bool = False
    """Also compute the scIB scores of the chosen edit, the nulls and the baselines. This takes tens of seconds and
    needs --target all and pip install 'scsae[evaluate]'."""
    seed: int = Field(default=0, ge=0)
    """Seed of the nulls and of the samples of cells."""

    @pydantic.model_validator(mode="after")
    def _one_question(self) -> "SteerOptions":
        """Refuse options that contradict each other."""
        if self.toward is not None and self.target in (None, "all", self.toward):
            raise ValueError(
                f"toward was {self.toward!r} and target was {self.target!r}; give two different labels, e.g. "
                "--target stim --toward ctrl"
            )
        by_means = self.intervention in ("toward", "shift") or (self.intervention is None and self.toward is not None)
        if by_means and self.toward is None and self.target != "all":
            raise ValueError(
                f"intervention was {self.intervention!r}, which needs the mean codes of labels; give "
                "--toward LABEL, or --target all"
            )
        searches_kinds = self.intervention is None and self.target == "all"
        if self.by is not None and not by_means and not searches_kinds:
            raise ValueError(
                f"by was {self.by!r}, which applies to toward and shift only; give one of these, or leave by out"
            )
        if self.scib and self.target != "all":
            raise ValueError("scib scores how labels mix; give --target all, or leave scib out")
        if self.feature and "n_features" in self.model_fields_set:
            raise ValueError("feature and n_features were both given; give one of them")
        ablates = self.intervention == "ablate" or (self.intervention is None and not searches_kinds)
        if len(set(self.dose)) > 1 and not by_means and ablates:
            raise ValueError(
                f"dose was {list(self.dose)}, but ablate has no dose; leave it out, or give --intervention"
            )
        several = len(set(self.dose)) > 1 or len(set(self.n_features)) > 1
        if several and self.toward is None and self.target != "all":
            raise ValueError(
                f"n_features was {list(self.n_features)} and dose was {list(self.dose)}; the best of several is "
                "searched with --toward LABEL and --target all only; give one of each"
            )
        return self

    @pydantic.field_validator("cells")
    @classmethod
    def _column_and_value(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if "=" not in value.strip("="):
                raise ValueError(f"{value!r} is not COLUMN=VALUE; write e.g. cell_type=B")
        return values
