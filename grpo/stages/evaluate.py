"""Evaluation of models, within a run or apart from it, on held-out problems or benchmark files.

The score is accuracy alone, or `code` for problems with tests: a partial credit counts as wrong, and the format is not
asked for.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from flashgrpo.grpo.data.benchmarks import load_benchmark
from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_prompt, render_prompts
from flashgrpo.grpo.errors import DataError, RecipeError, RewardFailure, RunInputError
from flashgrpo.grpo.recipe.load import EvalRecipe, Recipe, SamplingRecipe
from flashgrpo.grpo.recipe.schema import ModelSection, SourceSection, Template
from flashgrpo.grpo.rewards.pool import RewardPool, open_reward_pool, require_answer
from flashgrpo.grpo.rewards.response import Response, count_reflections
from flashgrpo.grpo.rewards.rules import is_correct
from flashgrpo.grpo.rollout.generator import Generator, open_generator, sample_seeds, settle_generator
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.run.folder import newest_checkpoint
from flashgrpo.grpo.run.ledger import changed, differing, identify
from flashgrpo.grpo.run.machines import resolve_device
from flashgrpo.grpo.run.policy import Policy, open_policy
from flashgrpo.grpo.run.progress import console, say
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.stages.scores import Graded, scores_of, solved_by
from flashgrpo.grpo.types import CompletionGroup, Problem, Prompt, Request, Sampling
from flashgrpo.model.checkpoint import empty_decoder, read_config
from flashgrpo.model.files import parse_json, write_text
from flashgrpo.model.hub import local_folder

_EVAL_STREAM = 1 << 32  # keeps evaluation's seeds apart from those of the training steps
_HELD_OUT = "held-out"
Rows = dict[tuple[str, str], dict[str, Any]]  # by model and benchmark
_QUALITY = {"format": "format", "language": "language_consistency"}  # reward functions by the names of their means


def evaluate(
    prompts: Mapping[int, Prompt],
    policy: Policy,
    generator: Generator,
    pool: RewardPool,
    recipe: Recipe,
    step: int = 0,
    with_quality: bool = False,
) -> dict[int, list[Graded]]:
    """Sample recipe.eval.samples completions a prompt, seeded by its number, and score them; returns them by prompt.

    `with_quality` scores format and language, too, and shows the progress: apart from training.
    """
    requests = []
    for i, prompt in prompts.items():
        seeds = sample_seeds(recipe.run.seed, _EVAL_STREAM + step, i, recipe.eval.samples)
        requests.append(Request(i, prompt.token_ids, seeds))
    sampling = Sampling(recipe.rollout.max_new_tokens, recipe.eval.temperature, recipe.eval.top_p)
    groups = generator.generate(requests, sampling)
    if with_quality:
        shown = {"console": console, "transient": True, "disable": not console.is_terminal}
        groups = track(groups, "prompts", len(requests), **shown)
    rollouts = [*chain.from_iterable(groups)]
    # A group of its own each: a completion that is slow to score has the time limit to itself.
    texts = [CompletionGroup.of(prompts[rollout.group], [rollout], policy.decode) for rollout in rollouts]
    scored = _scores(texts, pool)  # the generator is done: from here on the workers have the processors
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
    return dict(samples)


def evaluate_models(recipe: Recipe, models: Mapping[str, str], output: Path | None = None) -> list[dict[str, Any]]:
    """Evaluate models, given by their labels and folders, on recipe.eval.benchmarks or else the held-out problems.

    Returns a row for each pair: model, benchmark, weights, temperature, top_p, max_new_tokens,
    seed, scores. They are in `output` as JSON after each pair, and what is there when it begins is
    not evaluated again; other models' rows stay. torchrun's ranks share a pair's problems.

    Raises RunInputError for an `output` with rows of these names that were made from anything else, RewardFailure where
    no completion of a pair could be scored; as `train` else.
    """
    if recipe.rollout.generator == "vllm_server":
        raise RecipeError("an evaluation cannot use servers; wanted --rollout.generator=vllm or native")
    with open_world(recipe) as world:
        recipe = settle_generator(recipe, world)
        for path in models.values():
            local_folder(path, with_weights=True)  # a wrong path is found before the first is evaluated
            read_config(path)
        benchmarks = _load_benchmarks(recipe)
        # Rank 0 alone has the file; the others hear from it what is still to be done.
        known = world.on_main(lambda: _read_rows(output))
        ledger = world.on_main(lambda: _compare(recipe, models, benchmarks, known, output))
        with _open_pool(recipe, benchmarks) as pool:
            for (label, name), made_from in ledger.items():
                if (label, name) not in known:
                    own = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=models[label]))
                    known[label, name] = {
                        "model": label,
                        "benchmark": name,
                        "weights": models[label],
                        **_score(f"{label} on {name}", own, benchmarks[name], pool, world),
                        "temperature": recipe.eval.temperature,
                        "top_p": recipe.eval.top_p,
                        "max_new_tokens": recipe.rollout.max_new_tokens,
                        "seed": recipe.run.seed,
                    }
                known[label, name]["made_from"] = made_from
                if output is not None:  # after each pair: a stop costs one
                    text = json.dumps([*known.values()], indent=1) + "\n"
                    world.on_main(functools.partial(write_text, output, text))
        return [known[pair] for pair in ledger]


def evaluate_recipe(recipe: EvalRecipe, resume: bool = True) -> Path:
    """Evaluate recipe.models, as `evaluate_models`, which always resumes; returns the file of scores."""
    output = Path(recipe.run.output) / "scores.json"
    evaluate_models(recipe, recipe.models, output)
    return output


def newest_model(recipe: Recipe) -> str:
    """Folder of the run's final model, of its newest checkpoint's, or else model.path."""
    run = Path(recipe.run.output)
    if (run / "model").exists():
        return str(run / "model")
    checkpoint = newest_checkpoint(run)
    if checkpoint and (checkpoint / "model").exists():
        return str(checkpoint / "model")
    return recipe.model.path


def open_for_sampling(recipe: SamplingRecipe, device: torch.device, has_prompts: bool = True) -> Policy:
    """The tokenizer at recipe.model.path, and the weights where this process samples: vLLM loads its own."""
    samples_here = has_prompts and recipe.rollout.generator == "native"
    empty = None if samples_here else empty_decoder(read_config(recipe.model.path), torch.float32)
    return open_policy(recipe.model, device, empty)


def sample_texts(
    model: str, prompt: str, template: Template, num_samples: int, sampling: Sampling, seed: int = 0
) -> list[str]:
    """Completions of one prompt by the model in a Hugging Face folder, or of a name on the hub."""
    policy = open_policy(ModelSection(model), resolve_device("auto"))
    prompt_ids = render_prompt(prompt, SourceSection(template=template), policy.tokenizer)
    request = Request(0, prompt_ids, sample_seeds(seed, 0, 0, num_samples))
    (group,) = NativeGenerator(policy.model, policy.stop_token_ids).generate([request], sampling)
    return [policy.decode(rollout.completion_ids) for rollout in group]


def _load_benchmarks(recipe: Recipe) -> dict[str, list[Problem]]:
    """Problems by the names of benchmarks."""
    if recipe.eval.benchmarks:
        return {path: load_benchmark(path, recipe.run.seed) for path in recipe.eval.benchmarks}
    _, held_out = load_problems(recipe.data, recipe.run.seed)
    if not held_out:
        raise DataError("data.held_out = 0 leaves no problem to evaluate on; set it, or name files in eval.benchmarks")
    require_answer(held_out[0])
    return {_HELD_OUT: held_out[: recipe.eval.problems]}


def _compare(
    recipe: Recipe, models: Mapping[str, str], benchmarks: Mapping[str, list[Problem]], known: Rows, output: Path | None
) -> dict[tuple[str, str], dict[str, Any]]:
    """What each pair is made from, in the order in which they are evaluated. Raises RunInputError where the row that is
    known of it was made from anything else.
    """
    ledger = {}
    for name, problems in benchmarks.items():
        settings = _settings(recipe, problems)
        for label in models:
            pair, inputs = (label, name), {"weights": models[label]}
            before = known[pair]["made_from"] if pair in known else {"recipe": {}, "inputs": {}}
            now = ledger[pair] = {"recipe": settings, "inputs": identify(inputs, before["inputs"])}
            changes = [*differing(before["recipe"], settings), *changed(before["inputs"], now["inputs"])]
            if pair in known and changes:
                raise RunInputError(
                    f"{output} has {label} on {name} by other weights, problems or settings ({', '.join(changes)}); "
                    "remove it, or choose another output"
                )
    return ledger


def _settings(recipe: Recipe, problems: Sequence[Problem]) -> dict[str, Any]:
    """What decides the scores of a model besides its weights. Problems are known by what they are: a task or a hub may
    have others under the same name.
    """
    rows = json.dumps([[problem.prompt, problem.columns] for problem in problems], default=str)
    settings = {
        "problems": hashlib.sha256(rows.encode()).hexdigest(),
        "template": recipe.data.template,
        "template_options": recipe.data.template_options,
        "system_prompt": recipe.data.system_prompt,
        "samples": recipe.eval.samples,
        "temperature": recipe.eval.temperature,
        "top_p": recipe.eval.top_p,
        "max_new_tokens": recipe.rollout.max_new_tokens,
        "dtype": recipe.model.dtype,
        "seed": recipe.run.seed,
    }
    return json.loads(json.dumps(settings, default=str))  # as it will be read


def _score(what: str, recipe: Recipe, problems: list[Problem], pool: RewardPool, world: World) -> dict[str, float]:
    """The scores of recipe.model on problems; tells them as those of `what`."""
    start = time.perf_counter()
    say(f"evaluating {what}: {len(problems)} x {recipe.eval.samples}")
    scores = scores_of(world.everywhere(lambda: _evaluate_share(recipe, problems, pool, world)))
    if "pass@1" not in scores:
        raise RewardFailure(
            f"{what}: no completion could be scored, so that there is no score; the warning above says why"
        )
    seconds = time.perf_counter() - start
    num_samples = scores["num_problems"] * scores["k"]
    rates = f"{num_samples / seconds:,.1f} samples/s, {num_samples * scores['length'] / seconds:,.0f} tokens/s"
    say(f"{what}: pass@1 {scores['pass@1']:.1%}, {rates}, {seconds:,.0f} s in all")
    return scores


def _open_pool(recipe: Recipe, benchmarks: Mapping[str, list[Problem]]) -> RewardPool:
    """What an evaluation scores by, in place of the recipe's rewards."""
    problems = [*chain.from_iterable(benchmarks.values())]
    columns: dict[str, Any] = {}
    scorers = set()
    for problem in problems:  # the example has every column, from a problem that has something in it
        columns |= {name: value for name, value in problem.columns.items() if value is not None}
        scorers.add(solved_by(problem.columns))
    functions = [*sorted(scorers), *_QUALITY.values()]
    rewards = dataclasses.replace(recipe.rewards, functions=functions, weights=[], start={})
    alone = dataclasses.replace(recipe, rewards=rewards, sources={}, reward_models={})
    return open_reward_pool(alone, Problem(problems[0].question, columns))


def _evaluate_share(recipe: Recipe, problems: list[Problem], pool: RewardPool, world: World) -> dict[int, list[Graded]]:
    """recipe.model on this rank's share of the problems; nothing of it is left in memory."""
    # All are rendered on every rank: the longest prompt decides how much room each generator makes.
    policy = open_for_sampling(recipe, world.device)
    prompts = render_prompts(problems, policy, recipe.data)
    longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
    own = {number: prompts[number] for number in range(world.rank, len(prompts), world.size)}
    alone = dataclasses.replace(world, rank=0, size=1)  # what fails on a rank is raised on all by who calls this
    with contextlib.closing(open_generator(recipe, policy, alone, longest_prompt, loaded=True)) as generator:
        return evaluate(own, policy, generator, pool, recipe, with_quality=True)


def _read_rows(output: Path | None) -> Rows:
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
        known = {}
        for row in rows:
            if not isinstance(row.get("made_from"), dict):  # an older version's, of which nothing is known
                row["made_from"] = {"recipe": {}, "inputs": {}}
            known[row["model"], row["benchmark"]] = row
        return known
    except (AttributeError, KeyError, TypeError) as error:
        raise RunInputError(
            f"{output}: not a file that an evaluation has written ({error!r}); choose another output"
        ) from error


def _scores(texts: Sequence[CompletionGroup], pool: RewardPool) -> np.ndarray:
    """What decides whether each completion is right, [num_completions], NaN where missing."""
    scores, places = np.full(len(texts), np.nan), defaultdict(list)
    for i, text in enumerate(texts):
        places[solved_by(text.problem.columns)].append(i)
    for name in sorted(places):
        own = [texts[i] for i in places[name]]
        scores[places[name]] = pool.score(own, name)[:, 0]
    return scores
