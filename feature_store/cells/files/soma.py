"""TileDB-SOMA: the folder of an experiment, as the Census of CELLxGENE holds one for each species.

    EXPERIMENT/obs                       soma_joinid, and a column for each annotation
    EXPERIMENT/ms/RNA/var                soma_joinid, and the names of the genes, such as feature_id and feature_name
    EXPERIMENT/ms/RNA/X/raw              the counts; further layers hold other values of the same genes

The measurement is RNA, or the only one. Of its X layers the counts in `raw` are taken, else another layer of counts;
normalised values only if `--matrix` names them. The names of the cells are the column that is called so, else their
soma_joinid, which is no obs column: it numbers the rows of this experiment. The folder is read by `tiledbsoma` (the
extra `soma`), and its digest covers all its files, so that an experiment that was written or consolidated again is
another data set.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.cells.annotations import ENSEMBL_COLUMNS, SYMBOL_COLUMNS, ObsColumn
from feature_store.cells.cellxgene_mark import CellxgeneMark, census_mark, mark_of
from feature_store.cells.files.cell_file import OneMatrixFile, names_with_closest
from feature_store.cells.matrix_choice import Candidate, MatrixChoice, choose_matrix
from feature_store.cells.obs_table import NAME_COLUMNS
from feature_store.cells.soma_arrays import EXPERIMENT, JOIN_ID, LayerRows, ObsArray, open_soma, reading_soma
from feature_store.cells.value_kinds import values_of
from feature_store.errors import InputError

RNA, RAW = "RNA", "raw"
CELL_NAMES = ("obs_id", *NAME_COLUMNS)
GENE_NAMES = ("var_id", *ENSEMBL_COLUMNS, *SYMBOL_COLUMNS)
_GROUP = ("__tiledb_group.tdb", "__group")
_ARRAY = ("__schema", "__fragments")


def is_soma(folder: Path) -> bool:
    """Whether a folder is a group or an array of TileDB, as every SOMA object is."""
    return (folder / _GROUP[0]).exists() or any((folder / name).is_dir() for name in (_GROUP[1], *_ARRAY))


class SomaFile(OneMatrixFile):
    """An opened SOMA experiment: see `CellFile`. Its matrices are the layers of the measurement, such as "raw", and
    those of another one as "MEASUREMENT/LAYER".
    """

    def __init__(
        self, path: Path, *, mark: CellxgeneMark | None, choice: MatrixChoice | None, filtered: str, **parts: Any
    ) -> None:
        super().__init__(path, reason="named with --matrix", **parts)
        self._mark, self.filtered = mark, filtered
        self.choice = choice or self.choice

    @property
    def cellxgene(self) -> CellxgeneMark | None:
        """The mark of the schema of CELLxGENE, or of its Census; None if the experiment has neither."""
        return self._mark

    def obsm(self, key: str) -> Any:
        """InputError: of an experiment obs, var and the layers of X are read."""
        raise InputError(
            f"obsm/{key} of {self.path} is not read, as it is a SOMA experiment; give the vectors as a file of their "
            "own, for example --vectors vectors.npy"
        )


def open_soma_experiment(path: Path, *, matrix: str | None = None, where: str | None = None) -> SomaFile:
    """Open the folder of an experiment.

    `matrix` is a layer of X, or MEASUREMENT/LAYER. `where` is a condition on obs in the syntax of SOMA's value filters:
    the cells that fulfil it are taken. InputError for a folder of another SOMA object, a condition that cannot be read
    or that no cell fulfils, a measurement or layer that is not there or has to be named, layers of which none holds
    counts, and as from `OneMatrixFile`.
    """
    experiment = open_soma(path)
    try:
        return _opened(experiment, path, matrix, where)
    except InputError:
        experiment.close()
        raise


def _opened(experiment: Any, path: Path, matrix: str | None, where: str | None) -> SomaFile:
    if experiment.soma_type != EXPERIMENT:
        raise _no_experiment(path, experiment.soma_type)
    with reading_soma(path, "obs"):
        frame = experiment.obs
    with reading_soma(path, "the measurements"):
        names = {name: list(one.X) if "X" in one else [] for name, one in experiment.ms.items()}
    of = _Measurements(path, names)
    measurement, layer = of.place(matrix)
    measured = experiment.ms[measurement]
    obs = ObsArray(frame, where, path)
    genes, var = _var(measured, f"var of the measurement {measurement}", path)

    def rows(name: str) -> LayerRows:
        what = f"the layer {of.name(measurement, name)}"
        with reading_soma(path, what):
            array = measured.X[name]
        return LayerRows(array, obs.ids, genes, what=what, path=path)

    choice = None
    if layer is None:
        candidates = [_candidate(of.name(measurement, name), name, rows) for name in names[measurement]]
        choice = _choice(candidates, raw=of.name(measurement, RAW))
        if choice is None:
            raise of.without_counts(measurement, candidates)
        layer = choice.taken.name.rpartition("/")[2]
    index = next((name for name in CELL_NAMES if name in obs.columns), None)
    columns = [name for name in obs.columns if name != index]
    n_cells, n_all = len(obs.ids), len(obs.ids) if where is None else _n_cells(experiment, path)
    return SomaFile(
        path,
        mark=_mark(measured, obs.columns, var, path),
        choice=choice,
        filtered="" if where is None else f"{n_cells:,} of {n_all:,} cells",
        format=f"SOMA experiment, measurement {measurement}",
        name=of.name(measurement, layer),
        rows=rows(layer),
        var=var,
        index=ObsColumn(n_cells=n_cells, read=partial(obs.read_names, index)),
        obs={name: ObsColumn(n_cells=n_cells, read=partial(obs.read, name)) for name in columns},
        ignored=[f"the measurements {', '.join(others)}"] if (others := of.others(measurement)) else [],
        close=experiment.close,
    )


class _Measurements(NamedTuple):
    """The measurements of an experiment and the names of their layers."""

    path: Path
    layers: dict[str, list[str]]

    @property
    def default(self) -> str | None:
        return RNA if RNA in self.layers else next(iter(self.layers)) if len(self.layers) == 1 else None

    def name(self, measurement: str, layer: str) -> str:
        """What `--matrix` calls a layer."""
        return layer if measurement == self.default else f"{measurement}/{layer}"

    def others(self, measurement: str) -> list[str]:
        return [name for name in self.layers if name != measurement]

    def every(self) -> list[str]:
        return [self.name(measurement, layer) for measurement, layers in self.layers.items() for layer in layers]

    def place(self, matrix: str | None) -> tuple[str, str | None]:
        """The measurement and the layer that `--matrix` names; without it the default, and None."""
        measurement, _, layer = (matrix or "").rpartition("/")
        found = measurement or self.default
        if matrix is not None and (found not in self.layers or layer not in self.layers[found]):
            raise InputError(
                f"--matrix was {matrix!r}, not a layer of {self.path}; it has "
                f"{names_with_closest(matrix, self.every())}"
            )
        if found is None:
            example = next(iter(self.every()), f"{RNA}/{RAW}")
            raise InputError(
                f"{self.path} has {len(self.layers)} measurements, and none is called {RNA}: "
                f"{', '.join(self.layers) or 'none'}; name one and its layer: --matrix {example}"
            )
        return found, layer or None

    def without_counts(self, measurement: str, candidates: Sequence[Candidate]) -> InputError:
        """The error for a measurement of which no layer holds counts."""
        layers = "; ".join(f"{one.name}: {one.says()}" for one in candidates) or "it has no layer"
        usable = [one.name for one in candidates if one.is_usable]
        usable += [name for name in self.every() if name not in {one.name for one in candidates}]
        advice = f"name one with --matrix {usable[0]}" if usable else "write the counts as its layer raw"
        others = [name for name in self.every() if "/" in name]
        return InputError(
            f"no X layer of the measurement {measurement} of {self.path} holds counts ({layers})"
            f"{'; other layers: ' + ', '.join(others) if others else ''}; {advice}"
        )


def _candidate(name: str, layer: str, rows: Any) -> Candidate:
    """What a layer holds, or why it cannot be used."""
    try:
        matrix = rows(layer)
        return Candidate(name=name, n_genes=matrix.shape[1], values=values_of(matrix, f"the layer {name}"))
    except InputError as error:
        return Candidate(name=name, problem=str(error).partition(";")[0])


def _choice(candidates: Sequence[Candidate], *, raw: str) -> MatrixChoice | None:
    """The layer that is taken: `raw` if it holds counts, else the best other layer of counts; None if none does."""
    counts = [one for one in candidates if one.kind == "counts"]
    best = choose_matrix([one for one in counts if one.name == raw] or counts)
    if best is None:
        return None
    passed_over = {one.name: one.says() for one in candidates if one is not best.taken}
    return MatrixChoice(taken=best.taken, reason=best.reason, passed_over=passed_over)


def _var(measured: Any, what: str, path: Path) -> tuple[npt.NDArray[np.int64], Any]:
    """The ascending soma_joinid of each gene, and var in their order as the frame of an AnnData."""
    with reading_soma(path, what):
        frame = measured.var.read().concat().to_pandas().sort_values(JOIN_ID)
    ids = frame[JOIN_ID].to_numpy(dtype=np.int64)
    index = next((name for name in GENE_NAMES if name in frame), None)
    if index is None:
        raise InputError(
            f"{what} of {path} has no names of genes ({', '.join(GENE_NAMES)}); it has {', '.join(frame.columns)}"
        )
    if (np.diff(ids) < 1).any():
        raise InputError(f"{what} of {path} has a {JOIN_ID} twice; write the experiment again")
    names = frame[index].astype(str)
    var = frame.drop(columns=[JOIN_ID, *(["var_id"] if index == "var_id" else [])])
    return ids, var.set_axis(names.to_list(), axis=0)


def _mark(measured: Any, obs_columns: Sequence[str], var: Any, path: Path) -> CellxgeneMark | None:
    with reading_soma(path, "uns"):
        uns = dict(measured["uns"].metadata) if "uns" in measured else {}
    n_filtered = int(var["feature_is_filtered"].astype(bool).sum()) if "feature_is_filtered" in var else 0
    found = mark_of(str(uns.get("schema_version", "")), str(uns.get("schema_reference", "")), n_filtered)
    return found or census_mark(obs_columns, list(var.columns))


def _n_cells(experiment: Any, path: Path) -> int:
    with reading_soma(path, "obs"):
        return int(experiment.obs.count)


def _no_experiment(path: Path, soma_type: str) -> InputError:
    """The error for a folder of another SOMA object, which names the experiments below it."""
    below = [one for pattern in ("*", "*/*") for one in sorted(path.glob(pattern)) if is_experiment(one)]
    above = next((one for one in path.absolute().parents if is_experiment(one)), None)
    advice = f"give one: {', '.join(map(str, below[:5]))}" if below else "give the folder of an experiment"
    return InputError(f"{path} is a {soma_type}, not a SOMA experiment; {f'give {above}' if above else advice}")


def is_experiment(folder: Path) -> bool:
    """Whether a folder looks like an experiment: a group with obs and measurements."""
    return is_soma(folder) and (folder / "obs").is_dir() and (folder / "ms").is_dir()
