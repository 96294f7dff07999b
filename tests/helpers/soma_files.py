"""Experiments that are made array by array, so that every index, soma_joinid and layer is as a test needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import anndata

TERMS = {"assay": "EFO:0009922", "cell_type": "CL:0000000", "disease": "PATO:0000461", "tissue": "UBERON:0002048"}


def experiment(
    path: Path,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    layers: Mapping[str, sparse.coo_matrix],
    *,
    index: str = "soma_joinid",
    measurements: Sequence[str] = ("RNA",),
) -> Path:
    """Write frames that have a column soma_joinid, and layers whose rows and columns are these."""
    import tiledbsoma as soma

    tables = {f"ms/{name}/var": (_table(var), "soma_joinid") for name in measurements}
    tables["obs"] = (_table(obs), index)
    with soma.Experiment.create(str(path)) as made:
        ms = made.add_new_collection("ms")
        for name in measurements:
            x = ms.add_new_collection(name, soma.Measurement).add_new_collection("X")
            for layer, values in layers.items():
                array = x.add_new_sparse_ndarray(layer, type=pa.from_numpy_dtype(values.dtype), shape=values.shape)
                places = {"soma_dim_0": values.row.astype(np.int64), "soma_dim_1": values.col.astype(np.int64)}
                array.write(pa.table({**places, "soma_data": values.data}))
        for place, (table, by) in tables.items():
            *folders, name = place.split("/")
            parent = made
            for folder in folders:
                parent = parent[folder]
            domain = [(0, max(table[by].to_pylist()))] if by == "soma_joinid" else [None]
            parent.add_new_dataframe(name, schema=table.schema, index_column_names=[by], domain=domain)
    # careful: categories that are written at the time of the creation are lost
    for place, (table, _) in tables.items():
        with soma.DataFrame.open(f"{path}/{place}", "w") as frame:
            frame.write(table)
    return path


def _table(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()


def census(adata: anndata.AnnData, folder: Path, *, first: int = 100, step: int = 3, **options: Any) -> Path:
    """The cells as the Census holds them: names by soma_joinid alone, which do not follow each other; categories; ids
    in feature_id; the counts in `raw`, and normalised values beside them.
    """
    n = adata.n_obs
    ids = first + step * np.arange(n)
    categories = {
        "assay": ["10x 3' v3"] * n,
        "cell_type": list(adata.obs["type"]),
        "disease": ["normal", "influenza", "normal"] * (n // 3),
        "tissue": ["lung", "blood"] * (n // 2),
    }
    columns: dict[str, Any] = {name: pd.Categorical(values) for name, values in categories.items()}
    columns |= {f"{name}_ontology_term_id": pd.Categorical([term] * n) for name, term in TERMS.items()}
    columns |= {"dataset_id": pd.Categorical(["d"] * n), "donor_id": pd.Categorical(list(adata.obs["donor"]))}
    columns |= {"is_primary_data": np.arange(n) % 6 > 0}
    obs = pd.DataFrame({"soma_joinid": ids, **columns})
    var = pd.DataFrame(
        {
            "soma_joinid": np.arange(adata.n_vars),
            "feature_id": [f"ENSG{i:011d}" for i in range(adata.n_vars)],
            "feature_name": list(adata.var_names),
            "feature_type": pd.Categorical(["protein_coding"] * adata.n_vars),
        }
    )
    counts = sparse.coo_matrix(adata.X)
    shape = (int(ids[-1]) + 1, adata.n_vars)
    raw = sparse.coo_matrix((counts.data, (ids[counts.row], counts.col)), shape=shape)
    total = np.asarray(counts.sum(axis=1)).ravel()
    logged = np.log1p(counts.data * 1e4 / total[counts.row]).astype(np.float32)
    layers = {"normalized": sparse.coo_matrix((logged, (raw.row, raw.col)), shape=shape), "raw": raw}
    return experiment(folder / "census", obs, var, layers, **options)
