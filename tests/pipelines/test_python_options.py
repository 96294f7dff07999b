"""Options as a person types them in a notebook, and results as a notebook shows them."""

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from pipelines.config import ExtractOptions, TrainOptions
from pipelines.errors import UsageError
from pipelines.python_options import takes_options
from pipelines.runtime.stage import StageResult, StageResults


@takes_options(ExtractOptions, first="data")
def extract(options: ExtractOptions, *, store: str = "s") -> ExtractOptions:
    return options


@takes_options(TrainOptions)
def train(options: TrainOptions, *, store: str = "s") -> TrainOptions:
    return options


@pytest.mark.parametrize(
    "layer", [2, "2", np.int64(2), (2,), [2], ["2"], range(2, 3), np.array([2]), pd.Index(["2"]), pl.Series([2]), {2}]
)
def test_one_layer_is_typed_in_many_ways(layer):
    assert extract("a.h5ad", layer=layer).layer == ("2",)


def test_texts_take_paths_and_numbers_take_those_of_numpy():
    taken = extract(
        Path("a.h5ad"),
        model=Path("models/x"),
        layer=[1, "attention.2"],
        cells=np.int32(50),
        obs=["a.csv", Path("b.csv")],
        model_option={"max_length": 5},
        random_init=np.bool_(True),
        num_gpus=np.float32(0.5),
        donor=None,
    )
    assert (taken.model, taken.cells, taken.num_gpus, taken.random_init) == ("models/x", 50, 0.5, True)
    assert taken.data == (Path("a.h5ad"),)
    assert taken.obs == (Path("a.csv"), Path("b.csv"))
    assert (taken.layer, taken.model_option) == (("1", "attention.2"), ("max_length=5",))
    assert train(k=np.arange(1, 4)).k == train(k=range(1, 4)).k == (1, 2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "f23"}, r"scsae\.extract: dtype was 'f23': .*'f16', 'bf16' or 'f32'; did you mean 'f32'\?"),
        ({"cell_typ": "x"}, r"'cell_typ' is unknown; did you mean 'cell_type'\? allowed here: .*\bstore\b"),
        ({"cells": 2}, r"cells was 2: .* 3"),
        ({"shard_size": "9 parsecs"}, r"'9 parsecs'.*256MB"),
    ],
)
def test_what_is_not_allowed_is_one_sentence_with_what_is(options, words):
    with pytest.raises(UsageError, match=words) as caught:
        extract("a.h5ad", **options)
    assert "\n" not in str(caught.value)


def test_the_help_says_that_an_anndata_is_taken_where_cells_are():
    assert "data may be an AnnData" in extract.__doc__
    assert "data may be an AnnData" in train.__doc__


def test_results_are_tables_whose_texts_are_escaped():
    result = StageResult(
        kind="codes",
        run="3f2a",
        path=Path("s/codes"),
        done=2,
        reused=1,
        seconds=1.25,
        facts={"<b>": "a & b", "n": 1200},
    )
    shown = result._repr_html_()
    assert "codes/3f2a" in shown
    assert "&lt;b&gt;" in shown
    assert "a &amp; b" in shown
    assert "1,200" in shown
    assert "<b>codes/3f2a</b>" in shown
    assert StageResults([result, result])._repr_html_().count("<table>") == 2

    @takes_options(TrainOptions)
    def made(_options: TrainOptions) -> list[StageResult]:
        return [result]

    assert made() == [result]
    assert "<table>" in made()._repr_html_()
