"""Products through oneDNN must be what torch's own are, forward and backward, and be used where they are faster."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.kernels.attention import packed_attention
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cpu import Linear, PackedWeights, padded_rows, product, weight_gradient

ONEDNN = torch.ops.mkldnn._linear_pointwise.default


class CountCalls(TorchDispatchMode):
    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n", "in_features", "out_features"), [(257, 96, 160), (301, 160, 96), (7, 40, 24), (0, 40, 24)]
)
def test_linear_equals_torch(n, in_features, out_features, bias):
    layer = Linear(in_features, out_features, bias=bias)
    x = torch.randn(n, in_features, requires_grad=True)
    upstream = torch.randn(n, out_features)
    with CountCalls(ONEDNN) as counter:
        out = layer(x)
        out.backward(upstream)
    assert counter.calls == (3 if n > 200 else 0)

    leaves = [x.detach().double().requires_grad_(), *(p.detach().double().requires_grad_() for p in layer.parameters())]
    wanted = F.linear(*leaves)
    wanted.backward(upstream.double())
    torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=0)
    for ours, leaf in zip([x, *layer.parameters()], leaves, strict=True):
        assert ours.grad is not None
        assert leaf.grad is not None
        torch.testing.assert_close(ours.grad.double(), leaf.grad, atol=1e-4, rtol=0)


def test_what_needs_no_gradient_gets_none():
    layer = Linear(160, 96)
    layer.weight.requires_grad_(False)
    x = torch.randn(300, 160)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_torchs_product(dtype):
    x, weight = torch.randn(300, 128, dtype=dtype), torch.randn(96, 128, dtype=dtype)
    d_out = torch.randn(300, 96, dtype=dtype)
    with CountCalls(ONEDNN) as counter:
        out, d_weight = product(x, weight), weight_gradient(d_out, x)
    assert counter.calls == 0
    torch.testing.assert_close(out, x @ weight.T)
    torch.testing.assert_close(d_weight, d_out.T @ x)


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def wide(request):
    """A decoder whose products are large enough for oneDNN, with and without biases."""
    config = {
        "model_type": request.param, "vocab_size": 61, "hidden_size": 128, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    decoder = init_decoder(ModelConfig.from_dict(config), seed=0)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return decoder


def only_values(_index, q, _k, v):
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def test_gradients_do_not_change_the_forward_pass(wide):
    """Old log-probs are computed without gradients; at equal weights they must equal the new ones exactly."""
    ids = torch.arange(300) % 61
    with torch.no_grad():
        without = wide.run(ids, ids, only_values)
    assert torch.equal(wide.run(ids, ids, only_values), without)


def test_selective_checkpointing_keeps_the_products(wide, monkeypatch):
    def calls(mode):
        monkeypatch.setattr(wide, "activation_checkpointing", mode)
        with CountCalls(ONEDNN) as counter:
            ids = torch.arange(300) % 61
            wide.run(ids, ids, only_values).sum().backward()
        return counter.calls

    assert calls("none") == calls("selective") < calls("full")


def test_packed_weights_are_read_inside_only(wide):
    x, weight = torch.randn(300, 128), wide.model.layers[0].mlp.gate_up_proj.weight
    packed = PackedWeights(wide, 300)
    wanted = product(x, weight)
    with torch.no_grad():
        weight.add_(1)
        changed = product(x, weight)
        with packed:
            torch.testing.assert_close(product(x, weight), wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(product(x, weight), changed)
        weight.sub_(1)


def test_rows_take_few_numbers():
    """oneDNN keeps memory for every shape it has met, and packs have any number of tokens."""
    weight = torch.empty(768, 256)
    padded = {n: padded_rows(n, weight) for n in range(20000)}
    assert all(n <= rows <= max(n * 17 / 16 + 1, n + 63) for n, rows in padded.items())
    assert len({rows for n, rows in padded.items() if n >= 64}) < 140
    assert padded_rows(301, weight.double()) == 301


def test_padding_changes_no_token(wide):
    prompt, completions = list(range(50)), [[i % 61 for i in range(n)] for n in (80, 40, 97)]
    batch = build_batch([Group(prompt, [Completion(np.array(ids), i) for i, ids in enumerate(completions)])])
    assert wide.padded_tokens(batch.total_tokens) > batch.total_tokens
    hidden = wide(batch)
    attend = functools.partial(attention_of, batch)
    torch.testing.assert_close(hidden, wide.run(batch.input_ids, batch.position_ids, attend), atol=1e-5, rtol=0)
    assert len(hidden) == batch.total_tokens


def attention_of(batch, _index, q, k, v):
    return packed_attention(q, k, v, batch.cu_seqlens, batch.prefix)


def test_what_is_not_a_plain_product_is_left_to_torch():
    layer = Linear(128, 96)
    cube = torch.randn(200, 3, 128, requires_grad=True)
    layer(cube).sum().backward()
    assert cube.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(300, 128)).dtype == torch.bfloat16
