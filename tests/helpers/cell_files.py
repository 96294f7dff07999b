"""One data set in every format that is read: the same counts, cells and genes, and obs where a format has any."""

from __future__ import annotations

import gzip
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io
import zarr
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GENES = "Gene Expression"


def counts_of(adata: anndata.AnnData) -> sparse.csr_matrix:
    return sparse.csr_matrix(adata.X).astype(np.float32)


def h5ad(adata: anndata.AnnData, folder: Path, convert: Callable[[Any], Any] = sparse.csr_matrix) -> Path:
    path = folder / "cells.h5ad"
    anndata.AnnData(convert(counts_of(adata)), obs=adata.obs, var=adata.var).write_h5ad(path)
    return path


def zarr_folder(
    adata: anndata.AnnData,
    folder: Path,
    *,
    version: int = 3,
    sharded: bool = False,
    convert: Callable[[Any], Any] = sparse.csr_matrix,
    name: str = "cells.zarr",
) -> Path:
    path = folder / name
    settings: dict[str, Any] = {"zarr_write_format": version} | ({"auto_shard_zarr_v3": True} if sharded else {})
    # anndata warns about its own default, and zarr about strings, while they write
    with warnings.catch_warnings(), anndata.settings.override(**settings):
        warnings.simplefilter("ignore")
        anndata.AnnData(convert(counts_of(adata)), obs=adata.obs, var=adata.var).write_zarr(path)
    return path


def collection(adata: anndata.AnnData, folder: Path, *, parts: int = 3) -> Path:
    """A zarr group of several AnnData in the order of the cells, as annbatch writes one."""
    path = folder / "collection.zarr"
    zarr.open_group(path, mode="w", zarr_format=3, attributes={"encoding-type": "annbatch-preshuffled"})
    for i, cells in enumerate(np.array_split(np.arange(adata.n_obs), parts)):
        zarr_folder(adata[cells].copy(), path, sharded=True, name=f"dataset_{i}")
    return path


def tenx_3(adata: anndata.AnnData, folder: Path) -> Path:
    path, counts = folder / "filtered_feature_bc_matrix.h5", counts_of(adata).astype(np.int32)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        _of_tenx(group, counts, adata)
        features = group.create_group("features")
        features["id"] = np.array(adata.var["gene_ids"], dtype="S")
        features["name"] = np.array(adata.var_names, dtype="S")
        features["feature_type"] = np.array(types_of(adata), dtype="S")
        features["genome"] = np.array(["GRCh38"] * adata.n_vars, dtype="S")
    return path


def tenx_2(adata: anndata.AnnData, folder: Path, *, genomes: tuple[str, ...] = ("hg19",)) -> Path:
    path, counts = folder / "filtered_gene_bc_matrices_h5.h5", counts_of(adata).astype(np.int32)
    with h5py.File(path, "w") as file:
        for genome in genomes:
            group = file.create_group(genome)
            _of_tenx(group, counts, adata)
            group["genes"] = np.array(adata.var["gene_ids"], dtype="S")
            group["gene_names"] = np.array(adata.var_names, dtype="S")
    return path


def _of_tenx(group: h5py.Group, counts: sparse.csr_matrix, adata: anndata.AnnData) -> None:
    group["barcodes"] = np.array(adata.obs_names, dtype="S")
    group["data"], group["indices"] = counts.data, counts.indices.astype(np.int64)
    group["indptr"] = counts.indptr.astype(np.int64)
    group["shape"] = np.array([adata.n_vars, adata.n_obs], dtype=np.int32)


def types_of(adata: anndata.AnnData) -> list[str]:
    return adata.var["feature_types"].tolist() if "feature_types" in adata.var else [GENES] * adata.n_vars


def mtx(
    adata: anndata.AnnData,
    folder: Path,
    *,
    version: int = 3,
    packed: bool = True,
    by_cell: bool = False,
    start: str = "",
) -> Path:
    """The folder of a matrix.mtx; `by_cell` writes cells x genes."""
    path = folder / "filtered_feature_bc_matrix"
    path.mkdir(exist_ok=True)
    counts = counts_of(adata).astype(np.int32)
    scipy.io.mmwrite(folder / "text.mtx", sparse.coo_matrix(counts if by_cell else counts.T), field="integer")
    rows = zip(adata.var["gene_ids"], adata.var_names, types_of(adata), strict=True)
    features = "".join("\t".join(row if version > 2 else row[:2]) + "\n" for row in rows)
    texts = {
        "matrix.mtx": (folder / "text.mtx").read_text(),
        "barcodes.tsv": "".join(f"{name}\n" for name in adata.obs_names),
        "features.tsv" if version > 2 else "genes.tsv": features,
    }
    (folder / "text.mtx").unlink()
    for name, text in texts.items():
        if packed:
            (path / f"{start}{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            (path / f"{start}{name}").write_text(text)
    return path


def gene_lists(
    adata: anndata.AnnData, folder: Path, *, parts: int = 2, marker: bool = True, group_rows: int = 7
) -> Path:
    """Parts with lists in no order of genes, which may begin with a marker, and a gene table beside them."""
    path = folder / "parquet"
    (path / "data").mkdir(parents=True)
    counts, rng = counts_of(adata), np.random.default_rng(0)
    tokens = rng.permutation(adata.n_vars) + 3
    for part, cells in enumerate(np.array_split(np.arange(adata.n_obs), parts)):
        genes, values = [], []
        for cell in cells:
            own = slice(counts.indptr[cell], counts.indptr[cell + 1])
            order = rng.permutation(own.stop - own.start)
            genes.append([*([1] if marker else []), *tokens[counts.indices[own][order]].tolist()])
            values.append([*([-2.0] if marker else []), *counts.data[own][order].tolist()])
        obs = adata.obs.iloc[cells]
        columns = {"BARCODE": obs.index.tolist(), **{name: obs[name].tolist() for name in obs.columns}}
        lists = {
            "genes": pa.array(genes, pa.list_(pa.int64())),
            "expressions": pa.array(values, pa.list_(pa.float32())),
        }
        pq.write_table(
            pa.table({**lists, **columns}), path / "data" / f"train-{part:05d}.parquet", row_group_size=group_rows
        )
    table = {"gene_symbol": list(adata.var_names), "ensembl_id": list(adata.var["gene_ids"]), "token_id": tokens}
    (path / "metadata").mkdir()
    pq.write_table(pa.table(table), path / "metadata" / "gene_metadata.parquet")
    return path


def soma(adata: anndata.AnnData, folder: Path, *, layer: str = "raw", measurement: str = "RNA", **parts: Any) -> Path:
    """A SOMA experiment, by TileDB-SOMA's own writer."""
    import tiledbsoma.io

    path = folder / "experiment"
    cells = anndata.AnnData(counts_of(adata), obs=adata.obs, var=adata.var, uns=adata.uns, **parts)
    tiledbsoma.io.from_anndata(str(path), cells, measurement_name=measurement, X_layer_name=layer)
    return path


FORMATS: dict[str, Callable[[anndata.AnnData, Path], Path]] = {
    "h5ad csr": h5ad,
    "h5ad csc": lambda adata, folder: h5ad(adata, folder, sparse.csc_matrix),
    "h5ad dense": lambda adata, folder: h5ad(adata, folder, lambda x: x.toarray()),
    "zarr 2": lambda adata, folder: zarr_folder(adata, folder, version=2),
    "zarr 3": zarr_folder,
    "zarr 3 sharded": lambda adata, folder: zarr_folder(adata, folder, sharded=True),
    "zarr 3 csc": lambda adata, folder: zarr_folder(adata, folder, convert=sparse.csc_matrix),
    "annbatch": collection,
    "10x h5, 3": tenx_3,
    "10x h5, 2": tenx_2,
    "mtx, 3, gz": mtx,
    "mtx, 2, text": lambda adata, folder: mtx(adata, folder, version=2, packed=False),
    "mtx, cells x genes": lambda adata, folder: mtx(adata, folder, by_cell=True, start="GSM1_"),
    "parquet": gene_lists,
    "parquet, one part, no marker": lambda adata, folder: gene_lists(
        adata, folder, parts=1, marker=False, group_rows=99
    ),
    "soma": soma,
}
if find_spec("tiledbsoma") is None:
    # it is an extra of its own, which need not be installed
    del FORMATS["soma"]
"""Writers of every format, by name; the writer returns the path to give to `open_source`."""
WITHOUT_OBS = ("10x", "mtx")
"""How the names of the formats begin that have no obs."""
