"""Generation by `vllm serve` processes on other GPUs or machines, over HTTP: token ids in, token ids out.

Requests go to the server with the fewest completions in flight, all at once. One that dies, or does not get on for
`timeout_s`, is dropped with a warning, and what it had not finished goes to the others. One whose answers are not what
was asked for ends the generation: what else it gets wrong cannot be known.
"""

import asyncio
import logging
import re
import sys
import threading
from collections.abc import Collection, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from typing import Annotated, Any, Literal, TypeVar

import aiohttp
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from flashgrpo.grpo.errors import GeneratorFailure
from flashgrpo.grpo.rollout.vllm.launch import sampled_rollout, sampling_fields
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.model.files import parse_json

logger = logging.getLogger(__name__)

_PING_S = 5.0
_PARTS = 8  # of a time limit
_LOST = aiohttp.ClientError, OSError
_TOKENS = re.compile(r"^vllm:generation_tokens_total(?:{.*})? (\S+)$", re.MULTILINE)
_LARGEST_VOCABULARY = 1 << 24
_NOT_FINITE = -9999.0  # what vLLM writes for a log-prob that is NaN or -inf
_ROUNDING = 1e-5  # by which a GPU's log-softmax may be above 0

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
        self._running: set[Future[list[Rollout]]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True).start()
        self._session = self._run(self._open_session())

    @property
    def servers(self) -> list[str]:
        """Those that live."""
        return [*self.in_flight]

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts as soon as the last of them is done.

        Raises GeneratorFailure when no server is left, or one refuses a request.
        """
        running = [self._submit(self._complete(request, sampling)) for request in requests]
        watchers = [self._submit(self._watch(url)) for url in self.servers]
        self._running.update(running)
        try:
            for group in as_completed(running):
                yield group.result()
        except CancelledError:
            raise GeneratorFailure("the generation was broken off") from None
        finally:
            for each in (*running, *watchers):
                each.cancel()
            self._running.difference_update(running)

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Every live server's answer to the same body, by address."""
        return self._run(self._all("POST", path, dict.fromkeys(self.servers, body or {})))

    def rpc(self, method: str) -> dict[str, list[Any]]:
        """The results of each server's workers."""
        answers = self.post(f"collective_rpc?method={method}", {"method": method})
        for url, answer in answers.items():
            if not answer.get("results"):
                raise ServerRefusal(f"{url} answered {method} by {str(answer)[:100]}, wanted results of its workers")
        return {url: answer["results"] for url, answer in answers.items()}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving ends; with NCCL every server's workers get ranks of their own."""
        self.rpc("expect_weights")
        bodies = {url: {"init_info": init_info} for url in self.servers}
        # vLLM's payload is for one server: all of them would take the same ranks.
        if "rank_offset" in init_info:
            offset, sizes = init_info["rank_offset"], self.world_sizes()
            for url in self.servers:
                bodies[url] = {"init_info": {**init_info, "rank_offset": offset}}
                offset += sizes[url]
        self._run(self._all("POST", "init_weight_transfer_engine", bodies))

    def start_weight_update(self) -> None:
        """Make room for new weights; what is being generated waits."""
        # Completions under way keep their tokens, and go on by the new weights.
        self.post("pause?mode=keep")
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
        answers = self._run(self._all("GET", "get_world_size", dict.fromkeys(self.servers)))
        for url, answer in answers.items():
            if type(answer.get("world_size")) is not int or answer["world_size"] < 1:
                raise ServerRefusal(f"{url} answered get_world_size by {str(answer)[:100]}, wanted its workers' number")
        return {url: answer["world_size"] for url, answer in answers.items()}

    def weight_digests(self) -> list[dict[str, int]]:
        """Checksums of what the first update has loaded, by name, of every worker."""
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

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()

    async def _open_session(self) -> aiohttp.ClientSession:
        # A connection for each call: a server may close an idle one at the very moment that a call begins.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _all(self, method: str, path: str, bodies: dict[str, Any]) -> dict[str, Any]:
        """One call to each server of `bodies`, side by side; those that cannot be reached in time are dropped. Where
        one refuses, all are waited for.
        """
        step = path.partition("?")[0]

        async def call(url: str) -> Any:
            try:
                return await self._in_time(self._call(method, f"{url}/{path}", bodies[url]))
            except TimeoutError:
                self.drop(url, f"it did not answer {step} within {self.timeout_s:g} s")
            except _LOST as error:
                self.drop(url, f"{step}: {_said(error)}")

        # Not the first error at once: a call that is still under way would meet the next step.
        answers = dict(zip(bodies, await asyncio.gather(*map(call, bodies), return_exceptions=True), strict=True))
        for answer in answers.values():
            if isinstance(answer, BaseException):
                raise answer
        self._require_server()
        missing = [url for url in bodies if url not in self.in_flight]
        if self.all_or_none and missing:
            raise GeneratorFailure(f"{step} without {', '.join(missing)}")
        return {url: answer for url, answer in answers.items() if url not in missing}

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

    async def _call(self, method: str, address: str, body: Any) -> dict[str, Any]:
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
        if response.status >= 500:  # its engine may have died, and the rest of it lives
            async with self._session.get("/".join([*address.split("/")[:3], "health"])) as health:
                if health.status != 200:
                    raise ConnectionError(said)
        raise ServerRefusal(said)

    async def _complete(self, request: Request, sampling: Sampling) -> list[Rollout]:
        """One group, by whichever server is left."""
        fields = sampling_fields(sampling, request, self.stop_token_ids)
        body = {"token_ids": request.prompt_ids, "sampling_params": fields}
        while True:
            self._require_server()
            url = min(self.in_flight, key=self.in_flight.__getitem__)
            self.in_flight[url] += len(request.seeds)
            oldest = self.loaded
            # A server that is dropped by `_watch` may never answer.
            call = asyncio.create_task(self._text("POST", f"{url}/inference/v1/generate", body))
            dropped = asyncio.create_task(self._dropped[url].wait())
            try:
                await asyncio.wait({call, dropped}, return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    answer = call.result()
                    self._answers[url] += 1
                    # New weights may have come while it was sampled; where none are sent at all, any version is right.
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
    except (ValueError, LookupError, TypeError):
        return text[:500]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class AnswerError(ValueError):
    """An answer that is not what was asked for."""


_Whole = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]


class _Token(TypedDict):
    logprob: Annotated[float, Field(strict=True, gt=_NOT_FINITE, le=_ROUNDING, allow_inf_nan=False)]


class _Logprobs(TypedDict):
    content: list[_Token]


class _Span(TypedDict):
    version: Annotated[int, Field(ge=0)]  # as text
    start: _Whole
    end: _Whole


class _Choice(TypedDict):
    index: _Whole
    token_ids: Annotated[list[_Whole], Field(min_length=1)]
    logprobs: _Logprobs
    finish_reason: Literal["stop", "length"]
    weight_versions: list[_Span]


class _Answer(TypedDict):
    choices: list[_Choice]


_ANSWER = TypeAdapter(_Answer)


def read_group(
    answer: str | bytes,
    request: Request,
    sampling: Sampling,
    vocab_size: int,
    stop_token_ids: Collection[int],
    versions: range,
) -> list[Rollout]:
    """The group that `request` asked for, sampled from weights of `versions`: whatever gets past here is trained on.

    Raises AnswerError where it is none.
    """
    try:
        choices = _ANSWER.validate_json(answer)["choices"]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise AnswerError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    choices.sort(key=lambda choice: choice["index"])
    numbers, most = [choice["index"] for choice in choices], sampling.max_new_tokens
    _expect(numbers == [*range(len(request.seeds))], f"completions {numbers}, wanted {len(request.seeds)}")
    group = []
    for choice in choices:
        ids, reason = choice["token_ids"], choice["finish_reason"]
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        spans = [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"]]
        _expect(len(ids) == most or (reason == "stop" and len(ids) < most), f"{len(ids)} tokens, cut at {most}")
        _expect(max(ids) < vocab_size, f"the token {max(ids)}, wanted 0 to {vocab_size - 1}")
        is_cut = reason == "stop" and ids[-1] not in stop_token_ids
        _expect(not is_cut, f"a stop at the token {ids[-1]}, wanted one of {stop_token_ids}")
        _expect(len(logprobs) == len(ids), f"{len(logprobs)} log-probs for {len(ids)} tokens")
        reached = 0
        for version, start, end in spans:
            _expect(start == reached < end, f"weight versions of the tokens {spans}")
            found = f"{end - start} tokens of the weights {version}"
            _expect(version in versions, f"{found}, wanted {versions[0]} to {versions[-1]}")
            reached = end
        _expect(reached == len(ids), f"weight versions of the tokens {spans} for {len(ids)} tokens")
        group.append(sampled_rollout(request, ids, logprobs, reason, spans))
    return group


def _expect(holds: bool, found: str) -> None:
    if not holds:
        raise AnswerError(found)
