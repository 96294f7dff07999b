"""Recovery: 1 for a perfect reconstruction, 0 for an ablation, and a reason where it cannot be measured."""

import json

import numpy as np
import pytest
import torch
from sealed_files import rewrite_sealed

from feature_store.cells import SELECT, read_split_numbers
from feature_store.storage import commit
from feature_store.storage.layout import SOURCE_FILE, Layout
from pipelines.inputs import load_recorded_model
from pipelines.loss_recovered import RecoveryProbe, probe, value_or_reason
from sae_core.sae import load_sae


class Scaled:
    """In the place of an autoencoder: activations times a number."""

    def __init__(self, factor):
        self.factor = factor

    def encode(self, x):
        return x

    def decode(self, z):
        return self.factor * z


@pytest.fixture
def activations(chain):
    return commit.Run.open(Layout(chain.store).latest("activations").path)


@pytest.fixture
def measured(chain, activations):
    cells = np.flatnonzero(read_split_numbers(Layout(chain.store).cells_dir(activations.plan["dataset"])) == SELECT)
    found = probe(activations, str(chain.store), cells, device="cpu")
    assert isinstance(found, RecoveryProbe)
    return found


def test_a_perfect_copy_recovers_all_and_zeros_nothing(measured):
    assert measured.of(Scaled(1.0)).embedding == 1.0
    assert measured.of(Scaled(0.0)).embedding == 0.0


def test_recovery_is_one_minus_a_ratio_of_mean_squared_errors(chain, activations, measured):
    sae = load_sae(Layout(chain.store).latest("saes").path)
    model, tokens = load_recorded_model(activations), measured.tokens

    def embedded(change):
        def patch(x, info):
            return torch.where(info.is_special[:, None], x, change(x))

        return model.embed(tokens, site="layer.2", patches={"layer.1": patch}).double()

    whole = embedded(lambda x: x)
    hat, zero = embedded(lambda x: sae.decode(sae.encode(x))), embedded(torch.zeros_like)
    expected = 1 - float((hat - whole).square().mean() / (zero - whole).square().mean())
    assert measured.of(sae).embedding == pytest.approx(expected, rel=1e-6)


def test_the_losses_are_the_models_own_with_each_replacement(activations, measured):
    model, tokens = load_recorded_model(activations), measured.tokens

    def loss(factor):
        def patch(x, info):
            return torch.where(info.is_special[:, None], x, factor * x)

        return float(model.pretraining_loss(tokens, patches={"layer.1": patch}).per_cell.nanmean())

    found = measured.of(Scaled(0.5))
    assert found.losses == pytest.approx((loss(1.0), loss(0.5), loss(0.0)), rel=1e-6)


@pytest.mark.parametrize(("ablated", "expected"), [([5.0, 6.0, 7.2], 0.75), ([5.0, 2.0, 3.0], None)])
def test_the_loss_has_a_recovery_where_an_ablation_clearly_costs(measured, monkeypatch, ablated, expected):
    whole = torch.tensor([1.0, 2.0, 3.0])
    cost = torch.tensor(ablated) - whole
    monkeypatch.setattr(measured, "_loss_whole", whole)
    monkeypatch.setattr(measured, "_loss_ablated", torch.tensor(ablated))
    monkeypatch.setattr(measured, "_loss", lambda patch: whole + 0.25 * cost)
    found = measured.of(Scaled(1.0)).loss
    if expected is None:
        assert "chance" in found
    else:
        assert found == pytest.approx(expected)


def test_the_summary_of_a_training_has_it(chain):
    summary = json.loads((Layout(chain.store).latest("saes").path / "summary.json").read_text())
    assert 0 < summary["select_recovery"] <= 1
    assert summary["recovery_cells"] > 0


def test_a_source_that_is_gone_or_vectors_of_cells_are_a_reason_and_no_error(chain, activations, own_store):
    layout = Layout(own_store)
    file = layout.cells_dir(activations.plan["dataset"]) / SOURCE_FILE
    rewrite_sealed(file, path=str(own_store / "away.h5ad"))
    said = probe(activations, str(own_store), np.arange(3), device="cpu")
    assert isinstance(said, str)
    assert "away.h5ad" in said
    assert probe(activations, str(own_store), np.arange(0), device="cpu") == "there is no `select` cell"


def test_memory_that_runs_out_is_a_reason_and_a_mistake_in_the_code_is_none():
    def fails(error):
        def make():
            raise error

        return make

    assert value_or_reason(fails(torch.OutOfMemoryError("CUDA out of memory"))) == "CUDA out of memory"
    assert value_or_reason(fails(FileNotFoundError("gone"))) == "gone"
    with pytest.raises(RuntimeError, match="shapes"):
        value_or_reason(fails(RuntimeError("shapes differ")))


def test_no_cells_asked_for_is_said_in_the_summary(chain, own_store, without_actors):
    from pipelines.train import train

    facts = train(chain.train.model_copy(update={"recovery_cells": 0, "n_steps": 3}), own_store).facts
    assert "--recovery-cells 0" in facts["select_recovery"]
    summary = json.loads((Layout(own_store).latest("saes").path / "summary.json").read_text())
    assert set(summary["missing"]) == {"select_recovery", "select_recovery_loss"}
    assert "--recovery-cells 0" in summary["missing"]["select_recovery"]
    assert "select_recovery" not in summary
