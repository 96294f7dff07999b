"""The answers of `scsae sql`, `scsae features` and `scsae describe`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from feature_store import FeatureStore
from feature_store.errors import NotFoundError
from feature_store.query.described import described_columns, described_tables, description_of
from feature_store.query.tables import MADE_BY
from pipelines.errors import UsageError
from pipelines.runtime.output import Destination, print_frame
from pipelines.runtime.progress import stderr_console

LOOKUP_COLUMNS = (
    "feature_id gene label gene_set number value select_auroc auroc select_pearson pearson select_spearman spearman "
    "identity_precision lift select_p overlap n_set odds_ratio q q_matched holds_on_test of class top_label top_genes"
).split()
"""The columns of a look-up in a table; the other forms have every column."""
NAMES = ("gene", "label", "gene_set", "number")
"""What features can be looked up by in `FeatureStore.features_for`."""
FIRST_SHOWN = {
    "gene": "those with the largest correlation on select cells",
    "label": "those with the largest AUROC on select cells",
    "gene_set": "those with the smallest p on select cells",
    "number": "those with the largest correlation on select cells",
}
"""The order of each look-up (`feature_store.query.store.RANKED_BY`), in words."""
ACROSS_CELLS = ("gene", "label", "number")
"""Those of NAMES whose q is of a test on cells, and so of donors."""


def ask(store: FeatureStore, query: str) -> pl.DataFrame:
    """Return the answer to a query; explain an empty one on stderr."""
    answer = store.sql(query)
    return answer if answer.height else _without_rows(answer, store.why_empty(query))


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """The options of `scsae features`: one of gene, label, gene set, number and cell (by id or by place), or none.

    `kind` is the kind of the label, or the collection of the gene set, if several have the same name.
    """

    gene: str | None = None
    label: str | None = None
    gene_set: str | None = None
    number: str | None = None
    cell: str | None = None
    cell_idx: int | None = None
    kind: str | None = None
    n: int = 20

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in (*NAMES, "cell", "cell_idx")}
        named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} were given together; give one of them")
        if self.kind is not None and self.label is None and self.gene_set is None:
            raise UsageError(f"--kind was {self.kind!r} without --label or --gene-set; give one of them")

    def answer(self, store: FeatureStore) -> pl.DataFrame:
        """Return the features, strongest first; without a look-up all features, densest first."""
        # not above: `scsae sql` needs no statistics
        from feature_store.associations.claims import NAMED_AT
        from feature_store.associations.held_out_units import UNITS, limit_of_claims

        cell = self.cell if self.cell_idx is None else self.cell_idx
        if cell is not None:
            found = store.features_of(cell, self.n)
            return found if found.height else _without_rows(found, f"no feature is above 0 in cell {cell}")
        asked = {name: value for name in NAMES if (value := getattr(self, name)) is not None}
        if asked:
            found = store.features_for(**asked, kind=self.kind)
            ((column, name),) = asked.items()
            if column in ("gene", "gene_set") and (note := store.meant_by(column, name).note):
                _say(note)
            if column == "gene_set":
                found = _with_shared_genes(found)
            holds = found.get_column("holds_on_test", default=pl.repeat(True, found.height, eager=True))
            if not holds.any():
                _say(f"no feature of {name!r} at {NAMED_AT} on test cells; {FIRST_SHOWN[column]} come first")
            elif not holds.head(self.n).all():
                first = int(holds.arg_max() or 0) + 1
                _say(
                    f"{holds.sum()} of {found.height} features have {NAMED_AT} for {name!r} on test cells"
                    + ("" if column == "gene_set" else ", in the direction of select cells")
                    + "; see holds_on_test"
                    + (f", of which the first is in row {first}: --n {first}" if first > self.n else "")
                )
            if column in ACROSS_CELLS and "cells" in store.tables():
                units = store.panel_cells().select("split", *UNITS).collect()
                if limit := limit_of_claims(units):
                    _say(limit)
            return found.head(self.n)
        features = store.frame("features").sort("density", "feature_id", descending=[True, False])
        return features.head(self.n).collect()


def _with_shared_genes(found: pl.DataFrame) -> pl.DataFrame:
    """The features that share a gene with the gene set, and a line on how many do not and are left out."""
    shared = found.filter(pl.col("overlap") > 0)
    if n := found.height - shared.height:
        _say(f"left out: {n} of {found.height} rows, whose features share no gene with the set on test cells")
    return shared


def write_lookup(asked: Lookup, store: FeatureStore, to: Destination) -> None:
    """Write the answer of a look-up: LOOKUP_COLUMNS in a table, all columns in any other form."""
    answer = asked.answer(store)
    shown = [name for name in LOOKUP_COLUMNS if name in answer.columns]
    to.write(answer.select(shown) if to.form == "table" else answer)


def write_description(table: str | None, store: Path, runs: Mapping[str, str | None], to: Destination) -> None:
    """Write what a table holds, or what there is where no table is named; a table on stdout has a line of title.

    The columns are those of the store if it has the table, else those of the schema. QueryError: an unknown table.
    """
    if table is None:
        to.write(described_tables())
        return
    about = description_of(table)
    try:
        opened = FeatureStore.open(store, **runs)
    except NotFoundError:
        if any(runs.values()):
            raise
        opened = None
    columns = opened.frame(table).collect_schema() if opened is not None and table in opened.tables() else None
    found = described_columns(table, columns)
    if to.is_printed_table:
        title = f"{table}: a row is {about.row}. Measured on: {about.measured_on}. Made by: {MADE_BY[table]}"
        print_frame(found, title=title, limit=found.height)
        return
    to.write(found)


def _without_rows(answer: pl.DataFrame, why: str) -> pl.DataFrame:
    _say(f"no rows: {why}")
    return answer


def _say(text: str) -> None:
    """Print a line on stderr, beside an answer on stdout."""
    stderr_console().print(text, soft_wrap=True)
