"""One registry says which way each metric is good, and nobody else does."""

import re
from pathlib import Path

import pytest

from feature_store.query import metrics
from feature_store.query.metrics import COMPARED_BY, COMPARED_BY_TRAINING, HEADLINES, METRICS, Direction, metric_of
from feature_store.query.steering import Role

ROOT = Path(__file__).parents[3]
A_DIRECTION = re.compile(r"higher_is_better|lower_is_better|[\"'](higher|lower)[\"']")


def test_no_other_module_holds_a_direction():
    home = Path(metrics.__file__)
    files = [
        path for room in ("scsae", "sae_core", "feature_store", "pipelines") for path in (ROOT / room).rglob("*.py")
    ]
    assert home in files
    assert [str(path) for path in files if path != home and A_DIRECTION.search(path.read_text())] == []


def test_every_record_is_whole_and_listed_by_its_name():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.description
        assert metric.source
        assert metric.low is None or metric.high is None or metric.low < metric.high
        assert metric.better in {Direction.HIGHER: ("higher",), Direction.LOWER: ("lower",)}.get(
            metric.direction, (None,)
        )


def test_versions_are_compared_by_listed_metrics_that_have_a_direction():
    for name in (*COMPARED_BY, *COMPARED_BY_TRAINING):
        assert METRICS[name].direction is not Direction.NEITHER
    assert set(HEADLINES) <= set(COMPARED_BY)


def test_an_edit_must_leave_the_accuracy_of_the_other_cells_high():
    assert metric_of("other_accuracy").direction is Direction.HIGHER


@pytest.mark.parametrize(
    ("intervention", "dose", "direction"),
    [
        ("ablate", None, Direction.LOWER),
        ("ablate", 1.0, Direction.LOWER),
        ("clamp", 2.0, Direction.HIGHER),
        ("clamp", 0.0, Direction.LOWER),
        ("scale", 0.5, Direction.LOWER),
        ("scale", 2.0, Direction.HIGHER),
        ("add", -1.0, Direction.LOWER),
        (None, 1.0, Direction.LOWER),
    ],
)
def test_the_votes_for_a_target_are_good_in_the_direction_of_the_edit(intervention, dose, direction):
    assert metric_of("target_votes").direction.under(intervention, dose) is direction
    assert metric_of("other_accuracy").direction.under(intervention, dose) is Direction.HIGHER


def test_a_metric_that_is_not_listed_has_no_direction():
    assert metric_of("some_new_figure").direction is Direction.NEITHER
    assert metric_of("some_new_figure").description == "some new figure"


def test_the_page_of_metrics_says_of_every_metric_and_role_of_steering_what_it_is() -> None:
    page = (Path(__file__).parents[3] / "docs" / "steering-metrics.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    listed = {name.strip("`"): rest for name, *rest in rows}
    of_training = {
        name for name, metric in METRICS.items() if metric.source.startswith(("sae_core.", "pipelines.loss_recovered"))
    }
    wanted = {name: metric for name, metric in METRICS.items() if name not in of_training}
    assert listed.keys() == wanted.keys() | {role.value for role in Role}
    for name, metric in wanted.items():
        what, better, source = listed[name]
        assert what == metric.description + (f" (in {metric.unit})" if metric.unit else "")
        is_module = metric.source.startswith("pipelines.")
        where = f"`{metric.source.replace('.', '/')}.py`" if is_module else metric.source
        assert (better, source) == (metric.direction.value, where)
