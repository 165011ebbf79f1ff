"""examples/trl_trainer.py beside TRL's own trainer, setting by setting: loss and gradients of one batch, runs of two
ranks, and what is refused. test_trl_trainer.py runs it in TRL's environment. The last line on stdout is one JSON object
of relative distances.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.distributed as dist
import transformers
import trl
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers

from trl_trainer import FlashGRPOTrainer

VOCAB, PROMPT, COMPLETION, ROWS = 96, 5, 9, 6
NUM_RANKS = 2


class Setting(NamedTuple):
    config: dict[str, Any]  # of GRPOConfig
    given: tuple[str, ...] = ("old_per_token_logps",)  # of what only some batches have
    is_training: bool = True


TOOLS = ("old_per_token_logps", "tool_mask")
VLLM = ("old_per_token_logps", "importance_sampling_ratio")
VLLM_BY_TOKEN = ("old_per_token_logps", "importance_sampling_ratio of tokens")
OPTIONAL = (*TOOLS, *VLLM[1:], VLLM_BY_TOKEN[-1], "sampling_per_token_logps", "advantages of tokens")
SEQUENCE = {"importance_sampling_level": "sequence"}
UNCORRECTED = {"use_bias_correction_kl": False}
GRID = {
    "defaults": Setting({}),
    "on-policy": Setting({}, ()),
    "evaluation": Setting({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, is_training=False),
    "grpo": Setting({"loss_type": "grpo"}),
    "bnpo": Setting({"loss_type": "bnpo"}),
    "dr_grpo": Setting({"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "cispo": Setting({"loss_type": "cispo", "epsilon_high": 1.5}),
    "luspo": Setting({"loss_type": "luspo", **SEQUENCE}),
    "gspo": Setting({"loss_type": "grpo", "epsilon": 0.05, **SEQUENCE}),
    "gspo, on-policy": Setting({"loss_type": "grpo", **SEQUENCE}, ()),
    "sequence ratios": Setting({"epsilon": 0.05, **SEQUENCE}),
    "cispo, sequence ratios": Setting({"loss_type": "cispo", "epsilon_high": 1.05, **SEQUENCE}),
    "clip higher": Setting({"epsilon": 0.1, "epsilon_high": 0.28}),
    "two-sided clip": Setting({"delta": 1.5}),
    "kl": Setting({"beta": 0.5, **UNCORRECTED}),
    "grpo, kl": Setting({"loss_type": "grpo", "beta": 0.5, **UNCORRECTED}),
    "kl, unbiased": Setting({"beta": 0.5}),
    "grpo, kl, unbiased, on-policy": Setting({"loss_type": "grpo", "beta": 0.5}, ()),
    "tools": Setting({}, TOOLS),
    "grpo, tools": Setting({"loss_type": "grpo"}, TOOLS),
    "accumulation": Setting({"gradient_accumulation_steps": 3}),
    "grpo, accumulation": Setting({"loss_type": "grpo", "gradient_accumulation_steps": 3}),
    "several updates a rollout": Setting({"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    "sapo": Setting({"loss_type": "sapo"}),
    "sapo, sequence ratios": Setting({"loss_type": "sapo", "sapo_temperature_neg": 2.0, **SEQUENCE}),
    "two-sided clip below": Setting({"delta": 1.05}),
    "high entropy": Setting({"top_entropy_quantile": 0.4}),
    "grpo, high entropy, kl": Setting({"loss_type": "grpo", "top_entropy_quantile": 0.4, "beta": 0.5}, TOOLS),
    "off-policy mask": Setting({"off_policy_mask_threshold": 0.05}),
    "off-policy mask, vllm": Setting({"off_policy_mask_threshold": 0.05}, (*VLLM, "sampling_per_token_logps")),
    "gspo, off-policy mask": Setting({"loss_type": "grpo", "off_policy_mask_threshold": 0.05, **SEQUENCE}),
    "advantages of tokens": Setting({}, ("old_per_token_logps", "advantages of tokens")),
    "temperature": Setting({"temperature": 0.7}),
    "vllm": Setting({}, VLLM),
    "grpo, vllm": Setting({"loss_type": "grpo"}, VLLM),
    "gspo, vllm": Setting({"loss_type": "grpo", **SEQUENCE}, VLLM),
    "vllm by token": Setting({}, VLLM_BY_TOKEN),
    "grpo, vllm by token": Setting({"loss_type": "grpo"}, VLLM_BY_TOKEN),
    "autocast": Setting({"bf16": True}),
}
# Whole runs of two ranks, with plain SGD, whose steps are as near to each other as its gradients.
RUNS = {
    "a rollout twice": {
        "num_iterations": 2,
        "epsilon": 1e-3,
        "temperature": 0.7,
        "gradient_accumulation_steps": 2,
        "beta": 0.5,
    },
    "sequence ratios": {"loss_type": "grpo", "steps_per_generation": 4, "gradient_accumulation_steps": 2, **SEQUENCE},
    "adapter": {"num_iterations": 2, "beta": 0.5, **UNCORRECTED, "peft_config": LoraConfig(target_modules=["q_proj"])},
}
REFUSED = {
    "vespo": {"loss_type": "vespo"},
    "entropy bonus": {"entropy_coef": 0.01},
}


def save_tiny_model(folder: str) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    tokenizer.save_pretrained(folder)


def batch() -> dict[str, torch.Tensor]:
    """As TRL makes it of a rollout: prompts end where completions begin. One completion consists of what a tool said.
    Log-probs lie around the model's own, so that some ratios are clipped.
    """
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(2, VOCAB, (ROWS, length), generator=generator)

    def logprobs() -> torch.Tensor:
        of_rows, of_tokens = (torch.randn(ROWS, n, generator=generator) for n in (1, COMPLETION))
        return 0.1 * of_rows + 0.3 * of_tokens - torch.tensor(float(VOCAB)).log()

    columns = torch.arange(COMPLETION)
    tool_mask = ((columns < 2) | (columns > 3)).repeat(ROWS, 1)
    tool_mask[2] = False
    return {
        "prompt_ids": ids(PROMPT),
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([0, 0, 0, 3, 3, 3])[:, None]).long(),
        "completion_ids": ids(COMPLETION),
        "completion_mask": (columns < torch.tensor([9, 4, 1, 7, 6, 9])[:, None]).long(),
        "advantages": torch.randn(ROWS, generator=generator),
        "advantages of tokens": torch.randn(ROWS, COMPLETION, generator=generator),
        "num_items_in_batch": torch.tensor(171.0),
        "ref_per_token_logps": logprobs(),
        "old_per_token_logps": logprobs(),
        "sampling_per_token_logps": logprobs(),
        "importance_sampling_ratio": torch.tensor([1.2, 0.0, 0.8, 1.0, 2.5, 0.4])[:, None],
        "importance_sampling_ratio of tokens": logprobs().exp() * VOCAB,
        "tool_mask": tool_mask.long(),
    }


def even_words(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]


def trainer_of(kind: type, folder: str, **config: Any) -> Any:
    torch.manual_seed(0)  # of an adapter's weights
    peft_config = config.pop("peft_config", None)
    config = {"bf16": False, "num_generations": 2, "per_device_train_batch_size": ROWS, **config}
    return kind(
        model=folder,
        peft_config=peft_config,
        reward_funcs=even_words,
        args=trl.GRPOConfig(
            f"{folder}/runs", use_cpu=True, gradient_checkpointing=False, max_completion_length=COMPLETION,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
            **config,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(3, 35)]}),
    )  # fmt: skip


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def loss_and_gradients(kind: type, folder: str, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    trainer = trainer_of(kind, folder, **setting.config)
    trainer.use_vllm = {VLLM[-1], VLLM_BY_TOKEN[-1]} & {*setting.given}
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train(setting.is_training)
    inputs = batch()
    for name in OPTIONAL:
        given = inputs.pop(name)
        if name in setting.given:
            inputs[name.removesuffix(" of tokens")] = given
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def train(kind: type, folder: str, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The movement of the weights, and what both log, as means over the run."""
    config = {
        "max_steps": 4,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "ddp_backend": "gloo",
        **config,
    }
    trainer = trainer_of(kind, folder, **config)
    start = weights(trainer.model)
    trainer.train()
    rows = trainer.state.log_history[:-1]  # the last one is of the whole run
    keys = ["entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "loss", "grad_norm"]
    if trainer.beta and not trainer.args.use_bias_correction_kl:  # TRL logs what it adds to the loss
        keys.append("kl")
    return weights(trainer.model) - start, torch.tensor([[float(row[key]) for key in keys] for row in rows]).mean(0)


def largest_part(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of sums whose terms are of both signs and about 1."""
    return float(((found - wanted).abs() / wanted.abs().clamp(min=0.1)).max())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def compare_runs(rank: int, folder: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # accelerate wants them; the ranks meet by a file
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=NUM_RANKS)
    runs = {}
    for name, config in RUNS.items():
        ours, theirs = (train(kind, folder, config) for kind in (FlashGRPOTrainer, trl.GRPOTrainer))
        runs[name] = [distance(ours[0], theirs[0]), largest_part(ours[1], theirs[1])]
    if rank == 0:
        Path(folder, "runs.json").write_text(json.dumps(runs))
    dist.destroy_process_group()


def run(folder: str) -> dict[str, Any]:
    save_tiny_model(folder)
    # Forked from here, where nothing has begun to run yet, ranks have imported all.
    torch.multiprocessing.start_processes(compare_runs, (folder,), nprocs=NUM_RANKS, start_method="fork")
    runs = json.loads(Path(folder, "runs.json").read_text())
    grid = {}
    for name, setting in GRID.items():
        ours, theirs = (loss_and_gradients(kind, folder, setting) for kind in (FlashGRPOTrainer, trl.GRPOTrainer))
        grid[name] = [largest_part(ours[0], theirs[0]), distance(ours[1], theirs[1])]
        print(name, grid[name], flush=True)
    refused = {}
    for name, config in REFUSED.items():
        try:
            trainer_of(FlashGRPOTrainer, folder, **config)
        except ValueError as error:
            refused[name] = str(error)
    return {"grid": grid, "runs": runs, "refused": refused}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
