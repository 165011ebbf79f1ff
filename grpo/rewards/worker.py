"""A worker of the reward pool: a process that scores one group at a time; both ends of its pipe.

Groups go out pickled. Answers come back as lines of JSON: each is set off by a new line and begins
with the number of its call, so that whatever a function writes into the pipe is no answer. The
first says that everything is imported.
"""

import contextlib
import functools
import inspect
import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from flashgrpo.grpo.errors import RewardFailure
from flashgrpo.grpo.rewards.rules import BUILTINS, RewardFunction, resolve_reward
from flashgrpo.grpo.run.child import end_guarded, start_child

# Of a worker, imports included, and of what a built-in imports at its first use.
_START_LIMIT_S = 600.0
_STARTS = 3  # of a worker that ends before it has begun with a call
_MAX_REASON_CHARS = 1000
_MAX_LINE_BYTES = 1 << 24
# Judges completions one by one, so that a slow answer costs itself alone.
_BY_COMPLETION = "accuracy"
_TOGETHER = 1 / 4  # of its limit, in which it may judge all completions of a group at once
WARM_UP = r"<think>one word after another so that there are enough of them</think><answer>\frac{1}{3}</answer>"
_WANTS_MESSAGES = re.compile(r"string indices must be integers|'str' object has no attribute 'get'")
_MESSAGES = (
    "; prompts and completions are text here, also where TRL gives lists of messages: take completion in place of "
    'completion[0]["content"]'
)


class Outcome(NamedTuple):
    """What a function gave for a group."""

    # [group_size], NaN where missing, None where the function leaves it to others.
    values: list[float | None]
    failure: str | None  # why the first missing or slow one is so
    seconds: float = 0.0  # that the process took


class Worker:
    """A process that scores one group at a time. Used by one thread at a time; `close` may come from another."""

    def __init__(self, examples: Mapping[str, Sequence[dict[str, Any]]]):
        self._examples = examples
        self._lock = threading.Lock()
        self._closed = False
        self._number = 0  # of the call
        self._start()

    def score(self, name: str, arguments: dict[str, Any], limit_s: float) -> Outcome:
        """Calls the function in the process; one that hung or died is replaced.

        Raises RewardFailure for a malformed result, and where the process does not start.
        """
        if name == _BY_COMPLETION:
            return self._score_each(name, arguments, limit_s)
        try:
            return self._call(name, arguments, limit_s)
        except (TimeoutError, EOFError) as error:
            return Outcome([math.nan] * len(arguments["completions"]), str(error))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            end_guarded(self._process, self._connection)

    def _score_each(self, name: str, arguments: dict[str, Any], limit_s: float) -> Outcome:
        """By a function that judges completions one by one: a slow answer is wrong, and costs none but itself."""
        left_s = limit_s
        try:
            # All at once first: one by one they would wake this process, which samples meanwhile, as often.
            return self._call(name, arguments, limit_s * _TOGETHER)
        except TimeoutError:
            left_s -= limit_s * _TOGETHER
        except EOFError:
            pass  # whose fault it was is found out below
        num = len(arguments["completions"])
        values: list[float | None] = []
        first_failure = None
        for i in range(num):
            own_limit_s = max(left_s / 2, limit_s / num)
            try:
                (value,), failure, seconds = self._call(name, _rows(arguments, slice(i, i + 1)), own_limit_s)
            except TimeoutError as error:
                value, failure, seconds = 0.0, f"{error} for an answer, which counts as wrong", own_limit_s
            except EOFError as error:
                value, failure, seconds = math.nan, str(error), 0.0
            left_s = max(left_s - seconds, 0.0)
            values.append(value)
            first_failure = first_failure or failure
        return Outcome(values, first_failure)

    def _call(self, name: str, arguments: dict[str, Any], limit_s: float) -> Outcome:
        """Raises TimeoutError or EOFError, which say what has happened, where the process had to be replaced."""
        self._begin(name, arguments)
        start_s = self._clock()
        try:
            values, failure = self._answer(self._number, limit_s)
        except TimeoutError:
            self._restart()
            raise TimeoutError(f"no result within the limit of {limit_s:.3g} s") from None
        except (EOFError, ConnectionError):
            raise EOFError(f"its process ended with exit code {self._restart()}") from None
        if values is None:
            raise RewardFailure(f"reward {name!r} {failure}")
        return Outcome(values, failure, self._clock() - start_s)

    def _begin(self, name: str, arguments: dict[str, Any]) -> None:
        """Asks for scores; returns when the process has imported everything and begins."""
        self._number += 1
        code = 0
        # A process that ended while it was idle, killed for memory say, is not this group's fault.
        for _ in range(_STARTS):
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
                # What is no answer, or one to an earlier call, is what the function itself wrote into the pipe.
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    found, *message = json.loads(line)
                    if found == number:
                        return message
            # Looked at again each time: a process that waits for a processor gets that time on top.
            left_s = limit_s - (self._clock() - start_s)
            if left_s <= 0:
                raise TimeoutError
            if self._connection.poll(left_s + 0.01):
                if not (read := os.read(self._connection.fileno(), 1 << 16)):
                    raise EOFError
                # What floods the pipe must not fill the memory of the trainer.
                self._received = self._received[-_MAX_LINE_BYTES:] + read

    def _clock(self) -> float:
        """Seconds, but for those that the process could have run and waited for a processor that others had."""
        try:
            with open(f"/proc/{self._process_id}/schedstat", encoding="ascii") as file:
                self._waited_s = int(file.read().split()[1]) / 1e9
        except (OSError, IndexError):
            # Not known: it starts, it has ended, or the kernel does not count.
            pass
        return time.monotonic() - self._waited_s

    def _restart(self) -> int:
        """Ends the process with all that it has started, and starts another; returns its exit code."""
        with self._lock:  # so that none is started behind the back of `close`
            code = end_guarded(self._process, self._connection)
            self._connection.close()
            if self._closed:
                raise RewardFailure("the pool is closed")
            self._start()
        return code

    def _start(self) -> None:
        # There are as many workers as the user wants cores for them.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process, self._connection = start_child(serve, {**os.environ, **one_thread}, guarded=True)
        self._process_id, self._received, self._waited_s = 0, b"", 0.0
        # If it has ended already, who waits for its answer will find that.
        with contextlib.suppress(ConnectionError):
            self._connection.send(self._examples)


def serve(file_descriptor: int) -> None:
    """The worker's life: imports and prepares, then scores groups until the other end of the pipe is closed."""
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

        functions: dict[str, RewardFunction] = {}
        for name, examples in connection.recv().items():
            functions[name] = resolve_reward(name)
            for arguments in examples:
                _prepare(name, arguments)
        answer(0, own_id)  # the process that is known to the other end is the guard of this one
        while True:
            number, name, arguments = connection.recv()
            if name not in functions:  # of an evaluation, whatever the rewards are
                functions[name] = BUILTINS[name]
                _prepare(name, arguments)
            answer(number)
            answer(number, *_result(functions[name], arguments))


def _rows(arguments: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Arguments for some of the completions."""
    return {name: value[rows] if isinstance(value, list) else value for name, value in arguments.items()}


def _prepare(name: str, arguments: dict[str, Any]) -> None:
    """Has a built-in function import and load what it will need; the user's may cost money, or count its calls."""
    if name not in BUILTINS:
        return
    row = _rows(arguments, slice(1)) | {"completions": [WARM_UP]}
    _result(BUILTINS[name], row)
    if name == "accuracy":  # of words and whole numbers it compares many without mathematics
        _result(BUILTINS[name], row | {"answer": [r"\frac{1}{2}"], "task": [None]})


@functools.cache
def _event_loop() -> Any:
    """One for all calls: clients that a function keeps belong to it."""
    import asyncio

    return asyncio.new_event_loop()


def _result(function: RewardFunction, arguments: dict[str, Any]) -> tuple[list[float | None] | None, str | None]:
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
    except Exception as error:
        # A function may raise anything; the rule for it is a missing score and a warning.
        text = str(error)[:_MAX_REASON_CHARS]
        hint = _MESSAGES if _WANTS_MESSAGES.search(text) else ""
        return [math.nan for _ in range(num)], f"{type(error).__name__}: {text}{hint}"
    failure = None
    for i, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            failure = failure or f"it returned {score}"
            scores[i] = math.nan
    return scores, failure
