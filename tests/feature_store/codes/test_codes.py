from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from token_codes import TokenCodes, commit_tokens, cut_of, finish, toy_codes, write_codes

from feature_store import codes
from feature_store.codes import (
    CodeReader,
    CodesRun,
    Merging,
    build_merged,
    cells_of_shard,
    merge,
    parquet,
    span_of_shard,
)
from feature_store.codes.parquet import CellCodesWriter, feature_bounds, read_row_groups, write_by_feature
from feature_store.errors import IncompleteRunError, InputError, PlanMismatchError, QueryError
from feature_store.storage.commit import Run
from feature_store.storage.schemas import SPLITS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from feature_store.storage.plans import CodesPlan

N_CELLS, N_FEATURES = 40, 12
PLAN = toy_codes(cut_of(N_CELLS, 10), n_features=N_FEATURES, dataset="toy")
SPLIT = np.array(["train", "select", "test", "train"] * 10)
ALL = np.arange(N_CELLS)
PANEL = np.array([0, 1, 5, 8, 9, 11, 17, 23, 24, 31, 32, 38])
ATLAS = replace(PLAN, cut=cut_of(N_CELLS, 5, n_panel=len(PANEL), other_cells=15), top_cells=3, top_tokens=4)
"""Three shards of the panel, of 5, 5 and 2 cells, and three of the others."""


@pytest.fixture
def tokens(random_tokens: Callable[..., TokenCodes]) -> TokenCodes:
    return random_tokens(0, N_CELLS)


def of_cells(tokens: TokenCodes, cells: Any) -> TokenCodes:
    return tokens.select(np.isin(tokens.cell_idx, cells))


def write(folder: Path, tokens: TokenCodes, plan: CodesPlan = PLAN, shards: Any = None, panel: Any = ALL) -> CodesRun:
    """The shards that are pending, or those named, of a run that is not finished."""
    run = CodesRun.create(folder, plan)
    for shard in run.pending() if shards is None else shards:
        part = of_cells(tokens, cells_of_shard(run.cut, shard, panel))
        start, stop = span_of_shard(run.cut, shard, panel)
        commit_tokens(run, shard, part, start=start, stop=stop, split_of_cell=SPLIT)
    return run


@pytest.fixture
def finished(tmp_path: Path, tokens: TokenCodes) -> CodesRun:
    run = write(tmp_path / "codes", tokens)
    finish(run)
    return run


@pytest.fixture
def atlas(tmp_path: Path, tokens: TokenCodes) -> CodesRun:
    """Codes of which a panel of 12 of 40 cells has everything."""
    run = write(tmp_path / "atlas", tokens, ATLAS, panel=PANEL)
    finish(run)
    return run


def pooled(tokens: TokenCodes, how: str = "max") -> np.ndarray:
    dense = np.zeros((N_CELLS, N_FEATURES), np.float32)
    rows = tokens.codes.toarray()
    for cell in np.unique(tokens.cell_idx):
        own = rows[tokens.cell_idx == cell]
        dense[cell] = own.max(axis=0) if how == "max" else own.mean(axis=0, dtype=np.float64)
    return dense


@pytest.fixture
def expected(tokens: TokenCodes) -> np.ndarray:
    return pooled(tokens)


def compact(expected: np.ndarray, panel: np.ndarray, keep: int) -> np.ndarray:
    """Cell codes of which cells outside the panel keep the largest."""
    kept = expected.copy()
    for cell in np.setdiff1d(ALL, panel):
        kept[cell, np.argsort(-expected[cell], kind="stable")[keep:]] = 0
    return kept


def test_the_shards_hold_every_cell_once_and_their_ranges_follow_each_other() -> None:
    cut = ATLAS.cut
    cells = [cells_of_shard(cut, shard, PANEL) for shard in range(cut.n_shards)]
    assert np.concatenate(cells[:3]).tolist() == PANEL.tolist()
    assert np.sort(np.concatenate(cells)).tolist() == ALL.tolist()
    spans = [span_of_shard(cut, shard, PANEL) for shard in range(cut.n_shards)]
    assert spans == [(0, 11), (11, 32), (32, 40), (0, 15), (15, 30), (30, 40)]
    assert all(start <= own[0] and own[-1] < stop for own, (start, stop) in zip(cells, spans, strict=True))
    assert [cells_of_shard(PLAN.cut, shard, ALL).tolist() for shard in range(4)] == ALL.reshape(4, 10).tolist()
    assert PLAN.cut.n_shards == 4
    assert [span_of_shard(PLAN.cut, shard, ALL) for shard in range(4)] == [(0, 10), (10, 20), (20, 30), (30, 40)]


def test_cell_codes_come_back_as_the_maximum_over_tokens(finished: CodesRun, expected: np.ndarray) -> None:
    loaded = codes.load_cell_codes(finished, ALL)
    assert loaded.shape == (N_CELLS, N_FEATURES)
    assert loaded.dtype == np.float32
    assert loaded.has_sorted_indices
    assert (loaded.toarray() == expected).all()


def test_mean_pooling_is_stored_when_the_plan_says_so(tmp_path: Path, tokens: TokenCodes) -> None:
    run = write(tmp_path / "codes", tokens, replace(PLAN, pooling="mean"))
    finish(run)
    assert np.allclose(codes.load_cell_codes(run, ALL).toarray(), pooled(tokens, "mean"), rtol=1e-6)


def test_codes_of_some_cells_read_only_the_parts_that_hold_them(finished: CodesRun, expected: np.ndarray) -> None:
    finished.by_cell.part(3).unlink()
    cells = np.array([25, 3, 3, 11])
    assert (codes.load_cell_codes(finished, cells).toarray() == expected[cells]).all()


def test_cells_that_the_run_does_not_have_are_refused(finished: CodesRun) -> None:
    with pytest.raises(InputError, match="40 cells"):
        codes.load_cell_codes(finished, np.array([3, 40]))
    with pytest.raises(InputError, match="panel of 40 cells; 20"):
        codes.load_feature_codes(finished, ALL[:20], 0, 12)
    with pytest.raises(InputError, match="not in the panel"):
        codes.load_feature_codes(finished, np.arange(5, 45), 0, 12)


def test_cells_outside_the_panel_keep_their_largest_codes(atlas: CodesRun, expected: np.ndarray) -> None:
    assert ((expected > 0).sum(axis=1) > ATLAS.keep).any()
    assert (codes.load_cell_codes(atlas, ALL).toarray() == compact(expected, PANEL, ATLAS.keep)).all()
    some = np.array([39, 8, 2, 24])
    assert (codes.load_cell_codes(atlas, some).toarray() == compact(expected, PANEL, ATLAS.keep)[some]).all()


def test_the_codes_by_feature_are_those_of_the_panel(atlas: CodesRun, expected: np.ndarray) -> None:
    for start, stop in ((0, 12), (3, 8), (11, 12)):
        loaded = codes.load_feature_codes(atlas, PANEL, start, stop)
        assert (loaded.toarray() == expected[PANEL, start:stop]).all()


def test_statistics_of_all_cells_do_not_depend_on_the_panel(
    atlas: CodesRun, finished: CodesRun, expected: np.ndarray
) -> None:
    for feature in range(N_FEATURES):
        best = np.argsort(-expected[:, feature], kind="stable")[: ATLAS.top_cells]
        wanted = [(int(cell), float(expected[cell, feature])) for cell in best if expected[cell, feature] > 0]
        assert CodeReader(atlas.folder).top_cells(feature, 3).rows() == wanted
    tops = [codes.load_top_tokens(run, 0, N_FEATURES) for run in (atlas, finished)]
    head = tops[1].group_by("feature_id", maintain_order=True).head(ATLAS.top_tokens)
    assert tops[0].equals(head)
    assert_same_firing(atlas, finished)
    assert codes.n_without_tokens(atlas) == codes.n_without_tokens(finished) == 0


def assert_same_firing(*runs: CodesRun) -> None:
    frames = [pl.concat(map(pl.read_parquet, Run.open(run.folder / "merged" / "firing").parts())) for run in runs]
    assert frames[0].equals(frames[1])


def test_firing_counts_cells_and_tokens_by_split(finished: CodesRun, tokens: TokenCodes, expected: np.ndarray) -> None:
    stored = pl.concat(map(pl.read_parquet, Run.open(finished.folder / "merged" / "firing").parts()))
    dense = tokens.codes.toarray()
    wanted = []
    for feature in range(N_FEATURES):
        for split in SPLITS:
            of_split = np.isin(tokens.cell_idx, np.flatnonzero(split == SPLIT))
            values = dense[of_split, feature]
            n_cells = int((expected[split == SPLIT, feature] > 0).sum())
            if n_cells:
                wanted.append((feature, split, n_cells, int((values > 0).sum()), float(values.max())))
    assert stored.rows() == wanted
    firing = codes.panel_firing(finished)
    assert firing.tolist() == (expected > 0).sum(axis=0).tolist()


def test_cells_without_a_token_are_told_from_cells_whose_features_do_not_fire(
    tmp_path: Path, tokens: TokenCodes
) -> None:
    silent = np.isin(tokens.cell_idx, np.arange(20, 30))
    values = tokens.codes.toarray()
    values[silent] = 0
    some = replace(tokens, codes=sparse.csr_array(values)).select(~np.isin(tokens.cell_idx, (12, 17)))
    run = write(tmp_path / "codes", some)
    finish(run)
    wanted = ~np.isin(ALL, (12, 17))
    assert (codes.panel_with_tokens(run, ALL) == wanted).all()
    assert codes.n_without_tokens(run) == 2
    panel = write(tmp_path / "atlas", some, ATLAS, panel=PANEL)
    finish(panel)
    assert (codes.panel_with_tokens(panel, PANEL) == (PANEL != 17)).all()
    assert codes.n_without_tokens(panel) == 2


@pytest.mark.parametrize("bounds", [(0, 12), (3, 8), (4, 5), (11, 12)])
@pytest.mark.parametrize("level", ["cell", "token"])
@pytest.mark.parametrize("entries", [1, 35, 1 << 16])
def test_codes_of_a_range_of_features_are_those_columns_of_the_cell_codes(
    tmp_path: Path,
    tokens: TokenCodes,
    expected: np.ndarray,
    level: str,
    bounds: tuple[int, int],
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ENTRIES", entries)
    run = write(tmp_path / "codes", tokens, replace(PLAN, level=level))
    finish(run)
    loaded = codes.load_feature_codes(run, ALL, *bounds)
    assert loaded.dtype == np.float32
    assert loaded.has_sorted_indices
    assert (loaded.toarray() == expected[:, slice(*bounds)]).all()
    assert (loaded.data != 0).all()


def test_row_groups_by_feature_end_at_the_same_features_in_every_part(
    tmp_path: Path, tokens: TokenCodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ENTRIES", 50)
    run = write(tmp_path / "codes", tokens)
    finish(run)
    assert run.bounds == [0, 5, 10, 12]
    for name in ("by_feature", "stats/feature_gene"):
        for path in run.tables[name].parts():
            footer = pq.read_metadata(path)
            place = footer.schema.to_arrow_schema().names.index("feature_id")
            spans = [footer.row_group(i).column(place).statistics for i in range(footer.num_row_groups)]
            assert [(span.min // 5, span.max // 5) for span in spans] == [(0, 0), (1, 1), (2, 2)]
            _, footer = read_row_groups(path, "feature_id", 5, 10)
            frame, _ = read_row_groups(path, "feature_id", 5, 7, footer=footer)
            whole = pl.read_parquet(path)
            assert frame.equals(whole.filter(pl.col("feature_id").is_in([5, 6])))
            assert whole.equals(whole.sort("feature_id", maintain_order=True))


def test_a_range_of_features_reads_one_row_group_of_each_part_whatever_the_number_of_cells(
    tmp_path: Path, random_tokens: Callable[..., TokenCodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ENTRIES", 20)
    read: list[int] = []
    original = pq.ParquetFile.read_row_groups

    def counted(self: Any, groups: list[int], *args: Any, **options: Any) -> Any:
        table = original(self, groups, *args, **options)
        read.append(table.num_rows)
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    for n_cells in (40, 120):
        tokens = random_tokens(0, n_cells)
        plan = toy_codes(cut_of(n_cells, 10), n_features=N_FEATURES)
        parts = [of_cells(tokens, np.arange(low, low + 10)) for low in range(0, n_cells, 10)]
        run = write_codes(tmp_path / str(n_cells), plan, parts, np.array(["select"] * n_cells))
        read.clear()
        for low in range(0, N_FEATURES, 2):
            codes.load_feature_codes(run, np.arange(n_cells), low, low + 2)
        # every nonzero is read once for all ranges together
        assert sum(read) == run.by_feature.manifest().rows
        assert len(read) == run.cut.n_panel_shards * N_FEATURES // 2


def test_by_feature_holds_the_same_nonzeros_sorted_by_feature_and_cell(finished: CodesRun, expected: Any) -> None:
    for marker in finished.by_feature.manifest().shards:
        frame = pl.read_parquet(finished.by_feature.part(marker.shard))
        assert frame.columns == ["feature_id", "cell_idx", "value"]
        features, cells = np.nonzero(expected[marker.start : marker.stop].T)
        wanted = expected[cells + marker.start, features]
        assert frame.rows() == list(zip(features, cells + marker.start, wanted, strict=True))


def test_shards_wait_for_each_other(tmp_path: Path, tokens: TokenCodes) -> None:
    run = write(tmp_path / "codes", tokens, shards=[0, 1, 3])
    with pytest.raises(IncompleteRunError):
        build_merged(run.folder)
    with pytest.raises(IncompleteRunError, match=r"\[2\]"):
        run.finalize_shards()


def test_a_run_resumed_after_losing_any_of_its_tables_equals_an_undisturbed_one(
    tmp_path: Path, tokens: TokenCodes, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    finish(write(tmp_path / "undisturbed", tokens, ATLAS, panel=PANEL))
    run = write(tmp_path / "resumed", tokens, ATLAS, shards=[4, 1, 5], panel=PANEL)
    (run.tables["stats/gene"].path / "part-00001.json").unlink()
    (run.tables["stats/feature_token"].path / "part-00004.parquet").write_bytes(b"")
    assert run.compact is not None
    run.compact.part(2).unlink()
    assert run.pending() == [0, 1, 2, 3, 4, 5]
    assert [run.committed(shard) for shard in range(6)] == [False] * 6
    finish(write(tmp_path / "resumed", tokens, ATLAS, panel=PANEL))
    assert folder_hashes(tmp_path / "resumed") == folder_hashes(tmp_path / "undisturbed")


def test_merging_resumes_and_does_not_depend_on_how_many_parts_are_merged_at_once(
    tmp_path: Path,
    tokens: TokenCodes,
    folder_hashes: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("feature_store.codes.codes_run.MERGE_ROWS", 100)
    run = write(tmp_path / "codes", tokens, ATLAS, panel=PANEL)
    run.finalize_shards()
    build_merged(run.folder)
    assert Merging(run.folder).bounds == list(range(13))
    before = folder_hashes(run.folder / "merged")
    (run.folder / "merged" / "firing" / "MANIFEST.json").unlink()
    (run.folder / "merged" / "firing" / "part-00002.json").unlink()
    (run.folder / "merged" / "feature_cell" / "part-00004.parquet").write_bytes(b"truncated")
    assert Merging(run.folder).pending() == [2, 4]
    build_merged(run.folder)
    assert folder_hashes(run.folder / "merged") == before
    monkeypatch.setattr(merge, "MERGED_ROWS", 2)
    shutil.rmtree(run.folder / "merged")
    build_merged(run.folder)
    assert folder_hashes(run.folder / "merged") == before


def test_counts_of_tokens_by_gene_are_those_of_a_brute_force_count(atlas: CodesRun, tokens: TokenCodes) -> None:
    inside = np.isin(tokens.cell_idx, PANEL)
    fired: dict[tuple[int, int, int], int] = {}
    total: dict[tuple[int, int], int] = {}
    rows = zip(tokens.cell_idx[inside], tokens.gene_id[inside], tokens.codes.toarray()[inside], strict=True)
    for cell, gene, row in rows:
        split = SPLITS.index(SPLIT[cell])
        total[split, gene] = total.get((split, gene), 0) + 1
        for feature in np.flatnonzero(row):
            fired[feature, split, gene] = fired.get((feature, split, gene), 0) + 1
    counts = codes.load_token_counts(atlas, 0, N_FEATURES)
    by = ["feature_id", "split", "gene_id"]
    summed = counts.feature_gene.group_by(by).agg(pl.col("n_tokens").sum())
    assert {tuple(row[:3]): row[3] for row in summed.rows()} == fired
    genes = counts.gene.group_by("split", "gene_id").agg(pl.col("n_tokens").sum())
    assert {tuple(row[:2]): row[2] for row in genes.rows()} == total
    some = codes.load_token_counts(atlas, 3, 8)
    assert some.feature_gene.equals(counts.feature_gene.filter(pl.col("feature_id").is_between(3, 7)))


def test_codes_of_tokens_are_stored_with_position_and_gene_and_pool_to_the_same_cells(
    tmp_path: Path, tokens: TokenCodes, expected: np.ndarray
) -> None:
    run = write(tmp_path / "codes", tokens, replace(PLAN, level="token"))
    finish(run)
    frame = pl.concat([pl.read_parquet(path) for path in run.by_cell.parts()])
    assert frame.columns == ["cell_idx", "token_pos", "gene_id", "feature_id", "value"]
    assert frame.height == tokens.codes.nnz
    assert frame.equals(frame.sort("cell_idx", "token_pos", "feature_id"))
    assert (codes.load_cell_codes(run, ALL).toarray() == expected).all()
    sorted_codes = pl.concat([pl.read_parquet(path) for path in run.by_feature.parts()])
    assert sorted_codes.columns == ["feature_id", "cell_idx", "token_pos", "gene_id", "value"]
    assert sorted_codes.height == frame.height
    panel = write(tmp_path / "atlas", tokens, replace(ATLAS, level="token"), panel=PANEL)
    finish(panel)
    assert (codes.load_cell_codes(panel, ALL).toarray() == compact(expected, PANEL, ATLAS.keep)).all()


@pytest.mark.parametrize(("n_features", "dtype"), [(12, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_feature_ids_are_stored_in_two_bytes_if_they_fit(tmp_path: Path, n_features: int, dtype: str) -> None:
    columns = {"cell_idx": np.zeros(2, int), "feature_id": np.array([0, n_features - 1]), "value": np.ones(2)}
    with CellCodesWriter(tmp_path / "p", n_features=n_features, names=list(columns)) as writer:
        writer.write(columns)
    schema = pq.read_schema(tmp_path / "p")
    assert [(field.name, str(field.type), field.nullable) for field in schema] == [
        ("cell_idx", "int64", False),
        ("feature_id", dtype, False),
        ("value", "float", False),
    ]
    assert pl.read_parquet(tmp_path / "p")["feature_id"].to_list() == columns["feature_id"].tolist()


def test_a_part_is_the_same_however_it_is_given(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "BY_CELL_ROW_GROUP_ROWS", 64)
    columns = {
        "cell_idx": np.sort(rng.integers(0, 90, 700)),
        "feature_id": rng.integers(0, 12, 700),
        "value": rng.random(700, np.float32),
    }
    for name, cuts in {"once": [0, 700], "often": [0, 1, 60, 64, 64, 300, 699, 700]}.items():
        with CellCodesWriter(tmp_path / name, n_features=12, names=list(columns)) as writer:
            for low, high in pairwise(cuts):
                writer.write({key: column[low:high] for key, column in columns.items()})
        assert writer.n_rows == 700
    assert (tmp_path / "once").read_bytes() == (tmp_path / "often").read_bytes()
    assert pq.read_metadata(tmp_path / "once").num_row_groups == 11


def test_codes_take_less_than_six_bytes_a_nonzero_in_both_orders(tmp_path: Path, rng: np.random.Generator) -> None:
    n_cells, per_cell, n_features = 400, 300, 4096
    feature_id = np.concatenate([np.sort(rng.choice(n_features, per_cell, replace=False)) for _ in range(n_cells)])
    columns = {
        "cell_idx": np.repeat(np.arange(n_cells), per_cell),
        "feature_id": feature_id,
        "value": rng.exponential(size=n_cells * per_cell).astype(np.float32),
    }
    with CellCodesWriter(tmp_path / "p", n_features=n_features, names=list(columns)) as writer:
        writer.write(columns)
    order = np.argsort(feature_id, kind="stable")
    by_feature = {name: column[order] for name, column in columns.items()}
    rows = write_by_feature(tmp_path / "q", by_feature, feature_bounds(n_features, n_cells))
    assert (tmp_path / "p").stat().st_size < 6 * rows
    assert (tmp_path / "q").stat().st_size < 6 * rows


def test_bad_codes_are_refused(tmp_path: Path, tokens: TokenCodes) -> None:
    columns = {"cell_idx": np.array([1, 0]), "feature_id": np.zeros(2, int), "value": np.ones(2)}
    with (
        CellCodesWriter(tmp_path / "p", n_features=3, names=list(columns)) as writer,
        pytest.raises(InputError, match="cell_idx"),
    ):
        writer.write(columns)
    with CellCodesWriter(tmp_path / "p", n_features=3, names=list(columns)) as writer:
        writer.write({**columns, "cell_idx": np.array([4, 5])})
        with pytest.raises(InputError, match="cell_idx"):
            writer.write({**columns, "cell_idx": np.array([3, 6])})
        with pytest.raises(InputError, match=r"3.* 0 to 2"):
            writer.write({**columns, "cell_idx": np.array([6, 6]), "feature_id": np.array([0, 3])})
    run = CodesRun.create(tmp_path / "codes", PLAN)
    with pytest.raises(InputError, match=r"\[0, 10\).* 10 to 18"):
        commit_tokens(run, 0, of_cells(tokens, np.arange(10, 20)), start=0, stop=10, split_of_cell=SPLIT)


def test_bad_plans_are_refused(tmp_path: Path, finished: CodesRun) -> None:
    with pytest.raises(PlanMismatchError, match="pooling"):
        CodesRun.create(finished.folder, replace(PLAN, pooling="mean"))
    for plan, message in (
        (replace(PLAN, n_features=0), "n_features"),
        (replace(PLAN, level="gene"), "'gene'"),
        (replace(PLAN, level="token", pooling="mean"), "'mean'"),
    ):
        with pytest.raises(InputError, match=message):
            CodesRun.create(tmp_path / "new", plan)


def test_a_run_whose_cells_have_no_codes_can_be_read(tmp_path: Path) -> None:
    none = np.empty(0, np.int64)
    tokens = TokenCodes(cell_idx=none, token_pos=none, gene_id=none, codes=sparse.csr_array((0, 12), dtype=np.float32))
    plan = toy_codes(cut_of(10, 10), n_features=N_FEATURES)
    run = write_codes(tmp_path / "codes", plan, [tokens], SPLIT)
    assert codes.load_cell_codes(run, np.arange(10)).nnz == 0
    assert codes.load_feature_codes(run, np.arange(10), 0, 12).nnz == 0
    assert codes.load_token_counts(run, 0, 12).gene.height == 0
    reader = CodeReader(run.folder)
    assert reader.top_cells(3, 5).height == reader.features_of(3).height == reader.codes_of(3).height == 0
    assert reader.scan().collect().height == 0


def test_more_top_cells_than_are_kept_are_of_all_cells_or_refused(
    atlas: CodesRun, tmp_path: Path, tokens: TokenCodes, expected: np.ndarray
) -> None:
    with pytest.raises(QueryError, match="LIMIT 4"):
        CodeReader(atlas.folder).top_cells(2, 4)
    run = write(tmp_path / "few", tokens, replace(PLAN, top_cells=2))
    finish(run)
    order = np.argsort(-expected[:, 2], kind="stable")
    wanted = [(int(cell), float(expected[cell, 2])) for cell in order if expected[cell, 2] > 0]
    assert len(wanted) > 4
    assert CodeReader(run.folder).top_cells(2, 2).rows() == wanted[:2]
    assert CodeReader(run.folder).top_cells(2, 40).rows() == wanted


def test_codes_of_the_panel_and_of_the_others_are_two_tables(atlas: CodesRun, expected: np.ndarray) -> None:
    reader = CodeReader(atlas.folder)
    others = np.setdiff1d(ALL, PANEL)
    for frame, cells in ((reader.scan(), PANEL), (reader.scan_compact(), others)):
        kept = compact(expected, PANEL, ATLAS.keep)
        wanted = [(int(c), int(f), float(kept[c, f])) for c in cells for f in np.flatnonzero(kept[c])]
        assert frame.collect().rows() == wanted
        one = int(cells[4])
        assert frame.filter(pl.col("cell_idx") == one).collect().rows() == [row for row in wanted if row[0] == one]
        assert frame.filter(pl.col("feature_id") == 7).collect().rows() == [row for row in wanted if row[1] == 7]
        assert frame.head(5).collect().rows() == wanted[:5]
        best = sorted(((f, v) for c, f, v in wanted if c == one), key=lambda pair: (-pair[1], pair[0]))
        assert reader.features_of(one).rows() == best
    assert reader.codes_of(7).rows() == [(int(c), float(expected[c, 7])) for c in PANEL if expected[c, 7] > 0]


def test_codes_of_more_features_than_two_bytes_count_are_read_in_every_way(tmp_path: Path) -> None:
    n_features = 70_000
    values = np.zeros((4, n_features), np.float32)
    values[[0, 1, 1, 3], [69_999, 3, 69_999, 65_536]] = [1, 2, 3, 4]
    tokens = TokenCodes(
        cell_idx=np.arange(4),
        token_pos=np.zeros(4, np.int32),
        gene_id=np.zeros(4, np.int32),
        codes=sparse.csr_array(values),
    )
    plan = toy_codes(cut_of(4, 4), n_features=n_features)
    run = write_codes(tmp_path / "codes", plan, [tokens], np.array(["test"] * 4))
    reader = CodeReader(tmp_path / "codes")
    frame = reader.scan().collect()
    assert frame.schema["feature_id"] == pl.Int32
    assert frame.rows() == [(0, 69_999, 1.0), (1, 3, 2.0), (1, 69_999, 3.0), (3, 65_536, 4.0)]
    assert reader.scan().filter(pl.col("feature_id") == 69_999).collect().rows() == [(0, 69_999, 1.0), (1, 69_999, 3.0)]
    assert reader.top_cells(69_999, 5).rows() == [(1, 3.0), (0, 1.0)]
    assert reader.features_of(1).rows() == [(69_999, 3.0), (3, 2.0)]
    assert (codes.load_cell_codes(run, np.arange(4)).toarray() == values).all()
    assert codes.load_feature_codes(run, np.arange(4), 65_000, 70_000).nnz == 3
