"""The loss in torch: per-token loss and gradient, and metrics, of what grpo_loss.py has the formulas for.

Everything here is per token, [num_targets], without the denominator, and without autograd: the
gradient by the log-prob is written out, as the kernel has it, so that a chunk of tokens can have
its gradient before the next chunk's log-probs exist.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import IGNORE_TARGET, accumulation_dtype
from flashgrpo.kernels.logprob_torch import row_logprobs
from flashgrpo.kernels.loss_config import (
    ADVANTAGE_EPS,
    ADVANTAGE_SCALES,
    MAX_DIFFERENCE,
    MAX_LOG_RATIO,
    METRICS,
    AdvantageScale,
    LossInputs,
)


class Loss(NamedTuple):
    """What is made of log-probs. Loss and gradients are over the denominator."""

    loss: Tensor  # 0-d
    metrics: Tensor  # [len(METRICS)] fp32
    per_token: Tensor  # [len(PER_TOKEN), num_targets]; no rows unless asked for
    d_logprobs: Tensor  # [num_targets]
    d_entropies: Tensor | None  # [num_targets], with an entropy bonus


def loss_of_logprobs(
    logprobs: Tensor,  # [num_targets]
    entropies: Tensor | None,  # [num_targets]
    inputs: LossInputs,
) -> Loss:
    tokens = TokenInputs.of(of_high_entropy(inputs, logprobs, entropies), logprobs)
    terms = token_losses(logprobs, tokens)
    d_entropies = None if tokens.d_entropies is None else tokens.d_entropies / inputs.divisor
    return Loss(*summed(terms, entropies, tokens, inputs), terms.d_logprob / inputs.divisor, d_entropies)


class RowLoss:
    """The token-level loss of tokens whose logits come in any number of calls, and what the calls have written."""

    def __init__(
        self,
        inputs: LossInputs,
        like: Tensor,  # for dtype and device
        temperature: float,
    ):
        assert inputs.targets is not None
        self.targets, self.temperature = inputs.targets, temperature
        self.logprobs = like.new_empty(self.targets.shape, dtype=accumulation_dtype(like.dtype))
        self.entropies = torch.empty_like(self.logprobs)
        self.live = torch.empty_like(self.logprobs, dtype=torch.bool)  # the gradient is not exactly 0
        self.tokens = TokenInputs.of(inputs, self.logprobs)
        self.taken: list[TokenLoss] = []

    def take(
        self,
        logits: Tensor,  # [rows, vocab], whose memory it may use up
        first_row: int,
        d_logits: Tensor | None,  # memory for the gradient, which may be the logits; None: no gradient
    ) -> Tensor | None:  # [rows, vocab]
        """The loss of tokens `first_row` and after; returns its gradient over the denominator, which may also lie
        elsewhere.
        """
        rows = slice(first_row, first_row + logits.shape[0])
        targets, tokens = self.targets[rows], self.tokens.rows(rows)
        found = row_logprobs(logits, targets, self.temperature, overwrite=True)
        self.logprobs[rows], self.entropies[rows] = found.logprobs, found.entropy
        self.taken.append(token_losses(found.logprobs, tokens))
        if d_logits is None:
            return None
        upstream, divisor = (self.taken[-1].d_logprob, tokens.d_entropies), tokens.numbers.divisor
        self.live[rows] = is_live(*upstream)
        d_logprobs, d_entropies = (None if x is None else x / divisor for x in upstream)
        assert d_logprobs is not None
        return found.gradients(targets, d_logprobs, d_entropies, self.temperature)

    def result(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The loss over the denominator of `inputs`, and the rest as in `summed`, when all rows have been taken."""
        columns = zip(*self.taken or [token_losses(self.logprobs, self.tokens)], strict=True)
        terms = TokenLoss._make(None if column[0] is None else torch.cat(column) for column in columns)
        return summed(terms, self.entropies, self.tokens, inputs)


def live_rows(
    x: Tensor,  # [rows, width]
    live: Tensor,  # [rows] bool
    num_live: int,
) -> tuple[Tensor, Tensor]:  # [num_live, width], [num_live] int64
    """x's live rows, and where each came from."""
    sources = torch.nonzero_static(live, size=num_live).squeeze(1)
    return x.index_select(0, sources), sources


def is_live(d_logprobs: Tensor, d_entropies: Tensor | None) -> Tensor:
    """Where a gradient is not exactly 0."""
    return d_logprobs != 0 if d_entropies is None else (d_logprobs != 0) | (d_entropies != 0)


class TokenInputs(NamedTuple):
    """`LossInputs` spread over tokens. Those that do not count hold zeros throughout."""

    numbers: LossInputs
    spans: Tensor  # [num_completions], tokens
    lengths: Tensor  # [num_completions], tokens that count
    sequence: Tensor  # [num_targets] int64, completion of the token
    counted: Tensor  # [num_targets] bool: has an advantage, and a target that is not ignored
    advantages: Tensor  # [num_targets], and so the others
    weights: Tensor  # of the aggregate, before the denominator
    old: Tensor | None  # None: exactly on-policy
    ref: Tensor | None
    behavior: Tensor | None
    log_weights: Tensor | None  # of completions, old - behavior; None: those of tokens

    @classmethod
    def of(
        cls,
        inputs: LossInputs,
        logprobs: Tensor,  # [num_targets]; only for shape, dtype and device unless they are scored first
    ) -> "TokenInputs":
        dtype, offsets = accumulation_dtype(logprobs.dtype), inputs.target_cu_seqlens.long()
        spans = offsets.diff()
        sequence = torch.searchsorted(offsets[1:], torch.arange(len(logprobs), device=logprobs.device), right=True)
        advantages = inputs.advantages
        if inputs.rewards is not None:
            scale = ADVANTAGE_SCALES[int(inputs.advantage_scale)]
            advantages = group_advantages(inputs.rewards, scale=scale).flatten()
            if inputs.sequence_ids is not None:
                advantages = advantages.index_select(0, inputs.sequence_ids)
        if inputs.token_advantages is not None:
            advantages = inputs.token_advantages.to(dtype)
        else:
            assert advantages is not None
            advantages = advantages.to(dtype).index_select(0, sequence)
        counted = ~advantages.isnan()
        if inputs.targets is not None:
            counted &= inputs.targets != IGNORE_TARGET

        def keep(x: Any) -> Any:
            return None if x is None else torch.where(counted, x.to(dtype), 0)

        weights = counted.to(dtype)
        lengths = torch.segment_reduce(weights, "sum", lengths=spans, unsafe=True)
        if inputs.aggregate == 0:
            weights = weights / lengths.clamp(min=1).index_select(0, sequence)
        old, behavior, log_weights = keep(inputs.old_logprobs), keep(inputs.behavior_logprobs), None
        if behavior is not None and inputs.behavior_level:
            mismatch = (keep(logprobs) if old is None else old) - behavior
            log_weights = _over_completions(mismatch, spans, sequence, lengths if inputs.behavior_level == 2 else None)
        sampled = old if behavior is None else behavior
        if sampled is not None and inputs.off_policy_threshold < math.inf:
            drift = _over_completions(sampled - keep(logprobs), spans, sequence, lengths)
            advantages = torch.where((advantages < 0) & (drift > inputs.off_policy_threshold), 0, advantages)
        return cls(
            inputs, spans, lengths, sequence, counted, torch.where(counted, advantages, 0), weights, old,
            keep(inputs.ref_logprobs), behavior, log_weights,
        )  # fmt: skip

    @property
    def d_entropies(self) -> Tensor | None:  # [num_targets]
        """Gradient of the loss by each token's entropy, before the denominator; None without an entropy bonus."""
        return -self.numbers.entropy_coef * self.weights if self.numbers.entropy_coef else None

    def rows(self, chunk: slice) -> "TokenInputs":
        """The same for a slice of the tokens. Only token-level ratios can be had from it."""
        per_token = (None if x is None else x[chunk] for x in self[3:])
        return self._make((*self[:3], *per_token))


class TokenLoss(NamedTuple):
    """Per token, [num_targets] each, before the denominator; zeros where a token does not count."""

    loss: Tensor
    d_logprob: Tensor
    ratio: Tensor
    kl: Tensor | None
    mismatch: Tensor | None  # |old - behavior|


def token_losses(
    logprobs: Tensor,  # [num_targets]
    tokens: TokenInputs,
) -> TokenLoss:
    """Loss and its gradient by the log-prob for every token."""
    numbers = tokens.numbers
    logprobs = torch.where(tokens.counted, logprobs.to(tokens.weights.dtype), 0)
    if tokens.old is None:
        log_ratio = torch.where(logprobs.isnan(), logprobs, 0)
    else:
        log_ratio = logprobs - tokens.old
        if numbers.ratio_level:
            log_ratio = _over_completions(log_ratio, tokens.spans, tokens.sequence, tokens.lengths)
    ratio = _bounded_exp(log_ratio)
    old = logprobs if tokens.old is None else tokens.old
    mismatch = None if tokens.behavior is None else old - tokens.behavior
    scaled_advantages = tokens.advantages
    if numbers.behavior_cap < math.inf and mismatch is not None:
        scaled_advantages = scaled_advantages * _behavior_weights(mismatch, tokens)
    above = ratio.clamp(max=1 + numbers.clip_high)
    ends = log_ratio > MAX_LOG_RATIO  # the ratio's gradient
    if numbers.objective == 2:
        tau = torch.full_like(ratio, numbers.tau_neg).masked_fill(tokens.advantages > 0, numbers.tau_pos)
        gate = torch.sigmoid(tau * (ratio - 1))
        loss = -scaled_advantages * gate * 4 / tau
        d_logprob = torch.where(ends, 0, -scaled_advantages * 4 * ratio * gate * torch.sigmoid(tau * (1 - ratio)))
    elif numbers.objective == 1:
        d_logprob = -scaled_advantages * above
        loss = torch.where(d_logprob == 0, 0, d_logprob * logprobs)
    else:
        below = ratio.clamp(1 - numbers.clip_low, numbers.clip_max)
        bounded = torch.where(tokens.advantages < 0, below, above)
        loss = -scaled_advantages * bounded
        beyond = (bounded < ratio) | (bounded > ratio) | ends
        d_logprob = torch.where(beyond, 0, loss)
    kl = None
    if tokens.ref is not None:
        kl, d_kl = _kl_and_gradient(tokens.ref - logprobs, numbers.kl_estimator)
        if numbers.kl_coef:
            weight, d_weight = (ratio, torch.where(ends, 0, ratio)) if numbers.kl_weight else (1.0, 0.0)
            loss = loss + numbers.kl_coef * weight * kl
            d_logprob = d_logprob + numbers.kl_coef * (weight * d_kl + d_weight * kl)
    return TokenLoss(
        tokens.weights * loss, tokens.weights * d_logprob, ratio, kl, None if mismatch is None else mismatch.abs()
    )


def summed(
    terms: TokenLoss,
    entropies: Tensor | None,  # [num_targets]
    tokens: TokenInputs,
    inputs: LossInputs,
) -> tuple[Tensor, Tensor, Tensor]:  # 0-d, [len(METRICS)], [len(PER_TOKEN) or 0, num_targets]
    """The scalar that is minimised, the metrics and what is told of each token; 0 for what the inputs do not define."""
    loss, d_entropies, counted, advantages = terms.loss, tokens.d_entropies, tokens.counted, tokens.advantages
    if d_entropies is not None and entropies is not None:
        loss = loss + d_entropies * torch.where(counted, entropies, 0)
    num_tokens = counted.sum()
    divisor, nothing = num_tokens.clamp(min=1), loss.new_zeros(())
    # Everything else is 0, or False, where a token does not count.
    ratio = torch.where(counted, terms.ratio, 0)

    def fraction(where: Tensor) -> Tensor:
        return where.count_nonzero() / divisor

    def largest(x: Tensor) -> Tensor:
        return x.amax() if len(x) else nothing

    below, above = ratio < 1 - inputs.clip_low, ratio > 1 + inputs.clip_high
    found = {
        "num_tokens": num_tokens,
        "ratio_mean": ratio.sum() / divisor,
        "ratio_max": largest(ratio),
        "clip_low_fraction": fraction(below & (advantages < 0)),
        "clip_high_fraction": fraction(above & (advantages > 0)),
        # A weight of 0 times a ratio that is not finite is NaN, which would be counted alone.
        "live_fraction": fraction(is_live(terms.d_logprob, d_entropies) & counted),
    }
    if terms.kl is not None:
        found["kl"] = terms.kl.sum() / divisor
    if terms.mismatch is not None:
        found["behavior_mismatch_mean"] = terms.mismatch.sum() / divisor
        found["behavior_mismatch_max"] = largest(terms.mismatch)
    if entropies is not None:
        found["entropy"] = torch.where(counted, entropies, 0).sum() / divisor
    metrics = torch.stack([found.get(name, nothing).to(loss.dtype) for name in METRICS])
    kl = torch.zeros_like(loss) if terms.kl is None else terms.kl
    per_token = torch.stack((ratio, kl, loss)) if inputs.per_token else loss.new_empty(0, len(loss))
    return loss.sum() / inputs.divisor, metrics.float(), per_token


def of_high_entropy(
    inputs: LossInputs,
    logprobs: Tensor,  # [num_targets]
    entropies: Tensor | None,  # [num_targets]
) -> LossInputs:
    """The same with an advantage of 0 where a token's entropy is below that of the `top_entropy` of tokens."""
    if inputs.top_entropy == 1 or entropies is None or not len(entropies):
        return inputs
    tokens = TokenInputs.of(inputs, logprobs)
    lowest = torch.where(tokens.counted, entropies, torch.nan).nanquantile(1 - inputs.top_entropy)
    advantages = tokens.advantages.masked_fill(entropies < lowest, 0).masked_fill(~tokens.counted, torch.nan)
    return inputs._replace(rewards=None, sequence_ids=None, advantages=None, token_advantages=advantages)


def _over_completions(
    x: Tensor,  # [num_targets], 0 where a token does not count
    spans: Tensor,  # [num_completions]
    sequence: Tensor,  # [num_targets]
    lengths: Tensor | None = None,  # [num_completions]
) -> Tensor:  # [num_targets]
    """For each token its completion's sum, over its length where lengths are given."""
    sums = torch.segment_reduce(x, "sum", lengths=spans, unsafe=True)
    return (sums if lengths is None else sums / lengths.clamp(min=1)).index_select(0, sequence)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _behavior_weights(mismatch: Tensor, tokens: TokenInputs) -> Tensor:
    numbers, weights = tokens.numbers, _bounded_exp(mismatch if tokens.log_weights is None else tokens.log_weights)
    bounded = weights.clamp(numbers.behavior_floor, numbers.behavior_cap)
    return torch.where(bounded != weights, 0, bounded) if numbers.behavior_mode else bounded


def _kl_and_gradient(
    difference: Tensor,  # [num_targets], ref - logprob
    estimator: float,  # of k1, k2 and k3, from 0
) -> tuple[Tensor, Tensor]:
    highest = MAX_LOG_RATIO if estimator == 2 else MAX_DIFFERENCE
    bounded = difference.clamp(-MAX_DIFFERENCE, highest)
    if estimator == 0:
        kl, d_kl = -bounded, -torch.ones_like(bounded)
    elif estimator == 1:
        kl, d_kl = bounded.square() / 2, bounded
    else:
        growth = bounded.expm1()
        kl, d_kl = growth - bounded, growth
    return kl, torch.where((difference < -MAX_DIFFERENCE) | (difference > highest), 0, -d_kl)


def group_advantages(
    rewards: Tensor,  # [num_groups, group_size]
    *,
    scale: AdvantageScale = "std",
    eps: float = ADVANTAGE_EPS,
) -> Tensor:  # [num_groups, group_size]
    """Rewards relative to their group's mean, over the sample standard deviation + eps unless `scale` is "none".

    fp32, or float64 for float64 rewards. A reward that is NaN or infinite is not there: its advantage is NaN, and it
    leaves the group's statistics. A group of one reward, or of equal ones, gets exactly 0.

    Raises ValueError unless rewards has two dimensions and `scale` is known.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; wanted [num_groups, group_size]")
    if scale not in ADVANTAGE_SCALES:
        raise ValueError(f"scale is {scale!r}; wanted one of {', '.join(ADVANTAGE_SCALES)}")
    rewards = rewards.to(accumulation_dtype(rewards.dtype))
    present = rewards.isfinite()
    count = present.sum(1, keepdim=True)
    # Measured from a reward of the group, equal rewards deviate by exactly 0 and large ones keep their digits.
    origin = rewards.gather(1, present.int().argmax(1, keepdim=True)) if rewards.shape[1] else rewards
    relative = torch.where(present, rewards - origin, 0)
    deviation = torch.where(present, relative - relative.sum(1, keepdim=True) / count, torch.nan)
    if scale == "none":
        return deviation
    variance = deviation.square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt() + eps)
