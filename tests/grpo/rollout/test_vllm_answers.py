"""Servers that answer with what was not asked for, or not at all: a run must neither train on it nor wait for ever."""

import asyncio
import ctypes
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web

from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, RunInputError, SyncError
from flashgrpo.grpo.recipe.schema import VllmSection
from flashgrpo.grpo.rollout.sync import DecoderSource, weight_shapes
from flashgrpo.grpo.rollout.vllm import generator as generator_module
from flashgrpo.grpo.rollout.vllm.answers import AnswerError, read_group
from flashgrpo.grpo.rollout.vllm.generator import ServersGenerator
from flashgrpo.grpo.rollout.vllm.launch import EngineOptions
from flashgrpo.grpo.rollout.vllm.servers import VllmServers
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.model.checkpoint import read_config
from flashgrpo.model.config import ModelConfig

LONGEST = 3


def options(on_gpu: bool, kept_limit: int = 0) -> EngineOptions:
    return EngineOptions("model", "bfloat16", on_gpu, 64, 0, VllmSection(), kept_limit)


REQUEST = Request(7, [5, 6], np.arange(2, dtype=np.uint64))


def group(**changes: Any) -> dict[str, Any]:
    """A right answer but for what is changed in one completion."""
    choices = [
        {
            "index": number,
            "token_ids": [4, 9, 1],
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -2.0}, {"logprob": 0.0}]},
            "finish_reason": "stop",
            "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
        }
        for number in (1, 0)  # in any order
    ]
    choices[1] |= changes
    return {"choices": choices}


def read(answer: dict[str, Any], kept_limit: int = 0) -> list:
    text, versions, sampling = json.dumps(answer), range(3, 5), Sampling(LONGEST, kept_limit=kept_limit)
    return read_group(text, REQUEST, sampling, vocab_size=10, stop_token_ids=[1, 2], versions=versions)


def test_a_right_answer_is_read():
    first, second = read(group())
    assert (first.group, first.prompt_ids, first.finish_reason) == (7, [5, 6], "stop")
    assert first.weight_versions == second.weight_versions == ((3, 2), (4, 1))
    assert first.completion_ids.tolist() == [4, 9, 1]
    assert first.behavior_logprobs.tolist() == [-0.5, -2.0, 0.0]
    assert first.behavior_logprobs.dtype == np.float32


KEPT = [[4], [2, 9, 0], [5, 1]]


def test_kept_sets_are_read_where_they_were_asked_for():
    answer = group()
    for choice in answer["choices"]:
        choice["sampling_mask"] = KEPT
    first, _ = read(answer, kept_limit=3)
    assert (first.kept_counts.tolist(), first.kept_ids.tolist()) == ([1, 3, 2], [4, 2, 9, 0, 5, 1])
    assert first.kept_counts.dtype == first.kept_ids.dtype == np.int32
    assert read(answer)[0].kept_counts is None  # an evaluation's


@pytest.mark.parametrize(
    ("sampling_mask", "message"),
    [
        (None, "no sampling_mask"),
        (KEPT[:2], "2 kept sets for 3 tokens"),
        ([[4], [2, 0], [1]], r"the token 9, drawn from \[2, 0\]"),
        ([[], [9], [1]], r"the token 4, drawn from \[\]"),
        ([[4], [9, 10], [1]], "the kept token 10, wanted 0 to 9"),
    ],
)
def test_kept_sets_that_tokens_cannot_be_from_are_refused(sampling_mask, message):
    answer = group(sampling_mask=sampling_mask)
    answer["choices"][0]["sampling_mask"] = KEPT
    with pytest.raises(AnswerError, match=message):
        read(answer, kept_limit=3)


def test_an_engine_that_tells_kept_sets_has_a_top_k_for_every_request():
    """vLLM refuses others; without them nothing changes."""
    telling = options(True, kept_limit=512)
    assert telling.engine_arguments()["return_sampling_mask"] is True
    assert telling.limited(Sampling(3, top_p=0.95, kept_limit=512)) == Sampling(3, 1.0, 0.95, 512, 512)
    assert telling.limited(Sampling(3, top_k=20, kept_limit=512)).top_k == 20
    assert telling.limited(Sampling(3, top_p=0.95)) == Sampling(3, 1.0, 0.95, 512)  # an evaluation's
    assert "return_sampling_mask" not in options(True).engine_arguments()
    assert options(False).limited(Sampling(3, top_p=0.95, kept_limit=512)) == Sampling(3, top_p=0.95)


def test_a_model_runner_that_tells_no_kept_sets_is_refused_where_they_are_wanted(monkeypatch):
    """By vLLM minutes later, and without the recipe's keys."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    options(True).engine_arguments()
    with pytest.raises(RecipeError, match=r"VLLM_USE_V2_MODEL_RUNNER=0 .* unset it, or set top_p = 1 and top_k = 0"):
        options(True, kept_limit=512).engine_arguments()


@pytest.mark.parametrize(("tells", "kept_limit"), [(True, 0), (False, 512)])
def test_a_server_of_another_truncation_is_refused_before_the_start(model_path, recipe, tells, kept_limit):
    policy: Any = SimpleNamespace(model=SimpleNamespace(config=read_config(model_path)))
    weights = weight_shapes(policy.model.config)
    served = {"dtype": "bfloat16", "weight_transfer": "nccl", "weights": weights, "max_model_len": 64}
    client: Any = SimpleNamespace(lost={}, ask_workers=lambda *_: {"http://a": [served | {"tells_kept_sets": tells}]})
    with pytest.raises(RunInputError, match=r"http://a was started with other rollout\.top_p and top_k"):
        generator_module._check_servers(client, policy, recipe, options(True, kept_limit), longest_prompt=8)


def spans(*ends: tuple[Any, int, int]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in ends]


def logprobs(*values: Any) -> dict[str, Any]:
    return {"content": [{"logprob": value} for value in values]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [4, 1]}, "3 log-probs for 2 tokens"),
        ({"token_ids": [4, 9, 1, 1], "weight_versions": spans(("3", 0, 4))}, "4 tokens, cut at 3"),
        ({"token_ids": [], "weight_versions": []}, "token_ids: .* at least 1 item"),
        ({"token_ids": [4, 9, 10]}, "the token 10, wanted 0 to 9"),
        ({"token_ids": [4, -9, 1]}, "token_ids.1: .* greater than or equal to 0"),
        ({"token_ids": [4, 9, 10**30]}, "token_ids.2: "),
        ({"token_ids": [4.0, 9.0, 1.0]}, "token_ids.0: .* integer"),
        ({"logprobs": logprobs(-1.0, -1.0)}, "2 log-probs for 3 tokens"),
        ({"logprobs": logprobs(-1.0, -1.0, 0.1)}, "content.2.logprob: .* less than or equal to 0.00001"),
        ({"logprobs": logprobs(-1.0, -1.0, math.nan)}, "content.2.logprob: .* finite"),
        ({"logprobs": logprobs(-1.0, -1.0, -9999.0)}, "content.2.logprob: "),  # vLLM's word for NaN
        ({"logprobs": logprobs(-1.0, -1.0, "-1.0")}, "content.2.logprob: .* number"),
        ({"token_ids": [4, 9, 5]}, r"a stop at the token 5, wanted one of \[1, 2\]"),
        ({"finish_reason": "abort"}, "finish_reason: .* 'stop' or 'length'"),
        ({"token_ids": [4, 9], "weight_versions": spans(("3", 0, 2)), "finish_reason": "length"}, "2 tokens, cut at 3"),
        ({"weight_versions": spans((3.9, 0, 3))}, "weight_versions.0.version: .* integer"),
        ({"weight_versions": spans(("2", 0, 3))}, "weights 2, wanted 3 to 4"),
        ({"weight_versions": spans(("5", 0, 3))}, "weights 5, wanted 3 to 4"),
        ({"weight_versions": spans(("3", 0, 1), ("4", 2, 3))}, "weight versions of the tokens"),
        ({"weight_versions": spans(("3", 0, 2))}, "weight versions of the tokens"),
        ({"weight_versions": spans(("3", 0, 3), ("4", 3, 2), ("3", 2, 3))}, "weight versions of the tokens"),
        ({"index": 1}, r"completions \[1, 1\], wanted 2"),
    ],
)
def test_an_answer_that_was_not_asked_for_is_refused(changes, message):
    with pytest.raises(AnswerError, match=message):
        read(group(**changes))


@pytest.mark.parametrize("key", ["index", "token_ids", "logprobs", "finish_reason", "weight_versions"])
def test_an_answer_that_lacks_a_part_is_refused(key):
    answer = group()
    del answer["choices"][1][key]
    with pytest.raises(AnswerError, match=key):
        read(answer)


class FakeServer:
    """Answers what is asked of it by `answer(request)`; `tokens` is what it says that it has sampled."""

    def __init__(self, answer: Callable[[web.Request], Any]):
        self.tokens, self.num_pings, self.keys = 0, 0, set[str | None]()
        self._loop, self._posted = asyncio.new_event_loop(), answer
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    async def _start(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.keys.add(request.headers.get("Authorization"))
        if request.method == "POST":
            return await self._posted(request)
        self.num_pings += 1
        return web.Response(text=f'# TYPE\nvllm:generation_tokens_total{{engine="0"}} {self.tokens}.0\nother 5\n')

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture
def serve():
    """serve(answer, ...) -> fake servers, a client of them."""
    opened: list[Any] = []

    def start(*answers: Callable[[web.Request], Any], timeout_s: float = 30.0) -> tuple[list[FakeServer], VllmServers]:
        servers = [FakeServer(answer) for answer in answers]
        client = VllmServers([server.url for server in servers], [1], timeout_s, vocab_size=10, key="secret")
        opened.extend([client, *servers])
        return servers, client

    yield start
    for each in opened:
        each.close()


ONE_VERSION = spans(("3", 0, 3))


async def right(_: web.Request, **more: Any) -> web.Response:
    answer = group(weight_versions=ONE_VERSION)
    answer["choices"][0]["weight_versions"] = ONE_VERSION
    return web.json_response(answer | more)


async def never(_: web.Request) -> web.Response:
    await asyncio.sleep(1000)
    return web.Response()


async def wrong(_: web.Request) -> web.Response:
    return web.json_response(group(token_ids=[10, 9, 1]))


async def text(_: web.Request) -> web.Response:
    return web.Response(text="<html>")


async def nested(_: web.Request) -> web.Response:
    return web.Response(text="[" * 100_000)


async def elsewhere(_: web.Request) -> web.Response:
    raise web.HTTPFound("http://127.0.0.1:9/")


async def broken(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.write(b"SSH-2.0\r\n\r\n")
    request.transport.close()
    return web.Response()


@pytest.mark.parametrize("answer", [wrong, text, nested, elsewhere, broken])
def test_a_server_that_answers_something_else_ends_the_run_by_its_name(serve, answer):
    (server,), client = serve(answer)
    with pytest.raises(GeneratorFailure, match=server.url):
        list(client.generate([REQUEST], Sampling(LONGEST)))


@pytest.mark.parametrize("loaded", [2, 4])
def test_a_server_that_another_run_gave_its_weights_ends_the_run(serve, loaded):
    (server,), client = serve(right)
    client.version = client.loaded = loaded
    with pytest.raises(GeneratorFailure, match=f"{server.url} .* of the weights 3, wanted {loaded} to {loaded}"):
        list(client.generate([REQUEST], Sampling(LONGEST)))


def test_a_server_whose_health_answers_but_which_samples_nothing_is_dropped(serve, caplog):
    """Without another one the generation ends."""
    (stuck, other), client = serve(never, right, timeout_s=1.0)
    groups = list(client.generate([REQUEST, REQUEST], Sampling(LONGEST)))
    assert len(groups) == 2
    assert f"the vLLM server at {stuck.url} is dropped: it has sampled nothing for 1 s; 1 left" in caplog.text
    assert client.urls == [other.url]
    assert stuck.keys == other.keys == {"Bearer secret"}
    client.drop(other.url, "lost by another rank")
    with pytest.raises(
        GeneratorFailure, match=r"no vLLM server is left: .* nothing for 1 s; .* by another rank; start"
    ):
        list(client.generate([REQUEST], Sampling(LONGEST)))


def test_a_server_that_gets_on_slowly_is_not_dropped(serve):
    """By its count of tokens, which a long completion has long before its end."""

    async def slow(request: web.Request) -> web.Response:
        for _ in range(12):
            server.tokens += 1
            await asyncio.sleep(0.25)
        return await right(request)

    (server,), client = serve(slow, timeout_s=1.0)
    assert len(list(client.generate([REQUEST], Sampling(LONGEST)))) == 1


def test_a_trainer_that_was_stopped_itself_drops_no_server(serve):
    """Its clock has run on meanwhile; the answers have come, as far as they fitted on the way."""

    async def soon(request: web.Request) -> web.Response:
        while server.num_pings < 3:
            await asyncio.sleep(0.01)
        are_asked.set()
        await asyncio.sleep(0.5)
        return await right(request, more="x" * 30_000_000)

    are_asked = threading.Event()
    (server,), client = serve(soon, timeout_s=2.0)
    with ThreadPoolExecutor(2) as threads:
        groups = threads.submit(lambda: list(client.generate([REQUEST], Sampling(LONGEST))))
        paused = threads.submit(client.pause)
        are_asked.wait()
        ctypes.PyDLL(None).usleep(4_000_000)  # no thread of this process runs meanwhile
        assert len(groups.result()) == 1
        paused.result()


def test_no_thread_waits_for_servers_that_are_closed(monkeypatch):
    """Python would not exit: it joins the threads in which vLLM's NCCL sender asks."""
    asked, refused = threading.Semaphore(0), []

    async def silent(self, method: str, address: str, body: Any = None) -> str:
        """As where a machine is gone: there is no connection yet."""
        asked.release()
        await asyncio.sleep(1000)
        return ""

    def update() -> None:
        try:
            client.update_weights({})
        except (CancelledError, GeneratorFailure) as error:
            refused.append(type(error))

    def begin() -> threading.Thread:
        thread = threading.Thread(target=update, daemon=True)
        thread.start()
        return thread

    monkeypatch.setattr(VllmServers, "_text", silent)
    client = VllmServers(["http://gone"], [1], timeout_s=30.0, vocab_size=10, key="")
    waiting = [begin() for _ in range(5)]
    for _ in waiting:
        assert asked.acquire(timeout=30)
    client.close()
    for thread in waiting:
        thread.join(5)
    assert refused == [CancelledError] * 5
    begin().join(5)  # as one that comes late
    assert refused[5:] == [GeneratorFailure]
    client.close()  # again, which costs nothing


@pytest.fixture
def empty_source(model_path) -> DecoderSource:
    config = ModelConfig.from_dict(json.loads((model_path / "config.json").read_text()))
    return DecoderSource({}, config, torch.float32)


def world_of(is_main: bool, lost_elsewhere: dict[str, str]) -> Any:
    """A rank, and what another one has lost."""
    return SimpleNamespace(
        is_main=is_main,
        device=torch.device("cuda"),
        gather=lambda lost: [lost, lost_elsewhere],
        everywhere=lambda work: [work()],
        on_main=lambda work: work() if is_main else None,
    )


async def nothing(request: web.Request) -> web.Response:
    answers = {"/expect_weights": [None, None], "/weight_digests": [{}, {}]}
    return web.json_response(answers.get(request.path))


def test_a_server_that_another_rank_has_lost_is_dropped(serve, empty_source, caplog):
    (first, second), client = serve(nothing, nothing)
    generator = ServersGenerator(client, options(False), world_of(False, {first.url: "it died"}), ExitStack())
    generator.load_weights(empty_source, 3)
    assert client.urls == [second.url]
    assert f"the vLLM server at {first.url} is dropped: it died; 1 left" in caplog.text
    assert (generator.weight_version, client.loaded) == (3, 3)


class Group:
    """vLLM's end of an NCCL group, which waits for a server that does not come until it is torn down."""

    def __init__(self, is_waiting: bool = False):
        self.is_torn_down = threading.Event()
        self.is_waiting, self.num_sent = is_waiting, 0

    def send_weights(self) -> None:
        self.num_sent += 1
        if self.is_waiting:
            self.is_torn_down.wait()

    def shutdown(self) -> None:
        self.is_torn_down.set()


@pytest.fixture
def nccl(monkeypatch):
    """set(open_nccl): vLLM's is this one."""

    def patch(open_nccl: Callable[..., Group]) -> None:
        monkeypatch.setattr(generator_module, "vllm_engine", lambda: SimpleNamespace(open_nccl=open_nccl))

    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    return patch


@pytest.mark.parametrize("phase", ["opening", "sending"])
def test_nccl_is_not_waited_for_without_end(serve, nccl, empty_source, phase):
    (_,), client = serve(nothing)
    group = Group(is_waiting=True)

    def open_group(*_):
        if phase == "opening":
            group.is_torn_down.wait()
        return group

    nccl(open_group)
    client.timeout_s = 0.5
    generator = ServersGenerator(client, options(True), world_of(True, {}), ExitStack())
    with pytest.raises(SyncError, match=r"version 3 .* servers had not done their part over NCCL within 0\.5 s"):
        generator.load_weights(empty_source, 3)
    assert group.is_torn_down.is_set() == (phase == "sending")
    group.is_torn_down.set()


def test_an_nccl_group_that_has_lost_a_server_is_made_anew(serve, nccl, empty_source):
    servers, client = serve(nothing, nothing)
    groups, sizes, lost = [], [], {}

    def open_group(_, source, address, port, world_size, is_sparse):
        sizes.append(world_size)
        groups.append(Group())
        return groups[-1]

    nccl(open_group)
    generator = ServersGenerator(client, options(True), world_of(True, lost), ExitStack())
    for version in (1, 2):
        generator.load_weights(empty_source, version)
    lost[servers[0].url] = "it died"
    generator.load_weights(empty_source, 3)
    assert sizes == [5, 3]  # with the trainer's rank, and two workers a server
    assert [(group.num_sent, group.is_torn_down.is_set()) for group in groups] == [(2, True), (1, False)]
    generator.close()
    assert groups[1].is_torn_down.is_set()
