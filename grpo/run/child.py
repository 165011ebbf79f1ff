"""Processes of the trainer's own: fresh interpreters at the other end of a pipe, which end when it closes."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from flashgrpo.grpo.errors import FlashgrpoError
from flashgrpo.grpo.run.interrupts import SIGNALS, outlive_output

_RANK, _TORCHRUN = ("RANK", "WORLD_SIZE"), ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
_START_LIMIT_S = 1800.0
_END_LIMIT_S = 5.0
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36  # of prctl


def start_child(
    life: Callable[[int], None], environment: Mapping[str, str] | None = None, guarded: bool = False
) -> tuple[subprocess.Popen, Connection]:
    """A process that runs `life`, a function of a module, with the file descriptor of its end of a pipe; and our end.

    The process hears neither Ctrl-C nor the signals that ask for the same, which a terminal or a
    scheduler sends to every process, and does not import the main script. One that runs what a user
    wrote is `guarded`: it has a process group of its own, the process that is returned is its guard
    (see `guard`), and `end_guarded` ends it.
    """
    ours, theirs = multiprocessing.Pipe()
    # Signals are ignored, and the guard is there, before anything that takes time is imported.
    command = (
        f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as child; child.ignore_signals(); "
        + (f"child.guard({theirs.fileno()}); " if guarded else "")
        + f"from {life.__module__} import {life.__name__} as life; life({theirs.fileno()})"
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
    """
    # Orphans become its own children, so that nothing escapes by a session or a parent that ends.
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

    # After the fork: the child need not wait for it.
    import psutil

    events = select.poll()
    events.register(os.pidfd_open(child), select.POLLIN)
    events.register(file_descriptor, select.POLLRDHUP)
    signal.signal(signal.SIGCHLD, reap)
    events.poll()
    # From now on none is reaped, and its number given away, before it is killed.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    deadline = time.monotonic() + _END_LIMIT_S
    while (left := psutil.Process().children()) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.002)
        reap()
    # The trainer tells how a worker ended by the end of its guard; a signal of the child's must not dump core twice.
    code = os.waitstatus_to_exitcode(ended.get(child, 1 << 8))
    if code < 0:
        prctl(_PR_SET_DUMPABLE, 0)
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


class Child:
    """A process with an object of its own, whose methods are called from here: what `make` of a module returns for
    `arguments`. `name` and `failure` are for its death, its delays, and errors that are not this project's.
    """

    def __init__(
        self,
        name: str,
        failure: type[Exception],
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        environment: Mapping[str, str],
    ):
        self.name, self.failure = name, failure
        self.process, self._connection = start_child(answer_calls, environment)
        try:
            self.send(make, *arguments)
            self.receive("starting", _START_LIMIT_S)
        except BaseException:  # nobody has it yet to close it
            self.close()
            raise

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """The method's result."""
        self.send(method, *arguments)
        return self.receive(method, timeout_s)

    def send(self, method: Any, *arguments: Any) -> None:
        """Ask for a call. Raises `failure` where the process has ended."""
        try:
            self._connection.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            self._raise_dead("starting" if callable(method) else method)

    def receive(self, method: str, timeout_s: float | None) -> Any:
        """Its result, or the next one where it yields them. Raises its error; a process that is late, or has ended,
        raises `failure`.
        """
        try:
            if not self._connection.poll(timeout_s):
                self.close()  # a late answer would be taken for that of the next call
                raise self.failure(f"{self.name} did not finish {method} within {timeout_s:g} s")
            error, result = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._raise_dead(method)
        if isinstance(error, str):
            raise self.failure(f"{self.name}: {error}")
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _raise_dead(self, method: str) -> NoReturn:
        raise self.failure(f"{self.name} ended during {method} with exit code {self.process.wait()}")


def answer_calls(file_descriptor: int) -> None:
    """The life of a `Child`'s process: it makes the object, and answers calls until the other end is closed."""
    from flashgrpo.model.config import CheckpointError

    os.dup2(2, 1)  # what a library prints must not mix with the trainer's output
    made: Any = None
    with Connection(file_descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        while True:
            message = connection.recv_bytes()
            try:
                # Here what cannot be imported is an error of the call, as any other.
                method, arguments = pickle.loads(message)
                if made is None:
                    made, results = method(*arguments), [None]
                else:
                    found = getattr(made, method)(*arguments)
                    results = found if isinstance(found, Iterator) else [found]
                for result in results:
                    connection.send((None, result))
            except (FlashgrpoError, CheckpointError) as error:  # raised again at the other end
                connection.send((error, None))
            except Exception as error:  # of a library; its class may not be known there
                connection.send((f"{type(error).__name__}: {error}", None))
    os.kill(os.getpid(), signal.SIGKILL)  # threads of a library's would keep it


def own_environment() -> dict[str, str]:
    """This process's, without the ranks of torchrun: for a process that is none of them."""
    return {k: v for k, v in os.environ.items() if k not in _RANK and not k.startswith(_TORCHRUN)}
