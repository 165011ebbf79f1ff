"""The peer of `cpu_step.py`: one GRPO step of TRL's GRPOTrainer on CPU.

    python bench/peer_trl.py '{"model": FOLDER, "prompts": JSONL, "num_prompts": 8, "group_size": 8,
        "max_new_tokens": 64, "micro_batch": 64, "steps": 5, "threads": 2}'

Runs in an environment of its own (`make .venv-trl/.done`) and needs nothing of flashgrpo.
Everything is fp32. A step is one rollout, its rewards, one optimizer update and its log line; no
KL, no reference model, no old log-probs. TRL's defaults that would slow it down here are off: bf16
autocast and gradient checkpointing. Every completion has exactly `max_new_tokens` tokens, since
`min_new_tokens` bars the end-of-sequence token; the run fails if one came out shorter. The last
line on stdout is one JSON object; times are seconds, memory is in units of 10^6 bytes.
"""

import importlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

WARMUP_STEPS = 2


def even_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of a completion's words that end in an even digit: cheap, and hardly ever equal throughout a group."""
    shares = []
    for completion in completions:
        last_digits = [word[-1] for word in completion.split()]
        shares.append(sum(map(last_digits.count, "02468")) / max(len(last_digits), 1))
    return shares


class StepClock(TrainerCallback):
    """Notes the time after every update; between two notes lie a rollout, its rewards, an update and a log line."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    on_train_begin = on_step_end

    def step_seconds(self) -> list[float]:
        return [end - begin for begin, end in itertools.pairwise(self.times)]


def peak_mb() -> float:
    """Largest resident memory of this process so far; `getrusage` would count what its parent held before the exec."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6


def grpo_config(trl: Any, settings: SimpleNamespace, output: str) -> Any:
    """TRL's settings for the step described above; what is not named keeps its default."""
    num_completions = settings.num_prompts * settings.group_size
    return trl.GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=num_completions // settings.micro_batch,
        num_generations=settings.group_size,
        max_completion_length=settings.max_new_tokens,
        generation_kwargs={"min_new_tokens": settings.max_new_tokens},
        temperature=1.0,
        loss_type="grpo",
        beta=0.0,
        num_iterations=1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=settings.steps,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def time_steps(settings: SimpleNamespace) -> dict[str, Any]:
    """Train for `steps` steps; report all but the warm-up."""
    # It is not installed where flashgrpo is, so a type checker cannot see it.
    trl = importlib.import_module("trl")
    prompts = [json.loads(line)["prompt"] for line in Path(settings.prompts).read_text().splitlines()]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
            reward_funcs=even_words,
            args=grpo_config(trl, settings, output),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(settings.model, padding_side="left"),
            callbacks=[clock],
        )
        trainer.train()
    # A completion that ends early is less work than the table says.
    shortest = min(row["completions/min_length"] for row in trainer.state.log_history if "reward" in row)
    if shortest != settings.max_new_tokens:
        raise RuntimeError(f"a completion has {shortest} tokens, all must have {settings.max_new_tokens}")
    return {"peer": f"trl {trl.__version__}", "step_s": clock.step_seconds()[WARMUP_STEPS:], "peak_mb": peak_mb()}


def read_settings() -> SimpleNamespace:
    """What both sides are called with: one JSON object. Sets the number of threads."""
    settings = SimpleNamespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    return settings


if __name__ == "__main__":
    print(json.dumps(time_steps(read_settings())))
