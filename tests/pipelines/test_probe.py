"""`scsae probe`: its tables against the codes, its resumption, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from feature_store import FeatureStore
from feature_store.associations.held_out_units import limit_of_claims
from feature_store.associations.inputs import Labels
from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.errors import StoreError
from feature_store.probes import ProbedCells, probe
from feature_store.query.runs import RunChain
from feature_store.storage import commit
from feature_store.storage.layout import PROBE_TABLES, Layout
from feature_store.storage.plans import ProbePlan
from pipelines.associate import associate
from pipelines.baseline import baseline
from pipelines.config import AssociateOptions, BaselineOptions, ProbeOptions
from pipelines.errors import UsageError
from pipelines.probe import GENES, PERMUTED, SAE, probe_labels

pytestmark = pytest.mark.usefixtures("module_without_actors")
OPTIONS = ProbeOptions(label=("cell_type", "batch"), k=(1, 3), genes=20)


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    """A store with probes of two kinds of labels."""
    store = shutil.copytree(chain.store, tmp_path_factory.mktemp("probe") / "store")
    return store, probe_labels(OPTIONS, store)


def test_a_shard_is_the_probe_of_the_codes_of_the_panel(whole):
    store, result = whole
    layout = Layout(store)
    chain = RunChain.of(layout, layout.latest("associations").run)
    cells = read_panel_cells(layout.cells_dir(chain.associations.dataset))
    codes = load_cell_codes(CodesRun.open(layout.codes_dir(chain.associations.codes)), cells["cell_idx"].to_numpy())
    labels, donors = (Labels.from_values(kind, cells[kind]) for kind in ("cell_type", "donor"))
    expected = probe(
        ProbedCells(
            features=codes, label=labels.codes, names=labels.names, split=cells["split"].to_numpy(), unit=donors.codes
        ),
        OPTIONS.k,
    )
    scores = commit.read_table(result.path / "probe_score").filter(representation=SAE, label_kind="cell_type")
    assert scores["label"].to_list() == ["A", "A", "B", "B", None, None]
    np.testing.assert_allclose(scores["auroc"], expected.scores["auroc"])
    np.testing.assert_allclose(scores["macro_f1"].drop_nulls(), expected.scores["macro_f1"].drop_nulls())
    assert scores["n_donors"].to_list() == expected.scores["n_units"].to_list()
    features = commit.read_table(result.path / "feature_probe").filter(representation=SAE, label_kind="cell_type")
    assert features["feature_id"].to_list() == expected.features["column"].to_list()
    np.testing.assert_allclose(features["weight"], expected.features["weight"])


def test_genes_have_their_symbols_and_permuted_labels_tell_nothing(whole):
    result = whole[1]
    features = commit.read_table(result.path / "feature_probe")
    genes = features.filter(representation=GENES, label_kind="cell_type", rank=1, k=1).sort("label")
    # genes 0 to 9 are high in A, 10 to 19 in B
    for row in genes.iter_rows(named=True):
        assert row["name"] == f"GENE{row['feature_id']}"
        assert row["feature_id"] < 20
    scores = commit.read_table(result.path / "probe_score").filter(label_kind="cell_type", k=1, label="A")
    of = dict(scores.select("representation", "auroc").iter_rows())
    assert of[GENES] > 0.9
    assert abs(of[PERMUTED] - 0.5) < 0.3
    assert set(of) == {SAE, GENES, PERMUTED}


def test_a_second_call_makes_nothing_and_sql_reads_the_tables(whole):
    store, result = whole
    again = probe_labels(OPTIONS, store)
    assert (again.run, again.done, again.reused) == (result.run, 0, 6)
    opened = FeatureStore.open(store)
    for name in PROBE_TABLES:
        found = opened.sql(f"SELECT COUNT(*) AS n, MIN(run) AS run FROM {name}")
        assert found.row(0) == (commit.read_table(result.path / name).height, result.run)


def test_few_donors_are_said_beside_the_result(whole, capsys):
    store, _ = whole
    capsys.readouterr()
    probe_labels(OPTIONS, store)
    limit = limit_of_claims(FeatureStore.open(store).panel_cells().collect())
    assert limit is not None
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"warning: {limit}") == 1


def test_parts_that_are_lost_are_made_again_with_the_same_bytes(whole, chain, tmp_path):
    store = shutil.copytree(chain.store, tmp_path / "store")
    first = probe_labels(OPTIONS, store)
    assert_same_bytes_of_tables(first, whole[1])
    table = first.path / "probe_score"
    (table / "MANIFEST.json").unlink()
    for part in table.glob("part-00003*"):
        part.unlink()
    again = probe_labels(OPTIONS, store)
    assert (again.done, again.reused) == (1, 5)
    assert_same_bytes_of_tables(again, whole[1])


def assert_same_bytes_of_tables(one, other):
    assert one.run == other.run
    for name in PROBE_TABLES:
        own, theirs = (commit.Run.open(made.path / name).manifest().sha for made in (one, other))
        assert own == theirs, name


def test_unknown_labels_and_labels_that_cannot_be_probed_are_refused_and_nothing_is_written(chain):
    for options, words in (
        (ProbeOptions(label=("donors",)), r"--label was 'donors'; the cells of tiny\S* have cell_type, batch"),
        (ProbeOptions(cells=10, k=(1,), label=("batch",)), "fewer than two labels have 5 cells"),
        (ProbeOptions(sae="nothing"), r"--sae was 'nothing', which names none"),
    ):
        with pytest.raises((UsageError, StoreError), match=words):
            probe_labels(options, chain.store)
    assert not (chain.store / "probes").exists()


def test_a_baseline_counts_after_the_codes_were_associated_again_with_other_gene_sets(own_store, tmp_path):
    baseline(BaselineOptions(kind=("random",)), own_store)
    (tmp_path / "own.gmt").write_text("SET\tabout\tGENE0\tGENE1\tGENE2\tGENE3\n")
    again = associate(AssociateOptions(gmt=(tmp_path / "own.gmt",)), own_store)
    made = probe_labels(ProbeOptions(k=(1,), genes=0), own_store)
    plan = ProbePlan.of(commit.Run.open(made.path / "probe_score"))
    assert plan.associations == again.run
    assert set(plan.representations) == {SAE, "random"}
    assert set(commit.read_table(made.path / "probe_score")["representation"]) == {SAE, "random", PERMUTED}
