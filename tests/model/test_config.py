"""A checkpoint this package would compute wrongly must be refused by a message that says what was found."""

import json

import pytest

from flashgrpo.model.config import CheckpointError, ModelConfig

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BAD = {
    "family": ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported families are llama, qwen2, qwen3"),
    "no family": ({"model_type": None}, "model_type is None"),
    "missing size": ({"hidden_size": None}, "hidden_size is None; a positive integer is wanted"),
    "size is text": ({"vocab_size": "61"}, "vocab_size is '61'"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads is 4, which num_key_value_heads, 3, does not divide"),
    "odd head": ({"head_dim": 7}, "head_dim is 7"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is true"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is set"),
    "window": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "sliding window"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding window"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "scaling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'; supported are"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing; a positive number is wanted"),
    "zero factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; a positive number is wanted"),
    "scaling is text": ({"rope_scaling": "yarn"}, "RoPE parameters are 'yarn'"),
    "theta is text": ({"rope_theta": "1e4"}, "rope_theta is '1e4'; a positive number is wanted"),
    "epsilon is a list": ({"rms_norm_eps": [1e-6]}, "rms_norm_eps is [1e-06]; a positive number is wanted"),
    "infinite range": ({"initializer_range": float("inf")}, "initializer_range is inf"),
    "half a head": ({"head_dim": 8.5}, "head_dim is 8.5; a positive integer is wanted"),
    "nested": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "have full_attention = {'rope_theta'"),
    "unknown": ({"rope_scaling": YARN | {"mrope_section": [2, 3]}}, "mrope_section = [2, 3], which is not supported"),
    "both": ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6, "rotary_dim": 8}}, "have rotary_dim = 8"),
    "no type": ({"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}}, "have factor, and no rope_type"),
    "linear attention": (
        {"layer_types": ["full_attention", "linear_attention"]},
        "layer_types have 'linear_attention'",
    ),
    "yarn truncate": ({"rope_scaling": YARN | {"truncate": False}}, "YaRN's truncate is False"),
    "yarn mscale": ({"rope_scaling": YARN | {"mscale": 0.7}}, "YaRN's mscale is 0.7"),
}


@pytest.mark.parametrize("case", BAD)
def test_unsupported_models_are_refused(case):
    change, message = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(QWEN3 | change)
    assert message in str(caught.value)


def test_missing_key_is_named():
    with pytest.raises(CheckpointError, match="intermediate_size is missing"):
        ModelConfig.from_dict({key: value for key, value in QWEN3.items() if key != "intermediate_size"})


def test_sliding_window_that_no_layer_uses_is_accepted():
    """Every Qwen2 checkpoint carries the key; most never use it."""
    unused = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1}
    beyond = {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 3}
    for keys in (unused, beyond):
        assert ModelConfig.from_dict(QWEN3 | {"model_type": "qwen2"} | keys).qkv_bias


def test_defaults_are_those_of_the_family():
    qwen3, llama = (ModelConfig.from_dict(QWEN3 | {"model_type": family}) for family in ("qwen3", "llama"))
    assert (qwen3.head_dim, llama.head_dim) == (128, 8)
    assert ModelConfig.from_dict(QWEN3 | {"model_type": "llama", "num_key_value_heads": None}).num_kv_heads == 4
    assert not llama.qkv_bias
    assert not llama.qk_norm


def test_the_context_is_what_config_json_says_or_stretches_to():
    """A run beyond it is warned of. Qwen2.5's long context leaves max_position_embeddings at what it is before."""
    stretched = {"max_position_embeddings": 64, "rope_scaling": YARN}
    configs = [ModelConfig.from_dict(QWEN3 | keys) for keys in ({}, {"max_position_embeddings": 64}, stretched)]
    assert [config.context > 10**6 for config in configs] == [True, False, False]
    assert [config.context for config in configs[1:]] == [64, 256]


def test_null_numbers_have_their_defaults():
    nothing = {"rms_norm_eps": None, "initializer_range": None, "rope_theta": None, "head_dim": None}
    assert ModelConfig.from_dict(QWEN3 | nothing) == ModelConfig.from_dict(QWEN3)


def test_unknown_keys_survive_a_round_trip():
    raw = QWEN3 | {"auto_map": {"x": "y"}, "torch_dtype": "float16", "eos_token_id": [1, 2]}
    written = json.loads(json.dumps(ModelConfig.from_dict(raw).to_dict("bfloat16")))
    changed = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "architectures": ["Qwen3ForCausalLM"]}
    assert written == raw | changed
    assert ModelConfig.from_dict(written) == ModelConfig.from_dict(raw)
