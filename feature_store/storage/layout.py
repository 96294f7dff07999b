"""The layout of a store: its folders, the names of a run's files, and the creation times of runs.

    <root>/cells/<dataset>/        the cell table (one part), with genes/, digests/, expression/ (by gene)
                                   and variable_genes/<id>/
    <root>/matrices/<id>/          sums/  digests/ of a pass over a large matrix, until a data set holds its tables
    <root>/rows/<id>/              parts of whole cells of a matrix that lies otherwise in its file
    <root>/activations/<run>/      plan.json  part-00012.parquet  part-00012.json  MANIFEST.json  genes/  [sample/
                                   chosen_genes/]
    <root>/saes/<run>/             ray_train/  sae.safetensors  config.json  history.json  summary.json  MANIFEST.json
                                   map/{umap,neighbours}/
    <root>/codes/<run>/            by_cell/  by_feature/  [compact/]  stats/  merged/  [top_cells/]
    <root>/associations/<run>/     features/  feature_label/  feature_number/  feature_gene/  feature_geneset/
                                   feature_token/  gene_sets/
                                   measured/ (what these are assembled from, a part per range of features)  map/
    <root>/steering/<run>/         results/  per_cell/  variants/  scores/  [search/  survey/  references/  head/
                                   map/  ...]
    <root>/effects/<run>/          draws/  feature_effect/  feature_effect_summary/
    <root>/circuits/<run>/         draws/  feature_edge/  edge_module/  edge_module_gene_set/
    <root>/inputs/<run>/           draws/  feature_input/  feature_input_summary/
    <root>/probes/<run>/           feature_probe/  probe_score/
    <root>/modules/<run>/          feature_module/  module/  module_gene_set/
    <root>/matches/<run>/          feature_match/
    <root>/comparisons/<run>/      comparison/  representation/
    <root>/commits/                the list of commits: KIND~RUN~TABLE.json, a small file a table
    <root>/data/                   cells that a program gave in memory (`pipelines.given_data`), as .h5ad files
    <root>/mlflow/                 mlflow.db  artifacts/

The root is a folder, or `s3://BUCKET/PREFIX` on object storage: `as_path` makes a path of either, with the interface
of pathlib, and only `filesystem` (the operations) distinguishes them. A run's name is a short hash of the plan that
determines its content (`plans`), so the same request always finds the same folder. Listing a kind reads one folder and
the manifests of its runs (one request each on object storage).

Manifests determine which run is the newest: each holds its creation time, which is later than that of every earlier
manifest, whatever the clock says. Copying a store therefore keeps its defaults.

The list of commits (`commits`) tells a run that is gone from one that never was: a table that is on the list and has no
manifest is damage, which `scsae forget` accepts. Its names alone are read here, by one listing. A manifest that is not
on the list counts like any other.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from feature_store.errors import InputError, IntegrityError, NotFoundError
from feature_store.storage import object_storage
from feature_store.storage.hashing import unsealed

PLAN = "plan.json"
MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"
COMMITS = "commits"
HISTORY = "history.json"
SUMMARY = "summary.json"
MODEL_FILE = "model.json"
SOURCE_FILE = "source.json"
LOCATIONS = {"cells": (SOURCE_FILE,), "activations": (MODEL_FILE,)}
"""Kind of run: the small files beside its table that say where the data set or the model is."""

ASSOCIATION_TABLES = (
    *("features", "feature_label", "feature_number", "feature_gene", "feature_geneset", "feature_token", "gene_sets"),
)
EFFECT_TABLES = ("feature_effect", "feature_effect_summary")
CIRCUIT_TABLES = ("feature_edge", "edge_module", "edge_module_gene_set")
MODULE_TABLES = ("feature_module", "module", "module_gene_set")
INPUT_TABLES = ("feature_input", "feature_input_summary")
PROBE_TABLES = ("feature_probe", "probe_score")
MEASURED_TABLES: Mapping[str, tuple[str, ...]] = {
    "effects": EFFECT_TABLES,
    "circuits": CIRCUIT_TABLES,
    "inputs": INPUT_TABLES,
    "probes": PROBE_TABLES,
    "modules": MODULE_TABLES,
}
"""Kinds of run of which an SAE may have several, which are read together, and the tables of each."""
COMPARISON_TABLES = ("comparison", "representation")
STATISTICS_TABLES = ("feature_gene", "gene", "feature_token", "feature_cell", "firing", "cell")
MERGED_TABLES = ("feature_token", "feature_cell", "firing")
CODES_TABLES = (
    *("by_cell", "by_feature"),
    *(f"stats/{name}" for name in STATISTICS_TABLES),
    *(f"merged/{name}" for name in MERGED_TABLES),
)

# A run counts as complete once all of these exist in its folder.
_COMPLETE_WHEN: Mapping[str, tuple[str, ...]] = {
    "cells": (MANIFEST,),
    "activations": (MANIFEST,),
    "saes": (MANIFEST,),
    "codes": tuple(f"{part}/{MANIFEST}" for part in CODES_TABLES),
    "associations": tuple(f"{table}/{MANIFEST}" for table in ASSOCIATION_TABLES),
    "steering": (f"results/{MANIFEST}",),
    **{kind: tuple(f"{table}/{MANIFEST}" for table in tables) for kind, tables in MEASURED_TABLES.items()},
    "matches": (f"feature_match/{MANIFEST}",),
    "comparisons": tuple(f"{table}/{MANIFEST}" for table in COMPARISON_TABLES),
}
KINDS = tuple(_COMPLETE_WHEN)

MEASURED_BY: Mapping[str, str] = {
    "effects": "scsae effects",
    "circuits": "scsae circuit",
    "inputs": "scsae inputs",
    "probes": "scsae probe",
    "modules": "scsae modules",
}
"""Kinds of MEASURED_TABLES: the command that makes a run."""
_MADE_BY: Mapping[str, str] = {
    "cells": "scsae extract DATA",
    "activations": "scsae extract DATA",
    "saes": "scsae train",
    "codes": "scsae encode",
    "associations": "scsae associate",
    "steering": "scsae steer",
    **MEASURED_BY,
    "matches": "scsae match",
    "comparisons": "scsae compare",
}
_TABLE_MADE_BY: Mapping[tuple[str, ...], str] = {
    ("cells", "expression"): "scsae associate",
    ("saes", "map"): "scsae serve",
    ("codes", "umap"): "scsae serve",
    ("associations", "map"): "scsae serve",
    ("steering", "map"): "scsae serve",
}
"""Tables that another command makes than the one that makes a run of their kind."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BETWEEN, _JSON = "~", ".json"
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
    complete run with a damaged manifest. `lost` are those of the tables that make a run complete which were committed
    and have no manifest any more ("" for a run that is one table); their folders, or that of the run, may be gone too.
    """

    kind: str
    run: str
    path: Path
    complete: bool
    created: datetime | None
    lost: tuple[str, ...] = ()


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

    def expression_dir(self, dataset: str) -> Path:
        """The expression of the panel's cells by gene, beside the cells."""
        return self.cells_dir(dataset) / "expression"

    def digests_dir(self, dataset: str) -> Path:
        """The digests of the cells of a data set, beside them."""
        return self.cells_dir(dataset) / "digests"

    def variable_genes_dir(self, dataset: str, plan: str) -> Path:
        """A choice of the most variable genes of a data set, beside its cells."""
        return self.cells_dir(dataset) / "variable_genes" / plan

    def matrix_dir(self, plan: str) -> Path:
        """What a pass over a matrix has made so far; it is removed when the tables of the data set are complete."""
        return self.root / "matrices" / plan

    def rows_dir(self, plan: str) -> Path:
        """The parts of whole cells of a matrix that does not lie cell by cell in its file; all stages read them."""
        return self.root / "rows" / plan

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
        """Codes: the tables of CODES_TABLES are runs of their own inside."""
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

    def effects_dir(self, run: str) -> Path:
        """Effects of the features of an SAE on predictions of hidden genes."""
        return self.run_dir("effects", run)

    def circuits_dir(self, run: str) -> Path:
        """Edges between the features of two SAEs of one model."""
        return self.run_dir("circuits", run)

    def inputs_dir(self, run: str) -> Path:
        """What the genes of cells do to the features of an SAE."""
        return self.run_dir("inputs", run)

    def probes_dir(self, run: str) -> Path:
        """Probes of labels from the features of an SAE, and from other representations of the same cells."""
        return self.run_dir("probes", run)

    def modules_dir(self, run: str) -> Path:
        """Modules of features that fire together."""
        return self.run_dir("modules", run)

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
        """Return all runs of a kind: the complete ones, newest first, then the incomplete and lost ones by name."""
        folder, listed = self.kind_dir(kind), self.committed(kind)
        there = {path.name: path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
        gone = {run: folder / run for run in listed if run not in there}
        found = [_inspect(kind, path, listed.get(run, set())) for run, path in sorted({**there, **gone}.items())]
        found = [info for info in found if info.run in there or info.lost]
        return sorted(found, key=lambda info: (info.complete, info.created or _NEVER), reverse=True)

    def committed(self, kind: str) -> dict[str, set[str]]:
        """Return the tables of each run of a kind that are on the list of commits ("" for a run that is one table)."""
        tables: dict[str, set[str]] = {}
        for of, run, *table in committed_tables(self.root):
            if of == kind:
                tables.setdefault(run, set()).add("/".join(table))
        return tables

    def is_present(self, table: Path) -> bool:
        """Return whether a table was committed, also if its manifest is gone since (`commit.Run` then says so)."""
        return (table / MANIFEST).is_file() or ((entry := entry_of(table)) is not None and entry.is_file())

    def refuse_lost(self, infos: Sequence[RunInfo]) -> None:
        """Raise IntegrityError if one of these runs was committed and is gone."""
        for info in infos:
            if info.lost:
                raise IntegrityError(lost_message(info.path / info.lost[0]))

    def command_for(self, kind: str) -> str:
        """Return the command that makes a run of a kind in this store."""
        return f"{_MADE_BY[kind]} {self.store_option}"

    @property
    def store_option(self) -> str:
        """The option `--store ROOT` as it is typed in a shell."""
        return f"--store {shlex.quote(str(self.root))}"

    def command_for_table(self, table: Path) -> str:
        """Return the command that makes a table of this store, given by its folder."""
        kind, _, *folders = table.relative_to(self.root).parts
        made_by = _TABLE_MADE_BY.get((kind, *folders[:1]), _MADE_BY[kind])
        return f"{made_by} {self.store_option}"

    def latest(self, kind: str) -> RunInfo:
        """Return the newest complete run.

        Raises:
            IntegrityError: a run was committed and is gone.
            NotFoundError: there is none; it names the incomplete ones and the command that makes one.
        """
        runs = self.runs(kind)
        self.refuse_lost(runs)
        for info in runs:
            if info.complete:
                return info
        state = f"only incomplete ones ({', '.join(info.run for info in runs)})" if runs else "none"
        raise NotFoundError(
            f"no complete run of kind {kind!r} in {self.root}: found {state}; make one with "
            f"`{self.command_for(kind)}` (an interrupted run resumes by running its command again)"
        )


def tables_of(info: RunInfo) -> list[Path]:
    """Return the folders of a run that hold a table, or held one when it was committed."""
    root = info.path.parent.parent
    listed = {root.joinpath(*entry) for entry in committed_tables(root) if entry[:2] == (info.kind, info.run)}
    needed = {(info.path / name).parent for name in _COMPLETE_WHEN[info.kind]}
    found = {file.parent for name in (PLAN, MANIFEST) for file in info.path.rglob(name)}
    return sorted({*needed, *listed, *found})


def needed_tables(kind: str) -> list[str]:
    """Return the tables that make a run of a kind complete ("" for a run that is one table)."""
    return [name.removesuffix(MANIFEST).rstrip("/") for name in _COMPLETE_WHEN[kind]]


def entry_of(table: Path) -> Path | None:
    """Return the file of a table in the list of commits of its store; None for a folder that is in no store."""
    kind = _kind_folder(table)
    if kind is None:
        return None
    return kind.parent / COMMITS / f"{_BETWEEN.join((kind.name, *table.relative_to(kind).parts))}{_JSON}"


def committed_tables(root: Path) -> set[tuple[str, ...]]:
    """Return kind, run and folders of each table on the list of commits of a store, by one listing."""
    try:
        names = [path.name for path in (root / COMMITS).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {tuple(name.removesuffix(_JSON).split(_BETWEEN)) for name in names if name.endswith(_JSON)}


def lost_message(table: Path) -> str:
    """Return the message of an error about a table that was committed and is gone."""
    kind = _kind_folder(table)
    if kind is None:
        return f"{table} was committed and is gone; run its stage again"
    run = table.relative_to(kind).parts[0]
    layout = Layout(kind.parent)
    return (
        f"{kind.name}/{run} was committed and is gone: there is no {table / MANIFEST}; make it again with "
        f"`{layout.command_for(kind.name)}` and the options that it was made with, or, if it was deleted on purpose, "
        f"type `scsae forget {kind.name}/{run} {layout.store_option}`"
    )


def repair_advice(table: Path) -> str:
    """Return what to type where a file of a table is damaged."""
    root = store_of(table)
    command = "" if root is None else f": `{Layout(root).command_for_table(table)}`"
    return f"run its stage again to repair it{command} (`scsae verify RUN` lists all damage)"


def creation_time(manifest: Path) -> datetime | None:
    """Return the creation time of a manifest; None if there is no manifest or it is damaged."""
    try:
        data = manifest.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    key = hashlib.sha256(data).digest()
    if key not in _TIMES:
        try:
            _TIMES[key] = datetime.fromisoformat(unsealed(data)["created"])
        except (KeyError, TypeError, ValueError):
            _TIMES[key] = None
    return _TIMES[key]


_TIMES: dict[bytes, datetime | None] = {}
"""Creation times by the sha256 of the manifest: one of ten thousand shards takes 50 ms to check."""


def next_creation_time(table: Path) -> datetime:
    """Return the creation time for a new manifest of a table (a folder of some run).

    It is the present time, but always later than that of the same table of every other run of its kind in the store,
    so that a clock that was set back, or that of another machine, cannot order a new run before an old one.
    """
    now = datetime.now(tz=UTC)
    kind = _kind_folder(table)
    if kind is None:
        return now
    name = table.relative_to(kind).parts[1:]
    times = [creation_time(run.joinpath(*name, MANIFEST)) for run in kind.iterdir()]
    return max([now, *(time + timedelta(microseconds=1) for time in times if time is not None)])


def store_of(table: Path) -> Path | None:
    """Return the root of the store that a table is in; None for a folder that is in no store."""
    kind = _kind_folder(table)
    return None if kind is None else kind.parent


def _kind_folder(table: Path) -> Path | None:
    """Return the folder of all runs of the kind that a table is of; None for a folder that is in no store."""
    return next((folder for folder in table.parents if folder.name in _COMPLETE_WHEN), None)


def _inspect(kind: str, path: Path, listed: Set[str]) -> RunInfo:
    needed = {name: path / name / MANIFEST for name in needed_tables(kind)}
    missing = [name for name, file in needed.items() if not file.is_file()]
    times = [] if missing else [creation_time(file) for file in needed.values()]
    known = [time for time in times if time is not None]
    # a run with a lost time cannot be ordered
    created = max(known) if known and len(known) == len(times) else None
    lost = tuple(name for name in missing if name in listed)
    return RunInfo(kind=kind, run=path.name, path=path, complete=not missing, created=created, lost=lost)
