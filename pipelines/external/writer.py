"""`scsae.ActivationWriter`: activations of tokens that any program computes, as a run of the store.

Blocks of tokens may come in any order of the cells, each cell in one block. A shard, a range of cells, is committed as
soon as every one of its cells has been given, and what is left at the end of the block; until then its tokens are held
in memory, and beyond `buffer_size` in a temporary folder of the run. A block that raises leaves the committed shards
and no manifest: the run is unfinished, and the same writer takes the cells that are missing. A run that is complete is
not written again.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from feature_store.activations import ActivationWriter as PartWriter
from feature_store.activations import to_stored
from feature_store.cells import Source, read_split_record
from feature_store.errors import InputError
from feature_store.storage import commit, filesystem
from feature_store.storage.hashing import content_sha, sealed
from feature_store.storage.layout import MODEL_FILE, TEMPORARY, Layout, as_path
from feature_store.storage.plans import ActivationsPlan
from pipelines.activations import create_activations, write_data_set
from pipelines.config import ActorOptions, CellOptions, ForwardOptions, check, parse_size
from pipelines.config.options import as_tuple
from pipelines.errors import UsageError
from pipelines.external.blocks import Spool, TokenNames
from pipelines.given_data import open_given
from pipelines.inputs import genes_as_tokens, save_token_of_gene
from pipelines.runtime.stage import Clock, StageResult
from pipelines.shard_size import ACTIVATIONS_SHARD, ITEMSIZE, cells_per_shard

TYPICAL_TOKENS = 1000
"""Tokens of a cell from which the cells of a shard follow: the real number is known at the end."""


class ActivationWriter:
    """Writes the activations of tokens that another program computes; a context manager.

    >>> with scsae.ActivationWriter("scsae-store", "cells.h5ad", name="my-model", d_model=512) as writer:
    ...     for cells, genes, x in batches:
    ...         writer.write(cells, genes, x)
    >>> scsae.train()

    Args:
        store: folder of the store, or s3://BUCKET/PREFIX.
        data: the .h5ad files or .zarr folders with the cells, or an AnnData, which is written into the store, because
            later stages read the expression again.
        name: name of the model.
        d_model: length of a token's vector.
        site: where in the model the vectors are read, in any words.
        version: version of the model. Store, data, name, version and site name the run: change the version when the
            model changes, because an unfinished run of the same version is resumed.
        dtype: number type in which the activations are stored: f16, bf16 or f32.
        matrix, where, donor, batch, cell_type, label, split, split_by, panel, seed: as in `scsae.extract`.
        shard_cells: number of cells in a shard; default: as many as have 256 MB of a thousand tokens each, or a 16th
            of the cells if that is less.
        buffer_size: size of the tokens that are held in memory, e.g. 512MB.

    Attributes:
        source: the data set: its cells and genes.
        run: id of the run.
        missing: cell_idx of the cells that no committed shard holds, ascending.
        result: what `scsae` prints of an extraction; set at the end.

    Raises:
        InputError, UsageError: data or options are wrong; nothing is written. Or, on entering, the run is complete.
        BusyError: another process writes this run.
    """

    def __init__(
        self,
        store: str | Path,
        data: Any,
        *,
        name: str,
        d_model: int,
        site: str = "recorded",
        version: str = "",
        dtype: str = "f16",
        matrix: str | None = None,
        where: str | None = None,
        donor: str | None = None,
        batch: str | None = None,
        cell_type: str | None = None,
        label: str | Sequence[str] = (),
        split: str | None = None,
        split_by: str | None = None,
        panel: int | None = None,
        seed: int = 0,
        shard_cells: int | None = None,
        buffer_size: str = "512MB",
    ) -> None:
        columns: dict[str, Any] = {"donor": donor, "batch": batch, "cell_type": cell_type, "panel": panel}
        columns["where"] = where
        columns |= {"split": split, "split_by": split_by, "label": as_tuple(label)}
        given = {key: value for key, value in columns.items() if value is not None}
        self._columns = check(CellOptions, given, "scsae.ActivationWriter")
        self._shards = check(ForwardOptions, {"shard_cells": shard_cells}, "scsae.ActivationWriter")
        for word, value in (("name", name), ("site", site), ("version", version)):
            if not value.isprintable() or (word != "version" and not value.strip()):
                raise UsageError(f"{word} was {value!r}; give a text of printable characters")
        if dtype not in ITEMSIZE:
            raise UsageError(f"dtype was {dtype!r}; it is one of {', '.join(ITEMSIZE)}")
        if d_model < 1:
            raise UsageError(f"d_model was {d_model}; it is the length of a token's vector, at least 1")
        self._layout, self._data, self._matrix = Layout(as_path(store)), data, matrix
        self._name, self._site, self._version = name, site, version
        self._d_model, self._dtype, self._seed = d_model, dtype, seed
        self._buffer_bytes = parse_size(buffer_size)
        self._stack = ExitStack()
        self.result: StageResult | None = None

    def __enter__(self) -> Self:
        clock = Clock()
        with ExitStack() as stack:
            filesystem.check_writable(self._layout.root)
            self.source: Source = stack.enter_context(
                open_given(self._data, self._layout, matrix=self._matrix, where=self._columns.where)
            )
            self._names = TokenNames(self.source)
            run = self._create()
            stack.enter_context(run.exclusive())
            _remove_scratch(run.path)
            pending = run.pending()
            if not pending:
                run.finalize()
                raise InputError(
                    f"activations/{run.path.name} in {self._layout.root} is complete: it holds {self._site} of "
                    f"{self._name}{self._version and f' {self._version}'} on these cells; use it, or give another "
                    "version to record another model"
                )
            beside = run.path if filesystem.is_local(run.path) else None
            scratch = Path(stack.enter_context(TemporaryDirectory(dir=beside, prefix=TEMPORARY)))
            self._stack = stack.pop_all()
        self._run, self.run, self._clock = run, run.path.name, clock
        self._pending, self._n_reused = set(pending), run.n_shards - len(pending)
        self._spool = Spool(scratch, buffer_bytes=self._buffer_bytes)
        self._is_given = np.zeros(self.source.n_cells, dtype=bool)
        self._n_tokens = 0
        self._first_missing = self.missing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    @property
    def missing(self) -> npt.NDArray[np.int64]:
        """The cell_idx of the cells that no committed shard holds, ascending."""
        spans = [np.arange(*self._span(shard), dtype=np.int64) for shard in sorted(self._pending)]
        return np.concatenate([np.empty(0, np.int64), *spans])

    def write(self, cells: Any, genes: Any, vectors: Any) -> None:
        """Take the tokens of some cells; all tokens of a cell come in one block, in the order of their positions.

        Args:
            cells: the cell of each token [n_tokens]: its name in the data, or its number (from 0).
            genes: the gene of each token [n_tokens]: its symbol or Ensembl id in the data, or its `gene_idx`.
            vectors: the activations, a float array or tensor [n_tokens d_model].

        Tokens of cells that are committed already are left out.

        Raises:
            InputError: a cell or gene is not in the data, a cell was given before, a number is not finite or the dtype
                cannot hold it, or lengths or width do not fit. The block is not taken.
        """
        block = self._names.block(cells, genes, vectors, d_model=self._d_model, dtype=self._dtype)
        shard = block.cell_idx // self._plan.shard_cells
        block, shard = block.of_shards(shard, self._pending)
        act = to_stored(block.act, self._dtype)
        given = np.unique(block.cell_idx)
        if self._is_given[given].any():
            cell = int(given[self._is_given[given]][0])
            raise InputError(f"cell {self._names.cell(cell)!r} was given twice; give all tokens of a cell in one block")
        self._is_given[given] = True
        self._n_tokens += len(block.cell_idx)
        for number in np.unique(shard).tolist():
            own = shard == number
            self._spool.add(number, block.cell_idx[own], block.gene_id[own], act[own])
        self._spool.spill()
        for number in np.unique(shard).tolist():
            if self._is_given[slice(*self._span(number))].all():
                self._commit(number)

    def _create(self) -> commit.Run:
        """Write the tables of the data set and create the run, or open one that was interrupted."""
        dataset, _ = write_data_set(self._layout, self.source, self._columns, actors=ActorOptions(), seed=self._seed)
        n_cells = self.source.n_cells
        self._plan = ActivationsPlan(
            control_of=None,
            origin="recorded",
            dataset=dataset,
            cells=None,
            genes=None,
            model=self._name,
            model_digest=content_sha({"name": self._name, "version": self._version}),
            site=self._site,
            d_model=self._d_model,
            dtype=self._dtype,
            precision="f32",
            tokens_per_cell=None,
            readout=None,
            seed=self._seed,
            n_cells=n_cells,
            shard_cells=cells_per_shard(
                self._shards,
                mean_tokens=TYPICAL_TOKENS,
                n_cells=n_cells,
                default=ACTIVATIONS_SHARD,
                row_bytes=self._d_model * ITEMSIZE[self._dtype],
                rows_per_cell=None,
            ),
        )
        run = create_activations(self._layout, self._plan, None)
        recorded = {"recorded": self._name, "version": self._version, "site": self._site}
        filesystem.replace_text(run.path / MODEL_FILE, sealed(recorded))
        save_token_of_gene(run.path, genes_as_tokens(self.source), run.plan_sha)
        return run

    def _span(self, shard: int) -> tuple[int, int]:
        start = shard * self._plan.shard_cells
        return start, min(start + self._plan.shard_cells, self._plan.n_cells)

    def _commit(self, shard: int) -> None:
        """Commit a shard with the tokens that were given of it, by cell and then in their order."""
        start, stop = self._span(shard)
        metadata = {"site": self._site, "plan_sha": self._run.plan_sha, "dtype": self._dtype}

        def write(path: Path) -> int:
            tokens = self._spool.take(shard, d_model=self._d_model)
            with PartWriter(path, self._d_model, metadata) as part:
                part.write(tokens.cell_idx, tokens.positions(), tokens.gene_id, tokens.act)
            return len(tokens.cell_idx)

        self._run.commit_shard(shard, write, start=start, stop=stop)
        self._spool.drop(shard)
        self._pending.discard(shard)

    def _finish(self) -> None:
        """Commit what is left and finish the run."""
        if not self._n_tokens and len(self._pending) == self._run.n_shards:
            raise InputError(
                f"no token was written to activations/{self.run}, so it stays unfinished; give blocks to `write`"
            )
        n_done = self._run.n_shards - self._n_reused
        for shard in sorted(self._pending):
            self._commit(shard)
        manifest = self._run.finalize()
        n_without = len(self._first_missing) - int(self._is_given[self._first_missing].sum())
        without = f"{n_without:,} of {self.source.n_cells:,}: none of their tokens was given"
        self.result = StageResult(
            kind="activations",
            run=self.run,
            path=self._run.path,
            done=n_done,
            reused=self._n_reused,
            seconds=self._clock.seconds,
            facts={
                "dataset": self._plan.dataset,
                "cells": self.source.n_cells,
                "recorded from": f"{self._name}{self._version and f' {self._version}'}",
                **({"CELLS WITHOUT TOKENS": without} if n_without else {}),
                "splits": read_split_record(self._layout.cells_dir(self._plan.dataset)).text,
                "site": self._site,
                "tokens": manifest.rows,
            },
        )


def _remove_scratch(run: Path) -> None:
    """Remove the temporary folders that killed programs left in the folder of a run that this process has locked."""
    for left in run.glob(f"{TEMPORARY}*") if filesystem.is_local(run) else ():
        if left.is_dir():
            filesystem.remove_folder(left)
