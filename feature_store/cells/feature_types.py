"""Which features of a data set are genes: antibodies, guides, hashtags and peaks are measured beside them.

10x writes the type of each feature ("Gene Expression", "Antibody Capture", "CRISPR Guide Capture", "Peaks") into the
var column `feature_types`, other tools into columns such as `modality`. An antibody may have the name of a gene, and
its counts are no part of a cell's RNA: a feature that is not said to be a gene, where some are, is left out of the
matrix, and so of every total. A column that speaks of something else (`feature_type` with biotypes such as
protein_coding) decides nothing.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.cells.column_matrices import ColumnMatrix, Sample, column_matrix
from feature_store.cells.matrices import CSRRows, RowMatrix
from feature_store.errors import InputError

TYPE_COLUMNS = ("feature_types", "feature_type", "modality", "modalities", "feature_modality", "mod", "feature_biotype")
UNTYPED = "without a type"
_GENES = frozenset(
    "geneexpression gene genes rna gex mrna expression transcriptome rnaexpression scrna scrnaseq".split()
)
_OTHERS = frozenset(
    "antibodycapture antibody antibodies crisprguidecapture crispr guide guides grna sgrna multiplexingcapture hashtag "
    "hto adt protein proteins prot peaks peak atac chromatinaccessibility customfeature custom antigencapture "
    "spikein".split()
)


class GeneFeatures(NamedTuple):
    """The features of a var frame that are genes [n_features], and the number of others by their type."""

    is_gene: npt.NDArray[np.bool_]
    left_out: Mapping[str, int]


def gene_features(var: Any, where: str) -> GeneFeatures:
    """The genes among the features of a var frame; all of them if no column tells types.

    InputError if the types say that none is a gene.
    """
    n = len(var.index)
    is_gene, left_out = np.ones(n, dtype=bool), Counter[str]()
    for name in var.columns:
        if str(name).lower() not in TYPE_COLUMNS:
            continue
        column = var[name]
        types = [UNTYPED if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]
        named = genes_by_type(types, f"var[{str(name)!r}] of {where}")
        left_out.update(types[i] for i in np.flatnonzero(is_gene & ~named))
        is_gene &= named
    return GeneFeatures(is_gene, dict(left_out))


def genes_by_type(types: Sequence[str], where: str) -> npt.NDArray[np.bool_]:
    """Whether each feature is a gene by its type [n_features]; all are if no type is one of a modality."""
    words = {kind: re.sub(r"[^a-z]", "", kind.lower()) for kind in set(types)}
    if not any(word in _GENES for word in words.values()):
        others = [kind for kind, word in words.items() if word in _OTHERS]
        if others and set(words) <= {*others, UNTYPED}:
            raise InputError(
                f"{where} says that no feature is a gene: {', '.join(sorted(words))}; give the file that holds the "
                "gene expression of these cells"
            )
        return np.ones(len(types), dtype=bool)
    return np.array([words[kind] in _GENES for kind in types], dtype=bool)


class GeneColumns:
    """A matrix without the columns of features that are no genes."""

    def __init__(self, matrix: RowMatrix, is_gene: npt.NDArray[np.bool_]) -> None:
        self._matrix = matrix
        self._is_gene = is_gene
        self._column = (np.cumsum(is_gene) - 1).astype(np.int32)
        self.shape = (matrix.shape[0], int(is_gene.sum()))

    def read(self, start: int, stop: int) -> CSRRows:
        """Rows [start, stop), with genes as columns."""
        return self._genes_of(self._matrix.read(start, stop))

    @property
    def by_column(self) -> ColumnMatrix | None:
        """The matrix of all features, if it has to be turned before its rows can be read."""
        return column_matrix(self._matrix)

    def sample(self) -> Sample:
        """See `column_matrices.ColumnMatrix.sample`, with genes as columns."""
        assert self.by_column is not None
        sample = self.by_column.sample()
        return sample._replace(rows=self._genes_of(sample.rows))

    def _genes_of(self, rows: CSRRows) -> CSRRows:
        kept = self._is_gene[rows.indices]
        before = np.concatenate([[0], np.cumsum(kept)])
        return CSRRows(
            indptr=before[rows.indptr].astype(np.int64),
            indices=self._column[rows.indices[kept]],
            data=rows.data[kept],
        )
