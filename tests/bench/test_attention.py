"""`bench attention --qualify`: what is wrong is found, and costs its entry alone; "auto" reads what was found."""

import json
import sys

import pytest
import torch

from flashgrpo.bench import attention as bench
from flashgrpo.bench.attention_checks import find_change, find_fault, random_pack
from flashgrpo.bench.cases import attention_mask
from flashgrpo.bench.peers import own_attention
from flashgrpo.grpo.cli import main
from flashgrpo.kernels import attention_plan, qualified
from flashgrpo.kernels.attention import _resolved, plan_attention

CPU, HEAD_DIM = torch.device("cpu"), 64
both_dtypes = pytest.mark.parametrize("dtype", bench.DTYPES.values(), ids=bench.DTYPES)


def right(x, excess=0.0):
    """To the last rounding; but for an excess of d_k."""
    wide = {name: x[name].float() for name in "qkv"}
    wide["k"] = wide["k"] + excess * (wide["k"] - wide["k"].detach())
    return own_attention(x | wide, "torch").to(x["q"].dtype)


def pack(dtype=torch.bfloat16, seed=1):
    return random_pack(seed, 100, HEAD_DIM, dtype, CPU)


@both_dtypes
def test_what_is_right_has_no_fault(dtype):
    assert find_fault(right, pack(dtype)) == ""


def test_the_packs_have_what_goes_wrong():
    """Empty and short segments, whole tiles, every ratio of heads, NaN behind and in most also between what counts."""
    lengths, ratios, between = set(), set(), 0
    for seed in range(bench.NUM_PACKS):
        x = random_pack(seed, bench.LONGEST, 1, torch.bfloat16, CPU)
        covered, spoilt, sees = int(x["cu_seqlens"][-1]), x["k"].isnan().flatten(1).any(1), attention_mask(x)
        assert spoilt[covered:].all()
        assert len(spoilt) > covered
        spoilt_queries = (sees & spoilt[:covered]).any(1)
        counting = (~(sees & spoilt_queries[:, None]).any(0)).nonzero()
        between += int(spoilt[int(counting[0]) : int(counting[-1])].any())
        lengths |= set(x["cu_seqlens"].diff().tolist())
        ratios.add(x["q"].shape[1] // x["k"].shape[1])
    assert {0, 1, 128} < lengths
    assert ratios == {1, 2, 6, 8}
    assert between > bench.NUM_PACKS / 2


def one_element_off(x):
    out = right(x)
    with torch.no_grad():
        place = out.nan_to_num(0.0).abs().argmax()
        ulp = 2.0 ** (out.flatten()[place].abs().log2().floor() - 7)
    return out + (2 * ulp * torch.nn.functional.one_hot(place, out.numel()).view(out.shape)).to(out.dtype)


def leaking(x):
    """A row's 0 times its neighbour's NaN."""
    out = right(x)
    return out + 0 * out.detach().roll(-1, 0)


def with_a_scaled_gradient(x):
    return right(x, excess=0.001)


def with_a_gradient_for_unused_rows(x):
    return right(x) + (x["v"] - x["v"].detach()).nan_to_num(0.0).repeat_interleave(2, 1)


def without_the_prefix(x):
    return right(x | {"prefix": torch.full_like(x["prefix"], -1)})


FAULTS = {
    one_element_off: "out: largest error",
    leaking: "out",
    with_a_scaled_gradient: "d_k",
    with_a_gradient_for_unused_rows: "d_v",
    without_the_prefix: "out: RMS error",
}


@both_dtypes
@pytest.mark.parametrize("attend", FAULTS, ids=lambda attend: attend.__name__)
def test_a_fault_is_found(attend, dtype):
    assert find_fault(attend, pack(dtype)).startswith(FAULTS[attend])


def test_a_repetition_that_differs_by_one_bit_is_found():
    calls = []

    def attend(x, changed):
        calls.append(None)
        out = x["q"] * 1.0
        if len(calls) == 2 + changed:
            with torch.no_grad():
                out.view(torch.int16)[3, 0, 5] ^= 1
        return out + 0.0 * (x["k"] + x["v"])

    x = random_pack(0, 9, 16, torch.bfloat16, CPU)
    assert find_change(lambda x: attend(x, 700), x, 1000).startswith("repetition 700 of 1000 ")
    calls.clear()
    assert find_change(lambda x: attend(x, 2000), x, 1000) == ""


PRINTS = "import json; print('a library speaks'); print(json.dumps({}))"
LOST = {
    "hangs": ("import time; time.sleep(60)", "hung after 1 s"),
    "crashes": ("import os, sys; print('bad', file=sys.stderr, flush=True); os.abort()", "exit code -6: bad"),
    "is wrong": (PRINTS.format({"status": "failed", "note": "gluon, pack 3: d_k"}), "gluon, pack 3: d_k"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_happens_to_an_entry_leaves_triton(name):
    code, note = LOST[name]
    row = bench.attempt([sys.executable, "-c", code], 1.0)
    assert row == {"winner": "triton", "status": "failed", "note": note}


def test_an_entry_is_measured_in_a_process_which_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    row = bench.attempt([sys.executable, "-m", bench.__name__, "64", "float16"], 60.0)
    assert row["winner"] == "triton"
    assert row["status"] == "failed"
    assert "CUDA" in row["note"] or "NVIDIA" in row["note"]


@pytest.mark.parametrize(("faster", "slower"), [bench.BACKENDS, bench.BACKENDS[::-1]])
def test_who_is_faster_over_all_shapes_wins(faster, slower, monkeypatch):
    """Though not in the forward pass. On a CPU the twin stands in for both."""
    forward, backward = {faster: 2.0, slower: 1.0}, {faster: 1.0, slower: 3.0}
    timed = []

    def time_turns(calls, device, budget_s):
        timed.append("backward" if all(isinstance(call(), tuple) for call in calls.values()) else "forward")
        milliseconds = {"forward": forward, "backward": backward}[timed[-1]]
        return {name: {"p50_ms": milliseconds[name], "spread": 0.01 * len(timed)} for name in calls}

    monkeypatch.setattr(bench, "plan_attention", lambda *index, backend, **more: plan_attention(*index, **more))
    monkeypatch.setattr(bench, "time_turns", time_turns)
    row = bench.time_backends(64, torch.bfloat16, CPU, "small")
    assert timed == 4 * ["forward", "backward"]
    assert row["forward_ms"] == {name: 4 * ms for name, ms in forward.items()}
    assert row["backward_ms"] == {name: 4 * ms for name, ms in backward.items()}
    assert row["spread"] == 0.08
    assert row["winner"] == faster


def test_all_checks_of_an_entry_then_its_times(monkeypatch):
    """With what is right in the place of both, and with a fault in that of the second."""
    for name, value in {"NUM_PACKS": 2, "LONGEST": 20, "REPETITIONS": 3}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "own_attention", lambda x, backend: right(x))
    monkeypatch.setattr(bench, "time_backends", lambda *of: {"of": of})
    assert bench.measure(16, torch.float16, CPU) == {"of": (16, torch.float16, CPU, "full")}
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(bench, "own_attention", lambda x, backend: (leaking if backend == "gluon" else right)(x))
    with pytest.raises(ValueError, match="gluon, pack 0: out"):
        bench.measure(16, torch.float16, CPU)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine with one, as far as is asked here; gives the file of "auto"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path / "results"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention_plan, "architecture", lambda like: "sm_90")
    qualified._winners.cache_clear()
    yield qualified.cache_path()
    qualified._winners.cache_clear()


def auto(head_dim, dtype=torch.bfloat16):
    return _resolved("auto", torch.empty(0, 4, head_dim, dtype=dtype))


TIMES = {"forward_ms": {"triton": 2.0, "gluon": 1.0}, "backward_ms": {"triton": 5.0, "gluon": 4.0}, "spread": 0.01}


def run_qualify(monkeypatch, *options):
    """With an entry that Gluon wins, at head_dim 128 in bfloat16, and others that fail."""

    def attempt(command, limit_s):
        assert command[1:3] == ["-m", bench.__name__]
        if command[3:] == ["128", "bfloat16"]:
            return {"winner": "gluon", "status": "ok", "note": "", **TIMES}
        return {"winner": "triton", "status": "failed", "note": f"hung after {limit_s:g} s"}

    monkeypatch.setattr(bench, "attempt", attempt)
    qualified._winners.cache_clear()
    return main(["bench", "attention", "--qualify", *options])


def test_auto_takes_what_has_won(hopper, monkeypatch, capsys):
    assert auto(128) == "triton"
    assert main(["bench", "attention"]) == 0
    assert "nothing is qualified" in capsys.readouterr().out
    assert run_qualify(monkeypatch, "--limit", "7") == 0
    printed = capsys.readouterr().out
    assert "hung after 7 s" in printed
    line = '"auto" is "gluon" at head_dim 128, bfloat16; "triton" at head_dim 64, bfloat16; '
    assert line in printed
    assert [auto(128), auto(64), auto(128, torch.float16), auto(32)] == ["gluon", "triton", "triton", "triton"]
    assert main(["bench", "attention"]) == 0
    assert capsys.readouterr().out.startswith(line)
    (rows,) = (json.loads(file.read_text())["rows"] for file in (hopper.parents[1] / "results").iterdir())
    assert [row["winner"] for row in rows] == ["gluon", "triton", "triton", "triton"]


def test_the_file_keeps_what_is_of_others(hopper, monkeypatch):
    """Of other machines, and of a dtype that is not asked for."""
    own = {"head_dim 64, bfloat16": "gluon", "head_dim 64, float16": "gluon"}
    here = qualified.machine_key(torch.device("cuda"))
    hopper.parent.mkdir(parents=True)
    hopper.write_text(json.dumps({"another": own, here: own}))
    run_qualify(monkeypatch, "--dtypes", "bfloat16")
    found = json.loads(hopper.read_text())
    assert found["another"] == own
    assert found[here] == own | {"head_dim 128, bfloat16": "gluon", "head_dim 64, bfloat16": "triton"}


def test_auto_is_a_constant_to_torch_compile(hopper, monkeypatch):
    """A plan that a user's compiled function makes must not break its graph where it reads the file."""
    run_qualify(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which torch.compile would believe
    taken = torch.compile(lambda like: _resolved("auto", like) == "gluon", fullgraph=True, backend="eager")
    assert [taken(torch.empty(1, 4, dim, dtype=torch.bfloat16)) for dim in (128, 64)] == [True, False]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "7", '{"KEY": 3}', '{"KEY": {"head_dim 128, bfloat16": 1}}', "[" * 9999]
)
def test_a_damaged_file_is_none_and_is_replaced(text, hopper, monkeypatch):
    hopper.parent.mkdir(parents=True)
    hopper.write_text(text.replace("KEY", qualified.machine_key(torch.device("cuda"))))
    assert auto(128) == "triton"
    run_qualify(monkeypatch)
    assert auto(128) == "gluon"


def test_an_interrupted_qualification_has_triton_for_what_is_not_done(hopper, monkeypatch):
    run_qualify(monkeypatch)

    def attempt(command, limit_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "attempt", attempt)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--qualify"])
    qualified._winners.cache_clear()
    assert auto(128) == "triton"


def test_without_a_hopper_there_is_nothing_to_qualify(hopper, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    for found in ("NVIDIA A100", "no GPU"):
        assert main(["bench", "attention"]) == 0
        assert capsys.readouterr().out == f'"auto" is "triton": found {found}, and "gluon" is for sm_90\n'
        assert main(["bench", "attention", "--qualify"]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message == f"flashgrpo: --qualify: found {found}, wanted one of sm_90, as an H100 or H200"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not hopper.exists()


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf"])
def test_a_limit_that_is_none_exits_2(limit, hopper, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "attention", "--qualify", f"--limit={limit}"])
    assert f"--limit: found {limit}, wanted a number above 0" in capsys.readouterr().err
    assert not hopper.exists()


def test_a_user_without_a_home_gets_triton(hopper, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert auto(128) == "triton"
