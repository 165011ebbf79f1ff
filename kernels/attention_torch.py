"""The torch twin of attention.py, and checks of its arguments.

The twin takes any floating dtype up to float64 and any head_dim on any device. It pads segments of
similar length into batches and calls scaled_dot_product_attention once a batch, so it also copies a
prompt's keys and values for each of its completions. It waits for the offsets to reach the host.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# The calls of one more batch take about as long as this many scores, so less padding than that is free.
_FREE_PADDING = 16_384
_MAX_PADDING_SHARE = 0.2


@dataclass(frozen=True)
class Segment:
    start: int
    length: int
    prefix_start: int
    prefix_length: int

    @property
    def num_scores(self) -> int:
        return self.length * (self.prefix_length + self.length)


@dataclass(frozen=True)
class Keys:
    segments: list[Segment]  # by themselves torch.compile would guard their number


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v are of one dtype and device, and of shapes that fit together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted [total_tokens, heads, head_dim]")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and q is {q.dtype}; wanted one floating dtype for q, k and v")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}; wanted one device")
    total_tokens, num_heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != total_tokens or k.shape[2] != head_dim:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; wanted [{total_tokens}, num_kv_heads, {head_dim}]"
        )
    if not k.shape[1] or num_heads % k.shape[1]:
        raise ValueError(f"q has {num_heads} heads and k has {k.shape[1]}; wanted a multiple")


@torch.compiler.disable()  # the host waits
def segments_on_host(
    cu_seqlens: Tensor,  # [num_segments + 1]
    prefix: Tensor | None,  # [num_segments]
    total_tokens: int,
    max_seqlen: int | None,
    *,
    in_order: bool,
) -> Keys:
    """The segments that have tokens. Raises ValueError for offsets and prefixes that are no segments, and with
    `in_order` for a segment that follows neither its prefix nor another segment that has it.
    """
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > total_tokens or any(start > stop for start, stop in pairwise(offsets)):
        raise ValueError(f"cu_seqlens is {offsets}; wanted offsets that rise from 0 to at most {total_tokens}")
    lengths = [stop - start for start, stop in pairwise(offsets)]
    if max_seqlen is not None and max_seqlen < max(lengths, default=0):
        raise ValueError(f"max_seqlen is {max_seqlen}, but a segment has {max(lengths)} tokens")
    prefixes = [-1] * len(lengths) if prefix is None else prefix.tolist()
    segments = []
    for segment, (length, parent) in enumerate(zip(lengths, prefixes, strict=True)):
        if not -1 <= parent < len(lengths) or parent == segment:
            raise ValueError(f"prefix[{segment}] is {parent}; wanted -1 or another of the {len(lengths)} segments")
        if parent >= 0 and prefixes[parent] >= 0:
            raise ValueError(f"prefix[{segment}] is {parent}, which has a prefix itself; wanted one level")
        if in_order and parent >= 0 and parent not in (segment - 1, *prefixes[segment - 1 : segment]):
            raise ValueError(
                f"prefix[{segment}] is {parent}; wanted segment {segment} right behind that one, or behind another "
                "that has it; or backend='torch'"
            )
        if length:
            shared = (offsets[parent], lengths[parent]) if parent >= 0 else (0, 0)
            segments.append(Segment(offsets[segment], length, *shared))
    return Keys(segments)


def _batches(segments: list[Segment]) -> list[list[Segment]]:
    """Segments grouped by similar lengths, longest first, so that little of a padded batch is padding."""
    batches: list[list[Segment]] = []
    padded_rows = padded_prefix = num_scores = 0
    for segment in sorted(segments, key=lambda s: (s.prefix_length, s.length), reverse=True):
        rows, shared = max(padded_rows, segment.length), max(padded_prefix, segment.prefix_length)
        if batches:
            area = (len(batches[-1]) + 1) * rows * (rows + shared)
            padding = area - num_scores - segment.num_scores
            fits = padding <= max(_FREE_PADDING, _MAX_PADDING_SHARE * area)
            if fits and (shared > 0) == (segment.prefix_length > 0):
                batches[-1].append(segment)
                padded_rows, padded_prefix, num_scores = rows, shared, num_scores + segment.num_scores
                continue
        batches.append([segment])
        padded_rows, padded_prefix, num_scores = segment.length, segment.prefix_length, segment.num_scores
    return batches


@torch.compiler.disable()  # the plan is made on the host
def torch_attention(
    q: Tensor,  # [total_tokens, num_heads, head_dim]
    k: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    v: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    keys: Keys,
    scale: float | None,
) -> Tensor:  # [total_tokens, num_heads, head_dim]
    """What `packed_attention` says, its arguments checked; prompts may stand anywhere."""
    if not keys.segments:  # zeros that remain a function of all three
        return q.new_zeros(q.shape) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    outputs = [q.new_zeros(1, q.shape[1] * q.shape[2])]  # that of tokens in no segment, then the batches' padded rows
    places = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    num_outputs = 1
    for batch in _batches(keys.segments):
        start, length, prefix_start, prefix_length = torch.tensor(
            [(s.start, s.length, s.prefix_start, s.prefix_length) for s in batch], device=q.device
        ).T.unsqueeze(2)
        # Padded rows repeat a segment's last token: finite wherever the segment is, never read back, hidden as keys.
        own = torch.arange(max(s.length for s in batch), device=q.device)
        shared = torch.arange(max(s.prefix_length for s in batch), device=q.device)
        query_rows = start + own.minimum(length - 1)  # [batch, own]
        key_rows = torch.cat((prefix_start + shared.minimum(prefix_length - 1), query_rows), 1)
        mask = None
        if shared.numel():
            sees_shared = (shared < prefix_length)[:, None, None].expand(-1, 1, own.numel(), -1)
            sees_own = (own <= own[:, None]).expand(len(batch), 1, -1, -1)
            mask = torch.cat((sees_shared, sees_own), 3)
        out = F.scaled_dot_product_attention(
            _gather_heads(q, query_rows),
            _gather_heads(k, key_rows),
            _gather_heads(v, key_rows),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        ).transpose(1, 2)  # [batch, own, num_heads, head_dim]
        outputs.append(out.flatten(2).flatten(0, 1))
        kept = own < length
        places[query_rows[kept]] = num_outputs + kept.flatten().nonzero().squeeze(1)
        num_outputs += kept.numel()
    return torch.cat(outputs).index_select(0, places).view(q.shape)


def _gather_heads(
    x: Tensor,  # [total_tokens, heads, head_dim]
    rows: Tensor,  # [batch, length]
) -> Tensor:  # [batch, heads, length, head_dim]
    return x.flatten(1).index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
