"""A model's shape, read from Hugging Face's config.json: dense Llama, Qwen2 and Qwen3, as causal models or as reward
models, which have a head of one score in place of the LM head.

transformers reads it: its defaults, its names of older versions and its checks of types are the
definition of what a key means. What is left to this file is to refuse what the decoder does not
compute. The original dictionary is kept and written back whole, so that keys nobody here knows
survive training.
"""

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashgrpo.model.rope import Rope

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_CAUSAL, _SCORING = "ForCausalLM", "ForSequenceClassification"
# transformers has defaults for these, too, and they are those of another model.
_SIZES = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
_POSITIVE = *_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "initializer_range", "max_position_embeddings"
_ROPE_KINDS = "default", "linear", "llama3", "yarn"
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_SCALINGS = {
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip


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
    context: int  # tokens of the longest sequence that the model was made for
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    is_reward_model: bool  # a head of one score instead of the LM head
    initializer_range: float
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def q_size(self) -> int:
        """Of the queries of all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Of the keys, or the values, of all heads."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """The model that `raw`, a parsed config.json, describes; keys left out have transformers' defaults.

        Raises CheckpointError for another family, a size that is missing, a value that transformers
        refuses, or a feature that would change the mathematics (sliding window, another activation,
        MLP bias, partial rotary embedding, quantised weights, several scores).
        """
        family = raw.get("model_type")
        if family not in ARCHITECTURES:
            raise CheckpointError(f"model_type is {family!r}; supported families are {', '.join(ARCHITECTURES)}")
        if missing := [key for key in _SIZES if raw.get(key) is None]:
            raise CheckpointError(f"{missing[0]} is missing")
        found = _read_by_transformers(raw)
        _refuse_unsupported(found)
        num_heads, num_kv_heads = found.num_attention_heads, found.num_key_value_heads
        head_dim = getattr(found, "head_dim", None) or found.hidden_size // num_heads
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads is {num_heads}, which num_key_value_heads, {num_kv_heads}, does not divide"
            )
        if head_dim % 2:
            raise CheckpointError(f"head_dim is {head_dim}; rotary embedding needs an even one")
        attention_bias = family != "qwen2" and found.attention_bias
        return cls(
            family=family,
            vocab_size=found.vocab_size,
            hidden_size=found.hidden_size,
            intermediate_size=found.intermediate_size,
            num_layers=found.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=found.rms_norm_eps,
            rope=_rope(found),
            context=max(raw.get("max_position_embeddings") or sys.maxsize, _stretched_context(found.rope_parameters)),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            qk_norm=family == "qwen3",
            tie_embeddings=found.tie_word_embeddings,
            is_reward_model=_is_reward_model(found),
            initializer_range=found.initializer_range,
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


def _read_by_transformers(raw: Mapping[str, Any]) -> Any:
    """transformers' configuration of `raw`, its types checked."""
    from transformers import AutoConfig  # here, because kernels and decoder run without it

    stated = {key: value for key, value in raw.items() if value is not None}  # null is as good as nothing
    try:
        return AutoConfig.for_model(**copy.deepcopy(stated))  # a copy: it writes into nested objects
    except Exception as error:  # of a class for every kind of fault, and the reason stands last
        raise CheckpointError(str(error).rpartition("Error: ")[2].strip('"')) from None


def _refuse_unsupported(found: Any) -> None:
    for key in _POSITIVE:
        value = getattr(found, key, None)  # Qwen2 has no head_dim of its own
        if value is not None and not 0 < value < math.inf:
            raise CheckpointError(f"{key} is {value!r}; a positive number is wanted")
    if found.hidden_act != "silu":
        raise CheckpointError(f"hidden_act is {found.hidden_act!r}; only 'silu' is supported")
    if getattr(found, "mlp_bias", False):
        raise CheckpointError("mlp_bias is true; MLPs with a bias are not supported")
    if getattr(found, "quantization_config", None):
        raise CheckpointError("quantization_config is set; train from the unquantised checkpoint")
    if other := {*(getattr(found, "layer_types", None) or ())} - {"full_attention"}:
        raise CheckpointError(
            f"layers of this checkpoint are of type {min(other)!r}, and only full attention is supported; if it was "
            "trained with full attention set use_sliding_window to false and remove layer_types"
        )


def _is_reward_model(found: Any) -> bool:
    if not any(name.endswith(_SCORING) for name in found.architectures or ()):
        return False
    if found.num_labels != 1:
        raise CheckpointError(f"a head of {found.num_labels} labels; only a reward model's, of one, is supported")
    return True


def _rope(found: Any) -> Rope:
    """Frequencies by transformers' own formulas, so that a checkpoint sees the angles it was trained with."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {key: value for key, value in found.rope_parameters.items() if value is not None}
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_KINDS:
        raise CheckpointError(f"RoPE scaling {kind!r}; supported are {', '.join(_ROPE_KINDS)}")
    known = _ROPE_KEYS if kind == "default" else _ROPE_KEYS | _ROPE_SCALINGS
    if unknown := [key for key in parameters if key not in known]:
        raise CheckpointError(
            f"RoPE parameters have {unknown[0]} = {parameters[unknown[0]]!r}, which is not supported with rope_type "
            f"{kind!r}"
        )
    if (partial := parameters.get("partial_rotary_factor", 1.0)) != 1:
        raise CheckpointError(f"partial_rotary_factor is {partial}; only 1 is supported")
    if kind == "default":  # which transformers has in each model's own code: it is `linear` by a factor of 1
        kind, found.rope_parameters["factor"] = "linear", 1.0
    try:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](found, "cpu")
        rope = Rope(tuple(frequencies.tolist()), float(scale))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"RoPE parameters are {parameters}: {error}") from None
    if not all(0 < number < math.inf for number in (*rope.frequencies, rope.scale)):
        raise CheckpointError(f"RoPE parameters are {parameters}, which give no angles")
    return rope


def _stretched_context(parameters: Mapping[str, Any]) -> int:
    original = parameters.get("original_max_position_embeddings")
    return int(original * (parameters.get("factor") or 1)) if isinstance(original, int) else 0
