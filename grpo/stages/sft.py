"""Supervised fine-tuning on prompt and completion: the same packs, attention and head as GRPO; `flashgrpo sft RECIPE`.

Cross-entropy is GRPO's loss on-policy with advantage 1 and token_mean: its gradient is that of the mean log-prob over
the completion's tokens, the prompt's tokens are not trained on, and there is no second loss kernel.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from flashgrpo.grpo.data.problems import load_completions
from flashgrpo.grpo.data.prompts import closed_ids, located, render_problem
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.learn.balance import plan_packs
from flashgrpo.grpo.learn.learner import Stats, packed_loss
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import SftRecipe
from flashgrpo.grpo.recipe.schema import SftDataSection
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.loop import RunLoop, epoch_order
from flashgrpo.grpo.run.policy import Policy, end_token_id, warn_beyond_context
from flashgrpo.grpo.run.progress import Clock, StepBar, peak_memory_mb
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.cost import ModelFlops

_CROSS_ENTROPY = LossConfig.preset("bnpo")


def sft(recipe: SftRecipe, resume: bool = False) -> Path:
    """Run an SFT recipe, or continue it; returns the folder of the final model. Errors as `train`."""
    with (
        open_world(recipe) as world,
        RunFolder(recipe, resume, world) as folder,
    ):
        return SftTrainer(recipe, folder, world).run()


class SftTrainer(RunLoop):
    title = "sft"

    def __init__(self, recipe: SftRecipe, folder: RunFolder, world: World):
        super().__init__(recipe, folder, world)
        self.recipe = recipe
        self.flops = ModelFlops.of(self.policy.model.config)
        self.examples = load_examples(recipe.data, self.policy, recipe.train.token_budget)
        self.steps_per_epoch = -(-len(self.examples) // recipe.train.batch_size)
        self.open_learner(recipe.train.epochs * self.steps_per_epoch)

    def run_step(self, step: int, bar: StepBar) -> tuple[dict[str, float], str]:
        """One optimizer update on batch_size examples; Ctrl-C waits until it is logged."""
        clock = Clock()
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        size = self.recipe.train.batch_size
        order = epoch_order(self.recipe.run.seed, epoch, len(self.examples))
        groups = [self.examples[i] for i in order[place * size : (place + 1) * size]]
        plan = plan_packs(groups, self.recipe.train.token_budget, self.world.size, self.flops)
        batches = [build_batch(pack).to(self.device) for pack in plan.packs[self.world.rank]]
        num_targets = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        lr = self.learner.set_lr(step)
        stats, norm = self.learner.update(batches, functools.partial(self._loss, denominator=float(num_targets)))
        self.step = step
        own = -torch.stack([s["logprobs"].sum() for s in stats]).sum() / num_targets
        taken = self.learner.take_skipped()
        loss = self.world.gather_tensor(own.float()).sum()
        values = torch.stack([loss, norm.float(), *taken.values()]).tolist()
        metrics = dict(zip(["loss", "grad_norm", *taken], values, strict=True))
        rate = sum(group.num_tokens for group in groups) / clock.total_s
        metrics |= {"lr": lr, "epoch": step / self.steps_per_epoch, "tokens_per_s/trained": rate}
        metrics["memory/peak_mb"] = peak_memory_mb(self.device)
        self.folder.log(step, metrics)
        return metrics, f"loss {metrics['loss']:.4f}, {rate:,.0f} tokens/s"

    def _loss(self, batch: PackedBatch, denominator: float) -> tuple[Tensor, Stats]:
        advantages = torch.ones(len(batch.sequence_ids), device=self.device)
        return packed_loss(self.policy.model, batch, _CROSS_ENTROPY, denominator=denominator, advantages=advantages)


def load_examples(data: SftDataSection, policy: Policy, token_budget: int) -> list[Group]:
    """Prompt and completion of every row as a group of one; the end-of-sequence token closes the completion.

    Raises DataError for a row without a prompt or completion, or an example over data.max_tokens or `token_budget`.
    """
    end = end_token_id(policy.path, policy.tokenizer)
    examples = []
    for number, (problem, text) in enumerate(load_completions(data, data.completion_column)):
        with located(problem):
            prompt_ids = render_problem(problem, data, policy.tokenizer)
            completion_ids = closed_ids(text, policy.tokenizer, end)
        length = len(prompt_ids) + len(completion_ids)
        if length > data.max_tokens:
            raise DataError(f"{problem.where} has {length} tokens, data.max_tokens = {data.max_tokens}")
        if length > token_budget:
            raise DataError(
                f"{problem.where} has {length} tokens, train.token_budget = {token_budget}; raise it, or cut the row"
            )
        examples.append(Group(prompt_ids, [Completion(completion_ids, sequence_id=number)]))
    warn_beyond_context(policy, max(group.num_tokens + 1 for group in examples))
    return examples
