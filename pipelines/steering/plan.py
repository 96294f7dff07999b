"""What a steering run asks and the ways in which it runs the model: its question, the grid, the nulls, the baseline.

Three questions, told apart by the options:
    edit    the features of one label are edited in all cells
    move    cells of one label (`target`) are moved to another (`toward`); the others stay as they are
    mix     features that tell the labels of a kind apart (batches, say) are edited in all cells

A `Variant` is one way to run the model. On `select` cells there are those of the grid. On `test` cells there are the
chosen point, the two cross-sections of the grid through it, the same edit in mode `replace` beside the reconstruction
alone, the draws of the nulls, and the mean-difference vector at the SAE's site.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import polars as pl

from feature_store.storage import schemas
from pipelines.config import SteerOptions

Name = Literal["edit", "move", "mix"]
Role = Literal["unsteered", "grid", "replace", "reconstruction", "null", "baseline"]

ALL = "all"
UNSTEERED, RECONSTRUCTION, MEAN_DIFFERENCE = "unsteered", "reconstruction", "mean difference"
RANDOM_FEATURES, RANDOM_DIRECTION, SHUFFLED_LABELS = "random features", "random direction", "shuffled labels"
NULLS = (RANDOM_FEATURES, RANDOM_DIRECTION, SHUFFLED_LABELS)
BY_REFERENCE = ("toward", "shift")
"""Interventions that need the mean codes of groups of cells."""
NEUTRAL = {"add": 0.0, "toward": 0.0, "shift": 0.0, "scale": 1.0}
"""The dose at which an intervention changes nothing."""
_OWN = {"direction_seed": pl.Int64(), "references": pl.Int32()}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of which label; `target` is `ALL` for mix, `toward` a label for move alone."""

    name: Name
    kind: str
    target: str
    toward: str | None
    intervention: str

    @property
    def needs_references(self) -> bool:
        """Whether the intervention goes by the mean codes of groups."""
        return self.intervention in BY_REFERENCE

    @property
    def text(self) -> str:
        """The question in short, such as `condition = stim -> ctrl`."""
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
        name: the condition; `draw` tells the draws of a null apart, `n_features` and `dose` the points of the grid.
        features: what is edited, best first; none for unsteered, the reconstruction and the baseline.
        direction_seed: of the direction of the random-direction null; its norm is that of the edit of `features`.
        references: number of the part of references that the intervention goes by.
        chosen: whether it is the one that the search chose.
    """

    id: int
    name: str
    role: Role
    intervention: str | None = None
    features: tuple[int, ...] = ()
    dose: float | None = None
    mode: Literal["delta", "replace"] = "delta"
    draw: int = 0
    direction_seed: int | None = None
    references: int | None = None
    chosen: bool = False

    @property
    def null(self) -> str | None:
        """The null that it is a draw of."""
        return self.name if self.role == "null" else None


def question_of(options: SteerOptions, target: str) -> Question:
    """The question that checked options ask about a target."""
    name: Name = "mix" if options.target == ALL else "edit" if options.toward is None else "move"
    default = "shift" if name == "move" else "ablate"
    return Question(
        name=name,
        kind=options.kind,
        target=target,
        toward=options.toward,
        intervention=options.intervention or default,
    )


def grid_of(options: SteerOptions) -> tuple[Point, ...]:
    """All points asked for, ascending; explicit features are one number of features."""
    numbers = (len(set(options.feature)),) if options.feature else options.n_features
    return tuple(Point(n, dose) for n in sorted(set(numbers)) for dose in sorted(set(options.dose)))


def cross_sections(grid: Sequence[Point], chosen: Point, intervention: str) -> tuple[Point, ...]:
    """The chosen point first, then the points that differ from it in one coordinate, and doing nothing at its features
    where a curve over doses is asked for.
    """
    others = [point for point in grid if (point.n_features == chosen.n_features) != (point.dose == chosen.dose)]
    neutral = NEUTRAL.get(intervention)
    if neutral is not None and len({point.dose for point in grid} - {neutral}) > 1:
        others.append(Point(chosen.n_features, neutral))
    return (chosen, *(point for point in sorted(set(others)) if point != chosen))


def search_variants(question: Question, ranked: Sequence[int], grid: Sequence[Point]) -> tuple[Variant, ...]:
    """Unsteered, and every point of the grid, on part 0 of the references."""
    references = 0 if question.needs_references else None
    return _numbered(
        [
            Variant(id=0, name=UNSTEERED, role="unsteered"),
            *(_at(question, ranked, point, references=references) for point in grid),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class NullDraw:
    """The features of one draw of a null, as many as the chosen ones, and the part of references made for them."""

    features: tuple[int, ...]
    references: int | None


def report_variants(
    question: Question,
    ranked: Sequence[int],
    points: Sequence[Point],
    *,
    random: Sequence[NullDraw],
    shuffled: Sequence[NullDraw],
    seed: int,
    displacement: int | None,
) -> tuple[Variant, ...]:
    """What test cells are run under.

    Args:
        question: what is asked.
        ranked: features, best first.
        points: `cross_sections`: the chosen one first.
        random: draws of the null of random features.
        shuffled: draws of the null of shuffled labels (none: there is no such null).
        seed: of the random directions, as many as `random`.
        displacement: part of references that holds the mean-difference vectors, if there are labels to take it from.
    """
    references = 0 if question.needs_references else None
    chosen, *rest = points
    own = _at(question, ranked, chosen, references=references, chosen=True)
    edit: dict[str, Any] = {"intervention": own.intervention, "dose": own.dose, "role": "null"}
    variants = [
        Variant(id=0, name=UNSTEERED, role="unsteered"),
        own,
        *(_at(question, ranked, point, references=references) for point in rest),
        _with(own, name=f"{own.name}, replace", role="replace", mode="replace", chosen=False),
        Variant(id=0, name=RECONSTRUCTION, role="reconstruction", mode="replace"),
        *(
            Variant(id=0, name=RANDOM_FEATURES, draw=i, features=null.features, references=null.references, **edit)
            for i, null in enumerate(random)
        ),
        *(
            _with(own, name=RANDOM_DIRECTION, role="null", draw=i, direction_seed=seed + i, chosen=False)
            for i in range(len(random))
        ),
        *(
            Variant(id=0, name=SHUFFLED_LABELS, draw=i, features=null.features, references=null.references, **edit)
            for i, null in enumerate(shuffled)
        ),
    ]
    if displacement is not None:
        variants.append(Variant(id=0, name=MEAN_DIFFERENCE, role="baseline", dose=1.0, references=displacement, draw=0))
    return _numbered(variants)


def variants_frame(variants: Sequence[Variant]) -> pl.DataFrame:
    """The table `variants`."""
    rows = [
        {**asdict(variant), "null": variant.null, "n_features": len(variant.features), "features": variant.features}
        for variant in variants
    ]
    frame = pl.DataFrame(
        [{**row, "variant": row["id"]} for row in rows], schema={**schemas.schema("steering_variants").columns, **_OWN}
    )
    return schemas.conform("steering_variants", frame)


def read_variants(frame: pl.DataFrame) -> tuple[Variant, ...]:
    """The variants of such a table."""
    return tuple(
        Variant(
            id=row["variant"],
            features=tuple(row["features"]),
            **{key: row[key] for key in ("name", "role", "intervention", "dose", "mode", "draw", "chosen")},
            **{key: row[key] for key in ("direction_seed", "references")},
        )
        for row in frame.iter_rows(named=True)
    )


def _at(
    question: Question, ranked: Sequence[int], point: Point, *, references: int | None, chosen: bool = False
) -> Variant:
    return Variant(
        id=0,
        name=question.intervention,
        role="grid",
        intervention=question.intervention,
        features=tuple(ranked[: point.n_features]),
        dose=point.dose,
        references=references,
        chosen=chosen,
    )


def _with(variant: Variant, **changes: Any) -> Variant:
    return Variant(**{**asdict(variant), **changes})


def _numbered(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    return tuple(_with(variant, id=i) for i, variant in enumerate(variants))
