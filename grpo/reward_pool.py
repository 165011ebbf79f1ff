"""Rewards in worker processes: scored as groups finish, each group and function under a time limit of its own.

Each worker has a pipe and a thread of the main process to itself, so that a function that hangs, crashes or is killed
costs its own group, and nothing else: the worker is replaced, and what it has started ends with it. A built-in function
judges completions one by one, so that a slow one costs itself alone. Workers are fresh interpreters that import neither
torch nor the main script; they start when the pool is made, and import what scoring needs while the model loads.

What a score can be: a number; None, by which a function leaves a completion to the others; or missing, which is NaN:
the number is not finite, or the function raised, crashed or ran out of time. One warning per function and step says
how many. A reward is the sum over the functions that did not give None, and missing if all did, or if a score is. Three
steps in a row without any number end the run, and so does, at once, a result that is not a list of one score per
completion.

A worker's answers are lines of JSON. Each is set off by a new line and begins with the number of its call, so that
whatever a function writes into the pipe is no answer.
"""

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashgrpo.grpo.child import end_guarded, start_child
from flashgrpo.grpo.data import Problem
from flashgrpo.grpo.reward_table import CompletionGroup, RewardSet, RewardTable, Scorer
from flashgrpo.grpo.rewards import BUILTINS, RewardError, RewardFailure, RewardFunction, resolve_reward

if TYPE_CHECKING:  # a worker must not wait for pydantic
    from flashgrpo.grpo.sections import ProgramsSection

logger = logging.getLogger(__name__)

_STEPS_WITHOUT_NUMBER = 3
_START_LIMIT_S = 600.0  # of a worker, imports included, and of what a built-in imports at its first use
_STARTS = 3  # of a worker that ends before it has begun with a call
_PROGRAM_GRACE_S = 2.0  # to start and end the last process of a program
_MAX_REASON_CHARS = 1000
_MAX_LINE_BYTES = 1 << 24
_BY_COMPLETION = BUILTINS.keys() - {"code"}  # which has limits for each program, and reads a group's tests once
_WARM_UP = r"<think>one word after another so that there are enough of them</think><answer>\frac{1}{3}</answer>"
_WANTS_MESSAGES = re.compile(r"string indices must be integers|'str' object has no attribute 'get'")
_MESSAGES = (
    "; prompts and completions are text here, also where TRL gives lists of messages: take completion in place of "
    'completion[0]["content"]'
)


class _Scores(NamedTuple):
    values: list[float | None]  # [group_size], NaN where missing, None where the function leaves it to others
    failure: str | None  # why the first missing one is missing


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
    for one function on one group; what it waits for a processor does not count, nor what built-in functions import.
    Of built-in ones, a completion may take half of what its group has left, or an equal share; `accuracy` then calls it
    wrong. `example` is any problem of the data, which built-in functions score at start, while there is time. `others`
    has the functions of further sources, `first_steps` the step from which a function applies, `scorers` what computes
    one in place of the workers: None where it is yet to be set, before the first group that it applies to. The pool
    closes them. `programs` are the limits of what `code` runs.

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
        examples: dict[str, list[dict[str, Any]]] = {}  # by function, what it may be called with
        for weight_of, problem in self._sets.values():
            arguments = self._arguments(CompletionGroup(problem, problem.question, [_WARM_UP], [[0]], ["stop"]))
            for name in weight_of:
                if name not in self.scorers:
                    _check_signature(name, arguments)
                    examples.setdefault(name, []).append(arguments)
        self._blank_steps: Counter[str] = Counter()  # in a row
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
        applies = {name: np.zeros(rewards.shape, dtype=bool) for name in self.functions}
        has_score = np.zeros(rewards.shape, dtype=bool)
        for name in self.functions:
            rows = [i for i, each in enumerate(pending) if name in each.weights]
            if not rows:
                continue
            groups = [pending[i].group for i in rows]
            if name in self.scorers:
                scores[name][rows] = self.scorers[name].score(groups)
                applies[name][rows] = True
                failure = "it gave no number" if np.isnan(scores[name][rows]).any() else None
            else:
                futures = [pending[i].futures[name] for i in rows]
                sizes = [len(group.completions) for group in groups]
                scores[name][rows], applies[name][rows], failure = _gather(name, sizes, futures)
            if failure:
                self.failures.setdefault(name, failure)
            weights = np.array([each.weights.get(name, 0.0) for each in pending])[:, None]
            counts = applies[name] & (weights != 0)
            rewards += np.where(counts, weights * scores[name], 0.0)
            has_score |= counts
        rewards[~has_score | np.isinf(rewards)] = np.nan
        return RewardTable(scores, rewards, applies)

    def check_step(self, table: RewardTable) -> None:
        """Warns of the missing scores of a step, given all its rows; to be called once a step.

        Raises RewardFailure in the third step in a row in which a function gave no number at all, but for completions
        that it left to others, or in which none did.
        """
        failures, self.failures = self.failures, {}
        applied = table.applied()
        for name, scores in applied.items():
            _warn(name, scores, failures.get(name))
            self._count_blank(f"reward {name!r}", scores, failures.get(name))
        faulty = [np.isnan(scores) & table.applies[name] for name, scores in table.scores.items()]
        if unscored := int((np.isnan(table.rewards) & ~np.any(faulty, axis=0)).sum()):
            logger.warning(
                "%d of %d completions have no reward: each function that scores them returned None",
                unscored, table.rewards.size,
            )  # fmt: skip
        if table.rewards.size:
            numbers = np.concatenate([np.empty(0), *(scores.ravel() for scores in applied.values())])
            self._count_blank("every reward function", numbers, "each returned None")

    def _count_blank(self, who: str, scores: np.ndarray, failure: str | None) -> None:
        """Counts steps in a row in which there was no number among the scores."""
        is_blank = bool(np.isnan(scores).all())
        self._blank_steps[who] = self._blank_steps[who] + 1 if is_blank else 0
        if self._blank_steps[who] == _STEPS_WITHOUT_NUMBER:
            raise RewardFailure(f"{who} gave no number in {_STEPS_WITHOUT_NUMBER} steps in a row: {failure}")

    def score(self, groups: Sequence[CompletionGroup], name: str) -> np.ndarray:
        """Scores by one function, of the pool's or not, apart from the step in progress: for an evaluation.

        Returns [num_groups, group_size] float64, NaN where missing; raises as `collect`.
        """
        futures = [self._threads.submit(self._run, name, self._arguments(group)) for group in groups]
        scores, _, failure = _gather(name, [len(group.completions) for group in groups], futures)
        _warn(name, scores, failure or "it returned None")
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


def _gather(
    name: str, sizes: Sequence[int], futures: Sequence[Future[_Result]]
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Scores [num_groups, group_size], whether each is one and not None, and why the first missing one is missing."""
    if len(set(sizes)) > 1:
        raise ValueError(f"groups of one step must have equally many completions, found {sorted(set(sizes))}")
    rows, failures = [], []
    for future in futures:
        result = future.result()
        if isinstance(result, RewardFailure):
            raise RewardFailure(f"reward {name!r} {result}")
        rows.append(result.values)
        failures += [result.failure] if result.failure else []
    values = np.array(rows, dtype=object).reshape(len(sizes), -1)
    return values.astype(float), values != None, failures[0] if failures else None  # noqa: E711  # by element


def _warn(name: str, scores: np.ndarray, failure: str | None) -> None:
    if missing := np.isnan(scores).sum():
        logger.warning("reward %r: %d of %d scores missing: %s", name, missing, scores.size, failure)


class _Worker:
    """A process that scores one group at a time. Used by one thread at a time; `close` may come from another."""

    def __init__(self, examples: Mapping[str, Sequence[dict[str, Any]]]):
        self._setup = examples
        self._lock = threading.Lock()
        self._closed = False
        self._number = 0  # of the call
        self._start()

    def score(self, name: str, arguments: dict[str, Any], limit_s: float) -> _Result:
        """Calls the function in the process; one that hung or died is replaced, and goes on with what is left."""
        num = len(arguments["completions"])
        by_completion = name in _BY_COMPLETION
        values: list[float | None] = []
        reason: str | None = None
        left_s, has_begun = limit_s, False
        while len(values) < num:
            if not has_begun:
                self._begin(name, _rows(arguments, slice(len(values), None)))
                has_begun = True
            own_limit_s = max(left_s / 2, limit_s / num) if by_completion else limit_s
            start_s = self._clock()
            try:
                part, failure = self._answer(self._number, own_limit_s)
                left_s = max(left_s - (self._clock() - start_s), 0.0)
            except (TimeoutError, EOFError, ConnectionError) as error:
                is_slow, code = isinstance(error, TimeoutError), self._restart()
                has_begun = False
                left_s = max(left_s - own_limit_s, 0.0) if is_slow else left_s
                part = [math.nan] * (1 if by_completion else num)
                failure = f"its process ended with exit code {code}"
                if is_slow and name == "accuracy":
                    part, failure = [0.0], None
                elif is_slow:
                    failure = f"no result within the limit of {own_limit_s:g} s"
            if part is None:
                return RewardFailure(failure)
            values += part
            reason = reason or failure
        return _Scores(values, reason)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            end_guarded(self._process, self._connection)

    def _begin(self, name: str, arguments: dict[str, Any]) -> None:
        """Asks for scores; returns when the process has imported everything and begins."""
        self._number += 1
        code = 0
        for _ in range(_STARTS):  # killed while idle, for memory say, which is not this group's fault
            try:
                if not self._process_id:
                    (self._process_id,) = self._answer(0, _START_LIMIT_S)
                self._connection.send((self._number, name, arguments))
                self._answer(self._number, _START_LIMIT_S)
                return
            except TimeoutError:
                raise RewardFailure(f"a reward worker was not ready within {_START_LIMIT_S:g} s") from None
            except (EOFError, ConnectionError):
                code = self._restart()
        raise RewardFailure(f"a reward worker ended {_STARTS} times before it was ready, with exit code {code}")

    def _answer(self, number: int, limit_s: float) -> list[Any]:
        """The next message of a call. Raises TimeoutError, EOFError and ConnectionError."""
        start_s = self._clock()
        while True:
            while b"\n" in self._received:
                line, _, self._received = self._received.partition(b"\n")
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    found, *message = json.loads(line)
                    if found == number:
                        return message
            left_s = limit_s - (self._clock() - start_s)
            if left_s <= 0:
                raise TimeoutError
            if self._connection.poll(left_s + 0.01):
                if not (read := os.read(self._connection.fileno(), 1 << 16)):
                    raise EOFError
                self._received = self._received[-_MAX_LINE_BYTES:] + read

    def _clock(self) -> float:
        """Seconds, but for those that the process could have run and waited for a processor that others had."""
        try:
            with open(f"/proc/{self._process_id}/schedstat", encoding="ascii") as file:
                return time.monotonic() - int(file.read().split()[1]) / 1e9
        except (OSError, IndexError):  # not known: it starts, it has ended, or the kernel does not count
            return time.monotonic()

    def _restart(self) -> int:
        with self._lock:
            code = end_guarded(self._process, self._connection)
            self._connection.close()
            if self._closed:
                raise RewardFailure("the pool is closed")
            self._start()
        return code

    def _start(self) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process, self._connection = start_child(serve, {**os.environ, **one_thread}, guarded=True)
        self._process_id, self._received = 0, b""
        self._connection.send(self._setup)


def serve(file_descriptor: int) -> None:
    """A worker's life: scores groups that come through the pipe until its other end is closed."""
    os.dup2(2, 1)  # what a reward prints must not mix with the main process's output
    own_id = os.getpid()
    with (
        contextlib.suppress(EOFError, ConnectionError),
        Connection(file_descriptor) as connection,
        open(file_descriptor, "w", encoding="ascii", closefd=False) as pipe,
    ):

        def answer(*message: Any) -> None:
            if os.getpid() != own_id:  # a function has forked, and returned in both
                os._exit(0)
            pipe.write(f"\n{json.dumps(message)}\n")
            pipe.flush()

        examples = connection.recv()
        functions = {name: resolve_reward(name) for name in examples}
        for name, given in examples.items():
            for arguments in given:
                _prepare(name, arguments)
        answer(0, own_id)
        while True:
            number, name, arguments = connection.recv()
            if name not in functions:
                functions[name] = BUILTINS[name]
                _prepare(name, arguments)
            answer(number)
            rows = range(len(arguments["completions"])) if name in _BY_COMPLETION else ()
            for part in [_rows(arguments, slice(i, i + 1)) for i in rows] or [arguments]:
                answer(number, *_call(functions[name], part))


def _rows(arguments: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Arguments for some of the completions."""
    return {name: value[rows] if isinstance(value, list) else value for name, value in arguments.items()}


def _prepare(name: str, arguments: dict[str, Any]) -> None:
    """Has a built-in function import and load what it will need; the user's may cost money, or count its calls."""
    if name not in BUILTINS:
        return
    row = _rows(arguments, slice(1)) | {"completions": [_WARM_UP]}
    _call(BUILTINS[name], row)
    if name == "accuracy":  # of words and whole numbers it compares many without mathematics
        _call(BUILTINS[name], row | {"answer": [r"\frac{1}{2}"], "task": [None]})


@functools.cache
def _event_loop() -> Any:
    """One for all calls: clients that a function keeps belong to it."""
    import asyncio

    return asyncio.new_event_loop()


def _call(function: RewardFunction, arguments: dict[str, Any]) -> tuple[list[float | None] | None, str | None]:
    """Scores, and why the first missing one is missing; no scores for a malformed result, and what is wrong with it."""
    num = len(arguments["completions"])
    try:
        result: Any = function(**arguments)
        if inspect.isawaitable(result):
            result = _event_loop().run_until_complete(result)
        values = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
        if not isinstance(values, list | tuple):
            return None, f"returned {type(values).__name__}, wanted a list of {num} numbers or None"
        if len(values) != num:
            return None, f"returned {len(values)} scores for {num} completions, wanted {num}"
        for value in values:
            if value is not None and (isinstance(value, str | bytes) or not hasattr(value, "__float__")):
                return None, f"returned {type(value).__name__} {value!r:.80} as a score, wanted a number or None"
        scores: list[float | None] = [None if value is None else float(value) for value in values]
    except Exception as error:  # a function may raise anything; the rule for it is a missing score and a warning
        text = str(error)[:_MAX_REASON_CHARS]
        hint = _MESSAGES if _WANTS_MESSAGES.search(text) else ""
        return [math.nan for _ in range(num)], f"{type(error).__name__}: {text}{hint}"
    faulty = [score for score in scores if score is not None and not math.isfinite(score)]
    failure = f"it returned {faulty[0]}" if faulty else None
    return [math.nan if score is not None and not math.isfinite(score) else score for score in scores], failure
