"""Runs a function of a test on several ranks: processes forked off one that has imported everything, over gloo.

`run(function, 4, *arguments)` returns each rank's result. The function lives at the top level of a test file and gets
torchrun's environment, so that `open_world` in it joins the ranks. A rank may die: `run(..., check=False)`.
"""

import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flashgrpo.grpo.stages.sft", "flashgrpo.grpo.train", "hypothesis", "pytest"])


class Outcome(NamedTuple):
    """How a rank ended: `error` is its traceback, `exit_code` negative after a signal."""

    result: Any
    error: str | None
    exit_code: int


def start(function, size: int, *arguments, environment: dict[str, str] | None = None):
    """The ranks' processes and the pipes of their results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        variables = {k: str(v) for k, v in variables.items()} | {"MASTER_PORT": str(port)} | (environment or {})
        where = function.__code__.co_filename, function.__name__
        process = _CONTEXT.Process(target=_rank, args=(where, pickle.dumps(arguments), variables, sys.path, sender))
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def finish(started, timeout_s: float) -> list[Outcome]:
    """Waits for every rank to end; those that do not within the time limit are killed."""
    deadline = time.monotonic() + timeout_s
    outcomes = []
    try:
        for process, receiver in started:
            result, error = None, f"gave no result within {timeout_s} s"
            if wait([receiver], max(deadline - time.monotonic(), 0)):
                try:
                    result, error = pickle.loads(receiver.recv_bytes())  # tensors by value
                except EOFError:
                    error = "died"
            process.join(max(deadline - time.monotonic(), 1))
            outcomes.append(Outcome(result, error, process.exitcode or 0))
    finally:
        for process, _ in started:
            process.kill()
            process.join()
    return outcomes


def run(function, size: int, *arguments, check: bool = True, timeout_s: float = 120.0) -> list[Any]:
    """Each rank's result of `function(*arguments)`, in their order; without `check`, their Outcomes."""
    outcomes = finish(start(function, size, *arguments), timeout_s)
    if not check:
        return outcomes
    failed = [f"rank {rank}: {o.error or o.exit_code}" for rank, o in enumerate(outcomes) if o.error or o.exit_code]
    assert not failed, "\n".join(failed)
    return [outcome.result for outcome in outcomes]


def _rank(where: tuple[str, str], arguments: bytes, variables: dict[str, str], path: list[str], sender) -> None:
    os.environ.update(variables)
    sys.path[:] = path
    try:
        file, name = where
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result = getattr(module, name)(*pickle.loads(arguments))
    except BaseException:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
        raise
    sender.send_bytes(pickle.dumps((result, None)))
