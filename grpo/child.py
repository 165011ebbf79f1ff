"""Processes of the trainer's own: fresh interpreters at the other end of a pipe, which end when it closes."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from flashgrpo.grpo.interrupts import SIGNALS

_START_LIMIT_S = 1800.0


def start_child(
    serve: Callable[[int], None], environment: Mapping[str, str] | None = None, process_group: int | None = None
) -> tuple[subprocess.Popen, Connection]:
    """A process that runs `serve`, a function of a module, with the file descriptor of its end of a pipe; and our end.

    The process hears neither Ctrl-C nor the signals that ask for the same, which a terminal or a scheduler sends to
    every process, and does not import the main script.
    """
    ours, theirs = multiprocessing.Pipe()
    command = (  # before anything that takes time is imported
        f"import sys; sys.path[:] = {sys.path!r}; import {__name__}; {__name__}.ignore_signals(); "
        f"from {serve.__module__} import serve; serve({theirs.fileno()})"
    )
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=environment,
            process_group=process_group,
        )
    return process, ours


def ignore_signals() -> None:
    """By this process alone: a function of a user's that ends a process of its own by SIGTERM can do so."""

    def restore() -> None:
        for number in SIGNALS[1:]:
            signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in SIGNALS[1:]:
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, what is started by exec does not inherit it
    os.register_at_fork(after_in_child=restore)


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
