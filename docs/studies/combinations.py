"""How few features tell a cell type: probes of Kang's cells from an SAE and from what it is held against.

python docs/studies/combinations.py --data $SCSAE_DATA --store ROOT --out docs

In each of four folds of donors (docs/findings.md) an SAE of layer 1 of the mini model is trained with another seed, and
neurons, PCA, ICA, random directions, the SAE of a model with random weights, and the 2,000 most variable genes take its
place. `scsae probe` does the rest. Figures are means over the folds, so that their intervals are over donors and seeds
together. The page docs/combinations.md is written anew.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from findings_study.cells import FOLDS, fold_column, fold_splits, prepare, write_cells
from findings_study.page import markdown
from findings_study.runs import LAYER, POOLING, TRAIN
from scipy.stats import t

from feature_store.query.probes import PERMUTED, SAE
from feature_store.storage import commit
from pipelines.baseline import baseline
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    ExtractOptions,
    ProbeOptions,
    Recipe,
)
from pipelines.probe import probe_labels
from pipelines.recipe import run_recipe

KINDS = ("cell_type", "condition")
BASELINES = ("neurons", "pca", "ica", "random", "random-model")
SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Study how few features tell the labels of real cells.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    options = parser.parse_args(arguments)
    cells = with_folds(prepare(options.data, options.store / "data").kang, options.store / "data" / "kang_folds.h5ad")
    tables = [probed(cells, options.store, fold) for fold in range(len(FOLDS))]
    scores, features = (
        pl.concat(frame.with_columns(fold=pl.lit(fold)) for fold, frame in enumerate(frames))
        for frames in zip(*tables, strict=True)
    )
    (options.out / "combinations.md").write_text(page(scores, features))


def with_folds(kang: Path, path: Path) -> Path:
    """A file of Kang's cells with the splits of each fold, written unless it is there."""
    import anndata

    if not path.exists():
        cells = anndata.read_h5ad(kang)
        for fold in range(len(FOLDS)):
            cells.obs[fold_column(fold)] = fold_splits(cells.obs["donor"].astype(str), fold)
        write_cells(cells, path)
    return path


def probed(cells: Path, store: Path, fold: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables `probe_score` and `feature_probe` of a fold, whose number is the seed of its SAE."""
    results = run_recipe(
        Recipe(
            extract=ExtractOptions(
                data=(cells,),
                layer=(LAYER,),
                donor="donor",
                cell_type="cell_type",
                label=("condition",),
                split=fold_column(fold),
            ),
            train=TRAIN.model_copy(update={"seed": fold}),
            encode=EncodeOptions(pooling=POOLING),
            associate=AssociateOptions(),
        ),
        store,
    )
    sae = next(result.run for result in results if result.kind == "saes")
    baseline(BaselineOptions(associations=results[-1].run, kind=BASELINES), store)
    made = probe_labels(ProbeOptions(sae=sae, label=KINDS), store)
    return commit.read_table(made.path / "probe_score"), commit.read_table(made.path / "feature_probe")


def interval(values: Sequence[float]) -> str:
    """The mean of the folds with its 95 % interval."""
    known = np.array(values)
    half = t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    return f"{known.mean():.3f} ± {half:.3f}"


def by_representation(scores: pl.DataFrame, kind: str, measure: str) -> pl.DataFrame:
    """A row for each representation, a column for each number of features: mean and interval of the folds."""
    every = scores.filter(pl.col("label").is_null(), label_kind=kind)
    rows = []
    for name in order(every):
        own = every.filter(representation=name)
        rows.append(
            {"representation": name}
            | {str(k): interval(own.filter(k=k).sort("fold")[measure].to_list()) for k in sorted(set(own["k"]))}
        )
    return pl.DataFrame(rows)


def differences(scores: pl.DataFrame, kind: str, measure: str) -> pl.DataFrame:
    """The SAE less each other representation, in the same fold: mean and interval."""
    every = scores.filter(pl.col("label").is_null(), label_kind=kind).sort("fold")
    own = every.filter(representation=SAE)
    rows = []
    for name in order(every)[1:]:
        if name == PERMUTED:
            continue
        other, row = every.filter(representation=name), {"SAE less": name}
        for k in sorted(set(own["k"])):
            row[str(k)] = interval((own.filter(k=k)[measure] - other.filter(k=k)[measure]).to_list())
        rows.append(row)
    return pl.DataFrame(rows)


def needed(scores: pl.DataFrame, kind: str, measure: str) -> pl.DataFrame:
    """The smallest number of features with which each representation reaches the SAE's mean with 1, 2 and 5."""
    every = scores.filter(pl.col("label").is_null(), label_kind=kind)
    mean = every.group_by("representation", "k").agg(pl.col(measure).mean()).sort("k")
    rows = []
    for name in order(every)[1:]:
        if name == PERMUTED:
            continue
        row = {"representation": name}
        for k in (1, 2, SHOWN):
            goal = mean.filter(representation=SAE, k=k)[measure].item()
            enough = mean.filter(pl.col(measure) >= goal, representation=name)["k"]
            row[f"SAE with {k}: {goal:.3f}"] = str(enough[0]) if len(enough) else f"more than {mean['k'].max()}"
        rows.append(row)
    return pl.DataFrame(rows)


def order(rows: pl.DataFrame) -> list[str]:
    """The representations, the SAE first and permuted labels last."""
    names = rows["representation"].unique(maintain_order=True).to_list()
    return sorted(names, key=lambda name: (name != SAE, name == PERMUTED))


def labels(scores: pl.DataFrame, features: pl.DataFrame, kind: str) -> pl.DataFrame:
    """The features of each label in the first fold, with their signs and first genes, and how well they do."""
    own = scores.filter(pl.col("label").is_not_null(), label_kind=kind, representation=SAE, k=SHOWN, fold=0)
    rows = []
    for label, area, accuracy in own.select("label", "auroc", "balanced_accuracy").iter_rows():
        mine = features.filter(label=label, label_kind=kind, representation=SAE, k=SHOWN, fold=0).sort("rank")
        words = [
            f"{'+' if weight > 0 else '-'} {feature} ({' '.join((name or 'no genes').split()[:3])})"
            for feature, name, weight in mine.select("feature_id", "name", "weight").iter_rows()
        ]
        rows.append(
            {"label": label, "features in their order": ", ".join(words), "AUROC": area, "balanced accuracy": accuracy}
        )
    return pl.DataFrame(rows)


def negatives(features: pl.DataFrame, kind: str) -> str:
    """The share of features with a negative weight at SHOWN features, of the SAE over all folds."""
    own = features.filter(representation=SAE, k=SHOWN, label_kind=kind)
    return f"{(own['weight'] < 0).mean():.2f}"


def page(scores: pl.DataFrame, features: pl.DataFrame) -> str:
    """The page."""
    parts = [
        """# Combinations: how few features tell a cell type

`scsae probe` asks, for each label, which few features tell its cells from the others, and how many it takes. For each
label a lasso on `train` cells gives the order in which features enter; the first k are refitted on `train` cells, tuned
on `select` cells and scored on `test` cells (`feature_store/probes`). The same is done with everything that an SAE is
held against. A feature with a negative weight says what the cell is not.

```
.venv/bin/scsae baseline                                # neurons, PCA, ICA, random directions, to hold the SAE against
.venv/bin/scsae probe --label cell_type                 # tables feature_probe and probe_score
.venv/bin/scsae sql "SELECT label, feature_id, name, weight FROM feature_probe WHERE representation = 'sae' AND k = 5"
.venv/bin/scsae plot probe-lines --save probes.png
```

The tests plant features in labels and find them with their signs, and find nothing in labels that were drawn at random;
the path of the lasso and the refits are those of scikit-learn.

## Kang et al. 2018

`python docs/studies/combinations.py --data $SCSAE_DATA --store ROOT --out docs` writes this page: 2,000 PBMC of eight
donors, control and IFN-beta, layer 1 of the mini model, SAEs as in docs/findings.md. Each of four folds trains on four
donors, tunes on two and tests on two others, with an SAE of another seed. Figures are means of the four folds with
their 95 % interval (t, three degrees of freedom), so that donors and seeds vary together. `permuted labels` are the
SAE's features with the labels permuted inside donors: chance.
"""
    ]
    for kind, measure, words in (
        ("cell_type", "macro_f1", "macro-F1"),
        ("condition", "balanced_accuracy", "balanced accuracy"),
    ):
        parts.append(
            f"""
### {kind.replace("_", " ")}: {words} on `test` cells by number of features

{markdown(by_representation(scores, kind, measure))}
The SAE less each of the others, in the same fold:

{markdown(differences(scores, kind, measure))}
How many features each of the others needs, of 1, 2, 5, 10 and 20, to reach the SAE's mean:

{markdown(needed(scores, kind, measure))}
In the first fold, with {SHOWN} features (their id, and the first genes that they go with):

{markdown(labels(scores, features, kind))}
Of the SAE's features in these probes of all folds a share of {negatives(features, kind)} has a negative weight.
"""
        )
    return "".join(parts)


if __name__ == "__main__":
    main()
