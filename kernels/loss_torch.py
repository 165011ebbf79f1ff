"""The loss in torch: per-token loss and gradient, and metrics, of what grpo_loss.py has the formulas for.

Everything here is per token, [num_targets], without the denominator, and without autograd: the gradient by the log-prob
is written out, as the kernel has it, so that a chunk of tokens can have its gradient before the next chunk's log-probs
exist.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import IGNORE_TARGET, accumulation_dtype
from flashgrpo.kernels.loss_config import (
    ADVANTAGE_SCALES,
    MAX_DIFFERENCE,
    MAX_LOG_RATIO,
    AdvantageScale,
    KLEstimator,
    LossConfig,
    LossInputs,
)

Stats = dict[str, Tensor]
ADVANTAGE_EPS = 1e-4  # added to the standard deviation


class TokenInputs(NamedTuple):
    """`LossInputs` spread over tokens. Those that do not count hold zeros throughout."""

    config: LossConfig
    counted: Tensor  # [num_targets] bool: has an advantage, and a target that is not ignored
    sequence: Tensor  # [num_targets] int64, completion of the token
    spans: Tensor  # [num_completions], tokens
    lengths: Tensor  # [num_completions], tokens that count
    advantages: Tensor  # [num_targets]
    weights: Tensor  # [num_targets], of the aggregate, before the denominator
    old: Tensor | None  # [num_targets], None: exactly on-policy
    ref: Tensor | None  # [num_targets]
    behavior: Tensor | None  # [num_targets]

    @classmethod
    def of(
        cls,
        inputs: LossInputs,
        like: Tensor,  # [num_targets], for shape, dtype and device
    ) -> "TokenInputs":
        config, dtype = inputs.config, accumulation_dtype(like.dtype)
        offsets = inputs.target_cu_seqlens.long()
        spans = offsets.diff()
        sequence = torch.searchsorted(offsets[1:], torch.arange(like.shape[0], device=like.device), right=True)
        advantages = inputs.advantages
        if inputs.rewards is not None:
            advantages = group_advantages(inputs.rewards, scale=config.advantage_scale).flatten()
            if inputs.sequence_ids is not None:
                advantages = advantages.index_select(0, inputs.sequence_ids)
        assert advantages is not None
        advantages = advantages.to(dtype).index_select(0, sequence)
        counted = ~advantages.isnan()
        if inputs.targets is not None:
            counted &= inputs.targets != IGNORE_TARGET

        def keep(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.where(counted, x.to(dtype), 0)

        weights = counted.to(dtype)
        lengths = segment_sum(weights, spans)
        if config.aggregate == "sequence_mean":
            weights = weights / lengths.clamp(min=1).index_select(0, sequence)
        return cls(
            config, counted, sequence, spans, lengths, torch.where(counted, advantages, 0), weights,
            old=keep(inputs.old_logprobs), ref=keep(inputs.ref_logprobs), behavior=keep(inputs.behavior_logprobs),
        )  # fmt: skip

    @property
    def d_entropies(self) -> Tensor | None:  # [num_targets]
        """Gradient of the loss by each token's entropy, before the denominator; None without an entropy bonus."""
        return -self.config.entropy_coef * self.weights if self.config.entropy_coef else None

    def rows(self, chunk: slice) -> "TokenInputs":
        """The same for a slice of the tokens. Only token-level ratios can be had from it."""
        old, ref, behavior = (None if x is None else x[chunk] for x in (self.old, self.ref, self.behavior))
        return self._replace(
            counted=self.counted[chunk], sequence=self.sequence[chunk], advantages=self.advantages[chunk],
            weights=self.weights[chunk], old=old, ref=ref, behavior=behavior,
        )  # fmt: skip


class TokenLoss(NamedTuple):
    """Per token, [num_targets] each, before the denominator; zeros where a token does not count."""

    loss: Tensor
    d_logprob: Tensor
    ratio: Tensor
    kl: Tensor | None
    mismatch: Tensor | None  # |old - behavior|


def token_losses(
    logprobs: Tensor,  # [num_targets]
    inputs: TokenInputs,
) -> TokenLoss:
    """Loss and its gradient by the log-prob for every token."""
    config = inputs.config
    logprobs = torch.where(inputs.counted, logprobs.detach().to(inputs.weights.dtype), 0)
    if inputs.old is None:
        log_ratio = torch.where(logprobs.isnan(), logprobs, 0)
    else:
        log_ratio = _at_ratio_level(logprobs - inputs.old, inputs)
    ratio = _bounded_exp(log_ratio)
    old = logprobs if inputs.old is None else inputs.old
    mismatch = None if inputs.behavior is None else old - inputs.behavior
    scaled_advantages = inputs.advantages
    if config.behavior_cap is not None and mismatch is not None:
        scaled_advantages = scaled_advantages * _behavior_weights(mismatch, config.behavior_cap, inputs)
    if config.objective == "cispo":
        d_logprob = -scaled_advantages * ratio.clamp(max=1 + config.clip_high)
        loss = torch.where(d_logprob == 0, 0, d_logprob * logprobs)
    else:
        above, below = ratio.clamp(max=1 + config.clip_high), ratio.clamp(1 - config.clip_low, config.clip_max)
        bounded = torch.where(inputs.advantages < 0, below, above)
        loss = -scaled_advantages * bounded
        beyond = (bounded < ratio) | (bounded > ratio) | (log_ratio > MAX_LOG_RATIO)
        d_logprob = torch.where(beyond, 0, loss)
    kl = None
    if inputs.ref is not None:
        kl, d_kl = _kl_and_gradient(inputs.ref - logprobs, config.kl_estimator)
        if config.kl_coef:
            loss = loss + config.kl_coef * kl
            d_logprob = d_logprob + config.kl_coef * d_kl
    return TokenLoss(
        inputs.weights * loss, inputs.weights * d_logprob, ratio, kl, None if mismatch is None else mismatch.abs()
    )


def summed(
    terms: TokenLoss,
    logprobs: Tensor,  # [num_targets]
    entropies: Tensor | None,  # [num_targets]
    inputs: TokenInputs,
    denominator: float | Tensor,
) -> tuple[Tensor, Stats]:
    """The scalar that is minimised, and the metrics that `grpo_loss` describes; with entropies `logits_grpo_loss`."""
    loss, d_entropies = terms.loss, inputs.d_entropies
    if d_entropies is not None and entropies is not None:
        loss = loss + d_entropies * torch.where(inputs.counted, entropies, 0)
    return loss.sum() / denominator, _token_stats(terms, entropies, inputs) | per_token_stats(logprobs, entropies)


def per_token_stats(logprobs: Tensor, entropies: Tensor | None) -> Stats:
    """What `logits_grpo_loss` reports of each token; nothing where there are no entropies."""
    return {} if entropies is None else {"logprobs": logprobs.detach(), "entropies": entropies.detach()}


def _token_stats(terms: TokenLoss, entropies: Tensor | None, inputs: TokenInputs) -> Stats:
    counted, config, d_entropies = inputs.counted, inputs.config, inputs.d_entropies
    num_tokens = counted.sum()
    live = terms.d_logprob != 0
    if d_entropies is not None:
        live |= d_entropies != 0

    def mean(x: Tensor) -> Tensor:
        return (torch.where(counted, x, 0).sum() / num_tokens.clamp(min=1)).float()

    def largest(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.where(counted, x, 0), (0, 1)).amax().float()

    below, above = terms.ratio < 1 - config.clip_low, terms.ratio > 1 + config.clip_high
    stats = {
        "num_tokens": num_tokens.float(),
        "ratio_mean": mean(terms.ratio),
        "ratio_max": largest(terms.ratio),
        "clip_low_fraction": mean(below & (inputs.advantages < 0)),
        "clip_high_fraction": mean(above & (inputs.advantages > 0)),
        "live_fraction": mean(live),
    }
    if terms.kl is not None:
        stats["kl"] = mean(terms.kl)
    if terms.mismatch is not None:
        stats["behavior_mismatch_mean"] = mean(terms.mismatch)
        stats["behavior_mismatch_max"] = largest(terms.mismatch)
    if entropies is not None:
        stats["entropy"] = mean(entropies)
    return stats


def segment_sum(
    x: Tensor,  # [num_targets]
    spans: Tensor,  # [num_completions]
) -> Tensor:  # [num_completions]
    """Sums over each completion's tokens."""
    return torch.segment_reduce(x, "sum", lengths=spans, unsafe=True)


def _at_ratio_level(log_ratio: Tensor, inputs: TokenInputs) -> Tensor:
    if inputs.config.ratio_level == "token":
        return log_ratio
    means = segment_sum(log_ratio, inputs.spans) / inputs.lengths.clamp(min=1)
    return means.index_select(0, inputs.sequence)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _behavior_weights(mismatch: Tensor, cap: float, inputs: TokenInputs) -> Tensor:
    weights = _bounded_exp(_at_ratio_level(mismatch, inputs))
    if inputs.config.behavior_mode == "truncate":
        return weights.clamp(max=cap)
    return torch.where((weights >= inputs.config.behavior_floor) & (weights <= cap), weights, 0)


def _kl_and_gradient(
    difference: Tensor,  # [num_targets], ref - logprob
    estimator: KLEstimator,
) -> tuple[Tensor, Tensor]:
    highest = MAX_LOG_RATIO if estimator == "k3" else MAX_DIFFERENCE
    bounded = difference.clamp(-MAX_DIFFERENCE, highest)
    if estimator == "k1":
        kl, d_kl = -bounded, -torch.ones_like(bounded)
    elif estimator == "k2":
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
