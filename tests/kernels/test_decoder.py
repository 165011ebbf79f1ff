"""A decoder whose blocks go through every kernel computes what the modules for a CPU do, however it is checkpointed."""

import pytest
import torch

from flashgrpo.kernels import attention_plan
from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import Decoder

pytestmark = pytest.mark.kernels

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(params=["qwen3", "qwen2"])
def models(request, device):
    """One of the family on its kernels, and one with equal weights on a CPU; no norm's weight is 1."""
    config = ModelConfig.from_dict({"model_type": request.param, **SIZES})
    on_cpu = init_decoder(config, seed=0)
    with torch.no_grad():
        for parameter in on_cpu.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    on_cpu.attention_backend = "torch"
    model = Decoder(config)
    model.load_state_dict(on_cpu.state_dict())
    return model.to(device), on_cpu


def make_batch(device, lengths=(13, 5, 9)):
    """A prompt and completions of it."""
    starts = [0] + [lengths[0]] * (len(lengths) - 1)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedBatch(
        input_ids=torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(0)).to(device),
        position_ids=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).to(device),
        cu_seqlens=offsets.to(device),
        prefix=torch.tensor([-1] + [0] * (len(lengths) - 1), device=device),
        max_seqlen=max(lengths),
        targets=empty,
        predictors=empty,
        target_cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device),
        sequence_ids=empty,
        completions_per_prompt=empty,
    )


def run(model, device):
    """Hidden states, and the gradient of every parameter."""
    model.zero_grad()
    hidden = model(make_batch(device))
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(device)).sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_kernels_compute_what_a_cpu_does_in_every_mode(models, device, close, monkeypatch):
    """By tables of attention that are made once a pass."""
    make_tables, made = attention_plan.attention_tiles, []
    monkeypatch.setattr(attention_plan, "attention_tiles", lambda *x: made.append(0) or make_tables(*x))
    model, on_cpu = models
    plain = run(model, device)
    close([x.cpu() for x in plain], run(on_cpu, torch.device("cpu")))
    with torch.no_grad():  # where RoPE overwrites the product of models with QK norm, too
        assert torch.equal(model(make_batch(device)), plain[0])
    for mode in ("selective", "full"):
        model.activation_checkpointing = mode
        assert all(map(torch.equal, run(model, device), plain)), mode
    assert len(made) == 4, "passes"


@pytest.mark.parametrize(("models", "mode"), [("qwen3", "none"), ("qwen2", "selective")], indirect=["models"])
def test_compiled_blocks_go_through_the_kernels_too(mode, models, device, close):
    model, _ = models
    wanted = run(model, device)
    torch.compiler.reset()
    model.activation_checkpointing = mode
    model.compile_blocks("aot_eager")
    close(run(model, device), wanted)
