from __future__ import annotations

import hashlib
import json

import pytest
import safetensors.torch
import torch

from sae_core.errors import CheckpointError, ConfigError
from sae_core.sae import (
    ARCHITECTURES,
    Normaliser,
    SAEConfig,
    SparseAutoencoder,
    TrainConfig,
    Trainer,
    load_sae,
    load_training,
    read_info,
    save_sae,
    save_training,
)


@pytest.fixture
def sae() -> SparseAutoencoder:
    made = SparseAutoencoder(SAEConfig(d_model=6, n_features=20, k=3))
    made.theta.fill_(0.2)
    made.mu.fill_(4.0)
    made.scale.fill_(3.0)
    return made


def test_a_loaded_autoencoder_gives_the_same_codes_of_raw_activations_bit_for_bit(sae, tmp_path):
    folded = sae.folded()
    save_sae(folded, tmp_path)
    loaded = load_sae(tmp_path)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) + 4
    a, b = folded.encode(x), loaded.encode(x)
    assert all(torch.equal(*pair) for pair in [(a.crow, b.crow), (a.col, b.col), (a.value, b.value)])
    assert torch.equal(folded.decode(a), loaded.decode(b))
    assert loaded.config == sae.config


def test_saving_folds_and_saving_what_was_loaded_writes_the_same_bytes(sae, tmp_path):
    save_sae(sae, tmp_path / "a", {"site": "layer.2"})
    save_sae(load_sae(tmp_path / "a"), tmp_path / "b", {"site": "layer.2"})
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_extra_values_come_back_and_are_read_without_the_weights(sae, tmp_path):
    save_sae(sae, tmp_path, {"site": "layer.2", "fvu": 0.25})
    (tmp_path / "sae.safetensors").unlink()
    info = read_info(tmp_path)
    assert info.extra == {"site": "layer.2", "fvu": 0.25}
    assert info.config == sae.config


def test_a_save_leaves_no_temporary_file_and_replaces_the_one_before(sae, tmp_path):
    save_sae(sae, tmp_path, {"n": 1})
    save_sae(sae, tmp_path, {"n": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]
    assert read_info(tmp_path).extra == {"n": 2}


def test_extra_values_that_are_no_json_are_refused_and_nothing_is_written(sae, tmp_path):
    for value in (float("nan"), torch.zeros(1)):
        with pytest.raises(ConfigError, match=r"config\.json"):
            save_sae(sae, tmp_path / "new", {"bad": value})
    assert not (tmp_path / "new").exists()


def test_a_damaged_or_foreign_weights_file_is_refused(sae, tmp_path):
    save_sae(sae, tmp_path)
    path = tmp_path / "sae.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"sae\.safetensors .*sha256"):
        load_sae(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"sae\.safetensors"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "sae_lens"}, r"'sae_lens'.*'scsae\.sae'"),
        ({"version": 3}, r"\b3\b.*1 to 2"),
        ({"config": {"d_model": 6, "n_features": 20, "k": 30}}, "k = 30"),
        ({"config": {"d_model": 6, "n_features": 20, "k": 3, "what": 1}}, r"\['what'\]"),
        ({"config": {"d_model": 6, "n_features": 21, "k": 3}}, "W_enc"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(sae, tmp_path, change, message):
    save_sae(sae, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_sae(tmp_path)


def test_a_folder_without_an_autoencoder_says_where_one_comes_from(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json .*`scsae train`"):
        load_sae(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"\(None, None\).*'scsae\.sae'"):
        load_sae(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_sae(tmp_path)


def test_training_resumes_from_disk_bit_for_bit(synthetic, tmp_path):
    def new() -> Trainer:
        config = SAEConfig(d_model=32, n_features=64, k=3)
        return Trainer(config, TrainConfig(n_steps=9, batch_size=64), Normaliser.fit([synthetic.sample(500, 0)]))

    batches = [synthetic.sample(64, seed) for seed in range(8)]
    undisturbed, first = new(), new()
    expected = [undisturbed.step(x) for x in batches]
    for x in batches[:3]:
        first.step(x)
    save_training(first.state_dict(), tmp_path, {"stream": {"epoch": 1, "position": 3}})
    state, extra = load_training(tmp_path)
    assert extra == {"stream": {"epoch": 1, "position": 3}}
    resumed = new()
    resumed.load_state_dict(state)
    assert [resumed.step(x) for x in batches[3:]] == expected[3:]
    a, b = resumed.state_dict().tensors, undisturbed.state_dict().tensors
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_saved_with_a_threshold_for_each_feature(synthetic, arch, tmp_path):
    config = SAEConfig(d_model=32, n_features=64, k=3, arch=arch, groups=(0.25, 0.75))
    trainer = Trainer(config, TrainConfig(n_steps=20), Normaliser.fit([synthetic.sample(500, 0)]))
    for seed in range(20):
        trainer.step(synthetic.sample(64, seed))
    sae, x = trainer.finish([synthetic.sample(500, 99)]), synthetic.sample(50, 100)
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.config == config
    assert loaded.theta.shape == (64,)
    assert torch.equal(loaded.theta, sae.theta)
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())
    assert not any(weight.requires_grad for weight in loaded.parameters())


def version_1(folder, weights: str, header: str, *, theta: str, drop: tuple[str, ...], edit) -> None:
    """Rewrite a saved folder as version 1 wrote it: one threshold, fewer fields."""
    tensors = safetensors.torch.load_file(folder / weights)
    tensors = {name: value for name, value in tensors.items() if name not in drop}
    tensors[theta] = tensors[theta][0]
    data = safetensors.torch.save(tensors)
    (folder / weights).write_bytes(data)
    body = json.loads((folder / header).read_text())
    body |= {"version": 1, "weights_sha256": hashlib.sha256(data).hexdigest()}
    edit(body)
    (folder / header).write_text(json.dumps(body))


OLD_SAE_FIELDS = ("d_model", "n_features", "k", "arch", "k_aux", "aux_coefficient")


def test_an_autoencoder_of_version_1_is_read_with_its_one_threshold_for_every_feature(sae, tmp_path):
    def edit(body):
        body["config"] = {name: body["config"][name] for name in OLD_SAE_FIELDS}

    save_sae(sae, tmp_path)
    version_1(tmp_path, "sae.safetensors", "config.json", theta="theta", drop=(), edit=edit)
    loaded, x = load_sae(tmp_path), torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) + 4
    assert torch.equal(loaded.theta, sae.folded().theta)
    assert torch.equal(loaded.encode(x).to_dense(), sae.folded().encode(x).to_dense())
    assert loaded.config == sae.config


def test_a_training_state_of_version_1_is_continued(synthetic, tmp_path):
    def edit(body):
        meta = body["meta"]
        del meta["n_dead_before"], meta["train_config"]["sparsity_warmup_fraction"]
        meta["sae_config"] = {name: meta["sae_config"][name] for name in OLD_SAE_FIELDS}

    config = SAEConfig(d_model=32, n_features=64, k=3)
    trainer, resumed = (
        Trainer(config, TrainConfig(n_steps=9, batch_size=64), Normaliser.fit([synthetic.sample(500, seed)]))
        for seed in (0, 1)
    )
    trainer.step(synthetic.sample(64, 0))
    save_training(trainer.state_dict(), tmp_path)
    version_1(tmp_path, "trainer.safetensors", "trainer.json", theta="sae.theta", drop=("r_mag",), edit=edit)
    state, _ = load_training(tmp_path)
    resumed.load_state_dict(state)
    assert resumed.step(synthetic.sample(64, 1)) == trainer.step(synthetic.sample(64, 1))


def test_a_training_state_is_no_autoencoder(sae, tmp_path):
    save_sae(sae, tmp_path)
    with pytest.raises(CheckpointError, match=r"trainer\.json"):
        load_training(tmp_path)


def test_nothing_is_pickled(sae, tmp_path):
    save_sae(sae, tmp_path)
    header_size = int.from_bytes((tmp_path / "sae.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "sae.safetensors").read_bytes()[8 : 8 + header_size])
    assert sorted(header) == ["W_dec", "W_enc", "b_dec", "b_enc", "theta"]
    assert header["W_dec"] == {"dtype": "F32", "shape": [20, 6], "data_offsets": header["W_dec"]["data_offsets"]}


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"d_model": 6, "n_features": 20, "k": 3} | {name: value}}
        for name, value in [
            ("k_aux", "many"),
            ("aux_coefficient", "small"),
            ("bandwidth", None),
            ("groups", "all"),
            ("groups", ["a"]),
            ("arch", 3),
        ]
    ]
    + [{"config": "word"}, {"extra": 3}, {"weights_sha256": None}, {"version": "2"}, {"version": []}],
)
def test_a_field_of_the_config_of_another_type_is_named_with_its_value(sae, tmp_path, change):
    save_sae(sae, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    name, value = next(iter(change.items()))
    if isinstance(value, dict):
        name, value = list(value.items())[-1]
    with pytest.raises(CheckpointError, match=rf"config\.json.*{name}") as caught:
        load_sae(tmp_path)
    assert repr(value).strip("[]") in str(caught.value)


def test_a_size_that_no_memory_could_hold_is_refused_before_an_autoencoder_is_built(sae, tmp_path):
    save_sae(sae, tmp_path)
    path = tmp_path / "config.json"
    body = json.loads(path.read_text())
    for name in ("d_model", "n_features"):
        path.write_text(json.dumps(body | {"config": body["config"] | {name: 10**12}}))
        with pytest.raises(CheckpointError, match="W_enc"):
            load_sae(tmp_path)


def test_a_number_that_json_writes_without_its_fraction_is_read(sae, tmp_path):
    save_sae(sae, tmp_path)
    path = tmp_path / "config.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"config": body["config"] | {"aux_coefficient": 0}}))
    assert load_sae(tmp_path).config.aux_coefficient == 0


@pytest.mark.parametrize("name", ["config.json", "sae.safetensors"])
def test_a_pointer_or_half_a_file_of_an_autoencoder_is_recognised(sae, tmp_path, name):
    save_sae(sae, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 99\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        load_sae(tmp_path)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=name):
        load_sae(tmp_path)
