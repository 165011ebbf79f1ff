"""What the decoder costs: FLOPs, weights, and saved activations, counted from its code.

A multiply-add is two FLOPs, attention counts its query-key pairs, and recomputation counts nothing.
"""

import functools
from dataclasses import dataclass

import torch

from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import Block


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a forward pass; a backward pass takes twice as many."""

    per_token: float  # products of the blocks
    per_pair: float  # a query and a key that it sees, over all blocks: q k^T and weights v
    per_target: float  # the LM head; a reward model has none

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelFlops":
        """The counts of a model's shape."""
        matrices = sum(parameter.numel() for parameter in _block(config).parameters() if parameter.dim() == 2)
        return cls(
            per_token=2.0 * config.num_layers * matrices,
            per_pair=4.0 * config.num_layers * config.q_size,
            per_target=0.0 if config.is_reward_model else 2.0 * config.hidden_size * config.vocab_size,
        )

    def forward(self, num_tokens, num_pairs, num_targets):
        """FLOPs of a forward pass, of numbers or arrays of them."""
        return self.per_token * num_tokens + self.per_pair * num_pairs + self.per_target * num_targets


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights."""

    block: int
    head: int  # the LM head's; the embedding's are as many
    root: int  # beside the blocks: embedding, head if it is not tied, final norm
    total: int

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelSize":
        """The counts of a model's shape."""
        block = sum(parameter.numel() for parameter in _block(config).parameters())
        head = config.vocab_size * config.hidden_size
        root = head * (1 if config.tie_embeddings else 2) + config.hidden_size
        return cls(block, head, root, config.num_layers * block + root)


@dataclass(frozen=True)
class BlockActivations:
    """Bytes a token of one decoder block."""

    kept: float  # from its forward to its backward pass
    recomputed: float  # in its backward pass, beside what is kept
    working: float  # at most, in its backward pass: in the MLP

    @classmethod
    def of(
        cls, config: ModelConfig, checkpointing: str, itemsize: int, cpu_group: tuple[float, float, int] | None = None
    ) -> "BlockActivations":
        """What model/decoder.py saves for tensors of `itemsize` bytes.

        `cpu_group` is for a CPU, whose attention copies a prompt's keys for each completion: tokens of the prompt and
        of a completion in the pack, and completions a prompt, all of equal length.
        """
        q, kv, mlp = config.q_size, config.kv_size, config.intermediate_size
        hidden = itemsize * config.hidden_size
        products = itemsize * (q + 2 * kv + 2 * mlp)  # to q, k, v, and to gate and up
        attended = itemsize * q + 4 * config.num_heads  # with lse
        if cpu_group is None:  # q and k after RoPE, and v, which else is part of the product
            inputs = itemsize * (q + kv + (0 if config.qk_norm else kv))
        else:  # copies with their indices, a mask of floats, and the output in order
            prompt, own, size = cpu_group
            keys = (prompt + size * (prompt + own)) / (prompt + size * own)
            mask = size * own * (prompt + own) / (prompt + size * own)
            inputs = itemsize * (q + 2 * keys * kv + mask + q) + 8 * (1 + keys + 1)
        normed = 4 * (config.num_heads + config.num_kv_heads) + itemsize * (q + 2 * kv) if config.qk_norm else 0
        everything = 4 * hidden + 2 * 4 + normed + inputs + attended + itemsize * 2 * mlp
        kept = {"none": everything, "selective": 3 * hidden + products + attended, "full": hidden}[checkpointing]
        reused = attended + itemsize * 2 * mlp + (itemsize * (q + 2 * kv) if config.qk_norm else 0)
        recomputed = {"none": 0, "selective": everything - hidden - reused, "full": everything - hidden}[checkpointing]
        return cls(kept, recomputed, itemsize * 5 * mlp + 2 * hidden)


@functools.cache
def _block(config: ModelConfig) -> Block:
    with torch.device("meta"):
        return Block(config)
