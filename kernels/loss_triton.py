# pyright: reportGeneralTypeIssues=false
"""The loss of grpo_loss.py on the device, from log-probs or from rows of logits.

From log-probs a program makes the loss of 1,024 tokens, and where there are more a second launch has
one for every metric. A program counts how many completions end before its first token and its last,
and for each between reads its group's rewards, and where that is asked for its tokens' log-ratios:
what lies apart is read again rather than kept in a launch of its own. 64k tokens are 1.3 MB, so the
launches are what takes time. Sums have a fixed order: lanes of a block, then blocks.

From logits (`RowLoss`) a launch beforehand gives every token the advantage and the length of its
completion. Then a program takes a row: it reads it for log-prob and entropy, makes the loss and its
gradient by them, and unless that is 0 reads the row again, backwards, to write the gradient of its
logits. The second read comes from L2 as far as it holds the rows at work, 528 on an H200; what it
touches leaves first, to rows still to be read again. By a simulation of 45 MB that is all of 32,768
logits and a third of 151,936: 5.3 bytes an element in bf16 from and to memory, 1.54 ms for 8,192
rows of 151,936 at 4.3 TB/s, predicted; 4 bytes and 1.16 ms would be the least.
"""

import math

import torch
from torch import Tensor

from flashgrpo.kernels import logprob
from flashgrpo.kernels.common import launch, tl, triton
from flashgrpo.kernels.logprob import ROW_STEP, row_logprob, row_slopes, whole_steps, write_gradient
from flashgrpo.kernels.loss_config import ADVANTAGE_EPS, METRICS, PER_TOKEN, LossInputs
from flashgrpo.kernels.loss_torch import Loss, of_high_entropy

BLOCK = 1024  # tokens of a program, and offsets read at once
NUM_WARPS = 8
GROUP_BLOCK = 32  # rewards of a group read at once: by each warp, so that no sum of them waits for other warps
_ROWS = 2048  # blocks summed at once
_SCALED = 1 << 17  # numbers, in whole rows, of a program that may have nothing to do: 4,000 for a weight of 4 x 10^8
_RATIO_MAX, _MISMATCH_MAX = (tl.constexpr(METRICS.index(name)) for name in ("ratio_max", "behavior_mismatch_max"))
_NUM_METRICS, _METRICS = tl.constexpr(len(METRICS)), tl.constexpr(16)  # and a power of two
_EPS = tl.constexpr(ADVANTAGE_EPS)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _at_most(x, bound):
    """min(x, bound) that lets NaN through."""
    return tl.where(x > bound, bound, x)


@triton.jit
def _largest(x):
    """max(x), NaN if any is."""
    return tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@triton.jit
def _group_advantage(rewards, slot, group_size, scale, GROUP_BLOCK: tl.constexpr):
    """Advantage of rewards[slot] in its group. Measured from it, equal rewards deviate by exactly 0."""
    group = rewards + slot // group_size * group_size
    own = tl.load(rewards + slot).to(tl.float32)
    lanes = tl.arange(0, GROUP_BLOCK)
    count, total, square = 0.0, 0.0, 0.0
    for start in range(0, group_size, GROUP_BLOCK):
        x = tl.load(group + start + lanes, mask=start + lanes < group_size, other=float("nan")).to(tl.float32)
        count += tl.sum(tl.where(_is_finite(x), 1.0, 0.0), 0)
        total += tl.sum(tl.where(_is_finite(x), x - own, 0.0), 0)
    mean = total / tl.maximum(count, 1.0)
    for start in range(0, group_size, GROUP_BLOCK):
        x = tl.load(group + start + lanes, mask=start + lanes < group_size, other=float("nan")).to(tl.float32)
        deviation = tl.where(_is_finite(x), (x - own) - mean, 0.0)
        square += tl.sum(deviation * deviation, 0)
    spread = tl.sqrt(square / tl.maximum(count - 1.0, 1.0)) + _EPS
    advantage = 0.0 - tl.where(scale == 0, mean / spread, mean)
    return tl.where(_is_finite(own), advantage, float("nan"))


@triton.jit
def _sequences_of(offsets, num_sequences, first, last, LANES: tl.constexpr):
    """The sequences of two rows, which are as many as end at or before each: all ends are read at once."""
    before_first, before_last = 0, 0
    for start in range(0, num_sequences, LANES):
        sequence = start + tl.arange(0, LANES)
        ends = tl.load(offsets + 1 + sequence, mask=sequence < num_sequences, other=0)
        before_first += tl.sum(((sequence < num_sequences) & (ends <= first)).to(tl.int32), 0)
        before_last += tl.sum(((sequence < num_sequences) & (ends <= last)).to(tl.int32), 0)
    return tl.minimum(before_first, num_sequences - 1), tl.minimum(before_last, num_sequences - 1)


@triton.jit
def _kl_and_gradient(difference, estimator):
    """k1, k2 or k3 of ref - logprob, and its gradient by the log-prob; 0 beyond the bounds."""
    highest = tl.where(estimator == 2, 20.0, 100.0)
    d = tl.where(difference < -100.0, -100.0, _at_most(difference, highest))
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
    k3 = tl.where(tl.abs(d) < 0.3, series, tl.exp(d) - 1 - d)  # exp(d) - 1 would lose the digits of a small d
    kl = tl.where(estimator == 0, -d, tl.where(estimator == 1, d * d / 2, k3))
    slope = tl.where(estimator == 0, 1.0, tl.where(estimator == 1, -d, -(k3 + d)))
    return kl, tl.where((difference < -100.0) | (difference > highest), 0.0, slope)


@triton.jit
def _policy(ratio, log_ratio, logprob, advantage, weighted, inputs):
    """Loss and gradient by the log-prob of the policy term; `weighted` is the advantage times the behavior weight."""
    ends = log_ratio > 20.0  # the ratio's gradient
    above = _at_most(ratio, 1 + inputs.clip_high)
    below = _at_most(tl.where(ratio < 1 - inputs.clip_low, 1 - inputs.clip_low, ratio), inputs.clip_max)
    bounded = tl.where((inputs.objective != 1) & (advantage < 0), below, above)
    beyond = (bounded < ratio) | (bounded > ratio) | ends
    clipped = -weighted * bounded
    slope = tl.where((inputs.objective != 1) & beyond, 0.0, clipped)
    loss = tl.where(inputs.objective != 1, clipped, tl.where(clipped == 0, 0.0, clipped * logprob))
    if inputs.objective == 2:
        tau = tl.where(advantage > 0, inputs.tau_pos, inputs.tau_neg)
        gate = 1 / (1 + tl.exp(tau * (1 - ratio)))
        loss = -weighted * gate * 4 / tau
        slope = tl.where(ends, 0.0, -weighted * 4 * ratio * gate / (1 + tl.exp(tau * (ratio - 1))))
    return loss, slope


@triton.jit
def _denominator(inputs):
    denominator = inputs.denominator
    if inputs.denominator_tensor is not None:
        denominator = tl.load(inputs.denominator_tensor).to(tl.float32)
    return denominator


@triton.jit
def _completions_of(
    rows, start, stop, log_ratio, log_weight, logprobs, inputs, num_sequences, num_rewards, group_size,
    BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each of the `rows` from start to stop: the advantage (NaN: does not count), the number of its completion's
    tokens that count, and log-ratio and log behavior weight: as given, or the completion's. Without `logprobs` no
    more than old ones tell of the completion is asked for.
    """
    sums_tokens = (inputs.ratio_level != 0) | (inputs.behavior_level != 0)
    sums_tokens = sums_tokens | (inputs.off_policy_threshold < float("inf"))
    drift = tl.zeros([BLOCK], tl.float32)
    advantage = tl.full([BLOCK], float("nan"), tl.float32)
    length = tl.full([BLOCK], 1.0, tl.float32)
    first, last = _sequences_of(inputs.target_cu_seqlens, num_sequences, start, stop - 1, BLOCK)
    for sequence in range(first, last + 1):
        begin, end = tl.load(inputs.target_cu_seqlens + sequence), tl.load(inputs.target_cu_seqlens + sequence + 1)
        mine = (rows >= begin) & (rows < end)
        own = float("nan")
        if inputs.advantages is not None:
            own = tl.load(inputs.advantages + sequence).to(tl.float32)
        elif inputs.rewards is not None:
            slot = sequence
            if inputs.sequence_ids is not None:
                slot = tl.load(inputs.sequence_ids + sequence)
            if (slot >= 0) & (slot < num_rewards):
                own = _group_advantage(inputs.rewards, slot, group_size, inputs.advantage_scale, GROUP_BLOCK)
        advantage = tl.where(mine, own, advantage)
        count, total, total_mismatch, total_drift = (end - begin).to(tl.float32), 0.0, 0.0, 0.0
        if (inputs.targets is not None) | (inputs.token_advantages is not None) | sums_tokens:
            count = 0.0
            for piece in range(begin, end, BLOCK):
                tokens = piece + tl.arange(0, BLOCK)
                valid = tokens < end
                if inputs.targets is not None:
                    valid = valid & (tl.load(inputs.targets + tokens, mask=valid, other=-100) != -100)
                if inputs.token_advantages is not None:
                    each = tl.load(inputs.token_advantages + tokens, mask=valid, other=0.0)
                    valid = valid & (each == each)
                count += tl.sum(valid.to(tl.float32), 0)
                if sums_tokens:
                    new = tl.zeros([BLOCK], tl.float32)
                    if logprobs is not None:
                        new = tl.load(logprobs + tokens, mask=valid, other=0.0).to(tl.float32)
                    old = new
                    if inputs.old_logprobs is not None:
                        old = tl.load(inputs.old_logprobs + tokens, mask=valid, other=0.0).to(tl.float32)
                        total += tl.sum(new - old, 0)
                    sampled = old
                    if inputs.behavior_logprobs is not None:
                        sampled = tl.load(inputs.behavior_logprobs + tokens, mask=valid, other=0.0).to(tl.float32)
                        total_mismatch += tl.sum(old - sampled, 0)
                    total_drift += tl.sum(sampled - new, 0)
        count = tl.maximum(count, 1.0)
        length = tl.where(mine, count, length)
        if inputs.old_logprobs is not None:
            log_ratio = tl.where(mine & (inputs.ratio_level != 0), total / count, log_ratio)
        over = tl.where(inputs.behavior_level == 2, count, 1.0)
        log_weight = tl.where(mine & (inputs.behavior_level != 0), total_mismatch / over, log_weight)
        drift = tl.where(mine, total_drift / count, drift)
    if inputs.token_advantages is not None:
        advantage = tl.load(inputs.token_advantages + rows, mask=rows < stop, other=float("nan")).to(tl.float32)
    advantage = tl.where((advantage < 0) & (drift > inputs.off_policy_threshold), 0.0, advantage)
    if inputs.targets is not None:
        ignored = tl.load(inputs.targets + rows, mask=rows < stop, other=-100) == -100
        advantage = tl.where(ignored, float("nan"), advantage)
    return tl.where(rows < stop, advantage, float("nan")), length, log_ratio, log_weight


@triton.jit
def _log_ratio_and_mismatch(rows, inside, logprob, inputs):
    """Of tokens: new - old log-probs, and old - behavior ones; 0 without them, but NaN where the log-prob is."""
    old_logprob = logprob
    log_ratio = tl.where(logprob != logprob, logprob, 0.0)
    if inputs.old_logprobs is not None:
        old_logprob = tl.load(inputs.old_logprobs + rows, mask=inside, other=0.0).to(tl.float32)
        log_ratio = logprob - old_logprob
    mismatch = tl.zeros_like(logprob)
    if inputs.behavior_logprobs is not None:
        mismatch = old_logprob - tl.load(inputs.behavior_logprobs + rows, mask=inside, other=0.0).to(tl.float32)
    return log_ratio, mismatch


@triton.jit
def _loss_of_tokens(
    rows, logprob, entropy, log_ratio, mismatch, log_weight, advantage, length, per_token, n, entropy_coef, inputs
):  # fmt: skip
    """The gradients of the loss by log-prob and by entropy, and the block's sums, as METRICS has them."""
    counted = advantage == advantage
    advantage = tl.where(counted, advantage, 0.0)
    weight = tl.where(counted, tl.where(inputs.aggregate != 0, 1.0, 1.0 / length), 0.0)
    logprob = tl.where(counted, logprob, 0.0)
    entropy = tl.where(counted, entropy, 0.0)
    log_ratio = tl.where(counted, log_ratio, 0.0)
    mismatch = tl.abs(tl.where(counted, mismatch, 0.0))

    behavior_weight = tl.exp(_at_most(tl.where(counted, log_weight, 0.0), 20.0))
    raised = tl.where(behavior_weight < inputs.behavior_floor, inputs.behavior_floor, behavior_weight)
    bounded = _at_most(raised, inputs.behavior_cap)
    cut = tl.where((inputs.behavior_mode != 0) & (bounded != behavior_weight), 0.0, bounded)
    weighted = tl.where(inputs.behavior_cap < float("inf"), advantage * cut, advantage)
    ratio = tl.exp(_at_most(log_ratio, 20.0))
    loss, slope = _policy(ratio, log_ratio, logprob, advantage, weighted, inputs)
    kl = tl.zeros_like(logprob)
    if inputs.ref_logprobs is not None:
        reference = tl.load(inputs.ref_logprobs + rows, mask=counted, other=0.0).to(tl.float32)
        kl, d_kl = _kl_and_gradient(reference - logprob, inputs.kl_estimator)
        kl = tl.where(counted, kl, 0.0)
        kl_weight = tl.where(inputs.kl_weight != 0, ratio, 1.0)
        d_weight = tl.where((inputs.kl_weight != 0) & (log_ratio <= 20.0), ratio, 0.0)
        loss += tl.where(inputs.kl_coef != 0, inputs.kl_coef * kl_weight * kl, 0.0)
        slope += tl.where(inputs.kl_coef != 0, inputs.kl_coef * (kl_weight * d_kl + d_weight * kl), 0.0)
    bonus = -entropy_coef * weight
    loss, slope = weight * loss + bonus * entropy, weight * slope
    live = (slope != 0) | (bonus != 0)
    counted_ratio = tl.where(counted, ratio, 0.0)
    if per_token is not None:
        tl.store(per_token + rows, counted_ratio, mask=rows < n)
        tl.store(per_token + n + rows, kl, mask=rows < n)
        tl.store(per_token + 2 * n + rows, loss, mask=rows < n)

    # In the order of METRICS.
    metric = tl.arange(0, _METRICS)
    sums = tl.where(metric == 0, tl.sum(loss, 0), tl.zeros([_METRICS], tl.float32))
    sums = tl.where(metric == 1, tl.sum(counted.to(tl.float32), 0), sums)
    sums = tl.where(metric == 2, tl.sum(counted_ratio, 0), sums)
    sums = tl.where(metric == _RATIO_MAX, _largest(counted_ratio), sums)
    sums = tl.where(metric == 4, tl.sum(((ratio < 1 - inputs.clip_low) & (advantage < 0)).to(tl.float32), 0), sums)
    sums = tl.where(metric == 5, tl.sum(((ratio > 1 + inputs.clip_high) & (advantage > 0)).to(tl.float32), 0), sums)
    sums = tl.where(metric == 6, tl.sum(live.to(tl.float32), 0), sums)
    sums = tl.where(metric == 7, tl.sum(kl, 0), sums)
    sums = tl.where(metric == 8, tl.sum(mismatch, 0), sums)
    sums = tl.where(metric == _MISMATCH_MAX, _largest(mismatch), sums)
    sums = tl.where(metric == 10, tl.sum(entropy, 0), sums)
    return slope, bonus, sums


@triton.jit
def _report(metric, total, num_tokens, loss, metrics, inputs):
    """Writes, of sums over all tokens, the loss over the denominator, and the metrics."""
    is_mean = (metric != 1) & (metric != _RATIO_MAX) & (metric != _MISMATCH_MAX)
    value = tl.where(is_mean, total / tl.maximum(num_tokens, 1.0), total)
    tl.store(metrics + metric, value, mask=metric < _NUM_METRICS)
    tl.store(loss + metric, total / _denominator(inputs), mask=metric == 0)


@triton.jit(do_not_specialize=["n", "num_sequences", "num_rewards", "group_size", "num_blocks"])
def _grpo_loss_kernel(
    logprobs, entropies, d_logprobs, d_entropies, partials, loss, metrics, per_token, n, num_sequences, num_rewards,
    group_size, num_blocks, inputs, BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients over the denominator; sums of several blocks go to `partials`, else to `loss` and `metrics`."""
    block = tl.program_id(0)
    start = block * BLOCK
    rows = start + tl.arange(0, BLOCK)
    inside = rows < n
    logprob = tl.load(logprobs + rows, mask=inside, other=0.0).to(tl.float32)
    entropy = tl.zeros([BLOCK], tl.float32)
    if entropies is not None:
        entropy = tl.load(entropies + rows, mask=inside, other=0.0)
    log_ratio, mismatch = _log_ratio_and_mismatch(rows, inside, logprob, inputs)
    advantage, length, log_ratio, log_weight = _completions_of(
        rows, start, tl.minimum(start + BLOCK, n), log_ratio, mismatch, logprobs, inputs, num_sequences, num_rewards,
        group_size, BLOCK, GROUP_BLOCK,
    )  # fmt: skip
    slope, bonus, sums = _loss_of_tokens(
        rows, logprob, entropy, log_ratio, mismatch, log_weight, advantage, length, per_token, n, inputs.entropy_coef,
        inputs,
    )  # fmt: skip
    denominator, metric = _denominator(inputs), tl.arange(0, _METRICS)
    tl.store(d_logprobs + rows, slope / denominator, mask=inside)
    if d_entropies is not None:
        tl.store(d_entropies + rows, bonus / denominator, mask=inside)
    if partials is None:
        _report(metric, sums, tl.sum(tl.where(metric == 1, sums, 0.0), 0), loss, metrics, inputs)
    else:
        tl.store(partials + metric * num_blocks + block, sums, mask=metric < _NUM_METRICS)


@triton.jit(do_not_specialize=["num_blocks"])
def _sum_blocks_kernel(partials, loss, metrics, num_blocks, inputs, ROWS: tl.constexpr):
    """One program a metric: the sum of its blocks in order, or their largest value."""
    metric = tl.program_id(0)
    is_max = (metric == _RATIO_MAX) | (metric == _MISMATCH_MAX)
    lanes = tl.arange(0, ROWS)
    total, tokens = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, num_blocks, ROWS):
        x = tl.load(partials + metric * num_blocks + start + lanes, mask=start + lanes < num_blocks, other=0.0)
        larger = tl.where((x > total) | (x != x), x, total)
        total = tl.where(is_max, larger, total + x)
        tokens += tl.load(partials + num_blocks + start + lanes, mask=start + lanes < num_blocks, other=0.0)
    result = tl.where(is_max, _largest(total), tl.sum(total, 0))
    _report(metric, result, tl.sum(tokens, 0), loss, metrics, inputs)


@triton.jit(do_not_specialize=["n", "num_sequences", "num_rewards", "group_size"])
def _advantage_kernel(
    token_advantages, token_lengths, token_log_weights, n, num_sequences, num_rewards, group_size, inputs,
    BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    rows = start + tl.arange(0, BLOCK)
    nothing = tl.zeros([BLOCK], tl.float32)
    advantage, length, _, log_weight = _completions_of(
        rows, start, tl.minimum(start + BLOCK, n), nothing, nothing, None, inputs, num_sequences, num_rewards,
        group_size, BLOCK, GROUP_BLOCK,
    )  # fmt: skip
    tl.store(token_advantages + rows, advantage, mask=rows < n)
    tl.store(token_lengths + rows, length, mask=rows < n)
    tl.store(token_log_weights + rows, log_weight, mask=rows < n)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _row_loss_kernel(
    logits, d_logits, token_advantages, token_lengths, token_log_weights, logprobs, entropies, live, partials,
    per_token, first_row, num_rows, vocab, row_stride, d_row_stride, scale, inputs, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_logits may be the logits, whose first row is that of token `first_row`. An entropy_coef of None is 0."""
    n = tl.program_id(0).to(tl.int64)
    token = first_row + n
    target = tl.load(inputs.targets + token)
    row = logits + n * row_stride
    logprob, entropy, base, total = row_logprob(row, target, vocab, scale, BLOCK, True)
    tl.store(logprobs + token, logprob)
    tl.store(entropies + token, entropy)

    one = token + tl.arange(0, 1)
    log_ratio, mismatch = _log_ratio_and_mismatch(one, one >= 0, tl.full([1], logprob, tl.float32), inputs)
    coefficient = 0.0
    if inputs.entropy_coef is not None:
        coefficient = inputs.entropy_coef
    slope, bonus, sums = _loss_of_tokens(
        one, tl.full([1], logprob, tl.float32), tl.full([1], entropy, tl.float32), log_ratio, mismatch,
        tl.where(inputs.behavior_level != 0, tl.load(token_log_weights + one), mismatch),
        tl.load(token_advantages + one), tl.load(token_lengths + one), per_token, num_rows, coefficient, inputs,
    )  # fmt: skip
    metric = tl.arange(0, _METRICS)
    tl.store(partials + metric.to(tl.int64) * num_rows + token, sums, mask=metric < _NUM_METRICS)
    d_logprob, d_entropy = tl.sum(slope, 0), tl.sum(bonus, 0)
    is_live = (d_logprob != 0) | (d_entropy != 0)
    tl.store(live + token, is_live.to(tl.int8))
    if d_logits is not None:
        denominator = _denominator(inputs)
        d_logprob /= denominator
        d_bonus = None
        if inputs.entropy_coef is not None:
            d_bonus = d_entropy / denominator
        d_row = d_logits + n * d_row_stride
        slopes = row_slopes(target, vocab, base, total, entropy, d_logprob, d_bonus, scale, is_live)
        tilted: tl.constexpr = inputs.entropy_coef is not None
        whole = vocab // ROW_STEP * ROW_STEP
        if whole < vocab:
            write_gradient(row, d_row, whole, vocab, slopes, scale, is_live, ROW_STEP, tilted)
        last = (vocab - 1) // BLOCK * BLOCK
        for back in range(0, vocab, BLOCK):
            write_gradient(row, d_row, last - back, whole, slopes, scale, is_live, BLOCK, tilted)


@triton.jit
def _move_rows_kernel(x, sources, width, row_stride, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    source = tl.load(sources + n)
    columns = tl.arange(0, BLOCK)
    if source != n:
        whole, rest = whole_steps(width)
        for start in range(0, whole, BLOCK):
            inside = start + columns < whole
            moved = tl.load(x + source * row_stride + start + columns, mask=inside)
            tl.store(x + n * row_stride + start + columns, moved, mask=inside)
        moved = tl.load(x + source * row_stride + rest, mask=rest < width)
        tl.store(x + n * row_stride + rest, moved, mask=rest < width)


@triton.jit(do_not_specialize=["num_rows"])
def _scale_kernel(x, factors, num_rows, width, row_stride, BLOCK: tl.constexpr):
    factor, num_programs = tl.load(factors).to(tl.float32), tl.num_programs(0)
    row = x + tl.program_id(0).to(tl.int64) * row_stride
    columns = tl.arange(0, BLOCK)
    if factor != 1:
        for _ in range(tl.program_id(0), num_rows, num_programs):
            for start in range(0, width, BLOCK):
                inside = start + columns < width
                tl.store(row + start + columns, tl.load(row + start + columns, mask=inside) * factor, mask=inside)
            row += num_programs.to(tl.int64) * row_stride


def loss_of_logprobs(
    logprobs: Tensor,  # [num_targets]
    entropies: Tensor | None,  # [num_targets]
    inputs: LossInputs,
) -> Loss:
    inputs = of_high_entropy(inputs, logprobs, entropies)
    n = logprobs.shape[0]
    d_logprobs = torch.empty_like(logprobs, dtype=torch.float32, memory_format=torch.contiguous_format)
    d_entropies = torch.empty_like(d_logprobs) if inputs.entropy_coef else None
    num_blocks, per_token = -(-n // BLOCK), _room_per_token(d_logprobs, inputs)
    # More blocks in one program would follow each other, each as long as the launch that they save.
    alone = num_blocks == 1
    partials = None if alone else d_logprobs.new_empty(len(METRICS), num_blocks)
    sums = d_logprobs.new_empty(()), d_logprobs.new_empty(len(METRICS))
    launch(
        _grpo_loss_kernel, (num_blocks,), logprobs.contiguous(), entropies, d_logprobs, d_entropies, partials,
        *(sums if alone else (None, None)), per_token if inputs.per_token else None, n, *_counts(inputs), num_blocks,
        inputs, BLOCK=BLOCK, GROUP_BLOCK=GROUP_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return Loss(*(sums if partials is None else _sums(partials, inputs)), per_token, d_logprobs, d_entropies)


def _room_per_token(like: Tensor, inputs: LossInputs) -> Tensor:
    return like.new_empty(len(PER_TOKEN) if inputs.per_token else 0, like.shape[0], dtype=torch.float32)


def _counts(inputs: LossInputs) -> tuple[int, int, int]:
    """Completions, rewards, and rewards of a group."""
    rewards = inputs.rewards
    num_rewards, group_size = (0, 1) if rewards is None else (rewards.numel(), rewards.shape[1])
    return inputs.target_cu_seqlens.shape[0] - 1, num_rewards, group_size


def _sums(
    partials: Tensor,  # [len(METRICS), num_blocks]
    inputs: LossInputs,
) -> tuple[Tensor, Tensor]:  # 0-d, [len(METRICS)]
    """The loss, and the metrics of all tokens."""
    loss, metrics = partials.new_empty(()), partials.new_empty(len(METRICS))
    launch(_sum_blocks_kernel, metrics.shape, partials, loss, metrics, partials.shape[1], inputs, ROWS=_ROWS)
    return loss, metrics


class RowLoss:
    """As in loss_torch.py."""

    def __init__(self, inputs: LossInputs, like: Tensor, temperature: float):
        assert inputs.targets is not None
        n = inputs.targets.shape[0]
        self.logprobs, self.entropies, *self.of_completions = (like.new_empty(n, dtype=torch.float32) for _ in range(5))
        self.live = like.new_empty(n, dtype=torch.int8)
        self.partials = like.new_empty(len(METRICS), n, dtype=torch.float32)
        self.per_token = _room_per_token(self.logprobs, inputs)
        # Without a bonus the kernel leaves the entropy's gradient out.
        self.inputs = inputs._replace(entropy_coef=inputs.entropy_coef or None)
        self.scale = math.log2(math.e) / temperature
        launch(
            _advantage_kernel, (-(-n // BLOCK),), *self.of_completions, n, *_counts(inputs), inputs,
            BLOCK=BLOCK, GROUP_BLOCK=GROUP_BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip

    def take(
        self,
        logits: Tensor,  # [rows, vocab], contiguous along rows
        first_row: int,
        d_logits: Tensor | None,  # like logits
    ) -> Tensor | None:
        """The gradient is over the denominator."""
        rows, vocab = logits.shape
        launch(
            _row_loss_kernel, (rows,), logits, d_logits, *self.of_completions, self.logprobs, self.entropies,
            self.live, self.partials, self.per_token if self.inputs.per_token else None, first_row,
            self.partials.shape[1], vocab, logits.stride(0),
            0 if d_logits is None else d_logits.stride(0), self.scale, self.inputs,
            BLOCK=logprob.BLOCK, num_warps=logprob.NUM_WARPS,
        )  # fmt: skip
        return d_logits

    def result(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        return *_sums(self.partials, inputs), self.per_token


def live_rows(
    x: Tensor,  # [rows, width], contiguous along rows
    live: Tensor,  # [rows], 0 or 1
    num_live: int,
) -> tuple[Tensor, Tensor]:  # [num_live, width], [num_live] int64
    """Moves x's live rows from behind the first `num_live` into dead ones before; these, and where each came from.

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
    return x[:num_live], sources


def scale_rows(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a 0-d tensor, without touching x where that is 1; x is contiguous along rows."""
    num_rows, width = x.shape
    launch(
        _scale_kernel, (-(-num_rows // max(1, _SCALED // width)),), x, factor, num_rows, width, x.stride(0),
        BLOCK=logprob.BLOCK, num_warps=logprob.NUM_WARPS,
    )  # fmt: skip
