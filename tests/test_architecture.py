"""The house: who may import whom, how long a file may be, and that the folders do not shadow other packages."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "model", "grpo", "bench")
# A room may import itself and those before it; rooms on one line know nothing of each other.
ROOMS = (
    ("kernels",),
    ("model",),
    ("grpo/recipe",),
    ("grpo/learn",),
    ("grpo/run",),
    ("grpo/data",),
    ("grpo/rollout", "grpo/rewards"),
    ("grpo", "grpo/stages"),  # one floor: training evaluates, a pipeline trains
    ("bench",),
)
GROUND = {"grpo/types.py", "grpo/errors.py"}  # for all of grpo/
DOOR = "grpo/cli.py"  # imports all of it, and nobody imports it
FILES_IN_A_ROOM = 12
ONE_IMPORTER = ("vllm", "tensorboard", "torch.utils.tensorboard")
KERNEL_PACKAGES = {"torch", "triton", "numpy", "flashgrpo"}

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, wherever the import stands, `from package import module` as package.module."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def imported_files(path: Path) -> set[str]:
    files = {module.removeprefix("flashgrpo.").replace(".", "/") + ".py" for module in imported_modules(path)}
    return {file for file in files if (ROOT / file).is_file()} - {str(path.relative_to(ROOT))}


def room_of(file: str) -> str:
    rooms = [room for floor in ROOMS for room in floor if file.startswith(f"{room}/")]
    return max(rooms, key=len)


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(ROOMS) if room in floor)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    file = str(path.relative_to(ROOT))
    here = room_of(file)
    for other in imported_files(path):
        there = room_of(other)
        if file == DOOR or other in GROUND:
            continue
        assert other != DOOR, "nobody imports the front door"
        assert file not in GROUND, f"{file} is ground, and imports {other}"
        same_floor = here == there or {here, there} == {"grpo", "grpo/stages"}
        assert same_floor or floor_of(there) < floor_of(here), f"{file} imports {other}"
    roots = {m.split(".")[0] for m in imported_modules(path)}
    assert not roots & set(FOLDERS), "import flashgrpo.kernels, not kernels"
    if here == "kernels":
        assert roots - set(sys.stdlib_module_names) <= KERNEL_PACKAGES, (
            "the kernels install with torch and triton alone"
        )


def test_no_files_import_each_other_in_a_round():
    arrows = {str(path.relative_to(ROOT)): imported_files(path) for path in SOURCES}
    while leaves := {file for file, targets in arrows.items() if not targets}:
        arrows = {file: targets - leaves for file, targets in arrows.items() if file not in leaves}
    assert sorted(arrows) == []


def test_a_room_has_few_files():
    sizes = Counter(path.parent for path in SOURCES if path.is_relative_to(ROOT / "grpo"))
    assert {str(room): size for room, size in sizes.items() if size > FILES_IN_A_ROOM} == {}


@pytest.mark.parametrize("package", ONE_IMPORTER)
def test_backends_are_imported_in_one_module(package):
    importers = [p for p in SOURCES if any(m == package or m.startswith(package + ".") for m in imported_modules(p))]
    assert len(importers) <= 1


def test_files_fit_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > 600} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_need_the_kernels_alone(path):
    ours = {module for module in imported_modules(path) if module.startswith("flashgrpo")}
    assert ours
    assert all(module.startswith("flashgrpo.kernels.") for module in ours)


def test_folders_are_not_packages():
    assert [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("kernels_installed", [False, True], ids=["without kernels", "with kernels"])
def test_transformers_imports_from_the_repository_root(tmp_path, kernels_installed):
    """transformers probes for the Hub package `kernels`; our folder of that name must not be taken for it."""
    if kernels_installed:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text("def get_kernel(*_, **__): ...\nMARK = 'the hub package'\n")
        metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    code = (
        "import sys; sys.path.insert(0, ''); import transformers; from transformers import AutoTokenizer, Qwen3Config\n"
        "from transformers.utils import is_kernels_available; print(is_kernels_available())\n"
        + ("import kernels; assert kernels.MARK" if kernels_installed else "")
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(kernels_installed)
