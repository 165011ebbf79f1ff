"""What a dry run sees is there, and what is not there it does not see: else all that rests on it would pass."""

import pytest
import torch
import torch.nn.functional as F

from fake_gpu.gpus import fake_gpus
from flashgrpo.grpo.run.progress import Clock
from flashgrpo.kernels.common import tl, triton

WAITS = {
    "a number": lambda x: x.sum().item(),
    "a truth": lambda x: bool((x > 0).any()),
    "numbers": lambda x: x[:3, 0].tolist(),
    "to the host": lambda x: x.cpu(),
    "into a host tensor": lambda x: torch.zeros(8, 16).copy_(x),
    "rows that are found": lambda x: (x > 0).nonzero(),
    "from the host": lambda x: torch.zeros(8).to(x.device),
    "a new tensor's values": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "not pinned": lambda x: torch.zeros(8).to(x.device, non_blocking=True),
    "a stream": lambda x: torch.cuda.current_stream().synchronize(),
    "the device": lambda x: torch.cuda.synchronize(),
}
QUEUES = {
    "a product": lambda x: x @ x.T,
    "from pinned memory": lambda x: torch.zeros(8).pin_memory().to(x.device, non_blocking=True),
    "between types": lambda x: x.half(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(name):
    with fake_gpus() as gpus:
        x = torch.ones(8, 16, device=gpus.device)
        with gpus.record() as run:
            WAITS[name](x)
    assert run.syncs.total() == 1, run.syncs


@pytest.mark.parametrize("name", QUEUES)
def test_what_only_queues_is_no_wait(name):
    with fake_gpus() as gpus:
        x = torch.ones(8, 16, device=gpus.device)
        with gpus.record() as run:
            QUEUES[name](x)
    assert (run.syncs.total(), run.kernels.total()) == (0, 1), (run.syncs, run.kernels)


def test_kernels_are_those_of_a_gpus_build():
    """The CPU build composes some of others: more kernels, and more that is kept."""
    with fake_gpus() as gpus:
        x = torch.ones(8, 16, device=gpus.device, requires_grad=True)
        with gpus.record() as run:
            F.silu(F.rms_norm(x, (16,))).view(-1)[::2].T.sum().backward()
    names = {"_fused_rms_norm", "silu", "sum", "ones_like", "slice_backward", "silu_backward"}
    assert {f"aten::{name}" for name in names} <= run.kernels.keys(), run.kernels
    assert run.kernels.total() <= len(names) + 1, run.kernels


def test_memory_is_what_is_alive_in_blocks_of_the_allocator():
    with fake_gpus() as gpus, gpus.record() as run:
        x = torch.empty(1000, dtype=torch.uint8, device=gpus.device)
        y = torch.empty(3, 512, dtype=torch.uint8, device=gpus.device)[1:]
        del x
        z = torch.empty(5, device=gpus.device)
        y.untyped_storage().resize_(0)
        torch.empty(512, device=gpus.device)
        assert gpus.tracer.bytes_now == 512
    assert run.peak_bytes == 1024 + 3 * 512, run.peaks
    assert z.shape == (5,)


def test_a_phase_that_does_not_wait_is_seen():
    with fake_gpus() as gpus:
        clock, wait = Clock(), torch.cuda.synchronize
        with gpus.record() as run:
            with clock("train"):
                torch.ones(8, device=gpus.device)
            torch.cuda.synchronize = lambda: None
            with clock("score"):
                torch.ones(8, device=gpus.device)
            torch.cuda.synchronize = wait
    assert run.unwaited.keys() == {"score"}, run.unwaited


@triton.jit
def _nothing_kernel(x, n, BLOCK: tl.constexpr):
    pass


def test_launches_are_as_triton_specialises_them():
    with fake_gpus() as gpus:
        x = torch.ones(1024, device=gpus.device)
        with gpus.record() as run:
            for tensor, n in ((x, 16), (x, 32), (x[4:], 7), (x[2:], 16)):
                _nothing_kernel[(n,)](tensor, n, BLOCK=8)
    assert [launch.misaligned for launch in run.launches] == [(), (), (), ("x",)]
    assert [launch.grid for launch in run.launches] == [(16,), (32,), (7,), (16,)]
    first, second, odd, shifted = (launch.variant for launch in run.launches)
    assert first == second
    assert len({first, odd, shifted}) == 3
