"""Positions must turn by the angles a checkpoint was trained with, over its whole context and for every scaling."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from flashgrpo.kernels.elementwise_torch import apply_rope
from flashgrpo.model.rope import rotary_cos_sin

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3-wide": {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 16.0},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": True},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.8},
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    "yarn-nulls": {**YARN, "mscale": None, "attention_factor": None},
    "yarn-own-context": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
}
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 64, "max_position_embeddings": 32_768}
POSITIONS = torch.tensor([0, 1, 2, 31, 1000, 8191, 8192, 30_000])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("written_by", ["transformers 5", "older"])
def test_angles_equal_transformers(scaling, written_by, tiny):
    parameters = dict(SCALINGS[scaling])
    theirs = Qwen3Config.from_dict({**SIZES, "num_attention_heads": 4, "rope_parameters": dict(parameters)})
    written = {"rope_parameters": parameters}
    if written_by == "older":
        theta, kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
        written = {"rope_theta": theta, "rope_scaling": {**parameters, "type": kind} if parameters else None}
    cos, sin = Qwen3RotaryEmbedding(theirs)(torch.zeros(1), POSITIONS[None])
    q = torch.randn(len(POSITIONS), 4, 64)
    wanted, _ = apply_rotary_pos_emb(q, q, cos[0], sin[0])
    rotated = apply_rope(q, *rotary_cos_sin(tiny(**SIZES, **written).rope, POSITIONS))
    torch.testing.assert_close(rotated, wanted, atol=2e-6, rtol=0)


def test_gradient_is_the_inverse_rotation(tiny):
    cos, sin = rotary_cos_sin(tiny(**SIZES).rope, POSITIONS)
    x = torch.randn(len(POSITIONS), 2, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply_rope(x, cos, sin).square().sum() / 2, x)
    torch.testing.assert_close(gradient, x.detach())


def test_bfloat16_is_rounded_once(tiny):
    """cos and sin stay fp32: rounded to bf16 they would turn every key and query by the wrong angle."""
    cos, sin = rotary_cos_sin(tiny(**SIZES).rope, POSITIONS)
    x = torch.randn(len(POSITIONS), 2, 64).bfloat16()
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())
