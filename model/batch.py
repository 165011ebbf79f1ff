"""The one layout that every stage shares: completions packed behind one copy of their prompt, no padding, no mask.

Token space is what goes through the decoder; target space has one row per completion token that is
trained on. A completion's last token predicts nothing, so its segment holds the tokens before it:
with prompt [a, b, c] and completions [d, e] and [f, g, h]

    input_ids     a b c | d | f g        cu_seqlens [0, 3, 4, 6]     prefix [-1, 0, 0]
    position_ids  0 1 2 | 3 | 3 4
    targets       d e | f g h            target_cu_seqlens [0, 2, 5]
    predictors    2 3 | 2 4 5            both completions begin at the prompt's last hidden state
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype, backward_once


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on one rank. Built and checked on the host by learn/packing; offsets are int32."""

    input_ids: Tensor  # [total_tokens] int64
    position_ids: Tensor  # [total_tokens] int64
    cu_seqlens: Tensor  # [num_segments + 1] int32
    prefix: Tensor  # [num_segments] int32, the prompt's segment for a completion, -1 for a prompt
    max_seqlen: int
    targets: Tensor  # [num_targets] int64
    predictors: Tensor  # [num_targets] int64, row of token space whose hidden state predicts the target
    target_cu_seqlens: Tensor  # [num_completions + 1] int32
    sequence_ids: Tensor  # [num_completions] int64, entry of rewards.flatten()
    completions_per_prompt: Tensor  # [num_prompts] int64, in the order of the pack
    behavior_logprobs: Tensor | None = None  # [num_targets] fp32, what the sampler reported
    old_logprobs: Tensor | None = None  # [num_targets] fp32, the trainer's own, before the update
    ref_logprobs: Tensor | None = None  # [num_targets] fp32, the frozen reference
    teacher_logprobs: Tensor | None = None  # [num_targets] fp32, the frozen model that is distilled
    kept_ids: Tensor | None = None  # [num_kept] int32, what top_p and top_k kept of the vocabulary, target by target
    kept_offsets: Tensor | None = None  # [num_targets + 1] int32

    @property
    def total_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_targets(self) -> int:
        return self.targets.shape[0]

    @property
    def kept(self) -> tuple[Tensor, Tensor] | None:
        """The sets that the targets were drawn from, as kernels take them; None: the whole vocabulary."""
        return None if self.kept_ids is None or self.kept_offsets is None else (self.kept_ids, self.kept_offsets)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch with every tensor on `device`; to CUDA from pinned memory, so that nothing waits for the copies."""
        to_cuda = torch.device(device).type == "cuda"
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {
            name: (tensor.pin_memory() if to_cuda and tensor.is_cpu else tensor).to(device, non_blocking=to_cuda)
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        }
        return replace(self, **moved)


def gather_predictors(
    hidden: Tensor,  # [total_tokens, hidden_size]
    batch: PackedBatch,
) -> Tensor:
    """Hidden states that predict the targets, [num_targets, hidden_size].

    The backward pass is free of atomics: a prompt's last hidden state collects its completions' gradients in fp32,
    in the order of the pack, and every other row has exactly one reader.
    """
    return _GatherPredictors.apply(hidden, batch.predictors, batch.target_cu_seqlens, batch.completions_per_prompt)


class _GatherPredictors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, predictors, target_cu_seqlens, completions_per_prompt):
        ctx.save_for_backward(predictors, target_cu_seqlens, completions_per_prompt)
        ctx.num_tokens = hidden.shape[0]
        return hidden.index_select(0, predictors)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        (d_gathered,) = grad_outputs
        predictors, target_cu_seqlens, completions_per_prompt = ctx.saved_tensors
        d_hidden = d_gathered.new_zeros(ctx.num_tokens, d_gathered.shape[1])
        if not predictors.numel():
            return d_hidden, None, None, None
        d_hidden.index_copy_(0, predictors, d_gathered)  # right but for the shared rows, which are written next
        first = target_cu_seqlens[:-1].long()
        d_first = d_gathered.index_select(0, first).to(accumulation_dtype(d_gathered.dtype))
        shared = torch.segment_reduce(d_first, "sum", lengths=completions_per_prompt, unsafe=True)
        # a prompt's completions all write its sum, and a prompt without any writes nothing
        shared = shared.to(d_hidden.dtype).repeat_interleave(completions_per_prompt, 0, output_size=first.shape[0])
        d_hidden.index_copy_(0, predictors.index_select(0, first), shared)
        return d_hidden, None, None, None
