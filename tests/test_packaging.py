"""What a user gets from the project without its checkout."""

import subprocess
import sys
import tomllib
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent.parent


def test_a_wheel_holds_recipes_pictures_and_marks_of_types(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    exec((ROOT / "setup.py").read_text(), {})
    files = set()
    for package, folder in found["package_dir"].items():
        for pattern in found["package_data"][""] + found["package_data"].get(package, []):
            files |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)}
    assert files >= {f"{folder}/py.typed" for folder in ("kernels", "model", "grpo", "bench")}
    assert files >= {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").iterdir() if path.is_file()}
    assert files >= {"bench/results/demo.png", "bench/results/r1_tiny.png"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["keywords"]
    assert "Typing :: Typed" in project["classifiers"]


def test_kernels_and_decoder_import_and_run_on_a_cpu_with_torch_alone():
    program = """
import importlib.util, sys
sys.modules["transformers"] = sys.modules["psutil"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from flashgrpo.kernels import attention, common, grpo_loss, linear_grpo, logprob
from flashgrpo.model import batch, cost, cpu, decoder, sharding
assert "flashgrpo.kernels.loss_triton" in sys.modules and not common.HAS_TRITON
logits = torch.randn(3, 8, requires_grad=True)
logprob.gather_logprobs(logits, torch.tensor([1, 2, 3]))[0].sum().backward()
try:
    logprob._logprob_fwd_kernel[(1,)](logits)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "kernels on a GPU need triton, which is not installed; pip install triton\n", done.stderr
