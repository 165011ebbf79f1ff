"""Prompts to scored groups: each rank samples its share of a step's prompts, a group's rewards begin as soon as it is
finished, and in the end all ranks have all of it.

With `rollout.overlap` the next step is sampled, and scored, by a thread of its own while this one trains: by weights
that are one version older than those that its completions will train.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
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
from flashgrpo.grpo.stages.scores import scores_of
from flashgrpo.grpo.types import Prompt, Request, Rollout, Sampling

_PROBES, _PROBE_TOKENS = 4, 64
_NO_ARRAYS = {
    "completion_ids": np.empty(0, dtype=np.int64),
    "behavior_logprobs": np.empty(0, dtype=np.float32),
}


class _Share(NamedTuple):
    """What one rank sampled; the arrays of its rollouts travel apart from it."""

    groups: list[list[Rollout]]
    lengths: list[int]  # of the completions, in tokens
    table: RewardTable
    failures: dict[str, str]
    seconds: float


@dataclass
class _Ahead:
    """This rank's groups of the next step, while and after they are sampled."""

    thread: threading.Thread
    groups: list[list[Rollout]] = field(default_factory=list)
    error: Exception | None = None


class Sampler:
    """Samples a run's prompts by a generator, whose weights are those of `source` at the last `sync`."""

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
        self.sync_seconds: list[float] = []  # of each sync in the step
        self._ahead: _Ahead | None = None

    def sync(self, version: int) -> None:
        """The generator samples by weights `version` from now on; nothing is sent where it has them."""
        if self.generator.weight_version != version:
            start = time.perf_counter()
            self.generator.load_weights(self.source, version)
            self.sync_seconds.append(time.perf_counter() - start)

    def sync_metrics(self) -> dict[str, float]:
        """Seconds and rate of the step's syncs, that before an evaluation included."""
        seconds = sum(self.sync_seconds)
        num_bytes = len(self.sync_seconds) * self.source.num_bytes
        return {"time/sync_s": seconds, **({"sync/gb_per_s": num_bytes / seconds / 1e9} if seconds else {})}

    @property
    def is_ahead(self) -> bool:
        """Whether the next step's completions have been begun."""
        return self._ahead is not None

    def rollout(self, step: int, position: Position, clock: Clock) -> StepData:
        """Sample and score prompts_per_step groups from `position` on; what was sampled ahead comes first.

        With refill_limit, groups whose rewards are equal are replaced by others of their source.
        """
        config, start = self.recipe.rollout, position.num_prompts
        groups: list[list[Rollout]] = []
        sources: list[str] = []
        tables: list[RewardTable] = []
        for attempt in range(1 + config.refill_limit):
            if attempt:  # what was sampled ahead, if anything, is used up
                self.sync(step - 1)
            first = position.num_prompts
            prompts, position = self.mixture.take(position, step, config.prompts_per_step - len(groups))
            rollouts, table = self._sample_groups(step, first, prompts, clock)
            is_last = attempt == config.refill_limit
            keep = (has_signal(table.rewards) | is_last).tolist()
            groups += compress(rollouts, keep)
            sources += [prompt.source for prompt in compress(prompts, keep)]
            tables.append(RewardTable.merge([table], np.flatnonzero(keep)))
            dropped = [prompt for prompt, is_kept in zip(prompts, keep, strict=True) if not is_kept]
            position = self.mixture.owe(position, step, dropped)
            if len(groups) == config.prompts_per_step:
                break
        # Refills came in rounds; a mini-batch should have its share of every source.
        order = interleaved(sources)
        table = RewardTable.merge(tables, order)
        self.pool.check_step(table)
        discarded = position.num_prompts - start - len(groups)
        data = StepData([groups[i] for i in order], table, position, step - 1, discarded)
        if self.recipe.sources:
            for name in self.mixture.prompts:
                data.sources[name] = [row for row, i in enumerate(order) if sources[i] == name]
        allowed = data.version - int(config.overlap)
        if data.oldest_version < allowed:
            raise GeneratorFailure(
                f"completions come from weight version {data.oldest_version}, wanted {allowed} or newer"
            )
        return data

    def start_ahead(self, step: int, position: Position) -> None:
        """Begin this rank's completions of a step from `position` on, in a thread; `rollout` waits for them."""
        prompts, _ = self.mixture.take(position, step, self.recipe.rollout.prompts_per_step)

        def work() -> None:
            try:
                ahead.groups = self._generate(step, position.num_prompts, prompts)
            except Exception as error:  # it is raised where the groups are taken
                ahead.error = error

        ahead = self._ahead = _Ahead(threading.Thread(target=work, name="sampling ahead", daemon=True))
        ahead.thread.start()

    def probe(self, step: int) -> list[list[Rollout]]:
        """A few short completions by the newest weights, the same on all ranks: where a step trains completions from
        older ones, those cannot show whether the sampler's log-probs are the trainer's.
        """
        prompts, _ = self.mixture.take(Position({}, {}), step, _PROBES if self.world.is_main else 0)
        requests = [Request(i, prompt.token_ids, sample_seeds(0, step, i, 1)) for i, prompt in enumerate(prompts)]
        sampling = dataclasses.replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, _PROBE_TOKENS))
        return self.world.together(lambda: [*self.generator.generate(requests, sampling)])[0]

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores on the held-out prompts by the weights after `step`."""
        if self._ahead:  # the generator can have one version of the weights at a time
            self._ahead.thread.join()
        self.sync(step)
        prompts = {i: self.held_out[i] for i in self._own(len(self.held_out))}
        parts = self.world.together(
            lambda: evaluate(prompts, self.policy, self.generator, self.pool, self.recipe, step)
        )
        return {f"eval/{name}": float(value) for name, value in scores_of(parts).items()}

    def close(self) -> None:
        """End the generator, and with it what is being sampled ahead."""
        self.generator.close()

    def _sample_groups(
        self, step: int, first: int, prompts: Sequence[Prompt], clock: Clock
    ) -> tuple[list[list[Rollout]], RewardTable]:
        """The groups of prompts, `first` being the first one's number in the run, and their scores; each rank samples
        its share, and gets all of them.
        """
        own: list[list[Rollout]] = []

        def sample() -> _Share:
            start = time.perf_counter()
            with clock("generate"):
                own.extend(self._take_ahead() if self._ahead else self._generate(step, first, prompts))
            with clock("reward"):
                if any(model.device == "trainer" for model in self.recipe.reward_models.values()):
                    self.generator.free_weights()  # they take its memory
                table = self.pool.collect()
            light = [[dataclasses.replace(rollout, **_NO_ARRAYS) for rollout in group] for group in own]
            lengths = [len(rollout.completion_ids) for rollout in chain.from_iterable(own)]
            return _Share(light, lengths, table, self.pool.failures, time.perf_counter() - start)

        shares = self.world.together(sample)
        seconds = [share.seconds for share in shares]
        clock.idle_s += max(seconds) - sum(seconds) / len(seconds)
        # All ranks warn of the same failures: for each function the first rank's that has one.
        self.pool.failures = {name: why for share in reversed(shares) for name, why in share.failures.items()}
        finished = self._with_arrays(shares, own)
        order = np.argsort([group[0].group for group in finished])
        table = RewardTable.merge([share.table for share in shares if share.groups], order)
        return [finished[i] for i in order], table

    def _with_arrays(self, shares: list[_Share], own: list[list[Rollout]]) -> list[list[Rollout]]:
        """The groups of all ranks, with the tokens and log-probs of theirs: 8 bytes a token, sent as they are, where
        pickled rollouts would take 12 and several copies of gigabytes.
        """
        if self.world.size == 1:
            return own
        flat = [*chain.from_iterable(own)]
        none = [np.empty(0)]
        ids = self.world.gather_array(np.concatenate([r.completion_ids for r in flat] or none).astype(np.int32))
        logprobs = self.world.gather_array(
            np.concatenate([r.behavior_logprobs for r in flat] or none).astype(np.float32)
        )
        finished = []
        for share, rank_ids, rank_logprobs in zip(shares, ids, logprobs, strict=True):
            ends = np.cumsum(share.lengths)[:-1]
            arrays = iter(zip(np.split(rank_ids.astype(np.int64), ends), np.split(rank_logprobs, ends), strict=True))
            for group in share.groups:
                whole = []
                for rollout in group:
                    completion_ids, behavior = next(arrays)
                    whole.append(
                        dataclasses.replace(rollout, completion_ids=completion_ids, behavior_logprobs=behavior)
                    )
                finished.append(whole)
        return finished

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
            whole = []
            for rollout, text in texts:
                # From here on log-probs are of the whole vocabulary, as the trainer's.
                found = {"behavior_logprobs": rollout.comparable_logprobs, "kept_logprobs": None}
                whole.append(dataclasses.replace(rollout, reflections=count_reflections(text), **found))
            finished.append(whole)
        return finished

    def _take_ahead(self) -> list[list[Rollout]]:
        assert self._ahead is not None
        self._ahead.thread.join()
        ahead, self._ahead = self._ahead, None
        if ahead.error is not None:
            raise ahead.error
        return ahead.groups

    def _own(self, size: int) -> range:
        return range(self.world.rank, size, self.world.size)
