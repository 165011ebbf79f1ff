"""The gather before the LM head decides which hidden states learn, and from which completions."""

import pytest
import torch

from flashgrpo.model.batch import PackedBatch, gather_predictors

# prompts of 3 and 2 tokens; completions of 2, 3 and 1 tokens behind the first, of 2 behind the second
PREDICTORS = [2, 3, 2, 4, 5, 2, 7, 8]
TARGET_CU_SEQLENS = [0, 2, 5, 6, 8]
COMPLETIONS_PER_PROMPT = [3, 1]
NUM_TOKENS = 9


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


@pytest.fixture
def batch():
    return make_batch(PREDICTORS, TARGET_CU_SEQLENS, COMPLETIONS_PER_PROMPT, NUM_TOKENS)


@pytest.fixture
def large_group():
    """One prompt with 64 completions of one token: every gradient meets in the prompt's last row."""
    return make_batch([4] * 64, list(range(65)), [64], 5)


def test_each_target_gets_the_hidden_state_before_it(batch):
    hidden = torch.randn(NUM_TOKENS, 4)
    assert torch.equal(gather_predictors(hidden, batch), hidden[PREDICTORS])


def test_gradient(batch):
    hidden = torch.randn(NUM_TOKENS, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: gather_predictors(h, batch), hidden)


def test_rows_without_targets_learn_nothing(batch):
    hidden = torch.randn(NUM_TOKENS, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(gather_predictors(hidden, batch).sum(), hidden)
    assert gradient[:, 0].tolist() == [0, 0, 3, 1, 1, 1, 0, 1, 1]


def test_a_prompt_without_completions_leaves_its_neighbours_alone():
    hidden = torch.randn(4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        gather_predictors(hidden, make_batch([1, 3], [0, 1, 2], [1, 0, 1], 4)).sum(), hidden
    )
    assert gradient[:, 0].tolist() == [0, 1, 0, 1]


def test_no_targets_give_a_zero_gradient():
    """A rank without live work still runs forward and backward."""
    hidden = torch.randn(3, 4, requires_grad=True)
    gathered = gather_predictors(hidden, make_batch([], [0], [], 3))
    assert gathered.shape == (0, 4)
    assert not torch.autograd.grad(gathered.sum(), hidden)[0].any()


def test_sum_over_completions_has_a_fixed_order(large_group):
    """Resuming a run bit for bit needs the same sum every time, and on every number of threads."""
    upstream = torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None]

    def gradient():
        hidden = torch.zeros(5, 256, requires_grad=True)
        return torch.autograd.grad(gather_predictors(hidden, large_group), hidden, upstream)[0]

    first = gradient()
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if num_threads == 1 else 1)
        assert torch.equal(gradient(), first)
    finally:
        torch.set_num_threads(num_threads)
    in_order = torch.zeros(256)
    for row in upstream:
        in_order += row
    assert torch.equal(first[4], in_order)


def test_bfloat16_gradients_are_summed_in_float32(large_group):
    """Summed in bf16, small gradients after a large one would be lost: 256 + 63 ones would stay 256."""
    hidden = torch.zeros(5, 8, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(64, 8, dtype=torch.bfloat16)
    upstream[0] = 256
    (gradient,) = torch.autograd.grad(gather_predictors(hidden, large_group), hidden, upstream)
    assert torch.equal(gradient[4], torch.full((8,), 319.0).bfloat16())
