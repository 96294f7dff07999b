"""Association: what the stage feeds its statistics, what comes back, and what it refuses."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp
from sealed_files import rewrite_sealed
from sklearn.metrics import roc_auc_score
from stored_bytes import contents_of

from feature_store import FeatureStore
from feature_store.cells import expression_matrix, open_source, read_cells, save_source_location, write_cells
from feature_store.codes import CodesRun, load_token_counts, load_top_tokens
from feature_store.errors import InputError, NotFoundError
from feature_store.storage import commit
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout
from feature_store.storage.schemas import SPLITS
from pipelines.associate import associate, associate_all, cell_inputs, label_kinds
from pipelines.config import AssociateOptions, Recipe, check
from pipelines.errors import UsageError
from pipelines.verify import verify_run

N_UNITS = 1 + len(ASSOCIATION_TABLES)
"""One range of features, and the tables."""


def written(store):
    """Every file of the store with its time."""
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def table(chain, name):
    return commit.read_table(Layout(chain.store).latest("associations").path / name)


@pytest.fixture(scope="module")
def stored(chain):
    """Cell codes as a dense matrix, read by Polars, and the cell table."""
    layout = Layout(chain.store)
    folder = layout.latest("codes").path / "by_cell"
    cells = read_cells(layout.cells_dir(CodesRun.open(folder.parent).plan.dataset))
    codes = np.zeros((cells.height, 48))
    for part in sorted(folder.glob("part-*.parquet")):
        cell, feature, value = pl.read_parquet(part).select("cell_idx", "feature_id", "value").to_numpy().T
        codes[cell.astype(int), feature.astype(int)] = value
    return codes, cells


def source_of(tmp_path, matrix):
    obs = pd.DataFrame(index=[f"c{i}" for i in range(matrix.shape[0])])
    var = pd.DataFrame(index=[f"G{i}" for i in range(matrix.shape[1])])
    anndata.AnnData(X=sp.csr_matrix(matrix.astype(np.float32)), obs=obs, var=var).write_h5ad(tmp_path / "x.h5ad")
    return open_source(tmp_path / "x.h5ad")


def test_expression_of_counts_is_log1p_of_counts_per_ten_thousand(tmp_path):
    counts = np.array([[1, 3, 0], [0, 0, 0], [2, 2, 4]])
    expected = np.log1p([[2500, 7500, 0], [0, 0, 0], [2500, 2500, 5000]])
    np.testing.assert_allclose(expression_matrix(source_of(tmp_path, counts)).toarray(), expected, rtol=1e-6)


def test_log_normalised_values_are_taken_as_they_are(tmp_path):
    values = np.log1p([[2500.0, 7500, 0], [10_000, 0, 0], [2500, 2500, 5000]]).astype(np.float32)
    source = source_of(tmp_path, values)
    assert source.value_kind == "lognorm"
    np.testing.assert_array_equal(expression_matrix(source).toarray(), values)


def test_expression_does_not_depend_on_how_many_cells_are_read_at_once(chain, monkeypatch):
    source = open_source(chain.extract.data)
    whole = expression_matrix(source).toarray()
    monkeypatch.setattr("feature_store.cells.expression.BLOCK_ROWS", 7)
    np.testing.assert_array_equal(expression_matrix(source).toarray(), whole)


def cells_with(chain, layout, **columns):
    """Write the tiny cells under another name with these columns; return the data set's name."""
    source = open_source(chain.extract.data)
    write_cells(layout, source, dataset="other", **columns)
    save_source_location(layout, "other", source)
    return "other"


@pytest.mark.parametrize(
    ("columns", "kinds"),
    [
        ({"cell_type": "type", "batch": "batch"}, ["cell_type", "batch"]),
        ({"cell_type": "type"}, ["cell_type"]),
        ({"batch": "batch", "labels": ["type", "donor"]}, ["batch", "type", "obs_donor"]),
        ({"donor": "donor", "labels": ["donor", "batch"]}, ["donor", "obs_batch"]),
        ({"batch": "batch", "labels": ["batch", "type", "type"]}, ["batch", "type"]),
        ({}, []),
    ],
)
def test_labels_are_cell_type_batch_and_those_named_each_once(chain, tmp_path, columns, kinds):
    layout = Layout(tmp_path)
    dataset = cells_with(chain, layout, **columns)
    assert label_kinds(layout, dataset, read_cells(layout.cells_dir(dataset))) == kinds


@pytest.mark.parametrize(
    ("columns", "unit"),
    [
        ({"donor": "donor", "batch": "batch", "cell_type": "type"}, "donor"),
        ({"batch": "batch", "cell_type": "type"}, "batch"),
        ({"cell_type": "type"}, None),
    ],
)
def test_the_replicate_unit_is_the_donor_else_the_batch_else_none(chain, own_store, columns, unit):
    layout = Layout(own_store)
    codes = CodesRun.open(layout.latest("codes").path)
    plan = replace(codes.plan, dataset=cells_with(chain, layout, **columns))
    other = CodesRun(codes.folder, plan, codes.tables)
    units = cell_inputs(layout, other, []).units
    assert (units.kind if units else None) == unit
    if units is not None:
        values = open_source(chain.extract.data).obs()[unit].to_list()
        assert [units.names[code] for code in units.codes] == values


def test_auroc_of_every_feature_and_type_is_sklearns_on_the_stored_codes(chain, stored):
    codes, cells = stored
    rows = table(chain, "feature_label").filter(label_kind="cell_type")
    assert rows.height == 48 * 2 * 2
    for feature, label, split, auroc in rows.select("feature_id", "label", "split", "auroc").iter_rows():
        own = cells.filter(split=split)
        expected = roc_auc_score((own["cell_type"] == label).to_numpy(), codes[own["cell_idx"].to_numpy(), feature])
        assert auroc == pytest.approx(expected)


def test_batches_are_compared_within_cell_types(chain, stored):
    codes, cells = stored
    rows = table(chain, "feature_label").filter(label_kind="batch")
    assert rows["method"].str.contains("blocks=cell_type").all()
    for feature, label, split, auroc in rows.select("feature_id", "label", "split", "auroc").iter_rows():
        wins = pairs = 0
        for kind in ("A", "B"):
            own = cells.filter(split=split, cell_type=kind)
            mine = (own["batch"] == label).to_numpy()
            here, there = (codes[own["cell_idx"].to_numpy()[side], feature] for side in (mine, ~mine))
            wins += (here[:, None] > there).sum() + 0.5 * (here[:, None] == there).sum()
            pairs += len(here) * len(there)
        assert auroc == pytest.approx(wins / pairs)


def test_pearson_of_a_gene_is_that_of_cell_codes_and_log_expression(chain, stored, tiny_cells):
    codes, cells = stored
    counts = tiny_cells.X.toarray().astype(np.float64)
    expression = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    rows = table(chain, "feature_gene").sample(200, seed=0)
    for feature, gene, split, pearson in rows.select("feature_id", "gene", "split", "pearson").iter_rows():
        mask = (cells["split"] == split).to_numpy()
        x, y = codes[mask, feature], expression[mask, int(gene.removeprefix("GENE"))]
        expected = np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else 0.0
        assert (pearson or 0.0) == pytest.approx(expected, abs=1e-5)


def test_top_tokens_carry_the_symbol_of_their_gene(chain, tiny_model):
    vocabulary = json.loads((tiny_model / "vocab.json").read_text())
    tokens = load_top_tokens(CodesRun.open(Layout(chain.store).latest("codes").path), 0, 48)
    symbol = {(f, c, p): g for f, c, p, g in tokens.drop("value").iter_rows()}
    rows = table(chain, "feature_token")
    assert rows.height == tokens.height > 0
    for feature, cell, place, gene in rows.select("feature_id", "cell_idx", "token_pos", "gene").iter_rows():
        assert vocabulary[gene] == symbol[feature, cell, place]


def test_identity_precision_is_the_share_of_a_features_tokens_that_are_the_genes(chain, tiny_model):
    vocabulary = json.loads((tiny_model / "vocab.json").read_text())
    fired = load_token_counts(CodesRun.open(Layout(chain.store).latest("codes").path), 0, 48).feature_gene
    rows = table(chain, "feature_gene").drop_nulls("identity_precision")
    assert rows.height > 0
    for feature, gene, split, precision in rows.select("feature_id", "gene", "split", "identity_precision").iter_rows():
        own = fired.filter(feature_id=feature, split=SPLITS.index(split))
        of_gene = own.filter(gene_id=vocabulary.get(gene, -1))["n_tokens"].sum()
        assert precision == pytest.approx(of_gene / max(own["n_tokens"].sum(), 1))


def test_gene_sets_come_from_the_files_named(own_store, without_actors, chain, tmp_path):
    gmt = tmp_path / "programs.gmt"
    gmt.write_text("type A\tfirst ten\t" + "\t".join(f"GENE{i}" for i in range(10)) + "\nabsent\tnone\tNOTHERE\n")
    found = associate(AssociateOptions(gmt=(gmt,)), own_store)
    assert found.run != Layout(chain.store).latest("associations").run
    sets = commit.read_table(found.path / "feature_geneset")
    assert set(sets["collection"]) == {"programs"}
    assert set(sets["gene_set"]) == {"type A"}
    assert set(sets["n_set"]) == {10}
    assert sets["overlap"].max() <= 10


def test_sets_without_a_gene_of_the_data_are_named_and_a_file_without_any_is_refused(
    own_store, without_actors, tmp_path, capsys
):
    gmt = tmp_path / "programs.gmt"
    gmt.write_text("some\t\tGENE1\nmouse\t\tGene2\tGene3\n")
    found = associate(AssociateOptions(gmt=(gmt,)), own_store)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search("1 of 2 gene sets of 'programs'.*mouse.*Gene2 and GENE2", said)
    listed = FeatureStore.open(own_store, associations=found.run).sql(
        "SELECT gene_set FROM gene_sets WHERE n_shared = 0"
    )
    assert listed.rows() == [("mouse",)]
    gmt.write_text("mouse\t\tGene2\tGene3\n")
    known = set(Layout(own_store).runs("associations"))
    with pytest.raises(InputError, match=r"'programs'.*mouse.*Gene2 and GENE2"):
        associate(AssociateOptions(gmt=(gmt,)), own_store)
    assert set(Layout(own_store).runs("associations")) == known


def test_the_same_gene_sets_in_a_file_of_another_place_are_the_same_run(own_store, without_actors, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.gmt").write_text("set\t\tGENE1\tGENE2\n")
    first = associate(AssociateOptions(gmt=(tmp_path / "a" / "s.gmt",)), own_store)
    again = associate(AssociateOptions(gmt=(tmp_path / "b" / "s.gmt",)), own_store)
    assert (again.run, again.done) == (first.run, 0)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, NotFoundError, r"gene-set file .*sets\.gmt .*give a \.gmt file"),
        ("one\tdescription\tGENE1\ntwo\tonly a description\n", InputError, r"sets\.gmt, line 2.*at least one gene"),
        ("a name and genes by spaces GENE1 GENE2\n", InputError, r"line 1.*tab-separated"),
        ("\n\n", InputError, "no set in it"),
        ("one\t\tGENE1\none\t\tGENE2\n", InputError, "'one' is there twice"),
    ],
)
def test_a_missing_or_malformed_gene_set_file_is_refused_before_anything_is_written(
    chain, tmp_path, content, error, words
):
    gmt = tmp_path / "sets.gmt"
    if content is not None:
        gmt.write_text(content)
    before = written(chain.store)
    with pytest.raises(error, match=words):
        associate(AssociateOptions(gmt=(gmt,)), chain.store)
    assert written(chain.store) == before


def without_expression(store):
    for folder in store.glob("cells/*/expression"):
        shutil.rmtree(folder)


def test_a_data_file_that_changed_since_its_extraction_is_refused_with_the_command_to_type(
    own_store, tiny_cells, tmp_path
):
    changed = tiny_cells.copy()
    changed.X[0, 0] += 1
    changed.write_h5ad(tmp_path / "changed.h5ad")
    note = next((own_store / "cells").glob("*/source.json"))
    rewrite_sealed(note, path=str(tmp_path / "changed.h5ad"))
    gmt = tmp_path / "new.gmt"
    gmt.write_text("set\t\tGENE1\n")
    without_expression(own_store)
    before = written(own_store)
    with pytest.raises(UsageError, match=r"changed\.h5ad changed since.*scsae extract"):
        associate(AssociateOptions(gmt=(gmt,)), own_store)
    assert written(own_store) == before


def test_a_data_file_that_moved_is_named(own_store, without_actors, tmp_path):
    note = next((own_store / "cells").glob("*/source.json"))
    rewrite_sealed(note, path=str(tmp_path / "gone.h5ad"))
    gmt = tmp_path / "new.gmt"
    gmt.write_text("set\t\tGENE1\n")
    assert associate(AssociateOptions(gmt=(gmt,)), own_store).done, "its expression is in the store"
    without_expression(own_store)
    gmt.write_text("set\t\tGENE1\tGENE2\n")
    with pytest.raises(UsageError, match=r"gone\.h5ad is not there.*scsae associate --data NEWPATH"):
        associate(AssociateOptions(gmt=(gmt,)), own_store)


def test_associating_again_does_nothing(chain):
    before = written(chain.store)
    again = associate(AssociateOptions(), chain.store)
    assert (again.done, again.reused) == (0, N_UNITS)
    assert written(chain.store) == before


@pytest.mark.parametrize("name", ASSOCIATION_TABLES)
def test_a_damaged_table_is_named_by_verify_and_written_again_to_the_same_bytes(own_store, capsys, name):
    folder = Layout(own_store).latest("associations").path
    part = commit.Run.open(folder / name).part(0)
    content = part.read_bytes()
    part.write_bytes(content[:100] + b"\0" + content[101:])
    assert verify_run(folder.name, own_store) == 1
    assert str(part) in capsys.readouterr().err
    again = associate(AssociateOptions(), own_store)
    assert (again.done, again.reused) == (1, N_UNITS - 1)
    assert part.read_bytes() == content
    assert verify_run(folder.name, own_store) == 0


def test_a_kill_between_two_tables_costs_only_the_tables_that_lack(own_store):
    folder = Layout(own_store).latest("associations").path
    calm = {name: commit.Run.open(folder / name).manifest() for name in ASSOCIATION_TABLES}
    for name in ASSOCIATION_TABLES[-3:]:
        (folder / name / "MANIFEST.json").unlink()
        (folder / name / "part-00000.json").unlink()
    again = associate(AssociateOptions(), own_store)
    assert (again.done, again.reused) == (3, N_UNITS - 3)
    assert {name: commit.Run.open(folder / name).manifest() for name in ASSOCIATION_TABLES} == calm


@pytest.fixture
def many_ranges(monkeypatch):
    """Sixteen ranges of three features, as of many more."""
    monkeypatch.setattr("feature_store.associations.ranges.RANGE_FEATURES", 1)


@pytest.mark.usefixtures("without_actors", "many_ranges")
def test_many_ranges_of_features_give_the_tables_of_one_and_resume_with_those_that_lack(own_store, chain):
    folder = Layout(own_store).latest("associations").path
    shutil.rmtree(folder)
    made = associate(AssociateOptions(), own_store)
    assert (made.path, made.done) == (folder, 16 + len(ASSOCIATION_TABLES))
    for name in ASSOCIATION_TABLES:
        assert commit.read_table(folder / name).equals(table(chain, name)), name
    calm = contents_of(folder)
    shutil.rmtree(folder / "features")
    for name, lost in (("pairs", 3), ("pairs", 4), ("tokens", 4), ("splits", 15)):
        (folder / "measured" / name / f"part-{lost:05d}.parquet").unlink()
    # ranges that were begun stay as they are
    again = associate(AssociateOptions(range_size="1KB"), own_store)
    assert (again.done, again.reused) == (3 + 1, 13 + len(ASSOCIATION_TABLES) - 1)
    assert contents_of(folder) == calm


IN_RANGES = "from feature_store.associations import ranges\nranges.RANGE_FEATURES = 1"


@pytest.mark.slow
@pytest.mark.usefixtures("without_actors", "many_ranges")
def test_an_association_whose_actor_and_driver_are_killed_ends_in_the_bytes_of_an_undisturbed_one(
    own_store, killable, tmp_path
):
    folder = Layout(own_store).latest("associations").path
    shutil.rmtree(folder)
    without_expression(own_store)
    broken = Path(shutil.copytree(own_store, tmp_path / "broken"))
    calm = associate(AssociateOptions(), own_store)
    killable.start("associate", "--num-actors", "2", "--store", str(broken), first=IN_RANGES)
    measured = broken / "associations" / calm.run / "measured" / "splits"

    def wait_for(n_more):
        goal = len(list(measured.glob("part-*.json"))) + n_more
        killable.wait_until(lambda: len(list(measured.glob("part-*.json"))) >= goal)

    wait_for(1)
    os.kill(killable.processes(b"ray::ShardActor")[0], signal.SIGKILL)
    wait_for(2)
    killable.kill()
    assert not (broken / "associations" / calm.run / "features").exists()
    resumed = associate(AssociateOptions(), broken)
    assert 0 < resumed.done < 16 + len(ASSOCIATION_TABLES)
    assert contents_of(resumed.path) == contents_of(calm.path)


@pytest.mark.usefixtures("without_actors")
def test_other_data_are_encoded_by_the_sae_and_associated_in_one_call(own_store, tiny_cells, tmp_path):
    other = tiny_cells[::-1].copy()
    other.obs["person"] = other.obs.pop("donor").to_numpy()
    other.obs["drug"] = np.where(np.arange(len(other)) % 3 == 0, "yes", "no")
    other.write_h5ad(tmp_path / "other.h5ad")
    layout = Layout(own_store)
    sae, before = layout.latest("saes").run, layout.latest("associations").run
    options = AssociateOptions(data=(tmp_path / "other.h5ad",), donor="person", cell_type="type", label=("drug",))
    encoded, found = associate_all(options, own_store)
    assert (encoded.kind, found.kind) == ("codes", "associations")
    assert found.run != before
    assert found.facts["sae"] == sae
    assert found.facts["dataset"] == encoded.facts["dataset"]
    rows = commit.read_table(found.path / "feature_label")
    assert set(rows["label_kind"]) == {"cell_type", "drug"}
    assert rows["n_donors"].null_count() == 0
    again = associate_all(options.model_copy(update={"sae": sae[:6]}), own_store)
    assert [(result.run, result.done) for result in again] == [(encoded.run, 0), (found.run, 0)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"donor": "d", "tokens_per_cell": 3}, r"donor, tokens_per_cell .*give data"),
        ({"sae": "5a"}, "sae was '5a'.*give data"),
        ({"data": "x.h5ad", "codes": "5a", "matrix": "X"}, "codes was '5a'.*give sae"),
        ({"matrix": "X"}, r"matrix .*give data"),
    ],
)
def test_what_describes_other_data_is_refused_without_any(given, words):
    with pytest.raises(UsageError, match=words):
        check(AssociateOptions, given, "scsae associate")


def test_a_recipe_encodes_other_data_by_its_own_stage():
    with pytest.raises(UsageError, match=r"give encode\.data"):
        check(Recipe, {"associate": {"data": "x.h5ad"}}, "recipe r.yaml")


def test_associating_without_codes_says_what_to_run_first(tmp_path):
    with pytest.raises(NotFoundError, match="scsae encode"):
        associate(AssociateOptions(), tmp_path)
    assert not list(tmp_path.iterdir())
