"""How well single features tell the cell lines of sc_mixology apart, by the genes that go into the mini model.

python docs/studies/variable_genes.py --data $SCSAE_DATA --store ROOT --out PAGE.md

A cell of Tian et al. 2019 (doi:10.1038/s41592-019-0425-8) detects 2,800 to 8,400 of the genes that all five batches
share, and the model takes 1,199. They are the most variable ones (`--genes hvg:1199`, chosen on `train` cells), or a
random part, of which all tokens are encoded, or 300. Cells are split inside each line of each batch, the SAE is trained
on 300 tokens of each `train` cell in every arm, features are chosen on `select` cells by their AUROC, and what is shown
is their AUROC on `test` cells. `docs/genes.md` has the figures of seed 0 (of splits, tokens and SAE), which took 27
minutes with one actor on two cores that had other work too; `--seed` repeats it with others.

The file has cells of single lines and no mixtures of known proportions, so that it cannot be asked whether codes follow
such proportions.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
from findings_study.cells import MIXOLOGY, shared_genes, write_cells
from findings_study.page import markdown
from steering_study.cells import split_inside

from feature_store import FeatureStore
from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, Recipe, TrainOptions
from pipelines.recipe import run_recipe

LAYER = "1"
POOLING: Literal["mean"] = "mean"
N_GENES, N_TOKENS = 1199, 300
TOP = 3
"""Features of a line that are shown, the best on `select` cells."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What goes into the model, and how many tokens of a cell make its code (None: all)."""

    genes: str | None
    tokens: int | None


ARMS: Mapping[str, Arm] = {
    f"{N_GENES:,} variable genes": Arm(genes=f"hvg:{N_GENES}", tokens=None),
    f"{N_GENES:,} random genes": Arm(genes=None, tokens=None),
    f"{N_GENES:,} random genes, {N_TOKENS} tokens": Arm(genes=None, tokens=N_TOKENS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Compare choices of genes by the features of five cell lines.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, required=True, help="file of the page")
    parser.add_argument("--seed", type=int, action="append", help="run one seed; may be repeated; default: 0")
    options = parser.parse_args(arguments)

    found = []
    for seed in options.seed or (0,):
        file = mixology_file(options.data, options.store / "data", seed)
        for name, arm in ARMS.items():
            run = run_recipe(recipe(file, arm, seed), options.store)[-1].run
            labels = FeatureStore.open(options.store, associations=run).frame("feature_label").collect()
            found.append(best_features(labels, TOP).with_columns(arm=pl.lit(name), seed=pl.lit(seed)))
    options.out.write_text(page(pl.concat(found)))


def mixology_file(data: Path, folder: Path, seed: int) -> Path:
    """The cells with all genes that every batch detects, split inside each line of each batch; made once."""
    import anndata

    path = folder / f"mixology_all_{seed}.h5ad"
    if not path.exists():
        cells = shared_genes(anndata.read_h5ad(data / MIXOLOGY))
        strata = cells.obs["batch"].astype(str) + "|" + cells.obs["cell_type"].astype(str)
        cells.obs["split"] = split_inside(strata.tolist(), seed=seed)
        write_cells(cells, path)
    return path


def recipe(file: Path, arm: Arm, seed: int) -> Recipe:
    """The stages of an arm; N_TOKENS tokens of a cell train in each."""
    return Recipe(
        extract=ExtractOptions(
            data=(file,),
            layer=(LAYER,),
            batch="batch",
            cell_type="cell_type",
            split="split",
            genes=arm.genes,
            tokens_per_cell=N_TOKENS,
            seed=seed,
        ),
        train=TrainOptions(n_features=1024, k=(8,), n_steps=1000, num_workers=0, recovery_cells=0, seed=seed),
        encode=EncodeOptions(fused=True, pooling=POOLING, tokens_per_cell=arm.tokens),
        associate=AssociateOptions(),
    )


def best_features(labels: pl.DataFrame, n: int) -> pl.DataFrame:
    """The `n` features of each cell line with the largest AUROC on `select` cells, and their AUROC on `test` cells.

    Columns: line, place (from 1), feature, select, test.
    """
    of_line = labels.filter(pl.col("label_kind") == "cell_type").rename({"label": "line", "feature_id": "feature"})
    select, test = (
        of_line.filter(pl.col("split") == split).select("line", "feature", pl.col("auroc").alias(split))
        for split in ("select", "test")
    )
    ranked = select.drop_nulls().sort("line", "select", "feature", descending=[False, True, False])
    ranked = ranked.with_columns(place=pl.int_range(1, pl.len() + 1).over("line")).filter(pl.col("place") <= n)
    joined = ranked.join(test, on=["line", "feature"], how="left", maintain_order="left")
    return joined.select("line", "place", "feature", "select", "test")


def page(found: pl.DataFrame) -> str:
    """The page: the test AUROC of the best feature of each line by arm, then of the first TOP, mean over the seeds."""
    seeds = ", ".join(map(str, found["seed"].unique().sort()))
    return "\n".join(
        [
            "# Variable genes and the features of five cell lines",
            "",
            f"Made by `{Path(__file__).name}`, seeds {seeds}; its docstring says how. AUROC on `test` cells of the",
            f"feature that is best on `select` cells, mean of the seeds (least to most); below, of the first {TOP}.",
            "",
            markdown(by_line(found.filter(pl.col("place") == 1))),
            "",
            markdown(by_line(found)),
            "",
        ]
    )


def by_line(found: pl.DataFrame) -> pl.DataFrame:
    """A row for each arm and a column for each line: the mean test AUROC and its range."""
    figures = found.group_by("arm", "line", maintain_order=True).agg(
        mean=pl.col("test").mean(), low=pl.col("test").min(), high=pl.col("test").max()
    )
    texts = figures.select("arm", "line", figure=pl.format("{} ({} to {})", *map(_rounded, ("mean", "low", "high"))))
    return texts.pivot("line", index="arm", values="figure", sort_columns=True)


def _rounded(column: str) -> pl.Expr:
    return pl.col(column).round(3).cast(pl.String)


if __name__ == "__main__":
    main()
