"""The head's products as a GPU gets them: those that sum 16-bit numbers into fp32 have no kernel on a CPU."""

import pytest
import torch

from fake_gpu.gpus import fake_gpus
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs

HIDDEN, VOCAB = 4096, 128_256


def head(gpus, num_rows):
    made = [torch.empty(n, HIDDEN, device=gpus.device, dtype=torch.bfloat16) for n in (num_rows, VOCAB)]
    return *made, torch.zeros(num_rows, device=gpus.device, dtype=torch.int64)


def products(monkeypatch):
    """Shapes of what torch multiplies from now on: [rows, columns] of the result and what is summed over."""
    made = []
    for name, second in (("mm", 1), ("addmm", 2)):

        def counted(*tensors, _product=getattr(torch, name), _second=second, **options):
            result, right = _product(*tensors, **options), tensors[_second]
            made.append((*result.shape, right.shape[0]))
            return result

        monkeypatch.setattr(torch, name, counted)
    return made


@pytest.mark.parametrize(
    (
        "num_rows",
        "chunks",
    ),  # a last chunk as long as the others made 12,288 rows of the first three, 67,584 of the last
    [(6200, [3200, 3000]), (8192, [4096] * 2), (9000, [4608, 4392]), (65_536, [6016] * 10 + [5376])],
)
def test_chunks_are_equal_and_no_row_is_computed_twice(num_rows, chunks):
    monkeypatch = pytest.MonkeyPatch()
    with fake_gpus() as gpus:
        made, arguments = products(monkeypatch), head(gpus, num_rows)
        with torch.no_grad():
            linear_logprobs(*arguments)
            assert [rows for rows, _, _ in made] == chunks
            offsets = torch.zeros(2, device=gpus.device, dtype=torch.int64)
            ones = torch.ones(1, device=gpus.device)
            linear_grpo_loss(*arguments, offsets, LossConfig(), denominator=1, advantages=ones)
        assert [rows for rows, _, _ in made] == 2 * chunks
