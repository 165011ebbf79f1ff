"""The README's numbers are those of the results files."""

import pytest

from flashgrpo.bench import readme


def test_the_readme_is_what_the_results_say():
    text = (readme.ROOT / "README.md").read_text()
    assert all(f"<!-- results: {name} -->" in text for name in readme.TABLES)
    assert readme.render(text) == text, "run `make readme`"


def test_only_what_stands_between_the_marks_is_replaced():
    rendered = readme.render("before\n<!-- results: demo -->\nstale\n<!-- end -->\nafter")
    assert rendered.startswith("before\n<!-- results: demo -->\n| seed |")
    assert rendered.endswith("|\n<!-- end -->\nafter")
    assert "stale" not in rendered


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        readme.render("<!-- results: nonsense -->\n<!-- end -->")
