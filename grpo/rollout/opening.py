"""The generator that a recipe names."""

from typing import Any

import torch

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import SamplingRecipe
from flashgrpo.grpo.rollout.generator import Generator
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.policy import Policy, open_sharded_model, resolve_dtype, warn_beyond_context
from flashgrpo.grpo.run.world import World
from flashgrpo.model.checkpoint import empty_decoder


def open_generator(recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int) -> Generator:
    """`rollout.generator`, without weights: for a run, which loads its own before each use.

    `longest_prompt` is in tokens. Raises RecipeError and RunInputError, where vLLM does not fit the run.
    """
    warn_beyond_context(policy, longest_prompt + recipe.rollout.max_new_tokens)
    if recipe.rollout.generator != "native":
        from flashgrpo.grpo.rollout.vllm.generator import open_vllm

        return open_vllm(recipe, policy, world, longest_prompt)
    dtype = resolve_dtype(recipe.model.dtype, world.device)
    generator = NativeGenerator(
        empty_decoder(policy.model.config, dtype, world.device), policy.stop_token_ids, world.device
    )
    generator.model.attention_backend = recipe.model.attention_backend
    generator.free_weights()
    return generator


def open_for_evaluation(recipe: SamplingRecipe, policy: Policy, device: torch.device, longest_prompt: int) -> Any:
    """`rollout.generator` with the weights of recipe.model.path, for one process; native, it has those of `policy`.

    Raises RecipeError for servers, whose weights only a run sends.
    """
    warn_beyond_context(policy, longest_prompt + recipe.rollout.max_new_tokens)
    if recipe.rollout.generator == "native":
        return NativeGenerator(policy.model, policy.stop_token_ids)
    if recipe.rollout.generator == "vllm_server":
        raise RecipeError("an evaluation cannot use servers; wanted --rollout.generator=vllm or native")
    from flashgrpo.grpo.rollout.vllm.generator import open_engine

    return open_engine(recipe, policy, device, longest_prompt)


def open_for_collection(recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int) -> Generator:
    """`rollout.generator` on every rank with the weights of recipe.model.path, which servers are sent; native, it has
    those of `policy`. Errors as `open_generator`.
    """
    if recipe.rollout.generator != "vllm_server":
        opened: list[Generator] = []
        try:
            world.everywhere(lambda: opened.append(open_for_evaluation(recipe, policy, world.device, longest_prompt)))
        except BaseException:  # another rank's failure is raised here, too
            for each in opened:
                each.close()
            raise
        return opened[0]
    generator = open_generator(recipe, policy, world, longest_prompt)
    try:
        dtype = resolve_dtype(recipe.model.dtype, world.device)
        model = open_sharded_model(recipe.model, world.device, world.mesh, stored=dtype)
        generator.load_weights(DecoderSource(dict(model.named_parameters()), model.config, dtype), 0)
    except BaseException:  # Ctrl-C, too, must leave no process behind
        generator.close()
        raise
    return generator
