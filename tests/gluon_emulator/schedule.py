"""Who goes on next: partitions as threads, one at a time, and what is under way beside them.

An order is drawn from a seed and repeats with it. Vector clocks tell what a partition knows to be over. A clock maps a
partition, a queue or a barrier to a count of its events: what a partition has done, operations of a queue that it has
waited for, phases of a barrier that it has seen complete. Source: Flanagan & Freund, FastTrack,
doi.org/10.1145/1542476.1542490.
"""

import linecache
import math
import random
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

_PACES = (1, 4, 16)  # how much more often one goes on than another


class Fault(AssertionError):
    """What a GPU answers with a hang, an error or wrong values, or the compiler with a refusal."""


class _Stopped(BaseException):
    """Ends a partition where another has failed."""


def join(clock: dict[Any, int], other: dict[Any, int]) -> None:
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

    def __init__(self, program: "Program", name: str, num_warps: int, clock: dict[Any, int]):
        self.program, self.name, self.num_warps = program, name, num_warps
        self.owner = program.index * 64 + len(program.partitions) + 1  # of what it writes to global memory
        self.clock = {**clock, self: 1}
        self.mmas, self.stores = Queue("wgmmas"), Queue("stores by TMA")
        self.baton = threading.Lock()  # held by nobody but whoever runs
        self.baton.acquire()
        self.pace = program.random.choice(_PACES)
        self.until: Callable[[], bool] | None = None
        self.waits_for: Callable[[], str] = str
        self.frame: Any = None
        self.is_done = False

    def has_seen(self, component: Any, count: int) -> bool:
        return self.clock.get(component, 0) >= count

    def release(self, clock: dict[Any, int]) -> None:
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
            raise Fault(f"{error} ({_line(error)}; {self.running.name} of program {self.place})") from error


def kernel_frame(frame: Any) -> Any:
    """The innermost frame that is a kernel's."""
    while frame and "__emulated__" not in frame.f_globals:
        frame = frame.f_back
    return frame


def _line(error: BaseException) -> str:
    """The kernel's innermost line on the way to an error."""
    trace = [
        (frame, number) for frame, number in traceback.walk_tb(error.__traceback__) if kernel_frame(frame) is frame
    ]
    return _text(*trace[-1]) if trace else "at the end"


def _text(frame: Any, number: int) -> str:
    return f"line {number}: {linecache.getline(frame.f_code.co_filename, number).strip()}"


def _blocked(partition: Partition) -> str:
    if partition.is_done:
        return f"{partition.name} has ended"
    frame = kernel_frame(partition.frame)
    place = f" at {_text(frame, frame.f_lineno)}" if frame else ""
    return f"{partition.name} waits for {partition.waits_for()}{place}"
