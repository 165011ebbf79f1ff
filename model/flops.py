"""FLOPs of the decoder, counted exactly: a multiply-add is two, attention by its query-key pairs, no recomputation."""

from dataclasses import dataclass

from flashgrpo.model.config import ModelConfig


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a forward pass; a backward pass takes twice as many."""

    per_token: float  # products of the blocks
    per_pair: float  # a query and a key that it sees, over all blocks: q k^T and weights v
    per_target: float  # the LM head; a reward model has none

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelFlops":
        """The counts of a model's shape."""
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        weights = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
        return cls(
            per_token=2.0 * config.num_layers * weights,
            per_pair=4.0 * config.num_layers * q_size,
            per_target=0.0 if config.is_reward_model else 2.0 * config.hidden_size * config.vocab_size,
        )

    def forward(self, num_tokens, num_pairs, num_targets):
        """FLOPs of a forward pass, of numbers or arrays of them."""
        return self.per_token * num_tokens + self.per_pair * num_pairs + self.per_target * num_targets
