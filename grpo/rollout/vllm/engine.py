"""vLLM, which no other module imports: an engine, and the ends of a weight transfer.

Weights come over vLLM's own transports, NCCL (a server on other GPUs) and CUDA IPC (an engine on the same GPU), and on
CPUs over one of ours: files in shared memory, a bucket at a time. vLLM finds it by the entry point in pyproject.toml in
each of its processes.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.sampling_params import RequestOutputKind

from flashgrpo.grpo.rollout.sync import DecoderSource, digest, weight_shapes
from flashgrpo.grpo.rollout.vllm.launch import (
    IPC,
    SHARED_MEMORY,
    EngineOptions,
    sampled_rollout,
    sampling_fields,
)
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.model.config import ModelConfig

_BUCKET_BYTES, _PROGRESS_S = 256 << 20, 1.0


class Engine:
    """vLLM in this process, and nothing else in it. Weights come from the trainer (`load_format` "dummy") or from the
    model's folder ("auto").

    It is also the receiving side of a weight transfer: vLLM's `VLLMWeightSyncClient`. `version` names the weights that
    are on their way.
    """

    def __init__(self, options: EngineOptions, stop_token_ids: list[int], load_format: str = "dummy"):
        # In this process alone: it is one of the trainer's own already, and ends with it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        register()
        self.version, self.stop_token_ids, self.on_gpu, self.is_asleep = 0, stop_token_ids, options.on_gpu, False
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

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end."""
        self.llm.collective_rpc("expect_weights")
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Make room for new weights."""
        if self.is_asleep:
            self.llm.wake_up(["weights"])
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Load a part of them."""
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Sample from the new weights, with nothing of the old ones in the cache."""
        self.llm.finish_weight_update(weight_version or str(self.version))
        if self.is_asleep:
            self.llm.wake_up(["kv_cache"])
        self.is_asleep = False
        self.llm.reset_prefix_cache()

    def weight_digests(self) -> list[dict[str, int]]:
        """Checksums of what the first update has loaded, by name, of every worker."""
        return self.llm.collective_rpc("weight_digests")

    def sleep(self) -> None:
        """On a GPU, give the memory of weights and cache back until the next update."""
        if self.on_gpu:
            self.llm.sleep(level=2)
            self.is_asleep = True

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts as soon as the last of them is done; all requests go in at once. An empty list
        says that tokens are being sampled.
        """
        engine, told_at = self.llm.llm_engine, time.monotonic()
        waiting = {str(number): request for number, request in enumerate(requests)}
        prompts: Any = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        try:
            for number, prompt in zip([*waiting], self.llm.renderer.render_cmpl(prompts), strict=True):
                engine.add_request(number, prompt, sampling_params(sampling, waiting[number], self.stop_token_ids))
            while waiting:
                for output in engine.step():
                    if output.finished:
                        yield _rollouts(waiting.pop(output.request_id), output.outputs)
                # Never behind the last: nobody would read it, and take it for the answer of the next call.
                if waiting and time.monotonic() - told_at > _PROGRESS_S:
                    told_at = time.monotonic()
                    yield []
        finally:
            if waiting:
                engine.abort_request([*waiting])


def sampling_params(sampling: Sampling, request: Request, stop_token_ids: list[int]) -> SamplingParams:
    """What vLLM is asked for; a group comes back once all of it is done."""
    fields = sampling_fields(sampling, request, stop_token_ids)
    return SamplingParams(**fields, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)


def _rollouts(request: Request, samples: Any) -> list[Rollout]:
    rollouts = []
    for sample in samples:
        spans = [(int(span.version), span.start, span.end) for span in sample.weight_versions]
        logprobs = sample.logprobs.logprobs
        rollouts.append(sampled_rollout(request, sample.token_ids, logprobs, sample.finish_reason, spans))
    return rollouts


class Extension:
    """Methods of vLLM's workers."""

    # Attributes of the worker that it becomes a part of.
    vllm_config: Any
    weight_transfer_engine: Any
    model_config: Any

    def served_model(self) -> dict[str, Any]:
        """What a trainer compares with its own before it begins."""
        return {
            "weights": weight_shapes(ModelConfig.from_dict(self.model_config.hf_config.to_dict())),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "max_model_len": self.model_config.max_model_len,
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


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """Some of the weights, one after another in a file of memory; all have one type."""

    file: str
    dtype: str
    names: list[str]
    shapes: list[list[int]]


class SharedMemoryReceiver(WeightTransferEngine[WeightTransferInitInfo, BucketInfo]):
    """A worker's end: loads a bucket at a time."""

    init_info_cls, update_info_cls = WeightTransferInitInfo, BucketInfo

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:  # vLLM's own waits for an accelerator
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketInfo) -> None:
        if not Path(update_info.file).exists():
            raise ValueError(f"{update_info.file} is not there: on CPUs, sampler and trainer must share a machine")
        sizes = [math.prod(shape) for shape in update_info.shapes]
        # A mapping, which keeps the memory until the last of the tensors is loaded: vLLM holds back those of a layer.
        flat = torch.from_file(update_info.file, size=sum(sizes), dtype=getattr(torch, update_info.dtype))
        tensors = [part.view(shape) for part, shape in zip(flat.split(sizes), update_info.shapes, strict=True)]
        model: Any = self.model
        model.load_weights([*zip(update_info.names, tensors, strict=True)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


@dataclass
class SharedMemoryTrainerInfo(TrainerInitInfo):
    """The sending end of a transfer through shared memory."""

    backend: ClassVar[str] = SHARED_MEMORY


class SharedMemorySender(TrainerWeightTransferEngine[SharedMemoryTrainerInfo]):
    """Writes a bucket of weights to a file in memory and has it loaded, until all are; rank 0 sends."""

    init_info_cls = SharedMemoryTrainerInfo

    @classmethod
    def trainer_init(
        cls, init_info: SharedMemoryTrainerInfo, *, client: Any, source: Any = None
    ) -> "SharedMemorySender":
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if sender.is_sender:
            client.init_weight_transfer_engine({})
        return sender

    def send_weights(self) -> None:
        source: Any = self.source
        if not self.is_sender:
            for _ in source:  # the ranks gather together
                pass
            return
        self.client.start_weight_update()
        bucket: dict[str, Tensor] = {}
        for name, tensor in source:
            bucket[name] = tensor.detach().cpu()
            if sum(each.nbytes for each in bucket.values()) >= _BUCKET_BYTES:
                self._ship(bucket)
                bucket = {}
        if bucket:
            self._ship(bucket)
        self.client.finish_weight_update()

    def _ship(self, bucket: dict[str, Tensor]) -> None:
        # A file without a name: no killed process leaves it behind, and a container's small /dev/shm is no limit.
        with open(os.memfd_create("flashgrpo_weights"), "wb") as file:
            for tensor in bucket.values():
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            path, (first, *_) = f"/proc/{os.getpid()}/fd/{file.fileno()}", bucket.values()
            dtype = str(first.dtype).removeprefix("torch.")
            info = BucketInfo(path, dtype, [*bucket], [list(tensor.shape) for tensor in bucket.values()])
            self.client.update_weights(asdict(info))


def open_sender(backend: str, client: Any, source: DecoderSource, **where: Any) -> TrainerWeightTransferEngine:
    """The trainer's end. `where`: `rank`, and for NCCL `master_address`, `master_port`, `world_size`."""
    register()
    if backend == SHARED_MEMORY:
        info: TrainerInitInfo = SharedMemoryTrainerInfo(**where)
    elif backend == IPC:
        # vLLM refuses a tensor larger than its buffer: the embedding, mostly.
        size = max(_BUCKET_BYTES, source.largest_bytes)
        info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, **where)
    else:
        info = NCCLTrainerInitInfo(packed_buffer_size_bytes=_BUCKET_BYTES, **where)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)  # type: ignore[arg-type]


def register() -> None:
    """Make our transport known to vLLM, in this process; twice is as good as once."""
    # vLLM calls it in each of its processes, and `Engine` and `open_sender` where it has not.
    with contextlib.suppress(ValueError):  # it is known
        WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryReceiver)
        WeightTransferTrainerFactory.register_engine(SHARED_MEMORY, SharedMemorySender)
