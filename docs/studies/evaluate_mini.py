"""How well the mini model's cell embeddings separate the types of cells that it never saw.

    python docs/studies/evaluate_mini.py [--model mini] [--random-seeds 3] [--out figures.json]

Data: `scanpy.datasets.pbmc68k_reduced()` (700 PBMC of 10 types; another study and laboratory than the training cells;
`.raw`, log-normalised). A classifier of k nearest neighbours (k = 5, Euclidean) predicts `bulk_labels` in five
stratified folds; accuracy and macro-F1 are over all held-out predictions and averaged over `--repeats` shufflings of
the folds. They are compared with 30 principal components of the same cells, from the genes that the model knows and
from all genes, and with random weights.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from sae_core.scfm import FoundationModel, load_model


@dataclass(frozen=True, kw_only=True)
class Score:
    """kNN quality of one representation of the cells."""

    representation: str
    accuracy: float
    macro_f1: float


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Log-normalised values [cell gene], gene symbols and cell types."""

    values: sp.csr_matrix[Any]
    symbols: tuple[str, ...]
    cell_type: np.ndarray


def pbmc68k() -> Cells:
    """The 700 cells that scanpy carries in its package."""
    with warnings.catch_warnings():
        # the file was written by an old anndata, which a new one says at every reading
        warnings.simplefilter("ignore")
        import scanpy

        data = scanpy.datasets.pbmc68k_reduced()
    raw = data.raw
    return Cells(
        values=sp.csr_matrix(raw.X, dtype=np.float32),
        symbols=tuple(raw.var_names),
        cell_type=data.obs["bulk_labels"].to_numpy(str),
    )


def knn_score(name: str, x: np.ndarray, labels: np.ndarray, *, repeats: int = 5) -> Score:
    """Accuracy and macro-F1 of kNN (k = 5) in stratified five-fold cross-validation, mean over fold shufflings."""
    accuracy, f1 = [], []
    for repeat in range(repeats):
        folds = StratifiedKFold(5, shuffle=True, random_state=repeat)
        predicted = cross_val_predict(KNeighborsClassifier(5), x, labels, cv=folds)
        accuracy.append(accuracy_score(labels, predicted))
        f1.append(f1_score(labels, predicted, average="macro"))
    return Score(representation=name, accuracy=float(np.mean(accuracy)), macro_f1=float(np.mean(f1)))


def model_scores(model: FoundationModel, cells: Cells, *, repeats: int = 5) -> list[Score]:
    """Scores at the embedding and at every layer: mean over gene tokens everywhere, `<cls>` at the layers."""
    match = model.match_genes(cells.symbols)
    tokens = model.tokenize(cells.values.indptr, cells.values.indices, cells.values.data, match, seed=0)
    gene = ~tokens.is_special
    cell = tokens.cell_of_token()[gene]
    average = sp.csr_matrix((np.ones(len(cell)) / np.bincount(cell)[cell], (cell, np.arange(len(cell)))))
    scores = []
    # all layers from one run; `embed` would run the network once for each of them
    for site, x in model.activations(tokens, ["embedding", *(f"layer.{i}" for i in range(model.n_layers))]).items():
        scores.append(knn_score(f"{site} mean", average @ x[gene].numpy(), cells.cell_type, repeats=repeats))
        if site.kind == "layer":
            cls = normalize(x[tokens.is_special].numpy())
            scores.append(knn_score(f"{site} cls", cls, cells.cell_type, repeats=repeats))
    return scores


def pca_scores(cells: Cells, known: np.ndarray, *, n_components: int = 30, repeats: int = 5) -> list[Score]:
    """Scores of principal components of the log values: of the genes `known` to the model, and of all genes."""
    dense = cells.values.toarray()
    return [
        knn_score(name, PCA(n_components, random_state=0).fit_transform(x), cells.cell_type, repeats=repeats)
        for name, x in (("PCA, same genes", dense[:, known]), ("PCA, all genes", dense))
    ]


def evaluate_mini(path: str = "mini", *, n_random: int = 3, repeats: int = 5) -> list[Score]:
    """All scores of the module's docstring; random weights are the mean over `n_random` seeds."""
    cells = pbmc68k()
    model = load_model(path)
    scores = model_scores(model, cells, repeats=repeats)
    scores += pca_scores(cells, model.match_genes(cells.symbols).matched, repeats=repeats)
    random = [model_scores(load_model(path, random_init=True, seed=s), cells, repeats=repeats) for s in range(n_random)]
    for same in zip(*random, strict=True):
        scores.append(
            Score(
                representation=f"random weights, {same[0].representation}",
                accuracy=float(np.mean([s.accuracy for s in same])),
                macro_f1=float(np.mean([s.macro_f1 for s in same])),
            )
        )
    return scores


def main() -> None:
    """Print the scores, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description="kNN quality of a model's embeddings of pbmc68k_reduced.")
    parser.add_argument("--model", default="mini", help="'mini' or an scGPT checkpoint folder")
    parser.add_argument("--random-seeds", type=int, default=3, help="networks with random weights to compare with")
    parser.add_argument("--repeats", type=int, default=5, help="shufflings of the folds")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    scores = evaluate_mini(options.model, n_random=options.random_seeds, repeats=options.repeats)
    for score in scores:
        print(f"{score.representation:36s} accuracy {score.accuracy:.3f}  macro-F1 {score.macro_f1:.3f}")
    if options.out:
        options.out.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")


if __name__ == "__main__":
    main()
