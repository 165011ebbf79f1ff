"""vLLM's transfers of weights in one process and without a GPU. NCCL's communicator is a queue between threads, a CUDA
IPC handle the number of a tensor, a stream nothing. All the rest is the code of both sides: what a run sends by, and
vLLM's LLM, its workers, and the engines at either end of a transfer.

Only with vLLM installed can this be imported.
"""

import asyncio
import contextlib
import json
import pickle
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions
from vllm import LLM
from vllm.config import WeightTransferConfig
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, packed_tensor
from vllm.v1.worker import gpu_worker

from flashgrpo.grpo.rollout.vllm.engine import Extension
from flashgrpo.grpo.rollout.vllm.servers import ServerRefusal, VllmServers

_POLL_S = 0.01


class Network:
    """What joins the communicators of a test: a queue for each rank that receives, with room for one chunk, as NCCL
    sends no further ahead. Rank `stuck` takes no more after `stuck_after` chunks.
    """

    def __init__(self) -> None:
        self.queues: dict[int, queue.Queue[Tensor]] = defaultdict(lambda: queue.Queue(maxsize=1))
        self.joined: list[tuple[int, int]] = []  # (rank, of how many), in all groups
        self.aborted: list[int] = []  # ranks whose communicators were
        self.chunks = self.num_bytes = 0  # that were sent
        self.stuck, self.stuck_after = -1, 0
        self.flipped = -1  # the chunk of which a byte arrives as another
        self.handles = IpcHandles()
        self.ended = threading.Event()  # the test has: nobody waits any more


class Communicator:
    """In place of vLLM's PyNcclCommunicator, in a group that has met over a real store."""

    def __init__(self, network: Network, group: Any):
        self.network, self.rank, self.size = network, group.rank, group.world_size
        self.device = torch.device("cpu")
        self._group = group  # whose store ends with rank 0's
        self._is_destroyed = threading.Event()
        self._received = 0
        group.broadcast_obj("an id", src=0)  # as NCCL's: until all are there
        network.joined.append((self.rank, self.size))

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        assert tensor.is_contiguous(), "NCCL reads on from the first byte"
        if self.rank != src:
            self._receive(tensor)
            return
        sent = tensor.clone()
        if self.network.chunks == self.network.flipped:
            sent[0] ^= 1
        self.network.chunks += 1
        self.network.num_bytes += tensor.nbytes
        for rank in range(self.size):
            if rank != src:
                self._patiently(lambda to=rank: self.network.queues[to].put(sent, timeout=_POLL_S))

    def destroy(self) -> None:
        """As ncclCommAbort, it wakes who waits here."""
        self.network.aborted.append(self.rank)
        self._is_destroyed.set()

    def _receive(self, tensor: Tensor) -> None:
        if self.rank == self.network.stuck and self._received == self.network.stuck_after:
            self.network.ended.wait()
        sent = self._patiently(lambda: self.network.queues[self.rank].get(timeout=_POLL_S))
        # NCCL would hang, or fill the buffer with parts of two chunks.
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype), "the ends cut chunks at other places"
        tensor.copy_(sent)
        self._received += 1

    def _patiently(self, move: Callable[[], Any]) -> Any:
        while not (self._is_destroyed.is_set() or self.network.ended.is_set()):
            with contextlib.suppress(queue.Empty, queue.Full):
                return move()
        raise RuntimeError("NCCL: the communicator was aborted")


class IpcHandles:
    """CUDA IPC: what `reduce_tensor` gives and `rebuild_cuda_tensor` takes, with a number in place of memory's name."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.opened: Counter[int] = Counter()

    def reduce(self, tensor: Tensor) -> tuple[Any, tuple]:
        self.tensors.append(tensor)
        return None, (len(self.tensors) - 1, *"12345", "the sender's device", *"789")

    def rebuild(self, number: int, *rest: Any) -> Tensor:
        assert rest[5] == 0, "not on the worker's device"
        self.opened[number] += 1
        return self.tensors[number]


class _Stream:
    def synchronize(self) -> None:
        pass


def emulate(patch: Any, network: Network) -> None:
    """What of CUDA, NCCL and CUDA IPC the transfers ask for, until `patch`, pytest's, is undone."""

    def empty(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.empty(*size, **options)

    class Torch:
        """torch, whose GPU is the CPU."""

        def __getattr__(self, name: str) -> Any:
            return empty if name == "empty" else getattr(torch, name)

    stream = _Stream()
    patch.setattr(packed_tensor, "torch", Torch())
    patch.setattr(packed_tensor, "_get_streams", lambda device, count: (stream,) * count)
    patch.setattr(packed_tensor, "reduce_tensor", network.handles.reduce)
    patch.setattr(reductions, "rebuild_cuda_tensor", network.handles.rebuild)
    patch.setattr(pynccl, "PyNcclCommunicator", lambda group, device: Communicator(network, group))
    patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda *_, **__: stream)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "set_device", lambda _: None)
    patch.setattr(torch.cuda, "ipc_collect", lambda: None)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    patch.setattr(torch.accelerator, "synchronize", lambda *_: None)


class SampledModel(torch.nn.Module):
    """A worker's. It keeps the very tensors that it is given, as vLLM does until it has all of a layer: a buffer that
    is used again before would be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loaded |= dict(weights)


class PatchedModel(SampledModel):
    """One that is written in place, as vLLM's own, where it has what changed alone."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.loaded.setdefault(name, torch.zeros_like(tensor)).copy_(tensor)


class Worker(gpu_worker.Worker, Extension):
    """A vLLM worker of which there is the transfer alone."""

    def __init__(self, backend: str, rank: int = 0, tensor_parallel: int = 1):
        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(),
            parallel_config=SimpleNamespace(data_parallel_index=0, world_size=tensor_parallel, rank=rank),
        )
        self.model = PatchedModel() if backend == "sparse_nccl" else SampledModel()
        self.vllm_config, self.rank = config, rank
        self.model_runner: Any = SimpleNamespace(reset_lora_state=lambda: None)
        self._weight_update_active = self._weight_update_is_draft = False
        device = torch.device("cuda", 0) if backend == "ipc" else torch.device("cpu")
        self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), config, device, self.model
        )


class Llm(LLM):
    """vLLM's, with a worker of ours below it."""

    def __init__(self, weight_transfer_config: WeightTransferConfig, **_: Any):
        self.worker, self.version = Worker(weight_transfer_config.backend), ""
        self.slept: list[Any] = []

        def call(method: str, timeout: Any = None, args: tuple = (), kwargs: Any = None) -> list[Any]:
            return [getattr(self.worker, method)(*args, **(kwargs or {}))]

        self.llm_engine: Any = SimpleNamespace(collective_rpc=call, set_weight_version=self._set_version)

    def _set_version(self, version: str) -> None:
        self.version = version

    def sleep(self, level: int = 1, mode: Any = "abort") -> None:
        self.slept.append(level)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.slept.append(tags)
        return True

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return True


class ChildHere:
    """In place of `Child`: in this process, in a thread, and what goes through the pipe is pickled. `hang_in` is the
    name of a method that does not return, and from which call of it on.
    """

    hang_in: tuple[str, int] = "", 0

    def __init__(self, name: str, failure: type[Exception], make: Any, arguments: tuple, environment: Any):
        self.name, self.failure, self.made = name, failure, make(*arguments)
        self.calls: list[str] = []

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        self.calls.append(method)
        arguments = pickle.loads(pickle.dumps(arguments))
        if (method, self.calls.count(method)) == self.hang_in:
            raise self.failure(f"{self.name} did not finish {method} within {timeout_s:g} s")
        return getattr(self.made, method)(*arguments)

    def close(self) -> None:
        pass


class ServersHere(VllmServers):
    """Servers in this process, of the workers at each address; bodies and answers are JSON all the same."""

    def __init__(self, workers: dict[str, Sequence[Worker]], timeout_s: float):
        self.workers, self.paths = workers, []
        self._threads = ThreadPoolExecutor()
        super().__init__([*workers], [0], timeout_s, vocab_size=128, key="")

    async def _text(self, method: str, address: str, body: Any = None) -> str:
        server, path = address[: address.rindex("/")], address[address.rindex("/") + 1 :]
        if path == "metrics" or path.startswith(("pause", "resume")):
            return ""
        self.paths.append(path)
        arguments = json.loads(json.dumps(body))
        arguments.pop("weight_version", None)  # which is the engine's, not a worker's
        loop = asyncio.get_running_loop()
        calls = []
        for worker in self.workers[server]:
            ask = getattr(worker, path)
            calls.append(loop.run_in_executor(self._threads, lambda ask=ask: ask(**arguments)))
        try:
            return json.dumps(await asyncio.gather(*calls))
        except Exception as error:
            raise ServerRefusal(f"{address} answered 500: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        super().close()
        self._threads.shutdown(wait=False)
