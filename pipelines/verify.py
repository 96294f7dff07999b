"""`scsae verify`: read and hash every file of a run."""

from pathlib import Path

from feature_store.commit import Run
from feature_store.errors import NotFoundError
from feature_store.layout import KINDS, PLAN, Layout
from pipelines.progress import stderr_console


def verify_run(run: str, store: Path) -> int:
    """Check every hash of the run whose id starts with `run`; print what is damaged; return the exit code, 0 or 1."""
    tables = tables_of(run, Layout(store))
    problems = [problem for table in tables for problem in Run.open(table).verify()]
    n_parts = sum(Run.open(table).n_shards for table in tables)
    console = stderr_console()
    for problem in problems:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    if problems:
        console.print(f"{run}: {len(problems)} problems; run its stage again to repair", style="red", markup=False)
        return 1
    console.print(f"{run}: {n_parts} parts in {len(tables)} tables are intact", markup=False)
    return 0


def tables_of(run: str, layout: Layout) -> list[Path]:
    """Return the committed folders (each with a plan) of the one run whose id starts with `run`."""
    found = [info for kind in KINDS for info in layout.runs(kind) if info.run.startswith(run)]
    if len(found) != 1:
        known = ", ".join(f"{info.kind}/{info.run}" for kind in KINDS for info in layout.runs(kind))
        raise NotFoundError(f"{run!r} names {len(found) or 'none'} of the runs in {layout.root}: {known or 'no runs'}")
    return sorted(plan.parent for plan in found[0].path.rglob(PLAN))
