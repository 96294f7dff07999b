"""What a steering run is for and the ways in which it runs the model: its task, the grid, the nulls, the baseline.

Three tasks, told apart by the options:
    edit    the features of one label are edited in all cells
    move    cells of one label (`target`) are moved to another (`toward`); the others stay as they are
    mix     features that tell the labels of a kind apart (batches, for example) are edited in all cells

A `Variant` is one way to run the model. On `select` cells there are the variants of the grid. On `test` cells there are
the chosen point, the two cross-sections of the grid through it, the same edit in mode `replace` beside the
reconstruction alone, the draws of the nulls, and the mean-difference vector at the SAE's site.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import polars as pl

from feature_store.query.steering import Role, p_column
from feature_store.storage import schemas
from pipelines.config import SteerOptions

ALL = "all"
"""The target of a mix."""
UNSTEERED, RECONSTRUCTION, MEAN_DIFFERENCE = "unsteered", "reconstruction", "mean difference"
"""Names of conditions."""
_OWN = {"direction_seed": pl.Int64(), "references": pl.Int32()}


class Task(StrEnum):
    """What steering is for."""

    EDIT = "edit"
    MOVE = "move"
    MIX = "mix"


class Null(StrEnum):
    """What an edit is compared with; the value is the name of its condition."""

    RANDOM_FEATURES = "random features"
    RANDOM_DIRECTION = "random direction"
    SHUFFLED_LABELS = "shuffled labels"

    @property
    def column(self) -> str:
        """The column of `results` that holds the p-value against it."""
        return p_column(self.value)


class InterventionType(StrEnum):
    """What an intervention does to the features."""

    ABLATE = "ablate"
    SCALE = "scale"
    CLAMP = "clamp"
    ADD = "add"
    TOWARD = "toward"
    SHIFT = "shift"

    @property
    def needs_group_means(self) -> bool:
        """Whether it goes by the mean codes of groups of cells."""
        return self in (InterventionType.TOWARD, InterventionType.SHIFT)

    @property
    def neutral_dose(self) -> float | None:
        """The dose at which it changes nothing; None where there is none."""
        match self:
            case InterventionType.ADD | InterventionType.TOWARD | InterventionType.SHIFT:
                return 0.0
            case InterventionType.SCALE:
                return 1.0
            case InterventionType.ABLATE | InterventionType.CLAMP:
                return None


@dataclass(frozen=True, kw_only=True)
class SteeringTask:
    """What steering is for and on which label; `target` is `ALL` for mix, `toward` a label for move alone."""

    type: Task
    kind: str
    target: str
    toward: str | None
    intervention: InterventionType

    @property
    def text(self) -> str:
        """The task in short, such as `condition = stim -> ctrl`."""
        return f"{self.kind} = {self.target}" + ("" if self.toward is None else f" -> {self.toward}")


class Point(NamedTuple):
    """One point of the grid."""

    n_features: int
    dose: float


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model.

    Attributes:
        id: its number among those of its table; 0 is unsteered.
        name: of the condition, for people; `role` says what it is. `draw` tells the draws of a null apart, `n_features`
            and `dose` the points of the grid.
        role: what it is compared as.
        intervention: what is done to the features; None where nothing is.
        features: the features that are edited, best first; none for unsteered, the reconstruction and the baseline.
        mode: whether the change is added to the activations or the reconstruction replaces them.
        direction_seed: of the direction of the random-direction null; its norm is that of the edit of `features`.
        references: number of the part of the group means that the intervention goes by.
        chosen: whether it is the one that the search chose.
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
        """The null that it is a draw of."""
        return Null(self.name) if self.role is Role.NULL else None


def task_of(options: SteerOptions, target: str) -> SteeringTask:
    """The task that checked options give for a target."""
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
    """All points of the grid, ascending; features that are given explicitly are one number of features."""
    numbers = (len(set(options.feature)),) if options.feature else options.n_features
    return tuple(Point(n, dose) for n in sorted(set(numbers)) for dose in sorted(set(options.dose)))


def cross_sections(grid: Sequence[Point], chosen: Point, intervention: InterventionType) -> tuple[Point, ...]:
    """The chosen point first, then the points that differ from it in one coordinate.

    Where there are several doses, the dose at which its features stay as they are is among them.
    """
    others = [point for point in grid if (point.n_features == chosen.n_features) != (point.dose == chosen.dose)]
    neutral = intervention.neutral_dose
    if neutral is not None and len({point.dose for point in grid} - {neutral}) > 1:
        others.append(Point(chosen.n_features, neutral))
    return (chosen, *(point for point in sorted(set(others)) if point != chosen))


def search_variants(task: SteeringTask, ranked: Sequence[int], grid: Sequence[Point]) -> tuple[Variant, ...]:
    """Unsteered, and every point of the grid, on part 0 of the group means."""
    references = 0 if task.intervention.needs_group_means else None
    return _numbered(
        [
            Variant(id=0, name=UNSTEERED, role=Role.UNSTEERED),
            *(_at(task, ranked, point, references=references) for point in grid),
        ]
    )


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
        task: what steering is for.
        ranked: features, best first.
        points: `cross_sections`: the chosen one first.
        random: draws of the null of random features.
        shuffled: draws of the null of shuffled labels (none: there is no such null).
        seed: of the random directions, as many as `random`.
        displacement: part of the group means that holds the mean-difference vectors, if there are labels to take them
            from.
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
        variants.append(
            Variant(id=0, name=MEAN_DIFFERENCE, role=Role.BASELINE, dose=1.0, references=displacement, draw=0)
        )
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
    """The variants of such a table."""
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
