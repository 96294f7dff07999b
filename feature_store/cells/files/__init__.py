"""The formats of data files, each behind the same few questions (`cell_file.CellFile`).

A path goes to `recognise.open_file`, which tells its format by its content and gives it to the module of that format:

cell_file       what a data set needs of a file; a file of one matrix
recognise       which format a path has; collections, which are several files
anndata_file    AnnData: .h5ad and .zarr
remote_zarr     a group of zarr at an address
tenx_h5         10x: filtered_feature_bc_matrix.h5 of Cell Ranger 2 and 3
mtx             10x: the folder of matrix.mtx, barcodes.tsv and features.tsv
gene_lists      Parquet with lists of genes and counts, as Tahoe-100M
soma            TileDB-SOMA: an experiment, as the Census of CELLxGENE
"""
