"""GRPO: sample groups, reward them, pack what has a gradient, update, once a step; `flashgrpo train RECIPE`, or on
many GPUs `torchrun --nproc_per_node 8 -m flashgrpo.grpo.cli train RECIPE`.

The methods of `Trainer` stand in the order of a step. It waits for the device once a step, in `device_metrics`, besides
what the generator does.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashgrpo.grpo.data.mixture import Mixture, Position
from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_prompts
from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.learn.balance import PackPlan, plan_packs
from flashgrpo.grpo.learn.learner import Stats, packed_loss
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch, centred, live_groups, loss_denominator
from flashgrpo.grpo.metrics import StepData, device_metrics, one_line, rollout_metrics, speed_metrics
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rewards.rules import check_names
from flashgrpo.grpo.rollout.opening import open_generator
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.loop import RunLoop
from flashgrpo.grpo.run.policy import open_sharded_model
from flashgrpo.grpo.run.progress import Clock, StepBar, console
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.sampler import Sampler
from flashgrpo.grpo.stages.evaluate import open_reward_pool
from flashgrpo.grpo.types import Problem, Rollout
from flashgrpo.kernels.linear_grpo import linear_logprobs
from flashgrpo.model.batch import PackedBatch, gather_predictors
from flashgrpo.model.checkpoint import read_config
from flashgrpo.model.cost import ModelFlops
from flashgrpo.model.decoder import Decoder
from flashgrpo.model.sharding import free_gathered

_LOGGED_GROUPS = 2
_STEPS_WITHOUT_SIGNAL = 3


@dataclass(frozen=True)
class Update:
    """One mini-batch: an optimizer update."""

    plan: PackPlan
    batches: list[PackedBatch]  # this rank's
    rewards: Tensor  # [num_groups, group_size] fp32, less their group's mean
    denominator: float


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe, or continue it; returns the folder of the final model.

    Raises RecipeError, DataError, RewardError, CheckpointError and RunInputError before the first step, RunError and
    RewardFailure later. Ctrl-C saves a checkpoint and raises KeyboardInterrupt.
    """
    check_names(recipe)
    with (
        open_world(recipe) as world,
        RunFolder(recipe, resume, world) as folder,
    ):
        read_config(recipe.model.path)  # a wrong path is found before the data set is fetched
        problems, held_out = load_problems(recipe.data, recipe.run.seed)
        others = {name: load_problems(source, recipe.run.seed)[0] for name, source in recipe.sources.items()}
        with open_reward_pool(recipe, problems[0], {name: source[0] for name, source in others.items()}) as pool:
            return Trainer(recipe, folder, world, pool, problems, held_out, others).run()


class Trainer(RunLoop):
    """The loop and its state: weights, optimizer, reference, data position, step."""

    title = "train"

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        world: World,
        pool: RewardPool,
        problems: list[Problem],
        held_out: list[Problem],
        others: Mapping[str, list[Problem]] = MappingProxyType({}),  # the problems of recipe.sources
    ):
        super().__init__(recipe, folder, world)
        self.recipe = recipe
        self._steps_without_signal = 0  # in a row, up to now
        self.position = folder.stored("position", Position, Position({}, {}))
        render = partial(render_prompts, policy=self.policy)
        prompts, tests = render(problems, data=recipe.data), render(held_out[: recipe.eval.problems], data=recipe.data)
        sources = {name: render(others[name], data=data, source=name) for name, data in recipe.sources.items()}
        mixture = Mixture(recipe, {"data": prompts, **sources})
        longest_prompt = max(len(prompt.token_ids) for prompt in chain(tests, *mixture.prompts.values()))
        _check_token_budget(recipe, longest_prompt)
        config = self.policy.model.config
        self.flops = ModelFlops.of(config)
        self.reference = None
        if recipe.loss.kl_coef:
            stored = self.compute_dtype
            self.reference = open_sharded_model(recipe.model, world.device, world.mesh, stored=stored)
            self.reference.requires_grad_(False)
        self.open_learner(recipe.train.steps)
        if recipe.reward_models:
            from flashgrpo.grpo.rewards.models import open_preferences

            used = {source: recipe.reward_weights[source].keys() for source in mixture.prompts}
            questions = {
                name: [prompt.problem for source in used if name in used[source] for prompt in mixture.prompts[source]]
                for name in recipe.reward_models
            }
            longest = recipe.rollout.max_new_tokens
            pool.scorers.update(open_preferences(recipe.reward_models, self.policy, world, questions, longest))
        generator = open_generator(recipe, self.policy, world, longest_prompt)
        source = DecoderSource(self.learner.params, config, self.compute_dtype)
        self.has_comparable_logprobs = recipe.rollout.generator == "native" or not recipe.rollout.is_truncated
        if not self.has_comparable_logprobs:
            console.print(
                "[yellow]vLLM gives log-probs of what top_p and top_k kept: whether they are the trainer's cannot be "
                "checked (train.mismatch_alarm)[/yellow]"
            )
        self.sampler = Sampler(recipe, world, self.policy, pool, generator, source, mixture, tests)
        self.ends.callback(self.sampler.close)

    def begin(self) -> None:
        """The evaluation before training, or one that a stop has cut short."""
        if self._evaluates_at(self.step) and not self.folder.has_logged(self.step, "eval/pass@1"):
            when = f"after step {self.step}" if self.step else "before the first step"
            size = f"{len(self.sampler.held_out)} x {self.recipe.eval.samples}"
            console.print(f"evaluating {size} {when}", highlight=False)
            self.folder.log_more(self.step, self.sampler.evaluate(self.step) | self.sampler.take_syncs())

    def run_step(self, step: int, bar: StepBar) -> tuple[dict[str, float], str]:
        """Rollout, rewards, packing, scoring, updates, metrics; Ctrl-C waits from the first update to the last."""
        clock = Clock()
        bar.phase("generate")
        data = self.sampler.rollout(step, self.position, clock)
        self.sampler.generator.free_weights()
        with clock("pack"):
            updates = self._plan_updates(data)
        metrics: dict[str, float] = {}
        try:
            bar.phase("train")
            metrics["lr"] = self.learner.set_lr(step)
            metrics |= self._learn(updates, data, clock)
            self.step, self.position = step, data.position
            self._refresh_reference()
            plans = [update.plan for update in updates] * self.recipe.train.epochs
            metrics |= rollout_metrics(data, self.recipe.loss) | speed_metrics(data, clock, plans, self.world)
            if self._evaluates_at(step):
                bar.phase("evaluate")
                metrics |= self.sampler.evaluate(step)
        finally:
            if self.step == step:
                self.folder.log_samples(step, self._samples(data))
                self.folder.log(step, metrics | self.sampler.take_syncs())
        self._compare_logprobs(step, data, metrics)
        self._watch_signal(step, metrics)
        return metrics, one_line(metrics)

    def _watch_signal(self, step: int, metrics: dict[str, float]) -> None:
        """Says when several steps in a row gave nothing to learn from."""
        has_signal = metrics["grad_norm"] != 0 and metrics["groups/dead"] < 1
        self._steps_without_signal = 0 if has_signal else self._steps_without_signal + 1
        if self._steps_without_signal == _STEPS_WITHOUT_SIGNAL:
            means = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("reward/"))
            console.print(
                f"[yellow]step {step}: {_STEPS_WITHOUT_SIGNAL} steps in a row had nothing to learn from: in each group "
                f"all rewards are equal or missing, or all completions masked ({means}). Look at samples.jsonl: are "
                "problems all too hard or too easy, is the reward blind, is rollout.max_new_tokens too low?[/yellow]",
                highlight=False,
            )

    def _compare_logprobs(self, step: int, data: StepData, metrics: dict[str, float]) -> None:
        """The alarm where the sampler's log-probs are not the trainer's."""
        alarm, rollouts = self.recipe.train.mismatch_alarm, [r for group in data.rollouts for r in group]
        broken = sum(not np.isfinite(rollout.behavior_logprobs).all() for rollout in rollouts)
        off = metrics.get("mismatch/mean", 0.0)
        if broken:
            fault = f"not finite in {broken} of {len(rollouts)} completions"
        elif not off <= alarm:  # NaN, too
            fault = f"{off:.3g} off the trainer's on average (train.mismatch_alarm = {alarm})"
        else:
            return
        console.print(f"[yellow]step {step}: the sampler's log-probs are {fault}[/yellow]")

    def _plan_updates(self, data: StepData) -> list[Update]:
        """Split the groups into mini-batches; pack those with a gradient."""
        recipe = self.recipe
        size = recipe.rollout.prompts_per_step // recipe.train.mini_batches
        updates = []
        for first in range(0, recipe.rollout.prompts_per_step, size):
            rewards = data.table.rewards[first : first + size]
            groups = [
                _trainable_group(rollouts, i * rewards.shape[1], recipe.rollout.mask_overlong)
                for i, rollouts in enumerate(data.rollouts[first : first + size])
            ]
            denominator = loss_denominator(groups, rewards, recipe.loss, recipe.rollout.max_new_tokens)
            live = live_groups(groups, rewards, recipe.loss)
            plan = plan_packs(live, recipe.train.token_budget, self.world.size, self.flops)
            batches = [build_batch(pack).to(self.device) for pack in plan.packs[self.world.rank]]
            updates.append(Update(plan, batches, centred(rewards, recipe.loss).to(self.device), denominator))
        return updates

    def _learn(self, updates: list[Update], data: StepData, clock: Clock) -> dict[str, float]:
        """Score the packs where that is needed, then every update of the step, in order, `epochs` times.

        Where completions are from older weights, and no behavior weight corrects for that, the old log-probs are the
        sampler's own: each by the weights that its token was sampled from.
        """
        takes_behavior = data.is_stale and self.recipe.loss.behavior_cap is None
        with clock("score"):
            updates = [self._score(update, i == 0, takes_behavior) for i, update in enumerate(updates)]
            probed = self._probe_mismatch(data.probe)
        collected, norms = [], []
        with clock("train"):
            for epoch in range(self.recipe.train.epochs):
                for i, update in enumerate(updates):
                    stats, norm = self.learner.update(update.batches, partial(self._loss, update=update))
                    if epoch == i == 0 and not takes_behavior:  # by the weights of before: old log-probs from now on
                        pairs = zip(update.batches, stats, strict=True)
                        scored = [dataclasses.replace(batch, old_logprobs=s["logprobs"]) for batch, s in pairs]
                        updates[0] = dataclasses.replace(update, batches=scored)
                    collected.append([{k: v for k, v in s.items() if v.dim() == 0} for s in stats])
                    norms.append(norm)
            metrics = device_metrics(collected, norms, self.learner, self.world)
        if takes_behavior or not self.has_comparable_logprobs:  # compared with themselves, or with renormalised ones
            metrics = {name: value for name, value in metrics.items() if not name.startswith("mismatch/")}
        return metrics | probed

    def _score(self, update: Update, on_policy: bool, takes_behavior: bool) -> Update:
        """Add old and reference log-probs. Old ones are left out where the weights have not moved since the rollout."""
        batches = []
        for batch in update.batches:
            if takes_behavior:
                old = batch.behavior_logprobs
            else:
                old = None if on_policy else self._logprobs(self.policy.model, batch)
            ref = self._logprobs(self.reference, batch) if self.reference else None
            batches.append(dataclasses.replace(batch, old_logprobs=old, ref_logprobs=ref))
        self._free_gathered()
        return dataclasses.replace(update, batches=batches)

    def _probe_mismatch(self, probe: list[list[Rollout]]) -> dict[str, float]:
        """How far the sampler's log-probs are off the trainer's, both by the newest weights: in place of the step's own
        numbers where its completions are from older ones. Waits for the device.
        """
        if not probe:
            return {}
        batch = build_batch([_trainable_group(group, i, False) for i, group in enumerate(probe)]).to(self.device)
        assert batch.behavior_logprobs is not None
        off = (self._logprobs(self.policy.model, batch) - batch.behavior_logprobs).abs()
        self._free_gathered()
        return {"mismatch/mean": float(off.mean()), "mismatch/max": float(off.max())}

    def _free_gathered(self) -> None:
        for model in filter(None, (self.policy.model, self.reference)):
            free_gathered(model)

    @torch.no_grad()
    def _logprobs(self, model: Decoder, batch: PackedBatch) -> Tensor:
        hidden = gather_predictors(model(batch), batch)
        temperature = self.recipe.rollout.temperature
        return linear_logprobs(hidden, model.lm_head_weight, batch.targets, temperature=temperature)[0]

    def _loss(self, batch: PackedBatch, update: Update) -> tuple[Tensor, Stats]:
        return packed_loss(
            self.policy.model,
            batch,
            self.recipe.loss,
            denominator=update.denominator,
            rewards=update.rewards,
            sequence_ids=batch.sequence_ids,
            temperature=self.recipe.rollout.temperature,
        )

    def _evaluates_at(self, step: int) -> bool:
        every = self.recipe.eval.every
        return bool(every) and (step % every == 0 or step == self.recipe.train.steps)

    def _samples(self, data: StepData) -> Iterator[dict[str, Any]]:
        """The first groups of the step, every completion with its rewards."""
        for index, group in enumerate(data.rollouts[:_LOGGED_GROUPS]):
            prompt = self.policy.decode(group[0].prompt_ids)
            for sample, rollout in enumerate(group):
                scores = {name: _number(scores[index, sample]) for name, scores in data.table.scores.items()}
                completion = self.policy.decode(rollout.completion_ids)
                reward = _number(data.table.rewards[index, sample])
                yield {"prompt": prompt, "completion": completion, "reward": reward, "rewards": scores}

    @torch.no_grad()
    def _refresh_reference(self) -> None:
        every = self.recipe.train.ref_refresh_every
        if self.reference and every and self.step % every == 0:
            for name, shard in self.reference.named_parameters():
                shard.copy_(self.learner.params[name])

    def extra_tensors(self) -> dict[str, Tensor]:
        """The reference, where it is not simply the model that the run began with."""
        if self.reference is None or not self.recipe.train.ref_refresh_every:
            return {}
        return {f"reference.{name}": shard for name, shard in self.reference.named_parameters()}

    def extra_state(self) -> dict[str, Any]:
        return {"position": self.position._asdict()}


def _check_token_budget(recipe: Recipe, longest_prompt: int) -> None:
    """A prompt and its longest completion must fit one micro-batch."""
    needed = longest_prompt + recipe.rollout.max_new_tokens - 1
    if needed > recipe.train.token_budget:
        raise RecipeError(
            f"train.token_budget = {recipe.train.token_budget} is below the longest prompt and completion together, "
            f"{longest_prompt} + {recipe.rollout.max_new_tokens} - 1 tokens; raise it to {needed} or more"
        )


def _trainable_group(rollouts: list[Rollout], first_id: int, mask_overlong: bool) -> Group:
    completions = [
        Completion(rollout.completion_ids, first_id + i, rollout.comparable_logprobs)
        for i, rollout in enumerate(rollouts)
        if not (mask_overlong and rollout.finish_reason == "length")
    ]
    return Group(rollouts[0].prompt_ids, completions)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


if __name__ == "__main__":  # a launcher's script that names this file must not end well without a step
    sys.exit("flashgrpo.grpo.train is no command; wanted -m flashgrpo.grpo.cli train RECIPE")
