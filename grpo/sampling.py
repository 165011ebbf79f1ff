"""Prompts to scored groups: each rank samples its share of a step's prompts, a group's rewards begin as soon as it is
finished, and in the end all ranks have all of it.

With `rollout.max_staleness` that many steps are sampled, and scored, ahead of the one that trains, each by a thread of
its own. Servers take new weights in the middle of that, and go on by them: no token is from weights that are more than
so many versions older than those that it trains.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import chain, islice
from typing import Any

import numpy as np

from flashgrpo.grpo.data.mixture import Mixture, Position, interleaved
from flashgrpo.grpo.errors import GeneratorFailure
from flashgrpo.grpo.learn.packing import has_signal
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rewards.response import count_reflections
from flashgrpo.grpo.rollout.generator import Generator, sample_seeds
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.policy import Policy
from flashgrpo.grpo.run.progress import Clock
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.stages.evaluate import evaluate
from flashgrpo.grpo.stages.scores import scores_of
from flashgrpo.grpo.types import CompletionGroup, Prompt, Request, Rollout, Sampling, ScoredGroup, StepData

_PROBES, _PROBE_TOKENS = 4, 64


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
        self.sampling = Sampling(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.kept_limit
        )
        self.sync_seconds: list[float] = []  # of each sync in the step
        # This rank's completions of a step, while and after they are sampled.
        self._ahead: dict[int, Future[list[list[Rollout]]]] = {}

    def sync(self, version: int) -> None:
        """The generator samples by weights `version` from now on; nothing is sent where it has them."""
        if self.generator.weight_version != version:
            clock = Clock()
            with clock("sync"):
                self.generator.load_weights(self.source, version)
            self.sync_seconds.append(clock.seconds["sync"])

    def sync_metrics(self) -> dict[str, float]:
        """Seconds and rate of the step's syncs, that before an evaluation included."""
        seconds = sum(self.sync_seconds)
        num_bytes = len(self.sync_seconds) * self.source.num_bytes
        return {"time/sync_s": seconds, **({"sync/gb_per_s": num_bytes / seconds / 1e9} if seconds else {})}

    def rollout(self, step: int, position: Position, clock: Clock) -> tuple[StepData, Position]:
        """Sample and score prompts_per_step groups from `position` on; what was sampled ahead comes first.

        With refill_limit, groups that nothing is learnt from, whose rewards are equal or whose mean is outside of
        keep_mean_reward, are replaced by others of their source.
        """
        config, discarded = self.recipe.rollout, 0
        groups: list[ScoredGroup] = []
        prompts, first, position = self.mixture.step_prompts(position, step, config.prompts_per_step)
        for attempt in range(1 + config.refill_limit):
            if attempt:
                self.sync(step - 1)
                first = position.num_prompts
                prompts, position = self.mixture.take(position, step, config.prompts_per_step - len(groups))
            sampled = self.sample_groups(step, first, prompts, clock)
            signals = has_signal(np.stack([group.scores.rewards for group in sampled]))
            is_last, dropped = attempt == config.refill_limit, []
            for prompt, group, is_live in zip(prompts, sampled, signals, strict=True):
                if is_last or (is_live and group.is_kept(config.keep_mean_reward)):
                    groups.append(group)
                else:
                    dropped.append(prompt)
            position = self.mixture.owe(position, step, dropped)
            discarded += len(dropped)
            if not dropped:
                break
        # Refills came in rounds; a mini-batch should have its share of every source.
        data = StepData(interleaved(groups), step - 1, discarded)
        self.pool.check_step([group.scores for group in data.groups])
        allowed = data.version - config.max_staleness
        if data.oldest_version < allowed:
            raise GeneratorFailure(
                f"completions come from weight version {data.oldest_version}, wanted {allowed} or newer"
            )
        return data, position

    def start_ahead(self, step: int, position: Position) -> Position:
        """With max_staleness, begin this rank's completions of `step` and of so many steps after it, unless they have
        been; `rollout` waits for them. Returns the position after their prompts.
        """
        config = self.recipe.rollout
        last = min(step + config.max_staleness, self.recipe.train.steps) if config.max_staleness else 0
        for number in range(step, last + 1):
            if number - step == len(position.begun):
                position = self.mixture.begin(position, number, config.prompts_per_step)
            if number not in self._ahead:  # a run that goes on has them begun by the one before, which has lost them
                self._start(number, Position(*position.begun[number - step]))
        return position

    def _start(self, step: int, position: Position) -> None:
        prompts, _ = self.mixture.take(position, step, self.recipe.rollout.prompts_per_step)
        ahead = self._ahead[step] = Future()

        def work() -> None:
            try:
                ahead.set_result(self._generate(step, position.num_prompts, prompts))
            except BaseException as error:  # it is raised where the completions are taken
                ahead.set_exception(error)

        # No executor's: at the end of a run that fails the process must not wait for it.
        threading.Thread(target=work, name="sampling ahead", daemon=True).start()

    def probe(self, step: int) -> list[list[Rollout]]:
        """A few short completions by the newest weights, the same on all ranks: where a step trains completions from
        older ones, those cannot show whether the sampler's log-probs are the trainer's.
        """
        prompts, _ = self.mixture.take(Position({}, {}), step, _PROBES if self.world.is_main else 0)
        requests = []
        for i, prompt in enumerate(prompts):
            requests.append(Request(i, prompt.token_ids, sample_seeds(0, step, i, 1)))
        longest = min(self.sampling.max_new_tokens, _PROBE_TOKENS)
        sampling = dataclasses.replace(self.sampling, max_new_tokens=longest)
        return self.world.together(lambda: [*self.generator.generate(requests, sampling)])[0]

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores on the held-out prompts by the weights after `step`, beside what is sampled ahead."""
        self.sync(step)
        prompts = {i: self.held_out[i] for i in self._own(len(self.held_out))}
        parts = self.world.together(
            lambda: evaluate(prompts, self.policy, self.generator, self.pool, self.recipe, step)
        )
        return {f"eval/{name}": float(value) for name, value in scores_of(parts).items()}

    def close(self) -> None:
        """End the generator, and with it what is being sampled ahead."""
        self.generator.close()

    def sample_groups(self, step: int, first: int, prompts: Sequence[Prompt], clock: Clock) -> list[ScoredGroup]:
        """The scored groups of prompts, `first` being the first one's number in the run; each rank samples its share,
        and gets all of them.
        """
        own: list[ScoredGroup] = []

        def sample() -> tuple[dict[str, str], float]:
            start = time.perf_counter()
            with clock("generate"):
                ahead = self._ahead.pop(step, None)
                sampled = ahead.result() if ahead else self._generate(step, first, prompts)
            with clock("reward"):
                if any(model.device == "trainer" for model in self.recipe.reward_models.values()):
                    self.generator.free_weights()  # they take its memory
                scores = self.pool.collect(step)
            for rollouts, each in zip(sampled, scores, strict=True):
                own.append(ScoredGroup(rollouts, each, prompts[rollouts[0].group].source))
            return self.pool.failures, time.perf_counter() - start

        told = self.world.together(sample)
        seconds = [rank_s for _, rank_s in told]
        clock.idle_s += max(seconds) - sum(seconds) / len(seconds)
        # All ranks warn of the same failures: for each function the first rank's that has one.
        self.pool.failures = {}
        for failures, _ in reversed(told):
            self.pool.failures |= failures
        return sorted(gather_groups(own, self.world), key=lambda group: group.rollouts[0].group)

    def _generate(self, step: int, first: int, prompts: Sequence[Prompt]) -> list[list[Rollout]]:
        """This rank's groups; each goes to the rewards as soon as it is finished."""
        seed, size = self.recipe.run.seed, self.recipe.rollout.group_size
        requests, finished = [], []
        for i in self._own(len(prompts)):
            requests.append(Request(i, prompts[i].token_ids, sample_seeds(seed, step, first + i, size), priority=step))
        for rollouts in self.generator.generate(requests, self.sampling):
            group = CompletionGroup.of(prompts[rollouts[0].group], rollouts, self.policy.decode)
            self.pool.submit(group, step)
            counted = []
            for rollout, text in zip(rollouts, group.completions, strict=True):
                counted.append(dataclasses.replace(rollout, reflections=count_reflections(text)))
            finished.append(counted)
        return finished

    def _own(self, size: int) -> range:
        return range(self.world.rank, size, self.world.size)


def gather_groups(own: list[ScoredGroup], world: World) -> list[ScoredGroup]:
    """The groups of all ranks. Their tokens, kept sets and log-probs travel as two arrays, 8 bytes a token without the
    sets, where pickled they would take 12 and several copies of gigabytes.
    """
    if world.size == 1:
        return own
    rollouts = [rollout for group in own for rollout in group.rollouts]
    numbers = [_whole_numbers(rollout) for rollout in rollouts]
    none = [np.empty(0)]  # of a rank without a prompt
    ids = np.concatenate([*chain.from_iterable(numbers)] or none).astype(np.int32)
    logprobs = np.concatenate([rollout.behavior_logprobs for rollout in rollouts] or none).astype(np.float32)
    arrays = zip(world.gather_array(ids), world.gather_array(logprobs), strict=True)
    empty = {"completion_ids": ids[:0], "behavior_logprobs": logprobs[:0], "kept_counts": None, "kept_ids": None}
    light = []
    for group in own:
        bare = [dataclasses.replace(rollout, **empty) for rollout in group.rollouts]
        light.append(dataclasses.replace(group, rollouts=bare))

    groups = []
    shares = world.gather((light, [[len(part) for part in parts] for parts in numbers]))
    for (share, sizes), (rank_ids, rank_logprobs) in zip(shares, arrays, strict=True):
        lengths = iter(sizes)
        parts = iter(np.split(rank_ids, np.cumsum([*chain.from_iterable(sizes)])[:-1]))
        behaviors = iter(np.split(rank_logprobs, np.cumsum([tokens for tokens, *_ in sizes])[:-1]))
        for group in share:
            whole = []
            for rollout in group.rollouts:
                completion_ids, *sets = islice(parts, len(next(lengths)))
                found: dict[str, Any] = dict(zip(("kept_counts", "kept_ids"), sets, strict=False))
                found |= {"completion_ids": completion_ids.astype(np.int64), "behavior_logprobs": next(behaviors)}
                whole.append(dataclasses.replace(rollout, **found))
            groups.append(dataclasses.replace(group, rollouts=whole))
    return groups


def _whole_numbers(rollout: Rollout) -> list[np.ndarray]:
    """Its tokens, and its kept sets where it has some."""
    if rollout.kept_counts is None or rollout.kept_ids is None:
        return [rollout.completion_ids]
    return [rollout.completion_ids, rollout.kept_counts, rollout.kept_ids]
