"""Reward models: the decoder with a head of one score, trained on pairs or labels; `flashgrpo reward-model RECIPE`.

The loss is -log sigmoid(margin), averaged over the rows of an update. Of a pair (Bradley and Terry 1952; arXiv
2203.02155) the margin is the better completion's score less the worse one's; of a labelled completion it is the score,
negated where the label is bad, which makes it binary cross-entropy. The completions of a pair share one copy of their
prompt in the pack, and are never in different ones.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.grpo.data.problems import load_problems, split_problems
from flashgrpo.grpo.data.prompts import located, render_problem
from flashgrpo.grpo.errors import DataError, nearest
from flashgrpo.grpo.learn.balance import PackPlan, plan_packs
from flashgrpo.grpo.learn.learner import Stats
from flashgrpo.grpo.learn.packing import build_batch
from flashgrpo.grpo.recipe.load import RewardModelRecipe
from flashgrpo.grpo.recipe.schema import DataSection, SourceSection
from flashgrpo.grpo.rewards.models import CARD, Card, scored_group, scored_ids
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.loop import RunLoop, epoch_order
from flashgrpo.grpo.run.policy import Policy, end_token_id, warn_beyond_context
from flashgrpo.grpo.run.progress import Clock, StepBar, console, peak_memory_mb
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.types import Problem
from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.cost import ModelFlops
from flashgrpo.model.sharding import free_gathered

_LABELS = {0: -1.0, 1: 1.0}  # by label; True is 1


def reward_model(recipe: RewardModelRecipe, resume: bool = False) -> Path:
    """Run a reward model's recipe, or continue it; returns the folder of the final model. Errors as `train`."""
    with (
        open_world(recipe) as world,
        RunFolder(recipe, resume, world) as folder,
    ):
        return RewardModelTrainer(recipe, folder, world).run()


@dataclass(frozen=True)
class Row:
    """A pair, or a labelled completion."""

    prompt_ids: list[int]
    texts: list[np.ndarray]  # the better and the worse completion, or the one
    signs: list[float]  # of their scores in the margin, one each


class RewardModelTrainer(RunLoop):
    title = "reward model"

    def __init__(self, recipe: RewardModelRecipe, folder: RunFolder, world: World):
        super().__init__(recipe, folder, world)
        self.recipe = recipe
        self.flops = ModelFlops.of(self.policy.model.config)
        self.rows, self.held_out = load_rows(recipe, self.policy)
        self.steps_per_epoch = -(-len(self.rows) // recipe.train.batch_size)
        self.open_learner(recipe.train.epochs * self.steps_per_epoch)

    def begin(self) -> None:
        """The held-out accuracy before training."""
        if self.held_out and self.step == 0 and not self.folder.has_logged(0, "eval/accuracy"):
            console.print(f"evaluating {len(self.held_out)} rows before the first step", highlight=False)
            self.folder.log_more(0, self._evaluate())

    def run_step(self, step: int, bar: StepBar) -> tuple[dict[str, float], str]:
        """One optimizer update on batch_size rows; Ctrl-C waits until it is logged."""
        clock = Clock()
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        size = self.recipe.train.batch_size
        order = epoch_order(self.recipe.run.seed, epoch, len(self.rows))
        rows = [self.rows[i] for i in order[place * size : (place + 1) * size]]
        plan, batches, signs = self._pack(rows)
        lr = self.learner.set_lr(step)
        stats, norm = self.learner.update(batches, functools.partial(self._loss, signs=signs))
        self.step = step
        scores = self._gather(batches, [s["scores"] for s in stats], signs)
        taken = self.learner.take_skipped()
        values = torch.stack([norm.float(), *taken.values()]).tolist()
        found = row_metrics(scores, signs)
        metrics = {"loss": found["loss"], "train/accuracy": found["accuracy"], "margin/mean": found["margin"]}
        metrics |= {"score/std": found["std"], **dict(zip(["grad_norm", *taken], values, strict=True))}
        num_tokens = sum(group.num_tokens for rank in plan.packs for pack in rank for group in pack)
        rate = num_tokens / clock.total_s
        metrics |= {"lr": lr, "epoch": step / self.steps_per_epoch, "tokens_per_s/trained": rate}
        metrics["memory/peak_mb"] = peak_memory_mb(self.device)
        every = self.settings.checkpoint_every
        if self.held_out and (step == self.total_steps or (every and step % every == 0)):
            bar.phase("evaluate")
            metrics |= self._evaluate()
        self.folder.log(step, metrics)
        accuracy = f"accuracy {metrics['train/accuracy']:.3f}"
        return metrics, f"loss {metrics['loss']:.4f}, {accuracy}, {rate:,.0f} tokens/s"

    def model_files(self) -> dict[str, dict[str, Any]]:
        """reward_model.json."""
        data, train = self.recipe.data, self.recipe.train
        rendering = data.template, data.template_options, data.system_prompt
        return {CARD: dataclasses.asdict(Card(train.scores, train.objective, *rendering))}

    def _pack(self, rows: Sequence[Row]) -> tuple[PackPlan, list[PackedBatch], Tensor]:
        """The plan of an update, this rank's part of it, and the signs [num_rows, texts a row] of all."""
        groups = [scored_group(row.prompt_ids, row.texts, i * len(row.texts)) for i, row in enumerate(rows)]
        plan = plan_packs(groups, self.recipe.train.token_budget, self.world.size, self.flops, keep_whole=True)
        batches = [build_batch(pack).to(self.device) for pack in plan.packs[self.world.rank]]
        return plan, batches, torch.tensor([row.signs for row in rows], device=self.device)

    def _loss(self, batch: PackedBatch, signs: Tensor) -> tuple[Tensor, Stats]:
        """The pack's part of the mean over all rows of the update."""
        scores = self.policy.model.scores(batch)
        margins = (scores * signs.flatten()[batch.sequence_ids]).view(-1, signs.shape[1]).sum(1)
        return F.softplus(-margins).sum() / len(signs), {"scores": scores.detach()}

    def _gather(self, batches: list[PackedBatch], scores: list[Tensor], signs: Tensor) -> np.ndarray:
        """Scores of all ranks, [num_rows, texts a row] float64."""
        own = torch.zeros(signs.numel(), device=self.device)
        for batch, values in zip(batches, scores, strict=True):
            own[batch.sequence_ids] = values.float()
        return self.world.gather_tensor(own).sum(0).view_as(signs).double().cpu().numpy()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows."""
        _, batches, signs = self._pack(self.held_out)
        scores = [self.policy.model.scores(batch) for batch in batches]
        free_gathered(self.policy.model)
        found = row_metrics(self._gather(batches, scores, signs), signs)
        return {f"eval/{name}": value for name, value in found.items()}


def row_metrics(scores: np.ndarray, signs: Tensor) -> dict[str, float]:
    """Means over rows of loss, accuracy (a tie is half right) and margin; the standard deviation of all scores."""
    margins = (scores * signs.double().cpu().numpy()).sum(1)
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "accuracy": float((0.5 + 0.5 * np.sign(margins)).mean()),
        "margin": float(margins.mean()),
        "std": float(scores.std()),
    }


def load_rows(recipe: RewardModelRecipe, policy: Policy) -> tuple[list[Row], list[Row]]:
    """Training rows in the order of the data, and data.held_out other ones with other prompts.

    Raises DataError for a missing column, what is no text or label, or a row over data.max_tokens or the token budget.
    """
    data, train = recipe.data, recipe.train
    is_pair = train.objective == "pairwise"
    columns = [data.chosen_column, data.rejected_column] if is_pair else [data.completion_column]
    shared = {f.name: getattr(data, f.name) for f in dataclasses.fields(SourceSection)}
    problems, _ = load_problems(DataSection(**shared, answer_column=columns[0], held_out=0), seed=0)
    end = end_token_id(policy.path, policy.tokenizer)

    def row(problem: Problem) -> Row:
        where = problem.where
        for name in columns if is_pair else [*columns, data.label_column]:
            if name not in problem.columns:
                raise DataError(f"{where}: no column {name!r}{nearest(name, problem.columns, with_all=True)}")
        for name in columns:
            if not isinstance(text := problem.columns[name], str):
                raise DataError(f"{where}: column {name!r} holds {type(text).__name__}, wanted text")
        with located(problem):
            prompt_ids = render_problem(problem, data, policy.tokenizer)
            texts = [scored_ids(problem.columns[name], train.scores, policy.tokenizer, end) for name in columns]
        length = len(prompt_ids) + max(map(len, texts))
        if length > data.max_tokens:
            raise DataError(f"{where} has {length} tokens, data.max_tokens = {data.max_tokens}")
        if (packed := len(prompt_ids) + sum(map(len, texts))) > train.token_budget:
            raise DataError(f"{where} has {packed} tokens, train.token_budget = {train.token_budget}; raise it")
        return Row(prompt_ids, texts, [1.0, -1.0] if is_pair else [_sign(problem.columns[data.label_column], where)])

    def _sign(label: Any, where: str) -> float:
        if not isinstance(label, int) or label not in _LABELS:
            raise DataError(f"{where}: column {data.label_column!r} holds {label!r}, wanted 0, 1, true or false")
        return _LABELS[label]

    rows = {id(problem): row(problem) for problem in problems}
    warn_beyond_context(policy, max(len(r.prompt_ids) + max(map(len, r.texts)) for r in rows.values()))
    training, held_out = (
        [rows[id(p)] for p in part] for part in split_problems(problems, data.held_out, recipe.run.seed)
    )
    if not is_pair and len({row.signs[0] for row in training}) == 1:
        raise DataError(f"{data.path}: all labels of column {data.label_column!r} are the same; wanted both kinds")
    return training, held_out
