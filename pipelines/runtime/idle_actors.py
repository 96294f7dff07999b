"""Actors that wait for the next stage, because their process has imported what every stage needs.

A stage of small data spends more time on starting its actors than on its work: each imports for four seconds. Inside
`one_ray_session` the actors of a stage are therefore kept, and serve the next pool that asks for the same resources.
They hold these resources while they wait, so that whoever needs others ends them first.
"""

from collections.abc import Iterable
from typing import Any

Resources = tuple[int, float]
"""CPU cores and GPUs of an actor."""
_waiting: dict[Resources, list[Any]] = {}


def take(resources: Resources, n: int) -> list[Any]:
    """Return up to `n` waiting actors of these resources, and end all others."""
    found = _waiting.pop(resources, [])
    end_all()
    _end(found[n:])
    return found[:n]


def keep(resources: Resources, actors: Iterable[Any]) -> None:
    """Let actors that have no work wait, without what they hold of their last work."""
    for actor in actors:
        actor.rest.remote()
        _waiting.setdefault(resources, []).append(actor)


def end_all() -> None:
    """End the waiting actors, so that their resources are free."""
    for actors in _waiting.values():
        _end(actors)
    _waiting.clear()


def forget() -> None:
    """Forget the waiting actors, which ended with their session."""
    _waiting.clear()


def _end(actors: Iterable[Any]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor)
