"""The numbers of a step. Names are those of metrics.jsonl and TensorBoard; lengths and counts are in tokens."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flashgrpo.grpo.learn.balance import PackPlan
from flashgrpo.grpo.learn.learner import Learner, Stats
from flashgrpo.grpo.learn.packing import centred, has_signal
from flashgrpo.grpo.run.machines import peak_flops
from flashgrpo.grpo.run.progress import Clock, peak_memory_mb
from flashgrpo.grpo.run.world import World
from flashgrpo.grpo.types import StepData, given_scores
from flashgrpo.kernels.grpo_loss import LossConfig, group_advantages, merge_stats

_NAMES = {
    "entropy": "entropy",
    "ratio_mean": "ratio/mean",
    "ratio_max": "ratio/max",
    "clip_low_fraction": "clip/low",
    "clip_high_fraction": "clip/high",
    "live_fraction": "live",
    "kl": "kl",
    "teacher_kl": "teacher/kl",
    "behavior_mismatch_mean": "mismatch/mean",
    "behavior_mismatch_max": "mismatch/max",
}
NOT_REWARDS = {f"reward/{name}" for name in ("mean", "std", "group_std", "missing")}  # of the keys reward/*
# What the terminal tells after the rewards: a key, its word and its format.
_TOLD = (
    ("eval/pass@1", "held-out", ".3f"),
    ("length/mean", "length", ".0f"),
    ("length/truncated", "truncated", ".1%"),
    ("entropy", "entropy", ".2f"),
    ("kl", "KL", ".2g"),
    ("teacher/kl", "KL to the teacher", ".3f"),
    ("clip/low", "clipped low", ".2%"),
    ("clip/high", "high", ".2%"),
    ("grad_norm", "gradient", ".2g"),
    ("mismatch/mean", "mismatch", ".1g"),
)
PHASES = ("generate", "reward", "pack", "score", "train", "sync")


def device_metrics(stats: list[Stats], norms: list[Tensor], learner: Learner, world: World) -> dict[str, float]:
    """Loss, ratios, KL, entropy, gradient norm over the step's micro-batches and all ranks; waits for the device, once.

    Means are over the tokens that were trained on, which those of dead groups are not; `loss` and `grad_norm` are means
    over updates.
    """
    loss = torch.zeros_like(norms[0])
    scalars: list[Stats] = []
    for micro_batch in stats:
        loss = loss + micro_batch["loss"]
        scalars.append({k: v for k, v in micro_batch.items() if k in _NAMES or k == "num_tokens"})
    own = {"loss": loss / len(norms), **(merge_stats(scalars) if scalars else {})}  # empty on all ranks, or on none
    gathered = world.gather_tensor(torch.stack([value.float() for value in own.values()]))
    tensors = {"loss": gathered[:, 0].sum(), "grad_norm": torch.stack(norms).mean(), **learner.take_skipped()}
    if scalars:
        # Each rank's numbers are merged as those of its micro-batches were.
        names = [name for name in own if name != "loss"]
        ranks = [dict(zip(names, row[1:], strict=True)) for row in gathered]
        merged = merge_stats(ranks)
        tensors |= {name: merged[key] for key, name in _NAMES.items() if key in merged}
    # The one wait for the device in a step.
    values = torch.stack([value.float() for value in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def rollout_metrics(
    data: StepData,
    config: LossConfig,
    functions: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Rewards, by function and source, advantages and lengths over the completions of the step; advantages are those of
    the loss, but for what a teacher adds.
    """
    rollouts, rewards = data.rollouts, data.rewards
    lengths = np.array([len(rollout.completion_ids) for rollout in rollouts])
    num_tokens = max(int(lengths.sum()), 1)
    age = 0  # of all tokens, in versions of the weights
    for rollout in rollouts:
        age += sum((data.version - version) * tokens for version, tokens in rollout.weight_versions)
    deviations = [np.nanstd(row, ddof=1) for row in rewards[has_signal(rewards)]]
    advantages = group_advantages(centred(rewards, config), scale=config.advantage_scale).numpy()
    metrics = {
        "reward/mean": _over_known(np.mean, rewards),
        "reward/std": _over_known(np.std, rewards),
    }
    scores = [group.scores for group in data.groups]
    for name in functions:
        if given := given_scores(scores, name):
            metrics[f"reward/{name}"] = _over_known(np.mean, np.array(given))
    counts = [rollout.kept_counts for rollout in rollouts if rollout.kept_counts is not None]
    if counts:
        sizes = np.concatenate(counts)
        metrics["kept/mean"] = float(sizes.sum() / max(np.count_nonzero(sizes), 1))
        metrics["kept/whole"] = float(np.mean(sizes == 0))
    for name in sources:
        rows = [i for i, group in enumerate(data.groups) if group.source == name]
        metrics[f"source/{name}/reward"] = _over_known(np.mean, rewards[rows])
        metrics[f"source/{name}/share"] = len(rows) / len(rewards)
    return metrics | {
        "reward/missing": float(np.isnan(rewards).mean()),
        "reward/group_std": float(np.mean(deviations)) if deviations else 0.0,
        "advantage/abs_mean": _over_known(np.mean, np.abs(advantages)),
        "advantage/max": _over_known(np.max, advantages),
        "groups/dead": 1 - len(deviations) / len(rewards),
        "groups/discarded": float(data.discarded),
        "staleness/mean": age / num_tokens,
        "staleness/max": float(data.version - data.oldest_version),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/min": float(lengths.min()),
        "length/truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "reflection/per_1000_tokens": 1000 * sum(rollout.reflections for rollout in rollouts) / num_tokens,
        "prompt_length/mean": float(np.mean([len(group.rollouts[0].prompt_ids) for group in data.groups])),
    }


def speed_metrics(data: StepData, clock: Clock, plans: Sequence[PackPlan], world: World) -> dict[str, float]:
    """Seconds by phase, and rates: sampled tokens a second of the whole step and, where it did not begin before, of the
    phase that samples; trained tokens a second of the training phase, and its model FLOPs a second and rank, which
    count attention exactly and recomputation not at all; `mfu` is their share of the GPU's dense bf16 peak, where that
    is known.

    `idle` is the share of the step that the ranks, on average, wait for the slowest: measured for the rollout, for the
    training phase by the FLOPs of each rank's micro-batches, in which ranks move in lockstep.
    """
    sampled = sum(len(rollout.completion_ids) for rollout in data.rollouts)
    trained = sum(group.num_tokens for plan in plans for rank in plan.packs for pack in rank for group in pack)
    flops = 3 * sum(float(plan.costs.sum()) for plan in plans)
    lockstep = 3 * world.size * sum(float(plan.costs.max(axis=0).sum()) for plan in plans)
    seconds = {f"time/{phase}_s": clock.seconds[phase] for phase in PHASES}
    generate_s, train_s = clock.seconds["generate"], max(clock.seconds["train"], 1e-9)
    rate = flops / train_s / world.size
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    return (
        seconds
        | ({"mfu": rate / peak} if peak else {})
        | ({"tokens_per_s/sampled": sampled / generate_s} if generate_s and not data.is_stale else {})
        | {
            "time/step_s": clock.total_s,
            "tokens_per_s": sampled / clock.total_s,
            "tokens_per_s/gpu": sampled / clock.total_s / world.size,
            "tokens_per_s/trained": trained / train_s,
            "tflops": rate / 1e12,
            "idle": (clock.idle_s + train_s * (1 - flops / max(lockstep, 1.0))) / clock.total_s,
            "memory/peak_mb": peak_memory_mb(world.device),
        }
    )


def one_line(metrics: dict[str, float]) -> str:
    """The progress bar's text: what tells whether a run learns, then what tells why it does not."""
    parts = [f"reward {metrics['reward/mean']:.3f}"]
    for key, value in metrics.items():
        if key.startswith("reward/") and key not in NOT_REWARDS:
            parts.append(f"{key.removeprefix('reward/')} {value:.3f}")
    for key, word, form in _TOLD:
        if key in metrics:
            parts.append(f"{word} {metrics[key]:{form}}")
    rates = f"{metrics['tokens_per_s/trained']:,.0f} training"
    if "tokens_per_s/sampled" in metrics:
        rates = f"{metrics['tokens_per_s/sampled']:,.0f} sampling, {rates}"
    return ", ".join([*parts, f"{metrics['tokens_per_s']:,.0f} tokens/s ({rates})"])


def _over_known(statistic: Callable[[np.ndarray], np.floating], values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(statistic(known)) if known.size else float("nan")
