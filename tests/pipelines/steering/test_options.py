"""Options of steering: three tasks, and what contradicts itself is refused with what to type."""

import polars as pl
import pytest

from feature_store.storage.schemas import SPLITS
from pipelines.config import SteerOptions, check
from pipelines.errors import UsageError
from pipelines.steering.plan import InterventionType, Point, cross_sections, grid_of, task_of
from pipelines.steering.request import SteeringRequest, _column_and_value, _with_canonical_labels

MOVE = {"kind": "condition", "target": "stim", "toward": "ctrl"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"toward": "ctrl"}, r"toward was 'ctrl' .*target was None; .* --target stim --toward ctrl"),
        ({**MOVE, "toward": "stim"}, r"toward was 'stim' .*target was 'stim'"),
        ({**MOVE, "target": "all"}, r"toward was 'ctrl' .*target was 'all'"),
        ({"target": "B", "intervention": "shift"}, r"'shift'.*--toward LABEL.*--target all"),
        ({"target": "B", "by": "gene"}, "by was 'gene'"),
        ({"feature": [3], "n_features": 2}, "feature and n_features"),
        ({"target": "B", "dose": [1, 2]}, r"dose was \[1.0, 2.0\].*--intervention"),
        ({"target": "all", "intervention": "ablate", "dose": [1, 2]}, r"dose was \[1.0, 2.0\].*--intervention"),
        ({"target": "B", "n_features": [1, 2]}, r"n_features was \[1, 2\].*--toward LABEL.*--target all"),
        ({"cells": "type"}, r"'type'.*COLUMN=VALUE"),
        ({"feature": [-1]}, "feature was -1"),
        ({"dose": ["nan"]}, "dose was 'nan'"),
        ({"dose": ["inf"], "intervention": "add"}, "dose was 'inf'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        check(SteerOptions, values, "scsae steer")


@pytest.mark.parametrize(
    ("values", "name", "intervention"),
    [
        ({"target": "B"}, "edit", "ablate"),
        (MOVE, "move", "shift"),
        ({**MOVE, "intervention": "ablate"}, "move", "ablate"),
        ({"kind": "batch", "target": "all"}, "mix", "ablate"),
        ({"kind": "batch", "target": "all", "intervention": "toward"}, "mix", "toward"),
    ],
)
def test_the_options_say_which_task_it_is(values, name, intervention):
    options = check(SteerOptions, values, "scsae steer")
    task = task_of(options, options.target)
    assert (task.type, task.intervention) == (name, intervention)
    assert task.intervention.needs_group_means == (intervention in ("shift", "toward"))


def test_the_report_has_the_two_cross_sections_through_the_chosen_point_and_doing_nothing():
    options = SteerOptions(**MOVE, n_features=(5, 10), dose=(0.5, 1.0, 2.0))
    grid = grid_of(options)
    assert grid == tuple(Point(n, dose) for n in (5, 10) for dose in (0.5, 1.0, 2.0))
    assert cross_sections(grid, Point(10, 1.0), InterventionType.SHIFT) == (
        *(Point(10, 1.0), Point(5, 1.0), Point(10, 0.0), Point(10, 0.5), Point(10, 2.0)),
    )
    assert cross_sections((Point(10, 1.0),), Point(10, 1.0), InterventionType.ABLATE) == (Point(10, 1.0),)


def test_features_that_are_named_are_one_number_of_features():
    assert grid_of(SteerOptions(target="B", feature=(4, 2, 4))) == (Point(2, 1.0),)


def mixing_request(batch: dict[str, list[str]]) -> SteeringRequest:
    """A request to mix batches of a data set with four cells in each split."""
    options = SteerOptions(kind="batch", target="all", feature=(1,))
    cells = pl.DataFrame(
        [(split, name) for split, names in batch.items() for name in names], schema=["split", "batch"], orient="row"
    ).with_row_index("cell_idx")
    fields = dict.fromkeys(("layout", "chain", "associations", "features", "genes", "gene_ids", "by_label"))
    fields["among_kinds"] = False
    steered = cells["cell_idx"].to_numpy()
    task = task_of(options, "all")
    return SteeringRequest(options=options, task=task, by="none", cells=cells, steered=steered, **fields)


def test_batches_can_be_mixed_where_every_split_has_them_and_else_the_error_says_how_to_extract():
    mixing_request({split: ["x", "y", "x", "y"] for split in SPLITS}).check_cells()
    whole = {"train": ["x"] * 4, "select": ["x"] * 4, "test": ["y"] * 4}
    with pytest.raises(UsageError, match=r"test cells have 1 batch of 2, y: .*--split-by cell.*--split COLUMN"):
        mixing_request(whole).check_cells()


def test_labels_that_are_asked_for_are_compared_by_value():
    found = _with_canonical_labels(SteerOptions(kind="treated", target="true", toward="FALSE"))
    assert (found.target, found.toward) == ("True", "False")
    cells = pl.DataFrame({"cell_idx": [0], "dose": ["1"], "name=B": ["1"], "obs_gene": ["x"]})
    chosen = [_column_and_value(text, cells) for text in ("dose=1.0", "name=B=1", "gene=TRUE")]
    assert chosen == [("dose", "1"), ("name=B", "1"), ("obs_gene", "True")]
    assert _with_canonical_labels(SteerOptions(target="nan")).target == "nan"
