"""The options of steering: which features are changed, in which cells, and how."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, Positive, as_tuple

FeatureId = Annotated[int, Field(ge=0)]
Dose = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SteerOptions(ActorOptions):
    """Change features in the running model and measure what happens to its cells, beside nulls and baselines.

    Three questions. --target LABEL edits the features of a label in all cells. --target LABEL --toward OTHER moves the
    cells of a label to another (stimulated to control, say), and leaves the others alone. --target all edits the
    features that tell the labels of a kind (batches) apart inside cell types, so that they mix. Features, and the best
    of several numbers of features and doses, are chosen on `select` cells; what is reported is of `test` cells.
    """

    associations: str | None = None
    """Associations run that describes the features; default: the newest."""
    kind: str = "cell_type"
    """Kind of the target label: cell_type, batch or another label column."""
    target: str | None = None
    """The label whose features are edited, or whose cells are moved; `all`: every label of the kind. Default: the one
    with the best feature on `select` cells."""
    toward: str | None = None
    """The label that the cells of `target` are moved to."""
    feature: Annotated[tuple[FeatureId, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Feature to edit, by its id, in place of a choice; may be repeated."""
    n_features: Annotated[tuple[Positive, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=(10,), min_length=1)
    """How many features are edited: the best on `select` cells. May be repeated: the best number is searched."""
    intervention: Literal["ablate", "clamp", "add", "scale", "toward", "shift"] | None = None
    """What is done to them: ablate, clamp, add, scale, or, with mean codes of labels, toward (replace a code by the
    mean of the label moved to) or shift (add the difference of the means). Default: ablate; with --toward shift."""
    dose: Annotated[tuple[Dose, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=(1.0,), min_length=1)
    """Dose: clamp and add in units of a feature's 99th percentile; scale as the factor; toward and shift as the share
    of the way; ablate takes none. May be repeated: the best dose is searched."""
    by: Literal["cell_type", "gene", "both", "none"] | None = None
    """toward and shift: mean codes by cell_type, by gene of the token, by both, or by none of them. Default: cell_type;
    with --target all none."""
    gene: Annotated[tuple[str, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Steer the tokens of this gene alone; may be repeated."""
    cells: Annotated[tuple[str, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Steer the cells with COLUMN=VALUE alone, e.g. cell_type=B; repeated: cells with one of them."""
    n_nulls: int = Field(default=20, ge=2)
    """Draws of each null: random features of matched density, random directions and, where means of labels or a choice
    by displacement are used, shuffled labels."""
    readout: str = "mean"
    """Which embedding of the cell is judged: mean over the gene tokens, or another readout of the model (cls, all)."""
    max_cells: int = Field(default=5000, ge=4)
    """Cells of each split, at most: a seeded sample of more, with labels and types in their proportions."""
    head: bool = False
    """Ask the model's own head about hidden genes of steered cells too: what it now predicts, gene by gene."""
    scib: bool = False
    """With --target all: score what was chosen, nulls and baselines by scIB too; tens of seconds, and needs
    pip install 'scsae[evaluate]'."""
    seed: int = Field(default=0, ge=0)
    """Seed of the nulls and of the samples of cells."""

    @pydantic.model_validator(mode="after")
    def _one_question(self) -> "SteerOptions":
        """Options that contradict each other."""
        if self.toward is not None and self.target in (None, "all", self.toward):
            raise ValueError(
                f"toward was {self.toward!r} and target {self.target!r}: cells of one label are moved to another; name "
                "two labels, e.g. --target stim --toward ctrl"
            )
        by_means = self.intervention in ("toward", "shift") or (self.intervention is None and self.toward is not None)
        if by_means and self.toward is None and self.target != "all":
            raise ValueError(
                f"intervention {self.intervention} needs labels to take means of; give --toward LABEL, or --target all"
            )
        if self.by is not None and not by_means:
            raise ValueError("by says which means toward and shift go by; give one of these, or leave it out")
        if self.scib and self.target != "all":
            raise ValueError("scib scores how labels mix; give it with --target all, or leave it out")
        if self.feature and "n_features" in self.model_fields_set:
            raise ValueError("feature and n_features were both given; give one of them")
        if len(set(self.dose)) > 1 and not by_means and self.intervention in (None, "ablate"):
            raise ValueError(f"dose was {list(self.dose)}, but ablate takes none; leave it out, or name --intervention")
        several = len(set(self.dose)) > 1 or len(set(self.n_features)) > 1
        if several and self.toward is None and self.target != "all":
            raise ValueError(
                "several n_features or doses are searched for the best, which is settled for --toward LABEL and for "
                "--target all; give one of each"
            )
        return self

    @pydantic.field_validator("cells")
    @classmethod
    def _column_and_value(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if "=" not in value.strip("="):
                raise ValueError(f"{value!r} is not COLUMN=VALUE; write e.g. cell_type=B")
        return values
