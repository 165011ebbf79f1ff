"""Real vLLM servers on the CPU, over HTTP: a run is the same with them, sampling ahead is one step stale, and servers
that are wrong, stall or die.
"""

import dataclasses
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ranks
import torch

from flashgrpo.grpo.errors import DataError, GeneratorFailure, RecipeError, RunInputError
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import CollectRecipe, Recipe, build_recipe
from flashgrpo.grpo.rollout.generator import open_generator, sample_seeds
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.rollout.vllm.launch import API_KEY, EngineOptions, OwnServers
from flashgrpo.grpo.run.folder import newest_checkpoint, read_rows
from flashgrpo.grpo.run.policy import open_policy, open_sharded_model
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.stages.collect import collect
from flashgrpo.grpo.train import train
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.kernels.linear_grpo import linear_logprobs
from flashgrpo.model.batch import gather_predictors

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(400)]
BOUND = 1e-5
SIZES = {"hidden_size": 64, "head_dim": 32}


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

    def make(*numbers: int, **sections) -> Recipe:
        values = {**recipe_values, "model": {"path": str(served_model)}}
        values["rollout"] = values["rollout"] | {"generator": "vllm_server"}
        values["vllm"] = {"servers": [servers.urls[number] for number in numbers], "sync_timeout_s": 60}
        return build_recipe(Recipe, {k: values.get(k, {}) | sections.get(k, {}) for k in {**values, **sections}})

    return make


def rows_of(recipe: Recipe) -> list[dict]:
    return read_rows(Path(recipe.run.output) / "metrics.jsonl")


def run(recipe: Recipe, key: str) -> None:
    os.environ[API_KEY] = key
    train(recipe)


def test_a_run_is_the_same_with_servers_and_with_an_engine_of_its_own(recipe_for, tmp_path):
    """The same samples of the same seeds, rewards and log-probs, on one server, on two, and in a process beside."""
    one, two = recipe_for(0, train={"lr": 3e-3}), recipe_for(0, 1, train={"lr": 3e-3})
    own = dataclasses.replace(
        two,
        rollout=dataclasses.replace(two.rollout, generator="vllm"),
        vllm=dataclasses.replace(two.vllm, servers=[], kv_cache_gb=0.05),
    )
    found = []
    for number, recipe in enumerate((one, two, own)):
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, output=str(tmp_path / str(number))))
        train(recipe)
        rows = rows_of(recipe)
        assert all(0 < row["mismatch/max"] <= BOUND for row in rows)
        found.append([(row["reward/mean"], row["length/mean"], pytest.approx(row["loss"], abs=1e-6)) for row in rows])
    assert found[0] == found[1] == found[2]


def test_weights_that_do_not_arrive_show(recipe_for, monkeypatch, capsys):
    """The bound above can fail: here the first weights are sent again and again."""

    def first_ones(self):
        sent.extend(sent or [(name, tensor.clone()) for name, tensor in original(self)])
        self.last = "a copy"
        return iter(sent[: len(self.metadata())])

    sent: list = []
    original = DecoderSource._tensors
    monkeypatch.setattr(DecoderSource, "_tensors", first_ones)
    train(recipe := recipe_for(0, train={"lr": 3e-3, "mismatch_alarm": 1e-4}))
    first, *others = rows_of(recipe)
    assert first["mismatch/max"] <= BOUND
    assert all(row["mismatch/max"] > 1e-3 for row in others)
    assert "step 2: the sampler's log-probs are" in capsys.readouterr().err


def test_two_ranks_feed_one_server(recipe_for, servers, tmp_path):
    alone, together = (
        dataclasses.replace(r, run=dataclasses.replace(r.run, output=str(tmp_path / str(size))))
        for size, r in enumerate((recipe_for(0), recipe_for(0)), start=1)
    )
    ranks.run(run, 2, together, servers.key)
    train(alone)
    for one, other in zip(rows_of(alone), rows_of(together), strict=True):
        assert one["reward/mean"] == pytest.approx(other["reward/mean"], abs=1e-9)
        assert other["mismatch/max"] <= BOUND


def test_sampling_ahead_is_one_step_stale_and_no_more(recipe_for):
    train(recipe := recipe_for(0, 1, rollout={"overlap": True}, train={"steps": 30, "lr": 1e-3}))
    first, *others = rows_of(recipe)
    assert (first["staleness/mean"], first["staleness/max"], len(others)) == (0, 0, 29)
    assert all(row["staleness/mean"] == row["staleness/max"] == 1 for row in others)
    assert all(row["mismatch/max"] <= BOUND for row in (first, *others[:-1]))  # probed by the newest weights
    assert max(row["ratio/max"] for row in others) > 1.001  # to the log-probs of the weights that sampled
    assert "mismatch/max" not in others[-1]  # the last step samples nothing ahead


@pytest.mark.parametrize("steps", [2, 3])
def test_resume_with_sampling_ahead(recipe_for, steps):
    recipe = recipe_for(0, rollout={"overlap": True}, eval={"every": 2, "samples": 2, "problems": 2})
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps)))
    file = Path(recipe.run.output) / "recipe.toml"
    file.write_text(file.read_text().replace(f"steps = {steps}", "steps = 4"))
    train(recipe, resume=True)
    rows = {row["step"]: row for row in rows_of(recipe)}
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert rows[steps + 1]["staleness/max"] == 0  # what was sampled ahead is lost with the process
    assert all("eval/pass@1" in rows[step] for step in (0, 2, 4))


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

    def killed(self):
        for number, (name, tensor) in enumerate(original(self)):
            if number == 6:
                raise KeyboardInterrupt
            yield name, 2 * tensor

    original = DecoderSource._tensors
    recipe = recipe_for(0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DecoderSource, "_tensors", killed)
        patched.setattr("flashgrpo.grpo.rollout.vllm.engine._BUCKET_BYTES", 1)
        train(recipe)
    train(recipe := recipe_for(0, run={"output": f"{recipe.run.output}_2"}))
    assert all(row["mismatch/max"] <= BOUND for row in rows_of(recipe))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/collective_rpc?method=served_model", {"method": "save_sharded_state", "args": ["FOLDER"]}, 200),
        ("POST", "/collective_rpc?method=save_sharded_state", {"args": ["FOLDER"]}, 403),
        ("POST", "/collective_rpc", {"method": "save_sharded_state", "args": ["FOLDER"]}, 403),
        ("POST", "/collective_rpc/", {"method": "save_sharded_state", "args": ["FOLDER"]}, 403),
        ("POST", "/sleep", {}, 403),
        ("GET", "/docs", None, 403),
        ("GET", "/health", None, 200),
    ],
)
def test_a_stranger_has_no_routes_but_those_of_a_run(servers, tmp_path, method, path, body, status):
    """And none but /health without the key."""
    body = None if body is None else json.dumps(body).replace("FOLDER", str(tmp_path)).encode()
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


def test_a_run_without_the_servers_key_is_told_so(recipe_for, monkeypatch):
    monkeypatch.setenv(API_KEY, "another")
    with pytest.raises(RunInputError, match=r"answered 401: wanted this server's key; set VLLM_API_KEY for the run"):
        train(recipe_for(0))


def test_an_update_in_flight_shows_in_the_spans(recipe_for):
    """Tokens carry the version of the weights that they were sampled from, and its log-probs."""
    recipe = recipe_for(0, rollout={"max_new_tokens": 200})
    with open_world(recipe) as world:
        models = [open_sharded_model(recipe.model, world.device, world.mesh) for _ in range(2)]
        with torch.no_grad():
            models[1].lm_head_weight.mul_(1.5)
        sources = [DecoderSource(dict(m.named_parameters()), m.config, torch.float32) for m in models]
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
    versions = [version for r in rollouts for version, num_tokens in r.weight_versions for _ in range(num_tokens)]
    with torch.no_grad():
        hidden = [gather_predictors(m(batch), batch) for m in models]
        ours = torch.stack(
            [linear_logprobs(h, m.lm_head_weight, batch.targets)[0] for h, m in zip(hidden, models, strict=True)]
        )
    off = (ours - batch.behavior_logprobs).abs()
    newer = torch.tensor(versions) == 2
    assert torch.where(newer, off[1], off[0]).max() <= BOUND
    assert torch.where(newer, off[0], off[1]).mean() > 0.05


@pytest.mark.parametrize(
    ("sections", "changes", "message"),
    [
        ({"vllm": {"servers": ["http://127.0.0.1:9"]}}, {}, r"127\.0\.0\.1:9: .* is `flashgrpo serve RECIPE` running"),
        ({}, {"intermediate_size": 96}, r"another model: .*0\.mlp\.gate_proj\.weight is \[64, 64\] there, \[96, 64\]"),
        ({}, {"tie_word_embeddings": False}, r"another model: lm_head\.weight is missing there, \[98, 64\]"),
        ({"rollout": {"max_new_tokens": 400}, "train": {"token_budget": 500}}, {}, r"max_model_len = 220 is below"),
        ({"model": {"dtype": "bfloat16"}}, {}, r"computes in float32, the trainer in bfloat16"),
    ],
    ids=["unreachable", "another model", "untied", "too short", "another type"],
)
def test_wrong_servers_are_refused(recipe_for, make_model, sections, changes, message):
    recipe = recipe_for(0, **sections)
    if changes:
        path = str(make_model(**SIZES, **changes))
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=path))
    with pytest.raises((RunInputError, RecipeError), match=message):
        train(recipe)


def test_a_server_that_stalls_in_a_sync_is_dropped(recipe_for, servers, caplog, monkeypatch):
    """The run goes on with the other one."""
    stop_in_sync(monkeypatch, servers._processes[1].pid, signal.SIGSTOP)
    try:
        train(recipe := recipe_for(0, 1, vllm={"sync_timeout_s": 10}))
    finally:
        os.kill(servers._processes[1].pid, signal.SIGCONT)
    assert f"the vLLM server at {servers.urls[1]} is dropped: it did not answer update_weights" in caplog.text
    assert [row["step"] for row in rows_of(recipe)] == [1, 2, 3, 4]


def test_the_requests_of_a_server_that_dies_go_elsewhere(recipe_for, servers, caplog, monkeypatch):
    signal_in_generation(monkeypatch, servers._processes[1].pid, signal.SIGKILL)
    train(recipe := recipe_for(0, 1, rollout={"max_new_tokens": 200}, train={"token_budget": 2000}))
    assert f"the vLLM server at {servers.urls[1]} is dropped" in caplog.text
    assert [row["step"] for row in rows_of(recipe)] == [1, 2, 3, 4]
    assert all(row["mismatch/max"] <= 2 * BOUND for row in rows_of(recipe))


@pytest.mark.parametrize("phase", ["generate", "sync"])
def test_without_a_server_the_run_ends_after_a_checkpoint(recipe_for, servers, monkeypatch, phase):
    """One that stalls, then one that dies."""
    pid = servers._processes[0].pid
    if phase == "sync":
        stop_in_sync(monkeypatch, pid, signal.SIGKILL)
    else:
        signal_in_generation(monkeypatch, pid, signal.SIGSTOP)
    lasting = {"rollout": {"max_new_tokens": 200}, "train": {"token_budget": 2000}, "vllm": {"sync_timeout_s": 10}}
    try:
        with pytest.raises(GeneratorFailure, match=r"no vLLM server is left: .*; start them again, or others as vllm"):
            train(recipe := recipe_for(0, **lasting))
    finally:
        os.kill(pid, signal.SIGCONT)
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    assert newest.name == "step_1"


def stop_in_sync(monkeypatch, pid: int, number: int) -> None:
    """A signal to `pid` in the middle of the second sync."""

    def stopping(self):
        passes.append(self)
        for name, tensor in original(self):
            if len(passes) == 2 and name == "model.layers.1.mlp.down_proj.weight":
                os.kill(pid, number)
            yield name, tensor

    passes: list = []
    original = DecoderSource._tensors
    monkeypatch.setattr(DecoderSource, "_tensors", stopping)


def signal_in_generation(monkeypatch, pid: int, number: int) -> None:
    """Soon after the second generation has begun."""

    def sending(self, step, *arguments):
        if step == 2:
            threading.Timer(0.1, os.kill, (pid, number)).start()
        return original(self, step, *arguments)

    original = Sampler._generate
    monkeypatch.setattr(Sampler, "_generate", sending)
