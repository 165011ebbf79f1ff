"""The real vLLM on the CPU, in a process beside the trainer's: its log-probs are the trainer's, whatever the weights
become; and what a person is told when it cannot go on.
"""

import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch

from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, SyncError
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rollout.generator import open_generator, sample_seeds
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.folder import newest_checkpoint, read_rows
from flashgrpo.grpo.run.policy import open_policy, open_sharded_model
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.train import train
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.kernels.linear_grpo import linear_logprobs
from flashgrpo.model.batch import gather_predictors
from flashgrpo.model.decoder import Decoder

pytestmark = pytest.mark.xdist_group("vllm")
BOUND = 1e-5  # of an fp32 log-prob
SIZES = {"hidden_size": 64, "head_dim": 32}  # vLLM's attention on a CPU wants heads of 32
MODELS = {
    "qwen3-tied": {},
    "qwen2": {"model_type": "qwen2", "vocab_size": 112},  # its tokenizer has a token of its own
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
}
TIMING = ("time/", "tokens_per_s", "tflops", "idle", "memory/", "sync/")


@pytest.fixture
def vllm_recipe(recipe_values, custom_rewards, make_model):
    """make(model, **sections) -> a recipe that samples with vLLM."""

    def make(model: str = "qwen3-tied", **sections) -> Recipe:
        values = {**recipe_values, "model": {"path": str(make_model(**SIZES, **MODELS[model]))}}
        values["rollout"] = values["rollout"] | {"generator": "vllm"}
        values["vllm"] = {"kv_cache_gb": 0.05, "sync_timeout_s": 60}
        return build_recipe(Recipe, {k: v | sections.get(k, {}) for k, v in values.items()})

    return make


@pytest.fixture(scope="module")
def opened(make_model):
    """(the trainer's model, a generator with its weights, their source); for all tests that leave it alive."""
    values = {
        "model": {"path": str(make_model(**SIZES))},
        "data": {"path": "none"},
        "rollout": {"generator": "vllm", "max_new_tokens": 20},
        "vllm": {"kv_cache_gb": 0.05, "sync_timeout_s": 60},
        "run": {"output": "none", "device": "cpu"},
    }
    recipe = build_recipe(Recipe, values)
    with open_world(recipe) as world:
        model = open_sharded_model(recipe.model, world.device, world.mesh)
        generator = open_generator(recipe, open_policy(recipe.model, world.device, model), world, longest_prompt=16)
        source = DecoderSource(dict(model.named_parameters()), model.config, torch.float32)
    yield model, generator, source
    generator.close()


def requests(num_prompts: int = 6, num_samples: int = 4) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 90, rng.integers(1, 16)).tolist() for _ in range(num_prompts)]
    return [Request(i, prompt, sample_seeds(0, 0, i, num_samples)) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def trainers_rows(model: Decoder, groups: list[list[Rollout]]):
    """(batch, the hidden state that predicts each sampled token), in the order of `groups`."""
    packed = [
        Group(group[0].prompt_ids, [Completion(r.completion_ids, 0, r.behavior_logprobs) for r in group])
        for group in groups
    ]
    batch = build_batch(packed)
    return batch, gather_predictors(model(batch), batch)


@pytest.mark.parametrize("model", MODELS)
def test_log_probs_are_the_trainers_before_and_after_updates(vllm_recipe, model):
    train(recipe := vllm_recipe(model, train={"lr": 3e-3}, rollout={"temperature": 0.7}))
    rows = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 < row["mismatch/mean"] <= row["mismatch/max"] <= BOUND
        assert row["staleness/max"] == 0
        assert row["sync/gb_per_s"] > 0


@pytest.mark.parametrize("sampling", [Sampling(12, 0.8, top_p=0.7), Sampling(12, 1.0, top_k=3)], ids=["top-p", "top-k"])
def test_a_truncated_sampler_renormalises(opened, sampling):
    model, generator, source = opened
    generator.load_weights(source, 1)
    groups = [*generator.generate(requests(), sampling)]
    batch, hidden = trainers_rows(model, groups)
    probs, order = (
        (hidden.double() @ model.lm_head_weight.double().T / sampling.temperature).softmax(-1).sort(descending=True)
    )
    kept = probs.cumsum(-1) - probs < sampling.top_p
    kept &= torch.arange(probs.shape[-1]) < (sampling.top_k or probs.shape[-1])
    probs = probs * kept
    probs /= probs.sum(-1, keepdim=True)
    wanted = probs[order == batch.targets[:, None]].log()
    torch.testing.assert_close(batch.behavior_logprobs, wanted.float(), atol=BOUND, rtol=0)
    whole, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets, temperature=sampling.temperature)
    assert (whole < wanted - 0.05).any()  # the trainer's is of the whole distribution


def test_samples_are_those_of_their_seeds(opened):
    """Groups of the asked size, in any order; the same again, and also when others are sampled beside them."""
    _, generator, source = opened
    generator.load_weights(source, 1)
    sampling = Sampling(20)
    first = {group[0].group: group for group in generator.generate(requests(), sampling)}
    again = {group[0].group: group for group in generator.generate(requests()[::-2], sampling)}
    assert sorted(first) == [0, 1, 2, 3, 4, 5]
    assert sorted(again) == [1, 3, 5]
    reasons = set()
    for number, group in first.items():
        assert len(group) == 4
        assert len({tuple(rollout.completion_ids) for rollout in group}) > 1
        for one, other in zip(group, again.get(number, group), strict=True):
            assert np.array_equal(one.completion_ids, other.completion_ids)
            assert one.finish_reason == ("stop" if one.completion_ids[-1] == 0 else "length")
            assert one.finish_reason == "stop" or len(one.completion_ids) == 20
            assert one.weight_versions == ((1, len(one.completion_ids)),)
            reasons.add(one.finish_reason)
    assert reasons == {"stop", "length"}


def test_no_sign_of_life_comes_after_the_last_group(monkeypatch):
    """Nobody would read it, and it would be taken for the answer of the next call, as that a sync is done."""
    from flashgrpo.grpo.rollout.vllm import engine as module

    class Stub:
        def __init__(self):
            self.steps = [[], [SimpleNamespace(finished=True, request_id="0", outputs=["text"])]]
            self.llm_engine, self.renderer = self, SimpleNamespace(render_cmpl=lambda prompts: prompts)

        def add_request(self, *_):
            pass

        def step(self):
            return self.steps.pop(0)

    monkeypatch.setattr(module, "_PROGRESS_S", -1.0)  # one is due after every step
    monkeypatch.setattr(module, "_rollouts", lambda request, outputs: outputs)
    engine = module.Engine.__new__(module.Engine)
    engine.llm, engine.stop_token_ids = Stub(), [0]
    assert [*engine.generate(requests()[:1], Sampling(8))] == [[], ["text"]]


def test_an_update_that_fails_leaves_no_trace(opened, monkeypatch):
    """The engine takes the right tensors afterwards, where a part of wrong ones had been loaded."""
    model, generator, source = opened
    monkeypatch.setattr("flashgrpo.grpo.rollout.vllm.engine._BUCKET_BYTES", 1)
    broken = DecoderSource(source.parameters, model.config, source.dtype)

    def breaking():
        for name, tensor in source:
            if "layers.1.mlp.up_proj" in name:
                raise RuntimeError("no more")
            broken.last = name
            yield name, 2 * tensor

    broken._tensors = breaking
    with pytest.raises(SyncError, match=r"version 2 of the weights did not reach vLLM; .* is model\.layers\.1\.mlp"):
        generator.load_weights(broken, 2)
    generator.load_weights(source, 3)
    batch, hidden = trainers_rows(model, [*generator.generate(requests(), Sampling(8))])
    ours, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets)
    torch.testing.assert_close(ours, batch.behavior_logprobs, atol=BOUND, rtol=0)


def test_what_arrives_changed_is_found_by_its_checksum(opened, monkeypatch):
    _, generator, source = opened
    generator._close_sender()  # the next sync is a first one again

    def changed(self=source):
        for name, tensor in original():
            yield name, tensor
            if name == "model.norm.weight":
                self.digests[name] += 1

    original = source._tensors
    monkeypatch.setattr(source, "_tensors", changed)
    with pytest.raises(SyncError, match=r"the checksum of 1 of \d+ tensors differs, of model\.norm\.weight first"):
        generator.load_weights(source, 2)


def test_an_engine_that_samples_nothing_is_not_waited_for_without_end(opened, monkeypatch):
    engine = opened[1].client
    monkeypatch.setattr(engine, "timeout_s", 0.5)
    monkeypatch.setattr(engine.child, "send", lambda *_: None)  # as if it did not hear
    monkeypatch.setattr(engine.child, "close", lambda: None)
    with pytest.raises(GeneratorFailure, match=r"vLLM's process did not finish generate within 0\.5 s"):
        next(engine.generate(requests(), Sampling(8)))


def test_a_stalled_sync_hits_its_deadline(opened, monkeypatch):
    """The last test of this engine."""
    _, generator, source = opened
    generator.load_weights(source, 1)
    monkeypatch.setattr(generator.client, "timeout_s", 3.0)

    def stalling():
        for name, tensor in original():
            if name == "model.layers.1.mlp.down_proj.weight":
                os.kill(generator.client.child.process.pid, signal.SIGSTOP)
            yield name, tensor

    original = source._tensors
    monkeypatch.setattr(source, "_tensors", stalling)
    message = r"version 2 .* the last tensor .* is model\.norm\.weight: .* did not finish update_weights within 3 s"
    with pytest.raises(SyncError, match=message):
        generator.load_weights(source, 2)


def test_an_engine_that_dies_leaves_a_checkpoint(vllm_recipe, monkeypatch):
    """In generation; the next test has one that dies before a sync."""

    def dying(self, *arguments):
        if self.generator.weight_version in (1, 2):
            threading.Timer(0.02, self.generator.client.child.process.kill).start()
        return original(self, *arguments)

    original = Sampler._generate
    monkeypatch.setattr(Sampler, "_generate", dying)
    more = {"max_new_tokens": 200, "prompts_per_step": 16}
    with pytest.raises(GeneratorFailure, match=r"vLLM's process ended during \w+ with exit code -9"):
        train(recipe := vllm_recipe(train={"checkpoint_every": 0}, rollout=more))
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    assert int(newest.name.removeprefix("step_")) >= 1


def train_with_a_dying_engine(recipe: Recipe) -> str:
    """On rank 1 the engine is killed before the second sync; what each rank raises."""

    def dying(self, version):
        if version == 1 and self.world.rank == 1:
            self.generator.client.child.process.kill()
        original(self, version)

    original = Sampler.sync
    Sampler.sync = dying
    with pytest.raises(GeneratorFailure) as caught:
        train(recipe)
    return str(caught.value)


def test_two_ranks_of_which_one_loses_its_engine_end_together(vllm_recipe):
    """In lockstep to the end of the sync, then with the same error, after a checkpoint."""
    recipe = vllm_recipe()
    first, second = ranks.run(train_with_a_dying_engine, 2, recipe)
    assert first == second
    assert "version 1 of the weights did not reach vLLM; the last tensor that the trainer gave is none: vLLM's" in first
    assert "exit code -9" in first
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    assert newest.name == "step_1"


def test_resume_goes_on_as_if_nothing_had_happened(vllm_recipe):
    def rows() -> list[dict]:
        found = read_rows(Path(recipe.run.output) / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in found]

    train(recipe := vllm_recipe())
    whole = rows()
    for made_later in ("model", "checkpoints/step_4"):  # than the moment that the run was killed
        shutil.rmtree(Path(recipe.run.output) / made_later)
    train(recipe, resume=True)
    assert rows() == whole


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"vllm": {"max_model_len": 11}}, r"max_model_len = 11 is below .* 4 \+ 8 tokens; raise it to 12 or more"),
        ({"vllm": {"kv_cache_gb": 1e-6}}, r"vllm\.kv_cache_gb = 1e-06, .*No available memory for the cache"),
    ],
)
def test_a_recipe_that_vllm_cannot_run_is_refused(vllm_recipe, sections, message):
    with pytest.raises(RecipeError, match=message):
        train(vllm_recipe(**sections))
