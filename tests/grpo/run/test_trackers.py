"""Trackers get every number, sample and recipe; none of them ends a run, lets it wait, or begins one that lacks it."""

import importlib.util
import json
import sys
import time
import types
from pathlib import Path

import pytest
import tomli_w
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.run import trackers
from flashgrpo.grpo.run.trackers import SAMPLES, Trackers

SAMPLE = {"prompt": "1+1=", "completion": "2\n# no heading", "reward": 1.0, "rewards": {"accuracy": 1.0, "code": None}}


class Client(types.ModuleType):
    """What trackio and wandb have in common; `test_the_clients_take_what_they_are_given` holds it against theirs."""

    def __init__(self, name):
        super().__init__(name)
        self.opened, self.logged, self.tables, self.finished = [], [], [], 0

    def login(self, verify=True):
        pass

    def init(self, **options):
        self.opened.append(options)
        return self

    def Table(self, columns, data):
        self.tables.append((columns, data))
        return "table"

    def log(self, metrics, step=None):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def client(monkeypatch):
    """client(name) -> a client of that name in place of the real one."""

    def make(name: str) -> Client:
        monkeypatch.setitem(sys.modules, name, found := Client(name))
        return found

    return make


@pytest.fixture
def make_recipe(tmp_path):
    def make(*loggers: str) -> Recipe:
        return build_recipe(
            Recipe,
            {
                "model": {"path": "m"},
                "data": {"path": "d"},
                "train": {"betas": [0.9, 0.95]},
                "run": {"output": str(tmp_path), "loggers": [*loggers]},
            },
        )

    return make


def test_tensorboard_has_numbers_samples_and_the_recipe(make_recipe, tmp_path):
    with Trackers(make_recipe("tensorboard"), -1, {}) as opened:
        opened.log(1, {"loss": 0.5, "kl": None})
        opened.log(1, {SAMPLES: [SAMPLE]})
        opened.log(2, {"loss": 0.25})
    with Trackers(make_recipe("tensorboard"), 1, {2: {"loss"}}) as opened:
        opened.log(2, {"loss": 0.125})
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    # What was after the checkpoint is drawn once, as it came to be.
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 0.125)]
    (text,) = found.Tensors("samples/text_summary")
    assert b"    # no heading" in text.tensor_proto.string_val[0]
    assert b"train.lr" in found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_client_has_numbers_samples_and_the_recipe_and_goes_on(name, client, make_recipe, monkeypatch):
    found = client(name)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    with Trackers(make_recipe(name), -1, {}) as opened:
        opened.log(1, {SAMPLES: [SAMPLE]})
        opened.log(1, {"loss": 0.5, "kl": None})
        opened.log(2, {"loss": 0.25})
    # Step 2 was after the checkpoint; its evaluation is new.
    with Trackers(make_recipe(name), 1, {2: {"step", "loss", SAMPLES}}) as opened:
        opened.log(2, {SAMPLES: [SAMPLE]})
        opened.log(2, {"loss": 0.25, "eval/pass@1": 0.75})
    assert found.logged == [
        (1, {"samples": "table"}),
        (1, {"loss": 0.5}),
        (2, {"loss": 0.25}),
        (2, {"eval/pass@1": 0.75}),
    ]
    (columns, ((prompt, completion, *_, rewards),)), *_ = found.tables
    assert (columns, prompt, completion) == ([*SAMPLE], "1+1=", "2\n# no heading")
    assert json.loads(rewards) == SAMPLE["rewards"]
    first, second = found.opened
    assert first == second
    assert (first["project"], first["resume"]) == ("mine", "allow")
    assert (first["config"]["train.steps"], first["config"]["train.betas"]) == (100, "[0.9, 0.95]")
    assert first["name"].endswith(first["id"] if name == "wandb" else first["name"][-8:])
    assert found.finished == 2


def test_the_clients_take_what_they_are_given(make_recipe, tmp_path, monkeypatch):
    """The real ones, where they are installed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    names = [name for name in ("trackio", "wandb") if importlib.util.find_spec(name)]
    if not names:
        pytest.skip("neither trackio nor wandb is installed")
    recipe = make_recipe(*names)
    trackers.check_trackers(recipe)
    for last_step in (-1, 1):
        with Trackers(recipe, last_step, {}) as opened:
            opened.log(last_step + 2, {SAMPLES: [SAMPLE]})
            opened.log(last_step + 2, {"loss": 0.5, "kl": None})
        assert not any(tracker._is_off for tracker in opened._trackers)


@pytest.fixture
def loggers(tmp_path, monkeypatch) -> Path:
    """A person's module of functions that get rows."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_loggers.py").write_text(
        "import time\n"
        "rows = []\n"
        "def keep(row): rows.append(row)\n"
        "def fail(row): raise SystemExit('no disk')\n"
        "def hang(row): time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("my_loggers", None)


def test_a_function_gets_each_row(make_recipe, loggers):
    with Trackers(make_recipe("my_loggers:keep"), -1, {}) as opened:
        opened.log(1, {SAMPLES: [SAMPLE]})
        opened.log(1, {"loss": 0.5, "kl": None})
    assert sys.modules["my_loggers"].rows == [{"step": 1, "loss": 0.5, "kl": None}]


@pytest.mark.parametrize("broken", ["init", "log", "finish", "function", "hangs"])
def test_a_tracker_that_fails_is_told_of_once_and_stops_nothing(
    broken, client, make_recipe, loggers, monkeypatch, capsys
):
    monkeypatch.setattr(trackers, "_QUIET_S", 0.05)
    monkeypatch.setattr(trackers, "_CLOSE_S", 0.1)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 5)
    name = {"function": "my_loggers:fail", "hangs": "my_loggers:hang"}.get(broken, "trackio")
    if name == "trackio":

        def fail(*_, **__):
            raise ConnectionError("no\nnetwork")

        monkeypatch.setattr(client(name), broken, fail)
    start = time.monotonic()
    with Trackers(make_recipe(name, "my_loggers:keep"), -1, {}) as opened:
        for step in range(20):
            opened.log(step, {"loss": 0.5})
            time.sleep(0.005)
    assert time.monotonic() - start < 3
    assert [row["step"] for row in sys.modules["my_loggers"].rows] == [*range(20)]
    (told,) = capsys.readouterr().err.splitlines()
    why = {"function": "SystemExit: no disk", "hangs": "is 5 rows behind"}.get(broken, "ConnectionError: no network")
    assert told.startswith(f"run.loggers: {name} ")
    assert why in told


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("trackio", "run.loggers: trackio cannot be imported (ModuleNotFoundError: "),
        ("wandb", "run.loggers: wandb cannot be imported (ModuleNotFoundError: "),
        ("my_loggers:kept", "run.loggers 'my_loggers:kept': my_loggers has no function 'kept'; did you mean keep?"),
        ("no_such:f", "run.loggers 'no_such:f': cannot import 'no_such'"),
        ("wandbb", "run.loggers.0: wanted tensorboard, trackio, wandb or \"package.module:function\", found 'wandbb'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_the_start(
    logger, message, recipe_values, loggers, tmp_path, monkeypatch, capsys
):
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe_values))
    # Also before a model is downloaded.
    overrides = f'--run.loggers=["{logger}"]', "--model.path=someone/no-model"
    assert main(["train", str(tmp_path / "recipe.toml"), *overrides]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert message in told
    assert not any((tmp_path / "run").glob("*.*"))


def test_a_wandb_without_a_key_is_refused_before_the_start(client, make_recipe, monkeypatch):
    def login(verify):
        raise ValueError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(client("wandb"), "login", login)
    with pytest.raises(RecipeError, match=r"wandb: No API key configured.*WANDB_MODE=offline"):
        trackers.check_trackers(make_recipe("wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check_trackers(make_recipe("wandb"))
