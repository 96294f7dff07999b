"""Activations from outside: vectors of cells that somebody has already, and tokens that another program records.

`vector_files` opens files of vectors, `vectors` finds those of a data set and checks them, `inspection` says what they
are (`scsae inspect --vectors`), and `extraction` stores them as an activations run (`scsae extract`). `writer` stores
tokens that any program computes, and `recording` takes them from a torch module while it runs. Behind such a run every
stage is the same; what would run the model again says that it is not here.
"""
