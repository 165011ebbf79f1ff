"""Shapes of published models by name, as their config.json has them, and smaller ones; nothing is downloaded."""

from typing import Any

_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "tie_word_embeddings",
)  # fmt: skip
_QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN3 = {
    "model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
_LLAMA3 = {
    "model_type": "llama",
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_SMALL = {"model_type": "qwen3", "head_dim": 64, "max_position_embeddings": 4096, "eos_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    name: {**family, **dict(zip(_KEYS, sizes, strict=True))}
    for name, family, sizes in (
        ("small", _SMALL, (256, 704, 6, 4, 2, 512, True)),
        ("large", _SMALL, (1024, 2816, 8, 4, 2, 16_384, True)),
        ("Qwen2.5-0.5B", _QWEN2, (896, 4864, 24, 14, 2, 151_936, True)),
        ("Qwen2.5-1.5B", _QWEN2, (1536, 8960, 28, 12, 2, 151_936, True)),
        ("Qwen2.5-7B", _QWEN2, (3584, 18_944, 28, 28, 4, 152_064, False)),
        ("Qwen2.5-32B", _QWEN2, (5120, 27_648, 64, 40, 8, 152_064, False)),
        ("Qwen3-4B", _QWEN3, (2560, 9728, 36, 32, 8, 151_936, True)),
        ("Llama-3.1-8B", _LLAMA3, (4096, 14_336, 32, 32, 8, 128_256, False)),
    )
}
