"""Nicheformer against torch's stock layers, numba's sort, and tokens computed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import tiny_nicheformer as tiny
import torch
from tiny_checkpoints import SYMBOLS, ensembl
from torch import nn

from sae_core.errors import CheckpointError, ConfigError, TokenizationError, VocabularyError
from sae_core.scfm import FoundationModel, GeneMatch, Nicheformer, ScFoundation, Site, Tokens, Vocabulary, load_model
from sae_core.scfm.nicheformer.context import Context
from sae_core.scfm.nicheformer.tokenizer import NicheformerTokenizer, TechnologyMeans, prepared_mean
from sae_core.scfm.nicheformer.unstable_order import unstable_order

Write = Callable[..., Path]
HUMAN, MOUSE, UNKNOWN_10X, DISSOCIATED, SPATIAL = 5, 6, 15, 3, 4
# of genes 0 to 5 of a reference; as they are in the file: NaN, 0.4 and 0 become 1, 2.5 becomes 3, and 1.49 becomes 1
RAW = np.array([np.nan, 0.4, 2.5, 1.49, 0.0, -1.75])
MEANS = TechnologyMeans({"dissociated": prepared_mean(RAW)})


def tokenize(rows: list[list[float]], *, only: tuple[int, ...] | None = None, **settings: Any) -> Tokens:
    """Tokens of cells whose columns are genes 0 to 5 of the reference, and one that it lacks."""
    options = {name: settings.pop(name) for name in ("max_tokens", "obs") if name in settings}
    given: dict[str, Any] = {"context": Context(), "means": MEANS, "max_positions": 20}
    tokenizer = NicheformerTokenizer(**(given | settings))
    x = sp.csr_matrix(np.array(rows, dtype=np.float32))
    match = GeneMatch(token_id=np.array([30, 31, 32, 33, 34, 35, 0]), matched=np.arange(7) < 6)
    match = match if only is None else match.only(np.array(only))
    return tokenizer(x.indptr, x.indices, x.data, match, **options)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return partial(tiny.write_nicheformer, tmp_path)


@pytest.fixture
def model(write: Write) -> Nicheformer:
    loaded = load_model(write())
    assert isinstance(loaded, Nicheformer)
    return loaded


def tokens_of(model: FoundationModel, counts: sp.csr_matrix, **options: Any) -> Tokens:
    match = model.match_genes(SYMBOLS)
    return model.tokenize(counts.indptr, counts.indices, counts.data, match, seed=0, **options)


def test_means_are_prepared_as_in_the_tokenization_notebooks() -> None:
    np.testing.assert_array_equal(prepared_mean(RAW), [1, 1, 3, 1, 1, -2 + 0])
    np.testing.assert_array_equal(prepared_mean(np.array([0.5, -0.3, -0.5, -1.5, 7.0])), [1, 1, 1, -1, 7])


def test_hand_computed_tokens() -> None:
    # total of the reference 20, so one count is 500; scores 1000, 1500, 1500, 4500, none, -250
    tokens = tokenize([[2, 3, 9, 0, 5, 1, 99], [0, 0, 0, 0, 0, 0, 7], [0, 0, 0, 4, 0, 0, 0]])
    np.testing.assert_array_equal(tokens.gene_id, [5, 15, 3, 34, 31, 32, 30, 35, 5, 15, 3, 33])
    np.testing.assert_array_equal(tokens.lengths, [8, 0, 4])
    np.testing.assert_allclose(tokens.value, [0, 0, 0, 2500, 1500, 1500, 1000, -250, 0, 0, 0, 1e4])
    np.testing.assert_array_equal(tokens.is_special, [True] * 3 + [False] * 5 + [True] * 3 + [False])


def test_a_block_without_cells_has_no_token() -> None:
    x = sp.csr_matrix((0, 7), dtype=np.float32)
    match = GeneMatch(token_id=np.arange(30, 37), matched=np.arange(7) < 6)
    tokenizer = NicheformerTokenizer(context=Context(assay="obs:assay"), means=MEANS, max_positions=20)
    tokens = tokenizer(x.indptr, x.indices, x.data, match, obs={"assay": []})
    assert (tokens.n_cells, tokens.n_tokens) == (0, 0)


def test_the_genes_of_the_highest_scores_fill_what_the_context_leaves() -> None:
    row = [[2, 3, 9, 0, 5, 1, 99]]
    np.testing.assert_array_equal(tokenize(row, max_positions=5).gene_id, [5, 15, 3, 34, 31])
    np.testing.assert_array_equal(tokenize(row, max_tokens=4).gene_id, [5, 15, 3, 34])
    np.testing.assert_array_equal(tokenize(row, max_tokens=4, ties="upstream").gene_id, [5, 15, 3, 34])
    with pytest.raises(ConfigError, match="3; allowed: 4 or more"):
        tokenize(row, max_tokens=3)


def test_chosen_genes_are_ranked_alone_by_the_total_of_all() -> None:
    whole, some = (tokenize([[2, 3, 9, 0, 5, 1, 99]], only=only) for only in (None, (30, 34)))
    np.testing.assert_array_equal(some.gene_id[3:], [34, 30])
    np.testing.assert_array_equal(some.value[3:], whole.value[[3, 6]])


def test_rounding_decides_ties_and_the_precision_is_a_setting() -> None:
    # total 22: 1 / 1 and 3 / 3 are one score in double precision; in single the second is the larger one
    row = [[0, 1, 3, 18, 0, 0, 0]]
    single = np.float64(np.float32(3) * (np.float32(1e4) / np.float32(22))) / 3
    assert single > np.float32(1e4) / np.float32(22)
    assert 3 * (1e4 / 22) / 3 == 1e4 / 22
    np.testing.assert_array_equal(tokenize(row).gene_id[3:], [33, 31, 32])
    np.testing.assert_array_equal(tokenize(row, precision="float32").gene_id[3:], [33, 32, 31])


def test_ties_are_in_order_of_tokens_or_in_that_of_numbas_sort() -> None:
    # 16 equal keys: the pivot of place 7 waits in place 15, and all others are swapped from both ends
    by_hand = [14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15]
    np.testing.assert_array_equal(unstable_order(np.zeros(16), 16), by_hand)
    np.testing.assert_array_equal(unstable_order(np.zeros(15), 15), np.arange(15))
    means = TechnologyMeans({"dissociated": np.ones(16)})
    x = sp.csr_matrix(np.ones((1, 16), dtype=np.float32))
    match = GeneMatch(token_id=np.arange(30, 46), matched=np.ones(16, dtype=bool))
    for ties, order in (("id", np.arange(16)), ("upstream", np.array(by_hand))):
        tokenizer = NicheformerTokenizer(context=Context(), means=means, max_positions=19, ties=ties)  # type: ignore[arg-type]
        np.testing.assert_array_equal(tokenizer(x.indptr, x.indices, x.data, match).gene_id[3:], 30 + order)


@pytest.fixture(scope="module")
def numba_argsort() -> Callable[[np.ndarray], np.ndarray]:
    numba = pytest.importorskip("numba", reason="numba, whose sort upstream uses, is not installed")

    def argsort(keys: np.ndarray) -> np.ndarray:
        return np.argsort(keys)

    compiled: Callable[[np.ndarray], np.ndarray] = numba.njit(argsort)
    return compiled


def test_the_order_of_ties_is_numbas(numba_argsort: Callable[[np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 14, 15, 16, 17, 31, 100, 1000):
        few = rng.integers(0, 4, n).astype(float)
        for keys in (few, np.sort(few), -np.sort(few), rng.normal(size=n), -few / rng.integers(1, 6, n)):
            expected = numba_argsort(keys)
            np.testing.assert_array_equal(unstable_order(keys, n), expected)
            np.testing.assert_array_equal(unstable_order(keys, n // 3), expected[: n // 3])


def test_tokens_of_two_real_cells_are_those_of_the_official_recipe(
    scsae_data: Path, numba_argsort: Callable[[np.ndarray], np.ndarray]
) -> None:
    import anndata

    data = anndata.read_h5ad(scsae_data / "scmixology_5lines_5batches_counts.h5ad")
    x, rng = sp.csr_matrix(data.X[[0, 700]]), np.random.default_rng(0)
    ids = np.array([str(name) for name in data.var["ensembl_id"]])
    reference = rng.permutation(ids[:20000])
    mean = rng.gamma(1.0, 3.0, len(reference))
    mean[rng.choice(len(reference), 60, replace=False)] = np.nan
    auxiliary = tuple(f"<{i}>" for i in range(30))
    vocabulary = Vocabulary(tokens=(*auxiliary, *reference), special=frozenset(auxiliary), genes_are="ids")
    match = vocabulary.match([f"{name}.7" for name in ids])
    column = {name: i for i, name in enumerate(ids)}
    whole = [int(m + 0.5) or 1 for m in np.nan_to_num(mean)]
    for precision in ("float64", "float32"):
        dense = x.toarray().astype(precision)[:, [column[name] for name in reference]]
        scaled = dense * (10000.0 / dense.sum(1, keepdims=True))
        assert scaled.dtype == precision
        score = scaled / np.array(whole, dtype=np.float64)
        tokenizer = partial(
            NicheformerTokenizer,
            context=Context(species="Homo sapiens", assay="10x 3' v2"),
            means=TechnologyMeans({"dissociated": prepared_mean(mean)}),
            max_positions=1500,
            precision=precision,
        )
        by_id, upstream = (tokenizer(ties=t)(x.indptr, x.indices, x.data, match) for t in ("id", "upstream"))
        for cell in range(2):
            expressed = np.flatnonzero(dense[cell])
            assert len(expressed) > 4000
            ranked = sorted(expressed.tolist(), key=lambda gene: (-score[cell, gene], gene))
            assert by_id.cells(cell, cell + 1).gene_id.tolist() == [5, 12, 3, *(30 + g for g in ranked[:1497])]
            as_upstream = expressed[numba_argsort(-score[cell, expressed])][:1497] + 30
            np.testing.assert_array_equal(upstream.cells(cell, cell + 1).gene_id[3:], as_upstream)


@pytest.mark.parametrize(
    ("assay", "token"),
    [
        ("10x 3' v3", 11),
        ("10X 3’ V3", 11),
        ("10x 3' v3 sequencing", 11),
        ("EFO:0009922", 11),
        ("11", 11),
        ("11.0", 11),
        ("10x 5' v2", 10),
        ("10x transcription profiling", 15),
        ("merfish", 7),
        ("NanoString digital spatial profiling", 8),
        ("Xenium", 9),
        ("visium", 9),
        ("CITE-seq", 17),
        ("Smart-seq v4", 18),
    ],
)
def test_usual_spellings_of_an_assay_are_recognised(assay: str, token: int) -> None:
    constant, of_cells = Context(assay=assay), Context(assay="obs:assay")
    for found in (constant.of_cells(1, None), of_cells.of_cells(1, {"assay": [assay]})):
        assert found.token_id.tolist() == [[HUMAN, token, SPATIAL if token < 10 else DISSOCIATED]]


@pytest.mark.parametrize("species", ["mouse", "Mus musculus", "mus_musculus", "NCBITaxon:10090", "6"])
def test_usual_spellings_of_a_species_are_recognised(species: str) -> None:
    assert Context(species=species).of_cells(1, None).token_id[0, 0] == MOUSE


def test_each_cell_has_its_own_context_and_the_means_of_its_technology() -> None:
    means = TechnologyMeans({"dissociated": np.array([1.0, 2, 1, 1, 1, 1]), "merfish": np.array([4.0, 1, 1, 1, 1, 1])})
    obs = {"organism": ["human", "mouse"], "assay": ["10x 3' v2", "MERFISH"], "kind": ["dissociated", "spatial"]}
    context = Context(species="obs:organism", assay="obs:assay", modality="obs:kind")
    tokens = tokenize([[1, 1, 0, 0, 0, 0, 0]] * 2, context=context, means=means, obs=obs)
    np.testing.assert_array_equal(tokens.gene_id, [5, 12, 3, 30, 31, 6, 7, 4, 31, 30])
    np.testing.assert_allclose(tokens.value, [0, 0, 0, 5000, 2500, 0, 0, 0, 5000, 1250])


@pytest.mark.parametrize(("value", "shown"), [("", "no value"), ("Drop-seq", "'Drop-seq'"), ("none", "'none'")])
def test_a_missing_or_unknown_value_of_a_cell_is_refused_with_what_is_allowed(value: str, shown: str) -> None:
    context = Context(assay="obs:assay")
    with pytest.raises(TokenizationError, match=rf"1 of 2 cells.*row 1.*{shown} as assay.*MERFISH.*assay=VALUE"):
        tokenize([[1, 1, 0, 0, 0, 0, 0]] * 2, context=context, obs={"assay": ["CITE-seq", value]})
    with pytest.raises(TokenizationError, match=r"'assay'.*0 values were given for 1"):
        tokenize([[1, 1, 0, 0, 0, 0, 0]], context=context)


def test_an_unknown_value_for_all_cells_is_refused_with_what_is_allowed(write: Write) -> None:
    folder = write()
    for name, value in (("species", "zebrafish"), ("assay", "Drop-seq"), ("modality", "bulk"), ("assay", "25")):
        with pytest.raises(ConfigError, match=rf"{name} was '{value}'; allowed: .*obs:COLUMN"):
            load_model(folder, options={name: value})
    for name in ("ties", "precision", "pads"):
        with pytest.raises(ConfigError, match=rf"{name} was 'other'"):
            load_model(folder, options={name: "other"})


def test_a_token_of_the_context_can_be_left_out_as_upstream_leaves_out_fields_that_it_is_not_given() -> None:
    context = Context(species="none", modality="none")
    np.testing.assert_array_equal(tokenize([[0, 0, 0, 4, 0, 0, 0]], context=context).gene_id, [15, 33])
    bare = Context(species="none", assay="none", modality="none")
    one = TechnologyMeans({}, np.ones(6))
    np.testing.assert_array_equal(tokenize([[0, 0, 0, 4, 0, 0, 0]], context=bare, means=one).gene_id, [33])


def test_settings_of_the_checkpoint_say_which_fields_are_tokens(write: Write) -> None:
    model = load_model(write(settings={"specie": False}))
    assert model.context["species"] == "none"
    assert model.max_genes == tiny.PLACES - 2


def test_cells_of_visium_need_means_of_their_own(write: Write, counts: sp.csr_matrix, tmp_path: Path) -> None:
    folder, file = write(), tmp_path / "visium.npy"
    np.save(file, np.full(len(tiny.IDS), 2.0))
    with pytest.raises(CheckpointError, match=r"no technology means of assay 'Visium'.*means=FILE"):
        load_model(folder, options={"assay": "Visium"})
    of_cells = load_model(folder, options={"assay": "obs:assay"})
    with pytest.raises(TokenizationError, match=r"no technology means of Visium.*means=FILE"):
        tokens_of(of_cells, counts, obs={"assay": ["Visium"] * counts.shape[0]})
    tokens = tokens_of(load_model(folder, options={"assay": "Visium", "means": file}), counts)
    assert tokens.gene_id[:3].tolist() == [HUMAN, 9, SPATIAL]


def by_torch(weights: dict[str, torch.Tensor], ids: torch.Tensor, is_pad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every site of padded cells by torch's stock layers, from the weights of the Lightning class."""
    x = weights["embeddings.weight"][ids] + weights["positional_embedding.weight"][: ids.shape[1]]
    states = {"embedding": x}
    for i in range(tiny.LAYERS):
        name = f"encoder.layers.{i}."
        layer = nn.TransformerEncoderLayer(tiny.D, tiny.HEADS, tiny.HIDDEN, batch_first=True, layer_norm_eps=1e-12)
        layer.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})
        layer.eval()
        for module in (layer.self_attn, layer.linear2):
            kind = "attention" if module is layer.self_attn else "mlp"

            def keep(_: nn.Module, args: Any, out: Any, site: str = f"{kind}.{i}") -> None:
                states[site] = out[0] if isinstance(out, tuple) else out

            module.register_forward_hook(keep)
        with torch.no_grad():
            x = layer(x, src_key_padding_mask=is_pad)
        states[f"layer.{i}"] = x
    return states


def padded(tokens: Tokens, length: int, pad_id: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the cells that have tokens, padded to `length`, and which places are padding."""
    lengths = tokens.lengths[tokens.lengths > 0]
    real = np.arange(length) < lengths[:, None]
    ids = np.full(real.shape, pad_id)
    ids[real] = tokens.gene_id
    return torch.from_numpy(ids), torch.from_numpy(~real)


@pytest.mark.parametrize("is_lightning", [False, True])
def test_every_site_equals_torchs_stock_layers_padded_or_not(
    write: Write, counts: sp.csr_matrix, is_lightning: bool
) -> None:
    model, weights = load_model(write(is_lightning=is_lightning)), tiny.lightning_weights()
    tokens = tokens_of(model, counts)
    assert len(set(tokens.lengths)) > 4
    ids, is_pad = padded(tokens, tiny.PLACES)
    expected = by_torch(weights, ids, is_pad)
    for limit in (1, 10_000):
        found = model.activations(tokens, model.sites, max_batch_tokens=limit)
        assert {str(site) for site in found} == set(expected)
        for site, x in found.items():
            torch.testing.assert_close(x, expected[str(site)][~is_pad], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pads", ["1", "0"])
def test_the_official_embedding_is_the_mean_over_all_places_but_three_with_the_padding(
    write: Write, counts: sp.csr_matrix, pads: str
) -> None:
    model, weights = load_model(write(), options={"pads": pads}), tiny.lightning_weights()
    tokens = tokens_of(model, counts)
    has_tokens = torch.from_numpy(tokens.lengths > 0)
    ids, is_pad = padded(tokens, tiny.PLACES, int(pads))
    states = by_torch(weights, ids, is_pad)
    for site in ("layer.2", "layer.0", "embedding"):
        official = model.embed(tokens, readout="official", site=site)
        torch.testing.assert_close(official[has_tokens], states[site][:, 3:].mean(1), atol=1e-5, rtol=0)
    genes = ~is_pad[:, 3:, None]
    last = states["layer.2"][:, 3:]
    mean = model.embed(tokens, readout="mean")
    torch.testing.assert_close(mean[has_tokens], (last * genes).sum(1) / genes.sum(1), atol=1e-5, rtol=0)
    assert (mean - model.embed(tokens, readout="official"))[has_tokens].abs().max() > 0.1


def test_the_official_embedding_drops_three_places_even_without_a_context(
    write: Write, counts: sp.csr_matrix, tmp_path: Path
) -> None:
    file = tmp_path / "one.npy"
    np.save(file, np.ones(len(tiny.IDS)))
    bare = {"species": "none", "assay": "none", "modality": "none", "means": file}
    model = load_model(write(), options=bare)
    tokens = tokens_of(model, counts)
    assert not tokens.is_special.any()
    ids, is_pad = padded(tokens, tiny.PLACES)
    expected = by_torch(tiny.lightning_weights(), ids, is_pad)["layer.2"][:, 3:].mean(1)
    found = model.embed(tokens, readout="official")
    torch.testing.assert_close(found[torch.from_numpy(tokens.lengths > 0)], expected, atol=1e-5, rtol=0)


def test_predictions_of_hidden_genes_are_those_of_the_classifier(model: Nicheformer, counts: sp.csr_matrix) -> None:
    weights, tokens = tiny.lightning_weights(), tokens_of(model, counts)
    task = model.mask_genes(tokens, seed=2, fraction=0.4)
    ids, is_pad = padded(task.tokens, tiny.PLACES)
    states = by_torch(weights, ids, is_pad)
    torch.testing.assert_close(
        model.activations(task, ["layer.2"])[Site.parse("layer.2")], states["layer.2"][~is_pad], atol=1e-5, rtol=0
    )
    logits = states["layer.2"][~is_pad][task.token_rows] @ weights["classifier_head.weight"].T
    expected = (logits + weights["classifier_head.bias"]).log_softmax(1)
    assert task.token_rows is not None
    found = model.masked_gene_prediction(task)
    hidden = torch.from_numpy(task.gene_id)
    torch.testing.assert_close(found.prediction, expected[torch.arange(len(hidden)), hidden], atol=1e-5, rtol=0)
    loss = nn.functional.cross_entropy(logits + weights["classifier_head.bias"], hidden)
    assert model.pretraining_loss(tokens, seed=2, mask_fraction=0.4).mean == pytest.approx(float(loss), abs=1e-5)


def test_genes_are_hidden_in_the_shares_of_the_pretraining_and_the_context_never(model: Nicheformer) -> None:
    rows = sp.csr_matrix(np.random.default_rng(0).integers(1, 50, (600, 25)).astype(np.float32))
    match = model.match_genes(SYMBOLS[:25])
    tokens = model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=0)
    task = model.mask_genes(tokens, seed=1, fraction=0.2)
    assert len(task.cell) == 600 * 5
    assert not tokens.is_special[task.token_rows].any()
    now = task.tokens.gene_id[task.token_rows]
    assert np.mean(now == 0) == pytest.approx(0.81, abs=0.02)
    assert np.mean(now == task.gene_id) == pytest.approx(0.09 + 0.1 / (tiny.N_TOKENS - 10), abs=0.02)
    other = now[(now != 0) & (now != task.gene_id)]
    assert len(other) / len(now) == pytest.approx(0.1, abs=0.02)
    assert (other.min(), other.max()) == (10, tiny.N_TOKENS - 1)


def test_without_a_classifier_there_is_no_prediction(write: Write, counts: sp.csr_matrix) -> None:
    def without(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in weights.items() if not key.startswith("classifier_head")}

    model = load_model(write(edit=without))
    with pytest.raises(ConfigError, match=r"nicheformer has no weights of classifier_head"):
        model.pretraining_loss(tokens_of(model, counts))


def test_random_weights_are_drawn_as_upstream_draws_them(write: Write) -> None:
    model = load_model(write(), random_init=True, seed=3)
    assert isinstance(model, Nicheformer)
    assert model.classifier_head is not None
    assert (model.token_embedding.weight[1] == 0).all()
    assert float(model.token_embedding.weight.std()) == pytest.approx(1, abs=0.1)
    linear, attention = model.layers[0].linear1.weight, model.layers[0].self_attn.Wqkv.weight
    assert float(linear.std()) == pytest.approx((2 / (tiny.D + tiny.HIDDEN)) ** 0.5, rel=0.15)
    assert float(attention.abs().max()) <= (6 / (4 * tiny.D)) ** 0.5
    assert float(model.classifier_head.bias.abs().max()) == 0


def test_every_weight_of_the_official_files_is_read_or_named(write: Write) -> None:
    settings = {"nlayers": 12, "nheads": 16, "dim_model": 32, "dim_feedforward": 8, "context_length": 1500}
    genes = [*(ensembl(i) for i in range(60)), *tiny.MOUSE]
    sizes = {"n_layers": 12, "n_tokens": 30 + len(genes), "d": 32, "hidden": 8, "places": 1500}
    weights = tiny.lightning_weights(**sizes)
    settings["n_tokens"] = 30 + len(genes)
    lightning = load_model(write("lightning", is_lightning=True, edit=lambda _: weights, settings=settings, ids=genes))
    hub = load_model(write("hub", edit=lambda _: tiny.hub_weights(weights), settings=settings, ids=genes))
    template = sorted(tiny.layer_shapes("encoder_layer"))
    heads = ["cls_head.bias", "cls_head.weight", "pooler_head.bias", "pooler_head.weight"]
    assert lightning.ignored_weights == tuple(sorted([*heads, *template, "pos"]))
    assert hub.ignored_weights == tuple(sorted([*template, "pos"]))
    assert "cls_head, encoder_layer, pooler_head, pos" in " ".join(lightning.notes)
    assert lightning.max_genes == 1497
    read = sum(value.numel() for value in lightning.state_dict().values())
    ignored = sum(weights[name].numel() for name in lightning.ignored_weights)
    assert read == sum(value.numel() for value in weights.values()) - ignored
    for name, value in lightning.state_dict().items():
        assert torch.equal(value, hub.state_dict()[name]), name


def test_a_fine_tuned_checkpoint_is_read_with_the_settings_of_its_base(write: Write, counts: sp.csr_matrix) -> None:
    def tuned(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"backbone.{key}": value for key, value in weights.items()} | {"linear_head.weight": torch.zeros(4, 16)}

    folder = write("tuned", is_lightning=True, edit=tuned)
    content = torch.load(folder / "nicheformer.ckpt", weights_only=True)
    torch.save(content | {"hyper_parameters": {"n_classes": 4}}, folder / "nicheformer.ckpt")
    with pytest.raises(CheckpointError, match=r"nicheformer\.ckpt has no dim_model.*config\.json.*beside it"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "nicheformer", **tiny.SETTINGS, "masking_p": 0.0}))
    model, base = load_model(folder), load_model(write("base"))
    assert "linear_head.weight" in model.ignored_weights
    assert model.mask_fraction == 0.15
    assert "masking_p 0: 0.15 was taken" in " ".join(model.notes)
    assert torch.equal(*(m.embed(tokens_of(m, counts)).nan_to_num() for m in (model, base)))


def test_names_by_id_with_version_by_symbol_and_mixed_find_the_same_genes(model: Nicheformer) -> None:
    versions = [f"{name}.{i % 9}" for i, name in enumerate(tiny.IDS[:40])]
    mixed = [*versions[:20], *SYMBOLS[20:]]
    for names in (tiny.IDS[:40], versions, SYMBOLS, mixed):
        np.testing.assert_array_equal(model.match_genes(names).token_id, np.arange(30, 70))
    both = model.match_genes(["other"] * 40, versions)
    np.testing.assert_array_equal(both.token_id, np.arange(30, 70))
    assert model.match_genes(["ENSG00000000001.4", "unknown"]).matched.tolist() == [True, False]


def test_a_symbol_of_two_genes_leads_to_neither(write: Write) -> None:
    folder = write()
    names = {name: "SAME" if i < 2 else f"GENE{i}" for i, name in enumerate(tiny.IDS)}
    (folder / "vocab_ensembl.json").write_text(json.dumps(names))
    assert load_model(folder).match_genes(["SAME", "GENE5"]).matched.tolist() == [False, True]


def test_mice_by_their_own_ids_are_refused_and_by_human_orthologues_taken(write: Write) -> None:
    model = load_model(write(), options={"species": "mouse"})
    own = [f"ENSMUSG{i:011d}.2" for i in range(30)]
    with pytest.raises(
        VocabularyError,
        match=r"30 of the 30.*mouse \(ENSMUSG0+\.2.*2 of these.* 2 .*40 human.*orthologues.*species=mouse",
    ):
        model.match_genes(own)
    # as mapped: human ids of the orthologues, and mouse ids of the few genes that have none
    mapped = [*tiny.IDS[:8], *tiny.MOUSE]
    x = sp.csr_matrix(np.arange(10, 0, -1, dtype=np.float32)[None])
    match = model.match_genes(mapped)
    tokens = model.tokenize(x.indptr, x.indices, x.data, match, seed=0)
    assert match.n_matched == 10
    assert tokens.gene_id[:3].tolist() == [MOUSE, UNKNOWN_10X, DISSOCIATED]
    assert {70, 71} < set(tokens.gene_id.tolist())
    assert "2 of the mouse; data of mice need human orthologues" in " ".join(model.notes)


def test_options_that_change_numbers_change_the_digest_and_two_names_of_one_value_do_not(write: Write) -> None:
    folder = write()
    plain = load_model(folder).digest
    changes: list[dict[str, str | Path]] = [{"species": "mouse"}, {"assay": "Xenium"}, {"assay": "obs:assay"}]
    changes += [{"modality": "spatial"}, {"species": "none"}, {"ties": "upstream"}, {"precision": "float32"}]
    changes += [{"pads": "0"}, {"means": folder / "merfish_mean_script.npy"}]
    digests = [load_model(folder, options=change).digest for change in changes]
    assert len({plain, *digests}) == len(changes) + 1
    assert load_model(folder, options={"species": "Homo sapiens"}).digest == plain
    np.save(folder / "merfish_mean_script.npy", np.ones(len(tiny.IDS)))
    assert load_model(folder).digest == plain
    np.save(folder / "dissociated_mean_script.npy", np.ones(len(tiny.IDS)))
    assert load_model(folder).digest != plain


def test_what_a_user_should_know_is_noted(write: Write) -> None:
    folder = write()
    notes = " | ".join(load_model(folder).notes)
    for part in (
        "species human (default), assay 10x 3' transcription profiling (default), modality by assay (default)",
        "dissociated_mean_script.npy, NaN to 0",
        "ties of scores: id",
    ):
        assert part in notes
    for part in ("places 4 to 30, padding included", "spatial for MERFISH, CosMx", "embedding notebook"):
        assert part in notes
    of_cells = " | ".join(load_model(folder, options={"assay": "obs:assay"}).notes)
    assert "Xenium and Visium share token 9" in of_cells
    assert "genes with a negative mean, which rank last: 1" in of_cells
    assert "assay obs:assay, modality by assay (default)" in of_cells


@pytest.mark.parametrize("place", [".", "model_means"])
def test_the_reference_and_the_means_lie_in_the_folder_or_in_model_means(write: Write, place: str) -> None:
    assert load_model(write(is_lightning=True, place=place)).vocabulary.n_genes == 42


def test_means_may_lie_in_another_folder(write: Write, tmp_path: Path) -> None:
    folder, other = write(technologies=()), write("other", is_lightning=True)
    with pytest.raises(CheckpointError, match=r"no dissociated_mean_script\.npy.*means=PATH"):
        load_model(folder)
    model = load_model(folder, options={"means": other})
    assert "dissociated_mean_script.npy" in " ".join(model.notes)
    with pytest.raises(CheckpointError, match=r"means is .*nowhere.npy, which is not there"):
        load_model(folder, options={"means": tmp_path / "nowhere.npy"})
    with pytest.raises(CheckpointError, match=r"no files \*_mean_script\.npy"):
        load_model(folder, options={"assay": "obs:assay"})


def test_cells_of_a_technology_without_means_are_refused_by_its_name(write: Write, counts: sp.csr_matrix) -> None:
    model = load_model(write(technologies=("dissociated",)), options={"assay": "obs:assay"})
    assert "no technology means of merfish, cosmx, xenium" in " ".join(model.notes)
    with pytest.raises(TokenizationError, match=r"no technology means of cosmx; there are means of dissociated"):
        tokens_of(model, counts, obs={"assay": ["CosMx"] * counts.shape[0]})


def test_the_genes_may_come_from_the_vocabulary_alone_and_must_not_differ_from_the_reference(write: Write) -> None:
    folder = write()
    plain = load_model(folder).vocabulary.tokens
    (folder / "model.h5ad").unlink()
    assert load_model(folder).vocabulary.tokens == plain
    tiny.write_reference(folder / "model.h5ad", tiny.IDS[::-1])
    with pytest.raises(
        CheckpointError, match=rf"vocab\.json gives genes other tokens than model\.h5ad.*{tiny.MOUSE[1]}"
    ):
        load_model(folder)
    (folder / "vocab.json").write_text(json.dumps({"[PAD]": 0, "[MODALITY_spatial]": 4}))
    assert load_model(folder).vocabulary.tokens[30] == tiny.MOUSE[1]
    (folder / "model.h5ad").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.h5ad, and vocab\.json names no genes"):
        load_model(folder)


def corrupt(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def half(name: str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes((p := folder / name).read_bytes()[: p.stat().st_size // 2]) and None
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
TWICE = {gene: 30 + i for i, gene in enumerate(tiny.IDS)} | {"again": 30}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (corrupt("model.safetensors", POINTER), r"model\.safetensors is a Git LFS pointer.*12,345"),
        (corrupt("model.h5ad", POINTER), r"model\.h5ad is a Git LFS pointer"),
        (corrupt("dissociated_mean_script.npy", POINTER), r"dissociated_mean_script\.npy is a Git LFS pointer"),
        (half("model.safetensors"), r"model\.safetensors is incomplete"),
        (half("model.h5ad"), r"model\.h5ad cannot be read as an \.h5ad"),
        (half("dissociated_mean_script.npy"), r"dissociated_mean_script\.npy cannot be read"),
        (half("config.json"), r"config\.json is incomplete"),
        (
            lambda f: tiny.write_reference(f / "model.h5ad", tiny.IDS[:-1]) or (f / "vocab.json").unlink(),
            r"42 rows.*41 genes",
        ),
        (
            lambda f: (
                tiny.write_reference(f / "model.h5ad", tiny.IDS[:-1] + tiny.IDS[:1]) or (f / "vocab.json").unlink()
            ),
            r"more than once",
        ),
        (lambda f: np.save(f / "dissociated_mean_script.npy", np.ones(7)), r"float64 of shape \(7,\).*42 genes"),
        (lambda f: np.save(f / "dissociated_mean_script.npy", np.full(42, np.inf)), r"42 infinite means"),
        (lambda f: np.save(f / "dissociated_mean_script.npy", np.array(["a"] * 42)), r"<U1 of shape"),
        (corrupt("vocab.json", json.dumps(TWICE).encode()), r"vocab\.json gives row 30 to"),
        (corrupt("vocab.json", b'{"ENSG00000000001": "x"}'), r"vocab\.json has 'ENSG00000000001': 'x'"),
        (corrupt("vocab.json", b'{"ENSG00000000001": 44}'), r"vocab\.json names 1 genes up to row 44"),
    ],
)
def test_a_wrong_file_is_named(write: Write, change: Callable[[Path], object], message: str) -> None:
    folder = write()
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nlayers": None}, r"config\.json has nlayers null"),
        ({"nheads": 3}, r"nheads 3; allowed: a divisor of dim_model 16"),
        ({"learnable_pe": False}, r"learnable_pe False; allowed: true"),
        ({"autoregressive": True}, r"autoregressive True; allowed: false"),
        ({"n_tokens": 20}, r"n_tokens 20; allowed"),
        ({"nlayers": 4}, r"missing encoder\.layers\.3\.self_attn\.in_proj_weight"),
        ({"nlayers": 2}, r"unexpected encoder\.layers\.2\."),
        ({"context_length": 31}, r"positional_embedding\.weight is \(30, 16\) instead of \(31, 16\)"),
        ({"dim_feedforward": 25}, r"linear1\.weight is \(24, 16\) instead of \(25, 16\)"),
    ],
)
@pytest.mark.parametrize("is_lightning", [False, True])
def test_a_wrong_setting_is_named(write: Write, settings: dict[str, Any], message: str, is_lightning: bool) -> None:
    file = "hyper_parameters of nicheformer.ckpt" if is_lightning else "config.json"
    with pytest.raises(CheckpointError, match=message.replace(r"config\.json", re.escape(file))):
        load_model(write(settings=settings, is_lightning=is_lightning))


@pytest.mark.parametrize(
    "key", ["embeddings.weight", "encoder.layers.1.norm2.bias", "encoder.layers.0.self_attn.in_proj_bias"]
)
def test_a_missing_weight_is_named_as_in_the_file(write: Write, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"do not fit hyper_parameters.*missing {re.escape(key)}"):
        load_model(write(is_lightning=True, edit=lambda w: {k: v for k, v in w.items() if k != key}))


def test_a_lightning_checkpoint_is_given_as_a_folder_or_by_its_own_path(write: Write, tmp_path: Path) -> None:
    folder = write(is_lightning=True)
    by_path = load_model(folder / "nicheformer.ckpt")
    assert by_path.digest == load_model(folder).digest
    (folder / "last.ckpt").write_bytes((folder / "nicheformer.ckpt").read_bytes())
    with pytest.raises(CheckpointError, match=r"several checkpoints \(last\.ckpt, nicheformer\.ckpt\)"):
        load_model(folder)
    for content, message in ((b"PK\x03\x04" + b"1" * 99, "is incomplete"), (POINTER, "Git LFS pointer")):
        (folder / "nicheformer.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"nicheformer\.ckpt {message}|nicheformer\.ckpt is a {message}"):
            load_model(folder / "nicheformer.ckpt")
    torch.save({"state_dict": [1]}, folder / "nicheformer.ckpt")
    with pytest.raises(CheckpointError, match="no state_dict of tensors"):
        load_model(folder / "nicheformer.ckpt")


def test_checkpoints_of_scfoundation_stay_its_own(write_scfoundation: Write) -> None:
    folder = write_scfoundation(parts=("cell",))
    assert isinstance(load_model(folder), ScFoundation)
    (folder / "models.ckpt").rename(folder / "other.ckpt")
    assert isinstance(load_model(folder / "other.ckpt"), ScFoundation)
