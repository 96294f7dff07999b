from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from evaluate_mini import Cells, knn_score, model_scores, pbmc68k, pca_scores

from sae_core.scfm import load_model


@pytest.fixture(scope="module")
def some_cells() -> Cells:
    """Every second of the 700 cells: enough to tell a trained network from a random one, in half the time."""
    cells = pbmc68k()
    assert cells.values.shape == (700, 765)
    assert len(set(cells.cell_type)) == 10
    common = np.flatnonzero(np.isin(cells.cell_type, ["Dendritic", "CD14+ Monocyte", "CD19+ B", "CD56+ NK"]))[::2]
    return Cells(values=cells.values[common], symbols=cells.symbols, cell_type=cells.cell_type[common])


def test_separate_types_score_one_and_labels_without_meaning_score_chance() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 40)
    x = rng.standard_normal((120, 3)) + 20 * (labels[:, None] == np.array(["a", "b", "c"]))
    assert knn_score("apart", x, labels).accuracy == 1.0
    assert knn_score("apart", x, labels).macro_f1 == 1.0
    assert knn_score("mixed", rng.standard_normal((120, 3)), labels).accuracy == pytest.approx(1 / 3, abs=0.12)


def test_principal_components_use_the_known_genes_only() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(["a", "b"], 30)
    values = rng.random((60, 8))
    values[:, 7] = 30.0 * (labels == "a")
    cells = Cells(values=sp.csr_matrix(values, dtype=np.float32), symbols=tuple("ABCDEFGH"), cell_type=labels)
    same, every = pca_scores(cells, np.arange(8) < 7, n_components=2)
    assert every.accuracy == 1.0
    assert same.accuracy < 0.8


@pytest.mark.slow
def test_mini_tells_cell_types_it_never_saw_apart_better_than_random_weights(some_cells: Cells) -> None:
    pretrained = {s.representation: s for s in model_scores(load_model("mini"), some_cells, repeats=1)}
    random = {s.representation: s for s in model_scores(load_model("mini", random_init=True), some_cells, repeats=1)}
    assert pretrained.keys() == random.keys()
    assert len(pretrained) == 1 + 2 * 4
    for name in pretrained:
        assert pretrained[name].macro_f1 > random[name].macro_f1 + 0.08, name
        assert pretrained[name].accuracy > 0.85, name
