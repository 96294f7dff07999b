"""Options of every stage, and the recipe that strings stages together.

One fact, one home: the docstring under a field is its help on the command line. pydantic lives here
alone, at the edge: a stage receives a checked, frozen object. Unknown keys are errors and name the nearest.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from pipelines.errors import UsageError

DEFAULT_STORE = Path("scsae-store")
T = TypeVar("T", bound="Options")
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `256MB` (decimal units); raise UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)\s*", text, flags=re.IGNORECASE)
    if not found:
        raise UsageError(f"a size was given as {text!r}; write a number and one of {', '.join(SIZE_UNITS)}, e.g. 256MB")
    return int(float(found[1]) * SIZE_UNITS[found[2].upper()])


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


Files = Annotated[tuple[Path, ...], pydantic.BeforeValidator(_one_or_many)]
"""Paths; a recipe may name one without a list around it."""
Arch = Literal["batchtopk", "matryoshka", "topk", "jumprelu", "gated", "standard"]
BaselineKind = Literal["neurons", "pca", "ica", "random", "random-model"]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
FeatureId = Annotated[int, Field(ge=0)]
Dose = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Options(BaseModel):
    """Base of every stage's options: frozen, strict about names, documented field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True)


class ActorOptions(Options):
    """How many actors share the shards, and what each of them gets."""

    num_actors: int | None = Field(default=None, ge=1)
    """Ray actors; default: as many as the cluster has room for."""
    num_cpus: int = Field(default=1, ge=1)
    """CPU cores of each actor."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each actor; 0 computes on the CPU."""


class ForwardOptions(ActorOptions):
    """How much of each cell the foundation model's forward pass gives, and how it is cut into shards."""

    tokens_per_cell: int | None = Field(default=None, ge=1)
    """Keep a seeded sample of this many tokens of each cell; default: all of them."""
    shard_cells: int | None = Field(default=None, ge=1)
    """Cells per shard."""
    shard_size: str | None = None
    """Size of a shard, e.g. 256MB, turned into cells per shard; default: 256MB, or a 16th of the cells if less."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Most tokens of one forward pass; halved by itself where memory runs out."""

    @pydantic.model_validator(mode="after")
    def _one_shard_rule(self) -> "ForwardOptions":
        if self.shard_cells is not None and self.shard_size is not None:
            raise ValueError("shard_cells and shard_size were both given; give one of them")
        if self.shard_size is not None:
            parse_size(self.shard_size)
        return self


class CellOptions(Options):
    """What the columns of obs mean."""

    donor: str | None = None
    """obs column of the donor: the unit of splits and of statistics."""
    batch: str | None = None
    """obs column of the batch."""
    cell_type: str | None = None
    """obs column of the cell type."""
    label: tuple[str, ...] = ()
    """Further obs column to associate features with, e.g. condition; may be repeated."""
    split: str | None = None
    """obs column that says train, select or test of each cell. Default: whole donors, else batches, are dealt to the
    splits; in other data than the SAE's, those that it knows keep theirs."""


class DataOptions(Options):
    """Which cells, and how they are read."""

    data: Files = Field(min_length=1)
    """The .h5ad files (or AnnData .zarr folders) that hold the cells. Several are one data set, in the order given:
    their genes are joined, obs gets a column `file`, and a donor of the same name is one donor in all of them."""
    matrix: str | None = None
    """Matrix to read: X, raw or layers/NAME; of several files one for all, or one for each, comma-separated. Default:
    the one that holds counts, else log-normalised values."""
    model: str = "mini"
    """Foundation model: a checkpoint folder, or `mini`, the one the project ships."""
    random_init: bool = False
    """Draw the model's weights at random instead of loading them: the control."""
    precision: Literal["f32", "bf16"] = "f32"
    """Matrix products of the model: f32, or bf16 (autocast), which is several times faster where there is hardware."""


class ExtractOptions(DataOptions, CellOptions, ForwardOptions):
    """Run the foundation model over the cells and keep the activations of its tokens."""

    layer: tuple[str, ...] = Field(default=(), min_length=0)
    """Where to read: a layer index (0 is the first block's output) or a site such as attention.2; may be repeated."""
    readout: str | None = None
    """Keep one vector a cell instead of its tokens: a readout of the model, such as mean or cls."""
    dtype: Literal["f16", "bf16", "f32"] = "f16"
    """Storage type of the activations."""
    seed: int = Field(default=0, ge=0)
    """Seed of splits, token samples and ties."""

    @pydantic.model_validator(mode="after")
    def _tokens_or_cells(self) -> "ExtractOptions":
        if self.readout is not None and self.tokens_per_cell is not None:
            raise ValueError("readout keeps one vector a cell and tokens_per_cell some of its tokens; give one of them")
        return self


class TrainOptions(Options):
    """Fit a sparse autoencoder to stored activations, as a Ray Train job."""

    activations: str | None = None
    """Activations run to train on; default: the newest."""
    arch: Annotated[tuple[Arch, ...], pydantic.BeforeValidator(_one_or_more)] = Field(
        default=("batchtopk",), min_length=1
    )
    """Architecture of the autoencoder: batchtopk, matryoshka, topk, jumprelu, gated or standard. May be repeated, as k
    and l1_coefficient may: all combinations are trained on one read of the activations, each as a run of its own."""
    n_features: int | None = Field(default=None, ge=1)
    """Number of features F; default: 8 times the model's width."""
    k: Annotated[tuple[Positive, ...], pydantic.BeforeValidator(_one_or_more)] = Field(default=(16,), min_length=1)
    """Active features per token, a whole number; without effect on gated and standard. May be repeated."""
    l1_coefficient: Annotated[tuple[PositiveFloat, ...], pydantic.BeforeValidator(_one_or_more)] = ()
    """Weight of the L1 loss of gated and standard, which decides how many features are active; default: 0.2. May be
    repeated."""
    groups: tuple[PositiveFloat, ...] = ()
    """matryoshka: share of the features in each nested group, repeated from the first on; they add up to 1. Default:
    1/16, 1/16, 1/8, 1/4, 1/2."""
    encoder_precision: Literal["f32", "bf16"] = "f32"
    """Product that ranks the features of a token: f32, or bf16, which is about twice as fast a step and leaves values
    and gradients in f32."""
    n_steps: int = Field(default=3000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=2048, ge=1)
    """Tokens per step."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; default: 5e-3, less for more than 1,024 features."""
    warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps over which the learning rate rises; default: 0.05."""
    decay_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps, at the end, over which it falls to 0; default: 0.3."""
    sparsity_warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps over which the sparsity loss of jumprelu, gated and standard sets in; default: 0.1."""
    dead_window_tokens: int | None = Field(default=None, ge=1)
    """Tokens without firing after which a feature counts as dead; default: a 20th of all tokens of the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights and of the shuffle."""
    checkpoint_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    recovery_cells: int = Field(default=32, ge=0)
    """Cells of `select` on which to measure what the model loses when x_hat replaces its activations; 0: none."""
    num_workers: int = Field(default=1, ge=0)
    """Ray Train workers, which share each step's tokens; 0 runs the same loop in the driver's process (starts 20 s
    sooner)."""
    num_cpus: int = Field(default=1, ge=1)
    """CPU cores of each worker; more than one pays on cores that nothing else uses."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each worker."""
    name: str | None = None
    """Name in the model registry; default: sae-MODEL-SITE."""


class EncodeOptions(CellOptions, ForwardOptions):
    """Turn activations into sparse codes and token statistics: stored ones, or fused with the forward pass."""

    sae: str | None = None
    """SAE run to encode with; default: the newest."""
    pooling: Literal["max", "mean"] = "max"
    """How the codes of a cell's tokens become the cell's code."""
    level: Literal["cell", "token"] = "cell"
    """Store the codes of cells, or of every token (as many times larger as a cell has tokens)."""
    fused: bool = False
    """Run the foundation model again over all cells and encode at once; nothing but codes is stored."""
    data: Files = ()
    """Encode the cells of another .h5ad or .zarr instead (fused); may be repeated."""
    matrix: str | None = None
    """Matrix of `data` to read: X, raw or layers/NAME; default as in extract."""

    @pydantic.model_validator(mode="after")
    def _fused_options(self) -> "EncodeOptions":
        """Options that only a forward pass, or only other data, can follow."""
        fields = type(self).model_fields
        given = {name for name, field in fields.items() if getattr(self, name) != field.default}
        of_data = sorted(given & {"matrix", *CellOptions.model_fields})
        if of_data and not self.data:
            raise ValueError(f"{', '.join(of_data)} describe other data; give data, or leave them out")
        of_forward = sorted(given & (set(ForwardOptions.model_fields) - set(ActorOptions.model_fields)))
        if of_forward and not (self.fused or self.data):
            raise ValueError(f"{', '.join(of_forward)} need a forward pass; give fused, or leave them out")
        return self


class AssociateOptions(CellOptions, ForwardOptions):
    """Associate features with labels, batches, genes and gene sets."""

    codes: str | None = None
    """Codes run to associate; default: the newest. With `data` give `sae` instead."""
    sae: str | None = None
    """SAE run that encodes `data`; default: the newest. Without `data` give `codes` instead."""
    gmt: tuple[Path, ...] = ()
    """Gene sets as GMT files; may be repeated. Default: the small file of canonical immune programs."""
    data: Files = ()
    """Encode the cells of another .h5ad or .zarr with a trained SAE first (fused) and associate its features with them;
    may be repeated."""
    matrix: str | None = None
    """Matrix of `data` to read: X, raw or layers/NAME; default as in extract."""
    range_size: str = "600MB"
    """Memory of an actor for the codes of a range of features. Each range goes over the expression of all cells once,
    so where codes are larger than this by far, more memory is less work."""

    @pydantic.field_validator("range_size")
    @classmethod
    def _a_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @pydantic.model_validator(mode="after")
    def _of_other_data(self) -> "AssociateOptions":
        """Options that only other data can follow, and the one that they replace."""
        if self.data and self.codes is not None:
            raise ValueError(f"codes was {self.codes!r}, but data are encoded first; name their SAE with sae")
        if self.sae is not None and not self.data:
            raise ValueError(
                f"sae was {self.sae!r}, but it only encodes data; name a codes run with codes, or give data"
            )
        fields = type(self).model_fields
        of_data = {"matrix", *CellOptions.model_fields, *ForwardOptions.model_fields} - set(ActorOptions.model_fields)
        given = sorted(name for name in of_data if getattr(self, name) != fields[name].default)
        if given and not self.data:
            raise ValueError(f"{', '.join(given)} describe how other data are encoded; give data, or leave them out")
        return self


class MatchOptions(Options):
    """Match the features of SAEs with each other: which are found again by another seed, layer, model or data set?

    The matches join the other tables, e.g.: scsae sql "SELECT m.other, m.similarity, f.top_genes FROM feature_match m
    JOIN features f USING (feature_id) WHERE m.mutual ORDER BY m.similarity DESC"
    """

    sae: str | None = None
    """SAE run whose features are matched; default: the newest."""
    other: tuple[str, ...] = ()
    """SAE run to match them with; may be repeated."""
    method: Literal["auto", "cosine", "pearson", "spearman"] = "auto"
    """How features are compared: by the cosine of their directions, or by the correlation of their codes of the same
    cells; auto takes the cosine for SAEs of the same model and site, else pearson."""
    n_null: int = Field(default=39, ge=19)
    """Permutations of the cells, within donors, that a correlation is held against."""
    max_cells: int = Field(default=5000, ge=3)
    """Cells of each split that a correlation is computed over, at most: a seeded sample of more."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random directions, the permutations and the sample."""


class BaselineOptions(ActorOptions):
    """Fit, encode and associate what an SAE has to surpass, by the same code into the same tables.

    neurons: the model's own. pca, ica: components of the same activations. random: an SAE with random directions.
    random-model: the SAE trained anew on the model with random weights, which is extracted again and takes as long.
    None of them is ever a default of another command. `scsae compare` says what the SAE has above them.
    """

    associations: str | None = None
    """Associations run of the SAE that the baselines are compared with; default: the newest."""
    kind: Annotated[tuple[BaselineKind, ...], pydantic.BeforeValidator(_one_or_more)] = Field(
        default=("neurons", "pca", "ica", "random"), min_length=1
    )
    """Baseline: neurons, pca, ica, random or random-model; may be repeated."""
    gmt: tuple[Path, ...] = ()
    """The GMT files that the SAE's features were associated with; may be repeated."""
    fit_tokens: int = Field(default=65_536, ge=2)
    """Tokens of `train` cells, a seeded sample, that mean, components and directions are found on."""


class SteerOptions(ActorOptions):
    """Change features in the running model and measure what happens to its cells, beside nulls and baselines.

    Three questions. --target LABEL edits the features of a label in all cells. --target LABEL --toward OTHER moves the
    cells of a label to another (stimulated to control, say), and leaves the others alone. --target all edits the
    features that tell the labels of a kind (batches) apart inside cell types, so that they mix. Features, and the best
    of several numbers of features and doses, are chosen on `select` cells; what is reported is of `test` cells.
    """

    associations: str | None = None
    """Associations run that describes the features; default: the newest."""
    kind: str = "cell_type"
    """Kind of the target label: cell_type, batch or another label column."""
    target: str | None = None
    """The label whose features are edited, or whose cells are moved; `all`: every label of the kind. Default: the one
    with the best feature on `select` cells."""
    toward: str | None = None
    """The label that the cells of `target` are moved to."""
    feature: Annotated[tuple[FeatureId, ...], pydantic.BeforeValidator(_one_or_more)] = ()
    """Feature to edit, by its id, in place of a choice; may be repeated."""
    n_features: Annotated[tuple[Positive, ...], pydantic.BeforeValidator(_one_or_more)] = Field(
        default=(10,), min_length=1
    )
    """How many features are edited: the best on `select` cells. May be repeated: the best number is searched."""
    intervention: Literal["ablate", "clamp", "add", "scale", "toward", "shift"] | None = None
    """What is done to them: ablate, clamp, add, scale, or, with mean codes of labels, toward (replace a code by the
    mean of the label moved to) or shift (add the difference of the means). Default: ablate; with --toward shift."""
    dose: Annotated[tuple[Dose, ...], pydantic.BeforeValidator(_one_or_more)] = Field(default=(1.0,), min_length=1)
    """Dose: clamp and add in units of a feature's 99th percentile; scale as the factor; toward and shift as the share
    of the way; ablate takes none. May be repeated: the best dose is searched."""
    by: Literal["cell_type", "gene", "both", "none"] | None = None
    """toward and shift: mean codes by cell_type, by gene of the token, by both, or by none of them. Default: cell_type;
    with --target all none."""
    gene: Annotated[tuple[str, ...], pydantic.BeforeValidator(_one_or_many)] = ()
    """Steer the tokens of this gene alone; may be repeated."""
    cells: Annotated[tuple[str, ...], pydantic.BeforeValidator(_one_or_many)] = ()
    """Steer the cells with COLUMN=VALUE alone, e.g. cell_type=B; repeated: cells with one of them."""
    n_nulls: int = Field(default=20, ge=2)
    """Draws of each null: random features of matched density, random directions and, where means of labels or a choice
    by displacement are used, shuffled labels."""
    readout: str = "mean"
    """Which embedding of the cell is judged: mean over the gene tokens, or another readout of the model (cls, all)."""
    max_cells: int = Field(default=5000, ge=4)
    """Cells of each split, at most: a seeded sample of more, with labels and types in their proportions."""
    head: bool = False
    """Ask the model's own head about hidden genes of steered cells too: what it now predicts, gene by gene."""
    scib: bool = False
    """With --target all: score what was chosen, nulls and baselines by scIB too; tens of seconds, and needs
    pip install 'scsae[evaluate]'."""
    seed: int = Field(default=0, ge=0)
    """Seed of the nulls and of the samples of cells."""

    @pydantic.model_validator(mode="after")
    def _one_question(self) -> "SteerOptions":
        """Options that contradict each other."""
        if self.toward is not None and self.target in (None, "all", self.toward):
            raise ValueError(
                f"toward was {self.toward!r} and target {self.target!r}: cells of one label are moved to another; name "
                "two labels, e.g. --target stim --toward ctrl"
            )
        by_means = self.intervention in ("toward", "shift") or (self.intervention is None and self.toward is not None)
        if by_means and self.toward is None and self.target != "all":
            raise ValueError(
                f"intervention {self.intervention} needs labels to take means of; give --toward LABEL, or --target all"
            )
        if self.by is not None and not by_means:
            raise ValueError("by says which means toward and shift go by; give one of these, or leave it out")
        if self.scib and self.target != "all":
            raise ValueError("scib scores how labels mix; give it with --target all, or leave it out")
        if self.feature and "n_features" in self.model_fields_set:
            raise ValueError("feature and n_features were both given; give one of them")
        if len(set(self.dose)) > 1 and not by_means and self.intervention in (None, "ablate"):
            raise ValueError(f"dose was {list(self.dose)}, but ablate takes none; leave it out, or name --intervention")
        several = len(set(self.dose)) > 1 or len(set(self.n_features)) > 1
        if several and self.toward is None and self.target != "all":
            raise ValueError(
                "several n_features or doses are searched for the best, which is settled for --toward LABEL and for "
                "--target all; give one of each"
            )
        return self

    @pydantic.field_validator("cells")
    @classmethod
    def _column_and_value(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if "=" not in value.strip("="):
                raise ValueError(f"{value!r} is not COLUMN=VALUE; write e.g. cell_type=B")
        return values


PARENTS = {
    "train": ("extract", "activations"),
    "encode": ("train", "sae"),
    "associate": ("encode", "codes"),
    "steer": ("associate", "associations"),
}
"""For a stage of a recipe, the stage that makes the run it starts from, and the option that names that run."""


class Recipe(Options):
    """Stages in their order; a stage left out is not run. A stage starts from the run that the stage before it made."""

    store: str | None = None
    """Folder of the store, or s3://BUCKET/PREFIX; the command line's --store comes first."""
    extract: ExtractOptions | None = None
    """Options of the extraction."""
    train: TrainOptions | None = None
    """Options of the training."""
    encode: EncodeOptions | None = None
    """Options of the encoding."""
    associate: AssociateOptions | None = None
    """Options of the associations."""
    steer: tuple[SteerOptions, ...] = ()
    """Steering runs, one after the other."""

    @pydantic.model_validator(mode="after")
    def _one_sae(self) -> "Recipe":
        """A recipe goes on from one SAE; a sweep is for `scsae train`."""
        options = self.train
        for name in ("arch", "k", "l1_coefficient") if options is not None else ():
            if len(values := getattr(options, name)) > 1:
                raise ValueError(f"train.{name} was {list(values)}; a recipe trains one: sweep with `scsae train`")
        return self

    @pydantic.model_validator(mode="after")
    def _other_data_are_encoded(self) -> "Recipe":
        """A recipe's associations are of the codes before them."""
        if self.associate is not None and self.associate.data:
            raise ValueError("associate.data is for `scsae associate`; a recipe encodes other data by encode.data")
        return self

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> "Recipe":
        """A stage starts from the run of the stage before it or from the run that it names, not from both."""
        for follower, (maker, field) in PARENTS.items():
            stages = getattr(self, follower)
            for stage in stages if isinstance(stages, tuple) else (stages,):
                named = None if stage is None else getattr(stage, field)
                if named is not None and getattr(self, maker) is not None:
                    raise ValueError(
                        f"{follower}.{field} was {named!r}, but the recipe has {maker} too, which makes that run; "
                        "leave one of them out"
                    )
        return self


def check(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build `cls` from `values`; raise UsageError that names the option, the value and what is allowed."""
    try:
        return cls(**values)
    except pydantic.ValidationError as error:
        raise UsageError("\n".join(_explain(cls, dict(e), where) for e in error.errors())) from None


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; raise UsageError for a missing file, broken YAML or a key that does not exist."""
    if not path.exists():
        raise UsageError(f"the recipe {path} does not exist; give the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"the recipe {path} holds {values!r}; it has to map stages to options")
    return check(Recipe, values, f"recipe {path}")


def _explain(cls: type[Options], error: dict[str, Any], where: str) -> str:
    """One line for one pydantic error."""
    location = [str(part) for part in error["loc"]]
    # one of several values: the option is named, as its value is shown
    named = location[:-1] if location and location[-1].isdigit() else location
    name = ".".join(named) or "options"
    if error["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(cls, location[:-1]))
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: the key {name!r} is unknown; {hint}allowed here: {', '.join(allowed)}"
    reason = error["msg"].removeprefix("Value error, ")
    return f"{where}: {name} was {error.get('input')!r}: {reason}" if location else f"{where}: {reason}"


def _fields_at(cls: type[Options], path: list[str]) -> set[str]:
    """Names of the fields below `path` (a stage's name, perhaps followed by a position in a list)."""
    stages: dict[str, type[Options]] = {
        "extract": ExtractOptions,
        "train": TrainOptions,
        "encode": EncodeOptions,
        "associate": AssociateOptions,
        "steer": SteerOptions,
    }
    below = stages[path[0]] if cls is Recipe and path and path[0] in stages else cls
    return set(below.model_fields)
