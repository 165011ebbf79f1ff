"""A CUDA device on which nothing runs, for torch's CPU build: what C++ asks of it (fake_guard.cpp), and Python.

What `install` does to torch stays for the life of the process, so it is for processes of their own (conftest.py).
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("fake_guard.cpp")
TORCH = Path(torch.__file__).parent


def why_not() -> str:
    """Why there can be no fake GPUs here; "" where they can be."""
    if torch.version.cuda or torch.version.hip:
        return "torch is a GPU's build; fake GPUs are made for its CPU build"
    if _compiler() is None:
        return "there is no C++ compiler for the fake device guard; install g++"
    if not os.access(SOURCE.parent, os.W_OK):
        return f"the fake device guard is kept in {SOURCE.parent}, which is not writable"
    return ""


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def build() -> Path:
    """The compiled guard, which waits beside Python's compiled files for the next run: 6 seconds, the first time."""
    version = torch.__version__.encode() + SOURCE.read_bytes()
    folder = SOURCE.with_name("__pycache__")  # not /tmp: what is loaded from there could be anybody's
    built = folder / f"guard_{hashlib.sha256(version).hexdigest()[:16]}.so"
    if built.exists():
        return built
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / built.name
        libraries = [f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"]
        options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{TORCH}/include", "-o", str(made)]
        ran = subprocess.run([_compiler(), *options, str(SOURCE), *libraries], capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile against torch {torch.__version__}:\n{ran.stderr}")
        made.replace(built)  # whole, however many processes build it at once
    return built


def complete_cuda() -> list[str]:
    """Give the CPU build a "CUDA" kernel, which never runs, of each operator that it composes of others and a GPU's
    build does not: composed, it would queue more and keep more for the backward pass. Those have a CPU kernel, too.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = ["aten::_fused_rms_norm", "aten::_fused_rms_norm_backward"]
    for name in torch._C._dispatch_get_all_op_names():
        keys = [key for key in ("CompositeImplicitAutograd", "CPU") if has_kernel(name, key)]
        if name.startswith("aten::") and len(keys) == 2 and not has_kernel(name, "CUDA"):
            found.append(name)
    for name in found:
        _LIBRARY.impl(name.removeprefix("aten::"), _never, "CUDA")
    return found


_LIBRARY = torch.library.Library("aten", "IMPL")


def _never(*arguments: Any, **options: Any) -> None:
    raise AssertionError("a kernel ran on a fake device")


class Stream:
    """A stream or an event: neither has anything to wait for, but `on_wait` hears that somebody did."""

    on_wait: Callable[[], None] = staticmethod(lambda: None)
    cuda_stream = stream_id = device_index = 0
    device_type = 1
    device = torch.device("cuda", 0)

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def synchronize(self) -> None:
        Stream.on_wait()

    def record_event(self, event: "Stream | None" = None) -> "Stream":
        return event or Stream()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def nothing(self, *arguments: Any) -> None:
        pass

    wait_stream = wait_event = record = wait = nothing

    def elapsed_time(self, other: "Stream") -> float:
        return 0.0

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *raised: object) -> None:
        pass


class _Properties:
    name, total_memory, multi_processor_count = "NVIDIA H200", 141 * 10**9, 132
    major, minor = 9, 0
    uuid, warp_size, L2_cache_size = "fake", 32, 50 << 20


class _Device(contextlib.nullcontext):
    """torch.cuda.device and device_of."""

    def __init__(self, device: Any = None):
        super().__init__()


def install(num_devices: int = 8) -> None:
    """Make torch believe in `num_devices` H200s; once a process."""
    if torch.cuda.Stream is Stream:
        return
    guard = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    guard.install()
    if torch.accelerator.current_accelerator() is None:
        raise RuntimeError(
            f"torch {torch.__version__} finds no CUDA in spite of {SOURCE.name}; does it keep its hooks elsewhere?"
        )
    complete_cuda()
    stream, properties = Stream(), _Properties()
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": num_devices, "current_device": 0,
        "get_device_capability": (9, 0), "get_device_name": properties.name, "get_device_properties": properties,
        "current_stream": stream, "default_stream": stream, "is_current_stream_capturing": False,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "is_bf16_supported": True,
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "init": None, "_lazy_init": None, "set_device": None, "empty_cache": None, "reset_peak_memory_stats": None,
        "set_per_process_memory_fraction": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, _answer=answer, **options: _answer)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.device = torch.cuda.device_of = _Device
    torch.cuda.stream = contextlib.nullcontext
    torch.cuda.synchronize = lambda device=None: Stream.on_wait()
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.current_stream = lambda device=None: stream
    torch.Tensor.record_stream = lambda self, stream: None
