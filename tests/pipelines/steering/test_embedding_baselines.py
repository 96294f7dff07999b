import logging
from importlib.util import find_spec

import numpy as np
import pytest

from pipelines.errors import UsageError
from pipelines.steering.embedding_baselines import MeanDifference, centre, centre_within, harmony

needs_harmony = pytest.mark.skipif(
    find_spec("harmonypy") is None, reason="harmonypy is not installed: pip install 'scsae[evaluate]'"
)


@pytest.fixture
def batches():
    """120 cells of two types in two batches, shifted by 5 in the first number; type A is rarer in the second batch."""
    rng = np.random.default_rng(0)
    batch = np.repeat(["x", "y"], 60)
    kind = np.where(np.arange(120) % 60 < np.where(batch == "x", 30, 15), "A", "B")
    embedding = rng.normal(size=(120, 4)) + 5.0 * np.outer(batch == "y", np.eye(4)[0])
    return embedding + 8.0 * np.outer(kind == "A", np.eye(4)[1]), batch, kind


def test_centring_moves_every_batch_to_the_mean_of_all(batches):
    embedding, batch, _ = batches
    out = centre(embedding, batch)
    for name in "xy":
        np.testing.assert_allclose(out[batch == name].mean(0), embedding.mean(0))
        np.testing.assert_allclose(out[batch == name].std(0), embedding[batch == name].std(0))


def test_centring_within_types_moves_every_batch_of_a_type_to_the_types_mean(batches):
    embedding, batch, kind = batches
    out = centre_within(embedding, batch, kind)
    for name, own in ((b, k) for b in "xy" for k in "AB"):
        np.testing.assert_allclose(out[(batch == name) & (kind == own)].mean(0), embedding[kind == own].mean(0))


def test_centring_mistakes_unequal_types_for_a_batch_effect_and_within_types_does_not(batches):
    embedding, batch, kind = batches

    def gap(out):
        return out[(batch == "x") & (kind == "A"), 1].mean() - out[(batch == "y") & (kind == "A"), 1].mean()

    assert abs(gap(centre(embedding, batch))) > 1.5
    assert abs(gap(centre_within(embedding, batch, kind))) < 1e-9


@needs_harmony
def test_harmony_brings_batches_together_and_leaves_types_apart(batches):
    embedding, batch, kind = batches
    out = harmony(embedding, batch, seed=1)
    means = {(b, k): out[(batch == b) & (kind == k)].mean(0) for b in "xy" for k in "AB"}
    assert np.linalg.norm(means["x", "A"] - means["y", "A"]) < 1.5
    assert np.linalg.norm(means["x", "A"] - means["x", "B"]) > 5


@needs_harmony
def test_harmony_is_seeded_and_quiet(batches, caplog, capfd):
    embedding, batch, _ = batches
    with caplog.at_level(logging.DEBUG):
        first = harmony(embedding, batch, seed=1)
    np.testing.assert_array_equal(first, harmony(embedding, batch, seed=1))
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


@needs_harmony
def test_harmony_keeps_rows_as_cells_where_there_are_as_many_numbers(batches):
    square = np.random.default_rng(0).normal(size=(40, 40)) + 3.0 * (np.arange(40) % 2)[:, None]
    out = harmony(square, np.array(["x", "y"])[np.arange(40) % 2])
    assert np.linalg.norm(out[::2].mean(0) - out[1::2].mean(0)) < np.linalg.norm(
        square[::2].mean(0) - square[1::2].mean(0)
    )


@needs_harmony
def test_few_cells_and_one_batch_are_answered():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(10, 3))
    assert np.isfinite(harmony(few, ["x", "y"] * 5)).all()
    np.testing.assert_array_equal(harmony(few, ["x"] * 10), few)
    with pytest.raises(UsageError, match=r"4.*6"):
        harmony(few[:4], ["x", "y"] * 2)


def test_without_harmonypy_the_extra_is_named(batches, monkeypatch):
    monkeypatch.setattr("pipelines.steering.embedding_baselines.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'scsae\[evaluate\]'"):
        harmony(batches[0], batches[1])


def test_mean_difference_is_learned_on_reference_and_added_to_target_cells_of_its_group():
    reference = np.array([[0.0, 0], [2, 0], [1, 4], [1, 6], [9, 9]])
    state = np.array(["s", "s", "c", "c", "s"])
    vectors = MeanDifference(reference, state == "s", state == "c", [*"AAAAB"])
    cells = np.ones((3, 2))
    out = vectors.applied(cells, np.array([True, False, True]), [*"AAB"], amount=2.0)
    np.testing.assert_array_equal(out, [[1, 11], [1, 1], [1, 1]])
    assert list(vectors.vectors) == ["A"]
    np.testing.assert_array_equal(cells, 1.0)


def test_the_mean_difference_of_other_groups_is_learned_without_the_group_s_own_cells():
    reference = np.array([[0.0, 0], [0, 0], [2, 2], [2, 2], [0, 0], [0, 8], [9, 9]])
    state = np.array(["s", "s", "c", "c", "s", "c", "s"])
    vectors = MeanDifference(reference, state == "s", state == "c", [*"AAAABBC"], of_other_groups=True)
    out = vectors.applied(np.zeros((4, 2)), np.array([True, True, True, False]), [*"ABCC"])
    # A has two cells on either side, and B one; C has no vector of its own
    np.testing.assert_allclose(out, [[0, 8], [2, 2], [4 / 3, 4], [0, 0]])
    alone = MeanDifference(reference, state == "s", state == "c", [*"AAAAAAA"], of_other_groups=True)
    np.testing.assert_array_equal(alone.applied(np.zeros((1, 2)), np.array([True]), ["A"]), [[0, 0]])
