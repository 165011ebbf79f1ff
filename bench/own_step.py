"""Our side of bench/cpu_step.py: GRPO steps of `flashgrpo train`, every completion forced to its full length.

    python -m flashgrpo.bench.own_step --model DIR --prompts FILE --num-prompts 8 --group-size 8 --max-new-tokens 64

Prints one JSON object: `step_s` (wall seconds of each step after the warm-up, logging included) and `peak_mb`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from flashgrpo.bench.peer_trl import WARMUP_STEPS, parse_args, peak_mb
from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.progress import step_bar
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.stages.evaluate import open_reward_pool
from flashgrpo.grpo.train import Trainer


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
            RunFolder(recipe, resume=False, world=world) as run,
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


if __name__ == "__main__":
    print(json.dumps(time_steps(parse_args())))
