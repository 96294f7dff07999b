"""The n largest values of each feature, while candidates arrive.

A value is a candidate if it is above the present n-th largest of its feature, or if there are fewer than n. Candidates
wait in a buffer, which is merged by one stable sort once it is as large as the table. Of N values in random order about
n (1 + ln(N / n)) are ever above the n-th largest before them. Of equal values those that came first stay.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sae_core.sae.codes import positions_above

LEAST_BUFFER, LARGEST_BUFFER = 1 << 16, 1 << 23


class TopRows(NamedTuple):
    """Rows by feature and falling value; of equal values the one that came first is first."""

    feature: Int64[Tensor, " row"]
    value: Float[Tensor, " row"]
    columns: list[Tensor]


class TopValues:
    """Keeps the `n` largest values above 0 of each feature, with some columns of each row."""

    def __init__(
        self,
        n_features: int,
        n: int,
        dtypes: tuple[torch.dtype, ...],
        device: torch.device,
        *,
        buffer: int | None = None,
    ) -> None:
        self.n_features, self.n = n_features, n
        self.threshold = torch.full((n_features,), 0.0 if n else torch.inf, device=device)
        """The n-th largest value of each feature; 0 where there are fewer."""
        self._kept = [torch.zeros(0, dtype=dtype, device=device) for dtype in (torch.int64, *dtypes)]
        self._waiting: list[list[Tensor]] = []
        self._n_waiting = 0
        self._buffer = buffer or min(max(n_features * n, LEAST_BUFFER), LARGEST_BUFFER)

    def candidates(self, feature: Int[Tensor, " n"], value: Float[Tensor, " n"]) -> Int64[Tensor, " n_chosen"]:
        """Places of the values that may be among the largest."""
        return positions_above(value > self.threshold.index_select(0, feature), 0.0)

    def add(self, feature: Int[Tensor, " n"], value: Float[Tensor, " n"], *columns: Tensor) -> None:
        """Add candidates, which come after all that were added before."""
        if value.numel() == 0:
            return
        # careful: floats above 0 keep their order as integers
        falling = 0x7FFFFFFF - value.view(torch.int32).long()
        self._waiting.append([(feature.long() << 32) | falling, *columns])
        self._n_waiting += value.numel()
        if self._n_waiting >= self._buffer:
            self._merge()

    def rows(self) -> TopRows:
        """The largest values of each feature."""
        self._merge()
        key, *columns = self._kept
        return TopRows(key >> 32, _value_of(key), columns)

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys, *columns = (torch.cat(parts) for parts in zip(self._kept, *self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        keys, order = torch.sort(keys, stable=True)
        feature = keys >> 32
        # a row has rank n or more in its feature if the row n places before it is of the same feature
        among = torch.ones_like(feature, dtype=torch.bool)
        among[self.n :] = feature[self.n :] != feature[: -self.n]
        places = positions_above(among, 0.0)
        keys, order, feature = keys[places], order[places], feature[places]
        self._kept = [keys, *(column[order] for column in columns)]
        last = self.n - 1
        nth = positions_above(feature[last:] == feature[: max(0, feature.numel() - last)], 0.0) + last
        self.threshold[feature[nth]] = _value_of(keys[nth])


def _value_of(key: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The values in the low half of the keys."""
    return (0x7FFFFFFF - (key & 0xFFFFFFFF)).int().view(torch.float32)
