"""A run's folder that was damaged, is used by two, or comes from somebody else: one line that names the file."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

import hub_cache
from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import RecipeError, RunError, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe, load_recipe, recipe_to_toml
from flashgrpo.grpo.run import ledger
from flashgrpo.grpo.run.checkpoints import SUMS, _Reader
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.run.ledger import changed as changed_content
from flashgrpo.grpo.run.ledger import changed_keys, identify
from flashgrpo.grpo.train import train
from flashgrpo.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from flashgrpo.model.files import content_hash, locked, parse_json


def changed(recipe: Recipe, section: str, **values) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


@pytest.fixture(scope="module")
def trained(model_path, tmp_path_factory) -> Recipe:
    """The recipe of a run with checkpoints of the steps 2 and 4, in a folder of this module's."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "sums.jsonl").write_text("".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}\n' for n in range(16)))
    values = {
        "model": {"path": str(model_path)},
        "data": {"path": str(folder / "sums.jsonl"), "template": "none", "held_out": 0},
        "rewards": {"functions": ["format"], "workers": 1},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4},
        "train": {"steps": 4, "token_budget": 256, "checkpoint_every": 2},
        "run": {"output": str(folder / "run"), "device": "cpu"},
    }
    recipe = build_recipe(Recipe, values)
    train(recipe)
    return recipe


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A folder of that run for one test."""
    return Path(shutil.copytree(trained.run.output, tmp_path / "run"))


def test_another_revision_of_a_model_of_the_hub_is_refused(trained, model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache, old, new = hub_cache.offline(monkeypatch, tmp_path / "cache"), "0" * 40, "1" * 40
    recipe = changed(changed(trained, "model", path="someone/tiny"), "run", output="run")
    with pytest.raises(CheckpointError, match=r"someone/tiny: no such folder.*`hf download someone/tiny` puts it in"):
        train(recipe)
    assert not Path("run").exists()
    hub_cache.put(cache, "someone/tiny", old, model_path)
    train(changed(recipe, "train", steps=1))
    assert json.loads(Path("run/made_from.json").read_text())["model.path"]["revision"] == old
    model = load_checkpoint(model_path)
    model.model.norm.weight.data[0] += 1
    save_checkpoint(model, "new", tokenizer_files_from=model_path)
    hub_cache.put(cache, "someone/tiny", new, Path("new"))
    with pytest.raises(RunInputError, match=r"model.path: what someone/tiny holds has changed since the run"):
        train(recipe, resume=True)


@pytest.fixture
def go_on(trained, run) -> Callable[[], Path]:
    """Continue it to its sixth step."""
    return lambda: train(changed(changed(trained, "run", output=str(run)), "train", steps=6), resume=True)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def sum_up(checkpoint: Path) -> None:
    """Checksums that hold, as of somebody who has written the checkpoint by hand."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != SUMS]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(checkpoint)}\n" for p in files]
    (checkpoint / SUMS).write_text("".join(lines))


def test_every_file_of_a_checkpoint_has_a_checksum(run, go_on):
    checkpoint = run / "checkpoints/step_4"
    for file in [p for p in checkpoint.rglob("*") if p.is_file() and p.name != SUMS]:
        content = file.read_bytes()
        flip(file)
        with pytest.raises(RunInputError) as error:
            go_on()
        assert str(file) in str(error.value)
        assert "continue from step_2, the newest that is whole" in str(error.value)
        file.unlink()
        with pytest.raises(RunInputError, match=file.name):
            go_on()
        file.write_bytes(content)
    done = subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=checkpoint, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    go_on()


def test_a_list_of_checksums_that_was_cut_is_not_called_whole(run, go_on):
    sums = run / "checkpoints/step_4" / SUMS
    lines = sums.read_text().splitlines(keepends=True)
    for kept in ([], lines[:-1], lines[1:], [*lines[:-1], lines[-1][:-3]]):
        sums.write_text("".join(kept))
        with pytest.raises(RunInputError, match=r"broken checkpoint.*continue from step_2, the newest that is whole"):
            go_on()
    sums.write_text("".join(lines))
    (sums.parent / "model/more.safetensors").touch()
    with pytest.raises(RunInputError, match=rf"more\.safetensors: broken checkpoint: it is not in {SUMS}"):
        go_on()
    (sums.parent / "model/more.safetensors").unlink()
    flip(sums.parent / "model/model.safetensors")
    (run / "checkpoints/step_2" / SUMS).write_text("no checksum\n")
    with pytest.raises(RunInputError, match="begin anew: none is whole"):
        go_on()


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("where", ["metadata", "values"])
def test_somebody_elses_checkpoint_runs_no_code(run, go_on, where, tmp_path):
    """A tensor that the metadata call an object would be unpickled from wherever they say."""
    file, mark = run / "checkpoints/step_4/state/.metadata", tmp_path / "code was run"
    metadata: Metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["a tensor"] = BytesStorageMetadata()
    file.write_bytes(pickle.dumps(metadata if where == "values" else Attack(mark)))
    sum_up(run / "checkpoints/step_4")
    with pytest.raises(RunInputError, match=r"step_4: broken checkpoint.*its metadata asks for .*not of tensors"):
        go_on()
    assert not mark.exists()


@pytest.mark.parametrize("shared", ["Metadata", "_MEM_FORMAT_ENCODING"])
def test_somebody_elses_checkpoint_changes_no_class(shared, tmp_path):
    for state in (b"N}\x8c\x05addedK\x01s\x86", b"}\x8c\x05addedK\x01s"):  # (None, {"added": 1}), {"added": 1}
        name = f"torch.distributed.checkpoint.metadata\n{shared}\n".encode()
        (tmp_path / ".metadata").write_bytes(b"\x80\x04c" + name + state + b"b.")
        with pytest.raises(pickle.UnpicklingError, match=f"asks to change .*{shared}"):
            _Reader(tmp_path).read_metadata()
    assert not hasattr(getattr(torch.distributed.checkpoint.metadata, shared), "added")


def test_two_runs_in_one_folder_are_not_possible(run, tmp_path, capsys):
    """Whether both are new, or go on; the lock dies with its owner."""
    recipe_file, new = str(shutil.copy(run / "recipe.toml", tmp_path)), tmp_path / "new"
    code = "import sys, time; from pathlib import Path; from flashgrpo.model.files import locked\n"
    code += "with locked(Path(sys.argv[1])), locked(Path(sys.argv[2])): print('held', flush=True); time.sleep(600)\n"
    with subprocess.Popen([sys.executable, "-c", code, str(run), str(new)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        for folder, options in {new: [], run: ["--resume"]}.items():
            assert main(["train", recipe_file, f"--run.output={folder}", *options]) == 2
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert line.startswith(f"flashgrpo: {folder} is in use by process {other.pid} on ")
        other.kill()
    with locked(new), locked(run):
        pass


def test_a_folder_that_is_left_without_content_is_taken_away(tmp_path):
    with locked(tmp_path / "runs/first"):
        assert (tmp_path / "runs/first").is_dir()
    assert not (tmp_path / "runs").exists()
    with locked(tmp_path / "runs/first"):
        (tmp_path / "runs/first/recipe.toml").touch()
    assert (tmp_path / "runs/first/recipe.toml").exists()


def test_another_run_may_put_something_where_nothing_is_left(tmp_path, monkeypatch):
    """Between two steps of the one that ends; what it has to say of itself is told."""
    unlink = Path.unlink

    def slowly(path: Path) -> None:
        unlink(path)
        (path.parent.parent / "second").mkdir()

    monkeypatch.setattr(Path, "unlink", slowly)
    with pytest.raises(RunError, match="its own"), locked(tmp_path / "runs/first"):
        raise RunError("its own")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["second"]


def test_a_lock_that_was_taken_away_as_it_was_opened_holds_nobody_off(tmp_path, monkeypatch):
    """It would leave a third process a lock of its own under the same name."""
    flock, other = fcntl.flock, contextlib.ExitStack()
    other.enter_context(locked(tmp_path / "run"))

    def after_the_other_has_ended(*arguments) -> None:
        other.close()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", after_the_other_has_ended)
    with locked(tmp_path / "run"), pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"):
        locked(tmp_path / "run").__enter__()


@pytest.mark.parametrize("found", [False, 0, ""])
def test_options_of_a_data_set_are_not_keys_newer_than_the_run(trained, tmp_path, found):
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(trained))
    other = changed(trained, "data", options={"allow_negation": found})
    with pytest.raises(RunInputError, match=r"allow_negation is .*, and the run in .* began with None"):
        changed_keys(tmp_path / "recipe.toml", other)


def test_inputs_replaced_in_place_are_refused_unless_accepted(trained, tmp_path, capsys):
    """A run in its model's folder is no change of it."""
    path = Path(shutil.copytree(trained.model.path, tmp_path / "model"))
    data = Path(shutil.copy(trained.data.path, tmp_path / "sums.jsonl"))
    recipe = changed(changed(trained, "model", path=str(path)), "data", path=str(data))
    recipe = changed(changed(recipe, "run", output=str(path / "run")), "train", steps=2)
    train(changed(recipe, "train", steps=1))
    train(recipe, resume=True)

    def refused(key: str, file: Path) -> None:
        capsys.readouterr()
        with pytest.raises(RunInputError, match=rf"{key}: what .*{file.name} holds has changed since the run.*--run\."):
            train(recipe, resume=True)
        train(changed(recipe, "run", accept_changes=True), resume=True)
        assert f"{key}: what " in capsys.readouterr().err
        train(recipe, resume=True)  # it is accepted for good

    data.write_text(data.read_text().replace("1+1=", "1 + 1 ="))
    refused("data.path", data)
    model = load_checkpoint(path)
    model.model.norm.weight.data[0] += 1
    save_checkpoint(model, tmp_path / "other", tokenizer_files_from=path)
    (tmp_path / "other/model.safetensors").replace(path / "model.safetensors")
    refused("model.path", path)
    assert read_rows(path / "run/metrics.jsonl")[-1]["step"] == 2


def test_what_is_not_read_may_change(recipe, tmp_path):
    path = Path(shutil.copytree(recipe.model.path, tmp_path / "model"))
    before = content_hash(path)
    for name in (".cache/downloaded", "README.md", "run/checkpoints/step_1/model/model.safetensors", "scores.json"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    assert content_hash(path) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (path / name).write_text((path / name).read_text("latin-1") + " " if (path / name).exists() else "")
        before, now = content_hash(path), before
        assert before != now, name


def test_an_interrupt_does_not_wait_for_all_files_to_be_read(tmp_path, monkeypatch):
    """Of a model they are hundreds of GB; it comes where the first one is waited for."""
    read: list[Path] = []

    def hash_slowly(file: Path) -> str:
        read.append(file)
        if file.name == "000":
            raise KeyboardInterrupt
        time.sleep(0.05)
        return "00" * 32

    for number in range(200):
        (tmp_path / f"{number:03}").touch()
    monkeypatch.setattr("flashgrpo.model.files._hash", hash_slowly)
    with pytest.raises(KeyboardInterrupt):
        content_hash(tmp_path)
    assert len(read) < 100


def test_what_takes_long_to_read_is_told_before(trained, run, monkeypatch, capsys):
    recipe = changed(trained, "run", output=str(run))
    monkeypatch.setattr(ledger, "_SLOW_BYTES", 0)
    Path(recipe.model.path, "config.json").touch()  # what has its size and time is not read again
    train(recipe, resume=True)
    told = capsys.readouterr().err.partition(f"loading {recipe.model.path}\n")[0].splitlines()
    assert told[0].startswith(f"reading {run}/checkpoints/step_4, 0 GB, to see that it is whole")
    assert f"reading {recipe.model.path}, 0 GB, to notice changes" in told
    train(recipe, resume=True)
    assert "to notice changes" not in capsys.readouterr().err
    monkeypatch.undo()
    train(recipe, resume=True)
    assert "reading" not in capsys.readouterr().err


DEEP = "[" * 100_000
LONG = "1" * 5_000
LINES = {  # in front of the rows that were there
    "a list": b"[]",
    "no step": b'{"loss": 1}',
    "a step that is none": b'{"step": null}',
    "bytes": b"\xff\xfe",
    "zeros": bytes(4096),
    "deep": DEEP.encode(),
    "an integer": b'{"step": %s}' % LONG.encode(),
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_broken_rows_of_a_log_are_named(name, tmp_path):
    log = tmp_path / name
    for line in LINES.values():
        log.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
        with pytest.raises(RunInputError, match=rf"{name}: line 2 is no row of a run"):
            read_rows(log)
        log.write_bytes(b'{"step": 1}\n' + line[: len(line) // 2])
        assert [row["step"] for row in read_rows(log)] == [1]  # cut by a crash


RECIPES = [None, b"[model", b"\xff\xfe", f"a = {DEEP}".encode(), f"a = {LONG}".encode(), b"a = 1"]  # None: it is gone
STATES = [
    {"step": 3},
    {},
    [],
    {"step": 4, "position": {"taken": {"data": "x"}, "owed": {}}},
    {"step": 4, "position": {"x": 1}},
]


def test_a_damaged_folder_is_one_line_and_exit_2(run, model_path, tmp_path, capsys):
    """Nothing is changed by the attempt: what was damaged can be restored."""
    whole = shutil.copytree(run, tmp_path / "whole")
    recipe_file = str(shutil.copy(run / "recipe.toml", tmp_path))

    def refused(name: str, content: bytes | None) -> None:
        file = run / name
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        sum_up(run / "checkpoints/step_4")
        assert main(["train", recipe_file, f"--run.output={run}", "--train.steps=5", "--resume"]) == 2
        line = capsys.readouterr().err.removeprefix(f"loading {model_path}\n")
        assert (line.count("\n"), line.count("Traceback")) == (1, 0)
        assert file.name in line
        assert len(line) < 700
        shutil.copy(whole / name, file)
        for log in ("metrics.jsonl", "samples.jsonl"):
            assert (run / log).read_bytes() == (whole / log).read_bytes()

    for content in RECIPES:
        refused("recipe.toml", content)
    for state in STATES:
        refused("checkpoints/step_4/state.json", json.dumps(state).encode())
    for content in (b"[]", b"\xff", DEEP.encode(), b"3"):
        refused("made_from.json", content)


def test_text_that_nobody_writes_is_refused_in_a_line(recipe_values, tmp_path):
    file = tmp_path / "recipe.toml"
    for text in (f"a = {DEEP}", f"a = {LONG}", "a = 0x" + "f" * 9_999, f"a{'.a' * 9_999} = 1"):
        file.write_text(text)
        with pytest.raises(RecipeError, match=r"recipe\.toml: not TOML") as error:
            load_recipe(Recipe, file)
        assert len(str(error.value)) < 500
    file.write_text(tomli_w.dumps(recipe_values))
    for option in (f"--run.seed={LONG}", f"--train.lr={DEEP}", "--train.steps=99999999999999999999"):
        with pytest.raises(RecipeError, match=option[:8]):
            load_recipe(Recipe, file, [option])
    for text in (DEEP, LONG, '{"a":' * 100_000):
        with pytest.raises(ValueError, match=r"nested too deeply|Exceeds the limit"):
            parse_json(text)


def test_deep_data_is_named_with_its_line(recipe_values, data_path, tmp_path, capsys):
    data_path.write_text(data_path.read_text() + '{"prompt":' + DEEP + "\n")
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe_values))
    assert main(["train", str(tmp_path / "recipe.toml")]) == 2
    assert f"{data_path}:65: unreadable line: it is nested too deeply" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "collect", "pipeline", "eval"])
def test_an_output_that_cannot_be_written_is_found_before_the_first_step(recipe_values, tmp_path, command, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "deep.json").write_text(DEEP)
    values, option, told = {**recipe_values}, "--run.output", "run.output"
    outputs = ["/proc/nowhere/run", str(tmp_path / "file/run"), str(tmp_path / ("long" * 100)), "a\0b"]
    if command == "collect":
        del values["train"], values["loss"], values["rollout"]
    elif command == "pipeline":
        stage = {name: section for name, section in values.items() if name != "run"}
        values = {"run": values["run"], "stages": {"s": {"kind": "train", **stage}}}
    elif command == "eval":
        option, told, outputs = "--output", "cannot be read and written", [*outputs[:2], str(tmp_path / "deep.json")]
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(tomli_w.dumps(values))
    for output in outputs:
        assert main([command, str(recipe_file), f"{option}={output}"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert told in line
        assert output in line


def test_a_file_moved_over_an_input_is_noticed_though_its_size_and_time_are_the_same(tmp_path):
    """Weights of one architecture are of one size, and archives of images give all files one time."""
    path = tmp_path / "rows.jsonl"
    path.write_text("one\n")
    before = identify({"data.path": str(path)}, {})
    other = tmp_path / "other"
    other.write_text("two\n")
    state = path.stat()
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.rename(path)
    assert changed_content(before, identify({"data.path": str(path)}, before)) == ["data.path"]
