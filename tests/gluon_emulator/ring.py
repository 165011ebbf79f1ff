"""A small kernel with all that the emulator has: out_i = sum_j (q_i . k_j)^2 v_j over the tokens of a segment.

One warp feeds rings of k and v by TMA to two warpgroups of 64 queries each, which have the next block's q . k in flight
with this block's product with v. Rows behind a segment are another's, which may be NaN, or nobody's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # of a warpgroup, and of a block of keys
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _produce(
    descriptors, buffers, full, empty, tail_full, first, start, stop, STAGES: gl.constexpr, HEAD_DIM: gl.constexpr
):
    q, k, v = descriptors
    q_s, k_s, v_s = buffers
    q_full, k_full, v_full = full
    k_empty, v_empty = empty
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    mbarrier.expect(q_full, 2 * q.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [first + half * ROWS, 0], q_full, q_s.index(half))
    for j in range(gl.cdiv(stop - start, ROWS)):
        slot = j % STAGES
        phase = j // STAGES & 1
        key = start + j * ROWS
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [key, 0], k_full.index(slot), k_s.index(slot))
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        if key + ROWS <= stop:
            mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
            tma.async_copy_global_to_shared(v, [key, 0], v_full.index(slot), v_s.index(slot))
        else:  # 0 * NaN is NaN: rows behind the segment become 0 before anyone multiplies by them
            mbarrier.expect(tail_full, v.block_type.nbytes)
            tma.async_copy_global_to_shared(v, [key, 0], tail_full, v_s.index(slot))
            mbarrier.wait(tail_full, 0)
            rows = key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BLOCKED))
            tail = gl.where((rows < stop)[:, None], v_s.index(slot).load(BLOCKED), 0.0)
            v_s.index(slot).store(tail)
            fence_async_shared()
            mbarrier.arrive(v_full.index(slot))


@gluon.jit
def _weights(scores, key, stop, LAYOUT: gl.constexpr, OPERAND: gl.constexpr):
    keys = key + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
    weights = gl.where((keys < stop)[None, :], scores * scores, 0.0)
    return gl.convert_layout(weights.to(gl.bfloat16), OPERAND)


@gluon.jit
def _consume(
    out, out_ptr, buffers, full, empty, first, start, stop, STAGES: gl.constexpr, HEAD_DIM: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    q_s, k_s, v_s = buffers
    q_full, k_full, v_full = full
    k_empty, v_empty = empty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    zero = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
    mbarrier.wait(q_full, 0)
    q = q_s.index(HALF)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zero, use_acc=False)
    mbarrier.arrive(k_empty.index(0))
    weights = _weights(scores, start, stop, LAYOUT, OPERAND)
    slot = 0
    phase = 0
    for j in range(1, gl.cdiv(stop - start, ROWS)):
        v_slot = slot
        v_phase = phase
        slot = j % STAGES
        phase = j // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        product = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_slot), v_phase)
        total = warpgroup_mma(weights, v_s.index(v_slot), acc, is_async=True)
        scores = warpgroup_mma_wait(1, [product])
        mbarrier.arrive(k_empty.index(slot))
        weights = _weights(scores, start + j * ROWS, stop, LAYOUT, OPERAND)
        acc = warpgroup_mma_wait(0, [total])
        mbarrier.arrive(v_empty.index(v_slot))
    mbarrier.wait(v_full.index(slot), phase)
    acc = warpgroup_mma(weights, v_s.index(slot), acc)
    row = first + HALF * ROWS
    if row + ROWS <= stop:
        q.store(acc.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row, 0], q)
        tma.store_wait(0)
    else:
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
        places = out_ptr + rows[:, None] * HEAD_DIM + columns[None, :]
        gl.store(places, acc.to(gl.bfloat16), mask=(rows < stop)[:, None])


@gluon.jit(do_not_specialize=["num_tokens"])
def squares(q_ptr, k_ptr, v_ptr, out, out_ptr, offsets_ptr, num_tokens, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """q, k, v, out [num_tokens, HEAD_DIM] bf16; `out` is the descriptor of out_ptr. A program has 128 queries."""
    start = gl.load(offsets_ptr + gl.program_id(0))
    stop = gl.load(offsets_ptr + gl.program_id(0) + 1)
    first = start + gl.program_id(1) * (2 * ROWS)
    if first >= stop:
        return
    shape = [num_tokens, HEAD_DIM]
    q = tma.make_tensor_descriptor(q_ptr, shape, [HEAD_DIM, 1], [ROWS, HEAD_DIM], SHARED)
    k = tma.make_tensor_descriptor(k_ptr, shape, [HEAD_DIM, 1], [ROWS, HEAD_DIM], SHARED)
    v = tma.make_tensor_descriptor(v_ptr, shape, [HEAD_DIM, 1], [ROWS, HEAD_DIM], SHARED)
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, HEAD_DIM], SHARED)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, HEAD_DIM], SHARED)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, HEAD_DIM], SHARED)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    tail_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(tail_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    buffers = (q_s, k_s, v_s)
    full = (q_full, k_full, v_full)
    empty = (k_empty, v_empty)
    gl.warp_specialize([
        (_consume, (out, out_ptr, buffers, full, empty, first, start, stop, STAGES, HEAD_DIM, 0)),
        (_consume, (out, out_ptr, buffers, full, empty, first, start, stop, STAGES, HEAD_DIM, 1)),
        (_produce, ((q, k, v), buffers, full, empty, tail_full, first, start, stop, STAGES, HEAD_DIM)),
    ], [4, 1], [240, 24])  # fmt: skip
