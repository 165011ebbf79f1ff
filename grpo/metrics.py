"""The numbers of a step. Names are those of metrics.jsonl and TensorBoard; lengths and counts are in tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashgrpo.grpo.learner import Learner, Stats
from flashgrpo.grpo.packing import is_dead
from flashgrpo.grpo.progress import Clock, peak_memory_mb
from flashgrpo.grpo.reward_pool import RewardTable
from flashgrpo.grpo.rollout import Rollout
from flashgrpo.kernels.grpo_loss import merge_stats

_NAMES = {
    "entropy": "entropy",
    "ratio_mean": "ratio/mean",
    "ratio_max": "ratio/max",
    "clip_low_fraction": "clip/low",
    "clip_high_fraction": "clip/high",
    "live_fraction": "live",
    "kl": "kl",
    "behavior_mismatch_mean": "mismatch/mean",
    "behavior_mismatch_max": "mismatch/max",
}
_PHASES = ("generate", "reward", "pack", "score", "train", "sync")


@dataclass(frozen=True)
class StepData:
    """What one rollout gave: row i of the table is group i. `position` counts the prompts consumed by its end."""

    rollouts: list[list[Rollout]]
    table: RewardTable
    position: int


def device_metrics(stats: list[list[Stats]], norms: list[Tensor], learner: Learner) -> dict[str, float]:
    """Loss, ratios, KL, entropy, gradient norm over the step's updates; waits for the device, once.

    Means are over the tokens that were trained on, which those of dead groups are not; `loss` and `grad_norm` are means
    over updates.
    """
    losses = [sum((s["loss"] for s in update), torch.zeros_like(norms[0])) for update in stats]
    tensors = {
        "loss": torch.stack(losses).mean(),
        "grad_norm": torch.stack(norms).mean(),
        **learner.take_skipped(),
    }
    every = [s for update in stats for s in update]
    if every:
        merged = merge_stats(every)
        tensors |= {name: merged[key] for key, name in _NAMES.items() if key in merged}
    values = torch.stack([value.float() for value in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def rollout_metrics(data: StepData) -> dict[str, float]:
    """Rewards, advantages and lengths over every completion that was sampled."""
    lengths = np.array([[len(r.completion_ids) for r in group] for group in data.rollouts])
    truncated = np.array([[r.finish_reason == "length" for r in group] for group in data.rollouts])
    rewards = data.table.rewards
    known = rewards[~np.isnan(rewards)]
    deviations = [np.nanstd(row, ddof=1) for row in rewards if not is_dead(row)]
    return {
        "reward/mean": float(known.mean()) if known.size else float("nan"),
        "reward/std": float(known.std()) if known.size else float("nan"),
        **{f"reward/{name}": _mean(scores) for name, scores in data.table.scores.items()},
        "reward/missing": float(np.isnan(rewards).mean()),
        "advantage/group_std": float(np.mean(deviations)) if deviations else 0.0,
        "groups/dead": float(np.mean([is_dead(row) for row in rewards])),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/min": float(lengths.min()),
        "length/truncated": float(truncated.mean()),
        "prompt_length/mean": float(np.mean([len(group[0].prompt_ids) for group in data.rollouts])),
    }


def speed_metrics(data: StepData, clock: Clock, trained_tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds by phase, sampled tokens a second of the whole step, trained tokens a second of the training phase."""
    sampled = sum(len(rollout.completion_ids) for group in data.rollouts for rollout in group)
    seconds = {f"time/{phase}_s": clock.seconds[phase] for phase in _PHASES}
    return seconds | {
        "time/step_s": clock.total_s,
        "tokens_per_s": sampled / clock.total_s,
        "tokens_per_s/trained": trained_tokens / max(clock.seconds["train"], 1e-9),
        "memory/peak_mb": peak_memory_mb(device),
    }


def one_line(metrics: dict[str, float]) -> str:
    """The progress bar's text."""
    parts = [f"reward {metrics['reward/mean']:.3f}"]
    if "reward/accuracy" in metrics:
        parts.append(f"accuracy {metrics['reward/accuracy']:.3f}")
    if "eval/pass@1" in metrics:
        parts.append(f"held-out {metrics['eval/pass@1']:.3f}")
    return ", ".join([*parts, f"length {metrics['length/mean']:.0f}", f"{metrics['tokens_per_s']:,.0f} tokens/s"])


def _mean(scores: np.ndarray) -> float:
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else float("nan")
