"""Products through oneDNN must be what torch's own are, forward and backward, and be used where they are faster."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.cpu import Linear, PackedWeights, padded_rows, product
from flashgrpo.model.decoder import Decoder

ONEDNN = torch.ops.mkldnn._linear_pointwise.default
IDS = torch.arange(300) % 61


class CountCalls(TorchDispatchMode):
    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


def test_what_is_not_a_plain_fp32_product_is_left_to_torch():
    layer = Linear(128, 96)
    with CountCalls(ONEDNN) as counter:
        for dtype in (torch.float64, torch.bfloat16):
            x, weight = torch.randn(300, 128, dtype=dtype), torch.randn(96, 128, dtype=dtype)
            torch.testing.assert_close(product(x, weight), x @ weight.T)
        cube = torch.randn(200, 3, 128, requires_grad=True)
        layer(cube).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(300, 128)).dtype == torch.bfloat16
    assert cube.grad is not None
    assert counter.calls == 0


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def wide(request, tiny):
    """A decoder whose products are large enough for oneDNN, with and without biases."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    decoder = init_decoder(tiny(**sizes, model_type=request.param), seed=0)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return decoder


def only_values(_index, q, _k, v):
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def test_a_decoder_on_a_cpu_computes_what_torchs_own_modules_do(wide):
    """Hidden states and gradients, with rows that are padding: they must change no token."""
    prompt, completions = list(range(50)), [[i % 61 for i in range(n)] for n in (80, 40, 97)]
    batch = build_batch([Group(prompt, [Completion(np.array(ids), i) for i, ids in enumerate(completions)])])
    assert wide.padded_tokens(batch.total_tokens) > batch.total_tokens
    plain = Decoder(wide.config)
    plain.load_state_dict(wide.state_dict())
    upstream = torch.randn(batch.total_tokens, wide.config.hidden_size)
    with CountCalls(ONEDNN) as counter:
        found = wide(batch)
        gradients = torch.autograd.grad(found, [*wide.parameters()], upstream, allow_unused=True)
    assert counter.calls > 3 * 4 * wide.config.num_layers - 4
    hidden = plain(batch)
    torch.testing.assert_close(found, hidden, atol=1e-4, rtol=0)
    wanted = torch.autograd.grad(hidden, [*plain.parameters()], upstream, allow_unused=True)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-2, rtol=1e-4)


def test_gradients_do_not_change_the_forward_pass(wide):
    """Old log-probs are computed without gradients; at equal weights they must equal the new ones exactly."""
    with torch.no_grad():
        without = wide.run(IDS, IDS, only_values)
    assert torch.equal(wide.run(IDS, IDS, only_values), without)


def test_selective_checkpointing_keeps_the_products(wide, monkeypatch):
    def calls(mode):
        monkeypatch.setattr(wide, "activation_checkpointing", mode)
        with CountCalls(ONEDNN) as counter:
            wide.run(IDS, IDS, only_values).sum().backward()
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
