"""`scsae verify`: read and hash every file of a run."""

from pathlib import Path

from feature_store.query.runs import resolve_any_run
from feature_store.storage import commit
from feature_store.storage.layout import Layout, tables_of
from pipelines.runtime.progress import stderr_console


def verify_run(run: str, store: Path) -> int:
    """Check the hashes of the run whose id starts with `run`; print the damaged files; return the exit code, 0 or 1."""
    tables = tables_of(resolve_any_run(Layout(store), run))
    problems = [problem for table in tables for problem in commit.verify(table)]
    console = stderr_console()
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True)
    if problems:
        console.print(f"{run}: {len(problems)} problems; run its stage again to repair it", style="red")
        return 1
    n_parts = sum(commit.Run.open(table).n_shards for table in tables)
    console.print(f"{run}: {n_parts} parts in {len(tables)} tables are intact")
    return 0
