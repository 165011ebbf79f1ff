"""The house: who may import whom, how long a file may be, and that the folders do not shadow other packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "model", "grpo", "bench")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "model": {"kernels", "model"},
    "grpo": {"kernels", "model", "grpo"},
    "bench": {"kernels", "model", "grpo", "bench"},
}
ONE_IMPORTER = ("vllm", "tensorboard", "torch.utils.tensorboard")
KERNEL_PACKAGES = {"torch", "triton", "numpy", "flashgrpo"}

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    folder = path.relative_to(ROOT).parts[0]
    ours = {m.split(".")[1] for m in imported_modules(path) if m.startswith("flashgrpo.")}
    assert ours <= MAY_IMPORT[folder]
    roots = {m.split(".")[0] for m in imported_modules(path)}
    assert not roots & set(FOLDERS), "import flashgrpo.kernels, not kernels"
    if folder == "kernels":
        assert roots - set(sys.stdlib_module_names) <= KERNEL_PACKAGES, (
            "the kernels install with torch and triton alone"
        )


@pytest.mark.parametrize("package", ONE_IMPORTER)
def test_backends_are_imported_in_one_module(package):
    importers = [p for p in SOURCES if any(m == package or m.startswith(package + ".") for m in imported_modules(p))]
    assert len(importers) <= 1


def test_files_fit_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > 600} == {}


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
