"""The reader of TranscriptFormer's folders: real layouts are read whole, and wrong files get one error each."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import torch
from tiny_transcriptformer import (
    ASSAYS,
    D_PROTEIN,
    SPECIAL,
    draw,
    is_unit,
    shapes_of,
    write_h5,
    write_transcriptformer,
)

from sae_core.errors import CheckpointError
from sae_core.scfm import TranscriptFormer, load_model
from sae_core.scfm.transcriptformer.files import read_keys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HUMAN, MOUSE, ASSAY_VOCAB = "vocabs/homo_sapiens_gene.h5", "vocabs/mus_musculus_gene.h5", "vocabs/assay_vocab.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_transcriptformer(tmp_path)


def test_every_weight_of_an_official_checkpoint_is_read_or_named(tmp_path: Path) -> None:
    genes = [f"ENSG{i:011d}" for i in range(9)]
    folder = write_transcriptformer(tmp_path, "tf_sapiens", genes=genes, settings={"model_config": {"num_layers": 12}})
    # the table of genes and its layers, that of assays, 12 blocks, the head of counts and that of genes
    shapes = shapes_of(
        n_rows=16, d_protein=D_PROTEIN, d=16, d_hidden=24, n_layers=12, n_assays=4, gene_head=12, biases=False
    )
    assert len(shapes) == 1 + 6 + 1 + 12 * 10 + 7 + 6
    weights = {key: draw(key, *shape) + float(is_unit(key)) for key, shape in shapes.items()}
    torch.save(weights, folder / "model_weights.pt")
    model = load_model(folder)
    heads = tuple(f"gene_id_head.layers.{i}.{part}" for i in (0, 2, 4) for part in ("bias", "weight"))
    assert model.ignored_weights == heads
    assert "not read, taken for heads that no activation needs: gene_id_head" in model.notes
    state, read = model.state_dict(), set(shapes) - set(heads)
    for key in read:
        if ".linears." not in key:
            assert torch.equal(state[key], weights[key]), key
    for i in range(12):
        layer = f"transformer_encoder.encoder_layers.{i}.self_attn."
        stacked = torch.cat([weights[f"{layer}linears.{part}.weight"] for part in range(3)])
        assert torch.equal(state[f"{layer}Wqkv.weight"], stacked)
        assert torch.equal(state[f"{layer}out_proj.weight"], weights[f"{layer}linears.3.weight"])
    assert len(state) == len(read) - 2 * 12


def test_heads_of_tuning_and_prefixes_of_training_scripts_do_not_block_reading(tmp_path: Path) -> None:
    def edit(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"module.{key}": value for key, value in w.items()} | {"classifier.weight": torch.ones(3, 16)}

    tuned = load_model(write_transcriptformer(tmp_path, edit=edit))
    plain = load_model(write_transcriptformer(tmp_path, "plain"))
    assert any("classifier, gene_id_head" in note for note in tuned.notes)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in tuned.state_dict().items())


def test_a_checkpoint_without_its_count_head_says_so(tmp_path: Path) -> None:
    model = load_model(
        write_transcriptformer(tmp_path, edit=lambda w: {k: v for k, v in w.items() if not k.startswith("mu.")})
    )
    assert isinstance(model, TranscriptFormer)
    assert model.mu is None
    assert any("without a count head" in note for note in model.notes)


def test_rows_are_the_special_tokens_of_the_settings_and_the_keys_of_the_files_in_their_order(tmp_path: Path) -> None:
    listed = {"data_config": {"esm2_mappings": ["mus_musculus_gene.h5", "homo_sapiens_gene.h5"]}}
    folder = write_transcriptformer(tmp_path, settings=listed)
    model, genes = load_model(folder), [f"GENE{i}" for i in range(40)]
    assert read_keys(folder / HUMAN) == genes[:20]
    assert read_keys(folder / MOUSE) == [genes[0], *genes[20:]]
    assert list(model.vocabulary.tokens[:47]) == [*SPECIAL, genes[0], *genes[20:], *genes[1:20]]
    assert list(model.vocabulary.tokens[47:]) == [f"[assay] {name}" for name in ASSAYS]
    assert model.vocabulary.n_genes == 40


def test_settings_that_list_no_special_tokens_have_the_documented_ones(tmp_path: Path) -> None:
    model = load_model(write_transcriptformer(tmp_path, settings={"data_config": {"special_tokens": None}}))
    assert model.vocabulary.tokens[:7] == ("unknown", "[START]", "[END]", "[RD]", "[CELL]", "[PAD]", "[MASK]")


def test_of_the_files_of_genes_in_the_folder_the_names_alone_are_read(folder: Path) -> None:
    whole = load_model(folder)
    for name in (HUMAN, MOUSE):
        keys = read_keys(folder / name)
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("keys", data=keys, dtype=h5py.string_dtype())
    assert load_model(folder).vocabulary == whole.vocabulary
    assert load_model(folder).digest == whole.digest
    with h5py.File(folder / MOUSE, "w") as file:
        file.create_dataset("keys", data=np.array([*read_keys(folder / HUMAN)[:1], *keys[1:][::-1]], dtype="S"))
    assert load_model(folder).digest != whole.digest


def test_null_is_the_default_and_said(folder: Path) -> None:
    model = load_model(folder)
    assert "config.json, model.data_config has clip_counts null: 30.0 was taken" in model.notes
    assert "counts above 30 are set to it" in model.notes


@pytest.mark.parametrize(
    ("table", "field", "value", "words"),
    [
        ("model_config", "num_layers", None, "num_layers null"),
        ("model_config", "num_layers", 4, "num_layers is 4 in config.json and 3 in the weights"),
        ("model_config", "embed_dim", 32, "embed_dim is 32 in config.json and 16 in the weights"),
        ("model_config", "model_dim", 10**9, "model_dim is 1000000000 in config.json and 24 in the weights"),
        ("model_config", "num_heads", 3, "num_heads 3; allowed: a divisor of embed_dim 16"),
        ("model_config", "seq_len", 1, "seq_len 1; allowed: a whole number of 2 or more"),
        ("model_config", "seq_len", "long", "seq_len 'long'"),
        ("model_config", "softcap", 0, "softcap 0; allowed: a number above 0"),
        ("model_config", "activation", "tanh", "activation 'tanh'; allowed: 'relu' or 'gelu' or 'silu'"),
        ("model_config", "mu_link_fn", "exp", "mu_link_fn 'exp'; allowed: 'softmax'"),
        ("model_config", "aux_len", 0, "aux_len 0; allowed: 1"),
        ("model_config", "attn_bias", True, r"missing .*self_attn\.linears\.0\.bias \(or its linears\.1"),
        ("data_config", "aux_cols", "assay,tissue", "aux_cols 'assay,tissue'; allowed: 'assay'"),
        ("data_config", "special_tokens", ["[PAD]"], r"special_tokens .*'\[START\]'"),
        ("data_config", "special_tokens", ["[START]", "[START]"], "special_tokens .*each name once"),
        ("data_config", "special_tokens", ["[START]", 3], "special_tokens .*a list of names"),
        (
            "data_config",
            "special_tokens",
            SPECIAL[:6],
            "has 47 rows but .* names 46 genes and special tokens .6 special",
        ),
        ("data_config", "esm2_mappings", None, "esm2_mappings None; allowed: a list of names"),
        ("data_config", "esm2_mappings", ["../x.h5"], "esm2_mappings .*'../x.h5'"),
        ("data_config", "esm2_mappings", ["homo_sapiens_gene.h5"], "has 47 rows but homo_sapiens_gene.h5 names 27"),
        ("data_config", "clip_counts", 0, "clip_counts 0; allowed: a number of 1 or more"),
        ("data_config", "pad_zeros", False, "pad_zeros False; allowed: true"),
        ("loss_config", "softplus_approx", "yes", "softplus_approx 'yes'; allowed: true or false"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, table: str, field: str, value: Any, words: str) -> None:
    folder = write_transcriptformer(tmp_path, settings={table: {field: value}})
    with pytest.raises(CheckpointError, match=words) as told:
        load_model(folder)
    assert "config.json" in str(told.value)
    assert "\n" not in str(told.value)


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda w: {key: value for key, value in w.items() if key not in names}


LAYER = "transformer_encoder.encoder_layers.1."


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("gene_embeddings.embedding.weight"), r"lack gene_embeddings\.embedding\.weight"),
        (without("aux_embeddings.assay.weight"), r"lack aux_embeddings\.assay\.weight"),
        (without(f"{LAYER}self_attn.linears.3.weight"), r"missing .*layers\.1\.self_attn\.linears\.3\.weight"),
        (without(f"{LAYER}self_attn.linears.1.weight"), r"missing .*layers\.1\.self_attn\.linears\.0\.weight \(or its"),
        (without("mu.mlp.layers.4.bias"), r"missing mu\.mlp\.layers\.4\.bias"),
        (
            lambda w: w | {f"{LAYER}norm1.weight": torch.ones(5)},
            r"layers\.1\.norm1\.weight is \(5,\) instead of \(16,\)",
        ),
        (
            lambda w: w | {"aux_embeddings.tissue.weight": torch.ones(2, 16)},
            r"unexpected aux_embeddings\.tissue\.weight",
        ),
        (lambda w: w | {"mu.mlp.layers.4.bias": torch.tensor([torch.nan])}, r"not finite .*mu\.mlp\.layers\.4\.bias"),
        (lambda w: w | {f"{LAYER}linear1.lora_A.weight": torch.ones(2, 2)}, r"adapter .*lora_A"),
    ],
)
def test_a_wrong_weight_is_named(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words) as told:
        load_model(write_transcriptformer(tmp_path, edit=edit))
    assert "\n" not in str(told.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.mark.parametrize("name", ["config.json", "model_weights.pt", ASSAY_VOCAB, HUMAN])
def test_a_pointer_or_a_half_of_a_file_is_recognised(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=rf"{name}.* is a Git LFS pointer"):
        load_model(folder)
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} .*(incomplete|cannot be read|begins)"):
        load_model(folder)


@pytest.mark.parametrize("name", [ASSAY_VOCAB, HUMAN, MOUSE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{name}: No such file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model_weights.pt"])
def test_a_folder_without_settings_or_weights_is_of_no_known_family(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"transcriptformer: config\.json, model_weights\.pt, and vocabs"):
        load_model(folder)


@pytest.mark.parametrize(
    ("assays", "words"),
    [
        (
            {"unknown": 0, "a": 1, "b": 2},
            r"aux_embeddings\.assay\.weight has 4 rows but assay_vocab\.json names 3 assays",
        ),
        ({"unknown": 0, "a": 1, "b": 2, "c": 4}, r"assay_vocab\.json has 'c': 4; allowed: a row .* from 0 to 3"),
        ({"unknown": 0, "a": 1, "b": 2, "c": True}, r"assay_vocab\.json has 'c': True"),
        ({"x": 0, "a": 1, "b": 2, "c": 3}, r"assay_vocab\.json lacks 'unknown'"),
    ],
)
def test_a_wrong_vocabulary_of_assays_is_named(folder: Path, assays: dict[str, Any], words: str) -> None:
    (folder / ASSAY_VOCAB).write_text(json.dumps(assays))
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)


def test_a_file_without_names_of_genes_is_named(folder: Path) -> None:
    for content, held in ((None, "nothing"), (np.arange(4), "keys")):
        with h5py.File(folder / HUMAN, "w") as file:
            if content is not None:
                file.create_dataset("keys", data=content)
        with pytest.raises(CheckpointError, match=rf"{HUMAN} has {held}; allowed: a dataset `keys`"):
            load_model(folder)


def test_wrong_vectors_of_another_species_are_named(folder: Path, tmp_path: Path) -> None:
    genes = ["ENSMUSG00000000001", "ENSMUSG00000000003"]
    path = write_h5(tmp_path / "mouse.h5", genes, d_protein=D_PROTEIN + 1)
    with pytest.raises(
        CheckpointError, match=r"mouse\.h5 has the shape \(11,\) at arrays/ENSMUSG00000000001.*10 numbers"
    ):
        load_model(folder, options={"embeddings": path})
    with h5py.File(path, "a") as file:
        del file["arrays"]
    with pytest.raises(CheckpointError, match=r"mouse\.h5 has no dataset at arrays/ENSMUSG00000000001"):
        load_model(folder, options={"embeddings": path})
    with pytest.raises(CheckpointError, match=r"cannot read .*nothing\.h5: No such file"):
        load_model(folder, options={"embeddings": tmp_path / "nothing.h5"})


def test_the_digest_changes_with_settings_weights_and_assays(folder: Path, tmp_path: Path) -> None:
    digests = {load_model(folder).digest}
    for name in ("config.json", ASSAY_VOCAB):
        own = shutil.copytree(folder, tmp_path / name.replace("/", "-"))
        (own / name).write_text((own / name).read_text() + "\n")
        digests.add(load_model(own).digest)
    weights = torch.load(folder / "model_weights.pt", weights_only=True)
    torch.save(weights | {"mu.mlp.layers.4.bias": torch.ones(1)}, folder / "model_weights.pt")
    digests.add(load_model(folder).digest)
    assert len(digests) == 4


def test_random_weights_keep_the_vectors_of_proteins(folder: Path) -> None:
    plain, random = load_model(folder), load_model(folder, random_init=True, seed=1)
    same = {key for key, value in plain.state_dict().items() if torch.equal(value, random.state_dict()[key])}
    assert same == {"gene_embeddings.embedding.weight"}
