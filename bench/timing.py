"""How benchmarks measure, beside the machine's own limits, and where their results go. A CPU and one GPU alike.

Sides are timed in two passes, A B A B: how far their medians lie apart says how steady the machine
was. On CUDA short calls are timed by Triton's `do_bench`, which overwrites the L2 cache before each
one and lets them queue up: Python's time to launch kernels shows where it outlasts the work, as in
training.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown

from flashgrpo.grpo.run.progress import peak_memory_mb
from flashgrpo.kernels.common import HAS_TRITON, triton
from flashgrpo.model.cpu import product
from flashgrpo.model.files import write_text
from flashgrpo.model.waits import word_for

Made = TypeVar("Made")
Row = dict[str, Any]  # of results, as JSON has it
Side = Callable[[], list[float]]  # one of those that take turns: milliseconds of its calls in a pass
Guard = Callable[[str], contextlib.AbstractContextManager[object]]
ROOT = Path(__file__).resolve().parent.parent
_MOST_ROUNDS = 100
_SHORT_MS = 3.0
_NOTE_LENGTH = 120
_LOOK_S, _IDLE_CORES = 0.5, 0.2


@dataclass(frozen=True)
class Limits:
    """What the machine reaches in this run: a large matmul in `dtype`, and a copy."""

    flops_per_s: float
    bytes_per_s: float
    dtype: str

    def ms(self, flops: float, num_bytes: float) -> float:
        """The least time of work that needs both."""
        return 1e3 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def sample_ms(
    call: Callable[[], object], device: torch.device, *, budget_s: float = 0.0, rounds: int = 1
) -> list[float]:
    """Milliseconds of calls in a row: of `rounds`, and of more until `budget_s` seconds are spent, at most 100."""
    taken: list[float] = []
    if device.type == "cuda" and budget_s:
        taken = sample_ms(call, device)
        if taken[0] < _SHORT_MS:
            # A clock on the host would also see how long Python takes to launch short kernels. The seven calls that
            # do_bench makes beforehand would cost long ones more than those that it counts.
            do_bench: Any = triton.testing.do_bench
            return do_bench(call, warmup=0, rep=1e3 * budget_s, return_mode="all")
    while len(taken) < rounds or (sum(taken) < 1e3 * budget_s and len(taken) < _MOST_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


def in_turns(sides: Mapping[str, Side], guard: Guard = contextlib.nullcontext) -> Iterator[tuple[str, Row]]:
    """Let each side measure itself in two passes, A B A B; gives its name and its `percentiles` so far after each turn.

    `guard(name)` stands around a turn: a side whose error it takes has no times of it, and no
    second turn.
    """
    passes: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(2):
        for name, sample in sides.items():
            taken = passes[name]
            if len(taken) == number:
                with guard(name):
                    taken.append(sample())
            if len(taken) > number:
                yield name, percentiles(taken)


def percentiles(passes: Sequence[Sequence[float]]) -> Row:
    """In ms, over all passes; and their `spread`, how far the medians are apart, by the smaller one."""
    # A drift of the machine shows between the passes, where percentiles over both would hide it.
    medians = [statistics.median(taken) for taken in passes]
    every = np.concatenate(passes)
    p20, p50, p80 = np.quantile(every, (0.2, 0.5, 0.8)).tolist()
    spread = max(medians) / min(medians) - 1
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "spread": spread, "rounds": len(every)}


def time_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, budget_s: float = 0.0, rounds: int = 1
) -> dict[str, Row]:
    """Time calls in turns: in each of two passes as `sample_ms` does, after a call that is not counted."""
    sides: dict[str, Side] = {}
    for name, call in calls.items():
        # It compiles, and fills the allocator's cache.
        with word_for(f"warming up {name}"):
            call()
        sides[name] = functools.partial(sample_ms, call, device, budget_s=budget_s, rounds=rounds)
    # Of each side the last row is that of both passes.
    return dict(in_turns(sides, lambda name: word_for(f"measuring {name}")))


@contextlib.contextmanager
def noted(*rows: Row) -> Iterator[None]:
    """An error becomes the rows' `status` and `note`: a benchmark goes on without what cannot be measured."""
    try:
        yield
    except Exception as error:  # a peer may raise anything
        kinds = {ImportError: "not installed", TimeoutError: "not measured", torch.OutOfMemoryError: "out of memory"}
        status = next((name for kind, name in kinds.items() if isinstance(error, kind)), "failed")
        text = str(error).strip().partition("\n")[0][:_NOTE_LENGTH]
        if text.startswith("0 active drivers"):  # Triton's words
            text = "it needs a GPU"
        for row in rows:
            row |= {"status": status, "note": text if status != "failed" else f"{type(error).__name__}: {text}"}
        if status == "out of memory":
            # Its frames hold what was allocated.
            error.__traceback__ = None
            torch.cuda.empty_cache()


def peak_mib(call: Callable[[], Made], device: torch.device) -> tuple[float, Made]:
    """Largest memory while `call` runs beyond what was there before, in 2^20 bytes, and what it gives.

    Of a CPU on Linux with glibc.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 1e6
    else:
        # What earlier calls have freed must not be taken again unseen, and the peak starts again from what is resident.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory_mb(device)
    made = call()
    return (peak_memory_mb(device) - before) * 1e6 / 2**20, made


def measure_limits(device: torch.device) -> Limits:
    """Matmul rate (bf16 on CUDA, fp32 on a CPU) and copy bandwidth, reading and writing."""
    is_gpu = device.type == "cuda"
    dtype, side, size = (torch.bfloat16, 8192, 2**30) if is_gpu else (torch.float32, 1024, 2**26)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    # The faster fifth: a limit is what the machine can do, not what it did on average.
    found = time_turns({"matmul": lambda: product(a, b), "copy": lambda: target.copy_(source)}, device, budget_s=0.5)
    flops_per_s, bytes_per_s = 2e3 * side**3 / found["matmul"]["p20_ms"], 2e3 * size / found["copy"]["p20_ms"]
    return Limits(flops_per_s, bytes_per_s, str(dtype))


def option_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of the options of `flashgrpo bench NAME`; its help begins with the module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"flashgrpo bench {name}", description=description, formatter_class=raw)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; a column whose name ends with ":" is set to the right."""
    names, marks, lines = [], [], []
    for name in columns:
        names.append(name.removesuffix(":"))
        marks.append("---:" if name.endswith(":") else "---")
    for cells in (names, marks, *rows):
        line = "|"
        for cell in cells:
            line += f" {cell} |" if cell else " |"
        lines.append(line)
    return lines


def show(lines: Sequence[str], *notes: str) -> None:
    """Print tables of Markdown, as wide as they need where there is no terminal, and notes below them."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with console.capture() as shown:
        console.print(Markdown("\n".join(lines)))
    print(shown.get(), end="")
    if "…" in shown.get():
        notes = *notes, "what ends in … is cut: a wider terminal, or `| less -S`, shows all of it"
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def publish(name: str, found: Row, table: Sequence[str], *notes: str) -> Path:
    """Write results, print their table and where they are; gives the path."""
    path = write_results(name, found)
    show(table, *notes, f"written to {path}")
    return path


def machine(device: torch.device) -> Row:
    """What a row of results was measured on: device, versions, commit (or COMMIT, where there is no git)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    describe, commit = ["git", "describe", "--always", "--abbrev=40", "--dirty"], ""
    if shutil.which("git"):
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": name,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "busy_cores": busy_cores(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "commit": commit or os.environ.get("COMMIT", "unknown"),
    }


@functools.cache
def busy_cores() -> float:
    """How many processors others keep busy, a hypervisor's other guests included: seen while this process sleeps, at
    the first call alone. Warns where times will not be those of an idle machine.
    """

    def read() -> np.ndarray:  # [8]: user, nice, system, idle, iowait, irq, softirq, steal
        return np.array(Path("/proc/stat").read_text().split()[1:9], dtype=float)

    before = read()
    time.sleep(_LOOK_S)
    passed = read() - before
    busy = (os.cpu_count() or 1) * (1 - (passed[3] + passed[4]) / max(passed.sum(), 1.0))
    if busy > _IDLE_CORES:
        warning = (
            f"this machine is busy: others keep {busy:.1f} of {os.cpu_count()} processors; times will not be its own"
        )
        print(warning, file=sys.stderr)
    return round(float(busy), 2)


def write_results(name: str, found: Row | list[Row]) -> Path:
    """Write results as JSON, a list as a line a row; gives the path.

    In `name`, {device} is that of the `machine` on which they were measured: `NVIDIA H200` gives
    `nvidia_h200`.
    """
    if isinstance(found, dict):
        header, text = found, json.dumps(found, indent=1) + "\n"
    else:
        header, text = found[0], "".join(json.dumps(row) + "\n" for row in found)
    device = header.get("machine", {}).get("device", "")
    path = results_folder() / name.format(device=re.sub(r"\W+", "_", device.lower()).strip("_"))
    write_text(path, text)
    return path


def results_folder() -> Path:
    """$OUT where it is set, else bench/results of a checkout, else the working folder; made where it is missing.

    Raises OSError where nothing can be written to it.
    """
    in_checkout = (ROOT / "pyproject.toml").exists()
    folder = Path(os.environ.get("OUT") or (ROOT / "bench" / "results" if in_checkout else "."))
    folder.mkdir(parents=True, exist_ok=True)
    # A folder may be there and not be ours to write to.
    tempfile.TemporaryFile(dir=folder).close()
    return folder


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
