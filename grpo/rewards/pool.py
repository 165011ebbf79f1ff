"""Rewards in worker processes, as groups finish, each group and function under its own time limit.

Each worker has a pipe and a thread of the main process to itself, so that a function that hangs,
crashes or is killed costs its own group, and nothing else: the worker is replaced, and what it has
started ends with it. Workers are fresh interpreters that import neither torch nor the main script;
they start when the pool is made, and import what scoring needs while the model loads.

What a score can be: a number; None, by which a function leaves a completion to the others; or
missing, which is NaN: the number is not finite, or the function raised, crashed or ran out of time.
A reward is the sum over the functions that did not give None, and missing if all did, or if a score
is; without any function, as beside a teacher, it is 0.
"""

import inspect
import logging
import math
import queue
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flashgrpo.grpo.errors import DataError, RewardError, RewardFailure
from flashgrpo.grpo.recipe.schema import ProgramsSection, first_step
from flashgrpo.grpo.rewards.rules import resolve_reward
from flashgrpo.grpo.rewards.worker import WARM_UP, Outcome, Worker
from flashgrpo.grpo.types import CompletionGroup, Problem, Scores, given_scores
from flashgrpo.model.waits import word_for

if TYPE_CHECKING:  # it imports torch
    from flashgrpo.grpo.recipe.load import Recipe

logger = logging.getLogger(__name__)

_STEPS_WITHOUT_NUMBER = 3
_PROGRAM_GRACE_S = 2.0  # to end the last process of a program


class Scorer(Protocol):
    """A function that is computed in this process, or by means of its own, as a reward model."""

    def submit(self, group: CompletionGroup) -> None:
        """Begin with a group that `score` will be asked for, if it can; returns at once."""

    @abstractmethod
    def score(self, groups: Sequence[CompletionGroup]) -> np.ndarray:
        """Scores, [num_groups, group_size] float64, NaN where missing. Raises RewardFailure."""

    def close(self) -> None:
        """End what runs for it."""


class RewardPool:
    """Scores groups of completions with several functions. Use as a context manager.

        weights, examples = {"data": {"accuracy": 1.0}}, {"data": problems[0]}
        with RewardPool(weights, examples, max_new_tokens=1024) as pool:
            pool.submit(group)           # as groups finish
            scores = pool.collect()      # of what was submitted for the step since the last call
            pool.check_step(scores)      # at the end of the step

    `weights` are by source and function: a group is scored by the functions of its source. They get
    the arguments that rewards/rules.py describes. A column of the data set that is named like one
    of the pool's own (`prompts`, `completions`, ...) is hidden by it. Neither the timing nor the
    number of workers changes a result.

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
        weights: Mapping[str, Mapping[str, float]],  # by source, of its functions
        examples: Mapping[str, Problem],  # any problem of each source
        *,
        max_new_tokens: int,
        timeout_s: float = 10.0,
        num_workers: int = 2,
        first_steps: Mapping[str, int] = MappingProxyType({}),
        scorers: Mapping[str, Scorer | None] = MappingProxyType({}),
        programs: ProgramsSection | None = None,
    ):
        self._weights, self._first_steps, self._programs = weights, first_steps, programs
        self._max_new_tokens, self._timeout_s = max_new_tokens, timeout_s
        self.scorers: dict[str, Any] = dict(scorers)
        self.functions = [*dict.fromkeys(chain.from_iterable(weights.values()))]
        self.failures: dict[str, str] = {}  # by function, why its first missing score is missing
        self._blank_steps: Counter[str] = Counter()  # in a row
        # By step; with the functions that apply, and what workers give. A scorer is asked when all groups are there.
        self._pending: dict[float, list[tuple[CompletionGroup, list[str], dict[str, Future[Outcome]]]]] = {}
        if programs and "code" in self.functions:
            from flashgrpo.grpo.rewards.sandbox import check_isolation

            check_isolation(programs)
        calls: dict[str, list[dict[str, Any]]] = {}  # by function, what it may be called with
        for source, problem in examples.items():
            arguments = self._arguments(CompletionGroup(problem, problem.question, [WARM_UP], [[0]], ["stop"]))
            for name in weights[source]:
                if name not in self.scorers:
                    _check_signature(name, arguments)
                    calls.setdefault(name, []).append(arguments)
        self._workers = [Worker(calls) for _ in range(num_workers)]
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
        arguments, futures = self._arguments(group), {}
        names = [name for name in self.functions if name in self._weights[group.source]]
        names = [name for name in names if step >= self._first_steps.get(name, 0)]
        for name in names:
            if name in self.scorers:
                self.scorers[name].submit(group)
            else:
                futures[name] = self._threads.submit(self._run, name, arguments)
        self._pending.setdefault(step, []).append((group, names, futures))

    def collect(self, step: float = math.inf) -> list[Scores]:
        """Waits for the groups submitted for `step` since the last call; in their order. Raises RewardFailure for a
        malformed result.
        """
        pending = self._pending.pop(step, [])
        by_scorer: dict[str, Iterator[Outcome]] = {}
        for name, scorer in self.scorers.items():  # while workers are busy with the last groups
            groups = [group for group, names, _ in pending if name in names]
            if groups:
                by_scorer[name] = iter(_outcomes(scorer.score(groups)))
        scored = []
        for group, names, futures in pending:
            found: dict[str, list[float | None]] = {}
            for name in names:
                outcome = next(by_scorer[name]) if name in by_scorer else futures[name].result()
                found[name] = outcome.values
                if outcome.failure:
                    self.failures.setdefault(name, outcome.failure)
            rewards = _weighted_sum(found, self._weights[group.source], len(group.completions))
            scored.append(Scores(rewards, found))
        return scored

    def check_step(self, groups: Sequence[Scores]) -> None:
        """Warns of the missing scores of a step, given all its groups; to be called once a step.

        Raises RewardFailure in the third step in a row in which a function gave no number at all,
        but for completions that it left to others, or in which none did.
        """
        failures, self.failures = self.failures, {}
        every: list[float] = []
        for name in self.functions:
            scores = given_scores(groups, name)
            every += scores
            if scores:
                _warn(name, scores, failures.get(name))
                self._count_blank(f"reward {name!r}", scores, failures.get(name))
        num_rewards = sum(len(each.rewards) for each in groups)
        if unscored := sum(map(_num_left_over, groups)):
            logger.warning(
                "%d of %d completions have no reward: each function that scores them returned None",
                unscored, num_rewards,
            )  # fmt: skip
        if any(each.by_function for each in groups):
            self._count_blank("every reward function", every, "each returned None")

    def _count_blank(self, who: str, scores: Sequence[float], failure: str | None) -> None:
        """Counts steps in a row in which there was no number among the scores."""
        is_blank = all(map(math.isnan, scores))
        self._blank_steps[who] = self._blank_steps[who] + 1 if is_blank else 0
        if self._blank_steps[who] == _STEPS_WITHOUT_NUMBER:
            raise RewardFailure(f"{who} gave no number in {_STEPS_WITHOUT_NUMBER} steps in a row: {failure}")

    def score(self, groups: Sequence[CompletionGroup], name: str) -> np.ndarray:
        """Scores by one function, of the pool's or not, beside the step in progress.

        Returns [num_groups, group_size] float64, NaN where missing; raises as `collect`.
        """
        futures = [self._threads.submit(self._run, name, self._arguments(group)) for group in groups]
        outcomes = [future.result() for future in futures]
        scores = np.array([outcome.values for outcome in outcomes], dtype=float)
        _warn(name, scores.ravel(), next(filter(None, (outcome.failure for outcome in outcomes)), None))
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

    def _run(self, name: str, arguments: dict[str, Any]) -> Outcome:
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
    with word_for(f"importing reward {name}"):
        function = resolve_reward(name)
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        # ValueError: of what is written in C and has no signature.
        called = f"called as (prompts, completions, **columns) with the columns {', '.join(arguments)}"
        raise RewardError(f"reward {name!r}: {error}; it is {called}") from error


def _outcomes(scores: np.ndarray) -> list[Outcome]:
    """A scorer's [num_groups, group_size] as what workers would have given."""
    return [Outcome(row.tolist(), "it gave no number" if np.isnan(row).any() else None) for row in scores]


def _weighted_sum(scores: Mapping[str, list[float | None]], weights: Mapping[str, float], size: int) -> np.ndarray:
    """A group's rewards, of the functions that have a weight and did not leave a completion to the others; 0 where no
    function has one.
    """
    rewards, has_score = np.zeros(size), np.full(size, not any(weights[name] for name in scores))
    for name, values in scores.items():
        if weights[name]:
            counts = np.array([value is not None for value in values])
            rewards += np.where(counts, weights[name] * np.array(values, dtype=float), 0.0)
            has_score |= counts
    rewards[~has_score | np.isinf(rewards)] = np.nan
    return rewards


def _num_left_over(group: Scores) -> int:
    """Completions whose reward is missing though no function has missed them: all have left them to others."""
    scores = np.array([*group.by_function.values()], dtype=object)
    faulty = (scores != None) & np.isnan(scores.astype(float))  # noqa: E711  # by element
    return int((np.isnan(group.rewards) & ~faulty.any(axis=0)).sum())


def _warn(name: str, scores: Sequence[float] | np.ndarray, failure: str | None) -> None:
    if missing := sum(map(math.isnan, scores)):
        reason = failure or "it returned None"
        logger.warning("reward %r: %d of %d scores missing: %s", name, missing, len(scores), reason)
    elif failure:
        logger.warning("reward %r: %s", name, failure)


def open_reward_pool(
    recipe: "Recipe",
    example: Problem,
    others: Mapping[str, Problem] = MappingProxyType({}),  # an example of each of recipe.sources
) -> RewardPool:
    """The recipe's reward functions in worker processes; its reward models are yet to be given, as `pool.scorers`.

    Raises DataError where evaluations would have no answer.
    """
    if recipe.eval.every:
        require_answer(example)
    rewards = recipe.rewards
    return RewardPool(
        recipe.reward_weights,
        {"data": example, **others},
        max_new_tokens=recipe.rollout.max_new_tokens,
        timeout_s=rewards.timeout_s,
        programs=rewards.programs,
        num_workers=rewards.workers,
        first_steps={name: first_step(start, recipe.train.steps) for name, start in rewards.start.items()},
        scorers=dict.fromkeys(recipe.reward_models),
    )


def require_answer(problem: Problem) -> None:
    """Raises DataError for a problem that an evaluation could not score."""
    if not problem.columns.keys() & {"answer", "tests"}:
        found = ", ".join(problem.columns) or "none"
        raise DataError(f"an evaluation needs a reference answer: name its column by data.answer_column; found {found}")
