from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import save_file

from sae_core.errors import CheckpointError
from sae_core.scfm import ScGPT, ScGPTConfig, Tokens, load_model

Write = Callable[..., Path]
Weights = dict[str, torch.Tensor]


def state(model: object) -> Weights:
    assert isinstance(model, ScGPT)
    return model.state_dict()


@pytest.mark.parametrize("prefix", ["self_attn.in_proj_", "self_attn._impl.Wqkv.", "self_attn._impl.in_proj_"])
def test_every_naming_of_the_attention_weights_loads_equal(
    write_checkpoint: Write, tiny_weights: Weights, prefix: str
) -> None:
    renamed = {key.replace("self_attn.Wqkv.", prefix): value for key, value in tiny_weights.items()}
    if "_impl" in prefix:
        renamed = {k.replace("self_attn.out_proj", "self_attn._impl.out_proj"): v for k, v in renamed.items()}
    assert renamed.keys() != tiny_weights.keys()
    loaded, plain = load_model(write_checkpoint("a", weights=renamed)), load_model(write_checkpoint("b"))
    assert all(torch.equal(state(loaded)[key], value) for key, value in state(plain).items())


def test_safetensors_and_torch_files_load_equal(write_checkpoint: Write) -> None:
    a, b = load_model(write_checkpoint("a")), load_model(write_checkpoint("b", file="model.safetensors"))
    assert all(torch.equal(state(a)[key], value) for key, value in state(b).items())


@pytest.mark.parametrize(
    "key", ["encoder.enc_norm.bias", "value_encoder.linear1.weight", "transformer_encoder.layers.2.linear2.bias"]
)
def test_a_missing_weight_is_named(write_checkpoint: Write, tiny_weights: Weights, key: str) -> None:
    folder = write_checkpoint(weights={k: v for k, v in tiny_weights.items() if k != key})
    with pytest.raises(CheckpointError, match=f"missing {key}"):
        load_model(folder)


def test_an_unexpected_weight_is_named(write_checkpoint: Write, tiny_weights: Weights) -> None:
    folder = write_checkpoint(weights=tiny_weights | {"transformer_encoder.layers.3.linear1.bias": torch.zeros(24)})
    with pytest.raises(CheckpointError, match=r"unexpected transformer_encoder\.layers\.3\.linear1\.bias"):
        load_model(folder)


def test_a_weight_of_another_shape_is_named_with_both_shapes(write_checkpoint: Write) -> None:
    folder = write_checkpoint(args={"d_hid": 20})
    with pytest.raises(CheckpointError, match=r"linear1\.weight.*\(24, 16\).*\(20, 16\)"):
        load_model(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(write_checkpoint: Write, tiny_weights: Weights, value: float) -> None:
    name = next(key for key in tiny_weights if "norm2.weight" in key)
    weights = {**tiny_weights, name: tiny_weights[name].clone()}
    weights[name][0] = value
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_model(write_checkpoint(weights=weights))


def test_unused_parts_of_an_official_checkpoint_are_listed_not_loaded(
    write_checkpoint: Write, tiny_weights: Weights
) -> None:
    extra = {"cls_decoder.out_layer.bias": torch.zeros(2), "flag_encoder.weight": torch.zeros(2, 16)}
    model = load_model(write_checkpoint(weights=tiny_weights | extra))
    assert isinstance(model, ScGPT)
    assert model.ignored_weights == tuple(sorted(extra))


def test_a_checkpoint_without_pretraining_heads_loads_without_them(
    write_checkpoint: Write, tiny_weights: Weights
) -> None:
    model = load_model(write_checkpoint(weights={k: v for k, v in tiny_weights.items() if "decoder" not in k}))
    assert isinstance(model, ScGPT)
    assert model.decoder is None
    assert model.mvc_decoder is None


@pytest.mark.parametrize("n_rows", [41, 42, 44, 48])
def test_a_vocabulary_of_another_size_than_the_embedding_is_refused_with_both_numbers(
    write_checkpoint: Write, tiny_weights: Weights, n_rows: int
) -> None:
    rows = tiny_weights["encoder.embedding.weight"]
    folder = write_checkpoint(weights=tiny_weights | {"encoder.embedding.weight": torch.cat([rows, rows])[:n_rows]})
    with pytest.raises(CheckpointError, match=rf" {n_rows} rows.*vocab\.json names 43 .*give the vocab\.json"):
        load_model(folder)


@pytest.mark.parametrize("missing", [["<eoc>"], ["<pad>", "<eoc>"], ["<pad>", "<cls>", "<eoc>"]])
def test_special_tokens_that_the_vocabulary_lacks_are_appended_before_sizes_are_compared(
    write_checkpoint: Write, missing: list[str]
) -> None:
    folder = write_checkpoint()
    kept = [token for token in json.loads((folder / "vocab.json").read_text()) if token not in missing]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(kept)}))
    assert load_model(folder).vocabulary.tokens == (*kept, *missing)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(kept[1:])}))
    with pytest.raises(CheckpointError, match=r" 43 rows.* 42 "):
        load_model(folder)


def test_the_vocabulary_in_the_folder_that_fits_is_named(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "vocab.json").rename(folder / "census_vocab.json")
    (folder / "vocab.json").write_text(json.dumps({"GENE0": 0}))
    (folder / "a_vocab.json").write_text("damaged")
    with pytest.raises(CheckpointError, match=r" 43 rows.* 4 .*census_vocab\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "n_names", "n_rows", "likely"),
    [
        ("default_gene_vocab.json", 48295, 60697, "whole-human"),
        ("finetuned_model_vocab.json", 60697, 36574, "earlier release"),
        ("default_census_vocab.json", 60697, 48295, "default_gene_vocab"),
    ],
)
def test_the_wrong_official_vocabulary_is_refused_and_the_right_one_named(
    write_checkpoint: Write, tiny_weights: Weights, scsae_data: Path, file: str, n_names: int, n_rows: int, likely: str
) -> None:
    folder = write_checkpoint(weights=tiny_weights | {"encoder.embedding.weight": torch.zeros(n_rows, 16)})
    shutil.copy(official_vocabulary(scsae_data, file), folder / "vocab.json")
    n_in_file = len(json.loads((folder / "vocab.json").read_text()))
    with pytest.raises(
        CheckpointError, match=rf" {n_rows} rows.*vocab\.json names {n_names} .*\({n_in_file} in the file.*{likely}"
    ):
        load_model(folder)


def test_the_genes_of_the_official_vocabulary_in_another_order_are_refused(
    write_checkpoint: Write, tiny_weights: Weights, scsae_data: Path
) -> None:
    weights = tiny_weights | {"encoder.embedding.weight": torch.zeros(60697, 16)}
    folder = write_checkpoint(weights=weights)
    ids = json.loads(official_vocabulary(scsae_data, "default_census_vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(ids))
    assert load_model(folder).vocabulary.n_genes == 60694
    shuffled = {token: i for i, token in enumerate(reversed(list(ids)))}
    (folder / "vocab.json").write_text(json.dumps(shuffled))
    with pytest.raises(CheckpointError, match=r"vocab\.json .*60694 .*another order.*own_vocabulary"):
        load_model(folder)
    own = write_checkpoint("own", weights=weights, args={"own_vocabulary": True})
    (own / "vocab.json").write_text(json.dumps(shuffled))
    assert load_model(own).vocabulary.n_genes == 60694


def official_vocabulary(scsae_data: Path, name: str) -> Path:
    path = scsae_data.parent / "vocab" / "scgpt" / name
    if not path.is_file():
        pytest.skip(f"{path} is no file: the official vocabularies lie beside SCSAE_DATA")
    return path


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("run-by-pickle"),)  # type: ignore[return-value]


def test_pickled_code_in_a_checkpoint_is_refused_and_not_run(
    write_checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint()
    monkeypatch.chdir(tmp_path)
    for write in (torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))):
        write({"encoder.embedding.weight": _Payload()}, folder / "best_model.pt")
        with pytest.raises(CheckpointError, match=r"best_model\.pt.*model\.safetensors"):
            load_model(folder)
    assert not (tmp_path / "run-by-pickle").exists()


def test_a_file_with_more_than_tensors_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    torch.save({"epoch": 3, "model": {}}, folder / "best_model.pt")
    with pytest.raises(CheckpointError, match="bare state dict"):
        load_model(folder)


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
def test_an_incomplete_folder_says_what_it_must_hold(write_checkpoint: Write, name: str) -> None:
    folder = write_checkpoint()
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"args\.json, vocab\.json and best_model\.pt"):
        load_model(folder)


def test_a_path_that_is_no_folder_says_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere' is not a folder; give 'mini'"):
        load_model(tmp_path / "nowhere")


def test_args_without_a_size_and_other_value_embeddings_are_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint("style", args={"input_emb_style": "category"})
    with pytest.raises(CheckpointError, match=r"style.*'category'.*'continuous'"):
        load_model(folder)
    folder = write_checkpoint("sizes")
    (folder / "args.json").write_text(json.dumps({"nlayers": 3, "embsize": 16}))
    with pytest.raises(CheckpointError, match="nheads, d_hid"):
        load_model(folder)


def test_args_of_the_whole_human_model_are_understood(write_checkpoint: Write, tiny_weights: Weights) -> None:
    args = {"nlayers": 12, "nheads": 8, "embsize": 512, "d_hid": 512, "dropout": 0.2, "n_layers_cls": 3, "n_bins": 51}
    args |= {"max_seq_len": 1200, "pad_value": -2, "mask_value": -1, "input_emb_style": "continuous"}
    args |= {"pad_token": "<pad>", "mask_ratio": [0.25, 0.5, 0.75], "fast_transformer": True, "batch_size": 32}
    config = ScGPTConfig.from_args(args)
    assert (config.n_layers, config.n_heads, config.d_model, config.d_hidden) == (12, 8, 512, 512)
    assert (config.cls_value, config.tie_break, config.value_clamp) == (-2.0, "random", 512.0)
    with pytest.raises(CheckpointError, match=r"nlayers is 12 in args\.json and 3 in the weights.*embsize is 512"):
        load_model(write_checkpoint("full", args=args))
    small = args | {"nlayers": 3, "nheads": 2, "embsize": 16, "d_hid": 24}
    model = load_model(write_checkpoint("small", args=small))
    assert (model.family, model.name, model.d_model, model.n_layers) == ("scgpt", "small", 16, 3)


def test_digest_changes_with_weights_args_and_random_seed_only(write_checkpoint: Write, tiny_weights: Weights) -> None:
    a, b = write_checkpoint("a", file="model.safetensors"), write_checkpoint("b", file="model.safetensors")
    assert load_model(a).digest == load_model(b).digest
    other = tiny_weights | {"encoder.enc_norm.bias": tiny_weights["encoder.enc_norm.bias"] + 1}
    folders = [a, write_checkpoint("c", weights=other, file="model.safetensors")]
    folders.append(write_checkpoint("d", args={"tie_break": "midpoint"}, file="model.safetensors"))
    digests = [load_model(folder).digest for folder in folders]
    digests += [load_model(a, random_init=True, seed=seed).digest for seed in (0, 1)]
    assert len(set(digests)) == 5
    assert all(len(digest) == 64 for digest in digests)


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    before = torch.random.get_rng_state()
    one, same, other = (load_model(folder, random_init=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    key = "transformer_encoder.layers.0.self_attn.Wqkv.weight"
    assert torch.equal(state(one)[key], state(same)[key])
    assert not torch.equal(state(one)[key], state(other)[key])
    assert not torch.equal(state(one)[key], state(load_model(folder))[key])


def test_random_weights_keep_the_size_of_a_value(write_checkpoint: Write) -> None:
    model = load_model(write_checkpoint("other"), random_init=True)
    assert isinstance(model, ScGPT)
    with torch.no_grad():
        v = model.value_encoder(torch.tensor([[1.0, 10.0, 50.0]]))[0]
    assert (v[0] - v[2]).norm() > 0.1 * v[2].norm()


def test_dtype_is_honoured_and_weights_ask_for_no_gradient(
    write_checkpoint: Write, tokenize: Callable[..., Tokens]
) -> None:
    model = load_model(write_checkpoint(), dtype=torch.bfloat16)
    assert isinstance(model, ScGPT)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.embed(tokenize(model)).dtype == torch.bfloat16


NULL = ["n_bins", "max_seq_len", "pad_value", "mask_value", "cls_value", "tie_break", "objective", "input_emb_style"]


@pytest.mark.parametrize("name", [*NULL, "input_style", "batch_label", "pretraining", "include_zero_gene", "dropout"])
def test_null_in_args_is_the_default_and_said_where_the_network_needs_it(write_checkpoint: Write, name: str) -> None:
    model, plain = load_model(write_checkpoint("null", args={name: None})), load_model(write_checkpoint("plain"))
    assert isinstance(model, ScGPT)
    assert isinstance(plain, ScGPT)
    default = {"max_seq_len": 1200}.get(name)
    assert model.config == (plain.config if default is None else replace(plain.config, max_seq_len=default))
    assert any(f"{name} null" in note for note in model.notes) == (name in [*NULL, "input_style", "include_zero_gene"])


@pytest.mark.parametrize("name", ["nlayers", "nheads", "embsize", "d_hid"])
def test_null_for_a_size_is_named(write_checkpoint: Write, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"args\.json has {name} null"):
        load_model(write_checkpoint(args={name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_bins", "many"),
        ("n_bins", -1),
        ("n_bins", 2),
        ("n_bins", True),
        ("max_seq_len", "1200"),
        ("max_seq_len", 1),
        ("max_seq_len", 12.5),
        ("pad_value", "low"),
        ("pad_value", False),
        ("mask_value", [-1]),
        ("cls_value", "zero"),
        ("nlayers", "three"),
        ("nheads", 3),
        ("embsize", -16),
        ("d_hid", {}),
        ("batch_label", "lung"),
        ("batch_label", -1),
        ("tie_break", "left"),
        ("objective", 3),
        ("pretraining", 3),
        ("input_style", "log1p"),
        ("pre_norm", True),
        ("norm_scheme", "pre"),
        ("pre_norm", "yes"),
        ("own_vocabulary", "yes"),
        ("include_zero_gene", "yes"),
    ],
)
def test_a_value_in_args_that_is_not_allowed_is_named_with_its_field(
    write_checkpoint: Write, name: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=rf"args\.json has {name} .*allowed") as caught:
        load_model(write_checkpoint(args={name: value}))
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nlayers", "embsize", "d_hid"])
def test_a_size_that_no_memory_could_hold_is_refused_before_a_network_is_built(
    write_checkpoint: Write, name: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} is 1000000000 in args\.json"):
        load_model(write_checkpoint(args={name: 1_000_000_000}))


@pytest.mark.parametrize("row", [1.0, "1", None, True, [1]])
def test_a_row_in_the_vocabulary_that_is_no_number_is_named(write_checkpoint: Write, row: object) -> None:
    folder = write_checkpoint()
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(ids | {"GENE1": row}))
    with pytest.raises(CheckpointError, match=r"vocab\.json has 'GENE1'"):
        load_model(folder)


def test_an_ensembl_id_that_leads_to_no_name_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "vocab_ensembl.json").write_text('{"ENSG1": 5}')
    with pytest.raises(CheckpointError, match=r"vocab_ensembl\.json has 'ENSG1': 5"):
        load_model(folder)


HEADS = {
    "mvc_decoder": {"gene2query.weight": (64, 16), "fc1.weight": (64, 80), "fc2.weight": (1, 64)},
    "decoder": {"coeff_decoder.fc.0.weight": (16, 16), "bias_decoder.fc.0.weight": (16, 16)},
    "cls_decoder": {"_decoder.0.weight": (16, 16), "out_layer.weight": (4, 16)},
    "grad_reverse_discriminator": {"out_layer.weight": (3, 16)},
    "mod_encoder": {"embedding.weight": (2, 16), "enc_norm.weight": (16,)},
    "my_head": {"weight": (2, 16)},
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_no_activation_needs_does_not_block_reading_and_is_said(
    write_checkpoint: Write, tiny_weights: Weights, tokenize: Callable[..., Tokens], head: str
) -> None:
    kept = {key: value for key, value in tiny_weights.items() if not key.startswith(f"{head}.")}
    own = {f"{head}.{key}": torch.ones(shape) for key, shape in HEADS[head].items()}
    model, plain = load_model(write_checkpoint("a", weights=kept | own)), load_model(write_checkpoint("b"))
    assert set(model.ignored_weights) == set(own)
    assert any(head in note for note in model.notes)
    tokens = tokenize(model)
    found, expected = (m.activations(tokens, ["layer.2"])[m.sites[-1]] for m in (model, plain))
    assert torch.equal(found, expected)


def test_batch_vectors_without_a_head_that_takes_them_do_not_block_reading(
    write_checkpoint: Write, tiny_weights: Weights
) -> None:
    kept = {key: value for key, value in tiny_weights.items() if "decoder" not in key}
    model = load_model(write_checkpoint(weights=kept | {"batch_encoder.embedding.weight": torch.ones(3, 16)}))
    assert model.ignored_weights == ("batch_encoder.embedding.weight",)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.encoder.embedding.weight",
        "transformer_encoder.layers.0.self_attn.out_proj.lora_A.default.weight",
        "transformer_encoder.layers.0.self_attn.Wqkv.base_layer.weight",
        "transformer_encoder.layers.1.MLP_Adapter.D_fc1.weight",
        "encoder.adapter.weight",
    ],
)
def test_adapters_are_named_and_refused(write_checkpoint: Write, tiny_weights: Weights, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter .*{re.escape(name)}.*merge"):
        load_model(write_checkpoint(weights=tiny_weights | {name: torch.ones(2, 2)}))


def test_a_folder_of_an_adapter_alone_or_beside_its_base_is_refused(write_checkpoint: Write, tmp_path: Path) -> None:
    for folder in (write_checkpoint(), tmp_path):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        with pytest.raises(CheckpointError, match=r"adapter_config\.json.*'org/base'.*merge"):
            load_model(folder)


def test_a_checkpoint_of_perturbation_prediction_is_refused(write_checkpoint: Write, tiny_weights: Weights) -> None:
    with pytest.raises(CheckpointError, match="pert_encoder"):
        load_model(write_checkpoint(weights=tiny_weights | {"pert_encoder.weight": torch.ones(3, 16)}))


@pytest.mark.parametrize("file", ["model.pt", "pytorch_model.bin", "model.safetensors", "best_model.pt"])
@pytest.mark.parametrize("vocabulary", ["vocab.json", "default_census_vocab.json"])
@pytest.mark.parametrize("args", ["args.json", "config.json"])
def test_the_names_of_mirrors_are_read(
    write_checkpoint: Write, tiny_weights: Weights, file: str, vocabulary: str, args: str
) -> None:
    folder = write_checkpoint()
    (folder / "best_model.pt").unlink()
    save_file(tiny_weights, folder / file) if file.endswith("safetensors") else torch.save(tiny_weights, folder / file)
    (folder / "vocab.json").rename(folder / vocabulary)
    (folder / "args.json").rename(folder / args)
    assert torch.equal(state(load_model(folder))["encoder.enc_norm.bias"], tiny_weights["encoder.enc_norm.bias"])


def test_the_names_of_weights_in_a_mirror_are_read(write_checkpoint: Write, tiny_weights: Weights) -> None:
    names = {"encoder.": "gene_encoder.", "transformer_encoder.": "transformer.", "decoder.": "expr_decoder."}
    renamed = {
        next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key).replace(
            "self_attn.Wqkv.", "self_attn.in_proj_"
        ): value
        for key, value in tiny_weights.items()
    }
    loaded = state(load_model(write_checkpoint(weights=renamed)))
    assert all(torch.equal(loaded[name], value) for name, value in tiny_weights.items())


def test_weights_in_parts_are_read_and_each_part_counts_for_the_digest(
    write_checkpoint: Write, tiny_weights: Weights
) -> None:
    folder = write_checkpoint()
    (folder / "best_model.pt").unlink()
    of_tensor = {name: f"model-{1 + (i > 9)}.safetensors" for i, name in enumerate(tiny_weights)}
    for part in set(of_tensor.values()):
        save_file({name: tiny_weights[name] for name in of_tensor if of_tensor[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of_tensor}))
    before = load_model(folder)
    assert all(torch.equal(state(before)[name], value) for name, value in tiny_weights.items())
    part = {name: tiny_weights[name] + 1 for name in of_tensor if of_tensor[name] == "model-2.safetensors"}
    save_file(part, folder / "model-2.safetensors")
    assert load_model(folder).digest != before.digest


def test_without_args_the_fields_to_write_are_printed_and_are_right(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "args.json").unlink()
    with pytest.raises(CheckpointError, match=r"args\.json is missing.*Write \S*args\.json: ") as caught:
        load_model(folder)
    written = json.loads(re.search(r"\{.*\}", str(caught.value))[0])
    assert {name: written[name] for name in ("nlayers", "embsize", "d_hid")} == {
        "nlayers": 3,
        "embsize": 16,
        "d_hid": 24,
    }
    (folder / "args.json").write_text(json.dumps(written))
    assert load_model(folder).n_layers == 3


def test_without_a_vocabulary_the_one_to_fetch_is_named(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.json is missing.*43 rows"):
        load_model(folder)


def test_several_vocabularies_are_told_apart_by_the_rows_of_the_embedding(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    text = (folder / "vocab.json").read_text()
    (folder / "vocab.json").rename(folder / "b_vocab.json")
    (folder / "a_vocab.json").write_text('{"GENE0": 0}')
    assert len(load_model(folder).vocabulary) == 43
    (folder / "a_vocab.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a_vocab\.json, b_vocab\.json.*vocab\.json"):
        load_model(folder)


@pytest.mark.parametrize("file", ["args.json", "vocab.json", "best_model.pt"])
def test_a_pointer_in_the_place_of_any_file_of_a_folder_is_recognised(write_checkpoint: Write, file: str) -> None:
    folder = write_checkpoint()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 205379072\n")
    with pytest.raises(CheckpointError, match=rf"{file} is a Git LFS pointer.*205,379,072"):
        load_model(folder)


def test_a_checkpoint_tuned_on_zero_genes_and_batches_says_so(write_finetuned_scgpt: Write) -> None:
    folder = write_finetuned_scgpt(batch_label=2)
    args = json.loads((folder / "args.json").read_text())
    notes = "; ".join(load_model(folder).notes)
    for told in ("DSBN true", "a norm for each batch", "zeros included", "3 batches", "batch 2", "nonzero genes alone"):
        assert told in notes
    tuned = {"include_zero_gene": True, "n_hvg": 1200, "max_seq_len": 1201, "use_batch_labels": True}
    (folder / "args.json").write_text(json.dumps(args | tuned))
    notes = "; ".join(load_model(folder).notes)
    for told in ("include_zero_gene true", "n_hvg 1200", "max_seq_len 1201", "input_genes"):
        assert told in notes
    (folder / "args.json").write_text(json.dumps(args | tuned | {"include_zero_gene": False}))
    assert any("without their zeros" in note for note in load_model(folder).notes)


def test_heads_for_zeros_tell_of_a_tuning_on_them(write_checkpoint: Write, tiny_weights: Weights) -> None:
    assert not any("zeros" in note for note in load_model(write_checkpoint("plain")).notes)
    model = load_model(write_checkpoint(weights=tiny_weights | {"decoder.zero_logit.0.weight": torch.ones(16, 16)}))
    assert any("zeros included" in note for note in model.notes)


def test_the_names_of_sizes_in_the_tutorials_are_read(write_checkpoint: Write, tiny_weights: Weights) -> None:
    square = {
        "linear1.weight": torch.ones(16, 16),
        "linear1.bias": torch.ones(16),
        "linear2.weight": torch.ones(16, 16),
    }
    weights = {
        key: square.get(key.split(".", 3)[-1], value) if "transformer_encoder" in key else value
        for key, value in tiny_weights.items()
    }
    folder = write_checkpoint(weights=weights)
    (folder / "args.json").write_text(json.dumps({"nlayers": 3, "nhead": 2, "layer_size": 16, "GEPC": True}))
    model = load_model(folder)
    assert isinstance(model, ScGPT)
    assert (model.config.n_heads, model.config.d_model, model.config.d_hidden) == (2, 16, 16)
    assert any("GEPC true" in note for note in model.notes)
    assert any("lacks n_bins and max_seq_len" in note for note in model.notes)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
def test_a_state_dict_among_the_values_of_a_training_script_is_read(
    write_checkpoint: Write, tiny_weights: Weights, key: str
) -> None:
    folder = write_checkpoint()
    torch.save({"epoch": 3, key: tiny_weights, "optimizer": {"lr": 0.1}}, folder / "best_model.pt")
    loaded = state(load_model(folder))
    assert all(torch.equal(loaded[name], value) for name, value in tiny_weights.items())


@pytest.fixture
def write_tuned(write_checkpoint: Write) -> Write:
    """Write a folder whose cells are to have all of `genes`, zeros included."""

    def write(name: str = "tuned", *, genes: str, **args: Any) -> Path:
        folder = write_checkpoint(name, args={"input_genes": "hvg.txt", "include_zero_gene": True} | args)
        (folder / "hvg.txt").write_text(genes)
        return folder

    return write


def test_chosen_genes_are_tokens_of_every_cell_with_their_zeros(
    write_tuned: Write, write_checkpoint: Write, tokenize: Callable[..., Tokens], counts: sp.csr_matrix
) -> None:
    chosen = [0, 2, 7, 30, 31]
    genes = "".join(f"GENE{i}\n" for i in chosen)
    model = load_model(write_tuned(genes=genes, tie_break="midpoint"))
    assert isinstance(model, ScGPT)
    tokens = tokenize(model)
    has_any = counts[:, chosen].getnnz(axis=1) > 0
    assert tokens.lengths.tolist() == [6 if has else 0 for has in has_any]
    ids, values = tokens.gene_id.reshape(-1, 6), tokens.value.reshape(-1, 6)
    assert (ids[:, 1:] == chosen).all()
    assert (values[:, 0] == 0).all()
    dense = counts[:, chosen].toarray()[has_any]
    assert ((values[:, 1:] == 0) == (dense == 0)).all()
    # the bins are those of a cell with these genes alone
    plain = load_model(write_checkpoint("plain", args={"tie_break": "midpoint"}))
    alone = sp.csr_matrix(np.where(np.isin(np.arange(40), chosen), counts.toarray(), 0))
    expected = tokenize(plain, x=alone)
    assert values[:, 1:][dense > 0].tolist() == expected.value[~expected.is_special].tolist()
    assert any("zeros included" in note for note in model.notes)


def test_chosen_genes_beyond_the_input_are_sampled_by_seed_and_cell(
    write_tuned: Write, tokenize: Callable[..., Tokens]
) -> None:
    model = load_model(write_tuned(genes="\n".join(f"GENE{i}" for i in range(40)), max_seq_len=12))
    one, same, other = (tokenize(model, seed=seed) for seed in (0, 0, 1))
    assert set(one.lengths.tolist()) == {0, 12}
    assert (one.gene_id == same.gene_id).all()
    assert (one.value == same.value).all()
    assert (one.gene_id != other.gene_id).any()
    assert len({tuple(row) for row in one.gene_id.reshape(-1, 12)}) > 1


def test_chosen_genes_without_zeros_are_the_nonzero_ones_among_them(
    write_tuned: Write, tokenize: Callable[..., Tokens]
) -> None:
    tokens = tokenize(load_model(write_tuned(genes="GENE0\nGENE7\n", include_zero_gene=False)))
    assert set(tokens.gene_id[~tokens.is_special].tolist()) == {0, 7}
    assert (tokens.value[~tokens.is_special] > 0).all()
    assert set(tokens.value[tokens.is_special].tolist()) == {-2.0}


@pytest.mark.parametrize(
    ("genes", "args", "message"),
    [
        ("GENE0\nNOGENE\n", {}, r"hvg\.txt lists 1 .*'NOGENE'"),
        ("\n", {}, r"hvg\.txt lists no gene"),
        ("GENE0", {"input_genes": "other.txt"}, r"input_genes 'other\.txt'"),
        ("GENE0", {"input_genes": 5}, "input_genes 5"),
        ("GENE0", {"input_genes": "../hvg.txt"}, "input_genes"),
    ],
)
def test_a_choice_of_genes_that_cannot_be_read_is_refused(
    write_tuned: Write, genes: str, args: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(write_tuned(genes=genes, **args))


def test_the_choice_of_genes_counts_for_the_digest(write_tuned: Write) -> None:
    assert load_model(write_tuned("a", genes="GENE0")).digest != load_model(write_tuned("b", genes="GENE1")).digest
