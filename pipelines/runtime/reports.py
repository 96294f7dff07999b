"""The results of stages, printed as tables on stdout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.table import Table

from feature_store.storage.commit import read_table
from feature_store.storage.layout import Layout
from pipelines.runtime.output import console, plain, print_frame, text_of
from pipelines.runtime.stage import StageResult

if TYPE_CHECKING:
    from pipelines.compare import Comparison

NEXT = {
    "activations": "scsae train",
    "saes": "scsae encode",
    "codes": "scsae associate",
    "associations": "scsae features --label LABEL",
    "steering": "scsae plot steering-bars --save steering.png",
    "effects": "scsae sql 'SELECT feature_id, gene, effect, z, q FROM feature_effect WHERE q <= 0.05 ORDER BY p'",
    "circuits": "scsae sql 'SELECT * FROM feature_edge WHERE q <= 0.05 ORDER BY p'",
    "inputs": "scsae sql 'SELECT feature_id, gene, path, share, z, q FROM feature_input WHERE q <= 0.05 ORDER BY p'",
    "probes": "scsae sql 'SELECT representation, k, auroc, balanced_accuracy, macro_f1 FROM probe_score "
    "WHERE label IS NULL'",
    "modules": "scsae sql 'SELECT module, n_features, stability, r_test, q, top_genes FROM module'",
    "matches": "scsae sql 'SELECT * FROM feature_match WHERE mutual ORDER BY similarity DESC'",
}
"""The command that follows each kind of run."""


def print_results(results: Sequence[StageResult], store: Path) -> None:
    """Print the outcome of each stage and the command that follows."""
    for result in results:
        facts = {"run": f"{result.kind}/{result.run}", "done now": result.done, "reused": result.reused, **result.facts}
        print_facts({**facts, "seconds": round(result.seconds, 1)})
    if results:
        print_next(f"{NEXT[results[-1].kind]} {Layout(store).store_option}")


def print_next(command: str) -> None:
    """Print the command to type next, on one line."""
    console().print(f"next: {command}", soft_wrap=True)


def results_frame(results: Sequence[StageResult]) -> pl.DataFrame:
    """Return the outcome of each stage, a row for each run, unrounded."""
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
        table.add_row(plain(key), plain(text_of(value)))
    console().print(table)


SHOWN_METRICS = (
    *("target_votes", "other_accuracy"),
    *("remaining", "remaining_corrected", "energy_remaining", "type_accuracy"),
    *("batch_mixing", "label_conservation", "lobo_macro_f1", "scib_total"),
)
"""The metrics that are printed for an edit, a move and a mix; the table `steering` has all of them."""


def print_steering(store: Path, run: str) -> None:
    """Print the effects of a steering run on `test` cells: the intervention, then its nulls and baselines."""
    results = read_table(Layout(store).steering_dir(run) / "results").filter(split="test", group="all")
    columns = ["condition", "n_features", "dose", "chosen", "n_draws", "value", "effect", "low", "high"]
    columns += [name for name in results.columns if name.startswith("p_") and results[name].is_not_null().any()]
    if results.filter(role="grid").height == results.filter("chosen").height:
        columns = [name for name in columns if name not in ("n_features", "dose", "chosen")]
    for (metric,), frame in results.group_by("metric", maintain_order=True):
        if metric in SHOWN_METRICS:
            print_frame(frame.select(columns), title=f"{metric} (effect: minus unsteered)")


def print_made(results: Sequence[StageResult]) -> None:
    """Print the outcome of several chains of stages, a row for each run."""
    columns = ["kind", "run", "control", "done", "reused", "seconds"]
    found = results_frame(results)
    print_frame(found.select(name for name in columns if name in found.columns), title="Runs")


def print_comparison(found: "Comparison") -> None:
    """Print the representations of a comparison, its labels, its means, and a verdict for each kind of target."""
    from feature_store.associations.comparison import summarise
    from pipelines.compare import verdicts

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
    console().print("Verdict on test cells", style="bold")
    console().print(*verdicts(found), sep="\n", soft_wrap=True)
    console().print("every target: scsae compare --format csv, or scsae sql 'SELECT * FROM comparison'")


def print_excess(store: Path, run: str) -> None:
    """Print the excess of new associations over their baselines, or the command that makes the baselines."""
    from pipelines.compare import excess_in_words
    from pipelines.loss_recovered import value_or_reason

    console().print(value_or_reason(lambda: excess_in_words(store, run)), soft_wrap=True)
