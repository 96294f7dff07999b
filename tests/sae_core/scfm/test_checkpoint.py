from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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


def test_the_number_of_tokens_is_the_checkpoints(write_checkpoint: Write, tiny_weights: Weights) -> None:
    rows = tiny_weights["encoder.embedding.weight"]
    longer = tiny_weights | {"encoder.embedding.weight": torch.cat([rows, rows[:5]])}
    assert len(state(load_model(write_checkpoint("longer", weights=longer)))["encoder.embedding.weight"]) == 48
    shorter = tiny_weights | {"encoder.embedding.weight": rows[:-1]}
    with pytest.raises(CheckpointError, match=r" 42 .*vocab\.json.* 43"):
        load_model(write_checkpoint("shorter", weights=shorter))


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
    with pytest.raises(CheckpointError, match=r"nowhere .*'mini'"):
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
    with pytest.raises(CheckpointError, match=r"missing transformer_encoder\.layers\.3.* and \d+ more"):
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
