"""Rewards in worker processes, as groups finish, each group and function under its own time limit.

Each worker has a pipe and a thread of the main process to itself, so that a function that hangs,
crashes or is killed costs its own group, and nothing else: the worker is replaced, and what it has
started ends with it. Workers are fresh interpreters that import neither torch nor the main script;
they start when the pool is made, and import what scoring needs while the model loads.

What a score can be: a number; None, by which a function leaves a completion to the others; or
missing, which is NaN: the number is not finite, or the function raised, crashed or ran out of time.
A reward is the sum over the functions that did not give None, and missing if all did, or if a score
is.
"""

import inspect
import logging
import math
import queue
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from flashgrpo.grpo.errors import RewardError, RewardFailure
from flashgrpo.grpo.recipe.schema import ProgramsSection
from flashgrpo.grpo.rewards.rules import resolve_reward
from flashgrpo.grpo.rewards.table import RewardSet, RewardTable, Scorer
from flashgrpo.grpo.rewards.worker import WARM_UP, Scores, Worker
from flashgrpo.grpo.types import CompletionGroup

logger = logging.getLogger(__name__)

_STEPS_WITHOUT_NUMBER = 3
_PROGRAM_GRACE_S = 2.0  # to end the last process of a program


class _Pending(NamedTuple):
    group: CompletionGroup
    weights: dict[str, float]  # of the functions that apply
    futures: dict[str, Future[Scores]]  # of those that workers compute


class RewardPool:
    """Scores groups of completions with several functions. Use as a context manager.

        sets = {"data": RewardSet({"accuracy": 1.0}, problems[0])}
        with RewardPool(sets, max_new_tokens=1024) as pool:
            pool.submit(group)           # as groups finish
            table = pool.collect()       # what was submitted since the last call
            pool.check_step(table)       # at the end of the step

    Functions get the arguments that rewards/rules.py describes. A column of the data set that is
    named like one of the pool's own (`prompts`, `completions`, ...) is hidden by it. Neither the
    timing nor the number of workers changes a result.

    Functions have names, see `resolve_reward`; one of weight 0 is scored but does not enter the
    sum. `timeout_s` is for one function on one group; what it waits for a processor does not count,
    nor what built-in functions import. An answer that takes `accuracy` half of what its group has
    left, and more than an equal share, is wrong. `first_steps` has the step from which a function
    applies, `scorers` what computes one in place of the workers: None where it is yet to be set,
    before the first group that it applies to. The pool closes them. `programs` are the limits of
    what `code` runs.

    Raises RewardError for a function that cannot be found, or not be called with the columns of its
    source's example.
    """

    def __init__(
        self,
        sets: Mapping[str, RewardSet],  # by source
        *,
        max_new_tokens: int,
        timeout_s: float = 10.0,
        num_workers: int = 2,
        first_steps: Mapping[str, int] = MappingProxyType({}),
        scorers: Mapping[str, Scorer | None] = MappingProxyType({}),
        programs: ProgramsSection | None = None,
    ):
        self._sets, self._first_steps, self._programs = sets, first_steps, programs
        self._max_new_tokens, self._timeout_s = max_new_tokens, timeout_s
        self.scorers: dict[str, Any] = dict(scorers)
        self.functions = [*dict.fromkeys(chain.from_iterable(each.weights for each in sets.values()))]
        self.failures: dict[str, str] = {}  # by function, why its first missing score is missing
        self._blank_steps: Counter[str] = Counter()  # in a row
        self._pending: list[_Pending] = []
        if programs and "code" in self.functions:
            from flashgrpo.grpo.rewards.sandbox import check_isolation

            check_isolation(programs)
        examples: dict[str, list[dict[str, Any]]] = {}  # by function, what it may be called with
        for weights, problem in sets.values():
            arguments = self._arguments(CompletionGroup(problem, problem.question, [WARM_UP], [[0]], ["stop"]))
            for name in weights:
                if name not in self.scorers:
                    _check_signature(name, arguments)
                    examples.setdefault(name, []).append(arguments)
        self._workers = [Worker(examples) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # A thread waits for one worker at a time, and there are as many: each finds one idle.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers at once, whatever they are doing; unfinished groups are lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        # Threads wait for their workers: these end first, and with them what the threads wait for.
        for each in (*self._workers, *filter(None, self.scorers.values())):
            each.close()
        self._threads.shutdown(wait=True)

    def submit(self, group: CompletionGroup, step: float = math.inf) -> None:
        """Queues a group, for the functions of its source that apply in `step`; returns at once."""
        arguments = self._arguments(group)
        weights, futures = {}, {}
        for name, weight in self._sets[group.source].weights.items():
            if step < self._first_steps.get(name, 0):
                continue
            weights[name] = weight
            if name in self.scorers:
                self.scorers[name].submit(group)
            else:
                futures[name] = self._threads.submit(self._run, name, arguments)
        self._pending.append(_Pending(group, weights, futures))

    def collect(self) -> RewardTable:
        """Waits for the groups submitted since the last call; rows are in their order.

        Raises RewardFailure for a malformed result, ValueError for groups of different sizes.
        """
        # Emptied first: after an error nothing of this step may come back in the next.
        pending, self._pending = self._pending, []
        shape = _shape([each.group for each in pending])
        rewards, has_score = np.zeros(shape), np.zeros(shape, dtype=bool)
        scores = {name: np.full(shape, np.nan) for name in self.functions}
        applies = {name: np.zeros(shape, dtype=bool) for name in self.functions}
        for name in self.functions:
            rows = [i for i, each in enumerate(pending) if name in each.weights]
            if not rows:
                continue
            scores[name][rows], applies[name][rows], failure = self._scores(name, [pending[i] for i in rows])
            if failure:
                self.failures.setdefault(name, failure)
            # By row, for sources may weigh a function differently.
            weights = np.array([each.weights.get(name, 0.0) for each in pending])[:, None]
            counts = applies[name] & (weights != 0)
            rewards += np.where(counts, weights * scores[name], 0.0)
            has_score |= counts
        rewards[~has_score | np.isinf(rewards)] = np.nan
        return RewardTable(scores, rewards, applies)

    def _scores(self, name: str, pending: Sequence[_Pending]) -> tuple[np.ndarray, np.ndarray | bool, str | None]:
        """As `_gather`, by whatever computes the function."""
        if name not in self.scorers:
            return _gather([each.group for each in pending], [each.futures[name] for each in pending])
        scores = self.scorers[name].score([each.group for each in pending])
        return scores, True, "it gave no number" if np.isnan(scores).any() else None

    def check_step(self, table: RewardTable) -> None:
        """Warns of the missing scores of a step, given all its rows; to be called once a step.

        Raises RewardFailure in the third step in a row in which a function gave no number at all,
        but for completions that it left to others, or in which none did.
        """
        failures, self.failures = self.failures, {}
        applied = table.applied()
        for name, scores in applied.items():
            _warn(name, scores, failures.get(name))
            self._count_blank(f"reward {name!r}", scores, failures.get(name))
        # Of the missing rewards, those that no function has missed were left over by all of them.
        faulty = [np.isnan(scores) & table.applies[name] for name, scores in table.scores.items()]
        if unscored := int((np.isnan(table.rewards) & ~np.any(faulty, axis=0)).sum()):
            logger.warning(
                "%d of %d completions have no reward: each function that scores them returned None",
                unscored, table.rewards.size,
            )  # fmt: skip
        if table.rewards.size:
            numbers = np.concatenate([np.empty(0), *map(np.ravel, applied.values())])
            self._count_blank("every reward function", numbers, "each returned None")

    def _count_blank(self, who: str, scores: np.ndarray, failure: str | None) -> None:
        """Counts steps in a row in which there was no number among the scores."""
        is_blank = bool(np.isnan(scores).all())
        self._blank_steps[who] = self._blank_steps[who] + 1 if is_blank else 0
        if self._blank_steps[who] == _STEPS_WITHOUT_NUMBER:
            raise RewardFailure(f"{who} gave no number in {_STEPS_WITHOUT_NUMBER} steps in a row: {failure}")

    def score(self, groups: Sequence[CompletionGroup], name: str) -> np.ndarray:
        """Scores by one function, of the pool's or not, beside the step in progress.

        Returns [num_groups, group_size] float64, NaN where missing; raises as `collect`.
        """
        futures = [self._threads.submit(self._run, name, self._arguments(group)) for group in groups]
        scores, _, failure = _gather(groups, futures)
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
            "completion_ids": [*map(list, group.completion_ids)],
            "finish_reasons": list(group.finish_reasons),
            "max_new_tokens": self._max_new_tokens,
        }

    def _run(self, name: str, arguments: dict[str, Any]) -> Scores:
        limit_s = self._timeout_s
        if name == "code" and self._programs:
            # Each program has limits of its own, by which a slow one is wrong.
            arguments = arguments | {"programs": self._programs}
            limit_s = max(limit_s, len(arguments["completions"]) * (self._programs.longest_s + _PROGRAM_GRACE_S))
        worker = self._idle.get()
        try:
            return worker.score(name, arguments, limit_s)
        finally:
            self._idle.put(worker)


def _check_signature(name: str, arguments: dict[str, Any]) -> None:
    function = resolve_reward(name)
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        # ValueError: of what is written in C and has no signature.
        called = f"called as (prompts, completions, **columns) with the columns {', '.join(arguments)}"
        raise RewardError(f"reward {name!r}: {error}; it is {called}") from error


def _shape(groups: Sequence[CompletionGroup]) -> tuple[int, int]:
    """(num_groups, group_size)"""
    sizes = {len(group.completions) for group in groups}
    if len(sizes) > 1:
        raise ValueError(f"groups of one step must have equally many completions, found {sorted(sizes)}")
    return len(groups), max(sizes, default=0)


def _gather(
    groups: Sequence[CompletionGroup], futures: Sequence[Future[Scores]]
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Scores [num_groups, group_size], whether each is one and not None, and why the first missing one is missing."""
    results = [future.result() for future in futures]
    values = np.array([result.values for result in results], dtype=object).reshape(_shape(groups))
    failure = next(filter(None, (result.failure for result in results)), None)
    return values.astype(float), values != None, failure  # noqa: E711  # by element


def _warn(name: str, scores: np.ndarray, failure: str | None) -> None:
    if missing := np.isnan(scores).sum():
        reason = failure or "it returned None"
        logger.warning("reward %r: %d of %d scores missing: %s", name, missing, scores.size, reason)
    elif failure:
        logger.warning("reward %r: %s", name, failure)
