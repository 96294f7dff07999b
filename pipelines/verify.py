"""`scsae verify`: read and hash every file of a run. `scsae forget`: take what is gone off the list of commits.

A stage that is run again trusts markers and sizes, and hashes nothing. `verify` therefore removes the marker of each
part in which it finds other bytes (`commit.Run.verify`), so that the command that it names computes that part again.
"""

from contextlib import suppress
from pathlib import Path

from feature_store.cells import missing_files
from feature_store.codes import CodesRun
from feature_store.errors import InputError, IntegrityError, StoreError
from feature_store.query.runs import resolve_any_run
from feature_store.storage import commit, commits, filesystem
from feature_store.storage.layout import LOCATIONS, Layout, RunInfo, tables_of
from feature_store.storage.plans import ActivationsPlan, SAEPlan
from pipelines.errors import UsageError
from pipelines.external.vectors import SITE, missing_file, refuse_changed
from pipelines.inputs import data_problems, load_recorded_source
from pipelines.runtime.progress import stderr_console


def verify_run(run: str, store: Path) -> int:
    """Check every file of the run that `run` names, and, for a data set, the data files that it was made of; print what
    is damaged, gone or changed; return the exit code, 0 or 1.

    What is damaged is pending afterwards, so that the stage repairs it.
    """
    layout = Layout(store)
    info = resolve_any_run(layout, run)
    tables = tables_of(info)
    problems = {table: commit.verify(table) for table in tables}
    problems[info.path] = [*problems.get(info.path, []), *_location_problems(info)]
    damaged = [table for table, found in problems.items() if found]
    console = stderr_console()
    for problem in dict.fromkeys(problem for found in problems.values() for problem in found):
        console.print(problem, style="red", soft_wrap=True)
    if damaged:
        n_problems = sum(map(len, problems.values()))
        commands = ", ".join(dict.fromkeys(f"`{_command_for(layout, info, table)}`" for table in damaged))
        console.print(
            f"{run}: {n_problems} problems; run its stage again, with the options that it was run with, to repair it: "
            f"{commands}",
            style="red",
            soft_wrap=True,
        )
        return 1
    if info.kind == "cells" and _data_changed(layout, info.run):
        return 1
    if info.complete and _vectors_changed(layout, info):
        return 1
    n_parts = sum(commit.Run.open(table).n_shards for table in tables)
    console.print(f"{run}: {n_parts} parts in {len(tables)} tables are intact")
    return 0


def forget_run(run: str, store: Path) -> None:
    """Take a run that was deleted by hand off the list of commits, and print what was taken off.

    Raises NotFoundError for a run that is not known, or of which nothing is gone.
    """
    layout = Layout(store)
    for table in commits.forget(layout, resolve_any_run(layout, run)):
        stderr_console().print(f"forgot {table}", soft_wrap=True)


def _command_for(layout: Layout, info: RunInfo, table: Path) -> str:
    """Return the command that makes a table again; an imported SAE is not trained."""
    if info.kind == "saes" and table == info.path:
        with suppress(StoreError):
            plan = SAEPlan.of(commit.Run.open(table))
            if plan.imported is not None:
                return f"scsae import-sae FOLDER --activations {plan.activations} {layout.store_option}"
    return layout.command_for_table(table)


def _data_changed(layout: Layout, dataset: str) -> bool:
    """Hash the data files of a data set and print how they changed, or that they are not there."""
    console = stderr_console()
    if missing := missing_files(layout, dataset):
        console.print(f"{', '.join(missing)}: not there, so the data were not compared", soft_wrap=True)
        return False
    problems = data_problems(layout, dataset)
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True)
    return bool(problems)


def _vectors_changed(layout: Layout, info: RunInfo) -> bool:
    """Hash the given vectors that a run of activations or codes was made of and print whether they changed, or are not
    there.
    """
    read = _vectors_read(info)
    if read is None:
        return False
    dataset, dtype = read
    console = stderr_console()
    if missing := [*missing_files(layout, dataset), *filter(None, [missing_file(info.path)])]:
        console.print(f"{', '.join(map(str, missing))}: not there, so the vectors were not compared", soft_wrap=True)
        return False
    try:
        with load_recorded_source(layout, dataset, stage="verify") as source:
            refuse_changed(info.path, source, dtype=dtype)
    except (UsageError, InputError) as error:
        console.print(str(error), style="red", soft_wrap=True)
        return True
    return False


def _vectors_read(info: RunInfo) -> tuple[str, str] | None:
    """Return the data set and the dtype of the given vectors that a run was made of; None if it was made of none."""
    if info.kind == "activations":
        plan = ActivationsPlan.of(commit.Run.open(info.path))
        return (plan.dataset, plan.dtype) if plan.origin == "vectors" else None
    if info.kind == "codes":
        codes = CodesRun.open(info.path).plan
        return (codes.dataset, codes.fused.dtype) if codes.fused is not None and codes.fused.site == SITE else None
    return None


def _location_problems(info: RunInfo) -> list[str]:
    """What is wrong with the small files of a run that say where its data set or model is."""
    problems = []
    for name in LOCATIONS.get(info.kind, ()) if info.complete else ():
        try:
            filesystem.read_required(info.path / name)
        except IntegrityError as error:
            problems.append(str(error))
    return problems
