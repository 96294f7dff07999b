"""The cells that `findings_study` asks: three files made of the real data sets in $SCSAE_DATA.

- kang.h5ad: Kang et al. 2018 (doi:10.1038/nbt.4042), PBMC of eight donors, control and IFN-beta, with the column
  `lineage`, in which CD4 and CD8 T cells are T cells.
- kang_control.h5ad: its control cells alone, with a column of splits for each fold: every donor is tested once.
- mixology.h5ad: Tian et al. 2019 (doi:10.1038/s41592-019-0425-8), five cell lines in five batches of two protocols, the
  genes that all batches detect, and splits by cell: a batch can only be chosen for and reported on where it is in both.

A file that is there is left as it is, so that runs made of it stay valid.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from feature_store.cells import make_splits

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata
    import pandas as pd

KANG = "kang18_ifnb_2000x9015_counts.h5ad"
MIXOLOGY = "scmixology_5lines_5batches_counts.h5ad"
T_CELLS, STIMULATED, CONTROL = "T cells", "stim", "ctrl"
LINEAGE = {"CD4 T cells": T_CELLS, "CD8 T cells": T_CELLS}
FOLDS = (("1015", "107"), ("1488", "1039"), ("1256", "101"), ("1244", "1016"))
"""Donors that a fold tests, one of many cells with one of few. It chooses on the next fold's and trains on the rest."""


class StudyFiles(NamedTuple):
    """The three files."""

    kang: Path
    control: Path
    mixology: Path


def prepare(data: Path, folder: Path) -> StudyFiles:
    """Write the files that are not there to `folder`, from the data sets in `data`; return their paths."""
    import anndata

    files = StudyFiles(*(folder / f"{name}.h5ad" for name in ("kang", "kang_control", "mixology")))
    if all(file.exists() for file in files):
        return files
    kang = anndata.read_h5ad(data / KANG)
    kang.obs["lineage"] = kang.obs["cell_type"].astype(str).replace(LINEAGE)
    write_cells(kang, files.kang)
    control = kang[kang.obs["condition"] == CONTROL].copy()
    for fold in range(len(FOLDS)):
        control.obs[fold_column(fold)] = fold_splits(control.obs["donor"].astype(str), fold)
    write_cells(control, files.control)
    write_cells(shared_genes(anndata.read_h5ad(data / MIXOLOGY)), files.mixology)
    return files


def fold_column(fold: int) -> str:
    """The obs column of a fold's splits."""
    return f"fold{fold}"


def fold_splits(donors: "Sequence[str] | pd.Series[str]", fold: int) -> list[str]:
    """The split of each cell, by its donor, in a fold."""
    select = FOLDS[(fold + 1) % len(FOLDS)]
    return ["test" if donor in FOLDS[fold] else "select" if donor in select else "train" for donor in donors]


def shared_genes(cells: "anndata.AnnData") -> "anndata.AnnData":
    """The genes that some cell of every batch has (others are zeros in whole batches by construction), and splits."""
    batches = cells.obs["batch"].astype(str).to_numpy()
    detected = [np.asarray((cells.X[batches == batch] > 0).sum(axis=0)).ravel() > 0 for batch in np.unique(batches)]
    shared = cells[:, np.all(detected, axis=0)].copy()
    shared.obs["split"] = make_splits(shared.n_obs)[0].tolist()
    shared.obs["n_genes"] = np.asarray((shared.X > 0).sum(axis=1)).ravel().astype(float)
    return shared


def write_cells(cells: "anndata.AnnData", path: Path) -> None:
    """Write cells to a file that is either not there or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    cells.write_h5ad(temporary, compression="gzip")
    temporary.replace(path)
