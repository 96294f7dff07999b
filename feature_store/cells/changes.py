"""What changed in the files of a data set since its tables were written, in words."""

from collections.abc import Iterator
from itertools import chain

import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.cells.source import Source
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.obs_columns import column_of
from feature_store.storage.plans import CellsPlan

CONSEQUENCE = "which would change the panel and every statistic"
NOTHING_ELSE = (
    "values of the matrix, or parts that are not read (obsm, uns), as cells, genes and obs columns are the same"
)


def what_changed(layout: Layout, dataset: str, source: Source) -> str:
    """How the present files of a data set differ from its tables: the first of number of cells, genes, names of cells,
    obs columns that splits, panel and statistics are made of, other obs columns, and what the tables do not hold.
    """
    folder = layout.cells_dir(dataset)
    cells, plan = commit.read_table(folder), CellsPlan.of(commit.Run.open(folder))
    found = chain(
        _of_genes(source, commit.read_table(layout.genes_dir(dataset))),
        _of_cells(source, cells),
        _of_columns(source, cells, plan),
    )
    return next(found, NOTHING_ELSE)


def _of_genes(source: Source, genes: pl.DataFrame) -> Iterator[str]:
    ids = source.ensembl_ids or [""] * source.n_genes
    now = [*zip(source.gene_symbols, ids, strict=True)]
    then = [*zip(genes["symbol"].to_list(), genes["ensembl_id"].fill_null("").to_list(), strict=True)]
    if now == then:
        return
    if len(now) != len(then):
        yield f"it has {len(now):,} genes and had {len(then):,}"
    if sorted(now) == sorted(then):
        yield "its genes are in another order"
    different = [one for one, other in zip(now, then, strict=False) if one != other]
    yield f"the names of {len(different):,} genes differ ({_few([symbol for symbol, _ in different])})"


def _of_cells(source: Source, cells: pl.DataFrame) -> Iterator[str]:
    if source.n_cells != cells.height:
        yield f"it has {source.n_cells:,} cells and had {cells.height:,}"
        return
    names = source.obs_names()
    if (n := _n_different(names, cells["cell_id"])) and names.sort().equals(cells["cell_id"].sort()):
        yield "its cells are in another order"
    if n:
        yield f"the names of {n:,} cells differ"


def _of_columns(source: Source, cells: pl.DataFrame, plan: CellsPlan) -> Iterator[str]:
    obs = source.obs()
    named = {column: f"{role} (obs column {column})" for role, column in _roles(plan).items() if column is not None}
    named |= {label: label for label in plan.labels if label not in named}
    # a table beside the data was joined when the cells were written, and is not read again
    named = {column: what for column, what in named.items() if column not in plan.obs_columns}
    gone = [what for column, what in named.items() if column not in obs.columns]
    if gone:
        yield f"{', '.join(gone)} is no longer there, {CONSEQUENCE}"
    told = []
    for column, what in named.items():
        if column in obs.columns and (n := _n_different(_as_stored(obs, column, plan), _stored(cells, column, plan))):
            told.append(f"{what} differs in {n:,} cells")
    if told:
        yield f"{'; '.join(told)}, {CONSEQUENCE}"
    others = [name for name in obs.columns if name not in (*named, *plan.obs_columns)]
    others = [name for name in others if column_of(name) in cells.columns]
    different = {name: n for name in others if (n := _n_different(obs[name], cells[column_of(name)]))}
    if different:
        yield f"obs columns differ in up to {max(different.values()):,} cells ({_few(list(different))})"


def _roles(plan: CellsPlan) -> dict[str, str | None]:
    return {"donor": plan.donor, "batch": plan.batch, "cell_type": plan.cell_type, "split": plan.split_column}


def _as_stored(obs: pl.DataFrame, column: str, plan: CellsPlan) -> pl.Series:
    return obs[column] if column in plan.numbers else canonical_text(obs[column])


def _stored(cells: pl.DataFrame, column: str, plan: CellsPlan) -> pl.Series:
    """The column of the table `cells` that an obs column became."""
    role = next((role for role, of in _roles(plan).items() if of == column), None)
    return cells[role or column_of(column)]


def _n_different(now: pl.Series, then: pl.Series) -> int:
    return int(now.cast(pl.String).ne_missing(then.cast(pl.String)).sum())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
