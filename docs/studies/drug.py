"""A drug, by patient: control cells of glioblastoma to panobinostat-treated ones and back; writes docs/drug.md.

python docs/studies/drug.py --data $SCSAE_DATA --store ROOT --out docs

Slices of five patients' tumours, cultured with panobinostat or without (Zhao et al. 2021,
doi:10.1186/s13073-021-00894-y), 300 genes. Each patient is left out once: an SAE of layer 2 of the mini model, with the
patient's number as its seed, is trained on three patients, chosen on one and tested on one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from findings_study.cells import write_cells
from findings_study.page import markdown, shrink
from steering_study.page import PICTURES, TITLES, move_section
from steering_study.runs import SteeringRun, steering_runs, train_options

from feature_store.storage import commit
from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, Recipe, SteerOptions

FILE = "glioblastoma_panobinostat_5000x300_counts.h5ad"
PATIENTS = ("PW030", "PW032", "PW034", "PW036", "PW040")
DRUG, CONTROL = "panobinostat", "ctrl"
LAYER = "2"
N_FEATURES, DOSES, N_NULLS = (5, 20, 50, 100), (0.5, 1.0, 1.5), 10
MIN_PATIENTS = 3
N_GENES = 12
"""Genes that are listed."""
SECTIONS = {
    "drug": ("Control cells to treated ones", "Five SAEs, each tested on the patient that it was not trained on."),
    "drug_back": ("Treated cells to control", "The same SAEs move cells the other way round."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Steer glioblastoma cells toward a drug and back.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    options = parser.parse_args(arguments)
    file = with_folds(options.data / FILE, options.store / "data" / "panobinostat.h5ad")
    runs: dict[str, list[SteeringRun]] = {name: [] for name in SECTIONS}
    for fold in range(len(PATIENTS)):
        for name, run in zip(SECTIONS, steering_runs(recipe(file, fold), fold, options.store), strict=True):
            runs[name].append(run)
    TITLES.update(SECTIONS)  # type: ignore[attr-defined]
    PICTURES.update({"drug": ("curve", "pareto", "head"), "drug_back": ("curve",)})  # type: ignore[attr-defined]
    sections = [move_section(options.out, name, own) for name, own in runs.items()]
    for picture in options.out.glob("steering_drug*.png"):
        shrink(picture)
    (options.out / "drug.md").write_text(HEAD + "\n".join([*sections, changed_genes(runs["drug"])]))


def with_folds(cells: Path, path: Path) -> Path:
    """The cells with one cell type and the splits of each fold, written unless they are there."""
    import anndata

    if not path.exists():
        found = anndata.read_h5ad(cells)
        found.obs["cell_type"] = "tumour slice"
        patient = found.obs["patient_id"].astype(str)
        for fold, tested in enumerate(PATIENTS):
            chosen_on = PATIENTS[(fold + 1) % len(PATIENTS)]
            found.obs[f"fold{fold}"] = [
                "test" if p == tested else "select" if p == chosen_on else "train" for p in patient
            ]
        write_cells(found, path)
    return path


def recipe(file: Path, fold: int) -> Recipe:
    """Control to drug and back, with one patient left out."""
    move = SteerOptions(
        kind="condition",
        target=CONTROL,
        toward=DRUG,
        intervention="shift",
        n_features=N_FEATURES,
        dose=DOSES,
        n_nulls=N_NULLS,
        head=True,
        seed=fold,
    )
    return Recipe(
        extract=ExtractOptions(
            data=(file,),
            layer=(LAYER,),
            donor="patient_id",
            cell_type="cell_type",
            label=("condition",),
            split=f"fold{fold}",
            # most of the 300 genes were chosen elsewhere; those that the model knows are taken
            min_matched_share=0,
        ),
        train=train_options(fold),
        encode=EncodeOptions(pooling="mean"),
        associate=AssociateOptions(),
        steer=(move, move.model_copy(update={"target": DRUG, "toward": CONTROL, "head": False})),
    )


def changed_genes(runs: Sequence[SteeringRun]) -> str:
    """How steering toward the drug changes the prediction of the genes that the drug changes most."""
    every = pl.concat(
        commit.read_table(run.path / "head").filter(condition="shift").with_columns(patient=pl.lit(PATIENTS[run.sae]))
        for run in runs
    ).drop_nulls(["difference", "change"])
    means = every.group_by("gene").agg(pl.col("difference", "change").mean(), n=pl.len())
    best = means.filter(pl.col("n") >= MIN_PATIENTS).sort(pl.col("difference").abs(), "gene", descending=[True, False])
    rows = []
    for gene, difference, change, n in best.head(N_GENES).select("gene", "difference", "change", "n").iter_rows():
        own = every.filter(gene=gene).sort("patient")
        agree = ((own["difference"] > 0) == (own["change"] > 0)).sum()
        rows.append(
            {
                "gene": gene,
                "real difference": difference,
                "change": change,
                "same sign": f"{agree} of {n} patients",
                "change by patient": " ".join(f"{value:+.2f}" for value in own["change"]),
            }
        )
    return f"""
## The genes that the drug changes most

The {N_GENES} genes with the largest real difference between treated and control cells of left-out patients, of those
that were hidden in at least {MIN_PATIENTS} of them, and the change of the model's prediction of them in control cells
that were steered toward the drug; both in bins of expression, means over patients.

{markdown(pl.DataFrame(rows))}"""


HEAD = """# A drug, by patient

`python docs/studies/drug.py --data $SCSAE_DATA --store ROOT --out docs` writes this page: slices of the tumours of five
glioblastoma patients, cultured with 0.2 uM panobinostat, an inhibitor of histone deacetylases, or without (Zhao et al.
2021, doi:10.1186/s13073-021-00894-y); 500 cells of each patient and condition, 300 genes. Each patient is left out
once. docs/steering.md explains the tables, nulls and baselines. The cells have no annotated types: distances are of all
cells of a patient.
"""


if __name__ == "__main__":
    main()
