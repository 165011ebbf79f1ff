"""vLLM, which no other module imports: an engine, and both ends of the weight transfer.

vLLM has three transports in its native weight-transfer API: NCCL (a server on other GPUs), CUDA IPC (an engine on the
same GPU) and, for CPUs, one of ours: files in shared memory, a bucket at a time. The receiving ends here add to vLLM's
own that a tensor without a place is refused by its name, and that checksums of what came can be asked for. vLLM finds
them by the entry point in pyproject.toml in each of its processes.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.sampling_params import RequestOutputKind

from flashgrpo.grpo.rollout.sync import DecoderSource, check_shapes, digest, wanted_shapes
from flashgrpo.grpo.rollout.vllm.options import IPC, NCCL, SHARED_MEMORY, EngineOptions, sampling_fields
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.model.config import ModelConfig

_BUCKET_BYTES, _PROGRESS_S = 256 << 20, 1.0
_MEMORY, _FOLDER, _BUCKET = Path("/dev/shm"), "flashgrpo_weights_", "bucket.safetensors"


class Engine:
    """vLLM in this process, and nothing else in it. Weights come from the trainer (`load_format` "dummy") or from the
    model's folder ("auto").

    It is also the receiving side of a weight transfer: vLLM's `VLLMWeightSyncClient`. `version` names the weights that
    are on their way.
    """

    def __init__(self, options: EngineOptions, stop_token_ids: list[int], load_format: str = "dummy"):
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
        """Checksums of what the first update received, by name, of every worker."""
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
                        samples: Any = output.outputs
                        request = waiting.pop(output.request_id)
                        yield [_rollout(request, sample) for sample in samples]
                if time.monotonic() - told_at > _PROGRESS_S:
                    told_at = time.monotonic()
                    yield []
        finally:
            if waiting:
                engine.abort_request([*waiting])


def sampling_params(sampling: Sampling, request: Request, stop_token_ids: list[int]) -> SamplingParams:
    """What vLLM is asked for; a group comes back once all of it is done."""
    fields = sampling_fields(sampling, request, stop_token_ids)
    return SamplingParams(**fields, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)


def _rollout(request: Request, sample: Any) -> Rollout:
    spans = [(int(span.version), span.end - span.start) for span in sample.weight_versions]
    return Rollout(
        request.prompt_ids,
        np.asarray(sample.token_ids, dtype=np.int64),
        np.asarray(sample.logprobs.logprobs, dtype=np.float32),
        sample.finish_reason,
        request.group,
        tuple(spans),
    )


class Extension:
    """Methods of vLLM's workers."""

    weight_transfer_engine: Any
    model_config: Any

    def served_model(self) -> dict[str, Any]:
        """What a trainer compares with its own before it begins."""
        config = self.model_config
        return {
            "config": json.loads(config.hf_config.to_json_string(use_diff=False)),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "logprobs_mode": config.logprobs_mode,
        }

    def weight_digests(self) -> dict[str, int]:
        """Checksums of the tensors that this worker received in the first update of a connection; told once."""
        return self.weight_transfer_engine.take_digests()


class _Checked:
    """A receiving engine that checks and sums up what it gives the model to load."""

    model: Any
    model_config: Any
    digests: dict[str, int] | None = None  # recorded while it is there: in the first update of a connection
    is_half_loaded = False

    def init_transfer_engine(self, init_info: Any) -> None:
        self.digests = {}
        self.shapes = wanted_shapes(ModelConfig.from_dict(self.model_config.hf_config.to_dict()))
        super().init_transfer_engine(init_info)  # type: ignore[misc]

    def start_weight_update(self) -> None:
        if self.is_half_loaded:  # by an update that failed: vLLM would count what that has loaded as part of this one
            self.finish_weight_update()
        self.is_half_loaded = True
        super().start_weight_update()  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        self.is_half_loaded = False

    def receive_weights(self, update_info: Any) -> None:
        model, self.model = self.model, _Doorkeeper(self.model, self.shapes, self.digests)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model

    def take_digests(self) -> dict[str, int]:
        digests, self.digests = self.digests, None
        return digests or {}


class _Doorkeeper:
    """Stands for the model while weights come in."""

    def __init__(self, model: Any, shapes: dict[str, tuple[int, ...]], digests: dict[str, int] | None):
        self.model, self.shapes, self.digests = model, shapes, digests

    def load_weights(self, weights: Any) -> Any:
        weights = list(weights)
        check_shapes({name: tuple(tensor.shape) for name, tensor in weights}, self.shapes)
        if self.digests is not None:
            self.digests |= {name: digest(tensor) for name, tensor in weights}
        return self.model.load_weights(weights)


class NcclReceiver(_Checked, NCCLWeightTransferEngine):
    """vLLM's, checked."""


class IpcReceiver(_Checked, IPCWeightTransferEngine):
    """vLLM's, checked."""


@dataclass
class FolderInfo(WeightTransferInitInfo):
    """The folder in shared memory that the trainer writes to."""

    folder: str


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """A safetensors file with some of the weights."""

    file: str


class _SharedMemory(WeightTransferEngine[FolderInfo, BucketInfo]):
    """Loads buckets from shared memory."""

    init_info_cls, update_info_cls = FolderInfo, BucketInfo

    def init_transfer_engine(self, init_info: FolderInfo) -> None:
        if not Path(init_info.folder).is_dir():
            raise ValueError(f"{init_info.folder} is not there: on CPUs, sampler and trainer must share a machine")

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:  # vLLM's own waits for an accelerator
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketInfo) -> None:
        model: Any = self.model
        model.load_weights([*load_file(update_info.file).items()])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class SharedMemoryReceiver(_Checked, _SharedMemory):
    """Ours, checked."""


@dataclass
class SharedMemoryTrainerInfo(TrainerInitInfo):
    """The sending end of a transfer through shared memory."""

    backend: ClassVar[str] = SHARED_MEMORY


class SharedMemorySender(TrainerWeightTransferEngine[SharedMemoryTrainerInfo]):
    """Writes a bucket of weights to a file in memory and has it loaded, until all are; rank 0 sends."""

    init_info_cls = SharedMemoryTrainerInfo
    folder, lock = "", -1  # of the rank that sends

    @classmethod
    def trainer_init(
        cls, init_info: SharedMemoryTrainerInfo, *, client: Any, source: Any = None
    ) -> "SharedMemorySender":
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if sender.is_sender:
            sender.folder, sender.lock = _open_folder(2 * max(_BUCKET_BYTES, source.largest_bytes))
            try:
                client.init_weight_transfer_engine(asdict(FolderInfo(sender.folder)))
            except BaseException:  # nobody has it yet to shut it down
                sender.shutdown()
                raise
        return sender

    def send_weights(self) -> None:
        if self.is_sender:
            self.client.start_weight_update()
        bucket: dict[str, Tensor] = {}
        for name, tensor in self.source or ():
            if self.is_sender:
                bucket[name] = tensor.detach().to("cpu", copy=True)
                if sum(t.nbytes for t in bucket.values()) >= _BUCKET_BYTES:
                    self._ship(bucket)
        if self.is_sender:
            self._ship(bucket)
            self.client.finish_weight_update()

    def _ship(self, bucket: dict[str, Tensor]) -> None:
        file = Path(self.folder) / _BUCKET
        save_file(bucket, file)
        bucket.clear()
        self.client.update_weights(asdict(BucketInfo(str(file))))
        file.unlink()

    def shutdown(self) -> None:
        if self.folder:
            _remove_folder(Path(self.folder))
            os.close(self.lock)


def _open_folder(needed: int) -> tuple[str, int]:
    """A folder in memory, and its lock, which a killed process lets go of; what such a one has left goes first."""
    disk = Path(tempfile.gettempdir())
    for left in (*_MEMORY.glob(f"{_FOLDER}*"), *disk.glob(f"{_FOLDER}*")):
        with contextlib.suppress(OSError):  # in use, or another user's
            lock = _lock(left)
            _remove_folder(left)
            os.close(lock)
    fits = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > needed  # a container's may be tiny
    folder = Path(tempfile.mkdtemp(prefix="new_", dir=_MEMORY if fits else disk))
    lock = _lock(folder)  # before others look for it under its name
    return str(folder.rename(folder.with_name(_FOLDER + folder.name))), lock


def _lock(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / _BUCKET).unlink(missing_ok=True)
        folder.rmdir()


def open_sender(backend: str, client: Any, source: DecoderSource, **where: Any) -> TrainerWeightTransferEngine:
    """The trainer's end. `where`: `rank`, and for NCCL `master_address`, `master_port`, `world_size`."""
    register()
    if backend == SHARED_MEMORY:
        info: TrainerInitInfo = SharedMemoryTrainerInfo(**where)
    elif backend == IPC:  # a bucket holds the largest tensor; every rank has an engine of its own to send to
        size = max(_BUCKET_BYTES, source.largest_bytes)
        info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, **where)
    else:
        info = NCCLTrainerInitInfo(packed_buffer_size_bytes=_BUCKET_BYTES, **where)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)  # type: ignore[arg-type]


def register() -> None:
    """Make the transports known to vLLM, in this process; twice is as good as once."""
    ends: list[Any] = [
        (WeightTransferTrainerFactory, SHARED_MEMORY, SharedMemorySender),
        (WeightTransferEngineFactory, SHARED_MEMORY, SharedMemoryReceiver),
        (WeightTransferEngineFactory, NCCL, NcclReceiver),
        (WeightTransferEngineFactory, IPC, IpcReceiver),
    ]
    for factory, name, end in ends:
        with contextlib.suppress(ValueError):  # it is
            factory.register_engine(name, end)
