"""The layout of a store: its folders, the names of a run's files, and the creation times of runs.

    <root>/cells/<dataset>/        the cell table (one part), with genes/, digests/ and expression/ (by gene)
    <root>/activations/<run>/      plan.json  part-00012.parquet  part-00012.json  MANIFEST.json
    <root>/saes/<run>/             ray_train/  sae.safetensors  config.json  history.json  summary.json  MANIFEST.json
                                   map/{umap,neighbours}/
    <root>/codes/<run>/            by_cell/  by_feature/  stats/{feature_gene,gene,feature_token}/
    <root>/associations/<run>/     features/  feature_label/  feature_number/  feature_gene/  feature_geneset/
                                   feature_token/  gene_sets/
                                   measured/ (what these are assembled from, a part per range of features)  map/
    <root>/steering/<run>/         results/  per_cell/  variants/  scores/  [search/  survey/  references/  head/
                                   map/  ...]
    <root>/matches/<run>/          feature_match/
    <root>/comparisons/<run>/      comparison/  representation/
    <root>/mlflow/                 mlflow.db  artifacts/

The root is a folder, or `s3://BUCKET/PREFIX` on object storage: `as_path` makes a path of either, with the interface
of pathlib, and only `filesystem` (the operations) distinguishes them. A run's name is a short hash of the plan that
determines its content (`plans`), so the same request always finds the same folder. Listing a kind reads one folder and
the manifests of its runs (one request each on object storage).

Manifests determine which run is the newest: each holds its creation time, which is later than that of every earlier
manifest, whatever the clock says. Copying a store therefore keeps its defaults.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from feature_store.errors import InputError, NotFoundError
from feature_store.storage import object_storage

PLAN = "plan.json"
MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"
HISTORY = "history.json"
SUMMARY = "summary.json"

ASSOCIATION_TABLES = (
    *("features", "feature_label", "feature_number", "feature_gene", "feature_geneset", "feature_token", "gene_sets"),
)
COMPARISON_TABLES = ("comparison", "representation")
STATISTICS_TABLES = ("feature_gene", "gene", "feature_token", "cell")

# A run counts as complete once all of these exist in its folder.
_COMPLETE_WHEN: Mapping[str, tuple[str, ...]] = {
    "cells": (MANIFEST,),
    "activations": (MANIFEST,),
    "saes": (MANIFEST,),
    "codes": tuple(
        f"{part}/{MANIFEST}" for part in ("by_cell", "by_feature", *(f"stats/{name}" for name in STATISTICS_TABLES))
    ),
    "associations": tuple(f"{table}/{MANIFEST}" for table in ASSOCIATION_TABLES),
    "steering": (f"results/{MANIFEST}",),
    "matches": (f"feature_match/{MANIFEST}",),
    "comparisons": tuple(f"{table}/{MANIFEST}" for table in COMPARISON_TABLES),
}
KINDS = tuple(_COMPLETE_WHEN)

_MADE_BY: Mapping[str, str] = {
    "cells": "scsae extract DATA",
    "activations": "scsae extract DATA",
    "saes": "scsae train",
    "codes": "scsae encode",
    "associations": "scsae associate",
    "steering": "scsae steer",
    "matches": "scsae match",
    "comparisons": "scsae compare",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CREATED = re.compile(rb'"created":"([0-9T:.+-]{26,32})"')
_NEVER = datetime.min.replace(tzinfo=UTC)


def as_path(root: str | Path) -> Path:
    """Return a folder as a pathlib Path, or `s3://BUCKET/PREFIX` as a path of the same interface.

    Endpoint, region and credentials of object storage are those of the AWS_* environment ($AWS_ENDPOINT_URL for
    anything but AWS) and of ~/.aws. InputError for another protocol or without the extra `s3`,
    NotFoundError if the bucket does not answer (checked once per process).
    """
    if not isinstance(root, str):
        return root
    return object_storage.open_path(root) if "://" in root else Path(root)


def part_name(shard: int) -> str:
    """Return the file name of a shard's Parquet part."""
    return f"part-{shard:05d}.parquet"


def marker_name(shard: int) -> str:
    """Return the file name of a shard's marker, the small JSON file that commits the part."""
    return f"part-{shard:05d}.json"


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One run folder.

    `created` is the latest creation time in the manifests of its tables. It is None for an incomplete run, and for a
    complete run with a damaged manifest whose time is lost.
    """

    kind: str
    run: str
    path: Path
    complete: bool
    created: datetime | None


class Layout:
    """The folders of one store, e.g. `Layout("scsae-store").activations_dir("0f3a...")`. It creates nothing."""

    def __init__(self, root: str | Path) -> None:
        self.root = as_path(root)

    def __repr__(self) -> str:
        return f"Layout({str(self.root)!r})"

    def kind_dir(self, kind: str) -> Path:
        """Folder of all runs of a kind."""
        if kind not in _COMPLETE_WHEN:
            raise InputError(f"unknown kind of run {kind!r}; kinds are {', '.join(KINDS)}")
        return self.root / kind

    def run_dir(self, kind: str, run: str) -> Path:
        """Folder of one run. InputError if `run` could name anything but a folder directly below the kind."""
        if not _NAME.fullmatch(run):
            raise InputError(f"bad name {run!r}; a run or data set name has letters, digits, '.', '_' and '-' only")
        return self.kind_dir(kind) / run

    def cells_dir(self, dataset: str) -> Path:
        """The cell table of a data set."""
        return self.run_dir("cells", dataset)

    def genes_dir(self, dataset: str) -> Path:
        """The gene table of a data set, beside its cells."""
        return self.cells_dir(dataset) / "genes"

    def digests_dir(self, dataset: str) -> Path:
        """The digests of the cells of a data set, beside them."""
        return self.cells_dir(dataset) / "digests"

    def activations_dir(self, run: str) -> Path:
        """Token activations of one site."""
        return self.run_dir("activations", run)

    def saes_dir(self, run: str) -> Path:
        """A trained SAE and the checkpoints of its training."""
        return self.run_dir("saes", run)

    def feature_map_dir(self, run: str) -> Path:
        """The map of an SAE's features, umap/ and neighbours/, beside its weights; it exists once it is computed."""
        return self.saes_dir(run) / "map"

    def codes_dir(self, run: str) -> Path:
        """Codes: by_cell/, by_feature/ and stats/ are runs of their own inside."""
        return self.run_dir("codes", run)

    def umap_dir(self, run: str) -> Path:
        """The map of the cells from their codes, beside the codes; it exists once it is computed."""
        return self.codes_dir(run) / "umap"

    def associations_dir(self, run: str) -> Path:
        """Association tables, each of which is a run folder."""
        return self.run_dir("associations", run)

    def profile_map_dir(self, run: str) -> Path:
        """The map of the features by their labels, beside the associations; it exists once it is computed."""
        return self.associations_dir(run) / "map"

    def steering_dir(self, run: str) -> Path:
        """Steering results."""
        return self.run_dir("steering", run)

    def matches_dir(self, run: str) -> Path:
        """The features of two SAEs matched with each other."""
        return self.run_dir("matches", run)

    def comparisons_dir(self, run: str) -> Path:
        """The comparison of an SAE with its baselines."""
        return self.run_dir("comparisons", run)

    @property
    def local_root(self) -> Path:
        """The folder of files that must be local: the root, or `scsae-local/BUCKET-PREFIX` for object storage."""
        return object_storage.stand_in(self.root)

    @property
    def mlflow_dir(self) -> Path:
        """MLflow's database and artifacts, below `local_root` (unless $MLFLOW_TRACKING_URI names a server)."""
        return self.local_root / "mlflow"

    def runs(self, kind: str) -> list[RunInfo]:
        """Return all runs of a kind: the complete ones, newest first, then the incomplete ones by name."""
        folder = self.kind_dir(kind)
        if not folder.is_dir():
            return []
        found = [_inspect(kind, path) for path in sorted(folder.iterdir()) if path.is_dir()]
        return sorted(found, key=lambda info: (info.complete, info.created or _NEVER), reverse=True)

    def command_for(self, kind: str) -> str:
        """Return the command that makes a run of a kind in this store."""
        return f"{_MADE_BY[kind]} --store {self.root}"

    def latest(self, kind: str) -> RunInfo:
        """Return the newest complete run. NotFoundError names the incomplete ones and the command that makes one."""
        runs = self.runs(kind)
        for info in runs:
            if info.complete:
                return info
        state = f"only incomplete ones ({', '.join(info.run for info in runs)})" if runs else "none"
        raise NotFoundError(
            f"no complete run of kind {kind!r} in {self.root}: found {state}; make one with "
            f"`{self.command_for(kind)}` (an interrupted run resumes by running its command again)"
        )


def tables_of(info: RunInfo) -> list[Path]:
    """Return the folders of a run that have a plan of their own or need one."""
    needed = {(info.path / name).parent for name in _COMPLETE_WHEN[info.kind]}
    return sorted({*needed, *(plan.parent for plan in info.path.rglob(PLAN))})


def creation_time(manifest: Path) -> datetime | None:
    """Return the creation time of a manifest; None if there is no manifest or its time is lost to damage."""
    try:
        found = _CREATED.search(manifest.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if found is None else datetime.fromisoformat(found[1].decode())


def next_creation_time(table: Path) -> datetime:
    """Return the creation time for a new manifest of a table (a folder of some run).

    It is the present time, but always later than that of the same table of every other run of its kind in the store,
    so that a clock that was set back, or that of another machine, cannot order a new run before an old one.
    """
    now = datetime.now(tz=UTC)
    kind = next((folder for folder in table.parents if folder.name in _COMPLETE_WHEN), None)
    if kind is None:
        return now
    name = table.relative_to(kind).parts[1:]
    times = [creation_time(run.joinpath(*name, MANIFEST)) for run in kind.iterdir()]
    return max([now, *(time + timedelta(microseconds=1) for time in times if time is not None)])


def _inspect(kind: str, path: Path) -> RunInfo:
    needed = [path / name for name in _COMPLETE_WHEN[kind]]
    complete = all(file.is_file() for file in needed)
    times = [creation_time(file) for file in needed] if complete else []
    known = [time for time in times if time is not None]
    # a run with a lost time cannot be ordered
    created = max(known) if known and len(known) == len(times) else None
    return RunInfo(kind=kind, run=path.name, path=path, complete=complete, created=created)
