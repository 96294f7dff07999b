from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from tiny_tahoe import DRUGS, LAYERS, D, tahoe_settings, tahoe_shapes
from torch import Tensor, nn

from sae_core.checkpoint_files import read_yaml
from sae_core.errors import CheckpointError, ConfigError, TokenizationError, VocabularyError
from sae_core.scfm import GeneMatch, Tahoe, Tokens, load_model
from sae_core.scfm.scgpt.files import is_scgpt
from sae_core.scfm.tahoe.tokenizer import TahoeTokenizer

Write = Callable[..., Path]
CLS, MASK = 1, -1.0
GENES = [f"ENSG{i * 37 + 11:011d}" for i in range(40)]
N_SMALL, N_LARGE = 50, 44
"""Rows of the embedding of the two kinds of tiny folders."""


def load(folder: Path, **options: str | Path) -> Tahoe:
    model = load_model(folder, options=options)
    assert isinstance(model, Tahoe)
    return model


def tokens_of(model: Tahoe, counts: sp.csr_matrix, genes: list[str], **options: Any) -> Tokens:
    options = {"seed": 0} | options
    return model.tokenize(counts.indptr, counts.indices, counts.data, model.match_genes(genes), **options)


class Stock:
    """Tahoe-x1 in torch's stock layers, one cell at a time, by the names of the official file and its settings."""

    def __init__(self, folder: Path) -> None:
        self.w = {key.removeprefix("model."): value for key, value in load_file(folder / "model.safetensors").items()}
        self.config = yaml.safe_load((folder / "model_config.yml").read_text())
        self.act = getattr(F, self.config["expression_encoder"]["activation"])
        self.seen: dict[str, Tensor] = {}
        self.layers = [self.layer(i) for i in range(self.config["n_layers"])]

    def layer(self, i: int) -> nn.TransformerEncoderLayer:
        d, activation = self.config["d_model"], self.config["transformer_activation"]
        layer = nn.TransformerEncoderLayer(
            d, self.config["n_heads"], d * self.config["expansion_ratio"], 0.0, activation, 1e-5, True, norm_first=True
        )
        names = {"self_attn.in_proj_": "self_attn.Wqkv.", "linear1": "up_proj", "linear2": "down_proj"}
        state = {}
        for key in layer.state_dict():
            official = key
            for theirs, ours in names.items():
                official = official.replace(theirs, ours)
            state[key] = self.w[f"transformer_encoder.layers.{i}.{official}"]
        layer.load_state_dict(state)

        def keep(site: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, given: Any, out: Any) -> None:
                self.seen[site] = (out[0] if isinstance(out, tuple) else out)[0]

            return hook

        layer.self_attn.register_forward_hook(keep(f"attention.{i}"))
        layer.linear2.register_forward_hook(keep(f"mlp.{i}"))
        layer.register_forward_hook(keep(f"layer.{i}"))
        return layer.requires_grad_(False)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def genes(self, gene_id: Tensor) -> Tensor:
        return self.norm(self.w["gene_encoder.embedding.weight"][gene_id], "gene_encoder.enc_norm")

    def sites(
        self, gene_id: Tensor, value: Tensor, *, hidden: Tensor, masked: bool, drug: int | None = None
    ) -> dict[str, Tensor]:
        """Activations of one cell at all sites; `drug` is the row of the drug whose token is at position 1."""
        v = self.linear(
            self.act(self.linear(value[:, None].clamp(max=512), "expression_encoder.linear1")),
            "expression_encoder.linear2",
        )
        x = self.genes(gene_id) + self.norm(v, "expression_encoder.norm") * ~hidden[:, None]
        x = x + self.w["flag_encoder.weight"][1] * hidden[:, None]
        if drug is not None:
            bits = self.w["chem_encoder.embedding.weight"][drug]
            x[1] = self.norm(
                self.linear(F.gelu(self.linear(bits, "chem_encoder.fc")), "chem_encoder.proj"), "chem_encoder.norm"
            )
        self.seen["embedding"] = x
        forbidden = hidden[None] & ~torch.eye(len(x), dtype=torch.bool) if masked else None
        h = x[None]
        for layer in self.layers:
            h = layer(h, src_mask=forbidden)
        self.seen["final"] = self.norm(h[0], "transformer_encoder.norm")
        return dict(self.seen)

    def heads(self, final: Tensor, gene_id: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted value of every token, by its own token and by the cell's."""
        act = getattr(F, self.config["expression_decoder"]["activation"])
        by_gene = self.linear(
            act(self.linear(final, "expression_decoder.linear_layers.0")), "expression_decoder.out_proj"
        )
        query = self.linear(torch.sigmoid(self.linear(self.genes(gene_id), "mvc_decoder.gene2query")), "mvc_decoder.W")
        return by_gene[:, 0], query @ final[0] / self.config["d_model"] ** 0.5


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize(
    ("large", "options"),
    [
        (False, {}),
        (False, {"attention": "full"}),
        (True, {}),
        (True, {"drug": "Talc"}),
        (True, {"attention": "masked"}),
    ],
)
def test_every_site_and_both_heads_equal_torchs_stock_layers_padded_and_not(
    write_tahoe: Write, counts: sp.csr_matrix, large: bool, options: dict[str, str], hides: bool
) -> None:
    folder = write_tahoe(genes=GENES, large=large)
    model, stock = load(folder, **options), Stock(folder)
    tokens = tokens_of(model, counts, GENES)
    task = model.mask_genes(tokens, seed=1, fraction=0.5)
    given = task if hides else tokens
    masked = options.get("attention", "full" if large else "masked") == "masked"
    together, alone = (model.activations(given, model.sites, max_batch_tokens=n) for n in (10_000, 1))
    predicted = model.masked_gene_prediction(task)
    loss = model.pretraining_loss(tokens, seed=1, mask_fraction=0.5)
    ragged = task.tokens if hides else tokens
    assert (tokens.lengths == 0).sum() == 1
    for cell in np.flatnonzero(tokens.lengths):
        here = slice(*tokens.offsets[cell : cell + 2])
        ids, value = torch.from_numpy(ragged.gene_id[here]), torch.from_numpy(ragged.value[here])
        drug = None
        if "drug" in options:
            drug, ids[1] = DRUGS[options["drug"]], 43
        hidden = value == MASK
        assert bool(hidden.any()) == hides
        expected = stock.sites(ids, value, hidden=hidden, masked=masked, drug=drug)
        assert [str(site) for site in model.sites] == [s for s in expected if s != "final"] + ["final"]
        for site in model.sites:
            for found in (together, alone):
                torch.testing.assert_close(found[site][here], expected[str(site)], atol=1e-5, rtol=1e-5)
        if hides:
            by_gene, by_cell = (head[hidden] for head in stock.heads(expected["final"], ids))
            target = torch.from_numpy(tokens.value[here])[hidden]
            torch.testing.assert_close(predicted.prediction[predicted.cell == cell], by_gene, atol=1e-5, rtol=1e-5)
            both = ((by_gene - target) ** 2 + (by_cell - target) ** 2) / 2
            assert float(loss.per_cell[cell]) == pytest.approx(float(both.mean()), rel=1e-5)


def test_the_cell_is_the_normalised_cls_token_after_the_final_norm(write_tahoe: Write, counts: sp.csr_matrix) -> None:
    model = load(write_tahoe(genes=GENES))
    tokens = tokens_of(model, counts, GENES)
    final = model.activations(tokens, ["final"])[model.default_site]
    cells = np.flatnonzero(tokens.lengths)
    expected = F.normalize(final[torch.from_numpy(tokens.offsets[cells])], dim=-1)
    torch.testing.assert_close(model.embed(tokens, readout="official")[cells], expected)
    assert model.readouts == ("cls", "mean")


def tokenizer(**settings: Any) -> TahoeTokenizer:
    defaults = {"cls_id": CLS, "special_value": -2.0, "n_bins": 51, "right_binning": False, "max_length": 20}
    return TahoeTokenizer(**(defaults | settings))


def tokenize(rows: list[list[float]], *, seed: int = 0, max_tokens: int | None = None, **settings: Any) -> Tokens:
    x = sp.csr_matrix(np.array(rows, dtype=np.float32))
    match = GeneMatch(token_id=np.arange(10, 10 + x.shape[1]), matched=np.ones(x.shape[1], dtype=bool))
    return tokenizer(**settings)(x.indptr, x.indices, x.data, match, seed=seed, max_tokens=max_tokens)


def test_digits_by_hand_and_a_tie_goes_to_its_low_end() -> None:
    # 5 bins: four edges at the quantiles 0, 1/3, 2/3, 1 of 1 1 2 9, which are 1, 1, 2, 9
    tokens = tokenize([[2, 1, 0, 9, 1]], n_bins=5)
    assert tokens.gene_id.tolist() == [CLS, 10, 11, 13, 14]
    assert tokens.value.tolist() == [-2, 3, 1, 4, 1]
    # with right binning an edge that equals a value is below it, and the digit is the number of edges
    assert tokenize([[2, 1, 0, 9, 1]], n_bins=5, right_binning=True).value.tolist() == [-2, 3, 2, 4, 2]
    assert tokenize([[0, 7, 0]]).value.tolist() == [-2, 1]
    assert tokenize([[4, 4, 4]]).value.tolist() == [-2, 1, 1, 1]


def test_a_stored_zero_is_no_token_and_a_cell_without_genes_has_none() -> None:
    x = sp.csr_matrix((np.array([0.0, 3.0, 0.0], dtype=np.float32), [0, 2, 1], [0, 2, 3]), shape=(2, 3))
    match = GeneMatch(token_id=np.arange(10, 13), matched=np.ones(3, dtype=bool))
    tokens = tokenizer()(x.indptr, x.indices, x.data, match, seed=0)
    assert tokens.gene_id.tolist() == [CLS, 12]
    assert tokens.lengths.tolist() == [2, 0]


def test_all_genes_are_binned_before_a_seeded_sample_of_a_long_cell_is_taken() -> None:
    row = [float(i) for i in range(1, 31)]
    whole = tokenize([row], max_length=40)
    cut, again, other = (tokenize([row], max_length=12, seed=seed) for seed in (3, 3, 4))
    assert cut.lengths.tolist() == [12]
    assert cut.is_special.tolist() == [True] + [False] * 11
    digit_of = dict(zip(whole.gene_id.tolist(), whole.value.tolist(), strict=True))
    assert cut.value.tolist() == [digit_of[gene] for gene in cut.gene_id.tolist()]
    assert np.array_equal(cut.gene_id, again.gene_id)
    assert not np.array_equal(cut.gene_id, other.gene_id)
    assert tokenize([row], max_length=31).n_tokens == 31
    with pytest.raises(ConfigError, match="max_tokens was 1; allowed: 2 or more"):
        tokenize([row], max_tokens=1)


def test_official_first_tokens_keep_the_raw_value_of_the_first_expressed_column_which_is_never_left_out() -> None:
    x = np.array([[0, 700, 3, 1, 2], [5, 0, 0, 1, 2]], dtype=np.float32)
    # columns are in another order than the ids of their tokens
    match = GeneMatch(token_id=np.array([14, 13, 12, 11, 10]), matched=np.ones(5, dtype=bool))
    rows = sp.csr_matrix(x)
    tokens = tokenizer(n_bins=5, n_raw=1)(rows.indptr, rows.indices, rows.data, match, seed=0)
    # of the others, 3 1 2, the edges are 1, 5/3, 7/3, 3; of 1 2 they are 1, 4/3, 5/3, 2
    assert tokens.gene_id.tolist() == [CLS, 10, 11, 12, 13, CLS, 10, 11, 14]
    assert tokens.value.tolist() == [-2, 3, 1, 4, 700, -2, 4, 1, 5]
    for seed in range(8):
        cut = tokenizer(n_bins=5, n_raw=1, max_length=3)(rows.indptr, rows.indices, rows.data, match, seed=seed)
        assert cut.lengths.tolist() == [3, 3]
        assert {13, 14} <= set(cut.gene_id.tolist())
    assert tokenize([[7]], n_raw=1).value.tolist() == [-2, 7]
    with pytest.raises(ConfigError, match="allowed: 3 or more"):
        tokenizer(n_raw=2)(rows.indptr, rows.indices, rows.data, match, seed=0, max_tokens=2)


@pytest.fixture
def kang(scsae_data: Path) -> tuple[sp.csr_matrix, list[str]]:
    """Counts of 120 real cells, and the Ensembl ids of their genes."""
    import anndata

    cells = anndata.read_h5ad(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad")[:120]
    return sp.csr_matrix(cells.X).astype(np.float32), list(cells.var["ensembl_id"].astype(str))


def test_tokens_of_real_cells_equal_the_published_rule_in_torch(
    write_tahoe: Write, kang: tuple[sp.csr_matrix, list[str]]
) -> None:
    counts, ids = kang
    known = sorted({i for i in ids if i.startswith("ENSG")})[::2]
    model = load(write_tahoe(genes=known, collator={"max_length": 2048}))
    tokens = tokens_of(model, counts, ids)
    of_gene = {name: i for i, name in enumerate(known)}
    pairs = [(column, of_gene[name]) for column, name in enumerate(ids) if name in of_gene]
    adding = sp.csr_matrix(
        (np.ones(len(pairs), dtype=np.float32), tuple(zip(*pairs, strict=True))), (len(ids), len(known))
    )
    totals = (counts @ adding).toarray()
    grades = torch.linspace(0, 1, 50)
    n_tied = 0
    for cell, total in enumerate(totals):
        expected = {CLS: -2.0}
        x = torch.from_numpy(total[total > 0]).float()
        digits = torch.bucketize(x, torch.quantile(x, grades)) + 1
        expected |= dict(zip((np.flatnonzero(total) + 3).tolist(), digits.tolist(), strict=True))
        here = slice(*tokens.offsets[cell : cell + 2])
        found = dict(zip(tokens.gene_id[here].tolist(), tokens.value[here].tolist(), strict=True))
        assert found == expected
        n_tied += len(x) - len(x.unique())
    assert n_tied > 5_000
    assert tokens.gene_id[tokens.offsets[:-1]].tolist() == [CLS] * 120


@pytest.mark.parametrize("cell", [0, 7])
def test_a_real_cell_by_hand_with_ties_unknown_genes_and_truncation(
    write_tahoe: Write, kang: tuple[sp.csr_matrix, list[str]], cell: int
) -> None:
    counts, ids = kang
    row = counts[cell].toarray()[0]
    n_columns = Counter(ids)
    expressed = [i for i in np.flatnonzero(row) if n_columns[ids[i]] == 1 and ids[i].startswith("ENSG")]
    known = sorted(ids[i] for i in expressed[::3])
    model = load(write_tahoe(genes=known))
    count_of = {ids[i]: row[i] for i in expressed}
    ordered = np.sort([count_of[name] for name in known])
    n = len(known)
    assert n > 60
    # edge j is at rank j (n - 1) / 49 of the ordered counts, between two of them by its fraction
    ranks = np.arange(50) * (n - 1) / 49
    low = np.minimum(ranks.astype(int), n - 2)
    edges = ordered[low] + (ordered[low + 1] - ordered[low]) * (ranks - low)
    digits = {3 + i: 1 + int((edges < count_of[name] - 1e-9).sum()) for i, name in enumerate(known)}
    whole = tokens_of(load(write_tahoe("long", genes=known, collator={"max_length": 1024})), counts[[cell]], ids)
    assert dict(zip(whole.gene_id[1:].tolist(), whole.value[1:].tolist(), strict=True)) == digits
    assert len(set(digits.values())) < n
    cut = tokens_of(model, counts[[cell]], ids)
    assert cut.n_tokens == 32
    assert all(
        digits[gene] == value for gene, value in zip(cut.gene_id[1:].tolist(), cut.value[1:].tolist(), strict=True)
    )


def test_ids_match_with_versions_and_symbols_are_refused(write_tahoe: Write) -> None:
    model = load(write_tahoe(genes=GENES))
    match = model.match_genes([f"{GENES[0]}.4", GENES[5].lower(), "CD79A", "<cls>", "<junk0>", "ENSG00000000001"])
    assert match.matched.tolist() == [True, True, False, False, False, False]
    assert match.token_id[:2].tolist() == [3, 8]
    with pytest.raises(VocabularyError, match="Ensembl ids"):
        model.match_genes(["CD79A", "MS4A1"])
    assert model.vocabulary.n_genes == 40


def test_each_cell_is_given_the_drug_of_its_column_and_unknown_ones_that_of_no_drug(
    write_tahoe: Write, counts: sp.csr_matrix
) -> None:
    folder = write_tahoe(genes=GENES, large=True)
    model = load(folder, drug="obs:treatment")
    names = ["Talc", "", "DMSO_TF", "Talc", "Bortezomib", *["Trametinib (DMSO_TF solvate)"] * 7]
    assert model.obs_columns == ("treatment",)
    tokens = tokens_of(model, counts, GENES, obs={"treatment": names})
    cells = np.flatnonzero(tokens.lengths)
    at = tokens.offsets[cells] + 1
    assert [model.vocabulary.tokens[i] for i in tokens.gene_id[at]] == [
        f"<drug:{names[cell] if names[cell] in DRUGS else '<pad>'}>" for cell in cells
    ]
    assert tokens.is_special[at].all()
    assert (tokens.value[at] == -2).all()
    mixed = model.embed(tokens, readout="cls")
    for name in ("Talc", "<pad>"):
        one = load(folder, drug=name)
        same = [cell for cell in cells if (names[cell] if names[cell] in DRUGS else "<pad>") == name]
        torch.testing.assert_close(one.embed(tokens_of(one, counts, GENES), readout="cls")[same], mixed[same])
        assert one.context == {"drug": name}
        assert one.obs_columns == ()
    assert any("a missing name, and one that is not among the 4 drugs" in note for note in model.notes)
    with pytest.raises(TokenizationError, match="'treatment'"):
        tokens_of(model, counts, GENES)
    half = load_model(folder, dtype=torch.bfloat16, options={"drug": "obs:treatment"})
    site = half.sites[0]
    rough, exact = (m.activations(tokens, [site])[site][at] for m in (half, model))
    assert float((rough.float() - exact).abs().max()) < 0.1


def test_a_drug_takes_the_place_of_no_gene_where_a_cell_is_shorter_than_the_input(
    write_tahoe: Write, counts: sp.csr_matrix
) -> None:
    folder = write_tahoe(genes=GENES, large=True)
    plain, treated = load(folder), load(folder, drug="Talc")
    lengths = [tokens_of(model, counts, GENES).lengths for model in (plain, treated)]
    assert lengths[0].max() < 32
    np.testing.assert_array_equal(lengths[1], lengths[0] + (lengths[0] > 0))
    cut = tokens_of(treated, counts, GENES, max_tokens=5)
    assert cut.lengths.max() == 5
    assert cut.is_special.sum() == 22
    with pytest.raises(ConfigError, match=r"allowed: 3 or more \(<cls>, the drug and a gene\)"):
        tokens_of(treated, counts, GENES, max_tokens=2)


def test_without_a_drug_its_token_is_left_out_and_its_encoder_is_not_read(
    write_tahoe: Write, counts: sp.csr_matrix
) -> None:
    model = load(write_tahoe(genes=GENES, large=True))
    assert len(model.ignored_weights) == 7
    assert all(name.startswith("model.chem_encoder.") for name in model.ignored_weights)
    assert tokens_of(model, counts, GENES).is_special.sum() == 11
    assert model.max_genes == 31
    with_drug = load(write_tahoe("other", genes=GENES, large=True), drug="<pad>")
    assert with_drug.max_genes == 30
    assert with_drug.ignored_weights == ()
    notes = " ".join(model.notes)
    for words in ("drug=obs:COLUMN", "keep_first=official", "amp_bf16", "chem_encoder", "at most 32 tokens"):
        assert words in notes
    assert "use_attn_mask" not in notes
    assert "attention=full" in " ".join(load(write_tahoe("small", genes=GENES)).notes)


def test_the_official_first_tokens_change_a_large_model_without_a_drug_alone(
    write_tahoe: Write, counts: sp.csr_matrix
) -> None:
    small, large = write_tahoe("s", genes=GENES), write_tahoe("l", genes=GENES, large=True)
    assert load(small, keep_first="official").tokenizer.n_raw == 0
    assert load(large, keep_first="official", drug="Talc").tokenizer.n_raw == 0
    model = load(large, keep_first="official")
    assert model.tokenizer.n_raw == 1
    tokens = tokens_of(model, counts, GENES)
    first = tokens.offsets[:-1][tokens.lengths > 0] + 1
    np.testing.assert_array_equal(tokens.value[first], counts.toarray()[tokens.lengths > 0, 0])
    assert any("keep their raw values" in note for note in model.notes)


def test_every_option_that_changes_numbers_changes_the_digest(write_tahoe: Write) -> None:
    folder = write_tahoe(genes=GENES, large=True)
    options: list[dict[str, str | Path]] = [{}, {"drug": "Talc"}, {"drug": "<pad>"}, {"drug": "obs:a"}]
    options += [{"keep_first": "official"}, {"attention": "masked"}, {"max_length": "20"}]
    options += [{"attention": "masked", "max_length": "20"}]
    assert len({load(folder, **one).digest for one in options}) == len(options)
    same: list[dict[str, str | Path]] = [{"drug": "none"}, {"attention": "full"}, {"max_length": "32"}]
    same += [{"keep_first": "special"}]
    assert {load(folder, **one).digest for one in same} == {load(folder).digest}
    (folder / "drug_to_id_pad.json").write_text(json.dumps(DRUGS | {"Talc": 3, "Trametinib (DMSO_TF solvate)": 2}))
    assert load(folder, drug="Talc").digest not in {load(write_tahoe("b", genes=GENES, large=True), drug="Talc").digest}


def test_the_drugs_may_lie_in_another_file(write_tahoe: Write, tmp_path: Path) -> None:
    folder = write_tahoe(genes=GENES, large=True)
    (folder / "drug_to_id_pad.json").rename(tmp_path / "drugs.json")
    with pytest.raises(CheckpointError, match=r"drug_to_id_pad\.json is not there.*--model-option drugs=FILE"):
        load(folder, drug="Talc")
    assert load(folder, drug="Talc", drugs=tmp_path / "drugs.json").drugs is not None


@pytest.mark.parametrize(
    ("large", "options", "words"),
    [
        (True, {"drug": "talc powder"}, r"drug was 'talc powder'.*4 names of drug_to_id_pad\.json"),
        (True, {"drug": "tramet"}, r"similar: Trametinib \(DMSO_TF solvate\)"),
        (False, {"drug": "Talc"}, r"no chemical_encoder in model_config\.yml.*allowed: none"),
        (True, {"keep_first": "2"}, "keep_first was '2'; allowed: special, official"),
        (True, {"attention": "causal"}, "attention was 'causal'; allowed: full, masked"),
        (True, {"max_length": "2k"}, "max_length was '2k'; allowed: a whole number of 3 or more"),
        (True, {"attention": "obs:type"}, "one for all cells"),
    ],
)
def test_an_option_with_another_value_is_named(
    write_tahoe: Write, large: bool, options: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(write_tahoe(genes=GENES, large=large), **options)


@pytest.mark.parametrize(
    "rows",
    [{"<pad>": 0, "Talc": 4}, {"<pad>": 0, "Talc": "1"}, {"<pad>": 1}, {"<pad>": 0, "a": 1, "b": 1}, {"Talc": 1}],
)
def test_a_list_of_drugs_that_does_not_fit_the_encoder_is_refused(write_tahoe: Write, rows: dict[str, Any]) -> None:
    folder = write_tahoe(genes=GENES, large=True)
    (folder / "drug_to_id_pad.json").write_text(json.dumps(rows))
    with pytest.raises(CheckpointError, match=r"drug_to_id_pad\.json has "):
        load(folder, drug="<pad>")


@pytest.mark.parametrize("fields_count_it", [True, False])
def test_the_rows_of_the_embedding_decide_about_the_drug_that_a_vocabulary_lacks(
    write_tahoe: Write, counts: sp.csr_matrix, fields_count_it: bool
) -> None:
    folder = write_tahoe(
        genes=GENES, large=True, with_drug=False, model={"vocab_size": N_LARGE - (not fields_count_it)}
    )
    model, whole = load(folder, drug="Talc"), load(write_tahoe("whole", genes=GENES, large=True), drug="Talc")
    assert model.vocabulary == whole.vocabulary
    assert model.vocabulary.id_of("<drug>") == N_LARGE - 1
    tokens = tokens_of(model, counts, GENES)
    assert torch.equal(model.embed(tokens).nan_to_num(), whole.embed(tokens).nan_to_num())
    assert any("43" in note for note in model.notes) != fields_count_it


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as told:
        load_model(folder)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("model", {"norm_scheme": "post"}, "model_config.yml has norm_scheme 'post'; allowed: 'pre'"),
        ("model", {"use_glu": True}, "model_config.yml has use_glu True; allowed: false"),
        ("model", {"standard_scale_outputs": True}, "standard_scale_outputs True"),
        ("model", {"cell_emb_style": "avg-pool"}, "cell_emb_style 'avg-pool'"),
        ("model", {"transformer_activation": "geglu"}, "transformer_activation 'geglu'"),
        ("model", {"n_heads": 3}, "n_heads 3; allowed: a divisor of d_model 16"),
        ("model", {"n_layers": None}, "model_config.yml has n_layers null"),
        ("model", {"n_layers": 4}, "n_layers is 4 in model_config.yml and 3 in the weights"),
        ("model", {"d_model": 32}, "d_model is 32 in model_config.yml and 16 in the weights"),
        ("model", {"expansion_ratio": 4}, "is 64 in model_config.yml and 32 in the weights"),
        ("model", {"vocab_size": 60}, "vocab_size 60; allowed: the number of rows of the embedding, 50"),
        ("model", {"attn_config": {"kv_n_heads": 1}}, "attn_config has kv_n_heads 1"),
        ("model", {"norm_config": {"norm_type": "rmsnorm"}}, "norm_config has norm_type 'rmsnorm'"),
        ("model", {"expression_encoder": {"input_emb_style": "category"}}, "input_emb_style 'category'"),
        ("model", {"expression_encoder": 3}, "model_config.yml has expression_encoder 3"),
        ("model", {"gene_encoder": {"use_norm": True, "embeddings": {"evo": {}}}}, "gene_encoder has embeddings"),
        ("model", {"mvc": {"arch_style": "concat query"}}, "mvc has arch_style 'concat query'"),
        ("model", {"expression_decoder": {"n_outputs": 2}}, "expression_decoder has n_outputs 2"),
        ("collator", {"do_binning": False}, "collator_config.yml has do_binning False; allowed: true"),
        ("collator", {"sampling": False}, "sampling False"),
        ("collator", {"log_transform": True}, "log_transform True"),
        ("collator", {"pad_token_id": 2}, "collator_config.yml has pad_token_id 2; allowed: that of '<pad>'"),
        ("collator", {"mask_value": -2}, "mask_value -2"),
        ("collator", {"mlm_probability": [0.3, 0.5]}, "mlm_probability [0.3, 0.5]"),
        ("collator", {"max_length": "${max_len}"}, "max_length '${max_len}'"),
    ],
)
def test_a_field_of_another_value_is_named_with_its_file(
    write_tahoe: Write, file: str, fields: dict[str, Any], words: str
) -> None:
    assert words in refused(write_tahoe(genes=GENES, **{file: fields}))


@pytest.mark.parametrize("file", ["model_config.yml", "collator_config.yml", "vocab.json"])
def test_a_missing_cut_or_replaced_file_is_named(write_tahoe: Write, file: str) -> None:
    folder = write_tahoe(genes=GENES)
    text = (folder / file).read_text()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2053\n")
    assert re.search(rf"{file} is a Git LFS pointer", refused(folder))
    (folder / file).write_text("- 1\n- 2\n" if file.endswith("yml") else text[: len(text) // 2])
    assert file in refused(folder)
    (folder / file).unlink()
    assert f"{file} is missing" in refused(folder)


@pytest.mark.parametrize(
    "text", ["a: [1", "!!python/object/apply:os.getcwd []", "[" * 1200, "a: b: c", "1: 2", "\t- x: [}"]
)
def test_what_is_no_plain_yaml_is_refused_in_a_line(write_tahoe: Write, text: str) -> None:
    folder = write_tahoe(genes=GENES)
    (folder / "model_config.yml").write_text(text)
    assert "model_config.yml" in refused(folder)


def test_yaml_numbers_are_read_in_every_spelling(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("a: 1e-5\nb: 1.0e-05\nc: 3\nd: 1E+2\ne: '1e-5'\nf: e5\n")
    assert read_yaml(path) == {"a": 1e-5, "b": 1e-5, "c": 3, "d": 100.0, "e": "1e-5", "f": "e5"}


@pytest.mark.parametrize("n_tokens", [49, 51])
def test_a_vocabulary_of_another_size_is_refused_with_both_numbers(write_tahoe: Write, n_tokens: int) -> None:
    folder = write_tahoe(genes=GENES)
    names = [*json.loads((folder / "vocab.json").read_text()), "ENSG99999999999"][:n_tokens]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    assert re.search(rf"embedding\.weight has 50 rows but vocab\.json names {n_tokens} tokens", refused(folder))


def test_a_vocabulary_without_its_special_tokens_is_refused(write_tahoe: Write) -> None:
    folder = write_tahoe(genes=GENES)
    names = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({name.replace("<cls>", "CLS"): i for name, i in names.items()}))
    assert "vocab.json lacks the token '<cls>'" in refused(folder)


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def with_tensor(name: str, *shape: int, fill: float = 0.0) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {f"model.{name}": torch.full(shape, fill)}


BLOCK = "transformer_encoder.layers.1."


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("flag"), "missing model.flag_encoder.weight"),
        (without("layers.1.up_proj.bias"), f"missing model.{BLOCK}up_proj.bias"),
        (with_tensor("gene_encoder.project.weight", 16, 20), "unexpected model.gene_encoder.project.weight"),
        (with_tensor(f"{BLOCK}gate_proj.bias", 32), f"unexpected model.{BLOCK}gate_proj.bias"),
        (with_tensor("mvc_decoder.W.weight", 16, 8), "model.mvc_decoder.W.weight is (16, 8) instead of (16, 16)"),
        (without("embedding"), "lack model.gene_encoder.embedding.weight"),
        (with_tensor("flag_encoder.weight", 2, 16, fill=torch.nan), "not finite (nan or inf): model.flag_encoder"),
        (with_tensor(f"{BLOCK}self_attn.Wqkv.lora_A", 2, 16), "adapter"),
    ],
)
def test_weights_that_do_not_fit_are_named_as_in_the_file(
    write_tahoe: Write, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    assert words in refused(write_tahoe(genes=GENES, edit=edit))


def test_a_checkpoint_of_a_training_run_is_refused_with_the_way_to_safetensors(write_tahoe: Write) -> None:
    folder = write_tahoe(genes=GENES)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state": {"model": weights, "callbacks": {}}, "rng": []}, folder / "best-model.pt")
    told = refused(folder)
    assert re.search(r"best-model\.pt runs code when it is opened.*model\.safetensors", told)
    found = re.search(r'python -c "(.*)"', told)
    assert found is not None
    code = found[1].replace("'best-model.pt'", repr(str(folder / "best-model.pt")))
    exec(code.replace("'model.safetensors'", repr(str(folder / "model.safetensors"))), {})
    assert load(folder).n_layers == LAYERS


def test_weights_in_parts_are_read(write_tahoe: Write) -> None:
    whole = write_tahoe("whole", genes=GENES)
    folder = write_tahoe("parts", genes=GENES)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file)
    index = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    state = load(folder).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in load(whole).state_dict().items())


def full_size(n_layers: int, *, large: bool) -> dict[str, Tensor]:
    """Tensors by the names of a published file, in tiny shapes."""
    shapes = tahoe_shapes(large=large, n_rows=N_LARGE if large else N_SMALL, n_layers=n_layers)
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def names_by_hand(n_layers: int, *, large: bool) -> set[str]:
    """Every key of a published file, written from the list of what is on disk."""
    both = [f"transformer_encoder.layers.{i}.{part}" for i in range(n_layers) for part in (
        "self_attn.Wqkv", "self_attn.out_proj", "up_proj", "down_proj", "norm1", "norm2")]  # fmt: skip
    both += ["gene_encoder.enc_norm", "expression_encoder.linear1", "expression_encoder.linear2"]
    both += ["expression_encoder.norm", "transformer_encoder.norm", "expression_decoder.linear_layers.0"]
    both += ["expression_decoder.out_proj", "mvc_decoder.gene2query"]
    both += ["chem_encoder.fc", "chem_encoder.proj", "chem_encoder.norm"] if large else []
    alone = ["gene_encoder.embedding", "flag_encoder", "mvc_decoder.W", *(["chem_encoder.embedding"] if large else [])]
    return {f"model.{name}.{end}" for name in both for end in ("weight", "bias")} | {f"model.{n}.weight" for n in alone}


@pytest.mark.parametrize(("n_layers", "large"), [(12, False), (24, False), (32, True)])
def test_every_weight_of_the_published_layouts_is_read_or_named(write_tahoe: Write, n_layers: int, large: bool) -> None:
    weights = full_size(n_layers, large=large)
    assert set(weights) == names_by_hand(n_layers, large=large)
    extra = {"model.cls_decoder.out_layer.weight": torch.ones(2, D), "model.classifier_head.bias": torch.ones(3)}
    given = {"n_layers": n_layers}
    folder = write_tahoe(genes=GENES, large=large, edit=lambda _: weights | extra, model=given)
    model = load(folder, **({"drug": "Talc"} if large else {}))
    assert model.n_layers == n_layers
    assert set(model.ignored_weights) == set(extra)
    ours = {
        f"model.{k.replace('.linear1.', '.up_proj.').replace('.linear2.', '.down_proj.')}"
        if ".layers." in k
        else f"model.{k}"
        for k in model.state_dict()
    }
    assert ours == set(weights)
    assert any("cls_decoder" in note for note in model.notes)
    if large:
        assert len(load(folder).ignored_weights) == len(extra) + 7


def test_a_checkpoint_without_heads_says_so_and_one_without_an_mvc_head_loses_its_error(
    write_tahoe: Write, counts: sp.csr_matrix
) -> None:
    bare = load(write_tahoe("a", genes=GENES, edit=without("_decoder")))
    tokens = tokens_of(bare, counts, GENES)
    assert any("without an expression decoder" in note for note in bare.notes)
    with pytest.raises(ConfigError, match="expression decoder"):
        bare.pretraining_loss(tokens)
    for folder in (
        write_tahoe("b", genes=GENES, edit=without("mvc")),
        write_tahoe("c", genes=GENES, model={"mvc": None}),
    ):
        model = load(folder)
        task = model.mask_genes(tokens, seed=0, fraction=0.5)
        predicted = model.masked_gene_prediction(task)
        error = (predicted.prediction - predicted.target) ** 2
        assert model.pretraining_loss(tokens).mean == pytest.approx(float(error.mean()), rel=1e-5)
    assert len(load(write_tahoe("d", genes=GENES, model={"mvc": None})).ignored_weights) == 3


def test_a_field_that_is_absent_has_the_default_of_the_authors_code(write_tahoe: Write) -> None:
    model, collator = tahoe_settings(large=False, n_rows=N_SMALL)
    for fields, names in (
        (model, ("norm_scheme", "use_glu", "attn_config", "norm_config")),
        (collator, ("num_bins", "right_binning", "sampling")),
    ):
        for name in names:
            del fields[name]
    folder = write_tahoe(genes=GENES)
    (folder / "model_config.yml").write_text(yaml.safe_dump(model))
    (folder / "collator_config.yml").write_text(yaml.safe_dump(collator))
    config = load(folder).config
    assert config == load(write_tahoe("whole", genes=GENES)).config
    del model["expression_encoder"]["use_norm"], model["gene_encoder"]
    (folder / "model_config.yml").write_text(yaml.safe_dump(model))
    assert "unexpected model.gene_encoder.enc_norm.weight" in refused(folder)


def test_a_large_network_is_built_without_memory_of_its_own_and_half_precision_files_are_read(
    write_tahoe: Write, counts: sp.csr_matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tahoe(genes=GENES)
    plain = load(folder)
    tokens = tokens_of(plain, counts, GENES)
    monkeypatch.setattr("sae_core.scfm.tahoe.network._LARGE", 0)
    assert torch.equal(load(folder).embed(tokens).nan_to_num(), plain.embed(tokens).nan_to_num())
    random = load_model(folder, random_init=True, seed=1)
    monkeypatch.undo()
    again = load_model(folder, random_init=True, seed=1)
    assert torch.equal(random.embed(tokens).nan_to_num(), again.embed(tokens).nan_to_num())
    half = load(write_tahoe("half", genes=GENES, edit=lambda w: {k: v.bfloat16() for k, v in w.items()}))
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}


def test_random_weights_keep_the_fingerprints_and_have_the_variance_of_the_authors(write_tahoe: Write) -> None:
    folder = write_tahoe(genes=[f"ENSG{i:011d}" for i in range(3000)], large=True)
    own, random = (load_model(folder, random_init=r, options={"drug": "Talc"}).state_dict() for r in (False, True))
    assert torch.equal(own["chem_encoder.embedding.weight"], random["chem_encoder.embedding.weight"])
    assert not torch.equal(own["chem_encoder.fc.weight"], random["chem_encoder.fc.weight"])
    assert float(random["gene_encoder.embedding.weight"].std()) == pytest.approx((2 / D) ** 0.5, rel=0.02)
    assert not random["transformer_encoder.layers.0.linear1.bias"].any()


def test_other_families_do_not_take_the_folder_and_scgpt_looks_at_its_names_alone(
    write_tahoe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tahoe(genes=GENES)
    monkeypatch.setattr("sae_core.scfm.scgpt.files.read_weights", lambda _: pytest.fail("the weights were read"))
    assert not is_scgpt(folder)
    assert load(folder).family == "tahoe"
