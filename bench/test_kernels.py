"""The cases of `flashgrpo bench kernels` under pytest-benchmark, to compare one commit with another (no sweeps):

pytest bench/ --benchmark-only --benchmark-save=before
pytest bench/ --benchmark-only --benchmark-compare
"""

import itertools

import pytest
import torch

from flashgrpo.bench.cases import cases
from flashgrpo.bench.kernels import check_case
from flashgrpo.bench.peers import providers
from flashgrpo.bench.timing import noted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES, DTYPE = ("full", torch.bfloat16) if DEVICE.type == "cuda" else ("small", torch.float32)
CHOSEN, GATES = {}, {}
for case in cases(SIZES, DTYPE):
    if case.op != "memory":
        CHOSEN.setdefault((case.op, case.variant), [(case, provider) for provider in providers(case)])


@pytest.mark.parametrize(("case", "provider"), [*itertools.chain(*CHOSEN.values())], ids=lambda value: value.name)
def test_kernel(benchmark, case, provider):
    gate = case.reduced()
    if gate.name not in GATES:
        GATES[gate.name] = check_case(gate, DEVICE, providers(case))
    found = dict(GATES[gate.name][provider.name])
    with noted(found):
        call = provider.call(case, case.make(DEVICE))
        call()
    # A peer that is wrong is timed all the same.
    assert found["status"] == "ok" or not provider.is_ours, found["note"]
    if found["status"] not in ("ok", "wrong"):
        pytest.skip(f"{found['status']}: {found['note']}")

    def timed() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(found, flops=case.flops, bytes=case.bytes)
    benchmark.pedantic(timed, rounds=5)
