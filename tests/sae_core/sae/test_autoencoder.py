from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.sae import ARCHITECTURES, SAEConfig, SparseAutoencoder, SparseCodes
from sae_core.sae import autoencoder as module


def unfolded(arch: str = "batchtopk", *, d_model: int = 6, n_features: int = 20, seed: int = 0) -> SparseAutoencoder:
    """An autoencoder with every part away from its default, whose inputs are far from centred and large."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(SAEConfig(d_model=d_model, n_features=n_features, k=3, arch=arch), generator=generator)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator))
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.b_dec.normal_(0, 0.1, generator=generator)
        sae.theta.uniform_(0.2, 0.4, generator=generator)
    sae.mu.normal_(5, 2, generator=generator)
    sae.scale.fill_(7.0)
    return sae


def activations(n_tokens: int = 50, d_model: int = 6, seed: int = 1) -> torch.Tensor:
    return 5 + 7 / d_model**0.5 * torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(seed))


def test_decoder_rows_start_as_unit_directions_the_encoder_as_their_copy_and_biases_at_zero():
    sae = SparseAutoencoder(SAEConfig(d_model=6, n_features=20, k=3))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_the_same_generator_seed_gives_the_same_weights_and_the_global_one_is_untouched():
    config = SAEConfig(d_model=6, n_features=20, k=3)
    before = torch.get_rng_state()
    a, b, c = (SparseAutoencoder(config, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, c.W_dec)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_encode_and_decode_equal_the_equations_written_densely(arch):
    sae, x = unfolded(arch), activations()
    pre = (((x - sae.mu) / sae.scale) @ sae.W_enc.T + sae.b_enc).relu()
    if arch == "topk":
        value, index = pre.topk(3, dim=1)
        z = 7.0 * torch.zeros_like(pre).scatter(1, index, value)
    else:
        z = 7.0 * torch.where(pre > sae.theta, pre, 0.0)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), z)
    torch.testing.assert_close(sae.decode(codes), z @ sae.W_dec + 7.0 * sae.b_dec + sae.mu)
    assert torch.equal(sae(x), sae.decode(codes))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folding_changes_neither_codes_nor_reconstructions_of_raw_activations(arch):
    sae, x = unfolded(arch), activations()
    folded = sae.folded()
    codes, same = sae.encode(x), folded.encode(x)
    assert torch.equal(codes.crow, same.crow)
    assert torch.equal(codes.col, same.col)
    torch.testing.assert_close(codes.value, same.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(codes), folded.decode(same), rtol=1e-5, atol=1e-5)


def test_a_folded_autoencoder_has_no_normaliser_left_and_keeps_unit_directions():
    sae = unfolded()
    folded = sae.folded()
    assert not folded.mu.any()
    assert folded.scale == 1.0
    assert torch.equal(folded.W_dec, sae.W_dec)
    assert torch.equal(folded.W_enc, sae.W_enc)
    assert not any(p.requires_grad for p in folded.parameters())


def test_folding_twice_equals_folding_once_bit_for_bit():
    once = unfolded().folded()
    twice = once.folded()
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steering_a_feature_adds_its_direction_in_raw_units_and_nothing_else(arch):
    sae, x = unfolded(arch).folded().requires_grad_(False), activations()
    codes = sae.encode(x)
    dense = codes.to_dense()
    dense[:, 4] = 2.5
    step = sae.decode(SparseCodes.from_dense(dense)) - sae.decode(codes)
    expected = (2.5 - codes.to_dense()[:, 4:5]) * sae.W_dec[4]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


def test_a_code_of_one_feature_moves_the_reconstruction_by_its_value_along_its_direction():
    sae = unfolded()
    nothing = SparseCodes.from_dense(torch.zeros(1, 20))
    one = torch.zeros(1, 20)
    one[0, 4] = 2.5
    step = sae.decode(SparseCodes.from_dense(one)) - sae.decode(nothing)
    torch.testing.assert_close(step[0], 2.5 * sae.W_dec[4])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_tokens_code_does_not_depend_on_the_tokens_beside_it(arch):
    sae, x = unfolded(arch), activations()
    together = sae.encode(x).to_dense()
    alone = torch.cat([sae.encode(x[i : i + 1]).to_dense() for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_encoding_in_chunks_equals_encoding_at_once(monkeypatch):
    sae, x = unfolded(), activations()
    whole = sae.encode(x)
    monkeypatch.setattr(module, "MAX_DENSE", 7 * 20)
    chunked = sae.encode(x)
    assert torch.equal(whole.crow, chunked.crow)
    torch.testing.assert_close(whole.to_dense(), chunked.to_dense())


def test_no_token_gives_empty_codes():
    sae = unfolded()
    assert sae.encode(torch.zeros(0, 6)).n_tokens == 0
    assert sae(torch.zeros(0, 6)).shape == (0, 6)


def test_activations_and_codes_of_another_width_are_refused():
    sae = unfolded()
    with pytest.raises(ConfigError, match=r"d_model = 5\b.*\b6\b"):
        sae.encode(torch.zeros(2, 5))
    with pytest.raises(ConfigError, match=r"n_features = 21\b.*\b20\b"):
        sae.decode(SparseCodes.from_dense(torch.zeros(2, 21)))


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"arch = 'vanilla'.*batchtopk, gated, jumprelu"):
        SparseAutoencoder(SAEConfig(d_model=2, n_features=4, k=1, arch="vanilla"))
