"""Reward models as rewards: completions scored by what `flashgrpo reward-model` has made.

A group goes through the model in passes of its own, its completions behind one copy of the
question, so that a score depends neither on the other groups nor on when they come. A question is
put in the reward model's template, not the policy's, and a completion is tokenised anew, from its
text.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flashgrpo.grpo.data.prompts import closed_ids, render_prompt
from flashgrpo.grpo.errors import DataError, PackingError, RecipeError, RewardFailure
from flashgrpo.grpo.learn.packing import Completion, Group, best_fit, build_batch
from flashgrpo.grpo.recipe.schema import CHECKED, PreferenceSection, Template
from flashgrpo.grpo.rewards.pool import Scorer
from flashgrpo.grpo.rewards.response import Response
from flashgrpo.grpo.run.child import Child, own_environment
from flashgrpo.grpo.run.machines import resolve_dtype
from flashgrpo.grpo.run.policy import (
    Policy,
    check_vocabulary,
    end_token_id,
    open_tokenizer,
    same_tokens,
    stop_token_ids,
)
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.types import CompletionGroup, Problem
from flashgrpo.model.checkpoint import CheckpointError, load_checkpoint, read_config, read_json
from flashgrpo.model.hub import local_folder

CARD = "reward_model.json"
_SCORE_LIMIT_S = 600.0


@dataclass(frozen=True, config=CHECKED)
class Card:
    """What a reward model's folder says of itself, in reward_model.json."""

    scores: Literal["answer", "whole"]
    objective: Literal["pairwise", "pointwise"]
    template: Template
    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    system_prompt: str | None = None

    def as_reward(self, logits: Tensor) -> Tensor:
        """Pairwise, the raw logit, of which only differences mean anything; pointwise, the probability of "good"."""
        return logits if self.objective == "pairwise" else logits.sigmoid()


def scored_ids(text: str, scores: str, tokenizer: PreTrainedTokenizerBase, end: int) -> np.ndarray:
    """What a reward model reads of a completion, [num_tokens] int64; its score is read at `end`.

    With scores = "answer" it is what follows the reasoning, without <answer> tags: nothing where
    the reasoning is not closed, and everything where there is none.
    """
    if scores == "answer":
        response = Response(text)
        text = "" if response.is_open else re.sub(r"</?answer>", "", response.conclusion).strip()
    return closed_ids(text, tokenizer, end)


def scored_group(prompt_ids: list[int], texts: Sequence[np.ndarray], first_id: int = 0) -> Group:
    """Texts behind one prompt; the token added to each is not fed, so that the last one fed is the text's own."""
    return Group(prompt_ids, [Completion(np.append(ids, ids[-1]), first_id + i) for i, ids in enumerate(texts)])


class RewardModel:
    """A reward model in memory; `where` names it in errors. Raises CheckpointError."""

    def __init__(self, path: str, device: str, batch_tokens: int, where: str, waits_on: str | None = None):
        self.device, self.batch_tokens, self.where = torch.device(device), batch_tokens, where
        self.card, self.tokenizer = read_card(path), open_tokenizer(path)
        self.end = end_token_id(path, self.tokenizer)
        dtype = resolve_dtype("auto", self.device)
        self.model = load_checkpoint(path, dtype=dtype, device=waits_on or self.device, reward_model=True)

    @torch.no_grad()
    def score(self, group: CompletionGroup) -> np.ndarray:  # [group_size] float64
        """Rewards of a group's completions.

        Raises RewardFailure for a question that does not suit the template, or is too long with a
        completion for batch_tokens.
        """
        try:
            prompt_ids = render_prompt(group.problem.prompt, self.card, self.tokenizer)
            texts = [Response(text, group.prompt).text for text in group.completions]
            ids = [scored_ids(text, self.card.scores, self.tokenizer, self.end) for text in texts]
        except DataError as error:
            raise RewardFailure(f"{self.where}: {error}") from error
        logits = torch.empty(len(ids), dtype=torch.float64)
        try:
            packs = best_fit([scored_group(prompt_ids, ids)], self.batch_tokens)
        except PackingError as error:
            longest = len(prompt_ids) + max(map(len, ids))
            raise RewardFailure(
                f"{self.where}: a question and its completion have {longest} tokens, batch_tokens = "
                f"{self.batch_tokens}; raise it to {longest} or more"
            ) from error
        # A long group takes several passes; its completions stand in the packs in any order.
        for pack in packs:
            batch = build_batch(pack)
            logits[batch.sequence_ids] = self.model.scores(batch.to(self.device)).double().cpu()
        return self.card.as_reward(logits).numpy()


class InTurn(Scorer):
    """On the policy's device for the time of a call; its weights wait on the host, on each rank."""

    def __init__(self, section: PreferenceSection, where: str, device: torch.device):
        self.model = RewardModel(section.path, str(device), section.batch_tokens, where, waits_on="cpu")
        if device.type == "cuda":
            # Only from pinned memory does a copy not make the host wait.
            for parameter in self.model.model.parameters():
                parameter.data = parameter.data.pin_memory()

    def score(self, groups: Sequence[CompletionGroup]) -> np.ndarray:
        waiting = [(parameter, parameter.data) for parameter in self.model.model.parameters()]
        try:
            for parameter, on_host in waiting:
                parameter.data = on_host.to(self.model.device, non_blocking=True)
            return np.array([self.model.score(group) for group in groups])
        except torch.OutOfMemoryError as error:
            hint = "lower its batch_tokens or train.token_budget, or give it a device of its own"
            raise RewardFailure(f"{self.model.where}: {str(error).splitlines()[0]} Next: {hint}") from error
        finally:  # nothing has changed: the copies on the device are dropped
            for parameter, on_host in waiting:
                parameter.data = on_host


class OwnProcess(Scorer):
    """In a process of the rank's own on another device, where it scores while the generator still samples."""

    def __init__(self, section: PreferenceSection, where: str):
        environment = {
            **own_environment(),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        arguments = section.path, section.device, section.batch_tokens, where
        self.child = Child(f"the process of {where}", RewardFailure, RewardModel, arguments, environment)
        # One thread speaks with the process: it answers one group after the other, while the trainer samples on.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward model")
        self._begun: dict[int, tuple[CompletionGroup, Future[np.ndarray]]] = {}  # by identity

    def submit(self, group: CompletionGroup) -> None:
        future = self._thread.submit(self.child.call, "score", group, timeout_s=_SCORE_LIMIT_S)
        self._begun[id(group)] = group, future

    def score(self, groups: Sequence[CompletionGroup]) -> np.ndarray:
        for group in groups:
            if id(group) not in self._begun:
                self.submit(group)
        return np.array([self._begun.pop(id(group))[1].result() for group in groups])

    def close(self) -> None:
        self.child.close()
        self._thread.shutdown(cancel_futures=True)


def open_preferences(
    sections: Mapping[str, PreferenceSection],
    policy: Policy,
    world: World,
    # By reward model, what it will score completions of.
    questions: Mapping[str, Sequence[Problem]],
    max_new_tokens: int,
) -> dict[str, Scorer]:
    """The reward models of [reward_models] by name. All ranks must call it.

    Raises CheckpointError for a folder that is no reward model, or has another tokenizer than the
    policy, DataError for a question that does not suit its template, RecipeError for one too long
    with a completion for its batch_tokens.
    """
    scorers: dict[str, Scorer] = {}

    def open_all() -> None:
        # All are checked first: to load one takes minutes.
        for name, section in sections.items():
            _check(f"reward_models.{name}", section, policy, questions[name], max_new_tokens)
        for name, section in sections.items():
            where = f"reward_models.{name}"
            in_turn = section.device == "trainer"
            scorers[name] = InTurn(section, where, world.device) if in_turn else OwnProcess(section, where)

    try:
        world.everywhere(open_all)
    except BaseException:  # nobody has them yet to close them
        for scorer in scorers.values():
            scorer.close()
        raise
    return scorers


def _check(
    where: str, section: PreferenceSection, policy: Policy, questions: Sequence[Problem], max_new_tokens: int
) -> None:
    path = section.path
    config, card = read_config(path, reward_model=True), read_card(path)
    theirs, ours = open_tokenizer(path), policy.tokenizer
    check_vocabulary(path, theirs, config.vocab_size, stop_token_ids(path, theirs))
    if not same_tokens(theirs, ours):
        raise CheckpointError(
            f"{path}: its tokenizer is not that of {policy.path}; train a reward model from one of the policy's family"
        )
    longest = 0
    for problem in questions:
        try:
            longest = max(longest, len(render_prompt(problem.prompt, card, theirs)))
        except DataError as error:
            raise DataError(f"{where}: {problem.where}: {error}") from None
    needed = longest + max_new_tokens + 1
    if needed > section.batch_tokens:
        raise RecipeError(
            f"{where}.batch_tokens = {section.batch_tokens} is below the longest question and completion together with "
            f"the token that ends it, {needed}; raise it to that or more"
        )


def read_card(path: str | Path) -> Card:
    """What the folder of a reward model says of itself. Raises CheckpointError."""
    file = local_folder(path) / CARD
    if not file.exists():
        raise CheckpointError(f"{path} has no {CARD}; make a reward model by `flashgrpo reward-model RECIPE`")
    try:
        return TypeAdapter(Card).validate_python(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
