"""verl's LM head, (hidden, weight, labels, temperature) -> (log-probs, entropies), by flashgrpo: logits a chunk at a
time, sums in a fixed order.

verl has two backends of this signature, and each has its stand-in here. Before verl makes a model:

    import verl.utils.experimental.torch_functional as by_torch
    import verl.utils.kernel.linear_cross_entropy as by_triton
    from verl_head import FusedLinearForPPO, linear_cross_entropy  # this file

    by_triton.linear_cross_entropy = linear_cross_entropy  # fused_kernel_options.impl_backend=triton
    by_torch.FusedLinearForPPO = FusedLinearForPPO  # fused_kernel_options.impl_backend=torch

with actor_rollout_ref.model.use_fused_kernels=True: its forwards import the two where they call them. Signatures as in
https://github.com/volcengine/verl at b178a3c, verl/utils/kernel/linear_cross_entropy.py and
verl/utils/experimental/torch_functional.py. Not here: Megatron's head that is split over ranks, and a `reduction`,
which verl does not ask for. Log-probs and entropies are fp32, as by verl's triton backend; its torch backend rounds
them to the dtype of the hidden states.
"""

from typing import Any

import torch
from torch import Tensor

from flashgrpo.kernels.linear_grpo import linear_logprobs


def linear_cross_entropy(
    hidden: Tensor,  # [..., hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    labels: Tensor,  # [...], the next tokens
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:  # [num_labels], as verl's, whatever the shape of the labels
    """Log-probs of the labels and entropies of softmax(hidden @ weight^T / temperature), in nats, both differentiable.

    Raises ValueError for a reduction and for a group of several ranks.
    """
    if reduction.lower() != "none":
        raise ValueError(f"reduction is {reduction!r}; wanted 'none', and reduce the log-probs yourself")
    if dist_process_group is not None and (ranks := torch.distributed.get_world_size(dist_process_group)) > 1:
        raise ValueError(f"dist_process_group has {ranks} ranks; a head that is split over ranks is not supported")
    return linear_logprobs(hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature)


class FusedLinearForPPO(torch.nn.Module):
    """`chunk_size` is verl's, rows of logits at a time; None: as many as `linear_logprobs` takes."""

    def __init__(self, chunk_size: int | None = None):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,  # [num_tokens, hidden_size] or [batch, num_tokens, hidden_size]
        vocab_weights: Tensor,  # [vocab, hidden_size]
        input_ids: Tensor,  # [num_tokens] or [batch, num_tokens], the next tokens
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # both of the shape of input_ids
        logprobs, entropy = linear_logprobs(
            hidden_states.flatten(0, -2), vocab_weights, input_ids.flatten(),
            temperature=temperature, chunk_tokens=self.chunk_size,
        )  # fmt: skip
        return logprobs.view(input_ids.shape), entropy.view(input_ids.shape)


if __name__ == "__main__":
    print(__doc__)
