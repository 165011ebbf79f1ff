"""What the decoder costs: FLOPs, weights, and saved activations, counted from its code.

A multiply-add is two FLOPs, attention counts its query-key pairs, and recomputation counts nothing.
"""

import functools
from dataclasses import dataclass
from typing import Literal

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
    head: int  # the LM head's, and the embedding's are as many; or a reward model's
    root: int  # beside the blocks: embedding, head if it is not tied, final norm
    total: int

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelSize":
        """The counts of a model's shape."""
        block = sum(parameter.numel() for parameter in _block(config).parameters())
        head = config.vocab_size * config.hidden_size
        root = head * (1 if config.tie_embeddings else 2) + config.hidden_size
        if config.is_reward_model:  # one score
            head, root = config.hidden_size, head + 2 * config.hidden_size
        return cls(block, head, root, config.num_layers * block + root)


Attention = Literal["triton", "flash", "cpu"]  # whose inputs and outputs a block keeps


@dataclass(frozen=True)
class BlockActivations:
    """Bytes a token of one decoder block."""

    kept: float  # from its forward to its backward pass
    recomputed: float  # in its backward pass, beside what is kept
    working: float  # at most, in its backward pass: in the MLP

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        checkpointing: str,
        itemsize: int,
        attention: Attention = "triton",
        group: tuple[float, float, int] | None = None,
    ) -> "BlockActivations":
        """What model/decoder.py saves for tensors of `itemsize` bytes.

        `group` is for an attention that copies a prompt's keys for each completion: tokens of the prompt and of a
        completion in the pack, and completions a prompt, all of equal length. None: one completion, and no end of it.
        """
        q, kv, mlp = config.q_size, config.kv_size, config.intermediate_size
        hidden = itemsize * config.hidden_size
        products = itemsize * (q + 2 * kv + 2 * mlp)  # to q, k, v, and to gate and up
        attended = itemsize * q + 4 * config.num_heads  # with lse
        prompt, own, size = group or (1.0, 0.0, 1)
        tokens = prompt + size * own
        keys = (prompt + size * (prompt + own)) / tokens  # with copies, a token of the pack
        joint = itemsize * (q + 2 * kv)
        norms = 0.0
        # In the MLP: d_product, in whose place the kernel puts the product. The twin has d_gate_up and that beside it.
        working = itemsize * mlp * (4 if attention == "cpu" else 1) + 2 * hidden
        if attention == "cpu":  # copies with their indices, a mask of floats, and the output in order
            mask = size * own * (prompt + own) / tokens
            inputs = itemsize * (q + 2 * keys * kv + mask + q) + 8 * (1 + keys + 1)
            norms = 2 * 4 + (4 * (config.num_heads + config.num_kv_heads) + joint if config.qk_norm else 0)
        else:  # q and k in the place of the product, which has v, or beside it
            inputs = joint + (itemsize * (q + kv) if config.qk_norm else 0)
        if attention == "flash":
            inputs += itemsize * 2 * keys * kv
            # flash_api.cpp: dq in fp32 with 128 more rows a sequence, and dk and dv for every head of q; then their
            # sums over a prompt's copies in fp32.
            padded = 4 * (1 + 128 * (size + 1) / tokens) * q
            attending = itemsize * 2 * q + padded + itemsize * 2 * keys * (q + kv) + 4 * keys * kv
            working = max(working, attending)
        everything = 4 * hidden + norms + inputs + attended + itemsize * 2 * mlp
        kept = {"none": everything, "selective": 3 * hidden + products + attended, "full": hidden}[checkpointing]
        # What a recomputed block has of what is kept: on a GPU at least v.
        of_product = joint if config.qk_norm else 0 if attention == "cpu" else itemsize * kv
        reused = attended + itemsize * 2 * mlp + of_product
        recomputed = {"none": 0, "selective": everything - hidden - reused, "full": everything - hidden}[checkpointing]
        return cls(kept, recomputed, working)


@dataclass(frozen=True)
class BlockPasses:
    """Bytes a token that a block's elementwise work on a GPU reads and writes, products and attention left out: the
    passes that kernels/elementwise.py counts.
    """

    forward: float
    backward: float

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int) -> "BlockPasses":
        """Those of model/decoder.py for tensors of `itemsize` bytes."""
        hidden, mlp = itemsize * config.hidden_size, itemsize * config.intermediate_size
        qk, kv = itemsize * (config.q_size + config.kv_size), itemsize * config.kv_size
        forward = 9 * hidden + 2 * qk + 3 * mlp
        return cls(forward, backward=8 * hidden + (3 if config.qk_norm else 2) * qk + 2 * kv + 6 * mlp)


@functools.cache
def _block(config: ModelConfig) -> Block:
    with torch.device("meta"):
        return Block(config)
