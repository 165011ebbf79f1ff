"""The forms that a completion goes through, from a problem of the data to a group with rewards."""

from collections.abc import Sequence
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
    """How completions are drawn. `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave out none."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

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


@dataclass(frozen=True)
class Rollout:
    """One completion. `completion_ids` ends with the stop token where there is one."""

    prompt_ids: list[int]
    completion_ids: np.ndarray  # [num_tokens] int64
    behavior_logprobs: np.ndarray  # [num_tokens] fp32, of the distribution that was sampled from
    finish_reason: Literal["stop", "length"]
    group: int
    weight_versions: tuple[tuple[int, int], ...]  # (version, tokens sampled from it), in the order of the tokens
    kept_logprobs: np.ndarray | None = None  # [num_tokens] fp32, of what top_k and top_p kept, where that is known
    reflections: int = 0  # reflective phrases in its text, where they were counted

    @property
    def comparable_logprobs(self) -> np.ndarray:
        """behavior_logprobs of the whole vocabulary, as the trainer's are; renormalised ones where nothing is known."""
        return self.behavior_logprobs if self.kept_logprobs is None else self.behavior_logprobs + self.kept_logprobs


@dataclass(frozen=True)
class CompletionGroup:
    """The completions of one problem, as rewards see them."""

    problem: Problem
    prompt: str  # the text that the model continued, in its template
    completions: Sequence[str]  # [group_size]
    completion_ids: Sequence[Sequence[int]]  # [group_size], each [num_tokens]
    finish_reasons: Sequence[str]  # [group_size]
    source: str = "data"  # whose functions score it
