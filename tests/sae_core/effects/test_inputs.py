"""What genes do to features: against shorter cells run alone, and on a model whose inputs are known."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from constructed_model import (
    D_MODEL_WITH_NOISE,
    EARLY,
    LATER,
    N_EARLY,
    N_GENES,
    N_LATER,
    ConstructedModel,
    Nothing,
    constructed,
    random_cells,
    unit_autoencoder,
)
from mini_cells import mini_cells, random_autoencoder

from sae_core.effects import CellGenes, CellInputs, GeneMeans, InputGenes, InputSums, add_cell_inputs, choose_genes
from sae_core.effects import inputs as inputs_module
from sae_core.effects.candidates import levels, sums_by_gene
from sae_core.effects.inputs import without_each
from sae_core.errors import ConfigError
from sae_core.scfm import CachedActivations, Site, Tokens, load_model

EMBEDDING = Site(kind="embedding")


@pytest.fixture(scope="module")
def mini():
    return load_model("mini")


@pytest.fixture(scope="module")
def sae(mini):
    return random_autoencoder(mini.d_model)


def densest(model, tokens, sae, site, n=3) -> list[int]:
    """The features with the largest sums over the gene tokens of a cell."""
    every = CellInputs(model, tokens, sae, site, range(sae.config.n_features))
    return np.sort(every.total.numpy().argsort()[-n:]).tolist()


def only(gene_id) -> InputGenes:
    """Genes that are tested, without null genes."""
    return InputGenes(gene_id=np.array(gene_id), of=np.array(gene_id))


def hand_cell(genes, values) -> Tokens:
    """A cell of the constructed model."""
    return Tokens(
        offsets=np.array([0, len(genes)]),
        gene_id=np.array(genes, np.int64) + 1,
        value=np.array(values, np.float32),
        is_special=np.zeros(len(genes), dtype=bool),
    )


def hand_model() -> ConstructedModel:
    """Early feature 0 causes later feature 2 with weight 5."""
    later = torch.zeros(N_EARLY, N_LATER)
    later[0, 2] = 5.0
    return ConstructedModel(torch.zeros(N_EARLY, N_GENES), later).eval()


@pytest.mark.parametrize("site", ["layer.0", "mlp.1", "layer.2", "embedding"])
def test_the_attribution_is_the_slope_of_the_sum_along_what_a_token_has_beyond_the_mean(mini, sae, site):
    model, sae, tokens = deepcopy(mini).double(), deepcopy(sae).double(), mini_cells(mini, n_genes=12, seed=1)
    features = densest(model, tokens, sae, site)
    cell = CellInputs(model, tokens, sae, site, features)
    found = cell.attributions()
    x = model.activations(tokens, [EMBEDDING])[EMBEDDING]
    beyond = x - x[1:].mean(0)  # without <cls>

    def sums(x):
        at = model.continued(tokens, CachedActivations(EMBEDDING, x), site).detach()
        pre = sae.pre_activations(sae.normalise(at))[:, features] * sae.scale
        return (pre * (cell.codes > 0)).sum(0)

    for token in range(1, tokens.n_tokens, 3):
        step = torch.zeros_like(x)
        step[token] = 1e-5 * beyond[token]
        slope = (sums(x + step) - sums(x - step)) / 2e-5
        np.testing.assert_allclose(found[:, token], slope, rtol=1e-4, atol=1e-6)
    assert (cell.total > 0).all()


def test_attributions_and_paths_of_a_cell_that_can_be_worked_out_by_hand():
    # genes 0 and 48 carry early feature 0, gene 5 does not: the mean of the feature is 1, and every later code is 5
    tokens, genes = hand_cell([0, N_EARLY, 5], [1.0, 2.0, 1.5]), only([1, 6, N_EARLY + 1])
    cell = CellInputs(hand_model(), tokens, unit_autoencoder(EARLY, LATER), "layer.2", [0, N_EARLY + 2])
    assert cell.total.tolist() == pytest.approx([3.0, 15.0])
    np.testing.assert_allclose(cell.attributions(), [[0, 1, 0], [0, 5, -5]], atol=1e-5)
    sums = [InputSums(genes) for _ in range(2)]
    add_cell_inputs(sums, cell, donor=0)
    early, later = (own.mean() for own in sums)
    np.testing.assert_allclose(early.own, [1, 0, 2], atol=1e-5)
    np.testing.assert_allclose(early.other, [0, 0, 0], atol=1e-5)
    # without gene 48 two tokens have 2.5; without gene 5 two tokens have 7.5, so that they make up for its own 5
    np.testing.assert_allclose(later.own, [5, 5, 5], atol=1e-5)
    np.testing.assert_allclose(later.other, [0, -5, 5], atol=1e-5)
    np.testing.assert_allclose(later.total, [15, 15, 15], rtol=1e-6)
    np.testing.assert_allclose(later.gradient, [0, -5, 5], atol=1e-5)


def test_all_tokens_of_a_repeated_gene_are_left_out_together_and_the_gene_counts_once():
    # gene 0 stands twice in the cell, as a gene that was drawn twice
    tokens, genes = hand_cell([0, N_EARLY, 0, 5], [1.0, 2.0, 1.0, 1.5]), only([1, 6, N_EARLY + 1])
    cell = CellInputs(hand_model(), tokens, unit_autoencoder(EARLY, LATER), "layer.2", [0, N_EARLY + 2])
    alone = CellInputs(
        hand_model(), hand_cell([N_EARLY, 5], [2.0, 1.5]), unit_autoencoder(EARLY, LATER), "layer.2", [0, N_EARLY + 2]
    )
    assert without_each(tokens, np.array([2, 1])).lengths.tolist() == [2, 3]
    np.testing.assert_allclose(cell.totals_without(np.array([2]))[0], alone.total, rtol=1e-6)
    sums = [InputSums(genes) for _ in range(2)]
    add_cell_inputs(sums, cell, donor=0)
    early, later = (own.mean() for own in sums)
    assert cell.total.tolist() == pytest.approx([4.0, 20.0])
    np.testing.assert_allclose(early.own, [2, 0, 2], atol=1e-5)
    np.testing.assert_allclose(early.other, [0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(later.own, [10, 5, 5], atol=1e-5)
    # without gene 0 the mean of the feature is 1 in two tokens; without gene 48, 2/3 in three
    np.testing.assert_allclose(later.total - later.own - later.other, [10, 20, 10], atol=1e-4)
    assert early.n_cells.tolist() == [1, 1, 1]
    cells = CellGenes(N_GENES + 1)
    cells.add(tokens)
    assert cells.beside(1).n[[1, 6, N_EARLY + 1]].tolist() == [1, 1, 1]
    ids, found = sums_by_gene(tokens.gene_id, np.array([1.0, 2.0, 3.0, 4.0]))
    assert ids.tolist() == [1, 6, N_EARLY + 1]
    assert found.tolist() == [4.0, 4.0, 2.0]


@pytest.mark.parametrize("site", ["layer.0", "mlp.1", "layer.2", "embedding"])
def test_a_cell_without_a_token_is_the_shorter_cell_run_by_itself(mini, sae, site):
    tokens = mini_cells(mini, seed=2)
    features = densest(mini, tokens, sae, site)
    rows = np.array([1, 7, 30])
    found = CellInputs(mini, tokens, sae, site, features).totals_without(rows)
    for i, row in enumerate(rows):
        kept = np.delete(np.arange(tokens.n_tokens), row)
        shorter = Tokens(
            offsets=np.array([0, len(kept)]),
            gene_id=tokens.gene_id[kept],
            value=tokens.value[kept],
            is_special=tokens.is_special[kept],
        )
        alone = CellInputs(mini, shorter, sae, site, features)
        np.testing.assert_allclose(found[i], alone.total, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(without_each(tokens, rows).cells(i, i + 1).gene_id, shorter.gene_id)
        np.testing.assert_array_equal(without_each(tokens, rows).cells(i, i + 1).value, shorter.value)


def test_batches_do_not_change_what_is_left(mini, sae, monkeypatch):
    tokens = mini_cells(mini, seed=3)
    cell = CellInputs(mini, tokens, sae, "layer.1", densest(mini, tokens, sae, "layer.1"))
    rows = np.arange(1, 12)
    together = cell.totals_without(rows)
    monkeypatch.setattr(inputs_module, "MAX_NUMBERS", 3 * 30 * mini.d_model)
    np.testing.assert_allclose(cell.totals_without(rows), together, rtol=1e-5)
    assert cell.totals_without(rows[:0]).shape == (0, 3)


def test_both_paths_add_up_to_the_fall_of_the_sum_over_gene_tokens(mini, sae):
    tokens = mini_cells(mini, seed=4)
    features = densest(mini, tokens, sae, "layer.1")
    cell = CellInputs(mini, tokens, sae, "layer.1", features)
    genes = [np.sort(tokens.gene_id[1 + j : 20 + j]) for j in range(3)]
    sums = [InputSums(only(own)) for own in genes]
    add_cell_inputs(sums, cell, donor=0)
    every = sae.encode(mini.activations(tokens, ["layer.1"])[Site.parse("layer.1")]).to_dense()[1:, features]
    np.testing.assert_allclose(cell.total, every.sum(0), rtol=1e-5)
    for j, own in enumerate(own.mean() for own in sums):
        rows = np.searchsorted(tokens.gene_id[1:], own.gene_id) + 1
        without = cell.totals_without(rows)[:, j].numpy()
        np.testing.assert_array_equal(own.gene_id, genes[j])
        np.testing.assert_allclose(own.own + own.other, float(cell.total[j]) - without, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(own.own, every[rows - 1, j], rtol=1e-4, atol=1e-5)


def test_means_cells_and_donors_are_counted_by_gene():
    sums = InputSums(InputGenes(gene_id=np.array([1, 2, 3, 7]), of=np.array([1, 1, 3, 7])))
    for donor, places, total in ((0, [0, 1], 4.0), (0, [1, 2], 2.0), (4, [1], 6.0)):
        value = np.full(len(places), total / 2)
        sums.add(np.array(places), total=total, own=value, other=-value, gradient=2 * value, donor=donor)
    found = sums.mean()
    assert found.gene_id.tolist() == [1, 2, 3]
    assert found.of.tolist() == [1, 1, 3]
    assert found.n_cells.tolist() == [1, 3, 1]
    assert found.n_donors.tolist() == [1, 2, 1]
    np.testing.assert_allclose(found.total, [4, 4, 2])
    np.testing.assert_allclose(found.own, [2, 2, 1])
    np.testing.assert_allclose(found.other, [-2, -2, -1])
    np.testing.assert_allclose(found.gradient, [4, 4, 2])
    assert (found.n_cells_fired, found.sum_total) == (3, 12.0)


def test_a_null_gene_is_left_out_only_beside_the_gene_for_which_it_was_drawn():
    sums = InputSums(InputGenes(gene_id=np.array([1, 2, 3, 6]), of=np.array([1, 6, 1, 6])))
    assert sums.places(np.array([1, 2, 3])).tolist() == [0, 2]
    assert sums.places(np.array([9, 6, 2])).tolist() == [1, 3]
    model, sae = hand_model(), unit_autoencoder(EARLY, LATER)
    for genes in ([0, 1, 2], [0, 1, 5], [0, 2]):
        tokens = hand_cell(genes, np.ones(len(genes)))
        add_cell_inputs([sums], CellInputs(model, tokens, sae, "layer.2", [N_EARLY + 2]), donor=0)
    found = sums.mean()
    assert dict(zip(found.gene_id.tolist(), found.n_cells.tolist(), strict=True)) == {1: 3, 2: 1, 3: 2, 6: 1}
    assert found.n_cells_fired == 3


def test_a_feature_that_does_not_fire_on_a_gene_token_adds_nothing(mini, sae):
    tokens = mini_cells(mini, seed=5)
    every = CellInputs(mini, tokens, sae, "layer.1", range(64))
    silent = int(every.total.argmin())
    assert every.total[silent] == 0
    loud = densest(mini, tokens, sae, "layer.1", n=1)[0]
    features = sorted([silent, loud])
    sums = [InputSums(only(np.sort(tokens.gene_id[1:]))) for _ in features]
    add_cell_inputs(sums, CellInputs(mini, tokens, sae, "layer.1", features), donor=0)
    assert [own.mean().n_cells_fired for own in sums] == [int(feature == loud) for feature in features]
    add_cell_inputs(sums[:1], CellInputs(mini, tokens, sae, "layer.1", [silent]), donor=0)
    assert sum(own.mean().n_cells_fired for own in sums) == 1


def test_wrong_inputs_are_refused(mini, sae):
    with pytest.raises(ConfigError, match="2 cells"):
        CellInputs(mini, mini_cells(mini, seed=0).take(np.array([0, 0])), sae, "layer.1", [0])
    with pytest.raises(ConfigError, match="d_model = 8"):
        CellInputs(mini, mini_cells(mini, seed=0), random_autoencoder(8), "layer.1", [0])

    class Cut(Nothing):
        def change(self, x, key_mask):
            return x.detach()

    model = hand_model()
    model.layers[0] = Cut()
    with pytest.raises(ConfigError, match=r"toy passes no gradient.*layer\.2"):
        CellInputs(model, hand_cell([0, 5], [1.0, 1.0]), unit_autoencoder(EARLY), "layer.2", [0])


def test_levels_are_ranks_from_zero_to_one_without_special_tokens():
    tokens = Tokens(
        offsets=np.array([0, 5]),
        gene_id=np.arange(5),
        value=np.array([99, 3, 1, 3, 7], np.float32),
        is_special=np.arange(5) == 0,
    )
    np.testing.assert_allclose(levels(tokens), [0.5, 0.125, 0.5, 0.875])


def means_of(values, n=9):
    """Means as if every gene had its value in each of n cells."""
    means = GeneMeans(len(values))
    for _ in range(n):
        means.add(np.arange(len(values)), np.asarray(values, np.float64))
    return means


def cells_with(model_genes, *, n_cells, n_tokens, seed) -> CellGenes:
    """Cells of genes that are the more often there the lower their number is, with values that rise with it."""
    rng, cells = np.random.default_rng(seed), CellGenes(model_genes)
    share = np.linspace(1, 0.05, model_genes)
    for _ in range(n_cells):
        genes = np.sort(rng.choice(model_genes, n_tokens, replace=False, p=share / share.sum()))
        value = (genes // 10 + rng.random(n_tokens)).astype(np.float32)
        no = np.zeros(n_tokens, dtype=bool)
        cells.add(Tokens(offsets=np.array([0, n_tokens]), gene_id=genes, value=value, is_special=no))
    return cells


def test_the_genes_beside_a_gene_are_those_of_its_cells():
    cells = CellGenes(5)
    for genes, value in (([0, 1, 2], [1, 2, 3]), ([0, 2], [5, 4]), ([1, 3], [1, 1])):
        no = np.zeros(len(genes), dtype=bool)
        cells.add(
            Tokens(
                offsets=np.array([0, len(genes)]), gene_id=np.array(genes), value=np.array(value, "f4"), is_special=no
            )
        )
    assert cells.beside(None).n.tolist() == [2, 2, 2, 1, 0]
    assert cells.beside(0).n.tolist() == [2, 1, 2, 0, 0]
    np.testing.assert_allclose(cells.beside(0).mean, [(1 / 6 + 3 / 4) / 2, 0.5, (5 / 6 + 1 / 4) / 2, 0, 0])


def test_candidates_have_the_largest_gradients_and_null_genes_are_like_them_and_all_different():
    cells = cells_with(300, n_cells=60, n_tokens=120, seed=0)
    attribution = means_of(np.random.default_rng(1).normal(size=300))
    choose = partial(choose_genes, attribution, cells, n_genes=10, n_nulls=4, min_cells=5)
    found = choose(seed=(0, 17))
    known = np.flatnonzero(cells.beside(None).n >= 5)
    order = known[np.argsort(-np.abs(attribution.mean[known]))]
    is_null = found.of != found.gene_id
    assert found.gene_id[~is_null].tolist() == np.sort(order[:10]).tolist()
    assert np.unique(found.gene_id).tolist() == found.gene_id.tolist()
    assert np.bincount(found.of)[order[:10]].tolist() == [5] * 10
    for gene, of in zip(found.gene_id[is_null], found.of[is_null], strict=True):
        beside = cells.beside(int(of))
        assert beside.n[gene] >= 5
        # among 290 genes, those of like value and cells
        assert abs(beside.mean[gene] - beside.mean[of]) + 1 - beside.n[gene] / beside.n[of] < 0.8
    same, other = choose(seed=(0, 17)), choose(seed=(0, 18))
    assert found.gene_id.tolist() == same.gene_id.tolist() != other.gene_id.tolist()


def test_few_genes_leave_half_of_them_for_the_null_or_nothing_is_measured():
    cells = cells_with(12, n_cells=9, n_tokens=12, seed=0)
    choose = partial(choose_genes, cells=cells, n_genes=20, n_nulls=4, min_cells=5, seed=(0, 0))
    found = choose(means_of(np.ones(12)))
    assert (found.n_candidates, len(found.gene_id)) == (6, 12)
    # a gene without any gradient is no candidate
    few = choose(means_of([1.0] * 2 + [0.0] * 10))
    assert (few.n_candidates, len(few.gene_id)) == (2, 12)
    assert set(few.of.tolist()) == {0, 1}
    for attribution in (means_of(np.ones(12), n=4), means_of(np.zeros(12))):
        assert len(choose(attribution).gene_id) == 0


N_OWN = 8
FEATURES = range(N_OWN + N_LATER)
"""Early features, which read their own tokens, and all later ones, which read others."""


def all_inputs(model, sae, chosen_on: Tokens, measured_on: Tokens, *, n_genes=20, n_nulls=4, seed=0):
    """What is measured of the genes that are chosen for every feature."""
    attribution = [GeneMeans(N_GENES + 1) for _ in FEATURES]
    genes = [CellGenes(N_GENES + 1) for _ in FEATURES]

    def cells_of(tokens):
        for c in range(tokens.n_cells):
            cell = CellInputs(model, tokens.take(np.array([c])), sae, "layer.2", FEATURES)
            yield cell, np.flatnonzero(cell.total > 0)

    for cell, fires in cells_of(chosen_on):
        found = cell.attributions().double().numpy()
        for f in fires:
            attribution[f].add(cell.tokens.gene_id, found[f])
    measured = list(cells_of(measured_on))
    for cell, fires in measured:
        for f in fires:
            genes[f].add(cell.tokens)
    sums = [
        InputSums(choose_genes(attribution[f], genes[f], n_genes=n_genes, n_nulls=n_nulls, min_cells=5, seed=(seed, f)))
        for f in FEATURES
    ]
    for cell, _ in measured:
        add_cell_inputs(sums, cell, donor=0)
    return [own.mean() for own in sums]


def scored(found):
    """The tested genes of each feature and their q by both paths, the own token first."""
    from feature_store.associations.multiple_testing import benjamini_hochberg
    from feature_store.effects import GeneEffects, pool_matched

    paths = []
    for name, two_sided in (("own", False), ("other", True)):
        effects = []
        for own in found:
            share, is_tested = getattr(own, name) / own.total, own.of == own.gene_id
            of = np.searchsorted(own.gene_id[is_tested], own.of[~is_tested])
            effects.append(GeneEffects(gene=share[is_tested], null=share[~is_tested], of=of))
        pooled = pool_matched(partial(iter, effects), two_sided=two_sided)
        p = [pooled.scores(one).p for one in effects]
        q = benjamini_hochberg(np.concatenate(p))
        paths.append(np.split(q, np.cumsum([len(own) for own in p])[:-1]))
    return [(own.gene_id[own.of == own.gene_id], *both) for own, *both in zip(found, *paths, strict=True)]


@pytest.mark.parametrize("n_draws", [1, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.usefixtures("one_thread")
def test_known_inputs_are_found_by_their_path_and_inert_genes_are_not(n_draws):
    sae = unit_autoencoder(slice(0, N_OWN), LATER, d_model=D_MODEL_WITH_NOISE)
    hits = found = planted = inert = n_inert = 0
    for draw in range(n_draws):
        rng = np.random.default_rng(draw)
        model = constructed(rng, noise=1.0)
        later = (model.layers[2].later != 0).numpy()
        result = scored(all_inputs(model, sae, random_cells(rng, 40), random_cells(rng, 40), seed=draw))
        every = np.arange(N_GENES)
        for feature, (candidate, *q_of) in enumerate(result):
            reads_own = feature < N_OWN
            causes = every % N_EARLY == feature if reads_own else later[every % N_EARLY, feature - N_OWN]
            is_cause = causes[candidate - 1]
            planted += causes.sum()
            for path, q in enumerate(q_of):
                chosen, is_path = q <= 0.05, (path == 0) == reads_own
                found += chosen.sum()
                hits += (chosen & is_cause).sum() * is_path
                inert += (chosen & ~(is_cause & is_path)).sum()
                n_inert += (~(is_cause & is_path)).sum()
    assert hits / planted > 0.95
    assert hits / found > 0.95
    assert inert / n_inert <= 0.05
