"""The plain loop on a transformers model."""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hf_loop


def test_packed_prompts_have_the_loss_and_gradients_of_padded_rows(capsys):
    hf_loop.main(steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step")][1].startswith("step  2 of 2: reward 0.")
    packed, padded, off = map(float, re.findall(r"-?\d+\.\d+(?:e-\d+)?", next(x for x in lines if "gradients" in x)))
    assert packed == pytest.approx(padded, abs=1e-6)
    assert packed != 0
    assert off < 1e-5
    shared, repeated = map(int, re.findall(r"\d+", next(x for x in lines if "through the layers" in x)))
    assert shared * 2 < repeated


def test_a_transformers_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    sys.modules["transformers"].__version__ = "4.40.0"
    with pytest.raises(SystemExit, match=r"needs transformers .* or newer; found 4\.40\.0"):
        runpy.run_path(str(Path(hf_loop.__file__)))
