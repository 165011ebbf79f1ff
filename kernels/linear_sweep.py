"""The LM head chunk by chunk: log-probs of its rows, and what they add to the gradients; formulas in linear_grpo.py.

What runs here is the same for torch and Triton but for the rows' softmax, which is a `RowLogprobs` or a `TritonRows`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype, by_triton
from flashgrpo.kernels.logprob import TritonRows
from flashgrpo.kernels.logprob_torch import RowLogprobs, row_logprobs
from flashgrpo.kernels.row_loss import RowLoss, move_live_rows

_COMPACT_BELOW = 0.9
# (rows, log-probs and entropies so far) -> the loss's gradients by log-prob and by entropy of the rows
Upstream = Callable[[slice | Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class Head(NamedTuple):
    """How the head is computed: the settings that all its chunks share."""

    temperature: float
    chunk_tokens: int
    logits_dtype: torch.dtype


@dataclass(frozen=True)
class Gradients:
    """Gradients before the denominator, None where nobody needs them."""

    d_hidden: Tensor | None  # [n, hidden_size], hidden's dtype
    d_weight: Tensor | None  # [vocab, hidden_size], fp32 or float64

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, need_d_hidden: bool, need_d_weight: bool) -> "Gradients":
        return cls(
            d_hidden=torch.zeros_like(hidden) if need_d_hidden else None,
            d_weight=torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype)) if need_d_weight else None,
        )

    @property
    def needed(self) -> bool:
        return self.d_hidden is not None or self.d_weight is not None

    def add(self, d_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        """Adds what the rows `rows` contribute, by their d_logits and hidden states."""
        if d_logits.is_cuda:  # 16-bit products also of fp32 logits' gradients
            d_logits = d_logits.to(weight.dtype)
        if self.d_hidden is not None and isinstance(rows, slice):
            torch.mm(d_logits.to(weight.dtype), weight, out=self.d_hidden[rows])
        elif self.d_hidden is not None:
            self.d_hidden[rows] = d_logits.to(weight.dtype) @ weight
        if self.d_weight is None:
            return
        if d_logits.is_cuda and d_logits.dtype == hidden.dtype != self.d_weight.dtype:
            torch.addmm(self.d_weight, d_logits.T, hidden, out_dtype=self.d_weight.dtype, out=self.d_weight)
        else:
            self.d_weight.addmm_(d_logits.T.to(self.d_weight.dtype), hidden.to(self.d_weight.dtype))


def sweep(
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: Head,
    gradients: Gradients | None = None,
    upstream: Upstream | None = None,
    *,
    compact: bool | None = False,
    rows: Tensor | None = None,  # [num_rows], those to visit; None: all
) -> tuple[Tensor, Tensor]:  # [n], [n], uninitialised where not visited
    """Log-probs and entropies, chunk by chunk, and with `upstream` what each chunk adds to `gradients`.

    `compact` is for torch: Triton's token-level loss is `sweep_loss`.
    """
    logprobs = hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))
    entropies = torch.empty_like(logprobs)
    logits_weight = weight if by_triton(hidden) else weight.to(head.logits_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0] if rows is None else rows.shape[0], head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            chosen = chunk if rows is None else rows[chunk]
            inputs, wanted = hidden[chosen], targets[chosen]
            rows_softmax = _softmax(inputs, logits_weight, wanted, head, hidden.shape[0])
            logprobs[chosen], entropies[chosen] = rows_softmax.logprobs, rows_softmax.entropy
            if gradients is not None and upstream is not None:
                d_logprobs, d_entropies = upstream(chosen, logprobs, entropies)
                live = _live_rows(d_logprobs, d_entropies, compact)
                if live is not None and isinstance(rows_softmax, RowLogprobs):
                    chosen, rows_softmax = live + start, rows_softmax.select(live)
                    inputs, wanted, d_logprobs = inputs[live], wanted[live], d_logprobs[live]
                    d_entropies = None if d_entropies is None else d_entropies[live]
                d_logits = rows_softmax.gradients(wanted, d_logprobs, d_entropies, head.temperature)
                gradients.add(d_logits, inputs, weight, chosen)
                del d_logits
            del rows_softmax  # before the next chunk's is made
    return logprobs, entropies


def sweep_loss(
    loss: RowLoss,
    gradients: Gradients,
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    head: Head,
    compact: bool | None,
) -> None:
    """By Triton: the token-level loss of all rows, and what each chunk adds to `gradients`.

    To leave dead rows out of a chunk's gradient GEMMs the host waits for their number, once in 19 TFLOP at
    6,144 x 4,096 x 128k. To hide the wait behind the next chunk's logits would take a second chunk of memory.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], head.chunk_tokens):
            rows: slice | Tensor = slice(start, start + head.chunk_tokens)
            logits = _logits(hidden[rows], weight, head, hidden.shape[0])
            loss.take(logits, logits if gradients.needed else None, start, 1.0)
            if not gradients.needed:
                continue
            num_live = logits.shape[0] if compact is False else int(loss.live[rows].sum())
            if compact or num_live < _COMPACT_BELOW * logits.shape[0]:
                rows = start + move_live_rows(logits, loss.live[rows], num_live)
                logits = logits[:num_live]
            gradients.add(logits, hidden[rows], weight, rows)
            del logits  # before the next chunk's are made


def _softmax(
    hidden: Tensor,  # [rows, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [rows]
    head: Head,
    num_tokens: int,  # of all chunks
) -> RowLogprobs | TritonRows:
    if not by_triton(hidden):
        return row_logprobs(hidden.to(weight.dtype) @ weight.T, targets, head.temperature, overwrite=True)
    return TritonRows.of(_logits(hidden, weight, head, num_tokens), targets, head.temperature)


def _logits(hidden: Tensor, weight: Tensor, head: Head, num_tokens: int) -> Tensor:
    # The library chooses a product's order of summation by its shape, so the last of several chunks is as long as all.
    missing = head.chunk_tokens - hidden.shape[0] if num_tokens > head.chunk_tokens else 0
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, missing)) if missing else hidden
    if head.logits_dtype == weight.dtype:
        return (padded @ weight.T)[: hidden.shape[0]]
    if not weight.is_cuda:  # in the interpreter
        return (padded.to(head.logits_dtype) @ weight.to(head.logits_dtype).T)[: hidden.shape[0]]
    return torch.mm(padded, weight.T, out_dtype=head.logits_dtype)[: hidden.shape[0]]


def recompute(
    gradients: Gradients,
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: Head,
    d_logprobs: Tensor,  # [n]
    d_entropies: Tensor | None,  # [n]
    compact: bool | None,
) -> None:
    """The logits once more, when the gradients by log-prob and entropy are known; dead rows leave all three GEMMs."""

    def known(rows: slice | Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        return d_logprobs[rows], None if d_entropies is None else d_entropies[rows]

    live = _live_rows(d_logprobs, d_entropies, compact)
    sweep(hidden, weight, targets, head, gradients, known, rows=live)


def _live_rows(d_logprobs: Tensor, d_entropies: Tensor | None, compact: bool | None) -> Tensor | None:
    """Indices of the rows whose gradient is not exactly 0, or None to use all rows. Waits for the device."""
    if compact is False:
        return None
    live = d_logprobs != 0 if d_entropies is None else (d_logprobs != 0) | (d_entropies != 0)
    rows = live.nonzero().squeeze(1)
    return rows if compact or rows.shape[0] < _COMPACT_BELOW * live.shape[0] else None
