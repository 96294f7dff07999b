"""The tables of `scsae models`: all versions with their metrics, and the origin and evaluations of one version."""

from pathlib import Path
from typing import Any

import polars as pl

from feature_store.query.metrics import COMPARED_BY
from feature_store.storage.layout import Layout
from pipelines.runtime.output import Destination
from pipelines.tracking import RUN_TAG, ModelVersion, Promotion, Tracking
from pipelines.tracking.promotion import scores_of
from pipelines.tracking.registry import ANSWER

TRAINING = ("test_fvu", "select_fvu", "select_l0", "select_dead_fraction")
IDENTITY = ("name", "version", "alias")
LINEAGE = ("sae run", "activations", "data set", "model digest")


def versions_frame(store: Path) -> pl.DataFrame:
    """Registered SAEs, one row a version, a column a headline figure of steering on `test` cells."""
    tracking = Tracking.existing(Layout(store))
    versions = tracking.versions()
    scores = [scores_of(tracking, version) for version in versions]
    steering = {label: None for found in scores for label, score in found.items() if score.evaluation}
    rows = [
        {
            "name": v.name,
            "version": v.version,
            "alias": ", ".join(v.aliases),
            **{key: v.metrics.get(key) for key in TRAINING},
            **{label: found[label].value if label in found else None for label in steering},
            "sae run": v.tags.get(RUN_TAG),
            "activations": v.tags.get("scsae.activations"),
            "data set": v.tags.get("scsae.dataset"),
            "model digest": v.tags.get("scsae.model_digest", "")[:12],
        }
        for v, found in zip(versions, scores, strict=True)
    ]
    if not rows:
        return pl.DataFrame(schema=dict.fromkeys((*IDENTITY, *TRAINING, *LINEAGE), pl.String))
    return pl.DataFrame(rows, infer_schema_length=None)


def for_people(versions: pl.DataFrame) -> pl.DataFrame:
    """The same in few columns: in `steering on test cells` the figure of each evaluation that decides, a line each."""
    labels = [name for name in versions.columns if name not in (*IDENTITY, *TRAINING, *LINEAGE)]
    first = {label.partition(" ")[2]: label for label in reversed(labels)}
    decides = dict(sorted(first.items()))
    said = [
        "; ".join(
            f"{label.partition(' ')[0]} {row[label]:.3f} {of}"
            for of, label in decides.items()
            if row[label] is not None
        )
        for row in versions.iter_rows(named=True)
    ]
    steering = pl.Series("steering on test cells", said, dtype=pl.String)
    return versions.select(*IDENTITY, "test_fvu", steering, "sae run", "data set")


def version_facts(store: Path, name: str, version: int) -> dict[str, dict[str, Any]]:
    """Facts of one version by what they are of: its lineage, then every steering evaluation, newest first."""
    from pipelines.tracking.provenance import origin_of

    layout = Layout(store)
    tracking = Tracking.existing(layout)
    found = tracking.version(name, version)
    return {**origin_of(layout, found), **_evaluations(tracking, found)}


def write_version(facts: dict[str, dict[str, Any]], to: Destination, *, every: bool = False) -> None:
    """Write the facts of one version: in parts for people, else a row a fact, in text of every digit.

    every: print all metrics of each evaluation too, and not only those that compare versions.
    """
    from pipelines.runtime.output import console
    from pipelines.runtime.reports import print_facts

    if to.is_printed_table:
        for part, own in facts.items():
            console().print(part, style="bold")
            shown = {key: value for key, value in own.items() if every or _is_shown(key, value)}
            print_facts({f"  {key}": value for key, value in shown.items()})
        if not every:
            console().print("every metric of each evaluation: the same command with --all, or --format csv")
        return
    rows = [
        (part, key, None if value is None else str(value)) for part, own in facts.items() for key, value in own.items()
    ]
    to.write(pl.DataFrame(rows, schema={"part": pl.String, "fact": pl.String, "value": pl.String}, orient="row"))


def _is_shown(key: str, value: Any) -> bool:
    """Return whether a fact is printed without --all: what is there, and of the metrics those that compare versions."""
    is_metric = "/" in key
    return value is not None and (not is_metric or key in {f"{ANSWER}/{name}" for name in COMPARED_BY})


def promotion_facts(promoted: Promotion) -> dict[str, Any]:
    """What `scsae models promote` says."""
    found = promoted.version
    facts: dict[str, Any] = {"name": found.name, "version": found.version, "aliases": ", ".join(found.aliases)}
    if promoted.metric is not None:
        facts[promoted.metric] = promoted.value
    if promoted.over is not None:
        facts[f"of version {promoted.over}, the champion before"] = promoted.value_of_champion
    return facts | ({"note": promoted.note} if promoted.note else {})


def _evaluations(tracking: Tracking, version: ModelVersion) -> dict[str, dict[str, Any]]:
    return {
        f"evaluation {found.run}": {
            "question": found.task,
            "dataset": found.dataset,
            **{
                key: found.params[key]
                for key in ("intervention", "chosen.n_features", "chosen.dose")
                if key in found.params
            },
            "mlflow_run": found.mlflow_run,
            **found.metrics,
        }
        for found in tracking.evaluations(version.tags.get(RUN_TAG, ""))
    }
