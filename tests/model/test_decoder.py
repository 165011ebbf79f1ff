"""A trained checkpoint must compute what transformers computes, in every family, forward and backward."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.kernels.linear_grpo import linear_grpo_loss
from flashgrpo.model.batch import gather_predictors
from flashgrpo.model.checkpoint import init_decoder, load_checkpoint, save_checkpoint
from flashgrpo.model.cpu import CPUMLP, CPURMSNorm
from flashgrpo.model.decoder import MLP, huggingface_views


@pytest.fixture
def decoder(tiny):
    return init_decoder(tiny(), seed=0)


def tokens(count, seed=0):
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def gradients(decoder, hidden):
    decoder.zero_grad()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    (hidden * weights).sum().backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}


def linear_flops(decoder, batch):
    with FlopCounterMode(display=False) as counter:
        gradients(decoder, decoder(batch))
    counts = counter.get_flop_counts()["Global"]
    return counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0)


def test_transformers_computes_the_same_before_and_after_training(model_name, reference, pack, tmp_path):
    """Logits and gradients of a model that it saved, then logits of what we save, in shards: names, ties, config."""
    theirs = reference(model_name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs")
    sequences = [tokens(n, seed=n) for n in (40, 1, 9)]
    wanted = torch.cat([theirs(torch.tensor([sequence])).logits[0] for sequence in sequences])
    logits = ours(pack(sequences)) @ ours.lm_head_weight.T
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)

    upstream = torch.randn(wanted.shape)
    (wanted * upstream).sum().backward()
    (logits * upstream).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = huggingface_views({name: parameter.grad for name, parameter in ours.named_parameters()}, ours.config)
    assert gradients.keys() == found.keys()
    for name, gradient in found.items():
        error = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-3, f"{name}: gradient off by {error:.2e}"

    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
        save_checkpoint(ours, tmp_path / "ours", max_shard_bytes=10_000 if "tied" in model_name else 5_000_000_000)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        logits = ours(pack([sequences[0]])) @ ours.lm_head_weight.T
        torch.testing.assert_close(logits, theirs(torch.tensor([sequences[0]])).logits[0], atol=1e-4, rtol=0)
    for name, tensor in load_checkpoint(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_shared_prompt_trains_what_repeated_prompts_train(decoder):
    """From rollouts to the gradient of every parameter, through the packer, the LM head and the loss."""
    decoder = decoder.double()
    prompts, lengths = [tokens(7, seed=1), tokens(3, seed=2)], [[4, 6, 1], [5, 2]]
    config = LossConfig.preset("grpo", kl_coef=0)
    advantages = torch.tensor([1.0, -0.5, 0.3, -1.2, 0.7], dtype=torch.float64)

    def train(groups):
        batch = build_batch(groups)
        loss, _ = linear_grpo_loss(
            gather_predictors(decoder(batch), batch), decoder.lm_head_weight, batch.targets, batch.target_cu_seqlens,
            config, denominator=5, advantages=advantages,
        )  # fmt: skip
        decoder.zero_grad()
        loss.backward()
        return loss.detach(), {name: parameter.grad for name, parameter in decoder.named_parameters()}

    groups = [
        Group(prompt, [Completion(np.array(tokens(n, seed=9 + n)), sequence_id=0) for n in of_prompt])
        for prompt, of_prompt in zip(prompts, lengths, strict=True)
    ]
    loss, shared = train(groups)
    wanted_loss, repeated = train([Group(group.prompt_ids, [one]) for group in groups for one in group.completions])
    torch.testing.assert_close(loss, wanted_loss, atol=1e-10, rtol=0)
    for name, gradient in shared.items():
        torch.testing.assert_close(gradient, repeated[name], atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_cost_and_nothing_else(mode, decoder, pack):
    """Gradients stay equal to the last bit; "full" computes every product again, "selective" none of them."""
    batch = pack([tokens(20), tokens(13)])
    wanted = gradients(decoder, decoder(batch))
    plain_flops = linear_flops(decoder, batch)
    decoder.activation_checkpointing = mode
    for name, gradient in gradients(decoder, decoder(batch)).items():
        assert torch.equal(gradient, wanted[name]), name
    matrices = [parameter for parameter in decoder.model.layers.parameters() if parameter.dim() == 2]
    extra = 2 * 33 * sum(matrix.numel() for matrix in matrices) if mode == "full" else 0
    assert linear_flops(decoder, batch) == plain_flops + extra
    decoder.activation_checkpointing = "ful"
    with pytest.raises(ValueError, match="wanted none, selective or full"):
        decoder(batch)


def test_activation_checkpointing_saves_memory(tiny, pack):
    decoder = init_decoder(tiny(num_hidden_layers=3), seed=0)
    batch = pack([tokens(200), tokens(130)])
    held = {}
    for mode in ("none", "selective", "full"):
        decoder.activation_checkpointing = mode
        with MemTracker() as tracker:
            hidden = decoder(batch)
            held[mode] = tracker.get_tracker_snapshot()[torch.device("cpu")]["Total"]
        assert hidden.requires_grad
    assert held["full"] < 0.7 * held["selective"] < 0.6 * held["none"]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_equal_eager_ones(mode, tiny, pack):
    """Nothing is compiled again in later steps, whose lengths all differ, or by a generator that shares the blocks."""
    decoder = init_decoder(tiny(num_hidden_layers=1), seed=0)
    decoder.activation_checkpointing = mode
    batches = [pack([tokens(n), tokens(m)]) for n, m in ((20, 13), (31, 9), (5, 50), (6, 7))]
    wanted = [gradients(decoder, decoder(batch)) for batch in batches]
    names = list(decoder.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    decoder.compile_blocks(counter)
    compiled = []
    for batch, expected in zip(batches, wanted, strict=True):
        for name, gradient in gradients(decoder, decoder(batch)).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)
        for scale in (1, 2):
            decoder.run(batch.input_ids, batch.position_ids, lambda _index, q, k, v, scale=scale: q * scale)
        compiled.append(counter.frame_count)
    assert compiled[1] == compiled[-1]
    assert (compiled[-1] > 0) == (mode == "none")  # no graph can break in a checkpoint, as the twin's attention does
    assert list(decoder.state_dict()) == names


@pytest.mark.parametrize(
    ("module", "shape"),
    [(CPURMSNorm(6, 1e-6), (3, 6)), (CPURMSNorm(6, 1e-6), (2, 3, 6)), (MLP, (3, 32)), (CPUMLP, (3, 32))],
)
def test_hand_written_gradients(module, shape, tiny):
    """The norm and the MLP have backward passes of their own, checked against differences in float64. They compile
    whole: a break in the graph would leave the blocks to eager mode where they are checkpointed.
    """
    module = module(tiny()) if isinstance(module, type) else module
    names = [name for name, _ in module.named_parameters()]
    weights = [torch.randn_like(p, dtype=torch.float64, requires_grad=True) for p in module.parameters()]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *weights):
        out = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))
        return out[0] if isinstance(out, tuple) else out  # a norm returns the residual stream, too

    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(call(x, *weights).sum(), x, create_graph=True)
    if len(shape) == 2:
        weights, x = [*module.parameters()], x.detach().float().requires_grad_()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        wanted = torch.autograd.grad(call(x, *weights).sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x, *weights).sum(), x)[0], wanted)


def test_bfloat16_stays_close_to_float32(decoder, tiny, pack):
    """On an accelerator the decoder runs in bf16; its one rounding error a layer must not grow into another model."""
    hidden = init_decoder(tiny(), seed=0, dtype=torch.bfloat16)(pack([tokens(30)]))
    assert hidden.dtype == torch.bfloat16
    wanted = decoder(pack([tokens(30)]))
    assert (hidden - wanted).norm() / wanted.norm() < 0.02


def test_trains_after_sampling(tiny, pack):
    """The first use of a model is often in inference mode; nothing cached there may reach the training graph."""
    decoder = init_decoder(tiny(rope_theta=12_345.0), seed=0)
    with torch.inference_mode():
        decoder(pack([tokens(5)]))
    assert all(gradient.isfinite().all() for gradient in gradients(decoder, decoder(pack([tokens(5)]))).values())
