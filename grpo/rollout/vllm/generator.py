"""vLLM as the generator of a run: opening it, checking that it fits, and keeping its weights those of the run.

The steps of a sync, for an engine and for servers: `expect_weights` before the first, `start_weight_update`, then
`update_weights` for each part of them, `finish_weight_update`, and after the first their checksums.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, RunInputError
from flashgrpo.grpo.recipe.load import SamplingRecipe
from flashgrpo.grpo.rollout.sync import DecoderSource, check_digests, shared_memory_parts, weight_shapes
from flashgrpo.grpo.rollout.vllm.answers import DIGESTS, NOTHING, SERVED_MODELS
from flashgrpo.grpo.rollout.vllm.launch import (
    API_KEY,
    SHARED_MEMORY,
    SPARSE_NCCL,
    EngineOptions,
    OwnServers,
    check_gpu,
    check_length,
    require_vllm,
)
from flashgrpo.grpo.rollout.vllm.nccl import NcclSender
from flashgrpo.grpo.rollout.vllm.servers import ServerRefusal, VllmServers
from flashgrpo.grpo.run.child import Child, own_environment
from flashgrpo.grpo.run.policy import Policy
from flashgrpo.grpo.run.progress import say
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.types import Request, Rollout, Sampling


def open_engine(
    recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int, loaded: bool
) -> "EngineGenerator":
    """An engine of each rank's own, `loaded` with the weights of recipe.model.path. Raises RecipeError."""
    require_vllm(on_gpu=world.device.type == "cuda")
    options = EngineOptions.of(recipe, world.device, longest_prompt)
    timeout_s, load_format = recipe.vllm.sync_timeout_s, "auto" if loaded else "dummy"
    engines: list[EngineGenerator] = []
    # What a restored checkpoint has left in torch's cache would not be free for the engine; nothing without CUDA.
    torch.cuda.empty_cache()
    world.everywhere(lambda: check_gpu(options, world.device))  # of all ranks, before the first engine loads
    say("starting vLLM")
    try:
        world.everywhere(
            lambda: engines.append(EngineGenerator(options, policy.stop_token_ids, world, timeout_s, load_format))
        )
    except BaseException as error:  # another rank's has failed: nobody has this one yet to close it
        for engine in engines:
            engine.close()
        if not isinstance(error, GeneratorFailure):
            raise
        cache_gb = options.engine_arguments().get("kv_cache_memory_bytes", 0) / 1e9
        raise RecipeError(
            f"vLLM cannot start with this recipe; the keys are vllm.memory_share = {recipe.vllm.memory_share:g}, "
            f"vllm.kv_cache_gb = {cache_gb:g}, vllm.max_model_len = {options.max_model_len}: {error}"
        ) from error
    return engines[0]


def open_servers(recipe: SamplingRecipe, policy: Policy, world: World, longest_prompt: int) -> "ServersGenerator":
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
        world.everywhere(lambda: _check_servers(client, policy, recipe, options, longest_prompt))
        return ServersGenerator(client, options, world, opened.pop_all())


class EngineGenerator:
    """A vLLM engine of this rank's own, in a child process, on the rank's GPU or the CPU. A call waits at most
    `timeout_s`, `generate` so long for the next tokens.

    On a GPU a process cannot open its own CUDA IPC handles; on a CPU vLLM would take over the trainer's process group,
    its threads and its random state. The process sees one GPU and nothing of torchrun's ranks.
    """

    def __init__(
        self, options: EngineOptions, stop_token_ids: list[int], world: World, timeout_s: float, load_format: str
    ):
        self.stop_token_ids, self.world, self.timeout_s = stop_token_ids, world, timeout_s
        self.weight_version = 0 if load_format == "auto" else -1
        self.options, self.on_gpu = options, options.on_gpu
        self._is_connected = False
        environment = own_environment()
        # vLLM takes the first GPU that it sees: it must be the rank's.
        if self.on_gpu:
            index, visible = world.device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible[0] else str(index)
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
        setup = options, load_format
        self.child = Child("vLLM's process", GeneratorFailure, _engine_in_child, setup, quiet | environment)

    def load_weights(self, source: DecoderSource, version: int) -> None:
        """Sample from the weights of `source` from now on. Raises SyncError, on every rank."""
        self.weight_version = -1
        self.world.everywhere(lambda: self._load(source, version))
        self.weight_version = version

    def _load(self, source: DecoderSource, version: int) -> None:
        is_first, self._is_connected = not self._is_connected, False
        with source.shared_pass(version, "vLLM", with_digests=is_first):
            if is_first:
                self._call("expect_weights")
            self._free_cache()  # the engine takes the memory of its weights back
            self._call("start_weight_update")
            for part in vllm_engine().ipc_parts(source) if self.on_gpu else shared_memory_parts(source):
                self._call("update_weights", part)
            self._free_cache()  # and that of its keys and values
            self._call("finish_weight_update", version)
            if is_first:
                check_digests(source.digests or {}, self._call("weight_digests"))
        if self.on_gpu:
            torch.cuda.ipc_collect()  # the buffer of the parts, which the engine has let go
        self._is_connected = True

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Groups as they finish. Where the caller stops early, the engine does so too."""
        self.child.send("generate", requests, self.options.limited(sampling), self.stop_token_ids)
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

    def free_weights(self) -> None:
        """An engine on the trainer's own GPU sleeps; one on a CPU keeps its weights."""
        if self.on_gpu and self.weight_version >= 0:
            self._call("sleep")
            self.weight_version = -1

    def close(self) -> None:
        """End the process."""
        self.child.close()

    def _free_cache(self) -> None:
        """Give back what torch keeps for itself; not in between, where it is used again for each part."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _call(self, method: str, *arguments: Any) -> Any:
        return self.child.call(method, *arguments, timeout_s=self.timeout_s)


def _engine_in_child(options: EngineOptions, load_format: str) -> Any:
    return vllm_engine().Engine(options, load_format)


class ServersGenerator:
    """Servers that all ranks share: rank 0 sends the weights, which all gather. `opened` has what ends with it."""

    def __init__(self, client: VllmServers, options: EngineOptions, world: World, opened: ExitStack):
        self.client, self.options, self.world = client, options, world
        self.stop_token_ids: list[int] = client.stop_token_ids
        self.weight_version = -1
        self._opened = opened
        self._connected: list[str] = []  # the servers of the last sync
        self._nccl: NcclSender | None = None

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts as soon as the last of them is done; all requests go in at once."""
        return self.client.generate(requests, self.options.limited(sampling))

    def load_weights(self, source: DecoderSource, version: int) -> None:
        """Sample from the weights of `source` from now on. A server that does not take part in time is dropped, on
        every rank, while others are left. Raises SyncError, on every rank.
        """
        self.weight_version, self.client.version = -1, version
        # One that a rank has lost in generation would keep rank 0 waiting; one that rank 0 loses now, all the others.
        self._share_losses()
        self.world.on_main(self.client.pause)
        self._share_losses()
        self.world.everywhere(lambda: self._load(source, version))
        self._share_losses()
        self.weight_version = self.client.loaded = version

    def _load(self, source: DecoderSource, version: int) -> None:
        # An NCCL group that has lost a server has to be made anew, of those that are left.
        servers = self.client.urls
        is_first, self._connected = self._connected != servers, []
        with source.shared_pass(version, "the vLLM servers", with_digests=is_first and self.world.is_main):
            if self.world.is_main:
                self._send(source, is_first)
        self._connected = servers

    def _send(self, source: DecoderSource, is_first: bool) -> None:
        client = self.client
        if is_first:
            client.ask_workers("expect_weights", NOTHING)
        if self.options.transport == SHARED_MEMORY:
            client.start_weight_update()
            for part in shared_memory_parts(source):
                client.update_weights(part)
            client.finish_weight_update()
        else:
            if self._nccl is None or is_first:
                self._close_nccl()
                is_sparse = self.options.transport == SPARSE_NCCL
                self._nccl = NcclSender(vllm_engine(), client, source, self.world.device, is_sparse)
            self._nccl.send(source)
        if is_first:
            for workers in client.ask_workers("weight_digests", DIGESTS).values():
                for received in workers:
                    check_digests(source.digests or {}, received)

    def free_weights(self) -> None:
        """Servers keep their weights."""

    def close(self) -> None:
        """End the servers that this run has started."""
        self._close_nccl()
        self._opened.close()

    def _close_nccl(self) -> None:
        nccl, self._nccl = self._nccl, None
        if nccl:
            nccl.close()

    def _share_losses(self) -> None:
        """Servers that one rank has dropped are dropped by all."""
        for lost in self.world.gather(dict(self.client.lost)):
            for url, why in lost.items():
                self.client.drop(url, why)


def _check_servers(
    client: VllmServers, policy: Policy, recipe: SamplingRecipe, options: EngineOptions, longest_prompt: int
) -> None:
    """The servers are there, and have this run's model, type, transport and room."""
    try:
        found = client.ask_workers("served_model", SERVED_MODELS)
    except ServerRefusal as error:
        start = "start servers by `flashgrpo serve RECIPE`, which sets what a run needs"
        raise RunInputError(f"{error}; {start}") from error
    except GeneratorFailure as error:
        raise RunInputError(
            f"{error}; is `flashgrpo serve RECIPE` running there? One that waits for a run which was killed in the "
            "middle of a sync over NCCL has to be started again"
        ) from error
    if client.lost:
        raise RunInputError(f"not reached: {'; '.join(f'{url}: {why}' for url, why in client.lost.items())}")
    wanted = {"dtype": options.dtype, "weight_transfer": options.transport, **weight_shapes(policy.model.config)}
    for url, (served, *_) in found.items():
        has = {"dtype": served["dtype"], "weight_transfer": served["weight_transfer"], **served["weights"]}
        for name in {**has, **wanted}:
            theirs, ours = has.get(name, "missing"), wanted.get(name, "missing")
            if theirs != ours:
                raise RunInputError(f"{url} serves another model: {name} is {theirs} there, {ours} here")
        check_length(served["max_model_len"], longest_prompt, recipe)
        if served["tells_kept_sets"] != bool(options.kept_limit):
            raise RunInputError(
                f"{url} was started with other rollout.top_p and top_k than the run has; start it by `flashgrpo serve "
                "RECIPE`, so that it tells what they kept where they leave tokens out, and only there"
            )


def vllm_engine() -> Any:
    """The module that imports vLLM. Not before it is needed: that takes seconds, and warns of what concerns no run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flashgrpo.grpo.rollout.vllm import engine
    return engine
