import numpy as np
import pytest
from scipy import sparse

from feature_store.associations import ClassConfig, Labels, TokenStatistics, as_csr, classify
from feature_store.errors import InputError

EXPECTED = {
    "type": "cell-context",
    "not-type": "cell-context",
    "batch": "batch",
    "confounded": "cell-context",
    "gene": "gene-identity",
    "noise": "mixed",
    "dead": "dead",
}


def run(planted, seed=0, **changes):
    arguments = {
        "contexts": [planted.cell_type],
        "batch": planted.batch,
        "tokens": planted.tokens,
        "units": planted.donor,
        "dead": np.array([m == "dead" for m in planted.meaning]),
        "config": ClassConfig(n_bootstrap=20, seed=seed),
        **changes,
    }
    return classify(planted.codes, **arguments)


def test_planted_features_get_their_class(plant):
    right = total = 0
    for seed in range(3):
        planted = plant(seed=seed, copies=8)
        table = run(planted)
        wanted = np.array([EXPECTED[m] for m in planted.meaning])
        right, total = right + (table["class"].to_numpy() == wanted).sum(), total + wanted.size
        confounded = np.array(planted.meaning) == "confounded"
        assert not (table["class"].to_numpy()[confounded] == "batch").any()
    assert right / total >= 0.9


def test_confidence_is_high_for_what_was_planted_and_the_table_is_deterministic(planted):
    table = run(planted)
    confidence = dict(zip(planted.meaning, table["class_confidence"], strict=True))
    assert min(confidence[m] for m in ("type", "not-type", "gene", "noise", "dead")) >= 0.9
    assert table.equals(run(planted))


def test_one_batch_per_type_cannot_be_told_apart_and_is_mixed():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], 100)
    codes = as_csr(np.where(rng.random(200) < np.where(group, 0.9, 0.05), 1.0, 0.0)[:, None], "codes")
    table = classify(
        codes,
        [Labels.from_values("cell_type", group)],
        Labels.from_values("batch", group),
        None,
        units=None,
        dead=np.array([False]),
        config=ClassConfig(),
    )
    assert table["class"].item() == "mixed"
    assert table["context_effect"].item() > 0.5
    assert table["gene_effect"].item() is None


def test_one_gene_outranks_the_type_it_marks_and_a_family_of_its_genes_does_not(planted):
    n_genes = len(planted.genes)
    of_type, of_none = np.arange(n_genes) % 3 == 0, np.arange(n_genes) >= 24
    of_type[12:] = False
    expression = planted.expression
    fired = np.zeros((3, n_genes), dtype=np.int64)
    fired[0, 0] = planted.tokens.gene_tokens[0]
    fired[1, of_type] = planted.tokens.gene_tokens[of_type]
    fired[2, of_none] = planted.tokens.gene_tokens[of_none]
    codes = np.stack([expression[:, rows].max(axis=1).toarray().ravel() for rows in ([0], of_type, of_none)], axis=1)
    table = classify(
        as_csr(codes, "codes"),
        [planted.cell_type],
        planted.batch,
        TokenStatistics(fired=sparse.csr_array(fired), gene_tokens=planted.tokens.gene_tokens),
        units=planted.donor,
        dead=np.zeros(3, bool),
        config=ClassConfig(),
    )
    assert table["class"].to_list() == ["gene-identity", "cell-context", "gene-identity"]
    assert (table["gene_effect"] > 0.9).all()
    assert table["gene_precision"].to_list() == [
        1.0,
        pytest.approx(fired[1].max() / fired[1].sum()),
        pytest.approx(fired[2].max() / fired[2].sum()),
    ]


def test_counts_on_more_tokens_than_a_gene_has_are_refused(planted):
    fired = sparse.csr_array(np.full((len(planted.meaning), len(planted.genes)), 10_000))
    with pytest.raises(InputError, match="more tokens of a gene than there are"):
        run(planted, tokens=TokenStatistics(fired=fired, gene_tokens=planted.tokens.gene_tokens))


def test_disease_carried_by_whole_batches_is_context_and_not_batch():
    rng = np.random.default_rng(0)
    donor = np.repeat(np.arange(8), 60)
    disease, cell_type = np.isin(donor, [1, 3, 5, 7]), rng.integers(0, 2, 480)
    codes = as_csr(np.where(rng.random(480) < np.where(disease, 0.8, 0.05), rng.random(480), 0.0)[:, None], "codes")
    table = classify(
        codes,
        [Labels.from_values("cell_type", cell_type), Labels.from_values("condition", disease)],
        Labels.from_values("batch", donor),
        None,
        units=Labels.from_values("donor", donor),
        dead=np.array([False]),
        config=ClassConfig(),
    )
    assert table.select("class", "context_kind").row(0) == ("cell-context", "condition")


def test_without_labels_only_genes_and_death_are_called(planted):
    table = run(planted, contexts=[], batch=None)
    assert set(table["class"]) == {"gene-identity", "mixed", "dead"}


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"cell_effect=0\.0"):
        ClassConfig(cell_effect=0.0)
