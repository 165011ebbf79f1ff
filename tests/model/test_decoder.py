"""A trained checkpoint must compute what transformers computes, in every family, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from flashgrpo.model.checkpoint import init_decoder, load_checkpoint
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import MLP, RMSNorm

TINY = {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tokens(count, vocab_size=61, seed=0):
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def dense_attend(lengths):
    """Causal attention within segments of these lengths, by one dense mask."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sees = (segment[:, None] == segment) & torch.ones(len(segment), len(segment)).tril().bool()

    def attend(_index, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)[0].transpose(0, 1)

    return attend


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


def test_logits_and_gradients_equal_transformers(model_name, reference, pack, tmp_path):
    theirs = reference(model_name)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    sequences = [tokens(n, theirs.config.vocab_size, seed=n) for n in (40, 1, 9)]
    wanted = torch.cat([theirs(torch.tensor([sequence])).logits[0] for sequence in sequences])
    logits = ours(pack(sequences)) @ ours.lm_head_weight.T
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)

    upstream = torch.randn(wanted.shape)
    (wanted * upstream).sum().backward()
    (logits * upstream).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-3, f"{name}: gradient off by {error:.2e}"


def test_shared_prompt_equals_repeated_prompts(pack):
    """Packing completions behind one prompt must train exactly what repeating the prompt trains."""
    decoder = init_decoder(ModelConfig.from_dict(TINY), seed=0).double()
    prompts = [tokens(7, seed=1), tokens(3, seed=2)]
    completions = [[tokens(4, seed=3), tokens(6, seed=4)], [tokens(5, seed=5)]]
    shared = decoder(pack([prompts[0], *completions[0], prompts[1], *completions[1]], [-1, 0, 0, -1, 3]))
    repeated = decoder(pack([p + c for p, of_prompt in zip(prompts, completions, strict=True) for c in of_prompt]))
    # rows of the completions alone: both layouts have each of them once
    in_shared = torch.tensor([*range(7, 17), *range(20, 25)])
    in_repeated = torch.tensor([*range(7, 11), *range(18, 24), *range(27, 32)])
    torch.testing.assert_close(shared[in_shared], repeated[in_repeated], atol=1e-12, rtol=1e-10)
    wanted = gradients(decoder, repeated[in_repeated])
    for name, gradient in gradients(decoder, shared[in_shared]).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_cost_and_nothing_else(mode, pack):
    """Gradients stay equal to the last bit; "full" computes every product again, "selective" none of them."""
    decoder = init_decoder(ModelConfig.from_dict(TINY), seed=0)
    batch = pack([tokens(20), tokens(13)])
    wanted = gradients(decoder, decoder(batch))
    plain_flops = linear_flops(decoder, batch)
    decoder.activation_checkpointing = mode
    for name, gradient in gradients(decoder, decoder(batch)).items():
        assert torch.equal(gradient, wanted[name]), name
    matrices = [parameter for parameter in decoder.model.layers.parameters() if parameter.dim() == 2]
    extra = 2 * 33 * sum(matrix.numel() for matrix in matrices) if mode == "full" else 0
    assert linear_flops(decoder, batch) == plain_flops + extra


@pytest.mark.parametrize("mode", ["some"])
def test_unknown_activation_checkpointing_is_refused(mode, pack):
    decoder = init_decoder(ModelConfig.from_dict(TINY), seed=0)
    decoder.activation_checkpointing = mode
    with pytest.raises(ValueError, match="'some'; wanted one of none, selective, full"):
        decoder(pack([tokens(3)]))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_blocks_equal_eager_ones(mode):
    """One graph serves every layer and every length: a trainer's lengths change in every step."""
    decoder = init_decoder(ModelConfig.from_dict(TINY), seed=0)
    decoder.activation_checkpointing = mode
    batches = [(20, 13), (31, 9), (5, 50)]
    inputs = [torch.tensor(tokens(sum(lengths))) for lengths in batches]
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in batches]

    def step(index):
        return gradients(decoder, decoder.run(inputs[index], positions[index], dense_attend(batches[index])))

    wanted = [step(index) for index in range(3)]
    names = list(decoder.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    decoder.compile_blocks(counter)
    for index in range(3):
        for name, gradient in step(index).items():
            torch.testing.assert_close(gradient, wanted[index][name], atol=1e-5, rtol=1e-4, msg=name)
    assert counter.frame_count == 1
    assert list(decoder.state_dict()) == names


@pytest.mark.parametrize(
    ("module", "shape"), [(RMSNorm(6, 1e-6), (3, 6)), (RMSNorm(6, 1e-6), (2, 3, 6)), ("mlp", (3, 32))]
)
def test_hand_written_gradients(module, shape):
    """The norm and the MLP have backward passes of their own, checked against differences in float64."""
    module = MLP(ModelConfig.from_dict(TINY)) if module == "mlp" else module
    names = [name for name, _ in module.named_parameters()]
    weights = [torch.randn_like(p, dtype=torch.float64, requires_grad=True) for p in module.parameters()]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)


def test_bfloat16_stays_close_to_float32(pack):
    """On an accelerator the decoder runs in bf16; its one rounding error a layer must not grow into another model."""
    exact = init_decoder(ModelConfig.from_dict(TINY), seed=0)
    rounded = init_decoder(ModelConfig.from_dict(TINY), seed=0, dtype=torch.bfloat16)
    batch = pack([tokens(30)])
    hidden = rounded(batch)
    assert hidden.dtype == torch.bfloat16
    wanted = exact(batch)
    assert (hidden - wanted).norm() / wanted.norm() < 0.02


def test_trains_after_sampling(pack):
    """The first use of a model is often in inference mode; nothing cached there may reach the training graph."""
    decoder = init_decoder(ModelConfig.from_dict({**TINY, "rope_theta": 12_345.0}), seed=0)
    with torch.inference_mode():
        decoder(pack([tokens(5)]))
    assert all(gradient.isfinite().all() for gradient in gradients(decoder, decoder(pack([tokens(5)]))).values())
