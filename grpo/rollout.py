"""What a generator is asked for, what it gives back, and the seeds that make every sample its own.

A sample's random numbers depend on (seed, step, prompt, sample) alone: not on rank, batch position or what else is
generated beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from flashgrpo.grpo.weight_sync import DecoderSource

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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


class Generator(Protocol):
    """Native or vLLM. `weight_version` is that of the weights it would sample from; -1: it holds none."""

    weight_version: int
    stop_token_ids: list[int]

    def load_weights(self, source: DecoderSource, version: int) -> None:
        """Sample from these weights from now on; on several ranks, all call it."""
        ...

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each group as soon as its last completion is done, in any order."""
        ...

    def free_weights(self) -> None:
        """Give the memory that training needs back until the next `load_weights`."""
        ...

    def close(self) -> None:
        """End what runs for it."""
        ...


def sample_seeds(seed: int, step: int, prompt: int, num_samples: int) -> np.ndarray:
    """Seeds of a prompt's samples, [num_samples] uint64, by splitmix64 (Steele et al. 2014) over the four numbers."""
    state = np.full(num_samples, seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for part in (step, prompt, np.arange(num_samples, dtype=np.uint64)):
        state = splitmix64(state ^ splitmix64(np.asarray(part).astype(np.uint64)))
    return state


def splitmix64(state: np.ndarray) -> np.ndarray:
    """One output of splitmix64 for each uint64 state."""
    with np.errstate(over="ignore"):
        z = state + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
