"""The `flashgrpo` command.

Exit codes: 2 for what is wrong before the first step, 1 for a later failure, 130 for Ctrl-C, 128 + n for signal n.
"""

import argparse
import dataclasses
import difflib
import importlib
import io
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flashgrpo.grpo.errors import FlashgrpoError
from flashgrpo.grpo.run.interrupts import Interrupts

_RUNS = {  # commands that run a recipe; what a command needs is imported by it: --help must not wait for torch
    "train": "train a policy by GRPO",
    "sft": "fine-tune on prompts and completions",
    "reward-model": "train a reward model on pairs or labels",
    "collect": "sample a model, filter what it wrote, write examples for SFT",
}

_BENCHMARKS = {  # modules of bench/, each with a `main`
    "kernels": "each kernel against every peer that is installed, beside the machine's limits",
    "step": "a training step of a random model of real shape, against transformers",
    "generate": "tokens a second of each generator",
    "sync": "seconds of a weight sync to each generator",
    "static": "what the kernels compile to for four chips; needs no GPU",
    "cpu-step": "a GRPO step on a CPU, against TRL",
    "demo-seeds": "the demo with several seeds",
    "gpu": "on a GPU: the kernels' tests, then kernels and step, within nine minutes",
    "report": "write the README's tables from the results; --check compares",
}

# For torch's threads on a CPU, read when it is imported: how long they wait for each other awake. It should be longer
# than the Python between two operators of a decoding step, or each of them must wake a thread: sampling on 2 cores is
# 1.6 times as fast as with 2,000. Beside a busy process no thread should wait so: model/threads.py takes it away.
_SPIN_COUNT = "50000"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        return _main(arguments)
    except ModuleNotFoundError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        is_ours = frame.f_globals.get("__name__", "").startswith("flashgrpo.")  # and not a user's function's
        if (name := (error.name or "flashgrpo").partition(".")[0]) == "flashgrpo" or not is_ours:
            raise
        print(f'flashgrpo: {name} is not installed; pip install "flashgrpo[train]"', file=sys.stderr)
        return 2


def _main(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sample that a terminal cannot show must not end a run
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if arguments[:1] == ["--version"]:
        from importlib.metadata import version

        print("flashgrpo", version("flashgrpo"))
        return 0
    if len(arguments) >= 2 and arguments[0] in _RUNS and {"-h", "--help"} & set(arguments[1:]):
        from flashgrpo.grpo.recipe.help import print_recipe_help
        from flashgrpo.grpo.recipe.load import KINDS

        print_recipe_help(arguments[0], KINDS[arguments[0]])
        return 0
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.command not in (*_RUNS, "pipeline", "eval", "plan", "serve"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    flags = [f"--{name}" for name, value in vars(options).items() if value in (None, False)]  # those not given
    for override in overrides:
        if "." not in override and (flag := difflib.get_close_matches(override, flags, n=1)):
            print(f"flashgrpo: {override}: did you mean {flag[0]}?", file=sys.stderr)
            return 2
    interrupts = Interrupts()
    try:
        with interrupts, interrupts.allowed():
            return options.run(options, overrides) or 0
    except KeyboardInterrupt as stop:
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except Exception as error:  # the one place that turns the package's own errors into a line and an exit code
        return _report(error)


def console() -> NoReturn:
    """Entry point of the console script."""
    end_process_after(main)


def end_process_after(run: Callable[[], int | None]) -> NoReturn:
    """Exits with what `run` returns, without Python's finalization.

    A thread of gloo's that still holds a finished collective's tensor would abort it there (pytorch#190489), and its
    threads outlive their process group where FSDP2 has used it.
    """
    code = 1
    try:
        code = run() or 0
    except SystemExit as ended:  # argparse's
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # as Python would at the end of the process, which this is
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _report(error: Exception) -> int:
    from flashgrpo.grpo.run.progress import console
    from flashgrpo.model.checkpoint import CheckpointError

    if not isinstance(error, FlashgrpoError | CheckpointError | OSError):
        raise error
    line = " ".join(str(error).split())  # a library's error may have many
    console.print(f"flashgrpo: {line}", markup=False, highlight=False, soft_wrap=True)
    return 2 if isinstance(error, CheckpointError) else getattr(error, "exit_code", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashgrpo", description="GRPO training with fused kernels.")
    parser.add_argument("--version", action="store_true", default=argparse.SUPPRESS, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in _RUNS.items():
        command = commands.add_parser(
            name, help=f"{help_text}; `flashgrpo {name} --help` lists every key", allow_abbrev=False
        )
        command.add_argument("recipe", help="TOML file; any key can be overridden as --section.key=value")
        command.add_argument("--resume", action="store_true", help="continue the run in run.output, or start it")
        command.set_defaults(run=_run_recipe)
    command = commands.add_parser("pipeline", help="run stages in a row, as all of DeepSeek-R1", allow_abbrev=False)
    command.add_argument("recipe", help="TOML file; override as --stages.NAME.section.key=value; finished stages stay")
    command.add_argument("--until", metavar="STAGE", help="the last stage to run")
    command.set_defaults(run=_run_pipeline)
    command = commands.add_parser("eval", help="pass@1, pass@k and cons@k of models", allow_abbrev=False)
    command.add_argument("recipe", help="a training recipe; its keys can be overridden, as --eval.samples=16")
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    command.add_argument(
        "--model",
        **several,
        metavar="[LABEL=]PATH",
        help="Hugging Face folders; default: the run's final or newest, else model.path",
    )
    command.add_argument(
        "--benchmark",
        **several,
        metavar="FILE",
        help="JSONL or Parquet; default: eval.benchmarks, else the held-out problems",
    )
    command.add_argument("--output", metavar="FILE", help="JSON, written after each pair; what it has is not run again")
    command.add_argument("--json", action="store_true", help="print a JSON list, of a row for each model and benchmark")
    command.set_defaults(run=_evaluate)
    count = _number(int, "1 or more", lambda n: n >= 1)
    temperature = _number(float, "a number, 0 or more", lambda t: 0 <= t < math.inf)
    share = _number(float, "a number above 0, at most 1", lambda p: 0 < p <= 1)
    command = commands.add_parser("plan", help="memory and time of a recipe on GPUs; needs none", allow_abbrev=False)
    command.add_argument("recipe", help="a training recipe; its keys can be overridden, as --train.token_budget=65536")
    positive = _number(float, "a number above 0", lambda x: 0 < x < math.inf)
    command.add_argument("--gpus", type=count, default=1, help="in all (default 1)")
    command.add_argument("--gpu", default="h200", help="a100, h100, h200 or b200 (default h200), 8 a node")
    command.add_argument("--memory", type=positive, help="GB of each; default: the GPU's")
    command.add_argument("--prompt-tokens", type=positive, help="mean; default 256")
    command.add_argument("--response-tokens", type=positive, help="mean; default a quarter of rollout.max_new_tokens")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_plan)
    command = commands.add_parser("serve", help="vLLM for training runs with vllm.servers", allow_abbrev=False)
    command.add_argument("recipe", help="the runs' recipe; its keys can be overridden, as --vllm.memory_share=0.9")
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines, too; default 127.0.0.1")
    command.add_argument("--port", type=count, default=8000, help="default 8000")
    command.add_argument("--devices", help='"0,1": one model over both; default: CUDA_VISIBLE_DEVICES, 0 or cpu')
    command.set_defaults(run=_serve)
    command = commands.add_parser("sample", help="complete one prompt")
    command.add_argument("model", help="Hugging Face folder")
    command.add_argument("prompt")
    command.add_argument("-n", type=count, default=1, help="completions (default 1)")
    command.add_argument("--template", choices=("r1", "chat", "none"), default="r1", help="default r1")
    command.add_argument("--max-new-tokens", type=count, default=512, help="default 512")
    command.add_argument("--temperature", type=temperature, default=0.6, help="0: greedy; default 0.6")
    command.add_argument("--top-p", type=share, default=0.95, help="default 0.95")
    command.add_argument("--seed", type=int, default=0, help="default 0")
    command.set_defaults(run=_sample)
    command = commands.add_parser(
        "bench", help=f"measure: {', '.join(_BENCHMARKS)}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    width = max(map(len, _BENCHMARKS))
    command.description = "\n".join(f"{name:{width}}  {text}" for name, text in _BENCHMARKS.items())
    command.add_argument("benchmark", choices=_BENCHMARKS, metavar="BENCHMARK")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="of the benchmark; `--help` tells them")
    command.set_defaults(run=_bench)
    command = commands.add_parser("demo", help="from nothing to a policy that GRPO has taught to add, on a CPU")
    command.add_argument("--recipe", default="recipes/demo.toml", help="default recipes/demo.toml")
    command.add_argument("--output", type=Path, default=Path("runs/demo"), help="removed first; default runs/demo")
    command.add_argument("--seed", type=int, default=1, help="default 1")
    command.set_defaults(run=_demo)
    command = commands.add_parser("report", help="draw RUN/report.png, print a summary and samples")
    command.add_argument("run_folder", metavar="RUN", help="a run's output folder")
    command.set_defaults(run=lambda options, _: _print_report(options.run_folder))
    return parser


def _number(kind: type, wanted: str, is_valid: Callable[[float], bool]) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not is_valid(value := kind(text)):
            raise argparse.ArgumentTypeError(f"found {text}, wanted {wanted}")
        return value

    return number


def _run_recipe(options: argparse.Namespace, overrides: list[str]) -> None:
    from flashgrpo.grpo.recipe.load import KINDS, load_recipe
    from flashgrpo.grpo.stages.runs import run_recipe

    recipe = load_recipe(KINDS[options.command], options.recipe, overrides)
    made = run_recipe(recipe, resume=options.resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"{'data' if options.command == 'collect' else 'model'}: {made}")
        if options.command != "collect":
            _print_report(recipe.run.output)


def _run_pipeline(options: argparse.Namespace, overrides: list[str]) -> None:
    from flashgrpo.grpo.stages.pipeline import run_pipeline

    run_pipeline(options.recipe, overrides, options.until)


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from rich.console import Console

    from flashgrpo.grpo.recipe.load import Recipe, load_recipe
    from flashgrpo.grpo.stages.evaluate import evaluate_models, newest_model
    from flashgrpo.grpo.stages.scores import table_of

    recipe = load_recipe(Recipe, options.recipe, overrides)
    if options.benchmark:
        recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, benchmarks=options.benchmark))
    models = dict(map(_labelled, options.model or [newest_model(recipe)]))
    rows = evaluate_models(recipe, models, options.output and Path(options.output).expanduser())
    if os.environ.get("RANK", "0") != "0":
        return
    if options.json:
        print(json.dumps(rows))
    else:
        Console().print(table_of(rows))


def _labelled(text: str) -> tuple[str, str]:
    label, equals, path = text.partition("=")
    label, path = (label, path) if equals and not Path(text).exists() else (text, text)
    return label, os.path.expanduser(path)  # a shell leaves ~ in --model=~/x


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from flashgrpo.grpo.recipe.load import Recipe, load_recipe
    from flashgrpo.grpo.stages.plan import plan_recipe, print_plan

    recipe = load_recipe(Recipe, options.recipe, overrides)
    found = plan_recipe(
        recipe, options.gpus, options.gpu, options.memory, options.prompt_tokens, options.response_tokens
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print_plan(found)


def _serve(options: argparse.Namespace, overrides: list[str]) -> None:
    from flashgrpo.grpo.recipe.load import Recipe, load_recipe
    from flashgrpo.grpo.rollout.vllm.launch import EngineOptions, become_server, require_vllm
    from flashgrpo.grpo.run.policy import resolve_device
    from flashgrpo.model.checkpoint import read_config

    recipe = load_recipe(Recipe, options.recipe, overrides)
    require_vllm()
    device = resolve_device({None: recipe.run.device, "cpu": "cpu"}.get(options.devices, "cuda"))
    on_gpu = device.type == "cuda"
    devices = options.devices or (os.environ.get("CUDA_VISIBLE_DEVICES", "0") if on_gpu else "cpu")
    context = read_config(recipe.model.path).raw.get("max_position_embeddings", sys.maxsize)
    room = (recipe.vllm.max_model_len or context) - recipe.rollout.max_new_tokens
    longest_prompt = max(source.max_prompt_tokens for source in (recipe.data, *recipe.sources.values()))
    longest_prompt = max(1, min(longest_prompt, room))  # vLLM refuses more than the model's context
    become_server(EngineOptions.of(recipe, device, longest_prompt), options.host, options.port, devices)


def _bench(options: argparse.Namespace, overrides: list[str]) -> int:
    module = importlib.import_module(f"flashgrpo.bench.{options.benchmark.replace('-', '_')}")  # may use everything
    if options.benchmark != "report":  # found now, not after minutes of measuring
        from flashgrpo.grpo.errors import RunInputError

        try:
            importlib.import_module("flashgrpo.bench.timing").results_folder()
        except OSError as error:
            raise RunInputError(f"results cannot be written: {error}; OUT=FOLDER names another place") from error
    return module.main(options.arguments)


def _sample(options: argparse.Namespace, overrides: list[str]) -> None:
    from flashgrpo.grpo.stages.evaluate import sample_texts
    from flashgrpo.grpo.types import Sampling

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    for text in sample_texts(options.model, options.prompt, options.template, options.n, sampling, options.seed):
        print(text)


def _demo(options: argparse.Namespace, overrides: list[str]) -> None:
    from flashgrpo.grpo.stages.demo import demo

    demo(options.recipe, options.output, options.seed)


def _print_report(run_folder: str) -> None:
    from flashgrpo.grpo.stages.plots import print_summary, write_report

    picture = write_report(run_folder)
    print_summary(run_folder)
    print(f"picture: {picture}")


if __name__ == "__main__":
    console()
