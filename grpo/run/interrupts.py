"""Ctrl-C, and the signals that ask for the same, while a command works: an update is never torn apart.

SIGTERM comes at the end of a job's time, before a preemption and from `docker stop`, SIGHUP when a terminal is closed,
SIGUSR1 where a scheduler was asked for a warning. Nothing heavy is imported: the signals are caught before torch loads.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """One of `SIGNALS` has come, to this rank or, where the ranks share it, to another."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum, self.rank = signum, os.environ.get("RANK", "0")


class Interrupts:
    """The signals are held back, but for blocks that are `allowed` to be torn apart, where they raise Stopped.

    A second Ctrl-C ends the process at once, with nothing saved; other signals are often sent
    twice, by a scheduler to every process and by torchrun to its own, and only the first one
    counts. One that is ignored, as SIGHUP is by nohup, stays so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        outlive_output()
        with contextlib.suppress(ValueError):  # not the main thread: signals never arrive here
            for number in SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hold) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within the block, and for one that came before it, a signal raises Stopped."""
        self._raises = True
        try:
            if self.received:
                raise Stopped(self.received)
            yield
        finally:
            self._raises = False

    def _hold(self, signum: int, frame: object) -> None:
        if self.received:
            if signum == signal.SIGINT:  # an exception here would save what is half updated
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            return
        self.received = signum
        if self._raises:
            raise Stopped(signum)
        if os.environ.get("RANK", "0") == "0":
            what = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
            again = "; again to stop at once" if signum == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # Ctrl-C ends what stands behind a pipe, too
                os.write(2, f"\n{what}: finishing this update, then a checkpoint{again}\n".encode())


class _Output(io.FileIO):
    def write(self, content: Any) -> Any:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())
        return super().write(content)


def outlive_output() -> None:
    """From here on, what is printed to a terminal that was closed, or to a pipe that nobody reads any more, goes
    nowhere: an error there would cost the run.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # it is closed, or somebody else's
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(output, stream.encoding, stream.errors, line_buffering=True))
