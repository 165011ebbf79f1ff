"""Log-probabilities, or the policy loss and its gradients, from hidden states; at most a chunk of logits at a time.

For n rows, hidden size H and vocabulary V, chunk by chunk:

    logits   = hidden_chunk @ weight^T          2 n V H FLOPs
    logprob, entropy, d_logits                  logprob.py and grpo_loss.py, made where the logits were
    d_hidden = d_logits @ weight                2 n V H
    d_weight += d_logits^T @ hidden_chunk       2 n V H, in fp32

`linear_grpo_loss` makes the gradients in its forward pass, so logits are computed once: 6 n V H FLOPs against 8 n V H
for what recomputes them. A sequence-level ratio needs all log-probs before any gradient, so it costs 8 n V H. Beyond
its inputs it holds d_hidden [n, H], d_weight [V, H] in fp32 and three chunks of logits in fp32. Every chunk reads the
weight and reads and writes d_weight, traffic that its rows share: the default is as many rows as have their fp32 logits
in 2 MiB, a processor's cache, or in 512 MiB on CUDA, and at least 256 or 2,048, from where the GEMMs are bound by
arithmetic.

Both functions make log-probs in `_sweep`, so with equal chunks they agree bit for bit, and autocast changes neither.
Not done here: vocabulary-parallel heads, a bias, logit soft-capping. Sources: Wijmans et al., Cut Your Losses, arXiv
2411.09009; Hsu et al., Liger Kernel, arXiv 2410.10989.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashgrpo.kernels.logprob import (
    accumulation_dtype,
    backward_once,
    check_index,
    check_temperature,
    row_gradients,
    row_logprobs,
)
from flashgrpo.kernels.loss_config import LossConfig, check_arguments
from flashgrpo.kernels.loss_torch import Stats, TokenLoss, prepare_inputs, token_losses, token_stats, total_loss

_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 512 << 20}
_MIN_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
_COMPACT_BELOW = 0.9
# (rows, their log-probs) -> the loss's gradients by log-prob and by entropy
Upstream = Callable[[slice | Tensor, Tensor], tuple[Tensor, Tensor | None]]


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
    always (True) or never (False). On CUDA, where counting them waits for the device, None means never.

    Loss, metrics and arguments are those of `logits_grpo_loss`, the rest as in `linear_logprobs`; raises what they
    raise.
    """
    head = _make_head(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype)
    like = hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))
    arguments = check_arguments(
        like, target_cu_seqlens, config, denominator, targets, rewards, sequence_ids, advantages,
        old_logprobs, ref_logprobs, behavior_logprobs,
    )  # fmt: skip
    inputs = prepare_inputs(like, arguments)
    grad = torch.is_grad_enabled()
    gradients = _Gradients.zeros(
        hidden, lm_head_weight, grad and hidden.requires_grad, grad and lm_head_weight.requires_grad
    )
    return _LinearGRPOLoss.apply(hidden, lm_head_weight, targets, head, inputs, compact, gradients)


@dataclass(frozen=True)
class _Head:
    """How the head is computed: the settings that all its chunks share."""

    temperature: float
    chunk_tokens: int
    logits_dtype: torch.dtype


@dataclass(frozen=True)
class _Gradients:
    """Gradients before the denominator, None where nobody needs them."""

    d_hidden: Tensor | None  # [n, hidden_size], hidden's dtype
    d_weight: Tensor | None  # [vocab, hidden_size], fp32 or float64

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, need_d_hidden: bool, need_d_weight: bool) -> "_Gradients":
        return cls(
            d_hidden=torch.zeros_like(hidden) if need_d_hidden else None,
            d_weight=torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype)) if need_d_weight else None,
        )

    @property
    def needed(self) -> bool:
        return self.d_hidden is not None or self.d_weight is not None

    def add(self, d_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        """Adds what the rows `rows` contribute, by their d_logits and hidden states."""
        if self.d_hidden is not None and isinstance(rows, slice):
            torch.mm(d_logits.to(weight.dtype), weight, out=self.d_hidden[rows])
        elif self.d_hidden is not None:
            self.d_hidden[rows] = d_logits.to(weight.dtype) @ weight
        if self.d_weight is not None:
            self.d_weight.addmm_(d_logits.T, hidden.to(d_logits.dtype))


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
    check_index("targets", targets, hidden.device, hidden.shape[0])
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


def _sweep(
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: _Head,
    gradients: _Gradients | None = None,
    upstream: Upstream | None = None,
    *,
    compact: bool | None = False,
    rows: Tensor | None = None,  # [num_rows], those to visit; None: all
) -> tuple[Tensor, Tensor]:  # [n], [n], uninitialised where not visited
    """Log-probs and entropies, chunk by chunk, and with `upstream` what each chunk adds to `gradients`."""
    logprobs = hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))
    entropies = torch.empty_like(logprobs)
    logits_weight = weight.to(head.logits_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0] if rows is None else rows.shape[0], head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            chosen = chunk if rows is None else rows[chunk]
            inputs, wanted = hidden[chosen], targets[chosen]
            softmax = row_logprobs(
                inputs.to(head.logits_dtype) @ logits_weight.T, wanted, head.temperature, overwrite=True
            )
            logprobs[chosen], entropies[chosen] = softmax.logprobs, softmax.entropy
            if gradients is not None and upstream is not None:
                d_logprobs, d_entropies = upstream(chosen, softmax.logprobs)
                live = _live_rows(d_logprobs, d_entropies, compact)
                if live is not None:
                    chosen, softmax = live + start, softmax.select(live)
                    inputs, wanted, d_logprobs = inputs[live], wanted[live], d_logprobs[live]
                    d_entropies = None if d_entropies is None else d_entropies[live]
                d_logits = row_gradients(softmax, wanted, d_logprobs, d_entropies, head.temperature)
                gradients.add(d_logits, inputs, weight, chosen)
                del d_logits
            del softmax  # before the next chunk's is made
    return logprobs, entropies


def _recompute(
    gradients: _Gradients,
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: _Head,
    d_logprobs: Tensor,  # [n]
    d_entropies: Tensor | None,  # [n]
    compact: bool | None,
) -> None:
    """The logits once more, when the gradients by log-prob and entropy are known; dead rows leave all three GEMMs."""

    def known(rows: slice | Tensor, _: Tensor) -> tuple[Tensor, Tensor | None]:
        return d_logprobs[rows], None if d_entropies is None else d_entropies[rows]

    live = _live_rows(d_logprobs, d_entropies, compact)
    _sweep(hidden, weight, targets, head, gradients, known, rows=live)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return _sweep(hidden, weight, targets, head)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_logprobs, d_entropies = grad_outputs
        hidden, weight, targets = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = hidden.new_zeros(targets.shape, dtype=accumulation_dtype(hidden.dtype))
        gradients = _Gradients.zeros(hidden, weight, *ctx.needs_input_grad[:2])
        _recompute(gradients, hidden, weight, targets, ctx.head, d_logprobs, d_entropies, None)
        d_weight = None if gradients.d_weight is None else gradients.d_weight.to(weight.dtype)
        return gradients.d_hidden, d_weight, None, None


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head, inputs, compact, gradients):
        d_entropies = inputs.d_entropies
        if gradients.needed and inputs.config.ratio_level == "token":
            parts: list[TokenLoss] = []

            def upstream(chunk, logprobs):
                parts.append(token_losses(logprobs, inputs.rows(chunk)))
                return parts[-1].d_logprob, None if d_entropies is None else d_entropies[chunk]

            logprobs, entropies = _sweep(hidden, weight, targets, head, gradients, upstream, compact=compact)
            joined = (None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))
            terms = TokenLoss._make(joined) if parts else token_losses(logprobs, inputs)
        else:
            logprobs, entropies = _sweep(hidden, weight, targets, head)
            terms = token_losses(logprobs, inputs)
            if gradients.needed:
                _recompute(gradients, hidden, weight, targets, head, terms.d_logprob, d_entropies, compact)
        ctx.save_for_backward(gradients.d_hidden, gradients.d_weight)
        ctx.denominator, ctx.dtype = inputs.denominator, weight.dtype
        return total_loss(terms, entropies, inputs), token_stats(terms, logprobs, entropies, inputs)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.denominator
        if d_hidden is not None:
            d_hidden = (d_hidden.to(scale.dtype) * scale).to(ctx.dtype)
        if d_weight is not None:
            d_weight = (d_weight * scale).to(ctx.dtype)
        return d_hidden, d_weight, None, None, None, None, None


def _live_rows(d_logprobs: Tensor, d_entropies: Tensor | None, compact: bool | None) -> Tensor | None:
    """Indices of the rows whose gradient is not exactly 0, or None to use all rows. Waits for the device."""
    if compact is False or (compact is None and d_logprobs.is_cuda):
        return None
    live = d_logprobs != 0 if d_entropies is None else (d_logprobs != 0) | (d_entropies != 0)
    rows = live.nonzero().squeeze(1)
    return rows if compact or rows.shape[0] < _COMPACT_BELOW * live.shape[0] else None
