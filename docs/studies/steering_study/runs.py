"""The recipes of docs/steering.md; see `steering_study`. A run that is in the store is not made again."""

from dataclasses import dataclass, replace
from pathlib import Path

from findings_study.cells import CONTROL, STIMULATED, fold_column

from feature_store import FeatureStore
from feature_store.storage import commit
from feature_store.storage.plans import SteeringPlan
from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, Recipe, SteerOptions, TrainOptions
from pipelines.recipe import run_recipe

N_FEATURES = (5, 10, 20, 50, 100)
DOSES = (0.5, 0.75, 1.0, 1.25, 1.5)
N_NULLS, FEW_NULLS = 10, 5
KINDS_N_FEATURES, KINDS_DOSES = (10, 50, 100), (0.5, 1.0, 1.5)
KANG_LAYER, MIXOLOGY_LAYER, CTCL_LAYER = "2", "1", "2"


@dataclass(frozen=True, kw_only=True)
class SteeringRun:
    """A steering run: the number of its SAE (a fold or a seed), its run id, and the folder of its tables."""

    sae: int
    id: str
    path: Path


def kang_recipe(file: Path, fold: int) -> Recipe:
    """Stimulated to control and back, on the donors of a fold; the fold is the SAE's seed, too."""
    move = SteerOptions(
        kind="condition",
        target=STIMULATED,
        toward=CONTROL,
        intervention="shift",
        n_features=N_FEATURES,
        dose=DOSES,
        n_nulls=N_NULLS,
        head=True,
        seed=fold,
    )
    back = move.model_copy(
        update={
            "target": CONTROL,
            "toward": STIMULATED,
            "n_features": (10, 50, 100),
            "dose": (0.75, 1.0, 1.25),
            "n_nulls": FEW_NULLS,
            "head": False,
        }
    )
    return Recipe(
        extract=ExtractOptions(
            data=(file,),
            layer=(KANG_LAYER,),
            donor="donor",
            cell_type="cell_type",
            label=("condition",),
            split=fold_column(fold),
        ),
        train=train_options(fold),
        encode=EncodeOptions(pooling="mean"),
        associate=AssociateOptions(),
        steer=(move, back),
    )


def mixology_recipe(file: Path, seed: int) -> Recipe:
    """Batches taken away: 0 to 100 features ablated, and moved to the mean over batches."""
    ablate = SteerOptions(
        kind="batch",
        target="all",
        intervention="ablate",
        n_features=N_FEATURES,
        n_nulls=FEW_NULLS,
        scib=True,
        seed=seed,
    )
    shift = ablate.model_copy(update={"intervention": "shift", "dose": DOSES})
    return Recipe(
        extract=ExtractOptions(
            data=(file,), layer=(MIXOLOGY_LAYER,), batch="batch", cell_type="cell_type", split="split"
        ),
        train=train_options(seed),
        encode=EncodeOptions(pooling="mean"),
        associate=AssociateOptions(),
        steer=(ablate, shift),
    )


def ctcl_recipe(file: Path, fold: int) -> Recipe:
    """Cells of a patient to those of healthy donors, one donor of each side left out."""
    return Recipe(
        extract=ExtractOptions(
            data=(file,),
            layer=(CTCL_LAYER,),
            donor="donor",
            cell_type="cell_type",
            label=("condition",),
            split="split",
        ),
        train=train_options(fold),
        encode=EncodeOptions(pooling="mean"),
        associate=AssociateOptions(),
        steer=(
            SteerOptions(
                kind="condition",
                target="CTCL",
                toward="healthy",
                intervention="shift",
                n_features=N_FEATURES,
                dose=DOSES,
                n_nulls=N_NULLS,
                seed=fold,
            ),
        ),
    )


def kinds_recipe(recipe: Recipe, seed: int) -> Recipe:
    """The same recipe with one steering: batches mixed by a kind of edit that is searched."""
    steering = SteerOptions(
        kind="batch",
        target="all",
        n_features=KINDS_N_FEATURES,
        dose=KINDS_DOSES,
        n_nulls=FEW_NULLS,
        seed=seed,
    )
    return recipe.model_copy(update={"steer": (steering,)})


def ctcl_mix_recipe(file: Path, seed: int) -> Recipe:
    """The skin of six donors, each of whom is a batch."""
    return Recipe(
        extract=ExtractOptions(data=(file,), layer=(CTCL_LAYER,), batch="donor", cell_type="cell_type", split="split"),
        train=train_options(seed),
        encode=EncodeOptions(pooling="mean"),
        associate=AssociateOptions(),
    )


def runs_of_kinds(best: SteeringRun) -> dict[str, SteeringRun]:
    """The runs of every kind of edit that were searched together with the best one, by kind."""
    searched = _without_kind(best.path)
    opened = FeatureStore.open(best.path.parent.parent, associations=searched.associations)
    found = {}
    for run in opened.lineage.steering:
        path = best.path.parent / run
        if _without_kind(path) == searched:
            kind = SteeringPlan.of(commit.Run.open(path / "results")).intervention
            found[kind] = SteeringRun(sae=best.sae, id=run, path=path)
    return found


def _without_kind(folder: Path) -> SteeringPlan:
    """The plan of a run less what the kind of its edit decides."""
    plan = SteeringPlan.of(commit.Run.open(folder / "results"))
    numbers = tuple(sorted({(n,) for n, _ in plan.grid}))
    return replace(plan, intervention="", by=None, grid=numbers)


def steering_runs(recipe: Recipe, sae: int, store: Path) -> list[SteeringRun]:
    """Run the recipe of one SAE; return its steering runs in their order."""
    results = [result for result in run_recipe(recipe, store) if result.kind == "steering"]
    return [SteeringRun(sae=sae, id=result.run, path=result.path) for result in results]


def small_training(seed: int) -> TrainOptions:
    """A smaller SAE in fewer steps, for studies of many SAEs."""
    return TrainOptions(n_features=512, k=(16,), n_steps=500, num_workers=0, recovery_cells=0, seed=seed)


def train_options(seed: int) -> TrainOptions:
    """Those of the SAE of a fold, whose number is its seed."""
    return TrainOptions(n_features=1024, k=(16,), n_steps=1000, num_workers=0, recovery_cells=0, seed=seed)
