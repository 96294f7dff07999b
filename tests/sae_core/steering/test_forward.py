"""Exactness, in float32 on one thread: a cell alone, in any batch and beside steered cells has the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.scfm import FoundationModel, Site, TokenInfo, Tokens, load_model
from sae_core.steering import (
    Ablate,
    Add,
    Clamp,
    Displace,
    GroupMeans,
    Intervention,
    Scale,
    Shift,
    SteeredModel,
    Steering,
    Toward,
    random_direction,
)

if TYPE_CHECKING:
    from pathlib import Path

    import scipy.sparse as sp

KINDS = ("scgpt", "geneformer-v1", "geneformer-v2", "scfoundation")
SYMBOLS = [f"GENE{i}" for i in range(40)]
EMPTY_CELL, N_CELLS, D, N_FEATURES = 3, 12, 16, 64
FEATURES = list(range(1, 64, 5))
GROUPS = torch.arange(N_CELLS) % 3
SITES = ("embedding", "layer.1", "attention.1", "mlp.0", "final")
Loaded = Callable[[str], FoundationModel]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def loaded(checkpoint_of: Callable[[str], Path]) -> Loaded:
    return lambda kind: load_model(checkpoint_of(kind))


@pytest.fixture
def dictionary() -> Callable[..., SparseAutoencoder]:
    def make(arch: str = "batchtopk", seed: int = 0) -> SparseAutoencoder:
        generator = torch.Generator().manual_seed(seed)
        sae = SparseAutoencoder(SAEConfig(d_model=D, n_features=N_FEATURES, k=6, arch=arch), generator=generator)
        sae.requires_grad_(False)
        sae.b_dec.normal_(0, 0.1, generator=generator)
        sae.theta.fill_(0.3)
        return sae

    return make


@pytest.fixture
def tokens_of(counts: sp.csr_matrix) -> Callable[[FoundationModel], Tokens]:
    def run(model: FoundationModel) -> Tokens:
        match = model.match_genes(SYMBOLS)
        return model.tokenize(counts.indptr, counts.indices, counts.data, match, seed=0)

    return run


def group_means(n_genes: int, seed: int = 0, columns: int = len(FEATURES)) -> GroupMeans:
    """For two of three groups and most of the genes."""
    generator = torch.Generator().manual_seed(seed)
    keys = (torch.rand(2 * n_genes, generator=generator) < 0.8).nonzero().squeeze(1)
    values = torch.randn(len(keys), columns, generator=generator)
    return GroupMeans(group=keys // n_genes, gene_id=keys % n_genes, values=values)


INTERVENTIONS: dict[str, Intervention] = {
    "ablate": Ablate(features=FEATURES),
    "ablate all": Ablate(features=range(N_FEATURES)),  # more than d_model: the sparse way
    "clamp": Clamp(features=FEATURES, dose=2.0, unit=torch.linspace(0.1, 1, N_FEATURES)),
    "add": Add(features=FEATURES, dose=0.7),
    "scale": Scale(features=FEATURES, factor=1.7),
    "toward": Toward(features=FEATURES, mean_code=torch.linspace(0, 2, N_FEATURES), amount=0.5),
    "toward by group": Toward(features=FEATURES, mean_code=group_means(50), group_of_cell=GROUPS),
    "shift": Shift(
        features=FEATURES,
        difference=group_means(50, 1),
        amount=torch.linspace(0, 2, N_FEATURES),
        group_of_cell=GROUPS,
    ),
}


def of_cells(steering: Steering | Displace, cells: list[int]) -> Steering | Displace:
    """The same steering for some of the cells alone."""
    if isinstance(steering, Displace):
        return replace(steering, group_of_cell=GROUPS[cells])
    if steering.groups is None:
        return steering
    return replace(steering, intervention=replace(steering.intervention, group_of_cell=GROUPS[cells]))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def last(model: FoundationModel) -> Site:
    return model.sites[-1]


def assert_exact(
    model: FoundationModel, tokens: Tokens, sae: SparseAutoencoder, site: str, steerings: list[Steering | Displace]
) -> None:
    together, at = SteeredModel(model, tokens, sae, site), last(model)
    subsets = [[5], [EMPTY_CELL], [8, 3, 0]]
    parts = [SteeredModel(model, tokens.take(np.array(cells)), sae, site, is_part=True) for cells in subsets]
    for steering in steerings:
        whole = together.embeddings(steering, [at])[at]
        assert whole.isnan().all(1).nonzero().flatten().tolist() == [EMPTY_CELL]
        assert not same(whole, together.embeddings(None, [at])[at])
        for cells, part in zip(subsets, parts, strict=True):
            assert same(part.embeddings(of_cells(steering, cells), [at])[at], whole[cells]), (site, steering, cells)


@pytest.mark.parametrize("kind", KINDS)
def test_a_steered_cell_has_the_same_bits_alone_and_in_any_batch(kind, loaded, dictionary, tokens_of):
    model, sae = loaded(kind), dictionary()
    steerings: list[Steering | Displace] = [Steering(sae=sae, intervention=i) for i in INTERVENTIONS.values()]
    steerings += [
        Steering(sae=sae, intervention=INTERVENTIONS["shift"], include_special=True, mode="replace"),
        Steering(sae=sae, intervention=INTERVENTIONS["add"], direction=random_direction(D, seed=0)),
        Steering(sae=sae, intervention=INTERVENTIONS["clamp"], positions=range(1, 20, 2)),
        Displace(vectors=group_means(50, 2, D), group_of_cell=GROUPS),
    ]
    assert_exact(model, tokens_of(model), sae, "layer.0", steerings)


@pytest.mark.parametrize("site", SITES)
def test_it_has_them_at_every_kind_of_site(site, loaded, dictionary, tokens_of):
    model, sae = loaded("scfoundation"), dictionary()
    assert_exact(model, tokens_of(model), sae, site, [Steering(sae=sae, intervention=INTERVENTIONS["shift"])])


@pytest.mark.parametrize(
    "arch",
    ["topk", *(pytest.param(a, marks=pytest.mark.slow) for a in ("matryoshka", "jumprelu", "gated", "standard"))],
)
def test_it_has_them_with_every_architecture(arch, loaded, dictionary, tokens_of):
    model, sae = loaded("scgpt"), dictionary(arch)
    steerings = [Steering(sae=sae, intervention=INTERVENTIONS[name]) for name in ("ablate", "toward by group")]
    assert_exact(model, tokens_of(model), sae, "layer.1", steerings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dose_of_zero_is_the_unsteered_embedding_bit_for_bit(kind, loaded, dictionary, tokens_of):
    model, sae = loaded(kind), dictionary()
    tokens, at = tokens_of(model), last(model)
    running = SteeredModel(model, tokens, sae, "layer.1")
    plain = model.embeddings(tokens, [at], max_batch_tokens=1)[at]
    assert same(running.embeddings(None, [at])[at], plain)
    nothing = [
        Add(features=FEATURES, dose=0.0),
        Scale(features=FEATURES, factor=1.0),
        replace(INTERVENTIONS["toward by group"], amount=0.0),
        replace(INTERVENTIONS["shift"], amount=torch.zeros(N_FEATURES)),
    ]
    for intervention in nothing:
        steering = Steering(sae=sae, intervention=intervention)
        assert same(running.embeddings(steering, [at])[at], plain)
        assert same(model.embeddings(tokens, [at], patches={"layer.1": steering}, max_batch_tokens=1)[at], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_steering_one_cell_changes_no_bit_of_another(kind, loaded, dictionary, tokens_of):
    model, sae = loaded(kind), dictionary()
    running, at = SteeredModel(model, tokens_of(model), sae, "layer.0"), last(model)
    plain = running.embeddings(None, [at])[at]
    for mode in ("delta", "replace"):
        steering = Steering(sae=sae, intervention=INTERVENTIONS["add"], cells=[4], mode=mode)
        steered = running.embeddings(steering, [at])[at]
        assert [c for c in range(N_CELLS) if not same(steered[[c]], plain[[c]])] == [4]


@pytest.mark.parametrize("site", SITES)
def test_it_is_what_the_patch_gives_in_a_whole_run(site, loaded, dictionary, tokens_of):
    model, sae = loaded("scfoundation"), dictionary()
    tokens, at = tokens_of(model), last(model)
    running = SteeredModel(model, tokens, sae, site)
    for name, mode in (("ablate all", "delta"), ("toward by group", "delta"), ("shift", "replace")):
        steering = Steering(sae=sae, intervention=INTERVENTIONS[name], mode=mode)
        whole = model.embeddings(tokens, [at], readout="all", patches={site: steering})[at]
        found = running.embeddings(steering, [at], readout="all")[at]
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0, equal_nan=True)


def test_tokens_without_a_row_and_cells_of_no_group_keep_their_bits(loaded, dictionary, tokens_of):
    model, sae = loaded("scgpt"), dictionary()
    running = SteeredModel(model, tokens_of(model), sae, "layer.0")
    table = group_means(50, 1)
    assert table.gene_id is not None
    steering = Steering(
        sae=sae, intervention=Shift(features=FEATURES, difference=table, group_of_cell=GROUPS), include_special=True
    )
    moved = (steering(running.x, running.info) != running.x).any(1)
    rows = set(zip(table.group.tolist(), table.gene_id.tolist(), strict=True))
    pairs = zip(GROUPS[running.info.cell].tolist(), running.info.gene_id.tolist(), strict=True)
    assert moved.tolist() == [pair in rows for pair in pairs]


def test_every_token_is_encoded_once_and_blocks_before_the_site_run_once(
    loaded, dictionary, tokens_of, monkeypatch: pytest.MonkeyPatch
):
    model, sae = loaded("scgpt"), dictionary()
    tokens, at = tokens_of(model), last(model)
    runs = [0, 0, 0]
    for i, block in enumerate(model.blocks):
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *a, i=i, f=forward, **k: (runs.__setitem__(i, runs[i] + 1), f(*a, **k))[1]
        )
    running, n = SteeredModel(model, tokens, sae, "layer.1"), N_CELLS - 1
    assert runs == [n, n, 0]
    monkeypatch.setattr(SparseAutoencoder, "encode", lambda *_: pytest.fail("encoded again"))
    for name in ("ablate", "add", "clamp"):
        running.embeddings(Steering(sae=sae, intervention=INTERVENTIONS[name], mode="replace"), [at])
    running.embeddings(Steering(sae=sae, intervention=INTERVENTIONS["add"], cells=[1, 2]), [at])
    # all cells as they are, all cells three times, and the two that are steered
    assert runs == [n, n, 4 * n + 2]


@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_asked_the_same_genes_whatever_the_steering_and_its_queries_are_steered_if_asked_for(
    kind, with_queries, loaded, dictionary, tokens_of
):
    model, sae = loaded(kind), dictionary()
    tokens = tokens_of(model)
    running = SteeredModel(model, tokens, sae, "layer.0")
    steering = Steering(sae=sae, intervention=INTERVENTIONS["add"], include_masked_genes=with_queries)
    plain, steered = (running.masked_gene_prediction(s, seed=1, fraction=0.3) for s in (None, steering))
    for name in ("cell", "gene_id", "target"):
        assert torch.equal(getattr(plain, name), getattr(steered, name))
    assert (plain.prediction != steered.prediction).float().mean() > 0.9
    question = model.mask_genes(tokens, seed=1, fraction=0.3)
    assert torch.equal(plain.prediction, model.masked_gene_prediction(question, max_batch_tokens=1).prediction)
    seen: list[tuple[torch.Tensor, torch.Tensor, TokenInfo]] = []

    def spy(x: torch.Tensor, info: TokenInfo) -> torch.Tensor:
        seen.append((x, steering(x, info), info))
        return seen[-1][1]

    patched = model.masked_gene_prediction(question, patches={"layer.0": spy}, max_batch_tokens=1)
    torch.testing.assert_close(patched.prediction, steered.prediction, atol=1e-5, rtol=1e-5)
    for before, after, i in seen:
        chosen = ~i.is_special | i.is_masked_gene if with_queries else ~(i.is_masked_gene | i.is_special)
        assert torch.equal((before != after).any(1), chosen)
    n_queries = sum(int(i.is_masked_gene.sum()) for *_, i in seen)
    assert n_queries == (0 if kind == "scfoundation" else len(question.cell))


def test_answers_of_a_cell_have_the_same_bits_alone_and_with_others(loaded, dictionary, tokens_of):
    for kind in KINDS:
        model, sae = loaded(kind), dictionary()
        tokens = tokens_of(model)
        steering = Steering(sae=sae, intervention=INTERVENTIONS["shift"])
        whole = SteeredModel(model, tokens, sae, "layer.0").masked_gene_prediction(steering, seed=1, fraction=0.3)
        own = SteeredModel(model, tokens.take(np.array([5])), sae, "layer.0", is_part=True)
        alone = own.masked_gene_prediction(of_cells(steering, [5]), seed=1, fraction=0.3)
        assert same(alone.prediction, whole.prediction[whole.cell == 5])


def test_what_does_not_fit_is_refused_before_anything_runs(loaded, dictionary, tokens_of, monkeypatch):
    model, sae = loaded("scgpt"), dictionary()
    tokens, at = tokens_of(model), last(model)
    wide = SparseAutoencoder(SAEConfig(d_model=8, n_features=16, k=2))
    with pytest.raises(ConfigError, match=r"d_model = 8\b.*\b16\b"):
        SteeredModel(model, tokens, wide, "layer.0")
    for site in ("layer.3", "attention.7", "final"):
        with pytest.raises(ConfigError, match=site):
            SteeredModel(model, tokens, sae, site)
    running, part = (SteeredModel(model, tokens, sae, "layer.1", is_part=is_part) for is_part in (False, True))
    plain = part.embeddings(None, [at])[at]
    with pytest.raises(ConfigError, match=r"layer\.1 .*layer\.0"):
        running.embeddings(None, ["layer.0"])
    monkeypatch.setattr(type(model), "_run", lambda *_: pytest.fail("the model was run"))
    nowhere = Steering(sae=sae, intervention=INTERVENTIONS["add"], cells=[EMPTY_CELL])
    with pytest.raises(ConfigError, match=rf"cells = \[{EMPTY_CELL}\]"):
        running.embeddings(nowhere, [at])
    with pytest.raises(ConfigError, match=rf"cells = \[{EMPTY_CELL}\]"):
        running.masked_gene_prediction(nowhere)
    assert same(part.embeddings(nowhere, [at])[at], plain)
    with pytest.raises(ConfigError, match="autoencoder"):
        running.embeddings(Steering(sae=dictionary(seed=1), intervention=INTERVENTIONS["add"]), [at])
    short = Shift(features=FEATURES, difference=group_means(50), group_of_cell=GROUPS[:-1])
    with pytest.raises(ConfigError, match=r"group_of_cell has 11 .*12 cells"):
        running.embeddings(Steering(sae=sae, intervention=short), [at])


def test_reduced_precision_and_cells_without_tokens_run_through(checkpoint_of, dictionary, tokens_of):
    folder, sae = checkpoint_of("scgpt"), dictionary()
    steering = Steering(sae=sae, intervention=INTERVENTIONS["shift"])
    exact = load_model(folder)
    tokens, at = tokens_of(exact), last(exact)
    wanted = SteeredModel(exact, tokens, sae, "layer.0").embeddings(steering, [at])[at]
    rough = load_model(folder, autocast=torch.bfloat16)
    found = SteeredModel(rough, tokens, sae, "layer.0").embeddings(steering, [at])[at]
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1, equal_nan=True)
    half = exact.to(torch.bfloat16)
    found = SteeredModel(half, tokens, sae, "layer.0").embeddings(steering, [at])[at]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.3, rtol=0.1, equal_nan=True)
    nobody = tokens.take(np.array([EMPTY_CELL, EMPTY_CELL]))
    empty = SteeredModel(half, nobody, sae, "layer.0", is_part=True)
    assert empty.embeddings(of_cells(steering, [0, 1]), [at])[at].isnan().all()
    assert empty.masked_gene_prediction(None).prediction.numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_numbers_of_the_cpu(kind, checkpoint_of, dictionary, tokens_of):
    folder, sae, found = checkpoint_of(kind), dictionary(), []
    for device in ("cpu", "cuda"):
        model, own = load_model(folder, device=device), sae.to(device)
        running, at = SteeredModel(model, tokens_of(model), own, "layer.0"), last(model)
        steerings = [Steering(sae=own, intervention=i) for i in INTERVENTIONS.values()]
        found.append([running.embeddings(s, [at])[at] for s in (None, *steerings)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, equal_nan=True)
