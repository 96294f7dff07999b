"""The training data of the mini model: healthy and control cells, its vocabulary and the start of its gene vectors.

`check_allowed` refuses everything that the model must not see: a stimulated cell, a CTCL patient, a held-out Kang donor
or a barcode that appears twice. A cell that is in both Kang files is kept in the one with more genes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import eigsh

from feature_store.cells import open_source
from sae_core.scfm import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HELD_OUT_DONORS = frozenset({"101", "107", "1039"})
MARKERS = frozenset(
    """CD3D CD3E CD4 CD8A CD8B IL7R CCR7 SELL LEF1 TCF7 FOXP3 IL2RA CTLA4 GZMA GZMB GZMH GZMK PRF1 NKG7 GNLY KLRD1 KLRB1
    NCAM1 XCL1 CD19 CD79A CD79B MS4A1 CD74 HLA-DRA HLA-DRB1 IGHM IGKC JCHAIN IGJ MZB1 CD14 LYZ S100A8 S100A9 FCN1 FCGR3A
    MS4A7 CST3 FCER1A CD1C CLEC10A CLEC9A LILRA4 IL3RA PPBP PF4 CD34 KIT ISG15 IFI6 IRF7 LY6E BST2 MKI67 KRT5 KRT14 KRT1
    COL1A1 COL1A2 DCN VWF PECAM1 ACTA2 RGS5 TPSAB1 PMEL""".split()
)
"""Canonical markers of blood and skin, in the vocabulary even if rare."""
_ALLOWED_CONDITIONS = frozenset({"ctrl", "healthy"})


class ForbiddenCellsError(ValueError):
    """Cells that the mini model must never see were selected."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Control cells of one file: counts [cell gene], the genes' names, and per cell what selection and balance need."""

    name: str
    counts: sp.csr_matrix[Any]
    symbols: tuple[str, ...]
    ensembl_ids: tuple[str, ...]
    condition: np.ndarray
    donor: np.ndarray
    cell_type: np.ndarray
    barcode: np.ndarray


def training_cohorts(folder: Path) -> tuple[Cohort, ...]:
    """The three cohorts of control cells in `folder` (`$SCSAE_DATA`), checked by `check_allowed`.

    Raises:
        InputError: one of the three files is missing.
        ForbiddenCellsError: the selection is wrong.
    """
    rich = _read(folder / "kang18_ifnb_2000x9015_counts.h5ad", "kang18_ifnb")
    rich = _take(rich, (rich.condition == "ctrl") & ~np.isin(rich.donor, sorted(HELD_OUT_DONORS)))
    wide = _read(folder / "kang18_ctrl_8684x2511_counts.h5ad", "kang18_ctrl", condition="ctrl")
    wide = _take(wide, ~np.isin(wide.barcode, rich.barcode))
    skin = _read(folder / "ctcl_skin_GSE128531_1800x33694_counts.h5ad", "skin")
    cohorts = (wide, rich, _take(skin, skin.condition == "healthy"))
    check_allowed(cohorts)
    return cohorts


def check_allowed(cohorts: Sequence[Cohort]) -> None:
    """Check that the model may be trained on the cells.

    Raises:
        ForbiddenCellsError: a condition other than control or healthy, a held-out donor, a CTCL patient, or a barcode
            of the two Kang files that appears twice.
    """
    for cohort in cohorts:
        if found := set(cohort.condition) - _ALLOWED_CONDITIONS:
            raise ForbiddenCellsError(f"{cohort.name}: conditions were {sorted(found)}; allowed: ctrl, healthy")
        unseen = {donor for donor in cohort.donor if donor in HELD_OUT_DONORS or donor.startswith("CTCL")}
        if unseen:
            raise ForbiddenCellsError(
                f"{cohort.name}: cells are of donors {sorted(unseen)}, whom the model must not see; leave them out"
            )
    kang = np.concatenate([c.barcode for c in cohorts if c.name.startswith("kang")] or [np.array([], dtype=str)])
    if len(np.unique(kang)) != len(kang):
        raise ForbiddenCellsError(f"{len(kang) - len(np.unique(kang))} Kang barcodes are in both files; keep each once")


def _read(path: Path, name: str, *, condition: str | None = None) -> Cohort:
    with open_source(path) as source:
        rows, obs, names = source.read_rows(0, source.n_cells), source.obs(), source.obs_names()
    counts = sp.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(source.n_cells, source.n_genes))
    barcodes = obs["barcode"].to_list() if "barcode" in obs.columns else names
    return Cohort(
        name=name,
        counts=counts.astype(np.float32),
        symbols=tuple(source.gene_symbols),
        ensembl_ids=tuple(source.ensembl_ids or [""] * source.n_genes),
        condition=_text(obs["condition"].to_list() if condition is None else [condition] * source.n_cells),
        donor=_text(obs["donor"].to_list()),
        cell_type=_text(obs["cell_type"].to_list()),
        barcode=_text([re.sub(r"-\d+$", "", str(barcode)) for barcode in barcodes]),
    )


def _text(values: Sequence[object]) -> np.ndarray:
    return np.array([str(value) for value in values])


def _take(cohort: Cohort, keep: np.ndarray) -> Cohort:
    return Cohort(
        name=cohort.name,
        counts=cohort.counts[np.flatnonzero(keep)],
        symbols=cohort.symbols,
        ensembl_ids=cohort.ensembl_ids,
        condition=cohort.condition[keep],
        donor=cohort.donor[keep],
        cell_type=cohort.cell_type[keep],
        barcode=cohort.barcode[keep],
    )


def balance_weights(cohorts: Sequence[Cohort]) -> np.ndarray:
    """Sampling weight per cell, cohort after cohort, sum 1: a (cohort, cell type) group counts as the root of its size.

    Half way between cells and groups: CD4 T cells are more than half of all cells and would otherwise be most of what
    is learnt; equal groups would repeat five megakaryocytes as often as four thousand CD4 T cells.
    """
    group = np.concatenate([[f"{c.name}/{t}" for t in c.cell_type] for c in cohorts])
    _, inverse, size = np.unique(group, return_inverse=True, return_counts=True)
    weight = size[inverse] ** -0.5
    return np.asarray(weight / weight.sum())


def choose_vocabulary(cohorts: Sequence[Cohort], n_genes: int, *, min_cells: int = 10) -> Vocabulary:
    """`n_genes` genes and `<pad>`, `<cls>`, `<eoc>`; a gene needs `min_cells` training cells, a marker three.

    First the Kang control file's genes (a published selection of informative genes: most cells measured only these) and
    `MARKERS`, then those whose log-normalised values vary most within any cohort, cells balanced.
    """
    variance: dict[str, float] = {}
    n_cells: dict[str, int] = {}
    ensembl: dict[str, str] = {}
    weights = np.split(balance_weights(cohorts), np.cumsum([c.counts.shape[0] for c in cohorts])[:-1])
    for cohort, weight in zip(cohorts, weights, strict=True):
        x = sp.csr_matrix(
            sp.diags(1e4 / np.maximum(np.asarray(cohort.counts.sum(1)).ravel(), 1)) @ cohort.counts
        ).log1p()
        w = weight / weight.sum()
        spread = x.power(2).T @ w - (x.T @ w) ** 2
        detected = np.asarray((cohort.counts > 0).sum(0)).ravel()
        for symbol, gene_id, v, n in zip(cohort.symbols, cohort.ensembl_ids, spread, detected, strict=True):
            variance[symbol] = max(variance.get(symbol, 0.0), float(v))
            n_cells[symbol] = n_cells.get(symbol, 0) + int(n)
            if gene_id.startswith("ENSG"):
                ensembl.setdefault(symbol, gene_id)
    first = {s for s in cohorts[0].symbols if n_cells[s] >= min_cells} | {s for s in MARKERS if n_cells.get(s, 0) >= 3}
    rest = sorted((s for s in variance if s not in first and n_cells[s] >= min_cells), key=lambda s: (-variance[s], s))
    genes = sorted([*first, *rest[: max(n_genes - len(first), 0)]])
    return Vocabulary(
        tokens=(*genes, "<pad>", "<cls>", "<eoc>"), ensembl={ensembl[g]: g for g in genes if g in ensembl}
    )


def on_vocabulary(cohort: Cohort, vocabulary: Vocabulary) -> tuple[sp.csr_matrix[Any], np.ndarray]:
    """Counts [cell vocabulary id] (columns of one gene added) and which vocabulary ids the cohort measured at all."""
    match = vocabulary.match(cohort.symbols)
    column = np.flatnonzero(match.matched)
    to_id = sp.csr_matrix(
        (np.ones(len(column), dtype=np.float32), (column, match.token_id[column])),
        shape=(len(cohort.symbols), len(vocabulary)),
    )
    measured = np.zeros(len(vocabulary), dtype=bool)
    measured[match.token_id[column]] = True
    return sp.csr_matrix(cohort.counts @ to_id), measured


def gene_vectors(cohorts: Sequence[Cohort], vocabulary: Vocabulary, d_model: int, *, seed: int) -> np.ndarray:
    """Start of the gene embedding [vocabulary d_model]: G with G G' close to the genes' correlations.

    Correlations of log-normalised values within each cohort, weighted by `balance_weights`, averaged over the cohorts
    that measured both genes; then the top eigenvectors, scaled by the root of their eigenvalues. As scBERT starts from
    gene2vec (10.1038/s42256-022-00534-z); without such a start 1,200 steps stayed at a random network's level.
    """
    n = len(vocabulary)
    total, mass = np.zeros((n, n), dtype=np.float32), np.zeros((n, n), dtype=np.float32)
    weights = np.split(balance_weights(cohorts), np.cumsum([c.counts.shape[0] for c in cohorts])[:-1])
    for cohort, weight in zip(cohorts, weights, strict=True):
        counts, measured = on_vocabulary(cohort, vocabulary)
        dense = counts.toarray()
        x = np.log1p(dense * (1e3 / np.maximum(dense.sum(1, keepdims=True), 1.0)))[:, measured]
        w = (weight / weight.sum()).astype(np.float32)[:, None]
        x -= (w * x).sum(0)
        sd = np.sqrt((w * x**2).sum(0))
        # a floor on the deviation keeps genes seen in a handful of cells from being all noise
        x /= sd + 0.25 * np.median(sd) + 1e-6
        ids = np.flatnonzero(measured)
        total[np.ix_(ids, ids)] += weight.sum() * (x.T @ (w * x))
        mass[np.ix_(ids, ids)] += weight.sum()
    correlation = total / np.maximum(mass, 1e-9)
    rng = np.random.default_rng(seed)
    values, vectors = eigsh(correlation, k=d_model, v0=rng.standard_normal(n))
    start = vectors * np.sqrt(np.maximum(values, 0.0))
    start /= start.std()
    return np.asarray(start + 0.05 * rng.standard_normal(start.shape), dtype=np.float32)
