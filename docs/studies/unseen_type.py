"""Steering what nobody saw: a cell type moved to a condition in which it was never seen; writes docs/unseen_type.md.

python docs/studies/unseen_type.py --data $SCSAE_DATA --store ROOT --out docs

Kang et al. 2018 (doi:10.1038/nbt.4042), control PBMC to IFN-beta-stimulated ones. For each of three cell types and each
of three folds of donors, a file lacks the stimulated cells of the type in `train` and `select` donors, and everything
from the SAE to the dose is made of it. The control cells of the type in `test` donors are steered by what the other
types show (`--by other_types`), and held against their stimulated cells, which nothing else uses. It takes
some 30 minutes of two cores.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from findings_study.cells import CONTROL, KANG, STIMULATED, fold_column, fold_splits, write_cells
from findings_study.page import markdown, shrink
from scipy import stats
from steering_study.page import results_of
from steering_study.runs import KANG_LAYER, SteeringRun, small_training, steering_runs

from feature_store import FeatureStore
from feature_store.plots import steering_pareto
from feature_store.query.steering import Role
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringPlan
from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, Recipe, SteerOptions
from pipelines.steering.plan import MEAN_DIFFERENCE, Null
from pipelines.steering.seeds import MIN_SEEDS

TYPES: Mapping[str, str] = {"CD4 T cells": "cd4", "CD14+ Monocytes": "cd14", "B cells": "b"}
"""The types that are left out, and the names of their files."""
N_FOLDS = 3
"""Folds of donors, each with an SAE of its own seed."""
GENES = "hvg:600"
"""The most variable genes of `train` cells: an eighth of the tokens, and of the time."""
N_FEATURES, DOSES, N_NULLS = (1, 5, 20, 50, 100), (0.5, 1.0, 1.5), 3
METRICS = ("remaining", "remaining_corrected", "energy_remaining", "off_axis", "type_accuracy", "target_votes")
SEARCHED = f"{MEAN_DIFFERENCE}, dose searched"
TOLD = ("unsteered", None, SEARCHED)
MIN_CELLS, N_GENES = 10, 12
"""Cells in which a gene was hidden, at least, and genes that are listed."""


class UnseenRun(NamedTuple):
    """A steering run, and the type that was left out of what it was made from."""

    cell_type: str
    run: SteeringRun

    @property
    def results(self) -> pl.DataFrame:
        """Its results, with the rival at the dose that its own search chose."""
        return with_searched_rival(results_of(self.run))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Steer cells of a type that was never seen stimulated.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument("--only", nargs=2, metavar=("TYPE", "FOLD"), action="append", help="run these; may be repeated")
    options = parser.parse_args(arguments)
    chosen = options.only or [(cell_type, fold) for cell_type in TYPES for fold in range(N_FOLDS)]
    runs = []
    for cell_type in TYPES:
        for fold in sorted(int(fold) for name, fold in chosen if name == cell_type):
            file = unseen_file(options.data / KANG, options.store / "data", cell_type, fold)
            (run,) = steering_runs(unseen_recipe(file, fold), fold, options.store)
            runs.append(UnseenRun(cell_type, run))
    write_page(options.out, runs)


def unseen_file(cells: Path, folder: Path, cell_type: str, fold: int) -> Path:
    """All cells but the stimulated ones of a type in train and select donors, written unless they are there."""
    import anndata

    path = folder / f"unseen_{TYPES[cell_type]}_{fold}.h5ad"
    if not path.exists():
        found = anndata.read_h5ad(cells)
        found.obs[fold_column(fold)] = fold_splits(found.obs["donor"].astype(str), fold)
        write_cells(found[is_seen(found.obs, cell_type, fold_column(fold))].copy(), path)
    return path


def is_seen(obs: Any, cell_type: str, split: str) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """The cells that are kept: not stimulated, of another type, or of test donors, against whom steering is held."""
    unseen = (obs["condition"] == STIMULATED) & (obs["cell_type"] == cell_type) & (obs[split] != "test")
    return ~np.asarray(unseen)


def unseen_recipe(file: Path, fold: int) -> Recipe:
    """Control to stimulated by the other types, on the donors of a fold; the fold is the SAE's seed, too."""
    return Recipe(
        extract=ExtractOptions(
            data=(file,),
            layer=(KANG_LAYER,),
            donor="donor",
            cell_type="cell_type",
            label=("condition",),
            split=fold_column(fold),
            genes=GENES,
        ),
        train=small_training(fold),
        encode=EncodeOptions(pooling="mean"),
        associate=AssociateOptions(),
        steer=(
            SteerOptions(
                kind="condition",
                target=CONTROL,
                toward=STIMULATED,
                intervention="shift",
                by="other_types",
                n_features=N_FEATURES,
                dose=DOSES,
                n_nulls=N_NULLS,
                head=True,
                seed=fold,
            ),
        ),
    )


def with_searched_rival(results: pl.DataFrame) -> pl.DataFrame:
    """The results, and the mean difference on test cells at the dose that leaves least on select cells, as SEARCHED."""
    rival = results.filter(condition=MEAN_DIFFERENCE)
    on_select = rival.filter(split="select", metric="remaining", group="all").sort("value", "dose")
    found = rival.filter(split="test", dose=on_select["dose"][0])
    return pl.concat([results, found.with_columns(condition=pl.lit(SEARCHED), role=pl.lit(Role.BASELINE.value))])


def write_page(out: Path, runs: Sequence[UnseenRun]) -> Path:
    """Write unseen_type.md and its figures to `out`; return its path."""
    out.mkdir(parents=True, exist_ok=True)
    sections = [HEAD, verdict(runs), few_features_section(runs)]
    sections += [section(out, name, own) for name, own in by_type(runs).items()]
    for picture in out.glob("unseen_type_*.png"):
        shrink(picture)
    page = out / "unseen_type.md"
    page.write_text("\n".join(sections))
    return page


def by_type(runs: Sequence[UnseenRun]) -> dict[str, list[UnseenRun]]:
    """The runs of each type that has any."""
    found = {name: [run for run in runs if run.cell_type == name] for name in TYPES}
    return {name: own for name, own in found.items() if own}


def conditions(runs: Sequence[UnseenRun]) -> pl.DataFrame:
    """A row a condition, a column a metric of the unseen type: the mean over SAEs, and of three its interval."""
    own = pl.concat(
        run.results.filter(split="test", group=run.cell_type).with_columns(
            condition=pl.when("chosen").then(pl.lit("chosen")).otherwise("condition")
        )
        for run in runs
    )
    points = [Role.GRID.value, Role.BASELINE_DOSE.value, Role.REPLACE.value, Role.TREND.value]
    own = own.filter(pl.col("chosen") | ~pl.col("role").is_in(points))
    rows = []
    for name in own["condition"].unique(maintain_order=True):
        row = {"condition": name}
        for metric in METRICS:
            values = own.filter(condition=name, metric=metric)["value"].drop_nulls().to_list()
            row[metric] = interval(values, sign="") if values else "-"
        rows.append(row)
    return pl.DataFrame(rows)


def value_of(unseen: UnseenRun, metric: str, condition: str | None = None) -> float:
    """A metric of the steered cells of the unseen type; `condition` None is what the search of the SAE chose."""
    own = unseen.results.filter(split="test", metric=metric, group=unseen.cell_type)
    own = (
        own.filter("chosen")
        if condition is None
        else own.filter(~pl.col("role").eq("baseline_dose"), condition=condition)
    )
    return float(own["value"].item())


def interval(values: Sequence[float], *, sign: str = "+") -> str:
    """The mean of values, one for each SAE, and of three or more its 95 % interval (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < MIN_SEEDS:
        return f"{mean:{sign}.2f}"
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:{sign}.2f} [{mean - half:{sign}.2f}, {mean + half:{sign}.2f}]"


def verdict(runs: Sequence[UnseenRun]) -> str:
    """Shift less the mean difference in the same SAE, by type, with the number of SAEs in which it does better."""
    rows, n_better = [], {"remaining_corrected": 0, "off_axis": 0, "both": 0}
    for name, own in by_type(runs).items():
        less = {
            metric: [value_of(run, metric) - value_of(run, metric, SEARCHED) for run in own]
            for metric in ("remaining_corrected", "off_axis", "type_accuracy")
        }
        rows.append(
            {"cell type": name, "SAEs": str(len(own)), **{metric: interval(values) for metric, values in less.items()}}
        )
        told = [interval([value_of(run, "type_accuracy", name) for run in own], sign="") for name in TOLD]
        rows[-1]["told"] = ", ".join(told)
        for metric in ("remaining_corrected", "off_axis"):
            n_better[metric] += sum(value < 0 for value in less[metric])
        n_better["both"] += sum(
            left < 0 and drift < 0 for left, drift in zip(less["remaining_corrected"], less["off_axis"], strict=True)
        )
    nulls = sum(
        value_of(run, "remaining_corrected") < min(value_of(run, "remaining_corrected", null.value) for null in Null)
        for run in runs
    )
    counts = ", ".join(f"{len(own)} for {name}" for name, own in by_type(runs).items())
    return f"""
## What came out

Of the {len(TYPES) * N_FOLDS} SAEs of the study, {len(runs)} are on this page ({counts}).
Features moved the unseen type nearer than every null for {nulls} of them. They left less of the distance than the mean
difference for {n_better["remaining_corrected"]}, drifted less for {n_better["off_axis"]}, and did both for \
{n_better["both"]}. `told` is the share of steered cells whose
neighbours among unsteered `train` cells are of their type, unsteered, under the shift and under the mean difference:
where it falls, cells were not only stimulated but made like the other types.

The chosen shift less the mean difference, both at the number of features and the dose that `select` cells of the other
types chose; means over the SAEs, with 95 % intervals where there are three or more. Below 0 is better, but for the
accuracy of types.

{markdown(pl.DataFrame(rows))}"""


def few_features(unseen: UnseenRun) -> dict[str, Any]:
    """The fewest features, at the chosen dose, that reach the mean difference within its interval, and both drifts."""
    rows = unseen.results.filter(split="test", group=unseen.cell_type)
    left, drift = (rows.filter(metric=metric) for metric in ("remaining_corrected", "off_axis"))
    chosen = left.filter("chosen").row(0, named=True)
    rival = left.filter(condition=SEARCHED).row(0, named=True)
    low, reached = (rival["value"] - rival["effect"] + rival[end] for end in ("low", "high"))
    grid = left.filter(pl.col("value") <= reached, role=Role.GRID.value, dose=chosen["dose"]).sort("n_features")
    found = {
        "cell type": unseen.cell_type,
        "SAE": str(unseen.run.sae),
        "chosen": f"{chosen['n_features']}, dose {chosen['dose']:g}",
        "remaining": chosen["value"],
        "mean difference": f"{rival['value']:.2f} [{low:.2f}, {reached:.2f}]",
        "its drift": drift.filter(condition=SEARCHED)["value"].item(),
    }
    if grid.is_empty():
        return {
            **found,
            "fewest features": "none",
            "their remaining": None,
            "their drift": None,
            "its drift there": None,
        }
    best = grid.row(0, named=True)
    own = drift.filter(role=Role.GRID.value, dose=chosen["dose"], n_features=best["n_features"])["value"].item()
    return {
        **found,
        "fewest features": str(best["n_features"]),
        "their remaining": best["value"],
        "their drift": own,
        "its drift there": drift_at(rival_curve(left, drift), best["value"]),
    }


def rival_curve(left: pl.DataFrame, drift: pl.DataFrame) -> list[tuple[float, float]]:
    """What remains under the mean difference and how far it drifts, from dose 0 upward."""
    rival = pl.col("condition") == MEAN_DIFFERENCE
    both = left.filter(rival).join(drift.filter(rival), on="dose", suffix="_drift").sort("dose")
    return [(1.0, 0.0), *both.select("value", "value_drift").iter_rows()]


def drift_at(curve: Sequence[tuple[float, float]], remaining: float) -> float | None:
    """The drift where a curve of (remaining, drift) first comes down to what remains, between its points by a line.

    None if it never does.
    """
    for (left, drift), (next_left, next_drift) in pairwise(curve):
        if left >= remaining >= next_left and left > next_left:
            return drift + (left - remaining) / (left - next_left) * (next_drift - drift)
    return None


def few_features_section(runs: Sequence[UnseenRun]) -> str:
    """How few features reach the mean difference, and with how much less drift."""
    table = pl.DataFrame([few_features(run) for run in runs], infer_schema_length=None)
    reached = table.drop_nulls("their drift")
    less = (reached["their drift"] < reached["its drift"]).sum()
    matched = reached.drop_nulls("its drift there")
    less_matched = (matched["their drift"] < matched["its drift there"]).sum()
    return f"""
## How few features, and how much less drift

For each SAE: the chosen point; what remains under the mean difference at its searched dose (less noise), with its 95 %
interval over the cells; and the fewest features, at the chosen dose, that leave no more than the upper end of that
interval. Drift is `off_axis`, the movement beside the way to the stimulated cells, as a share of that way. `its
drift there` is that of the mean difference at the dose where it leaves as much as these features, between its doses by
a line. The number of features is read off the `test` cells, so it describes them and predicts nothing.

Features reach the mean difference within its interval for {reached.height} of {table.height} SAEs, and then drift less
than it does for {less}. At the same remaining distance, where the mean difference passes it, features drift less for
{less_matched} of {matched.height}.

{markdown(table)}"""


def section(out: Path, cell_type: str, runs: Sequence[UnseenRun]) -> str:
    """One unseen type: every condition, what was chosen, the model's predictions of hidden genes, and the figure."""
    first = runs[0].run
    associations = SteeringPlan.of(commit.Run.open(first.path / "results")).associations
    opened = FeatureStore.open(first.path.parent.parent, associations=associations)
    picture = out / f"unseen_type_{TYPES[cell_type]}.png"
    steering_pareto(opened, first.id, x="off_axis", y="remaining_corrected", group=cell_type, save=picture, show=False)
    return f"""
## {cell_type}

{markdown(conditions(runs))}
{head_text(runs)}
![What remains against the drift of {cell_type}, SAE {first.sae}]({picture.name})
"""


def gene_predictions(unseen: UnseenRun) -> pl.DataFrame:
    """The table `head` of the cells of the unseen type alone."""
    from feature_store.cells import read_cells
    from feature_store.codes import CodesRun
    from feature_store.query.runs import RunChain
    from pipelines.inputs import load_token_of_gene
    from pipelines.steering.masked_gene_prediction import masked_gene_table, masked_gene_variants
    from pipelines.steering.plan import read_variants

    path = unseen.run.path
    layout = Layout(path.parent.parent)
    chain = RunChain.of(layout, SteeringPlan.of(commit.Run.open(path / "results")).associations)
    cells = read_cells(layout.cells_dir(chain.associations.dataset)).filter(cell_type=unseen.cell_type)
    answers = commit.read_table(path / "answers").filter(pl.col("cell_idx").is_in(cells["cell_idx"].implode()))
    genes = load_token_of_gene(layout, CodesRun.open(layout.codes_dir(chain.associations.codes)))
    genes = genes.drop_nulls("gene_id").select("symbol", "gene_id").unique("symbol", keep="first")
    variants = masked_gene_variants(read_variants(commit.read_table(path / "variants")))
    toward = cells.filter(condition=STIMULATED)["cell_idx"].to_list()
    return masked_gene_table(answers, variants, toward, genes).filter(draw=0)


def pooled(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Change and difference by condition and gene, means over the cells of all SAEs in which the gene was hidden."""
    rows = pl.concat(tables).drop_nulls(["change", "difference"])
    weight = pl.col("n_cells")
    means = [((pl.col(name) * weight).sum() / weight.sum()).alias(name) for name in ("change", "difference")]
    return rows.group_by("condition", "gene").agg(*means, n_cells=weight.sum()).filter(pl.col("n_cells") >= MIN_CELLS)


def head_text(runs: Sequence[UnseenRun]) -> str:
    """How the predictions of hidden genes change, beside the real differences, over all SAEs together."""
    table = pooled([gene_predictions(run) for run in runs])
    names = ("shift", MEAN_DIFFERENCE, *(null.value for null in Null))
    agreement = {
        name: table.filter(condition=name).select(pl.corr("change", "difference", method="spearman")).item()
        for name in names
    }
    own, rival = table.filter(condition="shift"), table.filter(condition=MEAN_DIFFERENCE)
    both = own.join(rival.select("gene", rival="change"), on="gene")
    best = both.sort(pl.col("difference").abs(), "gene", descending=[True, False]).head(N_GENES)
    shown = best.select("gene", "n_cells", "difference", "change", pl.col("rival").alias("mean difference"))
    same = {
        name: ((best["difference"] > 0) == (best[column] > 0)).sum()
        for name, column in (("shift", "change"), (MEAN_DIFFERENCE, "rival"))
    }
    return f"""\
The model's own head on hidden genes of these cells, all SAEs together, {own.height} genes that were hidden in
{MIN_CELLS} cells or more. Spearman correlation, over genes, of the change of the prediction with the real difference
between stimulated and control cells: {"; ".join(f"{name} {value:.2f}" for name, value in agreement.items())}.
Of the {best.height} genes that differ most, shift changes {same["shift"]} in the right direction and the mean
difference {same[MEAN_DIFFERENCE]} (in bins of expression):

{markdown(shown)}"""


HEAD = """# Steering what nobody saw

`python docs/studies/unseen_type.py --data $SCSAE_DATA --store ROOT --out docs` writes this page: PBMC of eight donors,
control and IFN-beta-stimulated (Kang et al. 2018, doi:10.1038/nbt.4042). One cell type is left out at a time: its
stimulated cells are taken out of the data in every donor but the two that are tested. The SAE (BatchTopK, F 512, k 16,
500 steps, layer 2 of the mini model, the 600 most variable genes of `train` cells), the choice of features, the
differences, the number of features and the dose come from what is left. Then the control cells of that type in the
tested donors are steered toward stimulated by what the other types show (`--by other_types`: each type is moved by the
mean over the others, also on the `select` cells on which number and dose are chosen), and held against their
stimulated cells, which nothing else used. Three folds of donors, each with an SAE of its own seed; 2,000 cells in all.

The rival needs no SAE: the mean difference of activations over the other types at the same site, at dose 1 and at the
dose that its own search on `select` cells chose (`dose searched`). docs/steering.md explains the other conditions;
`mean difference of embeddings` is of the other types as well. All figures below are of the control cells of the unseen
type.
"""


if __name__ == "__main__":
    main()
