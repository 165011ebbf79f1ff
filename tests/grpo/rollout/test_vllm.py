"""The real vLLM on the CPU, in a process beside the trainer's and as servers over HTTP: a run is the same with each,
log-probs are the trainer's, whatever the weights become; and what a person is told when it cannot go on.

A start takes seconds: tests share an engine, of a Qwen2, and two servers, of a Qwen3 with a tied head.
"""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ranks
from flashgrpo.grpo.errors import DataError, GeneratorFailure, RecipeError, RunInputError, SyncError
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import CollectRecipe, Recipe, build_recipe
from flashgrpo.grpo.rollout import sync
from flashgrpo.grpo.rollout.generator import open_generator, sample_seeds
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.rollout.vllm.launch import API_KEY, EngineOptions, OwnServers
from flashgrpo.grpo.run.folder import newest_checkpoint, read_rows
from flashgrpo.grpo.run.policy import open_policy, open_sharded_model
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.stages.collect import collect
from flashgrpo.grpo.train import train
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.kernels.linear_grpo import linear_logprobs
from flashgrpo.model.batch import gather_predictors
from flashgrpo.model.decoder import Decoder

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(400)]
BOUND = 1e-5  # of an fp32 log-prob
SIZES = {"hidden_size": 64, "head_dim": 32}  # vLLM's attention on a CPU wants heads of 32
VLLM = {"kv_cache_gb": 0.05, "sync_timeout_s": 60}
TIMING = ("time/", "tokens_per_s", "tflops", "idle", "memory/", "sync/")


@pytest.fixture(scope="module")
def opened(make_model):
    """(the trainer's Qwen2, a generator, the source of its weights); the last test ends its process."""
    values = {
        "model": {"path": str(make_model(**SIZES, model_type="qwen2", vocab_size=112))},  # 98 by its tokenizer
        "data": {"path": "none"},
        "rollout": {"generator": "vllm", "max_new_tokens": 20},
        "vllm": VLLM | {"options": {"block_size": 32}},  # which a prompt fills, so that its keys are cached
        "run": {"output": "none", "device": "cpu"},
    }
    recipe = build_recipe(Recipe, values)
    with open_world(recipe) as world:
        model = open_sharded_model(recipe.model, world.device, world.mesh)
        generator = open_generator(recipe, open_policy(recipe.model, world.device, model), world, longest_prompt=48)
        source = sync.DecoderSource(dict(model.named_parameters()), model.config, torch.float32)
    yield model, generator, source
    generator.close()


def requests(num_prompts: int = 6, num_samples: int = 4) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 90, rng.integers(1, 49)).tolist() for _ in range(num_prompts)]
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


def test_samples_are_those_of_their_seeds(opened):
    """Groups of the asked size, in any order; the same again, and also when others are sampled beside them."""
    _, generator, source = opened
    generator.load_weights(source, 1)
    first = {group[0].group: group for group in generator.generate(requests(num_samples=32), Sampling(20))}
    again = {group[0].group: group for group in generator.generate(requests(num_samples=32)[::-2], Sampling(20))}
    assert sorted(first) == [0, 1, 2, 3, 4, 5]
    assert sorted(again) == [1, 3, 5]
    reasons = set()
    for number, group in first.items():
        assert len(group) == 32
        assert len({tuple(rollout.completion_ids) for rollout in group}) > 1
        for one, other in zip(group, again.get(number, group), strict=True):
            assert np.array_equal(one.completion_ids, other.completion_ids)
            assert one.finish_reason == ("stop" if one.completion_ids[-1] == 0 else "length")
            assert one.finish_reason == "stop" or len(one.completion_ids) == 20
            assert one.weight_versions == ((1, len(one.completion_ids)),)
            reasons.add(one.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(
    "sampling",
    [Sampling(12, 0.8), Sampling(12, 0.8, top_p=0.7), Sampling(12, top_k=3)],
    ids=["whole", "top-p", "top-k"],
)
def test_log_probs_are_the_trainers_of_what_is_sampled_from(opened, sampling):
    """Whatever the weights become. A truncated sampler renormalises."""
    model, generator, source = opened
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
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
    assert (whole < wanted - 0.05).any() == sampling.is_truncated
    # This build does not tell what it kept; by what it must have been, the trainer's log-probs are the sampler's.
    sets = order[kept], torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
    options = {"temperature": sampling.temperature, "kept": sets}
    ours, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets, **options)
    torch.testing.assert_close(batch.behavior_logprobs, ours, atol=BOUND, rtol=0)


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
    first, second = ranks.run(train_with_a_dying_engine, 2, vllm_recipe, timeout_s=240)  # two engines start at once
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


@pytest.fixture(scope="module")
def served_model(make_model) -> Path:
    return make_model(**SIZES)


@pytest.fixture(scope="module")
def servers(served_model, tmp_path_factory):
    """Two, which the last tests kill; each of two processes, not three, since starting one takes seconds."""
    values = {"model": {"path": str(served_model)}, "data": {"path": "none"}, "run": {"output": "none"}}
    values |= {"rollout": {"max_new_tokens": 200}, "vllm": {"kv_cache_gb": 0.05}}
    options = EngineOptions.of(build_recipe(Recipe, values), torch.device("cpu"), longest_prompt=20)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        own = OwnServers(options, ["cpu"] * 2, tmp_path_factory.mktemp("servers"))
    yield own
    own.close()


@pytest.fixture
def recipe_for(recipe_values, custom_rewards, served_model, servers, monkeypatch):
    """make(numbers of servers, **sections) -> a recipe that samples with them; their key is set."""
    monkeypatch.setenv(API_KEY, servers.key)
    runs = iter(range(9))

    def make(*numbers: int, **sections) -> Recipe:
        values = {**recipe_values, "model": {"path": str(served_model)}}
        values["rollout"] = values["rollout"] | {"generator": "vllm_server"}
        values["vllm"] = {"servers": [servers.urls[number] for number in numbers], "sync_timeout_s": 60}
        values["run"] = values["run"] | {"output": f"{values['run']['output']}_{next(runs)}"}
        return build_recipe(Recipe, {k: values.get(k, {}) | sections.get(k, {}) for k in {**values, **sections}})

    return make


def rows_of(recipe: Recipe) -> list[dict]:
    return read_rows(Path(recipe.run.output) / "metrics.jsonl")


def test_a_run_is_the_same_with_servers_and_with_an_engine_of_its_own(recipe_for):
    """The same samples of the same seeds, rewards and log-probs, on one server, on two, and in a process beside; there
    it is also the same, bit for bit, where it was killed in between.
    """
    own = {"rollout": {"generator": "vllm"}, "vllm": {"servers": [], "kv_cache_gb": 0.05}}
    found = []
    for sections in ({}, {}, own):
        train(recipe := recipe_for(*range(len(found) % 2 + 1), train={"lr": 3e-3}, **sections))
        rows = rows_of(recipe)
        assert all(0 < row["mismatch/max"] <= BOUND for row in rows)
        found.append([(row["reward/mean"], row["length/mean"], pytest.approx(row["loss"], abs=1e-6)) for row in rows])
    assert found[0] == found[1] == found[2]

    for made_later in ("model", "checkpoints/step_4"):  # than the moment that the run was killed
        shutil.rmtree(Path(recipe.run.output) / made_later)
    train(recipe, resume=True)
    for before, after in zip(rows, rows_of(recipe), strict=True):
        assert {**before, **{k: v for k, v in after.items() if not k.startswith(TIMING)}} == before


def train_with_key(recipe: Recipe, key: str) -> None:
    os.environ[API_KEY] = key
    train(recipe)


def test_two_ranks_feed_one_server(recipe_for, servers):
    alone, together = recipe_for(0), recipe_for(0)
    ranks.run(train_with_key, 2, together, servers.key)
    train(alone)
    for one, other in zip(rows_of(alone), rows_of(together), strict=True):
        assert one["reward/mean"] == pytest.approx(other["reward/mean"], abs=1e-9)
        assert other["mismatch/max"] <= BOUND


def test_sampling_ahead_is_two_steps_stale_and_no_more(recipe_for):
    """Over an end and a resume between two evaluations, too, and with new weights in the middle of what is sampled."""
    steps, until = 9, 3
    more = {"max_staleness": 2}, {"steps": steps, "lr": 3e-3}, {"every": 2, "samples": 2, "problems": 2}
    recipe = recipe_for(0, 1, **dict(zip(("rollout", "train", "eval"), more, strict=True)))
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=until)))
    train(recipe, resume=True)
    scored, trained = {}, {}
    for row in rows_of(recipe):
        scored |= {row["step"]: row["eval/pass@1"]} if "eval/pass@1" in row else {}
        trained |= {row["step"]: row} if row["step"] else {}
    assert sorted(trained) == [*range(1, steps + 1)]
    assert sorted({*scored} - {until}) == [0, 2, 4, 6, 8, 9]
    for step, row in trained.items():
        # What was sampled ahead is lost with the process.
        most = 0 if step in (1, until + 1) else 1 if step in (2, until + 2) else 2
        assert row["staleness/mean"] <= row["staleness/max"] <= most
        assert row["mismatch/max"] <= BOUND  # of a probe, where not of the step
    assert max(row["staleness/max"] for row in trained.values()) == 2
    assert max(row["ratio/max"] for row in trained.values()) > 1.001  # to the log-probs of the weights that sampled


def test_servers_of_a_runs_own_get_the_models_weights_and_end_with_it(recipe_for, servers, monkeypatch):
    """They sample the likeliest tokens by the trainer's decoder before any sync of the run's."""
    closed = []

    class Started:
        urls, key = servers.urls[:1], servers.key

        def __init__(self, options: EngineOptions, devices: list[str], logs: Path):
            assert (options.path, devices, logs.name) == (recipe.model.path, ["cpu"], f"{output.name}_servers")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("flashgrpo.grpo.rollout.vllm.generator.OwnServers", Started)
    monkeypatch.setenv(API_KEY, "another")
    recipe = recipe_for(vllm={"devices": ["cpu"]})
    output = Path(recipe.run.output)
    requests = [Request(i, [*range(5, 9 + i)], sample_seeds(0, 0, i, 1)) for i in range(4)]
    with open_world(recipe) as world:
        model = open_sharded_model(recipe.model, world.device, world.mesh)
        policy = open_policy(recipe.model, world.device, model)
        generator = open_generator(recipe, policy, world, longest_prompt=12, loaded=True)
        found = {group[0].group: group[0] for group in generator.generate(requests, Sampling(20, top_k=1))}
        assert not closed
        generator.close()
    assert closed
    for (wanted,) in NativeGenerator(model, policy.stop_token_ids).generate(requests, Sampling(20, top_k=1)):
        assert found[wanted.group].completion_ids.tolist() == wanted.completion_ids.tolist()


def test_a_collection_is_sampled_with_the_models_weights(recipe_for, tmp_path):
    """A server is sent them: the likeliest tokens by vLLM are those by the trainer."""
    recipe, texts = recipe_for(0), []
    for generator in ("native", "vllm_server"):
        rollout = {"generator": generator, "group_size": 2, "top_k": 1, "max_new_tokens": 12, "prompts": 8}
        values = {
            "model": {"path": recipe.model.path},
            "data": {"path": recipe.data.path, "template": "none", "held_out": 8},
            "rewards": {"functions": ["format"], "workers": 1},
            "rollout": rollout,
            "vllm": {"servers": recipe.vllm.servers},
            "run": {"output": str(tmp_path / generator), "device": "cpu"},
        }
        with pytest.raises(DataError, match="all 16 completions were rejected"):  # a random model answers nothing
            collect(build_recipe(CollectRecipe, values))
        texts.append(pq.read_table(tmp_path / generator / "parts/part_00000.parquet")["completion"].to_pylist())
    assert len(set(texts[0])) > 1
    assert texts[0] == texts[1]


def test_a_server_on_which_a_run_was_killed_in_mid_sync_serves_the_next_run(recipe_for, monkeypatch):
    """Without a restart, and without a trace of the weights that had come."""

    def killed(*arguments):
        for number, (name, tensor) in enumerate(whole(*arguments)):
            if number == 6:
                raise KeyboardInterrupt
            yield name, 2 * tensor

    whole = sync.full_tensors
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sync, "full_tensors", killed)
        patched.setattr(sync, "BUCKET_BYTES", 1)
        train(recipe_for(0))
    train(recipe := recipe_for(0))
    assert all(row["mismatch/max"] <= BOUND for row in rows_of(recipe))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/served_model", 200),
        ("POST", "/collective_rpc", 403),
        ("POST", "/collective_rpc/", 403),
        ("POST", "/collective_rpc?method=served_model", 403),
        ("POST", "/save_sharded_state", 403),
        ("POST", "/sleep", 403),
        ("GET", "/docs", 403),
        ("GET", "/health", 200),
    ],
)
def test_a_stranger_has_no_routes_but_those_of_a_run(servers, tmp_path, method, path, status):
    """And none but /health without the key."""
    body = json.dumps({"method": "save_sharded_state", "args": [str(tmp_path)]}).encode() if method == "POST" else None
    found = []
    for key in ("", "another", servers.key):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        asked = urllib.request.Request(servers.urls[0] + path, body, headers, method=method)
        try:
            found.append(urllib.request.urlopen(asked, timeout=60).status)
        except urllib.error.HTTPError as error:
            found.append(error.code)
    assert found == ([200] * 3 if path == "/health" else [401, 401, status])
    assert not [*tmp_path.iterdir()]


def test_an_update_in_flight_shows_in_the_spans(recipe_for):
    """Tokens carry the version of the weights that they were sampled from, and its log-probs, which are others."""
    recipe = recipe_for(0, rollout={"max_new_tokens": 200})
    with open_world(recipe) as world:
        models = [open_sharded_model(recipe.model, world.device, world.mesh) for _ in range(2)]
        with torch.no_grad():
            models[1].lm_head_weight.mul_(1.5)
        sources = [sync.DecoderSource(dict(m.named_parameters()), m.config, torch.float32) for m in models]
        generator = open_generator(recipe, open_policy(recipe.model, world.device, models[0]), world, longest_prompt=9)
        generator.load_weights(sources[0], 1)
        requests = [Request(i, [*range(5, 14)], sample_seeds(0, 0, i, 8)) for i in range(8)]
        with ThreadPoolExecutor(1) as thread:
            groups = thread.submit(lambda: [*generator.generate(requests, Sampling(200))])
            time.sleep(0.1)
            assert [*generator.generate(requests[:1], Sampling(20))]  # by its end the others are under way
            generator.load_weights(sources[1], 2)
            rollouts = [rollout for group in groups.result() for rollout in group]
        generator.close()
    spans = [tuple(version for version, _ in rollout.weight_versions) for rollout in rollouts]
    assert {*spans} <= {(1,), (1, 2), (2,)}  # some had stopped, or not begun
    assert spans.count((1, 2)) > len(spans) / 2
    batch = build_batch([Group(r.prompt_ids, [Completion(r.completion_ids, 0, r.behavior_logprobs)]) for r in rollouts])
    versions = np.concatenate([np.repeat(*zip(*rollout.weight_versions, strict=True)) for rollout in rollouts])
    off = []
    with torch.no_grad():
        for model in models:
            hidden = gather_predictors(model(batch), batch)
            ours, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets)
            off.append((ours - batch.behavior_logprobs).abs())
    newer = torch.from_numpy(versions) == 2
    assert torch.where(newer, off[1], off[0]).max() <= BOUND
    assert torch.where(newer, off[0], off[1]).mean() > 0.05


@pytest.mark.parametrize(
    ("sections", "changes", "message"),
    [
        ({"vllm": {"servers": ["http://127.0.0.1:9"]}}, {}, r"127\.0\.0\.1:9: .* is `flashgrpo serve RECIPE` running"),
        ({}, {"intermediate_size": 96}, r"another model: .*0\.mlp\.gate_proj\.weight is \[64, 64\] there, \[96, 64\]"),
        ({}, {"tie_word_embeddings": False}, r"another model: lm_head\.weight is missing there, \[98, 64\]"),
        ({"rollout": {"max_new_tokens": 400}, "train": {"token_budget": 500}}, {}, r"max_model_len = 220 is below"),
        ({"model": {"dtype": "bfloat16"}}, {}, r"another model: dtype is float32 there, bfloat16 here"),
        (
            {"key": "another"},
            {},
            r"answered 401: wanted this server's key; set VLLM_API_KEY for the run.*; start servers",
        ),
    ],
    ids=["unreachable", "another model", "untied", "too short", "another type", "another key"],
)
def test_wrong_servers_are_refused(recipe_for, make_model, monkeypatch, sections, changes, message):
    if key := sections.pop("key", ""):
        monkeypatch.setenv(API_KEY, key)
    if changes:
        sections = {"model": {"path": str(make_model(**SIZES, **changes))}}
    with pytest.raises((RunInputError, RecipeError), match=message):
        train(recipe_for(0, **sections))


def test_servers_that_are_lost(recipe_for, servers, caplog, monkeypatch):
    """One that stalls in a sync is dropped, and one that dies in generation, whose requests go elsewhere. Without any
    the run ends after a checkpoint.
    """

    def stop_in_sync(number: int, with_signal: int):
        def stopping(*arguments):
            passes.append(number)
            for name, tensor in whole(*arguments):
                if len(passes) == 2 and name == "model.layers.1.mlp.down_proj.weight":
                    os.kill(servers.processes[number].pid, with_signal)
                yield name, tensor

        passes, whole = [], sync.full_tensors
        return sync, "full_tensors", stopping

    def kill_in_generation(number: int):
        def killing(self, step, *arguments):
            if step == 2:  # soon after it has begun
                threading.Timer(0.1, servers.processes[number].kill).start()
            return original(self, step, *arguments)

        original = Sampler._generate
        return Sampler, "_generate", killing

    with monkeypatch.context() as patched:
        patched.setattr(*stop_in_sync(1, signal.SIGSTOP))
        train(recipe := recipe_for(0, 1, vllm={"sync_timeout_s": 6}))
    os.kill(servers.processes[1].pid, signal.SIGCONT)
    assert f"the vLLM server at {servers.urls[1]} is dropped: it did not answer update_weights for 6 s" in caplog.text
    assert [row["step"] for row in rows_of(recipe)] == [1, 2, 3, 4]

    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr(*kill_in_generation(1))
        train(recipe := recipe_for(0, 1, rollout={"max_new_tokens": 200}, train={"token_budget": 2000}))
    assert f"the vLLM server at {servers.urls[1]} is dropped" in caplog.text
    assert [row["step"] for row in rows_of(recipe)] == [1, 2, 3, 4]
    assert all(row["mismatch/max"] <= 2 * BOUND for row in rows_of(recipe))

    recipe = recipe_for(0)
    monkeypatch.setattr(*stop_in_sync(0, signal.SIGKILL))
    with pytest.raises(GeneratorFailure, match=r"no vLLM server is left: .*; start them again, or others as vllm"):
        train(recipe)
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    assert newest.name == "step_1"
