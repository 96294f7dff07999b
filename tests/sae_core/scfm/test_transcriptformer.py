"""TranscriptFormer: its network against its equations in plain torch, laid out as upstream has it, and its tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
import torch.nn.functional as F
from tiny_transcriptformer import ASSAYS, SPECIAL, write_h5, write_transcriptformer
from torch import Tensor

from sae_core.errors import ConfigError, TokenizationError, VocabularyError
from sae_core.scfm import MaskedGeneTask, Site, Tokens, TranscriptFormer, load_model

if TYPE_CHECKING:
    from pathlib import Path

GENES = [f"GENE{i}" for i in range(40)]
UNKNOWN, PAD, START = (SPECIAL.index(name) for name in ("unknown", "[PAD]", "[START]"))
N_ROWS = len(SPECIAL) + len(GENES)
SEQ_LEN = 31


def load(folder: Path, **options: str | Path) -> TranscriptFormer:
    model = load_model(folder, options=options or None)
    assert isinstance(model, TranscriptFormer)
    return model


def official_weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "model_weights.pt", weights_only=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_transcriptformer(tmp_path)


def mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = F.relu(F.linear(x, w[f"{name}.layers.0.weight"], w[f"{name}.layers.0.bias"]))
    x = F.layer_norm(x, x.shape[-1:], w[f"{name}.layers.2.weight"], w[f"{name}.layers.2.bias"])
    return F.linear(x, w[f"{name}.layers.4.weight"], w[f"{name}.layers.4.bias"])


class Upstream:
    """One cell as upstream lays it out: genes shifted by `[START]`, padded to `seq_len` places, the assay in front.

    `sites` are the activations of all places by name, `mu` the rates of the counts of all genes.
    """

    def __init__(
        self,
        w: dict[str, Tensor],
        genes: list[int],
        counts: list[float],
        assay: int,
        *,
        training: bool = False,
        n_heads: int = 2,
        act: Any = F.gelu,
    ) -> None:
        n_pad = SEQ_LEN - len(genes)
        tokens, counts = [*genes, *[PAD] * n_pad], [*counts, *[0.0] * n_pad]
        shifted = [START, *tokens[:-1]]
        esm, self.w = w["gene_embeddings.embedding.weight"], w
        x = torch.cat([w["aux_embeddings.assay.weight"][[assay]], mlp(w, "gene_embeddings.mlp", esm[shifted])])
        n, d = x.shape
        real = torch.tensor([assay != ASSAYS["unknown"], *(token != PAD for token in shifted)])
        bias = torch.log1p(torch.tensor([1.0, 1.0, *counts[:-1]]) + 1e-6).expand(n, n)
        if training:
            bias = bias * (torch.arange(n)[:, None] > torch.arange(n))
        allowed = real & (torch.arange(n)[:, None] >= torch.arange(n))
        self.sites = {"embedding": x}
        for i in range(3):
            layer = f"transformer_encoder.encoder_layers.{i}."
            h = F.layer_norm(x, (d,), w[f"{layer}norm1.weight"], w[f"{layer}norm1.bias"])

            def linear(name: str, of: Tensor, layer: str = layer) -> Tensor:
                return F.linear(of, w[f"{layer}{name}.weight"], w.get(f"{layer}{name}.bias"))

            q, k, v = (linear(f"self_attn.linears.{part}", h).view(n, n_heads, -1) for part in range(3))
            score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d / n_heads) + bias
            weight = (10 * torch.tanh(score / 10)).exp() * allowed
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
            mixed = linear("self_attn.linears.3", torch.einsum("hqk,khd->qhd", weight, v).reshape(n, d))
            z = F.layer_norm(h + mixed, (d,), w[f"{layer}norm2.weight"], w[f"{layer}norm2.bias"])
            out = linear("linear2", act(linear("linear1", z)))
            x = z + out
            self.sites |= {f"attention.{i}": mixed, f"mlp.{i}": out, f"layer.{i}": x}
        self.n = len(genes)
        logit = w["mu.gene_embedding.weight"][tokens, 0]
        own = mlp(w, "gene_embeddings.mlp", esm[tokens])
        logit = logit + mlp(w, "mu.mlp", torch.cat([x[1:], own], -1))[:, 0]
        share = logit.masked_fill(torch.tensor(tokens) == PAD, -torch.inf).softmax(0)
        self.mu = (share * sum(counts))[: self.n]
        # of places that are masked out, zeros are averaged in
        self.cell = (x * real[:, None])[1:].mean(0)


def cells() -> Tokens:
    """Cells of 5, 1, 30 and 12 genes with counts, of four assays, the last one unknown."""
    rng, parts = np.random.default_rng(0), []
    for assay, n in zip((1, 3, 2, 0), (5, 1, 30, 12), strict=True):
        genes = np.sort(rng.choice(40, n, replace=False)) + len(SPECIAL)
        parts.append(([N_ROWS + assay, START, *genes], [1, 1, *rng.integers(1, 31, n)]))
    ids, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = np.cumsum([0, *(len(part[0]) for part in parts)])
    return Tokens(
        offsets=offsets,
        gene_id=ids.astype(np.int64),
        value=values.astype(np.float32),
        is_special=(ids >= N_ROWS) | (ids == START),
    )


def upstream_of(w: dict[str, Tensor], tokens: Tokens, cell: int, **options: Any) -> Upstream:
    here = slice(*tokens.offsets[cell : cell + 2])
    genes, counts = tokens.gene_id[here][2:].tolist(), tokens.value[here][2:].tolist()
    return Upstream(w, genes, counts, int(tokens.gene_id[here][0]) - N_ROWS, **options)


@pytest.mark.parametrize("max_batch_tokens", [1, 1000])
@pytest.mark.parametrize("task", [False, True])
def test_all_sites_equal_an_independent_implementation(folder: Path, max_batch_tokens: int, task: bool) -> None:
    model, tokens, w = load(folder), cells(), official_weights(folder)
    given = model.mask_genes(tokens, seed=0, fraction=0.4) if task else tokens
    found = model.activations(given, model.sites, max_batch_tokens=max_batch_tokens)
    assert len(model.sites) == 10
    for cell in range(tokens.n_cells):
        here = slice(*tokens.offsets[cell : cell + 2])
        expected = upstream_of(w, tokens, cell, training=task)
        for site in model.sites:
            of_site = expected.sites[str(site)][: here.stop - here.start]
            torch.testing.assert_close(found[site][here], of_site, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("activation", "act"), [("relu", F.relu), ("silu", F.silu)])
def test_biases_and_activations_of_the_settings_are_followed(tmp_path: Path, activation: str, act: Any) -> None:
    settings = {"model_config": {"attn_bias": True, "fw_bias": True, "activation": activation, "num_heads": 4}}
    folder = write_transcriptformer(tmp_path, settings=settings)
    model, tokens, w = load(folder), cells(), official_weights(folder)
    found = model.activations(tokens, ["layer.2"])[Site.parse("layer.2")]
    for cell in range(tokens.n_cells):
        here = slice(*tokens.offsets[cell : cell + 2])
        expected = upstream_of(w, tokens, cell, n_heads=4, act=act).sites["layer.2"][: here.stop - here.start]
        torch.testing.assert_close(found[here], expected, atol=1e-5, rtol=1e-5)


def test_the_official_embedding_is_the_sum_over_start_and_genes_divided_by_all_places(folder: Path) -> None:
    model, tokens, w = load(folder), cells(), official_weights(folder)
    found = model.embed(tokens, readout="official")
    for cell in range(tokens.n_cells):
        torch.testing.assert_close(found[cell], upstream_of(w, tokens, cell).cell, atol=1e-5, rtol=1e-5)
    norms = found.norm(dim=1)[torch.tensor([1, 0, 3, 2])]
    assert (norms.diff() > 0).all(), "it grows with the number of genes"


@pytest.mark.parametrize("approximate", [True, False])
def test_rates_and_losses_of_counts_equal_an_independent_implementation(tmp_path: Path, approximate: bool) -> None:
    folder = write_transcriptformer(tmp_path, settings={"loss_config": {"softplus_approx": approximate}})
    model, tokens, w = load(folder), cells(), official_weights(folder)
    task = model.mask_genes(tokens, seed=0, fraction=0.4)
    found, loss = model.masked_gene_prediction(task), model.pretraining_loss(tokens, mask_fraction=0.4)
    assert loss.n_masked.tolist() == [2, 0, 12, 5]
    for cell in (0, 2, 3):
        expected, start = upstream_of(w, tokens, cell, training=True), int(tokens.offsets[cell])
        of_cell = torch.from_numpy(task.cell == cell)
        assert task.token_rows is not None
        at = torch.from_numpy(task.token_rows[task.cell == cell]) - start - 1
        torch.testing.assert_close(found.prediction[of_cell], expected.mu[at], atol=1e-5, rtol=1e-5)
        assert float(expected.mu.sum()) == pytest.approx(tokens.value[start + 2 : tokens.offsets[cell + 1]].sum())
        mu, count = expected.mu[at].double().numpy() + 1e-6, found.target[of_cell].numpy()
        if approximate:
            norm = np.maximum(mu - np.log1p(np.exp(-mu)), 0)
            error = norm - count * np.log(mu) + [math.lgamma(c + 1) for c in count]
        else:
            error = -scipy.stats.poisson.logpmf(count, mu)
        assert float(loss.per_cell[cell]) == pytest.approx(error.mean(), rel=1e-5)


def test_the_error_is_that_of_a_zero_truncated_poisson_at_large_rates(folder: Path) -> None:
    rate, count = np.array([3.0, 5.0, 12.0]), np.array([4.0, 1.0, 12.0])
    exact = -scipy.stats.poisson.logpmf(count, rate) + np.log(-np.expm1(-rate))
    found = load(folder).count_error(torch.from_numpy(rate), torch.from_numpy(count)).numpy()
    np.testing.assert_allclose(found, exact, atol=3e-3)
    np.testing.assert_allclose(found - exact, np.log1p(np.exp(-rate)) * -1 - np.log(-np.expm1(-rate)), atol=1e-5)


def test_a_gene_is_predicted_from_the_place_before_it_and_nothing_is_hidden(folder: Path) -> None:
    model, tokens = load(folder), cells()
    task = model.mask_genes(tokens, seed=1, fraction=0.3)
    assert isinstance(task, MaskedGeneTask)
    assert task.tokens is tokens
    assert task.token_rows is not None
    np.testing.assert_array_equal(tokens.gene_id[task.token_rows + 1], task.gene_id)
    np.testing.assert_array_equal(tokens.value[task.token_rows + 1], task.target)
    # neither the gene nor its count changes what is there
    row = int(task.token_rows[0])
    count = tokens.value.copy()
    count[row + 1] += 7
    other = Tokens(offsets=tokens.offsets, gene_id=tokens.gene_id, value=count, is_special=tokens.is_special)
    x, y = (
        model.activations(model.mask_genes(t, seed=1, fraction=0.3), ["layer.2"])[Site.parse("layer.2")]
        for t in (tokens, other)
    )
    assert torch.equal(x[: row + 1], y[: row + 1])
    assert not torch.equal(x[row + 2], y[row + 2])


def test_a_patch_reaches_later_places_alone_and_scales_the_rates_of_earlier_genes_alike(folder: Path) -> None:
    model, tokens = load(folder), cells().take(np.array([2]))
    at = 15

    def patch(x: Tensor, info: Any) -> Tensor:
        # not a multiple of x or a constant, which the norm of the next block would take away
        return torch.where((info.position == at)[:, None], x + torch.linspace(-3, 3, 16) ** 2, x)

    plain, patched = (
        model.activations(tokens, ["layer.2"], patches=patches)[Site.parse("layer.2")]
        for patches in (None, {"layer.0": patch})
    )
    changed = (plain != patched).any(1)
    assert changed.tolist() == [place >= at for place in range(tokens.n_tokens)]
    task = model.mask_genes(tokens, seed=0, fraction=0.9)
    before, after = (model.masked_gene_prediction(task, patches=p).prediction for p in (None, {"layer.0": patch}))
    assert task.token_rows is not None
    ratio, earlier = after / before, torch.from_numpy(task.token_rows < at)
    torch.testing.assert_close(ratio[earlier], ratio[earlier][:1].expand(int(earlier.sum())), rtol=1e-5, atol=0)
    assert ratio[~earlier].std() > 1e-4


def test_no_place_attends_to_an_unknown_assay_and_its_own_row_attends_to_nothing(tmp_path: Path) -> None:
    def moved(w: dict[str, Tensor]) -> dict[str, Tensor]:
        w["aux_embeddings.assay.weight"] = w["aux_embeddings.assay.weight"] + 1 + torch.arange(16)
        return w

    tokens = cells()
    plain, other = (load(write_transcriptformer(tmp_path, name, edit=e)) for name, e in (("a", None), ("b", moved)))
    sites = ["attention.0", "layer.2"]
    x, y = (model.activations(tokens, sites)[Site.parse("layer.2")] for model in (plain, other))
    unknown = slice(int(tokens.offsets[3]) + 1, None)
    assert torch.equal(x[unknown], y[unknown])
    assert not torch.isclose(x[1 : tokens.offsets[1]], y[1 : tokens.offsets[1]]).all()
    attention = plain.activations(tokens, sites)[Site.parse("attention.0")]
    assert not attention[tokens.offsets[3]].any()
    assert attention[tokens.offsets[2]].any()


def test_gradients_pass_from_the_embedding_to_later_places_though_a_row_attends_to_nothing(folder: Path) -> None:
    from sae_core.scfm import CachedActivations

    model, tokens = load(folder), cells().take(np.array([3]))
    start = Site.parse("embedding")
    x = model.activations(tokens, [start])[start].requires_grad_()
    model.continued(tokens, CachedActivations(start, x), "layer.1")[6].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any(1).tolist() == [False, *[True] * 6, *[False] * 7]


# tokens


def tokenize(model: TranscriptFormer, rows: Any, genes: list[str], **options: Any) -> Tokens:
    x = sp.csr_matrix(np.array(rows, dtype=np.float32))
    options = {"obs": {"assay": ["10x 3' v3"] * x.shape[0]}} | options
    return model.tokenize(x.indptr, x.indices, x.data, model.match_genes(genes), seed=0, **options)


def test_hand_computed_tokens(folder: Path) -> None:
    model = load(folder)
    names = ["GENE7.4", "nothing", "GENE3", "GENE39", "GENE20"]
    tokens = tokenize(model, [[2, 9, 31, 0, 500], [0, 4, 0, 0, 0], [0, 0, 1, 30, 0]], names)
    assert tokens.offsets.tolist() == [0, 5, 5, 9]
    ids = [N_ROWS + 1, START, 7 + 3, 7 + 7, 7 + 20, N_ROWS + 1, START, 7 + 3, 7 + 39]
    assert tokens.gene_id.tolist() == ids
    assert tokens.value.tolist() == [1, 1, 30, 2, 30, 1, 1, 1, 30]
    assert tokens.is_special.tolist() == [True, True, False, False, False, True, True, False, False]
    assert [model.vocabulary.tokens[i] for i in ids[:3]] == ["[assay] 10x 3' v3", "[START]", "GENE3"]


def test_long_cells_keep_their_first_genes_by_vocabulary_whatever_the_order_of_the_columns(folder: Path) -> None:
    model = load(folder)
    assert model.max_genes == SEQ_LEN - 1
    for genes in (GENES, GENES[::-1]):
        tokens = tokenize(model, np.ones((1, 40)), genes)
        assert tokens.gene_id.tolist() == [N_ROWS + 1, START, *range(7, 7 + SEQ_LEN - 1)]
        short = tokenize(model, np.ones((1, 40)), genes, max_tokens=5)
        assert short.gene_id.tolist() == [N_ROWS + 1, START, 7, 8, 9]
    with pytest.raises(ConfigError, match=r"max_tokens was 2.*3 or more"):
        tokenize(model, np.ones((1, 40)), GENES, max_tokens=2)


def test_counts_are_clipped_at_the_settings_own_number_after_columns_of_one_gene_are_added(tmp_path: Path) -> None:
    model = load(write_transcriptformer(tmp_path, settings={"data_config": {"clip_counts": 12}}))
    tokens = tokenize(model, [[8, 7, 3]], ["GENE1", "GENE1.2", "GENE2"])
    assert tokens.value.tolist() == [1, 1, 12, 3]


def test_a_row_of_one_value_is_refused_where_its_count_cannot_be_recovered(folder: Path) -> None:
    with pytest.raises(TokenizationError, match=r"one value.*--matrix"):
        tokenize(load(folder), [[1.7, 0.0]], ["GENE1", "GENE2"])


def test_the_assay_is_that_of_each_cell_or_of_all_and_any_other_is_unknown(folder: Path) -> None:
    rows, genes = np.ones((5, 2)), GENES[:2]
    named = ["10x 3' v2", "Smart-seq2", "", "10X 3' V2", "unknown"]
    model = load(folder)
    assert model.context == {"assay": "obs:assay"}
    assert model.obs_columns == ("assay",)
    tokens = tokenize(model, rows, genes, obs={"assay": named})
    assert (tokens.gene_id[tokens.offsets[:-1]] - N_ROWS).tolist() == [2, 3, 0, 0, 0]
    assert any("'assay'; where it is missing or not among the 4" in note for note in model.notes)
    other = load(folder, assay="obs:protocol")
    assert other.obs_columns == ("protocol",)
    assert tokenize(other, rows, genes, obs={"protocol": named}).gene_id.tolist() == tokens.gene_id.tolist()
    constant = load(folder, assay="Smart-seq2")
    assert constant.obs_columns == ()
    tokens = tokenize(constant, rows, genes, obs=None)
    assert set(tokens.gene_id[tokens.offsets[:-1]].tolist()) == {N_ROWS + 3}
    assert len({one.digest for one in (model, other, constant)}) == 3


def test_an_assay_that_is_not_given_or_not_known_is_refused_with_what_to_do(folder: Path) -> None:
    for obs in (None, {"batch": ["1"]}, {"assay": ["1", "2"]}):
        with pytest.raises(
            TokenizationError, match=r"obs column 'assay', of which [02] values .* for 1 cells.*one assay for all"
        ):
            tokenize(load(folder), [[1.0, 2.0]], GENES[:2], obs=obs)
    with pytest.raises(ConfigError, match=r"assay was '10x 3 v3'.*obs:COLUMN.*\"10x 3' v3\""):
        load(folder, assay="10x 3 v3")


MIXED = ["ENSG00000000003", "ENSG00000141510", "ENSMUSG00000059552", "FBgn0000008", "WBGene00000001", "YAL001C"]


def test_ids_of_several_species_are_found_without_versions_wherever_they_stand(tmp_path: Path) -> None:
    model = load(write_transcriptformer(tmp_path, genes=MIXED))
    names = ["ENSG00000141510.18", "Trp53", "a", "b", "YAL001C.1", "TP53", "ENSMUSG00000059552.15"]
    ids = ["", "ENSMUSG00000059552.15", "FBgn0000008", "WBGene00000001.2", "", "ENSG00000000419.12", ""]
    match = model.match_genes(names, ids)
    found = [model.vocabulary.tokens[i] if ok else None for i, ok in zip(match.token_id, match.matched, strict=True)]
    assert found == [MIXED[1], MIXED[2], MIXED[3], MIXED[4], MIXED[5], None, MIXED[2]]
    assert match.n_by_symbol == 0
    # both columns of the mouse gene are one token
    x = sp.csr_matrix(np.array([[0, 3, 0, 0, 0, 5, 4]], dtype=np.float32))
    tokens = model.tokenize(x.indptr, x.indices, x.data, match, seed=0, obs={"assay": [""]})
    assert tokens.gene_id.tolist() == [len(SPECIAL) + 6, START, len(SPECIAL) + 2]
    assert tokens.value.tolist() == [1, 1, 7]


def test_data_of_another_species_or_with_symbols_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = load(write_transcriptformer(tmp_path, genes=MIXED[:2]))
    with pytest.raises(VocabularyError, match=r"mouse.*--model-option embeddings=SPECIES_gene\.h5"):
        model.match_genes(["ENSMUSG00000059552.15", "ENSMUSG00000000001"])
    with pytest.raises(VocabularyError, match=r"TP53.*no symbols; give the data Ensembl ids"):
        model.match_genes(["TP53", "CD3D"])


def test_another_species_takes_the_rows_behind_the_special_tokens_and_has_no_count_head(tmp_path: Path) -> None:
    folder = write_transcriptformer(tmp_path)
    mouse = ["ENSMUSG00000000001", "ENSMUSG00000059552", "ENSMUSG00000000003", "ENSMUSG00000059552"]
    path = write_h5(tmp_path / "mus_musculus_gene.h5", mouse)
    model = load(folder, embeddings=path)
    assert model.vocabulary.n_genes == 3
    w = official_weights(folder)
    with h5py.File(path) as file:
        vectors = [torch.from_numpy(file["arrays"][gene][:]) for gene in mouse[:3]]
    table = w["gene_embeddings.embedding.weight"]
    w["gene_embeddings.embedding.weight"] = torch.cat([table[: len(SPECIAL)], torch.stack(vectors)])
    w |= {"mu.gene_embedding.weight": torch.zeros(10, 1)}
    tokens = tokenize(model, [[4, 0, 2], [1, 1, 1]], ["ENSMUSG00000059552.3", "ENSMUSG00000000001", mouse[2]])
    assert tokens.gene_id.tolist() == [11, START, 8, 9, 11, START, 7, 8, 9]
    x = model.activations(tokens, ["layer.2"])[Site.parse("layer.2")]
    torch.testing.assert_close(x[:4], Upstream(w, [8, 9], [4, 2], 1).sites["layer.2"][:4], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"count head"):
        model.pretraining_loss(tokens)
    assert "mu.gene_embedding.weight" in model.ignored_weights
    assert any("mus_musculus_gene.h5; without the count head" in note for note in model.notes)
    assert model.digest != load(folder).digest


def test_tokens_of_real_cells_are_those_of_a_loop_over_their_columns(tmp_path: Path, scsae_data: Path) -> None:
    data = anndata.read_h5ad(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad", backed="r")
    ids, x = [str(name) for name in data.var["ensembl_id"]], sp.csr_matrix(data.X[:2])
    genes = list(dict.fromkeys(sorted(name.partition(".")[0] for name in ids if name.startswith("ENSG"))))[::2]
    folder = write_transcriptformer(tmp_path, genes=genes, seq_len=200)
    model, column_of = load(folder, assay="10x 3' v2"), {}
    for column, name in enumerate(ids):
        column_of.setdefault(name, []).append(column)
    versions = [f"{name}.{column % 9}" if name else "" for column, name in enumerate(ids)]
    match = model.match_genes([f"symbol{i}" for i in range(len(ids))], versions)
    tokens = model.tokenize(x.indptr, x.indices, x.data, match, seed=0)
    for cell in range(2):
        own = dict(zip(x[cell].indices.tolist(), x[cell].data.tolist(), strict=True))
        expected = []
        for row, gene in enumerate(genes):
            count = sum(own.get(column, 0) for column in column_of[gene])
            if count:
                expected.append((len(SPECIAL) + row, min(float(count), 30.0)))
        here = slice(*tokens.offsets[cell : cell + 2])
        assert len(expected) > 199, "the cell is cut"
        assert list(zip(tokens.gene_id[here][2:], tokens.value[here][2:], strict=True)) == expected[:199]
        assert tokens.gene_id[here][:2].tolist() == [len(SPECIAL) + len(genes) + 2, START]
    assert (tokens.value == 30).any()
