"""`scsae demo`: every stage on real cells, with the answers, plots and next commands.

The cells are 700 PBMC (see `pipelines.pbmc`), or those of any .h5ad file given by `--data`. Every stage is the one of
its own command. A second call finds all runs committed and computes nothing.
"""

import shutil
import sys
from pathlib import Path

import polars as pl

from feature_store import FeatureStore, Layout
from feature_store.associations.claims import NAMED_AT
from feature_store.storage import schemas
from feature_store.storage.addresses import DataPath
from feature_store.storage.obs_columns import shown_name
from pipelines.config import (
    DEFAULT_STORE,
    AssociateOptions,
    EncodeOptions,
    ExtractOptions,
    Recipe,
    SteerOptions,
    TrainOptions,
)
from pipelines.errors import UsageError
from pipelines.models import for_people, versions_frame
from pipelines.pbmc import BATCH, CELL_TYPE, write_pbmc68k
from pipelines.recipe import run_recipe
from pipelines.runtime.output import console, print_frame
from pipelines.runtime.reports import print_steering
from pipelines.runtime.stage import Clock, StageResult

LAYER = "2"
SHARD_CELLS = 100
TRAIN = TrainOptions(n_features=1024, k=(16,), n_steps=800, batch_size=2048, checkpoint_steps=200, num_workers=0)
"""Trained in the process of the command: the processes of Ray Train start for 20 s, as long as these steps take."""
P_LEVEL = 0.05
EMBEDDED_TARGET = "CD19+ B"
EMBEDDED_LABELS = (EMBEDDED_TARGET, "CD56+ NK")

MEANING = """\
SELECT test.feature_id, chosen.auroc AS select_auroc, test.auroc AS test_auroc, test.q AS test_q, features.top_genes
FROM feature_label AS chosen
JOIN feature_label AS test
  ON test.feature_id = chosen.feature_id AND test.label_kind = chosen.label_kind AND test.label = chosen.label
JOIN features ON features.feature_id = chosen.feature_id
WHERE chosen.split = 'select' AND test.split = 'test' AND chosen.label_kind = 'cell_type' AND chosen.label = '{label}'
  AND chosen.auroc > 0.5 AND test.q <= 0.05
ORDER BY chosen.p
LIMIT 3"""
GENE_SETS = """\
SELECT feature_id, gene_set, overlap, n_set, odds_ratio, q
FROM feature_geneset
WHERE split = 'test' AND overlap > 0 AND q <= 0.05 AND feature_id IN ({features})
ORDER BY q
LIMIT 5"""
ANY_GENE_SETS = """\
SELECT feature_id, gene_set, overlap, n_set, odds_ratio, q
FROM feature_geneset
WHERE split = 'test' AND overlap > 0 AND q <= 0.05
ORDER BY q
LIMIT 5"""
BATCHES = """\
SELECT feature_id, label, auroc, q, method
FROM feature_label
WHERE split = 'test' AND label_kind = 'batch' AND auroc > 0.5 AND q <= 0.05
ORDER BY p
LIMIT 3"""


def demo_recipe(
    store: Path,
    *,
    data: DataPath | None = None,
    donor: str | None = None,
    batch: str | None = None,
    cell_type: str | None = None,
) -> Recipe:
    """Return the stages of the demo with their options; without `data`, the PBMC are written to the store first."""
    target = None
    if data is None:
        if donor or batch or cell_type:
            raise UsageError(
                f"obs columns were given without --data (donor {donor!r}, batch {batch!r}, cell type {cell_type!r}), "
                "but those of the PBMC are known; give --data FILE.h5ad, or leave the columns out"
            )
        data = write_pbmc68k(Layout(store).local_root / "data")
        batch, cell_type, target = BATCH, CELL_TYPE, EMBEDDED_TARGET
    return Recipe(
        extract=ExtractOptions(
            data=(data,), layer=(LAYER,), donor=donor, batch=batch, cell_type=cell_type, shard_cells=SHARD_CELLS
        ),
        train=TRAIN,
        encode=EncodeOptions(),
        associate=AssociateOptions(),
        steer=() if cell_type is None else (SteerOptions(target=target),),
    )


def run_demo(
    store: Path,
    *,
    data: DataPath | None = None,
    donor: str | None = None,
    batch: str | None = None,
    cell_type: str | None = None,
) -> None:
    """Run the stages of the demo, print the answers to its questions and draw its plots."""
    clock = Clock()
    results = run_recipe(demo_recipe(store, data=data, donor=donor, batch=batch, cell_type=cell_type), store)
    by_kind = {result.kind: result for result in results}
    found = FeatureStore.open(store, associations=by_kind["associations"].run)
    labels = labels_to_ask(found, embedded=data is None)
    for label in labels:
        ask(found, label)
    if not labels:
        _answer(found, ANY_GENE_SETS, "Which gene sets do features match?")
        own = set(schemas.schema("cells").columns)
        columns = [shown_name(name) for name in found.frame("cells").collect_schema().names() if name not in own]
        known = f"of {', '.join(columns)}" if columns else "but this data set has no obs column"
        console().print(f"to look up the features of cell types, give their obs column: --cell-type COLUMN, {known}")
    if batch is not None or data is None:
        _answer(found, BATCHES, "Which features tell batches apart among cells of one type?")
    if "steering" in by_kind:
        print_steering(store, by_kind["steering"].run)
        console().print(verdict(by_kind["steering"]), soft_wrap=True)
    print_frame(summary(results), title="What was made")
    print_frame(for_people(versions_frame(store)), title="Registered SAEs")
    plots = draw(found, by_kind, store, labels)
    _next(store, plots, clock.seconds, by_kind["associations"].run)


def labels_to_ask(found: FeatureStore, *, embedded: bool) -> list[str]:
    """Return the cell types to look up: B and NK cells of the PBMC, else the two with the best features."""
    if embedded:
        return list(EMBEDDED_LABELS)
    best = found.frame("features").filter(pl.col("top_label").is_not_null())
    ranked = best.sort("top_label_auroc_select", descending=True).select("top_label").collect()
    return list(dict.fromkeys(ranked["top_label"].to_list()))[:2]


def ask(found: FeatureStore, label: str) -> None:
    """Print the queries and answers for one cell type: its features with their genes and gene sets."""
    features = _answer(found, MEANING.format(label=label.replace("'", "''")), f"Which features mean {label}?")
    if features.height:
        ids = ", ".join(str(i) for i in features["feature_id"])
        _answer(found, GENE_SETS.format(features=ids), f"Which gene sets do these match ({label})?")


def _answer(found: FeatureStore, query: str, question: str) -> pl.DataFrame:
    out = console()
    out.print("", question, sep="\n", style="bold")
    out.print(*query.splitlines(), sep="\n", style="dim", soft_wrap=True)
    answer = found.sql(query)
    print_frame(answer)
    if not answer.height:
        out.print(f"none at {NAMED_AT} on test cells")
    return answer


def verdict(steering: StageResult) -> str:
    """Return a sentence that says whether the intervention differs from its random controls."""
    facts = steering.facts
    p = {name: value for name, value in facts.items() if name.startswith("p against")}
    differs = all(value <= P_LEVEL for value in p.values())
    said = ", ".join(f"{name} {value:.2g}" for name, value in p.items())
    verb = "differs" if differs else "does NOT differ"
    return f"Steering {facts['target']}: the effect {verb} from its random controls at p <= {P_LEVEL} ({said})."


def summary(results: list[StageResult]) -> pl.DataFrame:
    """Return a row for each stage: its run, the work done now and the work reused."""
    rows = [
        {"stage": r.kind, "run": r.run, "done now": r.done, "reused": r.reused, "seconds": round(r.seconds, 1)}
        for r in results
    ]
    return pl.DataFrame(rows)


def draw(found: FeatureStore, by_kind: dict[str, StageResult], store: Path, asked: list[str]) -> list[Path]:
    """Draw the features by cell type, the genes of the feature of the first label, and the steering with its nulls."""
    from feature_store import plots

    folder = Layout(store).local_root / "plots"
    best = plots.best_features(found)
    drawn = []
    if best.height:
        drawn.append(folder / "features_by_cell_type.png")
        plots.dotplot(found, save=drawn[-1])
        feature = best.sort(~pl.col("label").is_in(asked[:1]), "p")["feature_id"][0]
        drawn.append(folder / f"genes_of_feature_{feature}.png")
        plots.gene_bars(found, feature, save=drawn[-1])
    if "steering" in by_kind:
        drawn.append(folder / "steering.png")
        plots.steering_bars(found, by_kind["steering"].run, save=drawn[-1])
    return drawn


def _next(store: Path, plots: list[Path], seconds: float, associations: str) -> None:
    """Print where the results are and the next commands; the last one opens the atlas of these associations."""
    layout = Layout(store)
    option = "" if store == DEFAULT_STORE else f" {layout.store_option}"
    # the path that was typed is shown, as the virtual environment may not be on the PATH
    typed = Path(sys.argv[0])
    scsae = str(typed) if typed.name == "scsae" and not shutil.which("scsae") else "scsae"
    newest = FeatureStore.open(store).lineage.associations
    run = "" if newest == associations else f" --associations {associations}"
    lines = [
        *(f"plot      {path}" for path in plots),
        f"tracking  mlflow ui --backend-store-uri sqlite:///{layout.mlflow_dir / 'mlflow.db'}",
        "",
        "Next:",
        f"  {scsae} features --gene CD79A{option}",
        f"  {scsae} features --cell-idx 0{option}",
        f'  {scsae} sql "SELECT class, COUNT(*) AS n FROM features GROUP BY class"{option}',
        f"  {scsae} models{option}",
        f"  {scsae} inspect YOUR.h5ad",
        f"done in {seconds:.0f} s",
        "",
        f"Look at the features in a web browser:  {scsae} serve{option}{run}",
    ]
    console().print(*lines, sep="\n", soft_wrap=True)
