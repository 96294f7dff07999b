"""A world of known features, of the field's size: correlated, hierarchical, of unequal densities, drawn batch by batch.

With the parts of SynthSAEBench (arXiv 2602.14687): many more features than dimensions, of which a few are active on a
token. Features come in trees: a root has CHILDREN children, of which at most one is active, and only with its root.
Roots come in topics: on a token few topics are active, and only their roots can be, so that roots of a topic go
together. Densities of roots follow a power law. Nothing is stored but the unit directions: a batch is a function of its
seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

CHILDREN = 3
ROOTS_OF_TOPIC = 16
CHILD_SHARE = 0.6
"""Probability that one of the children is active where the root is."""
EXPONENT = 0.6
"""Density of the i-th densest root is in proportion to i ** -EXPONENT."""
TOPICS_AT_ONCE = 8.0
"""Mean number of active topics of a token, as far as there are so many."""


class Batch(NamedTuple):
    """Activations [n_tokens d_model], and the lengths of the active features, sparse [n_tokens n_features]."""

    x: Tensor
    active: Tensor


@dataclass(frozen=True)
class World:
    """Feature r is a root for r < n_roots; the children of root r are n_roots + CHILDREN r + 0, 1, ..."""

    n_features: int
    d_model: int
    l0: float = 34.0
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_features % ((1 + CHILDREN) * ROOTS_OF_TOPIC):
            raise ValueError(f"n_features has to be a multiple of {(1 + CHILDREN) * ROOTS_OF_TOPIC}")
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.n_features, self.d_model, generator=generator)
        object.__setattr__(self, "directions", functional.normalize(drawn, dim=1))
        order = torch.randperm(self.n_roots, generator=generator)
        rate = (torch.arange(self.n_roots) + 1.0) ** -EXPONENT
        rate = rate[order]
        rate *= self.l0 / (1 + CHILD_SHARE) / rate.sum()
        n_topics = self.n_roots // ROOTS_OF_TOPIC
        by_topic = rate.view(n_topics, ROOTS_OF_TOPIC)
        # a topic is active often enough for its densest root
        topic = torch.maximum(by_topic.amax(1) * 1.25, torch.tensor(min(TOPICS_AT_ONCE, n_topics / 2) / n_topics))
        topic = topic.clamp(max=1)
        object.__setattr__(self, "topic", topic)
        object.__setattr__(self, "of_topic", (by_topic / topic[:, None]).clamp(max=1).reshape(-1))

    @property
    def n_roots(self) -> int:
        """Number of roots."""
        return self.n_features // (1 + CHILDREN)

    @property
    def density(self) -> Tensor:
        """The probability that each feature is active [n_features]."""
        root = self.of_topic * self.topic.repeat_interleave(ROOTS_OF_TOPIC)
        return torch.cat([root, (root * CHILD_SHARE / CHILDREN).repeat_interleave(CHILDREN)])

    def child_of(self, root: int) -> range:
        """The children of a root."""
        first = self.n_roots + CHILDREN * root
        return range(first, first + CHILDREN)

    def sample(self, n_tokens: int, seed: int) -> Batch:
        """A batch of tokens."""
        generator = torch.Generator().manual_seed(seed)
        topic = torch.rand(n_tokens, len(self.topic), generator=generator) < self.topic
        row, number = topic.nonzero().unbind(1)
        places = number[:, None] * ROOTS_OF_TOPIC + torch.arange(ROOTS_OF_TOPIC)
        on = torch.rand(places.shape, generator=generator) < self.of_topic[places]
        token, root = row[:, None].expand_as(places)[on], places[on]
        has_child = torch.rand(len(root), generator=generator) < CHILD_SHARE
        which = torch.randint(CHILDREN, (len(root),), generator=generator)
        child = self.n_roots + CHILDREN * root + which
        token = torch.cat([token, token[has_child]])
        feature = torch.cat([root, child[has_child]])
        length = 0.5 - torch.log1p(-torch.rand(len(token), generator=generator))
        shape, places = (n_tokens, self.n_features), torch.stack([token, feature])
        active = torch.sparse_coo_tensor(places, length, shape, check_invariants=True).coalesce()
        noise = torch.randn(n_tokens, self.d_model, generator=generator) * (1.5 * self.noise / self.d_model**0.5)
        return Batch(active @ self.directions + noise, active)


class Recovered(NamedTuple):
    """How well an autoencoder has a world's features; all are means over features of the world but `learned_alone`.

    cosine: with the nearest decoder row. share: those whose nearest is at RECOVERED or above. precision, recall: of the
    firing of that row on the feature's tokens, for recovered features. split: recovered features with several decoder
    rows at SPLIT or above. absorption: of recovered roots, how much oftener their row is silent where a child is active
    than where none is.
    """

    cosine: float
    share: float
    precision: float
    recall: float
    split: float
    absorption: float


RECOVERED, SPLIT, LEAST_TOKENS = 0.9, 0.7, 10


def recovery(world: World, directions: Tensor, codes: Tensor, active: Tensor) -> Recovered:
    """Hold unit decoder rows [n_learned d_model] and their codes on tokens against what was active there.

    codes, active: sparse or dense [n_tokens n_learned] and [n_tokens n_features].
    """
    best = torch.empty(world.n_features)
    nearest = torch.empty(world.n_features, dtype=torch.int64)
    n_near = torch.empty(world.n_features)
    for first in range(0, world.n_features, 1024):
        cosine = world.directions[first : first + 1024] @ directions.T
        best[first : first + 1024], nearest[first : first + 1024] = cosine.max(1)
        n_near[first : first + 1024] = (cosine >= SPLIT).sum(1).float()
    is_on = active.to_dense() > 0
    fires = (codes.to_dense() if codes.layout != torch.strided else codes) > 0
    known = (best >= RECOVERED) & (is_on.sum(0) >= LEAST_TOKENS)
    found = known.nonzero()[:, 0]
    own, learned = is_on[:, found], fires[:, nearest[found]]
    both = (own & learned).sum(0).double()
    precision, recall = both / learned.sum(0).clamp(min=1), both / own.sum(0)
    roots = found[found < world.n_roots].tolist()
    excess = []
    for root in roots:
        with_child = is_on[:, root] & is_on[:, list(world.child_of(root))].any(1)
        alone = is_on[:, root] & ~with_child
        if with_child.sum() >= LEAST_TOKENS and alone.sum() >= LEAST_TOKENS:
            silent = ~fires[:, nearest[root]]
            excess.append(float(silent[with_child].double().mean() - silent[alone].double().mean()))
    nothing = float("nan")
    return Recovered(
        cosine=float(best.mean()),
        share=float((best >= RECOVERED).double().mean()),
        precision=float(precision.mean()) if len(found) else nothing,
        recall=float(recall.mean()) if len(found) else nothing,
        split=float((n_near[best >= RECOVERED] > 1).double().mean()) if (best >= RECOVERED).any() else nothing,
        absorption=sum(excess) / len(excess) if excess else nothing,
    )
