"""A checkpoint this package would compute wrongly must be refused by a message that says what was found."""

import copy
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
    "size is null": ({"hidden_size": None}, "hidden_size is missing"),
    "size is text": ({"vocab_size": "61"}, "'vocab_size' expected int, got str (value: '61')"),
    "size is negative": ({"vocab_size": -3}, "vocab_size is -3; a positive number is wanted"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads is 4, which num_key_value_heads, 3, does not divide"),
    "no head": ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    "odd head": ({"head_dim": 7}, "`head_dim`=7"),
    "half a head": ({"head_dim": 8.5}, "'head_dim' expected int"),
    "Qwen2's odd head": ({"model_type": "qwen2", "hidden_size": 28}, "head_dim is 7"),
    "epsilon is a list": ({"rms_norm_eps": [1e-6]}, "'rms_norm_eps' expected float"),
    "infinite range": ({"initializer_range": float("inf")}, "initializer_range is inf"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is true"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is set"),
    "window": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "'sliding_attention'"),
    "layer types": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "set use_sliding_window to false",
    ),
    "linear attention": ({"layer_types": ["linear_attention"] * 3}, "of type 'linear_attention', and only full"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "scaling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'; supported are"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters`"),
    "zero factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "RoPE parameters are {'type': 'linear'"),
    "factor is text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "RoPE parameters are {'type': 'linear'"),
    "scaling is text": ({"rope_scaling": "yarn"}, "'rope_parameters' with value 'yarn'"),
    "theta is text": ({"rope_theta": "1e4"}, "RoPE parameters are {'rope_theta': '1e4'"),
    "nested": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "have full_attention = {'rope_theta'"),
    "unknown": ({"rope_scaling": YARN | {"mrope_section": [2, 3]}}, "mrope_section = [2, 3], which is not supported"),
    "no type": ({"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}}, "have factor = 4.0"),
    "labels": ({"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 2}, "a head of 2 labels"),
}


@pytest.mark.parametrize("case", BAD)
def test_unsupported_models_are_refused(case):
    change, message = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(QWEN3 | change)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", [key for key in QWEN3 if key not in ("model_type", "num_key_value_heads")])
def test_a_missing_size_is_named(key):
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        ModelConfig.from_dict({name: value for name, value in QWEN3.items() if name != key})


def test_null_is_as_good_as_nothing():
    keys = "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "head_dim", "max_position_embeddings"
    plain = {key: value for key, value in QWEN3.items() if key not in keys}
    assert ModelConfig.from_dict(QWEN3 | dict.fromkeys(keys)) == ModelConfig.from_dict(plain)
    scaling = {"type": "linear", "factor": 2.0, "original_max_position_embeddings": None}
    assert ModelConfig.from_dict(plain | {"rope_scaling": scaling, "max_position_embeddings": 64}).context == 64


def test_sliding_window_that_no_layer_uses_is_accepted():
    """Every Qwen2 checkpoint carries the key; most never use it."""
    unused = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1}
    beyond = {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 3}
    for keys in (unused, beyond):
        assert ModelConfig.from_dict(QWEN3 | {"model_type": "qwen2"} | keys).qkv_bias


def test_the_context_is_what_config_json_says_or_stretches_to():
    """A run beyond it is warned of. Qwen2.5's long context leaves max_position_embeddings at what it is before."""
    stretched = {"max_position_embeddings": 64, "rope_scaling": YARN}
    configs = [ModelConfig.from_dict(QWEN3 | keys) for keys in ({}, {"max_position_embeddings": 64}, stretched)]
    assert [config.context > 10**6 for config in configs] == [True, False, False]
    assert [config.context for config in configs[1:]] == [64, 256]


def test_unknown_keys_survive_a_round_trip():
    raw = QWEN3 | {"auto_map": {"x": "y"}, "torch_dtype": "float16", "eos_token_id": [1, 2], "rope_scaling": {**YARN}}
    before = copy.deepcopy(raw)
    config = ModelConfig.from_dict(raw)
    written = json.loads(json.dumps(config.to_dict("bfloat16")))
    changed = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "architectures": ["Qwen3ForCausalLM"]}
    assert written == before | changed
    assert ModelConfig.from_dict(written) == config
