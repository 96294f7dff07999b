"""The columns of obs that a stage takes where the options name none: those that the schema of CELLxGENE fixes.

An option overrules the schema, and `none` turns its column off. A file without the mark of the schema has no column
that was not named.
"""

from typing import TypeVar

from feature_store.cells import CellxgeneColumns, Source, cellxgene_columns
from pipelines.config import NO_COLUMN, CellOptions

T = TypeVar("T", bound=CellOptions)
COLUMNS = ("donor", "cell_type", "batch")


def named_columns(options: CellOptions) -> list[tuple[str, str]]:
    """Return the pairs of an option and its column where the options name one; `none` names none."""
    given = [(option, getattr(options, option)) for option in (*COLUMNS, "split")]
    given += [("label", label) for label in options.label]
    return [(option, column) for option, column in given if column not in (None, NO_COLUMN)]


def with_schema_columns(options: T, source: Source) -> tuple[T, dict[str, str]]:
    """Return the options with the columns of the schema where they name none, and what was taken and why, in words."""
    found = cellxgene_columns(source)
    update: dict[str, str | tuple[str, ...] | None] = {}
    for option in COLUMNS:
        given = getattr(options, option)
        if given == NO_COLUMN:
            update[option] = None
        elif given is None and found is not None:
            update[option] = getattr(found, option)
    if options.label == (NO_COLUMN,):
        update["label"] = ()
    elif not options.label and found is not None:
        update["label"] = found.labels
    taken = options.model_copy(update=update)
    return taken, {} if found is None else _facts(options, taken, found, source)


def _facts(given: CellOptions, taken: CellOptions, found: CellxgeneColumns, source: Source) -> dict[str, str]:
    said = [
        _column(option, getattr(given, option), getattr(taken, option), found, default)
        for option, default in zip(COLUMNS, ("donor_id", "cell_type", "assay"), strict=True)
    ]
    labels = ", ".join(f"{name} ({found.values[name]})" if name in found.values else name for name in taken.label)
    said.append(f"labels: {labels or 'none'}{' (--label)' if given.label else ''}")
    facts = {"CELLxGENE schema": f"{', '.join(found.versions)}, so that {'; '.join(said)}. An option overrules it"}
    if others := [name for name in found.possible_labels if name not in taken.label]:
        facts["possible labels"] = ", ".join(f"--label {name} ({found.values[name]})" for name in others)
    if found.n_secondary:
        facts["not primary data"] = (
            f"{found.n_secondary:,} of {source.n_cells:,} cells: another data set of CELLxGENE holds them as its own "
            "(is_primary_data is False); they are kept"
        )
    if found.n_filtered:
        where = "which X lacks and raw has" if "raw" in source.matrix else "which X lacks, so that they are 0"
        facts["feature_is_filtered"] = f"{found.n_filtered:,} genes, {where}"
    return facts


def _column(option: str, given: str | None, taken: str | None, found: CellxgeneColumns, default: str) -> str:
    """Return which column an option came to, and why."""
    name = option.replace("_", " ")
    if given is not None:
        return f"{name}: {taken or 'none'} (--{option.replace('_', '-')})"
    values = found.values[default]
    return f"{name}: none ({default} is {values})" if taken is None else f"{name}: {taken} ({values})"
