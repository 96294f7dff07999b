"""The recipes of the findings, and the stores that they fill; see `findings_study`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feature_store import FeatureStore
from findings_study.cells import StudyFiles, fold_column
from pipelines.config import AssociateOptions, BaselineOptions, EncodeOptions, ExtractOptions, Recipe, TrainOptions
from pipelines.recipe import run_recipe

LAYER = "1"
POOLING: Literal["mean"] = "mean"
TRAIN = TrainOptions(n_features=1024, k=(8,), n_steps=1000, num_workers=0, recovery_cells=0)
BASELINES: tuple[Literal["neurons", "pca", "random"], ...] = ("neurons", "pca", "random")
N_BASELINED = 2
"""Folds of the second question that are held against the baselines: three a fold, each as long as its SAE."""
TOKENS_OF_MIXOLOGY = 256
"""A cell of it fills all 1,199 places of the model; that many train."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """An SAE of control cells: its codes of control and stimulated cells, and its associations with control cells."""

    number: int
    both: FeatureStore
    control: FeatureStore


def cell_type_recipe(files: StudyFiles) -> Recipe:
    """The first question: extract, train, encode and associate on cells of both conditions."""
    return Recipe(
        extract=ExtractOptions(
            data=(files.kang,), layer=(LAYER,), donor="donor", cell_type="cell_type", label=("lineage", "condition")
        ),
        train=TRAIN,
        encode=EncodeOptions(pooling=POOLING),
        associate=AssociateOptions(),
    )


def detector_recipe(files: StudyFiles, fold: int) -> Recipe:
    """The second: train on control cells, encode those of both conditions; donors keep their splits."""
    return Recipe(
        extract=ExtractOptions(
            data=(files.control,), layer=(LAYER,), donor="donor", cell_type="cell_type", split=fold_column(fold)
        ),
        train=TRAIN,
        encode=both_conditions(files),
    )


def both_conditions(files: StudyFiles, sae: str | None = None) -> EncodeOptions:
    """Encode control and stimulated cells."""
    return EncodeOptions(
        sae=sae,
        data=(files.kang,),
        donor="donor",
        cell_type="cell_type",
        label=("condition",),
        pooling=POOLING,
    )


def protocol_recipe(files: StudyFiles) -> Recipe:
    """The third: a sample of each cell's tokens trains, and all are encoded.

    `protocol` is no label here: whole batches carry it, so that batches would be compared inside protocols.
    """
    return Recipe(
        extract=ExtractOptions(
            data=(files.mixology,),
            layer=(LAYER,),
            batch="batch",
            cell_type="cell_type",
            split="split",
            tokens_per_cell=TOKENS_OF_MIXOLOGY,
        ),
        train=TRAIN,
        encode=EncodeOptions(fused=True, pooling=POOLING),
        associate=AssociateOptions(),
    )


def run_cell_types(files: StudyFiles, store: Path) -> FeatureStore:
    """Run the first recipe; return the store opened at its associations."""
    return FeatureStore.open(store, associations=run_recipe(cell_type_recipe(files), store)[-1].run)


def run_detector(files: StudyFiles, store: Path, fold: int) -> Fold:
    """Run a fold of the second, and say what its features are among its own control cells."""
    results = run_recipe(detector_recipe(files, fold), store)
    sae = next(result.run for result in results if result.kind == "saes")
    own = run_recipe(Recipe(encode=EncodeOptions(sae=sae, pooling=POOLING), associate=AssociateOptions()), store)
    return Fold(
        number=fold,
        both=FeatureStore.open(store, codes=results[-1].run),
        control=FeatureStore.open(store, associations=own[-1].run),
    )


def run_detector_baselines(files: StudyFiles, fold: Fold) -> dict[str, Fold]:
    """The same fold with each baseline in the place of its SAE."""
    from pipelines.encode import encode

    store, found = fold.control.layout.root, {}
    for kind, control in run_baselines(fold.control).items():
        codes = encode(both_conditions(files, control.lineage.sae), store).run
        found[kind] = Fold(number=fold.number, both=FeatureStore.open(store, codes=codes), control=control)
    return found


def run_protocol(files: StudyFiles, store: Path) -> FeatureStore:
    """Run the third recipe."""
    return FeatureStore.open(store, associations=run_recipe(protocol_recipe(files), store)[-1].run)


def run_baselines(found: FeatureStore) -> dict[str, FeatureStore]:
    """Run the baselines of an SAE through the same tables; return the store opened at each of them."""
    from pipelines.baseline import baseline

    store = found.layout.root
    results = baseline(BaselineOptions(associations=found.lineage.associations, kind=BASELINES), store)
    runs = [result.run for result in results if result.kind == "associations"]
    return {kind: FeatureStore.open(store, associations=run) for kind, run in zip(BASELINES, runs, strict=True)}
