"""What else runs on GPUs than a GRPO step: SFT, reward models, and weights on their way to a sampler."""

import pytest

from fake_gpu.gpus import fake_gpus, shape


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Llama-3.1-8B"])
def test_sft(model):
    with fake_gpus(world=8) as gpus:
        run = gpus.supervised_step(shape(model, layers=4), checkpointing="selective")
    assert run.kernels_per_block.keys() == {"forward", "backward"}
    # 8,192 targets are two chunks of the head.
    assert run.syncs == {"linear_grpo.py:step": 2, "sft.py:run_step": 1, "sft.py:_measure": 1}, run.syncs


@pytest.mark.parametrize("model", ["Qwen2.5-1.5B", "Qwen3-4B"])
def test_a_reward_model(model):
    with fake_gpus(world=8) as gpus:
        run = gpus.supervised_step(shape(model, layers=4), checkpointing="full", reward_model=True)
    assert run.kernels_per_block.keys() == {"forward", "backward"}
    own = {"reward_model.py:_shared": 1, "reward_model.py:_measure": 2}  # signs to the device; scores and signs back
    assert run.syncs == own | {"sft.py:run_step": 1}, run.syncs


@pytest.mark.parametrize("reward_model", [False, True], ids=["sft", "reward model"])
def test_a_rank_without_a_row_takes_part_in_every_collective(reward_model):
    seen = []
    for rank in (0, 7):
        with fake_gpus(world=8, rank=rank) as gpus:
            config = shape("Qwen2.5-0.5B", layers=2)
            seen.append(gpus.supervised_step(config, 2048, reward_model=reward_model, packs=3))  # of a row each
    full, empty = seen
    assert full.kernels["triton::_attention_fwd_kernel"] > 0 == empty.kernels["triton::_attention_fwd_kernel"]
    assert full.collectives == empty.collectives


@pytest.mark.parametrize(("model", "world"), [("Qwen2.5-1.5B", 8), ("Qwen2.5-7B", 64), ("Qwen2.5-0.5B", 48)])
def test_a_sampler_gets_the_tensors_it_was_told_of(model, world):
    """At 48 ranks no dimension of 896 is shared equally."""
    with fake_gpus(world) as gpus:
        run, wrong = gpus.weight_source(shape(model, layers=2))
    assert wrong == [], wrong
    assert run.syncs.keys() == {"sync.py:_next_on_default_stream"}, run.syncs
