"""Generation by `vllm serve` processes on other GPUs or machines, over HTTP: token ids in, token ids out.

Requests go to the server with the fewest completions in flight, all at once. One that dies, or gives no sign of life
for `timeout_s`, is dropped with a warning, and what it had not finished goes to the others.
"""

import asyncio
import json
import logging
import queue
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import aiohttp
import numpy as np

from flashgrpo.grpo.rollout import Request, Rollout, Sampling
from flashgrpo.grpo.vllm_options import sampling_fields
from flashgrpo.grpo.world import GeneratorFailure

logger = logging.getLogger(__name__)

_PING_S = 5.0
_LOST = aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, ConnectionError

T = TypeVar("T")


class ServerRefusal(GeneratorFailure):
    """A server that answered, but with an error."""


class VllmServers:
    """A generator over servers, and the receiving side of a weight transfer to all of them at once: vLLM's
    `VLLMWeightSyncClient`. `version` names the weights that are on their way. Methods may be called from any thread.
    """

    def __init__(self, urls: Sequence[str], stop_token_ids: list[int], timeout_s: float):
        self.stop_token_ids, self.timeout_s, self.version = stop_token_ids, timeout_s, 0
        self.in_flight = {url.rstrip("/"): 0 for url in urls}  # completions, by live server
        self.lost: dict[str, str] = {}  # why, by server
        self.all_or_none = False  # an NCCL group: a call that one server misses fails
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
        """The answers of each server's workers."""
        return {url: answer["results"] for url, answer in self.post("collective_rpc", {"method": method}).items()}

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
            raise ServerRefusal(f"{error} A run was killed in the middle of one: start that server again") from error

    def update_weights(self, update_info: Any) -> None:
        """Load a part of them."""
        self.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Sample from the new weights, with nothing of the old ones in the cache: what was being generated goes on
        from where it was, its keys and values made anew.
        """
        self.post("finish_weight_update", {"weight_version": weight_version or str(self.version)})
        self.post("reset_prefix_cache?reset_running_requests=true")
        self.post("resume")

    def world_sizes(self) -> dict[str, int]:
        """Workers of each server."""
        return {url: answer["world_size"] for url, answer in self.get("get_world_size").items()}

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
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))

    async def _all(self, method: str, path: str, bodies: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call to each live server, side by side; those that cannot be reached in time are dropped."""
        step = path.partition("?")[0]
        urls = [*bodies] if bodies is not None else self.servers

        async def call(url: str) -> Any:
            try:
                async with asyncio.timeout(self.timeout_s):
                    return await self._call(method, f"{url}/{path}", bodies and bodies[url])
            except TimeoutError:
                self.drop(url, f"it did not answer {step} within {self.timeout_s:g} s")
            except _LOST as error:
                self.drop(url, f"{step}: {_said(error)}")

        answers = dict(zip(urls, await asyncio.gather(*map(call, urls)), strict=True))
        self._require_server()
        if self.all_or_none and not {*urls} <= self.in_flight.keys():
            raise GeneratorFailure(f"{step} without {', '.join(url for url in urls if url in self.lost)}")
        return {url: answer for url, answer in answers.items() if url in self.in_flight}

    async def _call(self, method: str, address: str, body: Any = None) -> Any:
        async with self._session.request(method, address, json=body) as response:
            if response.status != 200:
                said = f"{address} answered {response.status}: {_reason(await response.text())}"
                if response.status >= 500 and not await self._is_healthy(address):
                    raise ConnectionError(said)  # its engine has died
                raise ServerRefusal(said)
            if response.content_type == "application/json":
                return await response.json()
            return await response.text()

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
            call = asyncio.create_task(self._call("POST", f"{url}/inference/v1/generate", body))
            dropped = asyncio.create_task(self._dropped[url].wait())
            try:
                await asyncio.wait({call, dropped}, return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    answer = call.result()
                    return [_rollout(request, choice) for choice in sorted(answer["choices"], key=lambda c: c["index"])]
            except _LOST as error:
                self.drop(url, _said(error))
            finally:
                call.cancel()
                dropped.cancel()
                if url in self.in_flight:
                    self.in_flight[url] -= len(request.seeds)

    async def _watch(self, url: str) -> None:
        """Drop a server that lives no more, or hangs."""
        while url in self.in_flight:
            await asyncio.sleep(_PING_S)
            try:
                async with asyncio.timeout(self.timeout_s):
                    await self._call("GET", f"{url}/health")
            except _LOST as error:
                self.drop(url, f"no sign of life: {_said(error)}")

    def _require_server(self) -> None:
        if not self.in_flight:
            raise GeneratorFailure(
                "no vLLM server is left: "
                + "; ".join(f"{url}: {why}" for url, why in self.lost.items())
                + "; start them again, or others as vllm.servers, and continue with --resume"
            )


def _rollout(request: Request, choice: dict[str, Any]) -> Rollout:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerRefusal(f"a completion ended with {choice['finish_reason']!r}, wanted stop or length")
    return Rollout(
        request.prompt_ids,
        np.asarray(choice["token_ids"], dtype=np.int64),
        np.asarray([token["logprob"] for token in choice["logprobs"]["content"]], dtype=np.float32),
        choice["finish_reason"],
        request.group,
        tuple((int(span["version"]), span["end"] - span["start"]) for span in choice["weight_versions"]),
    )


def _reason(text: str) -> str:
    """The message in an answer of vLLM's."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:500]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
