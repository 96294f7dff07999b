"""Functions whose keyword options are the fields of an options class, as a person types them in a notebook.

Names, defaults and descriptions are read from the class, so that signature and help of a function are always those of
the command. Values are taken in the types of a notebook: a number for a text, a path for a text, one value for several,
a list, a range, or an array of numpy for a tuple, and an AnnData for a file of cells.
"""

import functools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from types import GenericAlias
from typing import Annotated, Any, TypeVar, get_args, get_origin

from feature_store.storage.layout import Layout
from pipelines.config import ADDRESS_HELP, DEFAULT_STORE, STORE_HELP, Options, check, option_help
from pipelines.config.options import as_tuple
from pipelines.runtime.stage import StageResult, StageResults

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound=Options)
SHARED = {"store": STORE_HELP, "address": ADDRESS_HELP}
"""Help of the parameters that are not options of a stage."""
DATA = "data"
"""The field of the cells."""


def takes_options(cls: type[Options], *, first: str | None = None) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Turn `body(options, *, store, ...)` into a function whose keyword options are the fields of `cls`.

    The field `first` may be given by position. One value is accepted where an option takes several, and None is the
    default of every option. The function raises UsageError for an unknown option and for a value that is not allowed;
    then no AnnData is written.
    """

    def decorate(body: Callable[..., T]) -> Callable[..., T]:
        name = body.__name__
        _, *shared = signature(body).parameters.values()

        @functools.wraps(body)
        def function(*values: Any, **given: Any) -> Any:
            if len(values) > (first is not None):
                raise TypeError(f"{name}() takes keyword options; {values[-1]!r} was given without a name")
            if first is not None and len(values) + (first in given) != 1:
                raise TypeError(f"{name}() takes {first!r} once; see help(scsae.{name})")
            given |= {str(first): value for value in values}
            own = {parameter.name: given.pop(parameter.name) for parameter in shared if parameter.name in given}
            beside = tuple(parameter.name for parameter in shared)
            fields = _as_fields(cls, given)
            options = check(cls, _without_objects(fields), f"scsae.{name}", beside=beside)
            store = own.get("store", DEFAULT_STORE) if "store" in beside else None
            with _objects_as_files(options, fields, store) as with_files:
                result = body(with_files, **own)
            return _shown_as_table(result)

        parameters = [_parameter(cls, field, by_position=field == first) for field in cls.model_fields]
        parameters.sort(key=lambda parameter: parameter.name != first)
        returned = signature(body).return_annotation
        function.__signature__ = Signature([*parameters, *shared], return_annotation=returned)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in (*parameters, *shared)} | {"return": returned}
        meanings = {parameter.name: option_help(cls, parameter.name) for parameter in parameters}
        function.__doc__ = _documentation(
            body, meanings | {parameter.name: SHARED[parameter.name] for parameter in shared}
        )
        return function

    return decorate


def _parameter(cls: type[Options], field: str, *, by_position: bool) -> Parameter:
    """Return the parameter of one field."""
    info = cls.model_fields[field]
    kind = Parameter.POSITIONAL_OR_KEYWORD if by_position else Parameter.KEYWORD_ONLY
    default = Parameter.empty if info.is_required() else info.get_default(call_default_factory=True)
    return Parameter(field, kind, default=default, annotation=_plain_type(info.annotation))


def _plain_type(annotation: Any) -> Any:
    """Return the type of an option without its limits, and with one value beside several."""
    if get_origin(annotation) is tuple:
        item, _ = get_args(annotation)
        item = get_args(item)[0] if get_origin(item) is Annotated else item
        return item | GenericAlias(tuple, (item, ...))
    return annotation


def _as_fields(cls: type[Options], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None as their fields take them: one value as a tuple where a field takes several,
    numbers of numpy as numbers, arrays and ranges as tuples, and a path as text where a field takes text.
    """
    values = {name: _plain(value) for name, value in given.items() if value is not None}
    for name in values.keys() & cls.model_fields.keys():
        annotation = cls.model_fields[name].annotation
        if get_origin(annotation) is tuple:
            values[name] = as_tuple(values[name])
        if Path not in set(_types_in(annotation)):
            values[name] = _with_paths_as_text(values[name])
    if DATA in cls.model_fields and DATA in values and not isinstance(values[DATA], tuple):
        values[DATA] = (values[DATA],)
    return values


def _plain(value: Any) -> Any:
    """Return arrays, series, lists, ranges and sets as tuples of plain values, and numbers of numpy as numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, set | frozenset):
        value = sorted(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple | range) else value


def _with_paths_as_text(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_with_paths_as_text, value))
    return str(value) if isinstance(value, Path) else value


def _types_in(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of."""
    if not (arguments := get_args(annotation)):
        yield annotation
    for one in arguments:
        yield from _types_in(one)


def _without_objects(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with a path in the place of each AnnData: options are checked before anything is written."""
    from pipelines.given_data import is_anndata

    if DATA not in fields:
        return dict(fields)
    return {**fields, DATA: tuple(Path("AnnData") if is_anndata(one) else one for one in fields[DATA])}


@contextmanager
def _objects_as_files(options: OptionsT, fields: Mapping[str, Any], store: str | Path | None) -> Iterator[OptionsT]:
    """Yield the options with the file of each AnnData: in the store, or in a temporary folder without a store."""
    from pipelines.given_data import data_folder, files_of, is_anndata

    if not any(map(is_anndata, fields.get(DATA, ()))):
        yield options
        return
    with ExitStack() as stack:
        folder = data_folder(Layout(store)) if store else Path(stack.enter_context(TemporaryDirectory()))
        files = files_of(fields[DATA], folder, matrix=fields.get("matrix"))
        yield options.model_copy(update={DATA: tuple(files)})


def _shown_as_table(result: Any) -> Any:
    """Return a list of results as one that a notebook shows as a table, and any other result as it is."""
    of_stages = isinstance(result, list) and all(isinstance(one, StageResult) for one in result)
    return StageResults(result) if of_stages else result


def _documentation(body: Callable[..., Any], meanings: Mapping[str, str]) -> str:
    """Return the docstring of `body`, followed by the meaning of every option."""
    lines = [
        textwrap.fill(f"{name}: {text}", 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, text in meanings.items()
    ]
    several = "Options (one that may be repeated takes a value or a tuple of values"
    several += "; data may be an AnnData):" if DATA in meanings else "):"
    return "\n".join([cleandoc(body.__doc__ or ""), "", several, *lines])
