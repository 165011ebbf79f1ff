"""What code does on a fake GPU: operators it queues, where it waits, memory it holds, Triton's launches, collectives.

A `Tracer` is a dispatch mode under which tensors on "cuda" have shapes and no numbers (torch's FakeTensor), and those
on the CPU are real. The bodies of this project's own operators run, so that what they queue is seen. What comes back
from the device is ones, or `answer` for a number.
"""

import functools
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fake_gpu.device import Stream

FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one for the process, whose caches keep tensors from run to run
SM_90 = make_backend(GPUTarget("cuda", 90, 32))
ALIGNMENT = 16  # bytes: what the widest load wants
BLOCK_OF_MEMORY = 512  # torch's allocator rounds up to it
# They queue nothing: memory that is given out, and shapes that change without being marked as views.
FREE = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
    "record_stream", "resize_", "set_",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A Triton kernel, what Triton compiles it for, and its pointers that are not aligned."""

    kernel: str
    grid: tuple[int, ...]
    variant: str
    misaligned: tuple[str, ...]


@dataclass
class DryRun:
    """What was seen while it was recorded. A scope is ("forward", block) or the like, or a phase."""

    # Names of the operators that queued work: by scope, one counter for each time that it was entered.
    queued: dict[Any, list[Counter[str]]] = field(default_factory=lambda: defaultdict(list))
    waits: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # "file:function" by phase
    unwaited: dict[str, str] = field(default_factory=dict)  # phases that a clock closed over work not done: the last
    collectives: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # bytes by moment
    owners: dict[str, dict[str, int]] = field(default_factory=dict)  # of the bytes at each peak, by line
    at_start: int = 0  # bytes
    planned: dict[str, float] = field(default_factory=dict)  # bytes by moment, as plan counts them

    @property
    def syncs(self) -> Counter[str]:
        """All waits of the host for the device, by file and function."""
        return sum(self.waits.values(), Counter())

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values(), default=0)

    def misplanned(self, most: float) -> dict[str, tuple[float, float]]:
        """GB of plan and of what was held, of moments where plan says less, and of the peak where it says more than
        `most` times it.
        """
        packs = self.peaks["pack"] - self.at_start  # megabytes of token ids and offsets, which plan leaves out
        found = {}
        for moment, planned in {**self.planned, "peak": max(self.planned.values())}.items():
            tracked = (self.peak_bytes if moment == "peak" else self.peaks[moment]) - packs
            is_over = moment == "peak" and planned > most * tracked
            if planned < 0.999 * tracked or is_over:  # a pack's log-probs and the allocator's rounding are below that
                found[moment] = planned / 1e9, tracked / 1e9
        return found

    @property
    def kernels(self) -> Counter[str]:
        """All operators that queued work, by name."""
        return sum((names for passes in self.queued.values() for names in passes), Counter())

    @property
    def kernels_per_block(self) -> dict[str, Counter[str]]:
        """Of the last pass through the second block: the first and the last block have the embedding's and the head's
        work, and only from the second micro-batch on are there gradients to add to.
        """
        ways = ("forward", "backward", "scoring")
        return {way: self.queued[way, 1][-1] for way in ways if (way, 1) in self.queued}

    @property
    def variants(self) -> dict[str, set[str]]:
        """What Triton would have compiled, by kernel."""
        found = defaultdict(set)
        for launch in self.launches:
            found[launch.kernel].add(launch.variant)
        return dict(found)


class Tracer(TorchDispatchMode):
    """One must see a model both made and used, since it knows tensors by their storages."""

    def __init__(self, answer: float = 1e9):
        super().__init__()
        self.answer = answer  # of a number that the host reads: by 1e9 rows of a chunk count as live
        self.run = DryRun()
        self.phase = "none"  # of a clock
        self.enter(self.phase)
        self.paused = False
        self.pending = ""  # the last operator that nobody has waited for
        self.live: dict[int, tuple[int, str]] = {}  # bytes and owner of every storage
        self.bytes_now = 0
        self.owners: Counter[str] = Counter()
        self.bodies = _own_operators()

    def enter(self, moment: str, scope: Any = None) -> None:
        """From here on what is seen belongs to `moment`, and to `scope`."""
        self.moment, self.scope = moment, scope or moment
        self.names: Counter[str] = Counter()
        self.run.queued[self.scope].append(self.names)

    @contextmanager
    def on(self) -> Iterator[None]:
        """What is done under it is done on the fake GPU."""
        lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes as a copy, which is seen
        try:
            with self, _watched(self):
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lift)

    @contextmanager
    def record(self) -> Iterator[DryRun]:
        """What is done under it goes into a record of its own."""
        before, self.run = self.run, DryRun(at_start=self.bytes_now)
        self.pending = ""
        self.enter(self.phase)
        self._note_peak()
        try:
            yield self.run
        finally:
            self.run = before
            self.enter(self.phase)

    def waited(self, where: str = "") -> None:
        """The host has waited for all that is queued."""
        self.run.waits[self.phase][where or _place()] += 1
        self.pending = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its local tensor comes next
        if self.paused or not _on_gpu(args, kwargs):
            return func(*args, **kwargs)
        name = func.name()
        if name in self.bodies:
            return self._own(name, args, kwargs)
        short = func.overloadpacket.__name__
        if short in _SPECIAL:
            return getattr(self, _SPECIAL[short])(func, *args, **kwargs)
        # Only those under which autograd is off, as in an operator's body, come here whole.
        if short not in FREE and _is_composite(name):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        with FAKE:
            found = func(*args, **kwargs)
        self._queue(func, name, short, args)
        self._hold(found)
        return found

    def _own(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name == "flashgrpo::linear_grpo_loss":
            self.enter("loss", "head")
        with self:
            return self.bodies[name](*args, **kwargs)

    def _queue(self, func: Any, name: str, short: str, args: tuple) -> None:
        if name.startswith(("c10d::", "_c10d_functional::")):
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.run.collectives.append(" ".join([short, *(f"{x.dtype}{[*x.shape]}" for x in tensors)]))
        elif short in FREE or name.startswith(("prim::", "profiler::")) or _is_view(func):
            return
        self.names[name] += 1
        self.pending = name

    # Memory

    def _hold(self, found: Any) -> None:
        for x in tree_leaves(found):
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                storage = x.untyped_storage()
                if storage._cdata not in self.live:
                    weakref.finalize(storage, self.resized, storage._cdata, None).atexit = False
                    self.live[storage._cdata] = 0, _place(self.moment)
                self.resized(storage._cdata, storage.nbytes())

    def resized(self, key: int, num_bytes: int | None) -> None:
        """A storage has another size, or (None) is freed."""
        before, owner = self.live.get(key, (0, ""))
        if num_bytes is None:
            self.live.pop(key, None)
        size = -(-(num_bytes or 0) // BLOCK_OF_MEMORY) * BLOCK_OF_MEMORY
        if size == before:
            return
        if key in self.live:
            self.live[key] = size, owner
        self.bytes_now += size - before
        self.owners[owner] += size - before
        self._note_peak()

    def _note_peak(self) -> None:
        if self.bytes_now > self.run.peaks[self.moment]:
            self.run.peaks[self.moment] = self.bytes_now
            self.run.owners[self.moment] = dict(self.owners)

    # Operators of _SPECIAL

    def _number(self, func: Any, x: Tensor) -> float | int | bool:
        self.waited()
        return torch.ones((), dtype=x.dtype).mul(self.answer).item() if x.dtype != torch.bool else True

    def _nonzero(self, func: Any, x: Tensor) -> Tensor:
        self.waited()
        with self:
            return x.new_empty((x.numel(), x.dim()), dtype=torch.int64)

    def _converted(self, func: Any, x: Tensor, **options: Any) -> Tensor:
        device = torch.device(options.get("device") or x.device)
        if x.device.type == "cuda" == device.type:
            return self._plain(func, x, **options)
        if device.type == "cuda":
            return self._plain(func, self._uploaded(x, options.get("non_blocking", False)), **options)
        self.waited()
        return torch.ones(x.shape, dtype=options.get("dtype") or x.dtype)

    def _copied(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if target.device.type == "cuda" == source.device.type:
            return self._plain(func, target, source, non_blocking)
        if target.device.type == "cuda":
            return self._plain(func, target, self._uploaded(source, non_blocking), non_blocking)
        self.waited()
        return target.fill_(1)

    def _uploaded(self, x: Tensor, non_blocking: bool) -> Tensor:
        """What is copied from the host, which waits for the stream but where it is pinned and non_blocking is asked."""
        if not (non_blocking and getattr(x, "pinned", False)):
            self.waited()
        return x if isinstance(x, FakeTensor) else FAKE.from_tensor(x)

    def _norm(self, func: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None):
        """A kernel of CUDA's, which the CPU build has no meta function for."""
        with self:
            wide = torch.promote_types(x.dtype, torch.float32)
            found = torch.empty_like(x), x.new_empty(*x.shape[: -len(shape)], *[1] * len(shape), dtype=wide)
        self._queue(func, func.name(), "_fused_rms_norm", ())
        return found

    def _norm_backward(self, func, d_out, x, shape, rstd, weight, wanted):
        with self:
            found = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        self._queue(func, func.name(), "_fused_rms_norm_backward", ())
        return found

    def _plain(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        with FAKE:
            found = func(*args, **kwargs)
        self._queue(func, func.name(), func.overloadpacket.__name__, args)
        self._hold(found)
        return found

    # Triton

    def launched(self, kernel: JITFunction, grid: Any, args: tuple, options: dict[str, Any]) -> None:
        """A kernel in place of JITFunction.run."""
        pointers, misaligned = [], []
        for name, value in zip(kernel.arg_names, args, strict=False):
            pointers.append(_pointer(value))
            misaligned += _misaligned(name, value)
        _, variant, rest = _binder(kernel)(*pointers, **options)
        grid = tuple(grid(options) if callable(grid) else grid)
        variant = str((variant, sorted(rest.items())))
        self.run.launches.append(Launch(kernel.__name__, grid, variant, tuple(misaligned)))
        self.names[f"triton::{kernel.__name__}"] += 1
        self.pending = kernel.__name__


# Operators that a fake tensor has no answer for, or one of the CPU build's, and what a tracer has in their place.
_SPECIAL = {
    "_local_scalar_dense": "_number",
    "nonzero": "_nonzero",
    "_to_copy": "_converted",
    "copy_": "_copied",
    "_fused_rms_norm": "_norm",
    "_fused_rms_norm_backward": "_norm_backward",
}


class _Pointer:
    """A tensor as Triton looks at it, at an offset from memory that is aligned."""

    def __init__(self, x: Tensor):
        self.dtype, self.offset = x.dtype, x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return 0


def _pointer(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Pointer(value)
    if isinstance(value, tuple):
        entries = map(_pointer, value)
        return value._make(entries) if hasattr(value, "_make") else tuple(entries)
    return value


def _misaligned(name: str, value: Any) -> list[str]:
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        return [bad for part, entry in zip(fields, value, strict=True) for bad in _misaligned(f"{name}.{part}", entry)]
    return [name] if isinstance(value, Tensor) and _Pointer(value).offset % ALIGNMENT else []


@functools.cache
def _binder(kernel: JITFunction) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, SM_90)


def _on_gpu(args: Any, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))


@functools.cache
def _is_composite(name: str) -> bool:
    """Whether it is made of others also on CUDA; `complete_cuda` gave a kernel to those that are not."""
    if name.startswith("prim::"):  # a question about the tensor
        return False
    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, name)
    return has_kernel("CompositeImplicitAutograd") and not has_kernel("CUDA")


@functools.cache
def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _place(moment: str = "") -> str:
    """The innermost line of this project's that is being run: "file:function", for memory with moment and line."""
    frame: Any = sys._getframe(1)
    while frame and not frame.f_globals.get("__name__", "").startswith("flashgrpo."):
        frame = frame.f_back
    if frame is None:
        return f"{moment} torch" if moment else "torch"
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
    return f"{moment} {place}:{frame.f_lineno}" if moment else place


def _own_operators() -> dict[str, Any]:
    """The bodies of this project's operators by name."""
    found = {}
    for name, module in [*sys.modules.items()]:
        if name.startswith("flashgrpo."):
            own = [value for value in vars(module).values() if isinstance(value, CustomOpDef)]
            found |= {op._qualname: op._init_fn for op in own}
    return found


@contextmanager
def _watched(tracer: Tracer) -> Iterator[None]:
    """What is no operator, and must be seen too."""
    resize, launch, pin, tolist = torch.UntypedStorage.resize_, JITFunction.run, Tensor.pin_memory, FakeTensor.tolist
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        found = resize(storage, size)  # FSDP frees what it has gathered by a storage of no bytes
        if storage._cdata in tracer.live:
            tracer.resized(storage._cdata, size)
        return found

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tracer.launched(kernel, grid, args, options)

    def pin_memory(x: Tensor) -> Tensor:
        x.pinned = True  # type: ignore[attr-defined]
        return x

    def quiet(*arguments: Any) -> Any:
        tracer.paused = True  # DTensor makes whole tensors to learn an operator's shapes: nobody's memory
        try:
            return propagate(*arguments)
        finally:
            tracer.paused = False

    patches = (
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", quiet, propagate),
        (torch.UntypedStorage, "resize_", resize_, resize),
        (JITFunction, "run", run, launch),
        (Tensor, "pin_memory", pin_memory, pin),
        (FakeTensor, "tolist", lambda x: x.cpu().tolist(), tolist),
        (Stream, "on_wait", staticmethod(tracer.waited), staticmethod(lambda: None)),
    )
    for owner, name, replacement, _ in patches:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, _, original in patches:
            setattr(owner, name, original)
