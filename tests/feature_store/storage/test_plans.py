"""A run id is made of everything in the plan: another value of any field, of any configuration, is another run."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from toy_plans import toy_plan

from feature_store.associations import AssociationConfig
from feature_store.errors import IntegrityError, OutdatedRunError
from feature_store.storage import commit, plans
from feature_store.storage.plans import (
    ActivationsPlan,
    AssociationsPlan,
    BaselineFit,
    CellsPlan,
    CodesPlan,
    FusedForward,
    GeneChoice,
    GeneSetFile,
    ImportedSAE,
    Plan,
    SAEPlan,
    SteeringPlan,
    as_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def records() -> list[type[Plan]]:
    """Every plan of a stage."""
    found = [one for one in vars(plans).values() if isinstance(one, type) and issubclass(one, Plan)]
    return [one for one in found if one is not Plan]


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if is_dataclass(value) and not isinstance(value, type):
        first = fields(value)[0].name
        return replace(value, **{first: other(getattr(value, first))})
    if value is None:
        return "something"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return {**value, "key": 1} if isinstance(value, dict) else (*value, 1)


def variants(record: Any) -> Iterator[tuple[str, Any]]:
    """The record with each of its fields, and of those of the records in it, changed, by the field's name."""
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            for name, changed in variants(value):
                yield f"{field.name}.{name}", replace(record, **{field.name: changed})
        else:
            yield field.name, replace(record, **{field.name: other(value)})


def filled(record: type[Plan]) -> Plan:
    """A plan with a record wherever one may be."""
    parts = {
        "fused": toy_plan(FusedForward),  # type: ignore[type-var]
        "genes": toy_plan(GeneChoice),  # type: ignore[type-var]
        "gene_sets": (GeneSetFile(collection="one", sha256="1"),),
    }
    names = {field.name for field in fields(record)}
    return toy_plan(record, **{name: value for name, value in parts.items() if name in names})


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_every_field_of_a_plan_changes_the_id(record: type[Plan]) -> None:
    plan = filled(record)
    ids = {name: changed.id for name, changed in variants(plan)}
    assert len(ids) >= len(fields(plan))
    assert len({plan.id, *ids.values()}) == len(ids) + 1


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_the_version_of_a_stage_changes_the_ids_of_that_stage_alone(
    record: type[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {one: filled(one).id for one in records()}
    monkeypatch.setattr(record, "version", record.version + 1)
    changed = {one for one in records() if filled(one).id != before[one]}
    assert changed == {one for one in records() if issubclass(one, record)}


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_a_plan_is_read_as_it_was_written(record: type[Plan], tmp_path: Path) -> None:
    plan = filled(record)
    bounds = {} if "bounds" in {field.name for field in fields(record)} else {"bounds": [0, 1]}
    run = commit.Run.create(tmp_path / "run", plan.table("toy", n_shards=3, **bounds))
    assert record.of(commit.Run.open(run.path)) == plan


def test_a_plan_with_a_value_of_another_type_is_refused() -> None:
    content = toy_plan(AssociationsPlan).to_json()
    with pytest.raises(IntegrityError, match=r"here.*associations"):
        AssociationsPlan.read({**content, "gene_sets": 1}, where="here")
    with pytest.raises(IntegrityError, match="here"):
        CellsPlan.read({**toy_plan(CellsPlan).to_json(), "split": {"seed": 1}}, where="here")


def test_every_field_of_the_configuration_of_associations_changes_the_id() -> None:
    plan = toy_plan(AssociationsPlan, config=as_json(AssociationConfig()))
    ids = [replace(plan, config=as_json(config)).id for _, config in changed_configs(AssociationConfig())]
    assert len({plan.id, *ids}) == len(ids) + 1
    assert len(ids) > len(fields(AssociationConfig))


def changed_configs(config: Any) -> Iterator[tuple[str, Any]]:
    """The configuration with each field changed, without its own checks."""
    for field in fields(config):
        value = getattr(config, field.name)
        nested = changed_configs(value) if is_dataclass(value) else [("", other(value))]
        for name, changed in nested:
            copy = object.__new__(type(config))
            for each in fields(config):
                object.__setattr__(copy, each.name, changed if each.name == field.name else getattr(config, each.name))
            yield f"{field.name}.{name}", copy


def test_the_id_of_a_baseline_leaves_out_the_configuration_that_its_fit_gives_it() -> None:
    fit = BaselineFit(kind="pca", d_model=8, k=2, n_features=None, fit_tokens=100, seed=3)
    before = toy_plan(SAEPlan, control_of="pca", baseline=fit)
    after = replace(before, sae={"arch": "batchtopk", "d_model": 8, "n_features": 16, "k": 2})
    assert before.id == after.id
    assert replace(after, baseline=replace(fit, k=3)).id != after.id
    assert (after.n_features, after.k, after.d_model, after.arch, after.seed) == (16, 2, 8, "batchtopk", 3)


def test_the_id_of_an_imported_sae_leaves_out_the_k_that_is_measured() -> None:
    source = ImportedSAE(format="saelens", sha256="ab", input_scale=None, model="m", site="layer.2", seed=3)
    before = toy_plan(SAEPlan, imported=source)
    after = replace(before, sae={"arch": "jumprelu", "d_model": 8, "n_features": 16, "k": 2})
    assert before.id == after.id
    assert (after.seed, after.k) == (3, 2)
    ids = {replace(after, imported=changed).id for _, changed in variants(source)}
    assert len({after.id, *ids}) == len(fields(source)) + 1


def test_a_trained_sae_has_the_seed_of_its_training() -> None:
    assert toy_plan(SAEPlan, train={"seed": 7}).seed == 7


def test_shards_follow_from_the_cells() -> None:
    assert toy_plan(ActivationsPlan, n_cells=10, shard_cells=4).n_shards == 3


def test_a_plan_of_another_stage_or_with_a_field_missing_is_refused(tmp_path: Path) -> None:
    content = toy_plan(CodesPlan).table("by_cell")
    with pytest.raises(IntegrityError, match=r"'codes'.*'sae'"):
        SAEPlan.read(content, where="here")
    with pytest.raises(IntegrityError, match=r"here.*pooling"):
        CodesPlan.read({key: value for key, value in content.items() if key != "pooling"}, where="here")


def test_a_plan_of_another_version_is_refused_as_outdated_with_both_versions() -> None:
    content = toy_plan(SteeringPlan).to_json()
    with pytest.raises(OutdatedRunError, match=rf"version 99 .*{SteeringPlan.version}"):
        SteeringPlan.read({**content, "version": 99}, where="here")


def test_plans_of_two_stages_have_different_ids() -> None:
    stages = {record.stage: filled(record).id for record in records()}
    assert len(set(stages.values())) == len(stages)


def test_the_difference_of_two_plans_is_named_down_to_the_entry(tmp_path: Path) -> None:
    from feature_store.errors import PlanMismatchError

    plan = toy_plan(AssociationsPlan, config={"alpha": 0.05, "classes": {"n_bootstrap": 5}})
    commit.Run.create(tmp_path, plan.table("features"))
    changed = replace(plan, config={"alpha": 0.05, "classes": {"n_bootstrap": 6}})
    with pytest.raises(PlanMismatchError, match=r"config\.classes\.n_bootstrap: 5 .*6") as caught:
        commit.Run.create(tmp_path, changed.table("features"))
    assert "alpha" not in str(caught.value)


def test_every_split_is_part_of_the_plan_of_the_cells() -> None:
    assert {field.name for field in fields(plans.SplitPlan)} >= {"seed", "fractions", "unit"}
    assert "split" in {field.name for field in fields(CellsPlan)}
