"""The gather before the LM head decides which hidden states learn, and from which completions."""

import pytest
import torch

from flashgrpo.model.batch import PackedBatch, gather_predictors


def make_batch(predictors, target_cu_seqlens, completions_per_prompt, num_tokens):
    """A PackedBatch whose token space is nothing but positions: the gather reads the target space alone."""
    tokens = torch.arange(num_tokens)
    return PackedBatch(
        input_ids=tokens,
        position_ids=tokens,
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        prefix=torch.tensor([-1], dtype=torch.int32),
        max_seqlen=num_tokens,
        targets=torch.zeros(len(predictors), dtype=torch.int64),
        predictors=torch.tensor(predictors, dtype=torch.int64),
        target_cu_seqlens=torch.tensor(target_cu_seqlens, dtype=torch.int32),
        sequence_ids=torch.arange(len(target_cu_seqlens) - 1),
        completions_per_prompt=torch.tensor(completions_per_prompt, dtype=torch.int64),
    )


CASES = {
    # prompts of 3 and 2 tokens; completions of 2, 3 and 1 tokens behind the first, of 2 behind the second
    "two prompts": make_batch([2, 3, 2, 4, 5, 2, 7, 8], [0, 2, 5, 6, 8], [3, 1], 9),
    "a prompt without completions": make_batch([1, 3], [0, 1, 2], [1, 0, 1], 4),
    "no targets": make_batch([], [0], [], 3),  # a rank without live work still runs forward and backward
}
# One prompt with 64 completions of one token: every gradient meets in the prompt's last row.
LARGE_GROUP = make_batch([4] * 64, list(range(65)), [64], 5)


@pytest.mark.parametrize("batch", CASES.values(), ids=CASES)
def test_each_target_gets_the_hidden_state_before_it_and_gives_its_gradient(batch):
    hidden = torch.randn(batch.total_tokens, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather_predictors(hidden, batch), hidden[batch.predictors])
    assert torch.autograd.gradcheck(lambda h: gather_predictors(h, batch), hidden)


def test_sum_over_completions_has_a_fixed_order():
    """Resuming a run bit for bit needs the same sum every time, and on every number of threads."""
    upstream = torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None]
    in_order = torch.zeros(256)
    for row in upstream:
        in_order += row
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            hidden = torch.zeros(5, 256, requires_grad=True)
            (gradient,) = torch.autograd.grad(gather_predictors(hidden, LARGE_GROUP), hidden, upstream)
            assert torch.equal(gradient[4], in_order)
    finally:
        torch.set_num_threads(num_threads)


def test_bfloat16_gradients_are_summed_in_float32():
    """Summed in bf16, small gradients after a large one would be lost: 256 + 63 ones would stay 256."""
    hidden = torch.zeros(5, 8, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(64, 8, dtype=torch.bfloat16)
    upstream[0] = 256
    (gradient,) = torch.autograd.grad(gather_predictors(hidden, LARGE_GROUP), hidden, upstream)
    assert torch.equal(gradient[4], torch.full((8,), 319.0).bfloat16())
