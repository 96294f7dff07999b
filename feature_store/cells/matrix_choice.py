"""Which matrix of a file is taken: the one that says most about the counts of all genes.

Counts are found wherever they are (X, raw, any layer). Logarithms from which the counts can be recovered say as much
(`value_kinds`), so a matrix of all genes is preferred to a selection of genes: one that has less than `WHOLE_SHARE` of
the other's values in the same sampled cells. Then counts come before logarithms, more genes before fewer, and X before
layers and raw. A matrix that cannot be used is passed over. The choice holds the reason for the matrix that is taken,
and for each that is not. A matrix that was named is taken without a comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from feature_store.cells.value_kinds import KINDS, USABLE, MatrixValues

WHOLE_SHARE = 0.9
"""Least share of the most values, in the same cells, that a matrix of all genes has; filtered genes have few values."""
_WORDS = {"counts": "counts", "lognorm": "log-normalised"}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A matrix of a file: its name, its number of genes, and what it holds or why it cannot be used."""

    name: str
    n_genes: int = 0
    values: MatrixValues | None = None
    by_column: bool = False
    """Whether it does not lie cell by cell, and has to be turned first (`column_matrices`)."""
    problem: str | None = None

    @property
    def kind(self) -> str:
        """The kind of its values, "" if it cannot be read."""
        return self.values.kind if self.values else ""

    @property
    def is_usable(self) -> bool:
        """Whether it holds counts or log-normalised values."""
        return self.kind in USABLE

    def says(self) -> str:
        """What it holds, in words."""
        return self.problem or KINDS[self.kind]


@dataclass(frozen=True, kw_only=True)
class MatrixChoice:
    """The matrix that is taken, the reason, and the reasons why others were passed over, by name."""

    taken: Candidate
    reason: str
    passed_over: Mapping[str, str] = field(default_factory=dict)


def named_matrix(candidate: Candidate) -> MatrixChoice:
    """The choice of a matrix that was named."""
    return MatrixChoice(taken=candidate, reason="named with --matrix")


def choose_matrix(candidates: Sequence[Candidate], *, kind: str | None = None) -> MatrixChoice | None:
    """The best usable matrix, of any kind or of `kind`; None if there is none."""
    usable = [one for one in candidates if one.is_usable]
    allowed = [one for one in usable if kind in (None, one.kind)]
    if not allowed:
        return None
    most = max(_n_values(one) for one in usable if _is_exact(one) or not any(map(_is_exact, usable)))
    taken = min(allowed, key=lambda one: _rank(one, most))
    others = {one.name: _why_not(one, taken, most) for one in candidates if one is not taken}
    reason = f"{_WORDS[taken.kind]} of {_genes(taken)}"
    if kind is not None:
        reason += f", because every file has {_WORDS[kind]}"
    return MatrixChoice(taken=taken, reason=reason, passed_over=others)


def _rank(one: Candidate, most: int) -> tuple[bool | int, ...]:
    """The place of a usable matrix in the order of preference; the lowest is taken."""
    assert one.values is not None
    return (
        not one.values.is_exact,
        _is_selection(one, most),
        one.values.is_binary,
        one.kind != "counts",
        -one.n_genes,
        one.by_column,
        _place(one.name),
    )


def _place(name: str) -> int:
    """The place of a matrix by its name alone; matrices of the same place keep the order of the file."""
    if name in ("X", "layers/counts"):
        return ("X", "layers/counts").index(name)
    if name == "raw":
        return 4
    return 2 if any(word in name.lower() for word in ("count", "raw", "umi")) else 3


def _why_not(one: Candidate, taken: Candidate, most: int) -> str:
    if not one.is_usable:
        return one.says()
    what = f"{_WORDS[one.kind]} of {_genes(one)}"
    if _is_selection(one, most) and not _is_selection(taken, most):
        return f"{what}, with {_n_values(one) / most:.0%} of the values that {taken.name} has in the same cells"
    assert one.values is not None
    if one.values.is_binary and not (taken.values and taken.values.is_binary):
        return f"{what}, but 0 and 1 alone"
    if one.kind != taken.kind:
        return what
    if one.n_genes < taken.n_genes:
        return f"{what}, which are fewer than {taken.name} has"
    return f"{what} as well"


def _is_selection(one: Candidate, most: int) -> bool:
    return _n_values(one) < WHOLE_SHARE * most


def _is_exact(one: Candidate) -> bool:
    return one.values is not None and one.values.is_exact


def _n_values(one: Candidate) -> int:
    return one.values.n_values if one.values else 0


def _genes(one: Candidate) -> str:
    return f"{one.n_genes:,} genes"
