"""Which pack goes to which rank and micro-batch: planned from lengths alone, alike in every process.

Ranks move in lockstep, so a micro-batch lasts as long as its slowest rank, and only the packs of one micro-batch have
to cost the same. Costs are whole FLOPs, so that their sums are exact.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashgrpo.grpo.learn.packing import Completion, Group, best_fit
from flashgrpo.model.cost import ModelFlops

# Found on lognormal lengths with medians of 300 to 4,000 tokens, prompts of 150 to 4,096, budgets of 16k to 64k.
_SLACKS = (1.04, 1.005)  # what a pack may cost, as multiples of an equal share of what is left
_SPLIT_CANDIDATES = 4  # so many of the largest groups are looked at for one to split


@dataclass(frozen=True)
class PackPlan:
    """The packs of one update. Every rank has as many micro-batches; an empty list of groups is an empty one."""

    packs: list[list[list[Group]]]  # [num_ranks][num_micro_batches]
    costs: np.ndarray  # [num_ranks, num_micro_batches] fp64, forward FLOPs


def plan_packs(
    groups: list[Group], token_budget: int, num_ranks: int, flops: ModelFlops, keep_whole: bool = False
) -> PackPlan:
    """Spread groups over ranks and micro-batches of at most `token_budget` tokens.

    Groups are split where that evens packs out, at the price of a repeated prompt. Of the plans
    with as few micro-batches as were found, more only where the budget leaves no room to even out,
    and of best-fit decreasing, which splits no group that fits, the one with the least sum of
    slowest ranks is returned. `keep_whole` is for losses that compare a group's completions: only
    best-fit decreasing, into packs of the budget or of an equal share. Raises PackingError for an
    empty prompt or completion, and where a prompt and one completion alone are over the budget.
    """
    fitted = _best_fit(groups, token_budget, flops)
    rests = sorted((_Piece.of(group, flops) for group in groups if group.completions), key=_largest_first)
    if keep_whole:
        plans = [fitted, _evenly_fit(groups, rests, len(fitted), token_budget, num_ranks, flops)]
        return _dealt_out(min(plans, key=lambda plan: _lockstep(plan, num_ranks)), num_ranks)

    def fill(num_packs: int, slack: float) -> list[list[_Piece]] | None:
        return _fill(rests, token_budget, num_ranks, num_packs, slack, flops.per_token)

    # As few packs as possible, however uneven; there are never more than completions.
    fewest = fill(sum(len(group.completions) for group in groups), math.inf) or []
    fewest = min(fewest, fitted, key=len)
    plans = [fewest, fitted]
    # A prompt that is repeated costs again, so an equal share of the packs is more than one of the groups.
    repeats = sum(map(_cost, fewest)) / max(_cost(rests), 1)
    num_packs = -(-len(fewest) // num_ranks) * num_ranks
    while num_ranks > 1 and len(plans) == 2:
        for slack in _SLACKS:
            if (packs := fill(num_packs, slack * repeats)) is None:
                break
            plans.append(packs)
        # Too little room in so many packs to even them out: every rank gets one more.
        num_packs += num_ranks
    return _dealt_out(min(plans, key=lambda plan: _lockstep(plan, num_ranks)), num_ranks)


def _best_fit(groups: list[Group], token_budget: int, flops: ModelFlops) -> list[list["_Piece"]]:
    """`best_fit`, with what each piece costs."""
    packs: list[list[_Piece]] = []
    for pack in best_fit(groups, token_budget):
        packs.append([_Piece.of(piece, flops) for piece in pack])
    return packs


def _evenly_fit(
    groups: list[Group], rests: list["_Piece"], num_packs: int, token_budget: int, num_ranks: int, flops: ModelFlops
) -> list[list["_Piece"]]:
    """Best-fit into packs of an equal share of the tokens, or of the largest group's."""
    num_packs = max(-(-num_packs // num_ranks) * num_ranks, 1)
    share = int(_SLACKS[0] * sum(rest.tokens for rest in rests) / num_packs)
    largest = max((rest.tokens for rest in rests), default=0)
    return _best_fit(groups, min(max(share, largest), token_budget), flops)


def _lockstep(packs: list[list["_Piece"]], num_ranks: int) -> tuple[int, int]:
    """The sum of slowest ranks, and the number of packs."""
    return sum(sorted(map(_cost, packs), reverse=True)[::num_ranks]), len(packs)


def _dealt_out(packs: list[list["_Piece"]], num_ranks: int) -> PackPlan:
    """Packs of like cost in one micro-batch."""
    packs = sorted(packs, key=_cost, reverse=True) + [[]] * (-len(packs) % num_ranks)
    return PackPlan(
        [[[piece.group for piece in pack] for pack in packs[rank::num_ranks]] for rank in range(num_ranks)],
        np.array([_cost(pack) for pack in packs], dtype=float).reshape(-1, num_ranks).T,
    )


@dataclass(slots=True)
class _Piece:
    """A prompt and some of its completions, with what they cost: FLOPs of a forward pass."""

    prompt_ids: Sequence[int]
    prompt_cost: int
    completions: list[Completion]  # from the shortest to the longest, until they are packed
    costs: list[int]  # of each completion
    lengths: list[int]  # of each, in tokens that are fed
    cost: int  # of all, the prompt's included
    tokens: int

    @classmethod
    def of(cls, group: Group, flops: ModelFlops) -> "_Piece":
        completions = sorted(group.completions, key=lambda c: len(c.token_ids))
        prompt, lengths = len(group.prompt_ids), [len(c.token_ids) - 1 for c in completions]
        prompt_cost = int(flops.forward(prompt, prompt * (prompt + 1) // 2, 0))
        costs = [int(flops.forward(n, n * prompt + n * (n + 1) // 2, n + 1)) for n in lengths]
        cost, tokens = prompt_cost + sum(costs), prompt + sum(lengths)
        return cls(group.prompt_ids, prompt_cost, completions, costs, lengths, cost, tokens)

    @property
    def group(self) -> Group:
        return Group(self.prompt_ids, self.completions)

    def num_fitting(self, cost: int, tokens: int, end: int) -> int:
        """How many of the first `end` completions are each within `cost` and `tokens`."""
        return min(bisect_right(self.costs, cost, 0, end), bisect_right(self.lengths, tokens, 0, end))

    def split(self, cost: int, tokens: int) -> tuple["_Piece", "_Piece"]:
        """The prompt and the longest completions that fit, one after the other; the prompt and the others."""
        prompt = len(self.prompt_ids)
        taken = _Piece(self.prompt_ids, self.prompt_cost, [], [], [], self.prompt_cost, prompt)
        # Both have the prompt.
        rest = replace(self, completions=self.completions[:], costs=self.costs[:], lengths=self.lengths[:])
        end = len(rest.costs)
        while end := rest.num_fitting(cost - taken.cost, tokens - taken.tokens, end):
            end -= 1
            taken.completions.append(rest.completions.pop(end))
            taken.costs.append(rest.costs.pop(end))
            taken.lengths.append(rest.lengths.pop(end))
            taken.cost += taken.costs[-1]
            taken.tokens += taken.lengths[-1]
        rest.cost -= taken.cost - self.prompt_cost
        rest.tokens -= taken.tokens - prompt
        return taken, rest


def _fill(
    rests: list[_Piece], token_budget: int, num_ranks: int, num_packs: int, slack: float, token_cost: float
) -> list[list[_Piece]] | None:
    """Fill one pack after the other, each from the largest group that is left; None where the packs do not suffice.

    A pack may cost `slack` times an equal share of what is left, or as much as the slowest of its micro-batch.
    """
    rests, packs, slowest = rests[:], [], 0
    cost_left, tokens_left = _cost(rests), sum(rest.tokens for rest in rests)
    while rests:
        packs_left = num_packs - len(packs)
        if tokens_left > packs_left * token_budget:
            return None
        if len(packs) % num_ranks == 0:  # a new micro-batch begins
            slowest = 0
        share = slack * cost_left / packs_left if packs_left > 1 else math.inf
        # At least what the slowest rank costs anyway, and the largest completion, which has to go somewhere.
        largest = rests[0].prompt_cost + rests[0].costs[-1]
        cost_room = max(int(min(share, cost_left)), slowest, largest)
        token_room = token_budget
        pack: list[_Piece] = []
        others: list[_Piece] = []
        choice: int | None = 0
        while choice is not None:
            piece = rest = rests.pop(choice)
            if rest.cost > cost_room or rest.tokens > token_room:
                piece, other = rest.split(cost_room, token_room)
                others.append(other)
            pack.append(piece)
            cost_room -= piece.cost
            token_room -= piece.tokens
            choice = _choose(rests, cost_room, token_room, token_cost, may_split=len(others) < 2)
        packs.append(pack)
        cost = _cost(pack)
        slowest = max(slowest, cost)
        cost_left += sum(other.prompt_cost for other in others) - cost
        tokens_left += sum(len(other.prompt_ids) for other in others) - (token_budget - token_room)
        for other in others:
            insort(rests, other, key=_largest_first)
    return packs


def _choose(rests: list[_Piece], cost: int, tokens: int, token_cost: float, may_split: bool) -> int | None:
    """The largest group that fits, else the one with the largest completion that fits behind its prompt."""
    # No group of more tokens fits: each costs `token_cost` at least.
    first = bisect_left(rests, -min(tokens, cost / token_cost), key=_largest_first)
    for i in range(first, len(rests)):
        if rests[i].cost <= cost:
            return i
    best, largest = None, 0
    for i, rest in enumerate(rests[:_SPLIT_CANDIDATES] if may_split else []):
        fitting = rest.num_fitting(cost - rest.prompt_cost, tokens - len(rest.prompt_ids), len(rest.costs))
        if fitting and rest.costs[fitting - 1] > largest:
            best, largest = i, rest.costs[fitting - 1]
    return best


def _largest_first(rest: _Piece) -> int:
    return -rest.tokens


def _cost(pack: Sequence[_Piece]) -> int:
    return sum(piece.cost for piece in pack)
