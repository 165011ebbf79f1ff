"""Evaluation of models, within a run or apart from it, on held-out problems or benchmark files.

The score is accuracy alone, or `code` for problems with tests: a partial credit counts as wrong, and the format is not
asked for.
"""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.progress import track

from flashgrpo.grpo.data.benchmarks import load_benchmark
from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_prompt, render_prompts
from flashgrpo.grpo.errors import DataError, RecipeError, RewardFailure, RunInputError
from flashgrpo.grpo.metrics import count_reflections
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.recipe.schema import ModelSection, Template, first_step
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rewards.response import Response
from flashgrpo.grpo.rewards.rules import is_correct
from flashgrpo.grpo.rewards.table import RewardSet
from flashgrpo.grpo.rollout.generator import Generator, open_generator, sample_seeds
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.run.folder import newest_checkpoint
from flashgrpo.grpo.run.policy import Policy, open_policy, resolve_device
from flashgrpo.grpo.run.progress import console
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.stages.scores import Evaluation, Graded, merge
from flashgrpo.grpo.types import CompletionGroup, Problem, Prompt, Request, Rollout, Sampling
from flashgrpo.model.checkpoint import empty_decoder, read_config
from flashgrpo.model.files import content_hash, parse_json, write_text

_EVAL_STREAM = 1 << 32  # keeps evaluation's seeds apart from those of the training steps
_HELD_OUT = "held-out"
_QUALITY = {"format": "format", "language": "language_consistency"}  # reward functions by the names of their means


def evaluate(
    prompts: Mapping[int, Prompt],
    policy: Policy,
    generator: Generator,
    pool: RewardPool,
    recipe: Recipe,
    step: int = 0,
    with_quality: bool = False,
) -> Evaluation:
    """Sample recipe.eval.samples completions a prompt, seeded by its number, and score them.

    `with_quality` scores format and language, too, and shows the progress: apart from training.
    """
    requests = [
        Request(i, prompt.token_ids, sample_seeds(recipe.run.seed, _EVAL_STREAM + step, i, recipe.eval.samples))
        for i, prompt in prompts.items()
    ]
    sampling = Sampling(recipe.rollout.max_new_tokens, recipe.eval.temperature, recipe.eval.top_p)
    groups = generator.generate(requests, sampling)
    if with_quality:
        shown = {"console": console, "transient": True, "disable": not console.is_terminal}
        groups = track(groups, "prompts", len(requests), **shown)
    rollouts = [rollout for group in groups for rollout in group]
    texts = [completion_group(prompts[r.group], [r], policy) for r in rollouts]  # each has the time limit to itself
    scored = _scores(texts, pool)
    quality = {name: pool.score(texts, function) for name, function in _QUALITY.items() if with_quality}
    samples: dict[int, list[Graded]] = defaultdict(list)
    for i, (rollout, text) in enumerate(zip(rollouts, texts, strict=True)):
        (completion,) = text.completions
        graded = Graded(
            is_correct=bool(is_correct(scored[i])),
            answer=Response(completion, text.prompt).answer(),
            length=len(rollout.completion_ids),
            is_truncated=rollout.finish_reason == "length",
            reflections=count_reflections(completion),
            quality={name: float(scores[i, 0]) for name, scores in quality.items()},
            is_missing=bool(np.isnan(scored[i])),
        )
        samples[rollout.group].append(graded)
    return Evaluation(dict(samples))


def evaluate_models(recipe: Recipe, models: Mapping[str, str], output: Path | None = None) -> list[dict[str, Any]]:
    """Evaluate models, given by their labels and folders, on recipe.eval.benchmarks or else the held-out problems.

    Returns a row for each pair: model, benchmark, weights, temperature, top_p, max_new_tokens, seed, scores. They are
    in `output` as JSON after each pair, and what is there when it begins is not evaluated again; other models' rows
    stay. torchrun's ranks share a pair's problems.

    Raises RunInputError for an `output` with rows of these names that were made from anything else, RewardFailure where
    no completion of a pair could be scored; as `train` else.
    """
    if recipe.rollout.generator == "vllm_server":
        raise RecipeError("an evaluation cannot use servers; wanted --rollout.generator=vllm or native")
    with open_world(recipe) as world:
        for path in models.values():
            read_config(path)  # a wrong path is found before the first is evaluated
        benchmarks = _load_benchmarks(recipe)
        known = world.on_main(lambda: _read_rows(output))
        made_from = world.on_main(lambda: _fingerprints(recipe, models, benchmarks))
        for pair in made_from:
            if pair in known and known[pair]["made_from"] != made_from[pair]:
                raise RunInputError(
                    f"{output} has {pair[0]} on {pair[1]} by other weights, problems or settings; remove it, or choose "
                    "another output"
                )
        with _open_pool(recipe, benchmarks) as pool:
            for label, name in made_from:
                if (label, name) in known:
                    continue
                start = time.perf_counter()
                size = f"{len(benchmarks[name])} x {recipe.eval.samples}"
                console.print(f"evaluating {label} on {name}: {size}", markup=False, highlight=False, soft_wrap=True)
                shares = world.everywhere(
                    lambda label=label, name=name: _evaluate_share(recipe, models[label], benchmarks[name], pool, world)
                )
                scores = merge(shares).scores()
                if "pass@1" not in scores:
                    raise RewardFailure(
                        f"{label} on {name}: no completion could be scored, so that there is no score; the warning "
                        "above says why"
                    )
                row = {
                    "model": label,
                    "benchmark": name,
                    "weights": models[label],
                    **scores,
                    "temperature": recipe.eval.temperature,
                    "top_p": recipe.eval.top_p,
                    "max_new_tokens": recipe.rollout.max_new_tokens,
                    "seed": recipe.run.seed,
                    "made_from": made_from[label, name],
                }
                known[label, name] = row
                if output is not None:
                    world.on_main(lambda: _write_rows(output, known))
                _tell(row, time.perf_counter() - start)
        return [known[pair] for pair in made_from]


def newest_model(recipe: Recipe) -> str:
    """Folder of the run's final model, of its newest checkpoint's, or else model.path."""
    run = Path(recipe.run.output)
    folders = [run / "model", *(checkpoint / "model" for checkpoint in filter(None, [newest_checkpoint(run)]))]
    return str(next((folder for folder in folders if folder.exists()), recipe.model.path))


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
    examples = {"data": example, **others}
    return RewardPool(
        {source: RewardSet(recipe.reward_weights[source], problem) for source, problem in examples.items()},
        max_new_tokens=recipe.rollout.max_new_tokens,
        timeout_s=rewards.timeout_s,
        programs=rewards.programs,
        num_workers=rewards.workers,
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


def _load_benchmarks(recipe: Recipe) -> dict[str, list[Problem]]:
    """Problems by the names of benchmarks."""
    if recipe.eval.benchmarks:
        return {path: load_benchmark(path, recipe.run.seed) for path in recipe.eval.benchmarks}
    _, held_out = load_problems(recipe.data, recipe.run.seed)
    if not held_out:
        raise DataError("data.held_out = 0 leaves no problem to evaluate on; set it, or name files in eval.benchmarks")
    _require_answer(held_out[0])
    return {_HELD_OUT: held_out[: recipe.eval.problems]}


def _fingerprints(
    recipe: Recipe, models: Mapping[str, str], benchmarks: Mapping[str, list[Problem]]
) -> dict[tuple[str, str], str]:
    """What the scores of each pair, in the order in which they are evaluated, are made from."""
    settings = recipe.eval.samples, recipe.eval.temperature, recipe.eval.top_p, recipe.rollout.max_new_tokens
    settings = *settings, recipe.data.template, recipe.model.dtype, recipe.run.seed
    settings = *settings, *filter(None, [recipe.data.template_options, recipe.data.system_prompt])
    weights = {label: content_hash(Path(path)) for label, path in models.items()}
    return {
        (label, name): hashlib.sha256(
            json.dumps([settings, weights[label], [[p.prompt, p.columns] for p in problems]], default=str).encode()
        ).hexdigest()
        for name, problems in benchmarks.items()
        for label in models
    }


def _open_pool(recipe: Recipe, benchmarks: Mapping[str, list[Problem]]) -> RewardPool:
    """What an evaluation scores by, in place of the recipe's rewards."""
    problems = [problem for found in benchmarks.values() for problem in found]
    columns = {name: value for p in problems for name, value in p.columns.items() if value is not None}
    functions = [*sorted({_scorer(problem) for problem in problems}), *_QUALITY.values()]
    rewards = dataclasses.replace(recipe.rewards, functions=functions, weights=[], start={})
    alone = dataclasses.replace(recipe, rewards=rewards, sources={}, reward_models={})
    return open_reward_pool(alone, Problem(problems[0].question, columns))


def _evaluate_share(recipe: Recipe, path: str, problems: list[Problem], pool: RewardPool, world: World) -> Evaluation:
    """A model on this rank's share of the problems; nothing of it is left in memory."""
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=path))
    is_native = recipe.rollout.generator == "native"  # vLLM loads the weights itself
    empty = None if is_native else empty_decoder(read_config(path), torch.float32)
    policy = open_policy(recipe.model, world.device, empty)
    prompts = dict(enumerate(render_prompts(problems, policy, recipe.data)))
    longest_prompt = max(len(prompt.token_ids) for prompt in prompts.values())
    own = {number: prompt for number, prompt in prompts.items() if number % world.size == world.rank}
    alone = dataclasses.replace(world, rank=0, size=1)  # what fails on a rank is raised on all by who calls this
    with contextlib.closing(open_generator(recipe, policy, alone, longest_prompt, loaded=True)) as generator:
        return evaluate(own, policy, generator, pool, recipe, with_quality=True)


def _read_rows(output: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of an earlier call by model and benchmark. Raises RunInputError, also where none could be written."""
    if output is None:
        return {}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            rows = parse_json(output.read_bytes()) if output.exists() else []
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunInputError(f"{output} cannot be read and written ({why}); choose another output") from None
    try:
        return {(row["model"], row["benchmark"]): {"made_from": None, **row} for row in rows}
    except (KeyError, TypeError) as error:
        raise RunInputError(
            f"{output}: not a file that an evaluation has written ({error!r}); choose another output"
        ) from error


def _write_rows(output: Path, rows: Mapping[Any, dict[str, Any]]) -> None:
    write_text(output, json.dumps(list(rows.values()), indent=1) + "\n")


def _tell(row: Mapping[str, Any], seconds: float) -> None:
    num_samples = row["num_problems"] * row["k"]
    rates = f"{num_samples / seconds:,.1f} samples/s, {num_samples * row['length'] / seconds:,.0f} tokens/s"
    console.print(
        f"{row['model']} on {row['benchmark']}: pass@1 {row['pass@1']:.1%}, {rates}, {seconds:,.0f} s in all",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _scores(texts: Sequence[CompletionGroup], pool: RewardPool) -> np.ndarray:
    """What decides whether each completion is right, [num_completions], NaN where missing."""
    scores = np.full(len(texts), np.nan)
    for name in ("accuracy", "code"):
        own = [i for i, text in enumerate(texts) if _scorer(text.problem) == name]
        if own:
            scores[own] = pool.score([texts[i] for i in own], name)[:, 0]
    return scores


def _scorer(problem: Problem) -> str:
    return "code" if problem.columns.get("tests") else "accuracy"


def _require_answer(problem: Problem) -> None:
    if not problem.columns.keys() & {"answer", "tests"}:
        found = ", ".join(problem.columns) or "none"
        raise DataError(f"an evaluation needs a reference answer: name its column by data.answer_column; found {found}")
