"""The constants that results depend on are part of the plan: another value is another run."""

import importlib
import pkgutil
from dataclasses import replace

import pytest
from toy_plans import toy_plan

from feature_store.storage.plans import SAEPlan, SteeringPlan, as_json
from pipelines import steering, training_loop
from pipelines.steering import metrics
from pipelines.steering.constants import MODULES, result_constants

MODULE_OF = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def test_the_constants_that_decide_what_is_chosen_and_tested_are_among_them():
    known = {
        "dose_selection.MAX_LOSS",
        "evaluators.MIN_CELLS",
        "feature_selection.MIN_CELLS",
        "group_means.PRIOR_TOKENS",
        "knn.N_NEIGHBORS",
        "scib.WEIGHTS",
        "token_sample.SAMPLE_CELLS",
        "type_preservation.MIN_CELLS",
    }
    assert known <= result_constants().keys()


OUTSIDE = {"context", "kinds", "report", "run", "seeds", "shards"}
"""context: the tokens of a block bound its memory; kinds: its dose is in the grid; report, run: how many draws allow a
p of .05 is said and changes nothing; seeds: of finished runs; shards: `SteeringRun` adds its constant.
"""


def test_every_module_of_steering_with_numbers_in_capitals_is_among_them():
    found = set()
    for package in (steering, metrics):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            names = vars(importlib.import_module(module.name)).items()
            if any(
                name.isupper() and not name.startswith("_") and type(value) in (int, float) for name, value in names
            ):
                found.add(module.name.rpartition(".")[2])
    assert found - OUTSIDE <= MODULE_OF.keys()


@pytest.mark.parametrize("name", sorted(result_constants()))
def test_another_value_of_a_constant_of_steering_is_another_run(name, monkeypatch):
    plan = toy_plan(SteeringPlan, config=as_json(result_constants()))
    module, constant = name.split(".")
    value = getattr(MODULE_OF[module], constant)
    monkeypatch.setattr(MODULE_OF[module], constant, (*value, 1) if isinstance(value, tuple) else value + 1)
    assert replace(plan, config=as_json(result_constants())).id != plan.id


@pytest.mark.parametrize("name", ["REPORT_STEPS", "HELD_OUT_TOKENS", "NORMALISER_TOKENS", "EVALUATED_SPLITS"])
def test_another_value_of_a_constant_of_training_is_another_run(name, monkeypatch):
    plan = toy_plan(SAEPlan, evaluation=as_json(training_loop.evaluation_constants()))
    value = getattr(training_loop, name)
    monkeypatch.setattr(training_loop, name, (*value, "x") if isinstance(value, tuple) else value + 1)
    assert replace(plan, evaluation=as_json(training_loop.evaluation_constants())).id != plan.id
