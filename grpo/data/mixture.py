"""Which prompts a step takes: every source its share of them, and its problems epoch by epoch.

All of it is a function of what was taken before, so that every rank, and a run that was stopped,
takes the same.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from flashgrpo.grpo.data.problems import level_of
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.recipe.schema import first_step
from flashgrpo.grpo.run.progress import say
from flashgrpo.grpo.types import Prompt, ScoredGroup


@lru_cache(maxsize=16)
def epoch_order(seed: int, epoch: int, size: int, source: int = 0) -> np.ndarray:
    """The order of `size` problems in a pass over them, from the seed, the pass and their source's number alone."""
    return np.random.default_rng([seed, epoch, *([source] if source else [])]).permutation(size)


class Position(NamedTuple):
    """Where a run stands in its data; both are by source."""

    taken: dict[str, int]  # prompts so far
    # Groups to come for its share so far, below 0 where it was ahead of it; they sum to 0.
    owed: dict[str, float]
    # Of the steps whose prompts have been taken ahead of them, in order: `taken` and `owed` where each begins.
    begun: tuple[tuple[dict[str, int], dict[str, float]], ...] = ()

    @property
    def num_prompts(self) -> int:
        """Prompts taken from all sources."""
        return sum(self.taken.values())


class Mixture:
    """The prompts of [data], whose source is named "data", and of [sources]."""

    def __init__(self, recipe: Recipe, prompts: Mapping[str, Sequence[Prompt]]):
        self.recipe = recipe
        # A resumed run may have its sources in another order.
        self.prompts = {name: prompts[name] for name in ("data", *sorted(recipe.sources))}
        self._levels: dict[str, np.ndarray] = {}  # by source with a curriculum, of each problem
        for name, own in self.prompts.items():
            if column := recipe.sources.get(name, recipe.data).curriculum:
                self._levels[name] = np.array([level_of(prompt.problem, column) for prompt in own])
                self._tell_of_rest(name)
        self._order_of = lru_cache(maxsize=16)(self._order)

    def shares(self, step: int) -> dict[str, float]:
        """Share of the step's groups by source, of those that have started."""
        others = {}
        for name, source in sorted(self.recipe.sources.items()):
            if step >= first_step(source.start, self.recipe.train.steps):
                others[name] = source.share
        return {"data": 1 - sum(others.values()), **others}

    def take(self, position: Position, step: int, num_prompts: int) -> tuple[list[Prompt], Position]:
        """The next prompts, and the position after them.

        Shares are exact over time, and sources alternate.
        """
        # A position is stored as it was before.
        taken, owed = dict(position.taken), dict(position.owed)
        shares, prompts = self.shares(step), []
        for _ in range(num_prompts):
            # Each prompt is owed to the sources by their shares, and taken from the one to which most is owed.
            for source, share in shares.items():
                owed[source] = owed.get(source, 0.0) + share
            source = max(shares, key=owed.__getitem__)
            owed[source] -= 1
            prompts.append(self._prompt(source, taken.get(source, 0)))
            taken[source] = taken.get(source, 0) + 1
        return prompts, position._replace(taken=taken, owed=owed)

    def begin(self, position: Position, step: int, num_prompts: int) -> Position:
        """The position after the prompts of a step were taken ahead of it, behind those that have been begun."""
        _, after = self.take(position, step, num_prompts)
        return after._replace(begun=(*position.begun, position[:2]))

    def step_prompts(self, position: Position, step: int, num_prompts: int) -> tuple[list[Prompt], int, Position]:
        """The prompts of the next step, which may have been begun, the first one's number, the position after them."""
        if not position.begun:
            prompts, after = self.take(position, step, num_prompts)
            return prompts, position.num_prompts, after
        start, *later = position.begun
        prompts, _ = self.take(Position(*start), step, num_prompts)
        return prompts, Position(*start).num_prompts, position._replace(begun=tuple(later))

    def owe(self, position: Position, step: int, discarded: Iterable[Prompt]) -> Position:
        """The position after prompts whose groups were thrown away: their sources owe others in place of them."""
        owed = dict(position.owed)
        for prompt in discarded:
            for source, share in self.shares(step).items():
                owed[source] -= share
            owed[prompt.source] += 1
        return position._replace(owed=owed)

    def _prompt(self, source: str, number: int) -> Prompt:
        prompts = self.prompts[source]
        epoch, place = divmod(number, len(prompts))
        return prompts[self._order_of(source, epoch)[place]]

    def _order(self, source: str, epoch: int) -> np.ndarray:
        """Of a source's problems in a pass over them: by level where it has a curriculum, drawn among equal ones."""
        # 0 is that of [data], whose order other sources do not change.
        stream = [*self.prompts].index(source)
        order = epoch_order(self.recipe.run.seed, epoch, len(self.prompts[source]), stream)
        levels = self._levels.get(source)
        return order if levels is None else order[np.argsort(levels[order], kind="stable")]

    def _tell_of_rest(self, source: str) -> None:
        """A run that ends within the first pass never comes to the hardest problems."""
        size, train = len(self.prompts[source]), self.recipe.train
        share = sum(self.shares(step).get(source, 0) for step in range(1, train.steps + 1))
        planned = share * self.recipe.rollout.prompts_per_step
        if planned < size:
            told = f"{source}: the run takes about {planned:,.0f} of {size:,} problems, the easiest by its curriculum"
            say(told, style="yellow")


def interleaved(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The groups in an order in which every source is spread evenly; its own keep theirs."""
    sizes, seen, places = Counter(group.source for group in groups), Counter[str](), []
    for group in groups:
        places.append((seen[group.source] + 0.5) / sizes[group.source])
        seen[group.source] += 1
    order = sorted(range(len(groups)), key=places.__getitem__)
    return [groups[i] for i in order]
