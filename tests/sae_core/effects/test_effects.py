"""Effects by gene: against a loop of single forwards, and on a model whose causes are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_model import EARLY, constructed, random_cells, unit_autoencoder
from mini_cells import mini_cells, random_autoencoder
from tiny_checkpoints import write_tiny

from sae_core.effects import EffectSums, HiddenGenes, add_cell, draw_directions
from sae_core.errors import ConfigError
from sae_core.scfm import CachedActivations, Tokens, load_model
from sae_core.steering import Ablate, Clamp, SteeredModel, Steering

N_NULLS, N_DRAWN = 3, 8


@pytest.fixture(scope="module")
def mini():
    return load_model("mini")


@pytest.fixture(scope="module")
def sae(mini):
    return random_autoencoder(mini.d_model)


@pytest.mark.parametrize("site", ["layer.0", "mlp.1", "embedding"])
def test_effects_are_those_of_steering_one_variant_at_a_time(mini, sae, site):
    tokens = mini_cells(mini, seed=1)
    cell = HiddenGenes(mini, tokens, sae, site, seed=3)
    feature = int((cell.codes * cell.is_visible[:, None]).sum(0).argmax())
    directions = draw_directions(sae.W_dec, feature, torch.rand(64) + 0.1, n_nulls=N_NULLS, seed=0)
    sums = EffectSums(len(mini.vocabulary), 1 + 2 * N_NULLS)
    assert add_cell(sums, cell, feature, directions, boosted=2.5, donor=0)
    found = sums.mean()
    running = SteeredModel(mini, tokens, sae, site)
    before = running.masked_gene_prediction(None, seed=3)
    unit = torch.full((64,), 2.5)
    # a clamp acts on every token, the boost only where the feature fires
    fires = np.flatnonzero(((cell.codes[:, feature] > 0) & cell.is_visible).numpy()).tolist()
    order = np.argsort(before.gene_id.numpy())
    for i, intervention in enumerate([Ablate(features=[feature]), Clamp(features=[feature], dose=1.0, unit=unit)]):
        after = running.masked_gene_prediction(Steering(sae=sae, intervention=intervention, positions=fires), seed=3)
        np.testing.assert_allclose(found.effect[i, 0], (after.prediction - before.prediction)[order], atol=2e-5)
    np.testing.assert_array_equal(found.gene_id, np.sort(before.gene_id.numpy()))
    assert found.n_cells_fired == 1
    assert found.n_tokens == len(fires)


def test_null_steps_have_the_length_and_the_tokens_of_the_features(mini, sae):
    cell = HiddenGenes(mini, mini_cells(mini, seed=2), sae, "layer.1", seed=0)
    feature = int((cell.codes * cell.is_visible[:, None]).sum(0).argmax())
    directions = draw_directions(sae.W_dec, feature, torch.ones(64), n_nulls=N_NULLS, seed=0)
    z = (cell.codes[:, feature] * cell.is_visible)[:, None]
    sums = EffectSums(len(mini.vocabulary), 1 + 2 * N_NULLS)
    add_cell(sums, cell, feature, directions, boosted=2.5, donor=0)
    order = np.argsort(cell.gene_id)
    for j, direction in enumerate(directions.all):
        moved = cell.x - z * directions.norm * direction
        expected = (cell.answers(moved[None]) - cell.answers(cell.x[None]))[0, order]
        np.testing.assert_allclose(sums.mean().effect[0, j], expected, atol=2e-5)
    np.testing.assert_allclose(torch.linalg.vector_norm(directions.all, dim=1), 1.0, rtol=1e-5)


def test_the_direct_path_skips_the_blocks_and_has_mean_zero(mini, sae):
    tokens = mini_cells(mini, seed=4)
    cell = HiddenGenes(mini, tokens, sae, "layer.1", seed=0)
    feature = int((cell.codes * cell.is_visible[:, None]).sum(0).argmax())
    directions = draw_directions(sae.W_dec, feature, torch.ones(64), n_nulls=2, seed=0)
    sums = EffectSums(len(mini.vocabulary), 5)
    add_cell(sums, cell, feature, directions, boosted=2.5, donor=0)
    task = mini.mask_genes(tokens, seed=0, fraction=mini.mask_fraction)
    ((at, x),) = mini.activations(task, [f"layer.{mini.n_layers - 1}"]).items()
    z = cell.codes[:, feature][(cell.codes[:, feature] > 0) & cell.is_visible]
    moved = x.clone()
    moved[task.token_rows] -= z.mean() * sae.W_dec[feature]
    answers = [mini.masked_gene_prediction(task, cached=CachedActivations(at, own)).prediction for own in (x, moved)]
    expected = answers[1] - answers[0]
    expected = (expected - expected.mean())[np.argsort(task.gene_id)]
    np.testing.assert_allclose(sums.mean().direct[0], expected, atol=2e-5)
    assert abs(sums.mean().direct.mean()) < 1e-6


def test_a_cell_in_which_the_feature_does_not_fire_adds_nothing(mini, sae):
    cell = HiddenGenes(mini, mini_cells(mini, seed=5), sae, "layer.1")
    cell.codes[:, 7] = 0
    sums = EffectSums(len(mini.vocabulary), 5)
    directions = draw_directions(sae.W_dec, 7, torch.ones(64), n_nulls=2, seed=0)
    assert not add_cell(sums, cell, 7, directions, boosted=1.0, donor=0)
    assert sums.mean().gene_id.size == 0


def test_in_a_causal_model_a_gene_has_an_effect_only_in_cells_where_the_feature_fires_before_it(tmp_path):
    model = load_model(write_tiny(tmp_path, "transcriptformer"))
    sae = random_autoencoder(model.d_model, theta=0.0)
    tokens = Tokens(
        offsets=np.array([0, 22]),
        gene_id=np.r_[48, 2, np.arange(7, 27)],
        value=np.r_[1, 1, np.arange(20) % 5 + 1].astype(np.float32),
        is_special=np.arange(22) < 2,
    )
    cell = HiddenGenes(model, tokens, sae, "layer.0", seed=0)
    at = int(cell.is_visible.nonzero()[8, 0])
    cell.codes[:, 7] = 0
    cell.codes[at, 7] = 2.0
    sums = EffectSums(len(model.vocabulary), 5)
    directions = draw_directions(sae.W_dec, 7, torch.ones(64), n_nulls=2, seed=0)
    assert add_cell(sums, cell, 7, directions, boosted=5.0, donor=0)
    reached = [gene for gene in cell.gene_id.tolist() if gene - 7 + 2 > at]
    assert 0 < len(reached) < len(cell.gene_id)
    assert sums.mean().gene_id.tolist() == reached
    moved = cell.x.clone()
    moved[at] -= 2.0 * directions.norm * directions.own
    expected = (cell.answers(moved[None]) - cell.answers(cell.x[None]))[0]
    np.testing.assert_allclose(sums.mean().effect[0, 0], expected[-len(reached) :], atol=1e-6)
    # where it fires behind all of them, the cell says nothing
    cell.codes[:, 7] = 0
    cell.codes[-1, 7] = 2.0
    assert cell.rows_of(7).tolist() == [21]
    assert not add_cell(EffectSums(len(model.vocabulary), 5), cell, 7, directions, boosted=5.0, donor=0)


def test_means_cells_and_donors_are_counted_by_gene():
    sums = EffectSums(10, 3)
    for donor, genes in ((0, [1, 2]), (0, [2, 3]), (4, [2])):
        ones = np.ones((2, 3, len(genes))) * (donor + 1)
        sums.add(np.array(genes), ones, ones[:, 0], donor=donor, n_tokens=2)
    found = sums.mean()
    assert found.gene_id.tolist() == [1, 2, 3]
    assert found.n_cells.tolist() == [1, 3, 1]
    assert found.n_donors.tolist() == [1, 2, 1]
    np.testing.assert_allclose(found.effect[0, 0], [1, 7 / 3, 1])
    np.testing.assert_allclose(found.direct[1], [1, 7 / 3, 1])
    assert (found.n_tokens, found.n_cells_fired) == (6, 3)


def test_draws_depend_on_seed_and_feature_alone(sae):
    density = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    one, same = (draw_directions(sae.W_dec, 3, density, n_nulls=4, seed=0) for _ in range(2))
    torch.testing.assert_close(one.all, same.all, rtol=0, atol=0)
    for feature, seed in ((4, 0), (3, 1)):
        other = draw_directions(sae.W_dec, feature, density, n_nulls=4, seed=seed)
        assert not torch.isclose(one.random, other.random).any(1).all()
    # a mixture is in the span of the other features of like density
    few = density.clone()
    few[5:] = 0
    mixed = draw_directions(sae.W_dec, 3, few, n_nulls=4, seed=0).mixture.double()
    basis = sae.W_dec[[0, 1, 2, 4]].double()
    rest = mixed - mixed @ torch.linalg.pinv(basis) @ basis
    assert rest.abs().max() < 1e-6


def test_wrong_inputs_are_refused(mini, sae):
    with pytest.raises(ConfigError, match="2 cells"):
        HiddenGenes(mini, mini_cells(mini, seed=0).take(np.array([0, 0])), sae, "layer.1")
    with pytest.raises(ConfigError, match="d_model = 8"):
        HiddenGenes(mini, mini_cells(mini, seed=0), random_autoencoder(8), "layer.1")
    with pytest.raises(ConfigError, match="and 1 fire"):
        draw_directions(sae.W_dec, 0, torch.tensor([1.0, 1.0] + [0.0] * 62), n_nulls=4, seed=0)


def all_effects(model, tokens, sae, site, *, n_nulls=N_DRAWN, seed=0):
    """The effect of every feature, its nulls and the genes: arrays [intervention, feature, direction, gene]."""
    cells = [HiddenGenes(model, tokens.take(np.array([c])), sae, site, seed=seed) for c in range(tokens.n_cells)]
    density = torch.stack([(cell.codes > 0).double().mean(0) for cell in cells]).mean(0)
    n_features, n_tokens = sae.config.n_features, len(model.vocabulary)
    found = np.full((2, n_features, 1 + 2 * n_nulls, n_tokens), np.nan)
    for feature in range(n_features):
        sums = EffectSums(n_tokens, 1 + 2 * n_nulls)
        directions = draw_directions(sae.W_dec, feature, density, n_nulls=n_nulls, seed=seed)
        for cell in cells:
            add_cell(sums, cell, feature, directions, boosted=4.0, donor=0)
        own = sums.mean()
        found[:, feature][:, :, own.gene_id] = own.effect
    return found


def scored(found, n_nulls=N_DRAWN):
    """q over all features, genes and interventions, of the larger p of the two nulls; and which were tested."""
    from feature_store.associations.multiple_testing import benjamini_hochberg
    from feature_store.effects import EffectBlock, pool_nulls

    kinds = (slice(1, 1 + n_nulls), slice(1 + n_nulls, None))
    p = []
    for own in found:
        blocks = [EffectBlock(effect=own[:, 0], draws=own[:, kind]) for kind in kinds]
        each = [pool_nulls(lambda b=block: [b], own.shape[-1]).scores(block).p for block in blocks]
        p.append(np.maximum(*each))
    p = np.stack(p)
    is_tested = np.isfinite(found[:, :, 0])
    assert np.isfinite(p[is_tested]).all()
    q = np.full(p.shape, np.nan)
    q[is_tested] = benjamini_hochberg(p[is_tested])
    return q, is_tested


@pytest.mark.parametrize("n_draws", [1, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.usefixtures("one_thread")
def test_known_causes_are_found_and_inert_features_are_not(n_draws):
    hits, found, planted, inert, n_inert = 0, 0, 0, 0, 0
    for draw in range(n_draws):
        rng = np.random.default_rng(draw)
        model = constructed(rng)
        q, is_tested = scored(all_effects(model, random_cells(rng, 24), unit_autoencoder(EARLY), "layer.0", seed=draw))
        is_cause = np.pad(model.layers[2].weight != 0, ((0, 0), (1, 0)))  # the first token is <pad>
        is_inert = ~is_cause.any(1)
        chosen = q <= 0.05
        hits += (chosen & is_cause).sum()
        found += chosen.sum()
        planted += (is_cause & is_tested).sum()
        inert += chosen[:, is_inert].any((0, 2)).sum()
        n_inert += is_inert.sum()
    assert hits / planted > 0.95
    assert hits / found > 0.95
    assert inert / n_inert <= 0.05


@pytest.mark.parametrize("n_replicates", [1, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.usefixtures("one_thread")
def test_random_directions_in_place_of_features_change_no_gene_beyond_their_nulls(mini, n_replicates):
    n_wrong = 0
    for replicate in range(n_replicates):
        sae = random_autoencoder(mini.d_model, n_features=16, theta=1.0, seed=replicate)
        tokens = mini_cells(mini, 8, n_genes=30, of=60, seed=replicate)
        q, is_tested = scored(all_effects(mini, tokens, sae, "layer.1", n_nulls=4, seed=replicate), n_nulls=4)
        assert is_tested.sum() > 500
        n_wrong += (q <= 0.05).any()
    # a discovery is wrong whatever it is, so that the share of replicates with one is the realised false discovery rate
    assert n_wrong / n_replicates <= 0.05
