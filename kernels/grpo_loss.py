"""Group advantages, clipped ratio, KL, gradient and metrics of GRPO and its relatives, from packed rewards.

For token i of completion c, with advantage A_c and log-ratio l_i = logprob_i - old_i (its mean over the completion
at `ratio_level="sequence"`), r_i = exp(min(l_i, 20)):

    policy_i = -b_i A_c bound(r_i)                  clip     bound: at most 1 + clip_high where A > 0,
                                                             at least 1 - clip_low, at most clip_max where A < 0
    policy_i = -b_i A_c min(r_i, 1 + clip_high) logprob_i    cispo, the ratio without gradient
    kl_i     = k1, k2 or k3 of d_i = ref_i - logprob_i       -d, d^2 / 2, exp(d) - d - 1
    loss     = sum_i w_i (policy_i + kl_coef kl_i - entropy_coef entropy_i) / denominator

w_i is 1 / tokens of c for `sequence_mean` and 1 otherwise; b_i is the detached weight p_old / p_behavior. The gradient
by logprob_i is w_i (-b_i A_c r_i + kl_coef dkl_i) / denominator while r_i is within its bounds, bounds included. At
sequence level it is the same expression, since the tokens of a completion share ratio, weight and advantage. d_i is
bounded to [-100, 100], for k3 to [-100, 20], and has no gradient beyond.

All shapes are [num_targets] but rewards and offsets; a token costs at most 16 bytes read and 4 written. Nothing here
reads a device tensor on the host. Bounds on offsets are checked on the CPU only.

Sources: GRPO arXiv 2402.03300, R1 2501.12948, k3 joschu.net/blog/kl-approx.html, DAPO 2503.14476, Dr. GRPO 2503.20783,
GSPO 2507.18071, CISPO 2506.13585, dual clip 1912.09729, TIS fengyao.notion.site/off-policy-rl, IcePop 2510.18855.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashgrpo.kernels.common import backward_once, by_triton
from flashgrpo.kernels.logprob import check_logits, gather_logprobs
from flashgrpo.kernels.loss_config import LossArguments, LossConfig, check_arguments
from flashgrpo.kernels.loss_torch import Stats, group_advantages, prepare_inputs, token_losses, token_stats, total_loss
from flashgrpo.kernels.loss_triton import (
    ENTROPY_COEF,
    LossBuffers,
    empty_sums,
    kernel_arguments,
    launch_loss,
    launch_sums,
    named_metrics,
)
from flashgrpo.kernels.row_loss import logits_loss, scale_rows

__all__ = ["LossConfig", "group_advantages", "grpo_loss", "logits_grpo_loss", "merge_stats", "pack_padded"]

_PER_TOKEN_STATS = ("logprobs", "entropies")


def grpo_loss(
    logprobs: Tensor,  # [num_targets]
    target_cu_seqlens: Tensor,  # [num_completions + 1] int32 or int64
    config: LossConfig,
    *,
    denominator: float | Tensor,
    rewards: Tensor | None = None,  # [num_groups, group_size]
    sequence_ids: Tensor | None = None,  # [num_completions], entries of rewards.flatten()
    advantages: Tensor | None = None,  # [num_completions]
    old_logprobs: Tensor | None = None,  # [num_targets]
    ref_logprobs: Tensor | None = None,  # [num_targets]
    behavior_logprobs: Tensor | None = None,  # [num_targets]
) -> tuple[Tensor, Stats]:
    """The policy loss, a scalar that is differentiable once by `logprobs`, and its metrics.

    Advantages come from `rewards` (then `sequence_ids` says whose completion is whose, by default in order) or as they
    are. A completion whose advantage is NaN takes no part in anything. Without `old_logprobs` the step is exactly
    on-policy: every ratio is 1, with the ratio's gradient.

    `denominator` is what the sum is divided by: of the whole optimizer update, over its micro-batches and ranks, the
    number of completions for `sequence_mean`, of their tokens for `token_mean`, and completions times the longest
    length allowed for `constant`. It is a number, or a 0-d tensor on the device, which torch.compile does not compile
    again for.

    Metrics are fp32 scalars on the device, means over the tokens that count: num_tokens, ratio_mean, ratio_max,
    clip_low_fraction, clip_high_fraction, live_fraction (gradient not 0), kl with a reference, and
    behavior_mismatch_mean and _max with behavior log-probs. `merge_stats` combines calls.

    Raises ValueError for both or neither of rewards and advantages, a coefficient whose log-probs are missing,
    entropy_coef (log-probs have no entropy), a denominator number that is not above 0, and shapes that do not fit
    together; TypeError for wrong dtypes.
    """
    if config.entropy_coef:
        raise ValueError(f"entropy_coef is {config.entropy_coef}; use logits_grpo_loss or linear_grpo_loss, or 0")
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}; wanted [num_targets]")
    if not logprobs.is_floating_point():
        raise TypeError(f"logprobs is {logprobs.dtype}; wanted a floating dtype")
    arguments = check_arguments(
        logprobs, target_cu_seqlens, config, denominator, None, rewards, sequence_ids, advantages,
        old_logprobs, ref_logprobs, behavior_logprobs,
    )  # fmt: skip
    return _loss(logprobs, None, arguments)


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
    old_logprobs: Tensor | None = None,  # [num_targets]
    ref_logprobs: Tensor | None = None,  # [num_targets]
    behavior_logprobs: Tensor | None = None,  # [num_targets]
    temperature: float = 1.0,
) -> tuple[Tensor, Stats]:
    """`grpo_loss` of the log-probs of `targets` under softmax(logits / temperature), with the entropy bonus.

    Targets of -100 do not count. The metrics also hold entropy, its mean, and per token logprobs and entropies. Logits
    that are another operation's result hold their gradient afterwards (at sequence level, in fp16 and on a CPU after
    the backward pass), and autograd refuses to use them again; a leaf, or a view of one, keeps its values. Read them
    before. Raises what `grpo_loss` and `gather_logprobs` raise.
    """
    check_logits(logits, targets, temperature)
    arguments = check_arguments(
        logits.new_empty(targets.shape), target_cu_seqlens, config, denominator, targets, rewards, sequence_ids,
        advantages, old_logprobs, ref_logprobs, behavior_logprobs,
    )  # fmt: skip
    spare = torch.compiler.is_compiling() or logits.is_leaf or (logits._base is not None and logits._base.is_leaf)
    # A sequence-level ratio needs all log-probs before any gradient, and fp16 would flush a gradient over a denominator
    # to 0 before it is scaled up.
    if not by_triton(logits) or config.ratio_level == "sequence" or logits.dtype == torch.float16:
        logprobs, entropies = gather_logprobs(logits, targets, temperature=temperature, inplace_backward=not spare)
        return _loss(logprobs, entropies, arguments)
    if logits.stride(1) != 1:
        logits, spare = logits.contiguous(), torch.compiler.is_compiling()
    spare |= logits.stride(0) < logits.shape[1]
    needed = torch.is_grad_enabled() and logits.requires_grad
    loss, metrics, logprobs, entropies = _LogitsLoss.apply(
        logits, needed, not spare, *kernel_arguments(arguments), temperature
    )
    return loss, named_metrics(metrics, entropies, arguments) | {"logprobs": logprobs, "entropies": entropies}


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


def merge_stats(stats: Sequence[Stats]) -> Stats:
    """Metrics of several calls as of one: sums, means over all tokens, largest values, per-token ones end to end.

    Raises ValueError for no calls, and for calls that report different metrics.
    """
    if not stats:
        raise ValueError("merge_stats needs the metrics of at least one call; found none")
    if different := {key for call in stats for key in call.keys() ^ stats[0].keys()}:
        raise ValueError(
            f"calls differ in the metrics {', '.join(sorted(different))}; merge calls of one configuration"
        )
    num_tokens = torch.stack([call["num_tokens"] for call in stats])
    total = num_tokens.sum()
    merged: Stats = {}
    for key in stats[0]:
        values = [call[key] for call in stats]
        if key in _PER_TOKEN_STATS:
            merged[key] = torch.cat(values)
        elif key == "num_tokens":
            merged[key] = total
        elif key.endswith("_max"):
            merged[key] = torch.stack(values).amax()
        else:
            merged[key] = (torch.stack(values) * num_tokens).sum() / total.clamp(min=1)
    return merged


def _loss(logprobs: Tensor, entropies: Tensor | None, arguments: LossArguments) -> tuple[Tensor, Stats]:
    if not by_triton(logprobs):
        return _GRPOLoss.apply(logprobs, entropies, prepare_inputs(logprobs, arguments))
    loss, metrics, *_ = _triton_loss(logprobs, entropies, *kernel_arguments(arguments))
    stats = named_metrics(metrics, entropies, arguments)
    if entropies is not None:
        stats |= {"logprobs": logprobs.detach(), "entropies": entropies.detach()}
    return loss, stats


@torch.library.custom_op("flashgrpo::grpo_loss", mutates_args=())
def _triton_loss(
    logprobs: Tensor, entropies: Tensor | None, tensors: Sequence[Tensor | None], denominator: Tensor | None,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics, gradients by log-prob and by entropy), the gradients before the denominator."""
    buffers = LossBuffers.empty(logprobs, numbers[ENTROPY_COEF] != 0)
    launch_loss(logprobs.contiguous(), entropies, tensors, numbers, buffers)
    return (
        *launch_sums(buffers.partials, denominator, numbers),
        buffers.d_logprobs,
        _or_nothing(buffers.d_entropies, logprobs),
    )


@_triton_loss.register_fake
def _(logprobs, entropies, tensors, denominator, numbers):
    buffers = LossBuffers.empty(logprobs, numbers[ENTROPY_COEF] != 0)
    return *empty_sums(logprobs), buffers.d_logprobs, _or_nothing(buffers.d_entropies, logprobs)


def _or_nothing(d_entropies: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if d_entropies is None else d_entropies


def _keep_gradients(ctx, inputs, output):
    logprobs, _, _, denominator, numbers = inputs
    ctx.save_for_backward(*output[2:], denominator)
    ctx.dtype, ctx.number, ctx.has_bonus = logprobs.dtype, numbers[-1], numbers[ENTROPY_COEF] != 0
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@backward_once
def _scale_gradients(ctx, *grad_outputs):
    d_logprobs, d_entropies, denominator = ctx.saved_tensors
    scale = grad_outputs[0] / (ctx.number if denominator is None else denominator)
    return (d_logprobs * scale).to(ctx.dtype), d_entropies * scale if ctx.has_bonus else None, None, None, None


_triton_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


class _LogitsLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, in place of the logits if `in_place`."""

    @staticmethod
    def forward(ctx, logits, needed, in_place, tensors, denominator, numbers, temperature):
        d_logits = None
        if needed:
            d_logits = logits if in_place else logits.new_empty(logits.shape)
        outputs = logits_loss(logits, d_logits, tensors, denominator, numbers, temperature)
        ctx.save_for_backward(d_logits)
        ctx.in_place = in_place
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        (d_logits,) = ctx.saved_tensors
        if ctx.in_place:  # and so for the last time: autograd refuses what has changed
            scale_rows(d_logits, grad_outputs[0])
        else:
            d_logits = d_logits * grad_outputs[0]
        return d_logits, *[None] * 6


class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropies, inputs):
        terms = token_losses(logprobs, inputs)
        ctx.save_for_backward(terms.d_logprob, inputs.d_entropies)
        ctx.denominator, ctx.dtype = inputs.denominator, logprobs.dtype
        return total_loss(terms, entropies, inputs), token_stats(terms, logprobs, entropies, inputs)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_logprob, d_entropy = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.denominator
        d_entropy = None if d_entropy is None else d_entropy * scale
        return (d_logprob * scale).to(ctx.dtype), d_entropy, None
