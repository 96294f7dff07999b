"""The precision in which the pre-activations of a training batch are ranked, and ranking by a product of integers.

x W_enc^T takes three quarters of a step in float32, and only the k * B largest of its B * F entries are used. A product
of integers of 8 bits is enough to say which entries may be among them:
    1. balance the dimensions, x'_d = x_d / s_d and w'_d = w_d s_d with s_d = sqrt(max |x_d| / max |w_d|), so that a
       dimension with large activations leaves the others their digits (arXiv 2211.10438), and round x' to 7 bits with
       one step for the batch and w' to 8 bits with one step for each feature;
    2. compute `SAMPLE` tokens in float32 as well: they give an estimate of the cutoff, and the root mean square
       e of the error near it;
    3. the candidates are the entries whose approximation exceeds `MARGIN` times the estimate less `ERRORS` * e. Their
       values are computed in float32, and the k * B largest of these are selected.
An entry is missed only if its error is larger than `ERRORS` * e, and only among the entries just above the cutoff. If
the cutoff is lower than estimated, or e is too large, float32 ranks the batch. All of it depends on the batch and the
weights alone, so a resumed run equals an undisturbed one. On activations of the mini model (300 cells of Kang, F 1024,
k 16, every tenth of 200 steps) none of 589,824 entries was missed, and float32 ranked 2 of 20 batches.

Cost, CPU ms on one thread with AVX2 at B 4096, d 512, F 16384: the product of integers takes 480 to 540, that in
float32 960 to 1,040. Seven bits keep sums of two products within 16 bits, so that processors without VNNI do not
saturate.
"""

import platform

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.sae.codes import SparseCodes, positions_above
from sae_core.sae.kernels import Kernel
from sae_core.sae.selectors import batch_topk, largest

SAMPLE = 128  # tokens that are computed in float32 as well
MARGIN = 0.96  # factor on the estimate of the cutoff, whose own error with 128 k chosen entries is below a percent
ERRORS = 5.0  # root mean square errors by which a candidate may lie below the cutoff
MAX_ERROR = 0.05  # of the cutoff: with a larger error the candidates would be too many
BLOCK = 256  # tokens whose approximations exist at a time, so that they stay in the cache
CHUNK = 1024  # features that are rounded at a time, for the same reason


def ranking_on(device: torch.device, precision: str, *, over_batch: bool) -> str:
    """The precision that is used on a device: the one that is asked for where it is faster than float32, else "f32".

    On a CPU, bfloat16 needs AMX (without it a step took 7 times as long, with AVX2 alone), and int8 needs an x86
    processor with AVX2 and an architecture that selects over the whole batch (`over_batch`). What a processor can do
    never changes during a run, unlike a measurement.
    """
    slow_bf16 = device.type == "cpu" and not torch.cpu._is_amx_tile_supported()
    slow = {"f32": False, "bf16": slow_bf16, "int8": not (over_batch and has_int8(device))}
    return "f32" if slow[precision] else precision


def has_int8(device: torch.device) -> bool:
    """Whether a device can rank by integers."""
    x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    has_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return x86 and has_onednn and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


@torch.no_grad()
def batch_topk_by_int8(
    x: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    k: int,
    kernel: Kernel,
) -> SparseCodes | None:
    """The k * n_tokens largest entries of x W_enc^T + b_enc with values in float32, or None if float32 has to rank."""
    n_tokens, wanted, step = len(x), k * len(x), max(1, len(x) // SAMPLE)
    sample = torch.addmm(b_enc, x[::step], W_enc.T)
    chosen = batch_topk(sample, k).value
    cutoff = float(chosen.min()) if chosen.numel() == k * len(sample) else 0.0
    if not (cutoff > 0 and bool(x.isfinite().all())):
        return None
    product = _IntegerProduct(x, W_enc, b_enc)
    near = (sample - cutoff).abs() < cutoff / 2
    error = float((product(slice(None, None, step)) - sample)[near].square().mean().sqrt())
    if not error <= MAX_ERROR * cutoff:  # careful: it is nan where no entry of the sample is near the cutoff
        return None
    floor = MARGIN * cutoff
    n_features = len(W_enc)
    places = []
    for start in range(0, n_tokens, BLOCK):
        block = product(slice(start, start + BLOCK))
        places.append(positions_above(block.flatten(), floor - ERRORS * error) + start * n_features)
    flat = torch.cat(places)
    # careful: values of another type than that of x are computed anew by the kernel, and these are placeholders
    candidates = SparseCodes.from_places(flat, torch.zeros(len(flat), dtype=torch.float16), n_tokens, n_features)
    value = kernel.encode(x, W_enc, b_enc, candidates)
    if int((value >= floor).sum()) < wanted:
        return None
    kept = largest(value, wanted)
    return SparseCodes.from_places(flat[kept], value[kept], n_tokens, n_features)


class _IntegerProduct:
    """Approximate pre-activations of slices of tokens, from one rounding of the batch and the weights."""

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
        tiny, n_features = torch.finfo(x.dtype).tiny, len(W_enc)
        reach = torch.stack([rows.abs().amax(dim=0) for rows in torch.split(W_enc, CHUNK)]).amax(dim=0)
        balance = (x.abs().amax(dim=0).clamp_min(tiny) / reach.clamp_min(tiny)).sqrt()
        x = x / balance
        self._step = max(float(x.abs().max()), tiny) / 63
        self._x = x.div_(self._step).round_().add_(64).to(torch.uint8)
        self._steps = torch.empty(n_features)
        rounded = torch.empty(W_enc.shape, dtype=torch.int8)
        for rows, steps, out in zip(
            torch.split(W_enc, CHUNK), torch.split(self._steps, CHUNK), torch.split(rounded, CHUNK), strict=True
        ):
            weight = rows * balance
            torch.div(weight.abs().amax(dim=1), 127, out=steps).clamp_min_(tiny)
            out.copy_(weight.div_(steps.unsqueeze(1)).round_())
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, list(x.shape))
        self._zero = torch.zeros(n_features, dtype=torch.int32)
        self._bias = b_enc

    def __call__(self, tokens: slice) -> Float[Tensor, "token feature"]:
        """The approximations of some tokens in float32."""
        x = self._x[tokens].contiguous()
        weight = (self._packed, self._steps, self._zero)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, self._step, 64, *weight, self._bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return out
