"""The door: what `import scsae` offers, used as in a notebook on the tiny cells."""

import inspect

import pytest

import scsae
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    ExtractOptions,
    SteerOptions,
    TrainOptions,
)
from pipelines.errors import UsageError

STAGES = {
    "extract": ExtractOptions,
    "train": TrainOptions,
    "encode": EncodeOptions,
    "associate": AssociateOptions,
    "baseline": BaselineOptions,
    "steer": SteerOptions,
}


def test_the_whole_job_runs_through_the_door(tiny_data, tiny_model, tmp_path, without_actors):
    store = tmp_path / "store"
    columns = {"donor": "donor", "batch": "batch", "cell_type": "type"}
    (extracted,) = scsae.extract(tiny_data, model=str(tiny_model), layer=1, dtype="f32", store=store, **columns)
    (trained,) = scsae.train(n_features=48, k=4, n_steps=60, batch_size=128, num_workers=0, store=store)
    encoded = scsae.encode(store=store)
    associated = scsae.associate(store=str(store))[-1]
    assert [result.kind for result in (extracted, trained, encoded, associated)] == [
        *("activations", "saes", "codes", "associations")
    ]
    opened = scsae.open(store)
    assert isinstance(opened, scsae.FeatureStore)
    assert opened.lineage.associations == associated.run
    found = opened.features_for(label="A")
    assert found["select_auroc"].is_sorted(descending=True)
    assert found.height == 48
    assert scsae.open(store, codes=encoded.run).lineage.codes == encoded.run
    assert scsae.load_sae(trained.path).config.n_features == 48
    assert scsae.load_model(tiny_model).d_model == 16
    assert scsae.plots.dotplot(opened, [0, 1], show=False) is not None


def test_the_cells_are_looked_at_without_writing(tiny_data, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = scsae.inspect(tiny_data, model=str(tiny_model))
    assert facts["genes matched"] == "28 of 30 (93%)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(scsae.__all__))
def test_every_name_has_a_docstring_with_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(scsae, name))


def test_the_names_offered_are_those_listed():
    assert dir(scsae) == sorted(scsae.__all__)
    with pytest.raises(AttributeError, match="features_for"):
        _ = scsae.features_for


@pytest.mark.parametrize(("name", "cls"), STAGES.items())
def test_a_stage_takes_every_option_of_its_command_with_the_default_of_its_command(name, cls):
    parameters = inspect.signature(getattr(scsae, name)).parameters
    assert set(parameters) == {*cls.model_fields, "store", "address"}
    for field, info in cls.model_fields.items():
        expected = inspect.Parameter.empty if info.is_required() else info.default
        assert parameters[field].default == expected, field


@pytest.mark.parametrize(("name", "cls"), STAGES.items())
def test_the_help_of_a_stage_holds_what_every_option_means(name, cls):
    words = " ".join(inspect.getdoc(getattr(scsae, name)).split()).replace("- ", "-")
    for field, info in cls.model_fields.items():
        assert f"{field}: {' '.join(info.description.split())}".replace("- ", "-") in words


def test_an_unknown_option_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"'n_feature'.*'n_features'"):
        scsae.train(n_feature=3)


def test_a_value_that_is_not_allowed_is_named():
    with pytest.raises(UsageError, match=r"scsae\.train: k was 0"):
        scsae.train(k=0)


def test_an_option_without_a_name_is_refused():
    with pytest.raises(TypeError, match="32"):
        scsae.train(32)
    with pytest.raises(TypeError, match="'data'"):
        scsae.extract()
    with pytest.raises(TypeError, match="'data'"):
        scsae.extract("a.h5ad", data="b.h5ad")
