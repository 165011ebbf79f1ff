"""The arithmetic that the loss functions share: configuration, per-token loss and gradient, metrics.

grpo_loss.py has the formulas. Everything here is per token, [num_targets], without the denominator, and without
autograd: the gradient by the log-prob is written out, as a kernel has it, so that a chunk of tokens can have its
gradient before the next chunk's log-probs exist.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Stats = dict[str, Tensor]
RatioLevel = Literal["token", "sequence"]
Objective = Literal["clip", "cispo"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregate = Literal["sequence_mean", "token_mean", "constant"]
AdvantageScale = Literal["std", "none"]
BehaviorMode = Literal["truncate", "mask"]
ADVANTAGE_SCALES = get_args(AdvantageScale)
# Log-ratios above this are as good as infinite: exp of them is bounded, and without gradient.
_MAX_LOG_RATIO = 20.0
# So are differences beyond this between log-prob and reference, which is below what fp32 holds as a probability.
_MAX_DIFFERENCE = 100.0


@dataclass(frozen=True)
class LossConfig:
    """What is minimised. `LossConfig.preset("dapo", kl_coef=0.01)` starts from a published recipe.

    The text beside each field is its help. Raises ValueError for a value that is not among a field's choices, is not
    a number, or is out of its range.
    """

    ratio_level: Annotated[RatioLevel, "Of each token, or the geometric mean over the completion (GSPO)."] = "token"
    objective: Annotated[Objective, "PPO's clipped ratio, or CISPO's: the bounded ratio weighs the log-prob."] = "clip"
    clip_low: Annotated[float, "The ratio counts down to 1 - clip_low; cispo has no lower bound."] = 0.2
    clip_high: Annotated[float, "The ratio counts up to 1 + clip_high."] = 0.2
    clip_max: Annotated[float | None, "Bound on the ratio where the advantage is negative, above 1 + clip_high."] = None
    kl_coef: Annotated[float, "Weight of the KL penalty; 0: no reference model."] = 0.0
    kl_estimator: Annotated[KLEstimator, "With d = ref - logprob: -d, d^2 / 2, or exp(d) - d - 1."] = "k3"
    entropy_coef: Annotated[float, "Weight of the entropy bonus; from logits or hidden states only."] = 0.0
    aggregate: Annotated[Aggregate, "Mean of completions' means, mean of tokens, or sum over a constant."] = (
        "sequence_mean"
    )
    advantage_scale: Annotated[AdvantageScale, "Divide by the group's standard deviation, or not (Dr. GRPO)."] = "std"
    behavior_cap: Annotated[float | None, "Largest weight p_old / p_behavior; none: no correction for the sampler."] = (
        None
    )
    behavior_floor: Annotated[float, "Smallest such weight; mask only."] = 0.0
    behavior_mode: Annotated[BehaviorMode, "Beyond the cap the weight is cut to it (TIS), or 0 (IcePop)."] = "truncate"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal:
                if value not in choices:
                    raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(choices)}")
            elif not (_is_number(value) or (value is None and choices)):
                raise ValueError(
                    f"{name} is {value!r}; wanted a finite number, 0 or above{', or None' * bool(choices)}"
                )
        if self.clip_max is not None:
            if self.objective == "cispo":
                raise ValueError(f"clip_max is {self.clip_max}, which objective 'cispo' does not have; leave it None")
            if not self.clip_max > 1 + self.clip_high:
                raise ValueError(f"clip_max is {self.clip_max}; wanted above 1 + clip_high = {1 + self.clip_high}")
        if self.behavior_floor and self.behavior_mode == "truncate":
            raise ValueError(f"behavior_floor is {self.behavior_floor}, which needs behavior_mode 'mask'; leave it 0")
        if self.behavior_cap is not None and not self.behavior_cap > self.behavior_floor:
            raise ValueError(f"behavior_cap is {self.behavior_cap}; wanted above behavior_floor={self.behavior_floor}")

    @classmethod
    def presets(cls) -> list[str]:
        """Names that `preset` takes."""
        return list(_PRESETS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LossConfig":
        """The configuration of a published method, with `overrides` on top. Raises ValueError for an unknown name."""
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(_PRESETS)}")
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in overrides if key not in known]:
            raise ValueError(f"LossConfig has no field {unknown[0]!r}; its fields: {', '.join(known)}")
        return cls(**{**_PRESETS[name], **overrides})


_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.04},
    "r1": {"clip_low": 10.0, "clip_high": 10.0, "kl_coef": 0.001},
    "dapo": {"aggregate": "token_mean", "clip_high": 0.28},
    "bnpo": {"aggregate": "token_mean"},
    "dr_grpo": {"aggregate": "constant", "advantage_scale": "none"},
    "gspo": {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"aggregate": "token_mean", "objective": "cispo", "clip_high": 4.0},
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


class LossInputs(NamedTuple):
    """What the loss knows of each token besides its log-prob. Tokens that do not count hold zeros throughout."""

    config: LossConfig
    denominator: float | Tensor
    counted: Tensor  # [num_targets] bool: has an advantage, and a target that is not ignored
    sequence: Tensor  # [num_targets] int64, completion of the token
    spans: Tensor  # [num_completions], tokens
    lengths: Tensor  # [num_completions], tokens that count
    advantages: Tensor  # [num_targets]
    weights: Tensor  # [num_targets], of the aggregate, before the denominator
    old: Tensor | None  # [num_targets], None: exactly on-policy
    ref: Tensor | None  # [num_targets]
    behavior: Tensor | None  # [num_targets]

    @property
    def d_entropies(self) -> Tensor | None:  # [num_targets]
        """Gradient of the loss by each token's entropy, before the denominator; None without an entropy bonus."""
        return -self.config.entropy_coef * self.weights if self.config.entropy_coef else None

    def rows(self, chunk: slice) -> "LossInputs":
        """The same for a slice of the tokens. Only token-level ratios can be had from it."""
        per_token = ("counted", "sequence", "advantages", "weights", "old", "ref", "behavior")
        values = {name: getattr(self, name) for name in per_token}
        return self._replace(**{name: value[chunk] for name, value in values.items() if value is not None})


class TokenLoss(NamedTuple):
    """Per token, [num_targets] each, before the denominator; zeros where a token does not count."""

    loss: Tensor
    d_logprob: Tensor
    ratio: Tensor
    kl: Tensor | None
    mismatch: Tensor | None  # |old - behavior|


def token_losses(
    logprobs: Tensor,  # [num_targets]
    inputs: LossInputs,
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
        beyond = (bounded < ratio) | (bounded > ratio) | (log_ratio > _MAX_LOG_RATIO)
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


def total_loss(
    terms: TokenLoss,
    entropies: Tensor | None,  # [num_targets]
    inputs: LossInputs,
) -> Tensor:
    """The scalar that is minimised."""
    loss, d_entropies = terms.loss, inputs.d_entropies
    if d_entropies is not None and entropies is not None:
        loss = loss + d_entropies * torch.where(inputs.counted, entropies, 0)
    return loss.sum() / inputs.denominator


def token_stats(
    terms: TokenLoss,
    logprobs: Tensor,  # [num_targets]
    entropies: Tensor | None,  # [num_targets]
    inputs: LossInputs,
) -> Stats:
    """The metrics that `grpo_loss` describes; with entropies also those of `logits_grpo_loss`."""
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
        stats |= {"entropy": mean(entropies), "logprobs": logprobs.detach(), "entropies": entropies.detach()}
    return stats


def segment_sum(
    x: Tensor,  # [num_targets]
    spans: Tensor,  # [num_completions]
) -> Tensor:  # [num_completions]
    """Sums over each completion's tokens."""
    return torch.segment_reduce(x, "sum", lengths=spans, unsafe=True)


def _at_ratio_level(log_ratio: Tensor, inputs: LossInputs) -> Tensor:
    if inputs.config.ratio_level == "token":
        return log_ratio
    means = segment_sum(log_ratio, inputs.spans) / inputs.lengths.clamp(min=1)
    return means.index_select(0, inputs.sequence)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=_MAX_LOG_RATIO).exp()


def _behavior_weights(mismatch: Tensor, cap: float, inputs: LossInputs) -> Tensor:
    weights = _bounded_exp(_at_ratio_level(mismatch, inputs))
    if inputs.config.behavior_mode == "truncate":
        return weights.clamp(max=cap)
    return torch.where((weights >= inputs.config.behavior_floor) & (weights <= cap), weights, 0)


def _kl_and_gradient(
    difference: Tensor,  # [num_targets], ref - logprob
    estimator: KLEstimator,
) -> tuple[Tensor, Tensor]:
    highest = _MAX_LOG_RATIO if estimator == "k3" else _MAX_DIFFERENCE
    bounded = difference.clamp(-_MAX_DIFFERENCE, highest)
    if estimator == "k1":
        kl, d_kl = -bounded, -torch.ones_like(bounded)
    elif estimator == "k2":
        kl, d_kl = bounded.square() / 2, bounded
    else:
        growth = bounded.expm1()
        kl, d_kl = growth - bounded, growth
    return kl, torch.where((difference < -_MAX_DIFFERENCE) | (difference > highest), 0, -d_kl)
