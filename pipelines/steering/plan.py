"""The task of a steering run, and the variants under which it runs the model: the grid, the nulls and the baseline.

The options choose one of three tasks:
    edit    the features of one label are edited in all cells
    move    cells of one label (`target`) are moved to another (`toward`); the other cells do not change
    mix     features that separate the labels of a kind (batches, for example) are edited in all cells

A `Variant` is one way to run the model. The `select` cells are run under the variants of the grid. The `test` cells are
run under the chosen point, the two cross-sections of the grid through it, the same edit in mode `replace` and the
reconstruction alone, the draws of the nulls, and the mean-difference vector at the SAE's site. If shift or toward are
searched over several doses, that vector is added in the same doses, on `select` and on `test` cells.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import polars as pl

from feature_store.query.steering import Role, p_column
from feature_store.storage import schemas
from feature_store.storage.obs_columns import shown_name
from pipelines.config import SteerOptions

ALL = "all"
"""The target of the task mix."""
UNSTEERED, RECONSTRUCTION, MEAN_DIFFERENCE = "unsteered", "reconstruction", "mean difference"
"""The names of conditions."""
_OWN = {"direction_seed": pl.Int64(), "references": pl.Int32()}


class Task(StrEnum):
    """The kind of a steering task."""

    EDIT = "edit"
    MOVE = "move"
    MIX = "mix"


class Null(StrEnum):
    """A null that an edit is compared with; the value is the name of its condition."""

    RANDOM_FEATURES = "random features"
    RANDOM_DIRECTION = "random direction"
    SHUFFLED_LABELS = "shuffled labels"

    @property
    def column(self) -> str:
        """The column of `results` that holds the p-value against this null."""
        return p_column(self.value)


class InterventionType(StrEnum):
    """The kind of change that an intervention makes to the features."""

    ABLATE = "ablate"
    SCALE = "scale"
    CLAMP = "clamp"
    ADD = "add"
    TOWARD = "toward"
    SHIFT = "shift"

    @property
    def needs_group_means(self) -> bool:
        """Whether the intervention uses the mean codes of groups of cells."""
        return self in (InterventionType.TOWARD, InterventionType.SHIFT)

    @property
    def neutral_dose(self) -> float | None:
        """The dose at which the intervention changes nothing; None if there is no such dose."""
        match self:
            case InterventionType.ADD | InterventionType.TOWARD | InterventionType.SHIFT:
                return 0.0
            case InterventionType.SCALE:
                return 1.0
            case InterventionType.ABLATE | InterventionType.CLAMP:
                return None


@dataclass(frozen=True, kw_only=True)
class SteeringTask:
    """The task of steering and its labels; `target` is `ALL` for mix, and `toward` is a label for move alone."""

    type: Task
    kind: str
    target: str
    toward: str | None
    intervention: InterventionType

    @property
    def text(self) -> str:
        """The task in short, such as `condition = stim -> ctrl`."""
        return f"{shown_name(self.kind)} = {self.target}" + ("" if self.toward is None else f" -> {self.toward}")


class Point(NamedTuple):
    """One point of the grid."""

    n_features: int
    dose: float


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model.

    Attributes:
        id: the number of the variant in its table; 0 is unsteered.
        name: the displayed name of the condition. `draw` separates the draws of a null, and `n_features` and `dose` the
            points of the grid.
        role: the role of the condition.
        intervention: the change of the features; None if there is none.
        features: the features that are edited, best first; none for unsteered, the reconstruction and the baseline.
        mode: whether the change is added to the activations or the reconstruction replaces them.
        direction_seed: the seed of the direction of the random-direction null; its norm is that of the edit of
            `features`.
        references: the number of the part of the group means that the intervention uses.
        chosen: whether the search chose this variant.
    """

    id: int
    name: str
    role: Role
    intervention: InterventionType | None = None
    features: tuple[int, ...] = ()
    dose: float | None = None
    mode: Literal["delta", "replace"] = "delta"
    draw: int = 0
    direction_seed: int | None = None
    references: int | None = None
    chosen: bool = False

    @property
    def null(self) -> Null | None:
        """The null of which the variant is a draw; None if it is not a draw of a null."""
        return Null(self.name) if self.role is Role.NULL else None


def task_of(options: SteerOptions, target: str) -> SteeringTask:
    """The task that checked options define for a target."""
    type_ = Task.MIX if options.target == ALL else Task.EDIT if options.toward is None else Task.MOVE
    default = InterventionType.SHIFT if type_ is Task.MOVE else InterventionType.ABLATE
    return SteeringTask(
        type=type_,
        kind=options.kind,
        target=target,
        toward=options.toward,
        intervention=InterventionType(options.intervention) if options.intervention else default,
    )


def grid_of(options: SteerOptions) -> tuple[Point, ...]:
    """All points of the grid, ascending; explicitly given features give one number of features."""
    numbers = (len(set(options.feature)),) if options.feature else options.n_features
    return tuple(Point(n, dose) for n in sorted(set(numbers)) for dose in sorted(set(options.dose)))


def cross_sections(grid: Sequence[Point], chosen: Point, intervention: InterventionType) -> tuple[Point, ...]:
    """The chosen point, followed by the points that differ from it in one coordinate.

    If there are several doses, the neutral dose, at which the features do not change, is among them.
    """
    others = [point for point in grid if (point.n_features == chosen.n_features) != (point.dose == chosen.dose)]
    neutral = intervention.neutral_dose
    if neutral is not None and len({point.dose for point in grid} - {neutral}) > 1:
        others.append(Point(chosen.n_features, neutral))
    return (chosen, *(point for point in sorted(set(others)) if point != chosen))


def search_variants(
    task: SteeringTask, ranked: Sequence[int], grid: Sequence[Point], *, displacement: int | None
) -> tuple[Variant, ...]:
    """The unsteered variant, one for every point of the grid, with part 0 of the group means, and the mean difference.

    `displacement` is the part that holds the mean-difference vectors; None leaves these out.
    """
    references = 0 if task.intervention.needs_group_means else None
    return _numbered(
        [
            Variant(id=0, name=UNSTEERED, role=Role.UNSTEERED),
            *(_at(task, ranked, point, references=references) for point in grid),
            *([] if displacement is None else _mean_differences(task, grid, displacement)),
        ]
    )


def _mean_differences(task: SteeringTask, grid: Sequence[Point], displacement: int) -> list[Variant]:
    """The mean difference at dose 1, and at the doses of the grid if they are shares of the same way."""
    doses = {point.dose for point in grid} if task.intervention.needs_group_means else set()
    one = Variant(id=0, name=MEAN_DIFFERENCE, role=Role.BASELINE, dose=1.0, references=displacement)
    if len(doses) < 2:
        return [one]
    return [one, *(replace(one, role=Role.BASELINE_DOSE, dose=dose) for dose in sorted(doses - {0.0, 1.0}))]


@dataclass(frozen=True, kw_only=True)
class NullDraw:
    """The features of one draw of a null, as many as the chosen ones, and the part of the group means made for them."""

    features: tuple[int, ...]
    references: int | None


def report_variants(
    task: SteeringTask,
    ranked: Sequence[int],
    points: Sequence[Point],
    *,
    random: Sequence[NullDraw],
    shuffled: Sequence[NullDraw],
    seed: int,
    displacement: int | None,
) -> tuple[Variant, ...]:
    """The variants that test cells are run under.

    Args:
        task: the steering task.
        ranked: the features, best first.
        points: the points of `cross_sections`, the chosen one first.
        random: the draws of the null of random features.
        shuffled: the draws of the null of shuffled labels; empty if there is no such null.
        seed: the seed of the random directions, of which there are as many as draws in `random`.
        displacement: the part of the group means that holds the mean-difference vectors; None if there are no labels to
            compute them from.
    """
    references = 0 if task.intervention.needs_group_means else None
    chosen, *rest = points
    own = _at(task, ranked, chosen, references=references, chosen=True)
    edit: dict[str, Any] = {"intervention": own.intervention, "dose": own.dose, "role": Role.NULL}
    variants = [
        Variant(id=0, name=UNSTEERED, role=Role.UNSTEERED),
        own,
        *(_at(task, ranked, point, references=references) for point in rest),
        replace(own, name=f"{own.name}, replace", role=Role.REPLACE, mode="replace", chosen=False),
        Variant(id=0, name=RECONSTRUCTION, role=Role.RECONSTRUCTION, mode="replace"),
        *(
            Variant(
                id=0,
                name=Null.RANDOM_FEATURES.value,
                draw=i,
                features=null.features,
                references=null.references,
                **edit,
            )
            for i, null in enumerate(random)
        ),
        *(
            replace(
                own, name=Null.RANDOM_DIRECTION.value, role=Role.NULL, draw=i, direction_seed=seed + i, chosen=False
            )
            for i in range(len(random))
        ),
        *(
            Variant(
                id=0,
                name=Null.SHUFFLED_LABELS.value,
                draw=i,
                features=null.features,
                references=null.references,
                **edit,
            )
            for i, null in enumerate(shuffled)
        ),
    ]
    if displacement is not None:
        variants += _mean_differences(task, points, displacement)
    return _numbered(variants)


def variants_frame(variants: Sequence[Variant]) -> pl.DataFrame:
    """The table `variants`."""
    rows = [
        {
            **asdict(variant),
            "variant": variant.id,
            "role": variant.role.value,
            "intervention": None if variant.intervention is None else variant.intervention.value,
            "null": None if variant.null is None else variant.null.value,
            "n_features": len(variant.features),
        }
        for variant in variants
    ]
    frame = pl.DataFrame(rows, schema={**schemas.schema("steering_variants").columns, **_OWN})
    return schemas.conform("steering_variants", frame)


def read_variants(frame: pl.DataFrame) -> tuple[Variant, ...]:
    """The variants that a table `variants` holds."""
    return tuple(
        Variant(
            id=row["variant"],
            role=Role(row["role"]),
            intervention=None if row["intervention"] is None else InterventionType(row["intervention"]),
            features=tuple(row["features"]),
            **{key: row[key] for key in ("name", "dose", "mode", "draw", "direction_seed", "references", "chosen")},
        )
        for row in frame.iter_rows(named=True)
    )


def _at(
    task: SteeringTask, ranked: Sequence[int], point: Point, *, references: int | None, chosen: bool = False
) -> Variant:
    return Variant(
        id=0,
        name=task.intervention.value,
        role=Role.GRID,
        intervention=task.intervention,
        features=tuple(ranked[: point.n_features]),
        dose=point.dose,
        references=references,
        chosen=chosen,
    )


def _numbered(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    return tuple(replace(variant, id=i) for i, variant in enumerate(variants))
