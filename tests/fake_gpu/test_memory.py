"""plan's memory against what a step of full depth holds, 5 to 20 s a row: in `make soak`, by FULL_DEPTH=1.

RECORD=1 writes bench/results/memory.json: bytes of a GPU by moment, of plan without what it holds back, and tracked.
"""

import json
import os

import pytest
import torch

from fake_gpu.gpus import fake_gpus, packed_groups, planned, shape, step_data, step_recipe
from flashgrpo.bench.report import RESULTS

TABLE = RESULTS / "memory.json"
# Model, ranks, ranks of a copy, tokens of a pack, checkpointing, whether weights are freed after the forward pass.
ROWS = [
    ("Qwen2.5-7B", 8, 8, 16_384, "none", True),
    ("Qwen2.5-7B", 8, 8, 32_768, "none", True),
    ("Qwen2.5-7B", 8, 8, 16_384, "full", True),
    ("Qwen2.5-7B", 8, 8, 32_768, "full", True),
    ("Qwen2.5-7B", 8, 8, 131_072, "full", True),
    ("Qwen2.5-7B", 8, 8, 32_768, "selective", True),
    ("Qwen2.5-7B", 8, 8, 16_384, "full", False),
    ("Qwen2.5-7B", 64, 64, 32_768, "full", True),
    ("Qwen2.5-7B", 64, 8, 32_768, "full", True),
    ("Llama-3.1-8B", 8, 8, 32_768, "full", True),
    ("Qwen3-4B", 8, 8, 32_768, "none", True),
    ("Qwen3-4B", 8, 8, 32_768, "selective", True),
    ("Qwen2.5-1.5B", 8, 8, 32_768, "none", True),
    ("Qwen2.5-1.5B", 1, 1, 32_768, "none", True),
]
KEYS = ("model", "ranks", "shard_ranks", "token_budget", "activation_checkpointing", "reshard_after_forward")


@pytest.mark.skipif("FULL_DEPTH" not in os.environ, reason="models of full depth are for `make soak`")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(map(str, row)))
def test_plan_counts_what_a_step_holds(row):
    model, ranks, shard_ranks, tokens, checkpointing, reshard = row
    with fake_gpus(ranks, shard_ranks) as gpus:
        run = gpus.train_step(shape(model), tokens, checkpointing, mini_batches=2, reshard=reshard)
    if "RECORD" in os.environ:
        record(row, run)
    assert run.misplanned(most=1.06) == {}, run.misplanned(most=1.06)


def test_the_table_is_plans():
    """By arithmetic alone: where plan has changed, RECORD=1 FULL_DEPTH=1 pytest -n0 tests/fake_gpu/test_memory.py."""
    table = {tuple(old[key] for key in KEYS): old["plan"] for old in json.loads(TABLE.read_text())["rows"]}
    assert table.keys() == set(ROWS)
    for row in ROWS:
        model, ranks, shard_ranks, tokens, checkpointing, reshard = row
        recipe = step_recipe(
            rollout={"prompts_per_step": 1, "group_size": 16, "max_new_tokens": 2048},
            train={"token_budget": tokens, "reshard_after_forward": reshard, "shard_ranks": shard_ranks},
            model={"path": "models/none", "activation_checkpointing": checkpointing},
            loss={"preset": "dapo"},
        )
        data = step_data(packed_groups(tokens, 256, 2048, 16), tokens, 256, 2048, 16)
        found = planned(recipe, shape(model), ranks, 256, data)
        assert table[row] == {moment: round(size) for moment, size in found.items()}, (row, found)


def record(row, run):
    rows = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []
    tracked = {moment: run.peaks[moment] for moment in (*run.planned, "score")}
    planned = {moment: round(size) for moment, size in run.planned.items()}
    made = dict(zip(KEYS, row, strict=True)) | {"plan": planned, "tracked": tracked}
    kept = {tuple(old[key] for key in KEYS): old for old in rows} | {row: made}
    ordered = [json.dumps(kept[each]) for each in ROWS if each in kept]
    TABLE.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n' + ",\n".join(ordered) + "\n]}\n")
