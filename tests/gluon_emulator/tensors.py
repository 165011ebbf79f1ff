"""Blocks and scalars in registers, and global memory.

Integers do not overflow, 16-bit floats are rounded, types are promoted as by Triton and layouts must agree. An element
of global memory is written by one partition of one program, and is read by nobody else.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.experimental.gluon import language as gl
from triton.language.semantic import TritonSemantic

from gluon_emulator.schedule import Fault, Program

DTYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32, torch.float64: gl.float64,
    torch.int32: gl.int32, torch.int64: gl.int64, torch.uint8: gl.uint8, torch.bool: gl.int1,
}  # fmt: skip
_SEMANTIC = object.__new__(TritonSemantic)  # for its rules of promotion, which need no builder


class Tensor:
    """A block with a layout, or a scalar whose `data` is a number and whose layout is None.

    16-bit floats are held as float32 and integers as int64. A pointer's data are elements of `span`.
    """

    __slots__ = ("data", "dtype", "layout", "span")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data, dtype, layout=None, span=None):
        self.data, self.dtype, self.layout, self.span = data, dtype, layout, span

    @property
    def shape(self):
        return list(np.shape(self.data))

    @property
    def type(self):
        return self.dtype if self.layout is None else gl.distributed_type(self.dtype, self.shape, self.layout)

    def to(self, dtype):
        return Tensor(_cast(self.data, self.dtype, dtype), dtype, self.layout)

    def __bool__(self):
        if self.layout is not None:
            raise Fault(f"a block {self.shape} decides a branch; wanted a scalar")
        Program.current.check_time()
        return bool(self.data)

    def __index__(self):
        return operator.index(self.data)

    def __getitem__(self, key):
        return expand_dims(self, key.index(None))


def dtype_of(x):
    if isinstance(x, bool):
        return gl.int1
    if isinstance(x, int):
        return gl.int32 if -(2**31) <= x < 2**31 else gl.int64
    return gl.float32 if isinstance(x, float) else x.dtype


def _cast(data, old, new):
    if old is new or old == new:
        return data
    block = isinstance(data, np.ndarray)
    if new == gl.int1:
        return data != 0
    if new.is_floating():
        kind = np.float64 if new == gl.float64 else np.float32
        return _fitted(data.astype(kind) if block else kind(data), new)
    return in_range(data.astype(np.int64) if block else int(data), new)


def _rounded(data, dtype):
    rounded = torch.as_tensor(data).to(torch.bfloat16 if dtype == gl.bfloat16 else torch.float16).float()
    return rounded.numpy() if isinstance(data, np.ndarray) else np.float32(rounded.item())


def in_range(data, dtype):
    bits = dtype.primitive_bitwidth
    if bits in (1, 64):
        return data
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype.is_int_signed() else (0, 2**bits)
    smallest, largest = (data.min(), data.max()) if isinstance(data, np.ndarray) else (data, data)
    if smallest < low or largest >= high:
        raise Fault(f"{dtype} overflows: {smallest if smallest < low else largest}")
    return data


def _fitted(data, dtype):
    """What a computation in 32 bits or more leaves of a value."""
    if not dtype.is_floating():
        return in_range(data, dtype)
    return _rounded(data, dtype) if dtype.primitive_bitwidth == 16 else data


@functools.cache
def _promoted(x, x_is_number, y, y_is_number, divides):
    return _SEMANTIC.computation_type_impl(x, x_is_number, y, y_is_number, divides)


def _promote(x, y, divides=False):
    return _promoted(dtype_of(x), not isinstance(x, Tensor), dtype_of(y), not isinstance(y, Tensor), divides)


def _data(x, dtype):
    if isinstance(x, Tensor):
        return _cast(x.data, x.dtype, dtype)
    return _cast(x, gl.float64 if dtype.is_floating() else dtype_of(x), dtype)


def _same_layout(*values):
    """The layout of the blocks among the values, which must agree."""
    blocks = [x for x in values if isinstance(x, Tensor) and x.layout is not None]
    known = [x for x in blocks if not isinstance(x.layout, gl.AutoLayout)] or blocks
    for x in blocks:
        if np.ndim(x.data) != np.ndim(blocks[0].data):
            raise Fault(f"blocks of shapes {blocks[0].shape} and {x.shape} meet; expand_dims first")
    for x in known:
        if x.layout is not known[0].layout and x.layout != known[0].layout:
            raise Fault(f"layouts {known[0].layout} and {x.layout} meet; convert_layout first")
    return known[0].layout if known else None


def binary(function, divides=False, compares=False):
    def apply(x, y):
        if _is_pointer(x) or _is_pointer(y):
            return _moved(function, x, y)
        dtype = _promote(x, y, divides)
        if function is operator.truediv and not dtype.is_floating():
            dtype = gl.float32
        layout, data = _same_layout(x, y), function(_data(x, dtype), _data(y, dtype))
        return Tensor(data, gl.int1, layout) if compares else Tensor(_fitted(data, dtype), dtype, layout)

    return apply


def _is_pointer(x):
    return isinstance(x, Tensor) and x.span is not None


def _moved(function, x, y):
    """A pointer plus or minus elements."""
    pointer, offset = (x, y) if _is_pointer(x) else (y, x)
    moved_by = dtype_of(offset)
    if function not in (operator.add, operator.sub) or not moved_by.is_int():
        raise Fault(f"a pointer and {moved_by} meet in {function.__name__}; wanted + or - of integers")
    data = function(pointer.data, offset.data if isinstance(offset, Tensor) else offset)
    return Tensor(data, pointer.dtype, _same_layout(pointer, offset), pointer.span)


def _quotient(x, y):
    """Of integers, rounded to zero as in C."""
    quotient, is_negative = abs(x) // abs(y), (x < 0) != (y < 0)
    if isinstance(quotient, np.ndarray):
        return np.where(is_negative, -quotient, quotient)
    return -quotient if is_negative else quotient


def _remainder(x, y):
    return x - _quotient(x, y) * y


def _define_operators():
    plain = {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_, "or": operator.or_,
        "xor": operator.xor, "lshift": operator.lshift, "rshift": operator.rshift,
    }  # fmt: skip
    operators = {name: binary(function) for name, function in plain.items()}
    for name, function in {"truediv": operator.truediv, "floordiv": _quotient, "mod": _remainder}.items():
        operators[name] = binary(function, divides=True)
    for name, apply in operators.items():
        setattr(Tensor, f"__{name}__", apply)
        setattr(Tensor, f"__r{name}__", lambda x, y, apply=apply: apply(y, x))
    unary = {
        "neg": lambda x: operators["sub"](0, x),
        "invert": lambda x: operators["xor"](x, True if x.dtype == gl.int1 else -1),
    }
    for name, apply in unary.items():
        setattr(Tensor, f"__{name}__", apply)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Tensor, f"__{name}__", binary(getattr(operator, name), compares=True))


_define_operators()


def elementwise(function, *, wide=False):
    """`wide` functions are of fp32 and fp64 alone."""

    def apply(x):
        if wide and x.dtype not in (gl.float32, gl.float64):
            raise Fault(f"{function.__name__} of {x.dtype}; wanted float32")
        return Tensor(_fitted(function(x.data), x.dtype), x.dtype, x.layout)

    return apply


def reduction(function):
    def reduce(x, axis: Any = None, keep_dims=False):
        dtype = gl.float32 if x.dtype == gl.bfloat16 else x.dtype
        data = _fitted(function.reduce(x.data, axis=axis), dtype)
        if np.ndim(data) == 0:
            return Tensor(data, dtype)
        reduced = Tensor(data, dtype, gl.SliceLayout(axis, x.layout))
        return expand_dims(reduced, axis) if keep_dims else reduced

    return reduce


def expand_dims(x, axis):
    layout = x.layout
    if not isinstance(layout, gl.AutoLayout):
        if not isinstance(layout, gl.SliceLayout) or layout.dim != axis:
            raise Fault(f"axis {axis} is added to a block of layout {layout}; wanted SliceLayout({axis}, ..)")
        layout = layout.parent
    return Tensor(np.expand_dims(x.data, axis), x.dtype, layout, x.span)


def where(condition, x, y):
    dtype, layout = _promote(x, y), _same_layout(condition, x, y)
    x, y = _data(x, dtype), _data(y, dtype)
    if layout is None:
        return Tensor(x if condition else y, dtype)
    return Tensor(np.where(_data(condition, gl.int1), x, y), dtype, layout)


def fma(x, y, z):
    dtype = _promote(x, y)
    exact = _data(x, gl.float64) * _data(y, gl.float64) + _data(z, gl.float64)
    return Tensor(_cast(exact, gl.float64, dtype), dtype, _same_layout(x, y, z))


def full(shape, value, dtype, layout=None):
    shape = [int(n) for n in shape]
    layout = gl.AutoLayout() if layout is None else layout
    check_block(shape, layout)
    value = _data(value, dtype)
    kind = bool if dtype == gl.int1 else np.int64 if dtype.is_int() else np.asarray(value).dtype
    return Tensor(np.full(shape, value, kind), dtype, layout)


def full_like(x, value, shape=None, dtype=None, layout=None):
    return full(shape or x.shape, value, dtype or x.dtype, layout or x.layout)


def arange(start, end, layout=None):
    layout = gl.AutoLayout() if layout is None else layout
    check_block((end - start,), layout)
    return Tensor(np.arange(start, end, dtype=np.int64), gl.int32, layout)


def convert_layout(x, layout, assert_trivial=False):
    check_block(x.shape, layout)
    return Tensor(x.data, x.dtype, layout, x.span)


def device_range(*limits, **_):
    """Counts in int32 scalars, as a loop of the device does; `gl.static_range` counts in numbers."""
    return (Tensor(i, gl.int32) for i in range(*map(int, limits)))


def check_block(shape, layout):
    if not isinstance(layout, gl.AutoLayout):
        _check_layout(tuple(shape), layout, Program.current.running.num_warps)


@functools.cache
def _check_layout(shape, layout, num_warps):
    if any(n & (n - 1) for n in shape) or len(shape) != layout.rank:
        raise Fault(f"a block {shape} has layout {layout}; wanted powers of two, and as many as the layout has")
    while isinstance(layout, (gl.SliceLayout, gl.DotOperandLayout)):
        layout = layout.parent
    warps = getattr(layout, "warps_per_cta", None)
    if warps is not None and math.prod(warps) != num_warps:
        raise Fault(f"{layout} is of {math.prod(warps)} warps; the partition has {num_warps}")
    if isinstance(layout, gl.NVMMADistributedLayout):
        _, n, k = layout.instr_shape
        if layout.version != [3, 0] or layout.instr_shape[0] != 16 or n % 8 or not 8 <= n <= 256 or k not in (8, 16):
            raise Fault(f"{layout}; wanted version [3, 0] and instr_shape [16, a multiple of 8 up to 256, 16]")
    if isinstance(layout, gl.BlockedLayout) and math.prod(layout.threads_per_warp) != 32:
        raise Fault(f"{layout} is of {math.prod(layout.threads_per_warp)} threads a warp; wanted 32")


class Memory:
    """The storage of a tensor as numpy, and which partition of which program has written its elements."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.is_16_bit = tensor.dtype in (torch.bfloat16, torch.float16)
        self.values = (self.tensor.float() if self.is_16_bit else self.tensor).numpy()
        self.owners = np.zeros(self.values.shape, np.int32)
        self.is_written = False

    def check(self, owners, owner: int, verb: str) -> None:
        if self.is_written and ((owners != owner) & (owners != 0)).any():
            raise Fault(f"race: global memory is {verb} that another partition or program has written")

    def write_back(self) -> None:
        if self.is_16_bit and self.is_written:
            self.tensor.copy_(torch.from_numpy(self.values))


class Span(NamedTuple):
    """The elements of a memory that a tensor covers."""

    memory: Memory
    low: int
    high: int


def _touched(pointer, mask):
    """The elements that a load or store touches, and where among the pointers they are."""
    if not _is_pointer(pointer):
        raise Fault(f"{pointer.dtype} is used as a pointer")
    _same_layout(pointer, mask)
    indices = np.asarray(pointer.data)
    mask = np.broadcast_to(True if mask is None else _data(mask, gl.int1), indices.shape)
    touched, (_, low, high) = indices[mask], pointer.span
    if touched.size and (touched.min() < low or touched.max() >= high):
        raise Fault(f"elements {touched.min() - low} to {touched.max() - low} of a tensor of {high - low} are touched")
    return touched, mask


def load(pointer, mask=None, other=None, **_):
    touched, mask = _touched(pointer, mask)
    dtype, memory = pointer.dtype.element_ty, pointer.span.memory
    memory.check(memory.owners[touched], Program.current.running.owner, "read")
    poison = float("nan") if dtype.is_floating() else dtype.primitive_bitwidth > 1 and 99
    data = np.broadcast_to(_data(poison if other is None else other, dtype), mask.shape).copy()
    data[mask] = memory.values[touched]
    if data.ndim == 0:
        return Tensor(data[()] if dtype.is_floating() else data.item(), dtype)
    return Tensor(data, dtype, pointer.layout)


def store(pointer, value, mask=None, **_):
    touched, mask = _touched(pointer, mask)
    _same_layout(pointer, value)
    memory, owner = pointer.span.memory, Program.current.running.owner
    memory.check(memory.owners[touched], owner, "written")
    data = np.broadcast_to(_data(value, pointer.dtype.element_ty), mask.shape)[mask]
    memory.values[touched], memory.owners[touched] = data, owner
    if not np.array_equal(memory.values[touched], data, equal_nan=data.dtype.kind == "f"):
        raise Fault("race: one store writes several values to one element")
    memory.is_written = True
