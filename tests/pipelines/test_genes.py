"""The genes that go into the model: chosen by variance or by a list, kept by every later stage, refused in one line."""

import json
import shutil

import numpy as np
import pytest
from loess_oracle import direct, give_scanpy_direct_loess, seurat_v3

from feature_store.activations import ActivationReader
from feature_store.cells import read_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.errors import IntegrityError, NotFoundError
from feature_store.query.runs import RunChain
from feature_store.storage import commit
from feature_store.storage.layout import CODES_TABLES, Layout
from feature_store.storage.plans import RANDOM_MODEL, ActivationsPlan
from pipelines import genes as stage
from pipelines.associate import associate, associate_all
from pipelines.baseline import _random_model
from pipelines.config import AssociateOptions, BaselineOptions, DataOptions, EncodeOptions, ExtractOptions, check
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.genes import recorded_genes
from pipelines.inputs import load_recorded_model, load_stored_sae
from pipelines.inspection import inspect_data
from pipelines.loss_recovered import RecoveryProbe, probe
from pipelines.steering.context import SteeringContext, SteeringPaths
from pipelines.train import train
from sae_core.scfm import load_model

pytestmark = pytest.mark.usefixtures("module_without_actors")

LISTED = [f"GENE{i}" for i in (3, 4, 5, 11, 12, 25)]


def tokens_of(run):
    """Cells, genes and activations of a run, in its order."""
    reader = ActivationReader(commit.Run.open(run))
    blocks = [reader.read(group.shard, group.group) for group in reader.row_groups]
    keys = [np.concatenate([getattr(block, name) for block in blocks]) for name in ("cell_idx", "gene_id")]
    return *keys, np.concatenate([block.act_f32() for block in blocks])


def part_hashes(folder):
    """Sha256 of every part of a codes run, by table."""
    return {table: [m.sha256 for m in commit.Run.open(folder / table).manifest().shards] for table in CODES_TABLES}


def chosen_names(run):
    return set(commit.read_table(run / "chosen_genes")["symbol"])


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    file = tmp_path_factory.mktemp("lists") / "genes.txt"
    file.write_text("# markers\n" + "\n".join(LISTED) + "\n\n")
    return file


@pytest.fixture(scope="module")
def made(extract_options, train_options, listed, tmp_path_factory, module_without_actors):
    """A store with every stage on the genes of a list."""
    store = tmp_path_factory.mktemp("chosen") / "store"
    extract(extract_options.model_copy(update={"genes": str(listed)}), store)
    train(train_options, store)
    encode(EncodeOptions(), store)
    associate(AssociateOptions(), store)
    return store


@pytest.fixture
def own(made, tmp_path):
    return shutil.copytree(made, tmp_path / "own")


def test_the_tokens_are_those_of_the_chosen_genes_as_the_model_takes_these_alone(made, tiny_cells, extract_options):
    layout = Layout(made)
    run = layout.latest("activations").path
    cell, gene, act = tokens_of(run)
    model, x = load_model(extract_options.model), tiny_cells[:, LISTED].X.tocsr()
    tokens = model.tokenize(x.indptr, x.indices, x.data, model.match_genes(LISTED), seed=0)
    wanted = ~tokens.is_special
    np.testing.assert_array_equal(cell, tokens.cell_of_token()[wanted])
    np.testing.assert_array_equal(gene, tokens.gene_id[wanted])
    np.testing.assert_allclose(act, model.activations(tokens, ["layer.1"]).popitem()[1].numpy()[wanted], atol=1e-5)
    assert chosen_names(run) == set(LISTED)
    table = commit.read_table(run / "genes")
    assert set(table.drop_nulls("gene_id")["symbol"]) == set(LISTED)


def test_the_plan_holds_the_choice_and_not_the_place_or_form_of_the_list(made, extract_options, tiny_cells, tmp_path):
    plan = ActivationsPlan.of(commit.Run.open(Layout(made).latest("activations").path))
    assert (plan.genes.choice, plan.genes.n_genes) == ("list", len(LISTED))
    (tmp_path / "same.txt").write_text("\r\n".join([*LISTED[::-1], LISTED[0], "  "]))
    (tmp_path / "other.txt").write_text("\n".join(LISTED[1:]))
    runs = {}
    for name in (None, "same.txt", "other.txt"):
        genes = name and str(tmp_path / name)
        runs[name] = extract(extract_options.model_copy(update={"genes": genes}), tmp_path / "store")[0].run
    assert runs["same.txt"] == plan.id
    assert len(set(runs.values())) == 3


def test_fused_codes_are_byte_for_byte_those_of_the_stored_tokens(own):
    stored = encode(EncodeOptions(), own)
    fused = encode(EncodeOptions(fused=True, shard_cells=16), own)
    assert fused.run != stored.run
    assert part_hashes(fused.path) == part_hashes(stored.path)
    assert fused.facts["genes chosen"].startswith("6 of the 6 (list)")


def other_data(tiny_cells, path, names):
    """The tiny cells with some genes alone, in another order, under Ensembl ids; of another depth."""
    other = tiny_cells[:, names].copy()
    other.obs_names = [f"new{i}" for i in range(other.n_obs)]
    other.write_h5ad(path)
    return path


def test_other_data_are_encoded_with_the_same_genes(own, tiny_cells, tmp_path, extract_options):
    names = ["GENE29", "GENE12", "GENE3", "GENE20", "GENE4", "GENE7"]
    path = other_data(tiny_cells, tmp_path / "other.h5ad", names)
    encoded, _ = associate_all(AssociateOptions(data=path, cell_type="type", min_matched_share=0), own)
    assert encoded.facts["genes chosen"].startswith("3 of the 6 (list)")
    found = load_cell_codes(CodesRun.open(encoded.path), np.arange(72)).toarray()
    kept = ["GENE3", "GENE4", "GENE12"]
    model, x = load_model(extract_options.model), tiny_cells[:, kept].X.tocsr()
    tokens = model.tokenize(x.indptr, x.indices, x.data, model.match_genes(kept), seed=0)
    sae = load_stored_sae(Layout(own).latest("saes").path)
    dense = sae.encode(model.activations(tokens, ["layer.1"]).popitem()[1]).to_dense().numpy()
    wanted = np.zeros_like(found)
    np.maximum.at(wanted, tokens.cell_of_token()[~tokens.is_special], dense[~tokens.is_special])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    n_runs = len(Layout(own).runs("cells"))
    without = other_data(tiny_cells, tmp_path / "without.h5ad", ["GENE20", "GENE21", "GENE22"])
    with pytest.raises(UsageError, match=r"without\.h5ad has none of the 6 genes that were chosen \(such as GENE3"):
        encode(EncodeOptions(data=without), own)
    assert len(Layout(own).runs("cells")) == n_runs


def test_steering_and_the_recovery_run_the_model_on_the_chosen_genes(made):
    layout = Layout(made)
    run = commit.Run.open(layout.latest("activations").path)
    dataset = run.plan["dataset"]
    chosen = set(recorded_genes(run).tokens)
    paths = SteeringPaths(
        activations=str(run.path),
        sae=str(layout.latest("saes").path),
        store=str(made),
        dataset=dataset,
        site="layer.1",
        seed=0,
        device="cpu",
        stage="steer",
        vectors=None,
    )
    measured = probe(run, str(made), np.arange(20), device="cpu")
    assert isinstance(measured, RecoveryProbe)
    for tokens in (measured.tokens, *(block.tokens for block in SteeringContext(paths).blocks(np.arange(20)))):
        assert set(tokens.gene_id[~tokens.is_special].tolist()) <= chosen


def test_the_random_model_has_the_same_genes_without_their_file(own, extract_options):
    layout = Layout(own)
    before, chain = layout.latest("activations"), RunChain.of(layout, layout.latest("associations").run)
    run = next(_random_model(RANDOM_MODEL, BaselineOptions(), own, chain, None)).path
    plan = ActivationsPlan.of(commit.Run.open(run))
    assert plan.control_of == RANDOM_MODEL
    assert plan.genes == ActivationsPlan.of(commit.Run.open(before.path)).genes
    assert chosen_names(run) == set(LISTED)
    assert load_recorded_model(commit.Run.open(run)).digest != load_model(extract_options.model).digest


def test_a_table_of_chosen_genes_that_is_gone_or_another_is_refused(own, extract_options):
    run = commit.Run.open(Layout(own).latest("activations").path)
    table = commit.read_table(run.path / "chosen_genes")
    plan = commit.Run.open(run.path / "chosen_genes").plan
    shutil.rmtree(run.path / "chosen_genes")
    with pytest.raises((IntegrityError, NotFoundError), match="chosen_genes"):
        encode(EncodeOptions(fused=True), own)
    commit.write_table(run.path / "chosen_genes", table.head(3), plan)
    with pytest.raises(IntegrityError, match=r"chosen_genes.*scsae extract"):
        recorded_genes(run)


def test_names_are_symbols_or_ensembl_ids_and_what_is_not_found_is_told(tmp_path, tiny_cells):
    cells = tiny_cells[:, :4].copy()
    cells.var_names = ["CD79A", "MS4A1", "NKG7", "LYZ"]
    cells.var["gene_ids"] = ["ENSG00000105369.1", "ENSG00000156738", "ENSG00000105374", "ENSG00000090382"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "genes.txt").write_text("MS4A1\nENSG00000105369\nENSG00000090382.7\nCD3D\nMS4A11\nMS4A1\n")
    options = ExtractOptions(
        data=tmp_path / "cells.h5ad", layer=("1",), genes=str(tmp_path / "genes.txt"), shard_cells=72
    )
    (result,) = extract(options, tmp_path / "store")
    assert chosen_names(result.path) == {"MS4A1", "CD79A", "LYZ"}
    said = result.facts["genes chosen"]
    assert said.startswith("3 of the 5 names")
    assert "not in the data: 1 (CD3D)" in said
    assert "known to neither: 1 (MS4A11)" in said


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("GENE3\nGENE44\ngene5\nGENE_7", UsageError, r"genes\.txt names 4 genes, of which 1 .*'GENE44' \(did you mean"),
        ("TP53\nMYC", UsageError, "names 2 genes, of which 0"),
        ("# nothing\n\n", UsageError, r"genes\.txt names no gene"),
        (None, NotFoundError, r"genes\.txt does not exist"),
    ],
)
def test_a_list_of_other_names_is_refused_before_anything_is_written(tmp_path, extract_options, text, error, words):
    file, store = tmp_path / "genes.txt", tmp_path / "store"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=words):
        extract(extract_options.model_copy(update={"genes": str(file)}), store)
    assert not store.exists()


@pytest.mark.parametrize("value", ["hvg:", "hvg:0", "hvg:-3", "hvg:many", "hvg:1.5"])
def test_a_number_of_variable_genes_is_one(value):
    with pytest.raises(UsageError, match=rf"genes was '{value}'.*hvg:1200"):
        check(ExtractOptions, {"data": "x.h5ad", "genes": value}, "scsae extract")


def test_variable_genes_need_counts_and_more_genes_than_they_are(tmp_path, tiny_cells, extract_options):
    logged = tiny_cells.copy()
    logged.X = logged.X.multiply(1e4 / logged.X.sum(axis=1)).tocsr().log1p().astype(np.float32)
    logged.write_h5ad(tmp_path / "logged.h5ad")
    store = tmp_path / "store"
    options = extract_options.model_copy(update={"data": (tmp_path / "logged.h5ad",), "genes": "hvg:5"})
    with pytest.raises(UsageError, match=r"'hvg:5'.*by counts.*log-normalised.*--matrix.*--genes FILE"):
        extract(options, store)
    with pytest.raises(UsageError, match=r"'hvg:28'.*knows 28 genes.*leave --genes out"):
        extract(extract_options.model_copy(update={"genes": "hvg:28"}), store)
    assert not store.exists()


@pytest.fixture
def variable(extract_options):
    return extract_options.model_copy(update={"genes": "hvg:9"})


def test_the_variable_genes_are_those_of_the_train_cells_by_batch(variable, tmp_path, tiny_cells, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("feature_store.cells.loess.loess", direct)
        (result,) = extract(variable, tmp_path)
    layout = Layout(tmp_path)
    split = read_cells(layout.cells_dir(result.facts["dataset"]))["split"].to_numpy()
    give_scanpy_direct_loess(monkeypatch)
    known = tiny_cells[split == "train", 2:].copy()
    wanted = seurat_v3(known, 9, batch_key="batch")
    assert chosen_names(result.path) == set(known.var_names[wanted["highly_variable"]])
    table = commit.read_table(result.path / "chosen_genes")
    of = dict(zip(known.var_names, wanted["variances_norm"], strict=True))
    np.testing.assert_allclose(table["variance"], [of[name] for name in table["symbol"]], rtol=1e-5)
    assert set(np.unique(tokens_of(result.path)[1])) <= set(table["gene_id"].to_list())
    assert result.facts["genes chosen"].startswith("the 9 most variable of 28 that tiny knows, on ")
    assert "of 2 batches" in result.facts["genes chosen"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("feature_store.cells.gene_table.ONE_SHARD_CELLS", 20)
    monkeypatch.setattr("feature_store.cells.gene_table.SHARD_CELLS", 10)


def test_the_choice_is_made_once_and_another_run_finds_it(variable, tmp_path, monkeypatch):
    first = extract(variable, tmp_path)[0]
    monkeypatch.setattr(stage, "_standardised_variance", None)
    again = extract(variable, tmp_path)[0]
    assert (again.run, again.done) == (first.run, 0)
    other = extract(variable.model_copy(update={"layer": ("0",)}), tmp_path)[0]
    assert chosen_names(other.path) == chosen_names(first.path)


@pytest.mark.usefixtures("small_shards")
def test_passes_of_shards_that_are_killed_resume_to_the_same_choice(variable, tmp_path, monkeypatch, shards_here):
    class Stop(Exception):
        pass

    with monkeypatch.context() as patch:
        patch.setattr("feature_store.cells.gene_table.ONE_SHARD_CELLS", 200)
        calm = extract(variable, tmp_path / "calm")[0]
    done = []

    class Counted(stage.PassReader):
        def shard(self, number):
            if len(done) == 11:
                raise Stop
            done.append(number)
            return super().shard(number)

    store = tmp_path / "killed"
    monkeypatch.setattr(stage, "PassReader", Counted)
    with pytest.raises(Stop):
        extract(variable, store)
    assert done == [*range(8), 0, 1, 2]
    assert {folder.name for folder in (store / "matrices").glob("*/*")} >= {"counts", "clipped"}
    asked = []

    def do_shards(worker, work, shards, *args, **options):
        asked.append(list(shards))
        return shards_here(worker, work, shards, *args, **options)

    monkeypatch.setattr(stage, "PassReader", Counted.__base__)
    monkeypatch.setattr(stage, "do_shards", do_shards)
    resumed = extract(variable, store)[0]
    assert asked == [[], [3, 4, 5, 6, 7]]
    assert list((store / "matrices").glob("*")) == []
    plans = [ActivationsPlan.of(commit.Run.open(result.path)) for result in (calm, resumed)]
    assert plans[0].genes == plans[1].genes
    tables = [commit.read_table(result.path / "chosen_genes") for result in (calm, resumed)]
    assert tables[0].drop("variance").equals(tables[1].drop("variance"))
    np.testing.assert_allclose(tables[0]["variance"], tables[1]["variance"], rtol=1e-12)


@pytest.mark.usefixtures("small_shards")
def test_passes_by_actors_read_a_matrix_that_was_turned(variable, tmp_path, tiny_cells, monkeypatch):
    # one that was not can be read for its first cells alone, which the command looks at
    for name in ("feature_store.cells.column_matrices.FIRST_CELLS", "pipelines.inputs.PROBE_CELLS"):
        monkeypatch.setattr(name, 16)
    calm = extract(variable, tmp_path / "calm")[0]
    by_gene = tiny_cells.copy()
    by_gene.X = by_gene.X.tocsc()
    by_gene.write_h5ad(tmp_path / "by_gene.h5ad")
    turned = extract(variable.model_copy(update={"data": (tmp_path / "by_gene.h5ad",)}), tmp_path / "turned")[0]
    assert chosen_names(turned.path) == chosen_names(calm.path)


def test_inspect_and_extract_tell_what_long_cells_lose_and_name_the_option(
    tiny_model, tiny_data, tmp_path, extract_options, tiny_cells
):
    folder = shutil.copytree(tiny_model, tmp_path / "short")
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"max_seq_len": 13}))
    said = inspect_data(DataOptions(data=tiny_data, model=str(folder)))["LONGER THAN THE INPUT"]
    n_genes = np.asarray((tiny_cells.X[:, 2:] > 0).sum(axis=1)).ravel()
    assert said.startswith(f"{(n_genes > 12).mean():.0%} of the first 72 cells")
    assert f"{np.median(n_genes):,.0f} genes" in said
    assert "12 fit" in said
    assert "a random sample" in said
    assert "--genes hvg:12" in said
    assert "LONGER THAN THE INPUT" not in inspect_data(DataOptions(data=tiny_data, model=str(tiny_model)))
    options = extract_options.model_copy(update={"model": str(folder)})
    assert extract(options, tmp_path / "store")[0].facts["LONGER THAN THE INPUT"] == said
    chosen = extract(options.model_copy(update={"genes": "hvg:12"}), tmp_path / "store")[0]
    assert "LONGER THAN THE INPUT" not in chosen.facts
    assert np.bincount(tokens_of(chosen.path)[0]).max() <= 12
