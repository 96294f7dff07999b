from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
import toy_plans
from deleted_runs import delete_run
from token_codes import cut_of, toy_codes, write_codes
from toy_plans import toy_table

import feature_store
from feature_store import FeatureStore
from feature_store.codes import load_cell_codes
from feature_store.errors import InputError, IntegrityError, NotFoundError, QueryError
from feature_store.query.run_list import run_list
from feature_store.storage import commit, schemas
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout
from feature_store.storage.plans import AssociationsPlan, SteeringResultsPlan

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES = ["cells", "codes", "cell_tokens", "feature_cell", "feature_firing", *ASSOCIATION_TABLES, "steering"]


@pytest.fixture
def store(small_store: Any) -> FeatureStore:
    return FeatureStore.open(small_store.layout.root)


@pytest.fixture
def dense(small_store: Any) -> np.ndarray:
    return load_cell_codes(small_store.codes, np.arange(40)).toarray()


def test_the_package_exports_what_it_says() -> None:
    assert feature_store.__all__ == ["FeatureStore", "Layout", "Lineage"]
    assert all(getattr(feature_store, name) for name in feature_store.__all__)
    with pytest.raises(AttributeError, match="'Feature'"):
        feature_store.Feature  # noqa: B018


def test_every_table_of_the_store_has_its_design_name(store: FeatureStore) -> None:
    assert store.tables() == TABLES
    for table in TABLES:
        assert isinstance(store.frame(table), pl.LazyFrame)
    for table in TABLES[:-1]:
        schemas.check(table, store.frame(table).collect())


JOINED = (
    "SELECT c.*, f.density FROM codes c JOIN features f ON c.feature_id = f.feature_id ORDER BY c.cell_idx, f.density"
)


def test_codes_and_features_join_in_sql(store: FeatureStore, dense: np.ndarray) -> None:
    result = store.sql(
        "SELECT c.feature_id, COUNT(*) AS n, MAX(c.value) AS top FROM codes c "
        "JOIN features f ON c.feature_id = f.feature_id WHERE NOT f.dead GROUP BY c.feature_id ORDER BY c.feature_id"
    )
    assert result["feature_id"].to_list() == list(range(1, 12))
    assert result["n"].to_list() == (dense[:, 1:] > 0).sum(axis=0).tolist()
    assert np.allclose(result["top"].to_numpy(), dense[:, 1:].max(axis=0))


QUESTIONS_TO_CODES = [
    "SELECT * FROM codes",
    "SELECT * FROM codes WHERE feature_id = 4",
    "SELECT value FROM codes WHERE feature_id = 11 LIMIT 3",
    "SELECT cell_idx FROM codes WHERE feature_id = 4 AND value > 0.5 AND cell_idx BETWEEN 3 AND 30",
    "SELECT cell_idx, feature_id FROM codes WHERE feature_id = 3 AND (cell_idx < 5 OR value > 0.9)",
    "SELECT * FROM codes WHERE feature_id = 3 OR cell_idx = 7",
    "SELECT * FROM codes WHERE feature_id IN (2, 9) OR feature_id > 10",
    "SELECT * FROM codes WHERE feature_id BETWEEN 3 AND 3",
    "SELECT * FROM codes WHERE feature_id = 99",
    "SELECT * FROM codes WHERE feature_id = -1 AND cell_idx = 4",
    "SELECT * FROM codes WHERE NOT feature_id <> 5",
    "SELECT * FROM codes WHERE feature_id % 12 = 5",
    "SELECT * FROM codes WHERE cell_idx = 25",
    "SELECT * FROM codes WHERE cell_idx >= 38 AND feature_id = 2",
    "SELECT * FROM codes WHERE cell_idx = 40",
    "SELECT * FROM codes WHERE feature_id = 4 AND value = (SELECT MAX(value) FROM codes WHERE feature_id = 4)",
    "SELECT * FROM (SELECT * FROM codes LIMIT 30) AS some WHERE feature_id = 4",
    "SELECT COUNT(*) AS n FROM codes",
    "SELECT COUNT(*) AS n FROM codes WHERE feature_id = 4",
    "SELECT feature_id, COUNT(*) AS n FROM codes GROUP BY feature_id HAVING feature_id = 4",
    "SELECT a.cell_idx, a.value, b.value AS other FROM codes a JOIN codes b ON a.cell_idx = b.cell_idx "
    "WHERE a.feature_id = 4 AND b.feature_id = 5 ORDER BY a.cell_idx",
]


@pytest.mark.parametrize("share", [1, 4, 1000])
def test_codes_are_the_same_rows_in_the_same_order_whichever_sort_order_answers(
    store: FeatureStore, small_store: Any, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    monkeypatch.setattr("feature_store.codes.code_reader.SPARSE_SHARE", share)
    by_cell = pl.concat([pl.read_parquet(part) for part in small_store.codes.by_cell.parts()])
    plain = pl.SQLContext({"codes": by_cell.with_columns(pl.col("feature_id").cast(pl.Int32))}, eager=True)
    for query in QUESTIONS_TO_CODES:
        assert store.sql(query).equals(plain.execute(query)), query


def test_sql_over_codes_reads_only_the_parts_that_the_filter_speaks_of(
    store: FeatureStore, small_store: Any, dense: np.ndarray
) -> None:
    folder = small_store.codes.folder
    for part in (folder / "by_cell").glob("*.parquet"):
        if part.name != "part-00001.parquet":
            part.write_bytes(b"not Parquet")
    found = store.sql("SELECT cell_idx, value FROM codes WHERE feature_id = 7")
    assert found["cell_idx"].to_list() == np.flatnonzero(dense[:, 7]).tolist()
    found = store.sql("SELECT feature_id FROM codes WHERE cell_idx IN (12, 17) AND value > 0 ORDER BY feature_id")
    assert found["feature_id"].to_list() == np.sort(np.nonzero(dense[[12, 17]])[1]).tolist()
    assert store.frame("codes").filter(pl.col("feature_id") == 7).collect().height == np.count_nonzero(dense[:, 7])


def test_steering_is_that_of_the_sae_the_store_is_opened_at(small_store: Any) -> None:
    layout = small_store.layout
    by_cell = layout.associations_dir("b0b0")
    for table in ASSOCIATION_TABLES:
        frame = commit.read_table(layout.associations_dir("a550c") / table)
        commit.write_table(by_cell / table, frame, toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="mine"))
    for run, sae in (("aaa", "mine"), ("bbb", "other")):
        folder = layout.steering_dir(run)
        for table in ("results", "variants", "head")[: 3 if sae == "mine" else 2]:
            commit.write_table(folder / table, pl.DataFrame({"name": [table]}), toy_table(SteeringResultsPlan, sae=sae))
    mine = FeatureStore.open(layout.root, associations="b0b0")
    assert {run for table in ("steering", "steering_variants", "steering_head") for run in mine.sql(
        f"SELECT run FROM {table} WHERE name IS NOT NULL")["run"]} == {"aaa"}  # fmt: skip
    assert "steering_scores" not in mine.tables()
    with pytest.raises(QueryError, match=r"'steering_scores'.*`scsae steer --store"):
        mine.frame("steering_scores")


def test_sql_sees_every_steering_run_with_its_id(store: FeatureStore) -> None:
    result = store.sql("SELECT run, control FROM steering WHERE effect > 0.2")
    assert result.rows() == [("57ee4", "edited")]


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("SELECT * FROM feature", "'feature'.*'features'.*cells, codes"),
        ("SELECT aurok FROM feature_label", r"'aurok'.* auroc \(feature_label\)"),
        ("SELECT l.aurok FROM feature_label l", r"'aurok'.* auroc \(feature_label\)"),
        ("SELECT AUROC FROM feature_label", r"'AUROC'.* auroc \(feature_label\)"),
        ("SELECT xyzzy FROM cells", "'xyzzy'; cells has cell_idx, cell_id, "),
        ("SELECT foo FROM cells", "'foo'; cells has cell_idx, cell_id, "),
        ("SELECT foo FROM genes_of_none", "'genes_of_none'"),
        ("SELECT feature_id FROM codes WHERE", "sql parser error"),
        ("SELECT nonsense(value) FROM codes", "unsupported function"),
    ],
)
def test_the_error_of_a_wrong_query_names_the_closest_tables_and_columns(
    store: FeatureStore, query: str, value: str
) -> None:
    with pytest.raises(QueryError, match=value):
        store.sql(query)


def test_features_are_ranked_on_select_cells_and_reported_on_test_cells(store: FeatureStore) -> None:
    found = store.features_for(label="B")
    assert found.select("split", "feature_id", "select_auroc", "auroc").rows() == [
        ("test", 3, 0.99, 0.7),
        ("test", 5, 0.6, 0.9),
    ]
    assert {"class", "density", "top_genes"} <= set(found.columns)


def test_features_of_a_gene_come_by_correlation_and_of_a_gene_set_by_p(store: FeatureStore) -> None:
    assert store.features_for(gene="MS4A1")["feature_id"].to_list() == [5, 3]
    assert store.features_for(gene_set="B cell receptor")["feature_id"].to_list() == [5, 3]


def test_an_unknown_label_gene_or_set_is_answered_with_the_nearest(store: FeatureStore) -> None:
    with pytest.raises(QueryError, match=r"'ms4a2' in feature_gene.*'MS4A1'.*CD79A, MS4A1"):
        store.features_for(gene="ms4a2")
    with pytest.raises(QueryError, match=r"'NK' in feature_label.* B"):
        store.features_for(label="NK")
    with pytest.raises(QueryError, match=r"gene_set.* gene, label"):
        store.features_for(gene="MS4A1", label="B")
    with pytest.raises(QueryError, match="none"):
        store.features_for()


def test_a_name_that_other_associations_have_is_answered_with_their_run_and_data_set(
    store: FeatureStore, small_store: Any
) -> None:
    assert "other associations" not in store.why_empty("SELECT * FROM feature_label WHERE label = 'NK cell'")
    tables = {name: store.frame(name).collect() for name in ASSOCIATION_TABLES}
    tables["feature_label"] = tables["feature_label"].with_columns(label=pl.lit("NK cell"))
    for run, control in (("b0a", None), ("c0a", "pca")):
        plan = toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae", control_of=control)
        for name, frame in tables.items():
            commit.write_table(small_store.layout.associations_dir(run) / name, frame, plan)
    asked = FeatureStore.open(small_store.layout.root, associations="a550c")
    where = r"'nk CELL' in feature_label of associations a550c \(data set toy\).*--associations b0a \(data set toy\)"
    with pytest.raises(QueryError, match=where) as refused:
        asked.features_for(label="nk CELL")
    assert "c0a" not in str(refused.value)
    assert "--associations b0a" in asked.why_empty("SELECT * FROM feature_label WHERE label = 'NK cell'")
    with pytest.raises(QueryError, match=r"no feature 99 in codes c0de \(data set toy\), which have features 0 to 11$"):
        asked.codes_of(99)


def test_a_name_in_another_case_is_found_unless_it_may_be_two(store: FeatureStore, small_store: Any) -> None:
    assert store.features_for(gene="ms4a1").equals(store.features_for(gene="MS4A1"))
    assert store.features_for(gene_set="b CELL receptor").equals(store.features_for(gene_set="B cell receptor"))
    labels = store.frame("feature_label").collect()
    both = pl.concat([labels.with_columns(label=pl.lit(name)) for name in ("Nk", "NK")])
    folder = small_store.layout.associations_dir("a550c") / "feature_label"
    shutil.rmtree(folder)
    commit.write_table(folder, both, toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae"))
    reopened = FeatureStore.open(small_store.layout.root)
    assert set(reopened.features_for(label="NK")["label"]) == {"NK"}
    with pytest.raises(QueryError, match=r"'nk' in feature_label.*'NK' or 'Nk'"):
        reopened.features_for(label="nk")


def test_a_label_that_two_kinds_have_is_ranked_within_the_one_that_is_named(
    store: FeatureStore, small_store: Any
) -> None:
    labels, expected = store.frame("feature_label").collect(), store.features_for(label="B")
    batch = labels.with_columns(label_kind=pl.lit("batch"), auroc=1 - pl.col("auroc"))
    folder = small_store.layout.associations_dir("a550c") / "feature_label"
    shutil.rmtree(folder)
    commit.write_table(
        folder, pl.concat([labels, batch]), toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae")
    )
    reopened = FeatureStore.open(small_store.layout.root)
    assert reopened.features_for(label="B", kind="cell_type").equals(expected)
    assert reopened.features_for(label="B", kind="batch")["feature_id"].to_list() == [5, 3]
    with pytest.raises(QueryError, match=r"'B'.* batch, cell_type.*--kind"):
        reopened.features_for(label="B")
    with pytest.raises(QueryError, match=r"'B'.*'donor'.* batch, cell_type"):
        reopened.features_for(label="B", kind="donor")
    with pytest.raises(QueryError, match=r"gene.*--kind 'batch'"):
        reopened.features_for(gene="MS4A1", kind="batch")


def test_a_label_without_figures_of_test_cells_is_said_to_have_none(store: FeatureStore, small_store: Any) -> None:
    labels = store.frame("feature_label").filter(pl.col("split") == "select").collect()
    folder = small_store.layout.associations_dir("a550c") / "feature_label"
    shutil.rmtree(folder)
    commit.write_table(folder, labels, toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae"))
    with pytest.raises(QueryError, match=r"'B'.* select .*SELECT \* FROM feature_label"):
        FeatureStore.open(small_store.layout.root).features_for(label="B")


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("SELECT * FROM feature_label WHERE label = 'b'", "'b' in feature_label.*'B'"),
        ("SELECT * FROM feature_gene g WHERE g.gene IN ('MS4A2')", "'MS4A2' in feature_gene.*'MS4A1'"),
        ("SELECT * FROM cells WHERE \"cell_type\" = 'NK'", "'NK' in cells"),
        ("SELECT * FROM feature_label WHERE label = 'B' AND auroc > 2", "^[^']+$"),
        ("SELECT * FROM cells WHERE cell_idx > 99", "^[^']+$"),
    ],
)
def test_a_query_without_an_answer_is_told_which_name_its_table_does_not_hold(
    store: FeatureStore, query: str, why: str
) -> None:
    assert store.sql(query).is_empty()
    assert re.search(why, store.why_empty(query))


@pytest.mark.parametrize("feature", [0, 4, 11])
def test_top_cells_are_those_with_the_largest_code(store: FeatureStore, dense: np.ndarray, feature: int) -> None:
    column = dense[:, feature]
    order = [int(cell) for cell in np.lexsort((np.arange(40), -column)) if column[cell] > 0]
    found = store.top_cells(feature, 7)
    assert found["cell_idx"].to_list() == order[:7]
    assert np.allclose(found["value"].to_numpy(), column[order[:7]])
    assert found["cell_type"].to_list() == [["B", "T"][cell % 2] for cell in order[:7]]
    assert store.top_cells(feature, 1000).height == len(order)


def test_top_cells_are_the_same_whether_or_not_the_cell_table_is_kept(
    store: FeatureStore, small_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = store.top_cells(4, 9), store.top_cells(4, 9)
    monkeypatch.setattr("feature_store.query.store.CELLS_KEPT", 39)
    other = FeatureStore.open(small_store.layout.root)
    assert [other.top_cells(4, 9).equals(first) for _ in range(2)] == [True, True]
    assert second.equals(first)


@pytest.mark.parametrize("cell", [0, 17, 39])
def test_features_of_a_cell_are_those_with_the_largest_code(store: FeatureStore, dense: np.ndarray, cell: int) -> None:
    order = [int(f) for f in np.lexsort((np.arange(12), -dense[cell])) if dense[cell, f] > 0]
    found = store.features_of(cell, 3)
    assert found["feature_id"].to_list() == order[:3]
    assert np.allclose(found["value"].to_numpy(), dense[cell, order[:3]])
    assert "top_genes" in found.columns


def test_a_cell_is_found_by_its_name_if_the_name_is_one_cells(store: FeatureStore) -> None:
    assert store.features_of("cell-17").equals(store.features_of(17))
    with pytest.raises(QueryError, match=r"'cell-0'.*cell_idx.* 0, 1"):
        store.features_of("cell-0")
    for cell in (40, -1, np.int64(40)):
        with pytest.raises(QueryError, match=f"{cell}.* toy .*0 to 39"):
            store.features_of(cell)
    for cell in (17.0, 17.5, None):
        with pytest.raises(QueryError, match=f"{cell!r}.*cell_id.*cell_idx"):
            store.features_of(cell)


@pytest.fixture
def numbered(small_store: Any) -> FeatureStore:
    """The cells are called "0" to "39", each by another number than its place."""
    folder = small_store.layout.cells_dir("toy")
    shutil.rmtree(folder)
    cells = small_store.cells.with_columns(cell_id=((pl.col("cell_idx") * 7 + 5) % 40).cast(pl.String))
    commit.write_table(folder, cells, {"table": "cells", "dataset": "toy"})
    return FeatureStore.open(small_store.layout.root)


def test_a_cell_id_of_digits_is_an_id_and_a_number_is_a_place(numbered: FeatureStore) -> None:
    for place in range(40):
        name = str((place * 7 + 5) % 40)
        assert numbered.features_of(name).equals(numbered.features_of(place))
        assert numbered.features_of(np.int64(place)).equals(numbered.features_of(place))
    assert not numbered.features_of("17").equals(numbered.features_of(17))
    chosen = numbered.to_anndata(cells=["17", 17, np.int32(5)], X=None)
    assert chosen.obs_names.tolist() == ["17", str((17 * 7 + 5) % 40), "0"]
    for missing in ("40", "017", "17.0", "-1"):
        with pytest.raises(QueryError, match=f"cell_id {missing!r}.*cell_idx 0 to 39.*--cell-idx"):
            numbered.features_of(missing)


@pytest.mark.parametrize(
    ("cell", "near"),
    [("cell-39-1", "'cell-39'"), ("CELL-25", "'cell-25'"), ("sample_cell-31", "'cell-31'"), ("l-17", "'cell-17'")],
)
def test_a_cell_id_with_more_or_less_around_it_is_answered_with_the_cell_that_it_may_be(
    store: FeatureStore, cell: str, near: str
) -> None:
    with pytest.raises(QueryError, match=f"{cell!r}.*{near}"):
        store.features_of(cell)


def test_a_feature_that_the_codes_do_not_have_is_refused(store: FeatureStore) -> None:
    with pytest.raises(QueryError, match=r"12.* 0 to 11"):
        store.top_cells(12)


def test_a_lookup_opens_only_the_part_that_the_manifest_names(
    store: FeatureStore, small_store: Any, dense: np.ndarray
) -> None:
    folder = small_store.codes.folder
    for shard in range(4):
        (folder / "by_feature" / f"part-0000{shard}.parquet").write_bytes(b"not Parquet")
    for shard in (0, 2, 3):
        (folder / "by_cell" / f"part-0000{shard}.parquet").write_bytes(b"not Parquet")
    assert store.top_cells(7)["value"][0] == dense[:, 7].max()
    assert store.features_of(15)["value"][0] == dense[15].max()


@pytest.mark.parametrize("data", [b"", b"PAR1 truncated", None])
def test_a_damaged_part_behind_a_query_is_named_with_what_to_type(
    store: FeatureStore, small_store: Any, data: bytes | None
) -> None:
    folder = small_store.layout.codes_dir("c0de")
    part = folder / "by_cell" / "part-00002.parquet"
    part.write_bytes(data) if data is not None else part.unlink()
    with pytest.raises(IntegrityError, match=r"by_cell/part-00002\.parquet.*`scsae verify"):
        store.sql("SELECT SUM(value) AS total FROM codes")
    with pytest.raises(IntegrityError, match=r"part-00002\.parquet"):
        store.features_of(25)
    with pytest.raises(IntegrityError, match=r"part-00002\.parquet"):
        load_cell_codes(small_store.codes, np.arange(40))


def test_codes_of_tokens_answer_the_same_questions(
    small_store: Any, tmp_path: Path, dense: np.ndarray, store: FeatureStore
) -> None:
    layout = Layout(tmp_path / "tokens")
    shutil.copytree(small_store.layout.cells_dir("toy"), layout.cells_dir("toy"))
    plan = toy_codes(cut_of(40, 40), n_features=12, dataset="toy", level="token", sae="5ae")
    write_codes(layout.codes_dir("70ce"), plan, [small_store.tokens], small_store.cells["split"].to_numpy())
    other = FeatureStore.open(layout.root)
    assert other.tables() == ["cells", "codes", "cell_tokens", "feature_cell", "feature_firing"]
    assert other.top_cells(4, 7).equals(store.top_cells(4, 7))
    assert other.features_of(17, 5).equals(store.features_of(17, 5).select("feature_id", "value"))


def test_the_lineage_follows_the_plans_and_not_the_newest_runs(store: FeatureStore, small_store: Any) -> None:
    layout = small_store.layout
    commit.write_table(layout.cells_dir("newer"), small_store.cells, {"dataset": "newer"})
    shutil.copytree(layout.codes_dir("c0de"), layout.codes_dir("f00d"))
    reopened = FeatureStore.open(layout.root)
    assert reopened.lineage == store.lineage
    assert (reopened.lineage.dataset, reopened.lineage.codes, reopened.lineage.associations) == ("toy", "c0de", "a550c")


def test_a_run_can_be_named_by_its_beginning(small_store: Any) -> None:
    assert FeatureStore.open(small_store.layout.root, associations="a55").lineage.associations == "a550c"
    with pytest.raises(NotFoundError, match=r"'zz'.*: c0de"):
        FeatureStore.open(small_store.layout.root, codes="zz")
    with pytest.raises(NotFoundError, match="'x'"):
        FeatureStore.open(small_store.layout.root, dataset="x")


def test_an_unfinished_run_is_not_seen_and_a_writer_beside_changes_nothing(
    store: FeatureStore, small_store: Any, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    layout = small_store.layout
    before = store.frame("features").collect()
    commit.write_table(
        layout.associations_dir("zzz") / "features",
        before.with_columns(dead=True),
        toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae"),
    )
    assert FeatureStore.open(layout.root).lineage.associations == "a550c"
    assert store.sql("SELECT COUNT(*) AS n FROM features WHERE dead")["n"].to_list() == [1]
    hashes = folder_hashes(layout.root)
    store.top_cells(3)
    store.sql("SELECT * FROM feature_label")
    assert folder_hashes(layout.root) == hashes


def test_a_store_with_cells_alone_answers_about_cells(tmp_path: Path, small_store: Any) -> None:
    layout = Layout(tmp_path / "half")
    shutil.copytree(small_store.layout.cells_dir("toy"), layout.cells_dir("toy"))
    store = FeatureStore.open(layout.root)
    assert store.tables() == ["cells"]
    assert store.sql("SELECT COUNT(*) AS n FROM cells")["n"].item() == 40
    with pytest.raises(QueryError, match=r"'feature_label'.*`scsae associate --store .* cells"):
        store.features_for(label="B")
    with pytest.raises(NotFoundError, match="scsae encode"):
        store.top_cells(0)


def test_an_empty_root_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="scsae demo --store"):
        FeatureStore.open(tmp_path / "nothing")


def test_of_several_data_sets_without_codes_the_newest_is_read_unless_one_is_named(
    tmp_path: Path, small_store: Any
) -> None:
    layout = Layout(tmp_path / "two")
    for age, name in enumerate(("one", "two", "three")):
        commit.write_table(layout.cells_dir(name), small_store.cells, {"dataset": name})
        os.utime(layout.cells_dir(name) / "MANIFEST.json", (1000 - age, 1000 - age))
    assert FeatureStore.open(layout.root).lineage.dataset == "three"
    assert FeatureStore.open(layout.root, dataset="two").lineage.dataset == "two"


@pytest.fixture
def two_sets(small_store: Any) -> Layout:
    """The small store, and newer codes `f00d` of another data set with associations `beef`."""
    layout = small_store.layout
    commit.write_table(layout.cells_dir("other"), small_store.cells, {"dataset": "other"})
    plan = toy_codes(cut_of(40, 40), n_features=12, dataset="other", sae="5ae")
    write_codes(layout.codes_dir("f00d"), plan, [small_store.tokens], small_store.cells["split"].to_numpy())
    for table in ASSOCIATION_TABLES:
        frame = commit.read_table(layout.associations_dir("a550c") / table)
        commit.write_table(
            layout.associations_dir("beef") / table,
            frame,
            toy_table(AssociationsPlan, codes="f00d", dataset="other", sae="5ae"),
        )
    return layout


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ({}, ("other", "f00d", "beef")),
        ({"codes": "c0"}, ("toy", "c0de", "a550c")),
        ({"dataset": "toy"}, ("toy", "c0de", "a550c")),
        ({"associations": "a5"}, ("toy", "c0de", "a550c")),
        ({"codes": "f00d", "dataset": "other"}, ("other", "f00d", "beef")),
    ],
)
def test_what_is_not_named_follows_from_what_is(
    two_sets: Layout, named: dict[str, str], found: tuple[str, ...]
) -> None:
    lineage = FeatureStore.open(two_sets.root, **named).lineage
    assert (lineage.dataset, lineage.codes, lineage.associations) == found


def test_codes_without_associations_are_read_without_those_of_others(two_sets: Layout) -> None:
    delete_run(two_sets.associations_dir("beef"))
    assert FeatureStore.open(two_sets.root).lineage.associations == "a550c"
    store = FeatureStore.open(two_sets.root, codes="f00d")
    assert (store.lineage.dataset, store.lineage.associations) == ("other", None)
    assert "features" not in store.tables()
    assert store.top_cells(3).height > 0


def test_runs_that_do_not_belong_together_are_refused(two_sets: Layout) -> None:
    with pytest.raises(NotFoundError, match=r"'beef'.*'f00d'.*'c0de'"):
        FeatureStore.open(two_sets.root, associations="beef", codes="c0de")
    with pytest.raises(NotFoundError, match=r"'toy'.*'other'"):
        FeatureStore.open(two_sets.root, codes="c0de", dataset="other")


WRITER = """
import sys
sys.path.append(sys.argv[2])
import numpy as np
from scipy import sparse
from feature_store.storage import commit
from feature_store.codes import CodesRun
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout
from feature_store.storage.plans import AssociationsPlan, SteeringResultsPlan
from token_codes import TokenCodes, commit_tokens, cut_of, finish, toy_codes
from toy_plans import toy_table

layout = Layout(sys.argv[1])
cells = commit.read_table(layout.cells_dir("toy"))
for i in range(2):
    commit.write_table(layout.cells_dir(f"new{i}"), cells, {"dataset": f"new{i}"})
    commit.write_table(layout.genes_dir("toy"), cells, {"i": 0})
    plan = toy_codes(cut_of(40, 10), n_features=12, dataset="toy", sae="5ae")
    codes = CodesRun.create(layout.codes_dir(f"c{i}"), plan)
    for shard in range(4):
        start, stop = 10 * shard, 10 * shard + 10
        cell = np.arange(start, stop)
        dense = sparse.csr_array(np.full((10, 12), i + 1.0, np.float32))
        tokens = TokenCodes(cell_idx=cell, token_pos=cell * 0, gene_id=cell * 0, codes=dense)
        commit_tokens(codes, shard, tokens, start=start, stop=stop, split_of_cell=cells["split"].to_numpy())
        print(i, shard, flush=True)
    finish(codes)
    for table in ASSOCIATION_TABLES:
        frame = commit.read_table(layout.associations_dir("a550c") / table)
        plan = toy_table(AssociationsPlan, codes=f"c{i}", dataset="toy", sae="5ae")
        commit.write_table(layout.associations_dir(f"a{i}") / table, frame.head(1), plan)
    steered = toy_table(SteeringResultsPlan, seed=i, sae="5ae")
    commit.write_table(layout.steering_dir(f"s{i}") / "results", cells, steered)
"""


@pytest.mark.slow
def test_a_store_answers_the_same_while_another_process_writes_into_it_and_a_new_one_sees_what_is_finished(
    store: FeatureStore, small_store: Any
) -> None:
    root = small_store.layout.root

    def answers() -> list[pl.DataFrame]:
        counts = [store.sql(f"SELECT COUNT(*) AS n FROM {table}") for table in store.tables()]
        return [*counts, store.sql("SELECT * FROM codes"), store.top_cells(3), store.features_of(7), store.sql(JOINED)]

    before, tables = answers(), store.tables()
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(Path(toy_plans.__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        for _ in writer.stdout or ():
            assert all(one.equals(other) for one, other in zip(answers(), before, strict=True))
            assert FeatureStore.open(root).sql("SELECT * FROM features").height in (1, 12)
    assert writer.returncode == 0
    assert store.tables() == tables
    assert all(one.equals(other) for one, other in zip(answers(), before, strict=True))
    new = FeatureStore.open(root)
    assert (new.lineage.codes, new.lineage.associations) == ("c1", "a1")
    assert new.top_cells(3)["value"].unique().to_list() == [2.0]
    assert len(new.lineage.steering) == 3


def test_anndata_has_the_cells_the_codes_and_the_tables_about_features(store: FeatureStore, dense: np.ndarray) -> None:
    adata = store.to_anndata(X=None)
    assert adata.shape == (40, 0)
    assert (adata.obsm["X_sae"].toarray() == dense).all()
    # two cells have one name
    assert adata.obs_names.to_list() == [str(i) for i in range(40)]
    assert adata.obs["cell_type"].to_list() == ["B", "T"] * 20
    assert "batch" not in adata.obs
    about = adata.uns["sae"]
    assert about["features"]["feature_id"].to_list() == list(range(12))
    assert about["features"]["top_label"].to_list() == ["B"] * 12
    assert about["feature_label"].shape[0] == 4
    assert {"feature_gene", "feature_geneset", "feature_token", "feature_id"} <= about.keys()


def test_anndata_of_some_cells_and_features_keeps_their_order(store: FeatureStore, dense: np.ndarray) -> None:
    adata = store.to_anndata(
        cells=[30, "cell-2", np.int64(17)], features=[5, 3], tables=["features"], key="X_codes", X=None
    )
    assert adata.obs_names.to_list() == ["cell-30", "cell-2", "cell-17"]
    assert (adata.obsm["X_codes"].toarray() == dense[[30, 2, 17]][:, [5, 3]]).all()
    assert adata.uns["codes"]["features"]["feature_id"].to_list() == [5, 3]
    assert set(adata.uns["codes"]) == {"features", "feature_id", "provenance"}
    test = store.to_anndata(
        cells=(pl.col("split") == "test") & (pl.col("cell_type") == "T"), features=range(12), X=None
    )
    assert test.obs["cell_idx"].to_list() == list(range(3, 40, 4))
    assert (test.obsm["X_sae"].toarray() == dense[3::4]).all()
    assert store.to_anndata(cells=[], features=[], X=None).obsm["X_sae"].shape == (0, 0)


def test_anndata_of_what_is_not_there_is_refused(store: FeatureStore) -> None:
    with pytest.raises(QueryError, match=r"12.* 0 to 11"):
        store.to_anndata(features=[3, 12])
    with pytest.raises(QueryError, match=r"40.* toy .*0 to 39"):
        store.to_anndata(cells=[40])
    with pytest.raises(QueryError, match=r"'cel_type'.* cell_type"):
        store.to_anndata(cells=pl.col("cel_type") == "T")
    with pytest.raises(QueryError, match=r"'feature_gen'.*'feature_gene'"):
        store.to_anndata(tables=["feature_gen"])
    with pytest.raises(QueryError, match=r"'cells'.* features, feature_label"):
        store.to_anndata(tables=["features", "cells"])


def test_anndata_says_which_runs_it_comes_from(store: FeatureStore, small_store: Any) -> None:
    found = store.to_anndata(X=None).uns["sae"]["provenance"]
    assert found["runs"] == {"dataset": "toy", "sae": "5ae", "codes": "c0de", "associations": "a550c"}
    assert found["manifests"]["codes"] == small_store.codes.by_cell.manifest().sha
    assert {"cells", "features", "feature_label"} <= found["manifests"].keys()
    plans = json.loads(found["plans"])
    assert plans["codes"]["n_features"] == 12
    assert plans["associations"]["codes"] == "c0de"


def test_anndata_is_the_same_after_writing_and_reading(store: FeatureStore, small_store: Any, tmp_path: Path) -> None:
    folder = small_store.layout.cells_dir("toy")
    cells = small_store.cells.with_columns(
        day=pl.date(2024, 1, 1) + pl.duration(days=pl.col("cell_idx")),
        genes=pl.Series([["A", "B"]] * 40),
        seen=pl.Series([True, None] * 20),
        old=pl.Series([True, False] * 20),
        stage=pl.Series(["I", None] * 20),
        score=pl.Series([1, None] * 20),
    )
    shutil.rmtree(folder)
    commit.write_table(folder, cells, {"table": "cells", "dataset": "toy"})
    adata = FeatureStore.open(small_store.layout.root).to_anndata(X=None)
    adata.write_h5ad(tmp_path / "codes.h5ad")
    read = anndata.read_h5ad(tmp_path / "codes.h5ad")
    pd.testing.assert_frame_equal(read.obs, adata.obs)
    assert (read.obsm["X_sae"] != adata.obsm["X_sae"]).nnz == 0
    assert read.uns["sae"].keys() == adata.uns["sae"].keys()
    for name, value in adata.uns["sae"].items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(read.uns["sae"][name], value)
    assert read.uns["sae"]["provenance"] == adata.uns["sae"]["provenance"]
    assert (read.uns["sae"]["feature_id"] == adata.uns["sae"]["feature_id"]).all()
    assert read.obs["day"].iloc[1] == "2024-01-02"
    assert read.obs["genes"].iloc[0] == "A,B"
    assert read.obs["stage"].isna().sum() == 20


def test_a_notebook_shows_the_runs_that_are_read_and_what_the_tables_hold(store: FeatureStore) -> None:
    shown = store._repr_html_()
    for text in ("<td", "a550c", "c0de", "5ae", "<th", "one feature, label and split", str(store.layout.root)):
        assert text in shown
    assert '<td style="text-align: left">40</td>' in shown


def test_a_notebook_shows_how_many_cells_the_panel_has(panel_store: Any) -> None:
    assert "panel of 12 of 40 cells" in FeatureStore.open(panel_store.layout.root)._repr_html_()


def test_a_damaged_table_is_no_error_of_what_a_notebook_shows(small_store: Any) -> None:
    store = FeatureStore.open(small_store.layout.root)
    (small_store.layout.cells_dir("toy") / "part-00000.parquet").unlink()
    assert "one feature, label and split" in store._repr_html_()


def test_the_runs_of_a_store_are_those_of_the_command(store: FeatureStore) -> None:
    runs = store.runs()
    assert runs.equals(run_list(store.layout))
    assert set(runs["kind"]) >= {"cells", "codes", "associations"}
    assert store.runs("codes")["run"].to_list() == ["c0de"]
    with pytest.raises(InputError, match=r"'code'.*codes"):
        store.runs("code")
