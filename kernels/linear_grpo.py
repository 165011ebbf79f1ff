"""Log-probabilities, or the policy loss and its gradients, from hidden states; at most a chunk of logits at a time.

For n rows, hidden size H and vocabulary V, chunk by chunk:

    logits   = hidden_chunk @ weight^T          2 n V H FLOPs
    logprob, entropy, d_logits                  logprob.py and grpo_loss.py, made where the logits were
    d_hidden = d_logits @ weight                2 n V H
    d_weight += d_logits^T @ hidden_chunk       2 n V H, in fp32

`linear_grpo_loss` makes the gradients in its forward pass, so logits are computed once: 6 n V H FLOPs against 8 n V H
for what recomputes them. A sequence-level ratio needs all log-probs before any gradient, so it costs 8 n V H. Beyond
its inputs it holds d_hidden [n, H], d_weight [V, H] in fp32 and one chunk of logits, which the kernels turn into their
gradient in place (in torch three chunks, in fp32). Gradients pass through the logits' dtype before the denominator: in
fp16 an advantage times a ratio above 65,504 overflows.

Every chunk reads the weight and reads and writes d_weight, 10 V H bytes against 6 V H FLOPs a row: with r rows a chunk
that is 306 / r of the GEMMs' time on an H200 (4.3 TB/s, 790 TFLOP/s), so 5% at 6,144. So on CUDA r is 6,144 rows of
16-bit or 3,072 of fp32 logits, which also is what 5% of full fp32 logits hold for 64k targets; on a CPU it is as many
as have their fp32 logits in 2 MiB of cache, and at least 256.

Both functions make log-probs by the same GEMM and `logprob.row_logprob`, so with equal chunks they agree bit for bit,
and autocast changes neither.
Not done here: vocabulary-parallel heads, a bias, logit soft-capping. Sources: Wijmans et al., Cut Your Losses, arXiv
2411.09009; Hsu et al., Liger Kernel, arXiv 2410.10989.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype, backward_once, by_triton, check_index, check_temperature
from flashgrpo.kernels.linear_sweep import Gradients, Head, recompute, sweep, sweep_loss
from flashgrpo.kernels.loss_config import LossConfig, check_arguments
from flashgrpo.kernels.loss_torch import Stats, TokenLoss, prepare_inputs, token_losses, token_stats, total_loss
from flashgrpo.kernels.loss_triton import (
    ENTROPY_COEF,
    LossBuffers,
    empty_sums,
    kernel_arguments,
    launch_loss,
    launch_sums,
    named_metrics,
)
from flashgrpo.kernels.row_loss import RowLoss

_CPU_CACHE = 2 << 20  # bytes
_MIN_CPU_CHUNK = 256
_CUDA_CHUNK_BYTES = 12_288  # of one column of logits


def linear_logprobs(
    hidden: Tensor,  # [n, hidden_size]
    lm_head_weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n] int32 or int64
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Log-probabilities of `targets` and entropies of softmax(hidden @ lm_head_weight^T / temperature), in nats.

    Both are fp32 (float64 for float64) and differentiable once; the backward pass computes the logits again. Targets
    as in `gather_logprobs`. `logits_dtype` is hidden's dtype (None) or torch.float32, `chunk_tokens` the number of
    rows whose logits exist at once.

    Raises ValueError for shapes that do not fit together, a temperature that is not above 0, fewer than one token a
    chunk and another logits_dtype; TypeError for wrong dtypes.
    """
    head = _make_head(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype)
    return _linear_logprobs_op(hidden, lm_head_weight, targets.contiguous(), *head)


def linear_grpo_loss(
    hidden: Tensor,  # [num_targets, hidden_size]
    lm_head_weight: Tensor,  # [vocab, hidden_size]
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
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    compact: bool | None = None,
) -> tuple[Tensor, Stats]:
    """`logits_grpo_loss` of hidden @ lm_head_weight^T, with the gradients made in the forward pass.

    The gradients are made only for those of hidden and lm_head_weight that require them, and wait for the backward
    pass, which multiplies them by the upstream scalar over the denominator and cannot be differentiated again. Rows
    whose gradient is exactly 0 leave the gradient GEMMs where fewer than 90% of a chunk are live (`compact=None`),
    always (True) or never (False). To count them the host waits for the device once a chunk; under torch.compile None
    means never.

    Loss, metrics and arguments are those of `logits_grpo_loss`, the rest as in `linear_logprobs`; raises what they
    raise.
    """
    head = _make_head(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype)
    targets = targets.contiguous()
    like = hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))
    arguments = check_arguments(
        like, target_cu_seqlens, config, denominator, targets, rewards, sequence_ids, advantages,
        old_logprobs, ref_logprobs, behavior_logprobs,
    )  # fmt: skip
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, lm_head_weight)]
    if compact is None and torch.compiler.is_compiling():
        compact = False
    if not by_triton(hidden):
        inputs = prepare_inputs(like, arguments)
        return _LinearGRPOLoss.apply(hidden, lm_head_weight, targets, head, inputs, compact, needed)
    loss, metrics, logprobs, entropies, *_ = _linear_grpo_op(
        hidden, lm_head_weight, *kernel_arguments(arguments), config.ratio_level == "sequence", *head, compact, needed
    )
    return loss, named_metrics(metrics, entropies, arguments) | {"logprobs": logprobs, "entropies": entropies}


def default_chunk_tokens(vocab_size: int, itemsize: int, on_cuda: bool) -> int:
    """Rows whose logits, of `itemsize` bytes each, exist at once."""
    return _CUDA_CHUNK_BYTES // itemsize if on_cuda else max(_MIN_CPU_CHUNK, _CPU_CACHE // (4 * vocab_size))


def _make_head(
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    temperature: float,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
) -> Head:
    """Checks the arguments that both functions have, and fills in the defaults. Raises as `linear_logprobs` says."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; wanted [n, hidden_size]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"lm_head_weight has shape {tuple(weight.shape)}; wanted [vocab, {hidden.shape[1]}]")
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and lm_head_weight {weight.dtype}; wanted one floating dtype")
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and lm_head_weight on {weight.device}; wanted one device")
    check_index("targets", targets, hidden.device, hidden.shape[0])
    check_temperature(temperature)
    logits_dtype = logits_dtype or hidden.dtype
    allowed = {hidden.dtype, accumulation_dtype(hidden.dtype)}
    if logits_dtype not in allowed:
        raise ValueError(f"logits_dtype is {logits_dtype}; wanted one of {', '.join(map(str, allowed))}")
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(weight.shape[0], logits_dtype.itemsize, hidden.is_cuda)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; wanted 1 or above")
    return Head(temperature, chunk_tokens, logits_dtype)


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head, inputs, compact, needed):
        d_entropies, gradients = inputs.d_entropies, Gradients.zeros(hidden, weight, *needed)
        if gradients.needed and inputs.config.ratio_level == "token":
            parts: list[TokenLoss] = []

            def upstream(chunk, logprobs, _entropies):
                parts.append(token_losses(logprobs[chunk], inputs.rows(chunk)))
                return parts[-1].d_logprob, None if d_entropies is None else d_entropies[chunk]

            logprobs, entropies = sweep(hidden, weight, targets, head, gradients, upstream, compact=compact)
            joined = (None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))
            terms = TokenLoss._make(joined) if parts else token_losses(logprobs, inputs)
        else:
            logprobs, entropies = sweep(hidden, weight, targets, head)
            terms = token_losses(logprobs, inputs)
            if gradients.needed:
                recompute(gradients, hidden, weight, targets, head, terms.d_logprob, d_entropies, compact)
        ctx.save_for_backward(gradients.d_hidden, gradients.d_weight)
        ctx.denominator, ctx.dtype = inputs.denominator, weight.dtype
        return total_loss(terms, entropies, inputs), token_stats(terms, logprobs, entropies, inputs)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_hidden, d_weight = ctx.saved_tensors
        return *_scaled(d_hidden, d_weight, grad_outputs[0] / ctx.denominator, ctx.dtype), *[None] * 5


def _scaled(
    d_hidden: Tensor | None, d_weight: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients times the upstream gradient over the denominator, in the parameters' dtype."""
    if d_hidden is not None:
        d_hidden = (d_hidden.to(scale.dtype) * scale).to(dtype)
    return d_hidden, None if d_weight is None else (d_weight * scale).to(dtype)


@torch.library.custom_op("flashgrpo::linear_logprobs", mutates_args=())
def _linear_logprobs_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, logits_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return sweep(hidden, weight, targets, Head(temperature, chunk_tokens, logits_dtype))


@_linear_logprobs_op.register_fake
def _(hidden, weight, targets, *_head):
    return _per_target(hidden, targets), _per_target(hidden, targets)


@torch.library.custom_op("flashgrpo::linear_logprobs_bwd", mutates_args=())
def _linear_logprobs_bwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, d_logprobs: Tensor, d_entropies: Tensor | None,
    temperature: float, chunk_tokens: int, logits_dtype: torch.dtype, needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = Gradients.zeros(hidden, weight, *needed)
    head = Head(temperature, chunk_tokens, logits_dtype)
    compact = False if hidden.is_cuda else None  # to count live rows would wait for the device
    recompute(gradients, hidden, weight, targets, head, d_logprobs, d_entropies, compact)
    d_weight = None if gradients.d_weight is None else gradients.d_weight.to(weight.dtype)
    return _or_nothing(gradients.d_hidden, hidden), _or_nothing(d_weight, hidden)


@_linear_logprobs_bwd.register_fake
def _(hidden, weight, targets, d_logprobs, d_entropies, temperature, chunk_tokens, logits_dtype, needed):
    return tuple(
        torch.empty_like(x) if need else hidden.new_empty(0) for x, need in zip((hidden, weight), needed, strict=True)
    )


def _per_target(hidden: Tensor, targets: Tensor) -> Tensor:
    return hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.head = inputs[3:]
    ctx.set_materialize_grads(False)


@backward_once
def _linear_logprobs_backward(ctx, *grad_outputs):
    d_logprobs, d_entropies = grad_outputs
    hidden, weight, targets = ctx.saved_tensors
    if d_logprobs is None:
        d_logprobs = _per_target(hidden, targets).zero_()
    needed = list(ctx.needs_input_grad[:2])
    gradients = _linear_logprobs_bwd(hidden, weight, targets, d_logprobs, d_entropies, *ctx.head, needed)
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, None, None, None


_linear_logprobs_op.register_autograd(_linear_logprobs_backward, setup_context=_keep_inputs)


@torch.library.custom_op("flashgrpo::linear_grpo_loss", mutates_args=())
def _linear_grpo_op(
    hidden: Tensor, weight: Tensor, tensors: Sequence[Tensor | None], denominator: Tensor | None,
    numbers: Sequence[float], at_sequence_level: bool, temperature: float, chunk_tokens: int,
    logits_dtype: torch.dtype, compact: bool | None, needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics, logprobs, entropies, d_hidden, d_weight), the gradients before the denominator."""
    head, gradients = Head(temperature, chunk_tokens, logits_dtype), Gradients.zeros(hidden, weight, *needed)
    targets = tensors[0]
    assert targets is not None
    if at_sequence_level:
        logprobs, entropies = sweep(hidden, weight, targets, head)
        loss = LossBuffers.empty(logprobs, numbers[ENTROPY_COEF] != 0)
        launch_loss(logprobs, entropies, tensors, numbers, loss)
        if gradients.needed:
            recompute(gradients, hidden, weight, targets, head, loss.d_logprobs, loss.d_entropies, compact)
    else:
        loss = RowLoss(_per_target(hidden, targets), tensors, numbers, temperature)
        sweep_loss(loss, gradients, hidden, weight, head, compact)
        logprobs, entropies = loss.logprobs, loss.entropies
    d_hidden, d_weight = (_or_nothing(x, hidden) for x in (gradients.d_hidden, gradients.d_weight))
    return *launch_sums(loss.partials, denominator, numbers), logprobs, entropies, d_hidden, d_weight


@_linear_grpo_op.register_fake
def _(hidden, weight, tensors, denominator, numbers, at_sequence_level, temperature, chunk, dtype, compact, needed):
    d_hidden = torch.empty_like(hidden) if needed[0] else hidden.new_empty(0)
    d_weight = torch.empty_like(weight, dtype=torch.float32) if needed[1] else hidden.new_empty(0)
    return *empty_sums(hidden), _per_target(hidden, tensors[0]), _per_target(hidden, tensors[0]), d_hidden, d_weight


def _keep_gradients(ctx, inputs, output):
    hidden, _, _, denominator, numbers, *_, needed = inputs
    ctx.save_for_backward(*output[4:], denominator)
    ctx.number, ctx.needed, ctx.dtype = numbers[-1], needed, hidden.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@backward_once
def _linear_grpo_backward(ctx, *grad_outputs):
    *gradients, denominator = ctx.saved_tensors
    d_hidden, d_weight = (x if need else None for x, need in zip(gradients, ctx.needed, strict=True))
    scale = grad_outputs[0] / (ctx.number if denominator is None else denominator)
    return *_scaled(d_hidden, d_weight, scale, ctx.dtype), *[None] * 9


_linear_grpo_op.register_autograd(_linear_grpo_backward, setup_context=_keep_gradients)
