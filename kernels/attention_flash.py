"""Packed attention by flash-attn 2.8 instead of the kernels of attention.py: backend="flash_attn", extra `flash`.

A completion's keys are its prompt's and its own. Gathered one behind the other they make one packed
tensor of keys, and a causal call, which aligns queries and keys at their ends, gives the exact
result, with one softmax over both parts. It costs a copy of the prompt's keys and values for each
completion. The gather's backward pass adds the copies' gradients in the order of the pack, in fp32,
so it is deterministic as the rest.

The host waits once a plan, to learn how many keys there are and how long the longest sequences
are. Not done: CPU tensors, fp32, CUDA graphs. Source: Dao, arXiv 2307.08691.
"""

from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.kernels.attention_plan import Segments
from flashgrpo.kernels.common import accumulation_dtype, backward_once


class Keys(NamedTuple):
    """Where the queries of a batch find their keys."""

    rows: Tensor  # [num_keys] int64, of k and v; a prompt's are there once for itself and once for each completion
    order: Tensor  # [num_keys] int64, sorts `rows`
    counts: Tensor  # [total_tokens] int64, how often a row is in `rows`
    offsets_q: Tensor  # [num_sequences + 1] int32, and so the next
    offsets_k: Tensor
    longest_q: int
    longest_k: int


@torch.compiler.disable()  # the host waits
def gathered_keys(cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int) -> Keys:
    """The plan of a batch. The host waits for the number of keys, and for how long the longest sequences are."""
    segments = Segments.of(cu_seqlens, prefix, total_tokens)
    segments.check_order(cu_seqlens, prefix, total_tokens)
    own = segments.stop - segments.start
    shared = torch.where(segments.parent < 0, 0, own[segments.parent])
    # Rows in no segment are the last sequence, which has no keys: flash-attn writes zeros, and else nothing at all.
    num_keys = torch.where(segments.is_last, 0, shared + own)
    ends = num_keys.cumsum(0)
    total, longest_q, longest_k = torch.stack((ends[-1], own.max(), num_keys.max())).tolist()  # waits
    key = torch.arange(total, device=ends.device)
    segment = torch.searchsorted(ends, key, right=True)
    place = key - (ends - num_keys)[segment]
    own_place = place - shared[segment]
    prompt_row = segments.start[segments.parent[segment]] + place
    rows = torch.where(own_place < 0, prompt_row, segments.start[segment] + own_place)
    offsets_q, offsets_k = F.pad(own.cumsum(0), (1, 0)).int(), F.pad(ends, (1, 0)).int()
    counts = torch.bincount(rows, minlength=total_tokens)
    # flash-attn lays one query a sequence out in a way of its own, hence a maximum of 2 or more.
    longest = max(2, longest_q), max(2, longest_k)
    return Keys(rows, rows.argsort(stable=True), counts, offsets_q, offsets_k, *longest)


class _Gather(torch.autograd.Function):
    """Rows of x, as often as they are asked for; the backward pass adds them up in order, without atomics."""

    @staticmethod
    def forward(ctx, x, rows, order, counts):
        ctx.save_for_backward(order, counts)
        return x.index_select(0, rows)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        (d_gathered,) = grad_outputs
        order, counts = ctx.saved_tensors
        ordered = d_gathered.index_select(0, order).to(accumulation_dtype(d_gathered.dtype))
        d_x = torch.segment_reduce(ordered, "sum", lengths=counts, unsafe=True)
        return d_x.to(d_gathered.dtype), None, None, None


def check_flash(q: Tensor) -> None:
    """Raises ValueError for what flash-attn does not have."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q is {q.dtype}; wanted bfloat16 or float16, or another backend than 'flash_attn'")
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise ValueError(
            f"q has head_dim {q.shape[2]}; wanted a multiple of 8 up to 256, or another backend than 'flash_attn'"
        )


def flash_attention(q: Tensor, k: Tensor, v: Tensor, keys: Keys, scale: float) -> Tensor:  # as q
    """What `packed_attention` says, its arguments checked."""
    try:
        attend = import_module("flash_attn").flash_attn_varlen_func
    except ModuleNotFoundError as error:
        raise ImportError("backend 'flash_attn' needs flash-attn: pip install \"flash-attn>=2.8,<3\"") from error
    k, v = (_Gather.apply(x, keys.rows, keys.order, keys.counts) for x in (k, v))
    return attend(
        q, k, v, keys.offsets_q, keys.offsets_k, keys.longest_q, keys.longest_k,
        softmax_scale=scale, causal=True, deterministic=True,
    )  # fmt: skip
