"""The cells of a data set: every input format behind one matrix interface, and the tables made of it.

`ingest` opens the files as one data set and writes the tables `cells` and `genes`; `anndata_file`, `matrices` and
`annotations` read one file each for it, `splits` deals the cells to train, select and test, and `expression` stores the
values of the matrix by gene.
"""
