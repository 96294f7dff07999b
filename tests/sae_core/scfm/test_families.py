"""Families of other packages: found by their entry point where they are needed, and one clear line where they fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from plug_ins import install
from toy_family import ToyModel, write_toy

from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm import load_model
from sae_core.scfm.families import plug_ins

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_family_of_another_package_is_recognised_and_loaded(tmp_path: Path, toy_plug_in: None) -> None:
    model = load_model(write_toy(tmp_path / "mine"))
    assert isinstance(model, ToyModel)
    assert (model.family, model.name) == ("toy", "mine")
    with pytest.raises(CheckpointError, match=r"scfoundation: .*toy \(scsae-toy 0\.3\): toy\.json"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match=r"part was 'cell'.*toy \(scsae-toy 0\.3\).*only scfoundation"):
        load_model(tmp_path / "mine", options={"part": "cell"})


def test_without_the_package_its_folder_is_of_no_known_family(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of a known family, but toy\.json, toy\.safetensors"):
        load_model(write_toy(tmp_path / "mine"))


def test_a_package_that_cannot_be_imported_is_named_where_its_family_may_be_needed_and_nowhere_else(
    tmp_path: Path,
    toy_plug_in: None,
    monkeypatch: pytest.MonkeyPatch,
    write_checkpoint: Callable[..., Path],
) -> None:
    install(monkeypatch, tmp_path / "more", "scsae-gone", "1.2", gone="module_that_is_not_there:FAMILY")
    assert load_model(write_toy(tmp_path / "mine")).family == "toy"
    assert load_model(write_checkpoint()).family == "scgpt"
    (tmp_path / "other").mkdir()
    with pytest.raises(
        CheckpointError, match=r"'gone' of the package scsae-gone 1\.2 .*module_that_is_not_there"
    ) as told:
        load_model(tmp_path / "other")
    assert "\n" not in str(told.value)


def test_no_package_is_looked_up_for_a_family_from_here_or_for_a_path_that_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_checkpoint: Callable[..., Path]
) -> None:
    monkeypatch.setattr("sae_core.scfm.checkpoint.plug_ins", lambda: pytest.fail("plug-ins were looked up"))
    assert load_model(write_checkpoint()).family == "scgpt"
    with pytest.raises(CheckpointError, match="not a folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BLIND", "failed to look at .*TypeError"),
        ("CLUMSY", "failed to load it .*KeyError: 'x'"),
        ("WITHOUT_DIGEST", "a model without a digest"),
        ("NO_MODEL", "gave a int"),
        ("NO_FAMILY", "is a str and no sae_core"),
        ("ABSENT", "cannot be imported .*AttributeError"),
    ],
)
def test_a_package_that_fails_is_one_line_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    install(monkeypatch, tmp_path / "site-packages", "scsae-bad", "0.1", bad=f"toy_family:{name}")
    with pytest.raises(CheckpointError, match=rf"'bad' of the package scsae-bad 0\.1.*{words}") as told:
        load_model(write_toy(tmp_path / "mine"))
    assert "\n" not in str(told.value)


def test_a_folder_that_two_packages_recognise_is_refused(
    tmp_path: Path, toy_plug_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path / "more", "scsae-twin", "0.2", twin="toy_family:FAMILY")
    assert len(plug_ins().families) == 2
    with pytest.raises(CheckpointError, match=r"toy \(scsae-toy 0\.3\) and toy \(scsae-twin 0\.2\)"):
        load_model(write_toy(tmp_path / "mine"))
