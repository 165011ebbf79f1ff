"""Log-probabilities of chosen tokens, and entropies, from logits that already exist.

With z = logits / temperature, p = softmax(z) and t = target:

    logprob   = z_t - log sum_j exp z_j
    entropy   = -sum_j p_j log p_j                                 p_j log p_j = 0 where z_j = -inf
    d_logit_j = (d_logprob (1[j = t] - p_j) - d_entropy p_j (log p_j + entropy)) / temperature

The forward pass reads n x vocab logits once, the backward pass reads and writes them once. The torch twin works on
rows of at most 8 MiB in fp32, which stay in a processor's cache, and allocates nothing else of the logits' size but
their gradient, and not even that with `inplace_backward`. Double backward raises.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

IGNORE_TARGET = -100
# Below this log p is replaced: p is exactly 0 there (exp(-745) underflows in float64), and 0 * -inf would be NaN.
_LOG_ZERO = -1e4
_CHUNK_BYTES = 8 << 20


def backward_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward pass that autograd cannot differentiate: raises RuntimeError under create_graph=True.

    torch's once_differentiable raises only if an upstream gradient has a graph, and else treats d_logits as constant.
    """

    @wraps(backward)
    def checked(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("operations of flashgrpo are differentiable once; leave create_graph out")
        return backward(ctx, *grad_outputs)

    return checked


class RowLogprobs(NamedTuple):
    """A chunk of rows after the softmax. `row_gradients` overwrites log_p and p."""

    logprobs: Tensor  # [rows]
    entropy: Tensor  # [rows]
    log_p: Tensor  # [rows, vocab], bounded from below
    p: Tensor  # [rows, vocab]

    def select(self, rows: Tensor) -> "RowLogprobs":
        return RowLogprobs(*(x.index_select(0, rows) for x in self))


def gather_logprobs(
    logits: Tensor,  # [n, vocab], any stride over rows
    targets: Tensor,  # [n] int32 or int64
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Log-probabilities of `targets` and entropies of softmax(logits / temperature), in nats.

    Both are fp32 (float64 for float64 logits) and differentiable once. A target of -100 is ignored: log-prob and
    entropy 0, no gradient. Any other target out of range gives a NaN log-prob. With `inplace_backward` the gradient
    is written over the logits, which autograd then refuses to use again.

    Raises ValueError for shapes that do not fit together and a temperature that is not above 0; TypeError for wrong
    dtypes.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; wanted [n, vocab]")
    if not logits.is_floating_point():
        raise TypeError(f"logits is {logits.dtype}; wanted a floating dtype")
    check_index("targets", targets, logits.device, logits.shape[0])
    check_temperature(temperature)
    return _GatherLogprobs.apply(logits, targets, temperature, inplace_backward)


def check_index(name: str, index: Tensor, device: torch.device, length: int | None = None) -> None:
    """Raises unless `index` is an int32 or int64 tensor [length] on `device`; None: of any length above 0."""
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {index.dtype}; wanted int32 or int64")
    if index.dim() != 1 or (not index.shape[0] if length is None else index.shape[0] != length):
        wanted = "one dimension, with an entry or more" if length is None else f"[{length}]"
        raise ValueError(f"{name} has shape {tuple(index.shape)}; wanted {wanted}")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}; wanted {device}")


def check_temperature(temperature: float) -> None:
    """Raises unless `temperature` is a finite number above 0."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; wanted a finite number above 0")


def by_triton(x: Tensor) -> bool:
    """Whether a Triton kernel works on `x`: on CUDA, and under TRITON_INTERPRET=1 on a CPU; never in float64."""
    return x.dtype != torch.float64 and (x.is_cuda or triton.knobs.runtime.interpret)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, fp32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def row_logprobs(
    logits: Tensor,  # [rows, vocab]
    targets: Tensor,  # [rows]
    temperature: float,
    *,
    overwrite: bool = False,
) -> RowLogprobs:
    """The softmax of a chunk of rows, in fp32 or float64 also under autocast; with `overwrite` p lies in the logits.

    The one place where log-probs are made from logits.
    """
    scaled = logits.to(accumulation_dtype(logits.dtype))
    overwrite |= scaled is not logits
    if temperature != 1.0:
        scaled = torch.div(scaled, temperature, out=scaled if overwrite else None)
        overwrite = True
    in_range = (targets >= 0) & (targets < logits.shape[1])
    ignored = targets == IGNORE_TARGET
    with torch.autocast(logits.device.type, enabled=False):
        log_p = torch.log_softmax(scaled, -1)
        chosen = log_p.gather(1, torch.where(in_range, targets, 0).long().unsqueeze(1)).squeeze(1)
        p = torch.exp(log_p, out=scaled if overwrite else None)
        log_p.clamp_(min=_LOG_ZERO)
        entropy = -torch.linalg.vecdot(p, log_p)
    logprobs = torch.where(in_range, chosen, torch.nan).masked_fill(ignored, 0)
    return RowLogprobs(logprobs, entropy.masked_fill(ignored, 0), log_p, p)


def row_gradients(
    rows: RowLogprobs,
    targets: Tensor,  # [rows]
    d_logprobs: Tensor,  # [rows]
    d_entropy: Tensor | None,  # [rows]
    temperature: float,
) -> Tensor:  # [rows, vocab]
    """Gradient by the logits, made in the memory of `rows`. Out-of-range targets give NaN, ignored ones exactly 0."""
    in_range = (targets >= 0) & (targets < rows.p.shape[1])
    to_target = torch.where(in_range, d_logprobs, torch.nan).unsqueeze(1) / temperature
    if d_entropy is None:
        d_logits = rows.p.mul_(-to_target)
    else:
        slope = d_entropy.unsqueeze(1) / -temperature
        offset = torch.addcmul(-to_target, slope, rows.entropy.unsqueeze(1))
        d_logits = rows.log_p.mul_(slope).add_(offset).mul_(rows.p)
    d_logits.scatter_add_(1, torch.where(in_range, targets, 0).long().unsqueeze(1), to_target)
    ignored = targets == IGNORE_TARGET
    if ignored.is_cuda:  # all rows are visited, so that nothing waits for the device
        return d_logits.masked_fill_(ignored.unsqueeze(1), 0)
    return d_logits.index_fill_(0, ignored.nonzero().squeeze(1), 0)


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, inplace_backward):
        ctx.save_for_backward(logits, targets)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        ctx.set_materialize_grads(False)
        logprobs = logits.new_empty(targets.shape, dtype=accumulation_dtype(logits.dtype))
        entropy = torch.empty_like(logprobs)
        for chunk in _row_chunks(logits):
            rows = row_logprobs(logits[chunk], targets[chunk], temperature)
            logprobs[chunk], entropy[chunk] = rows.logprobs, rows.entropy
        return logprobs, entropy

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_logprobs, d_entropy = grad_outputs
        if d_logprobs is None and d_entropy is None:
            return None, None, None, None
        logits, targets = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(d_entropy)
        d_logits = logits if ctx.inplace_backward else torch.empty_like(logits)
        for chunk in _row_chunks(logits):
            rows = row_logprobs(logits[chunk], targets[chunk], ctx.temperature)
            d_entropy_rows = None if d_entropy is None else d_entropy[chunk]
            d_logits[chunk] = row_gradients(rows, targets[chunk], d_logprobs[chunk], d_entropy_rows, ctx.temperature)
        return d_logits, None, None, None


def _row_chunks(logits: Tensor) -> list[slice]:
    num_rows, vocab = logits.shape
    step = max(1, _CHUNK_BYTES // (4 * vocab))
    return [slice(start, start + step) for start in range(0, num_rows, step)]
