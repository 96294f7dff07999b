from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest

from feature_store.cells import SplitConfig, make_splits, open_source
from feature_store.cells.splits import (
    UNKNOWN,
    KnownSplits,
    SplitLabels,
    check_whole_units,
    splits_from_column,
)
from feature_store.errors import InputError
from feature_store.storage.schemas import SPLITS

if TYPE_CHECKING:
    from pathlib import Path


def assign(units: Any, n_cells: int, **config: Any) -> SplitLabels:
    return make_splits(n_cells, donor=units, config=SplitConfig(**config))[0]


def donors(rng: np.random.Generator, n_cells: int, n_donors: int) -> np.ndarray:
    share = rng.dirichlet(np.full(n_donors, 5.0))
    return rng.choice([f"donor-{i}" for i in range(n_donors)], n_cells, p=share).astype(object)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_donors", [3, 4, 8, 30])
def test_no_unit_spans_two_splits_and_no_split_is_empty(rng: np.random.Generator, n_donors: int, seed: int) -> None:
    units = donors(rng, 500, n_donors)
    labels = assign(units, 500, seed=seed)
    check_whole_units(labels, units)
    assert set(labels) == set(SPLITS)


def test_shares_of_cells_are_near_the_fractions_when_units_are_many(rng: np.random.Generator) -> None:
    labels = assign(donors(rng, 10_000, 40), 10_000, fractions=(0.6, 0.1, 0.3))
    shares = [(labels == split).mean() for split in SPLITS]
    assert np.allclose(shares, (0.6, 0.1, 0.3), atol=0.03)


def test_the_split_of_a_unit_does_not_depend_on_the_order_of_the_cells(rng: np.random.Generator) -> None:
    units = donors(rng, 300, 9)
    order = rng.permutation(300)
    assert (assign(units, 300, seed=3)[order] == assign(units[order], 300, seed=3)).all()


def test_the_seed_decides_which_units_go_where(rng: np.random.Generator) -> None:
    units = donors(rng, 400, 8)
    results = {tuple(assign(units, 400, seed=seed)) for seed in range(6)}
    assert len(results) > 1
    assert tuple(assign(units, 400, seed=0)) in results


def test_a_unit_larger_than_all_others_goes_to_train() -> None:
    units = np.array(["big"] * 98 + ["a", "b"], dtype=object)
    labels = assign(units, 100)
    assert set(labels[:98]) == {"train"}
    assert set(labels[98:]) == {"select", "test"}


def test_cells_without_a_unit_are_in_train_and_count_as_none() -> None:
    units = ["a", None, "b", None, "c", None] + [None] * 30
    labels, record = make_splits(36, donor=units)
    is_known = np.array([unit is not None for unit in units])
    assert set(labels[~is_known]) == {"train"}
    assert sorted(labels[is_known]) == sorted(SPLITS)
    assert (record.unit, record.n_units, record.units) == ("donor", 3, dict.fromkeys(SPLITS, 1))
    assert record.text.startswith("3 whole donors: 34 train, 1 select, 1 test cells; 33 cells without a donor in train")


def test_units_share_what_cells_without_one_leave_of_the_fractions() -> None:
    donor = [None] * 400 + [f"d{i % 20}" for i in range(800)]
    labels, record = make_splits(1200, donor=donor)
    wanted = {"train": 600, "select": 300, "test": 300}
    # a donor has 40 cells
    assert max(abs(record.cells[split] - wanted[split]) for split in SPLITS) <= 40
    assert set(labels[:400]) == {"train"}


def test_two_donors_beside_cells_without_one_cannot_fill_the_splits() -> None:
    _, record = make_splits(30, donor=["a", "b", None] * 10)
    assert record.unit == "cell"
    assert str(record.fallback).startswith("2 donors cannot fill 3 splits")


def test_cells_without_a_donor_may_lie_in_any_split_of_a_column_and_of_an_sae() -> None:
    column = pl.Series(["train", "select", "test", "train", "select", "test"])
    donor = ["a", "b", "c", None, None, None]
    found, record = splits_from_column(column, name="part", donor=donor)
    assert [SPLITS[number] for number in found] == column.to_list()
    assert (record.unit, record.n_units, record.fallback) == ("donor", 3, None)
    known = known_cells(["train", "select", "test", "train", "select", None])
    labels, record = make_splits(6, donor=donor, known=known)
    assert labels.tolist() == ["train", "select", "test", "train", "select", "train"]
    assert (record.unit, record.n_units) == ("donor", 3)
    assert str(record.fallback).startswith("1 cell without a donor in train")


def test_by_cell_gives_the_fractions_exactly_and_a_cell_to_each() -> None:
    labels = assign(None, 1000, seed=1)
    assert [int((labels == split).sum()) for split in SPLITS] == [500, 250, 250]
    assert sorted(assign(None, 3)) == ["select", "test", "train"]


def known_units(n_cells: int, units: dict[str, str]) -> KnownSplits:
    return KnownSplits(cells=np.full(n_cells, UNKNOWN, dtype=np.int8), unit="donor", units=units)


def known_cells(labels: list[str | None]) -> KnownSplits:
    return KnownSplits(cells=np.array([UNKNOWN if one is None else SPLITS.index(one) for one in labels], dtype=np.int8))


def splits_of(labels: SplitLabels, units: Any) -> dict[str, set[str]]:
    return {unit: set(labels[np.array(units) == unit]) for unit in set(units)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_batches", [1, 2, 5])
def test_without_donors_the_cells_of_every_batch_are_in_every_split(n_batches: int, seed: int) -> None:
    batch = [f"b{i % n_batches}" for i in range(40 * n_batches)]
    labels, record = make_splits(len(batch), batch=batch, config=SplitConfig(seed=seed))
    for one in set(batch):
        own = labels[np.array(batch) == one]
        assert [int((own == split).sum()) for split in SPLITS] == [20, 10, 10]
    assert (record.unit, record.n_batches, record.n_batches_in_all) == ("cell", n_batches, n_batches)
    assert f"inside {n_batches} batch" in record.text
    assert record.text.count(f"{n_batches} of {n_batches} batches in every split") == 1
    assert "confirmed" not in record.text


def test_the_record_says_what_batches_that_are_not_in_every_split_cannot_be_used_for() -> None:
    names = [f"d{i // 10}" for i in range(80)]
    labels, record = make_splits(80, donor=names, batch=names)
    assert all(len(own) == 1 for own in splits_of(labels, names).values())
    assert "0 of 8 batches in every split (what goes with a batch is confirmed only if" in record.text


def test_batches_of_few_cells_are_dealt_together() -> None:
    labels, record = make_splits(36, batch=["big"] * 30 + ["a", "a", "b", "c", "d", "d"])
    assert record.cells == {split: int((labels == split).sum()) for split in SPLITS}
    assert set(labels[:30]) == set(labels[30:]) == set(SPLITS)
    assert record.n_batches_in_all == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_donors", [3, 4, 7])
def test_donors_are_dealt_so_that_every_batch_is_in_every_split(n_donors: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [(f"b{b}", f"b{b}d{d}") for b in range(4) for d in range(n_donors)]
    cells = [pairs[i] for i in rng.choice(len(pairs), 3000, p=rng.dirichlet(np.full(len(pairs), 3.0)))]
    batch, donor = (list(column) for column in zip(*cells, strict=True))
    labels, record = make_splits(3000, donor=donor, batch=batch, config=SplitConfig(seed=seed))
    check_whole_units(labels, donor)
    assert all(found == set(SPLITS) for found in splits_of(labels, batch).values())
    assert (record.unit, record.n_batches_in_all) == ("donor", 4)


def test_donors_in_several_batches_and_batches_of_few_donors_are_dealt_as_far_as_possible() -> None:
    donor = ["d1", "d2", "d3", "d1", "d2", "d3", "d4", "d5"] * 10
    batch = ["x", "x", "x", "y", "y", "y", "z", "z"] * 10
    labels, record = make_splits(80, donor=donor, batch=batch)
    check_whole_units(labels, donor)
    found = splits_of(labels, batch)
    assert found["x"] == found["y"] == set(SPLITS)
    assert len(found["z"]) == 2
    assert (record.n_batches, record.n_batches_in_all) == (3, 2)


def test_whole_batches_are_held_out_on_request() -> None:
    batch = ["x", "y", "z"] * 10
    labels, record = make_splits(30, batch=batch, config=SplitConfig(by="batch"))
    check_whole_units(labels, batch)
    assert (record.unit, record.n_units, record.fallback) == ("batch", 3, None)
    assert record.cells == {split: int((labels == split).sum()) for split in SPLITS}
    assert record.units == {"train": 1, "select": 1, "test": 1}
    assert record.n_batches_in_all == 0
    assert record.text.startswith("3 whole batches: 10 train, 10 select, 10 test cells")


def test_a_unit_of_which_there_is_no_column_is_refused() -> None:
    with pytest.raises(InputError, match=r"'batch'.*--batch COLUMN"):
        make_splits(30, config=SplitConfig(by="batch"))
    _, record = make_splits(30, donor=list("abcde") * 6, config=SplitConfig(by="cell"))
    assert record.unit == "cell"


def test_donor_is_preferred_to_batch() -> None:
    _, record = make_splits(12, donor=list("abcd") * 3, batch=list("xyz") * 4)
    assert (record.unit, record.n_units) == ("donor", 4)


def test_with_fewer_than_three_units_cells_are_split_and_the_record_says_so() -> None:
    labels, record = make_splits(20, donor=["a", "b"] * 10)
    assert record.unit == "cell"
    assert record.n_units == 20
    assert record.fallback is not None
    assert "2 donors" in record.fallback
    with pytest.raises(InputError, match="scsae extract"):
        check_whole_units(labels, ["a", "b"] * 10)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.7, 0.4, -0.1)])
def test_fractions_that_do_not_sum_to_one_or_are_not_positive_are_refused(
    fractions: tuple[float, float, float],
) -> None:
    with pytest.raises(InputError, match=re.escape(str(fractions))):
        SplitConfig(fractions=fractions)


def test_too_few_cells_or_units_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 cells.* 2"):
        assign(None, 2)
    with pytest.raises(InputError, match=r"2 .* 5"):
        assign(["a", "b"], 5)


FROZEN = {
    0: ("ttssettttsteetttsseetttsstettttseet", "tettsetssttstteestte"),
    1: ("tetsettsettettsttsettsetstttsetsett", "tseetsseetttttttsste"),
}
"""Splits of 35 cells by unit, of which 7 have none, and of 20 by cell: t(rain), s(elect), (t)e(st)."""
FROZEN_REAL = {
    "kang18_ifnb_2000x9015_counts": ("donor", "ddef036c36202287"),
    "kang18_ctrl_8684x2511_counts": ("donor", "8743064a0fd77dfb"),
    "scmixology_5lines_5batches_counts": ("batch", "108925249124e29d"),
    "ctcl_skin_GSE128531_1800x33694_counts": ("donor", "d03c0f2d65ab58ef"),
}


def letters(labels: SplitLabels) -> str:
    return "".join({"train": "t", "select": "s", "test": "e"}[label] for label in labels)


@pytest.mark.parametrize("seed", FROZEN)
def test_the_split_of_a_seed_never_changes(seed: int) -> None:
    units = [f"donor-{i % 7}" if i % 5 else None for i in range(35)]
    by_unit, by_cell = FROZEN[seed]
    assert letters(assign(units, 35, seed=seed)) == by_unit
    assert letters(assign(None, 20, seed=seed)) == by_cell


@pytest.mark.parametrize("name", FROZEN_REAL)
def test_the_split_of_real_data_never_changes(scsae_data: Path, name: str) -> None:
    column, digest = FROZEN_REAL[name]
    source = open_source(scsae_data / f"{name}.h5ad")
    labels, _ = make_splits(source.n_cells, donor=source.obs()[column])
    assert hashlib.sha256(letters(labels).encode()).hexdigest()[:16] == digest


def test_units_may_be_a_list_an_array_or_a_series(rng: np.random.Generator) -> None:
    units = donors(rng, 200, 6)
    units[7] = None
    wanted = assign(units, 200).tolist()
    for other in (units.tolist(), pl.Series(units.tolist()), pl.Series(units.tolist(), dtype=pl.Categorical)):
        assert assign(other, 200).tolist() == wanted
    numbers = rng.integers(0, 9, 200)
    assert (assign(pl.Series(numbers), 200) == assign([str(i) for i in numbers], 200)).all()


def test_known_units_keep_their_splits_and_new_ones_are_held_out(rng: np.random.Generator) -> None:
    units = donors(rng, 600, 9)
    known = {"donor-0": "test", "donor-1": "train", "donor-2": "select", "elsewhere": "train"}
    labels, record = make_splits(600, donor=units, known=known_units(600, known))
    check_whole_units(labels, units)
    for name in ("donor-0", "donor-1", "donor-2"):
        assert set(labels[units == name]) == {known[name]}
    assert set(labels[~np.isin(units, list(known))]) == {"select", "test"}
    assert record.units == {split: len(set(units[labels == split])) for split in SPLITS}
    assert min(record.units.values()) > 0


def test_units_of_which_none_is_known_are_assigned_as_without_known_units(rng: np.random.Generator) -> None:
    units = donors(rng, 200, 6)
    free, record = make_splits(200, donor=units)
    labels, again = make_splits(200, donor=units, known=known_units(200, {"elsewhere": "test"}))
    assert (labels == free).all()
    assert again == record


def test_few_units_that_are_known_are_not_divided_into_cells() -> None:
    labels, record = make_splits(20, donor=["a", "b"] * 10, known=known_units(20, {"a": "train"}))
    assert set(labels[::2]) == {"train"}
    assert len(set(labels[1::2]) & {"select", "test"}) == 1
    assert (record.unit, record.fallback) == ("donor", None)


def test_known_cells_keep_their_splits_whatever_they_are_split_by() -> None:
    own = ["train", "select", "test", None] * 15
    donor, batch = [f"d{i % 7}" for i in range(60)], [f"b{i % 2}" for i in range(60)]
    for options in ({}, {"donor": donor}, {"batch": batch}, {"donor": donor, "batch": batch}):
        labels, record = make_splits(60, known=known_cells(own), **options)
        assert [one for one, split in zip(labels, own, strict=True) if split] == [split for split in own if split]
        assert record.n_kept == 45
        assert "45 cells keep the split" in record.text
    assert set(labels[3::4]) == {"train"}, "a donor with cells in train is not held out"
    assert "7 of 7 donors" in str(record.fallback)
    labels, record = make_splits(60, known=known_cells(own))
    assert set(labels[3::4]) == {"select", "test"}, "cells that the SAE has not seen are held out"


def test_a_donor_that_is_known_by_its_cells_keeps_their_split_under_another_name() -> None:
    donor = [f"d{i % 6}" for i in range(60)]
    names = dict(zip(sorted(set(donor)), ["train", "train", "select", "test", None, None], strict=True))
    # one cell of each donor is known
    own = [names[one] if i < 6 else None for i, one in enumerate(donor)]
    labels, record = make_splits(60, donor=donor, known=known_cells(own))
    check_whole_units(labels, donor)
    assert all(splits_of(labels, donor)[name] == {split} for name, split in names.items() if split)
    assert splits_of(labels, donor)["d4"] | splits_of(labels, donor)["d5"] <= {"select", "test"}
    assert (record.unit, record.fallback) == ("donor", None)


def test_a_donor_with_the_name_of_one_and_the_cells_of_another_takes_the_split_that_is_not_held_out() -> None:
    known = KnownSplits(cells=np.array([0, *[UNKNOWN] * 5] * 5, dtype=np.int8), unit="donor", units={"a": "test"})
    labels, _ = make_splits(30, donor=["a", "b", "b", "b", "c", "d"] * 5, known=known)
    assert set(labels[::6]) == {"train"}


def test_one_new_cell_among_known_ones_is_held_out() -> None:
    labels, _ = make_splits(4, known=known_cells(["train", "select", None, "test"]))
    assert labels.tolist()[2] in ("select", "test")


def names_of(numbers: np.ndarray) -> list[str]:
    return [SPLITS[number] for number in numbers]


def test_a_column_that_moves_known_cells_or_holds_out_a_known_donor_is_refused() -> None:
    column = pl.Series(["train", "select", "test"] * 4)
    same = known_cells(column.to_list())
    assert names_of(splits_from_column(column, name="fold", known=same)[0]) == column.to_list()
    with pytest.raises(InputError, match=r"'fold'.* 1 cells.*row 2 \(train .*test.*leave --split out"):
        splits_from_column(column, name="fold", known=known_cells(["train", None, "train", *[None] * 9]))
    with pytest.raises(InputError, match=r"'fold'.*donor 'c'.*leave --split out"):
        splits_from_column(column, name="fold", donor=list("abc") * 4, known=known_units(12, {"c": "train"}))
    splits_from_column(column, name="fold", donor=list("abc") * 4, known=known_units(12, {"c": "select", "b": "test"}))


def test_splits_are_read_from_a_column_and_the_record_names_the_unit() -> None:
    column = pl.Series(["train", "train", "select", "test"] * 3)
    whole = ["a", "b", "c", "d"] * 3
    numbers, record = splits_from_column(column, name="fold", donor=whole)
    assert names_of(numbers) == column.to_list()
    assert (record.unit, record.n_units, record.units) == ("donor", 4, {"train": 2, "select": 1, "test": 1})
    assert record.cells == {"train": 6, "select": 3, "test": 3}
    _, by_batch = splits_from_column(column, name="fold", batch=whole)
    assert (by_batch.unit, by_batch.fallback) == ("batch", None)
    _, divided = splits_from_column(column, name="fold", batch=["x", "y", "y", "x", "x"] * 2 + ["x", "y"])
    assert (divided.unit, divided.n_units) == ("cell", 12)
    assert divided.fallback is not None
    assert "the same batches" in divided.fallback


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["train", "select", "held out"], "held out, test"),
        (["train", "select", "train"], "test"),
        (["train", "select", None], "None, test"),
    ],
)
def test_a_column_that_holds_other_than_the_three_splits_is_refused(values: list[str | None], words: str) -> None:
    with pytest.raises(InputError, match=rf"--split was 'fold'.*{words}"):
        splits_from_column(pl.Series(values), name="fold")


def test_a_column_that_divides_a_donor_is_refused() -> None:
    with pytest.raises(InputError, match=r"'a'.*train.*select.*scsae extract"):
        splits_from_column(pl.Series(["train", "select", "test"]), name="fold", donor=["a", "a", "b"])
