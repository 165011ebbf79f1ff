"""The real vLLM on the CPU, in a process beside the trainer's: its log-probs are the trainer's, whatever the weights
become; and what a person is told when it cannot go on.
"""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, SyncError
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rollout import sync
from flashgrpo.grpo.rollout.generator import open_generator, sample_seeds
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
VLLM = {"kv_cache_gb": 0.05, "sync_timeout_s": 60}


@pytest.fixture(scope="module")
def opened(make_model):
    """(the trainer's Qwen2, a generator, the source of its weights); the last test ends its process."""
    values = {
        "model": {
            "path": str(make_model(**SIZES, model_type="qwen2", vocab_size=112))
        },  # of which the tokenizer has 98
        "data": {"path": "none"},
        "rollout": {"generator": "vllm", "max_new_tokens": 20},
        "vllm": VLLM,
        "run": {"output": "none", "device": "cpu"},
    }
    recipe = build_recipe(Recipe, values)
    with open_world(recipe) as world:
        model = open_sharded_model(recipe.model, world.device, world.mesh)
        generator = open_generator(recipe, open_policy(recipe.model, world.device, model), world, longest_prompt=16)
        source = sync.DecoderSource(dict(model.named_parameters()), model.config, torch.float32)
    yield model, generator, source
    generator.close()


def requests(num_prompts: int = 6, num_samples: int = 4) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 90, rng.integers(1, 16)).tolist() for _ in range(num_prompts)]
    return [Request(i, prompt, sample_seeds(0, 0, i, num_samples)) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def trainers_rows(model: Decoder, groups: list[list[Rollout]]):
    """(batch, the hidden state that predicts each sampled token), in the order of `groups`."""
    packed = []
    for group in groups:
        completions = [Completion(rollout.completion_ids, 0, rollout.behavior_logprobs) for rollout in group]
        packed.append(Group(group[0].prompt_ids, completions))
    batch = build_batch(packed)
    return batch, gather_predictors(model(batch), batch)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(12, 0.8), Sampling(12, 0.8, top_p=0.7), Sampling(12, top_k=3)],
    ids=["whole", "top-p", "top-k"],
)
def test_log_probs_are_the_trainers_of_what_is_sampled_from(opened, sampling):
    """A truncated sampler renormalises."""
    model, generator, source = opened
    generator.load_weights(source, 1)
    batch, hidden = trainers_rows(model, [*generator.generate(requests(), sampling)])
    logits = hidden.double() @ model.lm_head_weight.double().T / sampling.temperature
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = probs.cumsum(-1) - probs < sampling.top_p
    kept &= torch.arange(probs.shape[-1]) < (sampling.top_k or probs.shape[-1])
    probs = probs * kept
    probs /= probs.sum(-1, keepdim=True)
    wanted = probs[order == batch.targets[:, None]].log()
    torch.testing.assert_close(batch.behavior_logprobs, wanted.float(), atol=BOUND, rtol=0)
    whole, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets, temperature=sampling.temperature)
    assert (whole < wanted - 0.05).any() == sampling.is_truncated  # the trainer's is of the whole distribution


def test_samples_are_those_of_their_seeds(opened):
    """Groups of the asked size, in any order; the same again, and also when others are sampled beside them."""
    _, generator, source = opened
    generator.load_weights(source, 1)
    first = {group[0].group: group for group in generator.generate(requests(), Sampling(20))}
    again = {group[0].group: group for group in generator.generate(requests()[::-2], Sampling(20))}
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


def test_an_update_that_fails_leaves_no_trace(opened, monkeypatch):
    """A part of wrong tensors is loaded; then what arrives is not what was sent, by its checksum; then all is right."""
    model, generator, source = opened

    def breaking(*arguments):
        for name, tensor in whole(*arguments):
            if "layers.1.mlp.up_proj" in name:
                raise RuntimeError("no more")
            yield name, 2 * tensor

    whole = sync.full_tensors
    with monkeypatch.context() as patched:
        patched.setattr(sync, "full_tensors", breaking)
        patched.setattr(sync, "BUCKET_BYTES", 1)
        message = (
            r"version 2 of the weights did not reach vLLM; .* is model\.layers\.1\.mlp\.gate_proj\.weight: no more"
        )
        with pytest.raises(SyncError, match=message):
            generator.load_weights(source, 2)
        assert generator.weight_version == -1
    with monkeypatch.context() as patched:
        patched.setattr(sync, "digest", lambda tensor: len(tensor))
        with pytest.raises(SyncError, match=r"the checksum of (\d+) of \1 tensors differs, of model\.embed_tokens"):
            generator.load_weights(source, 3)
    generator.load_weights(source, 4)
    batch, hidden = trainers_rows(model, [*generator.generate(requests(), Sampling(8))])
    ours, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets)
    torch.testing.assert_close(ours, batch.behavior_logprobs, atol=BOUND, rtol=0)


def test_an_engine_that_samples_nothing_is_not_waited_for_without_end(opened, monkeypatch):
    _, generator, _ = opened
    monkeypatch.setattr(generator, "timeout_s", 0.5)
    monkeypatch.setattr(generator.child, "send", lambda *_: None)  # as if it did not hear
    monkeypatch.setattr(generator.child, "close", lambda: None)
    with pytest.raises(GeneratorFailure, match=r"vLLM's process did not finish generate within 0\.5 s"):
        next(generator.generate(requests(), Sampling(8)))


def test_a_stalled_sync_hits_its_deadline_and_ends_the_engine(opened, monkeypatch):
    _, generator, source = opened
    generator.load_weights(source, 1)
    monkeypatch.setattr(generator, "timeout_s", 3.0)

    def stalling(*arguments):
        for name, tensor in whole(*arguments):
            if name == "model.layers.1.mlp.down_proj.weight":
                os.kill(generator.child.process.pid, signal.SIGSTOP)
            yield name, tensor

    whole = sync.full_tensors
    monkeypatch.setattr(sync, "full_tensors", stalling)
    message = r"version 2 .* the last tensor .* is model\.norm\.weight: .* did not finish update_weights within 3 s"
    with pytest.raises(SyncError, match=message):
        generator.load_weights(source, 2)
    with pytest.raises(GeneratorFailure, match=r"vLLM's process ended during generate with exit code -9"):
        next(generator.generate(requests(), Sampling(8)))


@pytest.fixture
def vllm_recipe(recipe_values, custom_rewards, make_model) -> Recipe:
    """Of a run that samples with engines of its own, for a Llama with a head of its own."""
    recipe_values["model"]["path"] = str(make_model(**SIZES, model_type="llama", tie_word_embeddings=False))
    recipe_values["rollout"] |= {"generator": "vllm", "temperature": 0.7}
    recipe_values["train"]["lr"] = 3e-3
    return build_recipe(Recipe, recipe_values | {"vllm": VLLM})


def train_with_a_dying_engine(recipe: Recipe) -> str:
    """On rank 1 the engine is killed before the third sync; what each rank raises."""

    def dying(self, version):
        if version == 2 and self.world.rank == 1:
            self.generator.child.process.kill()
        original(self, version)

    original = Sampler.sync
    Sampler.sync = dying
    with pytest.raises(GeneratorFailure) as caught:
        train(recipe)
    return str(caught.value)


def test_two_ranks_of_which_one_loses_its_engine_end_together(vllm_recipe):
    """Each has an engine with weights that both hold a part of. In lockstep to the end of the sync, then with the same
    error, after a checkpoint.
    """
    first, second = ranks.run(train_with_a_dying_engine, 2, vllm_recipe)
    assert first == second
    assert "version 2 of the weights did not reach vLLM; the last tensor that the trainer gave is none: vLLM's" in first
    assert "exit code -9" in first
    newest = newest_checkpoint(vllm_recipe.run.output)
    assert newest is not None
    assert newest.name == "step_2"
    rows = read_rows(Path(vllm_recipe.run.output) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["mismatch/mean"] <= row["mismatch/max"] <= BOUND for row in rows)
    assert all(row["staleness/max"] == 0 < row["sync/gb_per_s"] for row in rows)


def test_a_recipe_that_vllm_cannot_run_is_refused(vllm_recipe, monkeypatch):
    short = dataclasses.replace(vllm_recipe.vllm, max_model_len=11)
    message = r"max_model_len = 11 is below .* 4 \+ 8 tokens; raise it to 12 or more"
    with pytest.raises(RecipeError, match=message):
        train(dataclasses.replace(vllm_recipe, vllm=short))

    def start(*_):
        raise GeneratorFailure("vLLM's process: ValueError: No available memory")

    monkeypatch.setattr("flashgrpo.grpo.rollout.vllm.generator.Child", start)
    with pytest.raises(
        RecipeError, match=r"vllm\.kv_cache_gb = 0\.05, vllm\.max_model_len = 12: .*No available memory"
    ):
        train(vllm_recipe)
