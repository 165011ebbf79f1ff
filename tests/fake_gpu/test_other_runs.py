"""What else runs on GPUs than a GRPO step: SFT, reward models, and weights on their way to a sampler."""

import pytest

from fake_gpu.gpus import fake_gpus, shape


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Llama-3.1-8B"])
def test_sft(model):
    with fake_gpus(world=8) as gpus:
        run = gpus.supervised_step(shape(model, layers=4), checkpointing="selective")
    assert run.kernels_per_block.keys() == {"forward", "backward"}
    assert run.syncs.keys() == {"linear_grpo.py:step", "sft.py:run_step", "sft.py:_measure"}, run.syncs


@pytest.mark.parametrize("model", ["Qwen2.5-1.5B", "Qwen3-4B"])
def test_a_reward_model(model):
    with fake_gpus(world=8) as gpus:
        run = gpus.supervised_step(shape(model, layers=4), checkpointing="full", reward_model=True)
    assert run.kernels_per_block.keys() == {"forward", "backward"}
    assert run.syncs.keys() == {"reward_model.py:_shared", "reward_model.py:_measure", "sft.py:run_step"}, run.syncs


@pytest.mark.parametrize(("model", "world"), [("Qwen2.5-1.5B", 8), ("Qwen2.5-7B", 64), ("Qwen2.5-0.5B", 48)])
def test_a_sampler_gets_the_tensors_it_was_told_of(model, world):
    """At 48 ranks no dimension of 896 is shared equally."""
    with fake_gpus(world) as gpus:
        run, wrong = gpus.weight_source(shape(model, layers=2))
    assert wrong == [], wrong
    assert run.syncs.keys() == {"sync.py:_next_on_default_stream"}, run.syncs
