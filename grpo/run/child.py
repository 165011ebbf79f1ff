"""Processes of the trainer's own: fresh interpreters at the other end of a pipe, which end when it closes."""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from flashgrpo.grpo.run.interrupts import SIGNALS, outlive_output

_RANK, _TORCHRUN = ("RANK", "WORLD_SIZE"), ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")

_START_LIMIT_S = 1800.0
_END_LIMIT_S = 5.0
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36  # of prctl


def start_child(
    serve: Callable[[int], None], environment: Mapping[str, str] | None = None, guarded: bool = False
) -> tuple[subprocess.Popen, Connection]:
    """A process that runs `serve`, a function of a module, with the file descriptor of its end of a pipe; and our end.

    The process hears neither Ctrl-C nor the signals that ask for the same, which a terminal or a scheduler sends to
    every process, and does not import the main script. One that runs what a user wrote is `guarded`: it has a process
    group of its own, the process that is returned is its guard (see `guard`), and `end_guarded` ends it.
    """
    ours, theirs = multiprocessing.Pipe()
    command = (  # before anything that takes time is imported
        f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as child; child.ignore_signals(); "
        + (f"child.guard({theirs.fileno()}); " if guarded else "")
        + f"from {serve.__module__} import serve; serve({theirs.fileno()})"
    )
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=environment,
            process_group=0 if guarded else None,
        )
    return process, ours


def ignore_signals() -> None:
    """By this process alone: a function of a user's that ends a process of its own by SIGTERM can do so. And the end of
    the terminal that they tell of.
    """

    def restore() -> None:
        for number in SIGNALS[1:]:
            signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in SIGNALS[1:]:
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, what is started by exec does not inherit it
    os.register_at_fork(after_in_child=restore)
    outlive_output()


def end_guarded(process: subprocess.Popen, connection: Connection) -> int:
    """Ends a guarded child and all that it has started; returns its exit code. Another thread may be reading."""
    if not connection.closed:  # to close it would leave the other thread waiting, and so the guard
        with socket.socket(fileno=os.dup(connection.fileno())) as end, contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    try:
        return process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:  # stopped, by what it guards
        process.kill()
        return process.wait()


def guard(file_descriptor: int) -> None:
    """Returns in a child of this process, which stays behind. When the child ends, or the other end of the pipe is
    closed, as by a killed trainer, it ends all that the child has started, and itself in the way that the child did.

    Orphans become its own children, so that nothing escapes by a session or a parent that ends.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if not (child := os.fork()):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        ignore_signals()
        return
    ended: dict[int, int] = {}  # status by process

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended.update([found])

    events = select.poll()
    events.register(os.pidfd_open(child), select.POLLIN)
    events.register(file_descriptor, select.POLLRDHUP)
    signal.signal(signal.SIGCHLD, reap)
    events.poll()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # none is reaped, and its number given away, before it is killed
    deadline = time.monotonic() + _END_LIMIT_S
    while (left := _children()) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
        reap()
    code = os.waitstatus_to_exitcode(ended.get(child, 1 << 8))
    if code < 0:
        prctl(_PR_SET_DUMPABLE, 0)
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _children() -> list[int]:
    """This process's own children, zombies included."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/stat", encoding="latin-1") as file:
            _, parent, *_ = file.read().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                found.append(int(process))
    return found


class Child:
    """A child that answers with (error, result), first to `setup`; `name` and `failure` are for its death and its
    delays.
    """

    def __init__(
        self,
        name: str,
        failure: type[Exception],
        serve: Callable[[int], None],
        environment: Mapping[str, str],
        setup: Any,
    ):
        self.name, self.failure = name, failure
        self.process, self._connection = start_child(serve, environment)
        try:
            self.send(setup, "starting")
            self.receive("starting", _START_LIMIT_S)
        except BaseException:  # nobody has it yet to close it
            self.close()
            raise

    def send(self, message: Any, step: str) -> None:
        """Ask for `step`. Raises `failure` where the process has ended."""
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_dead(step)

    def receive(self, step: str, timeout_s: float | None) -> Any:
        """The next result, or its error; a process that is late, or has ended, raises `failure`."""
        try:
            if not self._connection.poll(timeout_s):
                self.close()  # a late answer would be taken for that of the next call
                raise self.failure(f"{self.name} did not finish {step} within {timeout_s:g} s")
            error, result = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._raise_dead(step)
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _raise_dead(self, step: str) -> NoReturn:
        raise self.failure(f"{self.name} ended during {step} with exit code {self.process.wait()}")


def own_environment() -> dict[str, str]:
    """This process's, without the ranks of torchrun: for a process that is none of them."""
    return {k: v for k, v in os.environ.items() if k not in _RANK and not k.startswith(_TORCHRUN)}
