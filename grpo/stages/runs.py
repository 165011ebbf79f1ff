"""What runs a recipe, by its kind."""

import importlib
from pathlib import Path

from flashgrpo.grpo.recipe.load import AnyRecipe, CollectRecipe, Recipe, RewardModelRecipe, SftRecipe

_RUN_BY = {
    Recipe: "train",
    SftRecipe: "stages.sft",
    RewardModelRecipe: "stages.reward_model",
    CollectRecipe: "stages.collect",
}


def run_recipe(recipe: AnyRecipe, resume: bool = False) -> Path:
    """Run a recipe, or continue it; returns what it has made: the folder of a model, or a file of examples.

    Raises RecipeError, DataError, RewardError, CheckpointError and RunInputError before the first step, RunError and
    RewardFailure later. Ctrl-C saves what there is and raises KeyboardInterrupt.
    """
    name = _RUN_BY[type(recipe)]
    return getattr(importlib.import_module(f"flashgrpo.grpo.{name}"), name.rpartition(".")[2])(recipe, resume)
