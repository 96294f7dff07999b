"""Baselines have the directions that numpy and scikit-learn find, and are autoencoders in every other respect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, FastICA

from sae_core.errors import ConfigError, TrainingError
from sae_core.sae import BASELINES, evaluate, fit_baseline, load_sae, save_sae
from sae_core.sae.baselines import fastica

D_MODEL, K, WIDTH = 12, 3, 40


def tokens(n: int, seed: int, d_model: int = D_MODEL) -> torch.Tensor:
    """Mixed heavy-tailed sources, off centre: correlated, not Gaussian, of unequal variance."""
    mix = np.random.default_rng(0).normal(size=(d_model, d_model)) * np.geomspace(3, 0.3, d_model)[:, None]
    sources = np.random.default_rng(seed).laplace(size=(n, d_model))
    return torch.from_numpy((sources @ mix + 5).astype(np.float32))


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    return tokens(8000, 1)


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return tokens(3000, 2)


@pytest.fixture(scope="module")
def fitted(train, held_out):
    return {
        kind: fit_baseline(kind, train, held_out.split(700), k=K, n_features=WIDTH).sae.requires_grad_(False)
        for kind in BASELINES
    }


@pytest.mark.parametrize("kind", BASELINES)
def test_held_out_tokens_have_k_active_features_on_average(kind, fitted, held_out):
    assert evaluate(fitted[kind], [held_out]).l0 == pytest.approx(K, rel=0.02)


@pytest.mark.parametrize("kind", BASELINES)
def test_decoder_rows_have_unit_length_and_a_saved_baseline_gives_the_same_codes(kind, fitted, held_out, tmp_path):
    sae = fitted[kind]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.config.n_features))
    save_sae(sae, tmp_path)
    mine, loaded = sae.encode(held_out), load_sae(tmp_path).encode(held_out)
    torch.testing.assert_close(loaded.to_dense(), mine.to_dense(), rtol=1e-4, atol=1e-4)
    assert (mine.value > 0).all()


@pytest.mark.parametrize("kind", [kind for kind, found in BASELINES.items() if found.signed])
def test_each_direction_has_an_opposite_feature_and_never_both_fire(kind, fitted, held_out):
    sae = fitted[kind]
    half = sae.config.n_features // 2
    torch.testing.assert_close(sae.W_dec[half:], -sae.W_dec[:half])
    codes = sae.encode(held_out).to_dense()
    assert not ((codes[:, :half] > 0) & (codes[:, half:] > 0)).any()


def test_a_neurons_code_is_how_far_it_lies_from_its_mean_where_that_is_above_the_threshold(train, held_out, fitted):
    sae = fitted["neurons"]
    centred = (held_out.double() - train.double().mean(0)).numpy()
    signed = np.concatenate([centred, -centred], axis=1)
    threshold = float(sae.theta[0] * sae.scale)
    border = np.abs(signed - threshold) < 1e-3
    codes = sae.encode(held_out).to_dense().numpy()
    np.testing.assert_allclose(codes[~border], (signed * (signed > threshold))[~border], rtol=1e-3, atol=1e-4)
    assert len(set(sae.theta.tolist())) == 1


def test_of_all_orthogonal_directions_principal_axes_leave_the_least_error(fitted, held_out):
    assert evaluate(fitted["pca"], [held_out]).fvu < evaluate(fitted["neurons"], [held_out]).fvu


def test_principal_axes_are_those_of_scikit_learn_in_its_order(train, fitted):
    axes = PCA(random_state=0).fit(train.double().numpy()).components_
    cosine = (fitted["pca"].W_dec[:D_MODEL].numpy() * axes).sum(axis=1)
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-4)


def test_all_principal_components_together_reconstruct_exactly(train, held_out):
    sae = fit_baseline("pca", train, [held_out], k=D_MODEL, n_features=WIDTH).sae
    assert evaluate(sae, [held_out]).fvu < 1e-6


def test_independent_components_are_those_of_scikit_learn(train, held_out, fitted):
    theirs = FastICA(whiten="unit-variance", random_state=0, tol=1e-6, max_iter=1000).fit(train.double().numpy())
    mine = fitted["ica"].W_enc[:D_MODEL].double().numpy()
    mine /= np.linalg.norm(mine, axis=1, keepdims=True)
    other = theirs.components_ / np.linalg.norm(theirs.components_, axis=1, keepdims=True)
    best = np.abs(mine @ other.T).max(axis=1)
    np.testing.assert_allclose(best, 1, atol=2e-3)
    written = theirs.mixing_ / np.linalg.norm(theirs.mixing_, axis=0)
    np.testing.assert_allclose(np.abs(fitted["ica"].W_dec[:D_MODEL].numpy() @ written).max(axis=1), 1, atol=2e-3)


def test_the_fixed_point_takes_the_same_steps_as_scikit_learns_from_one_start():
    rng = np.random.default_rng(3)
    white = PCA(whiten=True).fit_transform(rng.laplace(size=(4000, 6)) @ rng.normal(size=(6, 6)))
    white /= white.std(axis=0)
    start = rng.normal(size=(6, 6))
    their = FastICA(whiten=False, w_init=start, tol=1e-4, max_iter=200).fit(white)
    found = fastica(torch.from_numpy(white), torch.from_numpy(start))
    assert found.n_iterations == their.n_iter_
    assert found.change <= 1e-4
    np.testing.assert_allclose(found.rotation.numpy(), their.components_, atol=1e-6)


def test_an_ica_that_has_not_settled_says_so(train, held_out):
    white = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    found = fastica(white, torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), n_iterations=2, tolerance=0.0)
    assert found.n_iterations == 2
    assert found.change > 0
    assert fit_baseline("ica", train, [held_out], k=K, n_features=WIDTH).notes.keys() == {
        "ica_iterations",
        "ica_change",
    }


def test_sources_of_ica_add_up_to_the_activation(train, held_out):
    sae = fit_baseline("ica", train, [held_out], k=D_MODEL, n_features=WIDTH).sae
    assert evaluate(sae, [held_out]).fvu < 1e-6


def test_random_directions_have_the_width_asked_for_and_follow_the_seed(train, held_out):
    def rows(seed: int) -> torch.Tensor:
        return fit_baseline("random", train, [held_out], k=K, n_features=WIDTH, seed=seed).sae.W_dec

    assert rows(0).shape == (WIDTH, D_MODEL)
    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))


def test_directions_without_variance_are_no_components_and_a_constant_neuron_never_fires(train, held_out):
    def flat(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, 3 * torch.ones(len(x), 1), x.sum(dim=1, keepdim=True)], dim=1)

    for kind in ("pca", "ica"):
        assert fit_baseline(kind, flat(train), [flat(held_out)], k=K, n_features=WIDTH).sae.config.n_features == 24
    neurons = fit_baseline("neurons", flat(train), [flat(held_out)], k=K, n_features=WIDTH).sae
    fired = evaluate(neurons, [flat(held_out)]).density
    assert fired[D_MODEL] == fired[2 * D_MODEL + 2] == 0


def test_what_cannot_be_fitted_is_refused(train, held_out):
    with pytest.raises(ConfigError, match=r"'umap'.*neurons, pca, ica, random"):
        fit_baseline("umap", train, [held_out], k=K, n_features=WIDTH)
    with pytest.raises(ConfigError, match=r"k = 25\b.*\b24\b"):
        fit_baseline("pca", train, [held_out], k=25, n_features=WIDTH)
    with pytest.raises(ConfigError, match=r"\b0 tokens"):
        fit_baseline("pca", train, [], k=K, n_features=WIDTH)
    with pytest.raises(TrainingError, match="token 0 "):
        fit_baseline("pca", train * torch.nan, [held_out], k=K, n_features=WIDTH)
