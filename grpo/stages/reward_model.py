"""Reward models: the decoder with a head of one score, trained on pairs or labels; `flashgrpo reward-model RECIPE`.

The loss is -log sigmoid(margin), averaged over the rows of an update. Of a pair (Bradley and Terry
1952; arXiv 2203.02155) the margin is the better completion's score less the worse one's; of a
labelled completion it is the score, negated where the label is bad, which makes it binary
cross-entropy. The completions of a pair share one copy of their prompt in the pack, and are never
in different ones.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.grpo.data.problems import completion_in, read_rows, split_problems, to_problem, value_in
from flashgrpo.grpo.data.prompts import located, render_prompt
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.learn.learner import Stats
from flashgrpo.grpo.learn.packing import Group
from flashgrpo.grpo.recipe.load import RewardModelRecipe
from flashgrpo.grpo.rewards.models import CARD, Card, scored_group, scored_ids
from flashgrpo.grpo.run.policy import Policy, end_token_id, warn_beyond_context
from flashgrpo.grpo.stages.sft import SupervisedTrainer, check_length, supervise
from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.waits import word_for


def reward_model(recipe: RewardModelRecipe, resume: bool = False) -> Path:
    """Run a reward model's recipe, or continue it; returns the folder of the final model. Errors as `train`."""
    return supervise(RewardModelTrainer, recipe, resume)


@dataclass(frozen=True)
class Row:
    """A pair, or a labelled completion."""

    prompt_ids: list[int]
    texts: list[np.ndarray]  # the better and the worse completion, or the one
    signs: list[float]  # of their scores in the margin, one each


class RewardModelTrainer(SupervisedTrainer[Row]):
    title = "reward model"
    keeps_groups_whole = True
    logged_as: ClassVar[dict[str, str]] = {"accuracy": "train/accuracy", "margin": "margin/mean", "std": "score/std"}

    def model_files(self) -> dict[str, dict[str, Any]]:
        """reward_model.json."""
        data, train = self.recipe.data, self.recipe.train
        rendering = data.template, data.template_options, data.system_prompt
        return {CARD: dataclasses.asdict(Card(train.scores, train.objective, *rendering))}

    def _load(self) -> tuple[list[Row], list[Row]]:
        return load_rows(self.recipe, self.policy)

    def _groups(self, rows: Sequence[Row]) -> list[Group]:
        return [scored_group(r.prompt_ids, r.texts, i * len(r.texts)) for i, r in enumerate(rows)]

    def _shared(self, rows: Sequence[Row]) -> Tensor:  # [num_rows, texts a row]
        """The signs of all scores, which `sequence_ids` count through."""
        return torch.tensor([row.signs for row in rows], device=self.device)

    def _loss(self, batch: PackedBatch, shared: Tensor) -> tuple[Tensor, Stats]:
        scores = self.policy.model.scores(batch)
        # A pair is never split, so that its scores stand side by side.
        margins = (scores * shared.flatten()[batch.sequence_ids]).view(-1, shared.shape[1]).sum(1)
        return F.softplus(-margins).sum() / len(shared), {"scores": scores.detach()}

    def _measure(self, batches: list[PackedBatch], stats: list[Stats], shared: Tensor) -> dict[str, float]:
        """Means over rows of loss, accuracy (a tie is half right) and margin; the deviation of all scores."""
        own = torch.zeros(shared.numel(), device=self.device)
        for batch, found in zip(batches, stats, strict=True):
            own[batch.sequence_ids] = found["scores"].float()
        # Each score is one rank's, and 0 on the others.
        scores = self.world.gather_tensor(own).sum(0).view_as(shared).double().cpu().numpy()
        margins = (scores * shared.double().cpu().numpy()).sum(1)
        return {
            "loss": float(np.logaddexp(0, -margins).mean()),
            "accuracy": float((0.5 + 0.5 * np.sign(margins)).mean()),
            "margin": float(margins.mean()),
            "std": float(scores.std()),
        }


@word_for("tokenizing the examples")
def load_rows(recipe: RewardModelRecipe, policy: Policy) -> tuple[list[Row], list[Row]]:
    """Training rows in the order of the data, and data.held_out other ones with other prompts.

    Raises DataError for a missing column, what is no text or label, or a row over data.max_tokens or the token budget.
    """
    data, is_pair = recipe.data, recipe.train.objective == "pairwise"
    names = [data.chosen_column, data.rejected_column] if is_pair else [data.completion_column]
    end = end_token_id(policy.path, policy.tokenizer)
    problems, rows, longest = [], {}, 0
    for where, columns in read_rows(str(data.path), data.subset, data.split):
        problem = to_problem(where, columns, data.prompt_column, names[0])
        texts = [completion_in(where, columns, name) for name in names]
        with located(problem):
            prompt_ids = render_prompt(problem.prompt, data, policy.tokenizer)
            ids = [scored_ids(text, recipe.train.scores, policy.tokenizer, end) for text in texts]
        longest = max(longest, check_length(where, len(prompt_ids), [*map(len, ids)], recipe))
        signs = [1.0, -1.0] if is_pair else [_sign(where, columns, data.label_column)]
        problems.append(problem)
        rows[id(problem)] = Row(prompt_ids, ids, signs)
    if not problems:
        raise DataError(f"no problems in {data.path}")
    warn_beyond_context(policy, longest)
    # Rows go with their problems: those of one prompt fall on one side.
    training, held_out = [], []
    parts = split_problems(problems, data.held_out, recipe.run.seed)
    for part, problems_of_it in zip((training, held_out), parts, strict=True):
        part += [rows[id(problem)] for problem in problems_of_it]
    if not is_pair and len({row.signs[0] for row in training}) == 1:
        raise DataError(f"{data.path}: all labels of column {data.label_column!r} are the same; wanted both kinds")
    return training, held_out


def _sign(where: str, row: Mapping[str, Any], column: str) -> float:
    label = value_in(where, row, column)
    if not isinstance(label, int) or label not in (0, 1):  # True is 1
        raise DataError(f"{where}: column {column!r} holds {label!r}, wanted 0, 1, true or false")
    return 1.0 if label else -1.0
