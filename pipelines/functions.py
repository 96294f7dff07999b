"""The stages as functions with keyword options, for notebooks and scripts; `import scsae` re-exports them.

The options of a function are the fields of the stage's options class, and the check is the one of the command:
`scsae.train(k=32)` is `scsae train --k 32` (`pipelines.python_options`). Where cells are given as `data`, an AnnData
may stand in the place of a path (`pipelines.given_data`). A stage itself is imported when its function is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.storage.layout import as_path
from pipelines.config import (
    DEFAULT_STORE,
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
    ProbeOptions,
    SteerOptions,
    TrainOptions,
)
from pipelines.python_options import takes_options

if TYPE_CHECKING:
    from feature_store.query.store import FeatureStore
    from pipelines.compare import Comparison
    from pipelines.runtime.stage import StageResult


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


@takes_options(InspectOptions, first="data")
def inspect(options: InspectOptions) -> dict[str, Any]:
    """Return facts about cells and model together: genes matched, tokens per cell, bytes and time; or about the vectors
    of the cells. Writes nothing into a store; an AnnData is read by way of a temporary file.

    >>> scsae.inspect("cells.h5ad", model="path/to/scGPT_human")["genes matched"]
    >>> scsae.inspect(adata, vectors="obsm/X_uce")["vectors"]
    """
    from pipelines.inspection import inspect_data

    return inspect_data(options)


@takes_options(ExtractOptions, first="data")
def extract(
    options: ExtractOptions, *, store: str | Path = DEFAULT_STORE, address: str | None = None
) -> "list[StageResult]":
    """Run the foundation model over cells and store the activations of their tokens; return a result for each layer.

    >>> scsae.extract("cells.h5ad", layer=2, cell_type="cell_type", batch="batch")
    >>> scsae.extract(adata[adata.obs["tissue"] == "blood"], layer=2, cell_type="cell_type")

    An AnnData, also a view or a backed one, is written once into `data/` of the store, because actors and later stages
    read the cells again: X, layers and raw (with `matrix` that one alone), obs, var and obsm. It takes the space of an
    uncompressed .h5ad, and for a view or a backed object the memory of its matrix. The same content gives the same
    run, and other content another, also than the file that an object was read from; the object is not changed. Every
    function takes an AnnData as `data`.
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
