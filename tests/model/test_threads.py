"""Torch computes with as many threads as have a processor to themselves, and no bit depends on their number."""

import itertools
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from flashgrpo.model import threads
from flashgrpo.model.checkpoint import init_decoder

CPUS = 4


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(monkeypatch):
    """A machine of four processors: half a second passes at each call, in which others take so many of them."""
    clock = itertools.count(100.0, 0.5)
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(threads.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CPUS)), raising=False)
    fitted = threads.Threads()

    def measured(taken: float, times: int = 1) -> int:
        monkeypatch.setattr(psutil, "cpu_percent", lambda percpu: [100 * taken / CPUS] * CPUS)
        for _ in range(times):
            fitted.fit()
        return torch.get_num_threads()

    measured(0.0)  # the first one only begins to count
    return measured


def test_threads_leave_the_processors_that_others_use_and_come_back_when_those_are_done(measure):
    torch.set_num_threads(4)
    assert [measure(taken) for taken in (0.2, 1.0, 2.6, 9.0)] == [4, 3, 1, 1]
    assert measure(0.0, times=threads.REMEMBERED - 1) == 1  # a pause of a busy process is not its end
    assert measure(0.0) == 4


def test_never_more_threads_than_were_asked_for(measure, monkeypatch):
    assert measure(0.0) == 2
    torch.set_num_threads(1)
    assert measure(0.0, times=8) == 1
    torch.set_num_threads(3)
    assert measure(0.0) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert measure(4.0) == 3


@pytest.mark.parametrize("num_tokens", [100, 3])
def test_the_number_of_threads_changes_no_bit_of_a_gradient(tiny, pack, num_tokens):
    """Otherwise a run that is resumed beside another process would not be the same run."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "head_dim": 32}
    decoder = init_decoder(tiny(**sizes, vocab_size=256, tie_word_embeddings=True), seed=0)
    completions = [[(7 * i + j) % 256 for j in range(num_tokens)] for i in range(min(num_tokens, 8))]
    batch = pack([[1, 2], *completions], [-1, *[0] * len(completions)])

    def gradients(num_threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(num_threads)
        return torch.autograd.grad(decoder(batch).square().sum(), list(decoder.parameters()))

    assert all(map(torch.equal, gradients(1), gradients(2)))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_beside_a_real_busy_process_a_decoder_computes_with_a_thread_less(tiny, pack):
    """Otherwise `make demo` beside a build takes ten times as long."""
    decoder, batch = init_decoder(tiny(), seed=0), pack([[1, 2, 3]])
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        deadline = time.monotonic() + 60
        while torch.get_num_threads() == 2 and time.monotonic() < deadline:
            decoder(batch)
            time.sleep(0.05)
        assert torch.get_num_threads() == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()
