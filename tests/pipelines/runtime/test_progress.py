"""What is said on stderr while work goes on, with and without progress, where there is no terminal."""

import io
import re
import time
from types import SimpleNamespace

import pytest

from pipelines import baseline
from pipelines.config import BaselineOptions, Recipe
from pipelines.recipe import StageNames
from pipelines.runtime import progress
from pipelines.runtime.progress import PlainConsole, activity, progress_bar


@pytest.fixture
def quick(monkeypatch):
    """A second of waiting takes a hundredth of it."""
    for name in ("LINE_INTERVAL_S", "SHOW_AFTER_S", "QUIET_S"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 100)


def test_work_without_progress_says_what_it_does_again_and_again(quick, capsys):
    with activity("steer", "computes the metrics"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert all(re.fullmatch(r"steer        computes the metrics, \d+ s", line) for line in lines)


def test_short_work_says_nothing(capsys):
    with activity("steer", "computes the metrics"):
        pass
    assert capsys.readouterr().err == ""


def test_what_goes_wrong_inside_is_raised_as_it_is():
    with pytest.raises(KeyError, match="metric"), activity("steer", "computes the metrics"):
        raise KeyError("metric")


def test_a_bar_without_news_repeats_its_last_line(quick, capsys):
    with progress_bar("train", 800, "steps") as report:
        report(0, "starts its workers")
        time.sleep(0.5)
        report(800, "mse 1.0")
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    first, last = lines[0], lines[-1]
    assert first.startswith("train        0/800 steps starts its workers")
    assert last.startswith("train        800/800 steps mse 1.0")
    assert len([line for line in lines if "800/800" in line]) >= 2


def test_the_end_of_a_bar_is_said_once(capsys):
    with progress_bar("encode", 2, "shards") as report:
        report(1)
        report(2)
        report(2)
    assert capsys.readouterr().err.count("2/2 shards") == 1


def test_on_a_terminal_an_activity_is_shown_while_it_lasts_and_taken_away(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(progress, "stderr_console", lambda: PlainConsole(file=drawn, force_terminal=True, width=100))
    with activity("umap", "computes the map"):
        time.sleep(0.2)
    assert "computes the map" in drawn.getvalue()
    assert drawn.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize(
    ("recipe", "n_stages"),
    [
        ({"extract": {"data": "a.h5ad", "layer": ["1", "2"]}, "train": {}, "encode": {}, "associate": {}}, 7),
        ({"extract": {"data": "a.h5ad", "layer": ["1", "2"]}, "steer": [{"target": "A"}]}, 2),
        ({"encode": {}, "associate": {}, "steer": [{"target": "A"}, {"target": "B"}]}, 4),
    ],
)
def test_a_recipe_says_which_stage_of_how_many_begins(recipe, n_stages, capsys):
    stages = StageNames(Recipe(**recipe))
    stages.begin("extract")
    stages.begin("train")
    assert capsys.readouterr().err == f"stage 1 of {n_stages}: extract\nstage 2 of {n_stages}: train\n"
    StageNames(Recipe(encode={})).begin("encode")
    assert capsys.readouterr().err == ""


def test_it_is_said_which_baseline_of_how_many_is_made(monkeypatch, capsys, tmp_path):
    made = SimpleNamespace(run="run", codes=SimpleNamespace(dataset="cells"))
    monkeypatch.setattr(baseline, "_fitted", lambda *_: iter([made]))
    for name in ("encode_options", "gene_sets_of"):
        monkeypatch.setattr(baseline, name, lambda *_: ())
    monkeypatch.setattr("pipelines.encode.encode", lambda *_, **__: made)
    monkeypatch.setattr("pipelines.associate.associate_with", lambda *_, **__: made)
    options = BaselineOptions(kind=("neurons", "pca", "neurons"))
    assert len(list(baseline._stages(options, tmp_path, made, None))) == 6
    assert capsys.readouterr().err == "baseline 1 of 2: neurons\nbaseline 2 of 2: pca\n"
