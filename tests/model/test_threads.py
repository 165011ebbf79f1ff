import itertools
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from transformers import AutoConfig

from flashgrpo.model import cpu
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig

CPUS = 4


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    monkeypatch.setattr(cpu, "_threads", cpu._Threads())
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(monkeypatch):
    """A machine of four processors: half a second passes at each call, in which others take so many of them."""
    clock = itertools.count(100.0, 0.5)
    monkeypatch.setattr(cpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(cpu.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CPUS)), raising=False)

    def measured(taken: float, times: int = 1) -> int:
        monkeypatch.setattr(psutil, "cpu_percent", lambda percpu: [100 * taken / CPUS] * CPUS)
        for _ in range(times):
            cpu.fit_threads()
        return torch.get_num_threads()

    measured(0.0)  # the first one only begins to count
    return measured


def test_threads_leave_the_processors_that_others_use_and_come_back_when_those_are_done(measure):
    torch.set_num_threads(4)
    assert measure(0.2) == 4
    assert measure(1.0) == 3
    assert measure(2.6) == 1
    assert measure(9.0) == 1
    assert measure(0.0, times=cpu._REMEMBERED - 1) == 1  # a pause of a busy process is not its end
    assert measure(0.0) == 4


def test_never_more_threads_than_were_asked_for(measure):
    assert measure(0.0) == 2
    torch.set_num_threads(1)
    assert measure(0.0, times=8) == 1
    torch.set_num_threads(3)
    assert measure(0.0) == 3


def test_a_number_that_the_environment_sets_stays(measure, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert measure(4.0) == 2


@pytest.mark.parametrize("num_tokens", [100, 3])
def test_the_number_of_threads_changes_no_bit_of_a_gradient(pack, num_tokens):
    """Otherwise a run that is resumed beside another process would not be the same run."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
    config = AutoConfig.for_model("qwen3", vocab_size=512, tie_word_embeddings=True, **sizes)
    decoder = init_decoder(ModelConfig.from_dict(config.to_dict()), seed=0)
    completions = [[(7 * i + j) % 512 for j in range(num_tokens)] for i in range(min(num_tokens, 8))]
    batch = pack([[1, 2], *completions], [-1, *[0] * len(completions)])

    def gradients(num_threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(num_threads)
        hidden = decoder(batch)
        return torch.autograd.grad(hidden.square().sum(), list(decoder.parameters()))

    assert all(map(torch.equal, gradients(1), gradients(2)))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_beside_a_real_busy_process_a_thread_less_computes():
    """Otherwise `make demo` beside a build takes ten times as long."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        deadline = time.monotonic() + 60
        while torch.get_num_threads() == 2 and time.monotonic() < deadline:
            cpu.fit_threads()
            time.sleep(0.05)
        assert torch.get_num_threads() == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()
