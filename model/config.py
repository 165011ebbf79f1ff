"""A model's shape, read from Hugging Face's config.json: dense Llama, Qwen2 and Qwen3, as causal models or as reward
models, which have a head of one score in place of the LM head.

The original dictionary is kept and written back whole, so that keys this package does not know survive training.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashgrpo.model.rope import Rope

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_KEYS = "rope_type", "type", "rope_theta", "partial_rotary_factor"
_ROPE_SCALINGS = (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
_CAUSAL, _SCORING = "ForCausalLM", "ForSequenceClassification"


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or describes a model this package cannot run."""

    exit_code = 2  # of the command line: it is found before the first step


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Made by `from_dict`; `raw` is the dictionary it was read from."""

    family: str  # llama, qwen2 or qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    is_reward_model: bool  # a head of one score instead of the LM head
    initializer_range: float
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        stretched = int(self.rope.original_context * self.rope.factor)
        return max(_positive_int(self.raw, "max_position_embeddings", sys.maxsize), stretched)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """The model that `raw`, a parsed config.json, describes; keys left out have transformers' defaults.

        Raises CheckpointError for another family, a missing key, or a feature that would change the mathematics
        (sliding window, another activation, MLP bias, partial rotary embedding, quantised weights, several scores).
        """
        family = raw.get("model_type")
        if family not in ARCHITECTURES:
            raise CheckpointError(f"model_type is {family!r}; supported families are {', '.join(ARCHITECTURES)}")
        _refuse_unsupported(raw)
        hidden_size, num_heads = _positive_int(raw, "hidden_size"), _positive_int(raw, "num_attention_heads")
        num_kv_heads = _positive_int(raw, "num_key_value_heads", num_heads)
        head_dim = _positive_int(raw, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads is {num_heads}, which num_key_value_heads, {num_kv_heads}, does not divide"
            )
        if head_dim % 2:
            raise CheckpointError(f"head_dim is {head_dim}; rotary embedding needs an even one")
        attention_bias = bool(raw.get("attention_bias", False)) and family != "qwen2"
        return cls(
            family=family,
            vocab_size=_positive_int(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive_int(raw, "intermediate_size"),
            num_layers=_positive_int(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            qk_norm=family == "qwen3",
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            is_reward_model=_is_reward_model(raw),
            initializer_range=_positive(raw, "initializer_range", 0.02),
            raw=raw,
        )

    def as_reward_model(self) -> "ModelConfig":
        """This model with a head of one score, as transformers' AutoModelForSequenceClassification reads it.

        transformers looks for the last token that is not padding: one that is also an end of sequence, which a score
        is read at, is no padding here.
        """
        raw = {**self.raw, "architectures": [ARCHITECTURES[self.family].replace(_CAUSAL, _SCORING)]}
        raw |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        ends = raw.get("eos_token_id")
        if raw.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
            raw["pad_token_id"] = None
        return ModelConfig.from_dict(raw)

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """The config.json of this model with weights of `dtype` ("bfloat16"); every key of `raw` is kept."""
        written = {**self.raw, "dtype": dtype}
        written["architectures"] = written.get("architectures") or [ARCHITECTURES[self.family]]  # null in a new config
        if "torch_dtype" in written:  # the key's name before transformers 5
            written["torch_dtype"] = dtype
        return written


def _is_reward_model(raw: Mapping[str, Any]) -> bool:
    if not any(str(name).endswith(_SCORING) for name in raw.get("architectures") or ()):
        return False
    if (num := raw.get("num_labels", len(raw.get("id2label") or (0, 1)))) != 1:
        raise CheckpointError(f"a head of {num} labels; only a reward model's, of one, is supported")
    return True


def _positive(raw: Mapping[str, Any], key: str, default: float | None = None, wanted: str = "number") -> float:
    """raw[key], or `default` where the key is missing or null; a number above 0 either way."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        found = f"is {value!r}" if key in raw else "is missing"
        raise CheckpointError(f"{key} {found}; a positive {wanted} is wanted")
    return value


def _positive_int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _positive(raw, key, default, "integer")
    if not isinstance(value, int):
        raise CheckpointError(f"{key} is {value!r}; a positive integer is wanted")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"hidden_act is {activation!r}; only 'silu' is supported")
    if raw.get("mlp_bias"):
        raise CheckpointError("mlp_bias is true; MLPs with a bias are not supported")
    if raw.get("quantization_config"):
        raise CheckpointError("quantization_config is set; train from the unquantised checkpoint")
    if other := set(map(str, raw.get("layer_types") or ())) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"layer_types have {min(other)!r}; only layers of full attention are supported")
    windowed = "sliding_attention" in (raw.get("layer_types") or ())
    if raw.get("layer_types") is None and raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None:
        windowed = _positive(raw, "max_window_layers", 28) < _positive_int(raw, "num_hidden_layers")
    if windowed:
        raise CheckpointError(
            "layers of this checkpoint use a sliding window, which is not supported; if it was trained "
            "with full attention set use_sliding_window to false and remove layer_types"
        )


def _check_rope(parameters: Any) -> None:
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"RoPE parameters are {parameters!r}; an object is wanted")
    given = {key: value for key, value in parameters.items() if value is not None}
    if unknown := [key for key in given if key not in (*_ROPE_KEYS, *_ROPE_SCALINGS)]:
        raise CheckpointError(
            f"RoPE parameters have {unknown[0]} = {given[unknown[0]]!r}, which is not supported; known are "
            f"{', '.join((*_ROPE_KEYS, *_ROPE_SCALINGS))}, the same for all layers"
        )
    if not {"rope_type", "type"} & given.keys() and (unused := given.keys() & {*_ROPE_SCALINGS}):
        raise CheckpointError(f"RoPE parameters have {min(unused)}, and no rope_type that says what it scales")


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = [raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    for parameters in given:
        _check_rope(parameters)
    found = given[0] if given else {}
    theta = _positive(found, "rope_theta", _positive(raw, "rope_theta", 10_000.0))
    kind = found.get("rope_type") or found.get("type") or "default"
    if (partial := found.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) not in (1.0, None):
        raise CheckpointError(f"partial_rotary_factor is {partial}; only 1 is supported")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, _positive(found, "factor"))
    if kind not in ("llama3", "yarn"):
        raise CheckpointError(f"RoPE scaling {kind!r}; supported are default, linear, llama3, yarn")
    key = "original_max_position_embeddings"
    context = _positive_int(raw if raw.get(key) else found, key, raw.get("max_position_embeddings"))
    if kind == "llama3":
        low, high = _positive(found, "low_freq_factor"), _positive(found, "high_freq_factor")
        return Rope(theta, kind, _positive(found, "factor"), context, low_freq_factor=low, high_freq_factor=high)
    for key, wanted in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if found.get(key) not in (None, wanted):
            raise CheckpointError(f"YaRN's {key} is {found[key]!r}, which is not supported")
    factor = _positive(found, "factor", _positive_int(raw, "max_position_embeddings", context) / context)
    return Rope(
        theta,
        kind,
        factor,
        context,
        beta_fast=_positive(found, "beta_fast", 32.0),
        beta_slow=_positive(found, "beta_slow", 1.0),
        attention_factor=_positive(found, "attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
    )
