"""The tiles of attention.py's kernels: their sizes, and the tables of them that the kernels walk.

Tables are made on the device, once a batch, in sizes that follow from shapes.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# With more tiles of keys a prompt has enough programs, however many completions it has.
SPLIT_TILES = 16
_CACHED_TABLES = 12
# By architecture and head_dim rounded up: queries and keys in a tile, warps and stages of the forward pass, of d_q, and
# of d_k with d_v. A CPU takes the first row.
TILES = {
    ("fp32", 64): ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ("fp32", 128): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
    ("fp32", 256): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_80", 64): ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    ("sm_80", 128): ((128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2)),
    ("sm_80", 256): ((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    ("sm_90", 64): ((128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2)),
    ("sm_90", 128): ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_90", 256): ((128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    ("sm_100", 64): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_100", 128): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_100", 256): ((128, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    ("gfx942", 64): ((128, 64, 4, 1), (128, 64, 4, 1), (64, 128, 4, 1)),
    ("gfx942", 128): ((128, 64, 4, 1), (128, 32, 4, 1), (32, 128, 4, 1)),
    ("gfx942", 256): ((64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
}


def block_of(head_dim: int) -> int:
    """The next power of two, which a tile has as columns."""
    return 1 << (head_dim - 1).bit_length()


def architecture(q: Tensor) -> str:
    """What a table of tiles has for q's device and dtype."""
    if not q.is_cuda or q.dtype == torch.float32:
        return "fp32"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(q.device)[0], "sm_80")


def tile_options(q: Tensor) -> list[dict[str, Any]]:
    """What each of the three kernels is compiled with, for q's device, dtype and head_dim."""
    block_d, arch = block_of(q.shape[2]), architecture(q)
    tiles = TILES[arch, max(64, block_d) if q.is_cuda else 64]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    shared = {"HEAD_DIM": q.shape[2], "BLOCK_D": block_d} | ({"matrix_instr_nonkdim": 16} if torch.version.hip else {})
    return [dict(zip(names, tile, strict=True)) | shared for tile in tiles]


class Segments(NamedTuple):
    """Offsets on the device; the last segment is made of the rows in none. [num_segments + 1] each."""

    start: Tensor
    stop: Tensor
    parent: Tensor  # -1 where there is none
    is_last: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int) -> "Segments":
        bounds = F.pad(cu_seqlens.long().clamp(0, total_tokens), (0, 1), value=total_tokens)
        start, stop = bounds[:-1], bounds[1:]
        parent = torch.full_like(start, -1)
        if prefix is not None:
            parent[:-1] = prefix.clamp(-1, prefix.shape[0] - 1)
        index = torch.arange(start.shape[0], device=start.device)
        return cls(start, stop, parent, index == start.shape[0] - 1)

    def query_stop(self) -> Tensor:
        """End of the queries that see a segment's keys: they begin in it. [num_segments + 1], of the last its start."""
        index = torch.arange(self.start.shape[0], device=self.start.device)
        family = torch.where(self.parent < 0, index, self.parent)  # rises, as completions follow their prompt
        behind = torch.searchsorted(family, index, right=True).clamp(max=index.shape[0] - 1)
        return torch.where(self.parent < 0, self.start[behind], self.stop)

    def tiles(self, block: int, total_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Segment, first row and end of each tile of `block` rows; an unused one begins at its end or behind."""
        counts = (self.stop - self.start + block - 1) // block
        ends = counts.cumsum(0)
        tile = torch.arange(total_tokens // block + counts.shape[0], device=ends.device)
        segment = torch.searchsorted(ends, tile, right=True).clamp(max=counts.shape[0] - 1)
        first = self.start[segment] + (tile - (ends - counts)[segment]) * block
        return segment, first, self.stop[segment]


def _table(work: Tensor, *columns: Tensor) -> Tensor:  # [num_tiles, 5] int32
    """A row a tile, the longest work first."""
    order = work.sort(descending=True, stable=True).indices
    return torch.stack(columns, 1)[order].int()


def query_tiles(cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int, block: int) -> Tensor:
    """Columns: first query, end of its segment, start of its segment (-1: none), start and end of the prefix."""
    segments = Segments.of(cu_seqlens, prefix, total_tokens)
    segment, first, stop = segments.tiles(block, total_tokens)
    parent = segments.parent[segment]
    prefix_start, prefix_stop = (torch.where(parent < 0, 0, x[parent]) for x in (segments.start, segments.stop))
    start = torch.where(segments.is_last, -1, segments.start)[segment]
    work = torch.where((first < stop) & (start >= 0), prefix_stop - prefix_start + first - start + block, 0)
    return _table(work, first, stop, start, prefix_start, prefix_stop)


def key_tiles(
    cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int, block: int, piece: int, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Columns: first key, end of its segment, first and end of the queries, slot of a piece (-1: the only one).

    The second table has a row a slot: first key, end of its segment, first slot, number of pieces; used for a tile's
    first slot.
    """
    segments = Segments.of(cu_seqlens, prefix, total_tokens)
    segment, first, stop = segments.tiles(block, total_tokens)
    end = segments.query_stop()[segment]
    pieces = (end - first + piece - 1) // piece
    is_split = (pieces > 1) & (segments.stop - segments.start <= SPLIT_TILES * block)[segment]
    is_split &= torch.where(is_split, pieces, 0).cumsum(0) <= num_slots  # all of them, for a right max_seqlen
    slots = torch.where(is_split, pieces, 0)
    used = torch.where(first < stop, slots.clamp(min=1), 0)
    last_entry, last_slot = used.cumsum(0), slots.cumsum(0)
    entry = torch.arange(first.shape[0] + num_slots, device=cu_seqlens.device)
    tile = torch.searchsorted(last_entry, entry, right=True).clamp(max=first.shape[0] - 1)
    place = entry - (last_entry - used)[tile]
    first_slot = last_slot - slots
    begin = first[tile] + place * piece
    end = torch.where(is_split[tile], torch.minimum(begin + piece, end[tile]), end[tile])
    slot = torch.where(is_split[tile], first_slot[tile] + place, -1)
    tile_stop = torch.where(place < used[tile], stop[tile], 0)
    entries = _table(torch.where(tile_stop > 0, end - begin, 0), first[tile], tile_stop, begin, end, slot)
    slot = torch.arange(num_slots, device=cu_seqlens.device)
    tile = torch.searchsorted(last_slot, slot, right=True).clamp(max=first.shape[0] - 1)
    tile_stop = torch.where(is_split[tile] & (slot == first_slot[tile]), stop[tile], 0)
    return entries, torch.stack((first[tile], tile_stop, slot, pieces[tile], slot), 1).int()


_tables: OrderedDict[tuple, tuple[list[StorageWeakRef], Any]] = OrderedDict()


def cached(build: Callable, cu_seqlens: Tensor, prefix: Tensor | None, *arguments: int | None) -> Any:
    """build(cu_seqlens, prefix, *arguments), kept for the layers of a batch as long as the tensors do not change.

    A weak reference to a storage keeps its address from being given to another one.
    """
    tensors = [cu_seqlens] if prefix is None else [cu_seqlens, prefix]
    if any(x.is_inference() for x in tensors) or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return build(cu_seqlens, prefix, *arguments)
    stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream if cu_seqlens.is_cuda else 0
    storages = [StorageWeakRef(x.untyped_storage()) for x in tensors]
    layouts = [(x.storage_offset(), x.stride(), x.shape, x.dtype, x._version) for x in tensors]
    key = (build, stream, arguments, *(storage.cdata for storage in storages), *layouts)
    if key not in _tables:
        _tables[key] = storages, build(cu_seqlens, prefix, *arguments)
        if len(_tables) > _CACHED_TABLES:
            _tables.popitem(last=False)
    return _tables[key][1]
