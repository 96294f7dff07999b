"""What a data set in the schema of CELLxGENE says of its cells, so that no option has to.

The schema fixes the names of the columns: `donor_id` is the donor, `cell_type` the cell type, and `disease` and
`tissue` are labels. Assays differ as batches do, so `assay` is the batch. A column is taken where it has more than one
value. Sex, ethnicity and stage of development are named as possible labels and not taken: each is one more family of
tests. Its genes (Ensembl ids with `feature_name`) and counts (in raw) are found as in any file.

Cells that CELLxGENE counts in another data set (`is_primary_data` is False) are counted, and kept.

Schema: https://github.com/chanzuckerberg/single-cell-curation
"""

from collections.abc import Iterable
from dataclasses import dataclass

from feature_store.cells.factors import sizes_of
from feature_store.cells.label_columns import Groups, read_groups
from feature_store.cells.source import Source

DONOR, CELL_TYPE, BATCH = "donor_id", "cell_type", "assay"
LABELS = ("disease", "tissue")
POSSIBLE_LABELS = ("sex", "self_reported_ethnicity", "development_stage")
_PRIMARY = "is_primary_data"
REQUIRED = (DONOR, CELL_TYPE, BATCH, "disease")
_N_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class CellxgeneColumns:
    """The columns of obs that the schema gives a meaning, and what else it says.

    Attributes:
        versions: the versions of the schema that the files name.
        donor, cell_type, batch: the column; None if it has one value alone.
        labels: columns of LABELS with several values.
        possible_labels: columns of POSSIBLE_LABELS with several values.
        values: what each of these columns holds, and those with one value, in words.
        n_secondary: cells that another data set of CELLxGENE holds as its own.
        n_filtered: features whose values X lacks by a filter.
    """

    versions: tuple[str, ...]
    donor: str | None
    cell_type: str | None
    batch: str | None
    labels: tuple[str, ...]
    possible_labels: tuple[str, ...]
    values: dict[str, str]
    n_secondary: int
    n_filtered: int


def has_cellxgene_columns(obs: Iterable[str]) -> bool:
    """Whether there is every column of obs that the schema of CELLxGENE needs."""
    return set(REQUIRED) <= set(obs)


def cellxgene_columns(source: Source) -> CellxgeneColumns | None:
    """The columns by the schema; None unless every file has its mark, and the data set its columns."""
    marks = [mark for mark in source.cellxgene if mark is not None]
    if len(marks) < len(source.paths) or not has_cellxgene_columns(source.obs_schema):
        return None
    names = [name for name in (*REQUIRED, *LABELS[1:], *POSSIBLE_LABELS, _PRIMARY) if name in source.obs_schema]
    read = read_groups(source, names, groups=names)

    def several(name: str) -> str | None:
        return name if name in read and read[name].n_values > 1 else None

    return CellxgeneColumns(
        versions=tuple(dict.fromkeys(mark.version for mark in marks)),
        donor=several(DONOR),
        cell_type=several(CELL_TYPE),
        batch=several(BATCH),
        labels=tuple(filter(several, LABELS)),
        possible_labels=tuple(filter(several, POSSIBLE_LABELS)),
        values={name: _in_words(groups) for name, groups in read.items() if name != _PRIMARY},
        n_secondary=_n_cells(read[_PRIMARY], "False") if _PRIMARY in read else 0,
        n_filtered=sum(mark.n_filtered for mark in marks),
    )


def _in_words(groups: Groups) -> str:
    if groups.n_values == 1:
        return f"{groups.examples[0]} alone"
    if groups.n_values <= _N_SHOWN and groups.factor is not None:
        names = [name for name in groups.factor.names if not name.startswith("\0")]
        return f"{groups.n_values} values: {', '.join(names)}"
    return f"{groups.n_values:,} values"


def _n_cells(groups: Groups, name: str) -> int:
    """The number of cells of the group of this name."""
    factor = groups.factor
    if factor is None or name not in factor.names:
        return 0
    return int(sizes_of(factor.unit_of_cell, len(factor.names))[factor.names.index(name)])
