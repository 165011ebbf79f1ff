"""The forms that a completion goes through, from a problem of the data to a group with rewards:

    Problem -> Prompt -> Request -> Rollout -> CompletionGroup, which rewards read -> ScoredGroup -> StepData

A sum by groups of two, of which the first completion is right:

    prompt = Prompt(Problem("1+1=", {"answer": "2"}), token_ids=[5, 6, 5, 7], text="1+1=")
    request = Request(0, prompt.token_ids, seeds)              # seeds: [2]
    rollouts = [Rollout(..., completion_ids=[8, 0]), Rollout(..., completion_ids=[9, 0])]
    asked = CompletionGroup.of(prompt, rollouts, decode)       # completions: ["2", "3"]
    scored = ScoredGroup(rollouts, Scores(rewards=[1.0, 0.0], by_function={"accuracy": [1.0, 0.0]}))

What is trained of it are `Completion`s behind their prompt (learn/packing.py), laid out as a `PackedBatch`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

PromptText = str | list[dict[str, Any]]  # text, or chat messages with `role` and `content`


@dataclass(frozen=True)
class Problem:
    """A prompt and the other columns of its row, which the rewards get; the expected answer is `columns["answer"]`."""

    prompt: PromptText
    columns: dict[str, Any]
    where: str = field(default="data", compare=False)  # its place in the data, for errors

    @property
    def question(self) -> str:
        """The prompt as text: of chat messages, what the user says."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(message["content"] for message in self.prompt if message["role"] == "user")


@dataclass(frozen=True)
class Prompt:
    """A problem as the model sees it."""

    problem: Problem
    token_ids: list[int]
    text: str
    source: str = "data"


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave out none.
    Rollouts have the sets that were drawn from, each where it has at most `kept_limit` tokens.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    kept_limit: int = 0

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class Request:
    """One prompt and the seeds of its completions: as many as there are seeds."""

    group: int
    prompt_ids: list[int]
    seeds: np.ndarray  # [group_size] uint64
    priority: int = 0  # a server samples those with a lower one first


@dataclass(frozen=True)
class Rollout:
    """One completion. `completion_ids` ends with the stop token where there is one.

    What top_p and top_k kept to draw a token from is its kept set: `kept_counts` has its size, or 0 where it is not
    known, as of the whole vocabulary, and `kept_ids` the sets behind one another. Log-probs are over these sets.
    """

    prompt_ids: list[int]
    completion_ids: np.ndarray  # [num_tokens] int64
    behavior_logprobs: np.ndarray  # [num_tokens] fp32
    finish_reason: Literal["stop", "length"]
    group: int
    weight_versions: tuple[tuple[int, int], ...]  # (version, tokens sampled from it), in the order of the tokens
    kept_counts: np.ndarray | None = None  # [num_tokens] int32; None: all are of the whole vocabulary
    kept_ids: np.ndarray | None = None  # [kept_counts.sum()] int32
    reflections: int = 0  # reflective phrases in its text, where they were counted


@dataclass(frozen=True)
class CompletionGroup:
    """The completions of one problem, as rewards see them."""

    problem: Problem
    prompt: str  # the text that the model continued, in its template
    completions: Sequence[str]  # [group_size]
    completion_ids: Sequence[Sequence[int]]  # [group_size], each [num_tokens]
    finish_reasons: Sequence[str]  # [group_size]
    source: str = "data"  # whose functions score it

    @classmethod
    def of(cls, prompt: Prompt, rollouts: Sequence[Rollout], decode: Callable[[np.ndarray], str]) -> "CompletionGroup":
        """What was sampled of a prompt, read as text by `decode`."""
        return cls(
            problem=prompt.problem,
            prompt=prompt.text,
            completions=[decode(rollout.completion_ids) for rollout in rollouts],
            completion_ids=[rollout.completion_ids.tolist() for rollout in rollouts],
            finish_reasons=[rollout.finish_reason for rollout in rollouts],
            source=prompt.source,
        )


@dataclass(frozen=True)
class Scores:
    """What the completions of a group are worth."""

    rewards: np.ndarray  # [group_size] float64, the weighted sum; NaN where missing
    # By function that applies, [group_size]: NaN where missing, None where it leaves a completion to the others.
    by_function: dict[str, list[float | None]]


def given_scores(groups: Sequence[Scores], name: str) -> list[float]:
    """What a function gave to the completions that it did not leave to others, group by group; NaN where missing."""
    given = []
    for group in groups:
        given += [score for score in group.by_function.get(name, []) if score is not None]
    return given


@dataclass(frozen=True)
class ScoredGroup:
    """A group as it is trained on: its completions with their scores."""

    rollouts: list[Rollout]  # [group_size]
    scores: Scores
    source: str = "data"

    def is_kept(self, bounds: tuple[float, float] | None) -> bool:
        """Whether the mean of its rewards, of those that are known, is within `bounds`."""
        known = self.scores.rewards[~np.isnan(self.scores.rewards)]
        return bounds is None or (known.size > 0 and bounds[0] <= known.mean() <= bounds[1])

    def is_trained(self, mask_overlong: bool) -> list[bool]:  # [group_size]
        """Whether a completion has a reward and, with `mask_overlong`, ended by itself."""
        known = []
        for rollout, reward in zip(self.rollouts, self.scores.rewards, strict=True):
            is_masked = mask_overlong and rollout.finish_reason == "length"
            known.append(not (np.isnan(reward) or is_masked))
        return known


@dataclass(frozen=True)
class StepData:
    """The groups of a step, the same on all ranks."""

    groups: list[ScoredGroup]
    version: int  # of the weights that it will train: the steps taken
    discarded: int = 0  # groups that dynamic sampling threw away

    @property
    def rollouts(self) -> list[Rollout]:
        """Every completion, in the order of `rewards.flatten()`."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def rewards(self) -> np.ndarray:
        """[num_groups, group_size] float64"""
        return np.stack([group.scores.rewards for group in self.groups])

    @property
    def oldest_version(self) -> int:
        """Of the weights that a token was sampled by."""
        return min(version for rollout in self.rollouts for version, _ in rollout.weight_versions)

    @property
    def is_stale(self) -> bool:
        """Whether a token was sampled by weights that are not the newest."""
        return self.oldest_version < self.version
