"""The embedded generator: right distribution, right log-probs, the same samples whatever is generated beside them."""

import numpy as np
import pytest
import torch

from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.rollout.generator import sample_seeds
from flashgrpo.grpo.rollout.native import NativeGenerator, _DecodingBatch, sample_tokens
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.kernels.linear_grpo import linear_logprobs
from flashgrpo.model.batch import gather_predictors
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig

STOP = 3


@pytest.fixture(scope="module")
def model():
    config = {
        "model_type": "qwen3",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    return init_decoder(ModelConfig.from_dict(config), seed=0)


def requests(num: int, group_size: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(4, 61, size=int(length)).tolist() for length in rng.integers(1, 12, size=num)]
    return [Request(i, prompt, sample_seeds(seed, 0, i, group_size)) for i, prompt in enumerate(prompts)]


def generate(model, asked, sampling):
    groups = list(NativeGenerator(model, [STOP]).generate(asked, sampling))
    return {group[0].group: group for group in groups}


@pytest.mark.parametrize(
    ("group_size", "sampling"),
    [
        (4, Sampling(80)),
        (4, Sampling(80, 0.7)),
        (1, Sampling(80)),
        (4, Sampling(80, 0.7, top_p=0.6)),
        (4, Sampling(80, top_k=40)),
        (1, Sampling(80, top_k=1000)),
    ],
)
def test_logprobs_to_compare_are_the_models_own(model, group_size, sampling):
    """Those that a truncated sampler reports are of what it kept; the trainer's are of the whole vocabulary."""
    groups = generate(model, requests(20 // group_size, group_size), sampling)
    rollouts = [rollout for group in groups.values() for rollout in group]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        batch = build_batch([Group(rollout.prompt_ids, [Completion(rollout.completion_ids, 0)])])
        with torch.no_grad():
            hidden = gather_predictors(model(batch), batch)
            logprobs, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets, temperature=sampling.temperature)
        np.testing.assert_allclose(rollout.comparable_logprobs, logprobs.numpy(), atol=1e-4)
        if 0 < sampling.top_k < 61 or sampling.top_p < 1:
            assert (rollout.behavior_logprobs > logprobs.numpy() + 1e-3).any()


def test_completions_end_at_the_stop_token_or_the_limit(model):
    for group in generate(model, requests(6, 4), Sampling(40)).values():
        for r in group:
            assert STOP not in r.completion_ids[:-1]
            assert r.finish_reason == ("stop" if r.completion_ids[-1] == STOP else "length")
            assert len(r.completion_ids) == 40 or r.finish_reason == "stop"
            assert len(r.behavior_logprobs) == len(r.completion_ids)


def test_a_sample_does_not_depend_on_what_is_beside_it(model):
    """Across the position where new random numbers are drawn, and while other rows and whole groups leave the batch."""
    asked = requests(12, 2)
    together = generate(model, asked, Sampling(90))
    lengths = sorted(max(len(r.completion_ids) for r in group) for group in together.values())
    assert lengths[0] < 64 < lengths[-1]
    for request in asked:
        alone = generate(model, [request], Sampling(90))[request.group]
        for a, b in zip(alone, together[request.group], strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, atol=1e-5)


def test_rows_outlive_their_finished_groups(model):
    """Rows leave in few numbers, so that some stay idle; the prompt of an idle row's group must stay with it."""
    generator = NativeGenerator(model, list(range(3, 13)))
    for seed in range(2, 13):
        assert len(list(generator.generate(requests(40, 1, seed), Sampling(60)))) == 40


def test_prompts_of_finished_groups_are_no_longer_read(model):
    """They would cost attention and memory up to the end of the longest completion."""
    with torch.inference_mode():
        batch = _DecodingBatch(model, requests(16, 2), Sampling(200), [STOP])
        while batch.has_live_rows:
            batch.step()
            if batch.has_live_rows:
                live = len(np.unique(batch.group_of_row[batch.rows]))
                num_kv_heads = model.config.num_kv_heads
                assert len(batch.prompt_cache[0][0]) == len(batch.groups) * num_kv_heads
                assert len(batch.groups) <= live * 8 / 7 + 1
    assert len(batch.groups) < 16


def test_samples_of_a_group_differ_and_repeat_with_their_seeds(model):
    first = generate(model, requests(2, 8), Sampling(20))
    again = generate(model, requests(2, 8), Sampling(20))
    texts = [tuple(r.completion_ids) for r in first[0]]
    long = [text for text in texts if len(text) > 3]
    assert len(set(long)) == len(long) > 3
    assert texts == [tuple(r.completion_ids) for r in again[0]]


def test_groups_may_differ_in_size(model):
    asked = requests(3, 4)
    asked[1] = Request(1, asked[1].prompt_ids, sample_seeds(0, 0, 1, 1))
    assert {index: len(group) for index, group in generate(model, asked, Sampling(10)).items()} == {0: 4, 1: 1, 2: 4}


def test_greedy_takes_the_likeliest_token(model):
    rollout = generate(model, requests(1, 1), Sampling(6, temperature=0))[0][0]
    ids = list(rollout.prompt_ids)
    for token in rollout.completion_ids:
        batch = build_batch([Group(ids, [Completion(np.array([0]), 0)])])
        with torch.no_grad():
            logits = gather_predictors(model(batch), batch) @ model.lm_head_weight.T
        assert int(logits.argmax()) == token
        ids.append(int(token))


def test_no_requests_and_one_token(model):
    assert generate(model, [], Sampling(5)) == {}
    assert [len(r.completion_ids) for r in generate(model, requests(1, 2), Sampling(1))[0]] == [1, 1]


def test_sampling_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, float("-inf")]).expand(40_000, -1)
    uniforms = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs, kept = sample_tokens(logits, uniforms, Sampling(1, temperature=0.8))
    wanted = torch.softmax(logits[0] / 0.8, 0)
    shares = torch.bincount(tokens, minlength=5) / 40_000
    torch.testing.assert_close(shares, wanted, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, wanted.log()[tokens])
    assert (kept == 0).all()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1, top_k=2), [2, 0]),
        (Sampling(1, top_p=0.6), [2, 0]),  # 0.5 is not enough, 0.5 + 0.3 is
        (Sampling(1, top_p=0.49), [2]),
        (Sampling(1, top_k=3, top_p=0.6), [2, 0]),
        (Sampling(1, top_p=1e-6), [2]),
    ],
)
def test_truncated_sampling_renormalises_and_tells_what_it_kept(sampling, kept):
    probs = torch.tensor([0.3, 0.15, 0.5, 0.05])
    uniforms = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    tokens, logprobs, mass = sample_tokens(probs.log().expand(4001, -1), uniforms, sampling)
    assert set(tokens.tolist()) == set(kept)
    torch.testing.assert_close(logprobs.exp(), (probs / probs[kept].sum())[tokens])
    torch.testing.assert_close(mass.exp(), probs[kept].sum().expand(4001))


def test_extreme_uniforms_stay_inside_the_vocabulary():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    tokens, *_ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), Sampling(1))
    assert tokens.tolist() == [1, 1]


def test_seeds_differ_in_every_argument():
    seeds = {int(s) for args in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)] for s in sample_seeds(*args, 16)}
    assert len(seeds) == 64
