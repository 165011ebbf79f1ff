"""What a person sees while a run works: progress bar and phase clock."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)
_LINES = 20  # of a run without a terminal


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.idle_s = 0.0  # that the ranks, on average, waited for the slowest
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self.start


@contextmanager
def step_bar(title: str, done: int, total: int) -> Iterator["StepBar"]:
    """A progress bar over steps; where there is no terminal, a line at the first and each twentieth of all steps."""
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = "[bold]{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[values]}", *times
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, completed=done, values="")
        yield StepBar(progress, task, title, total)


class StepBar:
    def __init__(self, progress: Progress, task, title: str, total: int):
        self.progress, self.task, self.title, self.total = progress, task, title, total

    def phase(self, name: str) -> None:
        """Show what the running step is doing."""
        self.progress.update(self.task, description=f"{self.title} · {name}")

    def advance(self, step: int, values: str) -> None:
        """A step is done."""
        self.progress.update(self.task, completed=step, values=values)
        is_shown = step == 1 or step * _LINES // self.total > (step - 1) * _LINES // self.total
        if is_shown and not (console.is_terminal or console.quiet):
            print(f"{self.title} {step}: {values}", file=sys.stderr, flush=True)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far, in 10^6 bytes: allocated on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text()  # getrusage keeps the parent's peak across exec
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
