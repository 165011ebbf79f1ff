"""Rewards in worker processes: scored as groups finish, each group and function under a time limit of its own.

Each worker has a pipe and a thread of the main process to itself, so that a function that hangs, crashes or is killed
costs its own group, and nothing else: the worker is replaced. Workers are fresh interpreters that import neither
torch nor the main script; they start when the pool is made, and import what scoring needs while the model loads.

What a score can be: a number; or missing, which is NaN: the function gave None or a number that is not finite,
raised, crashed or ran out of time. One warning per function and step says how many. Three steps in a row without any
number end the run, and so does, at once, a result that is not a list of one score per completion.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from flashgrpo.grpo.data import Problem
from flashgrpo.grpo.rewards import BUILTINS, RewardError, RewardFailure, RewardFunction, resolve_reward

logger = logging.getLogger(__name__)

_SUM = Problem("What is 1 + 1?", {"answer": "2"})
_STEPS_WITHOUT_NUMBER = 3
_START_LIMIT_S = 120.0
_ORPHAN_GRACE_S = 1.0


@dataclass(frozen=True)
class CompletionGroup:
    """The completions of one problem, as rewards see them."""

    problem: Problem
    prompt: str  # the text that the model continued, in its template
    completions: Sequence[str]  # [group_size]
    completion_ids: Sequence[Sequence[int]]  # [group_size], each [num_tokens]
    finish_reasons: Sequence[str]  # [group_size]


@dataclass(frozen=True)
class RewardTable:
    """Scores of a step in the order in which its groups were submitted; NaN where missing."""

    scores: dict[str, np.ndarray]  # by function, [num_groups, group_size] float64
    rewards: np.ndarray  # [num_groups, group_size] float64, the weighted sum


class _Scores(NamedTuple):
    values: list[float]  # [group_size], NaN where missing
    failure: str | None  # why any are missing


class _Malformed(NamedTuple):
    reason: str


_Futures = dict[str, Future[_Scores | _Malformed]]  # by function


class RewardPool:
    """Scores groups of completions with several reward functions in parallel processes. Use as a context manager.

        with RewardPool(["accuracy", "format"], max_new_tokens=1024, example=problems[0]) as pool:
            pool.submit(group)           # as groups finish
            table = pool.collect()       # at the end of the step

    Functions get the arguments that `flashgrpo.grpo.rewards` describes. A column of the data set that is named like
    one of the pool's own (`prompts`, `completions`, ...) is hidden by it. Neither the timing nor the number of workers
    changes a result.

    Args:
        functions: names, see `resolve_reward`; each is resolved here as well, so that a wrong one fails now.
        weights: one per function, default 1; a function of weight 0 is scored but does not enter the sum.
        max_new_tokens: the limit that completions are generated under.
        timeout_s: limit for one function on one group.
        num_workers: processes.
        example: any problem of the data; workers score it at start, so that imports do not count as scoring.

    Raises:
        RewardError: no, repeated or unresolvable functions; weights that are not one finite number each, or all 0.
    """

    def __init__(
        self,
        functions: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        max_new_tokens: int,
        timeout_s: float = 10.0,
        num_workers: int = 2,
        example: Problem = _SUM,
    ):
        self.functions = list(functions)
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        self._check_configuration()
        self._max_new_tokens = max_new_tokens
        self._steps_without_number = dict.fromkeys(self.functions, 0)
        self._pending: list[tuple[int, _Futures]] = []  # group size and futures
        setup = _Setup(self.functions, timeout_s, self._arguments(_example_group(example)))
        self._workers = [_Worker(setup) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers at once, whatever they are doing; unfinished groups are lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)

    def submit(self, group: CompletionGroup) -> None:
        """Queues a group for scoring and returns at once."""
        arguments = self._arguments(group)
        futures = {name: self._schedule(name, arguments) for name in self.functions}
        self._pending.append((len(group.completions), futures))

    def collect(self) -> RewardTable:
        """Waits for the groups submitted since the last call, which make up a step; rows are in their order.

        Raises:
            RewardFailure: a malformed result, or the third step in a row in which a function gave no number at all.
            ValueError: groups of different sizes.
        """
        pending, self._pending = self._pending, []
        sizes = [size for size, _ in pending]
        scores: dict[str, np.ndarray] = {}
        for name in self.functions:
            scores[name], failure = self._gather(name, sizes, [futures[name] for _, futures in pending])
            is_blank = scores[name].size > 0 and bool(np.isnan(scores[name]).all())
            self._steps_without_number[name] = self._steps_without_number[name] + 1 if is_blank else 0
            if self._steps_without_number[name] == _STEPS_WITHOUT_NUMBER:
                raise RewardFailure(
                    f"reward {name!r} gave no number in {_STEPS_WITHOUT_NUMBER} steps in a row: {failure}"
                )
        weighted = [weight * scores[name] for name, weight in zip(self.functions, self.weights, strict=True) if weight]
        return RewardTable(scores, np.sum(weighted, axis=0))

    def score(self, groups: Sequence[CompletionGroup], name: str) -> np.ndarray:
        """Scores by one function, of the pool's or not, apart from the step in progress: for an evaluation.

        Returns:
            [num_groups, group_size] float64, NaN where missing.

        Raises:
            RewardFailure: a malformed result.
            ValueError: groups of different sizes.
        """
        sizes = [len(group.completions) for group in groups]
        return self._gather(name, sizes, [self._schedule(name, self._arguments(group)) for group in groups])[0]

    def _check_configuration(self) -> None:
        if not self.functions:
            raise RewardError(f"no reward functions; name at least one of {', '.join(BUILTINS)}, or your own")
        for name in self.functions:
            if self.functions.count(name) > 1:
                raise RewardError(f"reward {name!r} is named {self.functions.count(name)} times; name it once")
            resolve_reward(name)
        if len(self.weights) != len(self.functions):
            raise RewardError(f"{len(self.weights)} weights for {len(self.functions)} reward functions; give one each")
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise RewardError(f"reward weights are {self.weights}; all must be finite, and one not 0")

    def _arguments(self, group: CompletionGroup) -> dict[str, Any]:
        """What a reward function is called with."""
        num = len(group.completions)
        return {
            **{name: [value] * num for name, value in group.problem.columns.items()},
            "prompts": [group.prompt] * num,
            "questions": [group.problem.question] * num,
            "completions": list(group.completions),
            "completion_ids": [list(ids) for ids in group.completion_ids],
            "finish_reasons": list(group.finish_reasons),
            "max_new_tokens": self._max_new_tokens,
        }

    def _schedule(self, name: str, arguments: dict[str, Any]) -> Future[_Scores | _Malformed]:
        return self._threads.submit(self._run, name, arguments)

    def _run(self, name: str, arguments: dict[str, Any]) -> _Scores | _Malformed:
        worker = self._idle.get()
        try:
            return worker.score(name, arguments)
        finally:
            self._idle.put(worker)

    def _gather(
        self, name: str, sizes: Sequence[int], futures: Sequence[Future[_Scores | _Malformed]]
    ) -> tuple[np.ndarray, str | None]:
        """(scores [num_groups, group_size], why the first missing score is missing); warns of missing ones."""
        if len(set(sizes)) > 1:
            raise ValueError(f"groups of one step must have equally many completions, found {sorted(set(sizes))}")
        scores = np.full((len(sizes), sizes[0] if sizes else 0), np.nan)
        failure = None
        for row, future in enumerate(futures):
            result = future.result()
            if isinstance(result, _Malformed):
                raise RewardFailure(f"reward {name!r} {result.reason}")
            scores[row] = result.values
            failure = failure or result.failure
        if failure:
            logger.warning("reward %r: %d of %d scores missing: %s", name, np.isnan(scores).sum(), scores.size, failure)
        return scores, failure


def _example_group(problem: Problem) -> CompletionGroup:
    return CompletionGroup(problem, problem.question, ["<think>so</think><answer>0</answer>"], [[0]], ["stop"])


class _Setup(NamedTuple):
    """What a worker is told at its start."""

    functions: list[str]
    timeout_s: float
    example: dict[str, Any]  # arguments for one call of each built-in


class _Worker:
    """A process that scores one group at a time. Used by one thread at a time; `close` may come from another."""

    def __init__(self, setup: _Setup):
        self._setup = setup
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def score(self, name: str, arguments: dict[str, Any]) -> _Scores | _Malformed:
        """Calls the function in the process; one that hung or died is replaced."""
        if self._process.poll() is not None:  # killed while idle, for memory say, which is not this group's fault
            self._restart()
        self._await_start()
        limit_s = self._setup.timeout_s
        missing = [math.nan] * len(arguments["completions"])
        try:
            self._connection.send((name, arguments))
            if self._connection.poll(limit_s):
                return self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            failure = f"its process ended with exit code {self._process.wait()}"
        else:
            failure = f"no result within the limit of {limit_s:g} s"
        self._restart()
        return _Scores(missing, failure)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._process.kill()
            self._process.wait()

    def _await_start(self) -> None:
        if self._started:
            return
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self._connection.poll(_START_LIMIT_S):
                self._started = self._connection.recv()
        if not self._started:
            self._process.kill()
            code = self._process.wait()
            raise RewardFailure(f"a reward worker did not start within {_START_LIMIT_S:g} s (exit code {code})")

    def _restart(self) -> None:
        with self._lock:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            if not self._closed:
                self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        command = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C at the terminal goes to the main process, which then ends its workers
            )
        self._started = False
        self._connection.send(self._setup)


def serve(file_descriptor: int) -> None:
    """A worker's life: scores groups that come through the pipe until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what a reward prints must not mix with the main process's output
    with Connection(file_descriptor) as connection, contextlib.suppress(EOFError, ConnectionResetError):
        setup: _Setup = connection.recv()
        for name in setup.functions:
            function = resolve_reward(name)
            if name in BUILTINS:  # the user's may cost money, or count its calls
                _call(function, setup.example)
        connection.send(True)
        while True:
            name, arguments = connection.recv()
            # Ends this process even if the main one is gone and nobody enforces the limit.
            signal.setitimer(signal.ITIMER_REAL, setup.timeout_s + _ORPHAN_GRACE_S)
            result = _call(resolve_reward(name), arguments)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(result)


def _call(function: RewardFunction, arguments: dict[str, Any]) -> _Scores | _Malformed:
    num = len(arguments["completions"])
    try:
        result: Any = function(**arguments)
    except Exception as error:  # a function may raise anything; the rule for it is a missing score and a warning
        return _Scores([math.nan] * num, f"{type(error).__name__}: {error}")
    values = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
    if not isinstance(values, list | tuple):
        return _Malformed(f"returned {type(values).__name__}, wanted a list of {num} numbers or None")
    if len(values) != num:
        return _Malformed(f"returned {len(values)} scores for {num} completions, wanted {num}")
    scores, failure = [], None
    for value in values:
        if value is None:
            score = math.nan
        elif isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            return _Malformed(f"returned {type(value).__name__} {value!r:.80} as a score, wanted a number or None")
        else:
            score = float(value)
        if not math.isfinite(score):
            failure = failure or f"it returned {value}"
            score = math.nan
        scores.append(score)
    return _Scores(scores, failure)
