"""What the features of real cells say: three questions to an SAE of the mini model, and a page with the answers.

    python -m pipelines.recipes.findings --data $SCSAE_DATA --store ROOT --out docs

1. Which features mean which cell type? PBMC of eight donors; features are chosen on two donors and reported on others.
2. Does an SAE that never saw a stimulated cell hold a feature that tells stimulated cells? Trained on control cells,
   asked of control and IFN-beta cells of donors that it was not trained on; four folds test every donor once.
3. Are features of the protocol told from features of the cell line? Five lines in five batches of two protocols.

Each is a recipe like any user's; what is made is found again by the next call. Layer, k and pooling are the best of
those tried (layers 1 and 3, k 8 and 16, max and mean) on the control SAE of the default split, by the AUROC on its
`select` donors 101 and 1256. Cost: about an hour on two busy cores, and 7 GB of store.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feature_store import FeatureStore
from pipelines.config import AssociateOptions, BaselineOptions, EncodeOptions, ExtractOptions, Recipe, TrainOptions
from pipelines.recipes.findings_data import FOLDS, Prepared, fold_column, prepare
from pipelines.recipes.run import run_recipe

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


def cell_type_recipe(files: Prepared) -> Recipe:
    """The first question: extract, train, encode and associate on cells of both conditions."""
    return Recipe(
        extract=ExtractOptions(
            data=(files.kang,), layer=(LAYER,), donor="donor", cell_type="cell_type", label=("lineage", "condition")
        ),
        train=TRAIN,
        encode=EncodeOptions(pooling=POOLING),
        associate=AssociateOptions(),
    )


def detector_recipe(files: Prepared, fold: int) -> Recipe:
    """The second: train on control cells, encode those of both conditions; donors keep their splits."""
    return Recipe(
        extract=ExtractOptions(
            data=(files.control,), layer=(LAYER,), donor="donor", cell_type="cell_type", split=fold_column(fold)
        ),
        train=TRAIN,
        encode=_both_conditions(files),
    )


def _both_conditions(files: Prepared, sae: str | None = None) -> EncodeOptions:
    """Encode control and stimulated cells."""
    return EncodeOptions(
        run=sae,
        data=(files.kang,),
        donor="donor",
        cell_type="cell_type",
        label=("condition",),
        pooling=POOLING,
    )


def protocol_recipe(files: Prepared) -> Recipe:
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


def run_cell_types(files: Prepared, store: Path) -> FeatureStore:
    """Run the first recipe; return the store opened at its associations."""
    return FeatureStore.open(store, associations=run_recipe(cell_type_recipe(files), store)[-1].run)


def run_detector(files: Prepared, store: Path, fold: int) -> Fold:
    """Run a fold of the second, and say what its features are among its own control cells."""
    results = run_recipe(detector_recipe(files, fold), store)
    sae = next(result.run for result in results if result.kind == "saes")
    own = run_recipe(Recipe(encode=EncodeOptions(run=sae, pooling=POOLING), associate=AssociateOptions()), store)
    return Fold(
        number=fold,
        both=FeatureStore.open(store, codes=results[-1].run),
        control=FeatureStore.open(store, associations=own[-1].run),
    )


def run_detector_baselines(files: Prepared, fold: Fold) -> dict[str, Fold]:
    """The same fold with each baseline in the place of its SAE."""
    from pipelines.encode import encode

    store, found = fold.control.layout.root, {}
    for kind, control in run_baselines(fold.control).items():
        codes = encode(_both_conditions(files, control.lineage.sae), store).run
        found[kind] = Fold(number=fold.number, both=FeatureStore.open(store, codes=codes), control=control)
    return found


def run_protocol(files: Prepared, store: Path) -> FeatureStore:
    """Run the third recipe."""
    return FeatureStore.open(store, associations=run_recipe(protocol_recipe(files), store)[-1].run)


def run_baselines(found: FeatureStore) -> dict[str, FeatureStore]:
    """Run the baselines of an SAE through the same tables; return the store opened at each of them."""
    from pipelines.baseline import baseline

    store = found.layout.root
    results = baseline(BaselineOptions(run=found.lineage.associations, kind=BASELINES), store)
    runs = [result.run for result in results if result.kind == "associations"]
    return {kind: FeatureStore.open(store, associations=run) for kind, run in zip(BASELINES, runs, strict=True)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this recipe."""
    parser = argparse.ArgumentParser(description="Ask features of real cells three questions and write the answers.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for findings.md and its figures")
    options = parser.parse_args(arguments)

    from pipelines.recipes.findings_page import write_page

    files = prepare(options.data, options.store / "data")
    folds = [run_detector(files, options.store, fold) for fold in range(len(FOLDS))]
    types, protocol = run_cell_types(files, options.store), run_protocol(files, options.store)
    write_page(
        options.out,
        types,
        run_baselines(types),
        folds,
        [run_detector_baselines(files, fold) for fold in folds[:N_BASELINED]],
        protocol,
        run_baselines(protocol),
    )


if __name__ == "__main__":
    main()
