"""One GRPO step on CPU against TRL's GRPOTrainer: same weights, prompts, lengths and rewards, fp32, no KL.

    make .venv-trl/.done
    flashgrpo bench cpu-step

A step is one rollout of 8 prompts x 8 completions of 64 tokens each, their rewards, one optimizer update and its log
line. Both sides run as processes of their own with 2 threads, in turns, so that a slow spell of the machine meets both.
TRL runs with all completions in one backward pass, as ours does, and with fewer, which is as fast or faster and needs
less memory. The machine should be idle: on 2 busy cores a step takes up to ten times as long, by chance.
Prints the README's table and writes every run to bench/results/cpu_step.json. Times are seconds, memory is in units of
10^6 bytes.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flashgrpo.bench.report import cpu_step_table
from flashgrpo.bench.timing import ROOT, machine, option_parser, results_folder
from flashgrpo.model.files import write_text

PEER_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
THREADS = 2
SIZES = {"num_prompts": 8, "group_size": 8, "max_new_tokens": 64}  # of a step
STEPS = 5  # of a run; the first two are not timed
ROUNDS = 2
PROMPT_LENGTHS = (64, 256)
PEER_MICRO_BATCHES = (64, 8)
OURS = "flashgrpo"


@dataclass(frozen=True)
class Inputs:
    """What both sides read."""

    model: Path  # Hugging Face folder: config, weights, tokenizer
    prompts: Path  # JSONL with a `prompt` column


def make_inputs(folder: Path, prompt_len: int, *, num_prompts: int = 64, num_words: int = 61, seed: int = 0) -> Inputs:
    """Write a random Qwen3 of 4.7M parameters, its word-level tokenizer, and prompts of exactly `prompt_len` tokens.

    Neighbouring words are never merged, so both sides read a prompt of `prompt_len` words as that many tokens. The
    vocabulary is small in TRL's favour: on CPU its LM head runs on the prompts' positions too.
    """
    words = [f"w{number}" for number in range(num_words)]
    vocabulary = {token: row for row, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=vocabulary["<pad>"],
        eos_token_id=vocabulary["<eos>"],
    )
    inputs = Inputs(model=folder / "model", prompts=folder / "prompts.jsonl")
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(inputs.model)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(inputs.model)
    rng = random.Random(seed)
    rows = [{"prompt": " ".join(rng.choices(words, k=prompt_len))} for _ in range(num_prompts)]
    inputs.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return inputs


def run_process(command: list[str]) -> dict[str, Any]:
    """Run one side to its end; the last line of its stdout is the JSON object that it reports."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def flags(inputs: Inputs) -> list[str]:
    """What both sides are called with."""
    values = {"model": inputs.model, "prompts": inputs.prompts, "steps": STEPS, "threads": THREADS}
    return [f"--{name.replace('_', '-')}={value}" for name, value in (values | SIZES).items()]


def run_peer(inputs: Inputs, micro_batch: int) -> dict[str, Any]:
    """TRL's step in its own environment. Raises FileNotFoundError if that has not been made."""
    if not PEER_PYTHON.exists():
        raise FileNotFoundError(f"{PEER_PYTHON} does not exist; make TRL's environment with `make .venv-trl/.done`")
    return run_process([str(PEER_PYTHON), "bench/peer_trl.py", f"--micro-batch={micro_batch}", *flags(inputs)])


def run_ours(inputs: Inputs) -> dict[str, Any]:
    """Our side, in a process of its own."""
    return run_process([sys.executable, "-m", "flashgrpo.bench.own_step", *flags(inputs)])


def measure(prompt_len: int, inputs: Inputs, progress: Progress) -> list[dict[str, Any]]:
    """Every contender in turn, `ROUNDS` times over; one row a run, with the load average it started under."""
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"TRL, micro-batch {size}": partial(run_peer, inputs, size) for size in PEER_MICRO_BATCHES},
        OURS: partial(run_ours, inputs),
    }
    task = progress.add_task(f"prompts of {prompt_len} tokens", total=ROUNDS * len(contenders))
    runs = []
    for round_number in range(ROUNDS):
        for name, run in contenders.items():
            row = {"name": name, "round": round_number, "load_average": os.getloadavg()[0], "prompt_len": prompt_len}
            runs.append(row | SIZES | {"steps": STEPS} | run())
            progress.advance(task)
    return runs


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a contender and prompt length: median step, largest peak, and both as multiples of ours."""
    grouped: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["prompt_len"], run["name"]), []).append(run)
    rows = {
        (prompt_len, name): {
            "prompt_len": prompt_len,
            "name": name,
            "median_step_s": statistics.median(second for run in same for second in run["step_s"]),
            "peak_mb": max(run["peak_mb"] for run in same),
        }
        for (prompt_len, name), same in grouped.items()
    }
    for (prompt_len, _), row in rows.items():
        ours = rows[prompt_len, OURS]
        row["step_ratio"] = row["median_step_s"] / ours["median_step_s"]
        row["peak_ratio"] = row["peak_mb"] / ours["peak_mb"]
    return list(rows.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything once, write it, print it."""
    option_parser("cpu-step", __doc__).parse_args(arguments)
    runs = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        inputs = {length: make_inputs(Path(folder) / str(length), length) for length in PROMPT_LENGTHS}
        for prompt_len in PROMPT_LENGTHS:
            runs += measure(prompt_len, inputs[prompt_len], progress)
    summary = summarize(runs)
    results = {
        "machine": machine(torch.device("cpu")),
        "threads": THREADS,
        "summary": summary,
        "runs": runs,
    }
    write_text(results_folder() / "cpu_step.json", json.dumps(results, indent=1) + "\n")
    print(*cpu_step_table(results), sep="\n")
    busiest = max(run["load_average"] for run in runs)
    print(f"load average before a run: up to {busiest:.1f}, about {THREADS} if idle otherwise")
    return 0


if __name__ == "__main__":
    sys.exit(main())
