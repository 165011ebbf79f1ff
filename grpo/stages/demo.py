"""`make demo`, which is `flashgrpo demo`: from nothing to a policy that GRPO has taught to add, on two CPU cores.

A tokenizer and a small Qwen3-shaped model are made from nothing; a cold start by SFT on worked
examples of a small share of the problems teaches the form and some of the arithmetic
(recipes/sft.toml); then GRPO learns from rewards (recipes/demo.toml). The held-out score is
accuracy, with no credit for form.
"""

import random
import shutil
import time
from pathlib import Path

from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_text
from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.recipe.load import Recipe, SftRecipe, load_recipe
from flashgrpo.grpo.recipe.shipped import FOLDER
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.run.progress import say
from flashgrpo.grpo.stages.plots import print_summary, write_report
from flashgrpo.grpo.stages.sft import sft
from flashgrpo.grpo.stages.toy import Author, make_model, write_jsonl
from flashgrpo.grpo.train import train

_MARK = ".flashgrpo-demo"
_COLD_START_EXAMPLES = 3_000
_TEACHER = Author(careful=0.45)  # else hasty


def demo(recipe_file: str, output: Path, seed: int) -> None:
    """Make the model, cold-start it, train it, show what came of it. An `output` of an earlier demo is removed first.

    Raises RunInputError for an `output` that no demo has made, and whatever SFT and training do.
    """
    start = time.perf_counter()
    if output.exists():
        if any(output.iterdir()) and not (output / _MARK).exists():
            raise RunInputError(f"{output} is not a folder that the demo made; choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / _MARK).touch()
    overrides = [
        f"--model.path={output / 'cold_start' / 'model'}",
        f"--run.output={output / 'grpo'}",
        f"--run.seed={seed}",
    ]
    recipe = load_recipe(Recipe, recipe_file, overrides)
    problems, held_out = load_problems(recipe.data, seed)
    say(f"{len(problems):,} problems to train on, {len(held_out):,} held out; seed {seed}")

    # The tokenizer learns from prompts as they will be read: what all of them repeat becomes one token.
    texts = [render_text(problem.prompt, recipe.data.template) for problem in problems[:500]]
    base = make_model(output / "base", texts, seed)
    rng = random.Random(seed)
    rows = []
    for problem in problems[:_COLD_START_EXAMPLES]:
        rows.append({"prompt": problem.prompt, "completion": _TEACHER.work_out(problem, rng)})
    examples = write_jsonl(output / "cold_start.jsonl", rows)

    overrides = [
        f"--model.path={base}",
        f"--data.path={examples}",
        f"--data.template={recipe.data.template}",
        f"--run.output={output / 'cold_start'}",
        f"--run.seed={seed}",
        f"--run.device={recipe.run.device}",
        f"--train.token_budget={recipe.train.token_budget}",
    ]
    sft(load_recipe(SftRecipe, FOLDER / "sft.toml", overrides))
    train(recipe)

    picture = write_report(recipe.run.output)
    print_summary(recipe.run.output)
    rows = read_rows(output / "grpo" / "metrics.jsonl")
    scores = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
    seconds = time.perf_counter() - start
    print(f"held-out pass@1: {scores[0]:.1%} after the cold start, {scores[-1]:.1%} after GRPO; {seconds:.0f} s in all")
    print(f"picture: {picture}\nmodel:   {output / 'grpo' / 'model'}")
