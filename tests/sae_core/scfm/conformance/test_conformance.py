"""What every family promises. A new family joins by one entry in KINDS and one case of `checkpoint_of`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sae_core.errors import CheckpointError, ConfigError, TokenizationError, VocabularyError
from sae_core.scfm import CachedActivations, FoundationModel, Site, Tokens, load_model

if TYPE_CHECKING:
    from sae_core.scfm import TokenInfo

KINDS = ("scgpt", "scgpt-finetuned", "geneformer-v1", "geneformer-v2", "scfoundation")
SYMBOLS = [f"GENE{i}" for i in range(40)]
EMPTY_CELL = 3
Checkpoint = Callable[[str], Path]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, checkpoint_of: Checkpoint) -> FoundationModel:
    return load_model(checkpoint_of(kind))


@pytest.fixture
def tokens(model: FoundationModel, counts: sp.csr_matrix) -> Tokens:
    return tokens_of(model, counts)


def tokens_of(
    model: FoundationModel, x: sp.csr_matrix, symbols: list[str] | None = None, seed: int = 0, **options: Any
) -> Tokens:
    return model.tokenize(x.indptr, x.indices, x.data, model.match_genes(symbols or SYMBOLS), seed=seed, **options)


def cells_of(tokens: Tokens) -> list[tuple[bytes, bytes, bytes]]:
    cuts = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tuple(a[i:j].tobytes() for a in (tokens.gene_id, tokens.value, tokens.is_special)) for i, j in cuts]  # type: ignore[misc]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def relative_error(rough: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error of activations, divided by their root mean square."""
    return float((rough - exact).double().norm() / exact.double().norm())


def test_the_family_is_recognised_from_the_folder_and_has_its_name(model: FoundationModel, kind: str) -> None:
    assert model.family == kind.partition("-")[0]
    assert model.name == kind
    assert len(model.digest) == 64
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_a_cells_tokens_depend_on_cell_and_seed_alone(
    model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix
) -> None:
    order = np.random.default_rng(1).permutation(counts.shape[0])
    whole, shuffled = cells_of(tokens), cells_of(tokens_of(model, counts[order]))
    assert [whole[i] for i in order] == shuffled
    assert whole == [cells_of(tokens_of(model, counts[[i]]))[0] for i in range(counts.shape[0])]


def test_tokens_do_not_depend_on_the_order_of_the_columns(
    model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix
) -> None:
    order = np.random.default_rng(2).permutation(counts.shape[1])
    permuted = tokens_of(model, sp.csr_matrix(counts[:, order]), [SYMBOLS[i] for i in order])
    assert cells_of(permuted) == cells_of(tokens)


def test_columns_of_one_gene_are_added(model: FoundationModel, counts: sp.csr_matrix) -> None:
    half = counts.copy()
    half.data = np.floor(half.data / 2)
    split = sp.csr_matrix(sp.hstack([half, counts - half]))
    assert cells_of(tokens_of(model, split, SYMBOLS + SYMBOLS)) == cells_of(tokens_of(model, counts))


def test_log_normalised_values_give_the_tokens_of_the_counts(
    model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix
) -> None:
    logged = counts.copy()
    total = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    logged.data = np.log1p(counts.data / np.repeat(total, np.diff(counts.indptr)) * 1e4).astype(np.float32)
    found = tokens_of(model, logged)
    np.testing.assert_array_equal(found.gene_id, tokens.gene_id)
    np.testing.assert_allclose(found.value, tokens.value, rtol=1e-6)


def test_scaled_values_are_refused(model: FoundationModel) -> None:
    scaled = sp.csr_matrix(np.array([[-1.0, 2.0] + [0.5] * 38], dtype=np.float32))
    with pytest.raises(TokenizationError, match=r"-1 and 2.*--matrix"):
        tokens_of(model, scaled)


def test_data_without_a_known_gene_are_refused_with_both_sides(model: FoundationModel) -> None:
    with pytest.raises(VocabularyError, match="Cd3d"):
        model.match_genes(["Cd3d", "Lyz2"])


def test_a_cell_without_a_known_gene_is_kept_without_tokens_and_embedded_as_nan(
    model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix
) -> None:
    assert tokens.lengths[EMPTY_CELL] == 0
    coverage = model.coverage(counts.indptr, counts.indices, counts.data, model.match_genes(SYMBOLS))
    assert np.flatnonzero(coverage.is_empty).tolist() == [EMPTY_CELL]
    for readout in ("official", *model.readouts):
        embedded = model.embed(tokens, readout=readout)
        assert embedded.isnan().all(1).nonzero().flatten().tolist() == [EMPTY_CELL]
        assert embedded[:EMPTY_CELL].isfinite().all()


def test_data_of_empty_cells_only_run_through(model: FoundationModel) -> None:
    tokens = tokens_of(model, sp.csr_matrix((3, 40), dtype=np.float32))
    assert tokens.n_tokens == 0
    assert model.embed(tokens).isnan().all()
    assert model.activations(tokens, ["layer.0"])[Site.parse("layer.0")].shape == (0, model.d_model)
    assert int(model.pretraining_loss(tokens).n_masked.sum()) == 0


def test_some_cells_can_be_taken_in_any_order(tokens: Tokens) -> None:
    order, whole = [7, EMPTY_CELL, 0, 7], cells_of(tokens)
    assert cells_of(tokens.take(np.array(order))) == [whole[i] for i in order]
    assert tokens.take(np.array([], dtype=np.int64)).n_cells == 0


def test_max_tokens_is_kept_with_the_special_tokens(model: FoundationModel, counts: sp.csr_matrix) -> None:
    whole, cut = tokens_of(model, counts), tokens_of(model, counts, max_tokens=6)
    assert cut.lengths.max() == 6
    n_special = np.bincount(whole.cell_of_token(), whole.is_special, minlength=12)
    np.testing.assert_array_equal(np.bincount(cut.cell_of_token(), cut.is_special, minlength=12), n_special)
    assert cells_of(cut) == cells_of(tokens_of(model, counts, max_tokens=6))


def test_batch_sizes_1_and_64_agree_at_every_site(model: FoundationModel, tokens: Tokens) -> None:
    alone, together = (model.activations(tokens, model.sites, max_batch_tokens=n) for n in (1, 64 * 40))
    for site in model.sites:
        torch.testing.assert_close(alone[site], together[site], atol=1e-5, rtol=0)
    for readout in model.readouts:
        a, b = (model.embed(tokens, readout=readout, max_batch_tokens=n) for n in (1, 64 * 40))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, equal_nan=True)


def test_float64_agrees_with_float32(model: FoundationModel, tokens: Tokens) -> None:
    single = model.activations(tokens, model.sites)
    double = model.double().activations(tokens, model.sites)
    for site in model.sites:
        assert double[site].dtype == torch.float64
        torch.testing.assert_close(double[site].float(), single[site], atol=1e-5, rtol=0)


def test_autocast_keeps_float32_activations_and_its_error_is_small(
    kind: str, checkpoint_of: Checkpoint, counts: sp.csr_matrix
) -> None:
    folder = checkpoint_of(kind)
    model, exact_model = load_model(folder, autocast=torch.bfloat16), load_model(folder)
    tokens = tokens_of(model, counts)
    assert model.embed(tokens).dtype == torch.float32
    site = model.default_site
    rough, exact = (m.activations(tokens, [site])[site] for m in (model, exact_model))
    assert 0 < relative_error(rough, exact) < 0.05


def test_a_patch_that_changes_nothing_is_bitwise_the_unpatched_run(model: FoundationModel, tokens: Tokens) -> None:
    nothing = {site: lambda x, info: x.clone() for site in model.sites}
    plain, patched = model.activations(tokens, model.sites), model.activations(tokens, model.sites, patches=nothing)
    assert all(torch.equal(plain[site], patched[site]) for site in model.sites)
    last = model.sites[-1]
    assert same(model.embed(tokens, site=last), model.embed(tokens, site=last, patches=nothing))
    loss, patched_loss = model.pretraining_loss(tokens), model.pretraining_loss(tokens, patches=nothing)
    assert same(loss.per_cell, patched_loss.per_cell)


@pytest.mark.parametrize("name", ["embedding", "attention.1", "mlp.1", "layer.1"])
def test_a_patch_changes_its_site_and_later_ones_only(model: FoundationModel, tokens: Tokens, name: str) -> None:
    direction = torch.linspace(-1, 1, model.d_model)
    plain = model.activations(tokens, model.sites)
    patched = model.activations(tokens, model.sites, patches={name: lambda x, info: x + direction})
    at = model.sites.index(Site.parse(name))
    for i, site in enumerate(model.sites):
        assert torch.equal(plain[site], patched[site]) == (i < at), str(site)


def test_a_patch_sees_real_tokens_only_each_once(model: FoundationModel, tokens: Tokens) -> None:
    seen: list[TokenInfo] = []
    model.activations(
        tokens, ["layer.0"], patches={"layer.0": lambda x, info: (seen.append(info), x)[1]}, max_batch_tokens=50
    )
    pairs = [(int(c), int(g)) for info in seen for c, g in zip(info.cell, info.gene_id, strict=True)]
    assert sorted(pairs) == sorted(zip(tokens.cell_of_token().tolist(), tokens.gene_id.tolist(), strict=True))
    assert sum(int(info.is_special.sum()) for info in seen) == int(tokens.is_special.sum())


def test_blocks_after_the_deepest_site_are_not_run(
    model: FoundationModel, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.blocks[2], "forward", lambda *a, **k: pytest.fail("the last block was run"))
    model.activations(tokens, ["layer.1", "embedding"])
    model.embed(tokens, site="layer.1")


def test_a_site_that_the_model_lacks_and_a_patch_after_the_readout_are_refused(
    model: FoundationModel, tokens: Tokens
) -> None:
    with pytest.raises(ConfigError, match=r"'layer\.3'.*layer\.2"):
        model.activations(tokens, ["layer.3"])
    if model.final_norm is None:
        with pytest.raises(ConfigError, match=r"'final'.*layer\.2"):
            model.activations(tokens, ["final"])
    with pytest.raises(ConfigError, match=r"layer\.1 .*layer\.0.*`site`"):
        model.embed(tokens, site="layer.0", patches={"layer.1": lambda x, info: x})


def test_a_patch_at_any_site_changes_the_embedding_at_its_readout_site(model: FoundationModel, tokens: Tokens) -> None:
    for site in model.sites:
        at = model.readout_site(site)
        assert at in (model.default_site, model.sites[-1])
        patched = model.embed(tokens, site=at, patches={site: lambda x, info: x * 1.5 + 0.3})
        assert not same(model.embed(tokens, site=at), patched), str(site)


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_cpu(kind: str, checkpoint_of: Checkpoint, counts: sp.csr_matrix) -> None:
    folder = checkpoint_of(kind)
    cpu, gpu = (load_model(folder, device=device) for device in ("cpu", "cuda"))
    tokens = tokens_of(cpu, counts)
    a, b = (model.activations(tokens, model.sites) for model in (cpu, gpu))
    for site in cpu.sites:
        torch.testing.assert_close(a[site], b[site], atol=1e-4, rtol=0)
    site = gpu.default_site
    rough = load_model(folder, device="cuda", autocast=torch.bfloat16).activations(tokens, [site])[site]
    assert relative_error(rough, b[site]) < 0.05


def test_cached_activations_give_what_the_whole_run_gives(model: FoundationModel, tokens: Tokens) -> None:
    site = Site.parse("layer.0")
    x = model.activations(tokens, [site])[site]
    patches = {"layer.1": lambda x, info: x * 0.9}
    options: dict[str, Any] = {"site": model.sites[-1], "patches": patches}
    torch.testing.assert_close(
        model.embed(tokens, cached=CachedActivations(site, x), **options),
        model.embed(tokens, **options),
        equal_nan=True,
    )


def test_readouts_have_their_width_and_others_are_refused(model: FoundationModel, tokens: Tokens) -> None:
    for readout in model.readouts:
        assert model.embed(tokens, readout=readout).shape == (tokens.n_cells, model.width(readout))
    assert same(model.embed(tokens, readout="official"), model.embed(tokens, readout=model.readouts[0]))
    with pytest.raises(ConfigError, match=r"'median'.*mean"):
        model.embed(tokens, readout="median")


def test_the_mean_readout_is_the_mean_of_the_gene_tokens(model: FoundationModel, tokens: Tokens) -> None:
    x = model.activations(tokens, [model.default_site])[model.default_site]
    embedded = model.embed(tokens, readout="mean")
    for cell in np.flatnonzero(tokens.lengths):
        genes = (tokens.cell_of_token() == cell) & ~tokens.is_special
        torch.testing.assert_close(embedded[cell], x[torch.from_numpy(genes)].mean(0), atol=1e-5, rtol=1e-5)


def test_the_pretraining_loss_masks_the_same_genes_of_a_cell_in_any_batch(
    model: FoundationModel, counts: sp.csr_matrix, tokens: Tokens
) -> None:
    loss = model.pretraining_loss(tokens, seed=3)
    assert np.isfinite(loss.mean)
    assert loss.per_cell[EMPTY_CELL].isnan()
    order = np.random.default_rng(5).permutation(counts.shape[0])
    shuffled = model.pretraining_loss(tokens_of(model, counts[order]), seed=3, max_batch_tokens=40)
    torch.testing.assert_close(shuffled.per_cell, loss.per_cell[order], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert torch.equal(shuffled.n_masked, loss.n_masked[order])
    assert model.pretraining_loss(tokens, seed=4).mean != loss.mean


def test_a_patch_changes_the_pretraining_loss(model: FoundationModel, tokens: Tokens) -> None:
    plain = model.pretraining_loss(tokens)
    patched = model.pretraining_loss(tokens, patches={"layer.1": lambda x, info: torch.zeros_like(x)})
    assert torch.equal(plain.n_masked, patched.n_masked)
    assert plain.mean != patched.mean


def test_the_loss_is_the_mean_error_of_the_predictions(kind: str, model: FoundationModel, tokens: Tokens) -> None:
    task = model.mask_genes(tokens, seed=3, fraction=model.mask_fraction)
    predicted = model.masked_gene_prediction(task)
    assert predicted.prediction.isfinite().all()
    assert torch.equal(predicted.gene_id, torch.from_numpy(task.gene_id))
    assert predicted.cell.diff().min() >= 0
    error = -predicted.prediction if kind.startswith("geneformer") else (predicted.prediction - predicted.target) ** 2
    total = torch.zeros(tokens.n_cells).index_add_(0, predicted.cell, error)
    loss = model.pretraining_loss(tokens, seed=3)
    found = total / loss.n_masked
    if kind.startswith("scgpt"):  # whose loss adds the error of a second head
        assert (found <= loss.per_cell)[loss.n_masked > 0].all()
    else:
        torch.testing.assert_close(found.double(), loss.per_cell, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_predictions_from_cached_activations_are_those_of_the_whole_run_and_masked_genes_are_marked(
    kind: str, model: FoundationModel, tokens: Tokens
) -> None:
    task = model.mask_genes(tokens, seed=3, fraction=0.3)
    site, marked = Site.parse("layer.0"), []
    cached = CachedActivations(site, model.activations(task, [site])[site])
    patches = {"layer.1": lambda x, info: (marked.append(info), x * 0.9)[1]}
    whole, rest = (model.masked_gene_prediction(task, patches=patches, cached=start) for start in (None, cached))
    assert torch.equal(whole.prediction, rest.prediction)
    pairs = {
        (int(c), int(p))
        for i in marked
        for c, p in zip(i.cell[i.is_masked_gene], i.position[i.is_masked_gene], strict=True)
    }
    rows = np.array([], dtype=int) if task.token_rows is None else task.token_rows
    cell = task.tokens.cell_of_token()[rows]
    assert pairs == set(zip(cell.tolist(), (rows - task.tokens.offsets[cell]).tolist(), strict=True))


def test_random_weights_are_a_seeded_control(kind: str, checkpoint_of: Checkpoint, counts: sp.csr_matrix) -> None:
    folder = checkpoint_of(kind)
    before = torch.random.get_rng_state()
    models = [load_model(folder), *(load_model(folder, random_init=True, seed=seed) for seed in (1, 1, 2))]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({model.digest for model in models}) == 3
    tokens = tokens_of(models[0], counts)
    x = [model.embed(tokens) for model in models]
    assert same(x[1], x[2])
    assert not same(x[0], x[1])
    assert not same(x[1], x[3])
    assert x[1][0].isfinite().all()


def test_matching_is_by_symbol_or_ensembl_id_where_the_checkpoint_knows_them(kind: str, model: FoundationModel) -> None:
    if kind.startswith("geneformer"):
        ids = [f"ENSG{i + 1:011d}.{i % 7}" for i in range(40)]
        by_id, by_symbol = model.match_genes(ids), model.match_genes(SYMBOLS)
        np.testing.assert_array_equal(by_id.token_id, by_symbol.token_id)
        assert by_id.n_matched == 40
    else:
        assert model.match_genes([*SYMBOLS[:5], "ENSG00000000001"]).n_matched == 5


def test_coverage_says_what_matched(model: FoundationModel, counts: sp.csr_matrix) -> None:
    symbols = [*SYMBOLS[:30], *(f"unknown{i}" for i in range(10))]
    match = model.match_genes(symbols)
    coverage = model.coverage(counts.indptr, counts.indices, counts.data, match)
    dense = counts.toarray()
    assert (coverage.n_genes, coverage.n_matched, coverage.n_vocabulary) == (40, 30, 40)
    assert coverage.share_of_counts == pytest.approx(dense[:, :30].sum() / dense.sum())
    np.testing.assert_array_equal(coverage.genes_per_cell, (dense[:, :30] > 0).sum(1))
    heaviest = coverage.top_unmatched(symbols, 1)
    assert heaviest == {
        f"unknown{dense[:, 30:].sum(0).argmax()}": pytest.approx(dense[:, 30:].sum(0).max() / dense.sum())
    }
    assert coverage.value_kind == "counts"


def test_a_folder_without_its_weights_is_of_no_known_family(kind: str, checkpoint_of: Checkpoint) -> None:
    folder = checkpoint_of(kind)
    for name in ("best_model.pt", "model.safetensors", "models.ckpt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"scgpt.*geneformer.*scfoundation"):
        load_model(folder)
