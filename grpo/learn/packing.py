"""From rollouts to packs: groups of one update, best-fit under a token budget, one copy of a prompt a pack.

Everything here is host work on numpy arrays; `PackedBatch` (model/batch.py) has the layout.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch

from flashgrpo.grpo.errors import PackingError
from flashgrpo.grpo.types import Rollout
from flashgrpo.kernels.grpo_loss import LossConfig, denominator_of, group_advantages
from flashgrpo.model.batch import PackedBatch

_MAX_DEVIATION = 1e15  # of a reward in fp32; 1e-4, which is added to the standard deviation, is nothing beside it


@dataclass(frozen=True)
class Completion:
    """What is trained on: all of `token_ids`. `sequence_id` is its entry of the update's rewards.flatten()."""

    token_ids: np.ndarray  # [num_tokens] int64, at least one
    sequence_id: int
    behavior_logprobs: np.ndarray | None = None  # [num_tokens] fp32
    kept_counts: np.ndarray | None = None  # [num_tokens] and [kept_counts.sum()], as a rollout has them
    kept_ids: np.ndarray | None = None


@dataclass(frozen=True)
class Group:
    """A prompt and those of its completions that are trained on."""

    prompt_ids: Sequence[int]
    completions: list[Completion]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], first_id: int = 0, is_trained: Sequence[bool] | None = None) -> "Group":
        """The completions of a prompt, all or some, whose rewards begin at entry `first_id`."""
        completions = []
        for i, rollout in enumerate(rollouts):
            if is_trained is None or is_trained[i]:
                sampled = rollout.behavior_logprobs, rollout.kept_counts, rollout.kept_ids
                completions.append(Completion(rollout.completion_ids, first_id + i, *sampled))
        return cls(rollouts[0].prompt_ids, completions)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(_input_length(c) for c in self.completions)


def best_fit(groups: list[Group], token_budget: int) -> list[list[Group]]:
    """Groups into packs of at most `token_budget` tokens, best-fit decreasing; order is deterministic.

    A group that is too large is split, its prompt repeated in each part. Raises PackingError where a prompt and one
    completion alone are over the budget.
    """
    packs: list[list[Group]] = []
    rooms: list[tuple[int, int]] = []  # tokens that are free, and the pack's index; ascending
    pieces = [piece for group in groups if group.completions for piece in _split(group, token_budget)]
    for size, piece in sorted(((p.num_tokens, p) for p in pieces), key=lambda sized: -sized[0]):
        best = bisect_left(rooms, (size, 0))
        room, pack = rooms.pop(best) if best < len(rooms) else (token_budget, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(piece)
        insort(rooms, (room - size, pack))
    return packs


def build_batch(groups: list[Group]) -> PackedBatch:
    """Lay groups out as one pack, in the order given; an empty list gives the empty micro-batch."""
    segments: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    prefix: list[int] = []
    start = 0
    for group in groups:
        check_group(group)
        num_prompt = len(group.prompt_ids)
        segments += [np.asarray(group.prompt_ids), *(c.token_ids[:-1] for c in group.completions)]
        prefix += [-1, *[len(prefix)] * len(group.completions)]
        positions.append(np.arange(num_prompt))
        start += num_prompt
        last_of_prompt = start - 1
        for completion in group.completions:
            length = _input_length(completion)
            positions.append(np.arange(num_prompt, num_prompt + length))
            predictors.append(np.concatenate([[last_of_prompt], np.arange(start, start + length)]))
            start += length

    completions = [completion for group in groups for completion in group.completions]
    behavior = _of_all("behavior_logprobs", completions)
    counts, kept_ids = _of_all("kept_counts", completions), _of_all("kept_ids", completions)
    return PackedBatch(
        input_ids=_joined(segments, np.int64),
        position_ids=_joined(positions, np.int64),
        cu_seqlens=_offsets([len(segment) for segment in segments]),
        prefix=torch.tensor(prefix, dtype=torch.int32),
        max_seqlen=max(map(len, segments), default=0),
        targets=_joined([c.token_ids for c in completions], np.int64),
        predictors=_joined(predictors, np.int64),
        target_cu_seqlens=_offsets([len(c.token_ids) for c in completions]),
        sequence_ids=torch.tensor([c.sequence_id for c in completions], dtype=torch.int64),
        completions_per_prompt=torch.tensor([len(group.completions) for group in groups], dtype=torch.int64),
        # An empty pack has them.
        behavior_logprobs=_joined(behavior, np.float32) if len(behavior) == len(completions) else None,
        kept_ids=torch.from_numpy(np.concatenate(kept_ids)) if kept_ids else None,
        kept_offsets=_offsets(np.concatenate(counts)) if counts else None,
    )


def _of_all(name: str, completions: Sequence[Completion]) -> list[np.ndarray]:
    """What each of the completions has by this name, or none of them."""
    found = [array for completion in completions if (array := getattr(completion, name)) is not None]
    if found and len(found) != len(completions):
        raise PackingError(f"{len(found)} of {len(completions)} completions have {name}, wanted all or none")
    return found


def check_group(group: Group, token_budget: float = math.inf) -> None:
    """Raises PackingError for an empty prompt or completion, and where the two alone are over the budget."""
    lengths = [len(c.token_ids) for c in group.completions]
    if not len(group.prompt_ids):
        raise PackingError("found an empty prompt: its completions have no token to be predicted from")
    if not lengths:
        raise PackingError("found a prompt without completions: it has nothing to train on; leave the group out")
    if not min(lengths):
        raise PackingError("found a completion without tokens; leave it out of the group")
    longest = max(lengths) - 1
    if len(group.prompt_ids) + longest > token_budget:
        raise PackingError(
            f"a prompt of {len(group.prompt_ids)} tokens with a completion of {longest} does not fit "
            f"token_budget = {token_budget}; raise train.token_budget to {len(group.prompt_ids) + longest} or more"
        )


def live_groups(
    groups: list[Group],
    rewards: np.ndarray,  # [num_groups, group_size]
    config: LossConfig,
) -> list[Group]:
    """Leave out groups of equal rewards, which have no gradient without a KL penalty or an entropy bonus."""
    if config.kl_coef or config.entropy_coef:
        return groups
    return [*compress(groups, has_signal(rewards))]


def centred(
    rewards: np.ndarray,  # [num_groups, group_size] float64
    config: LossConfig,
) -> torch.Tensor:  # [num_groups, group_size] fp32
    """Rewards less their group's mean, which advantages do not depend on: fp32 would lose 1e8 + {0, 1}.

    Where advantages are scaled by the deviation, too, groups are so scaled that its square does not overflow; else
    what is beyond fp32 becomes its largest number, whose gradient is not finite.
    """
    deviations = group_advantages(torch.from_numpy(rewards), scale="none")
    if config.advantage_scale == "std":
        largest = deviations.abs().nan_to_num().amax(1, keepdim=True)
        deviations = deviations * (_MAX_DEVIATION / largest).clamp(max=1)
    limit = torch.finfo(torch.float32).max
    return deviations.clamp(-limit, limit).float()


def has_signal(
    rewards: np.ndarray,  # [num_groups, group_size] float64
) -> np.ndarray:  # [num_groups] bool
    """Whether an advantage of the group is not 0: it has two rewards or more, and not all of them are equal."""
    deviations = group_advantages(torch.from_numpy(rewards), scale="none").float()
    return deviations.nan_to_num().any(1).numpy()


def loss_denominator(
    groups: list[Group],  # without the completions that have no reward
    rewards: np.ndarray,  # [num_groups, group_size]
    config: LossConfig,
    max_new_tokens: int,
) -> float:
    """What the sums of one optimizer update are divided by, over all its micro-batches and ranks.

    Every completion with a reward counts, those of dead groups included, so that leaving them out changes nothing.
    """
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    without_tokens = int((~np.isnan(rewards)).sum()) - len(lengths)  # masked for their length
    return float(denominator_of(config, torch.tensor(lengths + [0] * without_tokens), max_length=max_new_tokens))


def _split(group: Group, token_budget: int) -> list[Group]:
    check_group(group, token_budget)
    if group.num_tokens <= token_budget:
        return [group]
    room = token_budget - len(group.prompt_ids)
    parts: list[list[Completion]] = [[]]
    used = 0
    for completion in group.completions:
        if used + _input_length(completion) > room:
            parts.append([])
            used = 0
        parts[-1].append(completion)
        used += _input_length(completion)
    return [Group(group.prompt_ids, part) for part in parts]


def _input_length(completion: Completion) -> int:
    return len(completion.token_ids) - 1


def _offsets(lengths: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _joined(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts], dtype=dtype))
