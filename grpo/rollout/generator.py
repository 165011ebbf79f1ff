"""What a generator is asked for, what it gives back, and the seeds that make every sample its own.

A sample's random numbers depend on (seed, step, prompt, sample) alone: not on rank, batch position or what else is
generated beside it.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.types import Request, Rollout, Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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
