"""A worker of the reward pool: a process that scores one group at a time, as both ends of its pipe see it.

Groups go out pickled. Answers come back as lines of JSON: each is set off by a new line and begins with the number of
its call, so that whatever a function writes into the pipe is no answer. The first says that everything is imported.
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

_START_LIMIT_S = 600.0  # of a worker, imports included, and of what a built-in imports at its first use
_STARTS = 3  # of a worker that ends before it has begun with a call
_MAX_REASON_CHARS = 1000
_MAX_LINE_BYTES = 1 << 24
_BY_COMPLETION = "accuracy"  # judges completions one by one, so that a slow answer costs itself alone
WARM_UP = r"<think>one word after another so that there are enough of them</think><answer>\frac{1}{3}</answer>"
_WANTS_MESSAGES = re.compile(r"string indices must be integers|'str' object has no attribute 'get'")
_MESSAGES = (
    "; prompts and completions are text here, also where TRL gives lists of messages: take completion in place of "
    'completion[0]["content"]'
)


class Scores(NamedTuple):
    values: list[float | None]  # [group_size], NaN where missing, None where the function leaves it to others
    failure: str | None  # why the first missing or slow one is so


Result = Scores | RewardFailure  # the latter for a malformed result


class Worker:
    """A process that scores one group at a time. Used by one thread at a time; `close` may come from another."""

    def __init__(self, examples: Mapping[str, Sequence[dict[str, Any]]]):
        self._setup = examples
        self._lock = threading.Lock()
        self._closed = False
        self._number = 0  # of the call
        self._start()

    def score(self, name: str, arguments: dict[str, Any], limit_s: float) -> Result:
        """Calls the function in the process; one that hung or died is replaced, and goes on with what is left.

        What judges completions one by one is asked for all of them at once: answers one by one would wake the main
        process, which samples meanwhile, as often. Only where that takes too long they are.
        """
        num = len(arguments["completions"])
        by_completion = False
        all_limit_s = limit_s / 4 if name == _BY_COMPLETION else limit_s
        values: list[float | None] = []
        reason: str | None = None
        left_s, has_begun = limit_s, False
        while len(values) < num:
            if not has_begun:
                self._begin(name, _rows(arguments, slice(len(values), None)), by_completion)
                has_begun = True
            own_limit_s = max(left_s / 2, limit_s / num) if by_completion else all_limit_s
            start_s = self._clock()
            try:
                part, failure = self._answer(self._number, own_limit_s)
                left_s = max(left_s - (self._clock() - start_s), 0.0)
            except (TimeoutError, EOFError, ConnectionError) as error:
                is_slow, code = isinstance(error, TimeoutError), self._restart()
                has_begun = False
                left_s = max(left_s - own_limit_s, 0.0) if is_slow else left_s
                if name == _BY_COMPLETION and not by_completion:
                    by_completion = True
                    continue
                part = [math.nan] * (1 if by_completion else num)
                failure = f"its process ended with exit code {code}"
                if is_slow:
                    failure = f"no result within the limit of {own_limit_s:.3g} s"
                if is_slow and by_completion:
                    part, failure = [0.0], f"{failure} for an answer, which counts as wrong"
            if part is None:
                return RewardFailure(failure)
            values += part
            reason = reason or failure
        return Scores(values, reason)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            end_guarded(self._process, self._connection)

    def _begin(self, name: str, arguments: dict[str, Any], by_completion: bool) -> None:
        """Asks for scores; returns when the process has imported everything and begins."""
        self._number += 1
        code = 0
        for _ in range(_STARTS):  # killed while idle, for memory say, which is not this group's fault
            try:
                if not self._process_id:
                    (self._process_id,) = self._answer(0, _START_LIMIT_S)
                self._connection.send((self._number, name, arguments, by_completion))
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
                self._waited_s = int(file.read().split()[1]) / 1e9
        except (OSError, IndexError):  # not known: it starts, it has ended, or the kernel does not count
            pass
        return time.monotonic() - self._waited_s

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
        self._process_id, self._received, self._waited_s = 0, b"", 0.0
        with contextlib.suppress(ConnectionError):  # it has ended already, as who waits for its answer will find
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
            number, name, arguments, by_completion = connection.recv()
            if name not in functions:
                functions[name] = BUILTINS[name]
                _prepare(name, arguments)
            answer(number)
            rows = range(len(arguments["completions"])) if by_completion else ()
            for part in [_rows(arguments, slice(i, i + 1)) for i in rows] or [arguments]:
                answer(number, *_call(functions[name], part))


def _rows(arguments: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Arguments for some of the completions."""
    return {name: value[rows] if isinstance(value, list) else value for name, value in arguments.items()}


def _prepare(name: str, arguments: dict[str, Any]) -> None:
    """Has a built-in function import and load what it will need; the user's may cost money, or count its calls."""
    if name not in BUILTINS:
        return
    row = _rows(arguments, slice(1)) | {"completions": [WARM_UP]}
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
