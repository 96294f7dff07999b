"""`scsae verify`: read and hash every file of a run."""

from pathlib import Path

from feature_store.errors import NotFoundError
from feature_store.storage import commit
from feature_store.storage.layout import KINDS, Layout, RunInfo, tables_of
from pipelines.runtime.progress import stderr_console


def verify_run(run: str, store: Path) -> int:
    """Check every hash of the run whose id starts with `run`; print what is damaged; return the exit code, 0 or 1."""
    tables = tables_of(run_named(run, Layout(store)))
    problems = [problem for table in tables for problem in commit.verify(table)]
    console = stderr_console()
    for problem in problems:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    if problems:
        console.print(f"{run}: {len(problems)} problems; run its stage again to repair", style="red", markup=False)
        return 1
    n_parts = sum(commit.Run.open(table).n_shards for table in tables)
    console.print(f"{run}: {n_parts} parts in {len(tables)} tables are intact", markup=False)
    return 0


def run_named(run: str, layout: Layout) -> RunInfo:
    """Return the one run, complete or not, whose id starts with `run`; NotFoundError names those that there are."""
    found = [info for kind in KINDS for info in layout.runs(kind) if info.run.startswith(run)]
    if len(found) != 1:
        known = ", ".join(f"{info.kind}/{info.run}" for kind in KINDS for info in layout.runs(kind))
        raise NotFoundError(f"{run!r} names {len(found) or 'none'} of the runs in {layout.root}: {known or 'no runs'}")
    return found[0]
