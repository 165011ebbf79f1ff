"""As many threads of torch as have a processor to themselves.

torch takes as many as other processes leave it processors, measured as it computes. The threads of
an operator wait for the slowest of them, and wait awake (GOMP_SPINCOUNT, see grpo/cli.py): where
another process has taken the processor of one, the others burn theirs until the scheduler comes
round, at every operator. With a thread on each of two processors and one busy process beside them,
SFT falls to a thirteenth; a single thread has a processor to itself and keeps three quarters.
"""

import os
import threading
import time
from collections import deque

import torch

REMEMBERED = 4  # intervals: a thread too many costs far more than one too few, so it comes back late
_INTERVAL_S = 0.5  # long for the clock ticks that processor time is counted in, short beside a step
_TOLERATED = 0.35  # of a processor: with more of it taken, a thread costs more than it gives


class Threads:
    """Gives torch the threads that have a processor to themselves: one or more, at most those that it had.

    It measures twice a second. A thread that was taken away comes back after two quiet seconds. Where OMP_NUM_THREADS
    is set, the number of threads stays: it was asked for, as torchrun's 1.
    """

    def __init__(self) -> None:
        self.most = self.given = 0  # that somebody asked for, and that torch has been given since
        self.taken: deque[float] = deque(maxlen=REMEMBERED)  # processors that others took, of late
        self.measured_at = self.used_s = 0.0

    def fit(self) -> None:
        """Called at every pass through a decoder on a CPU."""
        now = time.monotonic()
        is_main = threading.current_thread() is threading.main_thread()  # torch counts each thread's own
        if torch.compiler.is_compiling() or now - self.measured_at < _INTERVAL_S or not is_main:
            return
        if torch.get_num_threads() != self.given:  # at first, or since somebody has changed it
            self.most = self.given = torch.get_num_threads()
        if self.most == 1 or "OMP_NUM_THREADS" in os.environ:
            return
        import psutil  # not where kernels alone are installed

        shares, used_s = psutil.cpu_percent(percpu=True), time.process_time()  # shares: since the last call
        own = (used_s - self.used_s) / (now - self.measured_at)
        is_first, self.measured_at, self.used_s = not self.measured_at, now, used_s
        if is_first:
            return
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
        busy = sum(share / 100 for cpu, share in enumerate(shares) if cpu in cpus)
        self.taken.append(busy - own)
        self.given = max(1, min(self.most, int(len(cpus) - max(self.taken) + _TOLERATED)))
        if self.given != torch.get_num_threads():
            torch.set_num_threads(self.given)
