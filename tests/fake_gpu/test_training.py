"""A training step on fake GPUs: it ends, waits where it may, queues the kernels that are recorded, and needs the memory
that plan says.

CASES cover rather than multiply: every sharding with every checkpointing and with every loss, every checkpointing with
every loss, and every model with two or more of each.
"""

import json
import os
from pathlib import Path

import pytest

from fake_gpu.gpus import fake_gpus, shape
from flashgrpo.kernels.linear_grpo import most_chunk_tokens

RECORDED = Path(__file__).with_name("kernels.json")
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B", "Qwen3-4B")
SHARDINGS = {"1": (1, 0), "8": (8, 0), "64": (64, 0), "8x8": (64, 8)}  # ranks, and those of a copy
CHECKPOINTING = ("none", "selective", "full")
LOSSES = {"dapo": {"preset": "dapo"}, "gspo": {"preset": "gspo"}, "kl": {"preset": "grpo", "kl_coef": 0.04}}
TOKENS, MICRO_BATCHES = 32_768, 2
# Once a phase; and one number for each number of `device_metrics`, which come together.
ENDS = {"progress.py:__call__": 3, "metrics.py:device_metrics": 1}


def covering():
    """(model, sharding, checkpointing, loss) of each case."""
    number = 0
    for i, sharding in enumerate(SHARDINGS):
        for j, checkpointing in enumerate(CHECKPOINTING):
            yield MODELS[number % len(MODELS)], sharding, checkpointing, [*LOSSES][(i + j) % len(LOSSES)]
            number += 1


CASES = [*covering()]


def step(model, sharding, checkpointing, loss, **options):
    world, shard_ranks = SHARDINGS[sharding]
    with fake_gpus(world, shard_ranks) as gpus:
        options = {"tokens": TOKENS, "micro_batches": MICRO_BATCHES, "warm": True} | LOSSES[loss] | options
        return gpus.train_step(shape(model, layers=4), checkpointing=checkpointing, **options)


def chunks(targets):
    return -(-targets // most_chunk_tokens(1, 2, True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_step(case):
    run = step(*case)
    sequence_level = case[3] == "gspo"
    # A sequence's ratio needs all log-probs first: which rows are live is asked once, not once a chunk.
    place, times = ("recompute", 1) if sequence_level else ("step", chunks(TOKENS - 256))
    uploads = {"train.py:_pack": 1}
    assert run.syncs == {f"linear_grpo.py:{place}": MICRO_BATCHES * times} | uploads | ENDS, run.syncs
    assert run.unwaited == {}, f"phases that end before their work, whose time is the next one's: {run.unwaited}"
    assert not [launch for launch in run.launches if launch.misaligned]
    assert run.misplanned(most=1.1) == {}, run.misplanned(most=1.1)
    found = {way: dict(sorted(names.items())) for way, names in run.kernels_per_block.items()}
    if os.environ.get("RECORD"):
        record(" ".join(case), found)
    recorded = json.loads(RECORDED.read_text())[" ".join(case)]
    message = (
        "kernels of a block are not those of kernels.json; where a change of ours is meant, or constraints.txt has "
    )
    message += "another torch, some of whose operators they are: RECORD=1 pytest -n0 tests/fake_gpu -k test_a_step"
    assert found == recorded, message


def record(case, found):
    kept = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    kept[case] = found
    lines = [f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in map(" ".join, CASES) if name in kept]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.parametrize("sharding", ["8", "8x8"])
def test_a_rank_without_a_pack_takes_part_in_every_collective(sharding):
    """It would hang the others, and only on many GPUs."""
    (world, shard_ranks), seen = SHARDINGS[sharding], []
    for rank in (0, world - 1):
        with fake_gpus(world, shard_ranks, rank) as gpus:
            # Six completions an update for eight ranks or more, some of which are scored.
            options = {"packs": 3, "group_size": 2, "tokens": 2048, "mini_batches": 2, "kl_coef": 0.1}
            options["teacher"] = shape("Qwen2.5-7B", layers=2)
            seen.append(gpus.train_step(shape("Qwen2.5-1.5B", layers=3), **options))
    full, empty = seen
    assert full.kernels["triton::_attention_fwd_kernel"] > 0 == empty.kernels["triton::_attention_fwd_kernel"]
    assert full.collectives == empty.collectives


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen3-4B"])
def test_packs_of_new_sizes_compile_nothing(model):
    """Compiling takes seconds, and every pack has another size."""
    with fake_gpus() as gpus:
        config = shape(model, layers=1)
        first = gpus.train_step(config, 20_011, prompt=251, response=397, mini_batches=2)
        later = gpus.train_step(config, 9_973, prompt=60, response=101, mini_batches=2)
    # One kernel is for packs above 16,384 tokens.
    assert {name: first.variants[name] for name in later.variants} == later.variants


def test_scoring_is_not_booked_as_training():
    """Half of the tokens are scored here, and a reference scores all: two thirds of what training costs."""
    run = step("Qwen2.5-1.5B", "8", "none", "kl", mini_batches=2)
    assert run.waits["score"] == {"progress.py:__call__": 1}
    assert run.waits.keys() == {"pack", "score", "train"}
    assert run.unwaited == {}


def test_a_teacher_costs_no_wait():
    """Advantages are made of its log-probs on the device."""
    alone, taught = (step("Qwen2.5-1.5B", "8", "none", "dapo", teacher=teacher)
                     for teacher in (None, shape("Qwen2.5-7B", layers=2)))  # fmt: skip
    assert taught.syncs == alone.syncs
    assert taught.unwaited == {}
