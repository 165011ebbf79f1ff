"""Supervised training: on prompt and completion here, `flashgrpo sft RECIPE`, and by the same loop of reward models.

It is GRPO's packs, attention and head. Cross-entropy is GRPO's loss on-policy with advantage 1 and
token_mean: its gradient is that of the mean log-prob over the completion's tokens, the prompt's
tokens are not trained on, and there is no second loss kernel.
"""

import abc
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from flashgrpo.grpo.data.mixture import epoch_order
from flashgrpo.grpo.data.problems import load_completions
from flashgrpo.grpo.data.prompts import closed_ids, located, render_prompt
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.learn.balance import plan_packs
from flashgrpo.grpo.learn.learner import Stats, packed_loss
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import RewardModelRecipe, SftRecipe
from flashgrpo.grpo.run.costs import TrainCosts
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.loop import RunLoop, as_begun
from flashgrpo.grpo.run.policy import Policy, end_token_id, warn_beyond_context
from flashgrpo.grpo.run.progress import Clock, StepBar, peak_memory_mb, say
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.cost import ModelFlops
from flashgrpo.model.sharding import free_gathered
from flashgrpo.model.waits import word_for

_CROSS_ENTROPY = LossConfig.preset("bnpo")

Row = TypeVar("Row")


class SupervisedTrainer(RunLoop, Generic[Row]):
    """Epochs over rows; a step is one update on batch_size of them. `held_out` rows are scored at every checkpoint.

    How rows become groups, and what their loss is, a subclass says.
    """

    # Whether a pack must hold all completions of a group, which the loss compares.
    keeps_groups_whole = False
    # What a training step's row calls a name of `_measure`, where that is not the name.
    logged_as: ClassVar[dict[str, str]] = {}

    def __init__(self, recipe: Any, folder: RunFolder, world: World):
        super().__init__(recipe, folder, world)
        self.recipe = recipe
        config = self.policy.model.config
        self.flops = ModelFlops.of(config)
        self.rows, self.held_out = self._load()
        groups = self._groups([*self.rows, *self.held_out])
        # With the last token of each text, which is not fed: as `check_length` counts.
        longest = max(group.num_tokens + len(group.completions) for group in groups)
        costs = TrainCosts(recipe, config, self.machine, world.size)
        self.recipe = self.settle_budget(recipe, costs, longest)
        self.steps_per_epoch = -(-len(self.rows) // recipe.train.batch_size)
        self.open_learner(recipe.train.epochs * self.steps_per_epoch)

    @abc.abstractmethod
    def _load(self) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and held-out ones."""

    @abc.abstractmethod
    def _groups(self, rows: Sequence[Row]) -> list[Group]:
        """Prompt and completions of each row."""

    @abc.abstractmethod
    def _shared(self, rows: Sequence[Row]) -> Any:
        """What every pack's loss needs to know of all rows of its update."""

    @abc.abstractmethod
    def _loss(self, batch: PackedBatch, shared: Any) -> tuple[Tensor, Stats]:
        """A pack's part of the update's loss."""

    @abc.abstractmethod
    def _measure(self, batches: list[PackedBatch], stats: list[Stats], shared: Any) -> dict[str, float]:
        """`loss` and what else is known of the rows, over all ranks."""

    def begin(self) -> None:
        """The held-out score before training."""
        if self.held_out and self.step == 0 and not self.folder.has_logged(0, "eval/loss"):
            say(f"evaluating {len(self.held_out)} rows before the first step")
            self.folder.log_more(0, self._evaluate())

    def run_step(self, step: int, bar: StepBar) -> tuple[dict[str, float], str]:
        """One optimizer update on batch_size rows; Ctrl-C waits until it is logged."""
        clock = Clock()
        # Each epoch has an order of its own, known from its number alone: a resume draws the same rows.
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        size = self.recipe.train.batch_size
        order = epoch_order(self.recipe.run.seed, epoch, len(self.rows))
        rows = [self.rows[i] for i in order[place * size : (place + 1) * size]]
        groups, shared = self._groups(rows), self._shared(rows)

        batches = self._pack(groups)
        lr = self.learner.set_lr(step)
        stats, norm = self.learner.update(batches, functools.partial(self._loss, shared=shared))
        self.step = step  # the weights have moved: a stop from here on is one after this step

        # Here the host waits for the device.
        found = self._measure(batches, stats, shared)
        metrics = {self.logged_as.get(name, name): value for name, value in found.items()}
        device_side = {"grad_norm": norm.float(), **self.learner.take_skipped()}
        values = torch.stack([*device_side.values()]).tolist()
        metrics |= dict(zip(device_side, values, strict=True))
        rate = sum(group.num_tokens for group in groups) / clock.total_s
        metrics |= {"lr": lr, "epoch": step / self.steps_per_epoch, "tokens_per_s/trained": rate}
        metrics["memory/peak_mb"] = peak_memory_mb(self.device)
        every = self.settings.checkpoint_every
        if self.held_out and (step == self.total_steps or (every and step % every == 0)):
            bar.phase("evaluate")
            metrics |= self._evaluate()
        self.folder.log(step, metrics)

        accuracy = f"accuracy {found['accuracy']:.3f}, " if "accuracy" in found else ""
        return metrics, f"loss {metrics['loss']:.4f}, {accuracy}{rate:,.0f} tokens/s"

    def _pack(self, groups: list[Group]) -> list[PackedBatch]:
        """This rank's packs of an update."""
        whole = self.keeps_groups_whole
        plan = plan_packs(groups, self.token_budget, self.world.size, self.flops, keep_whole=whole)
        return [build_batch(pack).to(self.device) for pack in plan.packs[self.world.rank]]

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows."""
        batches, shared = self._pack(self._groups(self.held_out)), self._shared(self.held_out)
        stats = [self._loss(batch, shared)[1] for batch in batches]
        free_gathered(self.policy.model)  # no backward pass will give the last block's weights back
        return {f"eval/{name}": value for name, value in self._measure(batches, stats, shared).items()}


def supervise(trainer: type[SupervisedTrainer], recipe: SftRecipe | RewardModelRecipe, resume: bool) -> Path:
    """Run a recipe, or continue it; returns the folder of the final model. Errors as `train`."""
    with open_world(recipe) as world:
        recipe = as_begun(recipe, world) if resume else recipe
        with RunFolder(recipe, resume, world) as folder:
            return trainer(recipe, folder, world).run()


def sft(recipe: SftRecipe, resume: bool = False) -> Path:
    """Run an SFT recipe, or continue it; returns the folder of the final model. Errors as `train`."""
    return supervise(SftTrainer, recipe, resume)


class SftTrainer(SupervisedTrainer[Group]):
    """A row is a group of one completion."""

    title = "sft"

    def _load(self) -> tuple[list[Group], list[Group]]:
        return load_examples(self.recipe, self.policy), []

    def _groups(self, rows: Sequence[Group]) -> list[Group]:
        return [*rows]

    def _shared(self, rows: Sequence[Group]) -> float:
        """The number of targets: a token weighs the same in whichever pack it lies."""
        return float(sum(len(row.completions[0].token_ids) for row in rows))

    def _loss(self, batch: PackedBatch, shared: float) -> tuple[Tensor, Stats]:
        ones = torch.ones(len(batch.sequence_ids), device=self.device)
        return packed_loss(self.policy.model, batch, _CROSS_ENTROPY, denominator=shared, advantages=ones)

    def _measure(self, batches: list[PackedBatch], stats: list[Stats], shared: float) -> dict[str, float]:
        own = -torch.stack([s["logprobs"].sum() for s in stats]).sum() / shared
        return {"loss": self.world.gather_tensor(own.float()).sum().item()}


@word_for("tokenizing the examples")
def load_examples(recipe: SftRecipe, policy: Policy) -> list[Group]:
    """Prompt and completion of every row; the end-of-sequence token closes the completion.

    Raises DataError for a row without a prompt or completion, or one that is too long.
    """
    end = end_token_id(policy.path, policy.tokenizer)
    examples, longest = [], 0
    for problem, text in load_completions(recipe.data, recipe.data.completion_column):
        with located(problem):
            prompt_ids = render_prompt(problem.prompt, recipe.data, policy.tokenizer)
            ids = closed_ids(text, policy.tokenizer, end)
        longest = max(longest, check_length(problem.where, len(prompt_ids), [len(ids)], recipe))
        examples.append(Group(prompt_ids, [Completion(ids, sequence_id=len(examples))]))
    warn_beyond_context(policy, longest)
    return examples


def check_length(where: str, prompt: int, texts: Sequence[int], recipe: Any) -> int:
    """The tokens of a row's longest sequence, from those of its prompt and of each of its texts.

    Raises DataError for a row over data.max_tokens, or one that a pack has no room for.
    """
    length, packed = prompt + max(texts), prompt + sum(texts)
    if length > recipe.data.max_tokens:
        raise DataError(f"{where} has {length} tokens, data.max_tokens = {recipe.data.max_tokens}")
    budget = recipe.train.token_budget
    if budget != "auto" and packed > budget:
        raise DataError(f"{where} has {packed} tokens, train.token_budget = {budget}; raise it, or cut the row")
    return length
