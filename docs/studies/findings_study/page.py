"""The page `docs/findings.md` and its three figures, from the stores that `findings_study` made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import sparse

from feature_store import FeatureStore, plots
from feature_store.associations.donor_agreement import sign_flip_p
from findings_study.cells import FOLDS, STIMULATED, T_CELLS
from findings_study.measures import (
    BatchAndTypeTests,
    CellMatrices,
    Detection,
    Q,
    batch_and_type_tests,
    cell_type_table,
    detect,
    feature_of_gene_set,
    firing_on,
    genes_inside_types,
    holds_on_test,
    n_of_set,
    separation,
)

if TYPE_CHECKING:
    from findings_study.runs import Fold

CELL_TYPES = (
    ("cell_type", "B cells", "B_CELL"),
    ("cell_type", "NK cells", "NK_CELL"),
    ("cell_type", "CD14+ Monocytes", "CD14_MONOCYTE"),
    ("lineage", T_CELLS, "T_CELL"),
    ("cell_type", "FCGR3A+ Monocytes", "FCGR3A_MONOCYTE"),
    ("cell_type", "CD8 T cells", "CD8_CYTOTOXIC_T"),
    ("cell_type", "Dendritic cells", "CONVENTIONAL_DC"),
)
"""Label kind, label, and the set of textbook markers that its genes are held against."""
TUNING_DONORS = ("101", "1256")
"""Donors on which layer, k and pooling were chosen."""
PROTOCOL_BATCH = "sc_dropseq"
TARGET_AUROC = 0.92
"""AUROC that an early run had for stimulated cells; the page names the donors below it."""
INTERFERON = "INTERFERON_RESPONSE"
BY_CONDITION, BY_GENE_SET = "by condition", "by gene set"
BEST_GENE, SCORE, COUNTS = COMPARISONS = ("best gene", "gene score", "total counts")


def write_page(
    out: Path,
    types: FeatureStore,
    baselines: Mapping[str, FeatureStore],
    folds: "Sequence[Fold]",
    fold_baselines: "Sequence[Mapping[str, Fold]]",
    protocol: FeatureStore,
    protocol_baselines: Mapping[str, FeatureStore],
) -> Path:
    """Write findings.md and its figures to `out`; return its path. `fold_baselines`: those of each fold, by kind."""
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        HEAD,
        cell_type_section(out, types, baselines),
        detector_section(out, folds, fold_baselines),
        protocol_section(out, protocol, protocol_baselines),
    ]
    for picture in out.glob("findings_*.png"):
        shrink(picture)
    page = out / "findings.md"
    page.write_text("\n".join(sections))
    return page


def shrink(picture: Path) -> None:
    """Write a picture again with 256 colours: a third of the bytes, and nothing to be seen of it."""
    from PIL import Image

    with Image.open(picture) as drawn:
        few = drawn.convert("RGB").quantize(256)
    few.save(picture, optimize=True)


HEAD = """\
# What the features of real cells say

This page is written by `python docs/studies/findings.py --data $SCSAE_DATA --store ROOT --out docs`. The SAEs
(BatchTopK, F 1024, k 8, 1,000 steps) are of layer 1 of the mini model, with mean pooling. Features are chosen on
`select` cells, and every figure is of `test` cells unless it says `select`; cells are split by donor where donors are
known. Layer, k and pooling were chosen among layers 1 and 3, k 8 and 16, max and mean, by the AUROC of the interferon
section below, on donors 101 and 1256. The mini model itself was trained on control cells of donors 1015, 1016, 1244,
1256 and 1488, without their conditions. A held-out donor among these five was seen by the model, but not by the SAE and
not in any choice. Donors 101, 107 and 1039 were seen by neither.
"""


def markdown(frame: pl.DataFrame) -> str:
    """A frame as a Markdown table; AUROCs with three digits, p with one."""

    def text(name: str, value: object) -> str:
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        return f"{value:.1e}" if name.split()[-1] in ("p", "q") and value < 0.001 else f"{value:.3f}"

    rows = [[text(name, row[name]) for name in frame.columns] for row in frame.iter_rows(named=True)]
    lines = [frame.columns, ["---"] * frame.width, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell_type_section(out: Path, store: FeatureStore, baselines: Mapping[str, FeatureStore]) -> str:
    """The first question: a feature for each cell type."""
    matrices = CellMatrices.open(store)
    table = cell_type_table(matrices, CELL_TYPES, baselines)
    compared = ("gene", *baselines)
    chosen = list(dict.fromkeys(table["feature"].to_list()))
    plots.dotplot(store, chosen, show=False, save=out / "findings_cell_types.png")
    donors = {split: sorted(set(matrices.cells.filter(split=split)["donor"].to_list())) for split in ("select", "test")}
    return f"""
## Cell types: Kang et al. 2018, 2,000 PBMC, {len(set(matrices.cells["donor"]))} donors

Chosen on donors {", ".join(donors["select"])}, by the smallest donor-blocked p; tested on {", ".join(donors["test"])}.
q is over all tests of the table. `genes` correlate with the cell code on `select` cells; `markers of 10` counts the
textbook markers among the first ten.

{markdown(table.drop(compared))}
The next table makes the same choice among single genes, and among the features of each baseline (`scsae baseline`). It
shows test AUROCs; a feature is worth what it has above them.

{markdown(table.select("label", pl.col("test AUROC").alias("SAE"), *compared))}
{_below(table, compared)}

![The chosen features by cell type, test cells](findings_cell_types.png)
"""


def _below(table: pl.DataFrame, compared: Sequence[str]) -> str:
    """Where the SAE has nothing above something simpler."""
    lines = []
    for name in compared:
        labels = table.filter(pl.col(name) >= pl.col("test AUROC"))["label"].to_list()
        excess = float((table["test AUROC"] - table[name]).to_numpy().mean())
        lines.append(
            f"- The SAE is above {name} by {excess:.3f} on average; it is not above it for: "
            f"{', '.join(labels) or 'no label'}."
        )
    return "\n".join(lines)


def mean_expression(matrices: CellMatrices, gene_set: str) -> sparse.csr_array:
    """The mean log1p(CP10k) of the genes of a set, as one column."""
    genes = np.array([n_of_set([gene], gene_set) > 0 for gene in matrices.genes])
    return sparse.csr_array(np.asarray(matrices.expression[:, np.flatnonzero(genes)].mean(axis=1)).reshape(-1, 1))


def depth(matrices: CellMatrices) -> sparse.csr_array:
    """The total counts of each cell, as one column."""
    return sparse.csr_array(matrices.cells["n_counts"].to_numpy().astype(float)[:, None])


def detector_section(out: Path, folds: "Sequence[Fold]", baselines: "Sequence[Mapping[str, Fold]]") -> str:
    """The second question: stimulated cells by an SAE of control cells."""
    found: dict[str, list[Detection]] = {name: [] for name in (BY_CONDITION, BY_GENE_SET, *COMPARISONS)}
    rows, genes = [], []
    for fold in folds:
        matrices = CellMatrices.open(fold.both)
        ids = [str(i) for i in range(matrices.codes.shape[1])]
        of_set = feature_of_gene_set(fold.control, INTERFERON)
        for name, columns, names, chosen in (
            (BY_CONDITION, matrices.codes, ids, None),
            (BY_GENE_SET, matrices.codes, ids, of_set),
            (BEST_GENE, matrices.expression, matrices.genes, None),
            (SCORE, mean_expression(matrices, INTERFERON), [f"mean of {INTERFERON}"], 0),
            (COUNTS, depth(matrices), ["n_counts"], 0),
        ):
            one = detect(matrices, columns, names, kind="condition", label=STIMULATED, chosen=chosen)
            found[name].append(one)
            rows.append(
                {
                    "test donors": " ".join(FOLDS[fold.number]),
                    "chosen": name,
                    "what": one.name,
                    "select AUROC": one.select,
                    "test AUROC": one.test,
                    "rank-biserial": 2 * one.test - 1,
                    "types pooled": one.pooled,
                    "permutation p": one.p_permutation,
                    "highest permuted": one.highest_permuted,
                }
            )
        for name in (BY_CONDITION, BY_GENE_SET):
            feature = int(found[name][-1].name)
            inside = genes_inside_types(fold.control, feature)
            genes.append(
                {
                    "test donors": " ".join(FOLDS[fold.number]),
                    "chosen": name,
                    "feature": feature,
                    "genes inside types": " ".join(inside[:8]),
                    "interferon of 10": n_of_set(inside, INTERFERON),
                    "firing on interferon genes": firing_on(fold.control, feature, INTERFERON),
                    "genes over all types": " ".join(genes_of(fold.control, feature)[:5]),
                }
            )
    by_donor = {name: _merged(values) for name, values in found.items()}
    draw_donors(by_donor, out / "findings_interferon.png")
    return f"""
## Interferon: an SAE of control cells, applied to stimulated cells

Each SAE is trained on control cells of four donors and applied to control and IFN-beta cells of two donors that it was
not trained on. All AUROCs but the pooled one are of stimulated against control cells inside cell types. A feature is
chosen in two ways: {BY_CONDITION}, the feature of highest AUROC on two other donors; and {BY_GENE_SET}, the
first feature that `scsae features --gene-set {INTERFERON}` names among control cells of these donors, so
that no stimulated cell has a part in the choice.
`gene score` is the mean log1p(CP10k) of the same genes, which one would use without any SAE. Permutations shuffle the
condition inside donor and cell type.

{markdown(pl.DataFrame(rows))}
The next table describes these features by control cells of the `select` donors. (The SAEs start from the same weights,
so a feature may keep its id from fold to fold.)

{markdown(pl.DataFrame(genes))}
By cell type, feature chosen {BY_CONDITION} and {BY_GENE_SET}:

{markdown(_by_type(folds, found))}
By donor:

{markdown(_donor_rows(by_donor))}
{_donor_claims(by_donor)}

With a baseline (`scsae baseline`) in place of the SAE in the first {len(baselines)} folds, chosen in the same ways:

{markdown(_baseline_rows(baselines, by_donor))}
![AUROC of each donor](findings_interferon.png)
"""


def _baseline_rows(
    baselines: "Sequence[Mapping[str, Fold]]", by_donor: Mapping[str, Mapping[str, float]]
) -> pl.DataFrame:
    """Two rows a baseline: its features chosen by condition and by gene set, and what the SAE has above them."""
    rows = []
    for kind in baselines[0] if baselines else ():
        opened = [
            (CellMatrices.open(fold[kind].both), feature_of_gene_set(fold[kind].control, INTERFERON))
            for fold in baselines
        ]
        for name in (BY_CONDITION, BY_GENE_SET):
            found = [_detect_feature(one, None if name == BY_CONDITION else of_set) for one, of_set in opened]
            values = _merged(found)
            above = [by_donor[name][donor] - value for donor, value in values.items()]
            fires = [
                firing_on(f[kind].control, int(one.name), INTERFERON) for f, one in zip(baselines, found, strict=True)
            ]
            rows.append(
                {
                    "baseline": kind,
                    "chosen": name,
                    "mean AUROC of donors": float(np.mean(list(values.values()))),
                    "lowest": min(values.values()),
                    "SAE above it": float(np.mean(above)),
                    "in donors": f"{sum(x > 0 for x in above)} of {len(above)}",
                    "sign-flip p": _sign_flip_p(above),
                    "firing on interferon genes": " ".join(f"{value:.2f}" for value in fires),
                }
            )
    return pl.DataFrame(rows)


def _sign_flip_p(effects: Sequence[float]) -> float:
    """Exact two-sided p of a mean effect over donors: never below 2^(1 - n)."""
    return float(sign_flip_p(np.asarray(effects)[:, None])[0])


def _detect_feature(matrices: CellMatrices, chosen: int | None) -> Detection:
    names = [str(i) for i in range(matrices.codes.shape[1])]
    return detect(matrices, matrices.codes, names, kind="condition", label=STIMULATED, chosen=chosen)


def genes_of(store: FeatureStore, feature: int) -> list[str]:
    """Genes that correlate with a feature over all `select` cells of a store."""
    found = store.frame("features").filter(pl.col("feature_id") == feature).select("top_genes").collect()
    return (found["top_genes"][0] or "").split()


def _by_type(folds: "Sequence[Fold]", found: Mapping[str, Sequence[Detection]]) -> pl.DataFrame:
    """A row a cell type: AUROC by condition / by gene set in the fold of each pair of donors."""
    types = sorted({name for one in found[BY_CONDITION] for name in one.by_type})
    pairs = list(zip(folds, found[BY_CONDITION], found[BY_GENE_SET], strict=True))

    def both(a: Detection, b: Detection, name: str) -> str | None:
        return f"{a.by_type[name]:.3f} / {b.by_type[name]:.3f}" if name in a.by_type else None

    columns = {" ".join(FOLDS[fold.number]): [both(a, b, name) for name in types] for fold, a, b in pairs}
    return pl.DataFrame({"cell type": types, **columns})


def _donor_rows(by_donor: Mapping[str, Mapping[str, float]]) -> pl.DataFrame:
    donors = sorted(by_donor[BY_CONDITION])
    return pl.DataFrame(
        {"donor": donors, **{name: [values.get(d) for d in donors] for name, values in by_donor.items()}}
    )


def _merged(found: Sequence[Detection]) -> dict[str, float]:
    """AUROC of each donor in the fold that tested it."""
    return {donor: value for one in found for donor, value in one.by_donor.items()}


def _donor_claims(by_donor: Mapping[str, Mapping[str, float]]) -> str:
    """What donors as the sample say, and what they could say at most."""
    lines = []
    for chosen in (BY_CONDITION, BY_GENE_SET):
        values = by_donor[chosen]
        for name, part in (
            (f"all {len(values)} donors", values),
            (f"without {' and '.join(TUNING_DONORS)}", {d: v for d, v in values.items() if d not in TUNING_DONORS}),
        ):
            effects = [2 * value - 1 for value in part.values()]
            if effects:
                lines.append(
                    f"Chosen {chosen}, {name}: mean rank-biserial {np.mean(effects):.3f}, lowest {min(effects):.3f}, "
                    f"sign-flip p {_sign_flip_p(effects):.4f} (the smallest that {len(part)} donors can give: "
                    f"{2.0 ** (1 - len(part)):.4f})."
                )
        below = [f"{donor} ({value:.3f})" for donor, value in sorted(values.items()) if value < TARGET_AUROC]
        lines.append(f"Chosen {chosen}, donors below {TARGET_AUROC}: {', '.join(below) or 'none'}.")
        for other in (BEST_GENE, SCORE):
            above = [values[donor] - by_donor[other][donor] for donor in values]
            lines.append(
                f"Chosen {chosen}, minus {other}: mean AUROC {np.mean(above):+.3f}, higher in "
                f"{sum(x > 0 for x in above)} of {len(above)} donors, sign-flip p {_sign_flip_p(above):.3f}."
            )
    lines.append(
        "Two donors of one fold alone cannot give a p below .5. The folds share training donors, and a donor that one "
        "fold tests is one that another fold chose on, so p over all donors is approximate."
    )
    return "\n".join(f"- {line}" for line in lines)


def draw_donors(by_donor: Mapping[str, Mapping[str, float]], save: Path) -> None:
    """Draw a row for each donor, with a mark for each column of numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.add_subplot()
    donors = sorted(by_donor[BY_CONDITION])
    colours = ("#0072B2", "#009E73", "#D55E00", "#E69F00", "#999999")
    for i, ((name, values), colour, marker) in enumerate(zip(by_donor.items(), colours, "o^svD", strict=True)):
        # one below the other: they lie close together
        y = np.arange(len(donors)) + 0.15 * (2 - i)
        ax.scatter([values[d] for d in donors], y, color=colour, marker=marker, label=name, s=18)
    ax.axvline(0.5, color="#999999", linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(donors)), donors)
    ax.set(xlabel="AUROC of stimulated cells inside cell types", ylabel="donor")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper", fontsize=8)
    figure.savefig(save, dpi=150, metadata={"Software": None})


def protocol_section(out: Path, store: FeatureStore, baselines: Mapping[str, FeatureStore]) -> str:
    """The third question: protocol against cell line."""
    matrices = CellMatrices.open(store)
    read = {"SAE": matrices.codes, "gene": matrices.expression}
    read |= {kind: CellMatrices.open(one).codes for kind, one in baselines.items()}
    results = batch_and_type_tests(matrices, PROTOCOL_BATCH)
    features = store.frame("features").sort("feature_id").collect()
    plots.batch_quadrant(store, show=False, save=out / "findings_protocol.png")
    of_batch, of_type = results.of_batch(), results.of_type()
    classes = features["class"].to_numpy()
    kinds = {"protocol": of_batch & ~of_type, "cell line": of_type & ~of_batch, "both": of_batch & of_type}
    counts = pl.DataFrame(
        [
            {"class": name, "features": int((classes == name).sum())}
            | {kind: int((mask & (classes == name)).sum()) for kind, mask in kinds.items()}
            for name in sorted(set(classes))
        ]
    )
    lines = [
        {"what": name, **_farthest(matrices, read, "cell_type", name, "batch")}
        for name in sorted(set(matrices.cells["cell_type"].to_list()))
    ]
    dropseq = {"what": PROTOCOL_BATCH, **_farthest(matrices, read, "batch", PROTOCOL_BATCH, "cell_type")}
    n_held = [
        (holds_on_test(table) & mask).sum() for table, mask in ((results.batch, of_batch), (results.type, of_type))
    ]
    covariates = ", ".join(f"{name} {value:.3f}" for name, value in results.depth.items())
    same_side = results.batch.select((pl.col("test") - 0.5) * (pl.col("at_depth") - 0.5) > 0).to_series().to_numpy()
    return f"""
## Protocol against cell line: Tian et al. 2019, five lines, four batches of CEL-seq2 and one of Drop-seq

The data are {matrices.cells.height:,} cells with the {len(matrices.genes):,} genes that all batches detect.
The mini model knows 4,794 of them and takes at most 1,199 of each cell, at random. Cells are split singly: with only
one Drop-seq batch, batches cannot be held out, and nothing here separates what is particular to Drop-seq from what is
particular to that one batch. The AUROC of Drop-seq is inside cell lines, and that of a line inside batches. A protocol
feature separates Drop-seq inside cell lines on `select` cells at q <= {Q}, and a cell-line feature separates a line
inside batches. The table counts them by class (the rule of the table `features`, from `train` and `select` cells):

{markdown(counts)}
Of {of_batch.sum()} protocol features {n_held[0]} also hold on test cells (same side, p <= {Q}); of {of_type.sum()}
cell-line features {n_held[1]} do. Sequencing depth alone separates Drop-seq inside cell lines with an AUROC of
{covariates}. Inside quartiles of detected genes, which leave {results.pairs_at_depth[0]:,} of
{results.pairs_at_depth[1]:,} pairs of cells, {(same_side & of_batch).sum()} of the protocol features stay on their
side. The best single gene, {results.gene[0]}, has {results.gene[1]:.3f}.

Protocol features, by their q on `select` cells:

{markdown(_feature_rows(features, results, _smallest_q(results.batch, 6)))}
The feature of smallest q for each line:

{markdown(_feature_rows(features, results, _smallest_q_by_type(results)))}
The last table compares the SAE with single genes and the baselines. Of each it takes the feature whose AUROC on
`select` cells is farthest from .5, and shows its AUROC on `test` cells (Drop-seq inside cell lines,
a line inside batches):

{markdown(pl.DataFrame([dropseq, *lines]))}
![Batch against cell context](findings_protocol.png)
"""


def _farthest(matrices: CellMatrices, read: Mapping[str, Any], kind: str, label: str, within: str) -> dict[str, float]:
    """The test AUROC of the column that is farthest from .5 on `select`, turned to be above it there."""
    positive, strata = matrices.is_label(kind, label), matrices.strata(within)
    found = {}
    for name, columns in read.items():
        side = separation(columns, positive, matrices.split("select"), strata) - 0.5
        best = int(np.nanargmax(np.abs(side)))
        test = float(separation(columns[:, [best]].tocsr(), positive, matrices.split("test"), strata)[0])
        found[name] = test if side[best] > 0 else 1 - test
    return found


def _smallest_q(table: pl.DataFrame, n: int) -> list[int]:
    strength = (pl.col("select") - 0.5).abs()
    chosen = table.filter(pl.col("q") <= Q).sort("q", strength, descending=[False, True])
    return chosen["feature_id"].head(n).to_list()


def _smallest_q_by_type(results: BatchAndTypeTests) -> list[int]:
    best = results.type.filter(pl.col("select") > 0.5).sort("q", "feature_id").unique("label", keep="first")
    return best.sort("label")["feature_id"].to_list()


def _feature_rows(features: pl.DataFrame, results: BatchAndTypeTests, chosen: Sequence[int]) -> pl.DataFrame:
    about = features.select("feature_id", "class", "batch_effect", "context_effect", "top_genes").rows(named=True)
    batch, types = results.batch.rows(named=True), results.type.rows(named=True)
    auroc = ["Drop-seq select", "Drop-seq test", "at like depth", "line", "line select", "line test"]
    schema = ["feature", "class", *auroc, "batch effect", "context effect", "genes"]
    rows = [
        (
            i,
            about[i]["class"],
            *(batch[i][name] for name in ("select", "test", "at_depth")),
            *(types[i][name] for name in ("label", "select", "test")),
            about[i]["batch_effect"],
            about[i]["context_effect"],
            " ".join((about[i]["top_genes"] or "-").split()[:6]),
        )
        for i in chosen
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")
