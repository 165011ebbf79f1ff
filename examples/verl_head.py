"""verl's LM head, (hidden, weight, labels, temperature) -> (log-probs, entropies), by flashgrpo: logits a chunk at a
time, sums in a fixed order.

verl has two backends of this signature, and each has its stand-in here. In a module of yours, flash_verl.py, that lies
on PYTHONPATH beside this file:

    import verl.utils.experimental.torch_functional as by_torch
    import verl.utils.kernel.linear_cross_entropy as by_triton
    from verl_head import FusedLinearForPPO, linear_cross_entropy  # this file

    by_triton.linear_cross_entropy = linear_cross_entropy  # fused_kernel_options.impl_backend=triton
    by_torch.FusedLinearForPPO = FusedLinearForPPO  # fused_kernel_options.impl_backend=torch

With actor_rollout_ref.model.external_lib=flash_verl every worker imports it before it makes a model, and with
actor_rollout_ref.model.use_fused_kernels=True its forward passes import the two where they call them. Signatures as in
https://github.com/volcengine/verl at b178a3c, verl/utils/kernel/linear_cross_entropy.py and
verl/utils/experimental/torch_functional.py, and as they have become since, with a temperature for each token. Not here:
Megatron's head that is split over ranks, and a `reduction`, which verl does not ask for. Log-probs and entropies are
fp32, as by verl's triton backend; its torch backend rounds entropies to the dtype of the hidden states.
"""

from typing import Any

import torch
from torch import Tensor

from flashgrpo.kernels.linear_grpo import linear_logprobs


def linear_cross_entropy(
    hidden: Tensor,  # [..., hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    labels: Tensor,  # [...], the next tokens
    temperature: float | Tensor = 1.0,
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
    return _head(hidden, weight, labels, temperature)


class FusedLinearForPPO(torch.nn.Module):
    """`chunk_size` is verl's, rows of logits at a time; None: as many as `linear_logprobs` takes."""

    def __init__(self, chunk_size: int | None = None, impl_backend: str = "torch"):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,  # [num_tokens, hidden_size] or [batch, num_tokens, hidden_size]
        vocab_weights: Tensor,  # [vocab, hidden_size]
        input_ids: Tensor,  # [num_tokens] or [batch, num_tokens], the next tokens
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:  # both of the shape of input_ids
        logprobs, entropy = _head(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)
        return logprobs.view(input_ids.shape), entropy.view(input_ids.shape)


def _head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    hidden = hidden.flatten(0, -2)
    if isinstance(temperature, Tensor) and temperature.numel() > 1:  # one a token
        hidden, temperature = (hidden / temperature.reshape(-1, 1)).to(hidden.dtype), 1.0
    return linear_logprobs(hidden, weight, labels.flatten(), temperature=float(temperature), chunk_tokens=chunk_tokens)
