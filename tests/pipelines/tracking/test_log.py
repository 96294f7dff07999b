"""A steering evaluation is one MLflow run with its tables and plots, on the SAE's model, however often it is logged."""

import pytest
from toy_plans import toy_plan

from feature_store.query.metrics import COMPARED_BY
from feature_store.storage.plans import SteeringPlan
from pipelines.config import SteerOptions
from pipelines.steering.mlflow_log import task_in_words


def model_metrics(registry, version, run):
    found = registry.tracking.client.get_logged_model(version.model_id).metrics
    return {m.key: m.value for m in found if m.run_id == run}


def test_the_chosen_variant_the_nulls_and_the_baselines_become_metrics_and_no_other_row(registry):
    version = registry.version("sae-a", name="a", select_fvu=0.2)
    run = registry.evaluation("eval-a", "sae-a", remaining=0.45, energy_remaining=0.4)
    metrics = registry.tracking.client.get_run(run).data.metrics
    of_remaining = {key: value for key, value in metrics.items() if key.split("/")[2] == "remaining"}
    assert of_remaining == {
        "test/chosen/remaining": 0.45,
        "test/chosen/remaining/effect": pytest.approx(-0.55),
        "test/chosen/remaining/low": pytest.approx(0.35),
        "test/chosen/remaining/high": pytest.approx(0.55),
        "test/chosen/remaining/p_random_features": 0.05,
        "select/chosen/remaining": 0.3,
        "select/chosen/remaining/effect": pytest.approx(-0.7),
        "select/chosen/remaining/low": pytest.approx(0.2),
        "select/chosen/remaining/high": pytest.approx(0.4),
        "select/chosen/remaining/p_random_features": 0.05,
        "test/unsteered/remaining": 1.0,
        "test/random features/remaining": 0.9,
        "test/Harmony/remaining": 0.4,
    }
    assert model_metrics(registry, version, run) == metrics
    assert registry.tracking.version("a", 1).metrics == {"select_fvu": 0.2}


def test_parameters_tags_tables_and_plots_are_in_the_run(registry):
    registry.version("sae-b", name="b")
    run = registry.evaluation(
        "eval-b", "sae-b", plots={"dose": lambda path: path.write_bytes(b"\x89PNG")}, remaining=0.45
    )
    logged = registry.tracking.client.get_run(run)
    assert {
        "grid": "[[20, 1.0], [50, 1.5]]",
        "config.seed": "3",
        "toward": "ctrl",
        "chosen.dose": "1.5",
    }.items() <= logged.data.params.items()
    assert logged.data.tags["scsae.sae"] == "sae-b"
    assert logged.data.tags["scsae.question"] == "stim -> ctrl"
    assert logged.data.tags["scsae.version"]
    files = [file.path for file in registry.tracking.client.list_artifacts(run)]
    assert files == ["plots", "results.csv", "variants.json"]
    assert [file.path for file in registry.tracking.client.list_artifacts(run, "plots")] == ["plots/dose.png"]
    assert not list(registry.layout.steering_dir("eval-b").iterdir())


def test_logging_again_logs_and_draws_nothing(registry):
    registry.version("sae-c", name="c")
    first = registry.evaluation("eval-c", "sae-c", remaining=0.45)
    again = registry.evaluation("eval-c", "sae-c", plots={"dose": lambda path: 1 / 0}, remaining=0.45)
    assert again == first
    assert len(registry.tracking.logged("eval-c")) == 1


def test_a_kill_before_the_end_of_the_log_is_healed_by_the_next_call_without_a_second_run(registry):
    version = registry.version("sae-d", name="d")
    first = registry.evaluation("eval-d", "sae-d", remaining=0.45)
    registry.tracking.client.update_run(first, status="RUNNING")
    assert registry.evaluation("eval-d", "sae-d", remaining=0.45) == first
    assert [run.info.status for run in registry.tracking.logged("eval-d")] == ["FINISHED"]
    found = registry.tracking.client.get_logged_model(version.model_id).metrics
    assert [m.value for m in found if m.key == "test/chosen/remaining"] == [0.45]


def test_a_plot_that_fails_costs_itself_alone_and_is_said_once(registry, capsys):
    version = registry.version("sae-e", name="e")
    plots = {
        "dose": lambda path: 1 / 0,
        "map": lambda path: path.write_bytes(b"\x89PNG"),
        "bars": lambda path: path.write_bytes(b"half") / 0,
    }
    run = registry.evaluation("eval-e", "sae-e", plots=plots, remaining=0.45)
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("warning: steering/eval-e is logged without some of its plots (dose: ZeroDivisionError(")
    assert "; bars: ZeroDivisionError(" in said
    assert said.endswith("draw them with `scsae plot steering-all --steering eval-e --save plots`")
    client = registry.tracking.client
    assert [file.path for file in client.list_artifacts(run)] == ["plots", "results.csv", "variants.json"]
    assert [file.path for file in client.list_artifacts(run, "plots")] == ["plots/map.png"]
    assert model_metrics(registry, version, run)["test/chosen/remaining"] == 0.45
    assert registry.evaluation("eval-e", "sae-e", plots=plots, remaining=0.45) == run
    assert capsys.readouterr().err == ""
    assert len(registry.tracking.logged("eval-e")) == len(registry.tracking.evaluations("sae-e")) == 1


def test_an_interrupt_while_plots_are_drawn_leaves_a_log_that_the_next_call_completes(registry):
    def interrupted(path):
        raise KeyboardInterrupt

    registry.version("sae-h", name="h")
    with pytest.raises(KeyboardInterrupt):
        registry.evaluation("eval-h", "sae-h", plots={"dose": interrupted}, remaining=0.45)
    assert registry.tracking.evaluations("sae-h") == []
    registry.evaluation("eval-h", "sae-h", remaining=0.45)
    assert len(registry.tracking.logged("eval-h")) == len(registry.tracking.evaluations("sae-h")) == 1


def test_an_evaluation_logged_before_its_sae_was_registered_is_attached_by_the_next_call(registry):
    run = registry.evaluation("eval-f", "sae-f", remaining=0.45)
    version = registry.version("sae-f", name="f")
    assert registry.evaluation("eval-f", "sae-f", remaining=0.45) == run
    assert model_metrics(registry, version, run)["test/chosen/remaining"] == 0.45


def test_headlines_are_of_the_chosen_variant_on_all_test_cells(registry):
    registry.version("sae-g", name="g")
    registry.evaluation("eval-g", "sae-g", **dict.fromkeys(COMPARED_BY, 0.5), page_p=0.01)
    (found,) = registry.tracking.evaluations("sae-g")
    assert found.headlines == dict.fromkeys(COMPARED_BY, 0.5)
    assert found.label("remaining") == "remaining (stim -> ctrl, data)"


@pytest.mark.parametrize(
    ("plan", "question"),
    [
        ({"target": "stim", "toward": "ctrl"}, "stim -> ctrl"),
        ({"target": "all", "kind": "batch"}, "mix batch"),
        ({"target": "B cells", "toward": None, "intervention": "ablate"}, "ablate cell_type B cells"),
        ({"target": "stim", "toward": "ctrl", "readout": "cls"}, "stim -> ctrl, readout cls"),
        ({"target": "stim", "toward": "ctrl", "gene": ["ISG15", "MX1"]}, "stim -> ctrl, gene ISG15, MX1"),
    ],
)
def test_a_question_names_what_is_asked_and_what_is_unusual(plan, question):
    usual = {"kind": "cell_type", "readout": "mean", "max_cells": SteerOptions.model_fields["max_cells"].default}
    assert task_in_words(toy_plan(SteeringPlan, **{**usual, **plan})) == question
