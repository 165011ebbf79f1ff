# pyright: reportGeneralTypeIssues=false
"""Log-probabilities of chosen tokens, and entropies, from logits that already exist.

With z = logits / temperature, p = softmax(z) and t = target:

    logprob   = z_t - log sum_j exp z_j
    entropy   = -sum_j p_j log p_j                                 p_j log p_j = 0 where z_j = -inf
    d_logit_j = (d_logprob (1[j = t] - p_j) - d_entropy p_j (log p_j + entropy)) / temperature

The forward pass reads n x vocab logits once, the backward pass reads and writes them once: 6 bytes
an element in bf16, 1.74 ms for 8,192 rows of 151,936 at 4.3 TB/s. Nothing else of the logits' size
is allocated but their gradient, and not even that with `inplace_backward`.

The Triton kernels give a row to a program. Each thread keeps a running maximum, so that the online
softmax (Milakov and Gimelshein, arXiv 1805.02867) rescales once for all that a thread loads
together, and threads meet only at the row's end. Everything is in powers of two, whose exponents
are a fused multiply-add each (as in Liger Kernel). Where 16 divides the strides of rows, logits are
loaded and stored 16 bytes at a time, but for the vocab % 16 at a row's end. By instructions 8,192 of
them take an H100's processor 512 clocks, 530 with the entropy; memory takes 880: predicted.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import backward_once, by_triton, check_index, check_temperature, launch, tl, triton
from flashgrpo.kernels.kept import Kept, check_kept, only_kept
from flashgrpo.kernels.logprob_torch import GatherLogprobs, RowLogprobs, row_logprobs

# The order of a row's sums depends on all three, so whatever makes log-probs has the same.
BLOCK = 8192  # logits a program has in registers at a time
NUM_WARPS = 4 if torch.version.hip else 8
_LANES = tl.constexpr(256)  # running maxima and sums, one a thread
HOPPER = {"maxnreg": 48}  # for log-probs, so that five programs share a processor; other chips would spill
ROW_STEP = tl.constexpr(16)  # Triton knows of a stride or a width whether this divides it, and of nothing less
_LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# Times a probability that has underflowed to 0 this is 0, where -inf would give NaN.
_NEVER = tl.constexpr(-1e30)
# A base's rounding is in all of its exponents alike. Below this it could pass 2^128.
_LOWEST_BASE = tl.constexpr(-(2.0**31))


@triton.jit
def _accumulate(x, scale, base, total, moment, ENTROPY: tl.constexpr):
    """Takes a block of logits x into each lane's base, its largest x scale, and with z = x scale - base into its sums
    of 2^z and of 2^z z. What is fused is so by name: were it left to the compiler, kernels might differ.
    """
    LOADED: tl.constexpr = 128 // x.dtype.primitive_bitwidth  # 16 bytes, which lie together in a thread
    x = tl.reshape(x, [x.shape[0] // (_LANES * LOADED), _LANES, LOADED]).to(tl.float32)
    higher = tl.maximum(base, tl.max(tl.max(x, 2), 0) * scale)
    z = tl.fma(x, scale, -higher[None, :, None])
    powers = tl.exp2(z)
    rise = base - higher
    fade = tl.exp2(rise)
    if ENTROPY:
        added = tl.sum(tl.sum(powers * tl.maximum(z, _NEVER), 2), 0)
        moment = tl.fma(fade, tl.fma(total, rise, moment), added)
    return higher, tl.fma(fade, total, tl.sum(tl.sum(powers, 2), 0)), moment


@triton.jit
def whole_steps(width):
    """What of a row is accessed 16 bytes at a time under a mask, and the columns of the rest, of which few are left."""
    whole = width // ROW_STEP * ROW_STEP
    return whole, whole + tl.arange(0, ROW_STEP)


@triton.jit
def row_softmax(row, vocab, scale, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """(base, sum of 2^z, mean of z) of the row at pointer `row`, with base and z as in `_accumulate`."""
    columns = tl.arange(0, BLOCK)
    base = tl.full([_LANES], _LOWEST_BASE, tl.float32)
    total = tl.zeros([_LANES], tl.float32)
    moment = tl.zeros([_LANES], tl.float32)
    whole, rest = whole_steps(vocab)
    blocks = vocab // BLOCK * BLOCK
    for start in range(0, blocks, BLOCK):
        x = tl.load(row + start + columns)
        base, total, moment = _accumulate(x, scale, base, total, moment, ENTROPY)
    if blocks < whole:
        x = tl.load(row + (blocks + columns), mask=blocks + columns < whole, other=float("-inf"))
        base, total, moment = _accumulate(x, scale, base, total, moment, ENTROPY)
    x = tl.load(row + rest, mask=rest < vocab, other=float("-inf")).to(tl.float32)
    highest = tl.maximum(tl.max(base, 0), tl.max(x, 0) * scale)
    z = tl.fma(x, scale, -highest)
    powers = tl.exp2(z)
    rise = base - highest
    fade = tl.exp2(rise)
    row_total = tl.sum(fade * total, 0) + tl.sum(powers, 0)
    mean = 0.0
    if ENTROPY:
        row_moment = tl.sum(fade * tl.fma(total, rise, moment), 0) + tl.sum(powers * tl.maximum(z, _NEVER), 0)
        mean = row_moment / row_total
    return highest, row_total, mean


@triton.jit
def row_logprob(row, target, vocab, scale, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """(log-prob of the target, entropy, base, sum of 2^z) of the row at pointer `row`; 0 for an ignored target."""
    logprob, entropy, base, total = 0.0, 0.0, 0.0, 1.0
    if target != -100:
        # Before the threads meet in `row_softmax`: behind it one of them may already overwrite the row.
        in_range = (target >= 0) & (target < vocab)
        chosen = tl.load(row + target, mask=in_range, other=float("nan")).to(tl.float32)
        base, total, mean = row_softmax(row, vocab, scale, BLOCK, ENTROPY)
        log_total = tl.log2(total)
        if ENTROPY:
            entropy = (log_total - mean) * LN_2
        # Not a plain product: fused with the subtraction of an old log-prob it would leave its rounding as log-ratio.
        logprob = tl.fma(tl.fma(chosen, scale, -base), LN_2, log_total * -LN_2)
    return logprob, entropy, base, total


@triton.jit
def row_slopes(target, vocab, base, total, entropy, d_logprob, d_entropy, scale, is_live):
    """(base, level, tilt, column, to_target): d_logit_j = 2^z_j (level + tilt z_j) + 1[j = column] to_target, with z as
    in `_accumulate`. All are 0 for a row that is not live; `d_entropy` may be None.
    """
    in_range = (target >= 0) & (target < vocab)
    to_target = tl.where(in_range | (d_logprob == 0), d_logprob, float("nan")) * (scale / _LOG2_E)
    level, tilt = to_target, 0.0
    if d_entropy is not None:
        to_entropy = d_entropy * (scale / _LOG2_E)
        level += to_entropy * (entropy - tl.log2(total) * LN_2)
        tilt = tl.where(is_live, to_entropy * -LN_2 / total, 0.0)
    level = tl.where(is_live, -level / total, 0.0)
    column = tl.where(in_range & is_live, target, -1).to(tl.int32)
    return tl.where(is_live, base, 0.0), level, tilt, column, to_target


@triton.jit
def write_gradient(row, d_row, start, stop, slopes, scale, is_live, BLOCK: tl.constexpr, TILTED: tl.constexpr):
    """d_logits of columns from `start` to below `stop`; zeros of a row that is not live, which is not read."""
    base, level, tilt, column, to_target = slopes
    columns = start + tl.arange(0, BLOCK)
    read = columns < tl.where(is_live, stop, 0)
    x = tl.load(row + columns, mask=read, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    z = tl.fma(x, scale, -base)
    if TILTED:
        level = tl.fma(tl.maximum(z, _NEVER), tilt, level)
    gradient = tl.exp2(z) * level
    if (column >= start) & (column < start + BLOCK):
        gradient += tl.where(columns == column, to_target, 0.0)
    tl.store(d_row + columns, gradient, mask=columns < stop, eviction_policy="evict_first")


@triton.jit
def _row(x, rows, outer_stride, row_stride):
    """The program's row of x [outer, rows, width]."""
    n = tl.program_id(0)
    return x + (n // rows).to(tl.int64) * outer_stride + (n % rows).to(tl.int64) * row_stride


@triton.jit(do_not_specialize=["rows"])
def _logprob_fwd_kernel(
    logits, targets, logprobs, entropies, bases, totals, vocab, rows, outer_stride, row_stride, scale,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = _row(logits, rows, outer_stride, row_stride)
    logprob, entropy, base, total = row_logprob(row, tl.load(targets + n), vocab, scale, BLOCK, ENTROPY)
    tl.store(logprobs + n, logprob)
    if ENTROPY:
        tl.store(entropies + n, entropy)
    tl.store(bases + n, base)
    tl.store(totals + n, total)


@triton.jit(do_not_specialize=["rows"])
def _logprob_bwd_kernel(
    logits, d_logits, targets, entropies, bases, totals, d_logprobs, d_entropies, vocab, rows, outer_stride, row_stride,
    d_outer_stride, d_row_stride, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_logits may be the logits: every element is read by the program that writes it, before it does."""
    n = tl.program_id(0)
    target = tl.load(targets + n)
    d_logprob, d_entropy, entropy = 0.0, None, 0.0
    if d_logprobs is not None:
        d_logprob = tl.load(d_logprobs + n)
    if d_entropies is not None:
        d_entropy, entropy = tl.load(d_entropies + n), tl.load(entropies + n)
    row = _row(logits, rows, outer_stride, row_stride)
    d_row = _row(d_logits, rows, d_outer_stride, d_row_stride)
    base, total, is_live = tl.load(bases + n), tl.load(totals + n), target != -100
    slopes = row_slopes(target, vocab, base, total, entropy, d_logprob, d_entropy, scale, is_live)
    whole = vocab // ROW_STEP * ROW_STEP
    start = tl.program_id(1) * BLOCK
    write_gradient(row, d_row, start, whole, slopes, scale, is_live, BLOCK, d_entropies is not None)
    if (whole < vocab) & (start == 0):
        write_gradient(row, d_row, whole, vocab, slopes, scale, is_live, ROW_STEP, d_entropies is not None)


def gather_logprobs(
    logits: Tensor,  # [..., vocab]
    targets: Tensor,  # [...] int32 or int64
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    entropy: bool = True,
    kept: Kept | None = None,  # ids [num_kept], offsets [n + 1], int32 or int64
) -> tuple[Tensor, Any]:  # [...], [...] or None
    """Log-probabilities of `targets` and entropies of softmax(logits / temperature), in nats.

    Both are fp32 (float64 for float64 logits) and differentiable once. Without `entropy` that is
    None, and the log-probs have the same bits. A target of -100 is ignored: log-prob and entropy 0,
    no gradient. Any other target out of range gives a NaN log-prob. With `inplace_backward` the
    gradient is written over the logits, which autograd then refuses to use again.

    With `kept` each row is of a part of the vocabulary, as kept.py has it: row i, as targets are
    flattened, of ids[offsets[i] : offsets[i + 1]], or of all where that is empty. Their order does
    not matter, and a target that is not among them has a NaN log-prob. Logits are copied for it;
    with `inplace_backward` the gradient takes the copy's place.

    `logits[:, :-1]` of [batch, length, vocab] is read where it lies; logits are copied only if all
    dimensions but the last two do not merge into one, and on a GPU if a row is not contiguous. A row
    of which the largest logit over the temperature is not within 1e9 of 0 may give NaN.

    Raises ValueError for shapes that do not fit together, a temperature that is not above 0, and on a CPU kept ids
    beyond the vocabulary; TypeError for wrong dtypes, and for kept sets that are no pair of tensors.
    """
    check_logits(logits, targets, temperature, kept)
    if kept is not None:
        logits = only_kept(logits, targets, *kept)
    rows = _as_rows(logits)
    inplace_backward &= _has_room(rows)
    if by_triton(logits):
        if rows.stride(2) != 1:
            rows, inplace_backward = rows.contiguous(), False
        flat = targets.contiguous().view(-1)
        logprobs, entropies, *_ = _logprob_fwd(rows, flat, temperature, inplace_backward, entropy)
    else:
        pairs = targets.reshape(rows.shape[:2])
        logprobs, entropies = GatherLogprobs.apply(rows, pairs, temperature, inplace_backward, entropy)
    return logprobs.view(targets.shape), entropies.view(targets.shape) if entropy else None


def check_logits(logits: Tensor, targets: Tensor, temperature: float, kept: Kept | None) -> None:
    """Raises as `gather_logprobs` says."""
    if not logits.dim() or not logits.shape[-1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; wanted [..., vocab]")
    if not logits.is_floating_point():
        raise TypeError(f"logits is {logits.dtype}; wanted a floating dtype")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; wanted {list(logits.shape[:-1])}")
    check_index("targets", targets.flatten(), logits.device, targets.numel())
    check_temperature(temperature)
    if kept is not None:
        check_kept(kept, targets, logits.shape[-1])


def _as_rows(logits: Tensor) -> Tensor:  # [..., vocab] -> [outer, rows, vocab]
    """A view with as few as can be for `outer`, as a kernel and its twin take it; a copy where strides allow none."""
    if logits.dim() < 3:
        return logits.reshape(1, -1, logits.shape[-1])
    rows = logits.flatten(0, -3)
    return rows.flatten(0, 1).unsqueeze(0) if rows.stride(0) == rows.shape[1] * rows.stride(1) else rows


def _has_room(rows: Tensor) -> bool:  # [outer, rows, vocab]
    """For a gradient: no two rows share memory."""
    (stride, size), (wide, _) = sorted(zip(rows.stride()[:2], rows.shape[:2], strict=True))
    return stride >= rows.shape[2] and wide >= (size - 1) * stride + rows.shape[2]


class TritonRows(NamedTuple):
    """Rows after the forward kernel, as `RowLogprobs` is after torch's; `gradients` overwrites logits."""

    logits: Tensor  # [rows, vocab] or [outer, rows, vocab], contiguous along rows
    logprobs: Tensor  # [outer * rows] fp32, and so the others
    entropy: Tensor  # empty unless wanted, as the twin's is: an operator's results are tensors
    bases: Tensor  # largest logit times log2(e) / temperature
    totals: Tensor  # sum of exp(logit / temperature) over 2^base

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, temperature: float, entropy: bool = True) -> "TritonRows":
        n = targets.shape[0]
        rows = cls(logits, *(logits.new_empty(size, dtype=torch.float32) for size in (n, n if entropy else 0, n, n)))
        hopper = logits.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(logits.device)[0] == 9
        launch(
            _logprob_fwd_kernel, (n,), logits, targets, *rows[1:], logits.shape[-1], *_strides(logits),
            math.log2(math.e) / temperature, BLOCK=BLOCK, ENTROPY=entropy, num_warps=NUM_WARPS,
            **HOPPER if hopper else {},
        )  # fmt: skip
        return rows

    def gradients(
        self,
        targets: Tensor,  # [outer * rows]
        d_logprobs: Tensor | None,  # [outer * rows] fp32
        d_entropies: Tensor | None,  # [outer * rows] fp32
        temperature: float,
        d_logits: Tensor | None = None,  # as logits, which it is by default
    ) -> Tensor:  # as logits
        d_logits, vocab = self.logits if d_logits is None else d_logits, self.logits.shape[-1]
        upstream = (None if x is None else x.contiguous() for x in (d_logprobs, d_entropies))
        launch(
            _logprob_bwd_kernel, (targets.shape[0], -(-vocab // BLOCK)), self.logits, d_logits, targets, *self[2:],
            *upstream, vocab, *_strides(self.logits), *_strides(d_logits)[1:], math.log2(math.e) / temperature,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        return d_logits


def _strides(rows: Tensor) -> tuple[int, int, int]:  # [rows, vocab] or [outer, rows, vocab]
    """The number of rows, and the strides of `outer` and of rows."""
    return rows.shape[-2], rows.stride(0) if rows.dim() == 3 else 0, rows.stride(-2)


def softmax_rows(
    logits: Tensor,  # [rows, vocab], whose memory is used up
    targets: Tensor,  # [rows]
    temperature: float,
    entropy: bool = True,
) -> RowLogprobs | TritonRows:
    """A chunk of rows after the softmax, by the kernel or by its twin."""
    if by_triton(logits):
        return TritonRows.of(logits, targets, temperature, entropy)
    return row_logprobs(logits, targets, temperature, overwrite=True, entropy=entropy)


@torch.library.custom_op("flashgrpo::logprob_fwd", mutates_args=())
def _logprob_fwd(
    logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropies, bases, totals), [n] each; the last two and `inplace_backward` are for the backward."""
    return TritonRows.of(logits, targets, temperature, entropy)[1:]


@_logprob_fwd.register_fake
def _(logits, targets, temperature, inplace_backward, entropy):
    n = targets.shape[0]
    return tuple(logits.new_empty(size, dtype=torch.float32) for size in (n, n if entropy else 0, n, n))


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
    logits, targets, ctx.temperature, ctx.inplace_backward, entropy = inputs
    ctx.save_for_backward(targets, logits, *output[1:])
    ctx.mark_non_differentiable(*output[2 if entropy else 1 :])
    ctx.set_materialize_grads(False)


@backward_once
def _backward(ctx, *grad_outputs):
    upstream = grad_outputs[:2]
    if all(x is None for x in upstream):
        return None, None, None, None, None
    targets, *saved = ctx.saved_tensors
    logits = saved[0]
    d_logits = logits if ctx.inplace_backward else torch.empty_like(logits, memory_format=torch.contiguous_format)
    _logprob_bwd(d_logits, targets, saved, upstream, ctx.temperature)
    return d_logits, None, None, None, None


_logprob_fwd.register_autograd(_backward, setup_context=_keep_for_backward)
