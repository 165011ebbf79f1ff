"""Small random models of every family, and packs of token sequences, shared by this folder's tests."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.config import ModelConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {  # every family, tied and untied, with and without biases, and every kind of RoPE at least once
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "rope_parameters": LINEAR},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-3},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 8},
    "qwen2-yarn": {"model_type": "qwen2", "num_key_value_heads": 1, "rope_parameters": YARN},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3-bias": {"model_type": "qwen3", "attention_bias": True, "rope_parameters": {**YARN, "beta_fast": 16.0}},
}


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes) -> the ModelConfig of a small Qwen3."""
    return lambda **changes: ModelConfig.from_dict({"model_type": "qwen3", **SIZES, **changes})


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


@pytest.fixture
def reference():
    """make(name, **changes) -> a random transformers model of MODELS, no weight at its initial 0 or 1."""

    def make(name, **changes):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **MODELS[name], **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.float().eval()

    return make


@pytest.fixture
def pack():
    """make(segments, prefix=None) -> a PackedBatch of lists of tokens; its target space is empty."""

    def make(segments, prefix=None):
        prefix = prefix or [-1] * len(segments)
        starts = [0 if parent < 0 else len(segments[parent]) for parent in prefix]
        lengths = [len(segment) for segment in segments]
        empty = torch.empty(0, dtype=torch.int64)
        return PackedBatch(
            input_ids=torch.tensor([token for segment in segments for token in segment]),
            position_ids=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
            prefix=torch.tensor(prefix, dtype=torch.int32),
            max_seqlen=max(lengths),
            targets=empty,
            predictors=empty,
            target_cu_seqlens=torch.zeros(1, dtype=torch.int32),
            sequence_ids=empty,
            completions_per_prompt=empty,
        )

    return make
