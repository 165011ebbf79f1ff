"""Two results files become one table that tells what has changed and what has only been measured again."""

import json

import pytest

from flashgrpo.bench import timing
from flashgrpo.grpo.cli import main

MACHINE = {"device": "A CPU", "cores": 2, "torch": "2.13", "commit": "a"}


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """compare(ending, a, b) -> exit code and what was printed of two files with these contents."""
    monkeypatch.chdir(tmp_path)

    def run(ending, *contents):
        for name, found in zip("ab", contents, strict=True):
            text = "\n".join(map(json.dumps, found)) if isinstance(found, list) else json.dumps(found)
            (tmp_path / f"{name}{ending}").write_text(text)
        code = main(["bench", "compare", f"a{ending}", f"b{ending}"])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def kernel(case, ms, spread=0.02):
    return {"case": case, "provider": "flashgrpo", "p50_ms": ms, "spread": spread}


def cells_of(printed: str, name: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if name in line]
    return line.replace(name, "").split()


def test_times_are_compared_case_by_case(compare):
    old = [{"machine": MACHINE}, kernel("x", 2.0), kernel("y", 4.0), kernel("gone", 1.0), {"case": "failed"}]
    new = [{"machine": MACHINE | {"commit": "b", "busy_cores": 1.5}}, kernel("x", 1.0), kernel("y", 4.1)]
    code, printed = compare(".jsonl", old, new)
    assert code == 0
    assert cells_of(printed, "x · flashgrpo") == ["2", "1", "ms", "2.000", "2.0%,", "2.0%", "faster"]
    assert cells_of(printed, "y · flashgrpo")[3:] == ["0.976", "2.0%,", "2.0%", "within", "the", "spread"]
    notes = printed.splitlines()[-3:]
    assert notes == ["only in a.jsonl: gone · flashgrpo", "commit: A a, B b", "busy_cores: A None, B 1.5"]


def test_each_case_of_one_file_alone_has_a_line_and_files_without_a_common_case_are_refused(compare):
    header = {"machine": MACHINE}
    _, printed = compare(".jsonl", [header, *(kernel(case, 1.0) for case in "xyz")], [header, kernel("x", 1.0)])
    assert printed.splitlines()[-2:] == ["only in a.jsonl: y · flashgrpo", "only in a.jsonl: z · flashgrpo"]
    code, printed = compare(".jsonl", [header, kernel("x", 1.0)], [header, kernel("y", 1.0)])
    assert code == 2
    assert printed == "flashgrpo: a.jsonl and b.jsonl have no case in common; wanted two files of one benchmark\n"


def test_of_rates_more_is_faster(compare):
    rates = {"tokens_per_s": {"native": 100.0}, "spread": {"native": 0.01}, "machine": MACHINE}
    code, printed = compare(".json", rates, rates | {"tokens_per_s": {"native": 50.0}})
    assert code == 0
    assert cells_of(printed, "native") == ["100", "50", "tokens/s", "0.500", "1.0%,", "1.0%", "slower"]


@pytest.mark.parametrize("found", [{"machine": MACHINE}, {"tokens_per_s": {"native": 1.0}}, [[]], 5])
def test_what_is_no_results_file_is_one_line_and_exit_2(compare, found):
    code, printed = compare(".json", found, found)
    assert code == 2
    kinds = "kernels, step, generate, sync or cpu-step"
    assert f"flashgrpo: a.json: not a results file of {kinds}: it has no machine and times\n" in printed
    assert len(printed.splitlines()) == 1


def test_the_results_of_the_pages_can_be_compared(capsys):
    for name in ("step_amd_epyc.jsonl", "generate_amd_epyc.json", "sync_amd_epyc.json", "cpu_step.json"):
        path = str(timing.ROOT / "bench" / "results" / name)
        assert main(["bench", "compare", path, path]) == 0
        printed = capsys.readouterr().out
        assert "1.000" in printed
        assert "faster" not in printed
        assert "only in" not in printed
        assert " 0.0%" not in printed  # none was measured once alone


@pytest.mark.parametrize(("busy", "warns"), [(0.0, False), (1.5, True)])
def test_a_busy_machine_is_told_once(busy, warns, monkeypatch, capsys):
    passed = iter([[0.0] * 8, [50 * busy, 0, 0, 100 - 50 * busy, 0, 0, 0, 0]])
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing.Path, "read_text", lambda path: f"cpu {' '.join(map(str, next(passed)))} 0 0")
    timing.busy_cores.cache_clear()
    assert timing.busy_cores() == timing.busy_cores() == busy
    timing.busy_cores.cache_clear()
    assert ("others keep 1.5 of 2 processors" in capsys.readouterr().err) == warns
