"""vLLM as the generator of a run: opening it, checking that it fits, and keeping its weights those of the run."""

import contextlib
import os
import socket
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, RunInputError, SyncError
from flashgrpo.grpo.recipe.load import SamplingRecipe
from flashgrpo.grpo.rollout.sync import DecoderSource, check_digests, weight_shapes
from flashgrpo.grpo.rollout.vllm.launch import (
    API_KEY,
    IPC,
    NCCL,
    SHARED_MEMORY,
    EngineOptions,
    OwnServers,
    check_length,
    require_vllm,
)
from flashgrpo.grpo.rollout.vllm.servers import ServerRefusal, VllmServers
from flashgrpo.grpo.run.child import Child, own_environment
from flashgrpo.grpo.run.policy import Policy
from flashgrpo.grpo.run.progress import console
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.types import Request, Rollout, Sampling


def open_engine(
    recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int, loaded: bool
) -> "VllmGenerator":
    """An engine of each rank's own, `loaded` with the weights of recipe.model.path. Raises RecipeError."""
    require_vllm()
    options = EngineOptions.of(recipe, world.device, longest_prompt)
    engines: list[EngineProcess] = []
    with ExitStack() as opened:

        def start() -> None:
            console.print("starting vLLM", highlight=False)
            load_format, timeout_s = "auto" if loaded else "dummy", recipe.vllm.sync_timeout_s
            try:
                engine = EngineProcess(options, policy.stop_token_ids, world.device, timeout_s, load_format)
            except GeneratorFailure as error:
                cache_gb = options.engine_arguments().get("kv_cache_memory_bytes", 0) / 1e9
                raise RecipeError(
                    f"vLLM cannot start with this recipe; the keys are vllm.memory_share = "
                    f"{recipe.vllm.memory_share:g}, vllm.kv_cache_gb = {cache_gb:g}, "
                    f"vllm.max_model_len = {options.max_model_len}: {error}"
                ) from error
            engines.append(opened.enter_context(closing(engine)))

        world.everywhere(start)
        backend = IPC if options.on_gpu else SHARED_MEMORY
        generator = VllmGenerator(engines[0], backend, world, recipe.vllm.sync_timeout_s, opened.pop_all())
    generator.weight_version = 0 if loaded else -1
    return generator


def open_servers(recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int) -> "VllmGenerator":
    """The recipe's servers, which all ranks share. Raises RecipeError, and RunInputError where they do not fit."""
    require_vllm()
    options = EngineOptions.of(recipe, world.device, longest_prompt)
    with ExitStack() as opened:

        def start() -> tuple[list[str], str]:
            if not recipe.vllm.devices:
                return recipe.vllm.servers, os.environ.get(API_KEY, "")
            output = Path(recipe.run.output)
            own = OwnServers(options, recipe.vllm.devices, output.with_name(f"{output.name}_servers"))
            opened.enter_context(closing(own))
            return own.urls, own.key

        urls, key = world.on_main(start)
        timeout_s, vocab_size = recipe.vllm.sync_timeout_s, policy.model.config.vocab_size
        client = opened.enter_context(closing(VllmServers(urls, policy.stop_token_ids, timeout_s, vocab_size, key)))
        world.everywhere(lambda: _check_servers(client, policy, recipe, options.dtype, longest_prompt))
        backend = NCCL if options.on_gpu else SHARED_MEMORY
        return VllmGenerator(client, backend, world, timeout_s, opened.pop_all())


class EngineProcess:
    """An `Engine` in a child process, on the rank's GPU or the CPU. A call waits at most `timeout_s`, `generate` so
    long for the next tokens.

    On a GPU a process cannot open its own CUDA IPC handles; on a CPU vLLM would take over the trainer's process group,
    its threads and its random state. The process sees one GPU and nothing of torchrun's ranks.
    """

    version = loaded = 0

    def __init__(
        self,
        options: EngineOptions,
        stop_token_ids: list[int],
        device: torch.device,
        timeout_s: float,
        load_format: str,
    ):
        self.stop_token_ids, self.timeout_s = stop_token_ids, timeout_s
        environment = own_environment()
        # vLLM takes the first GPU that it sees: it must be the rank's.
        if device.type == "cuda":
            index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible[0] else str(index)
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
        setup = options, stop_token_ids, load_format
        self.child = Child("vLLM's process", GeneratorFailure, _engine_in_child, setup, quiet | environment)
        self.close = self.child.close

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", weight_version or str(self.version))

    def weight_digests(self) -> list[dict[str, int]]:
        return self._call("weight_digests")

    def sleep(self) -> None:
        self._call("sleep")

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Groups as they finish. Where the caller stops early, the engine does so too."""
        self.child.send("generate", requests, sampling)
        missing = len(requests)
        try:
            while missing:
                if group := self.child.receive("generate", self.timeout_s):  # or it says that it is at work
                    yield group
                    missing -= 1
        finally:
            # It would go on to the end, and its groups would be taken for answers to the next call.
            if missing and self.child.process.poll() is None:
                self.child.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        return self.child.call(method, *arguments, timeout_s=self.timeout_s)


def _engine_in_child(options: EngineOptions, stop_token_ids: list[int], load_format: str) -> Any:
    from flashgrpo.grpo.rollout.vllm.engine import Engine

    return Engine(options, stop_token_ids, load_format)


class VllmGenerator:
    """One engine a rank, or servers that all ranks share: then rank 0 sends the weights, and all gather them. `opened`
    has what ends with it.
    """

    def __init__(self, client: Any, backend: str, world: World, timeout_s: float, opened: ExitStack):
        self.client, self.backend, self.world, self.timeout_s = client, backend, world, timeout_s
        self.is_shared = isinstance(client, VllmServers)
        self.stop_token_ids: list[int] = client.stop_token_ids
        self.weight_version = -1
        self._opened = opened
        self._opened.callback(self._close_sender)
        self._sender: Any = None
        self._steps = _Lockstep(client)
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
        self.weight_version, self.client.version = -1, version
        # A rank may have lost a server in generation, and another not: one that does not answer would stall the sync.
        self._share_losses()
        # An NCCL group that has lost a server has to be made anew, of those that are left.
        while not all(self.world.everywhere(lambda: self._send(source, version))):
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
        self._opened.close()

    def _share_losses(self) -> None:
        """Servers that one rank has dropped are dropped by all."""
        if not self.is_shared:
            return
        for lost in self.world.gather(dict(self.client.lost)):
            for url, why in lost.items():
                self.client.drop(url, why)
        if self.backend == NCCL and self._members != self.client.servers:
            self._close_sender()

    def _send(self, source: DecoderSource, version: int) -> bool:
        """One attempt; False where servers were dropped in it from an NCCL group, and others are left."""
        is_first = self._sender is None
        servers = self.client.servers if self.is_shared else []
        source.begin(with_digests=is_first)
        self._steps.begin(source)
        try:
            if is_first:
                self._sender = self._open_sender(source)
            self._sender.source = source
            with self._deadline():
                self._sender.send_weights()
            self._steps.raise_error()
            if is_first and self._sender.is_sender:
                for received in self.client.weight_digests():
                    check_digests(source.digests or {}, received)
        except Exception as error:
            last = self._steps.failed_at or source.last
            # The other ranks go through the whole pass, and would wait for this one in each gather.
            source.finish()
            self._close_sender()
            if self.backend == NCCL and self.client.servers and self.client.servers != servers:
                return False
            side = "the vLLM servers" if self.is_shared else "vLLM"
            raise SyncError(
                f"version {version} of the weights did not reach {side}; the last tensor that the trainer gave is "
                f"{last}: {error}"
            ) from error
        return True

    def _open_sender(self, source: DecoderSource) -> Any:
        # Not before it is needed: the import takes seconds, and warns of what concerns no run.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from flashgrpo.grpo.rollout.vllm.engine import open_sender

        is_sender = self.world.is_main or not self.is_shared
        where: dict[str, Any] = {"rank": 0 if is_sender else self.world.rank}
        if self.backend != NCCL:
            return open_sender(self.backend, self._steps, source, **where)
        self._members = self.client.servers
        where |= {"master_address": "", "master_port": 0, "world_size": 0}  # of no use to the ranks that do not send
        if is_sender:
            address, port = _own_address(self._members)
            size = 1 + sum(self.client.world_sizes().values())
            where |= {"master_address": address, "master_port": port, "world_size": size}
        # Without `_Lockstep`: vLLM waits for the servers and for NCCL at once, and must hear of either's error.
        return self._in_time(lambda: open_sender(self.backend, self.client, source, **where))

    def _in_time(self, work: Callable[[], Any]) -> Any:
        """NCCL's rendezvous has no time limit of its own."""
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                torch.cuda.set_device(self.world.device)
                outcome.set_result(work())
            except Exception as error:  # it is raised where the result is taken
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        if not wait([outcome], self.timeout_s).done:
            raise GeneratorFailure(f"no NCCL group of trainer and servers within {self.timeout_s:g} s")
        return outcome.result()

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        """NCCL waits for ever: after the time limit its group is torn down, which ends the wait."""
        if self.backend != NCCL or not self._sender.is_sender:
            yield
            return
        expired = threading.Event()

        def end() -> None:
            expired.set()
            self._close_sender()

        timer = threading.Timer(self.timeout_s, end)
        timer.start()
        try:
            yield
        finally:
            # Whatever NCCL said of a group that was torn down, the time limit is the reason.
            timer.cancel()
            if expired.is_set():
                raise GeneratorFailure(f"the servers had not taken the weights within {self.timeout_s:g} s")

    def _close_sender(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()


class _Lockstep:
    """A client whose steps do not raise. Ranks gather weights and share IPC handles together, and one that left in the
    middle would be waited for: so all go through every step, and then raise the first error.
    """

    def __init__(self, client: Any):
        self.client = client

    def begin(self, source: DecoderSource) -> None:
        """Before the first step of a transfer."""
        self.source, self.failed_at = source, ""
        self.error: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._take(self.client.init_weight_transfer_engine, init_info)

    def start_weight_update(self) -> None:
        self._take(self.client.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        self._take(self.client.update_weights, update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._take(self.client.finish_weight_update, weight_version)

    def raise_error(self) -> None:
        """After the last step."""
        if self.error is not None:
            raise self.error

    def _take(self, step: Callable[..., None], *arguments: Any) -> None:
        torch.cuda.empty_cache()  # for a colocated engine, which takes its memory back; nothing without CUDA
        if self.error is not None:
            return  # the steps after it would fail, too, and hide it
        try:
            step(*arguments)
        except Exception as error:  # whatever it is: `raise_error`
            self.error, self.failed_at = error, self.source.last


def _check_servers(
    client: VllmServers, policy: Policy, recipe: SamplingRecipe, dtype: str, longest_prompt: int
) -> None:
    """The servers are there, and have this run's model, type and room."""
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
    wanted = weight_shapes(policy.model.config)
    for url, (served, *_) in found.items():
        if not (isinstance(served, dict) and {"weights", "dtype", "max_model_len"} <= served.keys()):
            raise RunInputError(
                f"{url} says of its model {str(served)[:100]}, wanted its weights, type and length: it is of another "
                "version; start it again by `flashgrpo serve RECIPE`"
            )
        for name in {**served["weights"], **wanted}:
            theirs, ours = served["weights"].get(name, "missing"), wanted.get(name, "missing")
            if theirs != ours:
                raise RunInputError(f"{url} serves another model: {name} is {theirs} there, {ours} here")
        if served["dtype"] != dtype:
            raise RunInputError(f"{url} computes in {served['dtype']}, the trainer in {dtype}; they must agree")
        check_length(served["max_model_len"], longest_prompt, recipe)


def _own_address(servers: list[str]) -> tuple[str, int]:
    """An address of this machine that all servers can reach, and a free port on it."""
    hosts = [urllib.parse.urlsplit(url).hostname or "" for url in servers]
    addresses = [socket.gethostbyname(host) for host in hosts]
    farthest = max(addresses, key=lambda address: not address.startswith("127."))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, socket.socket() as free:
        probe.connect((farthest, 9))  # sends nothing
        free.bind(("", 0))
        return probe.getsockname()[0], free.getsockname()[1]
