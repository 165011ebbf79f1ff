"""GRPO; `flashgrpo train RECIPE`, or on many GPUs `torchrun --nproc_per_node 8 -m flashgrpo.grpo.cli train RECIPE`.

A step, as `Trainer.run_step` takes it:

    sync       The generator gets the weights that the step before has left.
    generate   Each rank samples its share of the step's prompts, a group of completions for each.
    reward     A group is scored while others are still sampled; then all ranks have all groups.
    pack       Of a mini-batch, the groups that have a gradient are laid out in packs of at most train.token_budget
               tokens, a prompt once for all of its completions, and spread over the ranks.
    score      Log-probs of the packs by the weights of before the step, by the reference and by a teacher, where the
               loss asks.
    train      An optimizer update for each mini-batch; the loss sees rewards, and makes advantages of them itself, or
               those of tokens, which a teacher gives.
    log        A row of numbers, and some completions.

The host waits for the device where a phase ends, so that each has its own time (`Clock`), and within training once a
chunk of logits (kernels/linear_grpo.py), besides what the generator does.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashgrpo.grpo.data.mixture import Mixture, Position
from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_prompts
from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.learn.balance import PackPlan, plan_packs
from flashgrpo.grpo.learn.learner import Stats, distillation_advantages, packed_loss
from flashgrpo.grpo.learn.packing import Group, build_batch, centred, live_groups, loss_denominator
from flashgrpo.grpo.metrics import device_metrics, one_line, rollout_metrics, speed_metrics
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.rewards.pool import RewardPool, open_reward_pool
from flashgrpo.grpo.rewards.rules import check_names
from flashgrpo.grpo.rollout.generator import open_generator, settle_generator
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.costs import Costs, Lengths, check_budget
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.ledger import begun_with
from flashgrpo.grpo.run.loop import RunLoop, as_begun
from flashgrpo.grpo.run.policy import check_teacher, open_sharded_model, open_teacher
from flashgrpo.grpo.run.progress import Clock, StepBar, say
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.types import Problem, Prompt, Rollout, StepData
from flashgrpo.kernels.linear_grpo import linear_logprobs
from flashgrpo.model.batch import PackedBatch, gather_predictors
from flashgrpo.model.checkpoint import read_config
from flashgrpo.model.cost import ModelFlops
from flashgrpo.model.decoder import Decoder
from flashgrpo.model.sharding import free_gathered

_LOGGED_GROUPS = 2
_STEPS_WITHOUT_SIGNAL = 3


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe, or continue it; returns the folder of the final model.

    Raises RecipeError, DataError, RewardError, CheckpointError and RunInputError before the first step, RunError and
    RewardFailure later. Ctrl-C saves a checkpoint and raises KeyboardInterrupt.
    """
    check_names(recipe)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(open_world(recipe))
        recipe = settle_generator(recipe, world, resume)
        recipe = as_begun(recipe, world) if resume else recipe
        folder = stack.enter_context(RunFolder(recipe, resume, world))
        read_config(recipe.model.path)  # a wrong path is found before the data set is fetched
        if recipe.teacher.path:
            check_teacher(recipe.teacher, recipe.model.path)
        problems, held_out = load_problems(recipe.data, recipe.run.seed)
        others, examples = {}, {}
        for name, source in recipe.sources.items():
            others[name], _ = load_problems(source, recipe.run.seed)
            examples[name] = others[name][0]
        pool = stack.enter_context(open_reward_pool(recipe, problems[0], examples))
        return Trainer(recipe, folder, world, pool, problems, held_out, others).run()


@dataclass
class Update:
    """One mini-batch: an optimizer update."""

    plan: PackPlan
    batches: list[PackedBatch]  # this rank's
    rewards: Tensor  # [num_groups, group_size] fp32, less their group's mean
    denominator: float


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
        self._steps_without_signal = 0  # in a row, up to now
        self.position = self._stored_position(recipe)
        prompts = {"data": render_prompts(problems, self.policy, recipe.data)}
        for name, source in recipe.sources.items():
            prompts[name] = render_prompts(others[name], self.policy, source, name)
        tests = render_prompts(held_out[: recipe.eval.problems], self.policy, recipe.data)
        mixture = Mixture(recipe, prompts)
        sizes = [len(prompt.token_ids) for prompt in chain(tests, *prompts.values())]
        longest_prompt, longest = max(sizes), recipe.rollout.max_new_tokens
        config = self.policy.model.config
        lengths = Lengths.assumed(recipe, sum(sizes) / len(sizes))
        costs = Costs(recipe, config, self.machine, world.size, lengths, foresees=False)
        recipe = self.recipe = self.settle_budget(recipe, costs, longest_prompt + longest - 1)
        check_budget(self.token_budget, longest_prompt, longest)
        self.flops = ModelFlops.of(config)
        # Its weights are the model's that the run begins with; a checkpoint has others only where they are refreshed.
        self.reference = None
        if recipe.loss.kl_coef:
            stored = self.compute_dtype
            self.reference = open_sharded_model(recipe.model, world.device, world.mesh, stored=stored)
            self.reference.requires_grad_(False)
        self.teacher = None
        if recipe.teacher.path:
            opened: list[Decoder] = []
            place = world.device, world.mesh
            world.everywhere(lambda: opened.append(open_teacher(recipe.teacher, recipe.model, *place)))
            (self.teacher,) = opened
        self.open_learner(recipe.train.steps)
        if recipe.reward_models:
            self._open_reward_models(pool, mixture.prompts)
        generator = open_generator(recipe, self.policy, world, longest_prompt)
        source = DecoderSource(self.learner.params, config, self.compute_dtype)
        tells_kept_sets = recipe.rollout.generator == "native" or world.device.type == "cuda"
        self.has_comparable_logprobs = tells_kept_sets or not recipe.rollout.is_truncated
        if not self.has_comparable_logprobs:
            say(
                "vLLM's CPU build gives log-probs of what top_p and top_k kept, and does not tell what that "
                "was: the trainer's are of the whole vocabulary, and whether the two fit cannot be checked "
                "(train.mismatch_alarm); rollout.generator = native tells it",
                style="yellow",
            )
        self.sampler = Sampler(recipe, world, self.policy, pool, generator, source, mixture, tests)
        self.ends.callback(self.sampler.close)

    def _stored_position(self, recipe: Recipe) -> Position:
        """Raises RunInputError where steps have been begun whose prompts would be others by this recipe."""
        position = self.folder.stored("position", Position, Position({}, {}))
        wanted = recipe.rollout.prompts_per_step
        begun = self.world.on_main(lambda: begun_with(recipe, "rollout", "prompts_per_step"))
        if position.begun and begun != wanted:
            raise RunInputError(
                f"rollout.prompts_per_step is {wanted}, and the run in {self.folder.path} has begun steps of {begun} "
                "ahead; keep it, or choose another run.output"
            )
        return position

    def _open_reward_models(self, pool: RewardPool, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        """Give the pool its scorers; each is shown the problems of all sources that it scores."""
        from flashgrpo.grpo.rewards.models import open_preferences

        questions: dict[str, list[Problem]] = {name: [] for name in self.recipe.reward_models}
        for source, weights in self.recipe.reward_weights.items():
            for name in questions.keys() & weights.keys():
                questions[name] += [prompt.problem for prompt in prompts[source]]
        longest = self.recipe.rollout.max_new_tokens
        pool.scorers.update(open_preferences(self.recipe.reward_models, self.policy, self.world, questions, longest))

    def begin(self) -> None:
        """The evaluation before training, or one that a stop has cut short."""
        if self._evaluates_at(self.step) and not self.folder.has_logged(self.step, "eval/pass@1"):
            when = f"after step {self.step}" if self.step else "before the first step"
            size = f"{len(self.sampler.held_out)} x {self.recipe.eval.samples}"
            say(f"evaluating {size} {when}")
            self._evaluate()

    def run_step(self, step: int, bar: StepBar) -> tuple[dict[str, float], str]:
        """Take a step, as the head of this file tells it. Ctrl-C waits from the first update to the last."""
        clock, sampler = Clock(), self.sampler
        sampler.sync_seconds.clear()

        bar.phase("generate")
        sampler.sync(step - 1)
        position = sampler.start_ahead(step, self.position)
        data, position = sampler.rollout(step, position, clock)
        probe = sampler.probe(step) if data.is_stale else []
        sampler.generator.free_weights()

        bar.phase("train")
        # Where nothing corrects for older weights, the old log-probs of a token are those that it was sampled by.
        takes_behavior = data.is_stale and self.recipe.loss.behavior_cap is None
        with clock("pack"):
            updates = self._pack(data)
        with clock("score"):
            self._score(updates, takes_behavior)
            probed = self._mismatch(probe)
        with clock("train"):
            learned = {"lr": self.learner.set_lr(step)} | self._update(updates)
        self.step, self.position = step, position
        self._refresh_reference()

        if takes_behavior or not self.has_comparable_logprobs:
            # The mismatch would be of the sampler's numbers with themselves, or with those of other tokens.
            learned = {name: value for name, value in learned.items() if not name.startswith("mismatch/")}
        metrics = self._log(data, updates, learned | probed, clock)
        if self._evaluates_at(step):
            bar.phase("evaluate")
            metrics |= self._evaluate()
        return metrics, one_line(metrics)

    def _pack(self, data: StepData) -> list[Update]:
        """Split the groups into mini-batches; pack those with a gradient."""
        recipe = self.recipe
        bounds = recipe.rollout.keep_mean_reward
        size = recipe.rollout.prompts_per_step // recipe.train.mini_batches
        updates = []
        for first in range(0, recipe.rollout.prompts_per_step, size):
            part, rewards = data.groups[first : first + size], data.rewards[first : first + size]
            groups = []
            for scored in part:
                is_trained = scored.is_trained(recipe.rollout.mask_overlong)
                groups.append(Group.of(scored.rollouts, len(groups) * rewards.shape[1], is_trained))
            denominator = loss_denominator(groups, rewards, recipe.loss, recipe.rollout.max_new_tokens)
            # Groups beyond the bounds stay out, as those of equal rewards, but that a teacher has a gradient for these.
            is_kept = [scored.is_kept(bounds) for scored in part]
            live = [*compress(groups, is_kept)]
            live = live if self.teacher else live_groups(live, rewards[is_kept], recipe.loss)
            plan = plan_packs(live, self.token_budget, self.world.size, self.flops)
            batches = [build_batch(pack).to(self.device) for pack in plan.packs[self.world.rank]]
            updates.append(Update(plan, batches, centred(rewards, recipe.loss).to(self.device), denominator))
        return updates

    def _score(self, updates: list[Update], takes_behavior: bool) -> None:
        """Add old, reference and teacher's log-probs to the packs.

        The first update trains by the very weights that the old log-probs are of, and gives them itself (`_update`),
        but where its advantages are made of them.
        """
        for number, update in enumerate(updates):
            for i, batch in enumerate(update.batches):
                old = batch.behavior_logprobs if takes_behavior else None
                if (number or self.teacher) and not takes_behavior:
                    old = self._logprobs(self.policy.model, batch)
                ref = self._logprobs(self.reference, batch) if self.reference else None
                teacher = self._logprobs(self.teacher, batch) if self.teacher else None
                found = {"old_logprobs": old, "ref_logprobs": ref, "teacher_logprobs": teacher}
                update.batches[i] = dataclasses.replace(batch, **found)
            self._free_gathered()

    def _update(self, updates: list[Update]) -> dict[str, float]:
        """Every update of the step in order, `epochs` times."""
        collected: list[Stats] = []
        norms = []
        for _ in range(self.recipe.train.epochs):
            for update in updates:
                stats, norm = self.learner.update(update.batches, partial(self._loss, update=update))
                norms.append(norm)
                for i, (batch, found) in enumerate(zip(update.batches, stats, strict=True)):
                    if batch.old_logprobs is None:  # for the next epoch
                        update.batches[i] = dataclasses.replace(batch, old_logprobs=found["logprobs"])
                    # What is kept per token would be gigabytes by the end of the step.
                    collected.append({k: v for k, v in found.items() if v.dim() == 0})
        return device_metrics(collected, norms, self.learner, self.world)

    def _loss(self, batch: PackedBatch, update: Update) -> tuple[Tensor, Stats]:
        recipe = self.recipe
        worth, taught = {"rewards": update.rewards, "sequence_ids": batch.sequence_ids}, {}
        if self.teacher:
            advantages, kl = distillation_advantages(batch, update.rewards, recipe.loss, recipe.teacher.coef)
            worth, taught = {"token_advantages": advantages}, {"teacher_kl": kl}
        loss, stats = packed_loss(
            self.policy.model,
            batch,
            recipe.loss,
            denominator=update.denominator,
            temperature=recipe.rollout.temperature,
            **worth,
        )
        return loss, stats | taught

    @torch.no_grad()
    def _logprobs(self, model: Decoder, batch: PackedBatch) -> Tensor:
        """Of the pack's targets, on the policy's device, wherever the model is."""
        device = model.lm_head_weight.device
        batch = batch if device == self.device else batch.to(device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # where Triton launches
            hidden = gather_predictors(model(batch), batch)
            options = {"temperature": self.recipe.rollout.temperature, "kept": batch.kept, "entropy": False}
            logprobs, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets, **options)
        return logprobs.to(self.device)

    def _mismatch(self, probe: list[list[Rollout]]) -> dict[str, float]:
        """How far the sampler's log-probs are off the trainer's, both by the newest weights: in place of the step's own
        numbers where its completions are from older ones. Waits for the device.
        """
        if not probe:
            return {}
        batch = build_batch([Group.of(rollouts) for rollouts in probe]).to(self.device)
        assert batch.behavior_logprobs is not None
        off = (self._logprobs(self.policy.model, batch) - batch.behavior_logprobs).abs()
        self._free_gathered()
        return {"mismatch/mean": float(off.mean()), "mismatch/max": float(off.max())}

    def _free_gathered(self) -> None:
        for model in filter(None, (self.policy.model, self.reference, self.teacher)):
            free_gathered(model)

    @torch.no_grad()
    def _refresh_reference(self) -> None:
        every = self.recipe.train.ref_refresh_every
        if self.reference and every and self.step % every == 0:
            for name, shard in self.reference.named_parameters():
                shard.copy_(self.learner.params[name])

    def _evaluates_at(self, step: int) -> bool:
        every = self.recipe.eval.every
        return bool(every) and (step % every == 0 or step == self.recipe.train.steps)

    def _evaluate(self) -> dict[str, float]:
        """Scores on the held-out problems, added to the row of the step, which stands where a stop cuts this short."""
        scores = self.sampler.evaluate(self.step)
        self.folder.log_more(self.step, scores | self.sampler.sync_metrics())
        return scores

    def _log(self, data: StepData, updates: list[Update], learned: dict[str, float], clock: Clock) -> dict[str, float]:
        """Write the step's numbers, which are returned, and its first groups; warn of what looks wrong in them."""
        recipe, sampler = self.recipe, self.sampler
        sources = [*sampler.mixture.prompts] if recipe.sources else []
        metrics = learned | rollout_metrics(data, recipe.loss, sampler.pool.functions, sources)
        if bounds := recipe.rollout.keep_mean_reward:
            metrics["groups/filtered"] = float(np.mean([not group.is_kept(bounds) for group in data.groups]))
        if self.teacher:
            metrics["groups/dead"] = 0.0  # it teaches those of equal rewards, too
        plans = [update.plan for update in updates] * recipe.train.epochs
        metrics |= speed_metrics(data, clock, plans, self.world) | sampler.sync_metrics()
        self.folder.log_samples(self.step, self._samples(data))
        self.folder.log(self.step, metrics)
        self._warn(data, metrics)
        return metrics

    def _samples(self, data: StepData) -> Iterator[dict[str, Any]]:
        """The first groups of the step, every completion with its rewards."""
        for group in data.groups[:_LOGGED_GROUPS]:
            prompt = self.policy.decode(group.rollouts[0].prompt_ids)
            for sample, rollout in enumerate(group.rollouts):
                scores: dict[str, float | None] = dict.fromkeys(self.sampler.pool.functions)
                for name, values in group.scores.by_function.items():
                    scores[name] = _number(values[sample])
                completion = self.policy.decode(rollout.completion_ids)
                reward = _number(float(group.scores.rewards[sample]))
                yield {"prompt": prompt, "completion": completion, "reward": reward, "rewards": scores}

    def _warn(self, data: StepData, metrics: dict[str, float]) -> None:
        """The alarms: the sampler's log-probs are not the trainer's; steps in a row gave nothing to learn from."""
        rollouts = data.rollouts
        broken = sum(not np.isfinite(rollout.behavior_logprobs).all() for rollout in rollouts)
        off, alarm = metrics.get("mismatch/mean", 0.0), self.recipe.train.mismatch_alarm
        fault = ""
        if broken:
            fault = f"not finite in {broken} of {len(rollouts)} completions"
        elif not off <= alarm:  # NaN, too
            fault = f"{off:.3g} off the trainer's on average (train.mismatch_alarm = {alarm})"
        if fault:
            # On GPUs vLLM samples by code that its CPU build, which is tested, does not have (docs/vllm.md); its other
            # code there tells no kept sets.
            rollout, on_gpu = self.recipe.rollout, self.device.type == "cuda"
            has_other = on_gpu and rollout.generator.startswith("vllm") and not rollout.is_truncated
            hint = "; does VLLM_USE_V2_MODEL_RUNNER=0 mend it?" if has_other and self.step == 1 else ""
            say(f"step {self.step}: the sampler's log-probs are {fault}{hint}", style="yellow")

        has_signal = metrics["grad_norm"] != 0 and metrics["groups/dead"] < 1
        self._steps_without_signal = 0 if has_signal else self._steps_without_signal + 1
        if self._steps_without_signal == _STEPS_WITHOUT_SIGNAL:
            means = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("reward/"))
            say(
                f"step {self.step}: {_STEPS_WITHOUT_SIGNAL} steps in a row had nothing to learn from: in each "
                f"group all rewards are equal or missing, their mean is outside of rollout.keep_mean_reward, or all "
                f"completions are masked ({means}). Look at samples.jsonl: are problems all too hard or too easy, is "
                "the reward blind, is rollout.max_new_tokens too low?",
                style="yellow",
            )

    def extra_tensors(self) -> dict[str, Tensor]:
        """The reference, where it is not simply the model that the run began with."""
        if self.reference is None or not self.recipe.train.ref_refresh_every:
            return {}
        return {f"reference.{name}": shard for name, shard in self.reference.named_parameters()}

    def extra_state(self) -> dict[str, Any]:
        return {"position": self.position._asdict()}


def _number(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else value


if __name__ == "__main__":  # a launcher's script that names this file must not end well without a step
    sys.exit("flashgrpo.grpo.train is no command; wanted -m flashgrpo.grpo.cli train RECIPE")
