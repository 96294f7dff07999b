"""scIB's scores of an embedding (Luecken et al. 2022, doi:10.1038/s41592-021-01336-8), by `scib-metrics`.

The aggregates are those of its Benchmarker: batch correction is the mean of BRAS, iLISI, kBET, graph connectivity and
PCR comparison; bio-conservation is the mean of isolated labels, k-means NMI and ARI, silhouette label and cLISI; the
total is .4 of the first plus .6 of the second. Silhouette batch is reported beside BRAS and is in no aggregate, because
it scores batches that lie in pairs as mixed (Rautenstrauch & Ohler 2025, doi:10.1038/s41587-025-02743-4). A score that
is not defined for the data is None with a reason, and aggregates are means of the others, so only embeddings of the
same cells can be compared.

Neighbours are exact and are searched once for LISI (90), kBET (50) and connectivity (15).

Cost: the extra is 0.4 GB (jax). A process pays 3.5 s to import it, 5 s to compile the rest for a new number of cells
(1 s from jax's cache in `$XDG_CACHE_HOME/scsae/jax`), and 25 s to compile kBET's neighbours with numba; 1,000 cells
then take seconds. jax runs on the CPU unless `JAX_PLATFORMS` says otherwise, so that scores agree between machines.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.neighbors import NearestNeighbors

from pipelines.errors import UsageError
from pipelines.steering.embedding_baselines import EXTRA
from pipelines.steering.metrics.intervals import Floats, Names

BATCH_CORRECTION = ("bras", "ilisi", "kbet", "graph_connectivity", "pcr_comparison")
BIO_CONSERVATION = ("isolated_labels", "nmi", "ari", "silhouette_label", "clisi")
OTHERS = ("silhouette_batch",)
AGGREGATES = ("batch_correction", "bio_conservation", "total")
_AGGREGATE_METRICS = {"batch_correction": "scib_batch", "bio_conservation": "scib_bio", "total": "scib_total"}
WEIGHTS = (0.4, 0.6)
"""The weights of batch correction and of bio-conservation in the total."""
MIN_CELLS = 4
"""Least number of cells for any score."""
KBET_MIN = 10
"""Least number of cells of a label for kBET."""
LISI_MIN = 10
"""Least number of cells for LISI, whose perplexity is a third of the neighbours and has to be above 1."""


@dataclass(frozen=True, kw_only=True)
class Scib:
    """The scores of one embedding, of which 1 is best; a score of None has a reason."""

    values: dict[str, float | None]
    reasons: dict[str, str]


class _Score(NamedTuple):
    """One score: the reason why it is not defined for these cells, if any, and the function that computes it."""

    problem: str | None
    compute: Callable[[], Any]


def has_scib() -> bool:
    """Whether scib-metrics is installed."""
    return find_spec("scib_metrics") is not None


def metric_name(score: str) -> str:
    """The name of a score in the table `results` and in the registry of metrics."""
    return _AGGREGATE_METRICS.get(score, f"scib_{score}")


def check_scib() -> None:
    """Raise UsageError if scib-metrics is not installed."""
    if not has_scib():
        raise UsageError(f"scIB's scores need scib-metrics, which is not installed; run: {EXTRA}")


def scib(embedding: Floats, unsteered: Floats, batch: Names, label: Names, *, kbet: bool = True) -> Scib:
    """Score an embedding.

    Args:
        embedding: the embedding [n_cells width].
        unsteered: the unsteered embedding of the same cells [n_cells any_width]; PCR comparison is relative to it, and
            is 0 for the unsteered embedding itself.
        batch: the batch of every cell [n_cells].
        label: the cell type of every cell [n_cells].
        kbet: whether to compute kBET, the slowest score; without it batch correction is the mean of the other four.

    Raises:
        UsageError: the extra `evaluate` is not installed, there are fewer than 4 cells, lengths differ, or values are
            not finite.
    """
    values, before = np.asarray(embedding, dtype=np.float32), np.asarray(unsteered, dtype=np.float32)
    batches, labels = np.asarray(batch, dtype=str), np.asarray(label, dtype=str)
    _check(values, before, batches, labels)
    library = _library()
    with _quiet():
        found = _scores(library, values, before, batches, labels, kbet=kbet)
        scores: dict[str, float | None] = {}
        reasons: dict[str, str] = {}
        for name, (problem, compute) in found.items():
            score = float("nan") if problem else float(compute())
            scores[name] = score if np.isfinite(score) else None
            if scores[name] is None:
                reasons[name] = problem or "scib-metrics found no finite value"
    for aggregate, parts in zip(AGGREGATES, (BATCH_CORRECTION, BIO_CONSERVATION), strict=False):
        known = [own for part in parts if (own := scores[part]) is not None]
        scores[aggregate] = float(np.mean(known)) if known else None
    mixing, bio = scores["batch_correction"], scores["bio_conservation"]
    scores["total"] = None if mixing is None or bio is None else WEIGHTS[0] * mixing + WEIGHTS[1] * bio
    reasons |= {name: "no score of its parts" for name in AGGREGATES if scores[name] is None}
    return Scib(values=scores, reasons=reasons)


def _scores(
    library: Any, values: Floats, before: Floats, batches: Any, labels: Any, *, kbet: bool
) -> dict[str, _Score]:
    """Every score, by name."""
    near = _neighbors(library, values)
    n_batches, n_labels = len(np.unique(batches)), len(np.unique(labels))
    per_label = [(int((labels == name).sum()), len(np.unique(batches[labels == name]))) for name in np.unique(labels)]
    one_batch = "there is one batch only" if n_batches < 2 else None
    one_label = "there is one label only" if n_labels < 2 else None
    if not one_label and n_labels == len(labels):
        one_label = "every cell has a label of its own"
    few = f"fewer than {LISI_MIN} cells" if len(labels) < LISI_MIN else None
    apart = None if any(1 < b < n for n, b in per_label) else "no label has cells of two batches, one of them with two"
    small = None if any(n >= KBET_MIN and b > 1 for n, b in per_label) else "no label of 10 cells is in two batches"
    constant = "the embedding is constant" if not np.ptp(values, axis=0).any() else None
    flat = "the unsteered embedding is constant" if not np.ptp(before, axis=0).any() else constant

    @cache
    def clusters() -> dict[str, float]:
        return dict(library.nmi_ari_cluster_labels_kmeans(values, labels))

    return {
        "bras": _Score(apart, lambda: library.bras(values, labels, batches)),
        "ilisi": _Score(one_batch or few, lambda: library.ilisi_knn(near(90), batches)),
        "kbet": _Score(
            "not requested" if not kbet else small, lambda: library.kbet_per_label(near(50), batches, labels)
        ),
        "graph_connectivity": _Score(None, lambda: library.graph_connectivity(near(15), labels)),
        "pcr_comparison": _Score(
            one_batch or flat, lambda: library.pcr_comparison(before, values, batches, categorical=True)
        ),
        "isolated_labels": _Score(one_label, lambda: library.isolated_labels(values, labels, batches)),
        "nmi": _Score(one_label or constant, lambda: clusters()["nmi"]),
        "ari": _Score(one_label or constant, lambda: clusters()["ari"]),
        "silhouette_label": _Score(one_label, lambda: library.silhouette_label(values, labels)),
        "clisi": _Score(one_label or few, lambda: library.clisi_knn(near(90), labels)),
        "silhouette_batch": _Score(apart, lambda: library.silhouette_batch(values, labels, batches)),
    }


def _neighbors(library: Any, values: Floats) -> Callable[[int], Any]:
    """A function of k that returns the k exact neighbours for scib-metrics, the cell itself first; one search."""
    most = min(90, len(values))
    distances, indices = NearestNeighbors(n_neighbors=most, algorithm="brute").fit(values).kneighbors(values)
    found = library.nearest_neighbors.NeighborsResults(indices=indices, distances=distances)
    return lambda n: found.subset_neighbors(min(n, most))


def _check(values: Floats, before: Floats, batches: Names, labels: Names) -> None:
    if values.ndim != 2 or before.ndim != 2 or not len(values) == len(before) == len(batches) == len(labels):
        raise UsageError(
            f"embedding was {list(values.shape)}, unsteered {list(before.shape)}, with {len(batches)} batches and "
            f"{len(labels)} labels; each of them needs a row for every cell"
        )
    if len(values) < MIN_CELLS:
        raise UsageError(f"there are {len(values)} cells, and scIB's scores need at least {MIN_CELLS}")
    if not (np.isfinite(values).all() and np.isfinite(before).all()):
        raise UsageError("an embedding holds values that are not finite; steer by a smaller --dose")


@cache
def _library() -> Any:
    """The module scib_metrics, with jax on the CPU, with cached compilations and without printed output."""
    check_scib()
    with _quiet():
        import jax

        if "JAX_PLATFORMS" not in os.environ:
            jax.config.update("jax_platforms", "cpu")
        if jax.config.jax_compilation_cache_dir is None:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scsae" / "jax"
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        import scib_metrics

        scib_metrics.settings.verbosity = "ERROR"
    return scib_metrics


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of the libraries that scib-metrics calls; the relevant ones are given as reasons."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
