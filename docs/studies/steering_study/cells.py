"""The cells that `steering_study` steers: files made of the real data sets in $SCSAE_DATA.

- kang.h5ad: Kang et al. 2018 (doi:10.1038/nbt.4042), PBMC of eight donors, control and IFN-beta, with a column of
  splits for each fold: every donor is tested once.
- mixology_SEED.h5ad: Tian et al. 2019 (doi:10.1038/s41592-019-0425-8), five cell lines in five batches of two
  protocols; the genes that all batches detect, of these the most variable inside batches of `train` cells. A cell of it
  detects more genes than the mini model reads; of a random 1,199 of them it hardly knows the lines (leave-one-batch-out
  accuracy .41 instead of .92).
- ctcl_FOLD.h5ad: lymphoma and healthy skin (GSE128531), three donors each, genes chosen alike inside `train` donors: a
  patient and a healthy donor are tested, another pair is chosen on, the third trains.
- ctcl_mix_SEED.h5ad: the same skin, of which each donor is a batch: splits by cell inside types of donors, and the
  genes most variable inside donors of `train` cells.

A file that is there is left as it is, so that runs made of it stay valid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from findings_study.cells import (
    FOLDS,
    KANG,
    MIXOLOGY,
    fold_column,
    fold_splits,
    shared_genes,
    write_cells,
)

if TYPE_CHECKING:
    import anndata

CTCL = "ctcl_skin_GSE128531_1800x33694_counts.h5ad"
SEEDS = (0, 1, 2)
"""Of the splits of sc_mixology's cells, and of the SAEs trained on them."""
SHARES = (0.4, 0.25, 0.35)
"""Of train, select and test cells of each line in each batch."""
N_GENES = 1200
CTCL_FOLDS = (("CTCL-5", "HC-1"), ("CTCL-6", "HC-2"), ("CTCL-8", "HC-3"))
"""The patient and the healthy donor that a fold tests; it chooses on the next fold's, and the third's train."""


def kang_file(data: Path, folder: Path) -> Path:
    """All cells of Kang et al., with the splits of every fold."""
    import anndata

    path = folder / "kang.h5ad"
    if not path.exists():
        cells = anndata.read_h5ad(data / KANG)
        for fold in range(len(FOLDS)):
            cells.obs[fold_column(fold)] = fold_splits(cells.obs["donor"].astype(str), fold)
        write_cells(cells, path)
    return path


def mixology_file(data: Path, folder: Path, seed: int) -> Path:
    """The cells of sc_mixology, split by cell inside each line of each batch, with the genes chosen on `train`."""
    import anndata

    path = folder / f"mixology_{seed}.h5ad"
    if not path.exists():
        cells = shared_genes(anndata.read_h5ad(data / MIXOLOGY))
        strata = cells.obs["batch"].astype(str) + "|" + cells.obs["cell_type"].astype(str)
        cells.obs["split"] = split_inside(strata.tolist(), seed=seed)
        write_cells(cells[:, variable_genes(cells, cells.obs["split"] == "train", "batch")].copy(), path)
    return path


def ctcl_file(data: Path, folder: Path, fold: int) -> Path:
    """The cells of the skin data, with the splits of one fold and the genes chosen on its `train` donors."""
    import anndata

    path = folder / f"ctcl_{fold}.h5ad"
    if not path.exists():
        cells = anndata.read_h5ad(data / CTCL)
        cells.obs["split"] = ctcl_splits(cells.obs["donor"].astype(str).tolist(), fold)
        write_cells(cells[:, variable_genes(cells, cells.obs["split"] == "train", "donor")].copy(), path)
    return path


def ctcl_mix_file(data: Path, folder: Path, seed: int) -> Path:
    """The cells of the skin data, split by cell inside each type of each donor, with the genes chosen on `train`."""
    import anndata

    path = folder / f"ctcl_mix_{seed}.h5ad"
    if not path.exists():
        cells = anndata.read_h5ad(data / CTCL)
        strata = cells.obs["donor"].astype(str) + "|" + cells.obs["cell_type"].astype(str)
        cells.obs["split"] = split_inside(strata.tolist(), seed=seed)
        write_cells(cells[:, variable_genes(cells, cells.obs["split"] == "train", "donor")].copy(), path)
    return path


def ctcl_splits(donors: Sequence[str], fold: int) -> list[str]:
    """The split of each cell, by its donor, in a fold of CTCL_FOLDS."""
    test, select = CTCL_FOLDS[fold], CTCL_FOLDS[(fold + 1) % len(CTCL_FOLDS)]
    return ["test" if donor in test else "select" if donor in select else "train" for donor in donors]


def split_inside(strata: Sequence[str], *, seed: int) -> list[str]:
    """Splits of cells in the proportions SHARES, drawn inside each stratum."""
    keys, found = np.asarray(strata), np.empty(len(strata), dtype=object)
    rng = np.random.default_rng(seed)
    for key in np.unique(keys):
        cells = rng.permutation(np.flatnonzero(keys == key))
        first, second = np.round(np.cumsum(SHARES[:2]) * len(cells)).astype(int)
        found[cells[:first]], found[cells[first:second]], found[cells[second:]] = "train", "select", "test"
    return [str(split) for split in found]


def variable_genes(
    cells: "anndata.AnnData", chosen: "Sequence[bool]", batch: str
) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """The N_GENES most variable genes of log1p CP10k inside batches of the chosen cells (scanpy)."""
    import scanpy as sc

    these = cells[np.asarray(chosen)].copy()
    sc.pp.normalize_total(these, target_sum=1e4)
    sc.pp.log1p(these)
    sc.pp.filter_genes(these, min_cells=3)
    sc.pp.highly_variable_genes(these, n_top_genes=N_GENES, batch_key=batch)
    return np.asarray(cells.var_names.isin(these.var_names[these.var["highly_variable"]]))
