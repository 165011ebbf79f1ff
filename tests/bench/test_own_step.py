"""Our side of the CPU benchmark runs: it uses the trainer's own step, so it breaks when that changes."""

import argparse

import pytest

from flashgrpo.bench import own_step
from flashgrpo.bench.cpu_step import make_inputs


@pytest.mark.parametrize(("what", "key"), [("step", "step_s"), ("generate", "ours_s"), ("prefix", "shared_s")])
def test_every_measurement_runs(tmp_path, what, key):
    inputs = make_inputs(tmp_path, prompt_len=4)
    options = argparse.Namespace(
        model=inputs.model, prompts=inputs.prompts, num_prompts=2, group_size=2, max_new_tokens=3, steps=3
    )
    assert all(second > 0 for second in own_step.WHAT[what](options)[key])
