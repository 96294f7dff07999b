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
from findings_study.cells import FOLDS, fold_column
from findings_study.page import markdown
from findings_study.runs import LAYER, POOLING, TRAIN
from scipy.stats import t
from steering_study.cells import kang_file

from feature_store.query.probes import PERMUTED, SAE
from feature_store.storage import commit
from pipelines.baseline import baseline
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    ExtractOptions,
    ModulesOptions,
    ProbeOptions,
    Recipe,
)
from pipelines.modules import modules
from pipelines.probe import probe_labels
from pipelines.recipe import run_recipe

KINDS = ("cell_type", "condition")
BASELINES = ("neurons", "pca", "ica", "random", "random-model")
SHOWN = 5
Q = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Study how few features tell the labels of real cells.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    options = parser.parse_args(arguments)
    cells = kang_file(options.data, options.store / "data")
    tables = [measured(cells, options.store, fold) for fold in range(len(FOLDS))]
    scores, features, groups, sets = (
        pl.concat((frame.with_columns(fold=pl.lit(fold)) for fold, frame in enumerate(frames)), how="diagonal_relaxed")
        for frames in zip(*tables, strict=True)
    )
    (options.out / "combinations.md").write_text(page(scores, features) + modules_section(groups, sets))


def fold_recipe(cells: Path, fold: int) -> Recipe:
    """The SAE of a fold, whose number is its seed, up to its associations."""
    return Recipe(
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
    )


def measured(cells: Path, store: Path, fold: int) -> tuple[pl.DataFrame, ...]:
    """The tables `probe_score`, `feature_probe`, `module` and `module_gene_set` of a fold, the number of which is the
    seed of its SAE; the latter two of each representation.
    """
    results = run_recipe(fold_recipe(cells, fold), store)
    sae = next(result.run for result in results if result.kind == "saes")
    others = baseline(BaselineOptions(associations=results[-1].run, kind=BASELINES), store)
    made = probe_labels(ProbeOptions(sae=sae, label=KINDS), store)
    saes = {SAE: sae, **dict(zip(BASELINES, (r.run for r in others if r.kind == "saes"), strict=True))}
    groups, sets = [], []
    for name, run in saes.items():
        found = modules(ModulesOptions(sae=run), store)
        groups.append(commit.read_table(found.path / "module").with_columns(representation=pl.lit(name)))
        sets.append(commit.read_table(found.path / "module_gene_set").with_columns(representation=pl.lit(name)))
    return (
        commit.read_table(made.path / "probe_score"),
        commit.read_table(made.path / "feature_probe"),
        pl.concat(groups),
        pl.concat(sets),
    )


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


def verdict(scores: pl.DataFrame, kind: str, measure: str) -> str:
    """In words: beyond which representations the SAE is, and which are beyond it, with how many features."""
    every = scores.filter(pl.col("label").is_null(), label_kind=kind).sort("fold")
    own, lines = every.filter(representation=SAE), []
    for name in order(every)[1:]:
        if name == PERMUTED:
            continue
        other = every.filter(representation=name)
        beyond: dict[str, list[str]] = {"above": [], "below": []}
        for k in sorted(set(own["k"])):
            less = (own.filter(k=k)[measure] - other.filter(k=k)[measure]).to_numpy()
            half = t.ppf(0.975, len(less) - 1) * less.std(ddof=1) / np.sqrt(len(less))
            if abs(less.mean()) > half:
                beyond["above" if less.mean() > 0 else "below"].append(str(k))
        said = "; ".join(f"{where} it with {', '.join(ks)}" for where, ks in beyond.items() if ks)
        lines.append(f"- The SAE against {name}: {said or 'no difference beyond the interval'}.")
    return "\n".join(lines)


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
their 95 % interval (t, three degrees of freedom), so that donors and seeds vary together; an interval is that of one
figure, not corrected for their number. `permuted labels` are the
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
Where the interval of this difference excludes 0:

{verdict(scores, kind, measure)}

How many features each of the others needs, of 1, 2, 5, 10 and 20, to reach the SAE's mean:

{markdown(needed(scores, kind, measure))}
In the first fold, with {SHOWN} features (their id, and the first genes that they go with):

{markdown(labels(scores, features, kind))}
Of the SAE's features in these probes of all folds a share of {negatives(features, kind)} has a negative weight.
"""
        )
    return "".join(parts)


def modules_section(groups: pl.DataFrame, sets: pl.DataFrame) -> str:
    """The section of modules: how many each representation has, and those of the SAE with a gene set."""
    own = groups.filter(pl.col("control").is_null())
    strong = sets.filter(pl.col("q") <= Q)
    rows = []
    for name in (SAE, *BASELINES):
        mine, shuffled = (
            own.filter(representation=name),
            groups.filter(pl.col("control").is_not_null(), representation=name),
        )
        of_fold = [mine.filter(fold=fold) for fold in range(len(FOLDS))]
        rows.append(
            {
                "representation": name,
                "modules": interval([frame.height for frame in of_fold]),
                "features in them": interval([frame["n_features"].sum() for frame in of_fold]),
                "beyond features that fire as often": f"{(mine['q'] <= Q).sum()} of {mine.height}",
                "with a gene set": strong.filter(representation=name).select("fold", "module").n_unique(),
                "of shuffled codes": shuffled.height,
            }
        )
    listed = []
    first = own.filter(representation=SAE, fold=0).sort("module")
    for row in first.iter_rows(named=True):
        named = strong.filter(representation=SAE, fold=0, module=row["module"]).sort("p")["gene_set"].head(3).to_list()
        if named:
            listed.append(
                {
                    "module": row["module"],
                    "features": row["n_features"],
                    "stability": row["stability"],
                    "r, test": row["r_test"],
                    "null": row["null_mean"],
                    "gene sets": " ".join(named),
                    "genes": row["top_genes"],
                }
            )
    return f"""
## Modules: features that fire together

`scsae modules` groups features by their partial correlation inside cells of one type and donor, given the number of
tokens, on `train` and `select` cells. A module is a group that resamples of half of the donors give again. Its cohesion
on `test` cells is held against sets of other features that fire as often, and the whole search is repeated on codes
that are shuffled inside types and donors (`feature_store/modules`). The tests plant modules and find them, and features
that follow type or depth alone make none.

```
.venv/bin/scsae modules
.venv/bin/scsae sql "SELECT module, n_features, stability, r_test, q, top_genes FROM module"
.venv/bin/scsae serve                                   # the map of features, coloured by module
```

The same four folds, numbers of modules with their 95 % interval; `with a gene set` counts modules of all folds with a
set at q <= .05, `of shuffled codes` those that all folds gave where there is nothing to find:

{markdown(pl.DataFrame(rows))}
The SAE's modules of the first fold that share a gene set:

{markdown(pl.DataFrame(listed))}"""


if __name__ == "__main__":
    main()
