"""The kernels of attention.py for Hopper, with FlashAttention-3's schedule, in Gluon: backend "gluon".

A program has three partitions. The producer, one warp, asks the tensor memory accelerator for blocks; two consumers,
warpgroups of half a tile's rows each, multiply them, so that the tensor cores work for one while the other is at its
exponentials. In the forward pass a block's scores and the product of the block before are in flight at once beneath
the softmax; in d_q, d_k and d_v the two products of scores are, and the exponentials run beneath the second.

Blocks pass from producer to consumers in rings. Of each slot `full` is completed by the bytes that have come, and
`empty` by the consumers that are done with it; the producer's first round finds all slots empty. What is read once, a
tile's own rows, is a ring of a slot for each consumer. Descriptors are ragged: rows from the end of a segment on come
as zeros, whatever its neighbour holds, so that 0 times NaN does not occur. For that a row is counted from the end of
its segment, with an address that wraps around 2^64 bytes, as in triton.tools.ragged_tma.

Tiles, rules and results are those of the Triton kernels, to rounding: the diagonal comes first here, so that a row has
a finite maximum from its first block on. No GPU has run these kernels. Tests run their Python in an emulator of what
they use of Gluon (tests/gluon_emulator), and bench/static.py reads what they compile to.

Sources: Shah et al., FlashAttention-3, arXiv 2407.08608; https://triton-lang.org/main/gluon/index.html.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Consumers take 240 registers a thread and the producer 24 of the 168 that all 384 threads are launched with.
_REGISTERS = gl.constexpr([240, 24])
_STAGES = gl.constexpr(2)
_RAGGED, _END = gl.constexpr(1 << 30), 0x7FFF0000  # ends of a ragged dimension, and of those that may not end
_LOG2_E = gl.constexpr(math.log2(math.e))


@gluon.jit
def _ring(desc, SLOTS: gl.constexpr, READERS: gl.constexpr, WRITERS: gl.constexpr = 1):
    """Slots of a block each, and of each slot the barriers `full` and `empty`, by how many arrive at each."""
    BLOCK: gl.constexpr = desc.block_type.shape
    slots = gl.allocate_shared_memory(desc.dtype, [SLOTS, 1, 1, BLOCK[2], 1, BLOCK[4]], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=WRITERS)
        mbarrier.init(empty.index(slot), count=READERS)
    return slots, full, empty


@gluon.jit
def _load(ring, i, desc, row, stop, head):
    """Asks for block i of a ring, the rows of a head from `row` on, once its readers are done with what is there."""
    slots, full, empty = ring
    slot = i % slots.shape[0]
    mbarrier.wait(empty.index(slot), (i // slots.shape[0] & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    place = [_RAGGED, stop, _RAGGED - stop + row, head, 0]
    hopper.tma.async_copy_global_to_shared(desc, place, full.index(slot), slots.index(slot))


@gluon.jit
def _wait(ring, i):
    """Block i of a ring, [rows, head_dim], once it is there."""
    slots, full, _ = ring
    slot = i % slots.shape[0]
    mbarrier.wait(full.index(slot), i // slots.shape[0] & 1)
    return slots.index(slot).reshape([slots.shape[3], slots.shape[5]])


@gluon.jit
def _free(ring, i):
    """This consumer is done with block i."""
    mbarrier.arrive(ring[2].index(i % ring[2].shape[0]), count=1)


@gluon.jit
def _tile(tiles_ptr, num_heads):
    """A program's tile and head; the programs of a tile's heads are neighbours."""
    tile = tiles_ptr + gl.program_id(0) // num_heads * 5
    row = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3), gl.load(tile + 4)
    return row, gl.program_id(0) % num_heads


@gluon.jit
def _key_blocks(tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many blocks of keys a tile of queries meets: on the diagonal; masked, these and the prefix's tail; whole ones
    in the prefix; in all."""
    start, stop, own_start, prefix_start, prefix_stop = tile
    diagonal = gl.cdiv(gl.minimum(stop - start, BLOCK_M), BLOCK_N)
    shared = (prefix_stop - prefix_start) // BLOCK_N
    masked = diagonal + gl.where(prefix_start + shared * BLOCK_N < prefix_stop, 1, 0)
    return diagonal, masked, shared, masked + shared + gl.where(own_start < 0, 0, (start - own_start) // BLOCK_N)


@gluon.jit
def _key_block(i, tile, counts, BLOCK_N: gl.constexpr):
    """First key of block i of these, and whether it is in the prefix."""
    start, _, own_start, prefix_start, _ = tile
    diagonal, masked, shared, _ = counts
    whole = i - masked
    in_prefix = (i >= diagonal) & (whole < shared)
    key = gl.where(i < diagonal, start + i * BLOCK_N, own_start + (whole - shared) * BLOCK_N)
    return gl.where(in_prefix, prefix_start + gl.where(whole < 0, shared, whole) * BLOCK_N, key), in_prefix


@gluon.jit
def _visible(i, tile, counts, rows, columns):
    """Which keys of masked block i each row sees."""
    key, in_prefix = _key_block(i, tile, counts, columns.shape[0])
    last = gl.where(in_prefix, tile[4] - 1, rows)
    return (key + columns)[None, :] <= last[:, None]


@gluon.jit
def _store(ptr, block, first, num_rows, stride):
    """Rows of a block, which are those from `first` on, below `num_rows`."""
    rows = first + gl.arange(0, block.shape[0], gl.SliceLayout(1, block.type.layout))
    columns = gl.arange(0, block.shape[1], gl.SliceLayout(0, block.type.layout))
    gl.store(ptr + rows[:, None] * stride + columns[None, :], block, mask=(rows < num_rows)[:, None])


@gluon.jit
def _start(own, start, BLOCK: gl.constexpr, CONSUMER: gl.constexpr):
    """A consumer's rows, the columns of its scores by a block, and zeros of such scores and of its result."""
    ROWS: gl.constexpr = own[0][0].shape[3]
    HEAD_DIM: gl.constexpr = own[0][0].shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    rows = start + CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    zero, result = gl.zeros([ROWS, BLOCK], gl.float32, SCORES), gl.zeros([ROWS, HEAD_DIM], gl.float32, RESULT)
    return rows, columns, zero, result


@gluon.jit
def _operand(x, like, dtype: gl.constexpr):
    """x as the left operand, in registers, of a product laid out as `like`."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, like.type.layout, 2))


@gluon.jit
def _load_own(own, descs, start, stop, head):
    """The producer's first: of each tensor a consumer's rows, which are half of the tile's."""
    for consumer in gl.static_range(2):
        for i in gl.static_range(len(own)):
            _load(own[i], consumer, descs[i], start + consumer * own[i][0].shape[3], stop, head)


@gluon.jit
def _load_for_queries(work, own_descs, k_desc, v_desc, head, kv_head):
    """The producer of a tile of queries: their rows, then blocks of keys and values."""
    own, keys, values, tile, counts, _ = work
    start, stop, _, _, prefix_stop = tile
    _load_own(own, own_descs, start, stop, head)
    for i in range(counts[3]):
        key, in_prefix = _key_block(i, tile, counts, keys[0].shape[3])
        end = gl.where(in_prefix, prefix_stop, stop)
        _load(keys, i, k_desc, key, end, kv_head)
        _load(values, i, v_desc, key, end, kv_head)


@gluon.jit
def _softmax(scores, row_max, row_sum, log2_scale):
    """Of one more block: p, by what to multiply all that was made of those before, and the new maximum and sum."""
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    base = new_max * log2_scale
    p = gl.exp2(scores * log2_scale - base[:, None])
    rescale = gl.exp2(row_max * log2_scale - base)
    return p, rescale, new_max, row_sum * rescale + gl.sum(p, 1)


@gluon.jit
def _fwd_consumer(work, CONSUMER: gl.constexpr):
    own, keys, values, tile, counts, outputs = work
    out_ptr, lse_ptr, stride, log2_scale, total_tokens = outputs
    start, stop, own_start, _, _ = tile
    rows, columns, zero, acc = _start(own, start, keys[0].shape[3], CONSUMER)
    q = _wait(own[0], CONSUMER)
    scores = warpgroup_mma(q, _wait(keys, 0).permute((1, 0)), zero, use_acc=False)
    _free(keys, 0)
    scores = gl.where((start + columns)[None, :] <= rows[:, None], scores, float("-inf"))
    row_max = gl.max(scores, 1)
    p = gl.exp2(scores * log2_scale - (row_max * log2_scale)[:, None])
    row_sum = gl.sum(p, 1)
    probs = _operand(p, acc, keys[0].dtype)
    for MASKED in gl.static_range(1, -1, -1):
        for i in range(1 if MASKED else counts[1], counts[1] if MASKED else counts[3]):
            coming = warpgroup_mma(q, _wait(keys, i).permute((1, 0)), zero, use_acc=False, is_async=True)
            summed = warpgroup_mma(probs, _wait(values, i - 1), acc, is_async=True)
            scores = warpgroup_mma_wait(1, [coming])
            _free(keys, i)
            if MASKED:
                scores = gl.where(_visible(i, tile, counts, rows, columns), scores, float("-inf"))
            rescale = row_max
            # Both conditions always hold, which ptxas cannot know: without the first it moves the wait for `summed`
            # above the softmax, without the second it reuses the registers of `probs` while `summed` reads them.
            if i < total_tokens:
                scores, rescale, row_max, row_sum = _softmax(scores, row_max, row_sum, log2_scale)
            acc = warpgroup_mma_wait(0, [summed])
            if total_tokens > 0:
                probs = _operand(scores, acc, keys[0].dtype)
            _free(values, i - 1)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    acc = warpgroup_mma(probs, _wait(values, counts[3] - 1), acc)
    lse = gl.where(own_start < 0, float("-inf"), row_max * log2_scale + gl.log2(row_sum))
    # Kept over the store of out it would make ptxas wait at each product.
    gl.store(lse_ptr + rows, lse, mask=rows < stop)
    out = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, acc.type.layout))[:, None]
    out = gl.where(own_start < 0, 0.0, out).to(keys[0].dtype)
    _store(out_ptr, out, CONSUMER * zero.shape[0], stop - start, stride)


@gluon.jit(do_not_specialize=["total_tokens", "num_heads", "group_size"])
def _attention_fwd_gluon(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, tiles_ptr, scale, total_tokens, num_heads, group_size
):  # fmt: skip
    tile, head = _tile(tiles_ptr, num_heads)
    if tile[0] >= tile[1]:
        return
    own = (_ring(q_desc, 2, 1),)
    keys, values = _ring(k_desc, _STAGES, 2), _ring(v_desc, _STAGES, 2)
    hopper.fence_async_shared()
    counts = _key_blocks(tile, 2 * q_desc.block_type.shape[2], k_desc.block_type.shape[2])
    stride = num_heads * q_desc.block_type.shape[4]
    out_ptr += tile[0].to(gl.int64) * stride + head * q_desc.block_type.shape[4]
    lse_ptr += head.to(gl.int64) * total_tokens
    work = own, keys, values, tile, counts, (out_ptr, lse_ptr, stride, scale * _LOG2_E, total_tokens)
    load = work, (q_desc,), k_desc, v_desc, head, head // group_size
    gl.warp_specialize(
        [(_fwd_consumer, (work, 0)), (_fwd_consumer, (work, 1)), (_load_for_queries, load)], [4, 1], _REGISTERS
    )


@gluon.jit
def _dq_consumer(work, CONSUMER: gl.constexpr):
    own, keys, values, tile, counts, outputs = work
    dq_ptr, lse_ptr, delta_ptr, stride, scale, total_tokens = outputs
    start, stop, own_start, _, _ = tile
    rows, columns, zero, dq = _start(own, start, keys[0].shape[3], CONSUMER)
    HEAD_DIM: gl.constexpr = dq.shape[1]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])  # 16 bytes a thread
    lse = gl.load(lse_ptr + rows, mask=rows < stop, other=float("inf"))
    q, d_out, out = _wait(own[0], CONSUMER), _wait(own[1], CONSUMER), _wait(own[2], CONSUMER)
    delta = gl.sum(out.load(WIDE).to(gl.float32) * d_out.load(WIDE).to(gl.float32), 1)
    delta = gl.convert_layout(delta, rows.type.layout)
    gl.store(delta_ptr + rows, delta, mask=rows < stop)
    for MASKED in gl.static_range(1, -1, -1):
        for i in range(0 if MASKED else counts[1], counts[1] if MASKED else counts[3]):
            k = _wait(keys, i)
            coming = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            coming_dp = warpgroup_mma(d_out, _wait(values, i).permute((1, 0)), zero, use_acc=False, is_async=True)
            p = warpgroup_mma_wait(1, [coming])
            if i < total_tokens:  # as in the forward pass
                p = gl.exp2(p * (scale * _LOG2_E) - lse[:, None])
            if MASKED:
                p = gl.where(_visible(i, tile, counts, rows, columns), p, 0.0)
            dp = warpgroup_mma_wait(0, [coming_dp])
            _free(values, i)
            dq = warpgroup_mma(_operand(p * (dp - delta[:, None]), dq, keys[0].dtype), k, dq)
            _free(keys, i)
    dq = gl.where(own_start < 0, 0.0, dq * scale).to(keys[0].dtype)
    _store(dq_ptr, dq, CONSUMER * dq.shape[0], stop - start, stride)


@gluon.jit(do_not_specialize=["total_tokens", "num_heads", "group_size"])
def _attention_bwd_dq_gluon(
    q_desc, k_desc, v_desc, out_desc, d_out_desc, lse_ptr, delta_ptr, dq_ptr, tiles_ptr,
    scale, total_tokens, num_heads, group_size,
):  # fmt: skip
    """Writes delta = rowsum(out * d_out) too, which the other kernel needs."""
    tile, head = _tile(tiles_ptr, num_heads)
    if tile[0] >= tile[1]:
        return
    own = _ring(q_desc, 2, 1), _ring(d_out_desc, 2, 1), _ring(out_desc, 2, 1)
    keys, values = _ring(k_desc, _STAGES, 2), _ring(v_desc, _STAGES, 2)
    hopper.fence_async_shared()
    counts = _key_blocks(tile, 2 * q_desc.block_type.shape[2], k_desc.block_type.shape[2])
    stride = num_heads * q_desc.block_type.shape[4]
    place = tile[0].to(gl.int64) * stride + head * q_desc.block_type.shape[4]
    row = head.to(gl.int64) * total_tokens
    outputs = dq_ptr + place, lse_ptr + row, delta_ptr + row, stride, scale, total_tokens
    work = own, keys, values, tile, counts, outputs
    load = work, (q_desc, d_out_desc, out_desc), k_desc, v_desc, head, head // group_size
    gl.warp_specialize(
        [(_dq_consumer, (work, 0)), (_dq_consumer, (work, 1)), (_load_for_queries, load)], [4, 1], _REGISTERS
    )


@gluon.jit
def _next_block(query, head, tile, BLOCK_M: gl.constexpr):
    """The blocks of queries of one head of the kv head, then those of the next."""
    is_last = query + BLOCK_M >= tile[3]
    return gl.where(is_last, tile[2], query + BLOCK_M), gl.where(is_last, head + 1, head)


@gluon.jit
def _load_for_keys(work, own_descs, q_desc, d_out_desc, inputs, head, kv_head):
    """The producer of a tile of keys: their rows, then blocks of queries with their d_out, lse and delta."""
    own, queries, grads, sums, tile, num_blocks, _ = work
    start, stop, query, query_stop, _ = tile
    lse_ptr, delta_ptr, total_tokens = inputs
    _load_own(own, own_descs, start, stop, kv_head)
    rows = gl.arange(0, queries[0].shape[3], gl.BlockedLayout([1], [32], [1], [0]))
    for i in range(num_blocks):
        place = head.to(gl.int64) * total_tokens + query + rows
        lse = gl.load(lse_ptr + place, mask=rows < query_stop - query, other=0.0)
        delta = gl.load(delta_ptr + place, mask=rows < query_stop - query, other=0.0)
        _load(queries, i, q_desc, query, query_stop, head)
        _load(grads, i, d_out_desc, query, query_stop, head)
        slot = i % _STAGES  # of `sums`, which come and are freed with the queries
        sums.index(2 * slot).store(lse)
        sums.index(2 * slot + 1).store(delta)
        mbarrier.arrive(queries[1].index(slot), count=1)
        query, head = _next_block(query, head, tile, queries[0].shape[3])


@gluon.jit
def _dkv_consumer(work, CONSUMER: gl.constexpr):
    """From the queries' end on q, d_out, lse and delta are 0, and so is what p = 1 adds there."""
    own, queries, grads, sums, tile, num_blocks, outputs = work
    dk_ptr, dv_ptr, dk_pieces_ptr, dv_pieces_ptr, stride, scale = outputs
    start, stop, query, _, piece = tile
    keys, columns, zero, dk = _start(own, start, queries[0].shape[3], CONSUMER)
    DTYPE: gl.constexpr = queries[0].dtype
    BLOCK_N: gl.constexpr = 2 * dk.shape[0]
    dv, head, first = gl.zeros_like(dk), 0, CONSUMER * dk.shape[0]
    k, v = _wait(own[0], CONSUMER), _wait(own[1], CONSUMER)
    for i in range(num_blocks):
        q = _wait(queries, i)
        coming = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        d_out = _wait(grads, i)
        coming_dp = warpgroup_mma(v, d_out.permute((1, 0)), zero, use_acc=False, is_async=True)
        lse = sums.index(i % _STAGES * 2).load(columns.type.layout)
        p = gl.exp2(warpgroup_mma_wait(1, [coming]) * (scale * _LOG2_E) - lse[None, :])
        if query < start + BLOCK_N:  # the diagonal
            p = gl.where((query + columns)[None, :] >= keys[:, None], p, 0.0)
        # Loaded earlier it would take registers that p needs.
        delta = sums.index(i % _STAGES * 2 + 1).load(columns.type.layout)
        ds = p * (warpgroup_mma_wait(0, [coming_dp]) - delta[None, :])
        summed_dv = warpgroup_mma(_operand(p, dv, DTYPE), d_out, dv, is_async=True)
        summed_dk = warpgroup_mma(_operand(ds, dk, DTYPE), q, dk, is_async=True)
        dv = warpgroup_mma_wait(1, [summed_dv])
        _free(grads, i)
        dk = warpgroup_mma_wait(0, [summed_dk])
        _free(queries, i)
        query, head = _next_block(query, head, tile, queries[0].shape[3])
    dk *= scale
    if piece < 0:
        _store(dk_ptr, dk.to(DTYPE), first, stop - start, stride)
        _store(dv_ptr, dv.to(DTYPE), first, stop - start, stride)
    else:
        _store(dk_pieces_ptr, dk, first, BLOCK_N, dk.shape[1])
        _store(dv_pieces_ptr, dv, first, BLOCK_N, dk.shape[1])


@gluon.jit(do_not_specialize=["total_tokens", "num_heads", "group_size"])
def _attention_bwd_dkv_gluon(
    q_desc, k_desc, v_desc, d_out_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_pieces_ptr, dv_pieces_ptr, tiles_ptr,
    scale, total_tokens, num_heads, group_size,
):  # fmt: skip
    num_kv_heads = num_heads // group_size
    tile, kv_head = _tile(tiles_ptr, num_kv_heads)
    start, stop, query_start, query_stop, piece = tile
    if start >= stop:
        return
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[2]
    HEAD_DIM: gl.constexpr = k_desc.block_type.shape[4]
    own = _ring(k_desc, 2, 1), _ring(v_desc, 2, 1)
    queries, grads = _ring(q_desc, _STAGES, 2, 2), _ring(d_out_desc, _STAGES, 2)  # a query comes with its sums
    sums = gl.allocate_shared_memory(gl.float32, [2 * _STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    hopper.fence_async_shared()
    stride = num_kv_heads * HEAD_DIM
    place = start.to(gl.int64) * stride + kv_head * HEAD_DIM
    pieces = (piece.to(gl.int64) * num_kv_heads + kv_head) * 2 * k_desc.block_type.shape[2] * HEAD_DIM
    outputs = dk_ptr + place, dv_ptr + place, dk_pieces_ptr + pieces, dv_pieces_ptr + pieces, stride, scale
    num_blocks = gl.cdiv(query_stop - query_start, BLOCK_M) * group_size
    work = own, queries, grads, sums, tile, num_blocks, outputs
    inputs = lse_ptr, delta_ptr, total_tokens
    load = work, (k_desc, v_desc), q_desc, d_out_desc, inputs, kv_head * group_size, kv_head
    gl.warp_specialize(
        [(_dkv_consumer, (work, 0)), (_dkv_consumer, (work, 1)), (_load_for_keys, load)], [4, 1], _REGISTERS
    )


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of blocks [rows, head_dim] of a head of x [tokens, heads, head_dim]; copied if not at multiples of 16 bytes."""
    if any(n % 16 for n in (x.data_ptr(), x.stride(0) * x.element_size(), x.stride(1) * x.element_size())):
        x = x.clone(memory_format=torch.contiguous_format)
    (_, heads, head_dim), row = x.shape, x.stride(0)
    shape, strides = [_END, _END, _RAGGED.value, heads, head_dim], [2**34 - row, row, row, x.stride(1), 1]
    return TensorDescriptor(x, shape, strides, [1, 1, rows, 1, head_dim], gl.NVMMASharedLayout(128, 16, 5))


@dataclass(frozen=True)
class Launcher:
    """Launches a kernel by the arguments of its Triton twin: descriptors take the place of tensors and strides."""

    kernel: Any
    own: tuple[str, ...]  # descriptors of which each consumer has half a tile

    def descriptors(self, tensors: dict[str, Any], BLOCK_M: int, BLOCK_N: int) -> dict[str, TensorDescriptor]:
        """Of those tensors of which the kernel takes one, by its name."""
        rows = dict.fromkeys(("q_desc", "out_desc", "d_out_desc"), BLOCK_M) | {"k_desc": BLOCK_N, "v_desc": BLOCK_N}
        rows |= {name: rows[name] // 2 for name in self.own}
        return {name: _descriptor(tensors[name], rows[name]) for name in rows if name in self.kernel.arg_names}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, BLOCK_M: int, BLOCK_N: int, **_: Any) -> None:
            given = dict(zip(self.kernel.arg_names, [*arguments[:-9], *arguments[-3:]], strict=True))
            self.kernel[grid](**given | self.descriptors(given, BLOCK_M, BLOCK_N), num_warps=4)

        return launch


# Forward, d_q, and d_k with d_v.
LAUNCHERS = (
    Launcher(_attention_fwd_gluon, ("q_desc",)),
    Launcher(_attention_bwd_dq_gluon, ("q_desc", "out_desc", "d_out_desc")),
    Launcher(_attention_bwd_dkv_gluon, ("k_desc", "v_desc")),
)
