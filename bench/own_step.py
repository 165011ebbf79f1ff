"""Our side of cpu_step.py: GRPO steps of `flashgrpo train`, every completion forced to its full length.

Called as peer_trl.py is. Prints one JSON object: `step_s` (wall seconds of each step after the
warm-up, logging included) and `peak_mb`.
"""

import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flashgrpo.bench.peer_trl import WARMUP_STEPS, peak_mb, read_settings
from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rewards.pool import open_reward_pool
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.progress import step_bar
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.train import Trainer


def time_steps(settings: SimpleNamespace) -> dict[str, Any]:
    """Wall seconds of each training step after the warm-up."""
    sizes = {"group_size": settings.group_size, "max_new_tokens": settings.max_new_tokens}
    values = {
        "model": {"path": settings.model},
        "data": {"path": settings.prompts, "answer_column": "prompt", "template": "none", "held_out": 0},
        "rewards": {"functions": ["flashgrpo.bench.peer_trl:even_words"]},
        "rollout": {"prompts_per_step": settings.num_prompts, **sizes},
        "loss": {"preset": "grpo", "kl_coef": 0.0},
        "train": {"steps": settings.steps, "token_budget": 1200},
    }
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = build_recipe(Recipe, values | {"run": {"output": str(Path(folder) / "run"), "device": "cpu"}})
        problems, held_out = load_problems(recipe.data, recipe.run.seed)
        with (
            open_world(recipe) as world,
            open_reward_pool(recipe, problems[0]) as pool,
            RunFolder(recipe, resume=False, world=world) as run,
            step_bar("step", 0, settings.steps) as bar,
        ):
            trainer = Trainer(recipe, run, world, pool, problems, held_out)
            # Nothing ends a completion before its full length, as `min_new_tokens` does on TRL's side.
            trainer.sampler.generator.stop_token_ids = []
            run.start()
            for step in range(1, settings.steps + 1):
                # The step's log line is part of it, as it is on TRL's side.
                start = time.perf_counter()
                metrics, _ = trainer.run_step(step, bar)
                seconds.append(time.perf_counter() - start)
                if metrics["length/min"] < settings.max_new_tokens:
                    raise RuntimeError(
                        f"a completion ended after {metrics['length/min']:.0f} tokens, wanted full length"
                    )
    return {"step_s": seconds[WARMUP_STEPS:], "peak_mb": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(time_steps(read_settings())))
