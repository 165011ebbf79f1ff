"""The plan is what runs do: saved activations to the byte, the peak memory of real steps on CPUs within 15%."""

import ast
import ctypes
import dataclasses
import functools
import gc
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import ranks
from flashgrpo.bench.shapes import SHAPES as PUBLISHED
from flashgrpo.grpo.cli import main
from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import Recipe, build_recipe, load_recipe
from flashgrpo.grpo.rewards.pool import open_reward_pool
from flashgrpo.grpo.run.costs import MATMUL_SHARE, Costs, Lengths
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.machines import MACHINES, Machine, peak_flops
from flashgrpo.grpo.run.progress import Clock
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.stages.plan import plan, plan_recipe
from flashgrpo.grpo.train import Trainer
from flashgrpo.kernels import attention, elementwise
from flashgrpo.model.checkpoint import init_decoder, save_checkpoint
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cost import BlockActivations, ModelSize
from flashgrpo.model.decoder import Decoder

SHAPE = {
    "model_type": "qwen3", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "qwen3": SHAPE,
    "qwen2": SHAPE | {"model_type": "qwen2", "intermediate_size": 96},
    "llama": SHAPE | {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "biases": SHAPE | {"attention_bias": True, "num_key_value_heads": 1, "head_dim": 32},
}
SEVEN_B = PUBLISHED["Qwen2.5-7B"]
H200 = MACHINES["h200"]
ROOT = Path(__file__).parents[3]
CPU = Machine(1e11, 24e9, 1e10, 1e9, 1e9, reserve=0, is_cpu=True)
PROMPT, RESPONSE, GROUP, NUM_GROUPS = 32, 33, 4, 2  # 320 tokens: a multiple of 64, which the decoder pads to on a CPU


def make_recipe(**sections: dict) -> Recipe:
    defaults = {
        "model": {"path": "models/none", "activation_checkpointing": "full"},
        "data": {"path": "none.jsonl"},
        "run": {"output": "runs/none"},
        "rollout": {"prompts_per_step": 128, "max_new_tokens": 8192},
        "loss": {"preset": "dapo"},
        "train": {"token_budget": 32_768},
    }
    return build_recipe(Recipe, {k: defaults.get(k, {}) | sections.get(k, {}) for k in defaults | sections})


def seven_b(num_gpus: int = 8, machine: Machine = H200, response: float = 2048, **sections: dict):
    recipe = make_recipe(**sections)
    lengths = Lengths(256, response, recipe.rollout.max_new_tokens)
    return plan(recipe, ModelConfig.from_dict(SEVEN_B), machine, num_gpus, lengths)


def make_batch(prompt: int, response: int, group: int, num_groups: int, vocab_size: int):
    tokens = np.random.default_rng(0).integers(0, vocab_size, (num_groups, group, response))
    prompts = np.random.default_rng(1).integers(0, vocab_size, (num_groups, prompt)).tolist()
    groups = [Group(p, [Completion(c, i) for i, c in enumerate(t)]) for p, t in zip(prompts, tokens, strict=True)]
    return build_batch(groups)


def block_bytes_a_token(shape: dict, checkpointing: str, make_decoder: Callable[[ModelConfig], Decoder]) -> float:
    """Of one more block: what a forward pass has allocated and not freed, saved by autograd or by checkpointing."""
    found = []
    for num_layers in (1, 3):
        model = make_decoder(ModelConfig.from_dict(shape | {"num_hidden_layers": num_layers}))
        model.activation_checkpointing = checkpointing
        batch = make_batch(PROMPT, RESPONSE, GROUP, NUM_GROUPS, shape["vocab_size"])
        model(batch)  # caches
        gc.collect()
        gc.disable()
        try:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                kept = model(batch)
        finally:
            gc.enable()
        events = profiled.profiler.kineto_results.events()
        found.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
        del kept
    return (found[1] - found[0]) / 2 / batch.total_tokens


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "biases"])
@pytest.mark.parametrize("path", ["cpu", "kernels"])
def test_activations_are_those_that_the_decoder_keeps(name, checkpointing, path, monkeypatch):
    """On a GPU, too, but for the bytes of an element: the kernels' inputs and outputs, here of no kernel at all."""
    attention_of, make_decoder = "cpu", functools.partial(init_decoder, seed=0)
    if path == "kernels":
        attention_of, make_decoder, kernel = "triton", Decoder, lambda *arguments, **options: None
        for module in (attention, elementwise):
            monkeypatch.setattr(module, "by_triton", lambda _: True)
        monkeypatch.setattr(attention, "_attention_fwd_kernel", defaultdict(lambda: kernel))
        monkeypatch.setattr(elementwise, "launch", kernel)
    counted = BlockActivations.of(
        ModelConfig.from_dict(SHAPES[name]), checkpointing, 4, attention_of, (PROMPT, RESPONSE - 1, GROUP)
    ).kept
    # A pack's copy of the weights of QK norm is less than a thousandth.
    assert block_bytes_a_token(SHAPES[name], checkpointing, make_decoder) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_decoder(name):
    model = init_decoder(ModelConfig.from_dict(SHAPES[name]), seed=0)
    size = ModelSize.of(model.config)
    assert size.total == sum(p.numel() for p in model.parameters())
    assert size.block == sum(p.numel() for p in model.model.layers[0].parameters())
    assert size.head == model.lm_head_weight.numel()
    assert size.root == size.total - size.block * model.config.num_layers


DEEP = SHAPE | {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6} | {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "eos_token_id": 0
}  # fmt: skip
WIDE_HEAD = DEEP | {"model_type": "qwen2", "vocab_size": 50_000, "num_hidden_layers": 2}


def peak_bytes(recipe: Recipe) -> tuple[int, dict[str, int]]:
    """Tokens of a rank's largest micro-batch; the peaks of a step's rollout and training above a world without a model.

    What glibc keeps of freed memory is no part of a plan: below this threshold 1.2 times the peak with one rank, twice
    with two ranks. A run has no such threshold, since returning memory takes half as long again as training.
    """
    ctypes.CDLL(None).mallopt(-3, 65_536)  # M_MMAP_THRESHOLD
    torch.set_num_threads(1)

    def memory(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(rf"{name}:\s+(\d+) kB", status)[0])

    def peak(work):
        Path("/proc/self/clear_refs").write_text("5")
        return work(), memory("VmHWM") - before

    problems, held_out = load_problems(recipe.data, recipe.run.seed)
    with (
        open_world(recipe) as world,
        open_reward_pool(recipe, problems[0]) as pool,
        RunFolder(recipe, resume=False, world=world) as folder,
    ):
        torch.randn(64, 64) @ torch.randn(64, 64)
        before = memory("VmRSS")
        trainer = Trainer(recipe, folder, world, pool, problems, held_out)

        def sample():
            trainer.sampler.sync(0)
            return trainer.sampler.rollout(1, trainer.position, Clock())

        (data, _), rollout = peak(sample)
        trainer.sampler.generator.free_weights()
        for scored in data.groups:  # every group has a gradient
            scored.scores.rewards[:] = np.arange(len(scored.rollouts))
        updates = trainer._pack(data)

        def learn():
            trainer._score(updates, takes_behavior=False)
            trainer._update(updates)

        _, training = peak(learn)
    return max(b.total_tokens for b in updates[0].batches), {"rollout": rollout, "training": training}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("shape", "checkpointing", "kl_coef", "num_groups", "size"),
    [(DEEP, "none", 0.0, 2, 1), (DEEP, "full", 0.01, 2, 2), (WIDE_HEAD, "none", 0.0, 2, 1)],
    ids=["saved activations", "recomputed activations and reference, 2 ranks", "vocabulary"],
)
def test_the_peak_memory_of_a_step(
    shape, checkpointing, kl_coef, num_groups, size, model_path, recipe_values, tmp_path
):
    config, (prompt, response, group_size) = ModelConfig.from_dict(shape), (64, 65, 4)
    save_checkpoint(init_decoder(config, seed=0), tmp_path / "model", tokenizer_files_from=model_path)
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i:064}", "answer": "none"}) + "\n" for i in range(64))
    )
    budget = num_groups * (prompt + group_size * (response - 1))
    rollout = {"prompts_per_step": 2 * num_groups * size, "group_size": group_size, "max_new_tokens": response}
    recipe = build_recipe(Recipe, recipe_values | {
        "model": {"path": str(tmp_path / "model"), "activation_checkpointing": checkpointing},
        "data": recipe_values["data"] | {"path": str(tmp_path / "data.jsonl")},
        "rewards": {"functions": ["exact_match"], "workers": 1},
        "rollout": rollout,
        "loss": {"preset": "dapo", "kl_coef": kl_coef},
        "train": {"token_budget": budget},
    })  # fmt: skip
    memory = Costs(recipe, config, CPU, size, Lengths(prompt, response, response)).memory(budget)
    wanted = {moment: sum(parts.values()) for moment, parts in memory.items()}
    training = max(wanted[moment] for moment in ("loss", "backward", "reduction"))
    wanted = {"rollout": wanted["rollout"], "training": training}
    for num_tokens, measured in ranks.run(peak_bytes, size, recipe):
        assert num_tokens > 0.9 * budget
        assert wanted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("mean", [1, 512, 1024, 4096])
def test_lengths_have_the_mean_they_were_given(mean):
    lengths = Lengths(10, mean, 4096)
    t = (np.arange(400_000) + 0.5) * 4096 / 400_000
    alive = lengths.alive(t)
    assert alive.mean() * 4096 == pytest.approx(mean, rel=1e-3)
    tokens, pairs, targets = lengths.group(4)
    assert (tokens, targets) == (10 + 4 * (mean - 1), 4 * mean)
    square = 2 * (alive * t).mean() * 4096
    assert pairs == pytest.approx(10 * 11 / 2 + 4 * (10 * mean + (square + mean) / 2), rel=1e-3)
    assert 0.99 * mean <= lengths.last(10_000) <= 4096


def test_more_gpus_hold_less_each_and_take_less_time():
    plans = [seven_b(n, response=512) for n in (8, 64, 512, 4096)]
    assert all(a.totals[m] >= b.totals[m] for a, b in pairwise(plans) for m in a.totals)
    steps = [sum(p.seconds.values()) for p in plans]
    assert steps == sorted(steps, reverse=True)
    assert plans[0].memory["loss"]["parameters (fp32 shard)"] == 4 * plans[0].num_params / 8


def test_copies_within_nodes_cost_memory_and_save_the_network():
    whole, copies = seven_b(512), seven_b(512, train={"shard_ranks": 8})
    assert copies.memory["loss"]["parameters (fp32 shard)"] == 64 * whole.memory["loss"]["parameters (fp32 shard)"]
    assert copies.seconds["sync"] < whole.seconds["sync"]
    with pytest.raises(RecipeError, match=r"train\.shard_ranks = 24 does not divide 512 GPUs"):
        seven_b(512, train={"shard_ranks": 24})


def test_one_gpu_waits_for_no_link():
    slow_links = dataclasses.replace(H200, memory=1e12, node_rate=1.0, network_rate=1.0)
    fast_links = dataclasses.replace(slow_links, node_rate=1e15, network_rate=1e15)
    assert seven_b(1, slow_links).seconds == seven_b(1, fast_links).seconds
    assert seven_b(8, slow_links).seconds["train"] > seven_b(8, fast_links).seconds["train"]


def test_the_parts_that_a_recipe_adds():
    base = seven_b()
    assert base.seconds["score"] == 0  # exactly on-policy, no reference
    assert 0.2 < base.mfu < MATMUL_SHARE
    with_kl = seven_b(loss={"kl_coef": 0.01})
    assert with_kl.memory["loss"]["reference (shard)"] == 2 * base.num_params / 8
    assert with_kl.seconds["score"] > 0
    # Less full packs are more, and each copies the gathered weights.
    scored = seven_b(train={"mini_batches": 4}).seconds["score"] / with_kl.seconds["score"]
    assert 0.75 <= scored < 0.76
    assert seven_b(train={"epochs": 2}).seconds["train"] == 2 * base.seconds["train"]
    kept = seven_b(train={"reshard_after_forward": False}).memory
    assert kept["loss"]["gathered weights"] == pytest.approx(2 * base.num_params)
    everything, recomputed = (seven_b(model={"activation_checkpointing": c}, train={"token_budget": 16_384})
                              for c in ("none", "full"))  # fmt: skip
    assert everything.totals["backward"] > recomputed.totals["backward"]
    assert everything.seconds["train"] < recomputed.seconds["train"]
    assert everything.mfu > recomputed.mfu


def test_a_teacher_is_in_the_plan(tmp_path):
    """On the GPUs of the policy with its shards and gathered weights; on its own in the time of a step alone."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen2.5-32B"]))
    base, size = seven_b(), ModelSize.of(ModelConfig.from_dict(PUBLISHED["Qwen2.5-32B"])).total
    beside = seven_b(teacher={"path": str(tmp_path)})
    assert beside.memory["loss"]["teacher (shard)"] == pytest.approx(2 * size / 8)
    assert beside.memory["score"]["gathered weights"] > base.memory["loss"]["gathered weights"]
    old = seven_b(loss={"kl_coef": 0.01}).seconds["score"]  # a pass of the policy's size
    assert beside.seconds["score"] == pytest.approx(old * (1 + size / base.num_params), rel=0.1)
    apart = seven_b(teacher={"path": str(tmp_path), "device": "cuda:7"})
    assert (apart.memory, apart.seconds["score"]) == (base.memory, beside.seconds["score"])


def test_decoding_reads_the_weights_at_every_step():
    found = seven_b()
    longest = found.lengths.last(128 * 16)
    assert 7000 < longest < 8192
    weights_s = 2 * (found.num_params - 152_064 * 3584) / H200.memory_rate
    assert longest * weights_s < found.seconds["generate"] < 10 * longest * weights_s
    assert found.sequences == 256
    assert seven_b(response=512).seconds["generate"] < found.seconds["generate"]
    slower = dataclasses.replace(H200, memory_rate=H200.memory_rate / 100)
    assert seven_b(machine=slower).seconds["generate"] > 20 * found.seconds["generate"]


@pytest.mark.parametrize(
    ("sections", "largest"),
    [
        ({"train": {"token_budget": 500_000}}, "backward.*; the largest are activations"),
        ({"rollout": {"prompts_per_step": 1024, "max_new_tokens": 16_384}}, "rollout.*; the largest are KV cache"),
        ({"train": {"shard_ranks": 1}}, r"backward.*; the largest are optimizer \(2 fp32 shards\)"),
    ],
    ids=["budget", "rollout", "sharding"],
)
def test_what_does_not_fit_is_refused_with_what_is_largest(sections, largest):
    with pytest.raises(RecipeError, match=rf"GB a GPU are needed \({largest}") as refusal:
        seven_b(**sections)
    budget = re.search(r"--train.token_budget=(\d+) would be enough", str(refusal.value))
    assert bool(budget) == ("token_budget" in str(sections))
    if budget:
        found = seven_b(train={"token_budget": int(budget[1])})
        assert found.largest_token_budget == int(budget[1])
        with pytest.raises(RecipeError, match="GB a GPU are needed"):
            seven_b(train={"token_budget": int(budget[1]) + 1})
    else:
        assert "no token budget is small enough" in str(refusal.value)


def test_a_budget_below_the_longest_completion_is_refused():
    with pytest.raises(RecipeError, match=r"8192 is below the longest prompt and completion together, 256 \+ 8192 - 1"):
        seven_b(train={"token_budget": 8192})


def test_the_shipped_recipes_fit_the_gpus_that_they_name():
    recipes = ROOT / "recipes"
    gsm8k, r1_zero = (load_recipe(Recipe, recipes / f"{name}.toml") for name in ("gsm8k_qwen2.5_1.5b", "r1_zero"))
    later = load_recipe(Recipe, recipes / "r1_zero.toml", ["--rollout.max_new_tokens=65536"])
    small, seven, large = (
        ModelConfig.from_dict(PUBLISHED[name]) for name in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-32B")
    )
    for recipe, config, num_gpus in [
        (gsm8k, small, 8), (r1_zero, seven, 64), (r1_zero, large, 512), (later, seven, 128)
    ]:  # fmt: skip
        longest = recipe.rollout.max_new_tokens
        plan(recipe, config, H200, num_gpus, Lengths(recipe.data.max_prompt_tokens, longest / 4, longest))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops_of_a_device_name(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_faulty_arguments():
    recipe = make_recipe()
    with pytest.raises(RecipeError, match="--gpu v100 is unknown; known are a100, h100"):
        plan_recipe(recipe, 8, "v100")
    with pytest.raises(
        RecipeError, match=r"--response-tokens 9000: wanted a mean of 1 to rollout.max_new_tokens = 8192"
    ):
        plan_recipe(recipe, 8, response=9000)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flashgrpo.grpo.stages.plan.auto_generator", lambda device: ("native", f"{device} is bare"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SEVEN_B))
    path = tmp_path / "recipe.toml"
    path.write_text(f'model.path = "{tmp_path}/model"\ndata.path = "none"\nrun.output = "{tmp_path}/run"\n')
    command = ["plan", str(path), "--gpus", "8", "--train.token_budget=8192"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("KV cache", "rollout", "7.62B parameters", "A prediction", "score"))
    assert len(printed.splitlines()) <= 40
    assert "Generator: native (auto, by what is installed here: cuda is bare). A" in " ".join(printed.split())
    assert main([*command, "--rollout.generator=vllm"]) == 0
    assert "Generator: vllm. A" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"] == {"prompt": 256, "response": 256, "longest": 1024}
    assert set(found["memory"]) == {"loss", "backward", "reduction", "prefill", "rollout"}
    assert main([*command, "--memory", "20"]) == 2
    assert "20.0 GB are there" in capsys.readouterr().err


def test_the_command_starts_without_the_large_libraries():
    """Seconds of imports: what the modules import, at their top, from this one on."""
    seen, left = set(), ["flashgrpo.grpo.stages.plan"]
    while left:
        seen.add(name := left.pop())
        file = ROOT / (name.removeprefix("flashgrpo.").replace(".", "/") + ".py")
        for node in ast.parse(file.read_text()).body if file.is_file() else []:
            if isinstance(node, ast.Import):
                left += {alias.name for alias in node.names} - seen
            elif isinstance(node, ast.ImportFrom):
                left += {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} - seen
    assert "flashgrpo.model.cost" in seen
    assert not {"transformers", "datasets", "matplotlib"} & {name.partition(".")[0] for name in seen}


def test_the_table_of_the_docs_is_what_plan_says():
    """docs/scale.md: the recipe of GSM8K by vLLM, each kind of checkpointing with the most tokens that fit."""
    page, file = ROOT / "docs/scale.md", ROOT / "recipes" / "gsm8k_qwen2.5_1.5b.toml"
    rows = []
    for name, gpu in (("Qwen2.5-1.5B", "H200"), ("Qwen2.5-7B", "H200"), ("Qwen2.5-7B", "H100")):
        for checkpointing in ("none", "selective", "full"):
            options = ["--rollout.generator=vllm", f"--model.activation_checkpointing={checkpointing}"]
            recipe = load_recipe(Recipe, file, options)
            config, lengths = ModelConfig.from_dict(PUBLISHED[name]), Lengths.assumed(recipe)
            found = plan(recipe, config, MACHINES[gpu.lower()], 8, lengths)
            train_s = found.seconds["train"] + found.seconds["score"]
            memory = f"{found.token_budget:,} | {max(found.totals.values()) / 1e9:.0f}"
            rows.append(f"| {name} | 8 {gpu} | {checkpointing} | {memory} | {train_s:.1f} | {found.mfu:.0%} |\n")
    text, printed = page.read_text(), r"(\| Qwen2\.5-.*\n)+"
    if os.environ.get("RECORD"):
        page.write_text(text := re.sub(printed, "".join(rows), text))
    assert "".join(rows) in text, "plan counts otherwise now; where that is meant: RECORD=1 pytest -k table_of_the_docs"
