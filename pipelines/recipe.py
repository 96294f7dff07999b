"""The stages of a recipe, run in order on one Ray session; each starts from the run that the stage before it made."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from feature_store.associations.gene_sets import read_collections
from feature_store.storage.layout import Layout
from pipelines.config import PARENTS, Options, Recipe
from pipelines.errors import UsageError
from pipelines.runtime.checks import check_before_work, check_tracking
from pipelines.runtime.cluster import one_ray_session
from pipelines.runtime.progress import stderr_console
from pipelines.runtime.stage import StageResult

T = TypeVar("T", bound=Options)


def run_recipe(recipe: Recipe, store: Path, *, address: str | None = None) -> list[StageResult]:
    """Run the stages of the recipe and return their results; the same call resumes a recipe that was interrupted.

    If several sites are extracted, the later stages run for each of them. A stage whose predecessor is not in the
    recipe starts from the run that its own option names (`train.activations`, `encode.sae`, ...), or from the newest
    run in the store. UsageError for a recipe without a stage. A store or MLflow server that cannot be written, an
    address without a cluster, a gene-set file that cannot be read and a folder without the SAE to import are errors
    before the first stage.
    """
    if recipe == Recipe(store=recipe.store):
        stages = "extract, train or import-sae, encode, associate, steer"
        raise UsageError(f"the recipe has no stage; give at least one of {stages}")
    layout = Layout(store)
    check_before_work(layout, address=address)
    # a file that is wrong is found now, and not after hours of the stages before
    if recipe.associate is not None:
        read_collections(recipe.associate.gmt)
    if recipe.import_sae is not None:
        from pipelines.exchange import check_folder

        check_folder(recipe.import_sae)
    if (_makes_sae(recipe) or recipe.steer) and os.environ.get("MLFLOW_TRACKING_URI"):
        check_tracking(layout)
    with one_ray_session():
        return list(_stages(recipe, store, address))


def _stages(recipe: Recipe, store: Path, address: str | None) -> Iterator[StageResult]:
    from pipelines.associate import associate
    from pipelines.encode import encode
    from pipelines.exchange import import_sae
    from pipelines.extract import extract
    from pipelines.steering.run import steer
    from pipelines.train import train

    heads: list[str | None] = [None]
    stages = StageNames(recipe)
    if recipe.extract is not None:
        stages.begin("extract")
        extracted = extract(recipe.extract, store, address=address)
        yield from extracted
        heads = [result.run for result in extracted]
    middle: dict[str, Callable[[Any, Path], StageResult]] = {
        **({"train": partial(train, address=address)} if recipe.import_sae is None else {"import_sae": import_sae}),
        "encode": partial(encode, address=address),
        "associate": partial(associate, address=address),
    }
    for head in heads if _makes_sae(recipe) else [None]:
        run = head
        for name, stage in middle.items():
            options = getattr(recipe, name)
            if options is None:
                run = None
                continue
            stages.begin(name.replace("_", "-"))
            result = stage(_with_parent(options, name, run), store)
            yield result
            run = result.run
        for steering in recipe.steer:
            stages.begin("steer")
            yield steer(_with_parent(steering, "steer", run), store, address=address)


class StageNames:
    """Says on stderr which stage of how many begins; the stages after the extraction run for each of its sites."""

    def __init__(self, recipe: Recipe) -> None:
        extracts = recipe.extract is not None
        sites = recipe.extract.layer if recipe.extract is not None and _makes_sae(recipe) else ()
        after = (recipe.train, recipe.import_sae, recipe.encode, recipe.associate, *recipe.steer)
        self._n_stages = extracts + max(len(sites), 1) * sum(options is not None for options in after)
        self._n_begun = 0

    def begin(self, name: str) -> None:
        """Say that a stage begins, if there are several."""
        self._n_begun += 1
        if self._n_stages > 1:
            stderr_console().print(f"stage {self._n_begun} of {self._n_stages}: {name}")


def _makes_sae(recipe: Recipe) -> bool:
    """Return whether the recipe trains or imports an SAE."""
    return recipe.train is not None or recipe.import_sae is not None


def _with_parent(options: T, stage: str, run: str | None) -> T:
    """Return the options of a stage with the run that it starts from, or unchanged if there is none yet."""
    _, field = PARENTS[stage]
    return options if run is None else options.model_copy(update={field: run})
