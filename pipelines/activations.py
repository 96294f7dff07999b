"""What every activations run begins with: the tables of its data set, its folder, and the cells that it holds."""

from collections.abc import Mapping
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import Source, SplitConfig, draw_cells, save_source_location, write_cells
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout, as_path
from feature_store.storage.plans import ActivationsPlan, SamplePlan
from pipelines.config import ActorOptions, CellOptions
from pipelines.inputs import annotation_facts, refuse_changed_data, turn_once, warn_of_samples
from pipelines.matrix_tables import tables_by_actors
from pipelines.schema_columns import with_schema_columns

SAMPLE = "sample"
Cells = npt.NDArray[np.int64]


class DataSet(NamedTuple):
    """The name of a data set, and what the schema of its files said of its columns and what these lack, in words."""

    name: str
    facts: Mapping[str, str]


def write_data_set(
    layout: Layout,
    source: Source,
    columns: CellOptions,
    *,
    actors: ActorOptions,
    seed: int,
    trained_on: str | None = None,
    known_as: str | None = None,
    address: str | None = None,
) -> DataSet:
    """Write the tables of a data set and the place of its files.

    Args:
        layout: the layout of the store.
        source: the data set.
        columns: the columns of obs that annotate the cells, and how these are split; the schema of the files may name
            others (`with_schema_columns`).
        actors: the actors that pass over the matrix of a large data set.
        seed: seed of the splits.
        trained_on: the data set of an SAE, whose cells and donors keep their splits.
        known_as: the name of the data set where the store has its tables: they are taken as they are, whatever
            `columns` say.
        address: Ray cluster to use.

    Raises:
        InputError: as `write_cells`; nothing is written.
        UsageError: the files are not those of the known data set any more.
    """
    if known_as is not None:
        refuse_changed_data(layout, known_as, source)
        turn_once(layout, source)
        return DataSet(known_as, {})
    columns, facts = with_schema_columns(columns, source)
    with tables_by_actors(layout, source, actors, address=address) as make_tables:
        dataset = write_cells(
            layout,
            source,
            donor=columns.donor,
            batch=columns.batch,
            cell_type=columns.cell_type,
            labels=columns.label,
            split=SplitConfig(seed=seed, by=columns.split_by),
            split_column=columns.split,
            panel=columns.panel,
            trained_on=trained_on,
            make_tables=make_tables,
        )
    save_source_location(layout, dataset, source)
    turn_once(layout, source)
    warn_of_samples(layout, dataset)
    return DataSet(dataset, {**facts, **annotation_facts(layout, dataset, n_cells=source.n_cells)})


def drawn_sample(layout: Layout, dataset: str, n: int | None, *, n_cells: int, seed: int) -> Cells | None:
    """Return the cell_idx of `--cells`, ascending; None where all cells are taken."""
    if n is None or n >= n_cells:
        return None
    return draw_cells(layout.cells_dir(dataset), n, seed=seed)


def digest_of_sample(sample: Cells | None) -> str | None:
    """Return what the plan holds of a sample."""
    return None if sample is None else sha256(sample.astype("<i8").tobytes()).hexdigest()


def create_activations(layout: Layout, plan: ActivationsPlan, sample: Cells | None) -> commit.Run:
    """Create or reopen the run of a plan, and write beside it the cells of its sample, if they are not all."""
    run = commit.Run.create(layout.activations_dir(plan.id), plan.table("activations", n_shards=plan.n_shards))
    if sample is not None:
        beside = SamplePlan(beside=run.plan_sha, cells=plan.cells or "")
        table = schemas.conform("sample", pl.DataFrame({"cell_idx": sample}))
        commit.write_table(run.path / SAMPLE, table, beside.table("sample"))
    return run


def sample_folder(run: commit.Run) -> str | None:
    """Return the folder of the table of a run's cells; None if it holds all cells."""
    return None if ActivationsPlan.of(run).cells is None else str((run.path / SAMPLE).resolve())


def cells_of(sample: str | None, n_cells: int) -> Cells:
    """Return the cells whose activations are stored, ascending: those in the folder `sample`, or all."""
    if sample is None:
        return np.arange(n_cells, dtype=np.int64)
    return commit.read_table(as_path(sample))["cell_idx"].to_numpy()
