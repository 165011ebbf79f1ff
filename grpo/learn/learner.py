"""Weights under training: AdamW on fp32 shards, clipping, and no update from a gradient that is not finite."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from flashgrpo.kernels.grpo_loss import LossConfig, group_advantages
from flashgrpo.kernels.linear_grpo import linear_grpo_loss
from flashgrpo.model.batch import PackedBatch, gather_predictors
from flashgrpo.model.decoder import Decoder

if TYPE_CHECKING:  # benchmarks run where pydantic is missing
    from flashgrpo.grpo.recipe.schema import OptimizerSection

Stats = dict[str, Tensor]


class Learner:
    """A sharded model and its optimizer. An update sums the gradients of its micro-batches, over all ranks, in fp32;
    then it takes one AdamW step on the fp32 shards.
    """

    def __init__(self, model: Decoder, config: "OptimizerSection", total_steps: int):
        self.model, self.config, self.total_steps = model, config, total_steps
        self.params = dict(model.named_parameters())  # the shards: outside of passes a module's own may be gathered
        matrices = [p for p in self.params.values() if p.dim() >= 2]
        vectors = [p for p in self.params.values() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        zero = torch.zeros((), device=matrices[0].device)
        for p in self.params.values():
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": zero.clone(), **moments}
        self.skipped = zero.clone()  # updates in a row, up to now
        self.most_skipped, self.total_skipped = zero, zero  # the longest such row, and all, since `take_skipped`

    def set_lr(self, step: int) -> float:
        """Set and return the learning rate of a step, counted from 1."""
        lr = self.config.lr * _schedule(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def update(
        self, batches: Sequence[PackedBatch], loss_of: Callable[[PackedBatch], tuple[Tensor, Stats]]
    ) -> tuple[list[Stats], Tensor]:
        """One optimizer step on the summed losses of `batches`; returns their stats and the gradient norm (0-d).

        Every rank must have equally many batches: ranks meet in each of their layers. Nothing waits for the device.
        Where the norm is not finite the weights and moments stay as they are.
        """
        collected = []
        for number, batch in enumerate(batches, start=1):
            if isinstance(self.model, FSDPModule):  # with HSDP, copies of the model meet once an update
                self.model.set_requires_all_reduce(number == len(batches))
            loss, stats = loss_of(batch)
            loss.backward()
            collected.append({"loss": loss.detach(), **stats})
        for p in self.params.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.grad_clip, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by the fused kernel, as GradScaler does
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped.add_(1).mul_(found_inf)
        self.most_skipped = torch.maximum(self.most_skipped, self.skipped)
        self.total_skipped = self.total_skipped + found_inf
        return collected, norm

    def take_skipped(self) -> Stats:
        """Skipped updates since the last call, and the longest run of them, as device scalars."""
        taken = {"update/skipped": self.total_skipped, "update/skipped_in_a_row": self.most_skipped}
        self.total_skipped = torch.zeros_like(self.total_skipped)
        self.most_skipped = self.skipped.clone()
        return taken

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the model and the optimizer by name, for saving, and for loading in place."""
        tensors = {
            f"optimizer.{name}.{key}": value
            for name, p in self.params.items()
            for key, value in self.optimizer.state[p].items()
        }
        return {**self.params, **tensors, "skipped": self.skipped}


def packed_loss(model: Decoder, batch: PackedBatch, config: LossConfig, **options: Any) -> tuple[Tensor, Stats]:
    """The loss of a pack with its log-probs; `options` are the other ones of `linear_grpo_loss`."""
    hidden = gather_predictors(model(batch), batch)
    with record_function("loss"):  # by which a profile tells it from the model
        return linear_grpo_loss(
            hidden,
            model.lm_head_weight,
            batch.targets,
            batch.target_cu_seqlens,
            config,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            behavior_logprobs=batch.behavior_logprobs,
            kept=batch.kept,
            **options,
        )


def distillation_advantages(
    batch: PackedBatch,
    rewards: Tensor,  # [num_groups, group_size]
    config: LossConfig,
    coef: float,
) -> tuple[Tensor, Tensor]:  # [num_targets], 0-d
    """What each token is worth, and the KL to the teacher that was sampled, in nats a token.

    A token's advantage is its completion's by the rewards, plus `coef` times the teacher's log-prob less the old one:
    what a sample says of the gradient of KL(policy || teacher), token by token, without those that follow. Sources:
    GKD, Agarwal et al., arXiv 2306.13649; MiniLLM, Gu et al., arXiv 2306.08543; as an advantage
    thinkingmachines.ai/blog/on-policy-distillation.
    """
    assert batch.teacher_logprobs is not None
    assert batch.old_logprobs is not None
    gain = batch.teacher_logprobs - batch.old_logprobs
    of_rewards = group_advantages(rewards, scale=config.advantage_scale).flatten()[batch.sequence_ids]
    lengths = batch.target_cu_seqlens.diff()
    of_tokens = of_rewards.repeat_interleave(lengths, output_size=batch.num_targets)
    return of_tokens + coef * gain, -gain.sum() / max(batch.num_targets, 1)


def _schedule(config: "OptimizerSection", step: int, total_steps: int) -> float:
    """Share of the peak learning rate at `step`, counted from 1."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.lr_end_share + (1 - config.lr_end_share) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
