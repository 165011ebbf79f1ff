"""Group advantages, clipped ratio, KL, gradient and metrics of GRPO and its relatives, from packed rewards.

For token i of completion c, with advantage A_i (A_c unless tokens have their own) and log-ratio
l_i = logprob_i - old_i (its mean over the completion at `ratio_level="sequence"`),
r_i = exp(min(l_i, 20)):

    policy_i = -b_i min(min(r_i, clip_max) A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i)
    policy_i = -b_i A_i min(r_i, 1 + clip_high) logprob_i    cispo, the ratio without gradient
    policy_i = -b_i A_i 4 / tau sigmoid(tau (r_i - 1))       sapo, tau_pos where A > 0 and tau_neg elsewhere
    kl_i     = k1, k2 or k3 of d_i = ref_i - logprob_i       -d, d^2 / 2, exp(d) - d - 1; times r_i by `kl_weight`
    loss     = sum_i w_i (policy_i + kl_coef kl_i - entropy_coef entropy_i) / denominator

w_i is 1 / tokens of c for `sequence_mean` and 1 otherwise. b_i is the detached weight p_old / p_behavior of the token,
or by `behavior_level` their product or geometric mean over the completion; within [behavior_floor, behavior_cap], or 0
beyond. A_i counts as 0 where the entropy is not among the `top_entropy` of all tokens of the call, and where it is
below 0 and the completion's mean of behavior_i - logprob_i (of old_i - logprob_i without the sampler's) above
`off_policy_threshold`.

The gradient by logprob_i is w_i (-b_i A_i r_i + kl_coef dkl_i) / denominator while a clipped r_i is within its bounds,
bounds included, also at sequence level: where the tokens of a completion share weight and advantage that is GSPO's,
and where they do not, GSPO-token's. r_i has no gradient where l_i > 20; d_i is bounded to [-100, 100], for k3 to
[-100, 20], and has none beyond.

All shapes are [num_targets] but rewards and offsets; a token costs at most 16 bytes read and 4 written. Nothing here
reads a device tensor on the host. Bounds on offsets are checked on the CPU only.

Sources: GRPO arXiv 2402.03300, R1 2501.12948, k3 joschu.net/blog/kl-approx.html, DAPO 2503.14476, Dr. GRPO 2503.20783,
GSPO and GSPO-token 2507.18071, CISPO 2506.13585, SAPO 2511.20347, dual clip 1912.09729 and INTELLECT-2's 2505.07291,
top_entropy 2506.01939, kl_weight and off_policy_threshold DeepSeek-V3.2 2512.02556 (equations 7 and 9), TIS and
weights of sequences fengyao.notion.site/off-policy-rl, IcePop 2510.18855; names and defaults also of TRL's GRPOConfig.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from flashgrpo.kernels import loss_torch, loss_triton
from flashgrpo.kernels.common import accumulation_dtype, backward_once, by_triton
from flashgrpo.kernels.kept import Kept, only_kept
from flashgrpo.kernels.logprob import check_logits, gather_logprobs
from flashgrpo.kernels.loss_config import METRICS, PER_TOKEN, LossConfig, LossInputs
from flashgrpo.kernels.loss_torch import group_advantages

__all__ = [
    "LossConfig", "denominator_of", "group_advantages", "grpo_loss", "logits_grpo_loss", "merge_stats", "pack_padded"
]  # fmt: skip

Stats = dict[str, Tensor]


def grpo_loss(
    logprobs: Tensor,  # [num_targets]
    target_cu_seqlens: Tensor,  # [num_completions + 1] int32 or int64
    config: LossConfig,
    *,
    denominator: float | Tensor,
    rewards: Tensor | None = None,  # [num_groups, group_size]
    sequence_ids: Tensor | None = None,  # [num_completions], entries of rewards.flatten()
    advantages: Tensor | None = None,  # [num_completions]
    token_advantages: Tensor | None = None,  # [num_targets]
    old_logprobs: Tensor | None = None,  # [num_targets]
    ref_logprobs: Tensor | None = None,  # [num_targets]
    behavior_logprobs: Tensor | None = None,  # [num_targets]
    per_token: bool = False,
) -> tuple[Tensor, Stats]:
    """The policy loss, a scalar that is differentiable once by `logprobs`, and its metrics.

    Advantages come from `rewards` (then `sequence_ids` says whose completion is whose, by default
    in order), or as they are: `advantages` of completions, or `token_advantages` (PPO's by GAE, rewards
    of steps, distillation). What has a NaN advantage takes no part in anything. Without `old_logprobs`
    the step is exactly on-policy: every ratio is 1, with the ratio's gradient.

    `denominator` is what the sum is divided by, see `denominator_of`. It is a number, or a 0-d
    tensor on the device, which torch.compile does not compile again for.

    Metrics are fp32 scalars on the device, means over the tokens that count: num_tokens,
    ratio_mean, ratio_max, clip_low_fraction, clip_high_fraction, live_fraction (gradient not 0), kl
    with a reference, and behavior_mismatch_mean and _max with behavior log-probs. `per_token` adds
    ratios, losses (w_i times what is summed, so that their sum over the denominator is the loss) and
    kls with a reference, [num_targets] each and 0 where a token does not count. `merge_stats`
    combines calls.

    Raises ValueError unless exactly one of rewards, advantages and token_advantages is given; for a
    coefficient whose log-probs are missing, entropy_coef and top_entropy (log-probs have no entropy), a
    denominator number that is not above 0, and shapes that do not fit; TypeError for wrong dtypes.
    """
    if config.entropy_coef:
        raise ValueError(f"entropy_coef is {config.entropy_coef}; use logits_grpo_loss or linear_grpo_loss, or 0")
    if config.top_entropy < 1:
        raise ValueError(f"top_entropy is {config.top_entropy}; use logits_grpo_loss or linear_grpo_loss, or 1")
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}; wanted [num_targets]")
    if not logprobs.is_floating_point():
        raise TypeError(f"logprobs is {logprobs.dtype}; wanted a floating dtype")
    inputs = LossInputs.of(
        logprobs, config, target_cu_seqlens, denominator, per_token, targets=None, rewards=rewards,
        sequence_ids=sequence_ids, advantages=advantages, token_advantages=token_advantages, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, behavior_logprobs=behavior_logprobs,
    )  # fmt: skip
    return _loss(logprobs, None, inputs)


def logits_grpo_loss(
    logits: Tensor,  # [num_targets, vocab], any stride over rows
    targets: Tensor,  # [num_targets] int32 or int64
    target_cu_seqlens: Tensor,  # [num_completions + 1] int32 or int64
    config: LossConfig,
    *,
    denominator: float | Tensor,
    rewards: Tensor | None = None,  # [num_groups, group_size]
    sequence_ids: Tensor | None = None,  # [num_completions], entries of rewards.flatten()
    advantages: Tensor | None = None,  # [num_completions]
    token_advantages: Tensor | None = None,  # [num_targets]
    old_logprobs: Tensor | None = None,  # [num_targets]
    ref_logprobs: Tensor | None = None,  # [num_targets]
    behavior_logprobs: Tensor | None = None,  # [num_targets]
    per_token: bool = False,
    temperature: float = 1.0,
    kept: Kept | None = None,  # ids [num_kept], offsets [num_targets + 1]
) -> tuple[Tensor, Stats]:
    """`grpo_loss` of the log-probs of `targets` under softmax(logits / temperature), with the entropy bonus.

    Targets of -100 do not count. The metrics also hold entropy, its mean, and per token logprobs
    and entropies. Logits that are another operation's result hold their gradient afterwards (where
    `config.scores_first`, in fp16 and on a CPU after the backward pass): whatever else needs them must
    come before this call. A leaf, or a view of one, keeps its values, and with `kept`, as in
    `gather_logprobs`, so do all. Raises what `grpo_loss` and `gather_logprobs` raise.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; wanted [num_targets, vocab], as rows of `pack_padded`"
        )
    check_logits(logits, targets, temperature, kept)
    if kept is not None:
        logits = only_kept(logits, targets, *kept)
    inputs = LossInputs.of(
        logits.new_empty(targets.shape), config, target_cu_seqlens, denominator, per_token, targets=targets,
        rewards=rewards, sequence_ids=sequence_ids, advantages=advantages, token_advantages=token_advantages,
        old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, behavior_logprobs=behavior_logprobs,
    )  # fmt: skip
    # A compiled function does not ask again whether its logits are a leaf.
    keep = torch.compiler.is_compiling() or logits.is_leaf or (logits._base is not None and logits._base.is_leaf)
    # Some losses need all log-probs before any gradient, and fp16 would flush a gradient over a denominator to 0 before
    # it is scaled up.
    if not by_triton(logits) or inputs.scores_first or logits.dtype == torch.float16:
        logprobs, entropies = gather_logprobs(logits, targets, temperature=temperature, inplace_backward=not keep)
        return _loss(logprobs, entropies, inputs)
    if logits.stride(1) != 1:
        logits, keep = logits.clone(memory_format=torch.contiguous_format), torch.compiler.is_compiling()
    in_place = not keep and logits.stride(0) >= logits.shape[1]  # rows that share memory have no place for gradients
    needed = torch.is_grad_enabled() and logits.requires_grad
    with torch.no_grad():
        d_logits = None
        if needed:
            d_logits = logits.detach() if in_place else logits.new_empty(logits.shape)
        loss, metrics, *of_tokens = _logits_loss_op(
            logits.detach(), d_logits, inputs.tensors, inputs.numbers, temperature
        )
    loss = WithGradients.apply(loss, logits, None, d_logits, None, None, in_place)
    return loss, named_stats(metrics, inputs, *of_tokens)


def denominator_of(
    config: LossConfig,
    completion_mask: Tensor,  # [num_completions, max_length] bool or integer, or [num_completions], their tokens
    *,
    max_length: int | None = None,
    micro_batches: float = 1,
    update_tokens: float | Tensor | None = None,
) -> float | Tensor:
    """What the losses divide by, by `config.aggregate`; 1 at least.

    | aggregate | denominator | TRL's loss_type |
    | --- | --- | --- |
    | sequence_mean | completions | grpo, sapo |
    | token_mean | tokens of these completions | bnpo |
    | token_mean | `update_tokens`: those of the whole update | dapo, cispo |
    | constant | completions * `max_length`, the longest allowed | dr_grpo; with a max_length of 1 luspo |

    Completions are those of the whole optimizer update, or an equal part of it: `micro_batches` says
    how many such parts there are, where their gradients are summed. Ranks whose gradients are summed
    are parts too; where they are averaged, as by DDP, they are not, and `update_tokens` is a rank's share.

    Raises ValueError for a `constant` without max_length, and for `update_tokens` where tokens do not count.
    """
    if config.aggregate == "token_mean":
        tokens = completion_mask.sum() * micro_batches if update_tokens is None else update_tokens
        return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1.0)
    if update_tokens is not None:
        raise ValueError(f"update_tokens is {update_tokens}, which aggregate {config.aggregate!r} has no use for")
    if config.aggregate == "constant":
        if max_length is None:
            raise ValueError("max_length is None; aggregate 'constant' needs the longest completion that is allowed")
        micro_batches *= max_length
    return max(completion_mask.shape[0] * micro_batches, 1.0)


def pack_padded(
    completion_mask: Tensor,  # [num_completions, max_length] bool or integer
) -> tuple[Tensor, Tensor]:  # [num_targets] int64, [num_completions + 1] int32
    """Rows of the flattened [num_completions, max_length] tensors that are tokens, and the offsets of each completion.

    `padded.flatten(0, 1)[rows]` brings a padded tensor of another trainer into target space.
    Raises ValueError unless the mask has two dimensions, TypeError for a floating mask.
    """
    if completion_mask.dim() != 2:
        raise ValueError(f"completion_mask has shape {tuple(completion_mask.shape)}; wanted [num_completions, length]")
    if completion_mask.is_floating_point() or completion_mask.is_complex():
        raise TypeError(f"completion_mask is {completion_mask.dtype}; wanted bool or an integer dtype")
    kept = completion_mask != 0
    rows = kept.flatten().nonzero().squeeze(1)
    return rows, torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()


def named_stats(
    metrics: Tensor,  # [len(METRICS)]
    inputs: LossInputs,
    per_token: Tensor,  # [len(PER_TOKEN), num_targets], or without rows
    logprobs: Tensor,  # [num_targets]
    entropies: Tensor | None,  # [num_targets]
) -> Stats:
    """What the inputs define of the metrics, and of what is told of each token."""
    absent = {"loss"}
    if inputs.ref_logprobs is None:
        absent |= {"kl", "kls"}
    if inputs.behavior_logprobs is None:
        absent |= {"behavior_mismatch_mean", "behavior_mismatch_max"}
    if entropies is None:
        absent.add("entropy")
    names, values = METRICS + PER_TOKEN[: len(per_token)], [*metrics, *per_token]
    stats = {name: value for name, value in zip(names, values, strict=True) if name not in absent}
    if entropies is not None:
        stats |= {"logprobs": logprobs.detach(), "entropies": entropies.detach()}
    return stats


def merge_stats(stats: Sequence[Stats]) -> Stats:
    """Metrics of several calls as of one: sums, means over all tokens, largest values, per-token ones end to end.

    Raises ValueError for calls that report different metrics.
    """
    if different := {key for call in stats for key in call.keys() ^ stats[0].keys()}:
        raise ValueError(
            f"calls differ in the metrics {', '.join(sorted(different))}; merge calls of one configuration"
        )
    num_tokens = torch.stack([call["num_tokens"] for call in stats])
    total = num_tokens.sum()
    merged: Stats = {}
    for key in stats[0]:
        values = [call[key] for call in stats]
        if values[0].dim():  # of tokens
            merged[key] = torch.cat(values)
        elif key == "num_tokens":
            merged[key] = total
        elif key.endswith("_max"):
            merged[key] = torch.stack(values).amax()
        else:
            merged[key] = (torch.stack(values) * num_tokens).sum() / total.clamp(min=1)
    return merged


class WithGradients(torch.autograd.Function):
    """The loss as a function of its inputs, whose gradients were made with it: the backward pass scales them by the
    upstream gradient, over `denominator` unless that is None.

    `in_place`: where they lie, by Triton, which leaves them as they are for a factor of exactly 1; so for the last
    time, as autograd refuses what has changed. Those of another dtype than their input's are scaled into that. The
    second is added to `main_grad` where that is given, and the second input gets none.
    """

    @staticmethod
    def forward(ctx, loss, first, second, d_first, d_second, denominator, in_place, main_grad=None):
        ctx.save_for_backward(d_first, d_second)
        ctx.denominator, ctx.in_place, ctx.main_grad = denominator, in_place, main_grad
        ctx.dtypes = first.dtype, None if second is None else second.dtype
        return loss.view_as(loss)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        scale = grad_outputs[0] if ctx.denominator is None else grad_outputs[0] / ctx.denominator
        gradients = list(ctx.saved_tensors)
        if ctx.main_grad is not None and gradients[1] is not None:
            torch.addcmul(ctx.main_grad, gradients[1], scale.reshape(1), out=ctx.main_grad)
            gradients[1] = None
        for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if gradient is not None and ctx.in_place and gradient.dtype == dtype:
                _scale_rows_op(gradient, scale)
            elif gradient is not None:
                gradients[i] = _scaled(gradient, scale, dtype)
        return None, *gradients, *[None] * 5


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in the wider of their dtypes, rounded once; no tensor of that dtype exists."""
    return torch.mul(gradient, scale.reshape(1), out=gradient.new_empty(gradient.shape, dtype=dtype))


def _loss(logprobs: Tensor, entropies: Tensor | None, inputs: LossInputs) -> tuple[Tensor, Stats]:
    with torch.no_grad():
        make = _logprobs_loss_op if by_triton(logprobs) else _logprobs_loss
        loss, metrics, per_token, d_logprobs, d_entropies = make(logprobs, entropies, inputs.tensors, inputs.numbers)
    stats = named_stats(metrics, inputs, per_token, logprobs, entropies)
    if not inputs.entropy_coef:
        entropies = d_entropies = None
    return WithGradients.apply(loss, logprobs, entropies, d_logprobs, d_entropies, None, False), stats


def implementation(x: Tensor) -> ModuleType:
    """The twin that makes the loss of what comes from x: both have `loss_of_logprobs`, `RowLoss` and `live_rows`."""
    return loss_triton if by_triton(x) else loss_torch


def or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or an empty tensor: an operator's results are tensors."""
    return like.new_empty(0) if x is None else x


def empty_sums(like: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """For an operator's fake: a loss, its metrics, and what is asked for of tokens; `like` is [num_targets, ...]."""
    wide = accumulation_dtype(like.dtype)
    per_token = like.new_empty(len(PER_TOKEN) if inputs.per_token else 0, like.shape[0], dtype=wide)
    return like.new_empty((), dtype=wide), like.new_empty(len(METRICS), dtype=torch.float32), per_token


def _logprobs_loss(
    logprobs: Tensor, entropies: Tensor | None, tensors: Sequence[Tensor | None], numbers: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, per_token, gradients by log-prob and by entropy)."""
    made = implementation(logprobs).loss_of_logprobs(logprobs, entropies, LossInputs._make((*tensors, *numbers)))
    return *made[:4], or_nothing(made.d_entropies, logprobs)


_logprobs_loss_op = torch.library.custom_op("flashgrpo::grpo_loss", _logprobs_loss, mutates_args=())


@_logprobs_loss_op.register_fake
def _(logprobs, entropies, tensors, numbers):
    d_logprobs = logprobs.new_empty(logprobs.shape, dtype=accumulation_dtype(logprobs.dtype))
    inputs = LossInputs._make((*tensors, *numbers))
    d_entropies = torch.empty_like(d_logprobs) if inputs.entropy_coef else logprobs.new_empty(0)
    return *empty_sums(logprobs, inputs), d_logprobs, d_entropies


@torch.library.custom_op("flashgrpo::logits_grpo_loss", mutates_args=("d_logits",))
def _logits_loss_op(
    logits: Tensor, d_logits: Tensor | None, tensors: Sequence[Tensor | None], numbers: Sequence[float],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics, per_token, logprobs, entropies), and the gradient in d_logits, which may be the logits."""
    inputs = LossInputs._make((*tensors, *numbers))
    rows = loss_triton.RowLoss(inputs, logits, temperature)
    rows.take(logits, 0, d_logits)
    return *rows.result(inputs), rows.logprobs, rows.entropies


@_logits_loss_op.register_fake
def _(logits, d_logits, tensors, numbers, temperature):
    logprobs = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return *empty_sums(logits, LossInputs._make((*tensors, *numbers))), logprobs, torch.empty_like(logprobs)


@torch.library.custom_op("flashgrpo::scale_rows", mutates_args=("x",))
def _scale_rows_op(x: Tensor, factor: Tensor) -> None:
    loss_triton.scale_rows(x, factor)
