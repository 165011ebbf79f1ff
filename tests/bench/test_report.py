"""The numbers of README.md and docs/ are those of the results files."""

import re

import pytest

from flashgrpo.bench import report


def test_the_pages_are_what_the_results_say():
    text = "".join(page.read_text() for page in report.pages())
    assert [text.count(f"<!-- results: {name} -->") for name in report.TABLES] == [1] * len(report.TABLES)
    assert report.render(text) == text, "run `make readme`"


def test_check_says_what_a_page_should_be(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/more.md"):
        (tmp_path / page).write_text("before\n<!-- results: demo -->\nstale\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "--- docs/more.md" in printed
    assert printed.count("-stale") == printed.count("+| seed |") == 2
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    # Only what stands between the marks is another.
    for page in report.pages():
        assert re.fullmatch(r"before\n<!-- .* -->\n\| seed \|.*\|\n<!-- end -->\nafter\n", page.read_text(), re.DOTALL)


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        report.render("<!-- results: nonsense -->\n<!-- end -->")
