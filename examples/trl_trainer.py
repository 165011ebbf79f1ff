"""TRL's GRPOTrainer with flashgrpo's loss: gradients of the LM head are made in its forward pass, a chunk of logits at
a time.

    from trl import GRPOConfig
    from trl_trainer import FlashGRPOTrainer  # this file, copied or on PYTHONPATH

    FlashGRPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=reward, train_dataset=dataset, args=GRPOConfig(...)).train()

GRPOConfig keeps its meaning; what this loss does not have is refused by name when the trainer is made. Old and
reference log-probs come from the same head as the loss, so that no ratio shows the difference of two implementations.
Made for trl 1.16, whose loss and gradients it has in every setting of tests/examples/trl_grid.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

from flashgrpo.kernels.grpo_loss import LossConfig, denominator_of, pack_padded
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs
from flashgrpo.kernels.loss_config import Aggregate

AGGREGATES: dict[str, Aggregate] = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "constant",
    "luspo": "constant",
}
METRICS = {  # as the loss and as TRL's log call them
    "entropy": "entropy",
    "kl": "kl",
    "clip_low_fraction": "clip_ratio/low_mean",
    "clip_high_fraction": "clip_ratio/high_mean",
}
# Keys of a model's config by which its logits are not hidden @ weight^T alone; 1 or None: they are.
SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def add_head(model: Any) -> None:
    """Makes `model(..., head=f)` return f(hidden states, weight of the LM head).

    f runs within the model's forward, where DDP, FSDP and autocast look after it.
    """
    forward = model.forward

    @functools.wraps(forward)
    def forward_or_head(*args: Any, head: Callable[[Tensor, Tensor], Any] | None = None, **inputs: Any) -> Any:
        if head is None:
            return forward(*args, **inputs)
        hidden = model.base_model(*args, use_cache=False, **inputs).last_hidden_state
        return head(hidden, model.get_output_embeddings().weight)

    model.forward = forward_or_head


class FlashGRPOTrainer(GRPOTrainer):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.loss_config = self._loss_config()
        for model in (self.model, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                add_head(model.get_base_model() if hasattr(model, "get_base_model") else model)  # below PEFT's adapters

    def _loss_config(self) -> LossConfig:
        """TRL's settings as those of the loss. Raises ValueError for what it lacks."""
        settings, model = self.args, self.model
        text_config = model.config.get_text_config()
        by_sequence = settings.importance_sampling_level == "sequence"
        unbiased_kl = settings.beta != 0 and settings.use_bias_correction_kl
        by_entropy = settings.top_entropy_quantile < 1
        by_token = settings.use_vllm and settings.vllm_importance_sampling_mode.startswith("token")
        lacking = {
            f"loss_type={settings.loss_type!r}": settings.loss_type not in AGGREGATES,
            "use_bias_correction_kl with ratios of sequences": by_sequence and unbiased_kl,
            "weights of tokens with ratios of sequences": by_sequence and (by_entropy or by_token),
            "top_entropy_quantile over several ranks": by_entropy and self.accelerator.num_processes > 1,
            "an entropy bonus": settings.entropy_coef != 0 or settings.use_adaptive_entropy,
            "cast_lm_head_to_fp32": settings.cast_lm_head_to_fp32,
            "router_aux_loss_coef": self.aux_loss_enabled,
            "an LM head with a bias": model.get_output_embeddings().bias is not None,
            "scaled or capped logits": any(getattr(text_config, key, None) not in (None, 1) for key in SCALES),
        }
        if found := [name for name, is_found in lacking.items() if is_found]:
            raise ValueError(f"flashgrpo's loss does not have {', '.join(found)}; use TRL's GRPOTrainer for it")
        objective = settings.loss_type if settings.loss_type in ("cispo", "sapo") else "clip"
        return LossConfig(
            ratio_level=settings.importance_sampling_level,
            objective=objective,
            clip_low=self.epsilon_low,
            # TRL's bound of cispo is on the ratio itself.
            clip_high=self.epsilon_high - 1 if objective == "cispo" else self.epsilon_high,
            clip_max=settings.delta if objective == "clip" else None,
            tau_pos=settings.sapo_temperature_pos,
            tau_neg=settings.sapo_temperature_neg,
            top_entropy=settings.top_entropy_quantile,
            off_policy_threshold=settings.off_policy_mask_threshold,
            kl_coef=self.beta,
            kl_weight="ratio" if unbiased_kl else "none",
            aggregate=AGGREGATES[settings.loss_type],
        )

    def _denominator(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        is_training, loss_type = self.model.training, self.args.loss_type
        micro_batches = self.current_gradient_accumulation_steps if is_training else 1
        update_tokens = None
        if loss_type in ("dapo", "cispo"):  # TRL counts the tokens of a rollout, of which an update has a part
            updates = self.args.steps_per_generation / micro_batches if is_training else 1
            update_tokens = inputs["num_items_in_batch"] / updates / self.accelerator.num_processes
        return denominator_of(
            self.loss_config,
            mask,
            max_length=1 if loss_type == "luspo" else self.max_completion_length,
            micro_batches=micro_batches,
            update_tokens=update_tokens,
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if inputs.get("pixel_values") is not None:
            raise ValueError("a batch has pixel_values; FlashGRPOTrainer is for text alone")
        targets = inputs["completion_ids"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        rows, target_cu_seqlens = pack_padded(mask)

        def packed(name: str) -> Tensor | None:
            padded = inputs.get(name)
            return None if padded is None else padded.flatten()[rows]

        # Of a completion or a token, and so are TRL's weights against the sampler's mismatch.
        advantages = inputs["advantages"].reshape(len(mask), -1) * inputs.get("importance_sampling_ratio", 1)

        def head(hidden: Tensor, lm_head_weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return linear_grpo_loss(
                predictors(hidden, targets)[rows],
                lm_head_weight,
                targets.flatten()[rows],
                target_cu_seqlens,
                self.loss_config,
                denominator=self._denominator(inputs, mask),
                token_advantages=advantages.expand_as(mask).flatten()[rows],
                old_logprobs=packed("old_per_token_logps"),
                ref_logprobs=packed("ref_per_token_logps"),
                behavior_logprobs=packed("sampling_per_token_logps"),
                temperature=self.temperature,
            )

        input_ids = torch.cat([inputs["prompt_ids"], targets], 1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        loss, stats = model(input_ids=input_ids, attention_mask=attention_mask, head=head)
        found = [name for name in METRICS if name in stats]
        sums = torch.stack([torch.ones_like(loss), *(stats[name] for name in found)]) * stats["num_tokens"]
        num_tokens, *sums = self.accelerator.reduce(sums.detach(), reduction="sum").tolist()
        log = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(found, sums, strict=True):
            log[METRICS[name]].append(total / max(num_tokens, 1.0))
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, None]:  # fmt: skip
        """Old and reference log-probs [num_completions, logits_to_keep]; those of padding count for nothing."""
        found = []
        for ids, mask in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
            targets = ids[:, -logits_to_keep:]

            def head(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor = targets) -> Tensor:
                rows = predictors(hidden, targets)
                return linear_logprobs(
                    rows, lm_head_weight, targets.flatten(), temperature=self.temperature, entropy=False
                )[0]

            with self.accelerator.autocast():
                found.append(model(input_ids=ids, attention_mask=mask, head=head).view_as(targets))
        return torch.cat(found), None, None


def predictors(
    hidden: Tensor,  # [num_completions, prompt + completion, hidden_size]
    targets: Tensor,  # [num_completions, completion]
) -> Tensor:  # [num_completions * completion, hidden_size]
    """The hidden states that predict the tokens of the completions."""
    return hidden[:, -targets.shape[1] - 1 : -1].flatten(0, 1)
