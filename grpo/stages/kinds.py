"""What can run: the kinds of recipe, each with the function that runs it. All of them can be stages of a pipeline."""

import importlib
from pathlib import Path
from typing import NamedTuple

from flashgrpo.grpo.recipe.load import (
    AnyRecipe,
    CollectRecipe,
    EvalRecipe,
    FunctionRecipe,
    Recipe,
    RewardModelRecipe,
    SftRecipe,
)
from flashgrpo.model.waits import word_for


class Kind(NamedTuple):
    """A kind of recipe."""

    recipe: type[AnyRecipe]
    function: str  # is called with a recipe and `resume`, returns `makes`; its module is imported then: it needs torch
    makes: str  # what there is in run.output when it has ended


KINDS = {
    "train": Kind(Recipe, "train:train", "model"),
    "sft": Kind(SftRecipe, "stages.sft:sft", "model"),
    "reward-model": Kind(RewardModelRecipe, "stages.reward_model:reward_model", "model"),
    "collect": Kind(CollectRecipe, "stages.collect:collect", "data.parquet"),
    "eval": Kind(EvalRecipe, "stages.evaluate:evaluate_recipe", "scores.json"),
    "function": Kind(FunctionRecipe, "stages.pipeline:call_function", ""),
}


def run_recipe(kind: str, recipe: AnyRecipe, resume: bool = False) -> Path:
    """Run a recipe, or continue it; returns what it has made: the folder of a model, or a file.

    Raises RecipeError, DataError, RewardError, CheckpointError and RunInputError before the first step, RunError and
    RewardFailure later. Ctrl-C saves what there is and raises KeyboardInterrupt.
    """
    module, _, name = KINDS[kind].function.partition(":")
    with word_for("importing torch and what comes with it"):
        imported = importlib.import_module(f"flashgrpo.grpo.{module}")
    return getattr(imported, name)(recipe, resume)
