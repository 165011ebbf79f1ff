"""The torch twin of logprob.py: rows of at most 8 MiB in fp32, which stay in a processor's cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import IGNORE_TARGET, accumulation_dtype, backward_once

# Below this log p is replaced: p is exactly 0 there (exp(-745) underflows in float64), and 0 * -inf would be NaN.
_LOG_ZERO = -1e4
_CHUNK_BYTES = 8 << 20


class RowLogprobs(NamedTuple):
    """A chunk of rows after the softmax. `gradients` overwrites log_p and p."""

    logprobs: Tensor  # [rows]
    entropy: Tensor  # [rows], or empty
    log_p: Tensor  # [rows, vocab], beside an entropy bounded from below
    p: Tensor | None  # [rows, vocab], beside an entropy

    def gradients(
        self,
        targets: Tensor,  # [rows]
        d_logprobs: Tensor,  # [rows]
        d_entropy: Tensor | None,  # [rows], of rows with an entropy
        temperature: float,
    ) -> Tensor:  # [rows, vocab]
        """Gradient by the logits, in the memory of the rows. Out-of-range targets give NaN, ignored ones exactly 0."""
        in_range = (targets >= 0) & (targets < self.log_p.shape[1])
        to_target = torch.where(in_range | (d_logprobs == 0), d_logprobs, torch.nan).unsqueeze(1) / temperature
        p = self.log_p.exp_() if self.p is None else self.p
        if d_entropy is None:
            d_logits = p.mul_(-to_target)
        else:
            slope = d_entropy.unsqueeze(1) / -temperature
            offset = torch.addcmul(-to_target, slope, self.entropy.unsqueeze(1))
            d_logits = self.log_p.mul_(slope).add_(offset).mul_(p)
        d_logits.scatter_add_(1, torch.where(in_range, targets, 0).long().unsqueeze(1), to_target)
        ignored = targets == IGNORE_TARGET
        if ignored.is_cuda:  # all rows are visited, so that nothing waits for the device
            return d_logits.masked_fill_(ignored.unsqueeze(1), 0)
        return d_logits.index_fill_(0, ignored.nonzero().squeeze(1), 0)


def row_logprobs(
    logits: Tensor,  # [rows, vocab]
    targets: Tensor,  # [rows]
    temperature: float,
    *,
    overwrite: bool = False,
    entropy: bool = True,
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
        logprobs = torch.where(in_range, chosen, torch.nan).masked_fill(ignored, 0)
        if not entropy:
            return RowLogprobs(logprobs, logprobs.new_empty(0), log_p, None)
        p = torch.exp(log_p, out=scaled if overwrite else None)
        log_p.clamp_(min=_LOG_ZERO)
        entropies = -torch.linalg.vecdot(p, log_p)
    return RowLogprobs(logprobs, entropies.masked_fill(ignored, 0), log_p, p)


class GatherLogprobs(torch.autograd.Function):
    """Of logits [outer, rows, vocab] and targets [outer, rows]."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, inplace_backward, entropy):
        ctx.save_for_backward(logits, targets)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        ctx.set_materialize_grads(False)
        logprobs = logits.new_empty(targets.shape, dtype=accumulation_dtype(logits.dtype))
        entropies = torch.empty_like(logprobs) if entropy else None
        for chunk in _row_chunks(logits):
            rows = row_logprobs(logits[chunk], targets[chunk], temperature, entropy=entropy)
            logprobs[chunk] = rows.logprobs
            if entropies is not None:
                entropies[chunk] = rows.entropy
        return logprobs, entropies

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_logprobs, d_entropy = grad_outputs
        if d_logprobs is None and d_entropy is None:
            return None, None, None, None, None
        logits, targets = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(d_entropy)
        d_logits = logits if ctx.inplace_backward else torch.empty_like(logits)
        for chunk in _row_chunks(logits):
            rows = row_logprobs(logits[chunk], targets[chunk], ctx.temperature, entropy=d_entropy is not None)
            d_entropy_rows = None if d_entropy is None else d_entropy[chunk]
            d_logits[chunk] = rows.gradients(targets[chunk], d_logprobs[chunk], d_entropy_rows, ctx.temperature)
        return d_logits, None, None, None, None


def _row_chunks(logits: Tensor) -> list[tuple[int, slice]]:
    outer, num_rows, vocab = logits.shape
    step = max(1, _CHUNK_BYTES // (4 * vocab))
    return [(i, slice(start, start + step)) for i in range(outer) for start in range(0, num_rows, step)]
