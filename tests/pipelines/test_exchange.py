"""SAEs of other libraries become runs like trained ones, and ours are written for them; others are one clear error."""

import json
import pickle
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from printed_commands import refusal

import scsae
from feature_store import FeatureStore
from feature_store.activations import ActivationReader
from feature_store.cells import SELECT, TRAIN, read_split_numbers
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SAEPlan
from pipelines.associate import associate
from pipelines.baseline import baseline
from pipelines.cli import main
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    ExportSAEOptions,
    ImportSAEOptions,
    MatchOptions,
    SteerOptions,
)
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.exchange import export_sae, import_sae
from pipelines.extract import extract
from pipelines.match import match
from pipelines.site_names import site_named
from pipelines.steering.run import steer
from pipelines.tracking import Tracking
from pipelines.tracking.provenance import origin_of
from pipelines.train import train
from pipelines.training_loop import fit, held_out
from pipelines.verify import verify_run
from sae_core.errors import CheckpointError
from sae_core.sae import SAEConfig, SparseAutoencoder, evaluate, load_sae, read_foreign, write_sparsify

# the tests of each stage have actors
pytestmark = pytest.mark.usefixtures("module_without_actors")

DOCS = Path(__file__).parents[2] / "docs"
D, F = 16, 24
FIGURES = ("select_fvu", "select_l0", "select_dead_fraction", "test_fvu", "theta", "select_recovery")


@dataclass(frozen=True, kw_only=True)
class Both:
    """A store with activations of two layers, an SAE that was trained on layer 1, and files made of it."""

    store: Path
    layer_1: str
    layer_2: str
    trained: str
    exported: Path
    """The trained SAE as `export-sae` writes it for SAELens."""
    theirs: Path
    """The same as SAELens itself writes it: nothing in it is ours."""
    imported: str


@pytest.fixture(scope="module")
def both(tmp_path_factory, module_without_actors, extract_options, train_options) -> Both:
    """Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("exchange")
    store = folder / "store"
    first, second = extract(extract_options.model_copy(update={"layer": ("1", "2")}), store)
    with pytest.MonkeyPatch.context() as patch:
        # Ray Train gives the bytes of the plain loop, and takes seconds to start
        patch.setattr("pipelines.train._run_job", lambda job, *_, **__: fit(job))
        trained = train(train_options.model_copy(update={"activations": first.run}), store)
    exported = export_sae(ExportSAEOptions(folder=folder / "exported", sae=trained.run), store).path
    theirs = folder / "theirs"
    shutil.copytree(exported, theirs)
    metadata = {"model_name": "tiny", "hook_name": "encoder.layers.1", "sae_lens_version": "6.0.0"}
    cfg = json.loads((theirs / "cfg.json").read_text())
    (theirs / "cfg.json").write_text(json.dumps(cfg | {"metadata": metadata}))
    imported = import_sae(ImportSAEOptions(folder=theirs, activations=first.run), store)
    return Both(
        store=store,
        layer_1=first.run,
        layer_2=second.run,
        trained=trained.run,
        exported=exported,
        theirs=theirs,
        imported=imported.run,
    )


@pytest.fixture
def own(both, tmp_path) -> Path:
    """A copy of that store, to write to."""
    return Path(shutil.copytree(both.store, tmp_path / "own"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `scsae` in an empty folder and in this process; its exit code, stdout and stderr."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("SCSAE_STORE", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scsae", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    run.here = here
    return run


def folder_of(store, sae):
    return Layout(store).saes_dir(sae)


def summary_of(store, sae):
    return json.loads((folder_of(store, sae) / "summary.json").read_text())


def content(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def select_tokens(store, activations):
    run = commit.Run.open(Layout(store).activations_dir(activations))
    split = read_split_numbers(Layout(store).cells_dir(run.plan["dataset"]))
    return held_out(ActivationReader(run), split == SELECT, seed=0)


def random_sae(arch="topk", *, d_model=D, n_features=F, k=3):
    generator = torch.Generator().manual_seed(1)
    sae = SparseAutoencoder(SAEConfig(d_model=d_model, n_features=n_features, k=k, arch=arch), generator=generator)
    return sae.requires_grad_(False)


def saelens_folder(folder, *, arch="jumprelu", weights=None, drop=(), **cfg):
    """A folder as SAELens writes it, with random weights of width D."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "W_enc": torch.randn(D, F, generator=generator),
        "W_dec": torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1),
        "b_enc": torch.zeros(F),
        "b_dec": torch.zeros(D),
        "threshold": torch.full((F,), 0.5),
    }
    tensors = {name: value for name, value in {**tensors, **(weights or {})}.items() if name not in drop}
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    header = {"architecture": arch, "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(header | {"normalize_activations": "none"} | cfg))
    return folder


def test_an_imported_sae_gives_the_codes_and_the_figures_of_the_trained_one_that_it_was(both):
    ours, theirs = (load_sae(folder_of(both.store, run)) for run in (both.trained, both.imported))
    x = select_tokens(both.store, both.layer_1)
    one, two = ours.encode(x), theirs.encode(x)
    assert torch.equal(one.crow, two.crow)
    assert torch.equal(one.col, two.col)
    torch.testing.assert_close(one.value, two.value)
    trained, imported = (summary_of(both.store, run) for run in (both.trained, both.imported))
    for name in FIGURES:
        assert imported[name] == pytest.approx(trained[name], rel=1e-4), name
    assert imported["findings"] == []


def test_k_is_measured_where_the_files_do_not_state_it_and_the_thresholds_are_kept(both):
    plan = SAEPlan.of(commit.Run.open(folder_of(both.store, both.imported)))
    measured = evaluate(load_sae(folder_of(both.store, both.imported)), [select_tokens(both.store, both.layer_1)]).l0
    assert (plan.arch, plan.k) == ("jumprelu", round(measured))
    assert not summary_of(both.store, both.imported)["imported"]["k_is_stated"]
    theta = safetensors.torch.load_file(both.theirs / "sae_weights.safetensors")["threshold"]
    torch.testing.assert_close(load_sae(folder_of(both.store, both.imported)).theta, theta)


def test_the_run_keeps_what_it_was_imported_from_and_what_was_assumed(both):
    plan = SAEPlan.of(commit.Run.open(folder_of(both.store, both.imported)))
    assert plan.imported is not None
    assert (plan.imported.format, plan.imported.site, plan.imported.model) == ("saelens", "encoder.layers.1", "tiny")
    assert (plan.activations, plan.site, plan.control_of, dict(plan.train)) == (both.layer_1, "layer.1", None, {})
    assert "normalize_activations is 'none'" in summary_of(both.store, both.imported)["imported"]["input"]
    assert Layout(both.store).latest("saes").run == both.imported


def test_it_is_registered_like_a_trained_one_with_its_origin(both):
    tracking = Tracking(Layout(both.store))
    trained, imported = (tracking.of_run(run) for run in (both.trained, both.imported))
    assert (trained.name, imported.name) == ("sae-tiny-layer.1",) * 2
    assert (trained.version, imported.version) == (1, 2)
    assert imported.metrics["select_fvu"] == pytest.approx(trained.metrics["select_fvu"], rel=1e-4)
    assert set(imported.metrics) == set(trained.metrics) - {"gamma"}
    facts = origin_of(Layout(both.store), imported)
    assert json.loads(facts["sae"]["imported"])["format"] == "saelens"
    assert facts["sae"]["state"] == "in this store, unchanged"
    params = tracking.client.get_run(imported.mlflow_run).data.params
    assert (params["imported.format"], params["arch"]) == ("saelens", "jumprelu")


def test_importing_again_does_nothing_and_another_place_of_the_files_is_the_same_run(own, both, tmp_path):
    moved = shutil.copytree(both.theirs, tmp_path / "elsewhere")
    before = content(own / "saes")
    again = import_sae(ImportSAEOptions(folder=moved, activations=both.layer_1), own)
    assert (again.run, again.done, again.reused) == (both.imported, 0, 1)
    assert content(own / "saes") == before
    assert len(Tracking(Layout(own)).versions()) == 2


def test_an_import_that_was_interrupted_ends_in_the_same_bytes(own, both, monkeypatch):
    import pipelines.exchange as stage

    original = commit.Run.open(folder_of(own, both.imported)).manifest().shards
    shutil.rmtree(folder_of(own, both.imported))
    whole, parts = commit.Run.commit_shard, []

    def commit_two(self, *arguments, **options):
        parts.append(self)
        if len(parts) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    options = ImportSAEOptions(folder=both.theirs, activations=both.layer_1)
    with monkeypatch.context() as patch:
        patch.setattr(commit.Run, "commit_shard", commit_two)
        with pytest.raises(KeyboardInterrupt):
            stage.import_sae(options, own)
    assert stage.import_sae(options, own).done == 1
    again = commit.Run.open(folder_of(own, both.imported)).manifest().shards
    assert [marker.sha256 for marker in again] == [marker.sha256 for marker in original]


def test_a_damaged_import_is_mended_by_the_command_that_verify_names(own, both, capsys):
    file = folder_of(own, both.imported) / "sae.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert verify_run(both.imported, own) == 1
    named = re.search(r"`(scsae import-sae FOLDER .*?)`", capsys.readouterr().err)[1]
    assert refusal(named) is None
    import_sae(ImportSAEOptions(folder=both.theirs, activations=shlex.split(named)[4]), own)
    assert file.read_bytes() == content


def test_an_imported_sae_is_encoded_associated_matched_and_steered(own, both, monkeypatch):
    monkeypatch.setattr("pipelines.steering.run.drawings_of", lambda *_: {})
    monkeypatch.setattr("pipelines.steering.evaluators.MIN_CELLS", 2)
    codes = encode(EncodeOptions(sae=both.imported), own)
    associations = associate(AssociateOptions(codes=codes.run), own)
    store = FeatureStore.open(own)
    assert store.lineage.sae == both.imported
    assert store.sae_facts()["imported"]["format"] == "saelens"
    assert store.features_for(label="A").height == 48
    (matched,) = match(MatchOptions(sae=both.imported, other=(both.trained,)), own)
    pairs = commit.read_table(matched.path / "feature_match").filter(sae=both.imported, dead=False)
    assert pairs.height > 40
    assert pairs["similarity"].to_numpy() == pytest.approx(np.ones(pairs.height), abs=1e-5)
    assert pairs["feature_id"].to_list() == pairs["other_feature_id"].to_list()
    assert "start" not in matched.facts
    found = steer(SteerOptions(associations=associations.run, n_features=(2,), n_nulls=2, target="A"), own)
    assert commit.read_table(found.path / "results").height > 0
    with pytest.raises(UsageError, match=r"random-model.*imported from saelens.*--kind pca"):
        baseline(BaselineOptions(associations=associations.run, kind=("pca", "random-model")), own)
    fitted = baseline(BaselineOptions(associations=associations.run, kind=("pca",), fit_tokens=500), own)[0]
    assert fitted.facts["select_l0"] == pytest.approx(
        SAEPlan.of(commit.Run.open(folder_of(own, both.imported))).k, rel=0.1
    )


def test_a_scale_is_folded_in_and_recorded_and_an_sae_that_does_not_fit_is_a_warning(own, both, capsys):
    (kept,) = [both.exported]
    options = {"activations": both.layer_1, "recovery_cells": 0}
    scaled = import_sae(ImportSAEOptions(folder=kept, input_scale=2.0, **options), own)
    assert "--input-scale" in summary_of(own, scaled.run)["imported"]["input"]
    assert SAEPlan.of(commit.Run.open(scaled.path)).imported.input_scale == 2.0
    x = select_tokens(own, both.layer_1)
    torch.testing.assert_close(
        load_sae(scaled.path)(x), load_sae(folder_of(own, both.trained))(2 * x) / 2, atol=1e-5, rtol=1e-4
    )
    capsys.readouterr()
    wrong = import_sae(ImportSAEOptions(folder=kept, input_scale=1e-3, **options), own)
    assert wrong.facts["select_fvu"] > 1
    assert "--input-scale" in wrong.facts["poor_reconstruction"]
    assert f"warning: saes/{wrong.run}" in capsys.readouterr().err
    tags = Tracking(Layout(own)).of_run(wrong.run).tags
    assert "poor_reconstruction" in tags["scsae.findings"]


def test_an_exported_sae_comes_back_as_it_was_in_every_format_that_can_hold_it(both, tmp_path):
    ours = load_sae(folder_of(both.store, both.trained))
    x = select_tokens(both.store, both.layer_1)
    for to in ("saelens", "dictionary_learning"):
        done = export_sae(ExportSAEOptions(folder=tmp_path / to, sae=both.trained, to=to), both.store)
        assert str(tmp_path / to) in done.facts["load it with"]
        back = read_foreign(done.path)
        assert back.sae.config == ours.config
        torch.testing.assert_close(back.sae(x), ours(x))
        plan = SAEPlan.of(commit.Run.open(folder_of(both.store, both.trained)))
        assert (back.origin.site, back.origin.model_digest) == ("layer.1", plan.model_digest)
    before = content(tmp_path)
    for folder, to, error, words in (
        (tmp_path / "saelens", "saelens", UsageError, "no empty folder"),
        (tmp_path / "new" / "one", "sparsify", CheckpointError, "arch is 'batchtopk'.*topk"),
    ):
        with pytest.raises(error, match=words):
            export_sae(ExportSAEOptions(folder=folder, sae=both.trained, to=to), both.store)
    assert content(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_both_are_functions_of_the_door(own, both, tmp_path):
    written = scsae.export_sae(tmp_path / "out", sae=both.trained, store=own)
    again = scsae.import_sae(written.path, activations=both.layer_1, recovery_cells=0, name="mine", store=own)
    assert SAEPlan.of(commit.Run.open(again.path)).sae == SAEPlan.of(commit.Run.open(folder_of(own, both.trained))).sae
    assert again.facts["registered"] == "mine 1 (champion)"
    with pytest.raises(UsageError, match="to was 'onnx'"):
        scsae.export_sae(tmp_path / "other", to="onnx", store=own)


class Payload:
    """What runs where a pickle is loaded as Python does."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return (Path.touch, (self.ran,))


def wide(folder):
    write_sparsify(random_sae(d_model=D + 1), folder)


def unknown(folder):
    folder.mkdir()
    (folder / "params.npz").write_bytes(b"x")
    (folder / "readme.md").write_text("x")


def no_folder(folder):
    pass


def no_threshold(folder):
    saelens_folder(folder, drop=("threshold",))


def not_finite(folder):
    saelens_folder(folder, weights={"b_enc": torch.full((F,), torch.nan)})


def pickled(folder):
    folder.mkdir()
    trainer = {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": F}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    (folder / "ae.pt").write_bytes(pickle.dumps({"bias": Payload(folder / "ran")}))


def several(folder):
    for name in ("layers.1", "layers.2"):
        write_sparsify(random_sae(), folder / name)


def other_site(folder):
    saelens_folder(folder, metadata={"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post"})


def other_model(folder):
    saelens_folder(folder, metadata={"scsae_origin": {"model": "large", "site": "layer.1", "model_digest": "ab" * 32}})


def scaled(folder):
    saelens_folder(folder, normalize_activations="expected_average_only_in")


def a_norm_per_token(folder):
    saelens_folder(folder, normalize_activations="layer_norm")


def a_transcoder(folder):
    saelens_folder(folder, arch="transcoder")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (wide, ["width 17", "width 16", "--activations"]),
        (unknown, ["params.npz, readme.md", "saelens: cfg.json", "dictionary_learning: config.json"]),
        (no_folder, ["is not a folder"]),
        (no_threshold, ["threshold is missing"]),
        (not_finite, ["b_enc holds values that are not finite"]),
        (pickled, ["ae.pt", "pickled code is never run"]),
        (several, ["2 autoencoders: layers.1, layers.2", "--pick layers.1"]),
        (other_site, ["'blocks.2.hook_resid_post', not layer.1", "--other-site"]),
        (other_model, ["'large'", "not 'tiny'", "--other-site"]),
        (scaled, ["expected_average_only_in", "sqrt(d_in)", "is about --input-scale "]),
        (a_norm_per_token, ["normalize_activations is 'layer_norm'"]),
        (a_transcoder, ["'transcoder'"]),
    ],
)
def test_what_is_no_sae_of_these_activations_is_one_clear_error_and_nothing_is_written(command, both, make, words):
    folder = command.here.parent / "sae"
    make(folder)
    before = content(both.store, command.here.parent)
    code, out, said = command("import-sae", folder, "--activations", both.layer_1, "--store", both.store)
    assert (code, out) == (2, ""), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert [word for word in words if word not in said] == [], said
    assert content(both.store, command.here.parent) == before


def test_the_scale_in_the_error_is_the_one_that_gives_activations_of_mean_length_sqrt_d(command, both):
    scaled(command.here / "sae")
    _, _, said = command("import-sae", "sae", "--activations", both.layer_1, "--store", both.store)
    scale = float(re.search(r"--input-scale ([\d.]+) \(", said)[1])
    run = commit.Run.open(Layout(both.store).activations_dir(both.layer_1))
    split = read_split_numbers(Layout(both.store).cells_dir(run.plan["dataset"]))
    reader = ActivationReader(run)
    lengths = [
        np.linalg.norm(block.act_f32()[split[block.cell_idx] == TRAIN], axis=1)
        for block in (reader.read(group.shard, group.group) for group in reader.row_groups)
    ]
    assert scale * np.concatenate(lengths).mean() == pytest.approx(np.sqrt(D), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import-sae"], ["Missing argument"]),
        (["import-sae", "s3://bucket/sae"], ["folder was", "this machine"]),
        (["import-sae", "sae", "--format", "npz"], ["format was 'npz'", "saelens"]),
        (["import-sae", "sae", "--input-scale", "0"], ["input_scale was 0", "give more than 0"]),
        (["import-sae", "sae", "--activations", "zzz"], ["--activations was 'zzz'"]),
        (["export-sae", "out", "--to", "onnx"], ["to was 'onnx'", "saelens"]),
        (["export-sae", "out", "--sae", "zzz"], ["--sae was 'zzz'"]),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(command, both, arguments, words):
    code, _, said = command(*arguments, "--store", both.store)
    assert code == 2
    assert [word for word in words if word not in said] == [], said
    assert list(command.here.iterdir()) == []


def test_without_activations_the_command_that_makes_them_is_named(command):
    code, _, said = command("import-sae", "sae", "--store", "new")
    assert code == 2
    assert "scsae extract DATA --store new" in said
    assert list(command.here.iterdir()) == []


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_their_order(own, both, command):
    """`path/to/sae` is one of SAELens, `path/to/run` a training of sparsify, RUN the activations of layer 1."""
    shutil.copytree(own, command.here / "scsae-store")
    shutil.copytree(both.theirs, command.here / "path" / "to" / "sae")
    several(command.here / "path" / "to" / "run")
    page = (DOCS / "exchange-saes.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    assert len(lines) >= 8
    words = {"RUN": both.layer_1, "RUN_OF_SAE": both.trained}
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        code, _, said = command(*(words.get(word, word) for word in arguments))
        assert (program, code) == ("scsae", 0), f"{line}: {said}"
    for name, file in (("for-saelens", "sae_weights.safetensors"), ("for-dictionary-learning", "ae.pt")):
        assert (command.here / name / file).is_file()


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layer.2", "layer.2"),
        ("embedding", "embedding"),
        ("attention.0", "attention.0"),
        ("blocks.2.hook_resid_post", "layer.2"),
        ("blocks.2.hook_resid_pre", "layer.1"),
        ("blocks.0.hook_resid_pre", "embedding"),
        ("hook_embed", "embedding"),
        ("blocks.11.hook_mlp_out", "mlp.11"),
        ("blocks.3.hook_attn_out", "attention.3"),
        ("resid_post_layer_8", "layer.8"),
        ("mlp_out_layer_0", "mlp.0"),
        ("bert.encoder.layer.5", "layer.5"),
        ("transformer_encoder.layers.3", "layer.3"),
        ("layers.5.mlp", "mlp.5"),
        ("gpt_neox.layers.5.attention", "attention.5"),
        ("transformer_encoder.layers.3.norm2", None),
        ("blocks.2.hook_z", None),
        ("layer", None),
        ("my site", None),
    ],
)
def test_a_name_of_another_library_means_a_site_only_where_that_is_certain(name, site):
    found = site_named(name)
    assert (None if found is None else str(found)) == site
