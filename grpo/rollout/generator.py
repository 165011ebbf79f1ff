"""Generators: what one is asked for and gives back, the seeds that make every sample its own, and how one is opened.

A sample's random numbers depend on (seed, step, prompt, sample) alone: not on rank, batch position or what else is
generated beside it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Protocol, TypeVar

import numpy as np

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import CollectRecipe, Recipe, SamplingRecipe
from flashgrpo.grpo.rollout.native import PREFILL_TOKENS, NativeGenerator, splitmix64
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.rollout.vllm.launch import auto_generator
from flashgrpo.grpo.run.ledger import begun_with
from flashgrpo.grpo.run.machines import resolve_dtype
from flashgrpo.grpo.run.policy import Policy, open_sharded_model, warn_beyond_context
from flashgrpo.grpo.run.progress import say
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.model.checkpoint import empty_decoder

_R = TypeVar("_R", Recipe, CollectRecipe)


class Generator(Protocol):
    """Native or vLLM. `weight_version` is that of the weights it would sample from; -1: it holds none."""

    weight_version: int
    stop_token_ids: list[int]

    def load_weights(self, source: DecoderSource, version: int) -> None:
        """Sample from these weights from now on; on several ranks, all call it."""
        ...

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each group as soon as its last completion is done, in any order."""
        ...

    def free_weights(self) -> None:
        """Give the memory that training needs back until the next `load_weights`."""
        ...

    def close(self) -> None:
        """End what runs for it."""
        ...


def settle_generator(recipe: _R, world: World, resume: bool = False) -> _R:
    """The recipe with a generator in place of "auto", which is told; with `resume` the one that the run has. Raises
    RecipeError for a transport of weights that is another generator's, and for kept sets that it does not tell.
    """
    name, device = recipe.rollout.generator, world.device.type
    if recipe.vllm.weight_transfer != "auto" and (name, device) != ("vllm_server", "cuda"):
        wanted = f"vllm.weight_transfer = {recipe.vllm.weight_transfer} wants rollout.generator = vllm_server on CUDA"
        raise RecipeError(f"{wanted}, found {name} on {device}")
    if device == "cpu" and name in ("vllm", "vllm_server") and isinstance(recipe, Recipe):
        recipe.check_kept_sets()  # vLLM has them by its Model Runner V2, on GPUs alone
    if name != "auto":
        return recipe
    # One rank decides for all: they must not differ, and their machines may.
    name = world.on_main(lambda: begun_with(recipe, "rollout", "generator") if resume else None)
    why = "as when the run began"
    if name not in ("native", "vllm"):
        name, why = world.on_main(lambda: auto_generator(world.device))
    if world.device.type == "cuda":  # a CPU's run has no choice
        say(f"generator: {name} ({why})")
    return dataclasses.replace(recipe, rollout=dataclasses.replace(recipe.rollout, generator=name))


def open_generator(
    recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int, loaded: bool = False
) -> Generator:
    """`rollout.generator`, for prompts of up to `longest_prompt` tokens; all ranks of `world` call it.

    A run loads its own weights before each use. `loaded`: it has those of recipe.model.path already; native, it samples
    from `policy` itself. Raises RecipeError and RunInputError, where vLLM does not fit the recipe.
    """
    warn_beyond_context(policy, longest_prompt + recipe.rollout.max_new_tokens)
    name = recipe.rollout.generator
    if name == "auto":  # in no run, which settles it before its folder is opened
        name, _ = auto_generator(world.device)
    if name == "native":
        budget = recipe.train.token_budget if isinstance(recipe, Recipe) else PREFILL_TOKENS
        if budget == "auto":  # outside of a run, which has settled it
            budget = PREFILL_TOKENS
        options = policy.stop_token_ids, world.device, budget, recipe.rollout.cuda_graphs
        if loaded:
            return NativeGenerator(policy.model, *options)
        dtype = resolve_dtype(recipe.model.dtype, world.device)
        own = NativeGenerator(empty_decoder(policy.model.config, dtype, world.device), *options)
        own.model.attention_backend = recipe.model.attention_backend
        own.free_weights()
        return own

    from flashgrpo.grpo.rollout.vllm.generator import open_engine, open_servers

    if name == "vllm":
        return open_engine(recipe, policy, world, longest_prompt, loaded)
    with ExitStack() as opened:
        generator = opened.enter_context(closing(open_servers(recipe, policy, world, longest_prompt)))
        if loaded:
            dtype = resolve_dtype(recipe.model.dtype, world.device)
            model = open_sharded_model(recipe.model, world.device, world.mesh, stored=dtype)
            generator.load_weights(DecoderSource(dict(model.named_parameters()), model.config, dtype), 0)
        # From here on it is the caller's to close; up to here nothing, not even Ctrl-C, may leave servers behind.
        opened.pop_all()
    return generator


def sample_seeds(seed: int, step: int, prompt: int, num_samples: int) -> np.ndarray:
    """Seeds of a prompt's samples, [num_samples] uint64, by splitmix64 over the four numbers."""
    state = np.full(num_samples, seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for part in (step, prompt, np.arange(num_samples, dtype=np.uint64)):
        state = splitmix64(state ^ splitmix64(np.asarray(part).astype(np.uint64)))
    return state
