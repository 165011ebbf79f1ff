"""Runs a Gluon kernel for Hopper on a CPU: its own Python body on numpy, with its partitions as threads.

Triton's interpreter has no Gluon. This is the part of it that our kernels use, with what a GPU does not tell:

- Partitions, copies by TMA and wgmmas go on one at a time, in an order that a seed draws and repeats. A wgmma reads
  shared memory at any moment up to its wait, a copy lands at any moment.
- mbarriers count phases, arrivals and bytes, and a deadlock is told at once, with who waits for what. Vector clocks
  know whether a read or a write of shared memory has waited for those before it: a missing wait is found in any order.
- Shared memory begins as NaN, and is read where it was written only. Integers do not overflow, 16-bit floats are
  rounded, products accumulate in fp32, layouts, shapes and alignments must agree.

Whatever is wrong raises `Fault`. Not modelled: clusters, registers and spills, bank conflicts, and what the compiler
makes of a body; a function of Gluon that is not here raises as well.
"""

import functools
import inspect
import itertools
import linecache
import operator
import random
import types
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from gluon_emulator import shared, tensors
from gluon_emulator.schedule import Fault, Program
from gluon_emulator.tensors import Memory, Span, Tensor, binary, elementwise, reduction

__all__ = ["Fault", "run", "with_fault"]


def run(kernel, grid: tuple[int, ...], *arguments: Any, seed=0, num_warps=4, seconds=60.0, **named: Any) -> None:
    """Runs every program of the grid on CPU tensors, in the order of `seed`, each for `seconds` at most.

    `arguments` and `named` are the kernel's: tensors, numbers, host descriptors and constexprs. Raises Fault.
    """
    memories: dict[Any, Memory] = {}
    names = [p.name for p in kernel.params]
    constants = {p.name for p in kernel.params if p.is_constexpr}
    named = dict(zip(names, arguments, strict=False)) | named
    bound = {name: x if name in constants else _on_device(x, memories) for name, x in named.items()}
    body = emulated(kernel)
    rng = random.Random(seed)
    places = list(itertools.product(*map(range, grid)))
    rng.shuffle(places)
    for i, place in enumerate(places):
        Program(i, place, grid, num_warps, rng).run(lambda: body(**bound), seconds)
    for memory in memories.values():
        memory.write_back()


def _on_device(x: Any, memories: dict[Any, Memory]) -> Any:
    if isinstance(x, TensorDescriptor):
        return shared.Descriptor.of(x, _on_device(x.base, memories))
    if not isinstance(x, torch.Tensor):
        return x if x is None else Tensor(np.float32(x) if isinstance(x, float) else x, tensors.dtype_of(x))
    key = x.untyped_storage().data_ptr(), x.dtype
    if key not in memories:
        memories[key] = Memory(x)
    start = int(x.storage_offset())
    extent = int(x.numel() and 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
    span = Span(memories[key], start, start + extent)
    return Tensor(start, gl.pointer_type(tensors.DTYPES[x.dtype]), None, span)


_globals: dict[int, dict[str, Any]] = {}


@functools.cache
def emulated(function: JITFunction) -> types.FunctionType:
    """The function's own code, with what stands for Gluon in place of its globals."""
    plain, theirs = function.fn, function.fn.__globals__
    if id(theirs) not in _globals:
        ours = _globals[id(theirs)] = {"range": tensors.device_range, "__emulated__": theirs}
        ours.update({name: _replacement(x) for name, x in theirs.items()})
    defaults = tuple(map(_replacement, plain.__defaults__ or ()))
    body = types.FunctionType(plain.__code__, _globals[id(theirs)], plain.__name__, defaults, plain.__closure__)
    body.__kwdefaults__ = {name: _replacement(x) for name, x in (plain.__kwdefaults__ or {}).items()}
    return body


def _replacement(x: Any) -> Any:
    if id(x) in _REPLACEMENTS:
        return _REPLACEMENTS[id(x)]
    if isinstance(x, JITFunction):
        return emulated(x)
    return x.value if isinstance(x, tl.constexpr) else x


class _Module:
    """A module of Gluon: our functions, and its own constants, dtypes and layouts."""

    def __init__(self, module: types.ModuleType, **functions: Any):
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        x = getattr(self._module, name)
        if id(x) not in _REPLACEMENTS and (hasattr(x, "__triton_builtin__") or isinstance(x, JITFunction)):
            raise Fault(f"{self._module.__name__}.{name} is not emulated; add it to tests/gluon_emulator")
        x = _Module(x) if isinstance(x, types.ModuleType) and id(x) not in _REPLACEMENTS else _replacement(x)
        setattr(self, name, x)  # so that the next look-up is short
        return x


def _warp_specialize(functions_and_args, worker_num_warps, worker_num_regs=None):
    (default, arguments), *workers = functions_and_args
    if len(workers) != len(worker_num_warps) or len(worker_num_regs or worker_num_warps) != len(workers):
        raise Fault(f"{len(workers)} workers have warps {worker_num_warps} and registers {worker_num_regs}")
    if any(n % 8 or not 24 <= n <= 256 for n in worker_num_regs or []):
        raise Fault(f"registers of workers are {worker_num_regs}; wanted multiples of 8 from 24 to 256")
    named = []
    for i, ((function, given), num_warps) in enumerate(zip(workers, worker_num_warps, strict=True)):
        if any(isinstance(x, Tensor) and x.layout is not None for x in given):
            raise Fault(f"{function.__name__} is handed a block of registers; wanted scalars and shared memory")
        named.append((f"{function.__name__} {i + 1}", num_warps, functools.partial(function, *given)))
    return Program.current.specialize(f"{default.__name__} 0", functools.partial(default, *arguments), named)


def _static_assert(condition, message=""):
    if not condition:
        raise Fault(f"assertion failed: {message}")


def _cdiv(x, y):
    return (x + (y - 1)) // y


def _zeros(shape, dtype, layout=None):
    return tensors.full(shape, 0, dtype, layout)


def _int32(x):
    return Tensor(x, gl.int32)


_LANGUAGE = {
    "abs": elementwise(np.abs), "ceil": elementwise(np.ceil), "floor": elementwise(np.floor),
    "exp": elementwise(np.exp, wide=True), "exp2": elementwise(np.exp2, wide=True),
    "log": elementwise(np.log, wide=True), "log2": elementwise(np.log2, wide=True),
    "sqrt": elementwise(np.sqrt, wide=True), "rsqrt": elementwise(lambda x: 1 / np.sqrt(x), wide=True),
    "add": binary(operator.add), "sub": binary(operator.sub), "mul": binary(operator.mul),
    "maximum": binary(np.fmax), "minimum": binary(np.fmin), "fma": tensors.fma, "cdiv": _cdiv,
    "max": reduction(np.fmax), "min": reduction(np.fmin), "sum": reduction(np.add),
    "where": tensors.where, "full": tensors.full, "full_like": tensors.full_like, "zeros": _zeros,
    "zeros_like": lambda x, **options: tensors.full_like(x, 0, **options), "arange": tensors.arange,
    "expand_dims": tensors.expand_dims, "convert_layout": tensors.convert_layout, "cast": Tensor.to,
    "load": tensors.load, "store": tensors.store, "static_range": range, "range": tensors.device_range,
    "program_id": lambda axis: _int32(Program.current.place[axis]),
    "num_programs": lambda axis: _int32(Program.current.grid[axis]),
    "num_warps": lambda: Program.current.running.num_warps, "num_ctas": lambda: 1,
    "barrier": lambda **_: Program.current.pause(), "warp_specialize": _warp_specialize,
    "static_assert": _static_assert, "device_assert": _static_assert, "assume": _static_assert,
    "static_print": lambda *_: None, "device_print": lambda *_: None,
    "multiple_of": lambda x, _: x, "max_contiguous": lambda x, _: x, "constexpr": lambda x: x,
    "allocate_shared_memory": shared.allocate_shared_memory,
}  # fmt: skip
_HOPPER = {
    "fence_async_shared": shared.fence_async_shared, "warpgroup_mma": shared.warpgroup_mma,
    "warpgroup_mma_wait": shared.warpgroup_mma_wait,
}  # fmt: skip
_TMA = ("async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait")
_MBARRIER = ("allocate_mbarrier", "arrive", "expect", "init", "invalidate", "wait")
_REPLACEMENTS: dict[int, Any] = {
    id(gl): _Module(gl, **_LANGUAGE),
    id(tl): _Module(tl, **_LANGUAGE),
    id(hopper): _Module(hopper, **_HOPPER),
    id(hopper.tma): _Module(
        hopper.tma, make_tensor_descriptor=shared.Descriptor, **{name: getattr(shared, name) for name in _TMA}
    ),
    id(hopper.mbarrier): _Module(hopper.mbarrier, **{name: getattr(shared, name) for name in _MBARRIER}),
    **{id(getattr(hopper, name)): ours for name, ours in _HOPPER.items()},
}


def with_fault(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """A copy of the module whose source has `new` in place of `old`, which must stand there exactly once."""
    source = inspect.getsource(module)
    if source.count(old) != 1:
        raise ValueError(f"{old!r} is {source.count(old)} times in {module.__name__}; wanted once")
    source = source.replace(old, new)
    copy = types.ModuleType(module.__name__)
    name = f"{module.__name__} with {new!r} for {old!r}"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name  # where Triton reads it
    exec(compile(source, name, "exec"), copy.__dict__)
    return copy
