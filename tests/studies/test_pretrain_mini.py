from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pretrain_mini
import pytest
import scipy.sparse as sp
import torch
from mini_corpus import Batch, Corpus, PretrainConfig, build_corpus, training_batch
from mini_data import (
    HELD_OUT_DONORS,
    Cohort,
    ForbiddenCellsError,
    balance_weights,
    check_allowed,
    choose_vocabulary,
    gene_vectors,
    training_cohorts,
)
from pretrain_mini import losses, new_model, pretrain

from sae_core.scfm import load_model

if TYPE_CHECKING:
    from pathlib import Path

KANG = [f"K{i}" for i in range(40)]
MORE = [f"M{i}" for i in range(20)]
ENSEMBL = {gene: f"ENSG{i:011d}" for i, gene in enumerate(KANG + MORE)}
TINY = PretrainConfig(
    n_genes=50, n_layers=1, n_heads=2, d_model=8, d_hidden=8, steps=6, positions_per_step=200, min_visible=4
)
TINY = replace(TINY, max_visible=12, n_queries=10, warmup=2, checkpoint_every=3, held_out_share=0.2)


def _write(path: Path, genes: list[str], obs: dict[str, list[str]], names: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    lam = rng.gamma(0.6, 1.5, len(genes)) * rng.gamma(1.0, 1.0, (len(names), 1))
    x = sp.csr_matrix(rng.poisson(lam).astype(np.float32))
    var = pd.DataFrame({"gene_name": genes, "ensembl_id": [ENSEMBL[g] for g in genes]}, index=genes)
    anndata.AnnData(x, obs=pd.DataFrame(obs, index=names), var=var).write_h5ad(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files in miniature, each with cells that must not be taken."""
    path = tmp_path_factory.mktemp("data")
    n = 90
    names = [f"WIDE{i}-1" for i in range(n - 5)] + [f"RICH{i}-1" for i in range(5)]
    obs = {"donor": ["1015", "1016"] * (n // 2), "cell_type": ["T"] * (n - 10) + ["B"] * 10}
    _write(path / "kang18_ctrl_8684x2511_counts.h5ad", KANG, obs, names, 0)
    condition = ["ctrl"] * 30 + ["stim"] * 20
    donor = ["101", "107", "1039", "1244", "1015"] * 10
    obs = {"barcode": [f"RICH{i}" for i in range(50)], "condition": condition, "donor": donor, "cell_type": ["T"] * 50}
    names = [f"{c}_RICH{i}" for i, c in enumerate(condition)]
    _write(path / "kang18_ifnb_2000x9015_counts.h5ad", KANG[:30] + MORE[:10], obs, names, 1)
    condition = ["healthy"] * 25 + ["CTCL"] * 15
    obs = {"condition": condition, "donor": ["HC-1"] * 25 + ["CTCL-5"] * 15, "cell_type": ["Fibroblast"] * 40}
    names = [f"S{i}" for i in range(40)]
    _write(path / "ctcl_skin_GSE128531_1800x33694_counts.h5ad", KANG + MORE, obs, names, 2)
    return path


def _cohort(name: str = "kang18_ctrl", **changes: str) -> Cohort:
    entry = {"condition": "ctrl", "donor": "1015", "cell_type": "T", "barcode": "AAA"} | changes
    columns = {key: np.array(["x", value]) for key, value in entry.items()}
    columns["condition"][0] = "ctrl"
    return Cohort(name=name, counts=sp.csr_matrix((2, 1)), symbols=("G",), ensembl_ids=("",), **columns)


@pytest.mark.parametrize(
    "changes",
    [{"condition": "stim"}, {"condition": "CTCL"}, {"donor": "CTCL-5"}, *({"donor": d} for d in HELD_OUT_DONORS)],
)
def test_cells_that_must_stay_unseen_are_refused(changes: dict[str, str]) -> None:
    check_allowed([_cohort()])
    with pytest.raises(ForbiddenCellsError, match="|".join(changes.values())):
        check_allowed([_cohort(), _cohort("skin", **changes)])


def test_a_cell_in_both_kang_files_is_refused() -> None:
    with pytest.raises(ForbiddenCellsError, match=r"^2\b"):
        check_allowed([_cohort(), _cohort("kang18_ifnb")])


def test_selection_of_real_data_leaves_out_stimulated_ctcl_and_held_out_donors(scsae_data: Path) -> None:
    cohorts = training_cohorts(scsae_data)
    assert [(c.name, c.counts.shape[0]) for c in cohorts] == [
        ("kang18_ctrl", 7997),
        ("kang18_ifnb", 858),
        ("skin", 900),
    ]
    assert {c for cohort in cohorts for c in cohort.condition} == {"ctrl", "healthy"}
    assert {d for cohort in cohorts for d in cohort.donor} == {
        *("1015", "1016", "1244", "1256", "1488"),
        *("HC-1", "HC-2", "HC-3"),
    }
    for cohort in cohorts:
        np.testing.assert_array_equal(cohort.counts.data, np.round(cohort.counts.data))


def test_a_shared_cell_is_kept_in_the_file_with_more_genes(folder: Path) -> None:
    wide, rich, skin = training_cohorts(folder)
    kept = [i for i, d in enumerate(["101", "107", "1039", "1244", "1015"] * 6) if d not in HELD_OUT_DONORS]
    assert rich.barcode.tolist() == [f"RICH{i}" for i in kept]
    assert {"RICH3", "RICH4"}.isdisjoint(wide.barcode)
    assert len(wide.barcode) == 88
    assert skin.counts.shape == (25, 60)


def test_a_group_is_drawn_by_the_root_of_its_size(folder: Path) -> None:
    cohorts = training_cohorts(folder)
    weight = balance_weights(cohorts)
    b_cells = np.concatenate([c.cell_type for c in cohorts]) == "B"
    skin = np.concatenate([[c.name] * len(c.donor) for c in cohorts]) == "skin"
    np.testing.assert_allclose(weight.sum(), 1.0)
    np.testing.assert_allclose(weight[b_cells].sum() / weight[skin].sum(), np.sqrt(b_cells.sum() / 25))


def test_vocabulary_holds_the_kang_genes_and_their_ensembl_ids(folder: Path) -> None:
    vocabulary = choose_vocabulary(training_cohorts(folder), 45, min_cells=3)
    assert vocabulary.n_genes == 45
    assert vocabulary.tokens[-3:] == ("<pad>", "<cls>", "<eoc>")
    assert sum(gene in vocabulary for gene in KANG) >= 39
    assert vocabulary.ensembl[ENSEMBL["K1"]] == "K1"


def test_gene_vectors_reproduce_the_strongest_correlations(folder: Path) -> None:
    cohorts = training_cohorts(folder)
    vocabulary = choose_vocabulary(cohorts, 50, min_cells=3)
    start = gene_vectors(cohorts, vocabulary, 8, seed=0)
    assert start.shape == (53, 8)
    assert np.isfinite(start).all()
    np.testing.assert_array_equal(start, gene_vectors(cohorts, vocabulary, 8, seed=0))


def test_queries_are_hidden_measured_and_have_the_right_targets(folder: Path) -> None:
    corpus, vocabulary, start = build_corpus(folder, TINY)
    model = new_model(vocabulary, start, TINY)
    pad, cls = vocabulary.id_of("<pad>"), vocabulary.id_of("<cls>")
    for step in range(5):
        rng = np.random.default_rng((TINY.seed, step))
        batch = training_batch(corpus, step, TINY, model)
        rng.uniform()
        cells = rng.choice(len(corpus.weight), size=len(batch.gene_id), p=corpus.weight)
        assert (batch.gene_id[:, 0] == cls).all()
        assert (corpus.held_out_weight[cells] == 0).all()
        for row, cell in enumerate(cells):
            digits = corpus.digits[[cell]].toarray()[0]
            visible, queries = batch.gene_id[row, 1 : batch.n_keys], batch.gene_id[row, batch.n_keys :].numpy()
            shown = visible[visible != pad].numpy()
            assert set(shown).isdisjoint(queries)
            np.testing.assert_array_equal(batch.value[row, 1 : 1 + len(shown)].numpy(), digits[shown])
            np.testing.assert_array_equal(batch.target[row].numpy(), digits[queries])
            measured = np.diff(corpus.zero_cdf[corpus.cohort[cell]], prepend=0) > 0
            assert measured[queries[digits[queries] == 0]].all()
            assert 0 < (digits[queries] > 0).sum() <= len(queries) // 2
        torch.testing.assert_close(batch.is_key, batch.gene_id[:, : batch.n_keys] != pad)


def test_a_prediction_depends_on_no_other_query(folder: Path) -> None:
    corpus, vocabulary, start = build_corpus(folder, TINY)
    model = new_model(vocabulary, start, TINY)
    batch = training_batch(corpus, 0, TINY, model)
    one = batch._replace(gene_id=batch.gene_id[:, : batch.n_keys + 1], value=batch.value[:, : batch.n_keys + 1])
    one = one._replace(target=batch.target[:, :1])
    other = torch.cat([one.gene_id, batch.gene_id[:, batch.n_keys + 1 :].flip(1)], dim=1)
    swapped = batch._replace(gene_id=other, target=torch.cat([one.target, batch.target[:, 1:].flip(1)], dim=1))
    torch.testing.assert_close(losses(model, swapped, TINY).gene, losses(model, batch, TINY).gene)
    assert torch.isfinite(losses(model, one, TINY).cell)


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(folder, tmp_path / "whole", TINY).state_dict()

    def killed(corpus: Corpus, step: int, *rest: Any) -> Batch:
        if step == 4:
            raise KeyboardInterrupt
        return training_batch(corpus, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_mini, "training_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(folder, tmp_path / "parts", TINY)
    resumed = pretrain(folder, tmp_path / "parts", TINY).state_dict()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    log = json.loads((tmp_path / "parts" / "log.json").read_text())
    assert [entry["step"] for entry in log] == [3, 6]


def test_the_written_folder_loads_and_predicts_bins(folder: Path, tmp_path: Path) -> None:
    model = pretrain(folder, tmp_path, TINY)
    loaded = load_model(tmp_path / "checkpoint")
    for name, parameter in loaded.named_parameters():
        in_bins = name in ("decoder.fc.4.weight", "decoder.fc.4.bias", "mvc_decoder.W.weight")
        expected = model.get_parameter(name) * (TINY.value_scale if in_bins else 1)
        torch.testing.assert_close(parameter, expected.half().float(), atol=0, rtol=0)


def test_a_run_is_not_resumed_under_other_settings(folder: Path, tmp_path: Path) -> None:
    pretrain(folder, tmp_path, replace(TINY, steps=1))
    with pytest.raises(ValueError, match=r"lr 0\.001 -> 0\.1"):
        pretrain(folder, tmp_path, replace(TINY, lr=0.1))
