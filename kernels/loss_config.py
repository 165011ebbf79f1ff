"""What the loss functions are told: the configuration, and the arguments they share, checked; and what they report.

grpo_loss.py has the formulas.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype, check_index

RatioLevel = Literal["token", "sequence"]
Objective = Literal["clip", "cispo", "sapo"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregate = Literal["sequence_mean", "token_mean", "constant"]
AdvantageScale = Literal["std", "none"]
BehaviorMode = Literal["truncate", "mask"]
BehaviorLevel = Literal["token", "sequence", "geometric"]
KLWeight = Literal["none", "ratio"]
ADVANTAGE_SCALES = get_args(AdvantageScale)
# Log-ratios above this are as good as infinite: exp of them is bounded, and without gradient.
MAX_LOG_RATIO = 20.0
# So are differences beyond this between log-prob and reference, which is below what fp32 holds as a probability.
MAX_DIFFERENCE = 100.0
ADVANTAGE_EPS = 1e-4  # added to a group's standard deviation
# What both twins sum up over tokens, in this order; maxima are largest values.
METRICS = (
    "loss", "num_tokens", "ratio_mean", "ratio_max", "clip_low_fraction", "clip_high_fraction", "live_fraction", "kl",
    "behavior_mismatch_mean", "behavior_mismatch_max", "entropy",
)  # fmt: skip
# What is told of each token where that is asked for, in this order.
PER_TOKEN = ("ratios", "kls", "losses")


@dataclass(frozen=True)
class LossConfig:
    """What is minimised. `LossConfig.preset("dapo", kl_coef=0.01)` starts from a published recipe.

    The text beside each field is its help. Raises ValueError for a value that is not among a field's choices, is not
    a number, or is out of its range.
    """

    ratio_level: Annotated[RatioLevel, "Of each token, or the geometric mean over the completion (GSPO)."] = "token"
    objective: Annotated[Objective, "PPO's clipped ratio, CISPO's that weighs the log-prob, or SAPO's soft gate."] = (
        "clip"
    )
    clip_low: Annotated[float, "The ratio counts down to 1 - clip_low; cispo has no lower bound, sapo no bounds."] = 0.2
    clip_high: Annotated[float, "The ratio counts up to 1 + clip_high."] = 0.2
    clip_max: Annotated[
        float | None, "Bound of the ratio where the advantage is negative: delta of INTELLECT-2 and of TRL."
    ] = None
    tau_pos: Annotated[float, "Temperature of sapo's gate where the advantage is positive; higher closes sooner."] = 1.0
    tau_neg: Annotated[float, "Temperature of sapo's gate elsewhere."] = 1.05
    top_entropy: Annotated[
        float, "Share of a micro-batch's tokens, those of highest entropy, that teach the policy."
    ] = 1.0
    kl_coef: Annotated[float, "Weight of the KL penalty; 0: no reference model."] = 0.0
    kl_estimator: Annotated[KLEstimator, "With d = ref - logprob: -d, d^2 / 2, or exp(d) - d - 1."] = "k3"
    kl_weight: Annotated[KLWeight, "Times the ratio, the KL has an unbiased gradient (DeepSeek-V3.2)."] = "none"
    entropy_coef: Annotated[float, "Weight of the entropy bonus; from logits or hidden states only."] = 0.0
    aggregate: Annotated[Aggregate, "Mean of completions' means, mean of tokens, or sum over a constant."] = (
        "sequence_mean"
    )
    advantage_scale: Annotated[AdvantageScale, "Divide by the group's standard deviation, or not (Dr. GRPO)."] = "std"
    behavior_cap: Annotated[float | None, "Largest weight p_old / p_behavior; none: no correction for the sampler."] = (
        None
    )
    behavior_floor: Annotated[float, "Smallest weight p_old / p_behavior."] = 0.0
    behavior_mode: Annotated[BehaviorMode, "A weight beyond cap or floor is cut to it (TIS), or 0 (IcePop)."] = (
        "truncate"
    )
    behavior_level: Annotated[BehaviorLevel, "Weights of tokens, or of completions: product or geometric mean."] = (
        "token"
    )
    off_policy_threshold: Annotated[
        float | None, "Negative advantages are 0 where the completion's mean of log p_behavior / p is above."
    ] = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value, may_be_none = getattr(self, name), getattr(LossConfig, name) is None
            if choices:
                if value not in choices:
                    raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(choices)}")
            elif not (_is_number(value) or (value is None and may_be_none)):
                raise ValueError(f"{name} is {value!r}; wanted a finite number, 0 or above{', or None' * may_be_none}")
        if self.clip_max is not None and self.objective != "clip":
            raise ValueError(f"clip_max is {self.clip_max}, which {self.objective!r} does not have; leave it None")
        if not min(self.tau_pos, self.tau_neg) > 0:
            raise ValueError(f"tau_pos is {self.tau_pos} and tau_neg {self.tau_neg}; wanted both above 0")
        if not 0 < self.top_entropy <= 1:
            raise ValueError(f"top_entropy is {self.top_entropy}; wanted a share above 0, at most 1")
        if self.kl_weight == "ratio" and self.ratio_level == "sequence":
            raise ValueError("kl_weight is 'ratio', which makes the KL unbiased with ratio_level 'token' alone")
        if self.behavior_cap is not None and not self.behavior_cap > self.behavior_floor:
            raise ValueError(f"behavior_cap is {self.behavior_cap}; wanted above behavior_floor={self.behavior_floor}")

    @property
    def scores_first(self) -> bool:
        """Whether a gradient needs all log-probs, so that logits are made once more."""
        return self.ratio_level == "sequence" or self.off_policy_threshold is not None or self.top_entropy < 1

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
    "gspo": {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "behavior_level": "geometric"},
    "cispo": {"aggregate": "token_mean", "objective": "cispo", "clip_high": 4.0},
    "sapo": {"objective": "sapo"},
}


# Of the fields that have some; nobody can ask for them under torch.compile.
_CHOICES = {
    name: get_args(hint) if get_origin(hint) is Literal else () for name, hint in get_type_hints(LossConfig).items()
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


class LossInputs(NamedTuple):
    """All that a loss is told besides log-probs, checked, as both twins take it and the kernels get it whole.

    The tensors have the names of the public functions' arguments. Of the configuration a choice is its place among the
    field's, and a bound of None infinite; all are floats, as Triton would compile an int in. torch's operators cannot
    take a tuple like this: they get `tensors` and `numbers`, and put it together again.
    """

    targets: Tensor | None  # [num_targets]
    target_cu_seqlens: Tensor  # [num_completions + 1]
    rewards: Tensor | None  # [num_groups, group_size]
    sequence_ids: Tensor | None  # [num_completions]
    advantages: Tensor | None  # [num_completions]
    token_advantages: Tensor | None  # [num_targets], and so the next three
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    behavior_logprobs: Tensor | None
    denominator_tensor: Tensor | None  # 0-d; None: the number that follows
    denominator: float
    # LossConfig's, by their names.
    ratio_level: float
    objective: float  # 0 clip, 1 cispo, 2 sapo
    clip_low: float
    clip_high: float
    clip_max: float
    tau_pos: float
    tau_neg: float
    top_entropy: float
    kl_coef: float
    kl_estimator: float  # 0 k1, 1 k2, 2 k3
    kl_weight: float
    entropy_coef: float | None
    aggregate: float
    advantage_scale: float
    behavior_cap: float
    behavior_floor: float
    behavior_mode: float
    behavior_level: float  # 0 token, 1 sequence, 2 geometric
    off_policy_threshold: float
    scores_first: float
    per_token: float

    @classmethod
    def of(
        cls,
        like: Tensor,  # [num_targets], for shape, dtype and device
        config: LossConfig,
        target_cu_seqlens: Tensor,
        denominator: float | Tensor,
        per_token: bool = False,
        **tensors: Tensor | None,
    ) -> "LossInputs":
        """Of the arguments of a public function, `tensors` by name. Raises as `grpo_loss` says."""
        for key, needed in (("kl_coef", "ref_logprobs"), ("behavior_cap", "behavior_logprobs")):
            if getattr(config, key) and tensors[needed] is None:
                raise ValueError(f"{key} is {getattr(config, key)}, which needs {needed}; found None")
        _check_denominator(denominator, like)
        _check_offsets(target_cu_seqlens, like)
        _check_tensors(tensors, like)
        _check_advantages(tensors, len(target_cu_seqlens) - 1)
        by_tensor = isinstance(denominator, Tensor)
        given = {name: None if x is None else x.detach().contiguous() for name, x in tensors.items()}
        if (rewards := given["rewards"]) is not None:  # often bools, and masked lanes of an integer load hold no NaN
            given["rewards"] = rewards.to(accumulation_dtype(rewards.dtype))
        numbers = {}
        for name, choices in _CHOICES.items():
            value = getattr(config, name)
            numbers[name] = math.inf if value is None else float(choices.index(value) if choices else value)
        bounds = 1 + numbers["clip_high"], numbers["clip_max"]  # which of them is where, is by INTELLECT-2's formula
        numbers["clip_high"], numbers["clip_max"] = min(bounds) - 1, max(bounds)
        weighs_completions = config.behavior_cap is not None and config.behavior_level != "token"
        return cls(
            **given,
            target_cu_seqlens=target_cu_seqlens.contiguous(),
            # A float64 one would make the loss float64.
            denominator_tensor=denominator.detach().to(accumulation_dtype(like.dtype)) if by_tensor else None,
            denominator=1.0 if by_tensor else float(denominator),
            **numbers,
            # Without old log-probs a completion's weight is by those that are to be made.
            scores_first=float(config.scores_first or (weighs_completions and given["old_logprobs"] is None)),
            per_token=float(per_token),
        )

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self[:_NUM_TENSORS]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self[_NUM_TENSORS:]

    @property
    def divisor(self) -> float | Tensor:
        """The denominator, whichever it is."""
        return self.denominator if self.denominator_tensor is None else self.denominator_tensor

    def undivided(self) -> "LossInputs":
        """The same with a denominator of 1."""
        return self._replace(denominator_tensor=None, denominator=1.0)


_NUM_TENSORS = LossInputs._fields.index("denominator")


def _check_denominator(denominator: float | Tensor, like: Tensor) -> None:
    if isinstance(denominator, Tensor):
        if denominator.dim() or denominator.device != like.device:
            found = f"has shape {tuple(denominator.shape)} and is on {denominator.device}"
            raise ValueError(f"denominator {found}; wanted a number, or a 0-d tensor on {like.device}")
    elif not 0 < denominator < math.inf:
        raise ValueError(f"denominator is {denominator}; wanted a finite number above 0")


def _check_tensors(tensors: dict[str, Tensor | None], like: Tensor) -> None:
    """Of those whose check needs nothing else: ids are checked with their rewards, targets with their log-probs."""
    for name, x in tensors.items():
        if x is None or name in ("sequence_ids", "targets"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}; wanted a tensor")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}; wanted {like.device}")
        if name != "rewards" and not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; wanted a floating dtype")
        if (name.endswith("_logprobs") or name == "token_advantages") and x.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted {tuple(like.shape)}, one entry a target")


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


def _check_advantages(tensors: dict[str, Tensor | None], num_completions: int) -> None:
    sources = ("rewards", "advantages", "token_advantages")
    if len(given := [name for name in sources if tensors[name] is not None]) != 1:
        raise ValueError(f"{' and '.join(given) or 'none'} given; wanted one of {', '.join(sources)}")
    rewards, sequence_ids, advantages = (tensors[name] for name in ("rewards", "sequence_ids", "advantages"))
    if advantages is not None and advantages.shape != (num_completions,):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; wanted [{num_completions}], one a completion"
        )
    if rewards is None:
        if sequence_ids is not None:
            raise ValueError(f"sequence_ids says where rewards belong; leave it out with {given[0]}")
        return
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
