"""Our generation by vLLM against a bare `LLM.generate` on the same requests, and the time of a weight sync, on a CPU.

    make bench-vllm        # python -m flashgrpo.bench.vllm_speed
    python -m flashgrpo.bench.vllm_speed --runs native=RUN vllm=RUN vllm_server=RUN     # scores of runs of one recipe

A bare `LLM.generate`, our wrapper around the same engine, `vllm` (a process beside the trainer's) and `vllm_server`
(HTTP) take turns in one run; the machine should be idle. Every completion has its full length. A sync writes all
weights to shared memory, a bucket at a time, and has them loaded; it costs at least two copies of them. Writes
bench/results/vllm_cpu.json.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from flashgrpo.bench.readme import RESULTS, vllm_table
from flashgrpo.grpo.demo import make_model
from flashgrpo.grpo.generators import open_generator
from flashgrpo.grpo.policy import open_policy, open_sharded_model
from flashgrpo.grpo.recipe import Recipe, build_recipe
from flashgrpo.grpo.rollout import Request, Sampling, sample_seeds
from flashgrpo.grpo.run_folder import read_rows
from flashgrpo.grpo.vllm_engine import Engine, sampling_params
from flashgrpo.grpo.vllm_generator import VllmGenerator
from flashgrpo.grpo.vllm_options import EngineOptions
from flashgrpo.grpo.weight_sync import DecoderSource
from flashgrpo.grpo.world import World, open_world
from flashgrpo.model.checkpoint import init_decoder, save_checkpoint
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.files import write_text

SIZES = {"num_prompts": 32, "group_size": 8, "prompt_len": 64, "max_new_tokens": 64}
ROUNDS = 9  # the first is not counted
SYNC_ROUNDS = 5
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 16_384}
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def recipe_for(model: Path, generator: str) -> Recipe:
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": "none"},
        "rollout": {"generator": generator, "max_new_tokens": SIZES["max_new_tokens"]},
        "vllm": {"devices": ["cpu"] if generator == "vllm_server" else [], "kv_cache_gb": 0.5},
        "run": {"output": str(model.parent / generator), "device": "cpu"},
    }
    return build_recipe(Recipe, values)


def opened(model: Path, name: str, world: World) -> tuple[VllmGenerator, DecoderSource]:
    """A generator with the model's weights, and their source."""
    recipe = recipe_for(model, name)
    decoder = open_sharded_model(recipe.model, world.device, world.mesh)
    generator: Any = open_generator(
        recipe, open_policy(recipe.model, world.device, decoder), world, SIZES["prompt_len"]
    )
    source = DecoderSource(dict(decoder.named_parameters()), decoder.config, torch.float32)
    generator.load_weights(source, 0)
    generator.client.stop_token_ids = []
    return generator, source


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; a slow spell of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in track(range(rounds), description=", ".join(sides)):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def measure_generation(model: Path, world: World) -> dict[str, float]:
    """Tokens a second by each."""
    requests = [
        Request(
            i,
            [5 + (i * 31 + j * 7) % 500 for j in range(SIZES["prompt_len"])],
            sample_seeds(0, 0, i, SIZES["group_size"]),
        )
        for i in range(SIZES["num_prompts"])
    ]
    sampling = Sampling(SIZES["max_new_tokens"])
    options = EngineOptions.of(recipe_for(model, "vllm"), "float32", on_gpu=False, longest_prompt=SIZES["prompt_len"])
    engine = Engine(options, [], load_format="auto")
    prompts: Any = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    params = [sampling_params(sampling, request, []) for request in requests]
    generators = {name: opened(model, name, world)[0] for name in ("vllm", "vllm_server")}
    sides: dict[str, Callable[[], Any]] = {
        "bare": lambda: engine.llm.generate(prompts, params, use_tqdm=False),
        "wrapped": lambda: [*engine.generate(requests, sampling)],
    }
    for name, generator in generators.items():
        sides[name] = lambda generator=generator: [*generator.generate(requests, sampling)]
    seconds = in_turns(sides, ROUNDS)
    for generator in generators.values():
        generator.close()
    num_tokens = SIZES["num_prompts"] * SIZES["group_size"] * SIZES["max_new_tokens"]
    return {name: num_tokens / s for name, s in seconds.items()}


def measure_sync(model: Path, world: World) -> dict[str, float]:
    """Seconds of one after the first, which compares checksums, too."""
    found = {}
    for name in ("vllm", "vllm_server"):
        generator, source = opened(model, name, world)
        found |= in_turns({name: lambda g=generator, s=source: g.load_weights(s, 1)}, SYNC_ROUNDS)
        found["gb"] = source.num_bytes / 1e9
        generator.close()
    return found


def scores(runs: list[str]) -> dict[str, dict[str, float]]:
    """First and last held-out score, and the largest mismatch and staleness, of runs given as NAME=FOLDER."""
    found = {}
    for run in runs:
        name, _, folder = run.partition("=")
        rows = read_rows(Path(folder) / "metrics.jsonl")
        evaluated = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
        mismatch = max(row.get("mismatch/max", 0.0) for row in rows)
        staleness = max(row.get("staleness/max", 0.0) for row in rows)
        found[name] = {"first": evaluated[0], "last": evaluated[-1], "mismatch": mismatch, "staleness": staleness}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", help="record the scores of these, and measure nothing")
    file = RESULTS / "vllm_cpu.json"
    recorded = json.loads(file.read_text()) if file.exists() else {}
    if runs := parser.parse_args().runs:
        recorded["demo"] = scores(runs)
    else:
        recorded |= measure()
    write_text(file, json.dumps(recorded, indent=1) + "\n")
    print("\n".join(vllm_table()))


def measure() -> dict[str, Any]:
    """Every number but the scores, and the machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_model(folder / "tokenizer_of", ["a sum of numbers"] * 50, seed=0)
        models = {}
        for size, changes in (("small", SMALL), ("large", LARGE)):
            decoder = init_decoder(ModelConfig.from_dict({**SHAPE, **changes}), seed=0)
            save_checkpoint(decoder, folder / size, tokenizer_files_from=tokenizer)
            models[size] = folder / size
        with open_world(recipe_for(models["small"], "vllm")) as world:
            found = {
                "sync": measure_sync(models["large"], world),
                "generate": measure_generation(models["small"], world),
            }
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "vllm-cpu": importlib.metadata.version("vllm-cpu"),
    }
    return {"machine": machine, "sizes": SIZES, **found}


if __name__ == "__main__":
    main()
