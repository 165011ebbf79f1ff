"""Decoding by the native generator on a fake GPU: kernels of a layer, where the host waits, what a graph would hold."""

import pytest
import torch

from fake_gpu.gpus import fake_gpus, shape
from flashgrpo.grpo.rollout import graph
from flashgrpo.grpo.rollout.generator import sample_seeds
from flashgrpo.grpo.rollout.native import NativeGenerator, _DecodingBatch
from flashgrpo.grpo.types import Request, Sampling

LAYERS = 3


def begin(gpus, model, prompts=3, group_size=4, new_tokens=400, **options):
    """A call of the generator whose prompts are in the cache, and whose first step, which makes room, is done."""
    decoder = gpus.model(shape(model, layers=LAYERS), stored=torch.bfloat16)
    requests = [Request(i, [1] * (50 + i), sample_seeds(0, 0, i, group_size)) for i in range(prompts)]
    generator = NativeGenerator(decoder, [0], **options)
    with torch.inference_mode():
        batch = _DecodingBatch(generator, requests, Sampling(new_tokens))
        batch.step()
    return batch


def steps(batch, times):
    with torch.inference_mode():
        for _ in range(times):
            batch.step()


@pytest.mark.parametrize("model", ["Qwen2.5-1.5B", "Llama-3.1-8B", "Qwen3-4B"])
def test_a_step_waits_once_and_a_layer_is_few_kernels(model):
    with fake_gpus() as gpus:
        batch = begin(gpus, model)
        with gpus.record() as run:
            steps(batch, 1)
    assert run.syncs == {"native.py:step": 1}, run.syncs
    block = run.kernels_per_block["scoring"]
    assert block["triton::_decode_split_kernel"] == block["triton::_decode_sum_kernel"] == 1
    assert block.total() <= 11, block
    assert not [launch for launch in run.launches if launch.misaligned]


def test_neither_growth_nor_rows_that_leave_wait_or_compile():
    """The cache grows after 128 tokens, and random numbers are drawn anew after 64."""
    with fake_gpus() as gpus:
        batch = begin(gpus, "Qwen2.5-1.5B")
        with gpus.record() as before:
            steps(batch, 100)
        with gpus.record() as after:
            steps(batch, 20)
            batch.done[[0, 1, 2, 3, 5, 6]] = True
            with torch.inference_mode():
                batch._drop_idle_rows(torch.ones(12, dtype=torch.int64, device=gpus.device))
                batch.hidden = batch.hidden[:6]  # that of the tokens that are kept, were they run
            steps(batch, 20)
    assert batch.cache.room == 256
    assert len(batch.rows) == 6
    assert after.syncs == {"native.py:step": 40}, after.syncs
    assert after.variants == before.variants


def test_a_graph_holds_all_layers_and_waits_for_nothing():
    """It is captured in the second step of a layout; what it holds is the same at any length."""
    captured = []
    with fake_gpus() as gpus:

        def capture(work):
            with gpus.record() as run:
                result = work()
            captured.append(run)
            return lambda: None, result

        graph.capture = capture
        batch = begin(gpus, "Qwen2.5-1.5B", cuda_graphs=True)
        with gpus.record() as eager:
            steps(batch, 128)  # captures one, and grows
        steps(batch, 1)  # captures another
        with gpus.record() as replayed:
            steps(batch, 1)
    first, second = captured
    assert first.syncs == second.syncs == {}
    assert first.kernels == second.kernels
    assert first.kernels["triton::_decode_split_kernel"] == LAYERS
    assert first.collectives == []
    assert eager.kernels["triton::_decode_split_kernel"] == LAYERS  # of the step that made room
    # Sampling, the copy of tokens, and what goes one further: no number of layers is in it.
    assert "triton::_decode_split_kernel" not in replayed.kernels
    assert replayed.kernels.total() <= 30, replayed.kernels
