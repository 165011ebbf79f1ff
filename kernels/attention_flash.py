"""Packed attention by flash-attn 4, 3 or 2, or torch's own, instead of the kernels of attention.py: "flash_attn".

A completion's keys are its prompt's and its own. Gathered one behind the other they make one packed
tensor of keys, and a causal call, which aligns queries and keys at their ends, gives the exact
result, with one softmax over both parts. It costs a copy of the prompt's keys and values for each
completion. The gather's backward pass adds the copies' gradients in the order of the pack, in fp32,
so it is deterministic as the rest; torch's backward pass is so only under
torch.use_deterministic_algorithms(True), as it has no flag.

`flash_family` says which of them a chip takes: the newest that is installed and has a deterministic
backward pass for chip and head_dim. The host waits once a plan, to learn how many keys there are
and how long the longest sequences are. Not done: CPU tensors, fp32, CUDA graphs.

Sources: Dao, FlashAttention-2, arXiv 2307.08691; Shah et al., FlashAttention-3, arXiv 2407.08608;
signatures and limits by https://github.com/Dao-AILab/flash-attention (flash_attn/flash_attn_interface.py,
hopper/flash_attn_interface.py, hopper/flash_api.cpp, flash_attn/cute/interface.py and its tests), and
https://docs.pytorch.org/docs/stable/nn.attention.varlen.html.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.kernels.attention_plan import Segments
from flashgrpo.kernels.common import accumulation_dtype, backward_once

logger = logging.getLogger(__name__)
_EVERY_CHIP = dict.fromkeys((8, 9, 10, 11, 12), 256)
# The newest first: module, function, an argument that tells it from older ones, and by major compute capability the
# largest head_dim with a deterministic backward pass.
_FAMILIES = {
    "flash-attn 4": ("flash_attn.cute", "flash_attn_varlen_func", "deterministic", {9: 192, 10: 128, 11: 128}),
    "flash-attn 3": ("flash_attn_interface", "flash_attn_varlen_func", "deterministic", {9: 192}),
    "flash-attn 2": ("flash_attn", "flash_attn_varlen_func", "deterministic", _EVERY_CHIP),
    "torch's varlen_attn": ("torch.nn.attention.varlen", "varlen_attn", "enable_gqa", _EVERY_CHIP),
}
_INSTALL = 'pip install "flash-attn>=2.8,<3", flash-attn-4 for a Hopper or Blackwell of a data center, or torch 2.13'


@cache
def flash_family(head_dim: int, capability: tuple[int, int]) -> tuple[str, Callable[..., Any]]:
    """Name and function of what backend "flash_attn" calls on a chip of this compute capability. Logs it once.

    Raises ImportError, which says what was found, where none is installed that has both.
    """
    found = []
    for name, (module, function, argument, chips) in _FAMILIES.items():
        if head_dim > chips.get(capability[0], 0):
            found.append(f"{name} does not have it")
            continue
        try:
            attend = getattr(import_module(module), function)
        except (ImportError, OSError, AttributeError) as error:  # also one that was built for another torch
            found.append(f"{name}: {error}")
            continue
        if argument not in signature(attend).parameters:
            found.append(f"{name} lacks {argument}: too old")
            continue
        logger.info("backend 'flash_attn' is %s for head_dim %d on sm_%d%d", name, head_dim, *capability)
        return name, attend
    raise ImportError(
        f"backend 'flash_attn' found nothing for head_dim {head_dim} on sm_{capability[0]}{capability[1]} "
        f"({'; '.join(found)}): {_INSTALL}, or another backend"
    )


def _capability(device: torch.device) -> tuple[int, int]:
    """ROCm's chips have flash-attn 2 and torch's, as sm_80. Raises ValueError for a CPU."""
    if device.type != "cuda":
        raise ValueError(f"q is on {device}; wanted a GPU, or another backend than 'flash_attn'")
    return (8, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


class Keys(NamedTuple):
    """Where the queries of a batch find their keys."""

    rows: Tensor  # [num_keys] int64, of k and v; a prompt's are there once for itself and once for each completion
    order: Tensor  # [num_keys] int64, sorts `rows`
    counts: Tensor  # [total_tokens] int64, how often a row is in `rows`
    offsets_q: Tensor  # [num_sequences + 1] int32, and so the next
    offsets_k: Tensor
    longest_q: int
    longest_k: int
    num_queries: int  # rows of q in a segment
    family: tuple[str, Callable[..., Any]]  # by `flash_family`


@torch.compiler.disable()  # the host waits
def gathered_keys(cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int, head_dim: int) -> Keys:
    """The plan of a batch. The host waits for the number of keys, and for how long the longest sequences are."""
    family = flash_family(head_dim, _capability(cu_seqlens.device))
    segments = Segments.of(cu_seqlens, prefix, total_tokens)
    own = segments.stop - segments.start
    own[-1] = 0
    shared = torch.where(segments.parent < 0, 0, own[segments.parent])
    num_keys = shared + own
    ends = num_keys.cumsum(0)
    sizes = torch.stack((ends[-1], own.max(), num_keys.max(), own.sum()))
    total, longest_q, longest_k, num_queries = sizes.tolist()  # waits
    key = torch.arange(total, device=ends.device)
    segment = torch.searchsorted(ends, key, right=True)
    place = key - (ends - num_keys)[segment]
    own_place = place - shared[segment]
    prompt_row = segments.start[segments.parent[segment]] + place
    rows = torch.where(own_place < 0, prompt_row, segments.start[segment] + own_place)
    offsets_q, offsets_k = (F.pad(x[:-1], (1, 0)).int() for x in (own.cumsum(0), ends))
    counts = torch.bincount(rows, minlength=total_tokens)
    # flash-attn lays one query a sequence out in a way of its own, hence a maximum of 2 or more.
    longest = max(2, longest_q), max(2, longest_k)
    return Keys(rows, rows.argsort(stable=True), counts, offsets_q, offsets_k, *longest, num_queries, family)


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
    name, attend = keys.family
    k, v = (_Gather.apply(x, keys.rows, keys.order, keys.counts) for x in (k, v))
    queries = q[: keys.num_queries]
    if not keys.num_queries:
        out = queries + k.sum() + v.sum()  # of nothing
    elif name == "torch's varlen_attn":
        causal = {"window_size": (-1, 0), "enable_gqa": True}
        offsets = keys.offsets_q, keys.offsets_k, keys.longest_q, keys.longest_k
        out = attend(queries, k, v, *offsets, scale=scale, **causal)
    else:
        out = attend(
            queries, k, v,
            cu_seqlens_q=keys.offsets_q, cu_seqlens_k=keys.offsets_k,
            max_seqlen_q=keys.longest_q, max_seqlen_k=keys.longest_k,
            softmax_scale=scale, causal=True, deterministic=True,
        )  # fmt: skip
        out = out[0] if isinstance(out, tuple) else out  # flash-attn 4 returns the logarithms of the sums, too
    rest = q.shape[0] - keys.num_queries  # rows in no segment
    return F.pad(out, (0, 0, 0, 0, 0, rest)) if rest else out
