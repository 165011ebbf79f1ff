"""That tests/gluon_emulator computes what a kernel says, in any order, and finds what is wrong with one."""

import os

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator import Fault, ring, run, with_fault

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
pytestmark = pytest.mark.twin
few = hypothesis.settings(max_examples=int(os.environ.get("EXAMPLES", 10)), deadline=None)
SEEDS = 5  # within which a fault must be found
HEAD_DIM = 64
LENGTHS = 128, 65, 200  # of segments: without a tail, with one of one row, with one
FAULTS = [  # what, text of the ring kernel, text in its place, what is said of it
    ("wait for k dropped", "        mbarrier.wait(k_full.index(slot), phase)\n", "", "race|nobody"),
    ("wait for the last v dropped", "    mbarrier.wait(v_full.index(slot), phase)\n    acc", "    acc", "race|nobody"),
    ("wait for q dropped", "    mbarrier.wait(q_full, 0)\n", "", "race|nobody"),
    ("wait for a free slot dropped", "        mbarrier.wait(v_empty.index(slot), phase ^ 1)\n", "", "race: _produce"),
    ("wait for the tail dropped", "            mbarrier.wait(tail_full, 0)\n", "", "race: _produce"),
    ("producer's phase flipped", "k_empty.index(slot), phase ^ 1)", "k_empty.index(slot), phase)", "deadlock"),
    ("consumer's phase flipped", "v_full.index(v_slot), v_phase)", "v_full.index(v_slot), 1 - v_phase)", "deadlock"),
    ("phase of another ring", "STAGES & 1\n        mbarrier", "(STAGES + 1) & 1\n        mbarrier", "deadlock|race"),
    ("ring of one slot", "k_full.index(slot), k_s.index(slot))", "k_full.index(slot), k_s.index(0))", "race: _produce"),
    ("arrival before the last read",
     "acc = warpgroup_mma_wait(0, [total])\n        mbarrier.arrive(v_empty.index(v_slot))\n",
     "mbarrier.arrive(v_empty.index(v_slot))\n        acc = warpgroup_mma_wait(0, [total])\n", "race: _produce"),
    ("one of two arrivals frees a slot", "(v_empty.index(i), count=2)", "(v_empty.index(i), count=1)", "race|deadlock"),
    ("three arrivals free a slot", "(v_empty.index(i), count=2)", "(v_empty.index(i), count=3)", "deadlock"),
    ("a consumer arrives thrice", "arrive(k_empty.index(slot))", "arrive(k_empty.index(slot), count=3)", "too often"),
    ("one of two copies expected", "expect(q_full, 2 * q", "expect(q_full, q", "race|does not expect"),
    ("too few bytes expected", "k_full.index(slot), k.block", "k_full.index(slot), 8 + 0 * k.block", "does not expect"),
    ("too many bytes expected", "expect(q_full, 2 * q", "expect(q_full, 3 * q", "deadlock"),
    ("barrier not begun", "    mbarrier.init(tail_full, count=1)\n", "", "wanted mbarrier.init"),
    ("product read while under way", "wait(1, [product])", "wait(2, [product]).to(gl.float32)", "under way"),
    ("product with a slot not yet there", "v_s.index(v_slot), acc, is", "v_s.index(slot), acc, is", "race|nobody"),
    ("sum read while under way", "weights = _weights(scores, start + j * ROWS,",
     "total *= 2\n        weights = _weights(scores, start + j * ROWS,", "under way"),
    ("no fence behind the tail's zeros", "    fence_async_shared()\n            mbar", "    mbar", "fence_async"),
    ("no fence before a store by TMA", "        fence_async_shared()\n        tma", "        tma", "fence_async"),
    ("store by TMA not waited for", "        tma.store_wait(0)\n", "", "not waited for at the end"),
    ("rows of another segment stored", "if row + ROWS <= stop:", "if row < stop:", "race: global memory"),
    ("rows behind the segment stored", "mask=(rows < stop)", "mask=(rows < stop + 9)", "race: global memory"),
    ("tail of v not zeroed", "(rows < stop)[:, None], v_s", "(rows < stop + 1)[:, None], v_s", "wrong values"),
    ("tail of k seen", "(keys < stop)[None, :], s", "(keys < stop + 1)[None, :], s", "wrong values"),
    ("keys a row on", "[key, 0], k_full", "[key + 1, 0], k_full", "wrong values"),
    ("k not transposed", "k_s.index(slot).permute((1, 0)), zero", "k_s.index(slot), zero", "wrong values"),
    ("weights in the wrong layout", "gl.convert_layout(weights.to(gl.bfloat16), OPERAND)", "weights.to(gl.bfloat16)",
     "DotOperandLayout"),
]  # fmt: skip


def attend(lengths, *, module=ring, seed=0, stages=2):
    """The kernel's output, for segments with NaN behind the last; raises Fault too if it is not as float64 has it."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    num_tokens = int(offsets[-1])
    q, k, v = torch.randn(3, num_tokens + 30, HEAD_DIM).bfloat16()
    for x in (q, k, v):
        x[num_tokens:] = float("nan")
    out = torch.full_like(q, 7.0)
    descriptor = TensorDescriptor.from_tensor(out, [64, HEAD_DIM], ring.SHARED.value)
    run(
        module.squares, (len(lengths), -(-max(lengths) // 128)), q, k, v, descriptor, out, offsets, num_tokens + 30,
        seed=seed, HEAD_DIM=HEAD_DIM, STAGES=stages,
    )  # fmt: skip
    assert (out[num_tokens:] == 7.0).all()
    out, *qkv = (x[:num_tokens] for x in (out, q, k, v))
    for found, q, k, v in zip(*(x.double().split(list(lengths)) for x in (out, *qkv)), strict=True):
        weights = (q @ k.T).square()
        room = 1.01 * 2**-7 * (weights @ v.abs())  # 2^-8 for rounding the weights, and for out
        if not ((found - weights @ v).abs() <= room).all():
            raise Fault("wrong values")
    return out


@few
@hypothesis.given(
    lengths=st.lists(st.integers(1, 260), min_size=1, max_size=3),
    stages=st.integers(2, 3),
    seed=st.integers(1, 10**6),
)
def test_any_order_gives_the_same_and_right_numbers(lengths, stages, seed):
    out = attend(lengths, stages=stages, seed=seed)
    assert torch.equal(out, attend(lengths, stages=stages, seed=0))


@pytest.mark.parametrize(("old", "new", "said"), [x[1:] for x in FAULTS], ids=[x[0] for x in FAULTS])
def test_planted_fault_is_found(old, new, said):
    module = with_fault(ring, old, new)
    with pytest.raises(Fault, match=said):
        for seed in range(SEEDS):
            attend(LENGTHS, module=module, seed=seed)


def test_a_deadlock_says_who_waits_for_what():
    module = with_fault(ring, "wait(v_empty.index(slot), phase ^ 1)", "wait(v_empty.index(slot), phase)")
    said = r"_produce 2 waits for phase 0 of v_empty\[0\], with 0 of 2 arrivals at line \d+: mbarrier.wait\(v_empty"
    with pytest.raises(Fault, match=f"^deadlock: _consume 0 waits .*; _consume 1 waits .*; {said}"):
        attend(LENGTHS, module=module)


def test_the_ring_is_gluon_for_hopper():
    """What the emulator runs is what the compiler takes."""
    block = f"tensordesc<bf16[64,{HEAD_DIM}],{ring.SHARED.value!r}>"
    types = ["*bf16", "*bf16", "*bf16", block, "*bf16", "*i32", "i32", "constexpr", "constexpr"]
    signature = dict(zip(ring.squares.arg_names, types, strict=True))
    source = GluonASTSource(ring.squares, signature, {(7,): HEAD_DIM, (8,): 2})
    assert "wgmma.mma_async" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@gluon.jit
def _numbers(x_ptr, i_ptr, sixteen_ptr, floats_ptr, ints_ptr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lanes = gl.arange(0, 128, layout=LAYOUT)
    x = gl.load(x_ptr + lanes, mask=lanes < 100, other=-1.5)
    i = gl.load(i_ptr + lanes)
    half = x.to(sixteen_ptr.dtype.element_ty)
    gl.store(sixteen_ptr + lanes, half)
    gl.store(sixteen_ptr + 128 + lanes, half * half + 0.1)
    gl.store(floats_ptr + lanes, half * x - i / 3)
    gl.store(floats_ptr + 128 + lanes, gl.where(x > 0, gl.maximum(x, 0.5), gl.exp2(x)))
    gl.store(floats_ptr + 256, gl.max(x, 0) + gl.sum(i, 0))
    gl.store(ints_ptr + lanes, i // 7)
    gl.store(ints_ptr + 128 + lanes, i % 7)
    gl.store(ints_ptr + 256 + lanes, x.to(gl.int32))
    gl.store(ints_ptr + 384, gl.load(i_ptr) // 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_those_of_torch(dtype):
    x, i = torch.linspace(-9, 9, 128), torch.arange(-64, 64, dtype=torch.int32)
    sixteen, floats, ints = torch.zeros(256, dtype=dtype), torch.zeros(257), torch.zeros(385, dtype=torch.int32)
    run(_numbers, (1,), x, i, sixteen, floats, ints)
    x[100:] = -1.5
    half = x.to(dtype)
    assert torch.equal(sixteen, torch.cat([half, half * half + torch.tensor(0.1, dtype=dtype)]))
    assert torch.equal(floats[:128], half.float() * x - (i.double() / 3).float())
    torch.testing.assert_close(floats[128:256], torch.where(x > 0, x.clamp(min=0.5), x.exp2()))
    assert floats[256] == x.max() + i.sum()
    assert torch.equal(ints, torch.cat([i.div(7, rounding_mode="trunc"), i.fmod(7), x.int(), torch.tensor([-9])]))


@gluon.jit
def _move(source, place, target, to):
    block = gl.allocate_shared_memory(gl.float32, source.block_shape, source.layout)
    landed = mbarrier.allocate_mbarrier()
    mbarrier.init(landed, count=1)
    mbarrier.expect(landed, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, place, landed, block)
    mbarrier.wait(landed, 0)
    tma.async_copy_shared_to_global(target, to, block.reshape(target.block_shape))
    tma.store_wait(0)


@gluon.jit
def _move_block(source, row, column, target, to_row, to_column):
    _move(source, [row, column], target, [to_row, to_column])


@pytest.mark.parametrize(("row", "column"), [(0, 0), (-3, 0), (9, 8), (2, -4), (50, 0)])
def test_tma_reads_0_and_writes_nothing_outside(row, column):
    def blocks(x):
        return TensorDescriptor.from_tensor(x, [8, 8], gl.NVMMASharedLayout(0, 32, 2))

    wide = torch.zeros(80, 80)  # x, with room on all sides
    x, block, target = torch.rand(12, 12) + 1, torch.ones(8, 8), torch.zeros(12, 12)
    wide[10:22, 10:22] = x
    run(_move_block, (1,), blocks(x), row, column, blocks(block), 0, 0)
    assert torch.equal(block, wide[10 + row : 18 + row, 10 + column : 18 + column])
    run(_move_block, (1,), blocks(x), 0, 0, blocks(target), row, column)
    wide[:] = 0
    wide[10 + row : 18 + row, 10 + column : 18 + column] = x[:8, :8]
    assert torch.equal(target, wide[10:22, 10:22])


@gluon.jit
def _move_ragged(source, target, row, stop):
    _move(source, [1 << 30, stop, (1 << 30) - stop + row, 0], target, [0, 0])


def test_rows_behind_the_end_of_a_ragged_descriptor_are_0():
    """Addresses wrap around 2^64 bytes, as in triton.tools.ragged_tma."""
    x, block = torch.rand(20, 8), torch.ones(8, 8)
    shape, strides = [0x7FFF0000, 0x7FFF0000, 1 << 30, 8], [2**34 - 8, 8, 8, 1]
    source = TensorDescriptor(x, shape, strides, [1, 1, 8, 8], gl.NVMMASharedLayout(0, 32, 4))
    target = TensorDescriptor.from_tensor(block, [8, 8], gl.NVMMASharedLayout(0, 32, 2))
    run(_move_ragged, (1,), source, target, 7, 12)
    assert torch.equal(block[:5], x[7:12])
    assert not block[5:].any()


@gluon.jit
def _wrong(out_ptr, block, n, CASE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lanes = gl.arange(0, 128, layout=LAYOUT)
    if CASE == "overflow":
        gl.store(out_ptr, (n * n).to(gl.int64))
    elif CASE == "far":
        gl.store(out_ptr + n, 1)
    elif CASE == "shared element":
        gl.store(out_ptr, 1)
    elif CASE == "element twice":
        gl.store(out_ptr + lanes // 2, lanes)
    elif CASE == "layouts":
        gl.store(out_ptr + lanes, lanes + gl.arange(0, 128, layout=gl.BlockedLayout([4], [32], [4], [0])))
    elif CASE == "warps":
        gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [8], [0]))
    elif CASE == "warps of a slice":
        gl.arange(0, 128, layout=gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [8, 1], [1, 0])))
    elif CASE == "axis":
        gl.store(out_ptr + lanes[:, None], 1)
    elif CASE == "branch":
        if lanes < 3:
            return
    elif CASE == "endless":
        while n > 0:
            n += 0
    elif CASE == "unknown":
        gl.histogram(lanes, 4)
    elif CASE == "shared bytes":
        gl.allocate_shared_memory(gl.float32, [256, 256], block.layout)
    elif CASE == "swizzle":
        gl.allocate_shared_memory(gl.float32, [8, 16], gl.NVMMASharedLayout(128, 32, 2))
    elif CASE == "never written":
        gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(LAYOUT)
    else:
        shared = gl.allocate_shared_memory(gl.float32, block.block_shape, block.layout)
        landed = mbarrier.allocate_mbarrier()
        mbarrier.init(landed, count=1)
        mbarrier.expect(landed, block.block_type.nbytes)
        tma.async_copy_global_to_shared(block, [0, 2 if CASE == "column" else 0], landed, shared)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("overflow", "int32 overflows: 4900000000"), ("far", "elements 70000 to 70000 of a tensor of 128"),
        ("shared element", "race: global memory is written"), ("element twice", "race: one store writes"),
        ("layouts", "convert_layout first"), ("warps", "of 8 warps; the partition has 4"),
        ("axis", r"wanted SliceLayout\(1, ..\)"), ("branch", "decides a branch"), ("endless", "out of time"),
        ("unknown", "histogram is not emulated"), ("shared bytes", "262144 bytes of shared memory"),
        ("swizzle", "swizzled by 128 bytes"), ("never written", "nobody has written"), ("column", "steps of 16 bytes"),
        ("copy", "a copy to shared by the kernel is not waited for"), ("warps of a slice", "of 8 warps; the"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(case, said):
    block = TensorDescriptor.from_tensor(torch.zeros(8, 8), [8, 8], gl.NVMMASharedLayout(0, 32, 2))
    with pytest.raises(Fault, match=said):
        run(_wrong, (2,), torch.zeros(128, dtype=torch.int32), block, 70_000, seconds=0.2, CASE=case)


@gluon.jit
def _write(out_ptr):
    gl.barrier()
    gl.store(out_ptr, 1)


@gluon.jit
def _race(out_ptr):
    gl.warp_specialize([(_write, (out_ptr,)), (_write, (out_ptr,))], [4], [24])


def test_a_seed_repeats_its_order_and_another_has_another():
    def second(seed):
        """Who comes second, which is a race."""
        with pytest.raises(Fault) as raised:
            run(_race, (1,), torch.zeros(1), seed=seed)
        return str(raised.value)

    found = [second(seed) for seed in range(10)]
    assert found == [second(seed) for seed in range(10)]
    assert len(set(found)) == 2
