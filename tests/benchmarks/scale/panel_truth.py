"""Statistics of planted features from a panel of cells, beside those of all cells.

64 features, three quarters full: 24 of types (eight types from the largest to the rare one, three strengths), 16 of
genes, 8 of batches, 8 of the condition and 8 of nothing. Every feature also has its own rate in every type and donor,
so that a panel of another composition than the cells has another AUROC. The statistics are those of `associate`, on
test cells (classes: on the others), once of all cells and once of the cells of a panel. Three panels are compared:

    floor    the panel of a data set (`feature_store.cells.panel`): a floor for each stratum, the rest in proportion
    equal    as many cells of each stratum, or all of a small one
    random   cells at random

A difference is divided by its standard error, that of a sample against the cells that it is drawn from: variance on the
panel minus variance on all cells, by Hanley and McNeil (1982, doi:10.1148/radiology.143.1.7063747) for AUROC and
Fisher's z for Pearson's correlation.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations.auroc import auroc
from feature_store.associations.classes import ClassConfig, classify
from feature_store.associations.familywise import Replicates
from feature_store.associations.gene_correlation import CellBlocks
from feature_store.associations.inputs import Labels, Strata
from feature_store.associations.label_statistics import associate_labels
from feature_store.associations.multiple_testing import benjamini_hochberg, q_within
from feature_store.cells.panel import draw_panel
from feature_store.cells.splits import make_splits
from scale.data import CATEGORIES, RARE, TYPES, Planted

if TYPE_CHECKING:
    from collections.abc import Callable

N_PANEL, N_SEEDS = 200_000, 20
TYPES_TESTED = [*(TYPES[i] for i in (0, 2, 5, 9, 14, 20, 29)), RARE]
STRENGTHS = (3.0, 1.5, 0.7)
SLOPES = (0.8, 0.4, 0.2, 0.1)
N_GENES, N_OTHER_GENES = 16, 16
NAMED_AT = 0.05


class Feature(NamedTuple):
    """What a feature was made to follow: a kind, the code of the label or the number of the gene, and how strongly."""

    kind: str
    target: int
    strength: float


class Cells(NamedTuple):
    """All cells: labels, split, expression CSC [n_cells n_genes], codes CSR [n_cells n_features] and the features."""

    labels: dict[str, Labels]
    codes_of: dict[str, np.ndarray]
    split: np.ndarray
    expression: Any
    codes: Any
    features: list[Feature]


class Found(NamedTuple):
    """AUROC [n_features] of each feature's own label (NaN for others), Pearson's correlation [n_features n_genes], the
    numbers of test cells with each feature's label and without, and of all test cells."""

    auroc: np.ndarray
    pearson: np.ndarray
    n_label: np.ndarray
    n_rest: np.ndarray
    n: int


def make_cells(n_cells: int, seed: int = 0) -> Cells:
    """Labels and expression of the synthetic data, and planted codes."""
    planted = Planted(seed)
    labels, rng = planted.labels(n_cells), np.random.default_rng((seed, 20))
    # genes of all densities: markers of types, batch genes and others
    genes = np.concatenate([planted.special["type"][:: len(TYPES) // 8, 0][:8], rng.permutation(planted.n_genes)[:24]])
    expression = _expression(planted, n_cells, genes)
    features = [Feature("cell_type", TYPES.index(name), s) for name in TYPES_TESTED for s in STRENGTHS]
    features += [Feature("gene", i, SLOPES[i % len(SLOPES)]) for i in range(N_GENES)]
    features += [Feature("batch", i, s) for i in range(4) for s in (2.0, 1.0)]
    features += [Feature("condition", i % 2, 0.4 * (1 + i // 2)) for i in range(8)]
    features += [Feature("nothing", 0, 0.0)] * 8
    columns = [
        _codes(feature, labels, expression, np.random.default_rng((seed, 21, i))) for i, feature in enumerate(features)
    ]
    names = {kind: np.array(CATEGORIES[kind], dtype=object)[codes] for kind, codes in labels.items()}
    split, _ = make_splits(n_cells, donor=names["donor"], batch=names["batch"])
    return Cells(
        labels={kind: _labels(kind, codes) for kind, codes in labels.items()},
        codes_of={kind: codes.astype(np.int64) for kind, codes in labels.items()},
        split=np.asarray(split).astype(str),
        expression=expression,
        codes=sparse.csr_array(sparse.hstack(columns, format="csc")),
        features=features,
    )


def _labels(kind: str, codes: np.ndarray) -> Labels:
    return Labels(
        kind=kind, codes=codes.astype(np.int64), names=tuple(CATEGORIES[kind]), known=np.ones(len(codes), bool)
    )


def _expression(planted: Planted, n_cells: int, genes: np.ndarray) -> Any:
    """log1p of counts per 10,000 of some genes, CSC [n_cells n_genes]."""
    parts = []
    for block in planted.blocks(n_cells):
        counts = sparse.csr_array((block.data, block.indices, block.indptr), (len(block.indptr) - 1, planted.n_genes))
        depth = np.asarray(counts.sum(axis=1)).ravel()
        own = sparse.csr_array(counts[:, genes])
        value = np.log1p(1e4 * own.data / np.repeat(depth, np.diff(own.indptr)))
        parts.append(sparse.csr_array((value.astype(np.float32), own.indices, own.indptr), own.shape))
    return sparse.csc_array(sparse.vstack(parts))


def _codes(feature: Feature, labels: dict[str, np.ndarray], expression: Any, rng: np.random.Generator) -> Any:
    """The codes of one feature, CSC [n_cells 1]."""
    n_cells = len(labels["donor"])
    # rates differ between types (more inside a lineage of five) and donors, whatever the feature follows
    lineage = np.repeat(rng.normal(0, 0.6, 7), 5)[: len(TYPES)]
    level = (1.1 + lineage + rng.normal(0, 0.5, len(TYPES)))[labels["cell_type"]]
    level += rng.normal(0, 0.15, len(CATEGORIES["donor"]))[labels["donor"]]
    strength = np.zeros(n_cells, dtype=np.float32)
    if feature.kind in labels:
        strength[labels[feature.kind] == feature.target] = feature.strength
    elif feature.kind == "gene":
        gene = expression[:, [feature.target]].tocoo()
        strength[gene.row] = feature.strength * gene.data / 2
    fires = rng.random(n_cells) < 1 / (1 + np.exp(-level - strength))
    value = rng.exponential(1.0, n_cells).astype(np.float32) + 0.1 * np.exp(level / 3).astype(np.float32) + strength
    return sparse.csc_array(np.where(fires, value, 0).astype(np.float32)[:, None])


def measure(cells: Cells, inside: np.ndarray) -> Found:
    """The statistics of the test cells among the cells of a mask [n_cells]."""
    rows = (cells.split == "test") & inside
    codes = cells.codes[np.flatnonzero(rows)]
    n = codes.shape[0]
    area, n_label = np.full(len(cells.features), np.nan), np.zeros(len(cells.features))
    for kind in ("cell_type", "batch", "condition"):
        own = [i for i, feature in enumerate(cells.features) if feature.kind == kind]
        indicator = cells.labels[kind].take(rows).one_hot()
        strata = Strata.of(n, cells.labels["cell_type"].take(rows)) if kind == "batch" else None
        found = auroc(codes[:, own], indicator, strata)
        target = [cells.features[i].target for i in own]
        area[own] = found[np.arange(len(own)), target]
        n_label[own] = np.asarray(indicator.sum(axis=0)).ravel()[target]
    blocks = CellBlocks.of(rows, None, None)
    cross = blocks.side(sparse.csc_array(codes))
    genes = blocks.side(sparse.csc_array(cells.expression[np.flatnonzero(rows)])).by_cell()
    return Found(area, blocks.correlate(cross, genes).pearson, n_label, n - n_label, n)


def auroc_variance(area: np.ndarray, n_label: np.ndarray, n_rest: np.ndarray) -> np.ndarray:
    """Hanley and McNeil's variance of an AUROC."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    above = area * (1 - area) + (n_label - 1) * (q1 - area**2) + (n_rest - 1) * (q2 - area**2)
    return np.divide(above, n_label * n_rest, out=np.full(len(area), np.nan), where=n_label > 0)


def equal_panel(columns: list[np.ndarray], n_wanted: int, seed: int) -> np.ndarray:
    """As many cells of each stratum, or all of a small one [n_cells]."""
    stratum = np.ravel_multi_index(columns, [int(codes.max()) + 1 for codes in columns])
    sizes = np.bincount(stratum)
    each = bisect.bisect_right(range(n_wanted), n_wanted, key=lambda t: np.minimum(sizes, t).sum()) - 1
    order = np.lexsort((np.random.default_rng(seed).random(len(stratum)), stratum))
    place = np.empty(len(stratum), dtype=np.int64)
    place[order] = np.arange(len(stratum)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place < each


def random_panel(n_cells: int, n_wanted: int, seed: int) -> np.ndarray:
    """Cells at random [n_cells]."""
    chosen = np.zeros(n_cells, dtype=bool)
    chosen[np.random.default_rng(seed).choice(n_cells, n_wanted, replace=False)] = True
    return chosen


def decisions(cells: Cells, inside: np.ndarray) -> tuple[pl.DataFrame, np.ndarray, list[str]]:
    """q of every feature and label of test cells, q of features and genes, and the classes of the features."""
    rows = np.flatnonzero(inside)
    codes, split = cells.codes[rows], cells.split[rows]
    label = {kind: labels.take(inside) for kind, labels in cells.labels.items()}
    splits = {name: split == name for name in ("select", "test")}
    tables = [
        associate_labels(
            codes,
            label[kind],
            splits,
            label["donor"],
            within=label["cell_type"] if kind == "batch" else None,
            replicates=Replicates(n=0),
        )
        for kind in ("cell_type", "batch", "condition")
    ]
    table = pl.concat(table.table for table in tables).with_columns(q=q_within("p", "label_kind"))
    blocks = CellBlocks.of(splits["test"], label["donor"], None)
    at = np.flatnonzero(splits["test"])
    genes = blocks.side(sparse.csc_array(cells.expression[rows][at])).by_cell()
    q = benjamini_hochberg(blocks.correlate(blocks.side(sparse.csc_array(codes[at])), genes).p)
    seen = split != "test"
    classes = classify(
        codes[np.flatnonzero(seen)],
        [label["cell_type"].take(seen), label["condition"].take(seen)],
        label["batch"].take(seen),
        None,
        units=label["donor"].take(seen),
        dead=np.zeros(codes.shape[1], dtype=bool),
        # the class does not depend on the resamples, which give its confidence
        config=ClassConfig(n_bootstrap=1),
    )
    return table.filter(pl.col("split") == "test"), q, classes["class"].to_list()


def main(options: Any) -> None:
    """Print the tables for the largest number of cells."""
    n_cells, start = max(options.cells), time.process_time()
    n_panel = min(N_PANEL, n_cells // 5)
    cells = make_cells(n_cells)
    split = np.unique(cells.split, return_inverse=True)[1]
    columns = [split, *(cells.codes_of[name] for name in ("donor", "cell_type", "condition"))]
    truth = measure(cells, np.ones(n_cells, dtype=bool))
    panels: dict[str, Callable[[int], np.ndarray]] = {
        "floor": lambda seed: draw_panel(columns, n_cells, n_wanted=n_panel, seed=seed),
        "equal": lambda seed: equal_panel(columns, n_panel, seed),
        "random": lambda seed: random_panel(n_cells, n_panel, seed),
    }
    fullness = cells.codes.nnz / cells.codes.shape[0] / cells.codes.shape[1]
    print(f"{n_cells:,} cells, panel {n_panel:,}, {len(cells.features)} features, {fullness:.2f} full")
    drawn = {name: [draw(seed) for seed in range(N_SEEDS)] for name, draw in panels.items()}
    found = {name: [measure(cells, inside) for inside in several] for name, several in drawn.items()}
    _print_auroc(cells, truth, found)
    _print_pearson(truth, found)
    _print_rare(cells, drawn)
    _print_decisions(cells, {name: several[0] for name, several in drawn.items()})
    print(f"\n{time.process_time() - start:.0f} CPU s")


def _print_auroc(cells: Cells, truth: Found, found: dict[str, list[Found]]) -> None:
    """Differences of AUROC from all cells, by the label that a feature follows."""
    of_all = auroc_variance(truth.auroc, truth.n_label, truth.n_rest)
    groups: dict[str, list[int]] = {}
    for i, feature in enumerate(cells.features):
        if feature.kind == "cell_type":
            groups.setdefault(TYPES[feature.target], []).append(i)
        elif feature.kind in ("batch", "condition"):
            groups.setdefault(feature.kind, []).append(i)
    print(
        "\nAUROC on test cells, panel minus all cells, in units of .001: largest mean over seeds, RMS, largest; and RMS"
    )
    print("in standard errors. SE: the mean standard error of the first panel.")
    print("| label | its cells | AUROC | SE | " + " | ".join(found) + " |\n|---" + "|---" * (3 + len(found)) + "|")
    for group, own in groups.items():
        columns, errors = [], []
        for several in found.values():
            difference = np.array([one.auroc[own] - truth.auroc[own] for one in several])
            variance = [auroc_variance(truth.auroc[own], one.n_label[own], one.n_rest[own]) for one in several]
            error = np.sqrt(np.maximum(np.array(variance) - of_all[own], 1e-12))
            columns.append(_summary(difference, error))
            errors.append(error.mean())
        area = " ".join(f"{value:.3f}" for value in truth.auroc[own][:3])
        row = [group, f"{truth.n_label[own].min():,.0f}", area, f"{1000 * errors[0]:.1f}", *columns]
        print("| " + " | ".join(row) + " |")


def _summary(difference: np.ndarray, error: np.ndarray) -> str:
    """Of differences [n_seeds ...]: the largest mean over seeds, RMS, largest, in .001; RMS in standard errors."""
    bias, rms, most = np.abs(difference.mean(axis=0)).max(), np.sqrt((difference**2).mean()), np.abs(difference).max()
    return f"{1000 * bias:.1f}, {1000 * rms:.1f}, {1000 * most:.1f}; {np.sqrt(((difference / error) ** 2).mean()):.2f}"


def _print_pearson(truth: Found, found: dict[str, list[Found]]) -> None:
    """Differences of the correlations of all features with all genes."""
    print("\nPearson's correlation of features and genes on test cells, the same figures")
    print("| panel | SE | differences |\n|---|---|---|")
    for name, several in found.items():
        difference = np.array([one.pearson - truth.pearson for one in several])
        drawn = np.array([max(1 / one.n - 1 / truth.n, 1e-12) for one in several])
        error = (1 - truth.pearson**2) * np.sqrt(drawn)[:, None, None]
        print(f"| {name} | {1000 * error.mean():.1f} | {_summary(difference, error)} |")


def _print_rare(cells: Cells, drawn: dict[str, list[np.ndarray]]) -> None:
    """How many cells of the rare type each panel has."""
    rare = cells.codes_of["cell_type"] == TYPES.index(RARE)
    of_test = rare & (cells.split == "test")
    print(f"\n| panel | of {rare.sum()} rare cells | of {of_test.sum()} rare test cells |\n|---|---|---|")
    for name, several in drawn.items():
        counts = [[int((which & one).sum()) for one in several] for which in (rare, of_test)]
        print(f"| {name} | " + " | ".join(f"{min(n)} to {max(n)}" for n in counts) + " |")


def _print_decisions(cells: Cells, drawn: dict[str, np.ndarray]) -> None:
    """Which q and classes of a panel differ from those of all cells."""
    table, q, classes = decisions(cells, np.ones(len(cells.split), dtype=bool))
    kinds = [feature.kind for feature in cells.features]
    print(f"\nclasses of all cells: {Counter(zip(kinds, classes, strict=True))}")
    print(f"pairs at q <= {NAMED_AT} in both, of all cells only, of the panel only; planted labels found: all, panel")
    print("| panel | labels | genes | planted labels | q of the rare type | other classes |\n|---" + "|---" * 5 + "|")
    key = ["feature_id", "label_kind", "label"]
    own = pl.DataFrame(
        {
            "feature_id": pl.Series(range(len(kinds)), dtype=pl.Int32),
            "label_kind": kinds,
            "label": [CATEGORIES[f.kind][f.target] if f.kind in CATEGORIES else "" for f in cells.features],
        }
    )
    for name, inside in drawn.items():
        other, other_q, other_classes = decisions(cells, inside)
        both = table.select(*key, "q").join(other.select(*key, panel_q="q"), on=key, how="left")
        all_named, named = (both[column].fill_null(1.0).to_numpy() <= NAMED_AT for column in ("q", "panel_q"))
        planted = both.join(own, on=key)
        of_rare = planted.filter(pl.col("label") == RARE)["panel_q"]
        of_planted = [(planted[column] <= NAMED_AT).sum() for column in ("q", "panel_q")]
        differ = sum(a != b for a, b in zip(classes, other_classes, strict=True))
        row = [
            name,
            _shared(all_named, named),
            _shared(q <= NAMED_AT, other_q <= NAMED_AT),
            f"{of_planted[0]}, {of_planted[1]} of {planted.height}",
            ", ".join("none" if value is None else f"{value:.1e}" for value in of_rare),
            f"{differ} of {len(classes)}",
        ]
        print("| " + " | ".join(row) + " |")


def _shared(a: np.ndarray, b: np.ndarray) -> str:
    return f"{(a & b).sum()}, {(a & ~b).sum()}, {(~a & b).sum()}"
