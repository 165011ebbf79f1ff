"""The tiles of attention.py's kernels: their sizes, and the tables of them that the kernels walk.

Tables are made on the device, in sizes that follow from shapes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A piece has this many rows of queries or more, those of all the query heads of a kv head counted.
PIECE_ROWS = 8192
# By architecture and head_dim rounded up: queries and keys in a tile, warps and stages of the forward pass, of d_q, and
# of d_k with d_v. With 3 stages a pass waits for what was asked for a whole pass before, with 2 only a product before.
# A CPU takes the first row.
TILES = {
    ("fp32", 64): ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ("fp32", 128): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
    ("fp32", 256): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_80", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
    ("sm_80", 128): ((128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 8, 3)),
    ("sm_80", 256): ((64, 32, 8, 3), (64, 32, 8, 3), (32, 64, 8, 3)),
    ("sm_86", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
    ("sm_86", 128): ((128, 32, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2)),
    ("sm_86", 256): ((64, 32, 8, 2), (32, 32, 8, 3), (32, 32, 8, 3)),
    ("sm_90", 64): ((128, 128, 8, 3), (128, 128, 8, 3), (64, 128, 8, 3)),
    ("sm_90", 128): ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_90", 256): ((128, 32, 8, 3), (128, 32, 8, 3), (32, 64, 8, 3)),
    ("sm_100", 64): ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_100", 128): ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_100", 256): ((128, 32, 8, 3), (128, 32, 8, 2), (32, 64, 8, 3)),
    ("gfx942", 64): ((128, 64, 4, 1), (128, 64, 4, 1), (64, 128, 4, 1)),
    ("gfx942", 128): ((128, 64, 4, 1), (128, 32, 4, 1), (32, 128, 4, 1)),
    ("gfx942", 256): ((64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
}
# Every other chip takes the tiles of sm_86, which fit 99 KB of shared memory: sm_86, sm_89 and sm_120 have no more.
_CAPABILITIES = {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def block_of(head_dim: int) -> int:
    """The next power of two, which a tile has as columns."""
    return 1 << (head_dim - 1).bit_length()


def of_capability(capability: tuple[int, int]) -> str:
    """What a table of tiles has for an Nvidia chip."""
    return _CAPABILITIES.get(capability, "sm_86")


def architecture(q: Tensor) -> str:
    """What a table of tiles has for q's device and dtype."""
    if not q.is_cuda or q.dtype == torch.float32:
        return "fp32"
    if torch.version.hip:
        return "gfx942"
    return of_capability(torch.cuda.get_device_capability(q.device))


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
    parent: Tensor  # its prefix; below 0 where there is none
    family: Tensor  # its prefix, or itself: rises where completions follow their prompt

    @classmethod
    def of(cls, cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int) -> "Segments":
        """Stops the device where offsets fall or leave the tensor, or a segment follows neither its prefix nor another
        segment that has it. Nothing waits for that; ROCm leaves it out.
        """
        bounds = F.pad(cu_seqlens.long(), (0, 1), value=total_tokens)
        index = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device)
        parent = torch.full_like(index, -1)
        if prefix is not None:
            parent[:-1] = prefix.clamp(-2, prefix.shape[0] - 1)
        family = torch.where(parent < 0, index, parent)
        begins = parent == -1
        in_order = begins[1:] | (family[1:] == family[:-1])
        right = torch.cat((bounds[:1] == 0, bounds.diff() >= 0, begins[:1], in_order)).all()
        torch.ops.aten._assert_async.msg(right, "cu_seqlens falls, or a segment does not follow its prefix")
        bounds = bounds.clamp(0, total_tokens)
        return cls(bounds[:-1], bounds[1:], parent, family)

    def query_stop(self) -> Tensor:
        """End of the queries that see a segment's keys: they begin in it. [num_segments + 1], of the last its start.

        Prefixes in another order would need more than another search here: a range with a stranger in it is none.
        """
        behind = torch.searchsorted(self.family, self.family, right=True).clamp(max=self.start.shape[0] - 1)
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


def query_tiles(segments: Segments, total_tokens: int, block: int) -> Tensor:
    """Columns: first query, end of its segment, start of its segment (-1: none), start and end of the prefix."""
    segment, first, stop = segments.tiles(block, total_tokens)
    parent = segments.parent[segment]
    prefix_start, prefix_stop = (torch.where(parent < 0, 0, x[parent]) for x in (segments.start, segments.stop))
    start = torch.where(segment < segments.start.shape[0] - 1, segments.start[segment], -1)
    work = torch.where(start < 0, 0, prefix_stop - prefix_start + first - start + block)
    return _table(work, first, stop, start, prefix_start, prefix_stop)


def piece_lengths(
    length: Tensor, span: Tensor, num_heads: int, num_kv_heads: int, block_m: int, block_n: int
) -> Tensor:
    """Into pieces of how many queries the `span` queries of a segment of `length` keys are cut, [num_segments + 1].

    Keys of a short prompt or of few kv heads make too few programs, each too long. A segment of n keys in T tiles of
    block_n, whose tiles meet x_1, .., x_T queries, S the most of them, may have

        slots = 3 (3 n + S) / (2 num_kv_heads block_n)        pieces of        sum_t x_t / (slots - T)

    queries or more; that makes sum_t ceil(x_t / piece) <= sum_t x_t / piece + T <= slots. S is n for a completion, and
    n with all its completions for a prompt, so that 3 n + S count no token more than 5 times: no pack has more pieces
    than `count_slots` says. By a rule of the segment and the model alone values do not depend on the pack.
    """
    tiles = (length + block_n - 1) // block_n
    queries = tiles * span - tiles * (tiles - 1) // 2 * block_n
    room = 3 * (3 * length + span) // (2 * num_kv_heads * block_n) - tiles
    piece = torch.where(room > 0, (queries + room - 1) // room.clamp(min=1), span)
    piece = piece.clamp(min=PIECE_ROWS // (num_heads // num_kv_heads))
    return (piece + block_m - 1) // block_m * block_m


def count_slots(total_tokens: int, num_kv_heads: int, block_n: int) -> int:
    """Places for pieces in a pack: 7.5 rows of fp32 a token for d_k, and for d_v; 503 MB for 64k tokens of 128."""
    return 15 * total_tokens // (2 * num_kv_heads * block_n)


def key_tiles(
    segments: Segments, total_tokens: int, num_heads: int, num_kv_heads: int, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """Columns: first key, end of its segment, first and end of the queries, slot of a piece (-1: the only one).

    The second table has the tiles that are cut: first key, end of its segment, first slot, number of pieces. The last
    piece of a tile is what is left: short programs at the end fill the processors.
    """
    segment, first, stop = segments.tiles(block_n, total_tokens)
    end = segments.query_stop()
    length, span = segments.stop - segments.start, end - segments.start
    piece = piece_lengths(length, span, num_heads, num_kv_heads, block_m, block_n)
    end, piece = end[segment], piece[segment]
    pieces = (end - first + piece - 1) // piece
    slots = torch.where((first < stop) & (pieces > 1), pieces, 0)
    num_slots = count_slots(total_tokens, num_kv_heads, block_n)
    slots = torch.where(slots.cumsum(0) <= num_slots, slots, 0)  # all of them where offsets are in order
    last_slot, last_entry = slots.cumsum(0), torch.where(first < stop, slots.clamp(min=1), 0).cumsum(0)
    first_slot = last_slot - slots
    cut = torch.stack((first, torch.where(slots > 0, stop, 0), first_slot, slots, slots), 1).int()
    entry = torch.arange(first.shape[0] + num_slots, device=first.device)
    tile = torch.searchsorted(last_entry, entry, right=True).clamp(max=first.shape[0] - 1)
    tiles = torch.stack((first, stop, end, piece, slots, first_slot, last_entry - slots.clamp(min=1)), 1)
    first, stop, end, piece, slots, first_slot, first_entry = tiles[tile].unbind(1)
    place = entry - first_entry
    begin = first + place * piece
    end = torch.where(slots > 0, torch.minimum(begin + piece, end), end)
    slot = torch.where(slots > 0, first_slot + place, -1)
    stop = torch.where(entry < last_entry[-1], stop, 0)
    return _table(torch.where(stop > 0, end - begin, 0), first, stop, begin, end, slot), cut


@torch.library.custom_op("flashgrpo::attention_tiles", mutates_args=())  # one graph then serves every pack
def attention_tiles(
    cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int, heads: Sequence[int], blocks: Sequence[int]
) -> list[Tensor]:
    """The query tiles of the forward pass; with four blocks also those of d_q, the key tiles, and those that are cut.

    `heads` are those of q and of k, `blocks` the queries of a tile forward, and for d_q, and the queries and keys of
    one for d_k and d_v.
    """
    segments = Segments.of(cu_seqlens, prefix, total_tokens)
    forward = query_tiles(segments, total_tokens, blocks[0])
    if len(blocks) == 1:
        return [forward]
    backward = forward.clone() if blocks[1] == blocks[0] else query_tiles(segments, total_tokens, blocks[1])
    return [forward, backward, *key_tiles(segments, total_tokens, *heads, *blocks[2:])]


@attention_tiles.register_fake
def _(cu_seqlens, prefix, total_tokens, heads, blocks):
    numbers = [total_tokens // blocks[i] + cu_seqlens.shape[0] for i in (0, 1, 3, 3) if i < len(blocks)]
    if blocks[2:]:
        numbers[2] += count_slots(total_tokens, heads[1], blocks[3])
    return [cu_seqlens.new_empty(number, 5, dtype=torch.int32) for number in numbers]
