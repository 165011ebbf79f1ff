"""Our side of bench/cpu_step.py: GRPO steps of `flashgrpo train`, every completion forced to its full length.

    python -m flashgrpo.bench.own_step --model DIR --prompts FILE --num-prompts 8 --group-size 8 --max-new-tokens 64

Prints one JSON object: `step_s` (wall seconds of each step after the warm-up, logging included) and `peak_mb`.
`--what generate` times the generator and transformers', `--what prefix` a training step (forward, loss, backward,
update) with the prompt repeated for each of its completions and shared by them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from flashgrpo.bench.peer_trl import WARMUP_STEPS, parse_args, peak_mb, read_prompts, transformers_sampler
from flashgrpo.grpo.data import load_problems
from flashgrpo.grpo.evaluate import open_reward_pool
from flashgrpo.grpo.learner import Learner, Stats, packed_loss
from flashgrpo.grpo.native_generator import NativeGenerator
from flashgrpo.grpo.packing import Completion, Group, build_batch
from flashgrpo.grpo.policy import open_policy
from flashgrpo.grpo.progress import step_bar
from flashgrpo.grpo.recipe import Recipe, build_recipe, recipe_to_toml
from flashgrpo.grpo.rollout import Request, Sampling, sample_seeds
from flashgrpo.grpo.run_folder import RunFolder
from flashgrpo.grpo.sections import ModelSection, TrainSection
from flashgrpo.grpo.train import Trainer
from flashgrpo.grpo.world import open_world
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.batch import PackedBatch


def time_steps(options: argparse.Namespace) -> dict:
    """Wall seconds of each training step after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model": {"path": str(options.model)},
            "data": {"path": str(options.prompts), "answer_column": "prompt", "template": "none", "held_out": 0},
            "rewards": {"functions": ["flashgrpo.bench.peer_trl:even_words"]},
            "rollout": {
                "prompts_per_step": options.num_prompts,
                "group_size": options.group_size,
                "max_new_tokens": options.max_new_tokens,
            },
            "loss": {"preset": "grpo", "kl_coef": 0.0},
            "train": {"steps": options.steps, "token_budget": 1200},
            "run": {"output": str(Path(folder) / "run"), "device": "cpu"},
        }
        recipe = build_recipe(Recipe, values)
        problems, held_out = load_problems(recipe.data, recipe.run.seed)
        seconds = []
        with (
            open_world(recipe) as world,
            open_reward_pool(recipe, problems[0]) as pool,
            RunFolder(recipe.run.output, recipe_to_toml(recipe), resume=False, world=world) as run,
            step_bar("step", 0, options.steps) as bar,
        ):
            trainer = Trainer(recipe, run, world, pool, problems, held_out)
            trainer.sampler.generator.stop_token_ids = []
            run.start()
            for step in range(1, options.steps + 1):
                start = time.perf_counter()
                metrics, _ = trainer.run_step(step, bar)
                seconds.append(time.perf_counter() - start)
                if metrics["length/min"] < options.max_new_tokens:
                    raise RuntimeError(
                        f"a completion ended after {metrics['length/min']:.0f} tokens, wanted full length"
                    )
    return {"step_s": seconds[WARMUP_STEPS:], "peak_mb": peak_mb()}


def time_generate(options: argparse.Namespace) -> dict:
    """Seconds to sample one completion for each of many prompts, by the generator and by transformers, in turns."""
    num_prompts = options.num_prompts * options.group_size
    policy = open_policy(ModelSection(str(options.model)), torch.device("cpu"))
    generator = NativeGenerator(policy.model, [])
    prompts = [policy.tokenizer(text)["input_ids"] for text in read_prompts(options.prompts, num_prompts)]
    requests = [Request(i, prompt, sample_seeds(0, 0, i, 1)) for i, prompt in enumerate(prompts[:num_prompts])]

    def sample() -> None:
        groups = list(generator.generate(requests, Sampling(options.max_new_tokens)))
        assert all(len(group[0].completion_ids) == options.max_new_tokens for group in groups)

    return _in_turns({"transformers": transformers_sampler(options), "ours": sample}, options.steps)


def time_prefix(options: argparse.Namespace) -> dict:
    """Wall seconds of a training step on the same completions, prompt shared and prompt repeated, in turns."""
    policy = open_policy(ModelSection(str(options.model)), torch.device("cpu"))
    vocab_size = policy.model.config.vocab_size
    rng = np.random.default_rng(0)
    texts = read_prompts(options.prompts, options.num_prompts)[: options.num_prompts]
    shared, repeated = [], []
    for number, text in enumerate(texts):
        prompt_ids = policy.tokenizer(text)["input_ids"]
        first = number * options.group_size
        completions = [
            Completion(rng.integers(0, vocab_size, size=options.max_new_tokens), first + i)
            for i in range(options.group_size)
        ]
        shared.append(Group(prompt_ids, completions))
        repeated += [Group(prompt_ids, [completion]) for completion in completions]
    packs = {"repeated": build_batch(repeated), "shared": build_batch(shared)}
    learner = Learner(policy.model, TrainSection(lr=1e-9), total_steps=1)
    advantages = torch.from_numpy(rng.standard_normal(options.num_prompts * options.group_size)).float()
    config = LossConfig.preset("grpo", kl_coef=0.0)

    def loss_of(batch: PackedBatch) -> tuple[torch.Tensor, Stats]:
        own = advantages[batch.sequence_ids]
        return packed_loss(policy.model, batch, config, denominator=float(len(advantages)), advantages=own)

    tokens = {f"{name}_tokens": batch.total_tokens for name, batch in packs.items()}
    steps = {name: partial(learner.update, [batch], loss_of) for name, batch in packs.items()}
    return _in_turns(steps, options.steps) | tokens


def _in_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict:
    """Wall seconds of two runs in turns, so that a slow spell of the machine meets both, without the warm-up.

    `ratio` is the median, over rounds, of the first one's seconds by the second one's.
    """
    seconds: dict[str, list[float]] = {f"{name}_s": [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[f"{name}_s"].append(time.perf_counter() - start)
    timed = {name: values[WARMUP_STEPS:] for name, values in seconds.items()}
    return timed | {"ratio": statistics.median(a / b for a, b in zip(*timed.values(), strict=True))}


WHAT = {"step": time_steps, "generate": time_generate, "prefix": time_prefix}


if __name__ == "__main__":
    options = parse_args(WHAT)
    print(json.dumps(WHAT[options.what](options)))
