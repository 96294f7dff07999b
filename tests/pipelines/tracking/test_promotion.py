"""The champion moves by one metric of test cells that must not be worse, and by no other in its place."""

import pytest

from pipelines.errors import UsageError
from pipelines.tracking import promote


@pytest.fixture
def two(registry, request):
    """Register a champion and a candidate under the test's own name, with these figures and evaluations."""
    name = request.node.name.replace("[", "-").strip("]")

    def make(champion, candidate, **evaluations):
        for number, metrics in enumerate((champion, candidate), start=1):
            dataset = metrics.get("dataset", "data")
            figures = {key: value for key, value in metrics.items() if key.endswith("fvu")}
            registry.version(f"{name}-{number}", name=name, dataset=dataset, **figures)
            headlines = {key: value for key, value in metrics.items() if key not in figures and key != "dataset"}
            if headlines:
                registry.evaluation(f"eval-{name}-{number}", f"{name}-{number}", dataset=dataset, **headlines)
        return name

    return make


def champion_of(registry, name):
    return registry.tracking.champion(name).version


def test_the_first_headline_that_both_have_decides_whatever_the_fvu(registry, two):
    name = two(
        {"select_fvu": 0.1, "test_fvu": 0.1, "remaining": 0.5, "energy_remaining": 0.1},
        {"select_fvu": 0.2, "test_fvu": 0.2, "remaining": 0.4, "energy_remaining": 0.2},
    )
    done = promote(registry.tracking, name, 2)
    assert (done.metric, done.value, done.value_of_champion) == ("remaining (stim -> ctrl, data)", 0.4, 0.5)
    assert (done.over, done.version.aliases, done.note) == (1, ("champion",), None)
    assert champion_of(registry, name) == 2


def test_a_worse_version_is_refused_with_both_values(registry, two):
    name = two({"test_fvu": 0.9, "remaining": 0.4}, {"test_fvu": 0.1, "remaining": 0.41})
    with pytest.raises(UsageError, match=r"remaining \(stim -> ctrl, data\) 0\.41.* 0\.4;"):
        promote(registry.tracking, name, 2)
    assert champion_of(registry, name) == 1


def test_an_equal_version_is_promoted(registry, two):
    name = two({"remaining": 0.4}, {"remaining": 0.4})
    assert promote(registry.tracking, name, 2).over == 1


@pytest.mark.parametrize(("metric", "better"), [("scib_total", 0.7), ("lobo_accuracy", 0.7), ("remaining", 0.5)])
def test_each_headline_has_its_own_direction(registry, two, metric, better):
    name = two({metric: 0.6}, {metric: better})
    assert promote(registry.tracking, name, 2, metric=metric).value == better
    with pytest.raises(UsageError, match="higher is better" if better > 0.6 else "lower is better"):
        promote(registry.tracking, name, 1, metric=metric)


@pytest.mark.parametrize(
    ("intervention", "dose", "upwards"), [("ablate", 1.0, False), ("clamp", 2.0, True), ("scale", 0.5, False)]
)
def test_votes_for_the_target_are_good_in_the_direction_of_the_edit(registry, intervention, dose, upwards):
    name = f"{intervention}-votes"
    plan = {"kind": "cell_type", "target": "B", "toward": None, "intervention": intervention, "dose": dose}
    for number, votes in enumerate((0.2, 0.6), start=1):
        registry.version(f"{name}-{number}", name=name)
        registry.evaluation(f"eval-{name}-{number}", f"{name}-{number}", plan=plan, target_votes=votes)
    if upwards:
        assert promote(registry.tracking, name, 2).metric == f"target_votes ({intervention} cell_type B, data)"
    else:
        with pytest.raises(UsageError, match="lower is better"):
            promote(registry.tracking, name, 2)


def test_without_a_common_evaluation_the_test_fvu_decides_and_it_is_said(registry, two):
    name = two({"select_fvu": 0.1, "test_fvu": 0.3}, {"select_fvu": 0.2, "test_fvu": 0.2, "remaining": 0.4})
    done = promote(registry.tracking, name, 2)
    assert (done.metric, done.note) == ("test_fvu", "they have no steering evaluation in common")


def test_where_neither_has_a_figure_of_test_cells_the_select_fvu_decides_with_a_note(registry, two):
    name = two({"select_fvu": 0.2}, {"select_fvu": 0.1})
    done = promote(registry.tracking, name, 2)
    assert done.metric == "select_fvu"
    assert "select cells" in done.note


@pytest.mark.parametrize(("champion", "candidate"), [({"test_fvu": 0.2}, {}), ({}, {"test_fvu": 0.2})])
def test_a_version_without_test_fvu_is_not_compared_by_another_metric_unless_it_is_named(
    registry, two, champion, candidate
):
    name = two({"select_fvu": 0.2, **champion}, {"select_fvu": 0.1, **candidate})
    with pytest.raises(UsageError) as refused:
        promote(registry.tracking, name, 2)
    with_both, without = "select_fvu, test_fvu", "select_fvu"
    listed = {1: with_both if champion else without, 2: with_both if candidate else without}
    for version, metrics in listed.items():
        assert f"version {version} has " in str(refused.value)
        assert set(metrics.split(", ")) == set(
            str(refused.value).split(f"version {version} has ")[1].split(";")[0].split(", ")
        )
    assert "--metric, one of: select_fvu;" in str(refused.value)
    assert champion_of(registry, name) == 1
    assert promote(registry.tracking, name, 2, metric="select_fvu").metric == "select_fvu"


def test_the_reason_why_a_version_has_no_test_fvu_is_given(registry, request):
    name = request.node.name
    registry.version(f"{name}-1", name=name, missing={"test_fvu": "part-00003 is damaged"}, select_fvu=0.2)
    registry.version(f"{name}-2", name=name, select_fvu=0.1, test_fvu=0.1)
    with pytest.raises(UsageError, match=r"version 1 has select_fvu .*part-00003 is damaged"):
        promote(registry.tracking, name, 2)
    with pytest.raises(UsageError, match="part-00003 is damaged"):
        promote(registry.tracking, name, 2, metric="test_fvu")


def test_a_shared_evaluation_without_a_shared_metric_is_no_reason_to_compare_by_the_training(registry, two):
    name = two({"test_fvu": 0.3, "remaining": 0.2}, {"test_fvu": 0.2, "energy_remaining": 0.2})
    with pytest.raises(UsageError, match=r"by remaining \(stim -> ctrl, data\).*--metric, one of: test_fvu"):
        promote(registry.tracking, name, 2)
    assert promote(registry.tracking, name, 2, metric="test_fvu").value == 0.2


def test_an_edit_that_strengthens_is_not_compared_with_one_that_weakens(registry, request):
    name = request.node.name
    plan = {"kind": "cell_type", "target": "B", "toward": None, "intervention": "scale"}
    for number, dose in enumerate((0.5, 2.0), start=1):
        registry.version(f"{name}-{number}", name=name)
        registry.evaluation(f"eval-{name}-{number}", f"{name}-{number}", plan={**plan, "dose": dose}, target_votes=0.5)
    with pytest.raises(UsageError, match=r"target_votes .*--metric.*--dose"):
        promote(registry.tracking, name, 2)
    assert champion_of(registry, name) == 1


def test_evaluations_of_other_questions_are_not_in_common(registry, two):
    name = two({"test_fvu": 0.3, "remaining": 0.2}, {"test_fvu": 0.2})
    registry.evaluation(f"other-{name}", f"{name}-2", plan={"target": "ctrl", "toward": "stim"}, remaining=0.9)
    assert promote(registry.tracking, name, 2).metric == "test_fvu"


def test_several_questions_in_common_have_to_be_told_apart(registry, two):
    name = two({"remaining": 0.2}, {"remaining": 0.3})
    for number, value in ((1, 0.9), (2, 0.8)):
        back = {"target": "ctrl", "toward": "stim"}
        registry.evaluation(f"back-{name}-{number}", f"{name}-{number}", plan=back, remaining=value)
    for metric in (None, "remaining"):
        with pytest.raises(UsageError, match=r"ctrl -> stim, data\).*stim -> ctrl, data\)"):
            promote(registry.tracking, name, 2, metric=metric)
    assert promote(registry.tracking, name, 2, metric="remaining (ctrl -> stim, data)").value == 0.8


def test_a_candidate_that_lacks_the_figure_gets_the_command_that_measures_it(registry, two):
    name = two({"remaining": 0.2, "test_fvu": 0.1}, {"test_fvu": 0.1})
    command = r"--kind 'condition' --target 'stim' --toward 'ctrl' --store"
    with pytest.raises(UsageError, match=rf"version 2 .*remaining.*scsae steer {command}"):
        promote(registry.tracking, name, 2, metric="remaining")
    with pytest.raises(UsageError, match=r"version 2 .*scib_total.*scsae steer"):
        promote(registry.tracking, name, 2, metric="scib_total")


def test_a_champion_that_lacks_the_figure_has_to_be_measured_first(registry, two):
    name = two({"test_fvu": 0.1}, {"remaining": 0.2, "test_fvu": 0.1})
    with pytest.raises(UsageError, match=r"version 1 .*remaining.*scsae steer"):
        promote(registry.tracking, name, 2, metric="remaining")


def test_figures_of_two_data_sets_are_not_compared(registry, two):
    name = two({"test_fvu": 0.3}, {"test_fvu": 0.2, "dataset": "other"})
    with pytest.raises(UsageError, match=r"test_fvu.*version 2.* other.*version 1.* data"):
        promote(registry.tracking, name, 2)


def test_an_unknown_figure_is_refused_with_those_there_are(registry, two):
    name = two({"test_fvu": 0.3}, {"test_fvu": 0.2})
    with pytest.raises(UsageError, match=r"'accuracy'.*remaining, .*test_fvu, select_fvu"):
        promote(registry.tracking, name, 2, metric="accuracy")


def test_where_there_is_no_champion_any_version_becomes_it(registry, two):
    name = two({"test_fvu": 0.1}, {"test_fvu": 0.2})
    registry.tracking.client.delete_registered_model_alias(name, "champion")
    assert promote(registry.tracking, name, 2).note == "there was no champion to compare it with"
    assert promote(registry.tracking, name, 2).note == "it is the champion already"
    assert champion_of(registry, name) == 2
