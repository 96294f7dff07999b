"""What a command shows: results as tables on stdout, in the form asked for."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Console as RichConsole
from rich.table import Table

from feature_store import FeatureStore
from feature_store.commit import read_table
from feature_store.layout import Layout
from pipelines.config import DataOptions
from pipelines.errors import UsageError
from pipelines.stage import StageResult

if TYPE_CHECKING:
    from pipelines.compare import Comparison

ROWS_SHOWN = 50
PLAIN_WIDTH = 160
NEXT = {
    "activations": "scsae train",
    "saes": "scsae encode",
    "codes": "scsae associate",
    "associations": "scsae features --label LABEL",
    "steering": "scsae sql 'SELECT * FROM steering'",
    "matches": "scsae sql 'SELECT * FROM feature_match WHERE mutual ORDER BY similarity DESC'",
}
"""What to type after a stage."""

LOOKUP_COLUMNS = (
    "feature_id gene label gene_set value select_auroc auroc select_pearson pearson identity_precision lift overlap "
    "n_set odds_ratio q class top_label top_genes"
).split()
"""What a look-up shows as a table; the other forms have every column."""


def console() -> RichConsole:
    """Return the console for results: as wide as the terminal, or wide enough for a table where there is none."""
    found = RichConsole(highlight=False)
    return found if found.is_terminal else RichConsole(highlight=False, width=PLAIN_WIDTH)


def print_results(results: Sequence[StageResult], store: Path) -> None:
    """Print what each stage made, and the command that goes on from there."""
    out = console()
    for result in results:
        facts = {"run": f"{result.kind}/{result.run}", "done now": result.done, "reused": result.reused, **result.facts}
        print_facts({**facts, "seconds": round(result.seconds, 1)})
    if results:
        out.print(f"next: {NEXT[results[-1].kind]} --store {store}", markup=False, soft_wrap=True)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, _text(value))
    console().print(table)


def print_frame(frame: pl.DataFrame, *, title: str | None = None, limit: int = ROWS_SHOWN) -> None:
    """Print a frame as a table; a line says how many rows were left out."""
    out = console()
    table = Table(title=title, title_justify="left", header_style="bold")
    for name, dtype in frame.schema.items():
        table.add_column(name, justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in frame.head(limit).iter_rows():
        table.add_row(*(_text(value) for value in row))
    out.print(table)
    if frame.height > limit:
        out.print(f"{frame.height - limit} more rows; add LIMIT, or --format csv for all of them")


def write_frame(frame: pl.DataFrame, output: str) -> None:
    """Write a frame to stdout as table, csv, json (one array of objects) or parquet (bytes)."""
    if output == "table":
        print_frame(frame)
        return
    flat = frame if output in ("json", "parquet") else _flat(frame)
    match output:
        case "csv":
            sys.stdout.write(flat.write_csv())
        case "json":
            sys.stdout.write(flat.write_json() + "\n")
        case "parquet":
            flat.write_parquet(sys.stdout.buffer)
        case _:
            raise UsageError(f"--format was {output!r}; allowed: table, csv, json, parquet")


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Lists as text, for forms that have no lists."""
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    return frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(",") for name in lists)


def _text(value: Any) -> str:
    """A value for a person: floats at three significant digits, lists comma-separated."""
    match value:
        case None:
            return ""
        case bool() | int() | str():
            return str(value)
        case float():
            return f"{value:.3g}"
        case list() | tuple() | pl.Series():
            return ", ".join(_text(item) for item in value)
    return str(value)


def print_steering(store: Path, run: str) -> None:
    """Print the effects of one steering run, the intervention first and its nulls below."""
    results = read_table(Layout(store).steering_dir(run) / "results")
    columns = ["condition", "n_draws", "value", "effect", "low", "high", *(c for c in results.columns if c[:2] == "p_")]
    shown = results.filter(pl.col("metric").is_in(["target_votes", "other_accuracy"]))
    for (metric,), frame in shown.group_by("metric", maintain_order=True):
        print_frame(frame.select(columns), title=f"{metric} (effect: minus unsteered)")


def print_comparison(found: "Comparison") -> None:
    """Print representations, labels and headline of a comparison."""
    from feature_store.comparison import summarise

    print_frame(found.representation.drop("run"), title="Representations (n_label, n_batch, n_gene_set: features)")
    labels = found.comparison.filter(pl.col("statistic") == "auroc")
    columns = ["target_kind", "target", "representation", "feature_id", "select", "test", "f1", "excess", "best"]
    shown = [*columns, "n_better", "n_units", "low", "high"]
    print_frame(labels.select(shown), title="Best feature of each label: AUROC", limit=200)
    print_frame(summarise(found.comparison), title="Excess over the best baseline of each target, test cells")


def print_excess(store: Path, run: str) -> None:
    """Print what new associations have above their baselines, or how to make these."""
    from pipelines.compare import excess_in_words

    console().print(excess_in_words(store, run), markup=False, soft_wrap=True)


def inspect_data(options: DataOptions) -> dict[str, Any]:
    """Facts about data and model together: what matches, what it costs. Nothing is written."""
    from pipelines.inputs import open_inputs

    opened = open_inputs(options)
    source, model, seen = opened.source, opened.model, opened.coverage
    n_tokens = opened.mean_tokens * source.n_cells
    probe = f"of the first {len(seen.genes_per_cell)} cells" + (", some of each file" if len(source.paths) > 1 else "")
    unmatched = seen.heaviest_unmatched(source.gene_symbols)
    n_cut = seen.n_cut(model.max_genes)
    return {
        "data": ", ".join(map(str, source.paths)),
        "matrix": f"{source.matrix} ({source.value_kind})",
        "cells": source.n_cells,
        "genes": f"{source.n_genes}, {source.n_genes_in_all} of them in every file"
        if len(source.paths) > 1
        else source.n_genes,
        "obs columns": ", ".join(source.obs().columns) or "none",
        "model": f"{model.name} ({model.family}, {model.n_layers} layers, d_model {model.d_model})",
        "genes matched": f"{seen.n_matched} of {seen.n_genes} ({seen.n_matched / seen.n_genes:.0%})",
        "genes of the model": f"{seen.n_tokens_matched} of {seen.n_vocabulary} found",
        "share of values matched": f"{seen.share_of_counts:.0%} {probe} ({seen.value_kind})",
        "largest unmatched": ", ".join(f"{name} {share:.2%}" for name, share in unmatched.items()) or "none",
        "cells without a matched gene": f"{int(seen.is_empty.sum())} {probe}: kept, without tokens",
        "cells cut to the model's input": f"{n_cut} {probe}" + (f", to {model.max_genes} genes" if n_cut else ""),
        "tokens per cell": round(opened.mean_tokens, 1),
        "activations, f16": f"{n_tokens * model.d_model * 2 / 1e9:.2f} GB per site",
        "time, one core": f"{opened.probe_seconds * source.n_cells:,.0f} s, through all layers",
    }


def lookup(
    store: Path, *, gene: str | None, label: str | None, gene_set: str | None, cell: int | None, n: int, output: str
) -> pl.DataFrame:
    """Answer `scsae features`: one of gene, label, gene_set and cell, or none for all features by density.

    As a table the answer has the columns that matter; in any other form it has all.
    """
    answer = _lookup(store, gene=gene, label=label, gene_set=gene_set, cell=cell, n=n)
    return answer.select(name for name in LOOKUP_COLUMNS if name in answer.columns) if output == "table" else answer


def _lookup(
    store: Path, *, gene: str | None, label: str | None, gene_set: str | None, cell: int | None, n: int
) -> pl.DataFrame:
    given = {"--gene": gene, "--label": label, "--gene-set": gene_set, "--cell": cell}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} were given together; ask for one at a time")
    found = FeatureStore.open(store)
    if cell is not None:
        return found.features_of(cell, n)
    if named:
        return found.features_for(gene=gene, label=label, gene_set=gene_set).head(n)
    return found.frame("features").sort("density", "feature_id", descending=[True, False]).head(n).collect()


def registered_models(store: Path) -> pl.DataFrame:
    """Registered SAEs, one row a version."""
    from pipelines.tracking import Tracking

    versions = Tracking.existing(Layout(store)).versions()
    rows = [
        {
            "name": v.name,
            "version": v.version,
            "alias": ", ".join(v.aliases),
            **{key: v.metrics.get(key) for key in ("select_fvu", "select_l0", "select_dead_fraction")},
            "sae run": v.tags.get("scsae.run"),
            "activations": v.tags.get("scsae.activations"),
            "data set": v.tags.get("scsae.dataset"),
            "model digest": v.tags.get("scsae.model_digest", "")[:12],
        }
        for v in versions
    ]
    return pl.DataFrame(rows)
