"""`flashgrpo bench kernels`: what its table says is true, and it survives whatever a peer does."""

import io
import json
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch.utils.flop_counter import FlopCounterMode

from flashgrpo.bench import kernels, peers
from flashgrpo.bench.cases import Case, as_float64, attention_mask, cases, plain_loss
from flashgrpo.bench.peers import Provider, providers
from flashgrpo.bench.timing import Limits
from flashgrpo.grpo.errors import RunInputError

CPU = torch.device("cpu")
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 8}
LAYOUTS = {
    "one": {"sequences": 1, "length": 11, "group": 0, "completion": 0},
    "many": {"sequences": 3, "length": 5, "group": 0, "completion": 0},
    "prefix": {"sequences": 2, "length": 7, "group": 4, "completion": 3},
}
LOSS = {"n": 24, "vocab": 37, "completions": 4, "dead": 0}
OF_HIDDEN = ("linear_logprobs", "linear_grpo_loss")
OF_LOGITS = ("gather_logprobs", "gather_grpo_loss", "logits_grpo_loss")


def tiny(op: str, **changes: int) -> Case:
    if op.startswith("attention"):
        return Case(op, torch.float32, LAYOUTS["one"] | ATTENTION | changes)
    shape = LOSS | ({"hidden": 16} if op in (*OF_HIDDEN, "memory") else {}) | changes
    return Case(op, torch.float32, shape)


TINY = {
    **{f"{op} {name}": tiny(op, **x) for op in ("attention_fwd", "attention") for name, x in LAYOUTS.items()},
    **{op: tiny(op) for op in (*OF_LOGITS, *OF_HIDDEN, "grpo_loss")},
    "half dead": tiny("linear_grpo_loss", dead=1),
    "one completion": tiny("grpo_loss", completions=1),
    "groups": tiny("grpo_loss", completions=8),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_flops_and_bytes_are_those_of_a_count(case):
    """Bytes are of the tensors that must move."""
    inputs = case.make(CPU)
    with FlopCounterMode(display=False) as counter:
        results = case.plain(inputs)
    counted = counter.get_total_flops()
    moved = [x for name, x in inputs.items() if name in ("q", "k", "v", "logits", "hidden", "weight", "logprobs")]
    if case.is_attention:  # dense: every pair, and a backward pass of 4 matmuls that keeps the scores
        mask = attention_mask(inputs)
        counted = counted * mask.sum().item() * (7 if case.wanted else 2) // (mask.numel() * (6 if case.wanted else 2))
        moved.append(results["out"])
        if case.wanted:  # backward reads them all again, and the gradient of the output
            moved += [*moved, inputs["d_out"]]
    elif case.op == "grpo_loss":
        moved.append(inputs["old_logprobs"])
    elif case.op == "gather_grpo_loss":  # logits once for log-probs, once for their gradient
        moved.append(inputs["logits"])
    if case.shape.get("dead"):
        counted = counted // 3 * 2  # the gradients' two matmuls on half of the rows
    moved += [results[f"d_{name}"] for name in case.wanted]
    assert (case.flops, case.bytes) == (counted, sum(x.nbytes for x in moved))


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_every_provider_gives_the_results_of_float64(case):
    """A peer that is called wrongly is fast and worthless; what a CPU cannot run must say so."""
    offered = [x for x in providers(case) if x.name not in ("torch.compile", "Liger")]  # they compile for seconds
    found = kernels.check_case(case, CPU, offered)
    assert found["flashgrpo"]["status"] == "ok", found
    ran = {name for name, row in found.items() if row["status"] in ("ok", "wrong")}
    assert ran >= {x.name for x in offered if x.name in ("torch", "torch SDPA", "flashgrpo, prompt repeated")}
    for name in ran - {"three GEMMs (bound)"}:
        assert found[name]["error"] < 5e-6, found
    for name in found.keys() - ran:
        assert found[name]["note"], found


def test_a_compiled_peer_gives_the_results_of_float64(monkeypatch):
    """As it is traced: Inductor takes seconds."""
    peers._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = tiny("grpo_loss")
    assert kernels.check_case(case, CPU, providers(case, ["torch.compile"]))["torch.compile"]["status"] == "ok"
    peers._compiled.cache_clear()


def test_a_package_is_called_with_the_inputs(monkeypatch):
    def gathered(logits, targets):
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    monkeypatch.setitem(sys.modules, "trl.trainer.utils", SimpleNamespace(selective_log_softmax=gathered))
    case = tiny("gather_grpo_loss")
    assert kernels.check_case(case, CPU, providers(case, ["TRL"]))["TRL"]["status"] == "ok"


def test_ratios_are_near_1_and_some_are_clipped():
    case = tiny("linear_grpo_loss", n=2000, completions=20)
    inputs = case.make(CPU)
    exact = case.plain(as_float64(inputs))
    alive = exact["d_hidden"].abs().sum(1) > 0
    assert 0.95 <= alive.float().mean() < 1
    assert inputs["advantages"].count_nonzero() == 20
    dead = tiny("linear_grpo_loss", n=2000, completions=20, dead=1)
    rows = dead.plain(dead.make(CPU))["d_hidden"].abs().sum(1).view(20, -1)
    assert not rows[1::2].any()
    assert rows[::2].any(1).all()


def test_the_targets_shapes_are_measured_and_every_plot_has_a_sweep():
    every = list(cases("full", torch.bfloat16))
    shapes = [(x.op, x.variant, x.tokens, x.shape.get("vocab"), x.shape.get("hidden")) for x in every]
    for wanted in [
        *((op, "", 8192, 151_936, None) for op in OF_LOGITS),
        ("linear_logprobs", "", 8192, 131_072, 4096),
        ("linear_grpo_loss", "", 4096, 128_256, 4096),
        ("linear_grpo_loss", "half dead", 4096, 128_256, 4096),
        ("attention", "", 8192, None, None),
        ("attention", "shared prefix", 12_288, None, None),
        ("grpo_loss", "", 65_536, None, None),
        ("grpo_loss", "one completion", 65_536, None, None),
        ("memory", "", 262_144, 128_256, 4096),
    ]:
        assert wanted in shapes
    for sizes in ("small", "full"):
        names = [x.name for x in cases(sizes, torch.float32)]
        assert len(set(names)) == len(names)
        for op in peers.PROVIDERS:
            assert sum(x.op == op and not x.variant for x in cases(sizes, torch.float32)) >= 2


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command on tiny cases with given providers; gives the exit code and what the file holds."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(kernels, "measure_limits", lambda device: Limits(1e11, 1e10, "torch.float32"))
    shapes = [tiny("grpo_loss", n=n) for n in (24, 48)] + [tiny("memory")]
    monkeypatch.setattr(kernels, "cases", lambda sizes, dtype: iter(shapes))

    def run(offered: list[Provider] | None = None, *arguments: str):
        if offered is not None:
            monkeypatch.setitem(peers.PROVIDERS, "grpo_loss", offered)
        code = kernels.main(["--ops", "grpo_loss", "--budget", "5", *arguments])
        return code, read(tmp_path)

    return run


def read(folder):
    (path,) = folder.glob("kernels_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


OURS, TORCH = peers.PROVIDERS["grpo_loss"][:2]


def doubled(inputs):
    return lambda: 2 * plain_loss(inputs["logprobs"], inputs)[0]


def missing(inputs):
    raise ModuleNotFoundError("No module named 'peer'")


def failing(inputs):
    raise RuntimeError("no kernel\nfor this [architecture]")


def full(inputs):
    if len(inputs["logprobs"]) == 48:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")
    return TORCH.load(inputs)


def test_a_peer_that_is_wrong_missing_or_raises_is_a_row_and_ends_nothing(bench, capsys):
    offered = [OURS, TORCH, Provider("wrong", "loss", doubled), Provider("absent", "loss", missing)]
    offered += [Provider("broken", "loss", failing), Provider("large", "logprobs", full)]
    code, (header, *rows) = bench(offered)
    assert code == 0
    assert header["machine"]["device"]
    assert header["limits"]["bytes_per_s"] == 1e10
    found = {(row["provider"], row["tokens"]): row for row in rows}
    assert len(found) == 12
    for n in (24, 48):
        assert found["flashgrpo", n]["ratio"] == 1
        assert found["wrong", n]["status"] == "wrong"
        assert found["wrong", n]["error"] > 0.9
        assert found["wrong", n]["p50_ms"] > 0
        assert (found["absent", n]["status"], found["absent", n]["note"]) == ("not installed", "No module named 'peer'")
        assert found["broken", n]["note"] == "RuntimeError: no kernel"
        row = found["torch", n]
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(12 * n / row["p50_ms"] / 1e6)
        assert row["share_of_limit"] == pytest.approx(row["gb_per_s"] / 10)
    assert found["large", 24]["p50_ms"] > 0
    assert found["large", 48]["status"] == "out of memory"
    out = capsys.readouterr().out
    assert "absent: not installed: No module named 'peer' (grpo_loss)" in out
    assert "broken: failed: RuntimeError: no kernel (grpo_loss)" in out
    assert re.search(r"wrong: wrong: \w+ [\d.]+x as wrong as torch's \(grpo_loss\)", out)
    assert "large: out of memory" in out


def test_tables_fit_a_terminal_of_80_characters_and_a_reason_is_said_once():
    case = {"op": "attention", "case": "attention length=512", "status": "ok", "note": "", "peak_mib": 1234.5}
    times = {"p50_ms": 12.3456, "spread": 0.1234, "tflops_per_s": 123.456, "gb_per_s": 1234.5}
    measured = case | times | {"share_of_limit": 0.5, "ratio": 12.34, "error": 1.2e-3}
    failed = {"op": "attention", "case": "attention length=9", "status": "not measured", "note": "the budget is spent"}
    names = "flashgrpo, prompt repeated", "torch.compile"
    lines, notes = kernels.listing([row | {"provider": name} for row in (measured, failed) for name in names])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Markdown("\n".join(lines)))
    shown = console.export_text()
    assert "…" not in shown
    for text in ("torch.compile", "12.35", "12%", "1234", "123.5", "50%", "12.34", "1e-03"):
        assert text in shown
    assert "length=9" not in shown
    assert notes == ["flashgrpo, prompt repeated · torch.compile: not measured: the budget is spent (attention)"]


@pytest.mark.parametrize("load", [doubled, failing], ids=["wrong", "raises"])
def test_a_faulty_kernel_of_ours_is_not_timed_and_the_exit_code_is_1(bench, capsys, load):
    code, (_, ours, torchs, *_) = bench([Provider("flashgrpo", "loss", load), TORCH])
    assert code == 1
    assert ours["status"] == ("wrong" if load is doubled else "failed")
    assert "p50_ms" not in ours
    assert torchs["p50_ms"] > 0
    assert "not timed" in capsys.readouterr().out


def zero(inputs):
    return lambda: {"loss": plain_loss(inputs["logprobs"], inputs)[0], "d_logprobs": inputs["logprobs"] * 0}


def poisoned(inputs):
    return lambda: {"loss": plain_loss(inputs["logprobs"], inputs)[0], "d_logprobs": inputs["logprobs"] * float("nan")}


@pytest.mark.parametrize(("load", "error"), [(zero, pytest.approx(1)), (poisoned, None)], ids=["zero", "NaN"])
def test_a_gradient_of_zero_or_nan_is_wrong(load, error):
    found = kernels.check_case(tiny("grpo_loss"), CPU, [Provider("peer", "results", load)])["peer"]
    assert (found["status"], found["error"]) == ("wrong", error)


def test_an_interrupted_run_leaves_what_was_measured(bench, tmp_path):
    def interrupted(inputs):
        if len(inputs["logprobs"]) == 48:
            raise KeyboardInterrupt
        return TORCH.load(inputs)

    with pytest.raises(KeyboardInterrupt):
        bench([OURS, Provider("peer", "logprobs", interrupted)])
    _, *rows = read(tmp_path)
    assert [(row["provider"], row["tokens"]) for row in rows] == [("flashgrpo", 24), ("peer", 24)]
    assert all(row["p50_ms"] > 0 for row in rows)
    assert [x.suffix for x in tmp_path.iterdir()] == [".jsonl"]


def test_a_machine_without_matplotlib_gets_its_numbers(bench, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flashgrpo.bench.plots", None)
    code, rows = bench([OURS, TORCH])
    assert (code, len(rows)) == (0, 5)
    assert "no plot" in capsys.readouterr().out


def test_a_spent_budget_is_said_of_every_row(bench):
    code, (_, *rows) = bench([OURS, TORCH], "--budget", "0")
    assert code == 0
    assert {(row["status"], "--budget" in row["note"]) for row in rows} == {("not measured", True)}


def test_peers_may_be_chosen_and_memory_is_measured_without_times(bench, tmp_path):
    _, (_, *rows) = bench(None, "--ops", "memory", "--providers", "flashgrpo", "torch")
    assert [row["provider"] for row in rows] == ["flashgrpo", "torch"]
    assert all(row["peak_mib"] >= 0 and "p50_ms" not in row for row in rows)
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_peer_joins_without_a_change_of_the_source(bench, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_peers.py").write_text(
        "from flashgrpo.bench.cases import plain_loss\n"
        "from flashgrpo.bench.peers import Provider\n"
        "def load(inputs): return lambda: plain_loss(inputs['logprobs'], inputs)[0]\n"
        "PROVIDERS = {'grpo_loss': [Provider('mine', 'loss', load)]}\n"
        "OURS = {'grpo_loss': [Provider('flashgrpo 2', 'loss', load)]}\n"
        "MISSPELT = {'grpo_los': []}\n"
        "NOTHING = {'grpo_loss': [Provider('mine', 'logprob', load)]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, (_, *rows) = bench([OURS, Provider("absent", "loss", missing)], "--peer", "my_peers:PROVIDERS")
    assert code == 0
    assert [(row["provider"], row["status"]) for row in rows[:3]] == [
        ("flashgrpo", "ok"),
        ("absent", "not installed"),
        ("mine", "ok"),
    ]
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed
    assert "absent: not installed: No module named 'peer' (grpo_loss)" in printed.splitlines()
    for name, message in [
        ("my_peers:OURS", "wanted a Provider whose name is not flashgrpo's"),
        ("my_peers:MISSPELT", "unknown operation 'grpo_los'; did you mean grpo_loss?"),
        ("my_peers:NOTHING", "grpo_loss: mine gives 'logprob', wanted one of out, logprobs, loss, results"),
        (
            "my_peers:load",
            "wanted a dictionary from operation to a list of flashgrpo.bench.peers.Provider",
        ),
        ("no_such:PROVIDERS", "ModuleNotFoundError: No module named 'no_such'"),
    ]:
        with pytest.raises(RunInputError, match=re.escape(message)):
            kernels.main(["--peer", name])


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
    assert kernels.table(found)[2:] == [
        "| `attention a` | 2 | 50% | fast | 3 | 1.50 |",
        "| `attention b` | 4 | 25% | | | |",
    ]
