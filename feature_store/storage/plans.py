"""What a run id is made of: one frozen record a stage, which holds everything that determines the bytes of its runs.

A run's id is the first 12 hex digits of the sha256 of its plan, and its plan.json holds that plan, so asking twice for
the same thing finds the same folder, and nothing that changes the content can be left out. Each stage has a version of
its own: it is raised when the content of that stage changes for the same plan, and only runs of that stage, and of what
is made from them, get other ids.

A plan names the runs that its run was made from, and says in `control_of` what control the run is, or descends from
(a baseline, a model with random weights; None for any other). Every stage copies that word from the plan it starts
from: no reader has to follow the parents, which may be deleted.

Values are plain (JSON). Configurations that belong to another package (`sae`, `train`, `config`) are kept as mappings,
made by `as_json` from the records that define them.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, Union, get_args, get_origin, get_type_hints

from feature_store.errors import IntegrityError, OutdatedRunError
from feature_store.storage.hashing import run_id

STAGE, VERSION = "stage", "version"
RANDOM_MODEL = "random-model"
"""The control that a foundation model with random weights is."""
TABLE_KEYS = frozenset({"format_version", STAGE, VERSION, "table", "n_shards", "files"})
"""Keys of plan.json that belong to the table, or to the store, and not to the stage's record."""


class HasPlan(Protocol):
    """What has the content of a plan.json, such as `commit.Run`."""

    @property
    def plan(self) -> Mapping[str, Any]:
        """The content of plan.json."""


def as_json(record: Any) -> Any:
    """Return a record (a dataclass, also nested) as JSON values: mappings, lists, numbers, text."""
    if is_dataclass(record) and not isinstance(record, type):
        return {field.name: as_json(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, Mapping):
        return {str(key): as_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [as_json(value) for value in record]
    return record


def constants_of(modules: Sequence[types.ModuleType]) -> dict[str, Any]:
    """Return the numbers in capitals of modules by `module.NAME`: a plan holds those that the content depends on.

    Names that begin with an underscore are left out: they bound memory and change no result.
    """
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": value
        for module in modules
        for name, value in sorted(vars(module).items())
        if name.isupper() and not name.startswith("_") and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Base of the stages' plans: their JSON, their id, and their reading."""

    stage: ClassVar[str]
    version: ClassVar[int]

    @property
    def id(self) -> str:
        """The run id: 12 hex digits that differ where any field, or the stage's version, differs."""
        return run_id(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the content of plan.json that determines the run."""
        return {STAGE: self.stage, VERSION: self.version, **as_json(self)}

    def table(self, name: str, *, n_shards: int = 1, **details: Any) -> dict[str, Any]:
        """Return the plan.json of one table of the run; `details` are what determines this table alone."""
        return {**self.to_json(), "table": name, "n_shards": n_shards, **as_json(details)}

    @classmethod
    def of(cls, run: HasPlan) -> Self:
        """Return the plan of a run. See `read`."""
        return cls.read(run.plan, where=str(run))

    @classmethod
    def read(cls, content: Mapping[str, Any], *, where: str) -> Self:
        """Return the plan that a plan.json holds; `where` names it in errors.

        Raises:
            OutdatedRunError: it is of another version of the stage.
            IntegrityError: it is of another stage, or a field is missing or of another type.
        """
        found = content.get(STAGE), content.get(VERSION)
        if found[0] == cls.stage and found[1] != cls.version:
            raise OutdatedRunError(
                f"{where} was made by version {found[1]} of the stage {cls.stage!r}; this scsae reads version "
                f"{cls.version}: run the stage again, and delete what you no longer need"
            )
        names = {field.name for field in fields(cls)}
        missing = sorted(
            field.name
            for field in fields(cls)
            if field.name not in content and field.default is MISSING and field.default_factory is MISSING
        )
        if found[0] != cls.stage or missing:
            lacks = f", and lacks {', '.join(missing)}" if missing else ""
            raise IntegrityError(f"{where} has the plan of stage {found[0]!r}, not of {cls.stage!r}{lacks}")
        hints = get_type_hints(cls)
        try:
            return cls(**{name: _value(hints[name], content[name]) for name in names & set(content)})
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{where} has a plan of stage {cls.stage!r} that cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """How the cells of a data set are split: what was asked for, and what came of it (`cells.splits.SplitRecord`)."""

    seed: int
    fractions: tuple[float, ...]
    by: Literal["donor", "batch", "cell"] | None
    unit: str
    n_units: int
    cells: Mapping[str, int]
    units: Mapping[str, int]
    n_batches: int
    n_batches_in_all: int
    n_kept: int
    fallback: str | None


@dataclass(frozen=True, kw_only=True)
class PanelPlan:
    """Which cells of a data set get everything (`cells.panel`). Where all do, only `n_cells` is set, so that the data
    set is the same however many were asked for.
    """

    wanted: int | None
    n_cells: int
    seed: int | None
    strata: tuple[str, ...]
    """The columns of the table `cells` whose combinations are the strata."""
    sha256: str | None
    """Sha256 of the numbers of the drawn cells, as int64."""


@dataclass(frozen=True, kw_only=True)
class CellsPlan(Plan):
    """The cell table of a data set, whose name ends in the beginning of this plan's id."""

    stage = "cells"
    version = 8

    digest: str
    """Sha256 of the content of the files, and of `where`."""
    matrix: str
    value_kind: str
    left_out: Mapping[str, int]
    """Number of features of the files that are no genes, by their type."""
    donor: str | None
    batch: str | None
    cell_type: str | None
    labels: tuple[str, ...]
    numbers: tuple[str, ...]
    """Those of `labels` that are measured as numbers (`cells.label_columns`)."""
    split: SplitPlan
    split_column: str | None
    kept_splits: Mapping[str, str] | None
    """Splits that donors or batches have among the cells of a trained SAE, and keep."""
    kept_cells: str | None
    """Sha256 of the splits that cells have there, and keep."""
    panel: PanelPlan
    sources: tuple[str, ...]
    """Short names of the files where there are several."""
    obs: tuple[str, ...]
    """Sha256 of the content of the tables that obs columns were joined from (`--obs`)."""
    obs_columns: tuple[str, ...]
    """The columns of these tables; they are not in the files."""
    where: str | None
    """The condition by which cells were taken (`--where`)."""


@dataclass(frozen=True, kw_only=True)
class GenesPlan(Plan):
    """The gene table of a data set."""

    stage = "genes"
    version = 6

    dataset: str
    digest: str
    matrix: str
    shard_cells: int
    """Cells of each of the sums that means are made of (`MatrixPlan`)."""


@dataclass(frozen=True, kw_only=True)
class DigestsPlan(Plan):
    """The digests of the cells of a data set."""

    stage = "digests"
    version = 6

    dataset: str
    digest: str
    matrix: str
    n_cells: int
    shard_cells: int

    @property
    def n_shards(self) -> int:
        """Shards of `shard_cells` cells."""
        return -(-self.n_cells // self.shard_cells)


@dataclass(frozen=True, kw_only=True)
class MatrixPlan(Plan):
    """What a pass over the matrix of some files gives, shard by shard, until the tables of a data set hold it."""

    stage = "matrix"
    version = 1

    digest: str
    matrix: str
    n_cells: int
    shard_cells: int

    @property
    def n_shards(self) -> int:
        """Shards of `shard_cells` cells."""
        return -(-self.n_cells // self.shard_cells)


@dataclass(frozen=True, kw_only=True)
class RowsPlan(Plan):
    """Parts of whole cells of a matrix that does not lie cell by cell in its file (`cells.row_parts`)."""

    stage = "rows"
    version = 1

    digest: str
    """Sha256 of the content of the file."""
    matrix: str
    n_cells: int
    n_features: int
    """Features of the matrix, those that are no genes too."""
    shard_cells: int

    @property
    def n_shards(self) -> int:
        """Shards of `shard_cells` cells."""
        return -(-self.n_cells // self.shard_cells)

    def range_of(self, shard: int) -> tuple[int, int]:
        """The cells [start, stop) of a shard."""
        return shard * self.shard_cells, min((shard + 1) * self.shard_cells, self.n_cells)


@dataclass(frozen=True, kw_only=True)
class ExpressionPlan(Plan):
    """The expression of the panel of a data set by gene."""

    stage = "expression"
    version = 6

    dataset: str
    digest: str
    matrix: str
    value_kind: str
    panel: str
    """Sha256 of the indices of the panel's cells."""
    n_cells: int
    """Cells of the panel."""
    n_genes: int
    shard_cells: int
    bounds: tuple[int, ...]
    """Where the ranges of genes begin, and the number of genes."""

    @property
    def n_shards(self) -> int:
        """Shards of `shard_cells` cells."""
        return -(-self.n_cells // self.shard_cells)


@dataclass(frozen=True, kw_only=True)
class TokenOfGenePlan(Plan):
    """The token of each gene, beside the run that it belongs to."""

    stage = "token_of_gene"
    version = 5

    beside: str
    """Sha256 of that run's plan."""


@dataclass(frozen=True, kw_only=True)
class VariableGenesPlan(Plan):
    """The most variable genes of the `train` cells of a data set (`feature_store.cells.variable_genes`)."""

    stage = "variable_genes"
    version = 1

    dataset: str
    digest: str
    matrix: str
    considered: str
    """Sha256 of the gene_idx of the genes that were ranked, as int64."""
    n: int
    """Number of genes that were taken."""
    constants: Mapping[str, Any]
    """Those of `feature_store.cells.variable_genes` and `loess`."""


@dataclass(frozen=True, kw_only=True)
class GeneChoice:
    """The genes that go into the model, where they are chosen."""

    choice: str
    """"hvg:N" or "list"."""
    n_genes: int
    """Number of the model's genes among them."""
    sha256: str
    """Sha256 of the model's names of these genes, sorted, one a line."""


@dataclass(frozen=True, kw_only=True)
class ActivationsPlan(Plan):
    """Activations at one site: of tokens, or one vector a cell."""

    stage = "activations"
    version = 8

    control_of: str | None
    origin: Literal["model", "vectors", "recorded"]
    """Where they come from: a model that scsae ran, vectors of cells that were given, or another program that recorded
    the tokens of its own model. Only the first can be run again."""
    dataset: str
    cells: str | None
    """Sha256 of the cell_idx of the cells, if they are a sample of the data set (`feature_store.cells.draw_cells`)."""
    genes: GeneChoice | None
    """The genes that may be tokens; None: all that the model knows."""
    model: str
    """Name of the model; of given vectors their `--source-name`."""
    model_digest: str
    """Sha256 of all that determines the model's numbers; of given vectors, of the vectors of all cells."""
    site: str
    d_model: int
    dtype: str
    precision: str
    tokens_per_cell: int | None
    readout: str | None
    seed: int
    n_cells: int
    """Cells whose activations are stored."""
    shard_cells: int

    @property
    def n_shards(self) -> int:
        """Shards of `shard_cells` cells."""
        return -(-self.n_cells // self.shard_cells)


@dataclass(frozen=True, kw_only=True)
class SamplePlan(Plan):
    """The cells whose activations are stored, beside them, if they are a sample of the data set."""

    stage = "sample"
    version = 1

    beside: str
    """Sha256 of the plan of the activations."""
    cells: str


@dataclass(frozen=True, kw_only=True)
class ChosenGenesPlan(Plan):
    """The genes that may be tokens, beside the activations, if they are chosen."""

    stage = "chosen_genes"
    version = 1

    beside: str
    """Sha256 of the plan of the activations."""
    sha256: str
    """That of the choice."""


@dataclass(frozen=True, kw_only=True)
class BaselineFit:
    """How a baseline in the form of an SAE is fitted."""

    kind: str
    d_model: int
    k: int
    n_features: int | None
    """Features of those kinds that are given a number of them."""
    fit_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ImportedSAE:
    """The files of another library from which an SAE was imported."""

    format: str
    """Name of the library's format."""
    sha256: str
    """Digest of its two files."""
    input_scale: float | None
    """The number by which activations were multiplied before its training; None: the weights take raw activations."""
    model: str | None
    """The model that the files name."""
    site: str | None
    """The site that the files name, in the words of the library."""
    seed: int
    """Seed of the samples on which it is measured."""


@dataclass(frozen=True, kw_only=True)
class SAEPlan(Plan):
    """A trained SAE (`train`), a baseline in the form of one (`baseline`), or one of another library (`imported`)."""

    stage = "sae"
    version = 5

    control_of: str | None
    activations: str
    dataset: str
    model: str
    model_digest: str
    site: str
    sae: Mapping[str, Any]
    """`sae_core.sae.SAEConfig`."""
    train: Mapping[str, Any]
    """`sae_core.sae.TrainConfig` of a trained SAE, else empty."""
    baseline: BaselineFit | None
    imported: ImportedSAE | None
    n_ranks: int
    recovery_cells: int
    evaluation: Mapping[str, Any]
    """What curves and figures are measured on (`pipelines.training_loop.evaluation_constants`)."""

    @property
    def id(self) -> str:
        """The run id.

        The configuration of a baseline is known after its fit, that of an imported SAE (its k) once it was measured. It
        follows from the rest of the plan and is not part of the id.
        """
        is_trained = self.baseline is None and self.imported is None
        return super().id if is_trained else run_id({**self.to_json(), "sae": {}})

    @property
    def seed(self) -> int:
        """Seed of the samples, and of the weights of a trained SAE."""
        made = self.baseline or self.imported
        return int(self.train["seed"]) if made is None else made.seed

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return int(self.sae["d_model"])

    @property
    def k(self) -> int:
        """Active features per token."""
        return int(self.sae["k"])

    @property
    def n_features(self) -> int:
        """Number of features."""
        return int(self.sae["n_features"])

    @property
    def arch(self) -> str:
        """Architecture."""
        return str(self.sae["arch"])


@dataclass(frozen=True, kw_only=True)
class FusedForward:
    """The forward pass of a fused encoding."""

    model_digest: str
    site: str
    dtype: str
    precision: str
    readout: str | None
    tokens_per_cell: int | None
    seed: int
    matrix: str


@dataclass(frozen=True, kw_only=True)
class CodesCut:
    """How the cells of a data set are divided into the shards of a codes run.

    The first shards are ranges of the panel's cells in their order. They are followed by ranges of all cells, of which
    a shard holds those outside the panel.
    """

    n_cells: int
    n_panel: int
    panel_cells: int
    """Cells of the panel in a shard."""
    other_cells: int
    """Cells in the range of a shard outside the panel."""

    @property
    def n_panel_shards(self) -> int:
        """Shards of the panel."""
        return -(-self.n_panel // self.panel_cells)

    @property
    def n_shards(self) -> int:
        """Shards of all cells; outside the panel there are none if it holds all cells."""
        return self.n_panel_shards + (-(-self.n_cells // self.other_cells) if self.n_panel < self.n_cells else 0)


@dataclass(frozen=True, kw_only=True)
class CodesPlan(Plan):
    """Codes by cell, with the statistics of their tokens."""

    stage = "codes"
    version = 6

    control_of: str | None
    sae: str
    sae_manifest: str
    activations: str
    dataset: str
    n_features: int
    pooling: Literal["max", "mean"]
    level: Literal["cell", "token"]
    keep: int | None
    """Largest codes kept of a cell outside the panel; None if there are no such cells."""
    top_cells: int
    """Cells with the largest codes kept of each feature."""
    top_tokens: int
    """Top-activating tokens kept of each feature."""
    cut: CodesCut
    fused: FusedForward | None


@dataclass(frozen=True, kw_only=True)
class MergedPlan(Plan):
    """The statistics of the features of a codes run over all its cells, merged from those of its shards."""

    stage = "merged"
    version = 1

    codes: str
    """Id of the codes run."""
    made_of: Mapping[str, str]
    """Sha256 of the manifest of each table that is merged."""
    bounds: tuple[int, ...]
    """Where the ranges of features of the parts begin, and the number of features."""


@dataclass(frozen=True, kw_only=True)
class TopCellsPlan(Plan):
    """The tokens of the cell in which each feature of a codes run fires most."""

    stage = "top_cells"
    version = 1

    codes: str
    """Id of the codes run."""
    made_of: str
    """Sha256 of the manifest of the table of the cells with the largest codes."""
    at_once: int
    """Features of a part."""


@dataclass(frozen=True, kw_only=True)
class MapPlan(Plan):
    """A map of cells or features beside the run that it is of."""

    stage = "map"
    version = 4

    made_of: Mapping[str, str]
    """Sha256 of the manifest of each table that is laid out."""
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class GeneSetFile:
    """A collection of gene sets."""

    collection: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class AssociationsPlan(Plan):
    """Associations of features with labels, genes and gene sets."""

    stage = "associations"
    version = 6

    control_of: str | None
    codes: str
    codes_manifest: str
    sae: str
    dataset: str
    gene_sets: tuple[GeneSetFile, ...]
    config: Mapping[str, Any]
    """`feature_store.associations.AssociationConfig`."""
    constants: Mapping[str, Any]
    """The constants that the statistics depend on (`feature_store.associations.constants`)."""


@dataclass(frozen=True, kw_only=True)
class RangesPlan(AssociationsPlan):
    """A table of associations that has a part for each range of features."""

    bounds: tuple[int, ...]
    """Where the ranges begin, and the number of features. They decide nothing but the memory."""


@dataclass(frozen=True, kw_only=True)
class FeaturesMeasured:
    """What the plans of those stages have in common that measure features in the running model."""

    control_of: str | None
    associations: str
    associations_manifest: str
    sae: str
    """The SAE of the features."""
    site: str
    """The site that it reads."""
    dataset: str
    features: tuple[int, ...]
    """The measured features, ascending."""
    cells: int
    """Cells of each feature, of each split that is used."""
    n_nulls: int
    """Null draws of each kind for each feature, or for each of its genes."""
    seed: int
    constants: Mapping[str, Any]
    """Those of the modules that draw, measure and score."""


@dataclass(frozen=True, kw_only=True)
class EffectsPlan(FeaturesMeasured, Plan):
    """What features do to the predictions of hidden genes; the nulls are directions."""

    stage = "effects"
    version = 3


@dataclass(frozen=True, kw_only=True)
class CircuitPlan(FeaturesMeasured, Plan):
    """Which features of a later SAE change when a feature of an earlier one is ablated; the nulls are directions."""

    stage = "circuit"
    version = 3

    to_sae: str
    """The later SAE."""
    to_sae_manifest: str
    to_site: str


@dataclass(frozen=True, kw_only=True)
class InputsPlan(FeaturesMeasured, Plan):
    """What the genes of cells do to features; the nulls are other genes."""

    stage = "inputs"
    version = 2

    n_genes: int
    """Genes of each feature that are tested."""


@dataclass(frozen=True, kw_only=True)
class ProbePlan(Plan):
    """Probes of labels from the features of an SAE, its baselines and genes."""

    stage = "probe"
    version = 1

    associations: str
    associations_manifest: str
    sae: str
    dataset: str
    representations: Mapping[str, str]
    """Associations run of the SAE and of each baseline, by name."""
    n_genes: int
    """Number of the most variable genes, which are a representation too; 0: none."""
    label_kinds: tuple[str, ...]
    ks: tuple[int, ...]
    cells: int
    """Most cells of each split."""
    seed: int
    constants: Mapping[str, Any]
    """Those of the modules that fit and score."""


@dataclass(frozen=True, kw_only=True)
class ModulesPlan(Plan):
    """Modules of features that fire together."""

    stage = "modules"
    version = 1

    associations: str
    associations_manifest: str
    sae: str
    dataset: str
    n_features: int
    """Most features, those of largest variance."""
    cells: int
    """Most cells that the modules are found on, and as many on which they are tested."""
    n_resamples: int
    n_draws: int
    seed: int
    constants: Mapping[str, Any]
    """Those of the modules that find and test."""


@dataclass(frozen=True, kw_only=True)
class MatchPlan(Plan):
    """The features of two SAEs matched with each other."""

    stage = "match"
    version = 4

    saes: tuple[str, str]
    """In the order of their ids."""
    sae_manifests: tuple[str, str]
    codes: tuple[str | None, str | None]
    method: Literal["cosine", "pearson", "spearman"]
    seed: int
    dataset: str | None
    n_null: int | None
    max_cells: int | None
    constants: Mapping[str, Any]
    """Those of `feature_store.associations.matching`."""


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan(Plan):
    """An SAE beside its baselines."""

    stage = "comparison"
    version = 5

    associations: str
    baselines: Mapping[str, str]
    """Associations run of each baseline."""
    constants: Mapping[str, Any]
    """Those of `feature_store.associations.comparison`."""


@dataclass(frozen=True, kw_only=True)
class SteeringPlan(Plan):
    """A steering run."""

    stage = "steering"
    version = 6

    control_of: str | None
    associations: str
    associations_manifest: str
    sae: str
    dataset: str
    site: str
    question: str
    """edit, move or mix."""
    kind: str
    target: str
    toward: str | None
    intervention: str
    by: str | None
    feature: tuple[int, ...]
    grid: tuple[tuple[float, ...], ...]
    gene: tuple[str, ...]
    cells: tuple[str, ...]
    n_nulls: int
    readout: str | None
    """The cell embedding that is evaluated; None for given vectors, which are their own output."""
    max_cells: int
    head: bool
    scib: bool
    seed: int
    config: Mapping[str, Any]
    """Every constant of steering and of its evaluation that results depend on (`pipelines.steering.constants`)."""


@dataclass(frozen=True, kw_only=True)
class SteeringResultsPlan(SteeringPlan):
    """The table of results of a steering run."""

    features: tuple[int, ...]
    """Features of the chosen condition, best first."""
    runs: Mapping[str, str]
    """Sha256 of the manifest of the cells that were run, by split."""


def _value(hint: Any, value: Any) -> Any:
    """A JSON value as the type of a field."""
    if value is None:
        return None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _value(next(one for one in arguments if one is not type(None)), value)
    if origin is tuple:
        inner = arguments[:1] * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        return tuple(_value(one, item) for one, item in zip(inner, value, strict=True))
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        return hint(**{name: _value(hints[name], item) for name, item in value.items()})
    return value


__all__ = [name for name, found in list(globals().items()) if isinstance(found, type) and is_dataclass(found)]
