"""What the loss functions are told: the configuration, and the arguments they share, checked.

grpo_loss.py has the formulas.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype, check_index

RatioLevel = Literal["token", "sequence"]
Objective = Literal["clip", "cispo"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregate = Literal["sequence_mean", "token_mean", "constant"]
AdvantageScale = Literal["std", "none"]
BehaviorMode = Literal["truncate", "mask"]
ADVANTAGE_SCALES = get_args(AdvantageScale)
# Log-ratios above this are as good as infinite: exp of them is bounded, and without gradient.
MAX_LOG_RATIO = 20.0
# So are differences beyond this between log-prob and reference, which is below what fp32 holds as a probability.
MAX_DIFFERENCE = 100.0


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
    """All that a loss is told besides log-probs. The fields' names are those of the public functions' arguments."""

    config: LossConfig
    target_cu_seqlens: Tensor  # [num_completions + 1]
    denominator: float | Tensor
    rewards: Tensor | None  # [num_groups, group_size]
    sequence_ids: Tensor | None  # [num_completions]
    advantages: Tensor | None  # [num_completions]
    old_logprobs: Tensor | None  # [num_targets]
    ref_logprobs: Tensor | None  # [num_targets]
    behavior_logprobs: Tensor | None  # [num_targets]
    targets: Tensor | None = None  # [num_targets]

    def checked(
        self,
        like: Tensor,  # [num_targets], for shape and device
    ) -> "LossInputs":
        """The same, detached. Raises as `grpo_loss` says."""
        config, denominator = self.config, self.denominator
        if config.kl_coef and self.ref_logprobs is None:
            raise ValueError(f"kl_coef is {config.kl_coef}, which needs ref_logprobs; found None")
        if config.behavior_cap is not None and self.behavior_logprobs is None:
            raise ValueError(f"behavior_cap is {config.behavior_cap}, which needs behavior_logprobs; found None")
        if isinstance(denominator, Tensor):
            if denominator.dim():
                raise ValueError(f"denominator has shape {tuple(denominator.shape)}; wanted a number or a 0-d tensor")
        elif not 0 < denominator < math.inf:
            raise ValueError(f"denominator is {denominator}; wanted a finite number above 0")
        _check_offsets(self.target_cu_seqlens, like)
        for name, x in self._asdict().items():
            # Offsets, ids and targets have their own check of dtype and shape.
            if not isinstance(x, Tensor) or name in ("target_cu_seqlens", "sequence_ids", "targets"):
                continue
            if x.device != like.device:
                raise ValueError(f"{name} is on {x.device}; wanted {like.device}")
            if name not in ("rewards", "denominator") and not x.is_floating_point():
                raise TypeError(f"{name} is {x.dtype}; wanted a floating dtype")
            if name.endswith("_logprobs") and x.shape != like.shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted {tuple(like.shape)}, one entry a target")
        _check_rewards(self.rewards, self.sequence_ids, self.advantages, self.target_cu_seqlens.shape[0] - 1)
        inputs = self._make(x.detach() if isinstance(x, Tensor) else x for x in self)
        if isinstance(inputs.denominator, Tensor):  # a float64 one would make the loss float64
            inputs = inputs._replace(denominator=inputs.denominator.to(accumulation_dtype(like.dtype)))
        if inputs.rewards is not None:  # often bools, and masked lanes of an integer load hold no NaN
            inputs = inputs._replace(rewards=inputs.rewards.to(accumulation_dtype(inputs.rewards.dtype)))
        return inputs


def _check_offsets(target_cu_seqlens: Tensor, like: Tensor) -> None:
    check_index("target_cu_seqlens", target_cu_seqlens, like.device)
    if like.shape[0] and target_cu_seqlens.shape[0] < 2:
        raise ValueError(f"target_cu_seqlens has one entry; wanted the offsets of {like.shape[0]} target rows")
    if target_cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        first, last = int(target_cu_seqlens[0]), int(target_cu_seqlens[-1])
        if first != 0 or last != like.shape[0] or bool((target_cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"target_cu_seqlens goes from {first} to {last}; wanted offsets that rise from 0 to the number of "
                f"target rows, {like.shape[0]}"
            )


def _check_rewards(
    rewards: Tensor | None, sequence_ids: Tensor | None, advantages: Tensor | None, num_completions: int
) -> None:
    if (rewards is None) == (advantages is None):
        raise ValueError(f"{'neither' if rewards is None else 'both'} of rewards and advantages given; wanted one")
    if advantages is not None:
        if sequence_ids is not None:
            raise ValueError("sequence_ids says where rewards belong; leave it out with advantages")
        if advantages.shape != (num_completions,):
            raise ValueError(f"advantages has shape {tuple(advantages.shape)}; wanted [{num_completions}]")
    elif rewards is not None:
        if rewards.dim() != 2:
            raise ValueError(f"rewards has shape {tuple(rewards.shape)}; wanted [num_groups, group_size]")
        if sequence_ids is not None:
            check_index("sequence_ids", sequence_ids, rewards.device, num_completions)
            on_host = sequence_ids.is_cpu and not torch.compiler.is_compiling()
            if on_host and (beyond := [i for i in sequence_ids.tolist() if not 0 <= i < rewards.numel()]):
                raise ValueError(f"sequence_ids has {beyond}; wanted entries of {rewards.numel()} rewards, from 0")
        elif rewards.numel() != num_completions:
            raise ValueError(
                f"rewards has shape {tuple(rewards.shape)} for {num_completions} completions; wanted one reward a "
                "completion, or sequence_ids"
            )
