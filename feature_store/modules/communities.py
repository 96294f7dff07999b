"""Groups of features that go together, and how stable they are.

Each feature is joined to the NEIGHBOURS features of largest correlation, as far as it is above the largest correlation
that codes shuffled inside blocks give. Communities of this graph (Louvain: Blondel et al. 2008, arXiv:0803.0476) are
found on the whole and on resamples, each of half of the donors with another seed. Two features belong together in so
many of the resamples: modules are the communities of the graph of pairs that do so in at least STABLE of them, and the
stability of a module is the mean over its pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt

from feature_store.associations.inputs import Floats, Ints
from feature_store.modules.cofiring import Matrix, correlations, shuffled_in_blocks

NEIGHBOURS = 10
STABLE = 0.5
MIN_MODULE = 3


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Modules of features, the largest first.

    Attributes:
        members: the features of each module, ascending.
        stability: of each module, 0 to 1.
        threshold: correlation above which two features may be joined.
    """

    members: tuple[tuple[int, ...], ...]
    stability: tuple[float, ...]
    threshold: float


def find_modules(values: Matrix, block: Ints, unit: Ints, *, n_resamples: int, seed: int) -> Modules:
    """The modules of features from residuals [n_cells n_features].

    block: number of the block of each cell, inside which codes are shuffled; unit: number of the donor of each cell, or
    of the cell where there are no donors; resamples take half of them.
    """
    rng = np.random.default_rng(seed)
    threshold = float(correlations(shuffled_in_blocks(values, block, rng)).max(initial=0))
    n_features, units = values.shape[1], np.unique(unit)
    together = np.zeros((n_features, n_features), dtype=np.uint16)
    for number in range(n_resamples):
        half = rng.permutation(units)[: max(1, (len(units) + 1) // 2)]
        found = correlations(values[np.isin(unit, half)])
        # a smaller sample has larger correlations by chance
        for group in _communities(found, threshold * np.sqrt(len(units) / len(half)), seed=seed + number):
            together[np.ix_(group, group)] += 1
    share: npt.NDArray[np.float64] = together / max(n_resamples, 1)
    np.fill_diagonal(share, 0)
    return _consensus(share, correlations(values), threshold, seed=seed)


def _consensus(share: Floats, found: Matrix, threshold: float, *, seed: int) -> Modules:
    graph: nx.Graph = nx.Graph()
    for a, b in zip(*np.nonzero(np.triu(share >= STABLE)), strict=True):
        if found[a, b] > threshold:
            graph.add_edge(int(a), int(b), weight=float(share[a, b]))
    groups = nx.community.louvain_communities(graph, weight="weight", seed=seed) if len(graph) else []
    kept = sorted((tuple(sorted(group)) for group in groups if len(group) >= MIN_MODULE), key=lambda g: (-len(g), g))
    stability = [share[np.ix_(group, group)].sum() / (len(group) * (len(group) - 1)) for group in kept]
    stable = [(group, float(one)) for group, one in zip(kept, stability, strict=True) if one >= STABLE]
    return Modules(
        members=tuple(group for group, _ in stable), stability=tuple(one for _, one in stable), threshold=threshold
    )


def _communities(found: Matrix, threshold: float, *, seed: int) -> list[list[int]]:
    """The communities of the graph of nearest features."""
    graph: nx.Graph = nx.Graph()
    k = min(NEIGHBOURS, found.shape[0] - 1)
    near = np.argpartition(-found, k - 1, axis=1)[:, :k] if k > 0 else np.empty((found.shape[0], 0), dtype=np.int64)
    for a, others in enumerate(near):
        for b in others.tolist():
            if found[a, b] > threshold:
                graph.add_edge(a, b, weight=float(found[a, b]))
    return [sorted(group) for group in nx.community.louvain_communities(graph, weight="weight", seed=seed)]


def coherence(
    found: Matrix, members: Sequence[int], density: Floats, *, n_draws: int, rng: np.random.Generator
) -> tuple[float, Floats]:
    """The mean correlation of the pairs of a module, and of sets of other features that fire as often [n_draws].

    A member's stand-in is one of the 20 features of most similar density that are not in the module; none is taken
    twice.
    """
    own, outside = np.array(members), np.setdiff1d(np.arange(len(density)), members)
    near = outside[np.argsort(np.abs(density[outside][None] - density[own][:, None]), axis=1, kind="stable")[:, :20]]
    draws = np.full(n_draws, np.nan)
    for i in range(n_draws):
        chosen: set[int] = set()
        for row in near:
            free = [feature for feature in row.tolist() if feature not in chosen]
            if free:
                chosen.add(int(rng.choice(free)))
        if len(chosen) >= MIN_MODULE:
            draws[i] = _mean_of_pairs(found, np.array(sorted(chosen)))
    return _mean_of_pairs(found, own), draws


def _mean_of_pairs(found: Matrix, members: Ints) -> float:
    n = len(members)
    return float(found[np.ix_(members, members)].sum(dtype=np.float64) / (n * (n - 1)))
