"""`scsae inspect` reports how a data set and a model match and what an extraction costs, or what given vectors are."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from feature_store.credentials import without_credentials
from pipelines.cell_tokens import tokens_of_cells
from pipelines.config import CellOptions, DataOptions, InspectOptions
from pipelines.external.inspection import inspect_vectors
from pipelines.genes import long_cells
from pipelines.inputs import LoadedInputs, few_matched, load_inputs, matrix_facts
from pipelines.runtime.stage import Clock
from pipelines.runtime.threads import torch_threads
from pipelines.schema_columns import with_schema_columns

if TYPE_CHECKING:
    from feature_store.cells import Source

TIMED_CELLS, TIMED_TOKENS, N_TIMED, TIMED_S = 16, 16_384, 5, 5.0
"""Cells and gene tokens of a timed run at most; timed runs at most; seconds after which no further one begins."""


def inspect_data(options: DataOptions) -> dict[str, Any]:
    """Return facts about data and model: the matched genes, and the size and time of an extraction.

    With `vectors`, facts about data and vectors; see `inspect_vectors`.
    """
    if isinstance(options, InspectOptions) and options.vectors is not None:
        return inspect_vectors(options, facts_of=data_facts)
    inputs = load_inputs(options)
    source, model, seen = inputs.source, inputs.model, inputs.coverage
    n_tokens = inputs.mean_tokens * source.n_cells
    probe = f"of the first {len(seen.genes_per_cell)} cells" + (", some of each file" if len(source.paths) > 1 else "")
    unmatched = seen.top_unmatched(source.gene_symbols)
    n_added = seen.n_matched - seen.n_tokens_matched
    n_truncated = seen.n_truncated(model.max_genes)
    few, longer = few_matched(inputs, options.min_matched_share), long_cells(inputs)
    return {
        **data_facts(source),
        **vectors_in_obsm(source),
        "model": f"{model.name} ({model.family}, {model.n_layers} layers, d_model {model.d_model})",
        "checkpoint": "; ".join(model.notes) or "as its authors have it",
        "genes matched": f"{seen.n_matched} of {seen.n_genes} ({seen.n_matched / seen.n_genes:.0%})",
        "matched by": f"Ensembl id: {seen.n_matched - seen.n_by_symbol}, symbol: {seen.n_by_symbol}",
        "genes of the model": f"{seen.n_tokens_matched} of {seen.n_vocabulary} found"
        + (f"; {n_added} genes of the data are added to another of the same name" if n_added else ""),
        "share of values matched": f"{seen.share_of_counts:.0%} {probe} ({seen.value_kind})",
        "largest unmatched": ", ".join(f"{name} {share:.2%}" for name, share in unmatched.items()) or "none",
        "cells without a matched gene": f"{int(seen.is_empty.sum())} {probe}: without tokens, in no statistic",
        "cells cut to the model's input": f"{n_truncated} {probe}"
        + (f", to {model.max_genes} genes" if n_truncated else ""),
        **({"LONGER THAN THE INPUT": longer} if longer else {}),
        "tokens per cell": round(inputs.mean_tokens, 1),
        "activations, f16": f"{n_tokens * model.d_model * 2 / 1e9:.2f} GB per site",
        "time, one core": f"{seconds_per_cell(inputs) * source.n_cells:,.0f} s, through all layers",
        **({"REFUSED BY EXTRACT": few} if few else {"next": extract_command(options, inputs)}),
    }


def extract_command(options: DataOptions, inputs: LoadedInputs) -> str:
    """Return the command that extracts the data with the model as they were inspected, at a layer behind the middle.

    The columns of donor, batch and cell type are those that the schema of CELLxGENE names, or that are called so. Where
    there is no such donor or cell type, COLUMN stands in its place.
    """
    columns, _ = with_schema_columns(CellOptions(), inputs.source)
    given: list[tuple[str, object]] = []
    for name in ("model", "model_option", "matrix", "where", "obs"):
        value = getattr(options, name)
        if value != type(options).model_fields[name].get_default():
            given += [(name, one) for one in (value if isinstance(value, tuple) else (value,))]
    given.append(("layer", inputs.model.n_layers * 2 // 3))
    for name in ("donor", "batch", "cell_type"):
        found = getattr(columns, name) or (name if name in inputs.source.obs_schema else None)
        if found is not None or name != "batch":
            given.append((name, found or "COLUMN"))
    given += [("label", label) for label in columns.label]
    words = [
        *map(str, options.data),
        *(text for name, one in given for text in (f"--{name.replace('_', '-')}", str(one))),
    ]
    return without_credentials(shlex.join(["scsae", "extract", *words]))


def seconds_per_cell(inputs: LoadedInputs) -> float:
    """Return the seconds in which one core tokenizes and embeds one cell: the fastest of several runs of TIMED_CELLS.

    The first run is not counted, because it allocates memory and compiles; other work on the machine slows single runs,
    which the fastest one shows least.
    """
    n = max(1, min(TIMED_CELLS, int(TIMED_TOKENS / max(inputs.mean_tokens, 1))))
    few = inputs.source.first_cells(n)[:n]
    seconds: list[float] = []
    with torch_threads(1):
        whole = Clock()
        while len(seconds) <= N_TIMED and (len(seconds) < 2 or whole.seconds < TIMED_S):
            clock = Clock()
            tokens = tokens_of_cells(inputs.model, inputs.source, inputs.match, few, seed=0)
            inputs.model.embed(tokens)
            seconds.append(clock.seconds)
    return min(seconds[1:]) / len(few)


def data_facts(source: "Source") -> dict[str, Any]:
    """Return facts about a data set alone."""
    several = len(source.paths) > 1
    _, by_schema = with_schema_columns(CellOptions(), source)
    return {
        "data": ", ".join(map(str, source.paths)),
        **matrix_facts(source, absent="none"),
        "cells": source.n_cells,
        "genes": f"{source.n_genes}, {source.n_genes_in_all} of them in every file" if several else source.n_genes,
        **(
            {"samples": f"{len(source.paths)} files, which the obs column `file` names; as batches: --batch file"}
            if several
            else {}
        ),
        "obs columns": ", ".join(source.obs_schema) or "none",
        **by_schema,
    }


def vectors_in_obsm(source: "Source") -> Mapping[str, str]:
    """Return the arrays of obsm that `--vectors` would take, or nothing if there are none."""
    widths = source.obsm_widths()
    if not widths:
        return {}
    found = ", ".join(f"{key} ({width:,})" for key, width in sorted(widths.items(), key=lambda one: -one[1]))
    return {"vectors in obsm": f"{found} numbers a cell: `scsae inspect DATA --vectors obsm/KEY` says what they are"}
