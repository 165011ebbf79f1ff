"""Weights to servers on GPUs: an NCCL group of the trainer's rank 0 and every server's workers, by vLLM's transport."""

import socket
import threading
import urllib.parse
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashgrpo.grpo.errors import GeneratorFailure
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.rollout.vllm.servers import VllmServers


class _Receivers:
    """The servers, as vLLM's end of a transfer asks for them; what they refuse is told at once."""

    def __init__(self, servers: VllmServers):
        self.init_weight_transfer_engine = servers.init_weight_transfer_engine
        self.start_weight_update = servers.start_weight_update
        self.finish_weight_update = servers.finish_weight_update
        self._update_weights = servers.update_weights
        self.refused: Future[Any] = Future()

    def update_weights(self, update_info: Any) -> None:
        """Beside the broadcast, which would wait for the workers of a server that has given up."""
        try:
            self._update_weights(update_info)
        except Exception as error:
            self.refused.set_exception(error)
            raise


class NcclSender:
    """Rank 0's end of a group with the servers that live when it is made, and have told of their workers.

    NCCL waits for ever: what takes longer than `timeout_s`, or a server refuses meanwhile, is left behind, and the
    group with it.
    """

    def __init__(self, engine: Any, servers: VllmServers, source: DecoderSource, device: torch.device, is_sparse: bool):
        self.device, self.timeout_s, self._engine = device, servers.timeout_s, engine
        self._sent: dict[str, Tensor] | None = {} if is_sparse else None
        self._group: Any = None
        self._receivers = _Receivers(servers)
        address, port = _own_address(servers.urls)
        world_size = 1 + servers.num_workers
        self._group = self._in_time(
            lambda: engine.open_nccl(self._receivers, source, address, port, world_size, is_sparse)
        )

    def send(self, source: DecoderSource) -> None:
        """All weights, or what has changed of them, in one update of the servers'."""
        if self._sent is None:
            self._group.source = source
            self._in_time(self._group.send_weights)
        else:
            self._in_time(partial(self._engine.send_changes, self._group, source, self._sent))

    def close(self) -> None:
        """Tear the group down, which ends whatever waits in it."""
        group, self._group = self._group, None
        if group is not None:
            group.shutdown()

    def _in_time(self, work: Callable[[], Any]) -> Any:
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                torch.cuda.set_device(self.device)
                outcome.set_result(work())
            except Exception as error:  # it is raised where the result is taken
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        refused = self._receivers.refused
        wait([outcome, refused], self.timeout_s, FIRST_COMPLETED)
        if outcome.done():
            return outcome.result()
        if self._group is not None:
            self.close()
            wait([outcome], self.timeout_s)  # it is still iterating the weights
        if refused.done():
            return refused.result()
        raise GeneratorFailure(f"the servers had not done their part over NCCL within {self.timeout_s:g} s")


def _own_address(servers: list[str]) -> tuple[str, int]:
    """An address of this machine that all servers can reach, and a free port on it."""
    hosts = [urllib.parse.urlsplit(url).hostname or "" for url in servers]
    addresses = [socket.gethostbyname(host) for host in hosts]
    farthest = max(addresses, key=lambda address: not address.startswith("127."))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, socket.socket() as free:
        probe.connect((farthest, 9))  # sends nothing
        free.bind(("", 0))
        return probe.getsockname()[0], free.getsockname()[1]
