"""What is scored, by which functions, and what comes of it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from flashgrpo.grpo.types import CompletionGroup, Problem


class RewardSet(NamedTuple):
    """What scores the completions of a source."""

    weights: Mapping[str, float]  # by function
    example: Problem  # any problem of the source


class Scorer(Protocol):
    """A function that is computed in this process, or by means of its own, as a reward model."""

    def submit(self, group: CompletionGroup) -> None:
        """Begin with a group that `score` will be asked for, if it can; returns at once."""

    @abstractmethod
    def score(self, groups: Sequence[CompletionGroup]) -> np.ndarray:
        """Scores, [num_groups, group_size] float64, NaN where missing. Raises RewardFailure."""

    def close(self) -> None:
        """End what runs for it."""


@dataclass(frozen=True)
class RewardTable:
    """Scores in the order in which the groups were submitted, NaN where there is none."""

    scores: dict[str, np.ndarray]  # by function, [num_groups, group_size] float64
    rewards: np.ndarray  # [num_groups, group_size] float64, the weighted sum
    applies: dict[str, np.ndarray]  # by function, [num_groups, group_size] bool

    def applied(self) -> dict[str, np.ndarray]:
        """Scores by function, of the completions that it applies to; none that applies to none."""
        found = {}
        for name, applies in self.applies.items():
            if applies.any():
                found[name] = self.scores[name][applies]
        return found

    @staticmethod
    def merge(tables: Sequence["RewardTable"], rows: Sequence[int] | np.ndarray) -> "RewardTable":
        """Some rows of the tables, counted as if one stood below the other."""
        rewards = np.concatenate([table.rewards for table in tables])[rows]
        scores = _stacked([table.scores for table in tables], rows)
        return RewardTable(scores, rewards, _stacked([table.applies for table in tables], rows))


def _stacked(parts: Sequence[Mapping[str, np.ndarray]], rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    stacked = {}
    for name in parts[0]:
        stacked[name] = np.concatenate([part[name] for part in parts])[rows]
    return stacked
