"""Log-probabilities, or the policy loss and its gradients, from hidden states; at most a chunk of logits at a time.

For n rows, hidden size H and vocabulary V, chunk by chunk:

    logits   = hidden_chunk @ weight^T          2 n V H FLOPs
    logprob, entropy, d_logits                  logprob.py and grpo_loss.py, made where the logits were
    d_hidden = d_logits @ weight                2 n V H
    d_weight += d_logits^T @ hidden_chunk       2 n V H, in fp32

`linear_grpo_loss` makes the gradients in its forward pass, so logits are computed once: 6 n V H FLOPs against 8 n V H
for what recomputes them. A sequence-level ratio needs all log-probs before any gradient, so it costs 8 n V H. Beyond
its inputs it holds d_hidden [n, H], d_weight [V, H] in fp32 and three chunks of logits, four where the temperature is
not 1. Every chunk reads the weight and reads and writes d_weight, traffic that its rows share: the default is as many
rows as have their fp32 logits in 8 MiB, a processor's cache, or in 512 MiB on CUDA, and at least 256 or 2,048, from
where the GEMMs are bound by arithmetic.

Both functions make log-probs with `_forward_chunk`, so with equal chunks they agree bit for bit. Not done here:
vocabulary-parallel heads, a bias, logit soft-capping. Sources: Wijmans et al., Cut Your Losses, arXiv 2411.09009;
Hsu et al., Liger Kernel, arXiv 2410.10989.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashgrpo.kernels.grpo_loss import check_denominator, prepare_inputs
from flashgrpo.kernels.logprob import (
    RowLogprobs,
    accumulation_dtype,
    backward_once,
    check_targets,
    check_temperature,
    row_gradients,
    row_logprobs,
)
from flashgrpo.kernels.loss_terms import (
    LossConfig,
    LossInputs,
    Stats,
    entropy_gradient,
    token_losses,
    token_stats,
    total_loss,
)

_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
_MIN_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
_COMPACT_BELOW = 0.9


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
    return _LinearLogprobs.apply(hidden, lm_head_weight, targets, head)


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
    always (True) or never (False).

    Loss, metrics and arguments are those of `logits_grpo_loss`, the rest as in `linear_logprobs`; raises what they
    raise.
    """
    check_denominator(denominator)
    head = _make_head(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype)
    like = hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))
    inputs = prepare_inputs(
        like, target_cu_seqlens, config, targets, rewards, sequence_ids, advantages,
        old_logprobs, ref_logprobs, behavior_logprobs,
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    gradients = _Gradients(
        d_hidden=torch.zeros_like(hidden) if grad and hidden.requires_grad else None,
        d_weight=_zeros_to_accumulate(lm_head_weight) if grad and lm_head_weight.requires_grad else None,
    )
    return _LinearGRPOLoss.apply(hidden, lm_head_weight, targets, head, inputs, config, denominator, compact, gradients)


@dataclass(frozen=True)
class _Head:
    """How the head is computed: the settings that all its chunks share."""

    temperature: float
    chunk_tokens: int
    logits_dtype: torch.dtype

    def chunks(self, num_rows: int) -> list[slice]:
        return [slice(start, start + self.chunk_tokens) for start in range(0, num_rows, self.chunk_tokens)]


@dataclass(frozen=True)
class _Gradients:
    """Gradients before the denominator, None where nobody needs them."""

    d_hidden: Tensor | None  # [n, hidden_size], hidden's dtype
    d_weight: Tensor | None  # [vocab, hidden_size], fp32 or float64

    @property
    def needed(self) -> bool:
        return self.d_hidden is not None or self.d_weight is not None

    def add(self, d_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        """Adds what the rows `rows` contribute, by their d_logits and hidden states."""
        if self.d_hidden is not None:
            self.d_hidden[rows] = d_logits.to(weight.dtype) @ weight
        if self.d_weight is not None:
            self.d_weight.addmm_(d_logits.T, hidden.to(d_logits.dtype))


def _zeros_to_accumulate(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))


def _make_head(
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    temperature: float,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
) -> _Head:
    """Checks the arguments that both functions have, and fills in the defaults. Raises as `linear_logprobs` says."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; wanted [n, hidden_size]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"lm_head_weight has shape {tuple(weight.shape)}; wanted [vocab, {hidden.shape[1]}]")
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and lm_head_weight {weight.dtype}; wanted one floating dtype")
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and lm_head_weight on {weight.device}; wanted one device")
    check_targets(targets, hidden.shape[0], hidden.device)
    check_temperature(temperature)
    logits_dtype = logits_dtype or hidden.dtype
    allowed = {hidden.dtype, accumulation_dtype(hidden.dtype)}
    if logits_dtype not in allowed:
        raise ValueError(f"logits_dtype is {logits_dtype}; wanted one of {', '.join(map(str, allowed))}")
    if chunk_tokens is None:
        on_cuda = "cuda" if hidden.is_cuda else "cpu"
        chunk_tokens = max(_MIN_CHUNK_TOKENS[on_cuda], _CHUNK_BYTES[on_cuda] // (4 * weight.shape[0]))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; wanted 1 or above")
    return _Head(temperature, chunk_tokens, logits_dtype)


def _forward_chunk(
    hidden: Tensor,  # [rows, hidden_size]
    weight: Tensor,  # [vocab, hidden_size], logits_dtype
    targets: Tensor,  # [rows]
    head: _Head,
) -> RowLogprobs:
    """The one forward: log-probs and entropies of a chunk of rows, with their softmax."""
    logits = hidden.to(weight.dtype) @ weight.T
    return row_logprobs(logits, targets, head.temperature)


def _forward_all(
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: _Head,
) -> tuple[Tensor, Tensor]:  # [n], [n]
    logprobs = hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))
    entropies = torch.empty_like(logprobs)
    logits_weight = weight.to(head.logits_dtype)
    for chunk in head.chunks(hidden.shape[0]):
        rows = _forward_chunk(hidden[chunk], logits_weight, targets[chunk], head)
        logprobs[chunk], entropies[chunk] = rows.logprobs, rows.entropy
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return _forward_all(hidden, weight, targets, head)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_logprobs, d_entropies = grad_outputs
        hidden, weight, targets = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = hidden.new_zeros(targets.shape, dtype=accumulation_dtype(hidden.dtype))
        need_d_hidden, need_d_weight, *_ = ctx.needs_input_grad
        gradients = _Gradients(
            d_hidden=torch.zeros_like(hidden) if need_d_hidden else None,
            d_weight=_zeros_to_accumulate(weight) if need_d_weight else None,
        )
        _accumulate_known(gradients, hidden, weight, targets, ctx.head, d_logprobs, d_entropies, compact=None)
        d_weight = None if gradients.d_weight is None else gradients.d_weight.to(weight.dtype)
        return gradients.d_hidden, d_weight, None, None


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head, inputs, config, denominator, compact, gradients):
        if gradients.needed and config.ratio_level == "token":
            logprobs, entropies = _forward_with_gradients(
                gradients, hidden, weight, targets, head, inputs, config, compact
            )
            terms = token_losses(logprobs, inputs, config)
        else:
            logprobs, entropies = _forward_all(hidden, weight, targets, head)
            terms = token_losses(logprobs, inputs, config)
            if gradients.needed:
                d_entropies = entropy_gradient(inputs, config)
                _accumulate_known(
                    gradients, hidden, weight, targets, head, terms.d_logprob, d_entropies, compact=compact
                )
        ctx.save_for_backward(gradients.d_hidden, gradients.d_weight)
        ctx.denominator, ctx.dtype = denominator, weight.dtype
        stats = token_stats(terms, logprobs, entropies, inputs, config)
        return total_loss(terms, entropies, inputs, config, denominator), stats

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.denominator
        if d_hidden is not None:
            d_hidden = (d_hidden.to(scale.dtype) * scale).to(ctx.dtype)
        if d_weight is not None:
            d_weight = (d_weight * scale).to(ctx.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None, None


def _forward_with_gradients(
    gradients: _Gradients,
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: _Head,
    inputs: LossInputs,
    config: LossConfig,
    compact: bool | None,
) -> tuple[Tensor, Tensor]:  # [n], [n]
    """One pass over the logits: a token's own log-prob is all that its gradient needs."""
    logprobs = torch.empty_like(inputs.weights)
    entropies = torch.empty_like(logprobs)
    d_entropies = entropy_gradient(inputs, config)
    logits_weight = weight.to(head.logits_dtype)
    for chunk in head.chunks(hidden.shape[0]):
        rows = _forward_chunk(hidden[chunk], logits_weight, targets[chunk], head)
        logprobs[chunk], entropies[chunk] = rows.logprobs, rows.entropy
        d_logprobs = token_losses(rows.logprobs, inputs.rows(chunk), config).d_logprob
        d_entropy = None if d_entropies is None else d_entropies[chunk]
        live = _live_rows(d_logprobs, d_entropy, compact)
        d_logits = row_gradients(rows, targets[chunk], d_logprobs, d_entropy, head.temperature)
        if live is None:
            gradients.add(d_logits, hidden[chunk], weight, chunk)
        else:
            live_rows = live + chunk.start
            gradients.add(d_logits[live], hidden[live_rows], weight, live_rows)
    return logprobs, entropies


def _accumulate_known(
    gradients: _Gradients,
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: _Head,
    d_logprobs: Tensor,  # [n]
    d_entropies: Tensor | None,  # [n]
    *,
    compact: bool | None,
) -> None:
    """The logits once more, when the gradients by log-prob and entropy are known; dead rows leave all three GEMMs."""
    live = _live_rows(d_logprobs, d_entropies, compact)
    num_rows = hidden.shape[0] if live is None else live.shape[0]
    logits_weight = weight.to(head.logits_dtype)
    for chunk in head.chunks(num_rows):
        chosen = chunk if live is None else live[chunk]
        rows = _forward_chunk(hidden[chosen], logits_weight, targets[chosen], head)
        d_entropy = None if d_entropies is None else d_entropies[chosen]
        d_logits = row_gradients(rows, targets[chosen], d_logprobs[chosen], d_entropy, head.temperature)
        gradients.add(d_logits, hidden[chosen], weight, chosen)


def _live_rows(d_logprobs: Tensor, d_entropies: Tensor | None, compact: bool | None) -> Tensor | None:
    """Indices of the rows whose gradient is not exactly 0, or None to use all rows. Waits for the device."""
    if compact is False:
        return None
    live = d_logprobs != 0 if d_entropies is None else (d_logprobs != 0) | (d_entropies != 0)
    rows = live.nonzero().squeeze(1)
    return rows if compact or rows.shape[0] < _COMPACT_BELOW * live.shape[0] else None
