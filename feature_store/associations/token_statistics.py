"""Token counts: on how many tokens of each gene a feature fired, on the gene axis of the expression matrix.

A token is one gene's position in one cell's input, so its gene is a column of the expression matrix; the model's
vocabulary ids are mapped once, here. Tokens of no column (`<cls>`, `<pad>`) are left out of all counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations.inputs import Floats, Ints, Sparse
from feature_store.errors import InputError
from feature_store.storage.schemas import SPLITS


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Counts of tokens on the gene axis of the expression matrix; mergeable by `+`.

    fired[f, g] = tokens of gene g on which feature f fired; gene_tokens[g] = tokens of gene g; special tokens are in
    neither.
    """

    fired: Sparse
    gene_tokens: Ints

    def __post_init__(self) -> None:
        if self.fired.shape[1] != self.gene_tokens.shape[0]:
            raise InputError(
                f"token statistics: fired has {self.fired.shape[1]} genes and gene_tokens {self.gene_tokens.shape[0]}"
            )

    def __add__(self, other: "TokenStatistics") -> "TokenStatistics":
        return TokenStatistics(fired=self.fired + other.fired, gene_tokens=self.gene_tokens + other.gene_tokens)

    @property
    def n_tokens(self) -> int:
        """All tokens counted."""
        return int(self.gene_tokens.sum())

    @property
    def feature_tokens(self) -> Floats:
        """Fired tokens per feature [n_features]."""
        return np.asarray(self.fired.sum(axis=1), dtype=np.float64).ravel()


def token_statistics(
    fired: pl.DataFrame, gene: pl.DataFrame, *, gene_id: Sequence[int | None], n_features: int
) -> dict[str, TokenStatistics]:
    """Counts by split from the tables `token_feature_gene` and `token_gene` of a codes run; rows of the same key are
    added.

    gene_id: the vocabulary id of every column of the expression matrix, None where the model does not know the gene;
    of columns that share an id the first gets the tokens. Raises InputError where a feature id is not below
    n_features.
    """
    unknown = fired["feature_id"].filter(fired["feature_id"] >= n_features)
    if unknown.len():
        raise InputError(f"token counts: feature_id {unknown[0]}; the codes have features 0..{n_features - 1}")
    column = pl.DataFrame(
        {"gene_id": gene_id, "column": range(len(gene_id))}, schema={"gene_id": pl.Int32, "column": pl.Int64}
    )
    column = column.drop_nulls().unique("gene_id", keep="first", maintain_order=True)
    fired, gene = fired.join(column, on="gene_id"), gene.join(column, on="gene_id")
    out = {}
    for number in gene["split"].unique().sort().to_list():
        counts = np.zeros(len(gene_id), dtype=np.int64)
        mine = gene.filter(pl.col("split") == number)
        np.add.at(counts, mine["column"].to_numpy(), mine["n_tokens"].to_numpy())
        part = fired.filter(pl.col("split") == number)
        place = (part["feature_id"].to_numpy(), part["column"].to_numpy())
        matrix = sparse.coo_array((part["n_tokens"].to_numpy(), place), shape=(n_features, len(gene_id))).tocsr()
        out[SPLITS[number]] = TokenStatistics(fired=matrix, gene_tokens=counts)
    return out
