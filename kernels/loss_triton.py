# pyright: reportGeneralTypeIssues=false
"""The loss of grpo_loss.py in two launches: a program for every 512 tokens, then one for every metric.

A program finds the completions of its tokens by bisection, and for each of them reads its group's rewards, and at
sequence level its tokens' log-ratios: what lies apart is read again rather than kept in a launch of its own. A token
costs at most 16 bytes read and 4 written; 64k tokens are 1.3 MB, so the launches themselves are what takes time. Sums
have a fixed order: lanes of a block, then blocks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import launch, tl, triton
from flashgrpo.kernels.loss_config import LossArguments
from flashgrpo.kernels.loss_torch import ADVANTAGE_EPS, Stats

BLOCK = 512  # tokens of a program
GROUP_BLOCK = 128  # rewards of a group read at once
_ROWS = 2048  # blocks summed at once
# Where `kernel_arguments` puts them among the numbers: those of a token begin, the entropy bonus.
TOKEN_NUMBERS, ENTROPY_COEF = 3, 7
# What a program sums up for its block, in this order; maxima are largest values.
_SUMS = (
    "loss", "num_tokens", "ratio_mean", "ratio_max", "clip_low_fraction", "clip_high_fraction", "live_fraction", "kl",
    "behavior_mismatch_mean", "behavior_mismatch_max", "entropy",
)  # fmt: skip
NUM_SUMS = len(_SUMS)
_RATIO_MAX, _MISMATCH_MAX = (tl.constexpr(_SUMS.index(name)) for name in ("ratio_max", "behavior_mismatch_max"))


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
def _group_advantage(rewards, slot, group_size, by_deviation, eps, GROUP_BLOCK: tl.constexpr):
    """Advantage of rewards[slot] in its group. Deviations are from a reward of the group, see `group_advantages`."""
    group = rewards + slot // group_size * group_size
    own = tl.load(rewards + slot).to(tl.float32)
    own = tl.where(_is_finite(own), own, float("nan"))
    lanes = tl.arange(0, GROUP_BLOCK)
    first = group_size
    for start in range(0, group_size, GROUP_BLOCK):
        x = tl.load(group + start + lanes, mask=start + lanes < group_size, other=float("nan")).to(tl.float32)
        first = tl.minimum(first, tl.min(tl.where(_is_finite(x), start + lanes, group_size), 0))
    origin = tl.load(group + first, mask=first < group_size, other=0.0).to(tl.float32)
    count, total, square = 0.0, 0.0, 0.0
    for start in range(0, group_size, GROUP_BLOCK):
        x = tl.load(group + start + lanes, mask=start + lanes < group_size, other=float("nan")).to(tl.float32)
        count += tl.sum(tl.where(_is_finite(x), 1.0, 0.0), 0)
        total += tl.sum(tl.where(_is_finite(x), x - origin, 0.0), 0)
    mean = total / tl.maximum(count, 1.0)
    for start in range(0, group_size, GROUP_BLOCK):
        x = tl.load(group + start + lanes, mask=start + lanes < group_size, other=float("nan")).to(tl.float32)
        deviation = tl.where(_is_finite(x), (x - origin) - mean, 0.0)
        square += tl.sum(deviation * deviation, 0)
    deviation = (own - origin) - mean
    spread = tl.sqrt(square / tl.maximum(count - 1.0, 1.0)) + eps
    return tl.where(by_deviation != 0, deviation / spread, deviation)


@triton.jit
def _sequence_of(offsets, num_sequences, row):
    """The last sequence that starts at or before `row`, by bisection."""
    low, high = 0, num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(offsets + middle) <= row:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _kl_and_gradient(difference, estimator):
    """k1, k2 or k3 of ref - logprob, and its gradient by the log-prob; 0 beyond the bounds."""
    highest = tl.where(estimator == 3, 20.0, 100.0)
    d = tl.where(difference < -100.0, -100.0, _at_most(difference, highest))
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
    k3 = tl.where(tl.abs(d) < 0.3, series, tl.exp(d) - 1 - d)  # exp(d) - 1 would lose the digits of a small d
    kl = tl.where(estimator == 1, -d, tl.where(estimator == 2, d * d / 2, k3))
    slope = tl.where(estimator == 1, 1.0, tl.where(estimator == 2, -d, -(k3 + d)))
    return kl, tl.where((difference < -100.0) | (difference > highest), 0.0, slope)


@triton.jit
def _policy(ratio, log_ratio, logprob, advantage, weighted, clip_low, clip_high, clip_max, cispo):
    """Loss and gradient by the log-prob of the policy term; `weighted` is the advantage times the behavior weight."""
    above = _at_most(ratio, 1 + clip_high)
    below = _at_most(tl.where(ratio < 1 - clip_low, 1 - clip_low, ratio), clip_max)
    bounded = tl.where((cispo == 0) & (advantage < 0), below, above)
    beyond = (bounded < ratio) | (bounded > ratio) | (log_ratio > 20.0)
    clipped = -weighted * bounded
    slope = tl.where((cispo == 0) & beyond, 0.0, clipped)
    loss = tl.where(cispo == 0, clipped, tl.where(clipped == 0, 0.0, clipped * logprob))
    return loss, slope


@triton.jit
def completions_of(
    rows, start, stop, log_ratio, log_weight, logprobs, targets, offsets, rewards, sequence_ids, advantages, old,
    behavior, num_sequences, num_rewards, group_size, eps, by_deviation, at_sequence_level,
    BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each of the `rows` from start to stop, by its completion: the advantage (NaN: does not count), the number of
    tokens that count, and log-ratio and log behavior weight, at sequence level their means.
    """
    advantage = tl.full([BLOCK], float("nan"), tl.float32)
    length = tl.full([BLOCK], 1.0, tl.float32)
    last = _sequence_of(offsets, num_sequences, stop - 1)
    for sequence in range(_sequence_of(offsets, num_sequences, start), last + 1):
        begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
        mine = (rows >= begin) & (rows < end)
        if advantages is not None:
            own = tl.load(advantages + sequence).to(tl.float32)
        else:
            slot = sequence
            if sequence_ids is not None:
                slot = tl.load(sequence_ids + sequence)
            own = float("nan")
            if (slot >= 0) & (slot < num_rewards):
                own = _group_advantage(rewards, slot, group_size, by_deviation, eps, GROUP_BLOCK)
        advantage = tl.where(mine, own, advantage)
        count, total, total_mismatch = (end - begin).to(tl.float32), 0.0, 0.0
        if (targets is not None) | (at_sequence_level != 0):
            count = 0.0
            for piece in range(begin, end, BLOCK):
                tokens = piece + tl.arange(0, BLOCK)
                valid = tokens < end
                if targets is not None:
                    valid = valid & (tl.load(targets + tokens, mask=valid, other=-100) != -100)
                count += tl.sum(valid.to(tl.float32), 0)
                if at_sequence_level != 0:
                    new = tl.load(logprobs + tokens, mask=valid, other=0.0).to(tl.float32)
                    was = new
                    if old is not None:
                        was = tl.load(old + tokens, mask=valid, other=0.0).to(tl.float32)
                        total += tl.sum(new - was, 0)
                    if behavior is not None:
                        sampled = tl.load(behavior + tokens, mask=valid, other=0.0).to(tl.float32)
                        total_mismatch += tl.sum(was - sampled, 0)
        count = tl.maximum(count, 1.0)
        length = tl.where(mine, count, length)
        if at_sequence_level != 0:
            if old is not None:
                log_ratio = tl.where(mine, total / count, log_ratio)
            log_weight = tl.where(mine, total_mismatch / count, log_weight)
    if targets is not None:
        ignored = tl.load(targets + rows, mask=rows < stop, other=-100) == -100
        advantage = tl.where(ignored, float("nan"), advantage)
    return tl.where(rows < stop, advantage, float("nan")), length, log_ratio, log_weight


@triton.jit
def log_ratio_and_mismatch(rows, inside, logprob, old, behavior):
    """Of tokens: new - old log-probs, and old - behavior ones; 0 without them, but NaN where the log-prob is."""
    old_logprob = logprob
    log_ratio = tl.where(logprob != logprob, logprob, 0.0)
    if old is not None:
        old_logprob = tl.load(old + rows, mask=inside, other=0.0).to(tl.float32)
        log_ratio = logprob - old_logprob
    mismatch = tl.zeros_like(logprob)
    if behavior is not None:
        mismatch = old_logprob - tl.load(behavior + rows, mask=inside, other=0.0).to(tl.float32)
    return log_ratio, mismatch


@triton.jit
def loss_of_tokens(
    rows, logprob, entropy, log_ratio, mismatch, log_weight, advantage, length, ref, sums, num_blocks,
    clip_low, clip_high, clip_max, kl_coef, entropy_coef, behavior_cap, behavior_floor,
    kl_estimator, cispo, over_tokens, has_cap, mask_behavior,
):  # fmt: skip
    """The gradients of the loss by log-prob and by entropy; the block's sums go to `sums`."""
    counted = advantage == advantage
    advantage = tl.where(counted, advantage, 0.0)
    weight = tl.where(counted, tl.where(over_tokens != 0, 1.0, 1.0 / length), 0.0)
    logprob = tl.where(counted, logprob, 0.0)
    entropy = tl.where(counted, entropy, 0.0)
    log_ratio = tl.where(counted, log_ratio, 0.0)
    mismatch = tl.abs(tl.where(counted, mismatch, 0.0))

    behavior_weight = tl.exp(_at_most(tl.where(counted, log_weight, 0.0), 20.0))
    within = (behavior_weight >= behavior_floor) & (behavior_weight <= behavior_cap)
    cut = tl.where(mask_behavior != 0, tl.where(within, behavior_weight, 0.0), _at_most(behavior_weight, behavior_cap))
    weighted = tl.where(has_cap != 0, advantage * cut, advantage)
    ratio = tl.exp(_at_most(log_ratio, 20.0))
    loss, slope = _policy(ratio, log_ratio, logprob, advantage, weighted, clip_low, clip_high, clip_max, cispo)
    kl = tl.zeros_like(logprob)
    if ref is not None:
        reference = tl.load(ref + rows, mask=counted, other=0.0).to(tl.float32)
        kl, d_kl = _kl_and_gradient(reference - logprob, kl_estimator)
        loss += tl.where(kl_coef != 0, kl_coef * kl, 0.0)
        slope += tl.where(kl_coef != 0, kl_coef * d_kl, 0.0)
    bonus = -entropy_coef * weight
    loss, slope = weight * loss + bonus * entropy, weight * slope
    live = (slope != 0) | (bonus != 0)

    # In the order of _SUMS.
    tl.store(sums, tl.sum(loss, 0))
    tl.store(sums + num_blocks, tl.sum(counted.to(tl.float32), 0))
    tl.store(sums + 2 * num_blocks, tl.sum(tl.where(counted, ratio, 0.0), 0))
    tl.store(sums + _RATIO_MAX * num_blocks, _largest(tl.where(counted, ratio, 0.0)))
    tl.store(sums + 4 * num_blocks, tl.sum(((ratio < 1 - clip_low) & (advantage < 0)).to(tl.float32), 0))
    tl.store(sums + 5 * num_blocks, tl.sum(((ratio > 1 + clip_high) & (advantage > 0)).to(tl.float32), 0))
    tl.store(sums + 6 * num_blocks, tl.sum(live.to(tl.float32), 0))
    tl.store(sums + 7 * num_blocks, tl.sum(tl.where(counted, kl, 0.0), 0))
    tl.store(sums + 8 * num_blocks, tl.sum(mismatch, 0))
    tl.store(sums + _MISMATCH_MAX * num_blocks, _largest(mismatch))
    tl.store(sums + 10 * num_blocks, tl.sum(entropy, 0))
    return slope, bonus


@triton.jit(do_not_specialize=["n", "num_sequences", "num_rewards", "group_size", "num_blocks"])
def _grpo_loss_kernel(
    logprobs, entropies, targets, offsets, rewards, sequence_ids, advantages, old, ref, behavior,
    d_logprobs, d_entropies, partials, n, num_sequences, num_rewards, group_size, num_blocks,
    eps, by_deviation, at_sequence_level, clip_low, clip_high, clip_max, kl_coef, entropy_coef, behavior_cap,
    behavior_floor, kl_estimator, cispo, over_tokens, has_cap, mask_behavior,
    BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    start = block * BLOCK
    rows = start + tl.arange(0, BLOCK)
    inside = rows < n
    logprob = tl.load(logprobs + rows, mask=inside, other=0.0).to(tl.float32)
    entropy = tl.zeros([BLOCK], tl.float32)
    if entropies is not None:
        entropy = tl.load(entropies + rows, mask=inside, other=0.0)
    log_ratio, mismatch = log_ratio_and_mismatch(rows, inside, logprob, old, behavior)
    advantage, length, log_ratio, log_weight = completions_of(
        rows, start, tl.minimum(start + BLOCK, n), log_ratio, mismatch, logprobs, targets, offsets, rewards,
        sequence_ids, advantages, old, behavior, num_sequences, num_rewards, group_size, eps, by_deviation,
        at_sequence_level, BLOCK, GROUP_BLOCK,
    )  # fmt: skip
    slope, bonus = loss_of_tokens(
        rows, logprob, entropy, log_ratio, mismatch, log_weight, advantage, length, ref, partials + block, num_blocks,
        clip_low, clip_high, clip_max, kl_coef, entropy_coef, behavior_cap, behavior_floor,
        kl_estimator, cispo, over_tokens, has_cap, mask_behavior,
    )  # fmt: skip
    tl.store(d_logprobs + rows, slope, mask=inside)
    if d_entropies is not None:
        tl.store(d_entropies + rows, bonus, mask=inside)


@triton.jit(do_not_specialize=["num_blocks"])
def _sum_blocks_kernel(partials, denominators, loss, metrics, num_blocks, denominator, ROWS: tl.constexpr):
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
    if metric == 0:
        if denominators is not None:
            denominator = tl.load(denominators).to(tl.float32)
        tl.store(loss, result / denominator)
    if (metric != 1) & (is_max == 0):
        result = result / tl.maximum(tl.sum(tokens, 0), 1.0)
    tl.store(metrics + metric, result)


class LossBuffers(NamedTuple):
    """What the loss kernel writes."""

    d_logprobs: Tensor  # [num_targets] fp32, before the denominator
    d_entropies: Tensor | None  # [num_targets] fp32, with an entropy bonus
    partials: Tensor  # [NUM_SUMS, num_blocks] fp32

    @classmethod
    def empty(cls, logprobs: Tensor, with_entropies: bool) -> "LossBuffers":
        d_logprobs = torch.empty_like(logprobs, dtype=torch.float32, memory_format=torch.contiguous_format)
        d_entropies = torch.empty_like(d_logprobs) if with_entropies else None
        return cls(d_logprobs, d_entropies, d_logprobs.new_empty(NUM_SUMS, -(-logprobs.shape[0] // BLOCK)))


def kernel_arguments(arguments: LossArguments) -> tuple[list[Tensor | None], Tensor | None, list[float]]:
    """The arguments as the kernels take them: tensors, the denominator if it is one, numbers."""
    config, denominator = arguments.config, arguments.denominator
    tensors = (
        arguments.targets, arguments.target_cu_seqlens, arguments.rewards, arguments.sequence_ids,
        arguments.advantages, arguments.old_logprobs, arguments.ref_logprobs, arguments.behavior_logprobs,
    )  # fmt: skip
    contiguous = [None if x is None else x.contiguous() for x in tensors]
    numbers = [
        ADVANTAGE_EPS, config.advantage_scale == "std", config.ratio_level == "sequence",
        config.clip_low, config.clip_high, _or_infinite(config.clip_max), config.kl_coef, config.entropy_coef,
        _or_infinite(config.behavior_cap), config.behavior_floor, {"k1": 1, "k2": 2, "k3": 3}[config.kl_estimator],
        config.objective == "cispo", config.aggregate != "sequence_mean", config.behavior_cap is not None,
        config.behavior_mode == "mask",
        1.0 if isinstance(denominator, Tensor) else denominator,
    ]  # fmt: skip
    return contiguous, denominator if isinstance(denominator, Tensor) else None, [float(number) for number in numbers]


def launch_loss(
    logprobs: Tensor,  # [num_targets]
    entropies: Tensor | None,  # [num_targets]
    tensors: Sequence[Tensor | None],  # those of `kernel_arguments`
    numbers: Sequence[float],
    buffers: LossBuffers,
) -> None:
    """Loss, and its gradient by the log-prob."""
    launch(
        _grpo_loss_kernel, buffers.partials.shape[1:], logprobs, entropies, *tensors, *buffers, logprobs.shape[0],
        *completion_counts(tensors), buffers.partials.shape[1], *numbers[:-1], BLOCK=BLOCK, GROUP_BLOCK=GROUP_BLOCK,
    )  # fmt: skip


def completion_counts(tensors: Sequence[Tensor | None]) -> tuple[int, int, int]:
    """Completions, rewards, and rewards of a group, by the tensors of `kernel_arguments`."""
    offsets, rewards = tensors[1:3]
    assert offsets is not None
    num_rewards, group_size = (0, 1) if rewards is None else (rewards.numel(), rewards.shape[1])
    return offsets.shape[0] - 1, num_rewards, group_size


def empty_sums(like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty((), dtype=torch.float32), like.new_empty(NUM_SUMS, dtype=torch.float32)


def launch_sums(
    partials: Tensor,  # [NUM_SUMS, num_blocks]
    denominator: Tensor | None,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:  # 0-d, [NUM_SUMS]
    """The loss, and the metrics of all tokens."""
    loss, metrics = empty_sums(partials)
    launch(
        _sum_blocks_kernel, (NUM_SUMS,), partials, denominator, loss, metrics, partials.shape[1], numbers[-1],
        ROWS=_ROWS,
    )  # fmt: skip
    return loss, metrics


def named_metrics(metrics: Tensor, entropies: Tensor | None, arguments: LossArguments) -> Stats:
    """Those of the metrics that the arguments define."""
    absent = {"loss"}
    absent |= {"kl"} if arguments.ref_logprobs is None else set()
    absent |= {"entropy"} if entropies is None else set()
    if arguments.behavior_logprobs is None:
        absent |= {"behavior_mismatch_mean", "behavior_mismatch_max"}
    return {name: value for name, value in zip(_SUMS, metrics, strict=True) if name not in absent}


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
