from itertools import pairwise

import anndata
import numpy as np
import polars as pl
import pytest
from scipy import sparse

from feature_store.associations import (
    AssociationConfig,
    CellInputs,
    ClassConfig,
    Labels,
    MeasuredRun,
    Numbers,
    TokenStatistics,
    assemble_measured,
    benjamini_hochberg,
    feature_ranges,
)
from feature_store.associations.feature_table import top_label
from feature_store.associations.gene_sets import GeneSets, canonical_immune, sets_of_table
from feature_store.associations.ranges import NONZERO_BYTES
from feature_store.errors import InputError
from feature_store.storage import schemas
from feature_store.storage.layout import ASSOCIATION_TABLES

SETS = GeneSets(
    collection="mine",
    names=("OF_TYPE_A", "EMPTY"),
    descriptions=("", ""),
    genes=(("G0", "G3", "G6", "G9"), ("NOT_HERE",)),
)
CONFIG = AssociationConfig(classes=ClassConfig(n_bootstrap=5))


def inputs_of(planted, **changes):
    """The arguments of `measure_ranges` and `tables_of` but for the options."""
    cells = {
        "split": planted.split,
        "genes": planted.genes,
        "labels": [planted.cell_type, planted.batch],
        "numbers": [Numbers.from_values(name, (np.arange(600) * step) % 97) for name, step in (("pct", 5), ("n", 7))],
        "units": planted.donor,
        "gene_sets": [SETS],
    }
    top = pl.DataFrame(
        {
            "feature_id": [1, 0, 0, 0],
            "cell_idx": [5, 7, 2, 3],
            "token_pos": [0, 3, 1, 0],
            "gene": ["G1", "G2", "G0", None],
            "value": [1.0, 2.0, 3.0, 9.0],
        }
    )
    arguments = {
        "codes": planted.codes,
        "expression": planted.expression,
        "tokens": dict.fromkeys(("train", "select", "test"), planted.tokens),
        "top_tokens": top,
        **changes,
    }
    return {"cells": cells | {name: arguments.pop(name) for name in set(cells) & set(arguments)}, **arguments}


@pytest.fixture(scope="module")
def tables(planted, tables_of):
    return tables_of(**inputs_of(planted), config=CONFIG)


def test_tables_hold_their_schemas_and_no_nan(tables):
    assert set(tables) == set(ASSOCIATION_TABLES)
    for name, frame in tables.items():
        schemas.check(name, frame)
        assert frame.height > 0
        for column in frame.select(pl.col(pl.Float64, pl.Float32)).iter_columns():
            assert not column.is_nan().any(), (name, column.name)


def test_every_association_row_carries_what_makes_it_believable(tables):
    for name in ("feature_label", "feature_number", "feature_gene", "feature_geneset"):
        frame = tables[name]
        for column in ("feature_id", "split", "n", "n_donors", "p", "q", "method"):
            assert frame[column].null_count() == 0, (name, column)
        assert set(frame["split"]) == {"select", "test"}
        assert (frame["q"] >= frame["p"] - 1e-15).all()


def test_q_of_labels_is_over_all_tests_of_the_kind_and_split_dead_features_included(tables, planted):
    test = tables["feature_label"].filter(pl.col("split") == "test")
    assert test["feature_id"].n_unique() == len(planted.meaning)
    assert set(test["label_kind"]) == {"batch", "cell_type"}
    for _, kind in test.group_by("label_kind"):
        np.testing.assert_allclose(kind["q"], benjamini_hochberg(kind["p"].to_numpy()))
    dead = test.filter(pl.col("feature_id") == planted.meaning.index("dead"))
    assert (dead["p"] == 1).all()


def test_q_of_a_kind_and_of_a_collection_do_not_depend_on_what_else_was_asked(tables, planted, tables_of):
    inputs = inputs_of(planted)
    number = inputs["cells"]["numbers"][:1]
    alone = tables_of(**inputs_of(planted, labels=[planted.cell_type], numbers=number), config=CONFIG)
    assert tables["feature_number"].filter(number="pct").equals(alone["feature_number"])
    more = GeneSets(
        collection="more",
        names=tuple(f"S{i}" for i in range(30)),
        descriptions=("",) * 30,
        genes=tuple((f"G{i}", f"G{i + 1}", f"G{i + 2}") for i in range(30)),
    )
    both = tables_of(**inputs_of(planted, gene_sets=[more, SETS]), config=CONFIG)
    mine = tables["feature_label"].filter(pl.col("label_kind") == "cell_type")
    assert mine.equals(alone["feature_label"])
    assert both["feature_geneset"].filter(pl.col("collection") == "mine").equals(tables["feature_geneset"])


def test_no_feature_has_a_name_or_class_that_test_cells_do_not_confirm(planted, tables_of):
    """Within donors the codes of the test cells are shuffled, so that nothing holds on them."""
    rng = np.random.default_rng(0)
    order = np.arange(planted.codes.shape[0])
    for donor in range(len(planted.donor.names)):
        cells = np.flatnonzero((planted.donor.codes == donor) & (np.array(planted.split) == "test"))
        order[cells] = rng.permutation(cells)
    silent = TokenStatistics(fired=planted.tokens.fired * 0, gene_tokens=planted.tokens.gene_tokens)
    counts = {"train": planted.tokens, "select": planted.tokens, "test": silent}
    inputs = inputs_of(planted, codes=planted.codes[order], tokens=counts, labels=[planted.cell_type])
    out = tables_of(**inputs, config=CONFIG)
    test = out["feature_label"].filter(pl.col("split") == "test")
    assert test["q"].min() > 0.05
    features = out["features"]
    assert set(features["class"]) <= {"gene-identity", "mixed", "dead"}
    for name in ("top_label", "top_label_kind", "top_label_auroc", "top_genes", "top_identity_genes", "context_kind"):
        assert features[name].null_count() == features.height, name


def test_the_top_label_is_the_one_of_the_largest_lower_bound_and_not_the_rarest():
    def row(label, split, auroc, low, q):
        found = {"feature_id": 0, "label_kind": "cell_type", "label": label, "split": split, "n_label": 12}
        return found | {"auroc": auroc, "low": low, "q": q}

    ranked = [
        *(row("rare", split, 0.99, -0.2, 0.01) for split in ("select", "test")),
        *(row("common", split, 0.85, 0.5, 0.01) for split in ("select", "test")),
        *(row("one donor", split, 1.0, None, 0.01) for split in ("select", "test")),
        *(row("by chance", split, 1.0, 0.9, 0.2) for split in ("select", "test")),
    ]
    assert top_label(pl.DataFrame(ranked))["top_label"].to_list() == ["common"]
    lost = [one | {"q": 0.06} if one["split"] == "test" else one for one in ranked]
    assert top_label(pl.DataFrame(lost)).is_empty()


def test_features_name_their_genes_label_and_class(tables, planted):
    features = tables["features"]
    row = features.row(0, named=True)
    assert (row["top_label"], row["top_label_kind"], row["class"]) == ("A", "cell_type", "cell-context")
    assert set(row["top_genes"].split()) <= {"G0", "G3", "G6", "G9"}
    assert row["top_label_auroc"] > 0.7
    gene = features.row(4, named=True)
    assert gene["top_identity_genes"].split()[0] == gene["top_genes"].split()[0] == f"G{planted.target[4]}"
    dead = features.row(6, named=True)
    assert (dead["dead"], dead["class"], dead["top_label"], dead["max"]) == (True, "dead", None, None)


def test_scales_are_those_of_the_train_cells(tables, planted):
    train = planted.codes.toarray()[np.array(planted.split) == "train"]
    row = tables["features"].row(2, named=True)
    fires = train[:, 2][train[:, 2] > 0]
    assert row["p99"] == pytest.approx(np.percentile(fires, 99))
    assert row["mean"] == pytest.approx(train[:, 2].mean(), rel=1e-6)
    assert row["max"] == pytest.approx(fires.max())


def test_the_gene_set_of_a_type_is_found_on_both_splits(tables):
    rows = tables["feature_geneset"].filter((pl.col("feature_id") == 0) & (pl.col("gene_set") == "OF_TYPE_A"))
    assert rows["split"].to_list() == ["select", "test"]
    assert (rows["overlap"] >= 3).all()
    assert (rows["odds_ratio"] > 10).all()
    assert (rows["q"] < 0.01).all()
    assert (rows["rank_biserial"] > 0.9).all()


def test_the_table_of_gene_sets_lists_all_sets_with_the_genes_that_the_data_share(tables):
    assert tables["gene_sets"].select("gene_set", "n_genes", "n_shared").rows() == [
        ("OF_TYPE_A", 4, 4),
        ("EMPTY", 1, 0),
    ]
    assert sets_of_table(tables["gene_sets"]) == (SETS,)


def test_top_tokens_are_ranked_by_value_without_special_tokens(tables):
    assert tables["feature_token"].select("feature_id", "cell_idx").rows() == [(0, 2), (0, 7), (1, 5)]


def test_nothing_that_select_decides_looks_at_test_cells(tables, planted, tables_of):
    test_cells = np.flatnonzero(np.array(planted.split) == "test")
    shuffled = np.random.default_rng(0).permutation(test_cells)
    order = np.arange(planted.codes.shape[0])
    order[test_cells] = shuffled
    other = tables_of(**inputs_of(planted, codes=planted.codes[order]), config=CONFIG)
    for name in ("feature_label", "feature_gene", "feature_geneset"):
        mine, theirs = (t[name].filter(pl.col("split") == "select") for t in (tables, other))
        keys = ["feature_id", *[c for c in ("label_kind", "label", "gene", "gene_set") if c in mine.columns]]
        # a pair without a discovery on select may be kept for the sake of test, its select numbers stay
        assert mine.join(theirs, on=keys, how="inner").height > 0
        joined = mine.join(theirs, on=keys, suffix="_other")
        assert (joined["p"] == joined["p_other"]).all()
    assert tables["features"]["p99"].equals(other["features"]["p99"])
    # a name is taken away where test cells do not confirm it, and never replaced by another
    names = tables["features"].join(other["features"], on="feature_id", suffix="_other")
    for column in ("top_label", "top_identity_genes", "context_kind"):
        kept = names.drop_nulls([column, f"{column}_other"])
        assert kept[column].equals(kept[f"{column}_other"]), column
    thresholds = [
        t["feature_label"].sort("feature_id", "label_kind", "label", "split")["threshold"] for t in (tables, other)
    ]
    assert thresholds[0].equals(thresholds[1])


def test_the_tables_are_deterministic(tables, planted, tables_of):
    again = tables_of(**inputs_of(planted), config=CONFIG)
    assert all(frame.equals(again[name]) for name, frame in tables.items())


@pytest.mark.parametrize("bounds", [[0, 1, 2, 7, 42], [0, 20, 21, 42]])
def test_ranges_of_features_give_the_tables_of_all_features_to_the_bit(tables, planted, tables_of, bounds):
    in_ranges = tables_of(**inputs_of(planted), config=CONFIG, bounds=bounds)
    assert all(frame.equals(in_ranges[name]) for name, frame in tables.items())


def test_q_of_genes_is_over_all_pairs_stored_or_not(tables, planted, correlate):
    rows = np.flatnonzero(np.array(planted.split) == "test")
    cells = np.isin(np.arange(len(planted.split)), rows)
    p = correlate(planted.codes[rows], planted.expression[rows], planted.donor.take(cells)).p
    expected = benjamini_hochberg(p)
    for row in tables["feature_gene"].filter(pl.col("split") == "test").iter_rows(named=True):
        place = row["feature_id"], planted.genes.index(row["gene"])
        assert (row["p"], row["q"]) == pytest.approx((p[place], expected[place]), rel=1e-12)


def test_ranges_that_were_measured_need_no_second_measurement(planted, measure_ranges):
    run = MeasuredRun.open(measure_ranges(**inputs_of(planted), config=CONFIG, bounds=[0, 10, 42]).folder)
    assert run.pending() == []
    assert (run.bounds, run.is_committed(0), run.is_committed(1)) == ([0, 10, 42], True, True)


def test_rows_of_genes_that_are_taken_range_by_range_are_those_of_the_whole_table(tables, planted, measure_ranges):
    run = measure_ranges(**inputs_of(planted), config=CONFIG, bounds=[0, 10, 42])
    taken = {}
    rest = assemble_measured(run, planted.genes, [SETS], CONFIG, keep_pairs=taken.__setitem__)
    assert set(rest) == set(tables) - {"feature_gene"}
    assert list(taken) == [0, 1]
    assert pl.concat(taken.values()).equals(tables["feature_gene"])


@pytest.mark.parametrize(
    ("n_features", "n_genes", "range_bytes", "widths"),
    [
        (4096, 500, 10**12, {256}),  # work for several actors
        (100, 500, 10**12, {64, 36}),  # but not for the sake of a few features
        (4096, 20_000, 10**12, {100, 96}),  # pairs with genes
        (400, 500, 20 * 1000 * NONZERO_BYTES, {20}),  # memory of codes
        (40, 500, 1, {1}),  # a feature is not cut
    ],
)
def test_ranges_of_features_are_as_wide_as_work_and_memory_allow(n_features, n_genes, range_bytes, widths):
    nonzeros = np.full(n_features, 1000)
    bounds = feature_ranges(nonzeros, n_genes, range_bytes=range_bytes, bounds=range(n_features))
    assert (bounds[0], bounds[-1]) == (0, n_features)
    assert {b - a for a, b in pairwise(bounds)} == widths


def test_ranges_are_narrow_where_features_are_full():
    nonzeros = np.repeat([1, 10_000, 1], 10)
    bounds = feature_ranges(nonzeros, 5, range_bytes=30_000 * NONZERO_BYTES, bounds=range(30))
    assert bounds == [0, 12, 15, 18, 30]


@pytest.mark.parametrize(
    ("groups", "ranges"),
    [
        ([0, 10, 20, 30, 40], [0, 30, 40]),  # whole groups
        ([0, 20], [0, 20, 40]),  # the last group ends with the features
        ([0, 5, 40], [0, 5, 23, 40]),  # a group that is too large is cut evenly
        ([], [0, 20, 40]),
    ],
)
def test_ranges_end_where_groups_of_stored_features_end(groups, ranges):
    found = feature_ranges(np.full(40, 1000), 5, range_bytes=30_000 * NONZERO_BYTES, bounds=groups)
    assert found == ranges


def test_without_labels_units_tokens_or_sets_the_tables_are_still_there(planted, tables_of):
    inputs = inputs_of(planted, labels=[], numbers=[], units=None, tokens={}, top_tokens=None, gene_sets=[])
    out = tables_of(**inputs, config=CONFIG)
    in_ranges = tables_of(**inputs, config=CONFIG, bounds=[0, 9, 42])
    assert all(frame.equals(in_ranges[name]) for name, frame in out.items())
    assert out["feature_label"].height == out["feature_geneset"].height == out["feature_token"].height == 0
    assert out["feature_number"].height == out["gene_sets"].height == 0
    assert out["features"]["top_label"].null_count() == out["features"].height
    assert out["feature_gene"]["identity_precision"].null_count() == out["feature_gene"].height
    assert out["feature_gene"]["n_donors"].null_count() == out["feature_gene"].height


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"split": ["train"] * 600}, "'train'"),
        ({"split": ["select", "valid"] * 300}, "'valid'"),
        ({"units": Labels.from_values("donor", ["a"])}, "'donor'.* 1 "),
    ],
)
def test_splits_and_labels_that_do_not_fit_are_refused(planted, changes, value):
    with pytest.raises(InputError, match=value):
        CellInputs(**inputs_of(planted, **changes)["cells"])


def test_token_counts_of_other_genes_are_refused(planted, measure_ranges):
    few = TokenStatistics(fired=planted.tokens.fired[:, :7], gene_tokens=planted.tokens.gene_tokens[:7])
    with pytest.raises(InputError, match=r"'test'.*\(42, 7\).*\(42, 40\)"):
        measure_ranges(**inputs_of(planted, tokens={"test": few}), config=CONFIG)


def test_real_cells_sums_of_marker_genes_find_their_type_state_and_programme(scsae_data, tables_of):
    cells = anndata.read_h5ad(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad")
    symbols = cells.var["gene_name"].astype(str).to_numpy()
    counts = sparse.csr_array(cells.X).astype(np.float64)
    scaled = sparse.csr_array(counts.multiply(1e4 / counts.sum(axis=1)[:, None]))
    scaled.data = np.log1p(scaled.data)
    wanted = np.unique(
        np.r_[
            np.argsort(-np.asarray(counts.sum(axis=0)).ravel())[:500],
            np.flatnonzero(np.isin(symbols, list(sum(canonical_immune().genes, ())))),
        ]
    )
    expression, genes = scaled[:, wanted], symbols[wanted].tolist()
    programmes = {"B": ["CD79A", "MS4A1", "CD74"], "NK": ["GNLY", "NKG7"], "IFN": ["ISG15", "IFI6", "IFIT3"]}
    codes = np.stack([expression[:, [genes.index(g) for g in p]].sum(axis=1) for p in programmes.values()], axis=1)
    donors = cells.obs["donor"].astype(str).to_numpy()
    order = {d: i for i, d in enumerate(sorted(set(donors)))}
    split = [("train", "select", "test")[min(order[d] // 3, 2)] for d in donors]
    inputs = CellInputs(
        split=split,
        genes=genes,
        labels=[Labels.from_values(k, cells.obs[k].astype(str).to_numpy()) for k in ("cell_type", "condition")],
        units=Labels.from_values("donor", donors),
        gene_sets=[canonical_immune()],
    )
    out = tables_of(inputs, sparse.csr_array(codes), expression, CONFIG)
    labels = out["features"]["top_label"].to_list()
    assert labels[0].startswith("B")
    assert "NK" in labels[1]
    assert labels[2] == "stim"
    assert (out["features"]["top_label_auroc"] > 0.9).all()
    best = (
        out["feature_geneset"]
        .filter(pl.col("split") == "test")
        .sort("feature_id", "p")
        .unique("feature_id", keep="first", maintain_order=True)
    )
    assert best["gene_set"].to_list()[1:] == ["NK_CELL", "INTERFERON_RESPONSE"]
    assert best["gene_set"][0] in ("B_CELL", "MHC_CLASS_II_PRESENTATION")
