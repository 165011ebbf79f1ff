"""The ranks of a run: torchrun's processes, or a world of one; and what they must do together.

All of them hold the same recipe, read the same data and, from the gathered rollouts on, compute the same plans. What
can fail or be interrupted on one of them alone goes through `together` or `on_main`, so that it ends on all of them.

A rank that dies or is stopped ends the others, which tell its name: also those that wait in NCCL, or compute. Rank 0
holds a connection to each of the others, and both ends say every second that they live. A process that dies, wherever
it runs, closes its connections; a machine that is gone confirms no packet; one that is stopped is silent.
"""

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, RewardFailure, RunError
from flashgrpo.grpo.recipe.load import AnyRecipe, recipe_to_toml
from flashgrpo.grpo.run.interrupts import Interrupts
from flashgrpo.grpo.run.machines import resolve_device
from flashgrpo.grpo.run.progress import console, say

GRACE_S = 5.0  # for this rank to find the same error, and for torchrun to end the ranks beside one that died
NOTICE_S = 5.0  # more than it takes until all know of a rank that is lost
_BEAT_S = 1.0
_GREETING_S = 1.0  # that a stranger at the port may keep rank 0 waiting
_ANSWER_S = 60.0  # of rank 0, which greets one after the other
_GONE_MS = 20_000  # after which packets that were not confirmed break a connection
_ALIVE, _DONE = b".", b"!"
_FAILED = "rank 0 failed"

Links = dict[int, socket.socket]  # by the rank at the other end
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank's view of all of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # (shard,) or (replicate, shard)
    interrupts: Interrupts = field(default_factory=Interrupts)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every rank's result of its own `work`. Ctrl-C, or a reward or generator that fails, on one of them is raised
        on all.
        """

        def interruptible() -> T:
            with self.interrupts.allowed():
                return work()

        return self.everywhere(interruptible, (KeyboardInterrupt, RewardFailure, GeneratorFailure))

    def everywhere(self, work: Callable[[], T], errors: tuple[type[BaseException], ...] = (Exception,)) -> list[T]:
        """Every rank's result of `work`; where one of them raises one of `errors`, all do."""
        outcome: tuple[T | None, BaseException | None]
        try:
            outcome = work(), None
        except errors as error:
            outcome = None, error
        outcomes: list[tuple[Any, BaseException | None]] = [*self.gather(outcome)]
        for rank, (_, error) in enumerate(outcomes):
            if error is not None:
                raise (outcome[1] or error) if rank == self.rank else error  # this rank's own has its traceback
        return [result for result, _ in outcomes]

    def on_main(self, work: Callable[[], T]) -> T:
        """The first rank's result of `work`, which the others do not do; its error is raised on all."""
        outcomes: list[Any] = self.everywhere(lambda: work() if self.is_main else None)
        return outcomes[0]

    def gather_array(self, values: np.ndarray) -> list[np.ndarray]:
        """Every rank's `values`, of one type and any length each, [num_values]."""
        if self.size == 1:
            return [values]
        lengths = self.gather(len(values))
        padded = torch.zeros(max(lengths), dtype=torch.from_numpy(values[:0]).dtype)
        padded[: len(values)] = torch.from_numpy(values)
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(rows, padded)
        return [row[:length].numpy() for row, length in zip(rows, lengths, strict=True)]

    def gather_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's `values` on the device, stacked: [size, *values.shape]. Does not wait for the device."""
        rows = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)


@contextmanager
def open_world(recipe: AnyRecipe) -> Iterator[World]:
    """The ranks that torchrun started, or a world of one, each with its device.

    Raises RecipeError where the ranks' recipes differ, or train.shard_ranks does not divide their number. An error
    that all ranks raise is shown by the first alone; that of a single one, with the rank's name.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    console.quiet = rank > 0
    logging.getLogger("flashgrpo").setLevel(logging.ERROR if rank else logging.NOTSET)
    limit_s = recipe.run.collective_timeout_s
    limit = datetime.timedelta(seconds=limit_s)
    # A single process opens a group, too: one program for one rank and for many.
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    links: Links = {}
    try:
        if size > 1:
            store, links = meet(next(rendezvous("env://"))[0], rank, size, limit_s)
        with watched(links, size, limit_s):
            device = resolve_device(recipe.run.device)
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(device)
            # Objects and what is on the host go through gloo, so that nothing of theirs waits for the device.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            # With a device NCCL makes its communicators here, and those of subgroups in `_mesh`, where without one it
            # would wait for the first collective: by then torch's cache has the memory that they need.
            own = device if device.type == "cuda" else None
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=own)
            _compare_recipes(recipe, size)
            shard_ranks = getattr(getattr(recipe, "train", None), "shard_ranks", 0)  # of what is trained
            yield World(rank, size, device, _mesh(device, size, shard_ranks or size, limit))
    except Exception as error:  # whatever it is, it is raised again below, once it is known which ranks tell it
        is_lost = misses_a_rank(error)
        if is_lost:
            # Where a rank has died or stopped, `watched` ends this one meanwhile, and knows which it was.
            time.sleep(NOTICE_S + GRACE_S)
        # Ranks find the same fault within seconds of each other; a person should read it once.
        if rank == 0:
            store.set(_FAILED, str(error))
        elif is_lost or not _is_told(store):
            console.quiet = False
            say(f"flashgrpo: rank {rank} of {size} on {socket.gethostname()}:", style="red")
        if is_lost:
            raise RunError(
                f"a rank let the others wait for longer than run.collective_timeout_s = {limit_s:g}; raise it, or look "
                f"at what the rank was doing, and continue with --resume: {error}"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def misses_a_rank(error: BaseException) -> bool:
    """Whether it is torch's about another rank that has ended, or does not answer."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _mesh(device: torch.device, size: int, shard_ranks: int, limit: datetime.timedelta) -> DeviceMesh:
    if size % shard_ranks:
        raise RecipeError(
            f"train.shard_ranks = {shard_ranks} does not divide the {size} ranks; use one that does, or 0 for all"
        )
    if shard_ranks == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    ranks = torch.arange(size).view(-1, shard_ranks)
    groups: list[Any] = [
        dist.new_subgroups_by_enumeration(rows.tolist(), timeout=limit)[0] for rows in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def _compare_recipes(recipe: AnyRecipe, size: int) -> None:
    """Before anything else that the ranks do together: what it is depends on the recipe."""
    texts: list[Any] = [""] * size
    dist.all_gather_object(texts, recipe_to_toml(recipe))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            lines = zip(texts[0].splitlines(), text.splitlines(), strict=False)
            found, wanted = next((pair for pair in lines if pair[0] != pair[1]), ("more keys", "fewer"))
            raise RecipeError(
                f"the ranks have different recipes: {found} on rank 0, {wanted} on rank {rank}; start all with the same"
            )


def _is_told(store: Any) -> bool:
    """Whether rank 0 has an error to tell, or is told when it was to find the same one."""
    try:
        store.wait([_FAILED], datetime.timedelta(seconds=GRACE_S))
    except dist.DistError as error:
        return isinstance(error, dist.DistNetworkError)  # rank 0 held the store, and has ended
    return True


def meet(store: Any, rank: int, size: int, limit_s: float) -> tuple[Any, Links]:
    """A part of torchrun's store for these processes alone, and rank 0's connections to the others, theirs to it.

    The store outlives a restart, with all that the ranks of before have left in it, and nothing
    that torchrun hands on tells them apart: TORCHELASTIC_RESTART_COUNT differs between nodes. So
    rank 0 gives each start a name, beside the port where it hears of the others; at the port of
    before nobody does.
    """
    store.set_timeout(datetime.timedelta(seconds=limit_s))
    try:
        name, links = _gather_others(store, size, limit_s) if rank == 0 else _join(store, rank, limit_s)
    except OSError as error:
        raise dist.DistStoreError(f"not all of the {size} ranks have started") from error
    for link in links.values():
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_MS)
    return dist.PrefixStore(name, store), links  # pyright: ignore[reportPrivateImportUsage]


def _gather_others(store: Any, size: int, limit_s: float) -> tuple[str, Links]:
    name, links = uuid.uuid4().hex, {}
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=has_both) as server:
        server.settimeout(limit_s)
        store.set("rank 0", f"{name} {server.getsockname()[1]}")
        while len(links) < size - 1:
            link, _ = server.accept()
            link.settimeout(_GREETING_S)
            with contextlib.suppress(OSError):  # anybody may knock at a port
                greeting = link.recv(64).split()
                if greeting[:1] == [name.encode()]:
                    link.sendall(name.encode())
                    links[int(greeting[1])] = link
    return name, links


def _join(store: Any, rank: int, limit_s: float) -> tuple[str, Links]:
    deadline = time.monotonic() + limit_s
    while True:
        name, port = store.get("rank 0").decode().split()
        try:
            link = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=_ANSWER_S)
            link.sendall(f"{name} {rank}".encode())
            if link.recv(len(name)) == name.encode():
                return name, {0: link}
            raise ConnectionRefusedError("another service has taken the port")
        except OSError:  # rank 0 has not started yet: this is where the one of before was
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def watched(links: Links, size: int, limit_s: float) -> Iterator[None]:
    """Ends this process soon after one at the other end of a link has died, or was silent for `limit_s`."""
    is_done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(links, size, is_done, limit_s), daemon=True)
    watcher.start()
    yield
    is_done.set()
    watcher.join()
    for link in links.values():
        link.close()


def _watch(links: Links, size: int, is_done: threading.Event, limit_s: float) -> None:
    """Until all others are done, too."""
    silence_s = limit_s + 2 * _BEAT_S
    # Counted here, not by a clock: of ranks that were all stopped for a while none is lost.
    silent_s, is_over = dict.fromkeys(links, 0.0), False  # of those that are not done
    while silent_s or not is_over:
        is_over = is_done.wait(_BEAT_S)
        for rank, link in links.items():
            is_left = rank in silent_s
            # Until this rank is done, none of the others may keep it waiting for the beat of the next.
            link.settimeout(_BEAT_S if is_over and is_left else 0)
            # Also to one that is done: it waits until this rank is, too.
            _tell(link, _DONE if is_over else _ALIVE)
            try:
                said = link.recv(1024)
            except (BlockingIOError, TimeoutError):
                if is_left:
                    silent_s[rank] += _BEAT_S
                    if silent_s[rank] >= silence_s:
                        fate = f"has given no sign of life for {silence_s:g} s, as if stopped"
                        _end(links, f"rank {rank} of {size} {fate}")
                continue
            except OSError:
                said = b""
            if said.strip(_ALIVE + _DONE):  # rank 0 tells of a third one, and its name itself
                _end({}, "")
            elif not said and is_left:
                _end(links, f"rank {rank} of {size} has died")
            elif is_left:
                silent_s[rank] = 0.0
                if _DONE in said:
                    del silent_s[rank]


def _tell(link: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):  # that one is lost, which is found when it is listened to
        link.send(word)


def _end(links: Links, news: str) -> None:
    for link in links.values():
        _tell(link, news.encode())
    time.sleep(GRACE_S)
    if news:
        os.write(2, f"flashgrpo: {news}; continue with --resume\n".encode())
    os._exit(1)
