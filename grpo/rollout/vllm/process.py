"""vLLM in a process of its own beside the trainer's.

On a GPU a process cannot open its own CUDA IPC handles; on a CPU vLLM would take over the trainer's process group, its
threads and its random state. `EngineProcess` has the methods of `vllm_engine.Engine`. Its process sees one GPU and
nothing of torchrun's ranks, and ends with the trainer's.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from flashgrpo.grpo.errors import GeneratorFailure
from flashgrpo.grpo.rollout.vllm.options import EngineOptions
from flashgrpo.grpo.run.child import Child, own_environment
from flashgrpo.grpo.types import Request, Rollout, Sampling


class EngineError(GeneratorFailure):
    """vLLM's process has ended, or did not answer in time."""


class EngineProcess:
    """An engine in a child process, on the rank's GPU or the CPU; a call waits at most `timeout_s`, `generate` so long
    for the next tokens.
    """

    version = loaded = 0

    def __init__(
        self,
        options: EngineOptions,
        stop_token_ids: list[int],
        device: torch.device,
        timeout_s: float,
        load_format: str = "dummy",
    ):
        self.stop_token_ids, self.timeout_s = stop_token_ids, timeout_s
        environment = own_environment()
        if device.type == "cuda":
            index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible[0] else str(index)
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
        setup = options, stop_token_ids, load_format
        self.child = Child("vLLM's process", EngineError, serve, quiet | environment, setup)

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
        self.child.send(("generate", (requests, sampling)), "generate")
        missing = len(requests)
        try:
            while missing:
                if group := self.child.receive("generate", self.timeout_s):
                    yield group
                    missing -= 1
        finally:
            if missing and self.child.process.poll() is None:
                self.close()  # it would go on to the end

    def close(self) -> None:
        """End the process."""
        self.child.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        self.child.send((method, arguments), method)
        return self.child.receive(method, self.timeout_s)


def serve(file_descriptor: int) -> None:
    """The process's life: answers calls until the other end of the pipe is closed."""
    os.dup2(2, 1)  # what vLLM prints must not mix with the trainer's output
    with Connection(file_descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        engine: Any = None
        while True:
            message = connection.recv()
            try:
                if engine is None:
                    from flashgrpo.grpo.rollout.vllm.engine import Engine

                    engine = Engine(*message)
                    connection.send((None, None))
                    continue
                method, arguments = message
                result = getattr(engine, method)(*arguments)
                if method != "generate":
                    connection.send((None, result))
                    continue
                for group in result:
                    connection.send((None, group))
            except Exception as error:  # it is raised again in the trainer
                connection.send((GeneratorFailure(f"{type(error).__name__}: {error}"), None))
    os.kill(os.getpid(), signal.SIGKILL)
