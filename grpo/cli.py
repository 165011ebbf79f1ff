"""The `flashgrpo` command: a table of commands, and how the process of one begins and ends.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, NoReturn

from flashgrpo.grpo.errors import RecipeError, RewardError, RunInputError
from flashgrpo.grpo.recipe.shipped import FOLDER, command_for, copy_recipe, shipped_recipes
from flashgrpo.grpo.run.interrupts import Interrupts
from flashgrpo.model.waits import word_for

# For torch's threads on a CPU, read when it is imported: how long they wait for each other awake. It should be longer
# than the Python between two operators of a decoding step, or each of them must wake a thread: sampling on 2 cores is
# 1.6 times as fast as with 2,000. Beside a busy process no thread should wait so: model/threads.py takes it away.
_SPIN_COUNT = "50000"

# What a command needs is imported by its function: --help must not wait for torch.
_importing = partial(word_for, "importing what the command needs")


def _run_recipe(options: argparse.Namespace) -> None:
    with _importing():
        from flashgrpo.grpo.recipe.load import load_recipe
        from flashgrpo.grpo.stages.kinds import KINDS, run_recipe

    recipe = load_recipe(KINDS[options.command].recipe, options.recipe, options.overrides)
    with _named(options.recipe):
        made = run_recipe(options.command, recipe, resume=options.resume)
    if os.environ.get("RANK", "0") != "0":
        return
    if options.command == "collect":
        print(f"data: {made}")
    else:
        print(f"model: {made}")
        _print_report(recipe.run.output)


@contextmanager
def _named(recipe_file: str) -> Iterator[None]:
    """A fault of the recipe that is found by running it is told with its file, as one that is found by reading it."""
    try:
        yield
    except (RecipeError, RewardError) as error:
        raise type(error)(f"{recipe_file}: {error}") from error


def _run_pipeline(options: argparse.Namespace) -> None:
    with _importing():
        from flashgrpo.grpo.stages.pipeline import run_pipeline

    run_pipeline(options.recipe, options.overrides, options.until)


def _evaluate(options: argparse.Namespace) -> None:
    with _importing():
        from rich.console import Console

        from flashgrpo.grpo.recipe.load import Recipe, load_recipe
        from flashgrpo.grpo.stages.evaluate import evaluate_models, newest_model
        from flashgrpo.grpo.stages.scores import table_of

    if options.benchmark:
        options.overrides.append(f"--eval.benchmarks={json.dumps(options.benchmark, ensure_ascii=False)}")
    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    models = dict(map(labelled, options.model or [newest_model(recipe)]))
    with _named(options.recipe):
        rows = evaluate_models(recipe, models, options.output and Path(options.output).expanduser())
    if os.environ.get("RANK", "0") != "0":
        return
    if options.json:
        print(json.dumps(rows))
    else:
        Console().print(table_of(rows))


def labelled(text: str) -> tuple[str, str]:
    """(label, path) of what --model was given: label=path, or a path, which then is its own label."""
    label, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        label = path = text
    # A shell leaves ~ in --model=~/x.
    return label, os.path.expanduser(path)


def _plan(options: argparse.Namespace) -> None:
    with _importing():
        from flashgrpo.grpo.recipe.load import Recipe, load_recipe
        from flashgrpo.grpo.stages.plan import plan_recipe, print_plan

    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    lengths = options.prompt_tokens, options.response_tokens
    found = plan_recipe(recipe, options.gpus, options.gpu, options.memory, *lengths)
    if options.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print_plan(found)


def _serve(options: argparse.Namespace) -> None:
    with _importing():
        from flashgrpo.grpo.recipe.load import Recipe, load_recipe
        from flashgrpo.grpo.rollout.vllm.launch import EngineOptions, become_server, require_vllm
        from flashgrpo.grpo.run.machines import resolve_device
        from flashgrpo.model.checkpoint import read_config

    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    require_vllm()
    device = resolve_device({None: recipe.run.device, "cpu": "cpu"}.get(options.devices, "cuda"))
    on_gpu = device.type == "cuda"
    devices = options.devices or (os.environ.get("CUDA_VISIBLE_DEVICES", "0") if on_gpu else "cpu")
    # vLLM refuses more than the model's context.
    context = read_config(recipe.model.path).raw.get("max_position_embeddings", sys.maxsize)
    room = (recipe.vllm.max_model_len or context) - recipe.rollout.max_new_tokens
    sources = recipe.data, *recipe.sources.values()
    longest_prompt = max(source.max_prompt_tokens for source in sources)
    longest_prompt = max(1, min(longest_prompt, room))
    become_server(EngineOptions.of(recipe, device, longest_prompt), options.host, options.port, devices)


def _sample(options: argparse.Namespace) -> None:
    with _importing():
        from flashgrpo.grpo.stages.evaluate import sample_texts
        from flashgrpo.grpo.types import Sampling

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    for text in sample_texts(options.model, options.prompt, options.template, options.n, sampling, options.seed):
        print(text)


def _bench(options: argparse.Namespace) -> int:
    name = options.benchmark.replace("-", "_")
    with _importing():
        module = importlib.import_module(f"flashgrpo.bench.{name}")
    if options.benchmark not in ("report", "compare"):
        # Found now, not after minutes of measuring.
        try:
            importlib.import_module("flashgrpo.bench.timing").results_folder()
        except OSError as error:
            raise RunInputError(f"results cannot be written: {error}; OUT=FOLDER names another place") from error
    return module.main(options.arguments)


def _demo(options: argparse.Namespace) -> None:
    with _importing():
        from flashgrpo.grpo.stages.demo import demo

    demo(options.recipe, options.output, options.seed)


def _init(options: argparse.Namespace) -> None:
    file = copy_recipe(options.name)
    command = command_for(file)
    print(f"{file}: {shipped_recipes()[file.stem]}")
    stage = "train" if command == "pipeline" else command
    print(f"next: edit it, then `flashgrpo {command} {file}`; `flashgrpo {stage} --help [KEY]` explains keys")


def _list_recipes(_: argparse.Namespace) -> None:
    for name, line in shipped_recipes().items():
        print(f"{name:20}  {line}")
    print("`flashgrpo init NAME` copies one to this folder")


def _print_report(run_folder: str) -> None:
    with word_for("drawing the report"):
        from flashgrpo.grpo.stages.plots import print_summary, write_report

        picture = write_report(run_folder)
    print_summary(run_folder)
    print(f"picture: {picture}")


def _report_runs(options: argparse.Namespace) -> None:
    if len(options.run_folder) == 1:
        _print_report(options.run_folder[0])
        return

    runs = {label: Path(path) for label, path in map(labelled, options.run_folder)}
    if len(runs) < len(options.run_folder):
        raise RunInputError(f"two runs are called {[*runs][-1]}; give each a label of its own, as A=runs/a B=runs/b")
    with word_for("drawing the report"):
        from flashgrpo.grpo.stages.plots import compare_runs

        picture = compare_runs(runs, options.output)
    print(f"picture: {picture}")


class _RecipeHelp(argparse.Action):
    """The help of a command, with every key of the recipe that it runs, or those that one looks for."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, looked_for: Any, *__: Any) -> NoReturn:
        with _importing():
            from flashgrpo.grpo.recipe.load import find_keys, recipe_keys
            from flashgrpo.grpo.stages.kinds import KINDS

        keys = [*recipe_keys(KINDS[parser.prog.split()[-1]].recipe)]
        if looked_for is None:
            parser.usage = "%(prog)s RECIPE.toml [--resume] [--section.key=value ...]"
        else:
            keys = find_keys(looked_for, keys)
            parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
        groups: dict[str, Any] = {}
        for key in keys:
            section = key.name.rpartition(".")[0]
            if section not in groups:
                groups[section] = parser.add_argument_group(f"[{section}]")
            default = key.default if key.default == "required" else f"default {key.default}"
            meaning = f"{key.meaning} ({default})".replace("%", "%%")  # argparse formats it
            groups[section].add_argument(f"--{key.name}", metavar=key.type, help=meaning)
        parser.print_help()
        parser.exit()


def _number(kind: type, wanted: str, is_valid: Callable[[float], bool]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"found {text}, wanted {wanted}")
        return value

    return number


_count = _number(int, "1 or more", lambda n: n >= 1)
_positive = _number(float, "a number above 0", lambda x: 0 < x < math.inf)
_temperature = _number(float, "a number, 0 or more", lambda t: 0 <= t < math.inf)
_share = _number(float, "a number above 0, at most 1", lambda p: 0 < p <= 1)

# An option is called with the parser that it is for.
_option = partial(methodcaller, "add_argument")
_several = partial(_option, nargs="+", action="extend")
_flag = partial(_option, action="store_true")

# A command that has it takes --section.key=value, too.
_RECIPE = _option("recipe", metavar="RECIPE.toml", help="any key can be overridden, as --train.lr=1e-5")
_PIPELINE = _option("recipe", metavar="PIPELINE.toml", help="any key, as --stages.sft.train.lr=1e-5")
_RUN = (
    _RECIPE,
    _flag("--resume", help="continue the run in run.output, or start it if there is none"),
    _option(
        "-h",
        "--help",
        action=_RecipeHelp,
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="KEY",
        help="this and every key, or what is like KEY",
    ),
)
_BENCHMARKS = {  # modules of bench/, each with a `main`
    "kernels": "each kernel against every peer that is installed, beside the machine's limits",
    "attention": 'which kernels attention\'s "auto" takes here; --qualify runs both',
    "step": "a training step of a random model of real shape, against transformers",
    "generate": "tokens a second of each generator",
    "sync": "seconds of a weight sync to each generator",
    "static": "what the kernels compile to for seven chips; needs no GPU",
    "cpu-step": "a GRPO step on a CPU, against TRL",
    "demo-seeds": "the demo with several seeds",
    "compare": "two results files beside each other",
    "report": "write the README's tables from the results; --check compares",
}
_BENCHMARKS_HELP = "; ".join(f"{name}: {text}" for name, text in _BENCHMARKS.items())

# What runs, and may return an exit code; the line of its help; its options.
COMMANDS: dict[str, tuple[Any, ...]] = {
    "recipes": (_list_recipes, "list the recipes that come with this"),
    "init": (
        _init,
        "copy one of them to this folder, to begin with",
        _option("name", metavar="NAME", help="as gsm8k: a name, or how one begins"),
    ),
    "train": (_run_recipe, "train a policy by GRPO", *_RUN),
    "sft": (_run_recipe, "fine-tune on prompts and completions", *_RUN),
    "reward-model": (_run_recipe, "train a reward model on pairs or labels", *_RUN),
    "collect": (_run_recipe, "sample a model, filter what it wrote, write examples for SFT", *_RUN),
    "pipeline": (
        _run_pipeline,
        "run stages in a row, as all of DeepSeek-R1; override as --stages.NAME.section.key=value",
        _PIPELINE,
        _option("--until", metavar="STAGE", help="the last stage to run; finished stages stay"),
    ),
    "eval": (
        _evaluate,
        "pass@1, pass@k and cons@k of models",
        _RECIPE,
        _several("--model", metavar="[LABEL=]PATH", help="default: the run's final or newest, else model.path"),
        _several("--benchmark", metavar="FILE", help="default: eval.benchmarks, else the held-out problems"),
        _option("--output", metavar="FILE", help="JSON, written after each pair; what it has is not run again"),
        _flag("--json", help="print a JSON list, of a row for each model and benchmark"),
    ),
    "plan": (
        _plan,
        "memory and time of a recipe on GPUs; needs none",
        _RECIPE,
        _option("--gpus", type=_count, default=1, help="in all (default 1)"),
        _option("--gpu", default="h200", help="a100, h100, h200 or b200 (default h200), 8 a node"),
        _option("--memory", type=_positive, help="GB of each; default: the GPU's"),
        _option("--prompt-tokens", type=_positive, help="mean; default 256"),
        _option("--response-tokens", type=_positive, help="mean; default a quarter of rollout.max_new_tokens"),
        _flag("--json", help="print one JSON object"),
    ),
    "serve": (
        _serve,
        "vLLM for training runs with vllm.servers",
        _RECIPE,
        _option("--host", default="127.0.0.1", help="0.0.0.0: for other machines, too; default 127.0.0.1"),
        _option("--port", type=_count, default=8000, help="default 8000"),
        _option("--devices", help='"0,1": one model over both; default: CUDA_VISIBLE_DEVICES, 0 or cpu'),
    ),
    "sample": (
        _sample,
        "complete one prompt",
        _option("model", help="Hugging Face folder, or name on the hub"),
        _option("prompt"),
        _option("-n", type=_count, default=1, help="completions (default 1)"),
        _option("--template", choices=("r1", "chat", "none"), default="r1", help="default r1"),
        _option("--max-new-tokens", type=_count, default=512, help="default 512"),
        _option("--temperature", type=_temperature, default=0.6, help="0: greedy; default 0.6"),
        _option("--top-p", type=_share, default=0.95, help="default 0.95"),
        _option("--seed", type=int, default=0, help="default 0"),
    ),
    "bench": (
        _bench,
        f"measure: {', '.join(_BENCHMARKS)}",
        _option("benchmark", choices=_BENCHMARKS, metavar="BENCHMARK", help=_BENCHMARKS_HELP),
        _option("arguments", nargs=argparse.REMAINDER, help="of the benchmark; `--help` tells them"),
    ),
    "demo": (
        _demo,
        "from nothing to a policy that GRPO has taught to add, on a CPU",
        _option("--recipe", default=str(FOLDER / "demo.toml"), help="default: the shipped demo.toml"),
        _option("--output", type=Path, default=Path("runs/demo"), help="removed first; default runs/demo"),
        _option("--seed", type=int, default=1, help="default 1"),
    ),
    "report": (
        _report_runs,
        "draw RUN/report.png, print a summary and samples; of several runs, one picture and one table",
        _option("run_folder", metavar="[LABEL=]RUN", nargs="+", help="a run's output folder"),
        _option("--output", type=Path, default=Path("report.png"), help="picture of several runs; default report.png"),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Raises SystemExit for a command line that argparse refuses."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        # A sample that a terminal cannot show must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if arguments[:1] == ["--version"]:
        # Asked for no sooner: a checkout that is not installed has none.
        from importlib.metadata import version

        print("flashgrpo", version("flashgrpo"))
        return 0
    interrupts = Interrupts()
    try:
        options = _parse(arguments)
        with interrupts, interrupts.allowed():
            return options.run(options) or 0
    except KeyboardInterrupt as stop:
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except Exception as error:
        return _report(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashgrpo", description="GRPO training with fused kernels.")
    parser.add_argument("--version", action="store_true", default=argparse.SUPPRESS, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, line, *options) in COMMANDS.items():
        # What runs a recipe brings a --help of its own.
        command = commands.add_parser(name, help=line, allow_abbrev=False, conflict_handler="resolve")
        command.set_defaults(run=run)
        for add_to in options:
            add_to(command)
    return parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command; those that are for its recipe are `overrides`."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # by a shell's hook, `eval "$(register-python-argcomplete flashgrpo)"`
        importlib.import_module("argcomplete").autocomplete(parser)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not {_RECIPE, _PIPELINE} & {*COMMANDS[options.command]}:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    # A flag that is nearly one of the command's is no key of a recipe, which has a dot.
    not_given = [f"--{name}" for name, value in vars(options).items() if value in (None, False)]
    for override in overrides:
        near = difflib.get_close_matches(override, not_given, n=1)
        if near and "." not in override:
            parser.exit(2, f"flashgrpo: {override}: did you mean {near[0]}?\n")
    options.overrides = overrides
    return options


def _report(error: Exception) -> int:
    """Tell of what a person can mend in a line; returns the exit code.

    Raises what is a bug again, for its traceback.
    """
    if isinstance(error, ModuleNotFoundError):
        # What one of our own modules misses is the extra `train`; a user's function may miss anything.
        package = (error.name or "flashgrpo").partition(".")[0]
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        is_ours = frame.f_globals.get("__name__", "").startswith("flashgrpo.")
        if package == "flashgrpo" or not is_ours:
            raise error
        print(f'flashgrpo: {package} is not installed; pip install "flashgrpo[train]"', file=sys.stderr)
        return 2
    if not (hasattr(error, "exit_code") or isinstance(error, OSError)):
        raise error
    # It is quiet on a rank whose error another one tells.
    from flashgrpo.grpo.run.progress import say

    line = " ".join(str(error).split())  # a library's error may have many
    say(f"flashgrpo: {line}")
    return getattr(error, "exit_code", 1)


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


if __name__ == "__main__":
    console()
