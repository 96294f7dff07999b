"""Several ranks: two processes over gloo, and two threads where many cases have to be fast."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch
from ranks import on_two_ranks

from sae_core.errors import TrainingError
from sae_core.sae import ARCHITECTURES, Normaliser, SAEConfig, TrainConfig, Trainer
from sae_core.sae.parallel import Communicator

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


class Meeting:
    """Where two threads exchange what they have."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=100)
        self.given: list[object] = [None, None]

    def exchange(self, rank: int, value: object) -> list[object]:
        self.given[rank] = value
        self.barrier.wait()
        everyone = list(self.given)
        self.barrier.wait()
        return everyone


class ThreadCommunicator(Communicator):
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self.meeting = rank, 2, meeting

    def sum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            tensor.copy_(sum(self.meeting.exchange(self.rank, tensor.clone())))

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            self.sum_(weight.grad)
            weight.grad /= 2

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        return self.meeting.exchange(self.rank, list(numbers))


def config(arch: str) -> SAEConfig:
    return SAEConfig(d_model=32, n_features=64, k=3, arch=arch, aux_coefficient=0.0)


def trainer(synthetic, arch: str, communicator: Communicator | None = None) -> Trainer:
    # careful: a dead window that is never reached, as AuxK is taken a rank at a time
    schedule = TrainConfig(n_steps=40, batch_size=256, dead_window_tokens=600)
    return Trainer(config(arch), schedule, Normaliser.fit([synthetic.sample(1000, 1)]), communicator=communicator)


def two(synthetic, arch: str, n_steps: int = 6, spoil: int | None = None) -> list[Trainer]:
    """Both ranks after some steps, each on its half of every batch."""
    meeting = Meeting()

    def run(rank: int) -> Trainer:
        mine = trainer(synthetic, arch, ThreadCommunicator(rank, meeting))
        for step in range(n_steps):
            x = synthetic.sample(256, step).chunk(2)[rank].clone()
            if rank == 1 and step == spoil:
                x[5, 7] = torch.nan
            mine.step(x)
        return mine

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(2)]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ranks_hold_the_same_state_bit_for_bit(synthetic, arch):
    one, other = (each.state_dict() for each in two(synthetic, arch))
    assert one.meta == other.meta
    for name, value in one.tensors.items():
        assert torch.equal(value, other.tensors[name]), name


@pytest.mark.parametrize("arch", ["topk", "gated", "standard"])
def test_two_ranks_equal_one_on_both_batches_up_to_rounding(synthetic, arch):
    both, _ = two(synthetic, arch)
    alone = trainer(synthetic, arch)
    for step in range(6):
        alone.step(synthetic.sample(256, step))
    for name, value in alone.state_dict().tensors.items():
        torch.testing.assert_close(both.state_dict().tensors[name], value, rtol=1e-4, atol=2e-5, msg=name)
    assert torch.equal(both.tokens_since_fired, alone.tokens_since_fired)


def test_what_a_step_says_is_of_all_ranks(synthetic):
    meeting = Meeting()

    def run(rank: int):
        mine = trainer(synthetic, "topk", ThreadCommunicator(rank, meeting))
        return mine.step(synthetic.sample(256, 0).chunk(2)[rank])

    with ThreadPoolExecutor(2) as pool:
        one, other = (future.result() for future in [pool.submit(run, rank) for rank in range(2)])
    alone = trainer(synthetic, "topk").step(synthetic.sample(256, 0))
    assert one == other
    assert one.l0 == alone.l0
    assert one.mse == pytest.approx(alone.mse, rel=1e-5)


def test_a_value_that_is_not_finite_on_one_rank_stops_all_at_the_same_step(synthetic):
    with pytest.raises(TrainingError, match=r"step 4 is nan.*\b1 values"):
        two(synthetic, "topk", spoil=3)


GLOO = """
import torch
from sae_core.sae import Normaliser, SAEConfig, TrainConfig, Trainer
folder = sys.argv[1]
torch.set_num_threads(1)
data = torch.load(f"{folder}/data.pt", weights_only=True)
config = SAEConfig(d_model=32, n_features=64, k=3, arch="topk")
trainer = Trainer(config, TrainConfig(n_steps=10, batch_size=256), Normaliser.fit([data]), communicator=ranks)
for x in data.split(256): trainer.step(x.chunk(2)[rank])
assert ranks.gather([rank, 7]) == [[0, 7], [1, 7]]
torch.save(trainer.state_dict().tensors, f"{folder}/{rank}.pt")
"""


def test_two_processes_over_gloo_hold_the_same_bits_and_equal_one_process(synthetic, tmp_path):
    data = synthetic.sample(1024, 0)
    torch.save(data, tmp_path / "data.pt")
    on_two_ranks(GLOO, tmp_path, meet=tmp_path / "meet")
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    schedule = TrainConfig(n_steps=10, batch_size=256)
    alone = Trainer(SAEConfig(d_model=32, n_features=64, k=3, arch="topk"), schedule, Normaliser.fit([data]))
    for x in data.split(256):
        alone.step(x)
    for name, value in alone.state_dict().tensors.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=2e-5, msg=name)
