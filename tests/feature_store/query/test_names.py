from __future__ import annotations

import json
import shutil
from importlib import resources
from typing import Any

import polars as pl
import pytest
from toy_plans import toy_table

from feature_store import FeatureStore
from feature_store.errors import QueryError
from feature_store.query import names
from feature_store.query.store import RANKED_BY
from feature_store.storage import commit, schemas
from feature_store.storage.plans import AssociationsPlan
from pipelines.cli.lookups import FIRST_SHOWN, NAMES, Lookup

SETS = {
    "INTERFERON_ALPHA_RESPONSE": "hallmark",
    "INTERFERON_GAMMA_RESPONSE": "hallmark",
    "B_CELL": "immune",
    "BASE EXCISION": "immune",
}


def replaced(small_store: Any, table: str, frame: pl.DataFrame) -> FeatureStore:
    folder = small_store.layout.associations_dir("a550c") / table
    shutil.rmtree(folder)
    plan = toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae")
    commit.write_table(folder, schemas.conform(table, frame), plan)
    return FeatureStore.open(small_store.layout.root)


@pytest.fixture
def of_sets(small_store: Any) -> FeatureStore:
    rows = pl.DataFrame(
        {
            "feature_id": range(len(SETS)),
            "collection": SETS.values(),
            "gene_set": SETS.keys(),
            "p": [0.02, 0.01, 0.3, 0.4],
        },
        strict=False,
    )
    lacking = {name: pl.lit(None) for name in schemas.TABLES["feature_geneset"].columns if name not in rows.columns}
    return replaced(small_store, "feature_geneset", rows.with_columns(**lacking))


def of_genes(small_store: Any, *genes: str) -> FeatureStore:
    rows = pl.DataFrame({"feature_id": range(len(genes)), "gene": genes, "pearson": 0.5})
    lacking = {name: pl.lit(None) for name in schemas.TABLES["feature_gene"].columns if name not in rows.columns}
    return replaced(small_store, "feature_gene", rows.with_columns(**lacking))


@pytest.mark.parametrize("name", ["CD20", "cd-20", "Cd 20"])
def test_a_gene_is_found_by_the_name_of_its_protein_and_it_is_said(name: str, small_store: Any) -> None:
    store = FeatureStore.open(small_store.layout.root)
    assert store.features_for(gene=name).equals(store.features_for(gene="MS4A1"))
    assert store.meant_by("gene", name) == (("MS4A1",), f"{name} is another name of MS4A1, whose features are shown")
    assert store.meant_by("gene", "ms4a1").note == ""


def test_a_gene_is_found_by_its_present_symbol_where_the_data_have_the_older_one(small_store: Any) -> None:
    store = of_genes(small_store, "IGJ", "FAIM3")
    assert store.features_for(gene="JCHAIN")["gene"].to_list() == ["IGJ"]
    assert store.features_for(gene="TOSO")["gene"].to_list() == ["FAIM3"]


def test_a_name_of_several_genes_of_the_data_is_taken_for_none_of_them(small_store: Any) -> None:
    store = of_genes(small_store, "CD8A", "CD8B")
    with pytest.raises(QueryError, match="CD8 is another name of CD8A and CD8B"):
        store.features_for(gene="CD8")
    assert of_genes(small_store, "CD8B").features_for(gene="CD8")["gene"].to_list() == ["CD8B"]


def test_a_name_of_a_gene_that_the_data_lack_is_said_to_be_one(small_store: Any) -> None:
    store = FeatureStore.open(small_store.layout.root)
    with pytest.raises(QueryError, match=r"no gene 'CD56' in feature_gene.*\(NCAM1\) are not there"):
        store.features_for(gene="CD56")


def test_a_gene_is_found_by_its_ensembl_id_with_and_without_version(small_store: Any) -> None:
    genes = pl.DataFrame(
        {"gene_idx": [0], "symbol": ["MS4A1"], "ensembl_id": ["ENSG00000156738"], "n_cells": [3], "mean": [1.0]}
    )
    commit.write_table(
        small_store.layout.genes_dir("toy"), schemas.conform("genes", genes), {"table": "genes", "dataset": "toy"}
    )
    store = FeatureStore.open(small_store.layout.root)
    for name in ("ENSG00000156738", "ensg00000156738.18"):
        assert store.meant_by("gene", name).names == ("MS4A1",)


def test_gene_sets_are_found_by_words_in_their_names(of_sets: FeatureStore) -> None:
    found = of_sets.features_for(gene_set="interferon")
    assert found["gene_set"].to_list() == ["INTERFERON_GAMMA_RESPONSE", "INTERFERON_ALPHA_RESPONSE"]
    note = of_sets.meant_by("gene_set", "interferon").note
    assert note.startswith("2 gene sets have 'interferon' in their names: INTERFERON_ALPHA_RESPONSE, INTERFERON_GAMMA")
    assert of_sets.meant_by("gene_set", "gamma interferon") == (
        ("INTERFERON_GAMMA_RESPONSE",),
        "the gene set with 'gamma interferon' in its name is INTERFERON_GAMMA_RESPONSE",
    )
    with pytest.raises(QueryError, match="no gene_set 'interferone'"):
        of_sets.features_for(gene_set="interferone")


def test_a_short_word_has_to_be_a_whole_word_of_the_name(of_sets: FeatureStore) -> None:
    assert of_sets.meant_by("gene_set", "b cell").names == ("B_CELL",)
    assert of_sets.meant_by("gene_set", "b").names == ("B_CELL",)


def test_words_are_looked_for_in_the_collection_that_is_named(of_sets: FeatureStore) -> None:
    assert of_sets.features_for(gene_set="response", kind="hallmark").height == 2
    with pytest.raises(QueryError, match="'response' in collection 'immune'"):
        of_sets.features_for(gene_set="response", kind="immune")


def test_the_command_leaves_out_features_that_share_no_gene_with_a_set_and_says_the_order_of_the_others(
    small_store: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    select = [(0, "select", 0.01, 1), (1, "select", 0.3, 1), (2, "select", 0.2, 1)]
    test = [(0, "test", 0.3, 0), (1, "test", 0.2, 2), (2, "test", 0.9, 1)]
    names_of = {"feature_id": pl.Int32, "split": pl.String, "p": pl.Float64, "overlap": pl.Int64}
    rows = pl.DataFrame([*select, *test], schema=names_of, orient="row").with_columns(
        collection=pl.lit("own"), gene_set=pl.lit("B_CELL")
    )
    lacking = {name: pl.lit(None) for name in schemas.TABLES["feature_geneset"].columns if name not in rows.columns}
    store = replaced(small_store, "feature_geneset", rows.with_columns(**lacking))
    assert Lookup(gene_set="B_CELL").answer(store)["feature_id"].to_list() == [2, 1]
    said = capfd.readouterr().err
    assert "left out: 1 of 3 rows, whose features share no gene" in said
    assert (
        "no feature of 'B_CELL' at q <= 0.05 on test cells; those with the smallest p on select cells come first"
        in said
    )


def test_an_association_holds_on_test_cells_where_it_is_significant_in_the_direction_of_select_cells(
    small_store: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        (split, feature, auroc, q)
        for feature, select, test, q in (
            (1, 0.9, 0.8, 0.01),
            (2, 0.8, 0.3, 1e-6),
            (3, 0.7, 0.9, 0.2),
            (4, 0.2, 0.1, 0.05),
            (5, 0.6, None, None),
        )
        for split, auroc, q in (("select", select, 0.01), ("test", test, q))
    ]
    frame = pl.DataFrame(rows, schema=["split", "feature_id", "auroc", "q"], orient="row").with_columns(
        pl.col("feature_id").cast(pl.Int32), label_kind=pl.lit("cell_type"), label=pl.lit("NK")
    )
    lacking = {name: pl.lit(None) for name in schemas.TABLES["feature_label"].columns if name not in frame.columns}
    store = replaced(small_store, "feature_label", frame.with_columns(**lacking))
    found = store.features_for(label="NK")
    assert found.select("feature_id", "holds_on_test").rows() == [
        (1, True),
        (2, False),
        (3, False),
        (5, False),
        (4, True),
    ]
    assert Lookup(label="NK").answer(store).equals(found)
    said = "2 of 5 features have q <= 0.05 for 'NK' on test cells, in the direction of select cells; see holds_on_test"
    assert said in capfd.readouterr().err
    assert Lookup(label="NK", n=1).answer(store).height == 1
    assert said not in capfd.readouterr().err
    low = frame.filter(pl.col("feature_id").is_in([2, 3, 4])).with_columns(**lacking)
    assert Lookup(label="NK", n=2).answer(replaced(small_store, "feature_label", low)).height == 2
    assert "1 of 3 features" in (said := capfd.readouterr().err)
    assert "the first is in row 3: --n 3" in said


def test_every_kind_of_look_up_says_its_order() -> None:
    assert set(FIRST_SHOWN) == set(RANKED_BY) == set(NAMES)
    assert {name for name, (_, _, descending) in RANKED_BY.items() if not descending} == {"gene_set"}
    for name, (_, key, _) in RANKED_BY.items():
        word = {"pearson": "correlation", "spearman": "correlation", "auroc": "AUROC", "p": "smallest p"}[key]
        assert word in FIRST_SHOWN[name]


def test_the_command_says_which_name_it_took(small_store: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert Lookup(gene="CD20").answer(FeatureStore.open(small_store.layout.root)).height == 2
    assert "CD20 is another name of MS4A1" in capfd.readouterr().err


def test_no_other_name_is_listed_for_a_gene_twice_or_as_its_own_symbol() -> None:
    listed = json.loads(resources.files(names.__package__).joinpath("gene_aliases.json").read_text())
    assert list(listed) == sorted(listed)
    for symbol, others in listed.items():
        assert len({symbol, *others}) == 1 + len(others)
        assert all(other == other.upper() and other.isalnum() for other in others)


def test_where_no_set_shares_a_gene_with_a_feature_the_next_command_is_named(small_store: Any) -> None:
    store = replaced(small_store, "feature_geneset", schemas.empty("feature_geneset"))
    with pytest.raises(QueryError, match=r"'B_CELL' in feature_geneset.*`scsae associate --gmt FILE`.*it has none"):
        store.features_for(gene_set="B_CELL")
