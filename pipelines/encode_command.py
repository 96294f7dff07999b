"""The command that encodes the cells of a data set of the store with an SAE, with every option that it needs.

The options are those that the data set was made with, as its plan and the place of its files say. A credential in an
address is not printed: `?...` stands in its place, and has to be filled in again.
"""

import shlex
from collections.abc import Iterator

from feature_store.cells import PANEL_CELLS, has_cellxgene_columns, source_location
from feature_store.codes import CodesRun
from feature_store.storage import commit
from feature_store.storage.addresses import data_path
from feature_store.storage.layout import Layout
from feature_store.storage.obs_columns import shown_name
from feature_store.storage.plans import ActivationsPlan, CellsPlan, SAEPlan
from pipelines.config import NO_COLUMN
from pipelines.config.vectors import VectorsPlace
from pipelines.external.vectors import SITE, load_vectors_location


def encode_command(layout: Layout, sae: str, dataset: str, *, pooling: str) -> str:
    """Return the command that encodes the cells of a data set with an SAE.

    A table of annotations (`--obs`) whose place an older store does not know is written as FILE, and given vectors that
    the store does not know as PATH/vectors.npy.
    """
    plan = SAEPlan.of(commit.Run.open(layout.saes_dir(sae)))
    given: list[tuple[str, object]] = [("sae", sae), ("store", layout.root)]
    if pooling != "max":
        given.append(("pooling", pooling))
    if plan.dataset != dataset:
        given += _data_options(layout, dataset)
        if (vectors := _vectors_of(layout, plan, dataset)) is not None:
            given.append(("vectors", vectors))
    return " ".join(["scsae encode", *(f"--{option} {shlex.quote(str(value))}" for option, value in given)])


def reads_vectors(layout: Layout, sae: SAEPlan) -> bool:
    """Return whether an SAE was trained on given vectors. NotFoundError if those activations are gone."""
    if sae.site != SITE:
        return False
    return ActivationsPlan.of(commit.Run.open(layout.activations_dir(sae.activations))).origin == "vectors"


def _data_options(layout: Layout, dataset: str) -> Iterator[tuple[str, object]]:
    """Yield the options, with their values, that a data set was made with."""
    where, run = source_location(layout, dataset), commit.Run.open(layout.cells_dir(dataset))
    plan = CellsPlan.of(run)
    yield from (("data", data_path(path)) for path in where.paths)
    yield "matrix", where.matrix
    if plan.where is not None:
        yield "where", plan.where
    # an older store does not know where the tables were, but that there were some
    yield from (("obs", data_path(path)) for path in where.obs or ("FILE",) * len(plan.obs))
    taken = {"donor": plan.donor, "batch": plan.batch, "cell-type": plan.cell_type}
    columns: dict[str, tuple[str, ...]] = {name: () if one is None else (one,) for name, one in taken.items()}
    known = {shown_name(name) for name in commit.read_part(run.checked_parts()[0]).columns}
    # careful: where an option is left out, the schema of CELLxGENE names the column
    not_given = (NO_COLUMN,) if has_cellxgene_columns(known) else ()
    for option, names in {**columns, "label": plan.labels}.items():
        yield from ((option, name) for name in names or not_given)
    if plan.split_column is not None:
        yield "split", plan.split_column
    if plan.split.by is not None:
        yield "split-by", plan.split.by
    if plan.panel.wanted is not None or plan.panel.n_cells > PANEL_CELLS:
        yield "panel", plan.panel.n_cells


def _vectors_of(layout: Layout, sae: SAEPlan, dataset: str) -> str | None:
    """Return the vectors that an SAE of given vectors would encode a data set from; None if they need no name.

    They are those that the store knows of the same model, if it knows any; else the user has to name them.
    """
    if not reads_vectors(layout, sae):
        return None
    own = load_vectors_location(layout.activations_dir(sae.activations)).vectors
    needs_name = VectorsPlace.parse(own).file is not None
    known = _known_vectors(layout, dataset, sae.model, sae.d_model)
    return next(known, "PATH/vectors.npy" if needs_name else None)


def _known_vectors(layout: Layout, dataset: str, model: str, d_model: int) -> Iterator[str]:
    """Yield where the vectors of a data set were that are said to be of a model, the newest activations first."""
    for info in layout.runs("activations"):
        if info.complete:
            plan = ActivationsPlan.of(commit.Run.open(info.path))
            if (plan.origin, plan.dataset, plan.model, plan.d_model) == ("vectors", dataset, model, d_model):
                yield load_vectors_location(info.path).vectors
    for info in layout.runs("codes"):
        codes = CodesRun.open(info.path).plan if info.complete else None
        if codes is not None and codes.fused is not None and codes.dataset == dataset:
            read = ActivationsPlan.of(commit.Run.open(layout.activations_dir(codes.activations)))
            if (read.origin, read.model, read.d_model) == ("vectors", model, d_model):
                yield load_vectors_location(info.path).vectors
