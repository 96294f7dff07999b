"""Training of one autoencoder in several processes (ranks), each on its own part of the tokens.

Every rank holds all weights and has its own batch. Gradients are averaged, so a step acts on the batches of all ranks
together. Everything else that a step decides (which features fired, whether the loss is finite, the running threshold)
is summed over ranks first, so all ranks decide alike and their weights stay equal bit for bit: the sum that a
collective returns has the same bits on every rank. All ranks have batches of one size.

Differences to one process on the concatenated batch: BatchTopK and Matryoshka select the k * B largest entries of each
rank's batch, and the ratios in AuxK and in the L0 loss are computed on each rank. TopK without dead features, Gated and
Standard agree up to rounding.

Cost: one reduction of 2 F d_model float32 numbers in each step after the backward pass, not overlapped with it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed


class Communicator:
    """The connection of a rank to the others; this class is for a single process, so nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        """Replace the gradient of each weight by its mean over the ranks."""

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of all ranks in order of rank; every rank gives equally many."""
        return [list(numbers)]


class TorchCommunicator(Communicator):
    """The default process group of `torch.distributed` (gloo on CPUs, nccl on GPUs), which has to exist already."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """`device` is where the tensors are that the backend can send."""
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self._device = torch.device(device)

    def sum_(self, *tensors: Tensor) -> None:
        """See Communicator."""
        for tensor in tensors:
            distributed.all_reduce(tensor)

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        """See Communicator; a weight without a gradient on this rank has gradient 0."""
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            distributed.all_reduce(weight.grad)
            weight.grad /= self.size

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """See Communicator."""
        own = torch.tensor(list(numbers), dtype=torch.int64, device=self._device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(everyone, own)
        return [each.tolist() for each in everyone]
