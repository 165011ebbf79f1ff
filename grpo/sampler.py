"""A step's completions and their rewards: each rank samples its share, and then all have all of them.

With `rollout.overlap` the completions of the next step are sampled, and scored, by a thread of their own while the
step before it trains: the weights are then one version older than those that are trained.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import numpy as np

from flashgrpo.grpo.data.mixture import Mixture, Position, interleaved
from flashgrpo.grpo.errors import GeneratorFailure
from flashgrpo.grpo.learn.packing import has_signal
from flashgrpo.grpo.metrics import StepData, count_reflections
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rewards.table import RewardTable
from flashgrpo.grpo.rollout.generator import Generator, sample_seeds
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.policy import Policy
from flashgrpo.grpo.run.progress import Clock
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.stages.evaluate import completion_group, evaluate
from flashgrpo.grpo.stages.scores import merge
from flashgrpo.grpo.types import Prompt, Request, Rollout, Sampling

_PROBES, _PROBE_TOKENS = 4, 64


class _Share(NamedTuple):
    """What one rank sampled."""

    groups: list[list[Rollout]]
    table: RewardTable
    failures: dict[str, str]
    seconds: float


@dataclass
class _Ahead:
    """This rank's groups of the next step, while and after they are sampled."""

    thread: threading.Thread | None = None
    groups: list[list[Rollout]] = field(default_factory=list)
    error: Exception | None = None


class Sampler:
    """Rollouts of a run's prompts by a generator whose weights follow those of `source`."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        policy: Policy,
        pool: RewardPool,
        generator: Generator,
        source: DecoderSource,
        mixture: Mixture,
        held_out: Sequence[Prompt],
    ):
        self.recipe, self.world, self.policy, self.pool = recipe, world, policy, pool
        self.generator, self.source, self.mixture, self.held_out = generator, source, mixture, held_out
        rollout = recipe.rollout
        self.sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
        self._synced_s: list[float] = []
        self._ahead: _Ahead | None = None

    def rollout(self, step: int, position: Position, clock: Clock) -> StepData:
        """Sample and reward prompts_per_step groups from `position` on; with refill_limit, replace those whose rewards
        are equal by others of their source. With overlap, what was sampled ahead comes first, and then the next step's
        sampling starts.
        """
        config, start = self.recipe.rollout, position.num_prompts
        groups: list[list[Rollout]] = []
        sources: list[str] = []
        tables: list[RewardTable] = []
        for attempt in range(1 + config.refill_limit):
            first = position.num_prompts
            prompts, position = self.mixture.take(position, step, config.prompts_per_step - len(groups))
            rollouts, table = self._sample_groups(step, first, prompts, clock)
            is_last = attempt == config.refill_limit
            keep = (has_signal(table.rewards) | is_last).tolist()
            groups += compress(rollouts, keep)
            sources += [prompt.source for prompt in compress(prompts, keep)]
            tables.append(RewardTable.merge([table], np.flatnonzero(keep)))
            position = self.mixture.owe(position, step, [p for p, kept in zip(prompts, keep, strict=True) if not kept])
            if len(groups) == config.prompts_per_step:
                break
        order = interleaved(sources)
        table = RewardTable.merge(tables, order)
        self.pool.check_step(table)
        discarded = position.num_prompts - start - len(groups)
        data = StepData([groups[i] for i in order], table, position, step - 1, discarded)
        if self.recipe.sources:
            data.sources = {n: [i for i, row in enumerate(order) if sources[row] == n] for n in self.mixture.prompts}
        self._check_staleness(data)
        if config.overlap and step < self.recipe.train.steps:
            self.load_generator(step - 1)
            if data.is_stale:
                data.probe = self._probe(step)
            self._start_ahead(step + 1, position)
        return data

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores on the held-out prompts by the weights after `step`."""
        self._join_ahead()
        self.load_generator(step)
        prompts = {i: self.held_out[i] for i in self._own(len(self.held_out))}
        parts = self.world.together(
            lambda: evaluate(prompts, self.policy, self.generator, self.pool, self.recipe, step)
        )
        return {f"eval/{name}": float(value) for name, value in merge(parts).scores().items()}

    def load_generator(self, version: int) -> None:
        """Bring the generator's weights up to date."""
        if self.generator.weight_version != version:
            start = time.perf_counter()
            self.generator.load_weights(self.source, version)
            self._synced_s.append(time.perf_counter() - start)

    def take_syncs(self) -> dict[str, float]:
        """Seconds and rate of all weight syncs since the last call, those before an evaluation included."""
        seconds, self._synced_s = self._synced_s, []
        rate = {"sync/gb_per_s": len(seconds) * self.source.num_bytes / sum(seconds) / 1e9} if seconds else {}
        return {"time/sync_s": sum(seconds), **rate}

    def close(self) -> None:
        """End the generator, and with it what is being sampled ahead."""
        self.generator.close()

    def _sample_groups(
        self, step: int, first: int, prompts: Sequence[Prompt], clock: Clock
    ) -> tuple[list[list[Rollout]], RewardTable]:
        """Generate for prompts, `first` being the first one's number in the run, each rank for its share; a group's
        rewards are computed while others still generate. Every rank gets all of them: a token takes 12 bytes.
        """
        if self._ahead is None:
            self.load_generator(step - 1)

        def sample() -> _Share:
            start = time.perf_counter()
            with clock("generate"):
                groups = self._generate(step, first, prompts) if self._ahead is None else self._take_ahead()
            with clock("reward"):
                if any(model.device == "trainer" for model in self.recipe.reward_models.values()):
                    self.generator.free_weights()  # they take its memory
                table = self.pool.collect()
            return _Share(groups, table, self.pool.failures, time.perf_counter() - start)

        shares = self.world.together(sample)
        seconds = [share.seconds for share in shares]
        clock.idle_s += max(seconds) - sum(seconds) / len(seconds)
        self.pool.failures = {name: why for share in shares[::-1] for name, why in share.failures.items()}
        finished = [group for share in shares for group in share.groups]
        order = np.argsort([group[0].group for group in finished])
        table = RewardTable.merge([share.table for share in shares if share.groups], order)
        return [finished[i] for i in order], table

    def _generate(self, step: int, first: int, prompts: Sequence[Prompt]) -> list[list[Rollout]]:
        """This rank's groups; each goes to the rewards as soon as it is finished."""
        seed, size = self.recipe.run.seed, self.recipe.rollout.group_size
        requests = [
            Request(i, prompts[i].token_ids, sample_seeds(seed, step, first + i, size)) for i in self._own(len(prompts))
        ]
        finished = []
        for group in self.generator.generate(requests, self.sampling):
            scored = completion_group(prompts[group[0].group], group, self.policy)
            self.pool.submit(scored, step)
            texts = zip(group, scored.completions, strict=True)
            finished.append([dataclasses.replace(r, reflections=count_reflections(text)) for r, text in texts])
        return finished

    def _start_ahead(self, step: int, position: Position) -> None:
        ahead = self._ahead = _Ahead()
        prompts, _ = self.mixture.take(position, step, self.recipe.rollout.prompts_per_step)

        def work() -> None:
            try:
                ahead.groups = self._generate(step, position.num_prompts, prompts)
            except Exception as error:  # it is raised where the groups are taken
                ahead.error = error

        ahead.thread = threading.Thread(target=work, name="sampling ahead", daemon=True)
        ahead.thread.start()

    def _take_ahead(self) -> list[list[Rollout]]:
        ahead = self._join_ahead()
        self._ahead = None
        if ahead.error is not None:
            raise ahead.error
        return ahead.groups

    def _join_ahead(self) -> "_Ahead":
        if self._ahead and self._ahead.thread:
            self._ahead.thread.join()
        return self._ahead or _Ahead()

    def _probe(self, step: int) -> list[list[Rollout]]:
        """A few short completions by the weights that were just sent, the same on all ranks: what is trained in this
        step is from older ones, and cannot show whether the sampler's log-probs are the trainer's.
        """
        prompts, _ = self.mixture.take(Position({}, {}), step, _PROBES if self.world.is_main else 0)
        requests = [Request(i, prompt.token_ids, sample_seeds(0, step, i, 1)) for i, prompt in enumerate(prompts)]
        sampling = dataclasses.replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, _PROBE_TOKENS))
        return self.world.together(lambda: [*self.generator.generate(requests, sampling)])[0]

    def _check_staleness(self, data: StepData) -> None:
        oldest, allowed = data.oldest_version, data.version - int(self.recipe.rollout.overlap)
        if oldest < allowed:
            raise GeneratorFailure(f"completions come from weight version {oldest}, wanted {allowed} or newer")

    def _own(self, size: int) -> range:
        return range(self.world.rank, size, self.world.size)
