"""How long a call takes, and by whose clock."""

import contextlib
import time
from unittest.mock import create_autospec

import torch
import triton
from rich.console import Console

from flashgrpo.bench import timing
from flashgrpo.bench.timing import in_turns, markdown, noted, sample_ms, show, time_turns
from flashgrpo.model import waits

CPU = torch.device("cpu")


def test_sides_take_turns_in_two_passes_after_a_call_that_does_not_count():
    order = []
    found = time_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, rounds=2)
    assert "".join(order) == "ab" + 2 * "aabb"
    assert found["a"]["rounds"] == 4
    assert found["a"]["p20_ms"] <= found["a"]["p50_ms"] <= found["a"]["p80_ms"]


def test_what_takes_long_is_named_while_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(waits, "_PATIENCE_S", 0.05)
    time_turns({"slow": lambda: time.sleep(0.2), "quick": lambda: None}, CPU)
    assert capsys.readouterr().err.splitlines() == ["warming up slow", "measuring slow", "measuring slow"]


def test_a_side_that_failed_has_no_second_turn():
    called = []

    def failing() -> list[float]:
        called.append(1)
        raise ValueError

    turns = in_turns({"a": failing, "b": lambda: [2.0]}, lambda name: contextlib.suppress(ValueError))
    assert [(name, times["p50_ms"], times["rounds"]) for name, times in turns] == [("b", 2.0, 1), ("b", 2.0, 2)]
    assert called == [1]


def test_a_peer_of_triton_alone_says_that_it_needs_a_gpu():
    row = {}
    with noted(row):
        raise RuntimeError("0 active drivers ([]). There should only be one.")
    assert row == {"status": "failed", "note": "RuntimeError: it needs a GPU"}


def test_a_table_that_a_terminal_cuts_says_how_to_see_it(monkeypatch, capsys):
    lines = markdown(["operation", "ms:"], [["attention", "123456789"]])
    for width, is_cut in ((14, True), (40, False)):
        monkeypatch.setattr(timing, "Console", lambda chars=width, **_: Console(width=chars))
        show(lines, "a note")
        printed = capsys.readouterr().out
        assert ("less -S" in printed) == is_cut == ("123456789" not in printed)
        assert "a note" in printed


def test_a_budget_is_spent_and_not_more():
    """A slow side gets as much time as a fast one, and a call at the least."""
    assert len(sample_ms(lambda: torch.zeros(1), CPU, budget_s=5.0)) == 100
    assert len(sample_ms(lambda: torch.randn(10**6), CPU, budget_s=1e-4)) == 1


def test_short_calls_on_a_gpu_are_timed_by_triton(monkeypatch):
    """Without a GPU: with arguments that it takes; a long call is not called seven times before it counts."""
    do_bench = create_autospec(triton.testing.do_bench, return_value=[1.0, 2.0])
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert sample_ms(lambda: None, torch.device("cuda"), budget_s=0.5) == [1.0, 2.0]
    assert do_bench.call_args.kwargs["rep"] == 500
    assert len(sample_ms(lambda: time.sleep(0.02), torch.device("cuda"), budget_s=0.05)) == 3
    assert do_bench.call_count == 1


def test_an_empty_cell_is_one_space():
    assert markdown(["", "ms:"], [["x", ""]]) == ["| | ms |", "| --- | ---: |", "| x | |"]
