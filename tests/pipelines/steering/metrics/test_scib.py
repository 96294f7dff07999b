import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from unittest.mock import MagicMock

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_samples

from feature_store.query.metrics import METRICS
from pipelines.errors import UsageError
from pipelines.steering.embedding_baselines import centre
from pipelines.steering.metrics import scib as module
from pipelines.steering.metrics.scib import AGGREGATES, BATCH_CORRECTION, BIO_CONSERVATION, metric_name, scib

FUNCTIONS = ("bras", "ilisi_knn", "kbet_per_label", "graph_connectivity", "pcr_comparison", "isolated_labels")
FUNCTIONS += ("silhouette_label", "clisi_knn", "silhouette_batch")
needs_scib = pytest.mark.skipif(
    find_spec("scib_metrics") is None, reason="scib-metrics is not installed: pip install 'scsae[evaluate]'"
)


@pytest.fixture(scope="module")
def batches():
    """100 cells of four types in three batches, shifted along an axis each; one size, so that jax compiles once."""
    rng = np.random.default_rng(0)
    i = np.arange(100)
    kind, batch = np.array(list("ABCD"))[i % 4], np.array(list("xyz"))[i // 4 % 3]
    embedding = rng.normal(size=(100, 8)) + 4.0 * np.eye(8)[i % 4] + 2.0 * np.eye(8)[7 - i // 4 % 3]
    return embedding.astype(np.float32), batch, kind


@pytest.fixture(scope="module")
def plain(batches):
    embedding, batch, kind = batches
    return scib(embedding, embedding, batch, kind, kbet=False)


@pytest.mark.slow
@needs_scib
def test_silhouettes_agree_with_sklearn(batches, plain):
    embedding, batch, kind = batches
    label = (silhouette_samples(embedding, kind).mean() + 1) / 2
    own = [1 - np.abs(silhouette_samples(embedding[kind == k], batch[kind == k])).mean() for k in "ABCD"]
    assert plain.values["silhouette_label"] == pytest.approx(label, abs=1e-5)
    assert plain.values["silhouette_batch"] == pytest.approx(np.mean(own), abs=1e-5)


@pytest.mark.slow
@needs_scib
def test_bras_is_the_silhouette_against_all_other_batches_by_cosine(batches, plain):
    embedding, batch, kind = batches
    per_type = []
    for name in "ABCD":
        x, b = embedding[kind == name], batch[kind == name]
        far = cdist(x, x, "cosine")
        inside = np.array([far[i, b == own].sum() / ((b == own).sum() - 1) for i, own in enumerate(b)])
        outside = np.array([far[i, b != own].mean() for i, own in enumerate(b)])
        per_type.append(1 - np.abs((outside - inside) / np.maximum(outside, inside)).mean())
    assert plain.values["bras"] == pytest.approx(np.mean(per_type), abs=1e-4)


@pytest.mark.slow
@needs_scib
def test_aggregates_are_means_and_the_total_weighs_them(plain):
    values = plain.values
    parts = [values[name] for name in BATCH_CORRECTION if name != "kbet"]
    assert values["batch_correction"] == pytest.approx(np.mean(parts))
    assert values["bio_conservation"] == pytest.approx(np.mean([values[name] for name in BIO_CONSERVATION]))
    assert values["total"] == pytest.approx(0.4 * values["batch_correction"] + 0.6 * values["bio_conservation"])
    assert plain.reasons == {"kbet": "not requested"}
    assert {metric_name(name) for name in values} == {name for name in METRICS if name.startswith("scib_")}


@pytest.mark.slow
@needs_scib
def test_an_embedding_is_no_correction_of_itself_and_centring_is_one(batches, plain):
    embedding, batch, kind = batches
    centred = scib(centre(embedding, batch), embedding, batch, kind, kbet=False).values
    assert plain.values["pcr_comparison"] == pytest.approx(0.0, abs=1e-5)
    assert centred["pcr_comparison"] > 0.9
    assert centred["batch_correction"] > plain.values["batch_correction"]
    assert centred["ilisi"] > plain.values["ilisi"]


@pytest.mark.slow
@needs_scib
def test_the_same_cells_have_the_same_scores(batches, plain):
    embedding, batch, kind = batches
    again = scib(embedding, embedding, batch, kind, kbet=False).values
    known = {name: value for name, value in again.items() if value is not None}
    assert known == pytest.approx({name: plain.values[name] for name in known}, abs=1e-6)  # XLA's sums vary by thread


CASES = {
    "one batch": {"bras", "silhouette_batch", "ilisi", "kbet", "pcr_comparison"},
    "one label": {"clisi", "nmi", "ari", "silhouette_label", "isolated_labels", "bio_conservation", "total"},
    "a label per cell": {"bras", "silhouette_batch", "kbet", "clisi", "nmi", "ari", "silhouette_label"}
    | {"isolated_labels", "bio_conservation", "total"},
    "types are batches": {"bras", "silhouette_batch", "kbet"},
    "a batch of one cell": set(),
    "a label in one batch only": set(),
    "a constant embedding": {"pcr_comparison", "nmi", "ari"},
    "six cells": {"ilisi", "clisi", "kbet"},
}


def labelled(case, embedding, batch, kind):
    """What `scib` is asked in each of `CASES`."""
    embedding = 0 * embedding if case == "a constant embedding" else embedding
    batch = {
        "one batch": np.full(100, "x"),
        "types are batches": kind,
        "a batch of one cell": np.where(np.arange(100) == 0, "single", batch),
    }.get(case, batch)
    kind = {
        "one label": np.full(100, "A"),
        "a label per cell": np.arange(100),
        "a label in one batch only": np.where(batch == "x", "only", kind),
        "six cells": np.array(list("AB"))[np.arange(100) // 4 % 2],
    }.get(case, kind)
    some = [0, 1, 4, 5, 8, 9] if case == "six cells" else slice(None)
    return embedding[some], embedding[some], batch[some], kind[some]


@pytest.mark.parametrize("case", CASES)
def test_a_score_that_cannot_be_asked_is_none_with_its_reason(batches, case, monkeypatch):
    computed = MagicMock(**{f"{name}.return_value": 0.5 for name in FUNCTIONS})
    computed.nmi_ari_cluster_labels_kmeans.return_value = {"nmi": 0.5, "ari": 0.5}
    monkeypatch.setattr(module, "_library", lambda: computed)
    scored = scib(*labelled(case, *batches))
    assert {name for name, value in scored.values.items() if value is None} == set(scored.reasons) == CASES[case]


@pytest.mark.slow
@needs_scib
@pytest.mark.parametrize("case", CASES)
def test_scores_that_can_be_asked_are_found_and_in_range(batches, case):
    scored = scib(*labelled(case, *batches))
    assert set(scored.reasons) == CASES[case]
    for name, value in scored.values.items():
        metric = METRICS[metric_name(name)]
        low = 0.0 if metric.low is None else metric.low
        assert value is None or low - 1e-5 <= value <= metric.high + 1e-5, name


@pytest.mark.slow
@needs_scib
def test_all_scores_and_aggregates_equal_the_benchmarker_of_scib_metrics(batches):
    import anndata
    import pandas as pd
    from scib_metrics.benchmark import Benchmarker
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    embedding, batch, kind = batches
    steered = centre(embedding, batch).astype(np.float32)
    obs = pd.DataFrame({"batch": batch, "kind": kind}, index=[f"c{i}" for i in range(100)])
    data = anndata.AnnData(X=embedding, obs=obs, obsm={"before": embedding, "after": steered})
    bench = Benchmarker(
        data, "batch", "kind", ["after"], pre_integrated_embedding_obsm_key="before", progress_bar=False
    )

    def exact(x, k):
        distances, indices = NearestNeighbors(n_neighbors=k).fit(x).kneighbors(x)
        return NeighborsResults(indices=indices, distances=distances)

    bench.prepare(neighbor_computer=exact)
    bench.benchmark()
    theirs = bench.get_results(clean_names=False).loc["after"]
    own = scib(steered, embedding, batch, kind).values
    names = {"ilisi": "ilisi_knn", "clisi": "clisi_knn", "kbet": "kbet_per_label"}
    names |= {name: f"nmi_ari_cluster_labels_kmeans_{name}" for name in ("nmi", "ari")}
    names |= dict(zip(AGGREGATES, ("Batch correction", "Bio conservation", "Total"), strict=True))
    for name in (*BATCH_CORRECTION, *BIO_CONSERVATION, *AGGREGATES):
        assert own[name] == pytest.approx(theirs[names.get(name, name)], abs=1e-5), name


@pytest.mark.slow
@needs_scib
def test_nothing_is_printed_or_logged(batches, caplog, capfd):
    embedding, batch, kind = batches
    with caplog.at_level(logging.INFO):
        scib(embedding, embedding, batch, kind, kbet=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@needs_scib
def test_a_fresh_process_keeps_its_compilations_and_says_nothing(tmp_path):
    code = (
        "import numpy as np; from pipelines.steering.metrics.scib import scib; r = np.random.default_rng(0);"
        "x = r.normal(size=(60, 4)); scib(x, x, ['a', 'b'] * 30, ['t', 't', 'u', 'u'] * 15, kbet=False)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list((tmp_path / "scsae" / "jax").iterdir())) > 5


def test_bad_embeddings_are_refused_before_anything_is_computed(batches):
    embedding, batch, kind = batches
    with pytest.raises(UsageError, match=r"\[99, 8\]"):
        scib(embedding, embedding[:-1], batch, kind)
    with pytest.raises(UsageError, match="dose"):
        scib(embedding * np.float32("nan"), embedding, batch, kind)
    with pytest.raises(UsageError, match=r"3 .*4"):
        scib(embedding[:3], embedding[:3], batch[:3], kind[:3])


def test_without_scib_metrics_the_extra_is_named(batches, monkeypatch):
    module._library.cache_clear()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not module.has_scib()
    with pytest.raises(UsageError, match=r"pip install 'scsae\[evaluate\]'"):
        scib(batches[0], batches[0], *batches[1:])
