"""A recipe means what its file and options say, and a fault in one is a line that names the key."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch

from flashgrpo.grpo.cli import labelled
from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import (
    CollectRecipe,
    Recipe,
    RewardModelRecipe,
    SftRecipe,
    build_recipe,
    load_recipe,
    recipe_keys,
    recipe_to_toml,
)
from flashgrpo.grpo.rollout.generator import settle_generator
from flashgrpo.grpo.rollout.vllm.launch import EngineOptions
from flashgrpo.grpo.stages.pipeline import load_pipeline
from flashgrpo.kernels.grpo_loss import LossConfig

RECIPES = Path(__file__).parents[3] / "recipes"
VALUES = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "run": {"output": "out"}}


@pytest.fixture
def load(tmp_path):
    """Write sections to a file, and load it with options over it."""

    def write(values: dict) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(values))
        return path

    def load_values(values: dict, *overrides: str, kind=Recipe):
        return load_recipe(kind, write(values), overrides)

    load_values.write = write
    return load_values


def faulty(section: str, **values) -> dict:
    return {**VALUES, section: {**VALUES.get(section, {}), **values}}


def test_a_recipe_of_a_windows_editor_is_read(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xef\xbb\xbf" + tomli_w.dumps(VALUES).encode())
    assert load_recipe(Recipe, file).run.output == "out"
    stage = {"kind": "sft", "model": {"path": "m"}, "data": {"path": "d.jsonl"}}
    file.write_bytes(b"\xef\xbb\xbf" + tomli_w.dumps({"run": {"output": "out"}, "stages": {"a": stage}}).encode())
    assert [stage.name for stage in load_pipeline(file)[1]] == ["a"]


def test_every_path_may_begin_with_the_home_folder(load, tmp_path, monkeypatch):
    """TOML keeps ~, and so does a shell in --run.output=~/x: it would be the name of a folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = {"path": "~/d"}
    values = {"model": {"path": "~/m"}, "data": data, "run": {"output": "~/o"}, "eval": {"benchmarks": ["~/b.jsonl"]}}
    values |= {"sources": {"s": data}, "reward_models": {"r": {"path": "~/r"}}, "rewards": {"functions": ["r"]}}
    assert "~" not in recipe_to_toml(load(values, "--run.output=~/p"))
    plain = {"model": {"path": "~/m"}, "data": data, "run": {"output": "~/o"}}
    assert "~" not in recipe_to_toml(load(plain | {"given": {"g": data}}, kind=CollectRecipe))
    for kind in (SftRecipe, RewardModelRecipe):
        assert load(plain, kind=kind).data.path == str(tmp_path / "home/d")
    stages = {"a": {"kind": "eval", "models": {"base": "~/m"}, "data": data}}
    _, (stage,) = load_pipeline(load.write({"run": {"output": "~/o"}, "stages": stages}))
    assert stage.folder == tmp_path / "home/o/a"
    assert stage.made_from["models"] == {"base": str(tmp_path / "home/m")}
    assert labelled("base=~/m") == ("base", str(tmp_path / "home/m"))
    with pytest.raises(
        RecipeError, match=r"run\.output: no user of that name has a home folder, found '~nobody_at_all/x'"
    ):
        load(values, "--run.output=~nobody_at_all/x")


@pytest.mark.parametrize("truncation", [{"top_p": 0.95}, {"top_k": 20}])
@pytest.mark.parametrize(
    ("more", "key"),
    [
        (
            {"rollout": {"max_staleness": 2, "generator": "vllm_server"}, "vllm": {"devices": ["cpu"]}},
            "max_staleness = 2",
        ),
        ({"loss": {"behavior_cap": 2.0}, "rollout": {"generator": "vllm"}}, r"loss.behavior_cap = 2"),
    ],
)
def test_ratios_to_a_truncated_samplers_log_probs_are_refused(load, truncation, more, key, model_path):
    """Where nobody tells what it kept, as vLLM's CPU build does not: every ratio would be the kept mass."""
    rollout, values = more.get("rollout", {}), {**VALUES, **more, "model": {"path": str(model_path)}}
    recipe = load({**values, "rollout": {**rollout, **truncation}})
    on_cpu, on_gpu = (SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))
    assert settle_generator(recipe, on_gpu) is recipe
    assert EngineOptions.of(recipe, on_gpu.device, longest_prompt=8).kept_limit == 512
    with pytest.raises(RecipeError, match=f"{key} weighs tokens by the sampler's .*wanted top_p = 1 and top_k = 0"):
        settle_generator(recipe, on_cpu)
    recipe = load({**values, "rollout": rollout})
    assert settle_generator(recipe, on_cpu) is recipe
    for world in (on_cpu, on_gpu):
        assert EngineOptions.of(recipe, world.device, longest_prompt=8).kept_limit == 0


def test_a_top_k_above_the_limit_of_kept_sets_is_refused(load):
    with pytest.raises(RecipeError, match="rollout: top_k = 600 is above kept_limit = 512"):
        load({**VALUES, "rollout": {"top_k": 600}})


def test_what_only_a_chat_template_reads_is_refused_for_others(load):
    assert load(faulty("data", template="chat"), "--data.template_options.thinks=false").data.template_options == {
        "thinks": False
    }
    for key in ({"system_prompt": "Be brief."}, {"template_options": {"thinks": False}}):
        with pytest.raises(
            RecipeError, match="data: template_options and system_prompt want template = chat, found r1"
        ):
            load(faulty("data", **key))


def test_defaults_are_the_documented_ones():
    recipe = build_recipe(Recipe, VALUES)
    assert recipe.loss == LossConfig.preset("grpo")
    assert recipe.rewards.functions == ["accuracy", "format"]
    assert (recipe.eval.temperature, recipe.eval.top_p, recipe.eval.every) == (0.6, 0.95, 0)
    assert (recipe.rollout.temperature, recipe.rollout.top_p, recipe.rollout.top_k) == (1.0, 1.0, 0)


def test_options_lie_over_the_file(load):
    recipe = load(
        faulty("train", lr=0.1, steps=7),
        "--train.lr=1e-5",
        "--train.betas=[0.9, 0.95]",
        "--rewards.functions=['accuracy', 'my.module:fn']",
        "--rewards.weights=[1, 0.5]",
        "--eval.every=5",
        "--rollout.mask_overlong=true",
        "--loss.preset=gspo",
        "--loss.clip_high=1",
    )
    assert (recipe.train.lr, recipe.train.steps, recipe.train.betas) == (1e-5, 7, (0.9, 0.95))
    assert recipe.rewards.functions == ["accuracy", "my.module:fn"]
    assert recipe.rewards.weights == [1.0, 0.5]
    assert recipe.eval.every == 5
    assert recipe.rollout.mask_overlong is True
    assert recipe.loss == LossConfig.preset("gspo", clip_high=1.0)


@pytest.mark.parametrize("text", ["5", "true", "[a]", 'a "quoted" name', "a=b", ""])
def test_text_keys_take_an_option_as_it_is(load, text):
    """A folder that is called 5 is not the number 5."""
    assert load(VALUES, f"--run.output={text}").run.output == text
    assert load(VALUES, f"--data.subset={text}").data.subset == text


def test_task_options_from_file_and_command_line(load):
    values = VALUES | {"data": {"task": "reasoning_gym:chain_sum", "options": {"min_terms": 2, "max_terms": 3}}}
    assert load(values, "--data.options.max_terms=5").data.options == {"min_terms": 2, "max_terms": 5}
    assert load(values, "--data.options={ min_digits = 1 }").data.options == {"min_digits": 1}
    assert load(values, "--data.options.words=[1, 'a']").data.options["words"] == [1, "a"]


def test_an_integer_is_a_float_where_a_float_is_wanted(load):
    recipe = load(VALUES | {"train": {"lr": 1}, "loss": {"clip_max": 5, "kl_coef": 0}, "rollout": {"temperature": 1}})
    for value in (recipe.train.lr, recipe.loss.clip_max, recipe.loss.kl_coef, recipe.rollout.temperature):
        assert type(value) is float
    assert recipe.loss.clip_max == 5.0


WRONG_FILES = [
    (faulty("train", lrr=1.0), r"train\.lrr: unknown key; did you mean train\.lr\?"),
    (faulty("model", lr=1.0), r"model\.lr: unknown key; did you mean train\.lr\?"),
    (faulty("loss", kl_coeff=0.1), r"loss\.kl_coeff: unknown key; did you mean loss\.kl_coef\?"),
    (faulty("train", qqqqq=1), r"train\.qqqqq: unknown key; known: train\.lr, train\.schedule"),
    (VALUES | {"trian": {}}, r"trian: unknown section; did you mean train\?"),
    (VALUES | {"train": 5}, r"train: found 5, wanted a section \[train\]"),
    (faulty("train", lr="1e-5"), r"train\.lr: .*number, found '1e-5'"),
    (faulty("train", lr=True), r"train\.lr: .*number, found True"),
    (faulty("train", lr=float("nan")), r"train\.lr: .*, found nan"),
    (faulty("train", steps=1.0), r"train\.steps: .*integer, found 1\.0"),
    (faulty("train", betas=[0.9, 1.0]), r"train\.betas\.1: .*less than 1, found 1\.0"),
    (faulty("model", compile=1), r"model\.compile: .*boolean, found 1"),
    (faulty("rollout", group_size=1), r"rollout\.group_size: .*greater than or equal to 2, found 1"),
    (
        faulty("rewards", functions=[]),
        r"rewards: .* of data have no function .* not 0, .* \[teacher\].*; found no func",
    ),
    (faulty("rewards", weights=[1.0]), r"rewards: found 1 weights for 2 functions, wanted one each"),
    (faulty("rewards", weights=[0, 0.0]), r"rewards: .* no function whose weight is not 0, .*; found accuracy, format"),
    (faulty("teacher", coef=2), r"teacher: found coef = 2 and device = trainer, but no path of a teacher"),
    (faulty("teacher", path="t", device="gpu"), r"teacher\.device: .*, found 'gpu'"),
    (
        faulty("rollout", refill_limit=1) | {"teacher": {"path": "t"}},
        r"rollout\.refill_limit = 1 .* \[teacher\].*wanted 0",
    ),
    (faulty("rewards", functions="accuracy"), r"functions: .*list, as \[.accuracy.\], found 'accuracy'"),
    (faulty("rewards", functions=["format", "format"]), r"rewards: found functions = .*, wanted each of them once"),
    (faulty("rewards", weights=[1.0, float("inf")]), r"rewards\.weights\.1: .*finite number, found inf"),
    (faulty("data", template="chatt"), r"data\.template: .*'r1', 'chat' or 'none', found 'chatt'"),
    (faulty("train", mini_batches=3), r"rollout\.prompts_per_step = 32 is not a multiple of train\.mini_batches = 3"),
    (faulty("data", task="reasoning_gym:chain_sum"), r"data: found task='.*' and path='d\.jsonl', wanted exactly one"),
    (VALUES | {"data": {}}, r"data: found task=None and path=None, wanted exactly one"),
    (faulty("eval", every=5) | {"data": {"path": "d", "held_out": 0}}, r"eval\.every = 5, but data\.held_out = 0"),
    ({"model": {"path": "m"}, "data": {"path": "d"}}, r"run: missing, and it has no default"),
    (VALUES | {"run": {"seed": 1}}, r"run\.output: missing, and it has no default"),
    (faulty("loss", preset="ppo"), r"loss: unknown preset 'ppo'; known presets: grpo, r1, dapo"),
    (faulty("loss", kl_coef="small"), r"loss: kl_coef is 'small'; wanted a finite number, 0 or above"),
    (faulty("loss", objective=3), r"loss: objective is 3; wanted one of clip, cispo"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_FILES, ids=[message[:40] for _, message in WRONG_FILES])
def test_a_faulty_file_is_one_line_that_names_file_and_key(load, values, message, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        load(values)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.toml'}: ")
    assert "\n" not in str(caught.value)


WRONG_OPTIONS = [
    ("--train.lrr=1", r"--train\.lrr=1: train\.lrr: unknown key; did you mean train\.lr\?"),
    ("--trian.lr=1", r"--trian\.lr=1: trian: unknown section; did you mean train\?"),
    ("--train.lr=fast", r"^--train\.lr=fast: train\.lr: .*number, found 'fast'"),
    ("--train.lr.x=1", r"^--train\.lr\.x=1: train\.lr is a value, not a section"),
    ("--train.steps.x=1", r"^--train\.steps\.x=1: train\.steps is a value, not a section"),
    ("--loss.kl_coef.x=1", r"loss\.kl_coef is a value, not a section"),
    ("--loss.kl_coef=much", r"^--loss\.kl_coef=much: loss: kl_coef is 'much'"),
    ("--rollout.group_size=1", r"^--rollout\.group_size=1: rollout\.group_size: .*found 1"),
    ("--rewards.functions=accuracy,format", r"functions: .*list, as '\[.accuracy., .format.\]', found 'acc"),
    ("--rewards.functions=[accuracy]", r"functions: .*list, as '\[.accuracy.\]', found '\[accuracy\]'"),
    ("--train.betas=0.9,1", r"train\.betas: .*tuple, as '\[0\.9, 1\]', found '0\.9,1'"),
    ("--lr=1e-5", r"^--lr=1e-5: wanted --section\.key=value; did you mean train\.lr\?$"),
    ("--top_p=1", r"wanted --section\.key=value; did you mean rollout\.top_p or eval\.top_p\?"),
    ("--train=5", r"--train=5: wanted --section\.key=value"),
    ("--train.lr", r"--train\.lr: wanted --section\.key=value"),
    ("train.lr=5", r"train\.lr=5: wanted --section\.key=value"),
]


@pytest.mark.parametrize(("option", "message"), WRONG_OPTIONS, ids=[option for option, _ in WRONG_OPTIONS])
def test_a_faulty_option_is_one_line_that_names_it(load, option, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load(faulty("train", lr=0.1), option)
    assert "\n" not in str(caught.value)


def test_an_option_over_a_faulty_file(load):
    """The file's fault is reported as the file's, whatever is laid over it."""
    with pytest.raises(RecipeError, match=r"recipe\.toml: train: found 5, wanted a section"):
        load(VALUES | {"train": 5}, "--train.lr=1")
    with pytest.raises(RecipeError, match=r"recipe\.toml: data\.options: found 5, wanted a section"):
        load(faulty("data", options=5), "--data.options.a=1")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"missing\.toml: cannot be read: No such file"):
        load_recipe(Recipe, tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("[train\nlr = 1")
    with pytest.raises(RecipeError, match=r"broken\.toml: not TOML: .*line 1"):
        load_recipe(Recipe, tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.toml: cannot be read: .*utf-8"):
        load_recipe(Recipe, tmp_path / "binary.toml")


def test_an_sft_recipe_has_its_own_keys(load):
    recipe = load(faulty("train", batch_size=4, epochs=3), "--train.lr=1", kind=SftRecipe)
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.train.lr) == (4, 3, 1.0)
    with pytest.raises(RecipeError, match=r"rollout: unknown section; known: model, data, run, train"):
        load(faulty("rollout", group_size=4), kind=SftRecipe)


@pytest.mark.parametrize("preset", ["gspo", "cispo"])
def test_the_recipe_that_a_run_writes_is_the_recipe_it_ran(load, tmp_path, preset):
    values = VALUES | {
        "data": {"task": "reasoning_gym:chain_sum", "options": {"min_terms": 2, "names": ["a", "ü"]}},
        "loss": {"preset": preset, "behavior_cap": 2.0},
        "train": {"betas": [0.9, 0.95], "lr": 3e-6},
        "rewards": {"weights": [1, 0.5]},
    }
    for recipe in (load(values), load(faulty("train", epochs=5), kind=SftRecipe)):
        (tmp_path / "resolved.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
        assert load_recipe(type(recipe), tmp_path / "resolved.toml") == recipe


@pytest.mark.parametrize("kind", [Recipe, SftRecipe])
def test_every_key_has_a_meaning_a_type_and_a_default(kind):
    keys = [*recipe_keys(kind)]
    sections = {f.name: f.type for f in dataclasses.fields(kind)}
    assert {key.name.partition(".")[0] for key in keys} == set(sections)
    assert len({key.name for key in keys}) == len(keys)
    for key in keys:
        assert key.meaning.endswith("."), key
        assert key.type, key
        assert key.default, key


def test_help_tells_defaults_as_a_file_would_have_them():
    keys = {key.name: key for key in recipe_keys(Recipe)}
    assert keys["model.path"].default == "required"
    assert keys["data.task"][1:3] == ("str", "none")
    assert keys["model.compile"].default == "false"
    assert keys["rewards.functions"].default == '["accuracy", "format"]'
    assert keys["train.betas"].default == "[0.9, 0.999]"
    assert keys["train.lr"].meaning == "Peak learning rate (AdamW)."
    assert keys["loss.preset"].type.split(" | ") == LossConfig.presets()
    assert keys["loss.kl_coef"].default == "of the preset"
    assert keys["loss.kl_estimator"][1:3] == ("k1 | k2 | k3", '"k3"')


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_load(path):
    if "[stages." in path.read_text():
        assert len(load_pipeline(path)[1]) >= 3
    else:
        kind = SftRecipe if path.stem == "sft" else Recipe
        assert isinstance(load_recipe(kind, path), kind)


def test_r1_zero_is_the_papers():
    """arXiv 2501.12948: 8,192 outputs a rollout, 32 questions x 16 outputs an update, 10,400 updates, KL 0.001."""
    recipe = load_recipe(Recipe, RECIPES / "r1_zero.toml")
    rollout, train = recipe.rollout, recipe.train
    assert (train.lr, train.schedule, recipe.loss.kl_coef, recipe.loss.kl_estimator) == (3e-6, "constant", 0.001, "k3")
    assert (recipe.loss.aggregate, recipe.loss.advantage_scale, recipe.loss.objective) == (
        "sequence_mean",
        "std",
        "clip",
    )
    assert rollout.prompts_per_step * rollout.group_size == 8192
    assert (rollout.prompts_per_step // train.mini_batches, rollout.group_size) == (32, 16)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens) == (1.0, 1.0, 0, 32_768)
    assert train.epochs == 1
    assert train.steps * train.mini_batches == 10_400
    assert train.ref_refresh_every * train.mini_batches == 400
    assert recipe.rewards.functions == ["accuracy", "format"]
    assert len(set(recipe.rewards.weights)) <= 1
    assert (recipe.data.template, recipe.eval.temperature, recipe.eval.top_p) == ("r1", 0.6, 0.95)
