"""README.md, docs/ and their like: links lead somewhere, examples run, commands are understood."""

import ast
import re
import shlex
import tomllib
from itertools import dropwhile
from pathlib import Path

import pytest
import torch

from flashgrpo.bench.api import PUBLIC
from flashgrpo.bench.shapes import SHAPES
from flashgrpo.grpo.cli import _parser
from flashgrpo.grpo.learn.learner import Learner
from flashgrpo.grpo.recipe.load import Recipe, build_recipe, load_recipe
from flashgrpo.grpo.recipe.schema import TrainSection
from flashgrpo.grpo.stages.kinds import KINDS
from flashgrpo.grpo.stages.pipeline import load_pipeline
from flashgrpo.model.checkpoint import init_decoder
from flashgrpo.model.config import ModelConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")), *DOCS]
MAKEFILE = (ROOT / "Makefile").read_text()
# The first words of lines in blocks of commands that are not ours.
OTHERS = {"source", "pytest", "cd", "cp"}
MODULE = "flashgrpo.grpo.cli"

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(language: str) -> list[tuple[str, str]]:
    """(name, text) of every fenced block in a language, of all pages."""
    found = []
    for page in PAGES:
        texts = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        found += [(f"{page.name} {number}", text) for number, text in enumerate(texts, start=1)]
    return found


EXAMPLES = dict(blocks("python"))
COMMANDS = [
    line
    for _, text in blocks("bash")
    for line in text.replace("\\\n", "").splitlines()
    if line and not line.startswith("#")
]


def section(page: Path, title: str) -> list[str]:
    """The lines below a heading, up to the next one."""
    return page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()


def anchors(page: Path) -> set[str]:
    """What a link can name in a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@by_name
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), f"{target}: no such file"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_every_page_is_in_the_list_of_the_readme():
    linked = re.findall(r"\]\((docs/\w+\.md)\)", "\n".join(section(README, "Start")))
    assert sorted(linked) == [str(page.relative_to(ROOT)) for page in DOCS]


@by_name
def test_files_that_are_named_exist(page):
    """Those of the project, in backticks or, in the README, in the tree of its rooms."""
    text = page.read_text()
    for path in re.findall(r"`((?:\.ci|bench|examples|grpo|kernels|model|recipes|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_rooms_of_the_readme_are_those_of_the_project():
    tree = "\n".join(section(README, "The rooms")).split("```")[1]
    named = re.findall(r"^ *([\w.]+/?)", tree, re.MULTILINE)
    ignored = ("runs", "build", "dist")  # of a run, and of pip install
    floor = [
        f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name.isalpha() and path.name not in ignored
    ]
    rooms = [f"{path.parent.name}/" for path in (ROOT / "grpo").glob("*/*.py")]
    files = [path.name for path in (ROOT / "grpo").glob("*.py")]
    assert sorted(named) == sorted({*floor, *rooms, *files})


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 230
    words = [line for line in section(README, "Words") if re.match(r"\| \w", line)]
    assert 20 <= len(words) <= 30


def told() -> str:
    """Every text of the sources, one a line, with NUL in place of its values."""
    texts = []
    for path in [path for folder in ("model", "grpo") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant):
                texts.append(str(node.value))
    return "\n".join(text.replace("\n", " ") for text in texts)


def test_symptoms_are_in_our_own_words():
    """What the page of troubleshooting quotes is told by the sources: a message, or the name of a number. So are the
    numbers of a step in the page of training.
    """
    pages = (ROOT / "docs/troubleshooting.md").read_text().splitlines()
    pages += section(ROOT / "docs/train.md", "The run's folder")
    rows = [row[1] for row in map(re.compile(r"\| (.*?) \| ").match, pages) if row]
    quoted = re.findall(r"`([^`]+)`", " ".join(rows))
    assert len(quoted) > 60
    texts = told()
    for words in quoted:
        pattern = ".*".join(map(re.escape, words.split("..")))
        of_any_name = "^" + re.escape(words.partition("/")[0] + "/\0")
        assert re.search(f"{pattern}|{of_any_name}" if "/" in words else pattern, texts, re.MULTILINE), words


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(name):
    code = EXAMPLES[name]
    lines = [line for line in code.splitlines() if line.strip() and not re.match(r"\s*#|import |from ", line)]
    assert len(lines) <= 20, "about 15 lines each"
    exec(compile(code, name, "exec"), {})


def test_the_step_of_the_readme_trains():
    """What it scores becomes likelier."""
    scope: dict = {}
    exec(compile(next(code for code in EXAMPLES.values() if "def train_step" in code), "README.md", "exec"), scope)
    torch.manual_seed(0)
    config = {**SHAPES["small"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 20}
    model = init_decoder(ModelConfig.from_dict(config), seed=0)
    learner = Learner(model, TrainSection(lr=1e-2), total_steps=30)
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
    assert all(re.search(rf"\b{name}\(", "".join(EXAMPLES.values())) for name in names.split())


def test_what_the_examples_import_is_on_the_page_of_public_functions():
    imports = re.findall(r"^from flashgrpo\.(\S+) import (.*)", "\n".join(EXAMPLES.values()), re.MULTILINE)
    assert len(imports) > 10
    for module, names in imports:
        assert {*names.split(", ")} <= {*PUBLIC.get(module, ())}, module


def test_recipes_are_recipes():
    recipes = blocks("toml")
    assert recipes
    for name, text in recipes:
        assert build_recipe(Recipe, tomllib.loads(text), name)


def test_commands_in_the_text_exist():
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`flashgrpo ([a-z-]+)", text))
    assert named <= set(re.findall(r"^    ([a-z-]+)\s", _parser().format_help(), re.MULTILINE))
    targets = set(re.findall(r"`make ([a-z][\w-]*)", text))
    assert targets <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))


def words_of(line: str) -> list[str]:
    """Without the environment in front of it."""
    words = shlex.split(line, comments=True)
    return [*dropwhile(lambda word: "=" in word, words)]


def flashgrpo_words(line: str) -> list[str] | None:
    """What a line gives to the command line, or None for another program's."""
    words = words_of(line)
    if words[0] == "flashgrpo":
        return words[1:]
    if words[0] == "torchrun":
        assert words[words.index("-m") + 1] == MODULE
        return words[words.index(MODULE) + 1 :]
    if words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
        return ["train", *words[2:]]
    return None


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    """By the command line, and so are the recipes and keys that they name; targets stand in the Makefile."""
    words = flashgrpo_words(line)
    if words is None:
        program, *rest = words_of(line)
        assert program in {"make", *OTHERS}, "a command that nobody has tried"
        for word in rest if program == "make" else []:
            variable, is_variable, _ = word.partition("=")
            wanted = rf"\b{variable}\b" if is_variable else rf"^{re.escape(word)}:"
            assert re.search(wanted, MAKEFILE, re.MULTILINE), word
        return
    options, overrides = _parser().parse_known_args(words)
    if options.command == "pipeline":
        stages = load_pipeline(ROOT / options.recipe, overrides)[1]
        assert options.until in {None, *(stage.name for stage in stages)}
    elif options.command == "demo":
        assert (ROOT / options.recipe).is_file()
    elif "recipe" in options:
        # `eval` takes the recipe of a run; only a stage of that kind has one of its own.
        kind = KINDS[options.command].recipe if options.command in KINDS.keys() - {"eval"} else Recipe
        assert load_recipe(kind, ROOT / options.recipe, overrides)
    else:
        assert overrides == []


def test_the_commands_of_the_pages_are_many():
    """Those that a reader looks for first; what is left out here is found with --help."""
    seen = {words[0] for words in map(flashgrpo_words, COMMANDS) if words}
    assert seen >= {"train", "sft", "pipeline", "eval", "plan", "serve", "sample", "report", "bench"}
