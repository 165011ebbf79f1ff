"""Rewards in worker processes: scored as groups finish, each group and function under a time limit of its own.

Each worker has a pipe and a thread of the main process to itself, so that a function that hangs, crashes or is killed
costs its own group, and nothing else: the worker is replaced. Workers are fresh interpreters that import neither
torch nor the main script; they start when the pool is made, and import what scoring needs while the model loads.

What a score can be: a number; or missing, which is NaN: the function gave None or a number that is not finite,
raised, crashed or ran out of time. One warning per function and step says how many. Three steps in a row without any
number end the run, and so does, at once, a result that is not a list of one score per completion.
"""

import contextlib
import inspect
import logging
import math
import os
import queue
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashgrpo.grpo.child import start_child
from flashgrpo.grpo.data import Problem
from flashgrpo.grpo.reward_table import CompletionGroup, RewardSet, RewardTable, Scorer
from flashgrpo.grpo.rewards import BUILTINS, RewardError, RewardFailure, RewardFunction, resolve_reward

if TYPE_CHECKING:  # a worker must not wait for pydantic
    from flashgrpo.grpo.sections import ProgramsSection

logger = logging.getLogger(__name__)

_STEPS_WITHOUT_NUMBER = 3
_START_LIMIT_S = 120.0
_ORPHAN_GRACE_S = 1.0
_PROGRAM_GRACE_S = 2.0  # to start and end the last process of a program


class _Scores(NamedTuple):
    values: list[float]  # [group_size], NaN where missing
    failure: str | None  # why any are missing


_Result = _Scores | RewardFailure  # the latter for a malformed result


class _Pending(NamedTuple):
    group: CompletionGroup
    weights: dict[str, float]  # of the functions that apply
    futures: dict[str, Future[_Result]]  # of those that workers compute


class RewardPool:
    """Scores groups of completions with several reward functions in parallel processes. Use as a context manager.

        with RewardPool(["accuracy", "format"], max_new_tokens=1024, example=problems[0]) as pool:
            pool.submit(group)           # as groups finish
            table = pool.collect()       # what was submitted since the last call
            pool.check_step(table)       # at the end of the step

    Functions get the arguments that `flashgrpo.grpo.rewards` describes. A column of the data set that is named like
    one of the pool's own (`prompts`, `completions`, ...) is hidden by it. Neither the timing nor the number of workers
    changes a result.

    `functions` are names, see `resolve_reward`; one of weight 0 is scored but does not enter the sum. `timeout_s` is
    for one function on one group. `example` is any problem of the data: workers score it at start, so that imports do
    not count as scoring. `others` has the functions of further sources, `first_steps` the step from which a function
    applies, `scorers` what computes one in place of the workers: None where it is yet to be set, before the first group
    that it applies to. The pool closes them. `programs` are the limits of what `code` runs.

    Raises RewardError for a function that cannot be found, or not be called with the columns of `example`.
    """

    def __init__(
        self,
        functions: Sequence[str],
        weights: Sequence[float] = (),
        *,
        max_new_tokens: int,
        example: Problem,
        timeout_s: float = 10.0,
        num_workers: int = 2,
        others: Mapping[str, RewardSet] = MappingProxyType({}),
        first_steps: Mapping[str, int] = MappingProxyType({}),
        scorers: Mapping[str, Scorer | None] = MappingProxyType({}),
        programs: "ProgramsSection | None" = None,
    ):
        weight_of = dict(zip(functions, weights or [1.0] * len(functions), strict=True))
        self._sets = {"data": RewardSet(weight_of, example), **others}
        self.functions = list(dict.fromkeys(name for each in self._sets.values() for name in each.weights))
        self.scorers: dict[str, Any] = dict(scorers)
        self._first_steps, self._max_new_tokens, self._timeout_s = first_steps, max_new_tokens, timeout_s
        self._programs = programs
        if programs and "code" in self.functions:
            from flashgrpo.grpo.sandbox import check_isolation

            check_isolation(programs)
        examples: dict[str, dict[str, Any]] = {}  # by function, what it may be called with
        for weight_of, problem in self._sets.values():
            text = "<think>so</think><answer>0</answer>"
            arguments = self._arguments(CompletionGroup(problem, problem.question, [text], [[0]], ["stop"]))
            for name in weight_of:
                if name not in self.scorers:
                    _check_signature(name, arguments)
                    examples.setdefault(name, arguments)
        self._steps_without_number = dict.fromkeys(self.functions, 0)
        self.failures: dict[str, str] = {}  # by function, why the first missing score of the step is missing
        self._pending: list[_Pending] = []
        self._workers = [_Worker(examples) for _ in range(num_workers)]
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
        for each in (*self._workers, *filter(None, self.scorers.values())):
            each.close()
        self._threads.shutdown(wait=True)

    def submit(self, group: CompletionGroup, step: float = math.inf) -> None:
        """Queues a group for scoring, by the functions of its source that apply in `step`, and returns at once."""
        arguments = self._arguments(group)
        weights = self._sets[group.source].weights
        weights = {name: weight for name, weight in weights.items() if step >= self._first_steps.get(name, 0)}
        futures = {n: self._threads.submit(self._run, n, arguments) for n in weights if n not in self.scorers}
        for name in weights.keys() & self.scorers:
            self.scorers[name].submit(group)
        self._pending.append(_Pending(group, weights, futures))

    def collect(self) -> RewardTable:
        """Waits for the groups submitted since the last call; rows are in their order.

        Raises RewardFailure for a malformed result, ValueError for groups of different sizes.
        """
        pending, self._pending = self._pending, []
        rewards = np.zeros((len(pending), len(pending[0].group.completions) if pending else 0))
        scores = {name: np.full(rewards.shape, np.nan) for name in self.functions}
        applies = {name: np.array([name in each.weights for each in pending], dtype=bool) for name in self.functions}
        for name, rows in applies.items():
            own = [each for each in pending if name in each.weights]
            if not own:
                continue
            if name in self.scorers:
                scores[name][rows] = self.scorers[name].score([each.group for each in own])
                failure = "it gave no number" if np.isnan(scores[name][rows]).any() else None
            else:
                sizes = [len(each.group.completions) for each in own]
                scores[name][rows], failure = _gather(name, sizes, [each.futures[name] for each in own])
            if failure:
                self.failures.setdefault(name, failure)
            weights = np.array([each.weights.get(name, 0.0) for each in pending])[:, None]
            rewards += np.where(weights != 0, weights * scores[name], 0.0)
        return RewardTable(scores, rewards, applies)

    def check_step(self, table: RewardTable) -> None:
        """Warns of the missing scores of a step, given all its rows; to be called once a step.

        Raises RewardFailure in the third step in a row in which a function gave no number at all.
        """
        failures, self.failures = self.failures, {}
        for name, scores in table.applied().items():
            _warn(name, scores, failures.get(name))
            is_blank = bool(np.isnan(scores).all())
            self._steps_without_number[name] = self._steps_without_number[name] + 1 if is_blank else 0
            if self._steps_without_number[name] == _STEPS_WITHOUT_NUMBER:
                raise RewardFailure(
                    f"reward {name!r} gave no number in {_STEPS_WITHOUT_NUMBER} steps in a row: {failures.get(name)}"
                )

    def score(self, groups: Sequence[CompletionGroup], name: str) -> np.ndarray:
        """Scores by one function, of the pool's or not, apart from the step in progress: for an evaluation.

        Returns [num_groups, group_size] float64, NaN where missing; raises as `collect`.
        """
        futures = [self._threads.submit(self._run, name, self._arguments(group)) for group in groups]
        scores, failure = _gather(name, [len(group.completions) for group in groups], futures)
        _warn(name, scores, failure)
        return scores

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

    def _run(self, name: str, arguments: dict[str, Any]) -> _Result:
        limit_s = self._timeout_s
        if name == "code" and self._programs:
            arguments = arguments | {"programs": self._programs}
            limit_s = max(limit_s, len(arguments["completions"]) * (self._programs.time_s + _PROGRAM_GRACE_S))
        worker = self._idle.get()
        try:
            return worker.score(name, arguments, limit_s)
        finally:
            self._idle.put(worker)


def _check_signature(name: str, arguments: dict[str, Any]) -> None:
    function = resolve_reward(name)
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:  # ValueError: of what is written in C and has no signature
        called = f"called as (prompts, completions, **columns) with the columns {', '.join(arguments)}"
        raise RewardError(f"reward {name!r}: {error}; it is {called}") from error


def _gather(name: str, sizes: Sequence[int], futures: Sequence[Future[_Result]]) -> tuple[np.ndarray, str | None]:
    """(scores [num_groups, group_size], why the first missing score is missing)."""
    if len(set(sizes)) > 1:
        raise ValueError(f"groups of one step must have equally many completions, found {sorted(set(sizes))}")
    scores = np.full((len(sizes), sizes[0] if sizes else 0), np.nan)
    failures = []
    for row, future in enumerate(futures):
        result = future.result()
        if isinstance(result, RewardFailure):
            raise RewardFailure(f"reward {name!r} {result}")
        scores[row] = result.values
        failures += [result.failure] if result.failure else []
    return scores, failures[0] if failures else None


def _warn(name: str, scores: np.ndarray, failure: str | None) -> None:
    if missing := np.isnan(scores).sum():
        logger.warning("reward %r: %d of %d scores missing: %s", name, missing, scores.size, failure)


class _Worker:
    """A process that scores one group at a time. Used by one thread at a time; `close` may come from another."""

    def __init__(self, examples: dict[str, dict[str, Any]]):
        self._setup = examples
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def score(self, name: str, arguments: dict[str, Any], limit_s: float) -> _Result:
        """Calls the function in the process; one that hung or died is replaced."""
        if self._process.poll() is not None:  # killed while idle, for memory say, which is not this group's fault
            self._restart()
        self._await_start()
        try:
            self._connection.send((name, arguments, limit_s))
            if self._connection.poll(limit_s):
                return self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            failure = f"its process ended with exit code {self._process.wait()}"
        else:
            failure = f"no result within the limit of {limit_s:g} s"
        self._restart()
        return _Scores([math.nan] * len(arguments["completions"]), failure)

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
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # Ctrl-C at the terminal goes to the main process, which then ends its workers, whatever those start
        self._process, self._connection = start_child(serve, {**os.environ, **one_thread}, process_group=0)
        self._started = False
        self._connection.send(self._setup)


def serve(file_descriptor: int) -> None:
    """A worker's life: scores groups that come through the pipe until its other end is closed."""
    os.dup2(2, 1)  # what a reward prints must not mix with the main process's output
    with Connection(file_descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        examples = connection.recv()
        functions = {name: resolve_reward(name) for name in examples}
        for name in functions.keys() & BUILTINS.keys():  # the user's may cost money, or count its calls
            _call(functions[name], examples[name])
        connection.send(True)
        while True:
            name, arguments, limit_s = connection.recv()
            # Ends this process even if the main one is gone and nobody enforces the limit.
            signal.setitimer(signal.ITIMER_REAL, limit_s + _ORPHAN_GRACE_S)
            result = _call(functions.get(name) or BUILTINS[name], arguments)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(result)


def _call(function: RewardFunction, arguments: dict[str, Any]) -> _Result:
    num = len(arguments["completions"])
    try:
        result: Any = function(**arguments)
    except Exception as error:  # a function may raise anything; the rule for it is a missing score and a warning
        return _Scores([math.nan] * num, f"{type(error).__name__}: {error}")
    values = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
    if not isinstance(values, list | tuple):
        return RewardFailure(f"returned {type(values).__name__}, wanted a list of {num} numbers or None")
    if len(values) != num:
        return RewardFailure(f"returned {len(values)} scores for {num} completions, wanted {num}")
    for value in values:
        if value is not None and (isinstance(value, str | bytes) or not hasattr(value, "__float__")):
            return RewardFailure(f"returned {type(value).__name__} {value!r:.80} as a score, wanted a number or None")
    is_missing = [value is None or not math.isfinite(value) for value in values]
    failure = f"it returned {values[is_missing.index(True)]}" if any(is_missing) else None
    return _Scores([math.nan if m else float(v) for v, m in zip(values, is_missing, strict=True)], failure)
