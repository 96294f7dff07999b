"""A recipe's stages in their order, on one Ray session. Each stage starts from the run that the one before it made."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipelines.config import Options, Recipe
from pipelines.errors import UsageError
from pipelines.runtime.cluster import one_ray_session
from pipelines.runtime.stage import StageResult

T = TypeVar("T", bound=Options)


def run_recipe(recipe: Recipe, store: Path, *, address: str | None = None) -> list[StageResult]:
    """Run the stages that the recipe names; call again to resume. Every option is checked before the first stage.

    With several sites, training and all that follows is done for each. A stage whose predecessor is not in the recipe
    takes the run that its `run` names, else the newest in the store.
    """
    if recipe == Recipe(store=recipe.store):
        raise UsageError("the recipe names no stage; name at least one of extract, train, encode, associate, steer")
    with one_ray_session():
        return list(_stages(recipe, store, address))


def _stages(recipe: Recipe, store: Path, address: str | None) -> Iterator[StageResult]:
    from pipelines.associate import associate
    from pipelines.encode import encode
    from pipelines.extract import extract
    from pipelines.steering.run import steer
    from pipelines.train import train

    heads: list[str | None] = [None]
    if recipe.extract is not None:
        extracted = extract(recipe.extract, store, address=address)
        yield from extracted
        heads = [result.run for result in extracted]
    middle: tuple[tuple[Options | None, Callable[[Any, Path], StageResult]], ...] = (
        (recipe.train, partial(train, address=address)),
        (recipe.encode, partial(encode, address=address)),
        (recipe.associate, partial(associate, address=address)),
    )
    for head in heads if recipe.train is not None else [None]:
        run = head
        for options, stage in middle:
            if options is None:
                run = None
                continue
            result = stage(_from_run(options, run), store)
            yield result
            run = result.run
        for steering in recipe.steer:
            yield steer(_from_run(steering, run), store, address=address)


def _from_run(options: T, run: str | None) -> T:
    """The options with `run` filled in, unless there is no run yet."""
    return options if run is None else options.model_copy(update={"run": run})
