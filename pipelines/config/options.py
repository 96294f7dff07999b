"""What all options share: the base class, the types of fields, and the check with its error messages.

The docstring below a field is its help on the command line. A stage receives options that were checked and cannot be
changed. An unknown key is an error that names the nearest known one.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from feature_store.storage.addresses import DataPath, RemotePath, data_path
from pipelines.errors import UsageError

T = TypeVar("T", bound="Options")
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_PLAIN_REASONS = tuple(
    (re.compile(f"Input should be {pattern}"), words)
    for pattern, words in (
        (r"a valid integer(, [^;\n]*)?", "give a whole number"),
        (r"a valid number(, [^;\n]*)?", "give a number"),
        (r"a finite number", "give a finite number"),
        (r"greater than or equal to (\S+)", r"give \1 or more"),
        (r"less than or equal to (\S+)", r"give \1 or less"),
        (r"greater than (\S+)", r"give more than \1"),
        (r"less than (\S+)", r"give less than \1"),
        (r"a valid boolean(, [^;\n]*)?", "give true or false"),
        (r"a valid string", "give a text"),
        (r"('.*)", r"give \1"),
    )
)
"""What pydantic says, and what is said instead."""


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as `256MB` (decimal units); raise UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)\s*", text, flags=re.IGNORECASE)
    if not found:
        raise UsageError(f"the size was {text!r}; give a number and one of {', '.join(SIZE_UNITS)}, e.g. 256MB")
    return int(float(found[1]) * SIZE_UNITS[found[2].upper()])


def as_tuple(value: Any) -> Any:
    """Return one text, path or number as a tuple, and anything else unchanged."""
    return (value,) if isinstance(value, str | Path | RemotePath | int | float) else value


def _as_data_path(value: Any) -> DataPath:
    """Return the path or address that a text names; ValueError for an address that is not taken, and for no path."""
    if not isinstance(value, str | Path | RemotePath):
        raise ValueError("give a path or an address, or a list of them")
    return data_path(value)


def _as_text(path: DataPath) -> str:
    return path.address if isinstance(path, RemotePath) else str(path)


# careful: pydantic's own check of a path takes none that was made before in what was JSON
_DataPath = Annotated[
    DataPath, pydantic.PlainValidator(_as_data_path), pydantic.PlainSerializer(_as_text, when_used="json")
]
Files = Annotated[tuple[_DataPath, ...], pydantic.BeforeValidator(as_tuple)]
"""Paths and addresses; a recipe may give one without a list."""


def _as_named_values(value: Any) -> Any:
    """Return texts NAME=VALUE, also those of a dictionary, as a tuple; ValueError for others and repeated names."""
    texts = [f"{name}={content}" for name, content in value.items()] if isinstance(value, Mapping) else as_tuple(value)
    found: dict[str, str] = {}
    for text in texts:
        name, equals, content = str(text).partition("=")
        if not (equals and name and content):
            raise ValueError(f"{str(text)!r} has not the form NAME=VALUE")
        if name in found:
            raise ValueError(f"{name} was given twice, as {found[name]!r} and {content!r}")
        found[name] = content
    return tuple(texts)


NamedValues = Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_named_values)]
"""Texts NAME=VALUE; a recipe and a notebook may give a dictionary."""
Positive = Annotated[int, Field(ge=1)]
FeatureId = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Options(BaseModel):
    """The base of all options: frozen, without unknown keys, and documented field by field.

    The checks of a class are built when it is first used, which saves the start of the command line.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, defer_build=True
    )


class ActorOptions(Options):
    """The number of actors and the resources of each."""

    num_actors: int | None = Field(default=None, ge=0)
    """Number of Ray actors; default: as many as the cluster has room for. 0 computes in the process of the command,
    which starts 10 s sooner."""
    num_cpus: int = Field(default=1, ge=1)
    """CPU cores of each actor."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each actor; 0 uses the CPU."""


NO_COLUMN = "none"
"""What an option of a column says where it is to be none, although the file has one."""


class ObsOptions(Options):
    """Which cells of a file are taken, and annotations of them that are not in it."""

    where: str | None = None
    """Condition on obs columns by which cells of a SOMA experiment are taken, in the syntax of its value filters, e.g.
    "tissue == 'lung' and is_primary_data == True"; later stages take the same cells. Default: all cells."""
    obs: Files = ()
    """CSV, TSV or Parquet table of annotations of the cells, or its address, joined by their names (a column `cell_id`
    or `barcode`, or the first one); its columns count as obs columns. For several files give one table, or one for
    each, in order."""


class CellOptions(ObsOptions):
    """The columns of obs that annotate the cells.

    A file in the schema of CELLxGENE needs none of them: its donor_id, cell_type, assay, disease and tissue are taken.
    """

    donor: str | None = None
    """obs column of the donor, the unit of the splits and of the statistics; `none` takes none of a CELLxGENE file."""
    batch: str | None = None
    """obs column of the batch; `none` takes none of a CELLxGENE file."""
    cell_type: str | None = None
    """obs column of the cell type; `none` takes none of a CELLxGENE file."""
    label: tuple[str, ...] = ()
    """Another obs column to associate features with, e.g. condition; may be repeated. A column of numbers with many
    different values, e.g. pct_mito, is correlated with features instead (table `feature_number`). `none` takes none
    of a CELLxGENE file."""
    split: str | None = None
    """obs column that says train, select or test of each cell. Default: whole donors, or without donors single cells,
    are dealt to the splits, so that every batch is in every split where possible; in other data than the SAE's, cells
    and donors that it knows keep theirs."""
    split_by: Literal["donor", "batch", "cell"] | None = None
    """What is dealt to the splits whole: donor, batch (held-out batches, which cannot be mixed by steering) or cell.
    Default: donor, and cell without donors."""
    panel: int = Field(default=200_000, ge=1)
    """Number of cells that get everything: full codes, associations, maps. Of a data set with more cells they are drawn
    in proportion from split, donor, cell type and label, with rare groups whole; the other cells get their largest
    codes."""

    @pydantic.model_validator(mode="after")
    def _one_way_to_split(self) -> "CellOptions":
        if self.split is not None and self.split_by is not None:
            raise ValueError(f"split was {self.split!r} and split_by was {self.split_by!r}; give one of them")
        if NO_COLUMN in self.label and len(self.label) > 1:
            raise ValueError(f"label was {', '.join(self.label)}; give `none` alone, or columns")
        if self.split_by in ("donor", "batch") and getattr(self, self.split_by) in (None, NO_COLUMN):
            raise ValueError(f"split_by was {self.split_by!r}; name the column with --{self.split_by} COLUMN too")
        return self


class MovedDataOptions(Options):
    """Where the data set is, for stages that read it again."""

    data: Files = ()
    """File, .zarr folder or address of the data set, if it was moved or renamed since its extraction; it is checked to
    be the same. Once for each file, if there are several."""


class GeneOptions(Options):
    """How well the genes of the data have to match those of the foundation model."""

    min_matched_share: float = Field(default=0.3, ge=0, le=1)
    """Least share of the counts that lies in genes that the foundation model knows; data below it are refused, because
    their genes are probably of another species or named otherwise."""


def option_help(cls: type[Options], field: str) -> str:
    """Return the description of an option on one line, with its choices if it has any."""
    info = cls.model_fields[field]
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    text = " ".join((info.description or "").split())
    return f"{text} One of: {', '.join(choices)}." if choices else text


def check(cls: type[T], values: dict[str, Any], where: str, *, beside: Sequence[str] = ()) -> T:
    """Build `cls` from `values`; raise UsageError that names the option, the value and what is allowed.

    `beside` are names that are taken besides the fields, for the message about an unknown one.
    """
    try:
        return cls(**values)
    except pydantic.ValidationError as error:
        found = error.errors()
        # of a list of which no item is valid, pydantic says as well that it is too short
        of_items = {one["loc"][0] for one in found if len(one["loc"]) > 1}
        shown = [one for one in found if one["type"] != "too_short" or one["loc"][0] not in of_items]
        raise UsageError("; ".join(_explain(cls, dict(one), where, beside) for one in shown)) from None


def _explain(cls: type[Options], error: dict[str, Any], where: str, beside: Sequence[str]) -> str:
    """One line for one pydantic error."""
    location = [str(part) for part in error["loc"]]
    # one of several values: the option is named, as its value is shown
    named = location[:-1] if location and location[-1].isdigit() else location
    name = ".".join(named) or "options"
    if error["type"] == "extra_forbidden":
        allowed = sorted({*_fields_at(cls, location[:-1]), *beside})
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: the key {name!r} is unknown; {hint}allowed here: {', '.join(allowed)}"
    reason = plain_reason(error["msg"].removeprefix("Value error, "))
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(error["input"]), re.findall("'([^']*)'", error["ctx"]["expected"]), n=1)
        reason += f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}: {name} was {error.get('input')!r}: {reason}" if location else f"{where}: {reason}"


def plain_reason(text: str) -> str:
    """Return what pydantic or typer says of a value that is no number, or is out of its bounds, in words to act on."""
    for pattern, words in _PLAIN_REASONS:
        text = pattern.sub(words, text)
    return text


def _fields_at(cls: type[Options], path: list[str]) -> set[str]:
    """Return the keys below `path`: the key of a field, perhaps followed by a position in a list."""
    fields = {_key_of(name, info): info for name, info in cls.model_fields.items()}
    if path and path[0] in fields:
        below = next(_options_in(fields[path[0]].annotation), cls)
        return {_key_of(name, info) for name, info in below.model_fields.items()}
    return set(fields)


def _key_of(name: str, info: pydantic.fields.FieldInfo) -> str:
    """Return how a field is written: by its first alias, if it has any."""
    alias = info.validation_alias
    return str(alias.choices[0]) if isinstance(alias, pydantic.AliasChoices) else name


def _options_in(annotation: Any) -> Iterator[type[Options]]:
    """Yield the options classes that an annotation contains."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        yield annotation
    for argument in get_args(annotation):
        yield from _options_in(argument)
