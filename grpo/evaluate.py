"""Held-out evaluation: pass@1 as the mean over k samples, pass@k, and cons@k by majority vote over extracted answers.

The score is accuracy alone: a partial credit counts as wrong, and the format is not asked for.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from flashgrpo.grpo.data import DataError, Problem, Template, load_problems, render_prompt
from flashgrpo.grpo.generators import open_for_evaluation
from flashgrpo.grpo.native_generator import NativeGenerator
from flashgrpo.grpo.policy import Policy, Prompt, open_policy, render_prompts, resolve_device
from flashgrpo.grpo.progress import console
from flashgrpo.grpo.recipe import Recipe
from flashgrpo.grpo.reward_pool import RewardPool
from flashgrpo.grpo.reward_table import CompletionGroup, RewardSet
from flashgrpo.grpo.rewards import extract_answer, is_correct
from flashgrpo.grpo.rollout import Generator, Request, Rollout, Sampling, sample_seeds
from flashgrpo.grpo.run_folder import newest_checkpoint
from flashgrpo.grpo.sections import ModelSection, first_step
from flashgrpo.model.checkpoint import empty_decoder, read_config

_EVAL_STREAM = 1 << 32  # keeps evaluation's seeds apart from those of the training steps


@dataclass(frozen=True)
class Evaluation:
    """`correct` and `answers` have one row a problem and one entry a sample."""

    correct: np.ndarray  # [num_problems, k] bool
    answers: list[list[str | None]]
    lengths: np.ndarray  # [num_problems, k]
    truncated: np.ndarray  # [num_problems, k] bool

    def scores(self) -> dict[str, float]:
        """pass@1, pass@k, cons@k, k, num_problems, mean length in tokens, truncated share."""
        consensus = [_majority(*row) for row in zip(self.answers, self.correct, strict=True)]
        return {
            "pass@1": float(self.correct.mean()),
            "pass@k": float(self.correct.any(axis=1).mean()),
            "cons@k": float(np.mean(consensus)),
            "k": self.correct.shape[1],
            "num_problems": self.correct.shape[0],
            "length": float(self.lengths.mean()),
            "truncated": float(self.truncated.mean()),
        }


def evaluate(
    prompts: Mapping[int, Prompt],
    policy: Policy,
    generator: Generator,
    pool: RewardPool,
    recipe: Recipe,
    step: int = 0,
) -> Evaluation:
    """Sample recipe.eval.samples completions a prompt, seeded by its number, and score them by accuracy."""
    requests = [
        Request(i, prompt.token_ids, sample_seeds(recipe.run.seed, _EVAL_STREAM + step, i, recipe.eval.samples))
        for i, prompt in prompts.items()
    ]
    sampling = Sampling(recipe.rollout.max_new_tokens, recipe.eval.temperature, recipe.eval.top_p)
    groups = sorted(generator.generate(requests, sampling), key=lambda group: group[0].group)
    scored = [completion_group(prompts[group[0].group], group, policy) for group in groups]
    shape = len(groups), recipe.eval.samples
    return Evaluation(
        correct=is_correct(pool.score(scored, "accuracy")).reshape(shape),
        answers=[[extract_answer(text, group.prompt) for text in group.completions] for group in scored],
        lengths=np.array([[len(r.completion_ids) for r in group] for group in groups]).reshape(shape),
        truncated=np.array([[r.finish_reason == "length" for r in group] for group in groups], dtype=bool).reshape(
            shape
        ),
    )


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of different problems as one."""
    return Evaluation(
        correct=np.concatenate([part.correct for part in parts]),
        answers=[row for part in parts for row in part.answers],
        lengths=np.concatenate([part.lengths for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
    )


def evaluate_recipe(recipe: Recipe, model: str | None = None) -> dict[str, float]:
    """Scores of `model` on a recipe's held-out problems; default: the run's final model, its newest checkpoint's, or
    else model.path.
    """
    path = model or _newest_model(Path(recipe.run.output)) or recipe.model.path
    console.print(f"evaluating {path}", highlight=False)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=str(path)))
    device = resolve_device(recipe.run.device)
    is_native = recipe.rollout.generator == "native"  # vLLM loads the weights itself
    policy = open_policy(recipe.model, device, None if is_native else empty_decoder(read_config(path), torch.float32))
    _, held_out = load_problems(recipe.data, recipe.run.seed)
    if not held_out:
        raise DataError("data.held_out = 0 leaves no problem to evaluate on; set it, or point data.path to a test set")
    _require_answer(held_out[0])
    prompts = dict(enumerate(render_prompts(held_out[: recipe.eval.problems], policy, recipe.data)))
    longest_prompt = max(len(prompt.token_ids) for prompt in prompts.values())
    generator = open_for_evaluation(recipe, policy, device, longest_prompt)
    with contextlib.closing(generator), open_reward_pool(recipe, held_out[0]) as pool:
        return evaluate(prompts, policy, generator, pool, recipe).scores()


def sample_texts(
    model: str, prompt: str, template: Template, num_samples: int, sampling: Sampling, seed: int = 0
) -> list[str]:
    """Completions of one prompt by the model in a Hugging Face folder."""
    policy = open_policy(ModelSection(model), resolve_device("auto"))
    prompt_ids = render_prompt(prompt, template, policy.tokenizer)
    request = Request(0, prompt_ids, sample_seeds(seed, 0, 0, num_samples))
    (group,) = NativeGenerator(policy.model, policy.stop_token_ids).generate([request], sampling)
    return [policy.decode(rollout.completion_ids) for rollout in group]


def open_reward_pool(
    recipe: Recipe,
    example: Problem,
    others: Mapping[str, Problem] = MappingProxyType({}),  # an example of each of recipe.sources
) -> RewardPool:
    """The recipe's reward functions in worker processes; its reward models are yet to be given, as `pool.scorers`.

    Raises DataError where evaluations would have no answer.
    """
    if recipe.eval.every:
        _require_answer(example)
    rewards = recipe.rewards
    return RewardPool(
        rewards.functions,
        rewards.weights,
        max_new_tokens=recipe.rollout.max_new_tokens,
        timeout_s=rewards.timeout_s,
        num_workers=rewards.workers,
        example=example,
        others={source: RewardSet(recipe.reward_weights[source], other) for source, other in others.items()},
        first_steps={name: first_step(start, recipe.train.steps) for name, start in rewards.start.items()},
        scorers=dict.fromkeys(recipe.reward_models),
    )


def completion_group(prompt: Prompt, group: list[Rollout], policy: Policy) -> CompletionGroup:
    """What reward functions are given of a group."""
    return CompletionGroup(
        problem=prompt.problem,
        prompt=prompt.text,
        completions=[policy.decode(rollout.completion_ids) for rollout in group],
        completion_ids=[rollout.completion_ids.tolist() for rollout in group],
        finish_reasons=[rollout.finish_reason for rollout in group],
        source=prompt.source,
    )


def _newest_model(run: Path) -> Path | None:
    if (run / "model").exists():
        return run / "model"
    checkpoint = newest_checkpoint(run)
    return checkpoint and checkpoint / "model"


def _require_answer(problem: Problem) -> None:
    if "answer" not in problem.columns:
        found = ", ".join(problem.columns) or "none"
        raise DataError(f"an evaluation needs a reference answer: name its column by data.answer_column; found {found}")


def _majority(answers: list[str | None], correct: np.ndarray) -> bool:
    """Whether the commonest answer is right; of equally common ones the first sampled; no answer is no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return bool(correct[answers.index(winner)])
