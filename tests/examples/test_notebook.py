"""examples/kernels.ipynb runs from its first cell to its last, and its outputs are there for who only reads it."""

import json
import re
from pathlib import Path

import matplotlib as mpl
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/kernels.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def words(text: str) -> str:
    """Without the numbers, whose last digits are the machine's."""
    return re.sub(r"\d[\d.e-]*", "", text)


def test_the_cells_run_and_print_what_the_notebook_shows(capsys):
    mpl.use("Agg")
    scope: dict = {}
    for cell in CELLS:
        exec("".join(cell["source"]), scope)
        found = capsys.readouterr().out
        assert words(found) == words(printed(cell))
    for plain, fused in zip(*scope["found"].values(), strict=True):
        assert float((fused - plain).norm() / plain.norm()) < 1e-5
    assert scope["shared"][scope["rows"]].numpy() == pytest.approx(scope["repeated"].numpy(), abs=1e-5)
    assert scope["curve"][-1] > 0.9
    assert [*CELLS[-1]["outputs"][-1]["data"]].count("image/png") == 1
    assert NOTEBOOK.stat().st_size < 50_000
