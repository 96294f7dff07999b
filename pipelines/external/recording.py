"""`scsae.record`: the output of a torch module becomes an activations run while the user's own loop runs the model.

A forward hook takes the output of the module each time that it runs. What it cannot see is which cells and genes the
rows are of: the loop says so before each forward pass (`Recording.batch`).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feature_store.errors import InputError
from pipelines.errors import UsageError
from pipelines.external.blocks import as_numpy
from pipelines.external.writer import ActivationWriter
from pipelines.runtime.stage import StageResult

if TYPE_CHECKING:
    from torch import Tensor, nn


class Recording:
    """What `record` gives to its block.

    Attributes:
        missing: cell_idx of the cells that no committed shard holds; None before the first output, unless `d_model` was
            given, because it decides with the other options which run this is.
        result: what `scsae` prints of an extraction; set at the end.
    """

    def __init__(self, writer: "_LazyWriter", where: str) -> None:
        self._writer, self._where = writer, where
        self._next: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None

    @property
    def missing(self) -> npt.NDArray[np.int64] | None:
        """The cell_idx of the cells that no committed shard holds, once the run is open."""
        return None if self._writer.opened is None else self._writer.opened.missing

    @property
    def result(self) -> StageResult | None:
        """The result of the finished recording."""
        return None if self._writer.opened is None else self._writer.opened.result

    def batch(self, cells: Any, genes: Any) -> None:
        """Say what the next forward pass reads.

        Args:
            cells: the cell of each row [n_rows]: its name in the data, or its number.
            genes: the gene at each position [n_rows n_positions]: its symbol, Ensembl id or `gene_idx` in the data. A
                position without a gene ("", None or a negative number: special tokens and padding) is not stored.

        Raises:
            InputError: the shapes do not fit, or the module did not run after the batch before.
        """
        self.check_taken()
        rows, at = as_numpy(cells), as_numpy(genes)
        if rows.ndim != 1 or at.ndim != 2 or len(at) != len(rows):
            raise InputError(
                f"a batch has cells of shape {rows.shape} and genes of shape {at.shape}; give a cell for each row, and "
                "the genes of its positions as [n_rows n_positions], with '' or -1 where there is none"
            )
        self._next = rows, at

    def take(self, x: "Tensor") -> None:
        """Write the output of the module for the batch that was named."""
        if self._next is None:
            raise InputError(
                f"{self._where} ran, and nothing said of which cells: call `batch(cells, genes)` before each forward "
                "pass"
            )
        (cells, genes), self._next = self._next, None
        if x.shape[:2] != genes.shape or x.ndim != 3:
            raise InputError(
                f"{self._where} gave an output of shape {tuple(x.shape)} for genes of shape {genes.shape}; it has to "
                "be [n_rows n_positions d_model] of these rows and positions (batch_first=False swaps the first two)"
            )
        has_gene = genes >= 0 if genes.dtype.kind in "iu" else ~np.isin(genes.astype(str), ("", "None"))
        row, position = np.nonzero(has_gene)
        self._writer.open(x.shape[2]).write(cells[row], genes[row, position], as_numpy(x)[row, position])

    def check_taken(self) -> None:
        """Raise InputError if a batch was named and the module has not run since."""
        if self._next is not None:
            raise InputError(
                f"a batch of {len(self._next[0])} cells was named, but {self._where} did not run; name a module whose "
                "output the forward pass computes (fused kernels of torch pass over the modules inside a layer)"
            )


class _LazyWriter:
    """The writer, which is opened when the width of the vectors is known."""

    def __init__(self, stack: ExitStack, options: Mapping[str, Any]) -> None:
        self._stack, self._options = stack, options
        self.opened: ActivationWriter | None = None

    def open(self, d_model: int) -> ActivationWriter:
        if self.opened is None:
            self.opened = self._stack.enter_context(ActivationWriter(d_model=d_model, **self._options))
        return self.opened


@contextmanager
def record(
    model: "nn.Module",
    module: "str | nn.Module",
    store: str | Path,
    data: Any,
    *,
    name: str,
    site: str | None = None,
    version: str | None = None,
    d_model: int | None = None,
    batch_first: bool = True,
    **options: Any,
) -> Iterator[Recording]:
    """Record the output of a torch module as an activations run, while the block runs the model.

    >>> with scsae.record(model, "encoder.layers.1", "scsae-store", "cells.h5ad", name="my-model") as recording:
    ...     for cells, genes in batches:
    ...         recording.batch(cells, genes)
    ...         model(genes)

    Args:
        model: the model; its weights are hashed.
        module: the module whose output is stored, [n_rows n_positions d_model] or a tuple that begins with it: a module
            of the model, or its name in `model.named_modules()`.
        store: as in `ActivationWriter`.
        data: as in `ActivationWriter`.
        name: name of the model.
        site: name of the place; default: the name of the module.
        version: version of the model; default: the sha256 of its weights, so that another checkpoint is another run.
        d_model: length of a token's vector; it opens the run at once, so that `recording.missing` says which cells an
            interrupted one lacks. Default: the width of the first output.
        batch_first: whether rows come before positions in the output.
        options: other options of `ActivationWriter`: dtype, donor, batch, cell_type, label, shard_cells, ...

    Raises:
        UsageError: the model has no such module.
        InputError: see `ActivationWriter` and `Recording`.
    """
    path, hooked = _module_of(model, module)
    chosen = {"name": name, "site": site or path, "version": weights_digest(model) if version is None else version}
    with ExitStack() as stack:
        writer = _LazyWriter(stack, {"store": store, "data": data, **chosen, **options})
        recording = Recording(writer, f"the module {path!r} of {name}")
        if d_model is not None:
            writer.open(d_model)

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            x = _first_tensor(output, path)
            recording.take(x if batch_first else x.transpose(0, 1))

        with hooked.register_forward_hook(hook):
            yield recording
        recording.check_taken()
        if writer.opened is None:
            raise InputError(f"the module {path!r} of {name} never ran, so nothing was recorded")


def weights_digest(model: "nn.Module") -> str:
    """The sha256 of the names, types, shapes and bytes of a model's weights and buffers, 64 hex digits."""
    import torch

    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _module_of(model: "nn.Module", module: "str | nn.Module") -> "tuple[str, nn.Module]":
    """The name of a module in the model, and the module."""
    known = dict(model.named_modules())
    if isinstance(module, str):
        if module not in known or not module:
            from feature_store.query.suggestions import did_you_mean

            raise UsageError(
                f"module was {module!r}, and the model has no such one{did_you_mean(module, [*known])}; "
                "model.named_modules() lists them"
            )
        return module, known[module]
    name = next((name for name, one in known.items() if one is module), None)
    if name is None:
        raise UsageError(f"the {type(module).__name__} is no module of the model; give one of model.named_modules()")
    return name or type(model).__name__, module


def _first_tensor(output: Any, path: str) -> "Tensor":
    import torch

    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, torch.Tensor):
        raise InputError(
            f"the module {path!r} gave {type(found).__name__}, not a tensor; name a module whose output is a tensor, "
            "or a tuple that begins with one"
        )
    if found.is_nested:
        raise InputError(f"the module {path!r} gave a nested tensor; make the encoder with enable_nested_tensor=False")
    return found
