"""How benchmarks measure: in turns, with cold caches, beside the machine's own limits. A CPU and one GPU alike.

On CUDA a call is timed by events on the device. Before each one the L2 cache is overwritten and the device sleeps until
the call is queued, so that Python's time to launch kernels shows only where it outlasts the work, as in training.
"""

import argparse
import ctypes
import itertools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flashgrpo.grpo.run.progress import peak_memory_mb
from flashgrpo.kernels.common import HAS_TRITON, triton
from flashgrpo.model.cpu import product

ROOT = Path(__file__).resolve().parent.parent
_SLEEP_CLOCKS = 1_000_000  # half a millisecond
_ROUNDS = range(5, 101)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: percentiles over two passes, and how far the passes' medians are apart."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    spread: float  # of the medians, by the smaller one
    rounds: int

    @classmethod
    def of(cls, passes: Sequence[Sequence[float]]) -> "Timing":
        every = sorted(itertools.chain(*passes))
        p20, p50, p80 = (every[min(int(share * len(every)), len(every) - 1)] for share in (0.2, 0.5, 0.8))
        medians = [statistics.median(values) for values in passes]
        return cls(p20, p50, p80, max(medians) / min(medians) - 1, len(every))


@dataclass(frozen=True)
class Limits:
    """What the machine reaches in this run: a large matmul in `dtype`, and a copy."""

    flops_per_s: float
    bytes_per_s: float
    dtype: torch.dtype

    def ms(self, flops: float, num_bytes: float) -> float:
        """The least time of work that needs both."""
        return 1e3 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; waits for it."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    torch.empty(size, dtype=torch.int8, device=device).zero_()
    torch.cuda._sleep(_SLEEP_CLOCKS)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_turns(
    sides: Mapping[str, Callable[[], object]], device: torch.device, *, budget_s: float = 2.0, rounds: int | None = None
) -> dict[str, Timing]:
    """Time every side, A B A B: two passes of as many rounds as fit into `budget_s`, 5 to 100, or of `rounds` each."""
    for call in sides.values():  # compiles, and fills the allocator's cache
        call_ms(call, device)
    if rounds is None:
        round_ms = sum(call_ms(call, device) for call in sides.values())
        rounds = min(max(int(500 * budget_s / round_ms), _ROUNDS[0]), _ROUNDS[-1])
    passes = [{name: [] for name in sides} for _ in range(2)]
    for taken in passes:
        for _ in range(rounds):
            for name, call in sides.items():
                taken[name].append(call_ms(call, device))
    return {name: Timing.of([taken[name] for taken in passes]) for name in sides}


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Largest memory while `call` runs beyond what was there before, in 2^20 bytes; of a CPU on Linux with glibc."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 1e6
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed must not be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
        before = peak_memory_mb(device)
    call()
    return (peak_memory_mb(device) - before) * 1e6 / 2**20


def measure_limits(device: torch.device) -> Limits:
    """Matmul rate (bf16 on CUDA, fp32 on a CPU) and copy bandwidth, reading and writing."""
    is_gpu = device.type == "cuda"
    dtype, side, size = (torch.bfloat16, 8192, 2**30) if is_gpu else (torch.float32, 1024, 2**26)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    found = time_turns({"matmul": lambda: product(a, b), "copy": lambda: target.copy_(source)}, device, budget_s=1.0)
    return Limits(2e3 * side**3 / found["matmul"].p20_ms, 2e3 * size / found["copy"].p20_ms, dtype)


def option_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of the options of `flashgrpo bench NAME`; its help begins with the module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"flashgrpo bench {name}", description=description, formatter_class=raw)


def console() -> Console:
    """For tables: as wide as they need where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def machine(device: torch.device) -> dict[str, Any]:
    """What a row of results was measured on: device, versions, commit (or COMMIT, where there is no git)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    describe, commit = ["git", "describe", "--always", "--abbrev=40", "--dirty"], ""
    if shutil.which("git"):
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": name,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "commit": commit or os.environ.get("COMMIT", "unknown"),
    }


def slug(device_name: str) -> str:
    """Of a device, for the names of files: `NVIDIA H200` gives `nvidia_h200`."""
    return re.sub(r"\W+", "_", device_name.lower()).strip("_")


def results_folder() -> Path:
    """$OUT where it is set, else bench/results of a checkout, else the working folder; made where it is missing.

    Raises OSError where nothing can be written to it.
    """
    in_checkout = (ROOT / "pyproject.toml").exists()
    folder = Path(os.environ.get("OUT") or (ROOT / "bench" / "results" if in_checkout else "."))
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
