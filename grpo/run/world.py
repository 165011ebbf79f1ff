"""The ranks of a run: torchrun's processes, or a world of one; and what they must do together.

All of them hold the same recipe, read the same data and, from the gathered rollouts on, compute the same plans. What
can fail or be interrupted on one of them alone goes through `together` or `on_main`, so that it ends on all of them.
"""

import datetime
import logging
import os
import socket
import time
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
from flashgrpo.grpo.run import watch
from flashgrpo.grpo.run.interrupts import Interrupts
from flashgrpo.grpo.run.machines import resolve_device
from flashgrpo.grpo.run.progress import console

_FAILED = "rank 0 failed"

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
    links: watch.Links = {}
    try:
        if size > 1:
            store, links = watch.meet(next(rendezvous("env://"))[0], rank, size, limit_s)
        with watch.watched(links, size, limit_s):
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
            time.sleep(watch.NOTICE_S + watch.GRACE_S)
        # Ranks find the same fault within seconds of each other; a person should read it once.
        if rank == 0:
            store.set(_FAILED, str(error))
        elif is_lost or not _is_told(store):
            console.quiet = False
            console.print(f"flashgrpo: rank {rank} of {size} on {socket.gethostname()}:", style="red", highlight=False)
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
        store.wait([_FAILED], datetime.timedelta(seconds=watch.GRACE_S))
    except dist.DistError as error:
        return isinstance(error, dist.DistNetworkError)  # rank 0 held the store, and has ended
    return True
