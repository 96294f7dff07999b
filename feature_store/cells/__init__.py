"""The cells of a data set: every input format behind one matrix interface, and the tables made of it.

>>> from feature_store.cells import open_source, write_cells
>>> with open_source(["a.h5ad", "b.h5ad"]) as source:
...     cells = write_cells(layout, source, donor="patient", cell_type="label")

Files become a `Source` (`open_source`), which gives the rows of the matrix, obs and the genes; a source becomes the
tables `cells` and `genes` (`write_cells`) and the expression by gene (`write_expression_part`). Everything that other
rooms need is exported here, on first use; its modules are imported by nobody else.

source                     a data set of one or more files
file_places                where its files are, and the data set opened again from there
files                      the formats of files, each behind the same questions
file_digests               the sha256 of a file, and how a file is known not to have changed
changes                    what changed in the files of a data set
column_matrices, turning    matrices that do not lie cell by cell, and are turned once
row_parts, list_parts      what they are turned into; Parquet files with lists
soma_arrays                obs and matrices of a SOMA experiment, of which a condition takes some cells
matrices, value_kinds      ranges of rows of a matrix on disk; whether its values are counts or log-normalised
matrix_choice              which matrix of a file is taken, and why not the others
feature_types              which features are genes
obs_table                  columns of obs from a table beside the data
annotations                the columns of obs and var
canonical                  the one text of an id or a label
cellxgene, cellxgene_mark  the columns of a file in the schema of CELLxGENE; the mark of such a file
label_columns              which labels are groups of cells, and which are numbers of cells
cell_table, gene_table     the tables `cells` and `genes`
cell_digests               how the same cell is recognised in another file
splits                     which cells are for training, selection and testing
panel                      which cells get everything, where there are too many for all of them
expression                 log1p(CP10k) by gene
variable_genes, loess      which genes vary most; the curve that is expected of them
size_ranges                ranges of genes or features whose sizes are limited
anndata_export             codes of cells as an AnnData
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_store.cells.anndata_export import to_anndata
    from feature_store.cells.canonical import canonical_column, canonical_name, canonical_text
    from feature_store.cells.cell_table import (
        StoredObs,
        draw_cells,
        read_cells,
        read_panel,
        read_panel_cells,
        read_split_numbers,
        read_split_record,
        refuse_unknown_columns,
        write_cells,
    )
    from feature_store.cells.cellxgene import CellxgeneColumns, cellxgene_columns, has_cellxgene_columns
    from feature_store.cells.changes import what_changed
    from feature_store.cells.column_matrices import ColumnMatrix
    from feature_store.cells.expression import (
        ExpressionReader,
        counts_matrix,
        expression_matrix,
        plan_expression,
        write_expression_part,
    )
    from feature_store.cells.file_digests import FileState, KnownDigest, no_known_digest
    from feature_store.cells.file_places import (
        SourceLocation,
        changed_files,
        load_source_location,
        missing_files,
        open_recorded,
        place_text,
        read_again,
        recorded_digests,
        save_source_location,
        source_location,
        write_source_location,
    )
    from feature_store.cells.gene_table import (
        MakeTables,
        MatrixPass,
        MatrixTables,
        gene_table_of,
        matrix_tables,
        shard_cells,
        shard_range,
    )
    from feature_store.cells.matrices import CSRRows, concat_rows
    from feature_store.cells.panel import PANEL_CELLS
    from feature_store.cells.size_ranges import split_by_size
    from feature_store.cells.source import Source, data_files, open_source, short_names
    from feature_store.cells.splits import SELECT, TEST, TRAIN, SplitConfig, SplitRecord, make_splits
    from feature_store.cells.turning import cost_of_turning, turn_matrices
    from feature_store.cells.variable_genes import (
        BatchSums,
        TrainBatches,
        expected_counts,
        rank_genes,
        standardised_variance,
        sums_of_cells,
        train_batches,
        variable_gene_constants,
    )

__all__ = [
    "PANEL_CELLS",
    "SELECT",
    "TEST",
    "TRAIN",
    "BatchSums",
    "CSRRows",
    "CellxgeneColumns",
    "ColumnMatrix",
    "ExpressionReader",
    "FileState",
    "KnownDigest",
    "MakeTables",
    "MatrixPass",
    "MatrixTables",
    "Source",
    "SourceLocation",
    "SplitConfig",
    "SplitRecord",
    "StoredObs",
    "TrainBatches",
    "canonical_column",
    "canonical_name",
    "canonical_text",
    "cellxgene_columns",
    "changed_files",
    "concat_rows",
    "cost_of_turning",
    "counts_matrix",
    "data_files",
    "draw_cells",
    "expected_counts",
    "expression_matrix",
    "gene_table_of",
    "has_cellxgene_columns",
    "load_source_location",
    "make_splits",
    "matrix_tables",
    "missing_files",
    "no_known_digest",
    "open_recorded",
    "open_source",
    "place_text",
    "plan_expression",
    "rank_genes",
    "read_again",
    "read_cells",
    "read_panel",
    "read_panel_cells",
    "read_split_numbers",
    "read_split_record",
    "recorded_digests",
    "refuse_unknown_columns",
    "save_source_location",
    "shard_cells",
    "shard_range",
    "short_names",
    "source_location",
    "split_by_size",
    "standardised_variance",
    "sums_of_cells",
    "to_anndata",
    "train_batches",
    "turn_matrices",
    "variable_gene_constants",
    "what_changed",
    "write_cells",
    "write_expression_part",
    "write_source_location",
]

_MODULES = {
    "anndata_export": ("to_anndata",),
    "canonical": ("canonical_column", "canonical_name", "canonical_text"),
    "cell_table": (
        *("draw_cells", "read_cells", "read_panel", "read_panel_cells", "read_split_numbers"),
        *("read_split_record", "refuse_unknown_columns", "write_cells", "StoredObs"),
    ),
    "column_matrices": ("ColumnMatrix",),
    "expression": (
        "ExpressionReader",
        "counts_matrix",
        "expression_matrix",
        "plan_expression",
        "write_expression_part",
    ),
    "cellxgene": ("CellxgeneColumns", "cellxgene_columns", "has_cellxgene_columns"),
    "changes": ("what_changed",),
    "file_digests": ("FileState", "KnownDigest", "no_known_digest"),
    "gene_table": tuple(
        "MakeTables MatrixPass MatrixTables gene_table_of matrix_tables shard_cells shard_range".split()
    ),
    "matrices": ("CSRRows", "concat_rows"),
    "panel": ("PANEL_CELLS",),
    "size_ranges": ("split_by_size",),
    "file_places": tuple(
        "SourceLocation changed_files load_source_location missing_files open_recorded place_text read_again "
        "recorded_digests save_source_location source_location write_source_location".split()
    ),
    "source": ("Source", "data_files", "open_source", "short_names"),
    "turning": ("cost_of_turning", "turn_matrices"),
    "variable_genes": (
        *("BatchSums", "TrainBatches", "expected_counts", "rank_genes", "standardised_variance", "sums_of_cells"),
        *("train_batches", "variable_gene_constants"),
    ),
    "splits": ("SELECT", "TEST", "TRAIN", "SplitConfig", "SplitRecord", "make_splits"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
