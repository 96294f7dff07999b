"""Several processes (ranks) that train one autoencoder, each on its own share of the tokens.

Every rank holds all weights and takes its own batch; gradients are averaged, so a step is one on the batches of all
ranks together. What else a step decides (who fired, whether the loss is finite, the running threshold) is summed over
the ranks first, so every rank decides alike and their weights stay equal bit for bit: the sum that a collective returns
has the same bits on every rank. Batches are of one size on all ranks.

What is not the same as one process on the concatenated batch: BatchTopK and Matryoshka choose the k * B largest of each
rank's batch, not of all together, and the ratios in AuxK and in the L0 loss are taken a rank at a time. TopK without
dead features, Gated and Standard agree up to rounding.

Cost: one reduction of 2 F d_model float32 a step after the backward pass, not overlapped with it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed


class Communicator:
    """The ranks that train together, as one of them sees them; this one is alone, and all its methods do nothing."""

    rank: int = 0
    size: int = 1

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        """Replace the gradient of each weight by its mean over the ranks."""

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, as many on each, in order of rank."""
        return [list(numbers)]


class TorchCommunicator(Communicator):
    """The default process group of `torch.distributed`: gloo on CPUs, nccl on GPUs. It has to be there already."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """`device`: where tensors lie that this backend can send."""
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self._device = torch.device(device)

    def sum_(self, *tensors: Tensor) -> None:
        """See Communicator."""
        for tensor in tensors:
            distributed.all_reduce(tensor)

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        """See Communicator; a weight without a gradient here counts as one with a gradient of 0."""
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
