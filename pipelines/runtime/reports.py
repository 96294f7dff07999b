"""What a command shows: results as tables on stdout, in the form asked for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.table import Table
from rich.text import Text

from feature_store import FeatureStore
from feature_store.storage.commit import read_table
from feature_store.storage.layout import Layout
from pipelines.config import DataOptions
from pipelines.errors import UsageError
from pipelines.runtime.output import Destination, console, print_frame, text_of
from pipelines.runtime.progress import stderr_console
from pipelines.runtime.stage import StageResult

if TYPE_CHECKING:
    from pipelines.compare import Comparison

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
    "n_set odds_ratio q q_matched class top_label top_genes"
).split()
"""What a look-up shows as a table; the other forms have every column."""


def print_results(results: Sequence[StageResult], store: Path) -> None:
    """Print what each stage made, and the command that goes on from there."""
    out = console()
    for result in results:
        facts = {"run": f"{result.kind}/{result.run}", "done now": result.done, "reused": result.reused, **result.facts}
        print_facts({**facts, "seconds": round(result.seconds, 1)})
    if results:
        out.print(f"next: {NEXT[results[-1].kind]} --store {store}", markup=False, soft_wrap=True)


def results_frame(results: Sequence[StageResult]) -> pl.DataFrame:
    """What each stage made, a row a run, unrounded."""
    rows = [
        {"kind": r.kind, "run": r.run, "done": r.done, "reused": r.reused, "seconds": r.seconds, **r.facts}
        for r in results
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(Text(key), Text(text_of(value)))
    console().print(table)


SHOWN_METRICS = (
    *("target_votes", "other_accuracy"),
    *("remaining", "remaining_corrected", "energy_remaining", "type_accuracy"),
    *("batch_mixing", "label_conservation", "lobo_macro_f1", "scib_total"),
)
"""What is shown of a steering run: of an edit, of a move, of a mix; all is in the table."""


def print_steering(store: Path, run: str) -> None:
    """Print the effects of one steering run on `test` cells: the intervention first, its nulls and baselines below."""
    results = read_table(Layout(store).steering_dir(run) / "results").filter(split="test", group="all")
    columns = ["condition", "n_features", "dose", "chosen", "n_draws", "value", "effect", "low", "high"]
    columns += [name for name in results.columns if name.startswith("p_") and results[name].is_not_null().any()]
    if results.filter(role="grid").height == results.filter("chosen").height:
        columns = [name for name in columns if name not in ("n_features", "dose", "chosen")]
    for (metric,), frame in results.group_by("metric", maintain_order=True):
        if metric in SHOWN_METRICS:
            print_frame(frame.select(columns), title=f"{metric} (effect: minus unsteered)")


def print_made(results: Sequence[StageResult]) -> None:
    """Print what several chains of stages made, a row a run."""
    columns = ["kind", "run", "control", "done", "reused", "seconds"]
    found = results_frame(results)
    print_frame(found.select(name for name in columns if name in found.columns), title="What was made")


def print_comparison(found: "Comparison") -> None:
    """Print representations, labels and headline of a comparison."""
    from feature_store.associations.comparison import summarise

    shown = found.representation.drop("run").rename(lambda name: name.removeprefix("class_"))
    print_frame(shown, title="Representations (n_label, n_batch, n_gene_set and classes: features)")
    labels = found.comparison.filter(pl.col("statistic") == "auroc")
    keys = ["target_kind", "target"]
    tests = labels.pivot(on="representation", index=keys, values="test", maintain_order=True)
    above = labels.filter(pl.col("best")).select(
        *keys, pl.col("representation").alias("best"), "excess", "n_better", "n_units", "low", "high"
    )
    title = "AUROC on test cells of the best feature on select cells, and the excess over the best baseline"
    print_frame(tests.join(above, on=keys, how="left", maintain_order="left"), title=title, limit=200)
    print_frame(summarise(found.comparison), title="Mean over targets, test cells")
    console().print("every target: scsae compare --format csv, or scsae sql 'SELECT * FROM comparison'", markup=False)


def print_excess(store: Path, run: str) -> None:
    """Print what new associations have above their baselines, or how to make these."""
    from pipelines.compare import excess_in_words
    from pipelines.loss_recovered import or_reason

    console().print(or_reason(lambda: excess_in_words(store, run)), markup=False, soft_wrap=True)


def inspect_data(options: DataOptions) -> dict[str, Any]:
    """Facts about data and model together: what matches, what it costs. Nothing is written."""
    from pipelines.inputs import open_inputs

    opened = open_inputs(options)
    source, model, seen = opened.source, opened.model, opened.coverage
    n_tokens = opened.mean_tokens * source.n_cells
    probe = f"of the first {len(seen.genes_per_cell)} cells" + (", some of each file" if len(source.paths) > 1 else "")
    unmatched = seen.top_unmatched(source.gene_symbols)
    n_cut = seen.n_truncated(model.max_genes)
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


def ask(store: FeatureStore, query: str) -> pl.DataFrame:
    """Answer `scsae sql`; an empty answer is explained on stderr."""
    answer = store.sql(query)
    return answer if answer.height else _without_rows(answer, store.why_empty(query))


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What `scsae features` is asked: one of gene, label, gene set and cell (cell_idx or cell_id), or none of them; the
    kind of a label, or the collection of a gene set, where several have one of the name.
    """

    gene: str | None = None
    label: str | None = None
    gene_set: str | None = None
    cell: str | None = None
    kind: str | None = None
    n: int = 20

    def __post_init__(self) -> None:
        given = {"--gene": self.gene, "--label": self.label, "--gene-set": self.gene_set, "--cell": self.cell}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} were given together; ask for one at a time")
        if self.kind is not None and self.label is None and self.gene_set is None:
            raise UsageError("--kind says which --label or --gene-set is meant; name one of them")

    def answer(self, store: FeatureStore) -> pl.DataFrame:
        """The features, strongest first; all features by density where nothing is asked for."""
        if self.cell is not None:
            cell = int(self.cell) if re.fullmatch(r"-?\d+", self.cell) else self.cell
            found = store.features_of(cell, self.n)
            return found if found.height else _without_rows(found, f"no feature is above 0 in cell {self.cell}")
        if self.gene is not None or self.label is not None or self.gene_set is not None:
            asked = {"gene": self.gene, "label": self.label, "gene_set": self.gene_set, "kind": self.kind}
            return store.features_for(**asked).head(self.n)
        features = store.frame("features").sort("density", "feature_id", descending=[True, False])
        return features.head(self.n).collect()


def write_lookup(asked: Lookup, store: FeatureStore, to: Destination) -> None:
    """Write the answer of a look-up: as a table the columns that matter, in any other form all of them."""
    answer = asked.answer(store)
    shown = [name for name in LOOKUP_COLUMNS if name in answer.columns]
    to.write(answer.select(shown) if to.form == "table" else answer)


def _without_rows(answer: pl.DataFrame, why: str) -> pl.DataFrame:
    stderr_console().print(f"no rows: {why}", markup=False, soft_wrap=True)
    return answer
