"""Shared memory and what reads and writes it beside the threads: mbarriers, copies by TMA, wgmmas.

A read must have waited for the writes before it, a write for the reads and writes before it; vector clocks know. What
threads have stored needs a fence before a wgmma or TMA reads it. Source: the PTX ISA's asynchronous operations and
proxies, docs.nvidia.com/cuda/parallel-thread-execution.
"""

import linecache
import math
import operator
import re
import traceback
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator.schedule import Clock, Fault, Partition, Program, is_kernel, join
from gluon_emulator.tensors import Tensor, check_block, in_range

SHARED_BYTES = 232_448  # what a program may have on sm_90
Box = tuple[tuple[int, int], ...]  # start and stop along each axis of an allocation


@dataclass
class _Access:
    """A read or write of a box. It is over for who has seen `count` events of `component`."""

    box: Box
    component: Any
    count: int
    what: str
    is_fenced: bool = True


def _overlap(a: Box, b: Box) -> bool:
    return all(x[0] < y[1] and y[0] < x[1] for x, y in zip(a, b, strict=True))


def _contains(a: Box, b: Box) -> bool:
    return all(x[0] <= y[0] and y[1] <= x[1] for x, y in zip(a, b, strict=True))


def _assigned_name() -> str:
    """What the kernel's line that allocates shared memory assigns it to."""
    frame = next(frame for frame, _ in traceback.walk_stack(None) if is_kernel(frame))
    assigned = re.match(r"\s*(\w+)(:.*?)? =", linecache.getline(frame.f_code.co_filename, frame.f_lineno))
    return assigned[1] if assigned else "shared memory"


class _Allocation:
    def __init__(self, dtype, shape, layout):
        self.name, self.dtype, self.layout = _assigned_name(), dtype, layout
        self.num_bytes = math.prod(shape) * dtype.primitive_bitwidth // 8
        kind = np.float64 if dtype == gl.float64 else np.float32 if dtype.is_floating() else np.int64
        self.data = np.full(shape, np.nan if dtype.is_floating() else 99, kind)
        self.written = np.zeros(shape, bool)
        self.reads: dict[Any, _Access] = {}
        self.writes: dict[Box, _Access] = {}
        self.barriers: dict[Box, _Barrier] = {}

    def check_end(self, partition: Partition) -> None:
        for access in self.writes.values():
            if not partition.has_seen(access.component, access.count):
                raise Fault(f"{access.what} is not waited for at the end")


class Shared:
    """A view of an allocation: a shared memory descriptor."""

    def __init__(self, allocation, array, box, axes, layout, name):
        self.allocation, self.array, self.box, self.axes = allocation, array, box, axes
        self.layout, self.name = layout, name
        self.slices = tuple(slice(*side) for side in box)

    @property
    def dtype(self):
        return self.allocation.dtype

    @property
    def shape(self):
        return list(self.array.shape)

    def _narrowed(self, axis, start, stop):
        """The box with one side of the view cut to start:stop."""
        if self.axes[axis] is None or not 0 <= start < stop <= self.shape[axis]:
            raise Fault(f"{self.name} {self.shape} is cut to {start}:{stop} along axis {axis}")
        low, box = self.box[self.axes[axis]][0], list(self.box)
        box[self.axes[axis]] = (low + start, low + stop)
        return tuple(box)

    def index(self, index):
        i = operator.index(index)
        box = self._narrowed(0, i, i + 1)
        return Shared(self.allocation, self.array[i], box, self.axes[1:], self.layout, f"{self.name}[{i}]")

    def slice(self, start, length, dim=0):
        box = self._narrowed(dim, start, start + length)
        array = self.array[(slice(None),) * dim + (slice(start, start + length),)]
        return Shared(self.allocation, array, box, self.axes, self.layout, self.name)

    def permute(self, order):
        layout = self.layout
        if tuple(order) == (1, 0) and isinstance(layout, gl.NVMMASharedLayout):
            layout = replace(layout, transposed=not layout.transposed)
        elif list(order) != sorted(order):
            raise Fault(f"{self.name} is permuted by {order}; wanted (1, 0)")
        axes = tuple(self.axes[i] for i in order)
        return Shared(self.allocation, self.array.transpose(order), self.box, axes, layout, self.name)

    def reshape(self, shape):
        """Adds or drops sides of length 1."""
        if [n for n in shape if n > 1] != [n for n in self.shape if n > 1]:
            raise Fault(f"{self.name} {self.shape} is reshaped to {shape}; wanted other sides of length 1 alone")
        layout = self.layout
        if isinstance(layout, gl.NVMMASharedLayout):
            layout = replace(layout, rank=len(shape))
        long = iter([axis for axis, n in zip(self.axes, self.shape, strict=True) if n > 1])
        axes = tuple(next(long) if n > 1 else None for n in shape)
        return Shared(self.allocation, self.array.reshape(shape), self.box, axes, layout, self.name)

    def load(self, layout):
        partition = Program.current.pause()
        check_block(self.shape, layout)
        self.begin_read(partition, partition, partition.clock[partition], is_async=False)
        return Tensor(self.array.copy(), self.dtype, layout)

    def store(self, value):
        partition = Program.current.pause()
        if value.dtype != self.dtype or value.shape != self.shape:
            raise Fault(f"{value.dtype} {value.shape} is stored in {self.name}, {self.dtype} {self.shape}")
        self.begin_write(partition, partition, partition.clock[partition], "a store", is_async=False)
        self.array[...] = value.data

    def begin_read(self, partition, component, count, *, is_async):
        allocation = self.allocation
        for write in allocation.writes.values():
            if _overlap(write.box, self.box):
                self._check_seen(partition, write, "reads", is_async)
        if not allocation.written[self.slices].all():
            raise Fault(f"{partition.name} reads {self.name}, parts of which nobody has written")
        what = f"a read of {self.name} by {partition.name}"
        allocation.reads[self.box, component] = _Access(self.box, component, count, what)

    def begin_write(self, partition, component, count, what, *, is_async):
        allocation = self.allocation
        for access in (*allocation.reads.values(), *allocation.writes.values()):
            if _overlap(access.box, self.box):
                self._check_seen(partition, access, "writes", is_async)
        allocation.reads = {key: x for key, x in allocation.reads.items() if not _contains(self.box, x.box)}
        allocation.writes = {key: x for key, x in allocation.writes.items() if not _contains(self.box, x.box)}
        what = f"{what} to {self.name} by {partition.name}"
        allocation.writes[self.box] = _Access(self.box, component, count, what, is_fenced=is_async)
        allocation.written[self.slices] = True

    def _check_seen(self, partition, access, verb, is_async):
        if not partition.has_seen(access.component, access.count):
            raise Fault(f"race: {partition.name} {verb} {self.name} and has not waited for {access.what}")
        if is_async and not access.is_fenced:
            raise Fault(f"a wgmma or TMA {verb} {self.name} after {access.what}; wanted fence_async_shared between")


def allocate_shared_memory(element_ty, shape, layout, value=None):
    program = Program.current
    shape = [int(n) for n in shape]
    if program.running is not program.partitions[0] or len(program.partitions) > 1:
        raise Fault("shared memory is allocated in a partition; wanted in the kernel")
    allocation = _Allocation(element_ty, shape, layout)
    check_shared_layout(layout, shape, element_ty)
    program.allocations.append(allocation)
    total = sum(x.num_bytes for x in program.allocations)
    if total > SHARED_BYTES:
        raise Fault(f"{total} bytes of shared memory with {allocation.name}; wanted at most {SHARED_BYTES}")
    box = tuple((0, n) for n in shape)
    view = Shared(allocation, allocation.data, box, tuple(range(len(shape))), layout, allocation.name)
    if value is not None:
        view.store(value)
    return view


def check_shared_layout(layout, shape, dtype):
    if not isinstance(layout, gl.NVMMASharedLayout):
        return
    bits, swizzle = dtype.primitive_bitwidth, layout.swizzle_byte_width
    block = shape[-layout.rank :]
    row = block[0 if layout.transposed else -1] * bits // 8
    if layout.element_bitwidth != bits or len(block) != layout.rank:
        raise Fault(f"{dtype} {shape} has layout {layout}; wanted its bits and rank")
    if swizzle and (row % swizzle or math.prod(block) * bits // 8 % (8 * swizzle)):
        raise Fault(f"a block {block} of {dtype} is swizzled by {swizzle} bytes; wanted 8 rows of that at least")


def fence_async_shared(cluster=False):
    partition = Program.current.running
    for allocation in Program.current.allocations:
        for write in allocation.writes.values():
            write.is_fenced |= partition.has_seen(write.component, write.count)


class _Barrier:
    def __init__(self, name, count):
        self.name, self.count, self.num_pending = name, count, count
        self.num_bytes = self.num_complete = 0
        self.clock: Clock = {}  # what is known to be over once the last complete phase is
        self.next_clock: Clock = {}

    def __str__(self):
        come = self.count - self.num_pending
        bytes_left = f" and {self.num_bytes} bytes to land" if self.num_bytes else ""
        return f"phase {self.num_complete} of {self.name}, with {come} of {self.count} arrivals{bytes_left}"

    def arrive(self, partition, count, num_bytes=0):
        if count > self.num_pending:
            raise Fault(f"{partition.name} arrives once too often in {self}")
        partition.release(self.next_clock)
        self.num_pending -= count
        self.num_bytes += num_bytes
        self._advance()

    def land(self, num_bytes, phase):
        self.num_bytes -= num_bytes
        if phase != self.num_complete or (self.num_bytes < 0 and not self.num_pending):
            raise Fault(f"{num_bytes} bytes land that phase {phase} of {self.name} does not expect")
        self._advance()

    def _advance(self):
        if not self.num_pending and not self.num_bytes:
            self.num_complete += 1
            self.num_pending = self.count
            join(self.clock, self.next_clock)
            self.clock[self] = self.num_complete


def _barrier(view) -> _Barrier:
    barrier = view.allocation.barriers.get(view.box)
    if barrier is None:
        raise Fault(f"{view.name} is used as an mbarrier; wanted mbarrier.init before")
    return barrier


def init(mbarrier, count):
    if mbarrier.dtype != gl.int64 or math.prod(mbarrier.shape) != 1 or mbarrier.box in mbarrier.allocation.barriers:
        raise Fault(f"mbarrier.init of {mbarrier.name}, {mbarrier.dtype} {mbarrier.shape}; wanted one int64, once")
    mbarrier.allocation.barriers[mbarrier.box] = _Barrier(mbarrier.name, count)


def invalidate(mbarrier):
    _barrier(mbarrier)
    del mbarrier.allocation.barriers[mbarrier.box]


def allocate_mbarrier(batch=None):
    shape = [1] if batch is None else [batch, 1]
    return allocate_shared_memory(gl.int64, shape, gl.nvidia.hopper.mbarrier.MBarrierLayout())


def arrive(mbarrier, *, count=1, pred=True):
    partition = Program.current.pause()
    if pred:
        _barrier(mbarrier).arrive(partition, count)


def expect(mbarrier, bytes_per_cta, pred=True):
    partition = Program.current.pause()
    if pred:
        _barrier(mbarrier).arrive(partition, 1, bytes_per_cta)


def wait(mbarrier, phase, pred=True, deps=()):
    barrier, phase = _barrier(mbarrier), operator.index(phase)
    if phase not in (0, 1):
        raise Fault(f"a wait for phase {phase} of {mbarrier.name}; wanted its parity, 0 or 1")
    if pred:
        partition = Program.current.pause(lambda: barrier.num_complete % 2 != phase, lambda: str(barrier))
        join(partition.clock, barrier.clock)


class Descriptor:
    """A tensor that TMA reads and writes in blocks."""

    def __init__(self, base, shape, strides, block_shape, layout, padding_option="zero"):
        self.shape, self.strides, self.block_shape = ([int(n) for n in x] for x in (shape, strides, block_shape))
        self.dtype, self.layout, self.span, self.start = base.dtype.element_ty, layout, base.span, base.data
        self.block_type = gl.block_type(self.dtype, self.block_shape)
        self.nbytes_per_cta = self.block_type.nbytes
        self.padding = float("nan") if padding_option == "nan" else 0
        self._check()

    @classmethod
    def of(cls, descriptor: TensorDescriptor, base: Tensor):
        shapes = (descriptor.shape, descriptor.strides, descriptor.block_shape)
        return cls(base, *shapes, descriptor.layout, descriptor.padding)

    def _check(self):
        size = self.dtype.primitive_bitwidth // 8
        if len({len(self.shape), len(self.strides), len(self.block_shape)}) != 1 or self.strides[-1] != 1:
            raise Fault(f"a descriptor of {self.shape} has strides {self.strides}; wanted as many, and the last 1")
        if self.start * size % 16 or any(n * size % 16 or n * size >= 2**40 for n in self.strides[:-1]):
            raise Fault(
                f"a descriptor starts at byte {self.start * size}, strides {self.strides}; wanted 16-byte steps"
            )
        if any(n > 256 for n in self.block_shape) or self.block_shape[-1] * size < 16:
            raise Fault(f"TMA copies blocks {self.block_shape}; wanted at most 256 a side, and 16 bytes a row")
        check_shared_layout(self.layout, self.block_shape, self.dtype)

    def _inside(self, place):
        """Of the part of a block that lies in the tensor: slices of the block, and views of values and owners."""
        (memory, low, high), first, part, sides = self.span, self.start, [], []
        for start, size, limit, stride in zip(place, self.block_shape, self.shape, self.strides, strict=True):
            begin = min(max(start, 0), limit)
            end = max(begin, min(start + size, limit))
            part.append(slice(begin - start, end - start))
            sides.append((end - begin, stride if end - begin > 1 else 0))
            first += begin * stride
        # Addresses wrap around 2^64 bytes, which ragged descriptors rely on.
        first %= 2**67 // self.dtype.primitive_bitwidth
        last = first + sum((n - 1) * stride for n, stride in sides)
        if all(n for n, _ in sides) and not low <= first <= last < high:
            raise Fault(f"TMA at {place} touches elements {first - low} to {last - low} of a tensor of {high - low}")
        extents, strides = zip(*sides, strict=True)
        views = (
            as_strided(x[first:], extents, np.multiply(strides, x.itemsize)) for x in (memory.values, memory.owners)
        )
        return tuple(part), *views

    def read(self, place, out):
        part, values, owners = self._inside(place)
        self.span.memory.check(owners, 0, "read")
        out[...] = self.padding
        out[part] = values

    def write(self, place, block, owner):
        part, values, owners = self._inside(place)
        self.span.memory.check(owners, owner, "written")
        values[...], owners[...] = block[part], owner
        self.span.memory.is_written = True

    def place(self, coordinates, view):
        """Coordinates as numbers, checked as the view is."""
        place = [in_range(operator.index(n), gl.int32) for n in coordinates]
        # Triton's sanitizer of illegal instructions wants the last coordinate so, too.
        if len(place) != len(self.shape) or place[-1] * self.dtype.primitive_bitwidth % 128:
            raise Fault(f"TMA at {place} of {self.shape}; wanted as many, and the last in steps of 16 bytes")
        for name, wanted in (("shape", self.block_shape), ("dtype", self.dtype), ("layout", self.layout)):
            if getattr(view, name) != wanted:
                raise Fault(f"TMA of blocks of {name} {wanted} meets {view.name} of {name} {getattr(view, name)}")
        return place


@dataclass(eq=False)
class _Copy:
    """A load by TMA, which lands at any moment."""

    descriptor: Descriptor
    place: list[int]
    view: Shared
    barrier: _Barrier
    phase: int

    def land(self):
        self.descriptor.read(self.place, self.view.array)
        self.barrier.land(self.descriptor.block_type.nbytes, self.phase)


@dataclass
class _Store:
    descriptor: Descriptor
    place: list[int]
    view: Shared
    owner: int

    def land(self):
        self.descriptor.write(self.place, self.view.array, self.owner)


def async_copy_global_to_shared(tensor_desc, coord, barrier, result, pred=True, multicast=False):
    partition = Program.current.pause()
    if not pred:
        return
    place, landing = tensor_desc.place(coord, result), _barrier(barrier)
    # Over for whoever has seen the phase of the barrier complete in which the copy lands.
    result.begin_write(partition, landing, landing.num_complete + 1, "a copy", is_async=True)
    Program.current.copies.append(_Copy(tensor_desc, place, result, landing, landing.num_complete))


def async_copy_shared_to_global(tensor_desc, coord, src):
    partition = Program.current.pause()
    number = partition.stores.issue(_Store(tensor_desc, tensor_desc.place(coord, src), src, partition.owner))
    src.begin_read(partition, partition.stores, number, is_async=True)


def store_wait(pendings):
    partition = Program.current.running
    partition.wait(partition.stores, pendings)


class Mma:
    """A wgmma under way, in place of its result until a wait has covered it."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool):
        self.shape, self.layout, self.number = acc.shape, acc.layout, 0
        self.a, self.b, self.acc = a if isinstance(a, Shared) else a.data, b, None
        if use_acc:
            self.acc = acc if isinstance(acc, Mma) else acc.data
        self.result: Any = None

    def land(self):
        self.result = (self.a.array if isinstance(self.a, Shared) else self.a) @ self.b.array
        if self.acc is not None:
            self.result += self.acc.result if isinstance(self.acc, Mma) else self.acc

    def early(self, *_):
        raise Fault("the result of a wgmma under way is read; wanted what a warpgroup_mma_wait that covers it returns")

    __getattr__ = __bool__ = __getitem__ = __neg__ = early


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge"):
    setattr(Mma, f"__{_name}__", Mma.early)


def _check_mma(partition, a, b, acc):
    layout = acc.layout
    if partition.num_warps % 4 or not isinstance(layout, gl.NVMMADistributedLayout):
        raise Fault(
            f"wgmma of {partition.num_warps} warps into {layout}; wanted whole warpgroups, NVMMADistributedLayout"
        )
    if not isinstance(b, Shared) or not (isinstance(a, Shared) or a.layout == gl.DotOperandLayout(0, layout, 2)):
        raise Fault(
            f"wgmma of {a.layout} and {b.layout}; wanted shared memory, or for a DotOperandLayout(0, {layout}, 2)"
        )
    of_fp32 = isinstance(acc, Mma) or acc.dtype == gl.float32
    if a.dtype != b.dtype or a.dtype not in (gl.bfloat16, gl.float16) or not of_fp32:
        raise Fault(f"wgmma of {a.dtype} and {b.dtype}; wanted bfloat16 or float16, into float32")
    (m, n), k = acc.shape, a.shape[1]
    rows, columns = (16 * layout.warps_per_cta[0], layout.instr_shape[1] * layout.warps_per_cta[1])
    if a.shape != [m, k] or b.shape != [k, n] or m % rows or n % columns or k % 16 or layout.instr_shape[2] != 16:
        raise Fault(f"wgmma of {a.shape} and {b.shape} into {acc.shape} by {layout}")
    for operand in (a, b):
        if isinstance(operand, Shared) and not getattr(operand.layout, "swizzle_byte_width", 0):
            raise Fault(f"wgmma reads {operand.name} of {operand.layout}; wanted a swizzled NVMMASharedLayout")


def warpgroup_mma(a, b, acc, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
    partition = Program.current.pause()
    _check_mma(partition, a, b, acc)
    mma = Mma(a, b, acc, bool(use_acc))
    mma.number = partition.mmas.issue(mma)
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.begin_read(partition, partition.mmas, mma.number, is_async=True)
    return mma if is_async else warpgroup_mma_wait(0, [mma])


def warpgroup_mma_wait(num_outstanding=0, deps=()):
    partition = Program.current.running
    partition.wait(partition.mmas, num_outstanding)
    over = partition.mmas.num_over
    results = [Tensor(x.result, gl.float32, x.layout) if isinstance(x, Mma) and x.number <= over else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)
