"""What a person sees of a run without a terminal: a log that stays readable."""

import pytest

from flashgrpo.grpo.progress import step_bar


@pytest.mark.parametrize(("total", "most"), [(1, 1), (7, 7), (50, 21), (1125, 21)])
def test_a_log_has_few_lines_however_many_the_steps(total, most, capsys):
    with step_bar("sft", 0, total) as bar:
        for step in range(1, total + 1):
            bar.advance(step, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert min(total, 20) <= len(lines) <= most
    assert lines[0] == "sft 1: loss 1"
    assert lines[-1] == f"sft {total}: loss 1"
