from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from toy_plans import toy_plan

from feature_store import codes
from feature_store.codes import CodeReader, by_feature, parquet, token_codes, token_statistics
from feature_store.errors import IncompleteRunError, InputError, PlanMismatchError
from feature_store.storage.commit import Run
from feature_store.storage.plans import CodesPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from feature_store.codes import TokenCodes

N_CELLS, N_FEATURES = 40, 12
PLAN = toy_plan(CodesPlan, n_features=N_FEATURES, dataset="toy", top_tokens=20)
SPLIT = np.array(["train", "select", "test", "train"] * 10)


@pytest.fixture
def parts(random_tokens: Callable[..., TokenCodes]) -> list[TokenCodes]:
    return [random_tokens(10 * shard, 10 * shard + 10) for shard in range(4)]


def write(folder: Path, parts: list[TokenCodes], plan: CodesPlan = PLAN, shards: Any = None) -> codes.CodesRun:
    run = codes.CodesRun.create(folder, plan, n_shards=4)
    for shard in run.pending() if shards is None else shards:
        run.commit_shard(shard, parts[shard], start=10 * shard, stop=10 * shard + 10, split_of_cell=SPLIT)
    return run


@pytest.fixture
def finished(tmp_path: Path, parts: list[TokenCodes]) -> codes.CodesRun:
    run = write(tmp_path / "codes", parts)
    run.finalize(n_buckets=5)
    return run


def dense_max(parts: list[TokenCodes]) -> np.ndarray:
    dense = np.zeros((N_CELLS, N_FEATURES), np.float32)
    for tokens in parts:
        np.maximum.at(dense, tokens.cell_idx, tokens.codes.toarray())
    return dense


@pytest.fixture
def expected(parts: list[TokenCodes]) -> np.ndarray:
    return dense_max(parts)


def test_cell_codes_come_back_as_the_maximum_over_tokens(finished: codes.CodesRun, expected: np.ndarray) -> None:
    loaded = codes.load_cell_codes(finished.by_cell, N_CELLS)
    assert loaded.shape == (N_CELLS, N_FEATURES)
    assert loaded.dtype == np.float32
    assert loaded.has_sorted_indices
    assert (loaded.toarray() == expected).all()


def test_mean_pooling_is_stored_when_the_plan_says_so(tmp_path: Path, parts: list[TokenCodes]) -> None:
    run = write(tmp_path / "codes", parts, replace(PLAN, pooling="mean"))
    run.finalize()
    tokens = parts[1]
    rows = tokens.codes.toarray()[tokens.cell_idx == 13]
    assert np.allclose(codes.load_cell_codes(run.by_cell, N_CELLS)[[13]].toarray(), rows.mean(axis=0), rtol=1e-6)


def test_codes_of_some_cells_read_only_the_parts_that_hold_them(finished: codes.CodesRun, expected: np.ndarray) -> None:
    finished.by_cell.part(3).unlink()
    cells = np.array([25, 3, 3, 11])
    assert (codes.load_cell_codes(finished.by_cell, N_CELLS, cells).toarray() == expected[cells]).all()
    mask = np.arange(N_CELLS) % 2 == 0
    mask[30:] = False
    assert (codes.load_cell_codes(finished.by_cell, N_CELLS, mask).toarray() == expected[mask]).all()


def test_more_cells_than_the_data_set_has_are_refused(finished: codes.CodesRun) -> None:
    with pytest.raises(InputError, match="20 cells"):
        codes.load_cell_codes(finished.by_cell, 20)


def test_cells_without_a_token_are_told_from_cells_whose_features_do_not_fire(
    tmp_path: Path, parts: list[TokenCodes]
) -> None:
    parts[1] = parts[1].select(~np.isin(parts[1].cell_idx, (12, 17)))
    silent = replace(parts[2], codes=sparse.csr_array(parts[2].codes.shape, dtype=np.float32))
    run = write(tmp_path / "codes", [*parts[:2], silent, parts[3]])
    run.finalize()
    wanted = np.isin(np.arange(N_CELLS), np.concatenate([part.cell_idx for part in parts]))
    assert not wanted[[12, 17]].any()
    assert (codes.cells_with_tokens(run.folder, N_CELLS) == wanted).all()


@pytest.mark.parametrize("bounds", [(0, 12), (3, 8), (4, 5), (11, 12)])
@pytest.mark.parametrize("level", ["cell", "token"])
def test_codes_of_a_range_of_features_are_those_columns_of_the_cell_codes(
    tmp_path: Path, parts: list[TokenCodes], expected: np.ndarray, level: str, bounds: tuple[int, int]
) -> None:
    run = write(tmp_path / "codes", parts, replace(PLAN, level=level))
    run.finalize(n_buckets=5)
    loaded = codes.load_feature_codes(Run.open(run.folder / "by_feature"), N_CELLS, *bounds)
    assert loaded.dtype == np.float32
    assert loaded.has_sorted_indices
    assert (loaded.toarray() == expected[:, slice(*bounds)]).all()
    assert (loaded.data != 0).all()
    with pytest.raises(InputError, match="2 cells"):
        codes.load_feature_codes(Run.open(run.folder / "by_feature"), 2, *bounds)


def test_statistics_of_some_features_are_those_rows(finished: codes.CodesRun) -> None:
    whole, some = codes.load_statistics(finished.folder), codes.load_statistics(finished.folder, features=(3, 8))
    wanted = pl.col("feature_id").is_between(3, 7)
    assert some.feature_gene.equals(whole.feature_gene.filter(wanted))
    assert some.feature_token.equals(whole.feature_token.filter(wanted))
    assert some.gene.equals(whole.gene)


def test_by_feature_holds_the_same_nonzeros_sorted_by_feature_and_falling_value(
    finished: codes.CodesRun, expected: np.ndarray
) -> None:
    run = Run.open(finished.folder / "by_feature")
    assert [(m.start, m.stop) for m in run.manifest().shards] == [(0, 2), (2, 4), (4, 7), (7, 9), (9, 12)]
    frame = pl.concat([pl.read_parquet(path) for path in run.parts()])
    cells, features = np.nonzero(expected)
    rows = sorted(zip(features, -expected[cells, features], cells, strict=True))
    assert frame.columns == ["feature_id", "value", "cell_idx"]
    assert frame.rows() == [(feature, -value, cell) for feature, value, cell in rows]


@pytest.mark.parametrize("max_rows", [1, 50, 10**9])
def test_by_feature_does_not_depend_on_how_many_buckets_are_gathered_at_once(
    finished: codes.CodesRun, folder_hashes: Callable[[Path], dict[str, str]], max_rows: int
) -> None:
    before = folder_hashes(finished.folder / "by_feature")
    shutil.rmtree(finished.folder / "by_feature")
    by_feature.build_by_feature(finished.folder, n_buckets=5, max_rows=max_rows)
    assert folder_hashes(finished.folder / "by_feature") == before


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 12, np.uint16), (4000, 4064, np.uint16), (7, 90_000, np.uint32)]
)
def test_rows_are_sorted_by_feature_and_falling_value_and_ties_keep_their_order(
    rng: np.random.Generator, low: int, high: int, dtype: type
) -> None:
    feature = rng.integers(low, high, 5000).astype(dtype)
    value = rng.integers(0, 50, 5000).astype(np.float32) / 3
    order = by_feature.falling_by_feature(feature, value)
    assert (order == np.lexsort((np.arange(5000), -value, feature))).all()
    assert len(by_feature.falling_by_feature(feature[:0], value[:0])) == 0


def test_a_group_holds_adjacent_buckets_and_at_most_max_rows_nonzeros(
    finished: codes.CodesRun, expected: np.ndarray
) -> None:
    building = by_feature.ByFeature(finished.folder, n_buckets=5)
    assert building.groups() == []
    for bucket in (0, 1, 2, 4):
        (finished.folder / "by_feature" / f"part-0000{bucket}.json").unlink()
    assert building.groups() == [(0, 3), (4, 5)]
    assert building.groups(max_rows=1) == [(0, 1), (1, 2), (2, 3), (4, 5)]
    two = int(np.count_nonzero(expected[:, :4]))
    assert building.groups(max_rows=two) == [(0, 2), (2, 3), (4, 5)]
    assert building.write(4, 5) == np.count_nonzero(expected[:, 9:])
    assert building.groups() == [(0, 3)]


def test_there_are_enough_buckets_that_each_has_a_bounded_number_of_nonzeros(
    finished: codes.CodesRun, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    monkeypatch.setattr(by_feature, "N_BUCKETS", 2)
    shutil.rmtree(finished.folder / "by_feature")
    assert by_feature.ByFeature(finished.folder).run.n_shards == 2
    shutil.rmtree(finished.folder / "by_feature")
    monkeypatch.setattr(by_feature, "BUCKET_ROWS", -(-int(np.count_nonzero(expected)) // 3))
    assert by_feature.ByFeature(finished.folder).run.n_shards == 3


def test_by_feature_resumes_and_a_finished_one_is_left_alone(
    finished: codes.CodesRun, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    folder = finished.folder / "by_feature"
    before = folder_hashes(folder)
    (folder / "MANIFEST.json").unlink()
    (folder / "part-00002.json").unlink()
    (folder / "part-00004.parquet").write_bytes(b"truncated")
    assert by_feature.build_by_feature(finished.folder, n_buckets=5) == Run.open(folder).manifest()
    assert folder_hashes(folder) == before


def test_by_feature_waits_for_by_cell(tmp_path: Path, parts: list[TokenCodes]) -> None:
    run = write(tmp_path / "codes", parts, shards=[0, 1, 3])
    with pytest.raises(IncompleteRunError):
        by_feature.build_by_feature(run.folder)
    with pytest.raises(IncompleteRunError, match=r"\[2\]"):
        run.finalize()


def test_a_run_resumed_after_losing_any_of_its_tables_equals_an_undisturbed_one(
    tmp_path: Path, parts: list[TokenCodes], folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    write(tmp_path / "undisturbed", parts).finalize(n_buckets=5)
    run = write(tmp_path / "resumed", parts, shards=[3, 1])
    (run.statistics["gene"].path / "part-00001.json").unlink()
    (run.statistics["feature_token"].path / "part-00003.parquet").write_bytes(b"")
    assert run.pending() == [0, 1, 2, 3]
    write(tmp_path / "resumed", parts).finalize(n_buckets=5)
    assert folder_hashes(tmp_path / "resumed") == folder_hashes(tmp_path / "undisturbed")


def test_statistics_over_all_shards_equal_those_of_all_tokens_at_once(
    finished: codes.CodesRun, parts: list[TokenCodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.codes.load.MERGE_PARTS", 2)
    statistics = codes.load_statistics(finished.folder)
    whole = token_codes.TokenCodes(
        cell_idx=np.concatenate([part.cell_idx for part in parts]),
        token_pos=np.concatenate([part.token_pos for part in parts]),
        gene_id=np.concatenate([part.gene_id for part in parts]),
        codes=sparse.vstack([part.codes for part in parts]).tocsr(),
    )
    split = SPLIT[whole.cell_idx]
    direct = token_statistics.feature_gene_statistics(whole, split)
    assert statistics.feature_gene.drop("sum", "sum_sq").equals(direct.drop("sum", "sum_sq"))
    assert np.allclose(statistics.feature_gene["sum"].to_numpy(), direct["sum"].to_numpy(), rtol=1e-13)
    assert statistics.gene.equals(token_statistics.gene_statistics(whole, split))
    assert statistics.feature_token.equals(token_statistics.top_tokens(whole, 20))


def test_codes_of_tokens_are_stored_with_position_and_gene_and_pool_to_the_same_cells(
    tmp_path: Path, parts: list[TokenCodes], expected: np.ndarray
) -> None:
    run = write(tmp_path / "codes", parts, replace(PLAN, level="token"))
    run.finalize(n_buckets=3)
    frame = pl.concat([pl.read_parquet(path) for path in run.by_cell.parts()])
    assert frame.columns == ["cell_idx", "token_pos", "gene_id", "feature_id", "value"]
    assert frame.height == sum(part.codes.nnz for part in parts)
    assert frame.equals(frame.sort("cell_idx", "token_pos", "feature_id"))
    assert (codes.load_cell_codes(run.by_cell, N_CELLS).toarray() == expected).all()
    sorted_codes = pl.concat([pl.read_parquet(path) for path in Run.open(run.folder / "by_feature").parts()])
    assert sorted_codes.columns == ["feature_id", "value", "cell_idx", "token_pos", "gene_id"]
    assert sorted_codes.height == frame.height


@pytest.mark.parametrize(("n_features", "dtype"), [(12, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_feature_ids_are_stored_in_two_bytes_if_they_fit(tmp_path: Path, n_features: int, dtype: str) -> None:
    last = np.array([0, n_features - 1])
    parquet.write_by_cell(tmp_path / "p", np.zeros(2, int), last, np.ones(2), n_features=n_features)
    schema = pq.read_schema(tmp_path / "p")
    assert [(field.name, str(field.type), field.nullable) for field in schema] == [
        ("cell_idx", "int64", False),
        ("feature_id", dtype, False),
        ("value", "float", False),
    ]
    assert pl.read_parquet(tmp_path / "p")["feature_id"].to_list() == last.tolist()


def test_codes_take_less_than_six_bytes_a_nonzero(tmp_path: Path, rng: np.random.Generator) -> None:
    n_cells, per_cell, n_features = 400, 300, 4096
    feature_id = np.concatenate([np.sort(rng.choice(n_features, per_cell, replace=False)) for _ in range(n_cells)])
    cell_idx = np.repeat(np.arange(n_cells), per_cell)
    value = rng.exponential(size=len(cell_idx)).astype(np.float32)
    rows = parquet.write_by_cell(tmp_path / "p", cell_idx, feature_id, value, n_features=n_features)
    assert (tmp_path / "p").stat().st_size < 6 * rows


def test_bad_codes_are_refused(tmp_path: Path, parts: list[TokenCodes]) -> None:
    with pytest.raises(InputError, match="cell_idx"):
        parquet.write_by_cell(tmp_path / "p", np.array([1, 0]), np.zeros(2, int), np.ones(2), n_features=3)
    with pytest.raises(InputError, match=r"3.* 0 to 2"):
        parquet.write_by_cell(tmp_path / "p", np.array([0, 0]), np.array([0, 3]), np.ones(2), n_features=3)
    run = codes.CodesRun.create(tmp_path / "codes", PLAN, n_shards=4)
    with pytest.raises(InputError, match=r"\[0, 10\).* 10 to 19"):
        run.commit_shard(0, parts[1], start=0, stop=10, split_of_cell=SPLIT)
    with pytest.raises(InputError, match=r"12 .* 13"):
        codes.CodesRun.create(tmp_path / "other", replace(PLAN, n_features=13), n_shards=4).commit_shard(
            0, parts[0], start=0, stop=10, split_of_cell=SPLIT
        )


def test_bad_plans_are_refused(tmp_path: Path, finished: codes.CodesRun) -> None:
    with pytest.raises(PlanMismatchError, match="pooling"):
        codes.CodesRun.create(finished.folder, replace(PLAN, pooling="mean"), n_shards=4)
    for plan, message in (
        (replace(PLAN, n_features=0), "n_features"),
        (replace(PLAN, level="gene"), "'gene'"),
        (replace(PLAN, level="token", pooling="mean"), "'mean'"),
    ):
        with pytest.raises(InputError, match=message):
            codes.CodesRun.create(tmp_path / "new", plan, n_shards=1)


def test_a_run_whose_cells_have_no_codes_can_be_read(tmp_path: Path) -> None:
    none = np.empty(0, np.int64)
    tokens = token_codes.TokenCodes(cell_idx=none, token_pos=none, gene_id=none, codes=sparse.csr_array((0, 12)))
    run = codes.CodesRun.create(tmp_path / "codes", PLAN, n_shards=1)
    run.commit_shard(0, tokens, start=0, stop=10, split_of_cell=SPLIT)
    run.finalize()
    assert codes.load_cell_codes(run.by_cell, 10).nnz == 0
    assert codes.load_statistics(run.folder).gene.height == 0


def test_codes_of_more_features_than_two_bytes_count_are_read_in_every_way(tmp_path: Path) -> None:
    n_features = 70_000
    values = np.zeros((4, n_features), np.float32)
    values[[0, 1, 1, 3], [69_999, 3, 69_999, 65_536]] = [1, 2, 3, 4]
    tokens = codes.TokenCodes(
        cell_idx=np.arange(4),
        token_pos=np.zeros(4, np.int32),
        gene_id=np.zeros(4, np.int32),
        codes=sparse.csr_array(values),
    )
    plan = toy_plan(CodesPlan, n_features=n_features, dataset="toy", top_tokens=20)
    run = codes.CodesRun.create(tmp_path / "codes", plan, n_shards=1)
    run.commit_shard(0, tokens, start=0, stop=4, split_of_cell=np.array(["test"] * 4))
    run.finalize()
    reader = CodeReader(tmp_path / "codes")
    frame = reader.scan().collect()
    assert frame.schema["feature_id"] == pl.Int32
    assert frame.rows() == [(0, 69_999, 1.0), (1, 3, 2.0), (1, 69_999, 3.0), (3, 65_536, 4.0)]
    assert reader.scan().filter(pl.col("feature_id") == 69_999).collect().rows() == [(0, 69_999, 1.0), (1, 69_999, 3.0)]
    assert reader.top_cells(69_999, 5).rows() == [(1, 3.0), (0, 1.0)]
    assert reader.features_of(1).rows() == [(69_999, 3.0), (3, 2.0)]
    assert (codes.load_cell_codes(run.by_cell, 4).toarray() == values).all()
