from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.scfm import CachedActivations, ScGPT, Site, TokenInfo, Tokens
from sae_core.scfm.foundation import plan_batches

if TYPE_CHECKING:
    import scipy.sparse as sp

Tokenize = Callable[..., Tokens]


def all_sites(model: ScGPT, tokens: Tokens, **options: object) -> dict[Site, torch.Tensor]:
    return model.activations(tokens, model.sites, **options)  # type: ignore[arg-type]


def test_a_cell_has_the_same_activations_whatever_the_batch_size(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    for max_batch_tokens in (1, 40, 100):
        small = all_sites(tiny, tokens, max_batch_tokens=max_batch_tokens)
        for site, x in all_sites(tiny, tokens).items():
            torch.testing.assert_close(small[site], x, atol=1e-5, rtol=0)


def test_a_cell_has_the_same_activations_whatever_its_neighbours_and_order(
    tiny: ScGPT, tokenize: Tokenize, counts: sp.csr_matrix
) -> None:
    tokens = tokenize(tiny)
    x = tiny.activations(tokens, ["layer.2"])[Site.parse("layer.2")]
    order = np.random.default_rng(1).permutation(counts.shape[0])
    shuffled_tokens = tokenize(tiny, counts[order])
    shuffled = tiny.activations(shuffled_tokens, ["layer.2"])[Site.parse("layer.2")]
    for row, cell in enumerate(order):
        here = slice(*tokens.offsets[cell : cell + 2])
        there = slice(*shuffled_tokens.offsets[row : row + 2])
        torch.testing.assert_close(shuffled[there], x[here], atol=1e-5, rtol=0)
        alone = tiny.activations(tokenize(tiny, counts[[cell]]), ["layer.2"])[Site.parse("layer.2")]
        torch.testing.assert_close(alone, x[here], atol=1e-5, rtol=0)


def test_activations_equal_a_plain_loop_over_single_cells(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    found = tiny.activations(tokens, ["embedding", "layer.0", "layer.2"])
    for cell in range(tokens.n_cells):
        here = slice(*tokens.offsets[cell : cell + 2])
        if here.start == here.stop:
            continue
        ids, values = torch.from_numpy(tokens.gene_id[here])[None], torch.from_numpy(tokens.value[here])[None]
        with torch.no_grad():
            x = tiny.encoder(ids) + tiny.value_encoder(values)
            torch.testing.assert_close(found[Site.parse("embedding")][here], x[0], atol=1e-5, rtol=0)
            for i, block in enumerate(tiny.blocks):
                x = block(x, index=i)
                if (site := Site(kind="layer", index=i)) in found:
                    torch.testing.assert_close(found[site][here], x[0], atol=1e-5, rtol=0)


def test_a_patch_that_changes_nothing_is_bitwise_the_unpatched_run(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    plain = all_sites(tiny, tokens)
    patched = all_sites(tiny, tokens, patches={site: lambda x, info: x for site in tiny.sites})
    assert all(torch.equal(plain[site], patched[site]) for site in tiny.sites)
    same = tiny.embed(tokens, patches={"layer.1": lambda x, info: x.clone()})
    assert torch.equal(tiny.embed(tokens), same) or torch.equal(tiny.embed(tokens).isnan(), same.isnan())
    assert torch.equal(tiny.embed(tokens).nan_to_num(), same.nan_to_num())


@pytest.mark.parametrize("name", ["embedding", "attention.1", "mlp.1", "layer.1"])
def test_a_patch_changes_its_site_and_later_ones_only(tiny: ScGPT, tokenize: Tokenize, name: str) -> None:
    tokens = tokenize(tiny)
    plain = all_sites(tiny, tokens)
    direction = torch.linspace(-1, 1, tiny.d_model)
    patched = all_sites(tiny, tokens, patches={name: lambda x, info: x + direction})
    at = tiny.sites.index(Site.parse(name))
    for i, site in enumerate(tiny.sites):
        assert torch.equal(plain[site], patched[site]) == (i < at), str(site)
    torch.testing.assert_close(patched[Site.parse(name)], plain[Site.parse(name)] + direction)


def test_a_patch_sees_every_real_token_once_with_its_gene_and_cell(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    seen: list[TokenInfo] = []

    def look(x: torch.Tensor, info: TokenInfo) -> torch.Tensor:
        assert len(x) == len(info.gene_id) == len(info.cell) == len(info.is_special)
        seen.append(info)
        return x

    tiny.activations(tokens, ["layer.0"], patches={"embedding": look}, max_batch_tokens=50)
    pairs = {(int(c), int(g)) for info in seen for c, g in zip(info.cell, info.gene_id, strict=True)}
    assert pairs == set(zip(tokens.cell_of_token().tolist(), tokens.gene_id.tolist(), strict=True))
    assert sum(len(info.cell) for info in seen) == tokens.n_tokens
    assert sum(int(info.is_special.sum()) for info in seen) == int(tokens.is_special.sum())


def test_a_patch_of_one_cell_leaves_the_others_alone(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    plain, patched = (
        tiny.embed(tokens, patches=patches)
        for patches in (None, {"layer.0": lambda x, info: torch.where((info.cell == 5)[:, None], x * 2, x)})
    )
    changed = (plain != patched).any(1) & ~plain.isnan().any(1)
    assert changed.nonzero().flatten().tolist() == [5]


def test_a_patch_that_changes_the_shape_is_refused(tiny: ScGPT, tokenize: Tokenize) -> None:
    with pytest.raises(ConfigError, match=r"layer\.0.*\(1, 16\)"):
        tiny.embed(tokenize(tiny), patches={"layer.0": lambda x, info: x[:1]})


@pytest.mark.parametrize("name", ["embedding", "layer.0", "layer.2"])
def test_a_run_from_cached_activations_is_bitwise_the_whole_run_with_and_without_a_patch(
    tiny: ScGPT, tokenize: Tokenize, name: str
) -> None:
    tokens = tokenize(tiny)
    cached = CachedActivations(name, tiny.activations(tokens, [name])[Site.parse(name)])
    for patches in ({}, {name: lambda x, _: x + 1.0}):
        whole, rest = (tiny.embed(tokens, patches=patches, cached=start) for start in (None, cached))
        assert torch.equal(whole.nan_to_num(7.0), rest.nan_to_num(7.0))


def test_cached_activations_of_other_tokens_or_after_a_patch_are_refused(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    x = tiny.activations(tokens, ["layer.1"])[Site.parse("layer.1")]
    with pytest.raises(ConfigError, match=r"\(\d+, 16\).*`activations`"):
        tiny.embed(tokens, cached=CachedActivations("layer.1", x[1:]))
    with pytest.raises(ConfigError, match=r"layer\.0 .*layer\.1; leave out `cached`"):
        tiny.embed(tokens, cached=CachedActivations("layer.1", x), patches={"layer.0": lambda x, _: x})


def test_blocks_after_the_deepest_site_are_not_run(
    tiny: ScGPT, tokenize: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.blocks[2], "forward", lambda *a, **k: pytest.fail("the last block was run"))
    tiny.activations(tokenize(tiny), ["layer.1", "embedding"])
    tiny.embed(tokenize(tiny), site="layer.1")


def test_a_site_the_model_lacks_is_refused_with_those_it_has(tiny: ScGPT, tokenize: Tokenize) -> None:
    with pytest.raises(ConfigError, match=r"layer\.3.*layer\.2"):
        tiny.activations(tokenize(tiny), ["layer.3"])
    with pytest.raises(ConfigError, match=r"'mlp\.0'"):
        tiny.embed(tokenize(tiny), site="mlp.0")


def test_mean_readout_is_the_mean_of_gene_tokens_and_nan_without_any(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    x = tiny.activations(tokens, ["layer.2"])[Site.parse("layer.2")]
    embedded = tiny.embed(tokens)
    for cell in range(tokens.n_cells):
        here = (tokens.cell_of_token() == cell) & ~tokens.is_special
        if here.any():
            torch.testing.assert_close(embedded[cell], x[torch.from_numpy(here)].mean(0))
        else:
            assert embedded[cell].isnan().all()
    assert embedded.isnan().all(1).nonzero().flatten().tolist() == [3]


def test_cls_readout_is_the_unit_vector_of_position_zero(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    x = tiny.activations(tokens, ["layer.1"])[Site.parse("layer.1")][torch.from_numpy(tokens.is_special)]
    embedded = tiny.embed(tokens, readout="cls", site="layer.1")
    filled = ~embedded.isnan().any(1)
    torch.testing.assert_close(embedded[filled], x / x.norm(dim=1, keepdim=True))


def test_float64_model_gives_float64_activations_close_to_float32(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens, site = tokenize(tiny), Site.parse("layer.2")
    single = tiny.activations(tokens, [site])[site]
    double = tiny.double().activations(tokens, [site])[site]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-5, rtol=0)


def test_batches_hold_every_cell_with_tokens_once_and_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(0, 900, 500)
    batches = plan_batches(lengths, 4000)
    assert sorted(np.concatenate(batches).tolist()) == np.flatnonzero(lengths).tolist()
    for cells in batches:
        assert len(cells) * lengths[cells].max() <= 4000
        assert lengths[cells].max() <= 1.25 * lengths[cells].min() + 4
    with pytest.raises(ConfigError, match=r"max_batch_tokens.*0"):
        plan_batches(lengths, 0)
