"""The page `docs/steering.md` and its figures, from the steering runs that `steering_study` made."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from findings_study.measures import CellMatrices, separation
from findings_study.page import markdown, shrink

from feature_store import FeatureStore
from feature_store.plots import steering_pareto
from feature_store.plots.steering import steering_drawings
from feature_store.storage import commit
from feature_store.storage.plans import SteeringPlan
from pipelines.steering.metrics.intervals import student
from pipelines.steering.plan import MEAN_DIFFERENCE, Null
from pipelines.steering.seeds import MIN_SEEDS, over_seeds
from steering_study.cells import SEEDS
from steering_study.runs import SteeringRun, runs_of_kinds

TARGET_REMAINING = 1 / 3
"""Share of the distance that may remain."""
MAX_LOSS = 0.02
"""Share of a conservation that a mixing may cost."""
MOVE_METRICS = ("remaining", "remaining_corrected", "energy_remaining", "target_votes", "type_accuracy")
MIX_METRICS = (
    "batch_mixing",
    "label_conservation",
    "lobo_accuracy",
    "lobo_macro_f1",
    "scib_batch",
    "scib_bio",
    "scib_total",
)
N_SHOWN = 5
"""Features of each SAE that are shown."""
MIN_CELLS = 10
"""Cells in which a gene was hidden, at least, to be shown."""
NULL_ROLES = ("null", "reconstruction")
KINDS = ("ablate", "scale", "toward", "shift")
RIVALS = (*("random features", "random direction", "mean difference", "centring", "centring within types", "Harmony"),)
"""Conditions beside the kinds of edit; nulls are those of shift."""

HEAD = """\
# Steering real cells

This page is written by `python docs/studies/steering.py --data $SCSAE_DATA --store ROOT --out docs`. SAEs (BatchTopK,
F 1024, k 16, 1,000 steps) steer the mini model; a cell's embedding is the mean over the gene tokens of its last layer.
Each experiment uses several SAEs, each trained with its own seed on its own `train` cells. Features, their number and
the dose are chosen on `select` cells, and every figure is of `test` cells, which nothing was chosen on. Values are
means over the SAEs with 95 % intervals (Student's t). The value of a null is first averaged over its draws (10; 5
in the second experiment on Kang et al. and in those on sc_mixology). The layer of each experiment was chosen on
`select` cells of its first SAE; of Kang et al. these are two donors that the second SAE tests.

`shift` adds, to the code of each token of a cell that is moved, the difference between the mean codes of the two labels
(of the same cell type, from `train` and `select` cells), on the chosen features alone, times the dose; the SAE's error
term stays. There are four nulls: `random features` of matched density, shifted by their own differences; `random
direction`, a step of the same length on every token; `shuffled labels`, for which choice and differences are made anew;
and `reconstruction`, which only replaces x by x_hat. `mean difference` adds the difference of mean activations at the
same site, without any SAE. `mean difference of embeddings` adds it to the output: this is all that the other donors
tell about these. `floor` is the share of the distance that sampling noise alone leaves.

Two more studies have pages of their own: [a drug, by patient](drug.md), and [a cell type that was never seen
stimulated](unseen_type.md).
"""


def write_page(out: Path, by_section: Mapping[str, Sequence[SteeringRun]]) -> Path:
    """Write steering.md and its figures to `out`; return its path. `by_section` has a run of every SAE.

    Sections of a page that is there and that `by_section` does not name are left as they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    page = out / "steering.md"
    sections = sections_of(page.read_text()) if page.exists() else {}
    for name, runs in by_section.items():
        section = kinds_section if name.endswith("kinds") else mix_section if "mixology" in name else move_section
        sections[TITLES[name][0]] = section(out, name, runs)
        for picture in out.glob(f"steering_{name}_*.png"):
            shrink(picture)
    written = [sections[title] for title, _ in TITLES.values() if title in sections]
    page.write_text("\n".join([HEAD, *written]))
    return page


def sections_of(page: str) -> dict[str, str]:
    """The sections of a written page, by title, each as its function returned it."""
    parts = [part.rstrip() for part in re.split(r"\n+(?=## )", page)[1:]]
    return {part.partition("\n")[0].removeprefix("## "): f"\n{part}\n" for part in parts}


def move_section(out: Path, name: str, runs: Sequence[SteeringRun]) -> str:
    """Cells of one label moved to another."""
    title, about = TITLES[name]
    frames = [results_of(run) for run in runs]
    summary = over_seeds(frames)
    pictures = _pictures(out, name, runs[0])
    by_type = summary.filter(
        (pl.col("metric") == "remaining") & (pl.col("role") == "chosen") & (pl.col("group") != "all")
    ).sort("group")
    return f"""
## {title}

{about}

{verdict_of_move(frames)}

{markdown(_table(summary, MOVE_METRICS))}
The share of the distance that remains, for each cell type with enough cells on both sides:

{markdown(by_type.select(pl.col("group").alias("cell type"), "n_seeds", _interval("remaining")))}
Chosen on `select` cells:

{markdown(_chosen(runs, frames))}
{_head_text(runs)}{_features_text(runs)}{pictures}
"""


def mix_section(out: Path, name: str, runs: Sequence[SteeringRun]) -> str:
    """Batches mixed, labels kept."""
    title, about = TITLES[name]
    frames = [results_of(run) for run in runs]
    summary = over_seeds(frames)
    return f"""
## {title}

{about}

{verdict_of_mix(frames)}

{markdown(_table(summary, MIX_METRICS))}
Chosen on `select` cells:

{markdown(_chosen(runs, frames))}
{_pictures(out, name, runs[0])}
"""


def kinds_section(out: Path, name: str, runs: Sequence[SteeringRun]) -> str:
    """Which kind of edit the search took, and what each did on test cells."""
    title, about = TITLES[name]
    of_kinds = [runs_of_kinds(run) for run in runs]
    rows = [_kind_row(kind, runs, of_kinds) for kind in KINDS]
    last = [results_of(found["shift"]) for found in of_kinds]
    rivals = [row for row in RIVALS if all(last_one.filter(condition=row).height for last_one in last)]
    return f"""
## {title}

{about}

{_verdict_of_kinds(runs, of_kinds)}

{markdown(pl.DataFrame(rows))}
Beside them, on the same `test` cells, what needs no features:

{markdown(pl.DataFrame([_rival_row(rival, last) for rival in rivals]))}"""


def _verdict_of_kinds(runs: Sequence[SteeringRun], of_kinds: Sequence[Mapping[str, SteeringRun]]) -> str:
    """Which kind was taken, and whether what it did on select cells holds on test cells."""
    taken = [
        next(kind for kind, one in found.items() if one.id == run.id) for run, found in zip(runs, of_kinds, strict=True)
    ]
    frames = [results_of(run) for run in runs]
    on_test = [_at(frame, "test", frame.filter("chosen").row(0, named=True)) for frame in frames]
    counts = ", ".join(f"{kind} for {taken.count(kind)}" for kind in KINDS if kind in taken)
    best = sum(
        max(found, key=lambda kind: _mixing_on_test(found[kind])) == kind
        for kind, found in zip(taken, of_kinds, strict=True)
    )
    better, kept = sum(mixed > 0 for mixed, *_ in on_test), sum(loss <= MAX_LOSS for *_, loss in on_test)
    so_far = "" if len(runs) == len(SEEDS) else f"{len(runs)} of {len(SEEDS)} SAEs was run so far. "
    return (
        f"{so_far}The search took **{counts}** of {len(runs)} SAEs. On `test` cells the kind that was taken mixes\n"
        f"most of the four for {best}, mixes better than unsteered cells for {better}, and keeps types within 2 %\n"
        f"for {kept}."
    )


def _mixing_on_test(run: SteeringRun) -> float:
    return _value(results_of(run), "batch_mixing", chosen=True)


def _kind_row(kind: str, runs: Sequence[SteeringRun], of_kinds: Sequence[Mapping[str, SteeringRun]]) -> dict[str, Any]:
    """What the chosen point of a kind did, over SAEs: on select cells, where it was chosen, and on test cells."""
    frames = [results_of(found[kind]) for found in of_kinds]
    points = [frame.filter("chosen").row(0, named=True) for frame in frames]
    taken = sum(found[kind].id == run.id for run, found in zip(runs, of_kinds, strict=True))
    on = {
        split: [_at(frame, split, point) for frame, point in zip(frames, points, strict=True)]
        for split in ("select", "test")
    }
    within = sum(loss <= MAX_LOSS for _, _, loss in on["test"])
    return {
        "kind": kind,
        "taken": f"{taken} of {len(runs)}",
        "features, dose": "; ".join(f"{point['n_features']}, {point['dose']:g}" for point in points),
        **{f"mixing, {split}": _changes([mixed for mixed, _, _ in values]) for split, values in on.items()},
        **{f"conservation, {split}": _changes([kept for _, kept, _ in values]) for split, values in on.items()},
        "within 2 %, test": f"{within} of {len(runs)}",
    }


def _rival_row(rival: str, frames: Sequence[pl.DataFrame]) -> dict[str, Any]:
    """What a condition without features did on test cells, over SAEs."""
    values = [_at(frame, "test", frame.filter(condition=rival, split="test").row(0, named=True)) for frame in frames]
    return {
        "condition": rival,
        "mixing, test": _changes([mixed for mixed, _, _ in values]),
        "conservation, test": _changes([kept for _, kept, _ in values]),
    }


def _at(frame: pl.DataFrame, split: str, point: Mapping[str, Any]) -> tuple[float, float, float]:
    """The change of mixing and of conservation at a point, less unsteered, and the share of conservation lost."""
    own = frame.filter(
        pl.col("dose").eq_missing(pl.lit(point["dose"])), split=split, group="all", condition=point["condition"]
    )
    if point["n_features"] is not None:
        own = own.filter(n_features=point["n_features"])
    effects = dict(own.select("metric", "effect").iter_rows())
    return effects["batch_mixing"], effects["label_conservation"], effects["conservation_loss"]


def _changes(values: Sequence[float]) -> str:
    """The mean of changes, one for each SAE, with its 95 % interval."""
    low, high = student(list(values))
    bounds = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{sum(values) / len(values):+.3f}{bounds}"


def results_of(run: SteeringRun) -> pl.DataFrame:
    """The results of a run."""
    return commit.read_table(run.path / "results")


def verdict_of_move(frames: Sequence[pl.DataFrame]) -> str:
    """Whether less than a third of the distance remains, and less than under every null, in words with the figures."""
    left = [_value(frame, "remaining", chosen=True) for frame in frames]
    nulls = [_null_values(frame, "remaining") for frame in frames]
    mean = sum(left) / len(left)
    below = sum(own < min(null.values()) for own, null in zip(left, nulls, strict=True))
    best = {name: sum(null[name] for null in nulls) / len(nulls) for name in nulls[0]}
    nearest = min(best, key=lambda name: best[name])
    said = "**less than a third**" if mean < TARGET_REMAINING else "**not less than a third**"
    each = ", ".join(f"{value:.2f}" for value in left)
    return (
        f"{mean:.2f} of the distance remains (by SAE: {each}): {said}. It is less than under every null for\n"
        f"{below} of {len(left)} SAEs; the nearest null, {nearest}, leaves {best[nearest]:.2f}. "
        + _without_noise(frames)
    )


def _without_noise(frames: Sequence[pl.DataFrame]) -> str:
    """What remains less sampling noise, and what the vector that needs no SAE leaves."""
    if not all(_has(frame, "remaining_corrected") for frame in frames):
        return ""

    def mean(metric: str, **which: Any) -> float:
        return sum(_value(frame, metric, **which) for frame in frames) / len(frames)

    vector = {metric: mean(metric, name=MEAN_DIFFERENCE) for metric in ("remaining", "remaining_corrected")}
    return (
        f"Less sampling noise, {mean('remaining_corrected', chosen=True):.2f} remains.\nThe mean-difference vector, "
        f"which needs no SAE, leaves {vector['remaining']:.2f}, and {vector['remaining_corrected']:.2f} less noise."
    )


def verdict_of_mix(frames: Sequence[pl.DataFrame]) -> str:
    """Whether batches mix better than under every null, and what it costs, in words with the figures."""
    lines = []
    for mixing, kept in (("batch_mixing", "label_conservation"), ("scib_batch", "scib_bio")):
        if not all(_has(frame, mixing) for frame in frames):
            continue
        gains = [_value(f, mixing, chosen=True) - _value(f, mixing, name="unsteered") for f in frames]
        nulls = [max(_null_values(f, mixing).values()) - _value(f, mixing, name="unsteered") for f in frames]
        before = [_value(f, kept, name="unsteered") for f in frames]
        loss = [1 - _value(f, kept, chosen=True) / b for f, b in zip(frames, before, strict=True)]
        beyond = sum(gain > null for gain, null in zip(gains, nulls, strict=True))
        mean_loss = sum(loss) / len(loss)
        lines.append(
            f"- `{mixing}` rises by {sum(gains) / len(gains):+.3f} (the best null: {sum(nulls) / len(nulls):+.3f}),\n"
            f"  more than under every null for {beyond} of {len(frames)} SAEs; `{kept}` "
            + (f"loses {100 * mean_loss:.1f} %, " if mean_loss >= 0 else f"gains {-100 * mean_loss:.1f} %, ")
            + ("within" if mean_loss <= MAX_LOSS else "**beyond**")
            + f" the {100 * MAX_LOSS:.0f} % allowed."
        )
    return "\n".join(lines)


def _table(summary: pl.DataFrame, metrics: Sequence[str], *, group: str = "all") -> pl.DataFrame:
    """A row a condition, a column a metric of a group of cells: mean [low, high] over SAEs."""
    rows = summary.filter((pl.col("group") == group) & pl.col("metric").is_in(metrics) & (pl.col("role") != "trend"))
    known = [metric for metric in metrics if metric in rows["metric"].to_list()]
    wide = rows.with_columns(_interval("text")).pivot(
        "metric", index=["condition", "role"], values="text", aggregate_function="first", maintain_order=True
    )
    order = {role: i for i, role in enumerate(("unsteered", "chosen", "replace", "reconstruction", "null", "baseline"))}
    wide = wide.sort(pl.col("role").replace_strict(order, default=len(order)), maintain_order=True)
    return wide.select("condition", *(pl.col(name).fill_null("-") for name in known))


def _interval(name: str) -> pl.Expr:
    """`mean [low, high]`, two digits; the mean alone of fewer than three SAEs."""

    def said(row: dict[str, float | None]) -> str:
        if row["mean"] is None:
            return "-"
        is_told = row["low"] is not None and (row["n_seeds"] or 0) >= MIN_SEEDS
        bounds = f" [{row['low']:.2f}, {row['high']:.2f}]" if is_told else ""
        return f"{row['mean']:.2f}{bounds}"

    return pl.struct("mean", "low", "high", "n_seeds").map_elements(said, return_dtype=pl.String).alias(name)


def _chosen(runs: Sequence[SteeringRun], frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """What the search of each SAE chose."""
    rows = []
    for run, frame in zip(runs, frames, strict=True):
        point = frame.filter(pl.col("chosen") & (pl.col("split") == "test")).row(0, named=True)
        rows.append({"SAE": str(run.sae), "features": str(point["n_features"]), "dose": point["dose"], "run": run.id})
    return pl.DataFrame(rows)


def _value(frame: pl.DataFrame, metric: str, *, chosen: bool = False, name: str | None = None) -> float:
    own = frame.filter((pl.col("split") == "test") & (pl.col("metric") == metric) & (pl.col("group") == "all"))
    own = own.filter(pl.col("chosen")) if chosen else own.filter(pl.col("condition") == name)
    return float(own["value"][0])


def _null_values(frame: pl.DataFrame, metric: str) -> dict[str, float]:
    own = frame.filter((pl.col("split") == "test") & (pl.col("metric") == metric) & (pl.col("group") == "all"))
    own = own.filter(pl.col("role").is_in(NULL_ROLES) & pl.col("value").is_not_null())
    return {row["condition"]: row["value"] for row in own.iter_rows(named=True)}


def _has(frame: pl.DataFrame, metric: str) -> bool:
    own = frame.filter((pl.col("split") == "test") & (pl.col("metric") == metric) & pl.col("chosen"))
    return own["value"].drop_nulls().len() > 0


def _features_text(runs: Sequence[SteeringRun]) -> str:
    """Whether the features chosen on `select` donors tell the labels inside cell types of donors left out."""
    rows = []
    for run in runs:
        opened, plan = _open_store(run)
        matrices, types = CellMatrices.open(opened), ("cell_type",)
        about = opened.frame("features").select("feature_id", "top_genes").collect()
        best = commit.read_table(run.path / "scores").sort("rank")["feature_id"].head(N_SHOWN).to_list()
        positive = matrices.is_label(plan.kind, plan.target)
        on = {
            split: separation(matrices.codes[:, best], positive, matrices.split(split), matrices.strata(*types))
            for split in ("select", "test")
        }
        for i, feature in enumerate(best):
            genes = about.filter(feature_id=feature)["top_genes"][0] or ""
            row = {"SAE": str(run.sae), "feature": str(feature), "genes": " ".join(genes.split()[:5])}
            rows.append({**row, **{f"{split} AUROC": float(values[i]) for split, values in on.items()}})
    table = pl.DataFrame(rows)
    same = ((pl.col("select AUROC") - 0.5) * (pl.col("test AUROC") - 0.5) > 0).sum()
    return f"""\
The {N_SHOWN} best features of each SAE, chosen on `select` donors, with their AUROC for the label that is moved, inside
cell types, on these donors and on the donors left
out. {table.select(same).item()} of {table.height} are on the same side
on both.

{markdown(table)}
"""


def _open_store(run: SteeringRun) -> tuple[FeatureStore, SteeringPlan]:
    """The store at the associations that a run started from, and the run's plan."""
    plan = SteeringPlan.of(commit.Run.open(run.path / "results"))
    return FeatureStore.open(run.path.parent.parent, associations=plan.associations), plan


def _head_text(runs: Sequence[SteeringRun]) -> str:
    """The genes whose prediction changes most, and how the change goes with the real difference, by SAE."""
    if not all((run.path / "head").exists() for run in runs):
        return ""
    tables = [commit.read_table(run.path / "head") for run in runs]
    agreement = {
        name: [_agreement(table, name) for table in tables] for name in ("shift", *(null.value for null in Null))
    }
    own = tables[0].filter((pl.col("condition") == "shift") & (pl.col("n_cells") >= MIN_CELLS))
    top = own.sort(pl.col("change").abs(), descending=True).head(10)
    said = ";\n".join(f"{name} {', '.join(f'{value:.2f}' for value in values)}" for name, values in agreement.items())
    return f"""\
The model's own head predicts hidden genes of the steered cells. `change` is the change of its
prediction (in bins of expression), `difference` the real difference between the labels, both on the tested cells. The
Spearman correlation of the two over genes, by SAE (for nulls, of their first draw):
{said}.

{markdown(top.select("gene", "n_cells", "change", "difference"))}
"""


def _agreement(table: pl.DataFrame, condition: str) -> float:
    known = table.filter((pl.col("condition") == condition) & (pl.col("n_cells") >= MIN_CELLS))
    known = known.filter(pl.col("draw") == 0).drop_nulls(["change", "difference"])
    return float(known.select(pl.corr("change", "difference", method="spearman")).item())


def _pictures(out: Path, name: str, run: SteeringRun) -> str:
    """The figures of the first SAE's run that the page shows."""
    opened, _ = _open_store(run)
    lines = []
    mixing = partial(steering_pareto, opened, run.id, x="label_conservation", y="batch_mixing")
    drawings = {**steering_drawings(opened, run.id), "mixing": lambda file, show: mixing(save=file, show=show)}
    for kind in [kind for kind in PICTURES[name] if kind in drawings]:
        file = out / f"steering_{name}_{kind}.png"
        drawings[kind](file, show=False)
        lines.append(f"![{kind}, SAE {run.sae}]({file.name})")
    return "\n\n".join(lines)


PICTURES: Mapping[str, Sequence[str]] = {
    "kang": ("curve", "distances", "map", "head"),
    "kang_back": ("curve",),
    "mixology_ablate": ("mixing",),
    "mixology_shift": ("mixing", "pareto"),
    "ctcl": ("curve", "distances"),
}
TITLES: Mapping[str, tuple[str, str]] = {
    "kang": (
        "Kang et al. 2018: stimulated cells to control",
        """\
Interferon-beta-stimulated PBMC of eight donors; four SAEs of layer 2, each tested on two donors (every donor is tested
once). Distances are between means of stimulated and control cells of the tested donors, inside cell types; each type
weighs the same.""",
    ),
    "kang_back": (
        "Kang et al. 2018: control cells to stimulated",
        "The same SAEs move cells the other way round.",
    ),
    "mixology_ablate": (
        "sc_mixology: batch features ablated",
        """\
Five cell lines in five batches of two protocols; three SAEs of layer 1, each with its own splits by cell inside line
and batch. The features with the largest variance between batches inside lines are set to 0 in all cells.""",
    ),
    "mixology_shift": (
        "sc_mixology: batches shifted to their mean",
        """\
The same SAEs and features, shifted in all cells by the difference between the mean over batches and the own batch's
mean code (inside lines of `train` and `select` cells, averaged over lines: the line of a test cell is not used).""",
    ),
    "ctcl": (
        "CTCL skin: cells of patients to those of healthy donors",
        """\
Three patients and three healthy donors; three SAEs of layer 2, each tested on one donor of either side. Disease and
donor are confounded: the distance also holds what any two donors differ in, and a shift by the difference of other
donors can only remove what patients have in common.""",
    ),
    "mixology_kinds": (
        "sc_mixology: which kind of edit mixes batches",
        """\
`scsae steer --kind batch --target all` without `--intervention`: ablate, scale, toward and shift are searched on
`select` cells (10, 50 and 100 features; doses .5, 1 and 1.5, of which scale has .5 alone and ablate none) for the point
that mixes most and loses at most 2 % of the conservation of cell types; the best kind is taken, and each is reported.
SAEs and splits are those of the two sections on sc_mixology above. Figures are changes from unsteered cells, means over
the SAEs, of which several give a 95 % interval.""",
    ),
    "ctcl_kinds": (
        "CTCL skin: which kind of edit mixes donors",
        """\
The same search on skin of three patients and three healthy donors, each a batch, split by cell inside types of donors;
SAEs of layer 2. What is mixed is all that donors differ in, lymphoma included.""",
    ),
}
