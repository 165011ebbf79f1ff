"""Generation by `vllm serve` processes on other GPUs or machines, over HTTP: token ids in, token ids out.

Requests go to the server with the fewest completions in flight, all at once. One that dies, or does not get on for
`timeout_s`, is dropped with a warning, and what it had not finished goes to the others. One whose answers are not what
was asked for ends the generation: what else it gets wrong cannot be known.
"""

import asyncio
import logging
import queue
import re
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import aiohttp

from flashgrpo.grpo.errors import GeneratorFailure
from flashgrpo.grpo.rollout.vllm.answers import AnswerError, read_group
from flashgrpo.grpo.rollout.vllm.options import sampling_fields
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.model.files import parse_json

logger = logging.getLogger(__name__)

_PING_S = 5.0
_PARTS = 8  # of a time limit
_LOST = aiohttp.ClientError, OSError
_TOKENS = re.compile(r"^vllm:generation_tokens_total(?:{.*})? (\S+)$", re.MULTILINE)
_LARGEST_VOCABULARY = 1 << 24

T = TypeVar("T")


class ServerRefusal(GeneratorFailure):
    """A server that answered, but with an error, or with what was not asked for."""


class VllmServers:
    """A generator over servers, and the receiving side of a weight transfer to all of them at once: vLLM's
    `VLLMWeightSyncClient`. `version` names the weights that are on their way, `loaded` those that have come; whoever
    sends them sets both. Methods may be called from any thread.
    """

    def __init__(
        self,
        urls: Sequence[str],
        stop_token_ids: list[int],
        timeout_s: float,
        vocab_size: int = _LARGEST_VOCABULARY,
        key: str = "",  # of servers that want one
    ):
        self.stop_token_ids, self.timeout_s, self.vocab_size, self.key = stop_token_ids, timeout_s, vocab_size, key
        self.version = self.loaded = 0
        self.in_flight = {url.rstrip("/"): 0 for url in urls}  # completions, by live server
        self.lost: dict[str, str] = {}  # why, by server
        self.all_or_none = False  # an NCCL group: a call that one server misses fails
        self._answers = dict.fromkeys(self.in_flight, 0)
        self._dropped = {url: asyncio.Event() for url in self.in_flight}
        self._running: set[Any] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True).start()
        self._session = self._run(self._open())

    @property
    def servers(self) -> list[str]:
        """Those that live."""
        return [*self.in_flight]

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts as soon as the last of them is done.

        Raises GeneratorFailure when no server is left, or one refuses a request.
        """
        done: queue.SimpleQueue[list[Rollout] | BaseException] = queue.SimpleQueue()
        running = asyncio.run_coroutine_threadsafe(self._generate(requests, sampling, done), self._loop)
        self._running.add(running)
        try:
            for _ in requests:
                group = done.get()
                if isinstance(group, BaseException):
                    raise group
                yield group
        finally:
            running.cancel()
            self._running.discard(running)

    def get(self, path: str) -> dict[str, Any]:
        """Every live server's answer, by address."""
        return self._run(self._all("GET", path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Every live server's answer to the same body."""
        return self._run(self._all("POST", path, dict.fromkeys(self.servers, body or {})))

    def rpc(self, method: str) -> dict[str, list[dict[str, Any]]]:
        """The answers of each server's workers, of which there is one at least."""
        answers = self.post(f"collective_rpc?method={method}", {"method": method})
        for url, answer in answers.items():
            results = answer.get("results")
            if not (isinstance(results, list) and results and all(isinstance(result, dict) for result in results)):
                raise ServerRefusal(f"{url} answered {method} by {str(answer)[:100]}, wanted results of its workers")
        return {url: answer["results"] for url, answer in answers.items()}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving ends; with NCCL every server's workers get ranks of their own."""
        bodies, offset = {}, init_info.get("rank_offset")
        sizes = self.world_sizes() if offset is not None else {}
        for url in self.servers:
            bodies[url] = {"init_info": init_info if offset is None else {**init_info, "rank_offset": offset}}
            offset = None if offset is None else offset + sizes[url]
        self._run(self._all("POST", "init_weight_transfer_engine", bodies))

    def start_weight_update(self) -> None:
        """Make room for new weights; what is being generated waits."""
        self.post("pause?mode=keep")
        try:
            self.post("start_weight_update")
        except ServerRefusal as error:
            if "already active" not in str(error):
                raise
            # A trainer was killed in the middle of one. What it has sent is overwritten by what comes now.
            self._run(self._all("POST", "finish_weight_update", {url: {} for url in self.servers}, may_refuse=True))
            self.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Load a part of them."""
        self.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Sample from the new weights, with nothing of the old ones in the cache: what was being generated goes on
        from where it was, its keys and values made anew.
        """
        self.post("finish_weight_update", {"weight_version": weight_version or str(self.version)})
        for url, answer in self.post("reset_prefix_cache?reset_running_requests=true").items():
            if not answer.get("success"):
                raise ServerRefusal(f"{url} keeps what it has cached of older weights: it could not reset its cache")
        self.post("resume")

    def world_sizes(self) -> dict[str, int]:
        """Workers of each server."""
        sizes = {url: answer.get("world_size") for url, answer in self.get("get_world_size").items()}
        for url, size in sizes.items():
            if not (isinstance(size, int) and size > 0):
                raise ServerRefusal(f"{url} has {size!r} workers, wanted a number")
        return sizes

    def weight_digests(self) -> list[dict[str, int]]:
        """Checksums of what the first update received, by name, of every worker."""
        return [worker for workers in self.rpc("weight_digests").values() for worker in workers]

    def drop(self, url: str, why: str) -> None:
        """Use a server no more."""
        if url in self.in_flight:
            del self.in_flight[url]
            self.lost[url] = why
            logger.warning("the vLLM server at %s is dropped: %s; %d left", url, why, len(self.in_flight))
            self._loop.call_soon_threadsafe(self._dropped[url].set)

    def close(self) -> None:
        """Break off what runs."""
        for running in [*self._running]:
            running.cancel()
        self._run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # an idle one may close just then
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _all(
        self, method: str, path: str, bodies: dict[str, Any] | None = None, may_refuse: bool = False
    ) -> dict[str, Any]:
        """One call to each live server, side by side; those that cannot be reached in time are dropped. Where one
        refuses, all are waited for.
        """
        step = path.partition("?")[0]
        urls = [*bodies] if bodies is not None else self.servers

        async def call(url: str) -> Any:
            try:
                return await self._in_time(self._call(method, f"{url}/{path}", bodies and bodies[url]))
            except TimeoutError:
                self.drop(url, f"it did not answer {step} within {self.timeout_s:g} s")
            except _LOST as error:
                self.drop(url, f"{step}: {_said(error)}")

        answers = dict(zip(urls, await asyncio.gather(*map(call, urls), return_exceptions=True), strict=True))
        for answer in answers.values():
            if isinstance(answer, BaseException) and not (may_refuse and isinstance(answer, ServerRefusal)):
                raise answer
        self._require_server()
        if self.all_or_none and not {*urls} <= self.in_flight.keys():
            raise GeneratorFailure(f"{step} without {', '.join(url for url in urls if url in self.lost)}")
        return {url: answer for url, answer in answers.items() if url in self.in_flight}

    async def _in_time(self, call: Coroutine[Any, Any, T]) -> T:
        """Its result. Time is counted in parts: a trainer that was itself stopped, or found no free processor, loses
        one of them and then hears what has come meanwhile.
        """
        task = asyncio.ensure_future(call)
        try:
            for _ in range(_PARTS):
                if (await asyncio.wait({task}, timeout=self.timeout_s / _PARTS))[0]:
                    return task.result()
            raise TimeoutError
        finally:
            task.cancel()

    async def _call(self, method: str, address: str, body: Any = None) -> dict[str, Any]:
        """A server's answer, an object of JSON; {} where it is empty."""
        text = await self._text(method, address, body)
        try:
            answer = parse_json(text or "{}")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerRefusal(f"{address} answered {text[:100]!r}, wanted an object of JSON")
        return answer

    async def _text(self, method: str, address: str, body: Any = None) -> str:
        async with self._session.request(method, address, json=body, allow_redirects=False) as response:
            text = (await response.read()).decode(errors="replace")
            if response.status == 200:
                return text
        said = f"{address} answered {response.status}: {_reason(text)}"
        if response.status >= 500 and not await self._is_healthy(address):
            raise ConnectionError(said)  # its engine has died
        raise ServerRefusal(said)

    async def _is_healthy(self, address: str) -> bool:
        async with self._session.get("/".join([*address.split("/")[:3], "health"])) as response:
            return response.status == 200

    async def _generate(self, requests: list[Request], sampling: Sampling, done: queue.SimpleQueue) -> None:
        watchers = [asyncio.create_task(self._watch(url)) for url in self.servers]

        async def complete(request: Request) -> None:
            try:
                done.put(await self._complete(request, sampling))
            except Exception as error:  # it is raised where the groups are taken
                done.put(error)

        try:
            await asyncio.gather(*map(complete, requests))
        except asyncio.CancelledError:
            done.put(GeneratorFailure("the generation was broken off"))
            raise
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def _complete(self, request: Request, sampling: Sampling) -> list[Rollout]:
        """One group, by whichever server is left."""
        fields = sampling_fields(sampling, request, self.stop_token_ids)
        body = {"token_ids": request.prompt_ids, "sampling_params": fields}
        while True:
            self._require_server()
            url = min(self.in_flight, key=lambda url: self.in_flight[url])
            self.in_flight[url] += len(request.seeds)
            oldest = self.loaded
            call = asyncio.create_task(self._call("POST", f"{url}/inference/v1/generate", body))
            dropped = asyncio.create_task(self._dropped[url].wait())
            try:
                await asyncio.wait({call, dropped}, return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    answer = call.result()
                    self._answers[url] += 1
                    versions = range(oldest, (self.version or sys.maxsize - 1) + 1)
                    return read_group(answer, request, sampling, self.vocab_size, self.stop_token_ids, versions)
            except AnswerError as error:
                raise ServerRefusal(f"{url} answered with what is no group of completions: {error}") from error
            except _LOST as error:
                self.drop(url, _said(error))
            finally:
                call.cancel()
                dropped.cancel()
                if url in self.in_flight:
                    self.in_flight[url] -= len(request.seeds)

    async def _watch(self, url: str) -> None:
        """Drop a server that lives no more, or does not get on: no answer, and no token by its own count. Silence is
        counted in pings, for the reason that `_in_time` has.
        """
        ping_s, silent, before = min(_PING_S, self.timeout_s / 4), 0, (0, 0.0)
        while url in self.in_flight:
            tokens, _ = await asyncio.gather(self._tokens(url, ping_s), asyncio.sleep(ping_s))
            now = self._answers[url], before[1] if tokens is None else tokens
            is_at_work = self.in_flight.get(url) and self.loaded == self.version  # or it is paused
            silent = silent + 1 if now == before and is_at_work else 0
            before = now
            if silent * ping_s >= self.timeout_s:
                self.drop(url, f"it has sampled nothing for {self.timeout_s:g} s")

    async def _tokens(self, url: str, limit_s: float) -> float | None:
        """Tokens that a server has sampled since it started; None where it does not say."""
        try:
            async with asyncio.timeout(limit_s):
                await self._text("GET", f"{url}/health")
                return sum(map(float, _TOKENS.findall(await self._text("GET", f"{url}/metrics"))))
        except (ServerRefusal, TimeoutError, ValueError):
            return None
        except _LOST as error:
            self.drop(url, f"no sign of life: {_said(error)}")

    def _require_server(self) -> None:
        if not self.in_flight:
            raise GeneratorFailure(
                "no vLLM server is left: "
                + "; ".join(f"{url}: {why}" for url, why in self.lost.items())
                + "; start them again, or others as vllm.servers, and continue with --resume"
            )


def _reason(text: str) -> str:
    """The message in an answer of vLLM's."""
    try:
        return str(parse_json(text)["error"]["message"])[:500]
    except (ValueError, LookupError, TypeError, RecursionError):
        return text[:500]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
