"""Generation by `vllm serve` processes on other GPUs or machines, over HTTP: token ids in, token ids out.

Requests go to the server with the fewest requests in flight, all at once. One that dies, or does
not get on for `timeout_s`, is dropped with a warning, and what it had not finished goes to the
others. One whose answers are not what was asked for ends the generation: what else it gets wrong
cannot be known.
"""

import asyncio
import logging
import re
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import aiohttp
from pydantic import TypeAdapter

from flashgrpo.grpo.errors import GeneratorFailure
from flashgrpo.grpo.rollout.vllm.answers import AnswerError, parse, read_group, sampling_fields
from flashgrpo.grpo.types import Request, Rollout, Sampling

logger = logging.getLogger(__name__)

_PING_S = 5.0
_PINGS = 8  # at least so many in a time limit
_BROKEN = aiohttp.ClientError, OSError
_GENERATE = "inference/v1/generate"
_TOKENS = re.compile(r"^vllm:generation_tokens_total(?:{.*})? (\S+)$", re.MULTILINE)

T = TypeVar("T")


class ServerRefusal(GeneratorFailure):
    """A server that answered, but with an error, or with what was not asked for."""


@dataclass
class _Server:
    """One that lives, and what it has to do."""

    url: str
    dropped: asyncio.Future[None]
    asked: list[str] = field(default_factory=list)  # paths of the calls under way
    answers: int = 0
    num_workers: int = 0


class VllmServers:
    """A generator over servers, and the receiving side of a weight transfer to all of them at once:
    vLLM's `VLLMWeightSyncClient`. `version` names the weights that are on their way, `loaded` those
    that have come; whoever sends them sets both. Methods may be called from any thread.
    """

    def __init__(self, urls: Sequence[str], stop_token_ids: list[int], timeout_s: float, vocab_size: int, key: str):
        self.stop_token_ids, self.timeout_s, self.vocab_size = stop_token_ids, timeout_s, vocab_size
        self.version = self.loaded = 0
        self.lost: dict[str, str] = {}  # why, by server
        self._loop = asyncio.new_event_loop()
        servers = [_Server(url.rstrip("/"), self._loop.create_future()) for url in urls]
        self._live = {server.url: server for server in servers}
        self._is_closed, self._closing = False, threading.Lock()
        threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True).start()
        self._run(self._open(key))

    @property
    def urls(self) -> list[str]:
        """Of those that live."""
        return [*self._live]

    @property
    def num_workers(self) -> int:
        """Of those that live, as they said when they were last asked for something."""
        return sum(server.num_workers for server in self._live.values())

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts as soon as the last of them is done.

        Raises GeneratorFailure when no server is left, or one refuses a request.
        """
        running = [self._submit(self._complete(request, sampling)) for request in requests]
        try:
            for group in as_completed(running):
                yield group.result()
        finally:
            for each in running:
                each.cancel()

    def ask_workers(self, method: str, form: TypeAdapter[list[T]]) -> dict[str, list[T]]:
        """What each server's workers answer."""
        answers = self._call(method, read=partial(parse, form))
        for server, answer in answers:
            server.num_workers = len(answer)
        return {server.url: answer for server, answer in answers}

    def pause(self) -> None:
        """Completions under way stand still, with the tokens that they have, until the next weights are there. Nothing
        that was made by the old ones stays in the cache: their keys and values are made anew.
        """
        self._call("pause?mode=keep&clear_cache=true")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving ends of an NCCL group."""
        # vLLM's payload is for one server: all of them would take the same ranks.
        bodies, offset = [], init_info["rank_offset"]
        for server in [*self._live.values()]:
            bodies.append((server, {"init_info": {**init_info, "rank_offset": offset}}))
            offset += server.num_workers
        self._run(self._all("init_weight_transfer_engine", bodies, str))

    def start_weight_update(self) -> None:
        """Make room for new weights."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Load a part of them."""
        self._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Sample from the new weights; what was being generated goes on from where it was."""
        self._call("finish_weight_update", {"weight_version": weight_version or str(self.version)})
        self._call("resume")

    def drop(self, url: str, why: str) -> None:
        """Use a server no more."""
        if server := self._live.pop(url, None):
            self.lost[url] = why
            logger.warning("the vLLM server at %s is dropped: %s; %d left", url, why, len(self._live))
            self._loop.call_soon_threadsafe(server.dropped.set_result, None)

    def close(self) -> None:
        """Break off what runs, and refuse what is asked for later. No thread is left waiting: Python would not exit
        before those of vLLM's NCCL sender.
        """
        with self._closing:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, path: str, body: Any = None, read: Callable[[str], T] = str) -> list[tuple[_Server, T]]:
        """Every live server's answer to the same body, as `read` has it."""
        bodies = [(server, body or {}) for server in [*self._live.values()]]
        return self._run(self._all(path, bodies, read))

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._closing:  # a call that came between `_close` and the loop's end would never be answered
            if not self._is_closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise GeneratorFailure("the generator over vLLM servers was closed; open another one")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()

    async def _open(self, key: str) -> None:
        # A connection for each call: a server may close an idle one at the very moment that a call begins.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self._live.values()]

    async def _close(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        # A thread that waits for one wakes when it has ended, some rounds of the loop later.
        await asyncio.gather(*running, return_exceptions=True)
        await self._session.close()

    async def _all(
        self, path: str, bodies: list[tuple[_Server, Any]], read: Callable[[str], T]
    ) -> list[tuple[_Server, T]]:
        """One call to each of these servers, side by side; those that are lost meanwhile are left out."""
        calls = [self._ask(server, path, body, read) for server, body in bodies]
        # Not the first error at once: a call that is still under way would meet the next step.
        found = await asyncio.gather(*calls, return_exceptions=True)
        answers = []
        for (server, _), answer in zip(bodies, found, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            if answer is not None:
                answers.append((server, answer))
        self._require_server()
        return answers

    async def _complete(self, request: Request, sampling: Sampling) -> list[Rollout]:
        """One group, by whichever server is left."""
        fields = sampling_fields(sampling, request, self.stop_token_ids)
        body = {"token_ids": request.prompt_ids, "sampling_params": fields, "priority": request.priority}
        group = None
        while group is None:
            self._require_server()
            server = min([*self._live.values()], key=lambda server: len(server.asked))
            read = partial(self._read, request, sampling, self.loaded)
            group = await self._ask(server, _GENERATE, body, read)
        return group

    def _read(self, request: Request, sampling: Sampling, oldest: int, answer: str) -> list[Rollout]:
        # New weights may have come while it was sampled; where none are sent at all, any version is right.
        versions = range(oldest, (self.version or sys.maxsize - 1) + 1)
        return read_group(answer, request, sampling, self.vocab_size, self.stop_token_ids, versions)

    async def _ask(self, server: _Server, path: str, body: Any, read: Callable[[str], T]) -> T | None:
        """A server's answer, as `read` has it; None where it is dropped meanwhile, as for a connection that breaks."""
        step = path.partition("?")[0]
        call = asyncio.create_task(self._text("POST", f"{server.url}/{path}", body))
        server.asked.append(step)
        try:
            # One that `_watch` drops may never answer.
            await asyncio.wait({call, server.dropped}, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                server.answers += 1
                return read(call.result())
        except AnswerError as error:
            raise ServerRefusal(f"{server.url} answered {step} with what was not asked for: {error}") from error
        except _BROKEN as error:
            self.drop(server.url, f"{step}: {type(error).__name__}: {error}")
        finally:
            call.cancel()
            server.asked.remove(step)

    async def _text(self, method: str, address: str, body: Any = None) -> str:
        async with self._session.request(method, address, json=body, allow_redirects=False) as response:
            text = (await response.read()).decode(errors="replace")
            if response.status == 200:
                return text
        said = f"{address} answered {response.status}: {text[:500]}"
        if response.status >= 500:  # its engine may have died, and the rest of it lives
            async with self._session.get("/".join([*address.split("/")[:3], "health"])) as health:
                if health.status != 200:
                    raise ConnectionError(said)
        raise ServerRefusal(said)

    async def _watch(self, server: _Server) -> None:
        """Drop a server that does not get on: no answer, and no token by its own count. Silence is counted in pings: a
        trainer that was itself stopped, or found no free processor, loses one of them, and then hears what has come
        meanwhile.
        """
        ping_s = min(_PING_S, self.timeout_s / _PINGS)
        silent, before, tokens = 0, 0, 0.0
        while not server.dropped.done():
            # While new weights are on their way, completions stand still.
            steps = [step for step in server.asked if step != _GENERATE]
            if not steps and (not server.asked or self.loaded != self.version):
                silent = 0
                await asyncio.sleep(ping_s)
                continue
            found, _ = await asyncio.gather(self._tokens(server, ping_s), asyncio.sleep(ping_s))
            found = tokens if found is None else found
            silent = silent + 1 if (server.answers, found) == (before, tokens) else 0
            before, tokens = server.answers, found
            if silent * ping_s >= self.timeout_s:
                what = f"did not answer {steps[0]}" if steps else "has sampled nothing"
                self.drop(server.url, f"it {what} for {self.timeout_s:g} s")

    async def _tokens(self, server: _Server, limit_s: float) -> float | None:
        """Tokens that a server has sampled since it started; None where it does not say."""
        try:
            async with asyncio.timeout(limit_s):
                counts = _TOKENS.findall(await self._text("GET", f"{server.url}/metrics"))
            return sum(map(float, counts))
        except (ServerRefusal, TimeoutError, ValueError):
            return None
        except _BROKEN as error:
            self.drop(server.url, f"no sign of life: {type(error).__name__}: {error}")

    def _require_server(self) -> None:
        if not self._live:
            raise GeneratorFailure(
                "no vLLM server is left: "
                + "; ".join(f"{url}: {why}" for url, why in self.lost.items())
                + "; start them again, or others as vllm.servers, and continue with --resume"
            )
