"""vLLM as the generator of a run: opening it, checking that it fits, and keeping its weights those of the run."""

import contextlib
import dataclasses
import os
import queue
import socket
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, RunInputError, SyncError
from flashgrpo.grpo.recipe.load import SamplingRecipe
from flashgrpo.grpo.rollout.sync import DecoderSource, check_digests
from flashgrpo.grpo.rollout.vllm.launch import OwnServers
from flashgrpo.grpo.rollout.vllm.options import (
    API_KEY,
    IPC,
    NCCL,
    SHARED_MEMORY,
    EngineOptions,
    check_length,
    require_vllm,
)
from flashgrpo.grpo.rollout.vllm.process import EngineProcess
from flashgrpo.grpo.rollout.vllm.servers import ServerRefusal, VllmServers
from flashgrpo.grpo.run.policy import Policy, resolve_dtype
from flashgrpo.grpo.run.progress import console
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.model.config import CheckpointError, ModelConfig

_SAMPLE_TEXTS = "2 + 3 = 5.\n", "<think>Déjà vu — 数学</think>", "def f(x):\n\treturn x ** 2"


class VllmGenerator:
    """One engine a rank, or servers that all ranks share: then rank 0 sends the weights, and all gather them."""

    def __init__(self, client: Any, backend: str, world: World, timeout_s: float, own: OwnServers | None = None):
        self.client, self.backend, self.world, self.timeout_s, self.own = client, backend, world, timeout_s, own
        self.is_shared = isinstance(client, VllmServers)
        self.stop_token_ids: list[int] = client.stop_token_ids
        self.weight_version = -1
        self._sender: Any = None
        self._steps: Any = None
        self._members: list[str] = []  # of the NCCL group
        if backend == NCCL:
            client.all_or_none = True

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts as soon as the last of them is done; all requests go in at once."""
        return self.client.generate(requests, sampling)

    def load_weights(self, source: DecoderSource, version: int) -> None:
        """Sample from the weights of `source` from now on. After the first time, both sides' checksums are compared.

        Raises SyncError, on every rank; servers that do not take part within `timeout_s` are dropped while others are
        left, on every rank.
        """
        self.weight_version = -1
        self._share_losses()
        while not all(self.world.everywhere(lambda: self._is_sent(source, version))):
            self._share_losses()
        self._share_losses()
        self.weight_version = self.client.loaded = version

    def free_weights(self) -> None:
        """An engine on the trainer's own GPU sleeps; servers, and engines on a CPU, keep their weights."""
        if self.backend == IPC and self.weight_version >= 0:
            self.client.sleep()
            self.weight_version = -1

    def close(self) -> None:
        """End the engine, or the servers that this run has started."""
        if self._sender is not None:
            self._sender.shutdown()
        self.client.close()
        if self.own is not None:
            self.own.close()

    def _share_losses(self) -> None:
        """Servers that one rank has dropped are dropped by all; an NCCL group without them has to be made anew."""
        if not self.is_shared:
            return
        for lost in self.world.gather(dict(self.client.lost)):
            for url, why in lost.items():
                self.client.drop(url, why)
        if self.backend == NCCL and self._members != self.client.servers:
            self._close_sender()

    def _is_sent(self, source: DecoderSource, version: int) -> bool:
        """One attempt; False where servers were dropped in it from an NCCL group, and others are left."""
        servers = self.client.servers if self.is_shared else []
        try:
            with source.one_pass():
                self._send(source, version)
        except Exception as error:
            self._close_sender()
            if self.backend == NCCL and self.client.servers and self.client.servers != servers:
                return False
            side = "the vLLM servers" if self.is_shared else "vLLM"
            raise SyncError(
                f"version {version} of the weights did not reach {side}; the last tensor that the trainer gave is "
                f"{source.failed_at}: {error}"
            ) from error
        finally:
            source.digests = None
        return True

    def _send(self, source: DecoderSource, version: int) -> None:
        self.client.version = version
        is_first = self._sender is None
        if is_first:
            source.digests = {}
            self._sender = self._open_sender(source)
        self._sender.source = source
        with self._deadline(source):
            self._sender.send_weights()
        self._steps.raise_error()
        if is_first and self._is_sender:
            for received in self.client.weight_digests():
                check_digests(source.digests or {}, received)

    @property
    def _is_sender(self) -> bool:
        return self.world.is_main or not self.is_shared

    def _open_sender(self, source: DecoderSource) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from flashgrpo.grpo.rollout.vllm.engine import open_sender

        where: dict[str, Any] = {"rank": 0 if self._is_sender else self.world.rank}
        self._steps = _Steps(self.client, source)
        if self.backend != NCCL:
            return open_sender(self.backend, self._steps, source, **where)
        self._members = self.client.servers
        where |= {"master_address": "", "master_port": 0, "world_size": 0}  # of no use to the ranks that do not send
        if self._is_sender:
            address, port = _own_address(self._members)
            size = 1 + sum(self.client.world_sizes().values())
            where |= {"master_address": address, "master_port": port, "world_size": size}
        return self._in_time(lambda: open_sender(self.backend, self.client, source, **where))

    def _in_time(self, work: Callable[[], Any]) -> Any:
        """NCCL's rendezvous has no time limit of its own."""
        done: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                torch.cuda.set_device(self.world.device)
                done.put((work(), None))
            except Exception as error:  # it is raised below
                done.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            result, error = done.get(timeout=self.timeout_s)
        except queue.Empty:
            raise GeneratorFailure(f"no NCCL group of trainer and servers within {self.timeout_s:g} s") from None
        if error is not None:
            raise error
        return result

    @contextlib.contextmanager
    def _deadline(self, source: DecoderSource) -> Iterator[None]:
        """NCCL waits for ever: after the time limit its group is torn down, which ends the wait."""
        if self.backend != NCCL or not self._is_sender:
            yield
            return
        expired = threading.Event()

        def end() -> None:
            expired.set()
            source.note_failure()
            self._close_sender()

        timer = threading.Timer(self.timeout_s, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if expired.is_set():
                raise GeneratorFailure(f"the servers had not taken the weights within {self.timeout_s:g} s")

    def _close_sender(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()


class _Steps:
    """The handshake with a client, whose first error waits until the ranks, in lockstep, are through all steps."""

    def __init__(self, client: Any, source: DecoderSource):
        self._client, self._source = client, source
        self._error: Exception | None = None

    def __getattr__(self, step: str) -> Callable[..., None]:
        def take(*arguments: Any) -> None:
            torch.cuda.empty_cache()  # for a colocated engine, which takes its memory back; nothing without CUDA
            if self._error is None:
                try:
                    getattr(self._client, step)(*arguments)
                except Exception as error:  # whatever it is, it is raised below
                    self._error = error
                    self._source.note_failure()

        return take

    def raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def open_vllm(recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int) -> VllmGenerator:
    """vLLM as recipe.rollout.generator wants it, checked. Raises RecipeError and RunInputError."""
    options, timeout_s = _engine_options(recipe, world.device, longest_prompt), recipe.vllm.sync_timeout_s
    if recipe.rollout.generator == "vllm":
        engines: list[EngineProcess] = []
        try:
            world.everywhere(
                lambda: engines.append(_open_engine(options, policy.stop_token_ids, world.device, timeout_s, "dummy"))
            )
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        return VllmGenerator(engines[0], IPC if options.on_gpu else SHARED_MEMORY, world, timeout_s)

    own: OwnServers | None = None

    def start() -> tuple[list[str], str]:
        nonlocal own
        if not recipe.vllm.devices:
            return recipe.vllm.servers, os.environ.get(API_KEY, "")
        output = Path(recipe.run.output)
        own = OwnServers(options, recipe.vllm.devices, output.with_name(f"{output.name}_servers"))
        return own.urls, own.key

    urls, key = world.on_main(start)
    client = VllmServers(urls, policy.stop_token_ids, timeout_s, policy.model.config.vocab_size, key)
    generator = VllmGenerator(client, NCCL if options.on_gpu else SHARED_MEMORY, world, timeout_s, own)
    try:
        world.everywhere(lambda: _check_servers(client, policy, recipe, options, longest_prompt))
    except BaseException:
        generator.close()
        raise
    return generator


def open_engine(recipe: SamplingRecipe, policy: Policy, device: torch.device, longest_prompt: int) -> EngineProcess:
    """vLLM with the weights of recipe.model.path, for use without a run. Raises RecipeError."""
    options = _engine_options(recipe, device, longest_prompt)
    return _open_engine(options, policy.stop_token_ids, device, recipe.vllm.sync_timeout_s, "auto")


def _engine_options(recipe: SamplingRecipe, device: torch.device, longest_prompt: int) -> EngineOptions:
    require_vllm()
    dtype = str(resolve_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    return EngineOptions.of(recipe, dtype, device.type == "cuda", longest_prompt)


def _open_engine(
    options: EngineOptions, stop_token_ids: list[int], device: torch.device, timeout_s: float, load_format: str
) -> EngineProcess:
    """An engine of this rank's own, in a process beside it."""
    console.print("starting vLLM", highlight=False)
    try:
        return EngineProcess(options, stop_token_ids, device, timeout_s, load_format)
    except GeneratorFailure as error:
        raise RecipeError(
            f"vLLM cannot start with this recipe; the keys are vllm.memory_share = {options.memory_share:g}, "
            f"vllm.kv_cache_gb = {options.kv_cache_gb:g}, vllm.max_model_len = {options.max_model_len}: {error}"
        ) from error


def _check_servers(
    client: VllmServers, policy: Policy, recipe: SamplingRecipe, options: EngineOptions, longest_prompt: int
) -> None:
    """The servers are there, and have this run's model, tokenizer, type and room."""
    try:
        found = client.rpc("served_model")
    except ServerRefusal as error:
        raise RunInputError(
            f"{error}; start servers by `flashgrpo serve RECIPE`, which sets what a run needs"
        ) from error
    except GeneratorFailure as error:
        raise RunInputError(
            f"{error}; is `flashgrpo serve RECIPE` running there? One that waits for a run which was killed in the "
            "middle of a sync over NCCL has to be started again"
        ) from error
    if client.lost:
        raise RunInputError(f"not reached: {'; '.join(f'{url}: {why}' for url, why in client.lost.items())}")
    for url, (served, *_) in found.items():
        _check_model(url, served["config"], policy.model.config)
        if served["dtype"] != options.dtype:
            raise RunInputError(f"{url} computes in {served['dtype']}, the trainer in {options.dtype}; they must agree")
        if served["logprobs_mode"] != "processed_logprobs":
            raise RunInputError(f"{url} reports {served['logprobs_mode']}; start it with processed_logprobs")
        check_length(served["max_model_len"], longest_prompt, recipe)
    for text in _SAMPLE_TEXTS:
        ours = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        for url, answer in client.post("tokenize", {"prompt": text, "add_special_tokens": False}).items():
            if answer["tokens"] != ours:
                raise RunInputError(f"{url} has another tokenizer: {text!r} is {answer['tokens']} there, {ours} here")


def _check_model(url: str, served: dict[str, Any], own: ModelConfig) -> None:
    try:
        config = ModelConfig.from_dict(served)
    except CheckpointError as error:
        raise RunInputError(f"{url} serves a model that is not supported: {error}") from error
    skipped = {"raw", "initializer_range"}
    for field in dataclasses.fields(own):
        theirs, ours = getattr(config, field.name), getattr(own, field.name)
        if field.name not in skipped and theirs != ours:
            raise RunInputError(f"{url} serves another model: {field.name} is {theirs!r} there, {ours!r} here")


def _own_address(servers: list[str]) -> tuple[str, int]:
    """An address of this machine that all servers can reach, and a free port on it."""
    hosts = [urllib.parse.urlsplit(url).hostname or "" for url in servers]
    addresses = [socket.gethostbyname(host) for host in hosts]
    farthest = max(addresses, key=lambda address: not address.startswith("127."))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, socket.socket() as free:
        probe.connect((farthest, 9))  # sends nothing
        free.bind(("", 0))
        return probe.getsockname()[0], free.getsockname()[1]
