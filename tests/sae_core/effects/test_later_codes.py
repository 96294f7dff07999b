"""Effects on later features: against single passes, and on a model whose circuits are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_model import EARLY, LATER, N_EARLY, N_LATER, constructed, random_cells, unit_autoencoder
from mini_cells import mini_cells, random_autoencoder

from feature_store.associations.multiple_testing import benjamini_hochberg
from feature_store.effects import EffectBlock, pool_nulls
from pipelines.circuit.tables import PRIOR
from sae_core.effects import LaterCodes, LaterSums, add_later, draw_directions
from sae_core.errors import ConfigError
from sae_core.scfm import CachedActivations, load_model

N_NULLS = 16


@pytest.fixture(scope="module")
def mini():
    return load_model("mini")


@pytest.mark.parametrize(
    ("site", "later_site"),
    [("layer.0", "layer.2"), ("embedding", "layer.1"), ("mlp.1", "layer.3"), ("attention.1", "mlp.1")],
)
def test_effects_are_those_of_one_patched_pass_at_a_time(mini, site, later_site):
    sae, later = random_autoencoder(mini.d_model, seed=0), random_autoencoder(mini.d_model, theta=0.1, seed=1)
    tokens = mini_cells(mini, 1, n_genes=20)
    cell = LaterCodes(mini, tokens, sae, site, later_sae=later, later_site=later_site)
    feature = int((cell.codes * cell.is_visible[:, None]).sum(0).argmax())
    directions = draw_directions(sae.W_dec, feature, torch.ones(64), n_nulls=3, seed=0)
    sums = LaterSums(64, 7)
    assert add_later(sums, cell, feature, directions, donor=0)
    found = sums.mean(min_cells=0)

    genes = torch.from_numpy(~tokens.is_special)
    z = (cell.codes[:, feature] * genes)[:, None]

    def mean_codes(patch):
        (after,) = mini.activations(tokens, [later_site], patches={site: patch}).values()
        return later.encode(after).to_dense()[genes].mean(0)

    before = mean_codes(lambda x, _: x)
    assert (before > 0).any()
    np.testing.assert_allclose(found.base, before, atol=2e-5)
    for j, direction in enumerate(directions.all):
        after = mean_codes(lambda x, _, step=z * directions.norm * direction: x - step)
        np.testing.assert_allclose(found.effect[j], after - before, atol=2e-5)
    np.testing.assert_allclose(found.of_donor, found.effect[:1])


def test_gradients_of_a_continued_pass_are_those_of_finite_differences(mini):
    model = mini.double()
    try:
        tokens = mini_cells(model, 3, n_genes=5)
        found = model.activations(tokens, ["layer.0", "layer.2"])
        start, expected = found.values()
        after = model.continued(tokens, CachedActivations("layer.0", start), "layer.2", max_batch_tokens=8)
        torch.testing.assert_close(after.detach(), expected)
        x, weight = start.clone().requires_grad_(), torch.randn(expected.shape[1], dtype=torch.float64)

        def total(x):
            return (model.continued(tokens, CachedActivations("layer.0", x), "layer.2")[7] * weight).sum()

        (gradient,) = torch.autograd.grad(total(x), x)
        assert (gradient[6:12] != 0).any()
        assert (gradient[:6] == 0).all()  # of another cell
        step = torch.zeros_like(start)
        step[8, 3] = 1e-6
        with torch.no_grad():
            slope = (total(start + step) - total(start - step)) / 2e-6
        torch.testing.assert_close(gradient[8, 3], slope, rtol=1e-5, atol=1e-8)
    finally:
        mini.float()


def test_a_continued_pass_goes_forward_only(mini):
    tokens = mini_cells(mini, 1, n_genes=20)
    (x,) = mini.activations(tokens, ["layer.2"]).values()
    with pytest.raises(ConfigError, match=r"'layer.1' comes before 'layer.2'"):
        mini.continued(tokens, CachedActivations("layer.2", x), "layer.1")


def test_means_donors_and_later_features_are_counted():
    sums = LaterSums(3, 2)
    before = np.array([1.0, 0.0, 0.0])
    for donor, change in ((0, -1.0), (0, -0.5), (4, 0.5)):
        sums.add(before, before + np.array([[change, 0.0, 0.0], [0.1, 0.2, 0.3]]), donor=donor)
    found = sums.mean(min_cells=2)
    assert found.feature_id.tolist() == [0]
    assert found.n_cells_fired.tolist() == [3]
    np.testing.assert_allclose(found.effect[:, 0], [-1 / 3, 0.1])
    np.testing.assert_allclose(found.of_donor, [[-0.75], [0.5]])
    assert found.n_cells == 3
    # a later feature that only a null direction wakes is none of the feature's
    assert sums.mean(min_cells=1).feature_id.tolist() == [0]
    assert LaterSums(3, 2).mean(min_cells=1).feature_id.size == 0


def test_wrong_sites_and_widths_are_refused(mini):
    tokens, sae = mini_cells(mini, 1, n_genes=20), random_autoencoder(mini.d_model, seed=0)
    for site, later, words in (
        ("layer.2", "layer.1", r"'layer.1' does not come after 'layer.2'"),
        ("layer.1", "layer.1", r"does not come after"),
        ("layer.1", "layer.9", r"no site 'layer.9'; allowed: embedding"),
    ):
        with pytest.raises(ConfigError, match=words):
            LaterCodes(mini, tokens, sae, site, later_sae=sae, later_site=later)
    with pytest.raises(ConfigError, match="d_model = 8"):
        LaterCodes(mini, tokens, sae, "layer.1", later_sae=random_autoencoder(8, seed=0), later_site="layer.2")
    with pytest.raises(ConfigError, match="2 cells"):
        LaterCodes(mini, mini_cells(mini, 2, n_genes=20), sae, "layer.1", later_sae=sae, later_site="layer.2")


def all_edges(model, tokens, *, seed):
    """q of every pair of an early and a later feature, over all pairs, by the larger p of the two nulls."""
    early, later = unit_autoencoder(EARLY), unit_autoencoder(LATER, threshold=0.01)
    cells = [
        LaterCodes(model, tokens.take(np.array([c])), early, "layer.0", later_sae=later, later_site="layer.2")
        for c in range(tokens.n_cells)
    ]
    density = torch.stack([(cell.codes > 0).double().mean(0) for cell in cells]).mean(0)
    found = np.zeros((N_EARLY, 1 + 2 * N_NULLS, N_LATER))
    for feature in range(N_EARLY):
        sums = LaterSums(N_LATER, 1 + 2 * N_NULLS)
        directions = draw_directions(early.W_dec, feature, density, n_nulls=N_NULLS, seed=seed)
        for cell in cells:
            add_later(sums, cell, feature, directions, donor=0)
        found[feature] = sums.mean(min_cells=0).effect
    p = []
    for kind in (slice(1, 1 + N_NULLS), slice(1 + N_NULLS, None)):
        block = EffectBlock(effect=found[:, 0], draws=found[:, kind])
        p.append(pool_nulls(lambda block=block: [block], N_LATER, prior=PRIOR).scores(block).p)
    return benjamini_hochberg(np.nan_to_num(np.maximum(*p), nan=1.0)), found[:, 0]


@pytest.mark.parametrize("n_draws", [1, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.usefixtures("one_thread")
def test_known_circuits_are_found_and_inert_features_have_no_edges(n_draws):
    hits, found, planted, inert, n_inert = 0, 0, 0, 0, 0
    for draw in range(n_draws):
        rng = np.random.default_rng(draw)
        model = constructed(rng)
        q, effect = all_edges(model, random_cells(rng, 12), seed=draw)
        is_edge = (model.layers[2].later != 0).numpy()
        is_inert = ~is_edge.any(1)
        chosen = q <= 0.05
        assert (effect[chosen & is_edge] < 0).all()  # without its cause a later feature is weaker
        hits += (chosen & is_edge).sum()
        found += chosen.sum()
        planted += is_edge.sum()
        inert += chosen[is_inert].any(1).sum()
        n_inert += is_inert.sum()
    assert hits / planted > 0.95
    assert hits / found > 0.95
    assert inert / n_inert <= 0.05
