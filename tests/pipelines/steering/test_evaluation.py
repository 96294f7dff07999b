"""Results of steering, on cells whose answers are known: two labels a fixed step apart in each of three types."""

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from feature_store.query.metrics import HEADLINE_OF_TASK, METRICS
from feature_store.query.steering import Role
from feature_store.storage import schemas
from feature_store.storage.layout import Layout
from pipelines.config import SteerOptions, check
from pipelines.errors import UsageError
from pipelines.steering import embedding_baselines
from pipelines.steering.dose_selection import choose_dose
from pipelines.steering.embeddings import SteeredEmbeddings
from pipelines.steering.evaluation import evaluate
from pipelines.steering.evaluation_cells import EvaluationCells
from pipelines.steering.evaluators import MixEvaluator, MoveEvaluator
from pipelines.steering.metrics.distances import corrected_distance, mean_distance
from pipelines.steering.metrics.mixing import predict_left_out
from pipelines.steering.plan import InterventionType, Null, SteeringTask, Task, Variant
from pipelines.steering.request import SteeringRequest

WIDTH, PER = 5, 12
TYPES, DONORS = ["B", "NK", "T"], ["d0", "d1", "d2"]
MOVE = SteeringTask(type=Task.MOVE, kind="condition", target="stim", toward="ctrl", intervention=InterventionType.SHIFT)
MIX = SteeringTask(type=Task.MIX, kind="condition", target="all", toward=None, intervention=InterventionType.ABLATE)
EDIT = SteeringTask(type=Task.EDIT, kind="cell_type", target="B", toward=None, intervention=InterventionType.ABLATE)
GAP = np.array([2.0, 0, 0, 1.0, 0])


@pytest.fixture(scope="module", name="cells")
def _cells():
    rows = [
        {"donor": donor, "cell_type": kind, "condition": condition, "split": "train" if donor == "d0" else "test"}
        for donor in DONORS
        for kind in TYPES
        for condition in ("ctrl", "stim")
        for _ in range(PER)
    ]
    return pl.DataFrame(rows).with_row_index("cell_idx").with_columns(pl.col("cell_idx").cast(pl.Int64))


@pytest.fixture(scope="module", name="unsteered")
def _unsteered(cells):
    rng = np.random.default_rng(0)
    centre = {kind: 10 * rng.normal(size=WIDTH) for kind in TYPES}
    places = np.stack([centre[kind] for kind in cells["cell_type"]]) + rng.normal(0, 0.3, (cells.height, WIDTH))
    return places + GAP * (cells["condition"] == "stim").to_numpy()[:, None]


def steered(cells, unsteered, share, noise=0.0, seed=0):
    """Stimulated cells with a share of the gap removed."""
    is_target = (cells["condition"] == "stim").to_numpy()[:, None]
    return (
        unsteered
        - share * GAP * is_target
        + noise * is_target * np.random.default_rng(seed).normal(size=unsteered.shape)
    )


def grid(i, n, dose, *, chosen=False):
    return Variant(
        id=i,
        name="shift",
        role=Role.GRID,
        intervention=InterventionType.SHIFT,
        features=tuple(range(n)),
        dose=dose,
        chosen=chosen,
    )


@pytest.fixture(scope="module", name="variants")
def _variants():
    nulls = [
        Variant(
            id=10 + 4 * j + i, name=null.value, role=Role.NULL, intervention=InterventionType.SHIFT, features=(7, 8),
            dose=1.0, draw=i,
        )
        for j, null in enumerate(Null)
        for i in range(4)
    ]  # fmt: skip
    points = [(2, 1.0), (2, 0.0), (2, 0.5), (1, 1.0), (4, 1.0)]
    return [
        Variant(id=0, name="unsteered", role=Role.UNSTEERED),
        *(grid(i + 1, n, dose, chosen=i == 0) for i, (n, dose) in enumerate(points)),
        Variant(id=6, name="reconstruction", role=Role.RECONSTRUCTION, mode="replace"),
        *nulls,
    ]


SHARES = {0: 0.0, 1: 0.7, 2: 0.0, 3: 0.35, 4: 0.4, 5: 0.75, 6: 0.02}


@pytest.fixture(scope="module", name="stored")
def _stored(cells, unsteered, variants):
    """As a run stores them: all cells unsteered, those that are steered under every other variant."""
    parts = []
    for variant in variants:
        share = SHARES.get(variant.id, 0.01 * variant.draw)
        embedded = steered(cells, unsteered, share).astype(np.float32)
        frame = pl.DataFrame(
            {"cell_idx": cells["cell_idx"], "variant": pl.Series([variant.id] * cells.height, dtype=pl.Int32),
             "embedding": embedded},
            schema_overrides={"embedding": pl.Array(pl.Float32, WIDTH)},
        )  # fmt: skip
        chosen = pl.lit(True) if variant.id == 0 else (cells["condition"] == "stim") & (cells["split"] == "test")
        parts.append(frame.filter(chosen))
    return pl.concat(parts)


@pytest.fixture(scope="module", name="found")
def _found(stored, cells, variants):
    embedded = SteeredEmbeddings.of(stored, cells, "condition")
    return evaluate(MOVE, variants, embedded, split="test", seed=0, n_samples=200)


def one(found, metric, group="all", **where):
    rows = found.filter(pl.col("metric") == metric, pl.col("group") == group, **where)
    assert rows.height == 1, rows
    return rows.row(0, named=True)


@pytest.fixture(scope="module", name="judged")
def _judged(cells, unsteered):
    test, train = (cells["split"] == split for split in ("test", "train"))
    text = {name: np.array(cells[name].to_list()) for name in ("condition", "cell_type", "donor")}
    return EvaluationCells(
        unsteered=unsteered[test.to_numpy()], label=text["condition"][test.to_numpy()],
        cell_type=text["cell_type"][test.to_numpy()], donor=text["donor"][test.to_numpy()],
        train=unsteered[train.to_numpy()], train_label=text["condition"][train.to_numpy()],
        train_type=text["cell_type"][train.to_numpy()], n_samples=20,
    )  # fmt: skip


def test_subsamples_leave_a_fifth_of_every_donor_type_and_label_out(judged):
    for donor in ("d1", "d2"):
        for kind in TYPES:
            for label in ("ctrl", "stim"):
                own = (judged.donor == donor) & (judged.cell_type == kind) & (judged.label == label)
                assert set(judged.kept[:, own].sum(1)) == {PER - 2}
    assert len(np.unique(judged.kept, axis=0)) == len(judged.kept)


def test_the_interval_of_a_mean_is_nearly_student_s(cells, unsteered):
    n = 400
    one_type = np.full(n, "B")
    cells = EvaluationCells(
        unsteered=np.zeros((n, 2)), label=one_type, cell_type=one_type, donor=one_type, train=np.zeros((0, 2)),
        train_label=one_type[:0], train_type=one_type[:0], n_samples=2000,
    )  # fmt: skip
    values = np.random.default_rng(0).normal(size=n)
    reading, nothing = cells.mean("m", values), cells.mean("m", np.zeros(n))
    low, high = cells.interval(reading.value, reading, nothing)
    half = stats.t.interval(0.95, n - 1, scale=stats.sem(values))[1]
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_sampled_distances_are_those_of_the_sampled_cells(judged, cells, unsteered):
    after = steered(cells, unsteered, 0.7, noise=0.2)[(cells["split"] == "test").to_numpy()]
    readings = {(r.metric, r.group): r for r in MoveEvaluator(judged, "stim", "ctrl").metrics(after)}
    for metric, measure in (("distance", mean_distance), ("distance_corrected", corrected_distance)):
        by_type = []
        for b in range(3):
            of_types = []
            for kind in TYPES:
                own = judged.cell_type == kind
                rows = [np.flatnonzero(own & (judged.label == label)) for label in ("stim", "ctrl")]
                target, toward = (np.repeat(part, judged.kept[b, part].astype(int)) for part in rows)
                a, c = after[target], judged.unsteered[toward]
                of_types.append(measure(a, c))
                np.testing.assert_allclose(readings[metric, kind].sampled[b], of_types[-1], rtol=1e-4)
            by_type.append(np.mean(of_types))
        np.testing.assert_allclose(readings[metric, "all"].sampled[:3], by_type, rtol=1e-4)


def test_sampled_means_and_f1_are_those_of_the_sampled_cells(judged):
    rng = np.random.default_rng(3)
    own = judged.label == "stim"
    values, said = rng.normal(size=own.sum()), rng.choice(TYPES, own.sum())
    truth = judged.cell_type[own]
    mean, f1 = judged.mean("m", values, own), judged.macro_f1("f", truth, said, own)
    for b in range(5):
        rows = np.repeat(np.arange(own.sum()), judged.kept[b, own].astype(int))
        assert mean.sampled[b] == pytest.approx(values[rows].mean(), rel=1e-5)
        assert f1.sampled[b] == pytest.approx(f1_score(truth[rows], said[rows], average="macro"), rel=1e-5)
    assert mean.value == pytest.approx(values.mean())


def test_what_remains_is_the_share_of_the_step_that_was_not_taken(found):
    for group in ("all", *TYPES):
        row = one(found, "remaining", group, chosen=True)
        assert row["value"] == pytest.approx(0.3, abs=0.08)
        assert row["effect"] == pytest.approx(row["value"] - 1)
        assert row["low"] < row["effect"] < row["high"]
    assert one(found, "along", chosen=True)["value"] == pytest.approx(0.7, abs=0.05)
    assert one(found, "type_accuracy", chosen=True)["value"] == 1
    assert one(found, "remaining", condition="floor")["value"] < 0.15
    schemas.check("steering", found)


def test_a_variant_that_changes_nothing_has_no_effect_at_all(found):
    nothing = found.filter(pl.col("role") == "grid", pl.col("dose") == 0)
    assert nothing.height > 10
    assert set(nothing["effect"]) == {0.0}
    assert set(nothing["low"].drop_nulls()) == {0.0}


def test_p_is_the_rank_among_draws_in_the_metric_s_direction_and_only_where_nulls_were_drawn(found):
    chosen, reconstruction = one(found, "remaining", chosen=True), one(found, "remaining", condition="reconstruction")
    assert {chosen[null.column] for null in Null} == {1 / 5}
    # the draws leave 1, .99, .98 and .97 of the step, the reconstruction .98
    assert reconstruction["p_random_features"] == pytest.approx((1 + 2) / 5)
    others = found.filter((pl.col("role").is_in(["grid", "null", "unsteered", "floor"])) & ~pl.col("chosen"))
    assert others["p_random_features"].null_count() == others.height


def test_a_null_has_the_mean_and_the_student_interval_of_its_draws(found, stored, cells):
    row = one(found, "remaining", condition="random features")
    embedded = SteeredEmbeddings.of(stored, cells, "condition")
    test = embedded.labels.split == "test"
    shares = []
    for variant in range(10, 14):
        after, before = embedded.under(variant)[test], embedded.unsteered[test]
        parts = [(embedded.labels.cell_type[test] == kind, embedded.labels.label[test]) for kind in TYPES]
        d = [[mean_distance(x[own & (label == "stim")], before[own & (label == "ctrl")]) for own, label in parts]
             for x in (after, before)]  # fmt: skip
        shares.append(np.mean(d[0]) / np.mean(d[1]))
    assert (row["n_draws"], row["value"]) == (4, pytest.approx(np.mean(shares), rel=1e-5))
    low, high = stats.t.interval(0.95, 3, np.mean(shares) - 1, stats.sem(shares))
    assert (row["low"], row["high"]) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_the_trend_over_doses_is_page_s_over_donors_and_types(found):
    rows = found.filter(pl.col("role") == "trend")
    assert one(rows, "dose_spearman")["value"] == pytest.approx(-1)
    page = one(rows, "dose_page_p")
    assert page["n_draws"] == 6
    table = np.tile([1.0, 0.65, 0.3], (6, 1))
    assert page["value"] == pytest.approx(stats.page_trend_test(-table).pvalue)


def test_the_mean_difference_learned_on_other_donors_leaves_nearly_nothing(found):
    row = one(found, "remaining", condition="mean difference of embeddings")
    assert row["role"] == "baseline"
    assert row["value"] < 0.2


def test_cells_of_other_splits_change_no_result_but_what_is_learned_from_them(found, stored, cells, variants):
    select = cells.with_columns(split=pl.when(donor="d0").then(pl.lit("select")).otherwise("split"))
    train = select.with_columns(split=pl.when(cell_idx=0).then(pl.lit("train")).otherwise("split"))
    other = evaluate(
        MOVE, variants, SteeredEmbeddings.of(stored, train, "condition"), split="test", seed=0, n_samples=200
    )
    learned = pl.col("metric").str.contains("votes|accuracy|type")
    wanted = found.filter(~learned)
    assert other.filter(~learned).equals(wanted, null_equal=True)


def test_mixing_is_read_by_batch_and_with_its_baselines(stored, cells, variants):
    embedded = SteeredEmbeddings.of(stored, cells, "condition")
    mix = evaluate(MIX, variants, embedded, split="test", seed=0, n_samples=20)
    base = one(mix, "batch_mixing", condition="unsteered")["value"]
    assert one(mix, "batch_mixing", condition="centring")["value"] > base + 0.3
    assert one(mix, "conservation_loss", condition="unsteered")["value"] == 0
    assert set(mix.filter(metric="lobo_accuracy")["group"]) == {"all", "ctrl", "stim"}
    names = {"centring", "centring within types"} | ({"Harmony"} if embedding_baselines.has_harmony() else set())
    assert set(mix.filter(role="baseline")["condition"]) == names
    assert set(mix["metric"]) <= set(METRICS)


def test_leave_one_batch_out_is_that_of_the_measure_with_intervals_about_it(judged):
    readings = {(r.metric, r.group): r for r in MixEvaluator(judged).metrics(judged.unsteered + 0.0)}
    predicted = predict_left_out(judged.unsteered, judged.label, judged.cell_type)
    found = {"lobo_accuracy": [], "lobo_macro_f1": []}
    for batch in np.unique(judged.label):
        own = judged.label == batch
        truth, said = judged.cell_type[own], predicted[own]
        found["lobo_accuracy"].append((truth == said).mean())
        found["lobo_macro_f1"].append(f1_score(truth, said, average="macro"))
        for metric, values in found.items():
            reading = readings[metric, batch]
            assert (reading.value, reading.n_cells) == (pytest.approx(values[-1]), own.sum())
            assert len(reading.sampled) == judged.n_samples
    for metric, values in found.items():
        assert readings[metric, "all"].value == pytest.approx(np.mean(values))


def test_scib_is_asked_of_what_was_chosen_and_of_three_draws_of_a_null(stored, cells, variants, monkeypatch):
    asked = []

    def costly(self, embedding):
        asked.append(embedding)
        return []

    monkeypatch.setattr(MixEvaluator, "scib_metrics", costly)
    monkeypatch.setattr(embedding_baselines, "has_harmony", lambda: False)
    embedded = SteeredEmbeddings.of(stored, cells, "condition")
    evaluate(MIX, variants, embedded, split="test", seed=0, n_samples=5, scib=True)
    assert len(asked) == 3 + 3 * 3 + 2  # unsteered, chosen, reconstruction; three draws of three nulls; two centrings


def test_an_edit_is_judged_by_the_votes_of_train_neighbours(stored, cells, variants):
    embedded = SteeredEmbeddings.of(stored, cells, "cell_type")
    edit = evaluate(EDIT, variants[:2], embedded, split="test", seed=0, n_samples=20)
    assert one(edit, "target_votes", condition="unsteered")["value"] == 1
    assert set(edit["metric"]) == {"target_votes", "other_votes", "other_accuracy", "target_shift", "other_shift"}


@pytest.mark.parametrize(("task", "kind"), [(MOVE, "condition"), (MIX, "condition"), (EDIT, "cell_type")])
def test_every_metric_of_a_steering_run_is_in_the_registry(stored, cells, variants, task, kind):
    found = evaluate(task, variants, SteeredEmbeddings.of(stored, cells, kind), split="test", seed=0, n_samples=5)
    assert set(found["metric"]) <= set(METRICS)
    assert HEADLINE_OF_TASK[task.type] in set(found["metric"])


def test_the_p_of_other_accuracy_counts_a_fall_as_harm(stored, cells, variants, unsteered):
    """The chosen edit takes cells of another type away from theirs; its nulls do nothing."""
    other = (cells["cell_type"] == "T") & (cells["split"] == "test")
    place = pl.Series([unsteered[cells["cell_type"] == "B"].mean(0)], dtype=pl.Array(pl.Float32, WIDTH))
    is_moved = (pl.col("variant") == 1) & pl.col("cell_idx").is_in(cells.filter(other)["cell_idx"].implode())
    moved = stored.with_columns(embedding=pl.when(is_moved).then(pl.lit(place)).otherwise("embedding"))
    found = evaluate(EDIT, variants, SteeredEmbeddings.of(moved, cells, "cell_type"), split="test", seed=0, n_samples=5)
    row = one(found, "other_accuracy", chosen=True)
    assert row["effect"] < 0
    assert row["p_random_features"] == 1


def test_the_best_point_leaves_least_of_the_distance(stored, cells, variants):
    embedded = SteeredEmbeddings.of(stored, cells, "condition")
    assert choose_dose(MOVE, variants, embedded).id == 5
    assert choose_dose(MIX, variants, embedded).role == "grid"


def test_a_type_of_few_cells_is_left_out_and_a_run_without_any_has_no_distance(stored, cells, variants):
    few = cells.filter(~((pl.col("cell_type") == "B") & (pl.col("condition") == "ctrl")))
    found = evaluate(
        MOVE, variants[:2], SteeredEmbeddings.of(stored, few, "condition"), split="test", seed=0, n_samples=5
    )
    assert set(found.filter(metric="remaining")["group"]) == {"all", "NK", "T"}
    none = cells.with_columns(cell_type=pl.when(condition="stim").then(pl.lit("B")).otherwise(pl.lit("T")))
    found = evaluate(
        MOVE, variants[:2], SteeredEmbeddings.of(stored, none, "condition"), split="test", seed=0, n_samples=5
    )
    assert found.filter(metric="remaining")["value"].to_list() == [None] * found.filter(metric="remaining").height


def test_select_cells_are_judged_without_train_cells_by_distances_alone(stored, cells, variants):
    select = cells.with_columns(split=pl.lit("select"))
    found = evaluate(
        MOVE, variants[:4], SteeredEmbeddings.of(stored, select, "condition"), split="select", seed=0, n_samples=5
    )
    assert set(found["split"]) == {"select"}
    assert not found["metric"].str.contains("votes|type_").any()
    assert set(found["role"]) == {"unsteered", "grid"}


def test_scib_is_refused_where_nothing_mixes_and_where_it_is_not_installed(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"scib.*--target all"):
        check(SteerOptions, {"kind": "batch", "target": "b1", "scib": True}, "scsae steer")
    monkeypatch.setattr("pipelines.steering.metrics.scib.has_scib", lambda: False)
    options = SteerOptions(kind="batch", target="all", scib=True)
    with pytest.raises(UsageError, match=r"pip install 'scsae\[evaluate\]'"):
        SteeringRequest.of(options, Layout(tmp_path))
