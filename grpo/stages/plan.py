"""`flashgrpo plan RECIPE`: whether a recipe fits its GPUs, and how fast it can be, before anything starts.

Reads the recipe and the model's config.json, nothing else; run/costs.py has the arithmetic.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.rewards.rules import check_names
from flashgrpo.grpo.rollout.vllm.launch import auto_generator
from flashgrpo.grpo.run.costs import (
    ATTENTION_SHARE,
    ENGINE_STEP_S,
    FIXED_LOSS,
    GROWING_LOSS,
    LINK_SHARE,
    MATMUL_SHARE,
    MEMORY_SHARE,
    Costs,
    Lengths,
    Parts,
    check_budget,
    settle_budget,
)
from flashgrpo.grpo.run.machines import MACHINES, Machine
from flashgrpo.model.checkpoint import read_config
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import ActivationCheckpointing


@dataclass(frozen=True)
class Setting:
    """What memory can be traded for time by."""

    activation_checkpointing: ActivationCheckpointing
    largest_token_budget: int
    step_s: float  # with it


@dataclass(frozen=True)
class Plan:
    """What `flashgrpo plan` prints; memory is a GPU's, in bytes."""

    num_params: int
    num_gpus: int
    lengths: Lengths
    memory: dict[str, Parts]  # by moment
    available: float
    token_budget: int  # the recipe's, or what is chosen for "auto"
    largest_token_budget: int  # of a micro-batch on a GPU
    sequences: int  # of a rollout, on a GPU
    largest_sequences: int  # of full length, whose keys and values fit at once
    micro_batches: int  # of an update, on a GPU
    seconds: dict[str, float]  # of a step, by phase
    step_s: float
    tokens_per_s_per_gpu: float  # sampled, over the whole step
    mfu: float  # of the training phase, nothing recomputed counted
    generator: str
    chosen_by: str  # why it is that generator, where the recipe has "auto"
    fastest: "Setting"

    @property
    def totals(self) -> Parts:
        return {moment: sum(parts.values()) for moment, parts in self.memory.items()}


def plan_recipe(
    recipe: Recipe,
    num_gpus: int,
    gpu: str = "h200",
    memory_gb: float | None = None,  # of each, in units of 10^9 bytes; None: the GPU's
    prompt: float | None = None,  # mean tokens; None: 256
    response: float | None = None,  # mean tokens; None: a quarter of the limit
) -> Plan:
    """`plan` of the model at model.path. Raises RecipeError also for an unknown GPU, CheckpointError for no model."""
    check_names(recipe)
    if gpu not in MACHINES:
        raise RecipeError(f"--gpu {gpu} is unknown; known are {', '.join(MACHINES)}")
    machine = MACHINES[gpu]
    if memory_gb is not None:
        machine = dataclasses.replace(machine, memory=memory_gb * 1e9)
    longest = recipe.rollout.max_new_tokens
    if response is not None and not 1 <= response <= longest:
        raise RecipeError(f"--response-tokens {response:g}: wanted a mean of 1 to rollout.max_new_tokens = {longest}")
    lengths = Lengths.assumed(recipe, prompt, response)
    why = ""
    if recipe.rollout.generator == "auto":
        name, why = auto_generator(torch.device("cuda"))
        recipe = dataclasses.replace(recipe, rollout=dataclasses.replace(recipe.rollout, generator=name))
    return plan(recipe, read_config(recipe.model.path), machine, num_gpus, lengths, why)


def plan(
    recipe: Recipe, config: ModelConfig, machine: Machine, num_gpus: int, lengths: Lengths, chosen_by: str = ""
) -> Plan:
    """What the recipe needs and how long its step takes.

    Raises RecipeError where it cannot fit, or the ranks of a copy do not divide the GPUs.
    """
    run = Costs(recipe, config, machine, num_gpus, lengths)
    wanted = recipe.train.token_budget
    if wanted != "auto":
        check_budget(wanted, math.ceil(lengths.prompt), lengths.longest)
    budget = settle_budget(run, wanted, lengths.needed)
    memory, seconds = run.memory(budget), run.seconds(budget)
    room = run.cache_bytes
    if run.generator not in ("vllm", "vllm_server"):
        unused = machine.memory - sum(memory["rollout"].values())
        room = memory["rollout"]["KV cache"] + unused / (1 + run.loss_share)
    sampled = recipe.rollout.prompts_per_step * recipe.rollout.group_size * lengths.response
    useful = 3 * recipe.train.epochs * run.flops.forward(run.tokens, run.pairs, run.targets)
    return Plan(
        num_params=run.size.total,
        num_gpus=num_gpus,
        lengths=lengths,
        memory=memory,
        available=machine.memory,
        token_budget=budget,
        largest_token_budget=run.largest_budget(),
        sequences=run.groups_a_rank * recipe.rollout.group_size,
        largest_sequences=int(room / run.kv_bytes / (lengths.longest + lengths.prompt / recipe.rollout.group_size)),
        micro_batches=run.micro_batches(budget),
        seconds=seconds,
        step_s=run.step_s(seconds),
        tokens_per_s_per_gpu=sampled / num_gpus / run.step_s(seconds),
        mfu=useful / seconds["train"] / run.peak_flops,
        generator=run.generator,
        chosen_by=chosen_by,
        fastest=min(_settings(recipe, config, machine, num_gpus, lengths), key=lambda setting: setting.step_s),
    )


def _settings(
    recipe: Recipe, config: ModelConfig, machine: Machine, num_gpus: int, lengths: Lengths
) -> Iterator[Setting]:
    """Every kind of checkpointing that fits, each with its largest packs."""
    for checkpointing in get_args(ActivationCheckpointing):
        model = dataclasses.replace(recipe.model, activation_checkpointing=checkpointing)
        run = Costs(dataclasses.replace(recipe, model=model), config, machine, num_gpus, lengths)
        if (budget := run.choose_budget(lengths.needed)) <= run.largest_budget():
            yield Setting(checkpointing, budget, run.step_s(run.seconds(budget)))


def print_plan(found: Plan) -> None:
    """The tables, to standard output."""
    console, totals = Console(highlight=False), found.totals.values()
    table = Table(title=f"memory of each of {found.num_gpus} GPUs, GB", title_justify="left")
    table.add_column("")
    for moment in found.memory:
        table.add_column(moment, justify="right")
    names: dict[str, None] = {}
    for parts in found.memory.values():  # a part that several moments have is one row
        names |= dict.fromkeys(parts)
    for name in names:
        sizes = [parts.get(name) for parts in found.memory.values()]
        table.add_row(name, *("" if size is None else f"{size / 1e9:,.2f}" for size in sizes))
    table.add_section()
    sizes = (f"[bold]{size / 1e9:,.2f}[/bold]" if size == max(totals) else f"{size / 1e9:,.2f}" for size in totals)
    table.add_row(f"of {found.available / 1e9:,.0f}", *sizes)
    console.print(table)
    step_s, fastest = found.step_s, found.fastest
    shares = ", ".join(f"{phase} {s:,.1f} s ({s / step_s:.0%})" for phase, s in found.seconds.items())
    lengths = found.lengths
    chosen = f" (auto, by what is installed here: {found.chosen_by})" if found.chosen_by else ""
    console.print(
        f"{found.num_params / 1e9:,.2f}B parameters. Token budget: {found.token_budget:,}; the largest that fits is "
        f"{found.largest_token_budget:,}.\n"
        f"Fastest that fits: activation_checkpointing = {fastest.activation_checkpointing} and a token budget of up to "
        f"{fastest.largest_token_budget:,}, {fastest.step_s:,.1f} s a step.\n"
        f"Generator: {found.generator}{chosen}. A rollout has {found.sequences:,} sequences a GPU; of the full "
        f"{lengths.longest:,} tokens {found.largest_sequences:,} would fit at once.\n"
        f"A step takes {step_s:,.1f} s: {shares};\n{found.micro_batches:,} micro-batches an update on every GPU, "
        f"{found.tokens_per_s_per_gpu:,.0f} sampled tokens/s/GPU, training at {found.mfu:.0%} of the peak FLOP/s.\n"
        f"[dim]A prediction. Assumed: prompts of {lengths.prompt:,.0f} tokens; completions of {lengths.response:,.0f} "
        f"on average, the share longer than t being (1 - t/{lengths.longest})^{lengths.tail:.3g}; no group without "
        f"gradient; products at {MATMUL_SHARE:.0%} of peak, attention at {ATTENTION_SHARE:.0%}, memory "
        f"at {MEMORY_SHARE:.0%}, links at {LINK_SHARE:.0%}; {_lost(found)}. "
        "Not counted: rewards, evaluation, checkpoints.[/dim]"
    )


def _lost(found: Plan) -> str:
    """What is assumed of the allocator and of decoding."""
    if found.generator == "native":
        return f"{GROWING_LOSS:.0%} of memory lost between tensors; decoding without CUDA graphs"
    share = FIXED_LOSS if found.generator == "vllm" else GROWING_LOSS
    return f"{share:.0%} of memory lost between tensors; vLLM at {ENGINE_STEP_S * 1e3:g} ms a token or more"
