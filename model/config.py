"""A model's shape, read from Hugging Face's config.json: dense Llama, Qwen2 and Qwen3.

The original dictionary is kept and written back whole, so that keys this package does not know survive training.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashgrpo.model.rope import Rope, yarn_attention_factor

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or describes a model this package cannot run."""


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
    initializer_range: float
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """The model that `raw`, a parsed config.json, describes; keys left out have transformers' defaults.

        Raises CheckpointError for another family, a missing key, or a feature that would change the mathematics
        (sliding window, another activation, MLP bias, partial rotary embedding, quantised weights).
        """
        family = raw.get("model_type")
        if family not in ARCHITECTURES:
            raise CheckpointError(f"model_type is {family!r}; supported families are {', '.join(ARCHITECTURES)}")
        _refuse_unsupported(raw)
        hidden_size, num_heads = _positive_int(raw, "hidden_size"), _positive_int(raw, "num_attention_heads")
        num_kv_heads = num_heads
        if raw.get("num_key_value_heads") is not None:
            num_kv_heads = _positive_int(raw, "num_key_value_heads")
        head_dim = 128 if family == "qwen3" else hidden_size // num_heads
        if raw.get("head_dim") is not None:
            head_dim = _positive_int(raw, "head_dim")
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
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            qk_norm=family == "qwen3",
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=float(raw.get("initializer_range", 0.02)),
            raw=raw,
        )

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """The config.json of this model with weights of `dtype` ("bfloat16"); every key of `raw` is kept."""
        written = {"architectures": [ARCHITECTURES[self.family]], **self.raw, "dtype": dtype}
        if "torch_dtype" in written:  # the key's name before transformers 5
            written["torch_dtype"] = dtype
        return written


def _positive_int(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = f"is {value!r}" if key in raw else "is missing"
        raise CheckpointError(f"{key} {found}; a positive integer is wanted")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"hidden_act is {activation!r}; only 'silu' is supported")
    if raw.get("mlp_bias"):
        raise CheckpointError("mlp_bias is true; MLPs with a bias are not supported")
    if raw.get("quantization_config"):
        raise CheckpointError("quantization_config is set; train from the unquantised checkpoint")
    windowed = "sliding_attention" in (raw.get("layer_types") or ())
    if raw.get("layer_types") is None and raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None:
        windowed = raw.get("max_window_layers", 28) < _positive_int(raw, "num_hidden_layers")
    if windowed:
        raise CheckpointError(
            "layers of this checkpoint use a sliding window, which is not supported; if it was trained "
            "with full attention set use_sliding_window to false and remove layer_types"
        )


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = float(found.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = found.get("rope_type") or found.get("type") or "default"
    if (partial := found.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) not in (1.0, None):
        raise CheckpointError(f"partial_rotary_factor is {partial}; only 1 is supported")
    if kind == "default":
        return Rope(theta)

    def number(key: str, default: float | None = None) -> float:
        value = default if found.get(key) is None else found[key]
        if not isinstance(value, int | float):
            raise CheckpointError(f"RoPE scaling {kind!r} needs a number {key!r}, found {value!r}")
        return float(value)

    if kind == "linear":
        return Rope(theta, kind, number("factor"))
    if kind not in ("llama3", "yarn"):
        raise CheckpointError(f"RoPE scaling {kind!r}; supported are default, linear, llama3, yarn")
    context = raw.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    context = context or _positive_int(raw, "max_position_embeddings")
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return Rope(theta, kind, number("factor"), context, low_freq_factor=low, high_freq_factor=high)
    factor = number("factor", raw.get("max_position_embeddings", math.nan) / context)
    return Rope(
        theta,
        kind,
        factor,
        context,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(found.get("truncate", True)),
        attention_factor=number(
            "attention_factor", yarn_attention_factor(factor, found.get("mscale"), found.get("mscale_all_dim"))
        ),
    )
