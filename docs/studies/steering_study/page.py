"""The page `docs/steering.md` and its figures, from the steering runs that `steering_study` made."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from findings_study.answers import Asked, separation
from findings_study.page import markdown, shrink

from feature_store import FeatureStore
from feature_store.plots import steering_pareto
from feature_store.plots.steered import steering_drawings
from feature_store.storage import commit
from pipelines.steering.plan import MEAN_DIFFERENCE, NULLS
from pipelines.steering.seeds import MIN_SEEDS, over_seeds
from steering_study.runs import Answer

WANTED = 1 / 3
"""Share of the distance that may remain."""
MAX_LOSS = 0.02
"""Share of a conservation that a mixing may cost."""
MOVED = ("remaining", "remaining_corrected", "energy_remaining", "target_votes", "type_accuracy")
MIXED = (
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
MIN_ASKED = 10
"""Cells in which a gene was hidden, at least, to be shown."""
NULL_ROLES = ("null", "reconstruction")

HEAD = """\
# Steering real cells

Written by `python docs/studies/steering.py --data $SCSAE_DATA --store ROOT --out docs`: SAEs (BatchTopK, F 1024,
k 16, 1,000 steps) inside the mini model, cells read as the mean over gene tokens of its last layer. Each question is
asked of several SAEs, each trained with its own seed on its own `train` cells; features, their number and the dose are
searched on `select` cells, and every figure is of `test` cells, which nothing was chosen on. Values are means over the
SAEs with 95 % intervals (Student's t); of a null, over its draws first (10; 5 of the way back and of sc_mixology). The
layer of each question was chosen on `select` cells of its first SAE; of Kang et al. these are two donors that the
second SAE tests.

What is done: `shift` adds, to the code of each token of a cell to be moved, the difference between the mean codes of
the two labels (of the same cell type, from `train` and `select` cells), on the chosen features alone, times the dose;
the SAE's error term stays. Nulls: `random features` of matched density, shifted by their own differences; `random
direction`, the same step length on every token; `shuffled labels`, with choice and differences made anew;
`reconstruction`, which changes nothing but replaces x by x_hat. `mean difference` adds the difference of mean
activations at the same site, without any SAE; `mean difference of embeddings` adds it to the output, and is what the
other donors know of these at all. `floor` is what sampling noise alone leaves of the distance.
"""


def write_page(out: Path, asked: Mapping[str, Sequence[Answer]]) -> Path:
    """Write steering.md and its figures to `out`; return its path. `asked`: runs by question, a run an SAE."""
    out.mkdir(parents=True, exist_ok=True)
    sections = [HEAD]
    for name, answers in asked.items():
        section = mixed_section if name.startswith("mixology") else moved_section
        sections.append(section(out, name, answers))
    for picture in out.glob("steering_*.png"):
        shrink(picture)
    page = out / "steering.md"
    page.write_text("\n".join(sections))
    return page


def moved_section(out: Path, name: str, answers: Sequence[Answer]) -> str:
    """Cells of one label moved to another."""
    title, about = TITLES[name]
    frames = [results_of(answer) for answer in answers]
    summary = over_seeds(frames)
    pictures = _pictures(out, name, answers[0])
    by_type = summary.filter(
        (pl.col("metric") == "remaining") & (pl.col("role") == "chosen") & (pl.col("group") != "all")
    ).sort("group")
    return f"""
## {title}

{about}

{verdict_of_move(frames)}

{markdown(_table(summary, MOVED))}
By cell type (those with cells enough on both sides), the share of the distance that remains:

{markdown(by_type.select(pl.col("group").alias("cell type"), "n_seeds", _interval("remaining")))}
Chosen on `select` cells:

{markdown(_chosen(answers, frames))}
{_head_text(answers)}{_features_text(answers)}{pictures}
"""


def mixed_section(out: Path, name: str, answers: Sequence[Answer]) -> str:
    """Batches mixed, labels kept."""
    title, about = TITLES[name]
    frames = [results_of(answer) for answer in answers]
    summary = over_seeds(frames)
    return f"""
## {title}

{about}

{verdict_of_mix(frames)}

{markdown(_table(summary, MIXED))}
Chosen on `select` cells:

{markdown(_chosen(answers, frames))}
{_pictures(out, name, answers[0])}
"""


def results_of(answer: Answer) -> pl.DataFrame:
    """The results of a run."""
    return commit.read_table(answer.path / "results")


def verdict_of_move(frames: Sequence[pl.DataFrame]) -> str:
    """Whether less than a third of the distance remains, and less than under every null, in words with the figures."""
    left = [_value(frame, "remaining", chosen=True) for frame in frames]
    nulls = [_of_nulls(frame, "remaining") for frame in frames]
    mean = sum(left) / len(left)
    below = sum(own < min(null.values()) for own, null in zip(left, nulls, strict=True))
    best = {name: sum(null[name] for null in nulls) / len(nulls) for name in nulls[0]}
    nearest = min(best, key=lambda name: best[name])
    said = "**less than a third**" if mean < WANTED else "**not less than a third**"
    each = ", ".join(f"{value:.2f}" for value in left)
    return (
        f"{mean:.2f} of the distance remains (by SAE: {each}): {said}. It is less than under every null for\n"
        f"{below} of {len(left)} SAEs; the nearest null, {nearest}, leaves {best[nearest]:.2f}. {_beside(frames)}"
    )


def _beside(frames: Sequence[pl.DataFrame]) -> str:
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
        nulls = [max(_of_nulls(f, mixing).values()) - _value(f, mixing, name="unsteered") for f in frames]
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


def _table(summary: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """A row a condition, a column a metric: mean [low, high] over SAEs."""
    rows = summary.filter((pl.col("group") == "all") & pl.col("metric").is_in(metrics) & (pl.col("role") != "trend"))
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


def _chosen(answers: Sequence[Answer], frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """What the search of each SAE chose."""
    rows = []
    for answer, frame in zip(answers, frames, strict=True):
        point = frame.filter(pl.col("chosen") & (pl.col("split") == "test")).row(0, named=True)
        rows.append(
            {"SAE": str(answer.unit), "features": str(point["n_features"]), "dose": point["dose"], "run": answer.run}
        )
    return pl.DataFrame(rows)


def _value(frame: pl.DataFrame, metric: str, *, chosen: bool = False, name: str | None = None) -> float:
    own = frame.filter((pl.col("split") == "test") & (pl.col("metric") == metric) & (pl.col("group") == "all"))
    own = own.filter(pl.col("chosen")) if chosen else own.filter(pl.col("condition") == name)
    return float(own["value"][0])


def _of_nulls(frame: pl.DataFrame, metric: str) -> dict[str, float]:
    own = frame.filter((pl.col("split") == "test") & (pl.col("metric") == metric) & (pl.col("group") == "all"))
    own = own.filter(pl.col("role").is_in(NULL_ROLES) & pl.col("value").is_not_null())
    return {row["condition"]: row["value"] for row in own.iter_rows(named=True)}


def _has(frame: pl.DataFrame, metric: str) -> bool:
    own = frame.filter((pl.col("split") == "test") & (pl.col("metric") == metric) & pl.col("chosen"))
    return own["value"].drop_nulls().len() > 0


def _features_text(answers: Sequence[Answer]) -> str:
    """Whether the features chosen on `select` donors tell the labels inside cell types of donors left out."""
    rows = []
    for answer in answers:
        opened, plan = _opened(answer)
        asked, types = Asked.open(opened), ("cell_type",)
        about = opened.frame("features").select("feature_id", "top_genes").collect()
        best = commit.read_table(answer.path / "scores").sort("rank")["feature_id"].head(N_SHOWN).to_list()
        positive = asked.is_label(plan["kind"], plan["target"])
        on = {
            split: separation(asked.codes[:, best], positive, asked.split(split), asked.strata(*types))
            for split in ("select", "test")
        }
        for i, feature in enumerate(best):
            genes = about.filter(feature_id=feature)["top_genes"][0] or ""
            row = {"SAE": str(answer.unit), "feature": str(feature), "genes": " ".join(genes.split()[:5])}
            rows.append({**row, **{f"{split} AUROC": float(values[i]) for split, values in on.items()}})
    table = pl.DataFrame(rows)
    same = ((pl.col("select AUROC") - 0.5) * (pl.col("test AUROC") - 0.5) > 0).sum()
    return f"""\
The {N_SHOWN} best features of each SAE, chosen on `select` donors: AUROC for the label to be moved, inside cell types,
on these and on the donors left out. {table.select(same).item()} of {table.height} are on the same side on both.

{markdown(table)}
"""


def _opened(answer: Answer) -> tuple[FeatureStore, dict[str, Any]]:
    """The store at the associations that a run started from, and the run's plan."""
    plan = commit.Run.open(answer.path / "results").plan
    return FeatureStore.open(answer.path.parent.parent, associations=plan["associations"]), plan


def _head_text(answers: Sequence[Answer]) -> str:
    """The genes whose prediction changes most, and how the change goes with the real difference, by SAE."""
    if not all((answer.path / "head").exists() for answer in answers):
        return ""
    tables = [commit.read_table(answer.path / "head") for answer in answers]
    asked = {name: [_agreement(table, name) for table in tables] for name in ("shift", *NULLS)}
    own = tables[0].filter((pl.col("condition") == "shift") & (pl.col("n_cells") >= MIN_ASKED))
    top = own.sort(pl.col("change").abs(), descending=True).head(10)
    said = ";\n".join(f"{name} {', '.join(f'{value:.2f}' for value in values)}" for name, values in asked.items())
    return f"""\
What the model itself now says: its own head is asked about hidden genes of the steered cells. `change` is that of its
answer (in bins of expression), `difference` the real one between the labels, on the tested cells. Spearman correlation
of the two over genes, by SAE (of nulls, their first draw):
{said}.

{markdown(top.select("gene", "n_cells", "change", "difference"))}
"""


def _agreement(table: pl.DataFrame, condition: str) -> float:
    known = table.filter((pl.col("condition") == condition) & (pl.col("n_cells") >= MIN_ASKED))
    known = known.filter(pl.col("draw") == 0).drop_nulls(["change", "difference"])
    return float(known.select(pl.corr("change", "difference", method="spearman")).item())


def _pictures(out: Path, name: str, answer: Answer) -> str:
    """The figures of the first SAE's run that the page shows."""
    opened, _ = _opened(answer)
    lines = []
    mixing = partial(steering_pareto, opened, answer.run, x="label_conservation", y="batch_mixing")
    drawings = {**steering_drawings(opened, answer.run), "mixing": lambda file, show: mixing(save=file, show=show)}
    for kind in [kind for kind in PICTURES[name] if kind in drawings]:
        file = out / f"steering_{name}_{kind}.png"
        drawings[kind](file, show=False)
        lines.append(f"![{kind}, SAE {answer.unit}]({file.name})")
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
        "The same SAEs the other way round.",
    ),
    "mixology_ablate": (
        "sc_mixology: batches taken away by ablation",
        """\
Five cell lines in five batches of two protocols; three SAEs of layer 1, each with its own splits by cell inside line
and batch. The features with the largest variance between batches inside lines are set to 0 in all cells.""",
    ),
    "mixology_shift": (
        "sc_mixology: batches moved to their mean",
        """\
The same SAEs and features, shifted in all cells by the difference between the mean over batches and the own batch's
mean code (inside lines of `train` and `select` cells, averaged over lines: the line of a test cell is not used).""",
    ),
    "ctcl": (
        "CTCL skin: cells of patients to those of healthy donors",
        """\
Three patients and three healthy donors; three SAEs of layer 2, each tested on one of either side. Disease and donor are
confounded: the distance holds what any two donors differ in, and shifting by other donors' difference can only take
away what patients have in common.""",
    ),
}
