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
