"""The embedded generator: right distribution, right log-probs, the same samples whatever is generated beside them."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from flashgrpo.grpo.learn.packing import Group, build_batch
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rollout import graph, kv_cache, native
from flashgrpo.grpo.rollout.generator import open_generator, sample_seeds
from flashgrpo.grpo.rollout.kv_cache import KernelCache, TorchCache
from flashgrpo.grpo.rollout.native import NativeGenerator, sample_tokens
from flashgrpo.grpo.run.policy import open_policy
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.kernels.linear_grpo import linear_logprobs
from flashgrpo.model.batch import gather_predictors
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig

STOP = 3


@pytest.fixture(scope="module")
def model():
    config = {
        "model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    }  # fmt: skip
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
        (4, Sampling(80, 0.7)),
        (1, Sampling(80)),
        (4, Sampling(80, 0.7, top_p=0.6, kept_limit=64)),
        (4, Sampling(80, 0.7, top_p=0.6, kept_limit=4)),
        (1, Sampling(80, top_k=40, kept_limit=64)),
        (1, Sampling(80, top_k=40)),
        (4, Sampling(80, top_k=1000, kept_limit=1000)),
        (1, Sampling(12, temperature=0)),
    ],
)
def test_completions_end_as_they_say_and_their_logprobs_are_the_models_own(model, group_size, sampling):
    """Over the set that was drawn from, where that is told, and else over the whole vocabulary. At temperature 0 the
    likeliest token is taken, and the log-probs are the model's.
    """
    groups = generate(model, requests(20 // group_size, group_size), sampling)
    rollouts = [rollout for group in groups.values() for rollout in group]
    if sampling.temperature:
        assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ids = rollout.completion_ids
        assert STOP not in ids[:-1]
        assert rollout.finish_reason == ("stop" if ids[-1] == STOP else "length")
        assert len(ids) == sampling.max_new_tokens or rollout.finish_reason == "stop"
        batch = build_batch([Group.of([rollout])])
        with torch.no_grad():
            hidden = gather_predictors(model(batch), batch)
            options = {"temperature": sampling.temperature or 1.0, "kept": batch.kept}
            logprobs, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets, **options)
        np.testing.assert_allclose(rollout.behavior_logprobs, logprobs.numpy(), atol=1e-4)
        if sampling.kept_limit:
            assert rollout.kept_counts is not None
            assert rollout.kept_ids is not None
            assert rollout.kept_counts.max() <= sampling.kept_limit
            assert len(rollout.kept_ids) == rollout.kept_counts.sum()
        else:
            assert rollout.kept_counts is rollout.kept_ids is None
        if sampling.temperature == 0:
            assert (hidden @ model.lm_head_weight.T).argmax(1).tolist() == ids.tolist()


def test_a_sample_does_not_depend_on_what_is_beside_it(model):
    """Across the position where new random numbers are drawn, and while other rows and whole groups leave the batch."""
    asked = requests(8, 2)
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
    read = []

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.baddbmm and args[0].shape[1] == 1:  # scores of prompts' tokens, over a bias
                read.append(len(args[2]) // model.config.num_kv_heads)
            return func(*args, **(kwargs or {}))

    with Reads():
        groups = generate(model, requests(16, 2), Sampling(200)).values()
    lengths = [max(len(rollout.completion_ids) for rollout in group) for group in groups]
    assert len(read) == (max(lengths) - 1) * model.config.num_layers  # the first token comes from the prompt's pass
    for position, prompts in enumerate(read[:: model.config.num_layers], start=1):
        live = sum(length > position for length in lengths)
        assert live <= prompts <= live * 8 / 7 + 2
    assert read[-1] < 16


@pytest.mark.parametrize("group_size", [1, 4])
def test_prompts_are_run_in_passes_of_whole_prompts(model, group_size, monkeypatch):
    """All in one pass, 64 prompts of 2,048 tokens take 19 GB of a GPU with a 7B model beside its weights."""
    passes = []
    run = type(model).run

    def watched(self, input_ids, *arguments):
        passes.append(len(input_ids))
        return run(self, input_ids, *arguments)

    monkeypatch.setattr(type(model), "run", watched)
    asked = requests(9, group_size)
    asked[3] = Request(3, [*range(4, 34)], asked[3].seeds)  # longer than a pass
    generator = NativeGenerator(model, [STOP], prefill_tokens=20)
    list(generator.generate(asked, Sampling(1)))  # the first token needs no other pass
    lengths = [len(request.prompt_ids) for request in asked]
    assert sum(passes) == sum(lengths)
    assert 30 in passes
    assert max(tokens for tokens in passes if tokens != 30) <= 20

    whole = generate(model, asked, Sampling(40))
    for group in generator.generate(asked, Sampling(40)):
        for a, b in zip(group, whole[group[0].group], strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, atol=1e-5)


@pytest.mark.parametrize("loaded", [True, False])
def test_passes_of_prompts_and_graphs_are_the_recipes(recipe_values, loaded):
    recipe_values["rollout"]["cuda_graphs"] = True
    recipe = build_recipe(Recipe, recipe_values)
    with open_world(recipe) as world:
        generator = open_generator(recipe, open_policy(recipe.model, world.device), world, 8, loaded)
    assert generator.prefill_tokens == recipe.train.token_budget == 256
    assert generator.cuda_graphs


def use_kernel_cache(monkeypatch):
    """What CUDA takes; here `decode_attention` is its torch twin."""
    caches = []

    def open_cache(model, *arguments):
        weight = model.lm_head_weight
        caches.append(KernelCache(model.config, weight.dtype, weight.device, *arguments))
        return caches[-1]

    monkeypatch.setattr(native, "open_cache", open_cache)
    return caches


@pytest.mark.parametrize("sizes", [[4, 1, 3, 2, 4], [1] * 6], ids=["groups", "single completions"])
def test_both_caches_make_the_same_samples(model, sizes, monkeypatch):
    """While the kernel's grows, and rows and groups leave in between."""
    asked = [
        Request(request.group, request.prompt_ids, request.seeds[:size])
        for request, size in zip(requests(len(sizes), 4, seed=5), sizes, strict=True)
    ]
    by_torch = generate(model, asked, Sampling(300))
    caches = use_kernel_cache(monkeypatch)
    ours = generate(model, asked, Sampling(300))
    assert caches[0].room >= 256
    assert len(caches[0].place) < sum(sizes)
    for index, group in by_torch.items():
        for a, b in zip(group, ours[index], strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("head_dim", "backend", "kind"),
    [
        (16, "triton", KernelCache),
        (16, "flash_attn", KernelCache),
        (16, "torch", TorchCache),
        (24, "triton", TorchCache),
    ],
)
def test_what_no_kernel_takes_is_left_to_torch(model, head_dim, backend, kind, monkeypatch):
    monkeypatch.setattr(kv_cache, "by_triton", lambda x: True)
    config = dataclasses.replace(model.config, head_dim=head_dim)
    decoder = SimpleNamespace(config=config, attention_backend=backend, lm_head_weight=model.lm_head_weight)
    assert type(kv_cache.open_cache(decoder, [3], np.zeros(2, int), 5)) is kind


SAMPLES = """
import json

import numpy as np
from flashgrpo.grpo.rollout.kv_cache import KernelCache
from flashgrpo.grpo.rollout.native import NativeGenerator, _DecodingBatch
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig

model = init_decoder(ModelConfig.from_dict({config}), seed=0)
asked = [Request(i, [5 + i] * (4 + i), np.arange(3, dtype=np.uint64) + i) for i in range(2)]
generator = NativeGenerator(model, [3])
assert {is_kernel} == isinstance(_DecodingBatch(generator, asked, Sampling(1)).cache, KernelCache)
for group in sorted(generator.generate(asked, Sampling(10)), key=lambda group: group[0].group):
    for rollout in group:
        print(json.dumps([rollout.completion_ids.tolist(), rollout.behavior_logprobs.tolist()]))
"""


def test_the_kernels_sample_what_torch_samples(capsys):
    """The whole generator once by torch's operators, and once by its kernels, in Triton's interpreter."""
    config = {
        "model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    }  # fmt: skip
    exec(SAMPLES.format(config=config, is_kernel=False), {})
    code, env = SAMPLES.format(config=config, is_kernel=True), os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    by_torch, ours = ([*map(json.loads, text.splitlines())] for text in (capsys.readouterr().out, ran.stdout))
    assert len(by_torch) == 6
    for (tokens, logprobs), (our_tokens, our_logprobs) in zip(by_torch, ours, strict=True):
        assert our_tokens == tokens
        np.testing.assert_allclose(our_logprobs, logprobs, atol=1e-5)


def test_the_kernels_cache_has_one_shape_for_128_steps_and_copies_only_when_it_grows(model, monkeypatch):
    caches, seen = use_kernel_cache(monkeypatch), []
    attend = KernelCache.attend

    def watched(self, layer, *qkv):
        seen.append((self.own[layer][0].data_ptr(), self.own[layer][0].shape[1]))
        return attend(self, layer, *qkv)

    monkeypatch.setattr(KernelCache, "attend", watched)
    list(NativeGenerator(model, []).generate(requests(2, 2), Sampling(300)))
    steps = seen[:: model.config.num_layers]
    assert [room for _, room in steps] == [128] * 128 + [256] * 128 + [384] * 43
    assert len({pointer for pointer, _ in steps}) == 3
    assert [keys.shape[0] for keys, _ in caches[0].prompts] == [sum(len(r.prompt_ids) for r in requests(2, 2))] * 3


def test_replayed_steps_make_the_same_samples(model, monkeypatch):
    """With a graph that runs its work again, where CUDA would replay its kernels; capturing one runs nothing."""
    captured, replayed = [], []

    def capture(work):
        result = torch.full((len(caches[-1].place), model.config.hidden_size), torch.nan)
        captured.append(caches[-1].rows)

        def replay():
            replayed.append(caches[-1].rows)
            result.copy_(work())

        return replay, result

    asked = requests(6, 4)
    caches = use_kernel_cache(monkeypatch)
    plain = generate(model, asked, Sampling(150))
    monkeypatch.setattr(graph, "capture", capture)
    for group in NativeGenerator(model, [STOP], cuda_graphs=True).generate(asked, Sampling(150)):
        for a, b in zip(group, plain[group[0].group], strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            assert a.behavior_logprobs.tolist() == b.behavior_logprobs.tolist()
    assert 4 < len(captured) < 20  # rows left, and the cache grew
    assert len(replayed) > 100
    assert {id(rows) for rows in replayed} == {id(rows) for rows in captured}


def test_samples_of_a_group_differ_and_repeat_with_their_seeds(model):
    first, again = (generate(model, requests(2, 8), Sampling(20))[0] for _ in range(2))
    texts = [tuple(r.completion_ids) for r in first]
    long = [text for text in texts if len(text) > 3]
    assert len(set(long)) == len(long) > 3
    assert texts == [tuple(r.completion_ids) for r in again]


def test_groups_may_differ_in_size_be_none_and_have_one_token(model):
    asked = requests(3, 4)
    asked[1] = Request(1, asked[1].prompt_ids, sample_seeds(0, 0, 1, 1))
    assert {index: len(group) for index, group in generate(model, asked, Sampling(10)).items()} == {0: 4, 1: 1, 2: 4}
    assert generate(model, [], Sampling(5)) == {}
    assert [len(r.completion_ids) for r in generate(model, requests(1, 2), Sampling(1))[0]] == [1, 1]


def test_sampling_follows_the_softmax_and_stays_inside_the_vocabulary():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, float("-inf")]).expand(40_000, -1)
    uniforms = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs, counts, kept_ids = sample_tokens(logits, uniforms, Sampling(1, temperature=0.8))
    wanted = torch.softmax(logits[0] / 0.8, 0)
    shares = torch.bincount(tokens, minlength=5) / 40_000
    torch.testing.assert_close(shares, wanted, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, wanted.log()[tokens])
    assert (counts == 0).all()
    assert kept_ids.shape == (40_000, 0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    middle = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    assert sample_tokens(middle, ends, Sampling(1))[0].tolist() == [1, 1]


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
    logits = probs.log().expand(4001, -1)
    for limit, told in ((4, True), (len(kept), True), (len(kept) - 1, False)):
        limited = dataclasses.replace(sampling, kept_limit=limit)
        tokens, logprobs, counts, kept_ids = sample_tokens(logits, uniforms, limited)
        assert set(tokens.tolist()) == set(kept)
        mass = probs[kept].sum() if told else 1.0
        torch.testing.assert_close(logprobs.exp(), (probs / mass)[tokens])
        assert (counts == (len(kept) if told else 0)).all()
        assert not told or (kept_ids[:, : len(kept)] == torch.tensor(kept)).all()
        assert kept_ids.shape[1] <= limit


def test_a_token_is_of_its_set_where_sums_of_probabilities_do_not_rise():
    """As of a GPU's, which are made in parallel. The log-prob of a token that its set lacks would be NaN."""

    class Parallel(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            sums = func(*args, **(kwargs or {}))
            if func is torch.Tensor.cumsum and sums.dtype == torch.float32:
                sums[:, 5::2] += 0.003
            return sums

    probs = torch.cat([torch.tensor([0.9]), torch.full((100,), 0.001)])
    uniforms = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    with Parallel():
        sampling = Sampling(1, top_p=0.95, kept_limit=100)
        tokens, _, counts, kept_ids = sample_tokens(probs.log().expand(4001, -1), uniforms, sampling)
    is_kept = torch.arange(kept_ids.shape[1]) < counts[:, None]
    assert ((kept_ids == tokens[:, None]) & is_kept).any(1).all()


def test_seeds_differ_in_every_argument():
    seeds = {int(s) for args in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)] for s in sample_seeds(*args, 16)}
    assert len(seeds) == 64
