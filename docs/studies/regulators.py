"""Do features prefer the targets of one regulator? Writes docs/regulators.md.

python docs/studies/regulators.py --data $SCSAE_DATA --genesets FOLDER --store ROOT --out docs

The first fold of docs/combinations.md: the SAE, neurons, principal components and random directions are associated with
the targets of each regulator of TRRUST v2 (doi:10.1093/nar/gkx1013), and with the same lists after genes were exchanged
for others that are detected in as many cells and are co-expressed with the same genes (N_PERMUTED times). The store
should be another one than that of the study of combinations, which takes the newest associations of each SAE.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from combinations import fold_recipe
from findings_study.page import markdown
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from steering_study.cells import kang_file

from feature_store import FeatureStore
from feature_store.cells import ExpressionReader, read_panel
from feature_store.storage import commit
from pipelines.associate import associate, expression_dir
from pipelines.baseline import baseline
from pipelines.config import AssociateOptions, BaselineOptions
from pipelines.recipe import run_recipe

FILE = "trrust_v2_human.symbols.gmt"
BASELINES = ("neurons", "pca", "random")
N_PERMUTED, N_CLUSTERS, N_BINS = 5, 20, 20
Q = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Hold features against the targets of regulators.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--genesets", type=Path, required=True, help=f"folder with {FILE}")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    options = parser.parse_args(arguments)
    cells = kang_file(options.data, options.store / "data")
    results = run_recipe(fold_recipe(cells, 0), options.store)
    others = baseline(BaselineOptions(associations=results[-1].run, kind=BASELINES), options.store)
    codes = {"SAE": next(r.run for r in results if r.kind == "codes")}
    codes |= dict(zip(BASELINES, (r.run for r in others if r.kind == "codes"), strict=True))
    store = FeatureStore.open(options.store, associations=results[-1].run)
    files = write_sets(options.genesets / FILE, store, options.store / "data")
    rows, found = [], {}
    for name, run in codes.items():
        made = associate(AssociateOptions(codes=run, gmt=tuple(files)), options.store)
        found[name] = commit.read_table(made.path / "feature_geneset")
        rows.append(figures(name, found[name], made.facts))
    (options.out / "regulators.md").write_text(page(pl.DataFrame(rows), found["SAE"]))


def write_sets(gmt: Path, store: FeatureStore, folder: Path) -> list[Path]:
    """The regulators' targets, and N_PERMUTED copies with genes exchanged inside strata, as .gmt files."""
    sets, strata, files = read_sets(gmt), strata_of_genes(store), [gmt]
    for number in range(N_PERMUTED):
        files.append(folder / f"permuted_{number}.gmt")
        lines = ("\t".join([name, "", *genes]) for name, genes in permuted_sets(sets, strata, number).items())
        files[-1].write_text("\n".join(lines) + "\n")
    return files


def read_sets(gmt: Path) -> dict[str, list[str]]:
    """The targets of each regulator."""
    lines = (line.split("\t") for line in gmt.read_text().splitlines())
    return {name: genes for name, _, *genes in lines}


def permuted_sets(sets: Mapping[str, Sequence[str]], strata: pl.DataFrame, seed: int) -> dict[str, list[str]]:
    """The same lists with genes exchanged inside the strata of `strata_of_genes`."""
    rng, exchanged = np.random.default_rng(seed), dict[str, str]()
    for _, genes in strata.group_by("stratum", maintain_order=True):
        names = genes["symbol"].to_list()
        exchanged.update(dict(zip(names, rng.permutation(names).tolist(), strict=True)))
    return {name: [exchanged.get(gene, gene) for gene in genes] for name, genes in sets.items()}


def strata_of_genes(store: FeatureStore) -> pl.DataFrame:
    """Symbol and stratum of each gene: how many `train` cells have it, and its cluster of co-expressed genes."""
    layout, dataset = store.layout, store.lineage.dataset
    assert dataset is not None
    panel = read_panel(layout.cells_dir(dataset))
    reader = ExpressionReader(commit.Run.open(expression_dir(layout, dataset)), panel)
    train = (store.panel_cells().select("split").collect()["split"] == "train").to_numpy()
    values = reader.read(0, reader.bounds[-1])[train].T.tocsr()
    n_cells = np.diff(values.indptr)
    places = TruncatedSVD(30, random_state=0).fit_transform(values)
    places /= np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1e-9)
    cluster = KMeans(N_CLUSTERS, n_init=1, random_state=0).fit_predict(places)
    bins = np.digitize(n_cells, np.quantile(n_cells, np.linspace(0, 1, N_BINS + 1)[1:-1]))
    symbols = commit.read_table(layout.genes_dir(dataset), ["symbol"])["symbol"]
    return pl.DataFrame({"symbol": symbols, "stratum": cluster * N_BINS + bins})


def figures(name: str, table: pl.DataFrame, facts: dict[str, object]) -> dict[str, object]:
    """Features with a regulator at q <= .05, against matched gene lists, and the same of permuted regulators."""
    own = table.filter(pl.col("q_matched") <= Q)
    real = own.filter(~pl.col("collection").str.starts_with("permuted"))
    counts = [own.filter(collection=f"permuted_{i}") for i in range(N_PERMUTED)]
    features = [frame["feature_id"].n_unique() for frame in counts]
    alive = int(str(facts["features"])) - int(str(facts["dead"]))
    return {
        "representation": name,
        "features that fire": alive,
        "with a regulator": real["feature_id"].n_unique(),
        "permuted": f"{np.mean(features):.1f} ({min(features)} to {max(features)})",
        "excess, share of features": (real["feature_id"].n_unique() - float(np.mean(features))) / max(alive, 1),
        "regulators": real["gene_set"].n_unique(),
        "permuted regulators": f"{np.mean([frame['gene_set'].n_unique() for frame in counts]):.1f}",
    }


def verdict(rows: pl.DataFrame) -> str:
    """In words: the excess of the SAE beside that of the others."""
    excess = dict(zip(rows["representation"], rows["excess, share of features"], strict=True))
    own = excess.pop("SAE")
    more = [name for name, value in excess.items() if value > own]
    said = f"More of the features of {', '.join(more)} do." if more else "Of no other representation more do."
    return (
        f"Beyond permuted lists, {100 * own:.1f} % of the SAE's features go with the targets of a regulator. {said}\n"
        "A direction that goes with many genes goes with more lists, whatever it stands for: the share says how often\n"
        "genes of a program come together, and not that features are regulators."
    )


def page(rows: pl.DataFrame, sae: pl.DataFrame) -> str:
    """The page."""
    real = sae.filter((pl.col("q_matched") <= Q) & ~pl.col("collection").str.starts_with("permuted"))
    top = (
        real.group_by("gene_set")
        .agg(features=pl.col("feature_id").n_unique(), q=pl.col("q_matched").min(), overlap=pl.col("overlap").max())
        .sort(["features", "gene_set"], descending=[True, False])
        .head(15)
        .rename({"gene_set": "regulator", "q": "smallest q", "overlap": "largest overlap"})
    )
    return f"""# Regulators

`python docs/studies/regulators.py --data $SCSAE_DATA --genesets FOLDER --store ROOT --out docs` writes this page. The
genes that each feature goes with (`feature_gene` at q <= .05 on `select` cells) are held against the targets of the 329
regulators of TRRUST v2. A feature counts if a regulator has q <= {Q} against gene lists matched in detection
(`q_matched`). `permuted` are the same lists with genes exchanged inside strata of detection ({N_BINS} bins) and
co-expression ({N_CLUSTERS} clusters of genes on `train` cells), {N_PERMUTED} times, mean and range: what co-expressed
genes give without any regulator. All lists are corrected together. Kang et al. 2018, the first fold of
docs/combinations.md. Whether the features' effects prefer targets is in [effects](effects.md).

{markdown(rows)}
{verdict(rows)}

The regulators that most features of the SAE go with:

{markdown(top)}
"""


if __name__ == "__main__":
    main()
