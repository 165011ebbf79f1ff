"""Who goes on next: partitions as threads, one at a time, and what is under way beside them.

An order is drawn from a seed and repeats with it. A vector clock is what a partition knows to be over, whatever the
order was: how much of each partition, how many operations of each queue, how many phases of each barrier. Source:
Flanagan & Freund, FastTrack, doi.org/10.1145/1542476.1542490.
"""

import itertools
import linecache
import math
import random
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, ClassVar

import numpy as np

Clock = dict[Any, int]
_PACES = (1, 4, 16)  # how much more often one goes on than another


class Fault(AssertionError):
    """What a GPU answers with a hang, an error or wrong values, or the compiler with a refusal."""


class _Stopped(BaseException):
    """Ends a partition where another has failed."""


def join(clock: Clock, other: Clock) -> None:
    for component, count in other.items():
        if clock.get(component, 0) < count:
            clock[component] = count


class Queue:
    """What a partition has begun and has to wait for, in order: its wgmmas, or its stores by TMA."""

    def __init__(self, what: str):
        self.what = what
        self.num_issued = self.num_over = 0
        self.flying: deque[Any] = deque()

    def issue(self, operation: Any) -> int:
        self.flying.append(operation)
        self.num_issued += 1
        return self.num_issued

    def land(self) -> None:
        self.flying.popleft().land()

    def wait(self, num_pending: int) -> None:
        while len(self.flying) > num_pending:
            self.land()
        self.num_over = max(self.num_over, self.num_issued - num_pending)


class Partition:
    """The warps that run one function of gl.warp_specialize, or the kernel."""

    def __init__(self, program: "Program", name: str, num_warps: int, clock: Clock):
        self.program, self.name, self.num_warps = program, name, num_warps
        self.owner = program.index * 64 + len(program.partitions) + 1  # of what it writes to global memory
        self.clock = {**clock, self: 1}
        self.mmas, self.stores = Queue("wgmmas"), Queue("stores by TMA")
        self.baton = threading.Lock()  # released whenever the partition may go on
        self.baton.acquire()
        self.pace = program.random.choice(_PACES)
        self.until: Callable[[], bool] | None = None
        self.waits_for: Callable[[], str] = str
        self.frame: Any = None
        self.is_done = False

    def has_seen(self, component: Any, count: int) -> bool:
        return self.clock.get(component, 0) >= count

    def release(self, clock: Clock) -> None:
        """Whoever reads `clock` afterwards knows what this partition has done so far."""
        join(clock, self.clock)
        self.clock[self] += 1

    def wait(self, queue: Queue, num_pending: int) -> None:
        self.program.pause()
        queue.wait(num_pending)
        self.clock[queue] = queue.num_over

    def finish(self) -> None:
        for queue in (self.mmas, self.stores):
            if queue.num_over < queue.num_issued:
                raise Fault(f"{queue.num_issued - queue.num_over} {queue.what} are not waited for at the end")
        self.is_done = True


class Program:
    """One program of a grid: its partitions, and who of them runs. The first is the kernel's own thread."""

    current: ClassVar["Program"]

    def __init__(self, index: int, place: tuple[int, ...], grid: tuple[int, ...], num_warps: int, rng: random.Random):
        self.index, self.place, self.grid, self.random = index, place, grid, rng
        self.pace = rng.choice(_PACES)  # of what is under way
        self.copies: list[Any] = []
        self.allocations: list[Any] = []
        self.error: BaseException | None = None
        self.deadline = math.inf
        self.partitions: list[Partition] = []
        self.running = Partition(self, "the kernel", num_warps, {})
        self.partitions.append(self.running)
        Program.current = self

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise Fault("out of time; wanted loops that end, or more seconds")

    def pause(self, until: Callable[[], bool] | None = None, waits_for: Callable[[], str] = str) -> Partition:
        """Lets others go on. Returns the caller, once `until` holds."""
        self.check_time()
        me = self.running
        me.until, me.waits_for, me.frame = until, waits_for, sys._getframe(1)
        chosen = self._next()
        if chosen is not me:
            self._pass_on(chosen)
            me.baton.acquire()
            if self.error:
                raise _Stopped
        me.until = me.frame = None
        return me

    def _pass_on(self, partition: Partition) -> None:
        self.running = partition
        partition.baton.release()

    def _next(self) -> Partition:
        """Draws what happens next, until that is a partition."""
        while True:
            able = [p for p in self.partitions if not p.is_done and (p.until is None or p.until())]
            under_way = self.copies + [q for p in self.partitions for q in (p.mmas, p.stores) if q.flying]
            if not able and not under_way:
                raise Fault("deadlock: " + "; ".join(map(_blocked, self.partitions)))
            paces = [p.pace for p in able] + [self.pace] * len(under_way)
            (chosen,) = self.random.choices([*able, *under_way], paces)
            if isinstance(chosen, Partition):
                return chosen
            if not isinstance(chosen, Queue):
                self.copies.remove(chosen)
            chosen.land()

    def specialize(
        self, name: str, default: Callable[[], Any], workers: list[tuple[str, int, Callable[[], Any]]]
    ) -> Any:
        """Runs `workers`, each a name, a number of warps and a body, beside `default`, and returns what that does."""
        main = self.running
        main.name = name
        if main is not self.partitions[0]:
            raise Fault("gl.warp_specialize inside of a partition")
        started = []
        for name, num_warps, body in workers:
            partition = Partition(self, name, num_warps, main.clock)
            self.partitions.append(partition)
            started.append((partition, threading.Thread(target=self._work, args=(partition, body), daemon=True)))
        main.clock[main] += 1
        for _, thread in started:
            thread.start()
        try:
            result = default()
            self.pause(lambda: all(p.is_done for p, _ in started), lambda: "the other partitions")
        except BaseException as error:
            self.error = self.error or error
            raise
        finally:
            for partition, thread in started:
                partition.baton.release()
                thread.join()
        for partition, _ in started:
            join(main.clock, partition.clock)
            self.partitions.remove(partition)
        return result

    def _work(self, partition: Partition, body: Callable[[], Any]) -> None:
        partition.baton.acquire()
        if self.error:
            return
        try:
            with np.errstate(all="ignore"):
                body()
            partition.finish()
            self._pass_on(self._next())
        except _Stopped:
            pass
        except BaseException as error:  # the kernel's thread raises it
            self.error = error
            self.partitions[0].baton.release()

    def run(self, body: Callable[[], Any], seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        try:
            with np.errstate(all="ignore"):
                body()
            self.partitions[0].finish()
            for allocation in self.allocations:
                allocation.check_end(self.partitions[0])
        except BaseException as raised:
            error = self.error or raised
            if not isinstance(error, Fault):
                raise error from None
            where = _lines(reversed(list(traceback.walk_tb(error.__traceback__))))
            raise Fault(f"{error} ({self.running.name} of program {self.place}, {where})") from error


def is_kernel(frame: FrameType) -> bool:
    return "__emulated__" in frame.f_globals


def _lines(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Where in its source a partition is, by its frames from the innermost on."""
    own = itertools.takewhile(lambda x: x[0].f_code is not Program.specialize.__code__, frames)
    lines = [(f.f_code.co_filename, number) for f, number in own if is_kernel(f)]
    return " in ".join(f"line {n}: {linecache.getline(file, n).strip()}" for file, n in lines) or "at the end"


def _blocked(partition: Partition) -> str:
    if partition.is_done:
        return f"{partition.name} has ended"
    return f"{partition.name} waits for {partition.waits_for()} at {_lines(traceback.walk_stack(partition.frame))}"
