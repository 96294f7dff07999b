"""The stages as functions with keyword options, for notebooks and scripts; `import scsae` re-exports them.

The options of a function are the fields of the stage's options class, and the check is the one of the command:
`scsae.train(k=32)` is `scsae train --k 32`. Names, defaults and descriptions are read from the class, so that signature
and help of a function are always those of the command. A stage itself is imported when its function is called.
"""

import functools
import textwrap
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

from feature_store.storage.layout import as_path
from pipelines.config import (
    ADDRESS_HELP,
    DEFAULT_STORE,
    STORE_HELP,
    AssociateOptions,
    BaselineOptions,
    CircuitOptions,
    EffectsOptions,
    EncodeOptions,
    ExportSAEOptions,
    ExtractOptions,
    ImportSAEOptions,
    InputsOptions,
    InspectOptions,
    MatchOptions,
    ModulesOptions,
    Options,
    ProbeOptions,
    SteerOptions,
    TrainOptions,
    check,
    option_help,
)
from pipelines.config.options import as_tuple

if TYPE_CHECKING:
    from feature_store.query.store import FeatureStore
    from pipelines.compare import Comparison
    from pipelines.runtime.stage import StageResult

T = TypeVar("T")
SHARED = {"store": STORE_HELP, "address": ADDRESS_HELP}
"""Help of the parameters that are not options of a stage."""


def takes_options(cls: type[Options], *, first: str | None = None) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Turn `body(options, *, store, ...)` into a function whose keyword options are the fields of `cls`.

    The field `first` may be given by position. One value is accepted where an option takes several, and None is the
    default of every option. The function raises UsageError for an unknown option and for a value that is not allowed.
    """

    def decorate(body: Callable[..., T]) -> Callable[..., T]:
        name = body.__name__
        _, *shared = signature(body).parameters.values()

        @functools.wraps(body)
        def function(*values: Any, **given: Any) -> T:
            if len(values) > (first is not None):
                raise TypeError(f"{name}() takes keyword options; {values[-1]!r} was given without a name")
            if first is not None and len(values) + (first in given) != 1:
                raise TypeError(f"{name}() takes {first!r} once; see help(scsae.{name})")
            given |= {str(first): value for value in values}
            own = {parameter.name: given.pop(parameter.name) for parameter in shared if parameter.name in given}
            return body(check(cls, _as_fields(cls, given), f"scsae.{name}"), **own)

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
    """Return the options that are not None, with a tuple around one value where a field takes several."""
    values = {name: value for name, value in given.items() if value is not None}
    for name in values.keys() & cls.model_fields.keys():
        if get_origin(cls.model_fields[name].annotation) is tuple:
            values[name] = as_tuple(values[name])
    return values


def _documentation(body: Callable[..., Any], meanings: Mapping[str, str]) -> str:
    """Return the docstring of `body`, followed by the meaning of every option."""
    lines = [
        textwrap.fill(f"{name}: {text}", 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, text in meanings.items()
    ]
    several = "Options (one that may be repeated takes a value or a tuple of values):"
    return "\n".join([cleandoc(body.__doc__ or ""), "", several, *lines])


def open(
    store: str | Path = DEFAULT_STORE,
    *,
    associations: str | None = None,
    codes: str | None = None,
    dataset: str | None = None,
) -> "FeatureStore":
    """Open a store for questions, at its newest associations or at the runs named (ids, or their beginnings).

    >>> store = scsae.open("scsae-store")
    >>> store.features_for(label="CD19+ B")
    >>> store.sql("SELECT feature_id, auroc, q FROM feature_label WHERE split = 'test' ORDER BY auroc DESC LIMIT 5")

    Raises:
        NotFoundError: the store holds no runs, or none of that name.
    """
    from feature_store.query.store import FeatureStore

    return FeatureStore.open(store, associations=associations, codes=codes, dataset=dataset)


def inspect(
    data: str | Path | tuple[str | Path, ...],
    *,
    model: str | None = None,
    matrix: str | None = None,
    where: str | None = None,
    obs: str | Path | tuple[str | Path, ...] = (),
    vectors: str | None = None,
) -> dict[str, Any]:
    """Return facts about cells and model together: genes matched, tokens per cell, bytes and time; or about the vectors
    of the cells. Writes nothing. The default model is `mini`.

    >>> scsae.inspect("cells.h5ad", model="path/to/scGPT_human")["genes matched"]
    >>> scsae.inspect("cells.h5ad", vectors="obsm/X_uce")["vectors"]
    """
    from pipelines.inspection import inspect_data

    values = {"data": data, "model": model, "matrix": matrix, "where": where, "obs": obs, "vectors": vectors}
    return inspect_data(check(InspectOptions, _as_fields(InspectOptions, values), "scsae.inspect"))


@takes_options(ExtractOptions, first="data")
def extract(
    options: ExtractOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None
) -> "list[StageResult]":
    """Run the foundation model over cells and store the activations of their tokens; return a result for each layer.

    >>> scsae.extract("cells.h5ad", layer=2, cell_type="cell_type", batch="batch")
    """
    from pipelines.extract import extract

    return extract(options, as_path(store), address=address)


@takes_options(TrainOptions)
def train(
    options: TrainOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None
) -> "list[StageResult]":
    """Fit sparse autoencoders to stored activations; return a result for each combination of options.

    >>> scsae.train(k=(16, 32), n_steps=3000)
    """
    from pipelines.train import train_all

    return train_all(options, as_path(store), address=address)


@takes_options(ImportSAEOptions, first="folder")
def import_sae(options: ImportSAEOptions, *, store: str | Path = DEFAULT_STORE) -> "StageResult":
    """Make a run of an SAE of SAELens, sparsify or dictionary_learning, as `train` makes one of its own.

    >>> scsae.import_sae("path/to/sae", activations="0f3a91")
    >>> scsae.encode()
    """
    from pipelines.exchange import import_sae

    return import_sae(options, as_path(store))


@takes_options(ExportSAEOptions, first="folder")
def export_sae(options: ExportSAEOptions, *, store: str | Path = DEFAULT_STORE) -> "StageResult":
    """Write an SAE as SAELens, sparsify or dictionary_learning reads it; `path` of the result is the folder.

    >>> scsae.export_sae("sae-for-saelens", to="saelens")
    """
    from pipelines.exchange import export_sae

    return export_sae(options, as_path(store))


@takes_options(EncodeOptions)
def encode(options: EncodeOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None) -> "StageResult":
    """Turn activations into the sparse codes of cells.

    >>> scsae.encode()
    >>> scsae.encode(data="other.h5ad", donor="donor_id")
    """
    from pipelines.encode import encode

    return encode(options, as_path(store), address=address)


@takes_options(AssociateOptions)
def associate(
    options: AssociateOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None
) -> "list[StageResult]":
    """Associate features with labels, batches, genes and gene sets; the last result is of the associations.

    >>> scsae.associate(gmt="hallmark.gmt")
    """
    from pipelines.associate import associate_all

    return associate_all(options, as_path(store), address=address)


@takes_options(BaselineOptions)
def baseline(
    options: BaselineOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None
) -> "list[StageResult]":
    """Fit, encode and associate the baselines of an SAE: neurons, PCA, ICA, random directions, a random model.

    >>> scsae.baseline(kind=("neurons", "pca"))
    >>> scsae.compare().comparison
    """
    from pipelines.baseline import baseline

    return baseline(options, as_path(store), address=address)


def compare(associations: str | None = None, *, store: str | Path = DEFAULT_STORE) -> "Comparison":
    """Compare an SAE with its baselines in the store, target by target; `baseline` has to be run before.

    >>> scsae.compare().comparison

    Args:
        associations: associations run of the SAE; default: the newest.
        store: folder of the store, or s3://BUCKET/PREFIX.
    """
    from pipelines.compare import compare_with_baselines

    return compare_with_baselines(as_path(store), associations)


@takes_options(MatchOptions)
def match(options: MatchOptions, *, store: str | Path = DEFAULT_STORE) -> "list[StageResult]":
    """Match the features of an SAE with those of others; return a result for each pair.

    >>> scsae.match(other="3f2a91")
    >>> scsae.open().sql("SELECT * FROM feature_match WHERE mutual ORDER BY similarity DESC")
    """
    from pipelines.match import match

    return match(options, as_path(store))


@takes_options(EffectsOptions)
def effects(options: EffectsOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None) -> "StageResult":
    """Measure what features do to the model's predictions of hidden genes, beside two nulls.

    >>> scsae.effects(feature=[772, 968])
    >>> scsae.open().sql("SELECT gene, effect, z, q FROM feature_effect WHERE feature_id = 772 ORDER BY p")
    """
    from pipelines.effects import effects

    return effects(options, as_path(store), address=address)


@takes_options(CircuitOptions)
def circuit(options: CircuitOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None) -> "StageResult":
    """Measure which features of a later SAE change when those of an earlier one are ablated, beside two nulls.

    >>> scsae.circuit(from_sae="3f2a91", to_sae="b7c044")
    >>> scsae.open().sql("SELECT * FROM feature_edge WHERE from_feature_id = 772 ORDER BY p")
    """
    from pipelines.circuit import circuit

    return circuit(options, as_path(store), address=address)


@takes_options(InputsOptions)
def inputs(options: InputsOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None) -> "StageResult":
    """Measure which genes of a cell make features fire, from their own token and from others, beside null genes.

    >>> scsae.inputs(feature=[772, 968])
    >>> scsae.open().sql("SELECT gene, path, share, z, q FROM feature_input WHERE feature_id = 772 ORDER BY p")
    """
    from pipelines.feature_inputs import inputs

    return inputs(options, as_path(store), address=address)


@takes_options(ProbeOptions)
def probe(options: ProbeOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None) -> "StageResult":
    """Find the few features that tell the cells of each label from the others, beside baselines and genes.

    >>> scsae.probe(label="cell_type", k=[1, 5, 20])
    >>> scsae.open().sql("SELECT * FROM feature_probe WHERE label = 'B cells' AND k = 5 ORDER BY rank")
    """
    from pipelines.probe import probe_labels

    return probe_labels(options, as_path(store), address=address)


@takes_options(ModulesOptions)
def modules(options: ModulesOptions, *, store: str | Path = DEFAULT_STORE) -> "StageResult":
    """Find groups of features that fire together beyond their rates, and test them on `test` cells.

    >>> scsae.modules()
    >>> scsae.open().sql("SELECT module, n_features, r_test, q, top_genes FROM module ORDER BY module")
    """
    from pipelines.modules import modules

    return modules(options, as_path(store))


@takes_options(SteerOptions)
def steer(options: SteerOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None) -> "StageResult":
    """Change features inside the running model and measure what happens to its cells, beside nulls and baselines.

    >>> scsae.steer(kind="condition", target="stim", toward="ctrl", n_features=20)
    >>> scsae.plots.steering_curve(scsae.open())
    """
    from pipelines.steering.run import steer

    return steer(options, as_path(store), address=address)
