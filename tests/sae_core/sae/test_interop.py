from __future__ import annotations

import json
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sae_core import sae as core
from sae_core.errors import CheckpointError, ConfigError, UnknownScaleError
from sae_core.sae import (
    ARCHITECTURES,
    FOREIGN_FORMATS,
    Origin,
    SAEConfig,
    SparseAutoencoder,
    find_foreign,
    load_sae,
    save_sae,
    write_dictionary_learning,
    write_saelens,
    write_sparsify,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

D, F, K, N = 6, 20, 3, 50
SAELENS = {"architecture": "standard", "d_in": 2, "d_sae": 2, "dtype": "float32", "apply_b_dec_to_input": True}
ONES = {"W_enc": [[1, 0], [0, 1]], "W_dec": [[2, 0], [0, 0.5]], "b_enc": [0, -1], "b_dec": [1, 1]}
"""Decoder rows of length 2 and 1/2. Of x = (3, 5), centred: pre = (2, 3), so x_hat = 2 (2, 0) + 3 (0, .5) + (1, 1)."""


def saelens_folder(folder: Path, tensors: Mapping[str, Any], **cfg: Any) -> Path:
    folder.mkdir(exist_ok=True)
    data = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in tensors.items()}
    safetensors.torch.save_file(data, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(SAELENS | cfg))
    return folder


def sparsify_folder(
    folder: Path, tensors: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, **cfg: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    data = {name: torch.as_tensor(value, dtype=dtype) for name, value in tensors.items()}
    safetensors.torch.save_file(data, folder / "sae.safetensors")
    fields = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": 1}
    fields |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": 2}
    (folder / "cfg.json").write_text(json.dumps(fields | cfg))
    return folder


def dictionary_folder(folder: Path, tensors: Mapping[str, Any], dict_class: str, **trainer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    state = {n: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float32) for n, v in tensors.items()}
    torch.save(state, folder / "ae.pt")
    header = {"trainer": {"trainer_class": "Some", "dict_class": dict_class, **trainer}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(header))
    return folder


def read_saelens(folder: Path, **options: Any) -> SparseAutoencoder:
    return core.read_saelens(folder, **options).sae


def read_sparsify(folder: Path, **options: Any) -> SparseAutoencoder:
    return core.read_sparsify(folder, **options).sae


def read_dictionary_learning(folder: Path, **options: Any) -> SparseAutoencoder:
    return core.read_dictionary_learning(folder, **options).sae


def read_foreign(folder: Path, **options: Any) -> SparseAutoencoder:
    return core.read_foreign(folder, **options).sae


def codes(sae: SparseAutoencoder, *x: list[float]) -> list[list[float]]:
    dense: list[list[float]] = sae.encode(torch.tensor(x, dtype=torch.float32)).to_dense().tolist()
    return dense


def recon(sae: SparseAutoencoder, *x: list[float]) -> list[list[float]]:
    x_hat: list[list[float]] = sae(torch.tensor(x, dtype=torch.float32)).tolist()
    return x_hat


def made(arch: str, *, one_theta: bool = False) -> SparseAutoencoder:
    """Random weights with a normaliser, for activations about 1."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sae = SparseAutoencoder(SAEConfig(d_model=D, n_features=F, k=K, arch=arch, groups=(0.25, 0.25, 0.5)))
    with torch.no_grad():
        sae.W_enc.add_(0.1 * draw(F, D))
        sae.b_enc.copy_(0.2 * draw(F))
        sae.b_dec.copy_(draw(D))
        sae.mu.copy_(1 + 0.2 * draw(D))
        sae.scale.fill_(2.5)
        sae.theta.copy_(torch.full((F,), 0.3) if one_theta else draw(F).abs() / 2)
        if arch == "standard":
            sae.theta.zero_()
    return sae


@pytest.fixture
def x() -> Tensor:
    return 1 + 2 * torch.randn(N, D, generator=torch.Generator().manual_seed(1))


# SAELens


def test_saelens_lengths_and_centring_are_folded_and_a_code_is_a_length(tmp_path):
    sae = read_saelens(saelens_folder(tmp_path, ONES))
    assert sae.W_dec.tolist() == [[1, 0], [0, 1]]
    assert sae.W_enc.tolist() == [[2, 0], [0, 0.5]]
    assert sae.b_enc.tolist() == [-2, -1]
    assert codes(sae, [3, 5], [0, 0]) == [[4, 1.5], [0, 0]]
    assert recon(sae, [3, 5], [0, 0]) == [[5, 2.5], [1, 1]]
    assert (sae.config.arch, sae.config.d_model, sae.config.n_features) == ("standard", 2, 2)
    assert not any(weight.requires_grad for weight in sae.parameters())


def test_saelens_centres_unless_it_is_told_not_to(tmp_path):
    sae = read_saelens(saelens_folder(tmp_path, ONES, apply_b_dec_to_input=False))
    assert codes(sae, [3, 5]) == [[6, 2]]
    assert recon(sae, [3, 5]) == [[7, 3]]
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({k: v for k, v in SAELENS.items() if k != "apply_b_dec_to_input"}))
    assert codes(read_saelens(tmp_path), [3, 5]) == [[4, 1.5]]


@pytest.mark.parametrize("name", ["threshold", "log_threshold"])
def test_saelens_thresholds_are_stretched_with_their_feature_and_not_reached_by_an_equal_value(tmp_path, name):
    threshold = torch.tensor([1.0, 3.0])
    tensors = ONES | {name: threshold if name == "threshold" else threshold.log()}
    sae = read_saelens(saelens_folder(tmp_path, tensors, architecture="jumprelu"))
    assert sae.theta.tolist() == pytest.approx([2, 1.5])
    sae.theta.copy_(torch.tensor([2.0, 1.5]))
    assert codes(sae, [3, 5], [3, 5.5]) == [[4, 0], [4, 1.75]]
    assert recon(sae, [3, 5]) == [[5, 1]]


def test_saelens_gate_becomes_a_threshold_on_the_magnitude(tmp_path):
    # gate: x_c + b_gate > 0, so x_c > (1, -.5); magnitude: 2 x_c + (0, .5), with x_c = x - (1, 1)
    tensors = {name: ONES[name] for name in ("W_enc", "W_dec", "b_dec")}
    tensors |= {"b_gate": [-1, 0.5], "b_mag": [0, 0.5], "r_mag": torch.tensor([2.0, 2.0]).log()}
    sae = read_saelens(saelens_folder(tmp_path, tensors, architecture="gated"))
    assert sae.config.arch == "gated"
    assert torch.allclose(sae.theta, torch.tensor([4, -0.25]))
    found = torch.tensor(codes(sae, [3, 5], [1.9, 0.9], [2.1, 0.4]))
    assert torch.allclose(found, torch.tensor([[8, 4.25], [0, 0.15], [4.4, 0]]), atol=1e-5)


def test_saelens_topk_ranks_lengths_or_needs_one_length(tmp_path):
    cfg = {"architecture": "topk", "k": 1}
    ranked = read_saelens(saelens_folder(tmp_path, ONES, **cfg, rescale_acts_by_decoder_norm=True))
    assert codes(ranked, [3, 5]) == [[4, 0]]
    assert ranked.config.k == 1
    with pytest.raises(CheckpointError, match=r"\(0\.5, 2\.0\)"):
        read_saelens(saelens_folder(tmp_path, ONES, **cfg))
    even = read_saelens(saelens_folder(tmp_path, ONES | {"W_dec": [[2, 0], [0, 2]]}, **cfg))
    assert codes(even, [3, 5]) == [[0, 6]]
    assert recon(even, [3, 5]) == [[1, 7]]


def test_saelens_before_version_6_had_topk_as_an_activation_function(tmp_path):
    even = ONES | {"W_dec": [[1, 0], [0, 1]], "scaling_factor": [1, 1]}
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1}, "normalize_activations": False}
    folder = saelens_folder(tmp_path, even, **old, hook_point="blocks.2.hook_resid_post", prepend_bos=True)
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["architecture"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    sae = read_saelens(folder)
    assert (sae.config.arch, sae.config.k) == ("topk", 1)
    assert codes(sae, [3, 5]) == [[0, 3]]


@pytest.mark.parametrize(("ranks", "theta"), [(False, [5, 1.25]), (True, [2.5, 2.5])])
def test_saelens_training_checkpoint_of_batchtopk_is_read_with_its_threshold(tmp_path, ranks, theta):
    cfg = {"architecture": "batchtopk", "k": 2.0, "rescale_acts_by_decoder_norm": ranks}
    sae = read_saelens(saelens_folder(tmp_path, ONES | {"topk_threshold": 2.5}, **cfg))
    assert (sae.config.arch, sae.config.k) == ("batchtopk", 2)
    assert sae.theta.tolist() == theta
    for threshold in (0.0, -1.0):
        with pytest.raises(CheckpointError, match=f"topk_threshold is {threshold}"):
            read_saelens(saelens_folder(tmp_path, ONES | {"topk_threshold": threshold}, **cfg))
    with pytest.raises(CheckpointError, match="topk_threshold"):
        read_saelens(saelens_folder(tmp_path, ONES, **cfg))
    with pytest.raises(CheckpointError, match=r"k is 2\.5"):
        read_saelens(saelens_folder(tmp_path, ONES | {"topk_threshold": 2.5}, **cfg | {"k": 2.5}))


def test_saelens_matryoshka_widths_are_the_groups(tmp_path):
    tensors = {"W_enc": torch.eye(4), "W_dec": torch.eye(4), "b_enc": [0] * 4, "b_dec": [0] * 4, "topk_threshold": 1}
    cfg = {"architecture": "matryoshka_batchtopk", "k": 1, "d_in": 4, "d_sae": 4}
    for widths in ([1, 3], [1, 3, 4]):
        sae = read_saelens(saelens_folder(tmp_path, tensors, **cfg, matryoshka_widths=widths))
        assert (sae.config.arch, sae.config.group_stops) == ("matryoshka", (1, 3, 4))


def test_saelens_k_comes_from_the_training_details_and_is_else_1(tmp_path):
    def k(**details: Any) -> int:
        metadata = {"training_architecture_details": details}
        return read_saelens(saelens_folder(tmp_path, ONES, metadata=metadata)).config.k

    assert [k(k=2), k(target_l0=2.0), k(target_l0=1.5), k(), k(target_l0=None)] == [2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "transcoder"}, "'transcoder'.*standard, jumprelu, topk, gated"),
        ({"architecture": "skip_transcoder"}, "'skip_transcoder'"),
        ({"architecture": ["x"]}, r"\['x'\]"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations"),
        ({"normalize_activations": True}, "normalize_activations is True"),
        ({"reshape_activations": "patches"}, "reshape_activations is 'patches'"),
        ({"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"architecture": "topk"}, "k is None"),
        ({"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}, r"k = 3\b"),
        ({"architecture": "jumprelu"}, "threshold"),
        ({"architecture": "gated"}, "b_gate.*b_enc"),
        ({"d_in": 3}, r"d_in is 3\b.*\b2\b"),
        ({"d_sae": 3}, r"d_sae is 3\b.*\b2\b"),
        ({"metadata": "text"}, "metadata is 'text'"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input is 'false'"),
        (
            {"architecture": "topk", "k": 1, "rescale_acts_by_decoder_norm": "no"},
            "rescale_acts_by_decoder_norm is 'no'",
        ),
        ({"activation_fn": "topk", "activation_fn_kwargs": "k"}, "activation_fn_kwargs is 'k'"),
        ({"metadata": {"scsae": "text"}}, "'scsae'.*'text'"),
    ],
)
def test_what_saelens_says_beyond_ours_is_refused(tmp_path, cfg, message):
    with pytest.raises(CheckpointError, match=message):
        read_saelens(saelens_folder(tmp_path, ONES, **cfg))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_skip": [[0, 0], [0, 0]]}, "W_skip"),
        ({"scaling_factor": [1, 2]}, "scaling_factor"),
        ({"finetuning_scaling_factor": [1, 2]}, "finetuning_scaling_factor"),
        ({"W_dec": [[2, 0], [0, 0]]}, "decoder row.*0"),
        ({"b_enc": [0, float("nan")]}, "b_enc"),
        ({"b_dec": [1, 1, 1]}, r"b_dec .*\(3,\).*\[d_model\]"),
        ({"b_dec": [[1, 1]]}, r"b_dec .*\(1, 2\)"),
    ],
)
def test_tensors_that_do_not_make_an_autoencoder_are_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_saelens(saelens_folder(tmp_path, ONES | change))


def test_unreadable_files_are_refused(tmp_path):
    folder = saelens_folder(tmp_path, ONES)
    (folder / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"sae_weights\.safetensors"):
        read_saelens(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cfg\.json"):
        read_saelens(folder)


@pytest.mark.parametrize("widths", ["all", 3, ["a"], [0.5]])
def test_widths_of_groups_that_are_no_whole_numbers_are_refused(tmp_path, widths):
    folder = saelens_folder(
        tmp_path,
        ONES | {"topk_threshold": 0.5},
        architecture="matryoshka_batchtopk",
        k=1,
        matryoshka_widths=widths,
    )
    with pytest.raises(CheckpointError, match="matryoshka_widths"):
        read_saelens(folder)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_pointer_in_a_folder_of_another_library_is_recognised(tmp_path, name):
    folder = saelens_folder(tmp_path, ONES)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 99\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        read_foreign(folder)


# sparsify

SPARSE = {"encoder.weight": [[1, 0], [0, 1], [1, 1]], "encoder.bias": [0, -1, -3]}
SPARSE |= {"W_dec": [[1, 0], [0, 1], [0.6, 0.8]], "b_dec": [1, 1]}


def test_sparsify_is_centred_and_keeps_the_k_largest_of_each_token(tmp_path):
    sae = read_sparsify(sparsify_folder(tmp_path, SPARSE, num_latents=3, k=2))
    assert (sae.config.arch, sae.config.k, sae.config.n_features) == ("topk", 2, 3)
    assert codes(sae, [3, 5], [1.5, 0]) == [[0, 3, 3], [0.5, 0, 0]]
    assert torch.allclose(sae(torch.tensor([[3.0, 5]])), torch.tensor([[2.8, 6.4]]))


def test_sparsify_sizes_come_from_the_expansion_factor_where_no_number_is_given(tmp_path):
    four = {"encoder.weight": torch.ones(4, 2), "encoder.bias": [0] * 4, "W_dec": [[1, 0]] * 4, "b_dec": [0, 0]}
    assert read_sparsify(sparsify_folder(tmp_path, four, expansion_factor=2)).config.n_features == 4
    with pytest.raises(CheckpointError, match=r"num_latents is 64\b.*\b4\b"):
        read_sparsify(sparsify_folder(tmp_path, four))


def test_sparsify_rows_that_half_precision_rounded_keep_their_codes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(8, 5, generator=generator), dim=1)
    tensors = {"encoder.weight": rows, "encoder.bias": [0] * 8, "W_dec": rows, "b_dec": [0] * 5}
    sae = read_sparsify(sparsify_folder(tmp_path, tensors, dtype=torch.bfloat16, num_latents=8, d_in=5, k=2))
    stored = rows.bfloat16().float()
    assert (torch.linalg.vector_norm(stored, dim=1) - 1).abs().max() > 1e-4
    assert torch.equal(sae.W_dec, stored)
    assert torch.equal(sae.W_enc, stored)
    with pytest.raises(CheckpointError, match="decoder"):
        read_sparsify(sparsify_folder(tmp_path, tensors | {"W_dec": stored}, num_latents=8, d_in=5, k=2))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"transcode": True}, "transcode is True"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"activation": "groupmax"}, "'groupmax'.*topk"),
        ({"signed": True}, "signed is True"),
        ({"something_new": 0.5}, r"something_new is 0\.5"),
        ({"k": 0}, "k is 0"),
        ({"k": 9}, r"k = 9\b"),
        ({"d_in": 7}, r"d_in is 7\b.*\b2\b"),
        ({"num_latents": None, "expansion_factor": "many"}, "expansion_factor is 'many'"),
        ({"num_latents": "many"}, "num_latents is 'many'"),
    ],
)
def test_what_sparsify_says_beyond_ours_is_refused(tmp_path, cfg, message):
    with pytest.raises(CheckpointError, match=message):
        read_sparsify(sparsify_folder(tmp_path, SPARSE, **{"num_latents": 3} | cfg))
    with pytest.raises(CheckpointError, match="W_skip"):
        read_sparsify(sparsify_folder(tmp_path, SPARSE | {"W_skip": [[0, 0], [0, 0]]}, num_latents=3))


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - {"topk"}))
def test_an_architecture_with_thresholds_cannot_be_written_for_sparsify(tmp_path, arch):
    with pytest.raises(CheckpointError, match=f"arch is '{arch}'.*topk"):
        write_sparsify(made(arch), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# dictionary_learning

LINEAR = {"encoder.weight": [[1, 0], [0, 1]], "encoder.bias": [0, -1], "decoder.weight": [[2, 0], [0, 0.5]]}
EVEN = LINEAR | {"decoder.weight": [[1, 0], [0, 1]]}
COUNT = {"k": torch.tensor(1, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("dict_class", "tensors", "trainer", "arch", "z", "x_hat"),
    [
        ("AutoEncoder", LINEAR | {"bias": [1, 1]}, {}, "standard", [4, 1.5], [5, 2.5]),
        ("AutoEncoderNew", LINEAR | {"decoder.bias": [1, 1]}, {}, "standard", [6, 2], [7, 3]),
        ("JumpReluAutoEncoder", ONES | {"threshold": [1, 4]}, {}, "jumprelu", [6, 0], [7, 1]),
        ("AutoEncoderTopK", EVEN | {"b_dec": [1, 1]}, {"k": 1}, "topk", [0, 3], [1, 4]),
        ("AutoEncoderTopK", EVEN | {"b_dec": [1, 1], "threshold": 9} | COUNT, {"k": 1}, "topk", [0, 3], [1, 4]),
        (
            "BatchTopKSAE",
            LINEAR | {"b_dec": [1, 1], "threshold": 2.5} | COUNT,
            {"k": 1},
            "batchtopk",
            [0, 1.5],
            [1, 2.5],
        ),
        (
            "MatryoshkaBatchTopKSAE",
            ONES | {"threshold": 2.5, "group_sizes": torch.tensor([1, 1])} | COUNT,
            {"k": 1},
            "matryoshka",
            [0, 1.5],
            [1, 2.5],
        ),
        (
            "GatedAutoEncoder",
            {name: LINEAR[name] for name in ("encoder.weight", "decoder.weight")}
            | {"decoder_bias": [1, 1], "r_mag": [0, 0], "gate_bias": [-2.5, 0], "mag_bias": [0, -1]},
            {},
            "gated",
            [0, 1.5],
            [1, 2.5],
        ),
    ],
)
def test_every_class_of_dictionary_learning_gives_the_codes_worked_out_by_hand(
    tmp_path, dict_class, tensors, trainer, arch, z, x_hat
):
    trainer = trainer | {"activation_dim": 2, "dict_size": 2}
    sae = read_dictionary_learning(dictionary_folder(tmp_path, tensors, dict_class, **trainer))
    assert sae.config.arch == arch
    assert sae.config.k == 1
    assert torch.allclose(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(2))
    assert codes(sae, [3, 5]) == [z]
    assert recon(sae, [3, 5]) == [x_hat]


def test_groups_of_dictionary_learning_are_kept(tmp_path):
    own = {"W_enc": torch.eye(4), "W_dec": torch.eye(4), "b_enc": [0] * 4, "b_dec": [0] * 4, "threshold": 0}
    sizes = {"group_sizes": torch.tensor([1, 1, 2])}
    sae = read_dictionary_learning(dictionary_folder(tmp_path, own | sizes, "MatryoshkaBatchTopKSAE", k=2))
    assert (sae.config.group_stops, sae.config.k) == ((1, 2, 4), 2)


@pytest.mark.parametrize(
    ("dict_class", "change", "trainer", "message"),
    [
        ("BatchTopKSAE", {"threshold": -1.0}, {"k": 1}, r"threshold is -1\.0.*>= 0"),
        ("BatchTopKSAE", {}, {"k": 1}, "threshold"),
        ("BatchTopKSAE", {"threshold": 1.0} | COUNT, {"k": 2}, r"k is 2\b.*\b1\b"),
        ("BatchTopKSAE", {"threshold": 1.0}, {}, "k is None"),
        ("BatchTopKSAE", {"threshold": 1.0}, {"k": 1, "dict_size": 3}, r"dict_size is 3\b.*\b2\b"),
        ("CrossCoder", {}, {}, "'CrossCoder'.*AutoEncoder"),
        ("IdentityDict", {}, {}, "'IdentityDict'"),
        ("AutoEncoderTopK", {}, {"k": 1}, "decoder"),
    ],
)
def test_what_dictionary_learning_says_beyond_ours_is_refused(tmp_path, dict_class, change, trainer, message):
    folder = dictionary_folder(tmp_path, LINEAR | {"b_dec": [1, 1]} | change, dict_class, **trainer)
    with pytest.raises(CheckpointError, match=message):
        read_dictionary_learning(folder)


def test_pickled_code_in_a_weights_file_is_never_run(tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (ran.touch, ())

    folder = dictionary_folder(tmp_path / "ae", LINEAR, "AutoEncoder")
    (folder / "ae.pt").write_bytes(pickle.dumps({"bias": Payload()}))
    with pytest.raises(CheckpointError, match=r"ae\.pt"):
        read_foreign(folder)
    assert not ran.exists()
    (folder / "config.json").write_text('{"trainer": [1]}')
    with pytest.raises(CheckpointError, match=r"trainer is \[1\]"):
        read_foreign(folder)


# writing, and back


@pytest.mark.parametrize("one_theta", [True, False])
@pytest.mark.parametrize(
    ("name", "arch"),
    [("sparsify", "topk"), *((name, arch) for name in ("saelens", "dictionary_learning") for arch in ARCHITECTURES)],
)
def test_what_is_written_is_read_back_as_the_same_autoencoder_of_raw_activations(tmp_path, x, name, arch, one_theta):
    sae = made(arch, one_theta=one_theta)
    FOREIGN_FORMATS[name].write(sae, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FOREIGN_FORMATS[name].files)
    back = read_foreign(tmp_path)
    assert back.config == sae.config
    codes, again = sae.folded().encode(x), back.encode(x)
    assert torch.equal(codes.col, again.col)
    assert torch.equal(codes.crow, again.crow)
    assert torch.allclose(codes.value, again.value, atol=2e-6)
    assert torch.allclose(sae.folded()(x), back(x), atol=5e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_saelens_is_given_comes_back_bit_for_bit(tmp_path, arch):
    sae = made(arch).folded()
    write_saelens(sae, tmp_path)
    back = read_saelens(tmp_path)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(back, name), getattr(sae, name)), name
    if arch != "topk":
        assert torch.allclose(back.theta, sae.theta, atol=1e-6)


SHAPES = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
LINEAR_SHAPES = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F)}
GATE_SHAPES = {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)}


@pytest.mark.parametrize(
    ("arch", "named", "more"),
    [
        ("batchtopk", "jumprelu", {"threshold": (F,)}),
        ("matryoshka", "jumprelu", {"threshold": (F,)}),
        ("jumprelu", "jumprelu", {"threshold": (F,)}),
        ("topk", "topk", {}),
        ("standard", "standard", {}),
        ("gated", "gated", GATE_SHAPES),
    ],
)
def test_saelens_is_given_its_own_names_shapes_and_fields(tmp_path, arch, named, more):
    write_saelens(made(arch), tmp_path, metadata={"model_name": "mini", "hook_name": "layer.2"})
    tensors = safetensors.torch.load_file(tmp_path / "sae_weights.safetensors")
    shapes = {n: s for n, s in SHAPES.items() if arch != "gated" or n != "b_enc"} | more
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    assert (metadata["model_name"], metadata["hook_name"], metadata["sae_lens_version"]) == ("mini", "layer.2", "6.0.0")
    assert metadata["scsae"] == json.loads(json.dumps(made(arch).config.to_dict()))
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg.get("k")) == (
        named,
        D,
        F,
        K if arch == "topk" else None,
    )
    assert (cfg["apply_b_dec_to_input"], cfg["normalize_activations"]) == (False, "none")


@pytest.mark.parametrize(
    ("arch", "one_theta", "dict_class", "shapes"),
    [
        ("batchtopk", True, "BatchTopKSAE", LINEAR_SHAPES | {"b_dec": (D,), "k": (), "threshold": ()}),
        ("batchtopk", False, "JumpReluAutoEncoder", SHAPES | {"threshold": (F,)}),
        ("matryoshka", True, "MatryoshkaBatchTopKSAE", SHAPES | {"k": (), "threshold": (), "group_sizes": (3,)}),
        ("matryoshka", False, "JumpReluAutoEncoder", SHAPES | {"threshold": (F,)}),
        ("jumprelu", True, "JumpReluAutoEncoder", SHAPES | {"threshold": (F,)}),
        ("topk", True, "AutoEncoderTopK", LINEAR_SHAPES | {"b_dec": (D,), "k": (), "threshold": ()}),
        ("standard", True, "AutoEncoderNew", LINEAR_SHAPES | {"decoder.bias": (D,)}),
        (
            "gated",
            True,
            "GatedAutoEncoder",
            {"encoder.weight": (F, D), "decoder.weight": (D, F), "decoder_bias": (D,)}
            | {"r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,)},
        ),
    ],
)
def test_dictionary_learning_is_given_its_own_names_shapes_and_fields(tmp_path, arch, one_theta, dict_class, shapes):
    sae = made(arch, one_theta=one_theta)
    write_dictionary_learning(sae, tmp_path, trainer={"lm_name": "mini", "layer": 2, "k": 99})
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert trainer == {
        "lm_name": "mini",
        "layer": 2,
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": F,
        "k": K,
    }
    if "group_sizes" in tensors:
        assert tensors["group_sizes"].tolist() == [5, 5, 10]
    if dict_class == "BatchTopKSAE":
        assert tensors["threshold"] == sae.folded().theta[0]


def test_sparsify_is_given_its_own_names_shapes_and_fields(tmp_path):
    write_sparsify(made("topk"), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "sae.safetensors")
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["d_in"], cfg["num_latents"], cfg["k"], cfg["activation"]) == (D, F, K, "topk")
    assert {cfg[name] for name in ("transcode", "skip_connection", "multi_topk")} == {False}


def test_a_standard_autoencoder_with_thresholds_is_written_as_jumprelu(tmp_path, x):
    sae = made("standard")
    sae.theta.fill_(0.5)
    for write, read in ((write_saelens, read_saelens), (write_dictionary_learning, read_dictionary_learning)):
        write(sae, tmp_path / write.__name__)
        back = read(tmp_path / write.__name__)
        assert torch.allclose(back.encode(x).to_dense(), sae.folded().encode(x).to_dense(), atol=2e-6)
    assert json.loads((tmp_path / "write_saelens" / "cfg.json").read_text())["architecture"] == "jumprelu"


def test_a_foreign_autoencoder_is_saved_and_loaded_like_our_own(tmp_path, x):
    write_dictionary_learning(made("batchtopk"), tmp_path / "theirs")
    sae = read_foreign(tmp_path / "theirs")
    save_sae(sae, tmp_path / "ours")
    loaded = load_sae(tmp_path / "ours")
    assert loaded.config == sae.config
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())


def test_values_that_are_no_json_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"cfg\.json"):
        write_saelens(made("topk"), tmp_path / "new", metadata={"bad": torch.zeros(1)})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 7}, "'scsae'"),
        ({"d_model": 7}, "'scsae'"),
        ({"arch": "batchtopk"}, "'scsae'"),
        ({"arch": "vanilla"}, "arch = 'vanilla'"),
        ({"what": 1}, r"\['what'\]"),
    ],
)
def test_our_configuration_in_a_foreign_folder_has_to_fit_what_is_beside_it(tmp_path, change, message):
    write_sparsify(made("topk"), tmp_path)
    path = tmp_path / "cfg.json"
    cfg = json.loads(path.read_text())
    cfg["scsae"] |= change
    path.write_text(json.dumps(cfg))
    with pytest.raises(CheckpointError, match=message):
        read_foreign(tmp_path)


def test_a_folder_is_known_by_its_files_and_by_those_of_one_format_only(tmp_path):
    sae = made("topk")
    with pytest.raises(CheckpointError, match=r"nothing.*saelens: cfg\.json"):
        read_foreign(tmp_path)
    with pytest.raises(CheckpointError, match="absent"):
        read_foreign(tmp_path / "absent")
    save_sae(sae, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="load_sae"):
        read_foreign(tmp_path / "ours")
    write_sparsify(sae, tmp_path / "two")
    write_saelens(sae, tmp_path / "two")
    with pytest.raises(CheckpointError, match="saelens and sparsify"):
        read_foreign(tmp_path / "two")


def test_of_two_formats_in_one_folder_the_one_that_is_named_is_read(tmp_path):
    write_sparsify(made("topk"), tmp_path)
    write_saelens(made("topk"), tmp_path)
    with pytest.raises(CheckpointError, match="--format saelens"):
        find_foreign(tmp_path)
    assert find_foreign(tmp_path, format="saelens").format == "saelens"
    with pytest.raises(CheckpointError, match=r"dictionary_learning.*config\.json"):
        find_foreign(tmp_path, format="dictionary_learning")
    with pytest.raises(CheckpointError, match=r"'npz'.*saelens"):
        find_foreign(tmp_path, format="npz")


def test_one_autoencoder_below_a_folder_is_found_and_of_several_one_has_to_be_named(tmp_path):
    write_sparsify(made("topk"), tmp_path / "run" / "layers.3")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert find_foreign(tmp_path).folder == tmp_path / "run" / "layers.3"
    write_saelens(made("gated"), tmp_path / "run" / "layers.4")
    with pytest.raises(CheckpointError, match=r"2 autoencoders: run/layers\.3, run/layers\.4.*--pick run/layers\.3"):
        find_foreign(tmp_path)
    assert find_foreign(tmp_path, format="saelens").folder == tmp_path / "run" / "layers.4"
    found = find_foreign(tmp_path, pick="run/layers.3")
    assert (found.format, found.read().sae.config.arch) == ("sparsify", "topk")
    for wrong in ("layers.3", "..", "run/layers.5"):
        with pytest.raises(CheckpointError, match=r"--pick.*run/layers\.3, run/layers\.4"):
            find_foreign(tmp_path, pick=wrong)


def test_the_digest_of_a_folder_is_that_of_its_two_files(tmp_path):
    write_saelens(made("gated"), tmp_path / "a")
    write_saelens(made("gated"), tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("more")
    one, two = (find_foreign(tmp_path / name).sha256 for name in "ab")
    assert one == two
    (tmp_path / "b" / "cfg.json").write_text("{}")
    assert find_foreign(tmp_path / "b").sha256 != one


# what a folder says about model, site and scale


@pytest.mark.parametrize("name", FOREIGN_FORMATS)
def test_model_and_site_come_back_as_they_were_written(tmp_path, name):
    origin = Origin(model="tiny", site="layer.2", model_digest="ab12")
    FOREIGN_FORMATS[name].write(made("topk"), tmp_path, origin=origin)
    assert core.read_foreign(tmp_path).origin == origin


@pytest.mark.parametrize(
    ("cfg", "site"),
    [
        ({"metadata": {"model_name": "m", "hook_name": "blocks.2.hook_resid_post"}}, "blocks.2.hook_resid_post"),
        ({"model_name": "m", "hook_name": "blocks.2.hook_mlp_out"}, "blocks.2.hook_mlp_out"),
        (
            {"model_name": "m", "hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1},
            "blocks.1.hook_resid_pre",
        ),
        ({"model_name": "m"}, None),
    ],
)
def test_saelens_names_model_and_site_in_every_version(tmp_path, cfg, site):
    assert core.read_saelens(saelens_folder(tmp_path, ONES, **cfg)).origin == Origin(model="m", site=site)


@pytest.mark.parametrize(
    ("trainer", "site"),
    [
        ({"layer": 3, "submodule_name": "resid_post_layer_3"}, "resid_post_layer_3"),
        ({"layer": 3}, "layer.3"),
        ({"layer": "3"}, None),
        ({}, None),
    ],
)
def test_dictionary_learning_names_a_submodule_or_a_layer(tmp_path, trainer, site):
    folder = dictionary_folder(tmp_path, LINEAR | {"bias": [1, 1]}, "AutoEncoder", lm_name="m", **trainer)
    assert core.read_dictionary_learning(folder).origin == Origin(model="m", site=site)


@pytest.mark.parametrize(
    ("name", "site"), [("layers.5.mlp", "layers.5.mlp"), ("h.3", "h.3"), ("mine", None), ("v2", None)]
)
def test_sparsify_names_the_folder_as_the_module(tmp_path, name, site):
    folder = sparsify_folder(tmp_path / name, SPARSE, num_latents=3, k=2)
    assert core.read_sparsify(folder).origin == Origin(site=site)


@pytest.mark.parametrize("entry", ["text", {"modell": "m"}, {"model": 3}])
def test_an_origin_that_was_not_written_here_is_refused(tmp_path, entry):
    write_sparsify(made("topk"), tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scsae_origin": entry}))
    with pytest.raises(CheckpointError, match="scsae_origin"):
        core.read_foreign(tmp_path)


def test_whether_k_is_stated_is_told(tmp_path):
    assert not core.read_saelens(saelens_folder(tmp_path, ONES)).k_is_stated
    assert core.read_saelens(
        saelens_folder(tmp_path, ONES, metadata={"training_architecture_details": {"k": 2}})
    ).k_is_stated
    for name in ("saelens", "dictionary_learning"):
        FOREIGN_FORMATS[name].write(made("jumprelu"), tmp_path / name)
        assert core.read_foreign(tmp_path / name).k_is_stated
    folder = dictionary_folder(tmp_path / "new", LINEAR | {"bias": [1, 1]}, "AutoEncoder")
    assert not core.read_dictionary_learning(folder).k_is_stated


SCALE = 2.5


@pytest.mark.parametrize(
    ("name", "arch"),
    [("sparsify", "topk"), *((name, arch) for name in ("saelens", "dictionary_learning") for arch in ARCHITECTURES)],
)
def test_a_scale_of_the_input_is_folded_so_that_raw_activations_give_what_scaled_ones_gave(tmp_path, x, name, arch):
    sae = made(arch, one_theta=True).folded()
    FOREIGN_FORMATS[name].write(sae, tmp_path)
    back = read_foreign(tmp_path, input_scale=SCALE)
    scaled, raw = sae.encode(SCALE * x), back.encode(x)
    assert torch.equal(scaled.col, raw.col)
    assert torch.equal(scaled.crow, raw.crow)
    assert torch.allclose(scaled.value / SCALE, raw.value, atol=5e-6)
    assert torch.allclose(sae(SCALE * x) / SCALE, back(x), atol=5e-6)
    with pytest.raises(ConfigError, match="input_scale"):
        read_foreign(tmp_path, input_scale=0.0)


def test_a_scale_that_saelens_did_not_keep_has_to_be_given(tmp_path):
    folder = saelens_folder(tmp_path, ONES, normalize_activations="expected_average_only_in")
    with pytest.raises(UnknownScaleError, match="--input-scale"):
        read_saelens(folder)
    # twice the activations: (6, 10), centred (5, 9), pre = (5, 8), x_hat = (10, 4) + (1, 1), and half of that
    assert codes(read_saelens(folder, input_scale=2.0), [3, 5]) == [[5, 2]]
    assert recon(read_saelens(folder, input_scale=2.0), [3, 5]) == [[5.5, 2.5]]


# the libraries themselves, where they are installed


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def check_same(sae: SparseAutoencoder, x: Tensor, z: Tensor, x_hat: Tensor) -> None:
    folded = sae.folded()
    assert torch.allclose(folded.encode(x).to_dense(), z, atol=1e-5)
    assert torch.allclose(folded(x), x_hat, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_saelens_itself_computes_the_same(tmp_path, x, arch):
    sae = made(arch)
    write_saelens(sae, tmp_path)
    theirs = library("sae_lens").SAE.load_from_disk(tmp_path)
    check_same(sae, x, theirs.encode(x).detach(), theirs(x).detach())


def test_sparsify_itself_computes_the_same(tmp_path, x):
    sae = made("topk")
    write_sparsify(sae, tmp_path)
    theirs = library("sparsify").SparseCoder.load_from_disk(tmp_path)
    top = theirs.encode(x)
    z = torch.zeros(N, F).scatter_(1, top.top_indices, top.top_acts.detach())
    check_same(sae, x, z, z @ theirs.W_dec.detach() + theirs.b_dec.detach())


@pytest.mark.parametrize("one_theta", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dictionary_learning_itself_computes_the_same(tmp_path, x, arch, one_theta):
    sae = made(arch, one_theta=one_theta)
    write_dictionary_learning(sae, tmp_path)
    load: Callable[..., Any] = library("dictionary_learning.utils").load_dictionary
    theirs, _ = load(str(tmp_path), "cpu")
    z = theirs.encode(x)
    check_same(sae, x, z.detach(), theirs.decode(z).detach())


# the reverse: what the libraries themselves write


def randomised(theirs: Any, *, unit_decoder: bool = False) -> Any:
    """Random weights instead of those of a start, thresholds above 0, and codes that are sparse."""
    generator = torch.Generator().manual_seed(4)
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator) / 2
            value.copy_(drawn.abs() if "threshold" in name else drawn)
    if unit_decoder:
        theirs.W_dec.data = torch.nn.functional.normalize(theirs.W_dec.data, dim=1)
    return theirs


def check_read(ours: SparseAutoencoder, x: Tensor, z: Tensor, x_hat: Tensor) -> None:
    """The same features are active, and the reconstruction is the same; theirs may count a code in other units."""
    assert torch.equal(ours.encode(x).to_dense() > 0, z > 0)
    assert 0 < int((z > 0).sum()) < z.numel()
    assert torch.allclose(ours(x), x_hat, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["Standard", "JumpReLU", "TopK", "Gated"])
def test_what_saelens_itself_writes_is_read_as_it_computes(tmp_path, x, name):
    lens = library("sae_lens")
    more = {"k": K} if name == "TopK" else {}
    config = getattr(lens, f"{name}SAEConfig")(d_in=D, d_sae=F, **more)
    config.metadata.hook_name, config.metadata.model_name = "blocks.1.hook_resid_post", "m"
    theirs = randomised(getattr(lens, f"{name}SAE")(config), unit_decoder=name == "TopK")
    theirs.save_model(tmp_path)
    found = core.read_foreign(tmp_path)
    assert found.origin == Origin(model="m", site="blocks.1.hook_resid_post")
    check_read(found.sae, x, theirs.encode(x).detach(), theirs(x).detach())


def test_what_sparsify_itself_writes_is_read_as_it_computes(tmp_path, x):
    sparse = library("sparsify")
    theirs = randomised(sparse.SparseCoder(D, sparse.SparseCoderConfig(num_latents=F, k=K)), unit_decoder=True)
    theirs.save_to_disk(tmp_path / "layers.1")
    found = core.read_foreign(tmp_path)
    assert found.origin == Origin(site="layers.1")
    top = theirs.encode(x)
    z = torch.zeros(N, F).scatter_(1, top.top_indices, top.top_acts.detach())
    check_read(found.sae, x, z, z @ theirs.W_dec.detach() + theirs.b_dec.detach())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("AutoEncoder", {}),
        ("AutoEncoderNew", {}),
        ("GatedAutoEncoder", {}),
        ("JumpReluAutoEncoder", {}),
        ("BatchTopKSAE", {"k": K}),
        ("MatryoshkaBatchTopKSAE", {"k": K, "group_sizes": [5, 15]}),
    ],
)
def test_what_dictionary_learning_itself_writes_is_read_as_it_computes(tmp_path, x, name, sizes):
    place = {"BatchTopKSAE": "trainers.batch_top_k", "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k"}
    module = library(f"dictionary_learning.{place.get(name, 'dictionary')}")
    theirs = randomised(getattr(module, name)(D, F, **sizes))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "lm_name": "m", "layer": 1, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    found = core.read_foreign(tmp_path)
    assert found.origin == Origin(model="m", site="layer.1")
    z = theirs.encode(x)
    check_read(found.sae, x, z.detach(), theirs.decode(z).detach())
