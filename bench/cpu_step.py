"""One GRPO step on CPU against TRL's GRPOTrainer: same weights, prompts, lengths and rewards, fp32, no KL.

    make .venv-trl/.done
    flashgrpo bench cpu-step

A step is one rollout of 8 prompts x 8 completions of 64 tokens each, their rewards, one optimizer
update and its log line. Both sides run as processes of their own with 2 threads, in turns, so that
a slow spell of the machine meets both. TRL runs with all completions in one backward pass, as ours
does, and with fewer, which is as fast or faster and needs less memory. The machine should be idle:
on 2 busy cores a step takes up to ten times as long, by chance. Prints the README's table and
writes every run to bench/results/cpu_step.json. Times are seconds, memory is in units of 10^6
bytes.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flashgrpo.bench.timing import ROOT, Row, machine, markdown, option_parser, publish
from flashgrpo.grpo.run.progress import console

PEER_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
# Without the script's folder on the path: transformers would take kernels.py beside it for the package of that name.
PEER = [str(PEER_PYTHON), "-P", "bench/peer_trl.py"]
THREADS = 2
SIZES = {"num_prompts": 8, "group_size": 8, "max_new_tokens": 64}  # of a step
# The first two are not timed: caches fill, and lazily imported code is loaded.
STEPS = 5
ROUNDS = 2
PROMPT_LENGTHS = (64, 256)
PEER_MICRO_BATCHES = (64, 8)
OURS = "flashgrpo"


def make_inputs(folder: Path, prompt_len: int, *, num_prompts: int = 64, num_words: int = 61) -> Row:
    """Write a random Qwen3 of 4.7M parameters, its word-level tokenizer, and prompts of exactly `prompt_len` tokens.

    Returns the paths that both sides read: `model`, a Hugging Face folder, and `prompts`, JSONL
    with a `prompt` column.

    Neighbouring words are never merged, so both sides read a prompt of `prompt_len` words as that
    many tokens. The vocabulary is small in TRL's favour: on CPU its LM head runs on the prompts'
    positions too.
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
    model, prompts = str(folder / "model"), folder / "prompts.jsonl"
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(model)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(model)
    rng = random.Random(0)
    with prompts.open("w") as file:
        for _ in range(num_prompts):
            row = {"prompt": " ".join(rng.choices(words, k=prompt_len))}
            file.write(json.dumps(row) + "\n")
    return {"model": model, "prompts": str(prompts)}


def run_side(command: Sequence[str], settings: Mapping[str, Any]) -> Row:
    """Run one side, in a process of its own, to its end; the last line of its stdout is a JSON object, its report."""
    # Both sides get as many threads, and none waits for a network.
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    every = [*command, json.dumps(settings)]
    done = subprocess.run(every, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(every)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turns(prompt_len: int, inputs: Row, progress: Progress) -> list[Row]:
    """Both sides, TRL's with each micro-batch, `ROUNDS` times over; a row a run, with the load it started under."""
    settings = inputs | SIZES | {"steps": STEPS, "threads": THREADS}
    own = [sys.executable, "-m", "flashgrpo.bench.own_step"]
    sides = {}
    for size in PEER_MICRO_BATCHES:
        sides[f"TRL, micro-batch {size}"] = PEER, settings | {"micro_batch": size}
    sides[OURS] = own, settings
    task = progress.add_task(f"prompts of {prompt_len} tokens", total=ROUNDS * len(sides))
    runs = []
    # In turns, so that a slow spell of the machine meets every side.
    for number in range(ROUNDS):
        for name, (command, own_settings) in sides.items():
            row = {"name": name, "round": number, "load_average": os.getloadavg()[0], "prompt_len": prompt_len}
            runs.append(row | SIZES | {"steps": STEPS} | run_side(command, own_settings))
            progress.advance(task)
    return runs


def summarize(runs: Sequence[Row]) -> list[Row]:
    """A row a side and prompt length: median step, largest peak, and both as multiples of ours."""
    seconds: dict[tuple[int, str], list[float]] = {}
    peaks: dict[tuple[int, str], float] = {}
    for run in runs:
        key = run["prompt_len"], run["name"]
        seconds.setdefault(key, []).extend(run["step_s"])
        peaks[key] = max(peaks.get(key, 0.0), run["peak_mb"])
    rows = []
    for (prompt_len, name), taken in seconds.items():
        median, peak = statistics.median(taken), peaks[prompt_len, name]
        ours = prompt_len, OURS
        row = {"prompt_len": prompt_len, "name": name, "median_step_s": median, "peak_mb": peak}
        row |= {"step_ratio": median / statistics.median(seconds[ours]), "peak_ratio": peak / peaks[ours]}
        rows.append(row)
    return rows


def table(found: Row) -> list[str]:
    """Of the results file."""
    cells = []
    for row in found["summary"]:
        seconds, step_ratio = f"{row['median_step_s']:.2f}", f"{row['step_ratio']:.2f}"
        peak, peak_ratio = f"{row['peak_mb']:.0f}", f"{row['peak_ratio']:.2f}"
        cells.append([str(row["prompt_len"]), row["name"], seconds, step_ratio, peak, peak_ratio])
    return markdown(["prompt tokens", "", "seconds a step", "x ours", "peak MB", "x ours"], cells)


def headline(found: Row) -> tuple[str, str]:
    rows = [row for row in found["summary"] if row["prompt_len"] == 256 and row["name"] != OURS]
    peer = min(rows, key=lambda row: row["step_ratio"])
    factors = f"{peer['step_ratio']:.1f} times as fast in {peer['peak_ratio']:.1f} times less memory"
    return "a GRPO step, prompts of 256 tokens, against TRL 1.16's GRPOTrainer at its fastest", factors


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything once, write it, print it. Raises FileNotFoundError where TRL's environment is missing."""
    option_parser("cpu-step", __doc__).parse_args(arguments)
    # Found now, not after minutes of measuring the other side.
    if not PEER_PYTHON.exists():
        raise FileNotFoundError(f"{PEER_PYTHON} does not exist; make TRL's environment with `make .venv-trl/.done`")
    where, runs = machine(torch.device("cpu")), []
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        for length in PROMPT_LENGTHS:
            runs += run_in_turns(length, make_inputs(Path(folder) / str(length), length), progress)
    found = {"machine": where, "threads": THREADS, "summary": summarize(runs), "runs": runs}
    busiest = max(run["load_average"] for run in runs)
    load = f"load average before a run: up to {busiest:.1f}, about {THREADS} if idle otherwise"
    publish("cpu_step.json", found, table(found), load)
    return 0
