"""The generator that a recipe names."""

from typing import Any

import torch

from flashgrpo.grpo.native_generator import NativeGenerator
from flashgrpo.grpo.policy import Policy, resolve_dtype
from flashgrpo.grpo.recipe import Recipe, RecipeError
from flashgrpo.grpo.rollout import Generator
from flashgrpo.grpo.world import World
from flashgrpo.model.checkpoint import empty_decoder


def open_generator(recipe: Recipe, policy: Policy, world: World, longest_prompt: int) -> Generator:
    """`rollout.generator`, without weights: for a run, which loads its own before each use.

    `longest_prompt` is in tokens. Raises RecipeError and RunInputError, where vLLM does not fit the run.
    """
    if recipe.rollout.generator != "native":
        from flashgrpo.grpo.vllm_generator import open_vllm

        return open_vllm(recipe, policy, world, longest_prompt)
    dtype = resolve_dtype(recipe.model.dtype, world.device)
    generator = NativeGenerator(empty_decoder(policy.model.config, dtype), policy.stop_token_ids, world.device)
    generator.model.attention_backend = recipe.model.attention_backend
    generator.free_weights()
    return generator


def open_for_evaluation(recipe: Recipe, policy: Policy, device: torch.device, longest_prompt: int) -> Any:
    """`rollout.generator` with the weights of recipe.model.path, for one process; native, it has those of `policy`.

    Raises RecipeError for servers, whose weights only a run sends.
    """
    if recipe.rollout.generator == "native":
        return NativeGenerator(policy.model, policy.stop_token_ids)
    if recipe.rollout.generator == "vllm_server":
        raise RecipeError("an evaluation cannot use servers; wanted --rollout.generator=vllm or native")
    from flashgrpo.grpo.vllm_generator import open_engine

    return open_engine(recipe, policy, device, longest_prompt)
