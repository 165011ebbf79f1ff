"""Our side of the CPU benchmark runs: it uses the trainer's own step, so it breaks when that changes."""

import argparse

from flashgrpo.bench import own_step
from flashgrpo.bench.cpu_step import make_inputs


def test_the_step_is_timed(tmp_path):
    inputs = make_inputs(tmp_path, prompt_len=4)
    options = argparse.Namespace(
        model=inputs.model, prompts=inputs.prompts, num_prompts=2, group_size=2, max_new_tokens=3, steps=3
    )
    assert all(second > 0 for second in own_step.time_steps(options)["step_s"])
