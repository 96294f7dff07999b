"""Steering: doing nothing is exactly nothing, choices come from select cells, nulls match, and all is logged once."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from feature_store import FeatureStore
from feature_store.associations.held_out_units import limit_of_claims
from feature_store.cells import open_source, read_cells
from feature_store.errors import NotFoundError, QueryError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringPlan
from pipelines.config import SteerOptions
from pipelines.errors import UsageError
from pipelines.runtime.stage import StageResult
from pipelines.steering import shards
from pipelines.steering.actors import SteeredEmbedder
from pipelines.steering.feature_selection import choose_features_of_label
from pipelines.steering.plan import Null
from pipelines.steering.run import steer
from pipelines.steering.token_sample import TokenSampler
from pipelines.tracking import Tracking
from sae_core.sae import SparseCodes, load_sae
from sae_core.scfm import load_model
from sae_core.steering import random_direction

ABLATE = SteerOptions(kind="cell_type", target="A", n_features=(3,), n_nulls=4)
MOVE = SteerOptions(kind="batch", target="b0", toward="b1", n_features=(2, 4), dose=(0.5, 1.0), by="both", n_nulls=2)
SITE = "layer.1"
VOTES = ("target_votes", "other_votes", "other_accuracy", "target_shift", "other_shift")


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A store with steering runs: features of type A ablated, the same features scaled by 1, batches moved."""

    store: Path
    ablated: StageResult
    idle: StageResult
    moved: StageResult


def changed(options, **changes):
    return SteerOptions(**{**{name: getattr(options, name) for name in options.model_fields_set}, **changes})


def cannot_draw(*_):
    raise ValueError("a table that no plot knows")


@pytest.fixture(scope="module")
def steered(chain, tmp_path_factory, shards_here):
    store = Path(shutil.copytree(chain.store, tmp_path_factory.mktemp("steered") / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.steering.shards.do_shards", shards_here)
        patch.setattr("pipelines.steering.shards.SHARD_CELLS", 8)
        patch.setattr("pipelines.steering.evaluators.MIN_CELLS", 2)
        idle = changed(ABLATE, intervention="scale", dose=1.0)
        moved = steer(MOVE, store)
        patch.setattr("pipelines.steering.run.drawings_of", lambda *_: {})
        ablated = steer(ABLATE, store)
        patch.setattr("pipelines.steering.run.drawings_of", cannot_draw)
        return Steered(store=store, ablated=ablated, idle=steer(idle, store), moved=moved)


@pytest.fixture
def without_plots(monkeypatch):
    """Log tables and figures alone: a drawing takes as long as the steering of the tiny cells."""
    monkeypatch.setattr("pipelines.steering.run.drawings_of", lambda *_: {})


@pytest.fixture
def here(without_actors, without_plots, monkeypatch):
    """Shards of 8 cells, in this process."""
    monkeypatch.setattr(shards, "SHARD_CELLS", 8)
    monkeypatch.setattr("pipelines.steering.evaluators.MIN_CELLS", 2)


def embeddings(result, condition, draw=0, table="per_cell", **point):
    """cell_idx and embeddings of one condition, by cell."""
    variants = commit.read_table(result.path / "variants").filter(name=condition, draw=draw, **point)
    if variants.height > 1:
        variants = variants.filter("chosen")
    frame = commit.read_table(result.path / table)
    own = frame.filter(variant=variants["variant"].item()).sort("cell_idx")
    return own["cell_idx"].to_list(), own["embedding"].to_numpy()


def cells_of(store):
    return read_cells(next(path for path in (store / "cells").iterdir()))


def chosen_features(result):
    return commit.read_table(result.path / "variants").filter("chosen")["features"].item().to_list()


def embed(chain, cells, patch=None):
    """Embedding of some cells straight from the model, one cell at a time, with a dense patch of gene tokens."""
    model = load_model(chain.extract.model)
    source = open_source(chain.extract.data)
    match = model.match_genes(source.gene_symbols)
    out = []
    for cell in cells:
        rows = source.read_rows(cell, cell + 1)
        tokens = model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=0)

        def on_genes(x, info, cell=cell):
            return torch.where(info.is_special[:, None], x, patch(x, cell, info.gene_id))

        out.append(model.embed(tokens, patches={SITE: on_genes} if patch else None))
    return torch.cat(out).numpy()


def results(result, **wanted):
    return commit.read_table(result.path / "results").filter(split="test", group="all", **wanted)


def votes(result, condition):
    return results(result, condition=condition).filter(pl.col("metric").is_in(VOTES))


def test_scaling_by_one_gives_bit_for_bit_the_unsteered_embedding_and_exactly_no_effect(steered):
    cells, unsteered = embeddings(steered.idle, "unsteered")
    at, scaled = embeddings(steered.idle, "scale")
    np.testing.assert_array_equal(scaled.view(np.uint32), unsteered[np.isin(cells, at)].view(np.uint32))
    effect = votes(steered.idle, "scale")
    assert effect["metric"].to_list() == list(VOTES)
    assert effect.select("effect", "low", "high").to_numpy().tolist() == [[0.0, 0.0, 0.0]] * len(VOTES)
    assert effect.select("p_random_features", "p_random_direction").to_numpy().min() == 1.0


def test_dose_0_of_a_move_gives_bit_for_bit_the_unsteered_embedding(steered):
    cells, unsteered = embeddings(steered.moved, "unsteered")
    at, still = embeddings(steered.moved, "shift", dose=0.0)
    assert len(at) > 0
    np.testing.assert_array_equal(still.view(np.uint32), unsteered[np.isin(cells, at)].view(np.uint32))


def test_ablation_does_change_the_embedding(steered):
    cells, unsteered = embeddings(steered.ablated, "unsteered")
    at, ablated = embeddings(steered.ablated, "ablate")
    assert np.abs(ablated - unsteered[np.isin(cells, at)]).max() > 1e-3


def test_unsteered_embeddings_are_the_models_own(steered, chain):
    cells, stored = embeddings(steered.ablated, "unsteered")
    np.testing.assert_allclose(stored, embed(chain, cells), atol=1e-5)


@pytest.mark.parametrize("run", ["ablated", "moved"])
def test_every_variant_embeds_the_test_cells_that_it_steers_and_none_a_select_cell(steered, run):
    found = getattr(steered, run)
    cells = cells_of(steered.store)
    ours = cells.filter(pl.col("batch") == "b0") if run == "moved" else cells
    for (variant,), own in commit.read_table(found.path / "per_cell").group_by("variant"):
        wanted = ours.filter(split="test") if variant else cells.filter(pl.col("split") != "select")
        assert sorted(own["cell_idx"]) == wanted["cell_idx"].to_list(), variant


def test_a_search_embeds_select_cells_alone(steered):
    select = cells_of(steered.store).filter(split="select")
    searched = commit.read_table(steered.moved.path / "search")
    assert set(searched["cell_idx"]) == set(select["cell_idx"])
    assert set(searched["variant"]) == {*range(1 + 4 + 2)}  # unsteered, the grid, and the mean difference in both doses


@pytest.mark.parametrize("condition", ["ablate", "ablate, replace", "reconstruction", "random direction"])
def test_a_condition_is_the_dense_formula_applied_to_the_gene_tokens_at_the_saes_site(steered, chain, condition):
    sae = load_sae(Layout(steered.store).latest("saes").path)
    features = chosen_features(steered.ablated)

    def decode(z):
        return sae.decode(SparseCodes.from_dense(z))

    def patch(x, *_):
        z = sae.encode(x).to_dense()
        ablated = z.clone()
        ablated[:, features] = 0
        step = decode(ablated) - decode(z)
        match condition:
            case "ablate":
                return x + step
            case "ablate, replace":
                return decode(ablated)
            case "reconstruction":
                return decode(z)
            case _:
                return x + step.norm(dim=1, keepdim=True) * random_direction(16, seed=2)

    at, stored = embeddings(steered.ablated, condition, draw=2 if condition == "random direction" else 0)
    assert len(at) > 0
    np.testing.assert_allclose(stored, embed(chain, at, patch), atol=2e-5)


def test_a_move_adds_the_differences_of_its_references_by_type_and_gene(steered, chain):
    """Worked out from the stored references, which `test_references` holds against means over tokens."""
    sae = load_sae(Layout(steered.store).latest("saes").path)
    chosen = commit.read_table(steered.moved.path / "variants").filter("chosen").row(0, named=True)
    run = commit.Run.open(steered.moved.path / "references" / "test")
    rows = commit.read_part(run.part(chosen["references"]))
    columns = [run.plan["features"][chosen["references"]].index(feature) for feature in chosen["features"]]
    step = {(row["group"], row["gene_id"]): np.array(row["value"])[columns] for row in rows.iter_rows(named=True)}
    kind = cells_of(steered.store)["cell_type"].to_list()
    none = np.zeros(len(columns))

    def patch(x, cell, genes):
        add = torch.from_numpy(np.array([step.get((kind[cell], gene), none) for gene in genes.tolist()])).float()
        return x + chosen["dose"] * add @ sae.W_dec[chosen["features"]]

    at, stored = embeddings(steered.moved, "shift", n_features=len(columns), dose=chosen["dose"])
    np.testing.assert_allclose(stored, embed(chain, at, patch), atol=2e-5)


def test_the_mean_difference_is_added_in_each_dose_of_the_search(steered, chain):
    variants = commit.read_table(steered.moved.path / "variants").filter(name="mean difference")
    assert variants.select("role", "dose").rows() == [("baseline", 1.0), ("baseline_dose", 0.5)]
    run = commit.Run.open(steered.moved.path / "references" / "test")
    rows = commit.read_part(run.part(variants["references"][0]))
    vector = {row["group"]: np.array(row["value"]) for row in rows.iter_rows(named=True)}
    kind = cells_of(steered.store)["cell_type"].to_list()
    for dose in (0.5, 1.0):

        def patch(x, cell, genes, dose=dose):
            return x + dose * torch.from_numpy(vector[kind[cell]]).float()

        at, stored = embeddings(steered.moved, "mean difference", dose=dose)
        np.testing.assert_allclose(stored, embed(chain, at, patch), atol=2e-5)
    found = commit.read_table(steered.moved.path / "results")
    measured = found.filter(condition="mean difference", metric="remaining", group="all").sort("split", "dose")
    assert measured.select("split", "dose").rows() == [(s, d) for s in ("select", "test") for d in (0.5, 1.0)]


def test_steering_says_what_the_donors_of_the_test_cells_allow(steered, here, capfd):
    limit = limit_of_claims(FeatureStore.open(steered.store).panel_cells().collect())
    assert limit is not None
    assert steer(ABLATE, steered.store).done == 0
    assert f"warning: {limit}" in capfd.readouterr().err


@pytest.mark.slow
def test_a_search_of_kinds_takes_one_sample_reports_each_kind_and_finishes_the_best_last(own_store, here):
    options = SteerOptions(kind="batch", target="all", n_features=(2, 4), dose=(0.5, 1.0), n_nulls=2)
    found = steer(options, own_store)
    said = found.facts["kinds, searched on select cells"]
    runs = dict(part.split() for part in said.split(", "))
    assert list(runs) == ["ablate", "scale", "toward", "shift"]
    folders = {kind: Layout(own_store).steering_dir(run) for kind, run in runs.items()}
    assert sum((folder / "survey").exists() for folder in folders.values()) == 1
    assert found.path in folders.values()
    best = next(kind for kind, folder in folders.items() if folder == found.path)
    for kind, folder in folders.items():
        chosen = commit.read_table(folder / "results").filter("chosen", split="test", metric="batch_mixing")
        assert chosen["condition"].item() == kind
        assert found.facts[f"{kind} on test cells"].startswith(f"batch_mixing {chosen['value'].item():.3f}")
    assert FeatureStore.open(own_store).lineage.steering[0] == runs[best]
    alone = steer(changed(options, intervention="shift"), own_store)
    assert (alone.run, alone.done) == (runs["shift"], 0)


def without_toward_cells_of(kind, splits=("train", "select")):
    """The cell table in which cells of `toward` of a type have no label in these splits."""
    unseen = (pl.col("batch") == MOVE.toward) & (pl.col("cell_type") == kind) & pl.col("split").is_in(splits)
    return lambda cells: cells.with_columns(batch=pl.when(~unseen).then("batch"))


def test_by_other_types_a_type_is_moved_of_which_only_test_cells_have_the_other_label(own_store, here):
    with_labels(own_store, without_toward_cells_of("A"))
    found = steer(changed(MOVE, by="other_types"), own_store)
    run = commit.Run.open(found.path / "references" / "test")
    rows = commit.read_part(run.part(0))
    assert rows["group"].to_list() == ["A"]  # B has no other type with cells of both labels
    kind = dict(cells_of(own_store).select("cell_idx", "cell_type").iter_rows())
    cells, before = embeddings(found, "unsteered")
    for condition in ("shift", "mean difference"):
        at, after = embeddings(found, condition, **({} if condition == "shift" else {"dose": 1.0}))
        still = (after == before[np.isin(cells, at)]).all(axis=1)
        assert {kind[cell] for cell, is_still in zip(at, still, strict=True) if is_still} == {"B"}
        assert {kind[cell] for cell, is_still in zip(at, still, strict=True) if not is_still} == {"A"}
    own = results_of_group(found, "A")
    assert set(own["metric"]) >= {"remaining", "type_accuracy", "type_changed", "target_votes", "target_shift"}
    assert own.filter(metric="target_shift")["value"].item() > 0
    assert results_of_group(found, "B").filter(metric="target_shift")["value"].item() == 0
    assert found.facts["not moved"].startswith("B: ")


def results_of_group(found, group):
    return commit.read_table(found.path / "results").filter("chosen", split="test", group=group)


def test_a_search_without_cells_to_be_held_against_is_refused(own_store, here):
    with_labels(own_store, without_toward_cells_of("A", ("select",)))
    with pytest.raises(UsageError, match=r"select cells.*'b1'.*--n-features.*--by other_types"):
        steer(changed(MOVE, cells=("cell_type=A",)), own_store)


def test_only_the_cells_that_are_steered_are_measured(own_store, here):
    found = steer(changed(MOVE, n_features=(2,), dose=(1.0,), by="cell_type", cells=("cell_type=A",)), own_store)
    of_all = commit.read_table(found.path / "results").filter("chosen", split="test", group="all")
    own = dict(of_all.filter(pl.col("metric").is_in(["remaining", "target_votes"])).select("metric", "n_cells").rows())
    moved = cells_of(own_store).filter(split="test", batch="b0", cell_type="A")
    assert own == {"remaining": moved.height, "target_votes": moved.height}
    assert of_all.filter(metric="remaining")["value"].item() == pytest.approx(
        results_of_group(found, "A").filter(metric="remaining")["value"].item()
    )


@pytest.mark.parametrize(
    ("intervention", "dose"),
    [
        pytest.param("clamp", 2.0, marks=pytest.mark.slow),
        ("add", 0.5),
        pytest.param("scale", 3.0, marks=pytest.mark.slow),
    ],
)
def test_a_dose_is_in_units_of_the_features_99th_percentile_and_a_scale_is_a_factor(
    chain, own_store, here, intervention, dose
):
    found = steer(changed(ABLATE, intervention=intervention, dose=dose, n_nulls=2), own_store)
    sae = load_sae(Layout(own_store).latest("saes").path)
    table = commit.read_table(Layout(own_store).latest("associations").path / "features")
    features = chosen_features(found)
    unit = torch.tensor([table.filter(feature_id=f)["p99"].item() for f in features], dtype=torch.float32) * dose

    def patch(x, *_):
        z = sae.encode(x).to_dense()
        edited = z.clone()
        edited[:, features] = {"clamp": unit, "add": z[:, features] + unit, "scale": dose * z[:, features]}[
            intervention
        ]
        return x + sae.decode(SparseCodes.from_dense(edited)) - sae.decode(SparseCodes.from_dense(z))

    at, stored = embeddings(found, intervention)
    np.testing.assert_allclose(stored, embed(chain, at, patch), atol=2e-5)


@pytest.fixture
def tables(chain):
    folder = Layout(chain.store).latest("associations").path
    return commit.read_table(folder / "feature_label"), commit.read_table(folder / "features")


def test_features_are_the_living_ones_with_the_smallest_p_on_select_cells(steered, tables):
    labels, features = tables
    dead = {row["feature_id"] for row in features.iter_rows(named=True) if row["dead"]}
    select = [
        (row["p"], row["feature_id"])
        for row in labels.filter(label_kind="cell_type", label="A", split="select").iter_rows(named=True)
        if row["auroc"] > 0.5 and row["feature_id"] not in dead
    ]
    assert chosen_features(steered.ablated) == [feature for _, feature in sorted(select)[:3]]


def test_what_is_true_on_test_cells_does_not_change_the_choice(tables):
    labels, features = tables
    spoiled = labels.with_columns(
        p=pl.when(split="test").then(1 - pl.col("p")).otherwise("p"),
        auroc=pl.when(split="test").then(1 - pl.col("auroc")).otherwise("auroc"),
    )
    for options in (ABLATE, SteerOptions(kind="cell_type")):
        (target, chosen), (other, again) = (
            choose_features_of_label(table, features, options, kinds=["cell_type"]) for table in (labels, spoiled)
        )
        assert (target, chosen.rows()) == (other, again.rows())


def with_labels(store, change):
    """Rewrite the cell table of a store; its other files stay."""
    folder = next((store / "cells").iterdir())
    cells, plan, note = read_cells(folder), commit.Run.open(folder).plan, (folder / "source.json").read_text()
    kept = {
        path.name: shutil.move(path, folder.parent.parent / path.name) for path in folder.iterdir() if path.is_dir()
    }
    shutil.rmtree(folder)
    commit.write_table(folder, change(cells), plan)
    (folder / "source.json").write_text(note)
    for name, path in kept.items():
        shutil.move(path, folder / name)


@pytest.mark.slow
def test_labels_of_test_cells_do_not_change_what_is_chosen_or_referred_to(steered, own_store, here):
    swapped = pl.when(split="test").then(pl.col("batch").replace({"b0": "b1", "b1": "b0"})).otherwise("batch")
    with_labels(own_store, lambda cells: cells.with_columns(batch=swapped))
    spoiled = steer(MOVE, own_store)
    for table in ("scores", "variants", "references/test", "references/search", "survey/codes", "search"):
        ours, theirs = (commit.Run.open(found.path / table).manifest().shards for found in (steered.moved, spoiled))
        assert [part.sha256 for part in ours] == [part.sha256 for part in theirs], table
    assert not results(spoiled).equals(results(steered.moved))


def test_without_a_target_the_label_of_the_best_feature_is_taken(tables):
    labels, features = tables
    best = labels.filter(pl.col("auroc") > 0.5, label_kind="cell_type", split="select").sort("p", "feature_id")
    target, _ = choose_features_of_label(labels, features, SteerOptions(), kinds=["cell_type"])
    assert target == best["label"][0]


def test_null_features_are_living_matched_in_density_and_never_the_targets(steered, tables):
    _, features = tables
    chosen = chosen_features(steered.ablated)
    density = dict(features.select("feature_id", "density").iter_rows())
    nulls = commit.read_table(steered.ablated.path / "variants").filter(name="random features")
    assert nulls["draw"].to_list() == [0, 1, 2, 3]
    drawn = [tuple(own) for own in nulls["features"].to_list()]
    assert len(set(drawn)) > 1
    for own in drawn:
        assert len(set(own)) == len(chosen)
        assert not set(own) & set(chosen)
        for target, pick in zip(chosen, own, strict=True):
            others = [f for f, d in density.items() if d > 0 and f not in chosen]
            distance = {f: abs(np.log(density[f]) - np.log(density[target])) for f in others}
            nearer = sum(d < distance[pick] for d in distance.values())
            # the nearest ten, those apart that the other targets took before
            assert nearer < 10 + len(chosen) - 1, (target, pick)


def test_results_hold_every_condition_and_metric_once(steered):
    frame = results(steered.ablated).filter(pl.col("metric").is_in(VOTES))
    conditions = ["unsteered", "ablate", "ablate, replace", "reconstruction", "random features", "random direction"]
    expected = {(condition, metric) for condition in conditions for metric in VOTES}
    assert frame.height == len(expected)
    assert set(frame.select("condition", "metric").iter_rows()) == expected
    assert set(frame.filter(role="null")["n_draws"]) == {4}
    assert frame.filter(condition="unsteered")["effect"].to_list() == [0.0] * len(VOTES)
    test = cells_of(steered.store).filter(split="test")
    n_cells = dict(frame.filter(condition="ablate").select("metric", "n_cells").iter_rows())
    assert n_cells["target_votes"] == (test["cell_type"] == "A").sum()
    assert n_cells["other_accuracy"] == (test["cell_type"] != "A").sum()


def test_a_move_reports_the_chosen_point_its_cross_sections_nulls_and_the_mean_difference(steered):
    frame = commit.read_table(steered.moved.path / "variants")
    chosen = frame.filter("chosen").row(0, named=True)
    points = frame.filter(role="grid").select("n_features", "dose").rows()
    others = {(n, d) for n in (2, 4) for d in (0.5, 1.0) if (n == chosen["n_features"]) != (d == chosen["dose"])}
    assert sorted(points) == sorted(others | {(chosen["n_features"], d) for d in (0.0, chosen["dose"])})
    assert set(frame["name"]) == {
        *("unsteered", "shift", "shift, replace", "reconstruction", "mean difference"),
        *("random features", "random direction", "shuffled labels"),
    }
    assert set(frame.filter(role="null").group_by("name").len()["len"]) == {2}
    assert set(results(steered.moved, metric="remaining")["condition"]) >= set(frame["name"])


def test_a_type_is_moved_to_another_and_its_head_asked(own_store, here, steered):
    options = SteerOptions(
        target="A", toward="B", intervention="toward", by="gene", feature=(2, 21), gene=("GENE3", "GENE12"),
        cells=("donor=D0", "donor=D1", "donor=D2", "donor=D3", "donor=D4"), n_nulls=2, head=True,
    )  # fmt: skip
    opened = FeatureStore.open(own_store)
    with pytest.raises(QueryError, match=r"no table 'steering' yet: `scsae steer --store [^`]+` makes it; tables: "):
        opened.frame("steering")
    found = steer(options, own_store)
    with pytest.raises(
        QueryError, match=r"'steering', which was made after the store was opened: `store\.renewed\(\)`"
    ):
        opened.frame("steering")
    assert opened.renewed().frame("steering").collect().height > 0
    cells = cells_of(own_store)
    variants = commit.read_table(found.path / "variants")
    assert set(variants.filter(role="grid")["features"].item()) == {2, 21}
    steered_cells = commit.read_table(found.path / "per_cell").filter(pl.col("variant") == 1)["cell_idx"]
    ours = cells.filter(pl.col("donor") != "D5", split="test", cell_type="A")["cell_idx"]
    assert sorted(steered_cells) == sorted(ours)
    head = commit.read_table(found.path / "head")
    assert set(head["condition"]) == {"toward", "mean difference", *Null}
    answers = commit.read_table(found.path / "answers")
    asked = set(cells.filter(pl.col("cell_idx").is_in(answers["cell_idx"].unique().implode()))["split"])
    assert asked == {"test"}
    for row in head.filter(condition="toward").iter_rows(named=True):
        gene = answers.filter(gene_id=int(row["gene"].removeprefix("GENE")) - 2)
        before, after = (gene.filter(variant=v).sort("cell_idx") for v in (0, 1))
        before = before.filter(pl.col("cell_idx").is_in(ours.implode()))
        assert before["cell_idx"].to_list() == after["cell_idx"].to_list()
        assert row["change"] == pytest.approx(float((after["answer"] - before["answer"]).mean()), abs=1e-6)


def test_mixing_steers_every_cell_and_shuffles_batches(own_store, here):
    found = steer(SteerOptions(kind="batch", target="all", intervention="shift", n_features=2, n_nulls=2), own_store)
    variants = commit.read_table(found.path / "variants")
    assert set(variants.filter(role="null")["name"]) == {"random features", "random direction", "shuffled labels"}
    test = cells_of(own_store).filter(split="test")
    for (variant,), own in commit.read_table(found.path / "per_cell").group_by("variant"):
        assert not variant or sorted(own["cell_idx"]) == test["cell_idx"].to_list()
    assert {"batch_mixing", "label_conservation"} <= set(results(found)["metric"])
    assert "batch_mixing" in found.facts


@pytest.mark.slow
def test_without_an_intervention_a_mixing_searches_every_kind_and_reports_each(own_store, here):
    options = SteerOptions(kind="batch", target="all", n_features=(2, 4), dose=(0.5, 1), n_nulls=2)
    found = steer(options, own_store)
    layout = Layout(own_store)
    made = {}
    for info in layout.runs("steering"):
        if info.complete:
            plan = SteeringPlan.of(commit.Run.open(info.path / "search"))
            if plan.target == "all":
                made[plan.intervention] = plan
    assert set(made) == {"ablate", "scale", "toward", "shift"}
    assert {dose for _, dose in made["ablate"].grid} == {1.0}
    assert {dose for _, dose in made["scale"].grid} == {0.5}
    assert {dose for _, dose in made["shift"].grid} == {0.5, 1.0}
    # the point that mixes best on select cells among those that keep the types, by the tables of the searches
    best, values = None, {}
    for intervention, plan in made.items():
        rows = commit.read_table(layout.steering_dir(plan.id) / "results").filter(split="select", group="all")
        unsteered = rows.filter(role="unsteered", metric="label_conservation")["value"].item()
        for row in rows.filter(role="grid", metric="batch_mixing").iter_rows(named=True):
            at = (pl.col("n_features") == row["n_features"]) & (pl.col("dose") == row["dose"])
            kept = rows.filter(at, role="grid", metric="label_conservation")["value"].item()
            if kept >= 0.98 * unsteered:
                values[intervention] = max(values.get(intervention, -1), row["value"])
    best = max(values, key=values.get)
    assert found.facts["intervention"].startswith(best)
    assert layout.latest("steering").run == found.run == made[best].id
    for intervention in made:
        assert "batch_mixing" in found.facts[f"{intervention} on test cells"]
    again = steer(options, own_store)
    assert (again.run, again.done) == (found.run, 0)


def test_votes_are_shares_of_the_five_nearest_unsteered_train_cells(steered):
    cells = cells_of(steered.store)
    kind, split = cells["cell_type"].to_list(), cells["split"].to_list()
    at, base = embeddings(steered.ablated, "unsteered")
    train = [i for i, cell in enumerate(at) if split[cell] == "train"]
    at_test, ablated = embeddings(steered.ablated, "ablate")
    shares = []
    for cell, x in zip(at_test, ablated, strict=True):
        if kind[cell] == "A":
            nearest = sorted(train, key=lambda i: float(((base[i].astype(float) - x) ** 2).sum()))[:5]
            shares.append(np.mean([kind[at[i]] == "A" for i in nearest]))
    row = results(steered.ablated, condition="ablate", metric="target_votes")
    assert row["value"].item() == pytest.approx(np.mean(shares))


def test_the_evaluation_is_logged_once_and_attached_to_the_registered_sae(steered, chain):
    tracking = Tracking(Layout(steered.store))
    logged = tracking.client.search_runs([tracking.experiment_id], f"tags.`scsae.run` = '{steered.ablated.run}'")
    assert [run.info.status for run in logged] == ["FINISHED"]
    assert logged[0].data.params["intervention"] == "ablate"
    assert logged[0].data.tags["scsae.sae"] == Layout(steered.store).latest("saes").run
    version = tracking.champion("sae-tiny-layer.1")
    row = results(steered.ablated, condition="ablate", metric="target_votes").row(0, named=True)
    key = "test/chosen/target_votes"
    assert logged[0].data.metrics[key] == pytest.approx(row["value"])
    assert logged[0].data.metrics[f"{key}/effect"] == pytest.approx(row["effect"])
    of_model = tracking.client.get_logged_model(version.model_id).metrics
    mine = [m.value for m in of_model if m.key == key and m.run_id == logged[0].info.run_id]
    assert mine == [pytest.approx(row["value"])]


def test_what_cannot_be_drawn_costs_neither_the_results_nor_the_log(steered):
    tracking = Tracking(Layout(steered.store))
    (logged,) = tracking.logged(steered.idle.run)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["test/chosen/target_votes/effect"] == 0.0
    files = [file.path for file in tracking.client.list_artifacts(logged.info.run_id)]
    assert files == ["results.csv", "scores.csv", "variants.json"]


@pytest.mark.parametrize(("options", "run"), [(ABLATE, "ablated"), (MOVE, "moved")])
def test_steering_again_does_nothing_and_logs_nothing(steered, monkeypatch, options, run):
    monkeypatch.setattr(shards, "SHARD_CELLS", 8)
    monkeypatch.setattr("pipelines.steering.evaluators.MIN_CELLS", 2)
    before_run = getattr(steered, run)
    before = {path: path.stat().st_mtime_ns for path in before_run.path.rglob("*") if path.is_file()}
    again = steer(options, steered.store)
    assert (again.path, again.done) == (before_run.path, 0)
    assert again.reused > 0
    assert again.facts == before_run.facts
    assert {path: path.stat().st_mtime_ns for path in again.path.rglob("*") if path.is_file()} == before
    tracking = Tracking(Layout(steered.store))
    assert len(tracking.client.search_runs([tracking.experiment_id], f"tags.`scsae.run` = '{again.run}'")) == 1


SLOW_TABLES = [pytest.param(table, marks=pytest.mark.slow) for table in ("survey", "search")]


@pytest.mark.parametrize("table", [*SLOW_TABLES, "per_cell"])
def test_an_interrupted_steering_resumes_to_the_same_bytes(steered, own_store, here, monkeypatch, table):
    worker = TokenSampler if table == "survey" else SteeredEmbedder
    original = worker.shard

    def dies(self, number):
        if table == "survey" or (Path(self.job.run).name == table and number == 1):
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "shard", dies)
        with pytest.raises(KeyboardInterrupt):
            steer(MOVE, own_store)
    resumed = steer(MOVE, own_store)
    assert (resumed.run, resumed.reused > 0) == (steered.moved.run, table != "survey")
    for plan in sorted(steered.moved.path.rglob("plan.json")):
        name = plan.parent.relative_to(steered.moved.path)
        own = commit.Run.open(resumed.path / name).manifest()
        assert own == commit.Run.open(steered.moved.path / name).manifest(), name


@pytest.mark.slow
def test_through_an_actor_the_stored_embeddings_are_the_same(steered, ray_local, own_store, without_plots, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CELLS", 72)
    found = steer(changed(ABLATE, num_actors=1), own_store)
    for condition in ("unsteered", "ablate", "random features"):
        cells, here = embeddings(steered.ablated, condition, draw=0)
        at, there = embeddings(found, condition, draw=0)
        assert at == cells
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (changed(ABLATE, kind="celltype"), r"--kind .*'celltype'.* cell_type, batch"),
        (changed(ABLATE, kind="donor"), r"--kind .*'donor'.* cell_type, batch"),
        (changed(ABLATE, target="C"), r"--target .*'C'.* A, B"),
        (changed(MOVE, target="b2"), r"--target .*'b2'.* b0, b1"),
        (changed(MOVE, toward="b7"), r"--toward .*'b7'.* b0, b1"),
        (SteerOptions(target="A", feature=(48,)), r"--feature .*48.* 47.*scsae features"),
        (changed(MOVE, n_features=47), r"--n-features .*47"),
        (changed(ABLATE, gene=("GENE0",)), r"--gene .*'GENE0'"),
        (changed(ABLATE, cells=("kind=A",)), r"--cells .*'kind=A'.*cell_type"),
        (changed(ABLATE, cells=("cell_type=C",)), r"--cells .*'cell_type=C'.* A, B"),
        (changed(MOVE, cells=("batch=b1",)), "--cells batch=b1"),
    ],
)
def test_a_request_for_what_is_not_there_says_what_is_and_writes_nothing(chain, options, words):
    with pytest.raises(UsageError, match=words):
        steer(options, chain.store)
    assert not (chain.store / "steering").exists()


def test_a_dead_feature_cannot_be_steered(chain, tables):
    _, features = tables
    dead = features.filter("dead")["feature_id"].to_list()
    assert dead, "the tiny autoencoder has dead features"
    with pytest.raises(UsageError, match=rf"--feature .*{dead[0]}.*scsae features"):
        steer(SteerOptions(target="A", feature=(dead[0],)), chain.store)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("site", "layer.0", r"'layer\.1'.*'layer\.0'"), ("d_model", 8, r"d_model 16.* 8")],
)
def test_an_sae_of_another_model_or_site_is_refused(own_store, key, value, words):
    folder = Layout(own_store).latest("activations").path
    plan = commit.Run.open(folder).plan | {key: value}
    shutil.rmtree(folder)
    commit.Run.create(folder, plan)
    with pytest.raises(UsageError, match=f"{words}.*scsae train"):
        steer(ABLATE, own_store)


def test_a_target_without_a_test_cell_is_refused_before_anything_is_written(own_store):
    only_b = pl.when(split="test").then(pl.lit("B")).otherwise("cell_type")
    with_labels(own_store, lambda cells: cells.with_columns(cell_type=only_b))
    with pytest.raises(UsageError, match=r"test .*'A'.*--target"):
        steer(ABLATE, own_store)
    assert not (own_store / "steering").exists()


def test_steering_without_associations_says_what_to_run_first(tmp_path):
    with pytest.raises(NotFoundError, match="scsae associate"):
        steer(ABLATE, tmp_path)
    assert not list(tmp_path.iterdir())
