"""Our side of cpu_step.py: GRPO steps of `flashgrpo train`, every completion forced to its full length.

Called as peer_trl.py is. Prints one JSON object: `step_s` (wall seconds of each step after the
warm-up, logging included) and `peak_mb`.
"""

import itertools
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from flashgrpo.bench.peer_trl import WARMUP_STEPS, peak_mb, read_settings
from flashgrpo.grpo import train as training
from flashgrpo.grpo.recipe.load import Recipe, build_recipe


def time_steps(settings: SimpleNamespace) -> dict[str, Any]:
    """Wall seconds of each training step after the warm-up."""
    times: list[float] = []
    peaks: list[float] = []

    class TimedTrainer(training.Trainer):
        def run_step(self, step: int, bar: Any) -> Any:
            # Nothing ends a completion before its full length, as `min_new_tokens` does on TRL's side.
            generator: Any = self.sampler.generator
            generator.stop_token_ids = []
            # Between two notes lie a step and a log line, as on TRL's side.
            times[:] = times or [time.perf_counter()]
            metrics, values = super().run_step(step, bar)
            times.append(time.perf_counter())
            peaks.append(peak_mb())  # before a final model is written, which TRL's side does not
            shortest = metrics["length/min"]
            if shortest < settings.max_new_tokens:
                raise RuntimeError(f"a completion ended after {shortest:.0f} tokens, wanted full length")
            return metrics, values

    sizes = {"group_size": settings.group_size, "max_new_tokens": settings.max_new_tokens}
    values = {
        "model": {"path": settings.model},
        "data": {"path": settings.prompts, "answer_column": "prompt", "template": "none", "held_out": 0},
        "rewards": {"functions": ["flashgrpo.bench.peer_trl:even_words"]},
        "rollout": {"prompts_per_step": settings.num_prompts, **sizes},
        "loss": {"preset": "grpo", "kl_coef": 0.0},
        "train": {"steps": settings.steps},
    }
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(training, "Trainer", TimedTrainer):
        output = {"run": {"output": str(Path(folder) / "run"), "device": "cpu"}}
        training.train(build_recipe(Recipe, values | output))
    seconds = [end - begin for begin, end in itertools.pairwise(times)]
    return {"step_s": seconds[WARMUP_STEPS:], "peak_mb": peaks[-1]}


if __name__ == "__main__":
    print(json.dumps(time_steps(read_settings())))
