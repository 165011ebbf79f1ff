"""Logits limited to what a truncated sampler kept: against float64 softmax over those columns alone."""

import dataclasses

import numpy as np
import pytest
import torch

from flashgrpo.grpo.learn.learner import packed_loss
from flashgrpo.grpo.learn.packing import Group, build_batch
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.kernels.grpo_loss import LossConfig, logits_grpo_loss
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs
from flashgrpo.kernels.logprob import gather_logprobs
from flashgrpo.model.batch import gather_predictors
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig

NUM_ROWS, HIDDEN, VOCAB = 7, 16, 310  # not a multiple of 16, and sets of more than are read at once
SIZES = 0, 1, 3, 300, VOCAB, 20
OFFSETS = torch.tensor([0, 3, 5, NUM_ROWS])


class Case:
    def __init__(self, device, dtype):
        generator = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / 2).to(device, dtype).requires_grad_()
        self.targets = torch.randint(0, VOCAB, (NUM_ROWS,), generator=generator).to(device)
        self.outside = torch.zeros(NUM_ROWS, VOCAB, dtype=torch.bool, device=device)
        sets, counts = [], []
        for row in range(NUM_ROWS):
            ids = torch.randperm(VOCAB, generator=generator)[: SIZES[row % len(SIZES)]]
            if len(ids):
                ids[-1] = self.targets[row]  # which may make it stand twice
                self.outside[row] = True
                self.outside[row, ids] = False
            sets.append(ids)
            counts.append(len(ids))
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        self.kept = torch.cat(sets).int().to(device), offsets.to(device)

    @property
    def leaves(self):
        return [self.hidden, self.weight]

    def exact_logits(self):
        """[NUM_ROWS, VOCAB] float64, -inf outside of the sets; a result of the leaves."""
        logits = self.hidden.double() @ self.weight.double().T
        return logits.masked_fill(self.outside, -torch.inf)


@pytest.fixture
def case(device, dtype):
    return Case(device, dtype)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_log_probs_entropies_and_gradients_are_of_the_kept_tokens(case, source, entropy, close):
    exact = torch.log_softmax(case.exact_logits() / 0.7, -1)
    wanted = [exact.gather(1, case.targets[:, None])[:, 0]]
    if entropy:
        wanted.append(-(exact.exp() * exact.clamp(min=-1e4)).sum(1))
    options = {"temperature": 0.7, "kept": case.kept, "entropy": entropy}
    if source == "hidden":
        found = linear_logprobs(case.hidden, case.weight, case.targets, chunk_tokens=3, **options)
    else:
        logits = (case.hidden @ case.weight.T).detach().requires_grad_()
        before = logits.detach().clone()
        found = gather_logprobs(logits, case.targets, inplace_backward=True, **options)
        (gradient,) = torch.autograd.grad(found[0].sum() + (found[1].sum() if entropy else 0), logits)
        assert (gradient[case.outside] == 0).all()
        assert (gradient[~case.outside] != 0).any()
        assert torch.equal(logits, before)
        found = gather_logprobs(case.hidden @ case.weight.T, case.targets, **options)
    scales = torch.linspace(-1, 1, NUM_ROWS, device=case.targets.device)
    sums = []
    for ours, theirs in zip(found, wanted, strict=False):
        close(ours, theirs)
        sums.append([(x * scales).sum() for x in (ours, theirs)])
    close(*(torch.autograd.grad(sum(parts), case.leaves) for parts in zip(*sums, strict=True)))


CONFIGS = {
    "dapo": LossConfig.preset("dapo", entropy_coef=0.1),
    "gspo": LossConfig.preset("gspo"),  # all log-probs first, and then the logits of live rows alone
    "forking": LossConfig(top_entropy=0.5, kl_coef=0.2),
}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dapo", "logits"),
        ("dapo", "hidden"),
        ("gspo", "hidden"),
        pytest.param("forking", "hidden", marks=pytest.mark.twin),
    ],
)
def test_losses_are_those_of_the_smaller_vocabulary(case, name, source, device, dtype, close):
    scores, _ = linear_logprobs(case.hidden, case.weight, case.targets, kept=case.kept)
    noise = 0.1 * torch.randn(NUM_ROWS, dtype=dtype).to(device)
    arguments = {
        "denominator": 3.0,
        "advantages": torch.tensor([0.7, 0.0, -0.7], dtype=dtype, device=device),
        "old_logprobs": scores.detach() + noise,
        "ref_logprobs": scores.detach() - noise,
    }
    offsets = OFFSETS.to(device)
    if source == "hidden":
        options = {"kept": case.kept, "chunk_tokens": 3, **arguments}
        loss, stats = linear_grpo_loss(*case.leaves, case.targets, offsets, CONFIGS[name], **options)
    else:
        logits = case.hidden @ case.weight.T
        loss, stats = logits_grpo_loss(
            logits, case.targets, offsets, CONFIGS[name], kept=case.kept, **arguments
        )  # fmt: skip
    arguments = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    exact, wanted = logits_grpo_loss(case.exact_logits(), case.targets, offsets, CONFIGS[name], **arguments)
    close(loss, exact)
    for key in ("logprobs", "entropies", "ratio_max", "live_fraction"):
        close(stats[key], wanted[key], key)
    close(torch.autograd.grad(loss, case.leaves), torch.autograd.grad(exact, case.leaves))


def test_a_token_outside_of_its_set_is_no_number_and_an_ignored_one_is_0(case):
    targets = case.targets.clone()
    targets[1] = (targets[1] + 1) % VOCAB  # of a set of one
    targets[2] = -100
    logprobs, _ = linear_logprobs(case.hidden, case.weight, targets, kept=case.kept)
    assert logprobs.isnan().nonzero().tolist() == [[1]]
    assert logprobs[2] == 0


def test_sets_of_no_rows(case):
    kept = case.kept[0][:0], case.kept[1][:1]
    logprobs, _ = linear_logprobs(case.hidden[:0], case.weight, case.targets[:0], kept=kept)
    assert logprobs.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ids, offsets: (ids + 1, offsets), ValueError, "wanted ids of this vocabulary, 0 to 309"),
        (lambda ids, offsets: (ids, offsets[1:]), ValueError, r"kept offsets has shape \(7,\); wanted \[8\]"),
        (lambda ids, offsets: (ids[1:], offsets), ValueError, "wanted them to rise from 0 to"),
        (lambda ids, offsets: (ids, offsets.flip(0)), ValueError, "wanted them to rise from 0 to"),
        (lambda ids, offsets: (ids.float(), offsets), TypeError, "kept ids is torch.float32; wanted int32 or int64"),
        (lambda ids, offsets: (), TypeError, r"kept is \(\); wanted None, or a pair of tensors \(ids, offs"),
        (lambda ids, offsets: (ids, 8), TypeError, r"kept is \(Tensor, int\); wanted None, or a pair"),
        (lambda ids, offsets: offsets.repeat(2, 1), TypeError, r"kept is \(Tensor\); wanted None, or a pair"),
    ],
)
@pytest.mark.twin
def test_sets_that_do_not_fit_are_refused(case, change, error, message):
    """On a CPU; on a GPU what the tensors hold is not looked at, and ids beyond the vocabulary are passed over."""
    kept = change(*case.kept)
    with pytest.raises(error, match=message):
        linear_logprobs(case.hidden, case.weight, case.targets, kept=kept)
    with pytest.raises(error, match=message):
        gather_logprobs(case.hidden @ case.weight.T, case.targets, kept=kept)
    ends = torch.tensor([0, len(case.targets)], dtype=torch.int32)
    options = {"denominator": 1.0, "advantages": torch.ones(1), "kept": kept}
    with pytest.raises(error, match=message):
        linear_grpo_loss(case.hidden, case.weight, case.targets, ends, LossConfig(), **options)
    with pytest.raises(error, match=message):
        logits_grpo_loss(case.hidden @ case.weight.T, case.targets, ends, LossConfig(), **options)


@pytest.mark.twin
def test_compiles_without_a_graph_break(case):

    def summed(hidden, weight):
        of_logits, _ = gather_logprobs(hidden @ weight.T, case.targets, kept=case.kept)
        return of_logits.sum() + linear_logprobs(hidden, weight, case.targets, kept=case.kept)[0].sum()

    compiled = torch.compile(summed, fullgraph=True, backend="aot_eager")
    found, wanted = (f(*case.leaves) for f in (compiled, summed))
    assert torch.equal(found, wanted)
    for pair in zip(*(torch.autograd.grad(x, case.leaves) for x in (found, wanted)), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize(
    "truncation",
    [{"top_p": 0.95}, {"top_k": 20}, pytest.param({"top_p": 0.95, "kept_limit": 8}, marks=pytest.mark.twin)],
    ids=str,
)
def test_a_step_by_the_weights_that_sampled_has_ratios_of_exactly_1(truncation, device):
    """Old and new log-probs are over what the sampler kept, as the sampler's own; also where a set is above the limit,
    and both sides are of the whole vocabulary.
    """
    config = {
        "model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.4,
    }  # fmt: skip
    model = init_decoder(ModelConfig.from_dict(config), seed=0).to(device)
    seeds = np.arange(2, dtype=np.uint64)
    requests = [Request(0, [5, 6], seeds)]
    sampling = Sampling(**{"max_new_tokens": 4, "temperature": 0.8, "kept_limit": 512} | truncation)
    rollouts = [*NativeGenerator(model, [0]).generate(requests, sampling)]
    batch = build_batch([Group.of(group) for group in rollouts]).to(device)
    assert batch.kept is not None
    counts = batch.kept[1].diff()
    assert 1 < counts.max() < 61
    assert (counts == 0).any() == (sampling.kept_limit == 8)

    with torch.no_grad():
        hidden = gather_predictors(model(batch), batch)
        options = {"temperature": 0.8, "kept": batch.kept}
        old, _ = linear_logprobs(hidden, model.lm_head_weight, batch.targets, **options)
    advantages = torch.tensor([1.0, -1.0], device=device)
    loss = {"denominator": 6.0, "advantages": advantages, "temperature": 0.8}
    _, stats = packed_loss(model, dataclasses.replace(batch, old_logprobs=old), LossConfig.preset("dapo"), **loss)
    assert torch.equal(stats["logprobs"], old)
    assert stats["ratio_max"] == stats["ratio_mean"] == 1
    assert stats["behavior_mismatch_max"] < 1e-4
