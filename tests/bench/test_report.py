"""The README's numbers are those of the results files."""

import re
import shlex

import pytest
import torch

from flashgrpo.bench import report
from flashgrpo.bench.shapes import SHAPES
from flashgrpo.grpo.cli import _parser
from flashgrpo.grpo.recipe.load import Recipe, SftRecipe, load_recipe
from flashgrpo.grpo.stages.pipeline import load_pipeline
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig


def test_the_readme_is_what_the_results_say():
    text = (report.ROOT / "README.md").read_text()
    assert all(f"<!-- results: {name} -->" in text for name in report.TABLES)
    assert report.render(text) == text, "run `make readme`"


def test_the_commands_of_the_readme_are_understood():
    """By the command line, and so are the recipes and keys that they name."""
    lines = (report.ROOT / "README.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("flashgrpo ")]
    seen = set()
    for command in commands:
        options, overrides = _parser().parse_known_args(command)
        seen.add(options.command)
        if options.command == "pipeline":
            assert load_pipeline(report.ROOT / options.recipe, overrides)[1]
        elif "recipe" in options:
            kind = SftRecipe if options.command == "sft" else Recipe
            assert load_recipe(kind, report.ROOT / options.recipe, overrides)
    assert seen == {"train", "sft", "pipeline", "eval", "plan", "serve", "sample", "report", "bench"}


EXAMPLES = re.findall(r"```python\n(.*?)```", (report.ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[re.findall(r"import (\w+)", code)[-1] for code in EXAMPLES])
def test_the_examples_run(example):
    lines = [line for line in example.splitlines() if line and not line.startswith(("import", "from"))]
    assert 3 <= len(lines) <= 16, "about 15 lines each"
    exec(compile(example, "README.md", "exec"), {})


def test_the_step_of_the_readme_trains():
    """What it scores becomes likelier."""
    scope: dict = {}
    exec(compile(next(code for code in EXAMPLES if "def train_step" in code), "README.md", "exec"), scope)
    torch.manual_seed(0)
    config = {**SHAPES["small"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 20}
    model = init_decoder(ModelConfig.from_dict(config), seed=0)
    learner = scope["Learner"](model, scope["TrainSection"](lr=1e-2), total_steps=30)
    shares = []

    def reward(rollout) -> float:
        shares.append(float((rollout.completion_ids == 7).mean()))
        return shares[-1]

    for step in range(1, 31):
        learner.set_lr(step)
        assert scope["train_step"](model, learner, [[5, 6], [8, 9, 10]], reward, step).isfinite()
    assert sum(shares[-64:]) > 3 * sum(shares[:64])


def test_every_kernel_has_an_example():
    names = "packed_attention gather_logprobs grpo_loss pack_padded logits_grpo_loss linear_logprobs linear_grpo_loss"
    assert all(re.search(rf"\b{name}\(", "".join(EXAMPLES)) for name in names.split())


def test_only_what_stands_between_the_marks_is_replaced():
    rendered = report.render("before\n<!-- results: demo -->\nstale\n<!-- end -->\nafter")
    assert rendered.startswith("before\n<!-- results: demo -->\n| seed |")
    assert rendered.endswith("|\n<!-- end -->\nafter")
    assert "stale" not in rendered


def test_check_says_what_the_readme_should_be(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("<!-- results: demo -->\nstale\n<!-- end -->\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--check"]) == 1
    assert "-stale" in (printed := capsys.readouterr().out)
    assert "+| seed |" in printed
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        report.render("<!-- results: nonsense -->\n<!-- end -->")
