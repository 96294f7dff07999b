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

from sae_core.sae.synthetic import own_seed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

CHILDREN = 3
ROOTS_OF_TOPIC = 16
CHILD_SHARE = 0.6
"""Probability that one of the children is active where the root is."""
EXPONENT = 0.6
"""Density of the i-th densest root is in proportion to i ** -EXPONENT."""
TOPICS_AT_ONCE = 8.0
"""Least mean number of active topics of a token, as far as there are so many: dense roots are active oftener."""


MEAN_LENGTHS = (1.0, 0.8)
"""Mean length of the densest and of the rarest feature when active; those between follow the rank of their density."""
LENGTH_DEVIATION = 0.1
"""Standard deviations of lengths are |N(LENGTH_DEVIATION, LENGTH_DEVIATION)|, one for each feature."""
LEAST_LENGTH = 0.1


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
        generator = torch.Generator().manual_seed(own_seed(self.seed, "world"))
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
        ranks = self.density.argsort(descending=True).argsort() / (self.n_features - 1)
        object.__setattr__(self, "mean_length", torch.lerp(*map(torch.tensor, MEAN_LENGTHS), ranks))
        deviation = (LENGTH_DEVIATION * (1 + torch.randn(self.n_features, generator=generator))).abs()
        object.__setattr__(self, "length_deviation", deviation)

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
        generator = torch.Generator().manual_seed(own_seed(seed, "tokens of the world"))
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
        varied = torch.randn(len(token), generator=generator) * self.length_deviation[feature]
        length = (self.mean_length[feature] + varied).clamp(min=LEAST_LENGTH)
        shape, places = (n_tokens, self.n_features), torch.stack([token, feature])
        active = torch.sparse_coo_tensor(places, length, shape, check_invariants=True).coalesce()
        noise = torch.randn(n_tokens, self.d_model, generator=generator) * (self.noise / self.d_model**0.5)
        return Batch(active @ self.directions + noise, active)


class Recovered(NamedTuple):
    """How well a dictionary has the features of a world; the row of a feature is the decoder row nearest to it.

    A feature is recovered if the cosine with its row is RECOVERED or above. Where no feature counts, a mean is NaN.
    """

    cosine: float
    """Mean over all features of the cosine with their row."""
    share: float
    """Share of all features that are recovered."""
    roots: float
    """Share of the roots that are recovered."""
    children: float
    """Share of the children that are recovered."""
    precision: float
    """Mean over recovered features: the share of the tokens where the row fires on which the feature is active."""
    recall: float
    """Mean over recovered features: the share of the tokens where the feature is active on which the row fires."""
    f1: float
    """Mean of 2 TP / (2 TP + FP + FN) of that firing over all features, recovered or not."""
    split: float
    """Share of the recovered features that several firing rows belong to: it is nearest to them, at SPLIT or above."""
    absorption: float
    """Mean over recovered roots: how much oftener the row is silent where a child is active than where none is."""
    composition: float
    """Mean over all children of the cosine between their row and the direction of their root, which is 0 in truth and
    sqrt(1/2) for a row that is the sum of both."""


RECOVERED, SPLIT, LEAST_TOKENS = 0.9, 0.85, 10
"""SPLIT is well above sqrt(1/2), so that the sum of a root and its child belongs to neither. Firing counts for features
that are active on LEAST_TOKENS tokens at least."""


def recovery(world: World, directions: Tensor, judged: Iterable[tuple[Tensor, Tensor]]) -> Recovered:
    """Hold unit decoder rows [n_learned d_model] and their codes against what was active on the same tokens.

    judged: batches of tokens, each as its codes [n_tokens n_learned] and what was active [n_tokens n_features].
    """
    cosine, nearest, belongs = _nearest_rows(world, directions)
    n_roots = world.n_roots
    active, fired, both = (torch.zeros(world.n_features, dtype=torch.int64) for _ in range(3))
    with_child, both_with_child = torch.zeros(n_roots, dtype=torch.int64), torch.zeros(n_roots, dtype=torch.int64)
    row_fired = torch.zeros(len(directions), dtype=torch.int64)
    for codes, truth in judged:
        rows, is_on = codes.to_dense() > 0, truth.to_dense() > 0
        fires = rows[:, nearest]
        hit = is_on & fires
        child = is_on[:, n_roots:].view(len(is_on), n_roots, CHILDREN).any(2)
        row_fired += rows.sum(0)
        active, fired, both = active + is_on.sum(0), fired + fires.sum(0), both + hit.sum(0)
        with_child += child.sum(0)
        both_with_child += (hit[:, :n_roots] & child).sum(0)
    seen = active >= LEAST_TOKENS
    found = cosine >= RECOVERED
    n_rows = torch.bincount(belongs[(belongs >= 0) & (row_fired > 0)], minlength=world.n_features)
    alone = active[:n_roots] - with_child
    compared = found[:n_roots] & (with_child >= LEAST_TOKENS) & (alone >= LEAST_TOKENS)
    excess = (both[:n_roots] - both_with_child) / alone - both_with_child / with_child
    children = directions[nearest[n_roots:]].view(n_roots, CHILDREN, -1)
    return Recovered(
        cosine=float(cosine.mean()),
        share=float(found.double().mean()),
        roots=float(found[:n_roots].double().mean()),
        children=float(found[n_roots:].double().mean()),
        precision=float((both / fired.clamp(min=1))[found & seen].mean()),
        recall=float((both / active)[found & seen].mean()),
        f1=float((2 * both / (active + fired))[seen].mean()),
        split=float((n_rows[found] > 1).double().mean()),
        absorption=float(excess[compared].mean()),
        composition=float((children @ world.directions[:n_roots, :, None]).mean()),
    )


def _nearest_rows(world: World, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest cosine of each feature, the row that has it, and the feature that each row belongs to, or -1."""
    best, nearest = torch.empty(world.n_features), torch.empty(world.n_features, dtype=torch.int64)
    row_best, belongs = torch.full((len(directions),), SPLIT), torch.full((len(directions),), -1)
    for first in range(0, world.n_features, 1024):
        cosine = world.directions[first : first + 1024] @ directions.T
        best[first : first + 1024], nearest[first : first + 1024] = cosine.max(1)
        top, feature = cosine.max(0)
        belongs = torch.where(top >= row_best, feature + first, belongs)
        row_best = torch.maximum(row_best, top)
    return best, nearest, belongs
