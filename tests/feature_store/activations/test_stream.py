from __future__ import annotations

import json
import threading
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from feature_store.activations import TokenStream, sample_tokens
from feature_store.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIONS: dict[str, Any] = {"batch_tokens": 7, "buffer_groups": 4, "seed": 5}


def ids(batches: Any) -> list[int]:
    """Numbers of the tokens in the order given (the fixture writes them into dimension 0)."""
    return [int(number) for batch in batches for number in batch[:, 0]]


def test_batches_are_float32_and_of_one_size_but_for_the_last(store_activations: Callable[..., Any]) -> None:
    batches = list(TokenStream(store_activations(dtype="f16").reader, n_epochs=1, **OPTIONS))
    assert {batch.dtype for batch in batches} == {np.dtype(np.float32)}
    assert [len(batch) for batch in batches] == [7] * 42 + [6]


def test_an_epoch_gives_every_token_exactly_once_with_its_activation(
    store_activations: Callable[..., Any],
) -> None:
    stored = store_activations()
    given = np.concatenate(list(TokenStream(stored.reader, n_epochs=1, **OPTIONS)))
    assert (given[np.argsort(given[:, 0])] == stored.act).all()


def test_only_tokens_of_kept_cells_are_given(store_activations: Callable[..., Any]) -> None:
    stored = store_activations()
    keep = np.arange(60) % 3 == 0
    stream = TokenStream(stored.reader, keep_cells=keep, n_epochs=2, **OPTIONS)
    expected = np.flatnonzero(keep[stored.cell_idx]).tolist()
    given = ids(stream)
    assert stream.n_tokens == len(expected)
    assert sorted(given[: len(expected)]) == expected
    assert sorted(given[len(expected) :]) == expected


def test_the_order_differs_between_epochs_and_seeds_and_repeats_with_the_seed(
    store_activations: Callable[..., Any],
) -> None:
    reader = store_activations().reader
    two = ids(TokenStream(reader, n_epochs=2, **OPTIONS))
    assert two[:300] != two[300:]
    assert two == ids(TokenStream(reader, n_epochs=2, **OPTIONS))
    assert two[:300] != ids(TokenStream(reader, n_epochs=1, **{**OPTIONS, "seed": 6}))


def test_a_batch_mixes_tokens_of_several_shards(store_activations: Callable[..., Any]) -> None:
    reader = store_activations().reader
    first = next(iter(TokenStream(reader, batch_tokens=50, buffer_groups=10, seed=0)))
    assert len({int(number) // 100 for number in first[:, 0]}) == 3


def test_without_an_end_every_batch_is_full_and_epochs_follow_each_other(
    store_activations: Callable[..., Any],
) -> None:
    batches = list(islice(TokenStream(store_activations().reader, **OPTIONS), 100))
    assert {len(batch) for batch in batches} == {7}
    given = ids(batches)
    assert sorted(given[:300]) == sorted(given[300:600]) == list(range(300))


@pytest.mark.parametrize("n_before", [0, 1, 8, 9, 10, 42, 43, 50, 85])
def test_a_resumed_stream_goes_on_with_exactly_the_next_token(
    store_activations: Callable[..., Any], n_before: int
) -> None:
    reader = store_activations().reader
    whole = ids(TokenStream(reader, n_epochs=2, **OPTIONS))
    first = TokenStream(reader, n_epochs=2, **OPTIONS)
    head = ids(islice(first, n_before))
    state = json.loads(json.dumps(first.state_dict()))
    second = TokenStream(reader, n_epochs=2, **OPTIONS)
    second.load_state_dict(state)
    assert head + ids(second) == whole


def test_resuming_with_another_batch_size_keeps_the_order(store_activations: Callable[..., Any]) -> None:
    reader = store_activations().reader
    whole = ids(TokenStream(reader, n_epochs=1, **OPTIONS))
    first = TokenStream(reader, n_epochs=1, **OPTIONS)
    head = ids(islice(first, 5))
    second = TokenStream(reader, n_epochs=1, **{**OPTIONS, "batch_tokens": 64})
    second.load_state_dict(first.state_dict())
    assert head + ids(second) == whole


def test_iterating_again_goes_on_and_a_finished_stream_gives_nothing(store_activations: Callable[..., Any]) -> None:
    reader = store_activations().reader
    stream = TokenStream(reader, n_epochs=1, **OPTIONS)
    given = ids(islice(stream, 10)) + ids(islice(stream, 3)) + ids(stream)
    assert given == ids(TokenStream(reader, n_epochs=1, **OPTIONS))
    assert ids(stream) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 6}, "seed.*5.*6"), ({"buffer_groups": 5}, "buffer_groups.*4.*5"), ({"keep_cells": 1}, "keep_cells")],
)
def test_a_state_of_another_stream_is_refused(
    store_activations: Callable[..., Any], change: dict[str, Any], named: str
) -> None:
    reader = store_activations().reader
    if "keep_cells" in change:
        change = {"keep_cells": np.arange(60) < 59}
    state = TokenStream(reader, **OPTIONS).state_dict()
    with pytest.raises(InputError, match=named):
        TokenStream(reader, **{**OPTIONS, **change}).load_state_dict(state)


def test_the_global_generator_is_neither_used_nor_changed(store_activations: Callable[..., Any]) -> None:
    reader = store_activations().reader
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    first = ids(TokenStream(reader, n_epochs=1, **OPTIONS))
    assert (before == np.random.get_state()[1]).all()  # type: ignore[index]
    np.random.seed(2)
    assert first == ids(TokenStream(reader, n_epochs=1, **OPTIONS))


def test_leaving_the_loop_ends_the_reading_thread(store_activations: Callable[..., Any]) -> None:
    batches = iter(TokenStream(store_activations().reader, **OPTIONS))
    next(batches)
    assert any(thread.name.startswith("token-stream") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("token-stream") for thread in threading.enumerate())


def test_a_read_that_fails_is_raised_where_the_batches_are_used(store_activations: Callable[..., Any]) -> None:
    stored = store_activations()
    stream = TokenStream(stored.reader, **OPTIONS)
    for path in stored.run.parts():
        path.unlink()
    with pytest.raises(IntegrityError, match="run its stage again"):
        next(iter(stream))


def test_bad_options_and_masks_are_refused(store_activations: Callable[..., Any]) -> None:
    reader = store_activations().reader
    with pytest.raises(InputError, match="0, 4, None"):
        TokenStream(reader, batch_tokens=0, buffer_groups=4)
    with pytest.raises(InputError, match="keep_cells has 10 "):
        TokenStream(reader, keep_cells=np.ones(10, dtype=bool))
    with pytest.raises(InputError, match="keep_cells"):
        TokenStream(reader, keep_cells=np.zeros(60, dtype=bool))


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_share_an_epoch_and_give_every_token_once(store_activations: Callable[..., Any], n_ranks: int) -> None:
    stored = store_activations()
    shares = [
        ids(TokenStream(stored.reader, n_epochs=1, rank=rank, n_ranks=n_ranks, **OPTIONS)) for rank in range(n_ranks)
    ]
    assert all(shares)
    assert sorted(chain.from_iterable(shares)) == list(range(300))


def test_each_rank_resumes_with_exactly_its_next_batch(store_activations: Callable[..., Any]) -> None:
    reader = store_activations().reader
    for rank in range(2):
        options = {**OPTIONS, "rank": rank, "n_ranks": 2}
        calm = ids(islice(TokenStream(reader, **options), 60))
        broken = TokenStream(reader, **options)
        start = ids(islice(broken, 23))
        later = TokenStream(reader, **options)
        later.load_state_dict(json.loads(json.dumps(broken.state_dict())))
        assert start + ids(islice(later, 37)) == calm


def test_more_ranks_than_row_groups_and_a_rank_out_of_range_are_refused(store_activations: Callable[..., Any]) -> None:
    reader = store_activations(n_shards=1, cells_per_shard=3).reader
    with pytest.raises(InputError, match="--num-workers"):
        TokenStream(reader, rank=0, n_ranks=2)
    with pytest.raises(InputError, match="2 of 2"):
        TokenStream(reader, rank=2, n_ranks=2)


def test_a_sample_has_kept_cells_from_the_whole_run_and_repeats_with_the_seed(
    store_activations: Callable[..., Any],
) -> None:
    stored = store_activations()
    keep = np.arange(60) % 3 == 0
    kept = set(np.flatnonzero(keep[stored.cell_idx]).tolist())

    def sample(seed: int) -> list[int]:
        return ids(sample_tokens(stored.reader, keep, n_tokens=40, seed=seed))

    given = sample(0)
    assert len(given) == len(set(given)) == 40
    assert set(given) <= kept
    assert {number // 100 for number in given} == {0, 1, 2}
    assert given == sample(0) != sample(1)


def test_a_sample_larger_than_the_run_is_every_kept_token_once(store_activations: Callable[..., Any]) -> None:
    stored = store_activations()
    keep = np.arange(60) % 2 == 0
    given = ids(sample_tokens(stored.reader, keep, n_tokens=10_000, seed=0))
    assert sorted(given) == np.flatnonzero(keep[stored.cell_idx]).tolist()
    assert ids(sample_tokens(stored.reader, ~(keep | ~keep), n_tokens=10, seed=0)) == []


def test_a_sample_reads_no_more_row_groups_than_it_needs(
    store_activations: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.activations.stream.SAMPLE_GROUPS", 3)
    stored = store_activations()
    everything = np.ones(60, dtype=bool)
    given = ids(sample_tokens(stored.reader, everything, n_tokens=20, seed=0))
    groups, opened = stored.reader.row_groups, {(number // 100, number % 100 // 16) for number in given}
    assert len(given) == 20
    assert len(opened) <= 3 < len(groups)


def test_every_token_is_equally_likely_in_a_sample(store_activations: Callable[..., Any]) -> None:
    stored = store_activations()
    everything = np.ones(60, dtype=bool)
    samples = (sample_tokens(stored.reader, everything, n_tokens=60, seed=seed) for seed in range(200))
    drawn = np.bincount(list(chain.from_iterable(map(ids, samples))), minlength=300)
    assert abs(drawn - 40).max() < 6 * np.sqrt(200 * 0.2 * 0.8)
