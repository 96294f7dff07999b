"""The token activations of one site of a model, as a run of Parquet parts, and the shuffled stream that training reads.

`ActivationWriter` writes the parts of a run, `ActivationReader` reads the row groups of a finished one, and
`TokenStream` gives its tokens in batches in a seeded order; `cell_means` is the mean of each cell. Activations are
stored as f16, bf16 or f32 (`dtypes`).
"""

from feature_store.activations.cell_means import cell_means
from feature_store.activations.dtypes import to_float32, to_stored
from feature_store.activations.parquet import (
    ROW_GROUP_ROWS,
    ActivationBlock,
    ActivationReader,
    ActivationWriter,
    RowGroup,
)
from feature_store.activations.stream import TokenStream, sample_tokens

__all__ = [
    "ROW_GROUP_ROWS",
    "ActivationBlock",
    "ActivationReader",
    "ActivationWriter",
    "RowGroup",
    "TokenStream",
    "cell_means",
    "sample_tokens",
    "to_float32",
    "to_stored",
]
