"""The numbers of README.md and docs/ are those of the results files."""

import pytest

from flashgrpo.bench import report


def test_the_pages_are_what_the_results_say():
    text = "".join(page.read_text() for page in report.pages())
    assert [text.count(f"<!-- results: {name} -->") for name in report.TABLES] == [1] * len(report.TABLES)
    assert report.render(text) == text, "run `make readme`"


def test_only_what_stands_between_the_marks_is_replaced():
    rendered = report.render("before\n<!-- results: demo -->\nstale\n<!-- end -->\nafter")
    assert rendered.startswith("before\n<!-- results: demo -->\n| seed |")
    assert rendered.endswith("|\n<!-- end -->\nafter")
    assert "stale" not in rendered


def kernel_row(provider: str, ms: float | None, case: str = "attention a", variant: str = "", **other) -> dict:
    timed = {} if ms is None else {"p50_ms": ms, "ratio": ms / 2, "share_of_limit": 1 / ms, "error": 1e-3}
    own = {"op": "attention", "case": case, "variant": variant, "provider": provider, "status": "ok"}
    return own | timed | other


def test_the_kernels_table_has_the_fastest_peer_that_is_right():
    found = [
        {"machine": {}},
        kernel_row("flashgrpo", 2.0),
        kernel_row("flashgrpo, prompt repeated", 0.5),
        kernel_row("slow", 9.0),
        kernel_row("fast", 3.0),
        kernel_row("wrong", 1.0, status="wrong"),
        kernel_row("absent", None, status="not installed"),
        kernel_row("flashgrpo", 8.0, case="attention of a sweep"),
        kernel_row("flashgrpo", 4.0, case="attention b", variant="short"),
    ]
    assert report.kernels_table(found)[2:] == [
        "| `attention a` | 2 | 50% | fast | 3 | 1.50 |",
        "| `attention b` | 4 | 25% | | | |",
    ]


def test_a_side_that_failed_stands_in_the_step_table():
    row = {"model": "m", "side": "s", "p50_ms": 500.0, "tokens_per_s": 2e3, "useful_mfu": 0.5, "peak_mib": 1024.0}
    row |= {"trained_tokens_per_s": 500.0, "checkpointing": "full"}
    failed = {"model": "m", "side": "t", "error": "OutOfMemoryError: full"}
    rows = report.step_table([{}, row | {"shares": {"attention": 0.25, "linear": 0.75}}, failed])
    assert rows[2:] == [
        "| m | s, full activation checkpointing | 0.50 | 2,000 | 500 | 50% | 1.00 | 25%, 75% |",
        "| m | t | OutOfMemoryError: full | | | | | |",
    ]


def test_check_says_what_a_page_should_be(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/more.md"):
        (tmp_path / page).write_text("<!-- results: demo -->\nstale\n<!-- end -->\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "--- docs/more.md" in printed
    assert printed.count("-stale") == printed.count("+| seed |") == 2
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        report.render("<!-- results: nonsense -->\n<!-- end -->")
