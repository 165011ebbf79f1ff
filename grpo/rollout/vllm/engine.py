"""vLLM, which no other module imports: an engine, what its workers do for a run, and its transports of weights.

Weights come by vLLM's own transports, NCCL (to servers on other GPUs) and CUDA IPC (to an engine on
the same GPU), and on CPUs by one of ours: files in shared memory. vLLM finds it by the entry point
in pyproject.toml in each of its processes.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer
from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLTrainerInitInfo, SparseWeightPatch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.sampling_params import RequestOutputKind

from flashgrpo.grpo.rollout.sync import BUCKET_BYTES, DecoderSource, changes, digest, in_buckets, weight_shapes
from flashgrpo.grpo.rollout.vllm.answers import ServedModel, sampled_rollout, sampling_fields
from flashgrpo.grpo.rollout.vllm.launch import IPC, SHARED_MEMORY, EngineOptions
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.model.config import ModelConfig

_PROGRESS_S = 1.0


class Engine:
    """vLLM in this process, and nothing else in it. Weights come from the trainer (`load_format` "dummy") or from the
    model's folder ("auto").
    """

    def __init__(self, options: EngineOptions, load_format: str = "dummy"):
        # In this process alone: it is one of the trainer's own already, and ends with it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        register()
        self.on_gpu, self.is_asleep = options.on_gpu, False
        self.llm = LLM(
            model=options.path,
            distributed_executor_backend="uni",
            load_format=load_format,
            enable_sleep_mode=options.on_gpu,
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=IPC if options.on_gpu else SHARED_MEMORY),
            **options.engine_arguments(),
        )
        self.llm.update_weight_version("0")

    def expect_weights(self) -> None:
        """Before the first update, and the first after one that failed."""
        self.llm.collective_rpc("expect_weights")
        if self.on_gpu:
            self.llm.init_weight_transfer_engine({"init_info": {"packed": True}})

    def start_weight_update(self) -> None:
        """Make room for new weights."""
        if self.is_asleep:
            self.llm.wake_up(["weights"])
        self.llm.start_weight_update()

    def update_weights(self, part: dict[str, Any]) -> None:
        """Load a part of them."""
        self.llm.update_weights({"update_info": part})

    def finish_weight_update(self, version: int) -> None:
        """Sample from the new weights, with nothing of the old ones in the cache."""
        self.llm.finish_weight_update(str(version))
        if self.is_asleep:
            self.llm.wake_up(["kv_cache"])
        self.is_asleep = False
        self.llm.reset_prefix_cache()

    def weight_digests(self) -> dict[str, int]:
        """Checksums of what was loaded since `expect_weights`, by name."""
        (digests,) = self.llm.collective_rpc("weight_digests")
        return digests

    def sleep(self) -> None:
        """On a GPU, give the memory of weights and cache back until the next update."""
        if self.on_gpu:
            self.llm.sleep(level=2)
            self.is_asleep = True

    def generate(
        self, requests: list[Request], sampling: Sampling, stop_token_ids: list[int]
    ) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts as soon as the last of them is done; all requests go in at once. An empty list
        says that tokens are being sampled.
        """
        engine, told_at = self.llm.llm_engine, time.monotonic()
        waiting = {str(number): request for number, request in enumerate(requests)}
        prompts: Any = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        try:
            for number, prompt in zip([*waiting], self.llm.renderer.render_cmpl(prompts), strict=True):
                engine.add_request(number, prompt, sampling_params(sampling, waiting[number], stop_token_ids))
            while waiting:
                # Before a group, never behind the last: nobody would read it, and take it for the next call's answer.
                if time.monotonic() - told_at > _PROGRESS_S:
                    told_at = time.monotonic()
                    yield []
                for output in engine.step():
                    if output.finished:
                        yield _rollouts(waiting.pop(output.request_id), output.outputs, sampling)
        finally:
            if waiting:
                engine.abort_request([*waiting])


def sampling_params(sampling: Sampling, request: Request, stop_token_ids: list[int]) -> SamplingParams:
    """What vLLM is asked for; a group comes back once all of it is done."""
    fields = sampling_fields(sampling, request, stop_token_ids)
    return SamplingParams(**fields, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)


def _rollouts(request: Request, samples: Any, sampling: Sampling) -> list[Rollout]:
    rollouts = []
    for sample in samples:
        spans = [(int(span.version), span.start, span.end) for span in sample.weight_versions]
        logprobs = sample.logprobs.logprobs
        sets = sample.sampling_mask.token_ids if sampling.kept_limit else None
        rollouts.append(sampled_rollout(request, sample.token_ids, logprobs, sample.finish_reason, spans, sets))
    return rollouts


class Extension:
    """Methods of vLLM's workers."""

    # Attributes of the worker that it becomes a part of.
    vllm_config: Any
    weight_transfer_engine: Any
    model_config: Any

    def served_model(self) -> ServedModel:
        """What a trainer compares with its own before it begins."""
        return {
            "weights": weight_shapes(ModelConfig.from_dict(self.model_config.hf_config.to_dict())),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "weight_transfer": self.weight_transfer_engine.config.backend,
            "max_model_len": self.model_config.max_model_len,
            "tells_kept_sets": self.model_config.return_sampling_mask,
        }

    def expect_weights(self) -> None:
        """Before the first update of a connection: it begins anew, and what it loads is summed up."""
        # An update that has failed, or whose trainer was killed, has left layers half loaded, and vLLM would count that
        # as part of the next one.
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.finish_weight_update()
        self._weight_update_active = False

        model = self.weight_transfer_engine.model
        load, digests = type(model).load_weights, {}

        def load_and_sum(weights: Any) -> Any:
            weights = list(weights)
            for name, tensor in weights:
                digests[name] = digest(tensor)
            return load(model, weights)

        self.digests, model.load_weights = digests, load_and_sum

    def weight_digests(self) -> dict[str, int]:
        """Checksums of the tensors that this worker has been given to load since; told once."""
        del self.weight_transfer_engine.model.load_weights  # that of its class from now on
        return self.digests


class SharedMemoryReceiver(WeightTransferEngine[WeightTransferInitInfo, Any]):
    """A worker's end of `shared_memory_parts`."""

    init_info_cls = WeightTransferInitInfo

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing: a part says where it is."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(update_info)  # vLLM's own waits for an accelerator

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        file, names, shapes = update_info["file"], update_info["names"], update_info["shapes"]
        if not Path(file).exists():
            raise ValueError(f"{file} is not there: on CPUs, sampler and trainer must share a machine")
        sizes = [math.prod(shape) for shape in shapes]
        # A mapping, which keeps the memory until the last of the tensors is loaded: vLLM holds back those of a layer.
        flat = torch.from_file(file, size=sum(sizes), dtype=getattr(torch, update_info["dtype"]))
        tensors = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        model: Any = self.model
        model.load_weights([*zip(names, tensors, strict=True)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is open between updates."""


def ipc_parts(source: DecoderSource) -> Iterator[dict[str, Any]]:
    """Where an engine on this GPU finds the weights, as `shared_memory_parts`: a buffer at a time, by CUDA IPC.

    vLLM's own sender would have all ranks share their handles, and wait for each other at every buffer; here each rank
    has an engine of its own.
    """
    # vLLM refuses a tensor larger than its buffer: the embedding, mostly.
    size = max(BUCKET_BYTES, *(meta.num_bytes for meta in source.metadata()))
    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    chunks = packed_ipc_producer(
        iter(source), gpu_uuid=gpu, post_iter_func=lambda named: named[1], buffer_size_bytes=size
    )
    for chunk in chunks:
        yield {
            "names": chunk.names,
            "dtype_names": chunk.dtype_names,
            "shapes": chunk.shapes,
            "tensor_sizes": chunk.tensor_sizes,
            "ipc_handles": chunk.ipc_handle,
        }


def open_nccl(
    client: Any, source: DecoderSource, address: str, port: int, world_size: int, is_sparse: bool
) -> TrainerWeightTransferEngine:
    """The trainer's end of an NCCL group with all workers behind `client`, a `VLLMWeightSyncClient`."""
    if is_sparse:
        sparse = SparseNCCLTrainerInitInfo(address, port, world_size, rank=0)
        return WeightTransferTrainerFactory.trainer_init(sparse, client=client)
    info = NCCLTrainerInitInfo(address, port, world_size, rank=0, packed_buffer_size_bytes=BUCKET_BYTES)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)  # type: ignore[arg-type]


def send_changes(group: Any, source: DecoderSource, sent: dict[str, Tensor]) -> None:
    """Through an end that `is_sparse`: what is not as in `sent`, see `changes`."""
    group.client.start_weight_update()
    for bucket in in_buckets(changes(source, sent), lambda change: change[1].nbytes + change[2].nbytes):
        group.send_weight_chunk([SparseWeightPatch(*change) for change in bucket])
    group.client.finish_weight_update()


def register() -> None:
    """Make our transport known to vLLM, in this process; twice is as good as once."""
    # vLLM calls it in each of its processes, and `Engine` where it has not.
    with contextlib.suppress(ValueError):  # it is known
        WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryReceiver)
