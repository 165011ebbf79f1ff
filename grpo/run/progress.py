"""What a person sees while a run works: progress bar and phase clock."""

import datetime
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

console = Console(stderr=True, markup=False, highlight=False, emoji=False)  # names and paths as they are
_DAY_S = 86_400.0  # steps may be long, and rich forgets what is older than this when it estimates the rest


def say(text: str, style: str = "") -> None:
    """A line on the first rank's screen, which a terminal wraps and a log keeps whole, to be searched for."""
    console.print(text, style=style, soft_wrap=True)


class Clock:
    """Wall seconds by phase. A phase on a GPU ends when its work is done there, not when the host has queued it: what
    scoring left on the queue would be the time of training.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.idle_s = 0.0  # that the ranks, on average, waited for the slowest
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        finally:
            self.seconds[phase] += time.perf_counter() - start

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self.start


class _TwoLines(Progress):
    """The bar, and each task's values below it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["values"])


@contextmanager
def step_bar(title: str, done: int, total: int) -> Iterator["StepBar"]:
    """A progress bar over steps; where there is no terminal, a line a step."""
    description = TextColumn("[bold]{task.description}", table_column=Column(overflow="ellipsis"))
    bar = BarColumn(None, table_column=Column(ratio=1))
    whole = Column(no_wrap=True)
    numbers = [kind(table_column=whole.copy()) for kind in (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)]
    shown = {"console": console, "disable": not console.is_terminal, "expand": True}
    with _TwoLines(description, bar, *numbers, speed_estimate_period=_DAY_S, **shown) as progress:
        task = progress.add_task(title, total=total, completed=done, values="")
        yield StepBar(progress, task, title, done, total)


class StepBar:
    def __init__(self, progress: Progress, task: TaskID, title: str, done: int, total: int):
        self.progress, self.task, self.title, self.done, self.total = progress, task, title, done, total
        self.start = time.perf_counter()

    def phase(self, name: str) -> None:
        """Show what the running step is doing."""
        self.progress.update(self.task, description=f"{self.title} · {name}")

    def advance(self, step: int, values: str) -> None:
        """A step is done."""
        self.progress.update(self.task, completed=step, values=values)
        if not (console.is_terminal or console.quiet):
            elapsed = time.perf_counter() - self.start
            left = elapsed / max(step - self.done, 1) * (self.total - step)
            times = f"{_hours(elapsed)} elapsed, {_hours(left)} left"
            print(f"{self.title} {step}/{self.total}: {values}, {times}", file=sys.stderr, flush=True)


def _hours(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far, in 10^6 bytes: allocated on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text()  # getrusage keeps the parent's peak across exec
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
