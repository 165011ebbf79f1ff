# pyright: reportGeneralTypeIssues=false
"""Log-probabilities of chosen tokens, and entropies, from logits that already exist.

With z = logits / temperature, p = softmax(z) and t = target:

    logprob   = z_t - log sum_j exp z_j
    entropy   = -sum_j p_j log p_j                                 p_j log p_j = 0 where z_j = -inf
    d_logit_j = (d_logprob (1[j = t] - p_j) - d_entropy p_j (log p_j + entropy)) / temperature

The forward pass reads n x vocab logits once, the backward pass reads and writes them once: 6 bytes
an element in bf16, 1.74 ms for 8,192 rows of 151,936 at 4.3 TB/s. Neither allocates anything else
of the logits' size but their gradient, and not even that with `inplace_backward`. Double backward
raises.

The Triton kernels give a row to a program. Its threads keep a running maximum for each 8 logits
that they load together, so that the online softmax (Milakov and Gimelshein, arXiv 1805.02867)
rescales once in 8 and threads meet only at the row's end. Everything is in powers of two. Where 16
divides the stride of rows, logits are loaded and stored 16 bytes at a time, but for the vocab % 16
at a row's end.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import backward_once, by_triton, check_index, check_temperature, launch, tl, triton
from flashgrpo.kernels.logprob_torch import GatherLogprobs, RowLogprobs, row_logprobs

# The order of a row's sums depends on both, so whatever makes log-probs has the same. Two programs fill a processor.
BLOCK = 16_384  # logits a program has in registers at a time
SLICE = 8  # of them a thread has in a row: 16 bytes of bf16
NUM_WARPS = 16
ROW_STEP = tl.constexpr(16)  # Triton knows of a stride or a width whether this divides it, and of nothing less
_LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# Times a probability that has underflowed to 0 this is 0, where -inf would give NaN.
_NEVER = tl.constexpr(-1e30)


@triton.jit
def _accumulate(x, scale, peak, total, moment, SLICE: tl.constexpr):
    """Takes a block of logits x into each slice's running maximum, and with z = (x - peak) scale its sums of 2^z and of
    2^z z. A maximum that is still -inf counts as 0.
    """
    x = tl.reshape(x, [x.shape[0] // SLICE, SLICE])
    higher = tl.maximum(peak, tl.max(x, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    z = (x - base[:, None]) * scale
    powers = tl.exp2(z)
    rise = tl.maximum((peak - base) * scale, _NEVER)
    fade = tl.exp2(rise)
    moment = fade * (moment + total * rise) + tl.sum(powers * tl.maximum(z, _NEVER), 1)
    return higher, fade * total + tl.sum(powers, 1), moment


@triton.jit
def whole_steps(width):
    """What of a row is accessed 16 bytes at a time under a mask, and the columns of the rest, of which few are left."""
    whole = width // ROW_STEP * ROW_STEP
    return whole, whole + tl.arange(0, ROW_STEP)


@triton.jit
def row_softmax(row, vocab, scale, BLOCK: tl.constexpr, SLICE: tl.constexpr):
    """(largest logit, log2 of the sum of 2^z, mean of z) of the row at pointer `row`, with z as in `_accumulate`."""
    columns = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK // SLICE], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // SLICE], tl.float32)
    moment = tl.zeros([BLOCK // SLICE], tl.float32)
    whole, rest = whole_steps(vocab)
    blocks = vocab // BLOCK * BLOCK
    for start in range(0, blocks, BLOCK):
        x = tl.load(row + start + columns).to(tl.float32)
        peak, total, moment = _accumulate(x, scale, peak, total, moment, SLICE)
    if blocks < whole:
        x = tl.load(row + blocks + columns, mask=blocks + columns < whole, other=float("-inf")).to(tl.float32)
        peak, total, moment = _accumulate(x, scale, peak, total, moment, SLICE)
    x = tl.load(row + rest, mask=rest < vocab, other=float("-inf")).to(tl.float32)
    highest = tl.maximum(tl.max(peak, 0), tl.max(x, 0))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    rise = tl.maximum((peak - highest) * scale, _NEVER)
    fade = tl.exp2(rise)
    z = (x - highest) * scale
    powers = tl.exp2(z)
    row_total = tl.sum(fade * total, 0) + tl.sum(powers, 0)
    row_moment = tl.sum(fade * (moment + total * rise), 0) + tl.sum(powers * tl.maximum(z, _NEVER), 0)
    return highest, tl.log2(row_total), row_moment / row_total


@triton.jit
def row_logprob(row, target, vocab, scale, BLOCK: tl.constexpr, SLICE: tl.constexpr):
    """(log-prob of the target, entropy, peak, log total) of the row at pointer `row`; zeros for an ignored target."""
    logprob, entropy, peak, log_total = 0.0, 0.0, 0.0, 0.0
    if target != -100:
        # Before the threads meet in `row_softmax`: behind it one of them may already overwrite the row.
        in_range = (target >= 0) & (target < vocab)
        chosen = tl.load(row + target, mask=in_range, other=float("nan")).to(tl.float32)
        peak, log_total, mean = row_softmax(row, vocab, scale, BLOCK, SLICE)
        entropy = (log_total - mean) * LN_2
        logprob = ((chosen - peak) * scale - log_total) * LN_2
    return logprob, entropy, peak, log_total


@triton.jit
def row_gradient(x, columns, target, vocab, peak, log_total, entropy, to_target, d_entropy, scale):
    """d_logits of logits x at `columns`, by the gradients by log-prob and by entropy (None: 0)."""
    log_p = (x - peak) * scale - log_total
    to_target = tl.where((target >= 0) & (target < vocab) | (to_target == 0), to_target, float("nan"))
    slope = to_target
    if d_entropy is not None:
        slope += d_entropy * (tl.maximum(log_p, _NEVER) * LN_2 + entropy)
    return (tl.where(columns == target, to_target, 0.0) - tl.exp2(log_p) * slope) * (scale / _LOG2_E)


@triton.jit
def write_gradient(
    row, d_row, columns, stop, target, vocab, peak, log_total, entropy, to_target, d_entropy, scale, is_live
):  # fmt: skip
    """d_logits of the columns below `stop`; zeros of a row that is not live, which is not read."""
    gradient = tl.zeros(columns.shape, tl.float32)
    if is_live:
        x = tl.load(row + columns, mask=columns < stop, other=float("-inf")).to(tl.float32)
        gradient = row_gradient(x, columns, target, vocab, peak, log_total, entropy, to_target, d_entropy, scale)
    tl.store(d_row + columns, gradient, mask=columns < stop)


@triton.jit
def _logprob_fwd_kernel(
    logits, targets, logprobs, entropies, peaks, log_totals, vocab, row_stride, scale,
    BLOCK: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    logprob, entropy, peak, log_total = row_logprob(
        logits + n * row_stride, tl.load(targets + n), vocab, scale, BLOCK, SLICE
    )
    tl.store(logprobs + n, logprob)
    tl.store(entropies + n, entropy)
    tl.store(peaks + n, peak)
    tl.store(log_totals + n, log_total)


@triton.jit
def _logprob_bwd_kernel(
    logits, d_logits, targets, entropies, peaks, log_totals, d_logprobs, d_entropies, vocab, row_stride, d_row_stride,
    scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_logits may be the logits: every element is read by the program that writes it, before it does."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + n)
    to_target = 0.0
    if d_logprobs is not None:
        to_target = tl.load(d_logprobs + n)
    d_entropy = None
    if d_entropies is not None:
        d_entropy = tl.load(d_entropies + n)
    row, d_row, is_live = logits + n * row_stride, d_logits + n * d_row_stride, target != -100
    peak, log_total, entropy = tl.load(peaks + n), tl.load(log_totals + n), tl.load(entropies + n)
    whole, rest = whole_steps(vocab)
    write_gradient(
        row, d_row, columns, whole, target, vocab, peak, log_total, entropy, to_target, d_entropy, scale, is_live
    )
    if (whole < vocab) & (tl.program_id(1) == 0):
        write_gradient(
            row, d_row, rest, vocab, target, vocab, peak, log_total, entropy, to_target, d_entropy, scale, is_live
        )


def gather_logprobs(
    logits: Tensor,  # [n, vocab], any stride over rows
    targets: Tensor,  # [n] int32 or int64
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Log-probabilities of `targets` and entropies of softmax(logits / temperature), in nats.

    Both are fp32 (float64 for float64 logits) and differentiable once. A target of -100 is ignored:
    log-prob and entropy 0, no gradient. Any other target out of range gives a NaN log-prob. With
    `inplace_backward` the gradient is written over the logits, which autograd then refuses to use
    again.

    Raises ValueError for shapes that do not fit together and a temperature that is not above 0; TypeError for wrong
    dtypes.
    """
    check_logits(logits, targets, temperature)
    inplace_backward &= logits.stride(0) >= logits.shape[1]  # rows that share memory have no place for gradients
    if by_triton(logits):
        if logits.stride(1) != 1:
            logits, inplace_backward = logits.contiguous(), False
        return _logprob_fwd(logits, targets.contiguous(), temperature, inplace_backward)[:2]
    return GatherLogprobs.apply(logits, targets, temperature, inplace_backward)


def check_logits(logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Raises as `gather_logprobs` says."""
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; wanted [n, vocab]")
    if not logits.is_floating_point():
        raise TypeError(f"logits is {logits.dtype}; wanted a floating dtype")
    check_index("targets", targets, logits.device, logits.shape[0])
    check_temperature(temperature)


class TritonRows(NamedTuple):
    """A chunk of rows after the forward kernel, as `RowLogprobs` is after torch's; `gradients` overwrites logits."""

    logits: Tensor  # [rows, vocab], contiguous along rows
    logprobs: Tensor  # [rows] fp32, and so the others
    entropy: Tensor
    peaks: Tensor  # largest logit
    log_totals: Tensor  # log2 of the sum of exp((logit - peak) / temperature)

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, temperature: float) -> "TritonRows":
        n, vocab = logits.shape
        rows = cls(logits, *(logits.new_empty(n, dtype=torch.float32) for _ in range(4)))
        launch(
            _logprob_fwd_kernel, (n,), logits, targets, *rows[1:], vocab, logits.stride(0),
            math.log2(math.e) / temperature, BLOCK=BLOCK, SLICE=SLICE, num_warps=NUM_WARPS,
        )  # fmt: skip
        return rows

    def gradients(
        self,
        targets: Tensor,  # [rows]
        d_logprobs: Tensor | None,  # [rows] fp32
        d_entropies: Tensor | None,  # [rows] fp32
        temperature: float,
        d_logits: Tensor | None = None,  # [rows, vocab], contiguous along rows; the logits by default
    ) -> Tensor:  # [rows, vocab]
        n, vocab = self.logits.shape
        d_logits = self.logits if d_logits is None else d_logits
        upstream = (None if x is None else x.contiguous() for x in (d_logprobs, d_entropies))
        launch(
            _logprob_bwd_kernel, (n, -(-vocab // BLOCK)), self.logits, d_logits, targets, *self[2:], *upstream,
            vocab, self.logits.stride(0), d_logits.stride(0), math.log2(math.e) / temperature,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        return d_logits


def softmax_rows(
    logits: Tensor,  # [rows, vocab], whose memory is used up
    targets: Tensor,  # [rows]
    temperature: float,
) -> RowLogprobs | TritonRows:
    """A chunk of rows after the softmax, by the kernel or by its twin."""
    if by_triton(logits):
        return TritonRows.of(logits, targets, temperature)
    return row_logprobs(logits, targets, temperature, overwrite=True)


@torch.library.custom_op("flashgrpo::logprob_fwd", mutates_args=())
def _logprob_fwd(
    logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropies, peaks, log totals), [n] each; the last two and `inplace_backward` are for the backward."""
    return TritonRows.of(logits, targets, temperature)[1:]


@_logprob_fwd.register_fake
def _(logits, targets, temperature, inplace_backward):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("flashgrpo::logprob_bwd", mutates_args=("d_logits",))
def _logprob_bwd(
    d_logits: Tensor, targets: Tensor, saved: Sequence[Tensor], upstream: Sequence[Tensor | None], temperature: float
) -> None:
    """Writes d_logits, which may be the logits; rows of both are contiguous. `saved` has the fields of TritonRows but
    the log-probs: they are the caller's, who may overwrite them.
    """
    logits, *rest = saved
    d_logprobs, d_entropies = upstream
    TritonRows(logits, rest[0], *rest).gradients(targets, d_logprobs, d_entropies, temperature, d_logits)


def _keep_for_backward(ctx, inputs, output):
    logits, targets, ctx.temperature, ctx.inplace_backward = inputs
    ctx.save_for_backward(targets, logits, *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


@backward_once
def _backward(ctx, *grad_outputs):
    upstream = grad_outputs[:2]
    if all(x is None for x in upstream):
        return None, None, None, None
    targets, *saved = ctx.saved_tensors
    logits = saved[0]
    d_logits = logits if ctx.inplace_backward else torch.empty_like(logits, memory_format=torch.contiguous_format)
    _logprob_bwd(d_logits, targets, saved, upstream, ctx.temperature)
    return d_logits, None, None, None


_logprob_fwd.register_autograd(_backward, setup_context=_keep_for_backward)
