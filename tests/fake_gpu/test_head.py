"""The head's products as a GPU gets them: those that sum 16-bit numbers into fp32 have no kernel on a CPU."""

import pytest
import torch

from fake_gpu.gpus import fake_gpus, shape
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs

HIDDEN, VOCAB = 4096, 128_256


def head(gpus, num_rows):
    made = [torch.empty(n, HIDDEN, device=gpus.device, dtype=torch.bfloat16) for n in (num_rows, VOCAB)]
    return *made, torch.zeros(num_rows, device=gpus.device, dtype=torch.int64)


def products(monkeypatch):
    """Shapes of what torch multiplies from now on: [rows, columns] of the result and what is summed over."""
    made = []

    def watched(product):
        def counted(*tensors, **options):
            num_made = len(made)
            result = product(*tensors, **options)
            made[num_made:] = [(*result.shape, tensors[-1].shape[0])]  # a fake one may be made of another
            return result

        return counted

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    return made


@pytest.mark.parametrize(
    ("num_rows", "chunks"),
    # A last chunk as long as the others made 12,288 rows of the first three, 67,584 of the last.
    [(6200, [3200, 3000]), (8192, [4096] * 2), (9000, [4608, 4392]), (65_536, [6016] * 10 + [5376])],
)
def test_chunks_are_equal_and_no_row_is_computed_twice(num_rows, chunks, monkeypatch):
    with fake_gpus() as gpus:
        made, arguments = products(monkeypatch), head(gpus, num_rows)
        with torch.no_grad():
            linear_logprobs(*arguments)
            assert [rows for rows, _, _ in made] == chunks
            offsets = torch.zeros(2, device=gpus.device, dtype=torch.int64)
            ones = torch.ones(1, device=gpus.device)
            linear_grpo_loss(*arguments, offsets, LossConfig(), denominator=1, advantages=ones)
        assert [rows for rows, _, _ in made] == 2 * chunks


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("num_rows", [4096, 9000])
def test_d_weight_is_written_once_and_one_chunk_makes_it_as_it_is_wanted(num_rows, with_main_grad, monkeypatch):
    """No zeros, no fp32 where one product makes it, and no pass over it where the upstream gradient is 1."""
    with fake_gpus() as gpus:
        made, (hidden, weight, targets) = products(monkeypatch), head(gpus, num_rows)
        offsets, ones = targets.new_zeros(2), torch.ones(1, device=gpus.device)
        main_grad = torch.empty(VOCAB, HIDDEN, device=gpus.device) if with_main_grad else None
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        with gpus.record() as forward:
            loss, _ = linear_grpo_loss(
                *leaves, targets, offsets, LossConfig(), denominator=37, advantages=ones, main_grad=main_grad
            )
        with gpus.record() as backward:
            loss.backward()
    rows, narrow = ([4096], not with_main_grad) if num_rows == 4096 else ([4608, 4392], False)
    shapes = [[(n, VOCAB, HIDDEN), (n, HIDDEN, VOCAB), (VOCAB, HIDDEN, n)] for n in rows]
    assert made == [shape for chunk in shapes for shape in chunk], made
    assert forward.kernels["aten::addmm.dtype_out"] == len(rows) - 1
    of_weight = [name for name in backward.kernels if name not in ("triton::_scale_kernel", "aten::ones_like")]
    assert of_weight == ([] if narrow else ["aten::addcmul.out" if with_main_grad else "aten::mul.out"])
    assert backward.kernels["triton::_scale_kernel"] == 1 + narrow
    logits, d_weight = 2 * rows[0] * VOCAB, (2 if narrow else 4) * VOCAB * HIDDEN
    held = 1.01 * (logits + d_weight + 2 * num_rows * HIDDEN)
    assert forward.peaks["loss"] - forward.at_start < held
    assert (
        backward.peaks["none"] - forward.at_start
        < d_weight + 2 * num_rows * HIDDEN + (0 if narrow or with_main_grad else 2 * VOCAB * HIDDEN) + 2**20
    )
    assert (weight.grad is None) == with_main_grad


def test_a_sharded_weight_is_refused():
    with fake_gpus(world=2) as gpus:
        weight = gpus.model(shape("Qwen2.5-0.5B", layers=1)).lm_head_weight
        hidden, targets = torch.empty(3, 896, device=gpus.device), torch.zeros(3, device=gpus.device, dtype=torch.int64)
        with pytest.raises(TypeError, match="lm_head_weight is a DTensor; wanted a whole tensor"):
            linear_logprobs(hidden, weight, targets)
