"""Which genes go in: the cell lines of sc_mixology by the features of the mini model, with random and variable genes.

    python docs/studies/genes.py --data $SCSAE_DATA --store ROOT

It prints the table of docs/genes.md. The cells are those of `findings_study.cells`: five lines in five batches, the
genes that every batch detects. The arms differ in their genes alone. For each seed of the SAE, the best feature of a
line is chosen by its AUROC on `select` cells and reported on `test` cells, and so is the best neuron.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from findings_study.cells import prepare

from feature_store import FeatureStore
from pipelines.config import AssociateOptions, BaselineOptions, EncodeOptions, ExtractOptions, TrainOptions
from pipelines.runtime.cluster import one_ray_session

LAYER = "1"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The genes of one arm, and how it is called."""

    name: str
    genes: str | None = None
    tokens_per_cell: int | None = None


ARMS = (
    Arm(name="hvg:300", genes="hvg:300"),
    Arm(name="300 random tokens of each cell", tokens_per_cell=300),
    Arm(name="hvg:1199", genes="hvg:1199"),
    Arm(name="1,199 random genes of each cell"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every arm and print the table."""
    parser = argparse.ArgumentParser(description="Compare choices of genes on the cell lines of sc_mixology.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--seeds", type=int, default=2, help="number of SAEs of each arm")
    parser.add_argument("--num-actors", type=int, default=None, help="actors of each stage")
    options = parser.parse_args(arguments)
    file = prepare(options.data, options.store / "data").mixology
    shown = pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_formatting="MARKDOWN", tbl_hide_dataframe_shape=True)
    rows: list[dict[str, object]] = []
    with one_ray_session(), shown:
        for arm in ARMS:
            rows += run_arm(arm, file, options.store, n_seeds=options.seeds, num_actors=options.num_actors)
            print(table_of(pl.DataFrame(rows)), flush=True)


def extract_options(arm: Arm, file: Path, num_actors: int | None) -> ExtractOptions:
    """The extraction of an arm; batches tell which genes vary, and lines are its cell types."""
    return ExtractOptions(
        data=(file,),
        layer=(LAYER,),
        batch="batch",
        cell_type="cell_type",
        split="split",
        genes=arm.genes,
        tokens_per_cell=arm.tokens_per_cell,
        num_actors=num_actors,
    )


def run_arm(arm: Arm, file: Path, store: Path, *, n_seeds: int, num_actors: int | None) -> Iterator[dict[str, object]]:
    """Run an arm; yield a row for each representation (the SAE of each seed, the neurons) and line."""
    from pipelines.associate import associate
    from pipelines.baseline import baseline
    from pipelines.encode import encode
    from pipelines.extract import extract
    from pipelines.train import train

    (extracted,) = extract(extract_options(arm, file, num_actors), store)
    for seed in range(n_seeds):
        sae = train(
            TrainOptions(
                activations=extracted.run,
                n_features=1024,
                k=(8,),
                n_steps=1000,
                num_workers=0,
                recovery_cells=0,
                seed=seed,
            ),
            store,
        )
        codes = encode(EncodeOptions(sae=sae.run, pooling="mean", num_actors=num_actors), store)
        found = {f"SAE {seed}": associate(AssociateOptions(codes=codes.run, num_actors=num_actors), store).run}
        if seed == 0:
            options = BaselineOptions(associations=found["SAE 0"], kind=("neurons",), num_actors=num_actors)
            made = baseline(options, store)
            found["neurons"] = made[-1].run
        for name, associations in found.items():
            for row in best_features(FeatureStore.open(store, associations=associations)).iter_rows(named=True):
                yield {"genes": arm.name, "representation": name, **row}


def best_features(store: FeatureStore) -> pl.DataFrame:
    """The line, and the AUROC on `test` cells of the feature with the largest AUROC on `select` cells for it."""
    labels = store.sql(
        "SELECT feature_id, label, split, auroc FROM feature_label WHERE label_kind = 'cell_type' AND auroc IS NOT NULL"
    )
    wide = labels.pivot(on="split", index=["feature_id", "label"], values="auroc")
    best = wide.sort("select", "feature_id", descending=[True, False], nulls_last=True).unique(
        "label", keep="first", maintain_order=True
    )
    return best.select("label", "select", auroc="test").sort("label")


def table_of(rows: pl.DataFrame) -> pl.DataFrame:
    """A row for each choice of genes and representation: the AUROC of each line (mean over seeds), and their mean."""
    kind = pl.col("representation").str.starts_with("SAE").replace_strict({True: "SAE", False: "neurons"})
    means = rows.group_by("genes", kind, "label", maintain_order=True).agg(pl.col("auroc").mean())
    wide = means.pivot(on="label", index=["genes", "representation"], values="auroc", maintain_order=True)
    lines = [name for name in wide.columns if name not in ("genes", "representation")]
    return wide.with_columns(mean=pl.mean_horizontal(lines))


if __name__ == "__main__":
    main()
