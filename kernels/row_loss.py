# pyright: reportGeneralTypeIssues=false
"""Rows of logits to the token-level loss and, in place of the logits, their gradient: one kernel.

A launch beforehand gives every token the advantage and the length of its completion. Then a program takes a row: it
reads it for log-prob and entropy, makes the loss and its gradient by them as loss_triton.py does, and reads the row
again, backwards, to write the gradient of its logits. The second read comes from L2 as far as the rows at work fit:
the 264 of an H200 in 50 MB if they have up to 95,000 logits, and more than half of 151,936. A row whose gradient is 0
is not read again. 4 bytes an element in bf16 from and to memory, or 6 without L2: for 8,192 rows of 151,936 that takes
at least 1.16 or 1.74 ms at 4.3 TB/s.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flashgrpo.kernels import logprob, loss_triton
from flashgrpo.kernels.common import launch, tl, triton
from flashgrpo.kernels.logprob import row_gradient, row_logprob
from flashgrpo.kernels.loss_triton import completions_of, log_ratio_and_mismatch, loss_of_tokens


@triton.jit(do_not_specialize=["n", "num_sequences", "num_rewards", "group_size"])
def _advantage_kernel(
    token_advantages, token_lengths, targets, offsets, rewards, sequence_ids, advantages, n, num_sequences, num_rewards,
    group_size, eps, by_deviation, BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    rows = start + tl.arange(0, BLOCK)
    nothing = tl.zeros([BLOCK], tl.float32)
    advantage, length, _, _ = completions_of(
        rows, start, tl.minimum(start + BLOCK, n), nothing, nothing, None, targets, offsets, rewards, sequence_ids,
        advantages, None, None, num_sequences, num_rewards, group_size, eps, by_deviation, 0, BLOCK, GROUP_BLOCK,
    )  # fmt: skip
    tl.store(token_advantages + rows, advantage, mask=rows < n)
    tl.store(token_lengths + rows, length, mask=rows < n)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _row_loss_kernel(
    logits, d_logits, token_advantages, token_lengths, targets, old, ref, behavior, logprobs, entropies, live, partials,
    denominators, first_row, num_rows, vocab, row_stride, d_row_stride, scale,
    clip_low, clip_high, clip_max, kl_coef, entropy_coef, behavior_cap, behavior_floor,
    kl_estimator, cispo, over_tokens, has_cap, mask_behavior, denominator,
    BLOCK: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """d_logits may be the logits, whose first row is that of token `first_row`. An entropy_coef of None is 0."""
    n = tl.program_id(0).to(tl.int64)
    token = first_row + n
    target = tl.load(targets + token)
    row = logits + n * row_stride
    logprob, entropy, peak, log_total = row_logprob(row, target, vocab, scale, BLOCK, SLICE)
    tl.store(logprobs + token, logprob)
    tl.store(entropies + token, entropy)

    one = token + tl.arange(0, 1)
    log_ratio, mismatch = log_ratio_and_mismatch(one, one >= 0, tl.full([1], logprob, tl.float32), old, behavior)
    coefficient = 0.0
    if entropy_coef is not None:
        coefficient = entropy_coef
    slope, bonus = loss_of_tokens(
        one, tl.full([1], logprob, tl.float32), tl.full([1], entropy, tl.float32), log_ratio, mismatch, mismatch,
        tl.load(token_advantages + one), tl.load(token_lengths + one), ref, partials + token, num_rows,
        clip_low, clip_high, clip_max, kl_coef, coefficient, behavior_cap, behavior_floor,
        kl_estimator, cispo, over_tokens, has_cap, mask_behavior,
    )  # fmt: skip
    d_logprob, d_entropy = tl.sum(slope, 0), tl.sum(bonus, 0)
    is_live = (d_logprob != 0) | (d_entropy != 0)
    tl.store(live + token, is_live.to(tl.int8))
    if d_logits is not None:
        if denominators is not None:
            denominator = tl.load(denominators).to(tl.float32)
        d_logprob /= denominator
        d_bonus = None
        if entropy_coef is not None:
            d_bonus = d_entropy / denominator
        d_row = d_logits + n * d_row_stride
        last = (vocab - 1) // BLOCK * BLOCK
        for back in range(0, vocab, BLOCK):
            columns = last - back + tl.arange(0, BLOCK)
            gradient = tl.zeros([BLOCK], tl.float32)
            if is_live:
                x = tl.load(row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
                gradient = row_gradient(x, columns, target, vocab, peak, log_total, entropy, d_logprob, d_bonus, scale)
            tl.store(d_row + columns, gradient, mask=columns < vocab)


@triton.jit
def _move_rows_kernel(x, sources, width, row_stride, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    source = tl.load(sources + n)
    columns = tl.arange(0, BLOCK)
    if source != n:
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            moved = tl.load(x + source * row_stride + start + columns, mask=inside)
            tl.store(x + n * row_stride + start + columns, moved, mask=inside)


@triton.jit
def _scale_kernel(x, factors, width, row_stride, BLOCK: tl.constexpr):
    factor = tl.load(factors).to(tl.float32)
    row = x + tl.program_id(0).to(tl.int64) * row_stride
    columns = tl.arange(0, BLOCK)
    if factor != 1:
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            tl.store(row + start + columns, tl.load(row + start + columns, mask=inside) * factor, mask=inside)


class RowLoss:
    """The loss of n tokens whose logits come in any number of calls, and what the calls have written so far."""

    def __init__(
        self,
        like: Tensor,  # fp32, for the device
        tensors: Sequence[Tensor | None],  # those of `loss_triton.kernel_arguments`
        numbers: Sequence[float],
        temperature: float,
    ):
        self.targets, offsets, rewards, sequence_ids, advantages, *self.per_token = tensors
        assert self.targets is not None
        n = self.targets.shape[0]
        self.numbers, self.scale = numbers, math.log2(math.e) / temperature
        self.logprobs, self.entropies, self.advantages, self.lengths = (like.new_empty(n) for _ in range(4))
        self.live = like.new_empty(n, dtype=torch.int8)
        self.partials = like.new_empty(loss_triton.NUM_SUMS, n)
        launch(
            _advantage_kernel, (-(-n // loss_triton.BLOCK),), self.advantages, self.lengths, self.targets, offsets,
            rewards, sequence_ids, advantages, n, *loss_triton.completion_counts(tensors), *numbers[:2],
            BLOCK=loss_triton.BLOCK, GROUP_BLOCK=loss_triton.GROUP_BLOCK,
        )  # fmt: skip

    def take(
        self,
        logits: Tensor,  # [rows, vocab], contiguous along rows
        d_logits: Tensor | None,  # like logits, or the logits; None: no gradient
        first_row: int,
        denominator: float | Tensor,
    ) -> None:
        """The loss of tokens `first_row` and after, and its gradient over the denominator."""
        rows, vocab = logits.shape
        by_tensor = isinstance(denominator, Tensor)
        numbers: list[float | None] = [*self.numbers[loss_triton.TOKEN_NUMBERS : -1]]
        at = loss_triton.ENTROPY_COEF - loss_triton.TOKEN_NUMBERS
        numbers[at] = numbers[at] or None
        launch(
            _row_loss_kernel, (rows,), logits, d_logits, self.advantages, self.lengths, self.targets, *self.per_token,
            self.logprobs, self.entropies, self.live, self.partials, denominator if by_tensor else None, first_row,
            self.partials.shape[1], vocab, logits.stride(0), 0 if d_logits is None else d_logits.stride(0), self.scale,
            *numbers, 1.0 if by_tensor else denominator,
            BLOCK=logprob.BLOCK, SLICE=logprob.SLICE, num_warps=logprob.NUM_WARPS,
        )  # fmt: skip


def move_live_rows(
    x: Tensor,  # [rows, width], contiguous along rows
    live: Tensor,  # [rows], 0 or 1
    num_live: int,
) -> Tensor:  # [num_live] int64
    """Moves x's live rows from behind the first `num_live` into dead ones before; returns where each came from.

    As many rows before are dead as behind are live, and nothing before is read: programs cannot race.
    """
    sources = torch.nonzero_static(live, size=num_live).squeeze(1)
    if num_live:
        kept = live[:num_live] != 0
        place = torch.arange(num_live, device=x.device)
        behind = kept.sum() + (~kept).cumsum(0) - 1  # where `sources` has the row for a dead one
        sources = torch.where(kept, place, sources[behind.clamp(0, num_live - 1)])
        launch(
            _move_rows_kernel, (num_live,), x, sources, x.shape[1], x.stride(0),
            BLOCK=logprob.BLOCK, num_warps=logprob.NUM_WARPS,
        )  # fmt: skip
    return sources


@torch.library.custom_op("flashgrpo::logits_grpo_loss", mutates_args=("d_logits",))
def logits_loss(
    logits: Tensor, d_logits: Tensor | None, tensors: Sequence[Tensor | None], denominator: Tensor | None,
    numbers: Sequence[float], temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics, logprobs, entropies), and the gradient in d_logits, which may be the logits."""
    loss = RowLoss(logits.new_empty(0, dtype=torch.float32), tensors, numbers, temperature)
    loss.take(logits, d_logits, 0, numbers[-1] if denominator is None else denominator)
    return *loss_triton.launch_sums(loss.partials, denominator, numbers), loss.logprobs, loss.entropies


@logits_loss.register_fake
def _(logits, d_logits, tensors, denominator, numbers, temperature):
    per_token = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    return *loss_triton.empty_sums(logits), *per_token


@torch.library.custom_op("flashgrpo::scale_rows", mutates_args=("x",))
def scale_rows(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a 0-d tensor, without touching x where that is 1; x is contiguous along rows."""
    launch(
        _scale_kernel, x.shape[:1], x, factor, x.shape[1], x.stride(0), BLOCK=logprob.BLOCK, num_warps=logprob.NUM_WARPS
    )
