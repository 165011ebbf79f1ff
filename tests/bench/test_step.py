"""The step's benchmark compares equal work, and says so where it does not."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from flashgrpo.bench import step, step_sides
from flashgrpo.bench.shapes import SHAPES
from flashgrpo.bench.step import PARTS, REPEATED, SHARED, main, shares, time_sides
from flashgrpo.bench.step_sides import Ours, Peer, Workload
from flashgrpo.bench.timing import Limits
from flashgrpo.model.decoder import huggingface_views

CPU = torch.device("cpu")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"groups": 2, "group_size": 3, "prompt_tokens": 9, "mean": 12, "cap": 30, "steps": 2}
OPTIONS = argparse.Namespace(**SIZES, token_budget=120, checkpointing=None)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", SHAPES["small"] | TINY)
    monkeypatch.setattr(step, "measure_limits", lambda device: Limits(1e12, 1e11, "torch.float32"))


@pytest.fixture
def rows_of(tiny, mesh):
    return lambda: time_sides("small", OPTIONS, CPU, 1e12, list)


def gradients(side) -> dict[str, torch.Tensor]:
    """Of a step, caught before the optimizer takes them."""
    optimizer, found = getattr(side, "learner", side).optimizer, {}
    optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in side.model.named_parameters()})
    side.step()
    return huggingface_views(found, side.config) if isinstance(side, Ours) else found


@pytest.mark.parametrize("family", ["Qwen2.5-0.5B", "Qwen3-4B", "Llama-3.1-8B"])
def test_every_side_has_the_same_gradients(mesh, family):
    shape, work = SHAPES[family] | TINY, Workload.random(3, 4, 7, 10, 25, vocab_size=97)
    sides = {
        "ours": (Ours(shape, mesh, torch.float32, "selective"), work),
        "repeated": (Ours(shape, mesh, torch.float32, "none"), work.repeated()),
        "padded": (Peer(shape, CPU, torch.float32, "full", packs=False), work),
        "packed": (Peer(shape, CPU, torch.float32, "full", packs=True, attention="sdpa"), work),
    }
    found = {}
    for name, (side, own_work) in sides.items():
        side.load(own_work, 100)
        assert len(side.batches) > 1
        found[name] = gradients(side)
        torch.testing.assert_close(found[name], found["ours"], rtol=1e-3, atol=1e-5)


def test_rows_say_how_fast_each_side_was(rows_of):
    shared, repeated, peer = rows_of()
    assert (shared["side"], repeated["side"]) == (SHARED, REPEATED)
    assert "transformers" in peer["side"]
    for row in (shared, repeated, peer):
        assert (row["status"], row["rounds"]) == ("ok", 4)
        assert row["useful_mfu"] == pytest.approx(row["useful_flops"] / (row["p50_ms"] / 1e3) / 1e12)
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert min(row["shares"].values()) > 0
        assert row["tokens_per_s"] * row["p50_ms"] == pytest.approx(shared["tokens_per_s"] * shared["p50_ms"])
    assert shared["fed_tokens"] < repeated["fed_tokens"]


def test_a_peer_that_does_other_work_is_not_timed(rows_of, monkeypatch):
    plain = Peer._plain
    monkeypatch.setattr(step_sides.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(Peer, "_plain", lambda self, hidden, batch: 1.01 * plain(self, hidden, batch))
    *ours, peer = rows_of()
    assert "p50_ms" not in peer
    assert peer["note"].startswith("ValueError: grad_norm is ")
    assert all("p50_ms" in row for row in ours)


@pytest.mark.parametrize("fault", ["positions", "prompts"])
def test_a_side_of_other_positions_or_masks_is_not_timed(rows_of, monkeypatch, fault):
    """At the tolerance of bf16, too."""
    build = step_sides.build_batch

    def faulty(groups):
        batch = build(groups)
        if len(batch.completions_per_prompt) == 1:  # the side with shared prompts is the reference
            return batch
        if fault == "positions":
            return dataclasses.replace(batch, position_ids=torch.zeros_like(batch.position_ids))
        return dataclasses.replace(batch, prefix=torch.full_like(batch.prefix, -1))

    monkeypatch.setattr(step_sides, "build_batch", faulty)
    monkeypatch.setitem(step._TOLERANCE, "cpu", step._TOLERANCE["cuda"])
    assert any(row["note"].startswith("ValueError: hidden states are ") for row in rows_of())


def test_one_side_that_fails_leaves_the_others(tiny, mesh, monkeypatch):
    """Also the first, to which the others are compared, and an error without a message."""
    probe = Ours.probe

    def failing(self, work):
        if len(work.groups) == SIZES["groups"]:
            raise AssertionError
        return probe(self, work)

    monkeypatch.setattr(Ours, "probe", failing)
    written = []
    rows = time_sides("small", OPTIONS, CPU, 1e12, lambda rows: written.append(["p50_ms" in row for row in rows]))
    assert rows[0]["note"].startswith("AssertionError")
    assert all("p50_ms" in row for row in rows[1:])
    # A run that is ended in the middle leaves the times of the turns so far.
    assert written[2:5] == [[False, True, False], [False, True, False], [False, True, True]]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("flashgrpo::packed_attention_backward", "attention"),
        ("GeneratedBackwardFor_flashgrpo_packed_attention_default", "attention"),
        ("_LinearGRPOLoss", "loss"),
        ("flashgrpo::linear_grpo_loss", "loss"),
        ("LigerFusedLinearGRPOFunction", "loss"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("aten::silu", "other"),
    ],
)
def test_operators_are_told_apart_by_name(name, part):
    """The Triton operators run on a GPU alone; a kernel counts with the operator around it."""
    outer = SimpleNamespace(name=name, sequence_nr=-1, cpu_parent=None)
    inner = SimpleNamespace(name="aten::copy_", sequence_nr=-1, cpu_parent=outer)
    assert step._part(inner, set()) == part


def test_what_does_not_fit_is_a_row_and_ends_nothing(tiny, monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB.\nmore")

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(step, "Peer", full)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main(flags) == 0
    assert "out of memory: CUDA out of memory. Tried to allocate 99 GiB." in capsys.readouterr().out
    (file,) = tmp_path.glob("step_*.jsonl")
    header, *rows = map(json.loads, file.read_text().splitlines())
    assert header["machine"]["torch"] == torch.__version__
    assert [("p50_ms" in row) for row in rows] == [True, True, False]
    monkeypatch.setattr(step, "Ours", full)
    assert main(flags) == 1


@pytest.mark.parametrize("slow", ["attention", "linear", "optimizer", "other"])
def test_shares_find_the_slow_part(slow):
    q, a, vector = torch.randn(1, 4, 700, 32, requires_grad=True), torch.randn(600, 600), torch.randn(10**6)
    parameter = torch.nn.Parameter(torch.randn(3_000_000))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    work = {
        "attention": lambda: F.scaled_dot_product_attention(q, q, q).sum().backward(),
        "linear": lambda: a @ a,
        "optimizer": optimizer.step,
        "other": vector.sin,
    }
    optimizer.step()
    found = shares(work[slow], CPU)
    assert found.keys() == set(PARTS)
    assert found[slow] > 0.7


def test_lengths_follow_the_mean_and_the_cap():
    work, again = (Workload.random(100, 16, 5, mean=300, cap=900, vocab_size=50) for _ in range(2))
    lengths = np.array([len(c.token_ids) for group in work.groups for c in group.completions])
    assert 250 < lengths.mean() < 320  # the cap takes a little
    assert (lengths.min() >= 1, lengths.max()) == (True, 900)
    assert (work.num_targets, work.num_tokens) == (lengths.sum(), lengths.sum() + 1600 * 5)
    np.testing.assert_array_equal(again.groups[99].completions[15].token_ids, work.groups[99].completions[15].token_ids)


def test_a_side_that_failed_stands_in_the_step_table():
    row = {"model": "m", "side": "s", "p50_ms": 500.0, "tokens_per_s": 2e3, "useful_mfu": 0.5, "peak_mib": 1024.0}
    row |= {"trained_tokens_per_s": 500.0, "checkpointing": "full"}
    failed = {"model": "m", "side": "t", "status": "out of memory", "note": "full"}
    rows = step.table([{}, row | {"shares": {"attention": 0.25, "linear": 0.75}}, failed])
    assert rows[2:] == [
        "| m | s, full activation checkpointing | 0.50 | 2,000 | 500 | 50% | 1.00 | 25%, 75% |",
        "| m | t | out of memory: full | | | | | |",
    ]
