from __future__ import annotations

import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sae_core.checkpoint_files import read_dictionary
from sae_core.errors import CheckpointError, ConfigError, TokenizationError
from sae_core.scfm import Geneformer, GeneMatch, Site, Tokens, load_model
from sae_core.scfm.geneformer.files import find_dictionaries
from sae_core.scfm.geneformer.tokenizer import GeneformerTokenizer

Write = Callable[..., Path]
PAD, MASK, CLS, EOS = range(4)
# token ids 4, 5, 6, 7, 8 and their medians
MEDIANS = np.array([np.nan] * 4 + [1.0, 2.0, 4.0, 2.0, 1.0])


def tokenize(
    rows: list[list[float]],
    *,
    v2: bool = False,
    max_positions: int = 20,
    only: tuple[int, ...] | None = None,
    **options: int,
) -> Tokens:
    tokenizer = GeneformerTokenizer(
        medians=MEDIANS, max_positions=max_positions, cls_eos_ids=(CLS, EOS) if v2 else None
    )
    x = sp.csr_matrix(np.array(rows, dtype=np.float32))
    match = GeneMatch(token_id=np.arange(4, 9), matched=np.ones(5, dtype=bool))
    match = match if only is None else match.only(np.array(only))
    return tokenizer(x.indptr, x.indices, x.data, match, **options)


def test_hand_computed_ranks() -> None:
    # x / median: 3, 4, 1.25, 0.5, 2 -> tokens 5, 4, 8, 6, 7; total 21, so token 5 has 8/21 * 10,000 / 2
    tokens = tokenize([[3, 8, 5, 1, 2]])
    np.testing.assert_array_equal(tokens.gene_id, [5, 4, 8, 6, 7])
    np.testing.assert_allclose(tokens.value, np.array([4, 3, 2, 1.25, 0.5]) / 19 * 1e4, rtol=1e-6)
    assert not tokens.is_special.any()


def test_chosen_genes_are_ranked_alone_by_the_total_of_all() -> None:
    whole, some = tokenize([[3, 8, 5, 1, 2]]), tokenize([[3, 8, 5, 1, 2]], only=(4, 6))
    kept = np.isin(whole.gene_id, [4, 6])
    assert kept.sum() == 2
    np.testing.assert_array_equal(some.gene_id, whole.gene_id[kept])
    np.testing.assert_array_equal(some.value, whole.value[kept])


def test_ties_are_broken_by_token_id() -> None:
    # x / median: 2, 2, 2, 1, 1
    np.testing.assert_array_equal(tokenize([[2, 4, 8, 2, 1]]).gene_id, [4, 5, 6, 7, 8])
    np.testing.assert_array_equal(tokenize([[1, 2, 8, 4, 2]]).gene_id, [6, 7, 8, 4, 5])


def test_v1_keeps_the_highest_ranks_that_fit() -> None:
    np.testing.assert_array_equal(tokenize([[3, 8, 5, 1, 2]], max_positions=3).gene_id, [5, 4, 8])
    np.testing.assert_array_equal(tokenize([[3, 8, 5, 1, 2]], max_positions=5).gene_id, [5, 4, 8, 6, 7])


def test_v2_cuts_to_two_less_and_then_adds_cls_and_eos() -> None:
    tokens = tokenize([[3, 8, 5, 1, 2], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], v2=True, max_positions=5)
    np.testing.assert_array_equal(tokens.gene_id, [CLS, 5, 4, 8, EOS, CLS, 6, EOS])
    np.testing.assert_array_equal(tokens.lengths, [5, 0, 3])
    np.testing.assert_array_equal(tokens.is_special, [True, False, False, False, True, True, False, True])
    np.testing.assert_array_equal(tokenize([[3, 8, 5, 1, 2]], v2=True, max_tokens=4).gene_id, [CLS, 5, 4, EOS])
    with pytest.raises(ConfigError, match="2; allowed: 3"):
        tokenize([[1, 0, 0, 0, 0]], v2=True, max_tokens=2)


def test_values_that_are_no_multiples_of_a_unit_are_refused() -> None:
    with pytest.raises(TokenizationError, match=r"row 1 .*--matrix"):
        tokenize([[1, 2, 3, 0, 0], [0.31, 1.7, 0.52, 2.2, 0.9]])


@pytest.fixture(scope="module")
def bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The oracle and its state dict, tied decoder and all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=44,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_act="relu",
            max_position_embeddings=30,
            layer_norm_eps=1e-12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BertForMaskedLM(config).eval()
            for parameter in model.parameters():
                parameter.data.normal_(std=0.3)
    return model, model.state_dict()


@pytest.fixture
def pair(
    bert: tuple[torch.nn.Module, dict[str, torch.Tensor]], write_geneformer: Write
) -> tuple[torch.nn.Module, Geneformer]:
    folder = write_geneformer(edit=lambda _: {k: v.clone() for k, v in bert[1].items() if "decoder" not in k})
    model = load_model(folder)
    assert isinstance(model, Geneformer)
    return bert[0], model


def padded(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    real = np.arange(tokens.lengths.max()) < tokens.lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = tokens.gene_id
    return torch.from_numpy(ids), torch.from_numpy(real)


def test_every_hidden_state_equals_transformers(
    pair: tuple[torch.nn.Module, Geneformer], counts: sp.csr_matrix, tokenize: Callable[..., Tokens]
) -> None:
    oracle, model = pair
    tokens = tokenize(model, counts[[0, 1, 2, 4, 5]])  # type: ignore[arg-type]
    ids, real = padded(tokens)
    with torch.no_grad():
        states = oracle(input_ids=ids, attention_mask=real.long(), output_hidden_states=True).hidden_states
    found = model.activations(tokens, model.sites)
    torch.testing.assert_close(found[Site.parse("embedding")], states[0][real], atol=1e-5, rtol=0)
    for i in range(3):
        torch.testing.assert_close(found[Site.parse(f"layer.{i}")], states[i + 1][real], atol=1e-5, rtol=0)
    embedded = model.embed(tokens)
    genes = real & (ids > EOS)
    expected = (states[2] * genes[..., None]).sum(1) / genes.sum(1, keepdim=True)
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.embed(tokens, readout="cls"), states[2][:, 0], atol=1e-5, rtol=0)


def test_the_pretraining_loss_equals_that_of_transformers(
    pair: tuple[torch.nn.Module, Geneformer], counts: sp.csr_matrix, tokenize: Callable[..., Tokens]
) -> None:
    oracle, model = pair
    tokens = tokenize(model, counts[[0, 1, 2, 4, 5]])  # type: ignore[arg-type]
    task = model.mask_genes(tokens, seed=0, fraction=0.4)
    ids, real = padded(task.tokens)
    labels = torch.full_like(ids, -100)
    labels[task.cell, task.token_rows - tokens.offsets[task.cell]] = torch.from_numpy(task.gene_id)
    with torch.no_grad():
        expected = oracle(input_ids=ids, attention_mask=real.long(), labels=labels).loss
    loss = model.pretraining_loss(tokens, seed=0, mask_fraction=0.4)
    assert loss.mean == pytest.approx(float(expected), abs=1e-5)
    assert int(loss.n_masked.sum()) == len(task.gene_id)


def test_genes_are_masked_replaced_or_kept_in_the_shares_of_bert(pair: tuple[torch.nn.Module, Geneformer]) -> None:
    _, model = pair
    rows = sp.csr_matrix(np.random.default_rng(0).integers(1, 50, (400, 25)).astype(np.float32))
    match = model.match_genes([f"GENE{i}" for i in range(25)])
    tokens = model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=0)
    task = model.mask_genes(tokens, seed=1, fraction=0.2)
    assert len(task.cell) == 400 * 5
    assert not tokens.is_special[task.token_rows].any()
    now = task.tokens.gene_id[task.token_rows]
    assert np.mean(now == MASK) == pytest.approx(0.8, abs=0.03)
    assert np.mean(now == task.gene_id) == pytest.approx(0.1, abs=0.03)
    assert now[now != MASK].min() > EOS


def test_a_saved_transformers_model_loads_whatever_its_file(
    pair: tuple[torch.nn.Module, Geneformer], write_geneformer: Write, tmp_path: Path
) -> None:
    oracle, model = pair
    folder = write_geneformer("saved")
    oracle.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    torch.save(oracle.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_model(folder)
    (folder / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").rename(folder / "pytorch_model.bin")
    for other in (loaded, load_model(folder)):
        state = other.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_parts_that_are_not_used_are_listed_and_a_classifier_has_no_head(write_geneformer: Write) -> None:
    def classifier(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {key: value for key, value in weights.items() if not key.startswith("cls.")}
        extra = {"bert.embeddings.position_ids": torch.arange(30)[None], "classifier.weight": torch.zeros(2, 16)}
        return kept | extra | {"bert.pooler.dense.bias": torch.zeros(16)}

    model = load_model(write_geneformer(edit=classifier))
    assert isinstance(model, Geneformer)
    assert model.ignored_weights == ("classifier.weight", "embeddings.position_ids", "pooler.dense.bias")
    rows = sp.csr_matrix(np.ones((1, 3), dtype=np.float32))
    match = model.match_genes(["GENE0", "GENE1", "GENE2"])
    tokens = model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=0)
    with pytest.raises(ConfigError, match=r"geneformer.*masked-gene head"):
        model.pretraining_loss(tokens)


HEADS = (
    "classification_heads.0.weight",
    "classification_heads.1.bias",
    "attention_pool.attention_weights.weight",
    "regression_head.0.weight",
    "qa_outputs.bias",
    "cls.seq_relationship.weight",
    "bert.pooler.dense.weight",
    "some_projector.net.2.weight",
)


def test_heads_of_other_tasks_do_not_block_reading(write_geneformer: Write) -> None:
    extra = {name: torch.zeros(3) for name in HEADS}
    tuned = load_model(write_geneformer("tuned", edit=lambda w: w | extra))
    plain = load_model(write_geneformer("plain"))
    assert {name.removeprefix("bert.") for name in HEADS} == set(tuned.ignored_weights)
    assert all(torch.equal(tuned.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert "classification_heads" in " ".join(tuned.notes)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model."])
def test_names_of_wrappers_are_taken_off(write_geneformer: Write, wrapper: str) -> None:
    tuned = load_model(write_geneformer("tuned", edit=lambda w: {wrapper + key: v for key, v in w.items()}))
    plain = load_model(write_geneformer("plain"))
    assert all(torch.equal(tuned.state_dict()[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.0.attention.self.query.lora_A.default.weight", "adapter.down.weight"]
)
def test_an_adapter_is_named_and_refused_with_what_to_do(write_geneformer: Write, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*merge_and_unload"):
        load_model(write_geneformer(edit=lambda w: w | {name: torch.zeros(2, 16)}))


def test_a_config_without_a_model_type_is_recognised_by_its_fields(write_geneformer: Write) -> None:
    assert isinstance(load_model(write_geneformer("null", config={"model_type": None})), Geneformer)
    with pytest.raises(CheckpointError, match="known family"):
        load_model(write_geneformer("other", config={"model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", "many"), ("num_hidden_layers", None), ("num_attention_heads", 3)]
)
def test_a_wrong_field_of_the_config_is_named(write_geneformer: Write, name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=name):
        load_model(write_geneformer(config={name: value}))


@pytest.mark.parametrize(
    "key",
    [
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.LayerNorm.bias",
        "bert.encoder.layer.2.output.dense.bias",
        "bert.encoder.layer.0.attention.output.LayerNorm.weight",
        "bert.encoder.layer.1.intermediate.dense.weight",
        "bert.encoder.layer.1.attention.self.query.bias",
        "cls.predictions.transform.dense.bias",
    ],
)
def test_a_missing_weight_is_named(write_geneformer: Write, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"missing {re.escape(key)}"):
        load_model(write_geneformer(edit=lambda w: {k: v for k, v in w.items() if k != key}))


def test_an_unexpected_weight_and_an_untied_decoder_are_named(write_geneformer: Write) -> None:
    extra = {"bert.encoder.layer.3.output.dense.bias": torch.zeros(16), "bert.embeddings.more": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"embeddings\.more; .*encoder\.layer\.3\.output\.dense\.bias"):
        load_model(write_geneformer("extra", edit=lambda w: w | extra))
    untied = {"cls.predictions.decoder.weight": torch.zeros(44, 16)}
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.decoder\.weight"):
        load_model(write_geneformer("untied", edit=lambda w: w | untied))


def test_other_activations_and_positions_are_refused(write_geneformer: Write) -> None:
    with pytest.raises(CheckpointError, match=r"'gelu'.*'relu'"):
        load_model(write_geneformer("act", config={"hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match="'relative_key'"):
        load_model(write_geneformer("pos", config={"position_embedding_type": "relative_key"}))


@pytest.mark.parametrize("place", [".", "geneformer", "gene_dictionaries_30m", "..", "../geneformer"])
def test_dictionaries_are_found_in_the_folder_or_beside_it(write_geneformer: Write, place: str) -> None:
    folder = write_geneformer("models/inner/model", dictionaries=place)
    assert load_model(folder).match_genes(["GENE0"]).n_matched == 1


def test_dictionaries_of_both_versions_side_by_side_are_told_apart(write_geneformer: Write, tmp_path: Path) -> None:
    one = write_geneformer("home/v1", version=1, dictionaries="..")
    two = write_geneformer("home/v2", version=2, dictionaries="../geneformer")
    for path in (tmp_path / "home" / "geneformer").iterdir():
        path.rename(tmp_path / "home" / path.name)
    assert load_model(one).readouts == ("mean",)
    assert load_model(two).readouts == ("cls", "mean")


def test_fine_tuned_models_of_the_official_repository_find_its_dictionaries(
    write_geneformer: Write, tmp_path: Path
) -> None:
    home = tmp_path / "Geneformer"
    one = write_geneformer("Geneformer/fine_tuned_models/one", version=1, dictionaries="../../geneformer/x")
    two = write_geneformer("Geneformer/fine_tuned_models/two", version=2, dictionaries="../../geneformer")
    deeper = write_geneformer(
        "Geneformer/fine_tuned_models/two/checkpoint-9", version=2, dictionaries="../../../geneformer"
    )
    (home / "geneformer" / "x").rename(home / "geneformer" / "gene_dictionaries_30m")
    assert load_model(one).readouts == ("mean",)
    assert load_model(two).readouts == load_model(deeper).readouts == ("cls", "mean")
    linked = tmp_path / "linked"
    linked.symlink_to(two)
    assert load_model(linked).digest == load_model(two).digest


def test_dictionaries_may_be_named_and_then_no_others_are_taken(write_geneformer: Write, tmp_path: Path) -> None:
    here, away = write_geneformer("here/model"), write_geneformer("away/model", dictionaries="../only")
    only = tmp_path / "away" / "only"
    names = {f"OTHER{i}": f"ENSG{i + 1:011d}" for i in range(40)}
    (only / "gene_name_id_dict_gc104M.pkl").write_bytes(pickle.dumps(names))
    with pytest.raises(CheckpointError, match=r"44 tokens.*--model-option dictionaries=DIR"):
        load_model(away)
    model = load_model(away, options={"dictionaries": only})
    assert model.match_genes(["OTHER3"]).n_matched == 1
    assert load_model(here, options={"dictionaries": only}).digest != load_model(here).digest
    assert str(only) in " ".join(model.notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"found: none"):
        load_model(here, options={"dictionaries": tmp_path / "empty"})
    with pytest.raises(CheckpointError, match=r"nowhere.*no folder"):
        load_model(here, options={"dictionaries": tmp_path / "nowhere"})


def test_rows_of_the_embedding_and_vocab_size_must_agree(write_geneformer: Write) -> None:
    with pytest.raises(CheckpointError, match=r"44 rows.*vocab_size 42"):
        load_model(write_geneformer(config={"vocab_size": 42}))


def test_a_folder_without_dictionaries_says_where_to_put_them(write_geneformer: Write) -> None:
    folder = write_geneformer("bare/model")
    for path in folder.glob("*.pkl"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"44 tokens.*token_dictionary\*\.pkl"):
        load_model(folder)


def test_json_and_pickled_dictionaries_give_the_same_model(write_geneformer: Write) -> None:
    a, b = write_geneformer("a"), write_geneformer("b")
    for path in b.glob("*.pkl"):
        path.with_suffix(".json").write_text(json.dumps(read_dictionary(path)))
        path.unlink()
    one, two = (find_dictionaries(folder, n_tokens=44) for folder in (a, b))
    assert one.vocabulary == two.vocabulary
    assert one.medians == two.medians


def test_v2_collapses_outdated_ids_and_aliases(write_geneformer: Write) -> None:
    match = load_model(write_geneformer()).match_genes(["ENSG99999999999.3", "oldname", "gene7", "GENE8", "?"])
    np.testing.assert_array_equal(match.matched, [True, True, True, True, False])
    np.testing.assert_array_equal(match.token_id[:4], [4, 5, 11, 12])


def test_a_gene_without_a_median_and_a_median_of_zero_are_refused(write_geneformer: Write) -> None:
    folder = write_geneformer()
    path = folder / "gene_median_dictionary_gc104M.pkl"
    medians = read_dictionary(path)
    path.write_bytes(pickle.dumps(medians | {"ENSG00000000002": 0.0}))
    with pytest.raises(CheckpointError, match=r"ENSG00000000002: 0\.0"):
        load_model(folder)
    del medians["ENSG00000000001"]
    path.write_bytes(pickle.dumps(medians))
    with pytest.raises(CheckpointError, match=r"1 of the 40 genes .*39 .*ENSG00000000001"):
        load_model(folder)
    path.write_bytes(pickle.dumps(dict.fromkeys(medians, "x")))
    with pytest.raises(CheckpointError, match=r"gene_median.*'x'"):
        load_model(folder)


@pytest.fixture(scope="session")
def vocab(scsae_data: Path) -> Path:
    folder = scsae_data.parent / "vocab"
    if not folder.is_dir():
        pytest.skip(f"{folder} is no folder: the real vocabularies lie beside SCSAE_DATA")
    return folder


@pytest.mark.parametrize(("version", "n_tokens"), [(1, 25426), pytest.param(2, 20275, marks=pytest.mark.slow)])
def test_the_real_dictionaries_are_read_from_pickles_as_from_json(
    vocab: Path, tmp_path: Path, version: int, n_tokens: int
) -> None:
    official = vocab / f"geneformer_v{version}"
    for path in official.glob("*.pkl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pickled = find_dictionaries(tmp_path, n_tokens=n_tokens)
    plain = find_dictionaries(official, n_tokens=n_tokens)
    assert pickled.vocabulary == plain.vocabulary
    assert pickled.medians == plain.medians
    assert plain.vocabulary.n_genes == n_tokens - 2 * version
    markers = ["CD3D", "MS4A1", "LYZ", "ENSG00000156738.17", "NKG7", "HLA-DRA"]
    match = plain.vocabulary.match(markers)
    assert match.n_matched == len(markers)
    assert match.token_id[1] == match.token_id[3]


COMPANIONS = ("gene_median_dictionary.json", "gene_name_id_dict.json", "ensembl_mapping_dict.json")


@pytest.mark.parametrize(("version", "n_tokens"), [(1, 25426), (2, 20275)])
def test_dictionaries_of_the_other_release_are_refused_with_both_numbers(
    vocab: Path, tmp_path: Path, version: int, n_tokens: int
) -> None:
    own, other = vocab / f"geneformer_v{version}", vocab / f"geneformer_v{3 - version}"
    n_other = {25426: 20275, 20275: 25426}[n_tokens]
    with pytest.raises(
        CheckpointError, match=rf"the {n_tokens} tokens.*V{version}.*{n_other} tokens.*token_dictionary_gc"
    ):
        find_dictionaries(tmp_path, n_tokens=n_tokens, dictionaries=other)
    for name in COMPANIONS:
        for path in tmp_path.iterdir():
            path.unlink()
        for path in own.glob("*.json"):
            (tmp_path / path.name).symlink_to(path)
        if not (other / name).is_file():
            continue
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(other / name)
        n = len(json.loads((other / name).read_text()))
        with pytest.raises(
            CheckpointError, match=rf"{name} (has {n} entries|leads to).*{n_tokens - 2 * version}|{n_tokens}"
        ):
            find_dictionaries(tmp_path, n_tokens=n_tokens)


def test_official_tokens_with_other_ids_are_refused(vocab: Path, tmp_path: Path) -> None:
    ids = json.loads((vocab / "geneformer_v2" / "token_dictionary.json").read_text())
    a, b = "ENSG00000000003", "ENSG00000000419"
    (tmp_path / "token_dictionary.json").write_text(json.dumps(ids | {a: ids[b], b: ids[a]}))
    (tmp_path / COMPANIONS[0]).symlink_to(vocab / "geneformer_v2" / COMPANIONS[0])
    with pytest.raises(CheckpointError, match=r"V2 with other ids"):
        find_dictionaries(tmp_path, n_tokens=20275)


@pytest.mark.parametrize("version", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_gene_of_gencode_goes_to_the_token_of_its_id_and_to_no_other(vocab: Path, version: int) -> None:
    folder = vocab / f"geneformer_v{version}"
    vocabulary = find_dictionaries(folder, n_tokens=25426 if version == 1 else 20275).vocabulary
    ids = json.loads((folder / "token_dictionary.json").read_text())
    current = json.loads((folder / "ensembl_mapping_dict.json").read_text()) if version == 2 else {t: t for t in ids}
    info = [line.split(",")[1:3] for line in (vocab / "gene_info_table.csv").read_text().splitlines()[1:]]
    gencode = [line.split(",") for line in (vocab / "GENCODEv44_Gene_id2name.csv").read_text().splitlines()]
    strays = {"ENSG00000270012", "ENSG00000215790"}
    genes = {name: s for i, (name, s) in enumerate(dict([*info, *gencode]).items()) if i % 4 == 0 or name in strays}
    match = vocabulary.match(list(genes.values()), list(genes))
    found = np.where(match.matched, match.token_id, -1)
    has_id = np.array(["unknown" not in name for name in genes])
    expected = np.array([ids.get(current.get(name), -1) for name in genes])
    np.testing.assert_array_equal(found[has_id], expected[has_id])
    assert match.n_by_symbol == (found[~has_id] >= 0).sum() > 0
    assert found[list(genes).index("ENSG00000270012")] != ids["ENSG00000049769"]  # LL0XNC01-7P3.1, not PPP1R3F
    assert found[list(genes).index("ENSG00000215790")] != ids["ENSG00000189339"]  # SLC35E2, not SLC35E2B


def test_the_real_medians_of_v2_have_ties(vocab: Path) -> None:
    medians = find_dictionaries(vocab / "geneformer_v2", n_tokens=20275).medians
    _, n_equal = np.unique(list(medians.values()), return_counts=True)
    assert n_equal.max() == 72
    assert all(math.isfinite(value) for value in medians.values())
