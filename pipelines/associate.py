"""Association: codes, labels and expression into the tables that say what a feature means.

The statistics are `feature_store.associations`; here they are given their inputs: cell codes, the cell table with its
splits, log1p(CP10k) of the data set's own counts, and the token counts of the codes run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store import commit, ingest, schemas
from feature_store.associations import AssociationInputs, Labels, assemble, token_statistics
from feature_store.codes import CodesRun, load_cell_codes, load_statistics
from feature_store.genesets import GeneSets, canonical_immune, read_gmt
from feature_store.layout import ASSOCIATION_TABLES, Layout, content_sha, run_id
from pipelines.config import AssociateOptions
from pipelines.inputs import recalled_genes, recalled_source
from pipelines.progress import ticking
from pipelines.stage import FORMAT_VERSION, Clock, StageResult, parent_run

BLOCK_CELLS = 4096
CP10K = 1e4


def associate(options: AssociateOptions, store: Path) -> StageResult:
    """Compute the five association tables of a codes run; what is committed already is not computed again.

    Raises:
        NotFoundError: there are no codes, or a gene-set file is missing.
        InputError: a gene-set file is malformed, or the data set changed.
    """
    clock = Clock()
    layout = Layout(store)
    sets = [read_gmt(path) for path in options.gmt] or [canonical_immune()]
    codes = CodesRun.open(parent_run(layout, "codes", options.run).path)
    plan = {
        "format": FORMAT_VERSION,
        "codes": codes.folder.name,
        "codes_manifest": codes.by_cell.manifest().sha,
        "sae": codes.plan["sae"],
        "dataset": codes.plan["dataset"],
        "gene_sets": [_digest(collection) for collection in sets],
    }
    folder = layout.associations_dir(run_id(plan))
    runs = {name: folder / name for name in ASSOCIATION_TABLES}
    missing = [name for name, path in runs.items() if not _is_intact(path)]
    if missing:
        with commit.sole_driver(folder), ticking("associate", len(ASSOCIATION_TABLES), "tables") as tick:
            tables = assemble(gather(layout, codes, sets))
            for n_done, (name, path) in enumerate(runs.items(), start=1):
                commit.write_table(path, tables[name], {**plan, "table": name})
                tick(n_done)
    features = commit.read_table(runs["features"])
    return StageResult(
        kind="associations",
        run=folder.name,
        path=folder,
        done=len(missing),
        reused=len(ASSOCIATION_TABLES) - len(missing),
        seconds=clock.seconds,
        facts={
            "features": features.height,
            "dead": int(features["dead"].sum()),
            **{f"class {name}": n for name, n in features["class"].value_counts(sort=True).iter_rows()},
        },
    )


def gather(layout: Layout, codes: CodesRun, sets: Sequence[GeneSets]) -> AssociationInputs:
    """Read everything that the statistics of one codes run need."""
    dataset = codes.plan["dataset"]
    cells = ingest.read_cells(layout.cells_dir(dataset))
    kinds = label_kinds(layout, dataset, cells)
    source = recalled_source(layout, dataset)
    genes = recalled_genes(layout, codes)
    statistics = load_statistics(codes.folder)
    symbols = dict(genes.select("gene_id", "symbol").drop_nulls().iter_rows())
    units = next((kind for kind in ("donor", "batch") if cells[kind].null_count() < cells.height), None)
    return AssociationInputs(
        codes=load_cell_codes(codes.by_cell, cells.height),
        split=cells["split"].to_list(),
        expression=expression_of(source),
        genes=genes["symbol"].to_list(),
        labels=[Labels.from_values(kind, cells[kind].to_list()) for kind in kinds],
        units=None if units is None else Labels.from_values(units, cells[units].to_list()),
        tokens=token_statistics(
            statistics.feature_gene,
            statistics.gene,
            gene_id=genes["gene_id"].to_list(),
            n_features=codes.n_features,
        ),
        top_tokens=statistics.feature_token.with_columns(
            gene=pl.col("gene_id").replace_strict(symbols, default=None, return_dtype=pl.String)
        ).drop("gene_id"),
        gene_sets=sets,
    )


def label_kinds(layout: Layout, dataset: str, cells: pl.DataFrame) -> list[str]:
    """Columns of the cell table that features are associated with: cell_type, batch, and those named by --label.

    An obs column whose name is taken by the table's own column (`donor`, say, without --donor) is there as `donor_obs`.
    """
    plan = commit.Run.open(layout.cells_dir(dataset)).plan
    own = schemas.schema("cells").columns
    named = [f"{label}_obs" if label in own and plan.get(label) != label else label for label in plan["labels"]]
    return [kind for kind in dict.fromkeys(("cell_type", "batch", *named)) if cells[kind].null_count() < cells.height]


def expression_of(source: ingest.Source) -> sparse.csr_array:
    """CSR float32 [n_cells n_genes] of log1p of counts per 10,000; values that are log-normalised already stay."""
    parts = []
    for start in range(0, source.n_cells, BLOCK_CELLS):
        rows = source.read_rows(start, min(start + BLOCK_CELLS, source.n_cells))
        shape = (len(rows.indptr) - 1, source.n_genes)
        block = sparse.csr_array((rows.data.astype(np.float64), rows.indices, rows.indptr), shape=shape)
        if source.value_kind == "counts":
            total: npt.NDArray[np.float64] = np.asarray(block.sum(axis=1)).ravel()
            block.data = np.log1p(block.data * CP10K / np.repeat(np.maximum(total, 1.0), np.diff(block.indptr)))
        parts.append(block.astype(np.float32))
    return sparse.vstack(parts, format="csr")


def _digest(collection: GeneSets) -> dict[str, Any]:
    """What identifies a collection of gene sets."""
    content = {name: list(genes) for name, genes in zip(collection.names, collection.genes, strict=True)}
    return {"collection": collection.collection, "sha256": content_sha(content)}


def _is_intact(path: Path) -> bool:
    """Whether a table is there, whole and unharmed."""
    return not commit.verify(path)
