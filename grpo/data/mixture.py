"""Which prompts a step takes: every source its share of them, and its problems epoch by epoch.

All of it is a function of what was taken before, so that every rank, and a run that was stopped,
takes the same.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.recipe.schema import first_step
from flashgrpo.grpo.run.loop import epoch_order
from flashgrpo.grpo.types import Prompt


class Position(NamedTuple):
    """Where a run stands in its data; both are by source."""

    taken: dict[str, int]  # prompts so far
    # Groups to come for its share so far, below 0 where it was ahead of it; they sum to 0.
    owed: dict[str, float]

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
        return prompts, Position(taken, owed)

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
        # 0 is that of [data], whose order other sources do not change.
        stream = [*self.prompts].index(source)
        return prompts[epoch_order(self.recipe.run.seed, epoch, len(prompts), stream)[place]]


def interleaved(sources: Sequence[str]) -> list[int]:
    """An order of the rows in which every source is spread evenly; its own rows keep theirs."""
    sizes, seen, places = Counter(sources), Counter[str](), []
    for source in sources:
        places.append((seen[source] + 0.5) / sizes[source])
        seen[source] += 1
    return sorted(range(len(sources)), key=places.__getitem__)
