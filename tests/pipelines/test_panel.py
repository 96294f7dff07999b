"""A data set with a panel: every number of the panel is that of a data set of these cells alone, in every stage."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from stored_bytes import hashes_of

from feature_store import FeatureStore, plots
from feature_store.activations import ActivationReader
from feature_store.cells import draw_cells, read_cells, read_panel
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.errors import BusyError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.associate import associate
from pipelines.baseline import baseline
from pipelines.compare import compare_with_baselines
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    ExtractOptions,
    MatchOptions,
    SteerOptions,
    TrainOptions,
)
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inputs import load_stored_sae
from pipelines.match import match
from pipelines.steering.run import steer
from pipelines.train import train

pytestmark = pytest.mark.usefixtures("module_without_actors", "small_ranges")

N_CELLS, N_PANEL, N_FEATURES, KEEP, RANGE = 72, 40, 48, 5, 16


@pytest.fixture(scope="module")
def small_ranges():
    """Shards of 16 cells outside the panel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.encode.OTHER_CELLS", RANGE)
        yield


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """A store whose data set has a panel of 40 of 72 cells, with every stage up to the associations."""

    store: Path
    cells: anndata.AnnData
    gmt: Path
    extract: ExtractOptions
    codes: str
    associations: str

    @property
    def panel(self):
        (dataset,) = Layout(self.store).runs("cells")
        return read_panel(dataset.path)


@pytest.fixture(scope="module")
def labelled(tiny_cells):
    """The tiny cells with a split by donor, a number, and a label that one cell has."""
    cells = tiny_cells.copy()
    split = {"D0": "train", "D1": "train", "D2": "select", "D3": "select", "D4": "test", "D5": "test"}
    cells.obs["dealt"] = [split[donor] for donor in cells.obs["donor"]]
    cells.obs["depth"] = np.asarray(cells.X.sum(axis=1)).ravel() + np.arange(N_CELLS) / 1000
    cells.obs["state"] = ["rare" if i == 7 else "common" for i in range(N_CELLS)]
    return cells


@pytest.fixture(scope="module")
def atlas(labelled, tiny_model, tmp_path_factory, small_ranges, module_without_actors) -> Atlas:
    """Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("atlas")
    labelled.write_h5ad(folder / "all.h5ad")
    gmt = folder / "sets.gmt"
    rows = [[f"SET{i}", "", *(f"GENE{gene}" for gene in range(10 * i, 10 * i + 10))] for i in range(3)]
    gmt.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    options = ExtractOptions(
        data=folder / "all.h5ad",
        model=str(tiny_model),
        layer=("1",),
        donor="donor",
        batch="batch",
        cell_type="type",
        label=("depth", "state"),
        split="dealt",
        panel=N_PANEL,
        shard_cells=RANGE,
        dtype="f32",
    )
    store = folder / "store"
    extract(options, store)
    train(TrainOptions(n_features=N_FEATURES, k=4, n_steps=60, batch_size=64, num_workers=0), store)
    codes = encode(EncodeOptions(keep=KEEP), store)
    found = associate(AssociateOptions(gmt=(gmt,)), store)
    return Atlas(store=store, cells=labelled, gmt=gmt, extract=options, codes=codes.run, associations=found.run)


@pytest.fixture
def own_atlas(atlas, tmp_path) -> Path:
    """A copy of the store, to write to."""
    return Path(shutil.copytree(atlas.store, tmp_path / "own"))


def of_data(atlas):
    """The options of the data set but its panel."""
    return atlas.extract.model_dump(include={"donor", "batch", "cell_type", "label", "split"})


def test_the_associations_of_a_panel_are_those_of_a_data_set_of_its_cells_alone(atlas, own_atlas, tmp_path):
    atlas.cells[atlas.panel].copy().write_h5ad(tmp_path / "panel.h5ad")
    alone = encode(EncodeOptions(data=tmp_path / "panel.h5ad", **of_data(atlas)), own_atlas)
    found = associate(AssociateOptions(codes=alone.run, gmt=(atlas.gmt,)), own_atlas)
    layout = Layout(own_atlas)
    for table in ("feature_label", "feature_number", "feature_gene", "feature_geneset", "gene_sets", "features"):
        mine, theirs = (
            commit.read_table(layout.associations_dir(run) / table) for run in (atlas.associations, found.run)
        )
        assert mine.height > 0, table
        assert_frame_equal(mine, theirs, rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.slow
def test_codes_of_all_cells_from_activations_of_a_sample_are_those_from_activations_of_all(
    atlas, own_atlas, tmp_path, monkeypatch
):
    sampled = extract(atlas.extract.model_copy(update={"cells": 30}), tmp_path)[0]
    run = commit.Run.open(sampled.path)
    drawn = draw_cells(Layout(tmp_path).cells_dir(sampled.facts["dataset"]), 30, seed=atlas.extract.seed)
    reader = ActivationReader(run)
    stored = np.unique(np.concatenate([reader.read(group.shard, group.group).cell_idx for group in reader.row_groups]))
    np.testing.assert_array_equal(stored, drawn)
    sae = train(TrainOptions(n_features=N_FEATURES, k=4, n_steps=10, batch_size=64, num_workers=0), tmp_path)
    of_sample = CodesRun.open(encode(EncodeOptions(keep=KEEP), tmp_path).path)
    assert of_sample.plan.fused is not None
    # in a store with the activations of all cells, that SAE takes the place of the one that is there
    shutil.rmtree(Layout(own_atlas).codes_dir(atlas.codes))
    monkeypatch.setattr("pipelines.encode.load_stored_sae", lambda _, device: load_stored_sae(sae.path, device=device))
    of_all = CodesRun.open(encode(EncodeOptions(keep=KEEP), own_atlas).path)
    assert of_all.plan.fused is None
    every = np.arange(N_CELLS)
    mine, wanted = (load_cell_codes(run, every).toarray() for run in (of_sample, of_all))
    assert (wanted > 0).any(axis=1).all()
    np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", ["cell", "token"])
def test_fused_codes_with_a_panel_are_those_of_stored_activations(own_atlas, level):
    stored = encode(EncodeOptions(level=level, keep=KEEP), own_atlas)
    fused = encode(EncodeOptions(level=level, keep=KEEP, fused=True, shard_cells=RANGE), own_atlas)
    assert fused.run != stored.run
    # careful: not byte for byte, as the model's batches are the cells of a shard, and stored shards have other cells
    wanted, found = (CodesRun.open(result.path) for result in (stored, fused))
    assert wanted.compact is not None
    for name, run in wanted.tables.items():
        assert len(run.manifest().shards) == len(found.tables[name].manifest().shards)
        for part in range(run.n_shards):
            mine, theirs = (pl.read_parquet(one.part(part)) for one in (found.tables[name], run))
            assert_frame_equal(mine, theirs, abs_tol=1e-5)


def test_another_panel_is_another_data_set_and_nothing_of_the_first_is_overwritten(atlas, own_atlas):
    before = hashes_of(own_atlas)
    layout = Layout(own_atlas)
    kinds = ("cells", "activations", "saes", "codes", "associations")
    runs = {kind: {info.run for info in layout.runs(kind)} for kind in kinds}
    extract(atlas.extract.model_copy(update={"panel": 50}), own_atlas)
    codes = encode(EncodeOptions(data=atlas.extract.data, panel=50, **of_data(atlas)), own_atlas)
    associate(AssociateOptions(codes=codes.run), own_atlas)
    for kind in kinds:
        assert len({info.run for info in layout.runs(kind)} - runs[kind]) == (0 if kind == "saes" else 1), kind
    after = hashes_of(own_atlas)
    kept = {name: sha for name, sha in before.items() if name.split("/")[0] in kinds}
    assert {name: after.get(name) for name in kept} == kept


def test_a_panel_larger_than_the_data_is_no_panel(atlas, tmp_path):
    whole = atlas.extract.model_copy(update={"panel": ExtractOptions.model_fields["panel"].default})
    ids = []
    for panel in (None, N_CELLS, N_CELLS + 1, 10**9):
        options = whole if panel is None else whole.model_copy(update={"panel": panel})
        ids.append(extract(options, tmp_path)[0].run)
    assert len(set(ids)) == 1
    assert [info.run for info in Layout(tmp_path).runs("activations")] == ids[:1]


@pytest.mark.parametrize("panel", [0, -3])
def test_a_panel_without_cells_is_refused(panel):
    from pipelines.config import check

    with pytest.raises(UsageError, match=rf"panel.*{panel}"):
        check(ExtractOptions, {"data": "d.h5ad", "panel": panel}, "scsae extract")


@pytest.mark.parametrize("panel", [1, 3])
def test_a_panel_of_a_few_cells_goes_through_every_stage(atlas, own_atlas, panel):
    codes = encode(EncodeOptions(data=atlas.extract.data, panel=panel, keep=10**6, **of_data(atlas)), own_atlas)
    found = associate(AssociateOptions(codes=codes.run), own_atlas)
    assert found.facts["features"] == N_FEATURES
    store = FeatureStore.open(own_atlas, associations=found.run)
    assert store.panel_cells().collect().height == panel
    assert store.frame("cells").collect().height == N_CELLS


@pytest.mark.slow
def test_data_without_donor_batch_or_type_have_a_panel(atlas, own_atlas):
    def codes_of(keep):
        found = encode(EncodeOptions(data=atlas.extract.data, panel=N_PANEL, keep=keep), own_atlas)
        return CodesRun.open(found.path)

    # more codes than there are features: all are kept
    codes = codes_of(256)
    found = associate(AssociateOptions(codes=codes.folder.name), own_atlas)
    store = FeatureStore.open(own_atlas, associations=found.run)
    assert store.frame("feature_label").collect().is_empty()
    assert store.frame("feature_gene").collect().height > 0
    every, fewer = (load_cell_codes(run, np.arange(N_CELLS)).toarray() for run in (codes, codes_of(2)))
    panel = codes_panel(codes, own_atlas)
    np.testing.assert_allclose(fewer[panel], every[panel], atol=1e-5)
    assert ((fewer > 0).sum(axis=1)[~panel] <= 2).all()
    assert ((every > 0).sum(axis=1)[~panel] > 2).any()
    np.testing.assert_allclose(np.sort(fewer, axis=1)[~panel, -2:], np.sort(every, axis=1)[~panel, -2:], atol=1e-5)


def codes_panel(codes, store):
    """Whether each cell is in the panel."""
    return read_cells(Layout(store).cells_dir(codes.plan.dataset))["panel"].to_numpy()


@pytest.mark.parametrize(
    "given",
    [
        {"batch": "batch", "label": ("batch",)},
        {"donor": "batch", "label": ("batch",)},
        {"donor": "donor", "cell_type": "type", "label": ("donor", "type")},
        {"batch": "donor", "cell_type": "batch", "label": ("donor", "batch", "state")},
    ],
)
def test_a_sample_is_drawn_from_columns_that_are_named_twice(atlas, tmp_path, given):
    nothing = {"donor": None, "batch": None, "cell_type": None, "label": (), "split": None}
    (sampled,) = extract(atlas.extract.model_copy(update={**nothing, **given, "cells": 30}), tmp_path)
    folder = Layout(tmp_path).cells_dir(sampled.facts["dataset"])
    cells = read_cells(folder)[draw_cells(folder, 30, seed=atlas.extract.seed)]
    assert cells.height == 30
    # the two batches have 36 cells each
    assert atlas.cells.obs["batch"].iloc[cells["cell_idx"].to_numpy()].value_counts().min() >= 12


def test_a_changed_obs_column_is_refused_where_the_data_are_read_again(atlas, own_atlas, tmp_path):
    file = tmp_path / "cells.h5ad"
    shutil.copy(atlas.extract.data[0], file)
    # the data set's new place
    encode(EncodeOptions(data=file, keep=KEEP), own_atlas)
    layout = Layout(own_atlas)
    (dataset,) = layout.runs("cells")
    shutil.rmtree(dataset.path / "expression")
    shutil.rmtree(layout.associations_dir(atlas.associations))
    changed = atlas.cells.copy()
    changed.obs["type"] = changed.obs["type"].to_numpy()[::-1]
    changed.write_h5ad(file)
    for stage in (
        lambda: encode(EncodeOptions(fused=True), own_atlas),
        lambda: associate(AssociateOptions(), own_atlas),
    ):
        before = hashes_of(own_atlas)
        with pytest.raises(UsageError, match=r"cells\.h5ad.* changed .*scsae extract"):
            stage()
        assert hashes_of(own_atlas) == before


def test_a_second_driver_of_merging_or_expression_is_refused_and_loses_nothing(atlas, own_atlas):
    codes = Layout(own_atlas).codes_dir(atlas.codes)
    (dataset,) = Layout(own_atlas).runs("cells")
    before = hashes_of(own_atlas)
    shutil.rmtree(codes / "merged")
    with CodesRun.open(codes).by_cell.exclusive(), pytest.raises(BusyError, match=codes.name):
        encode(EncodeOptions(keep=KEEP), own_atlas)
    encode(EncodeOptions(keep=KEEP), own_atlas)
    expression = dataset.path / "expression"
    (expression / "MANIFEST.json").unlink()
    for path in expression.glob("part-*"):
        path.unlink()
    with commit.Run.open(expression).exclusive(), pytest.raises(BusyError, match="expression"):
        associate(AssociateOptions(gmt=(atlas.gmt,)), own_atlas)
    associate(AssociateOptions(gmt=(atlas.gmt,)), own_atlas)
    after = hashes_of(own_atlas)
    assert {name: after.get(name) for name in before if "/commits/" not in name} == {
        name: sha for name, sha in before.items() if "/commits/" not in name
    }


@pytest.mark.slow
def test_baselines_matches_plots_and_steering_are_of_the_panels_cells(atlas, own_atlas, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.steering.evaluators.MIN_CELLS", 2)
    monkeypatch.setattr("pipelines.steering.run.drawings_of", lambda *_: {})
    panel = set(atlas.panel.tolist())
    made = baseline(BaselineOptions(kind=("random", "neurons"), fit_tokens=500, gmt=(atlas.gmt,)), own_atlas)
    of_baseline = [CodesRun.open(result.path) for result in made if result.kind == "codes"]
    own = CodesRun.open(Layout(own_atlas).codes_dir(atlas.codes))
    assert [run.plan.keep for run in of_baseline] == [own.plan.keep] * 2
    assert all(run.plan.dataset == own.plan.dataset and run.compact is not None for run in of_baseline)
    compared = compare_with_baselines(own_atlas).comparison
    assert set(compared["representation"]) >= {"random", "neurons"}
    other = next(result.run for result in made if result.kind == "saes")
    match(MatchOptions(method="pearson", other=(other,)), own_atlas)
    assert FeatureStore.open(own_atlas).frame("feature_match").collect().height > 0
    steered = steer(
        SteerOptions(kind="cell_type", target="A", n_features=(2,), n_nulls=2, associations=atlas.associations),
        own_atlas,
    )
    cells = commit.read_table(steered.path / "per_cell")["cell_idx"].unique().to_list()
    assert cells
    assert set(cells) <= panel
    store = FeatureStore.open(own_atlas, associations=atlas.associations)
    assert set(store.panel_cells().select("cell_idx").collect()["cell_idx"].to_list()) == panel
    feature = int(store.frame("feature_gene").select("feature_id").head(1).collect().item())
    for name, draw in {
        "violin": lambda path: plots.violin(store, feature, split=None, save=path),
        "dotplot": lambda path: plots.dotplot(store, [feature], "cell_type", save=path),
        "genes": lambda path: plots.gene_bars(store, feature, save=path),
    }.items():
        draw(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 5_000
    codes = store.frame("codes").select("cell_idx").unique().collect()["cell_idx"].to_list()
    assert set(codes) == panel
    compact = store.frame("compact_codes").select("cell_idx").unique().collect()["cell_idx"]
    assert not panel & set(compact.to_list())
    assert pl.concat([pl.Series(codes), compact]).n_unique() == N_CELLS
