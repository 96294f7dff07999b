import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from pipelines.errors import UsageError
from pipelines.steering.metrics.mixing import predict_left_out, quick_mixing


@pytest.fixture
def batches():
    """150 cells of three types in two unequal batches, which are shifted against each other by less than the types."""
    rng = np.random.default_rng(0)
    kind, batch = np.repeat(["A", "B", "C"], 50), np.array(["x", "y", "x"])[np.arange(150) % 3]
    embedding = rng.normal(size=(150, 6)) + 3.0 * np.eye(6)[np.repeat(range(3), 50)]
    return embedding + 2.0 * np.outer(batch == "y", np.eye(6)[5]), batch, kind


def test_each_batch_is_predicted_from_the_others_as_sklearn_does(batches):
    embedding, batch, kind = batches
    kind = np.roll(kind, 7)  # so that some labels are wrong and neighbours disagree
    found = predict_left_out(embedding, batch, kind)
    for name in "xy":
        own = batch == name
        predicted = KNeighborsClassifier(5).fit(embedding[~own], kind[~own]).predict(embedding[own])
        assert found[own].tolist() == predicted.tolist()
        assert (predicted != kind[own]).any()


def test_a_label_of_one_batch_alone_is_never_predicted_there(batches):
    embedding, batch, kind = batches
    alone = np.where((batch == "y") & (kind == "C"), "D", kind)
    assert "D" not in predict_left_out(embedding, batch, alone)[alone == "D"]


def test_batches_of_one_cell_are_predicted_too():
    predicted = predict_left_out(np.array([[0.0], [0.1], [5.0]]), ["x", "y", "z"], ["A", "A", "B"], k=1)
    assert predicted.tolist() == ["A", "A", "A"]


def test_leaving_out_the_only_batch_is_refused(batches):
    with pytest.raises(UsageError, match=r"\['x'\]"):
        predict_left_out(batches[0], ["x"] * 150, batches[2])
    with pytest.raises(UsageError, match="149 labels"):
        predict_left_out(*batches[:2], batches[2][:-1])


def test_mixing_is_the_share_of_foreign_neighbours_over_chance_cell_by_cell(batches):
    embedding, batch, kind = batches
    by_type = []
    for name in "ABC":
        x, b = embedding[kind == name], batch[kind == name]
        near = np.argsort(cdist(x, x) + np.diag([np.inf] * len(x)), axis=1)[:, :15]
        foreign = np.array([(b[row] != own).mean() for row, own in zip(near, b, strict=True)])
        chance = {own: (b != own).sum() / (len(b) - 1) for own in "xy"}
        by_type.append(np.mean([min(1.0, foreign[b == own].mean() / chance[own]) for own in "xy"]))
    assert quick_mixing(embedding, batch, kind).mixing == pytest.approx(np.mean(by_type))


def test_conservation_is_macro_f1_of_the_left_out_cells_neighbours(batches):
    embedding, batch, kind = batches
    near = np.argsort(cdist(embedding, embedding) + np.diag([np.inf] * 150), axis=1)[:, :15]
    votes = [max("ABC", key=[*kind[row]].count) for row in near]
    score = quick_mixing(embedding, batch, kind)
    assert score.conservation == pytest.approx(f1_score(kind, votes, average="macro"))


def test_random_batches_mix_wholly_and_distant_ones_not_at_all(batches):
    embedding, batch, kind = batches
    rng = np.random.default_rng(1)
    assert quick_mixing(rng.normal(size=(150, 6)), batch, ["A"] * 150).mixing > 0.93
    apart = quick_mixing(embedding + 100.0 * (batch == "y")[:, None], batch, kind)
    assert apart.mixing == 0.0
    assert apart.conservation > 0.8


def test_more_correction_mixes_more(batches):
    embedding, batch, kind = batches
    shift = 2.0 * np.outer(batch == "y", np.eye(6)[5])
    scores = [quick_mixing(embedding - part * shift, batch, kind).mixing for part in (0.0, 0.5, 1.0)]
    assert scores == sorted(scores)
    assert scores[2] > scores[0] + 0.2


def test_what_cannot_be_asked_is_none(batches):
    embedding, _, kind = batches
    confounded = quick_mixing(embedding, kind, kind)
    assert confounded.mixing is None
    assert confounded.conservation > 0.8
    assert quick_mixing(embedding, ["x"] * 150, ["A"] * 150) == (None, None)
    assert quick_mixing(embedding[:2], ["x", "y"], ["A", "B"]) == (None, None)
