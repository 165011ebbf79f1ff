"""Packed attention by flash-attn 2.8 instead of the kernels of attention.py: backend="flash_attn", extra `flash`.

One causal call takes every segment by itself. One that is not causal leads from all completions of a prompt, which
stand one after another, to the prompt. With out_a, lse_a of the first and out_b, lse_b of the second call

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

and the backward pass, which recomputes p_ij = exp(scale q_i . k_j - lse_i) and needs out only for d_out . out, is both
calls' on the merged out and lse; their gradients add up. out_a, out_b and each call's gradients are rounded to q's
dtype before they meet, so this is a little less accurate than one softmax over both parts. Deterministic.

The host waits twice for a new batch with prefixes, to learn how many prompts have completions and how long these are;
a batch's layers share the answer. Without `max_seqlen` the first call assumes segments of total_tokens, which is slow
and right. Not done: CPU tensors, fp32, CUDA graphs with prefixes. Sources: Dao, arXiv 2307.08691; Juravsky et al.,
Hydragen, arXiv 2402.05099.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.kernels.attention_tiles import Segments, cached
from flashgrpo.kernels.common import accumulation_dtype

# zero_tensors: rows of no segment get output and gradients of 0, where flash-attn writes nothing otherwise.
_OPTIONS: dict[str, Any] = {
    "dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
    "zero_tensors": True,
}  # fmt: skip


class _Sequences(NamedTuple):
    """What a call of flash-attn pairs: sequence i of queries with sequence i of keys, either of which may be empty."""

    cu_seqlens_q: Tensor  # [num_sequences + 1] int32
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def check_flash(q: Tensor) -> None:
    """Raises ValueError for what flash-attn does not have."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q is {q.dtype}; wanted bfloat16 or float16, or another backend than 'flash_attn'")
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise ValueError(
            f"q has head_dim {q.shape[2]}; wanted a multiple of 8 up to 256, or another backend than 'flash_attn'"
        )


def _flash_attn() -> Any:
    """The module with flash-attn's kernels."""
    try:
        return import_module("flash_attn.flash_attn_interface")
    except ModuleNotFoundError as error:
        raise ImportError("backend 'flash_attn' needs flash-attn: pip install \"flash-attn>=2.8,<3\"") from error


def _calls(cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int, max_seqlen: int | None) -> list[_Sequences]:
    """The causal call's sequences and, where completions have a prompt, the other call's.

    flash-attn takes at least one sequence, hence the empty one in front, and lays one query a sequence out in a way of
    its own, hence a maximum of 2 or more.
    """
    offsets = F.pad(cu_seqlens.int(), (1, 0))
    longest = max(2, total_tokens if max_seqlen is None else max_seqlen)
    calls = [_Sequences(offsets, offsets, longest, longest)]
    if prefix is None:
        return calls
    segments = Segments.of(cu_seqlens, prefix, total_tokens)
    end = segments.query_stop()
    families = (end > segments.stop).nonzero().squeeze(1)  # waits
    if not families.numel():
        return calls
    start, stop, end = (x[families] for x in (segments.start, segments.stop, end))
    # A family is three sequences: keys before its prompt and no queries; queries before its completions and no keys;
    # its completions with the prompt.
    offsets_q = torch.stack((F.pad(end[:-1], (1, 0)), stop, end), 1)
    offsets_k = torch.stack((start, start, stop), 1)
    offsets_q, offsets_k = (F.pad(x.flatten().int(), (1, 0)) for x in (offsets_q, offsets_k))
    longest_q, longest_k = torch.stack((offsets_q.diff().max(), offsets_k.diff().max())).tolist()  # waits
    return [*calls, _Sequences(offsets_q, offsets_k, max(2, longest_q), max(2, longest_k))]


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: Tensor | None, max_seqlen: int | None, scale: float
) -> tuple[Tensor, Tensor]:  # out as q; lse [num_heads, total_tokens] fp32, natural
    """What `attention._attention_fwd` says."""
    attend = _flash_attn()._flash_attn_varlen_forward
    own, *shared = cached(_calls, cu_seqlens, prefix, q.shape[0], max_seqlen)
    out, lse, *_ = attend(q, k, v, *own, softmax_scale=scale, causal=True, **_OPTIONS)
    for sequences in shared:
        other, other_lse, *_ = attend(q, k, v, *sequences, softmax_scale=scale, causal=False, **_OPTIONS)
        seen = other_lse.isfinite()  # it is inf where there are no keys, -inf in rows of no sequence
        weight = torch.where(seen, torch.sigmoid(other_lse - lse), 0.0).T.unsqueeze(2)
        dtype = accumulation_dtype(out.dtype)
        out = torch.lerp(out.to(dtype), other.to(dtype), weight).to(out.dtype)
        lse = torch.where(seen, torch.logaddexp(lse, other_lse), lse)
    return out, lse


def flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, prefix: Tensor | None, max_seqlen: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `attention._attention_bwd` says."""
    backward = _flash_attn()._flash_attn_varlen_backward
    totals: list[Tensor] = []
    for sequences in cached(_calls, cu_seqlens, prefix, q.shape[0], max_seqlen):
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        backward(
            d_out, q, k, v, out, lse, *gradients, *sequences, softmax_scale=scale, causal=not totals,
            deterministic=True, **_OPTIONS,
        )  # fmt: skip
        totals = [x.add_(y) for x, y in zip(totals, gradients, strict=True)] if totals else gradients
    d_q, d_k, d_v = totals
    return d_q, d_k, d_v
