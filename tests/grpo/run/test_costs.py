"""What a run may take of a GPU: chosen before it starts, kept by a resume, and refused by it as by `flashgrpo plan`."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from flashgrpo.bench.shapes import SHAPES
from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe, load_recipe, recipe_to_toml
from flashgrpo.grpo.run import costs, loop, machines
from flashgrpo.grpo.run.costs import ASLEEP, CPU_BUDGET, Costs, Lengths, require_free, settle_budget
from flashgrpo.grpo.run.machines import MACHINES, hold_reserve, machine_of
from flashgrpo.grpo.train import train
from flashgrpo.model.config import ModelConfig

CUDA = torch.device("cuda", 0)


def costs_of(name: str = "Qwen2.5-7B", num_gpus: int = 8, gpu: str = "h200", prompt: float = 256, **sections) -> Costs:
    values = {"model": {"path": "none"}, "data": {"path": "none"}, "run": {"output": "none"}} | sections
    recipe = build_recipe(Recipe, values)
    config = ModelConfig.from_dict(SHAPES[name])
    return Costs(recipe, config, MACHINES[gpu], num_gpus, Lengths.assumed(recipe, prompt))


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


# A1: what the allocator cannot use.


@pytest.mark.parametrize(("generator", "share"), [("native", 0.1), ("vllm", 0.2), ("vllm_server", 0.1)])
def test_what_is_lost_between_tensors_grows_with_them(generator, share):
    """Not with the card: a simulated allocator lost 10 to 20% of what was allocated, or 9 to 13% with segments that
    grow, which an engine on the same GPU rules out.
    """
    vllm = {"servers": ["http://node:8000"]} if generator == "vllm_server" else {}
    run = costs_of(rollout={"generator": generator}, vllm=vllm)
    for tokens in (4096, 16_384):
        for parts in run.memory(tokens).values():
            of_others = {"reserve", "lost between tensors", "vLLM, asleep", costs.ENGINE}
            tensors = sum(size for name, size in parts.items() if name not in of_others)
            assert parts["lost between tensors"] == pytest.approx(share * tensors)


def test_the_largest_budget_leaves_what_the_allocator_loses():
    """131 GB of tensors were said to fit an H200, of which an allocator would have had to find 144 to 157."""
    run = costs_of(model={"path": "none", "activation_checkpointing": "full"})
    largest = run.largest_budget()
    worst = max(run.memory(largest).values(), key=total)
    assert 1.1 * (total(worst) - worst["lost between tensors"] - worst["reserve"]) + worst["reserve"] <= 141e9


def test_segments_that_do_not_grow_lose_more():
    run, fixed = costs_of(), costs_of()
    fixed.machine = dataclasses.replace(run.machine, segments_grow=False)
    lost, more = (each.memory(8192)["loss"]["lost between tensors"] for each in (run, fixed))
    assert more == pytest.approx(2 * lost)


@pytest.fixture
def gpu(monkeypatch):
    """An H100 that answers questions, and what was set of its allocator."""
    done = {}
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: done.update(share=share), raising=True
    )
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda text: done.update(settings=text))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return done


def test_the_allocator_leaves_the_reserve(gpu):
    hold_reserve(CUDA, 3e9, grows=True)
    assert gpu == {"settings": "expandable_segments:True", "share": pytest.approx(77 / 80)}
    assert machine_of(CUDA).memory == 80e9


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize("settings", ["max_split_size_mb:512", "expandable_segments:True,max_split_size_mb:512"])
def test_the_users_own_settings_of_the_allocator_stay(gpu, monkeypatch, name, settings):
    assert machine_of(CUDA).segments_grow
    monkeypatch.setenv(name, settings)
    hold_reserve(CUDA, 3e9, grows=True)
    assert "settings" not in gpu
    # Nor is less lost than with segments of a fixed size, if that is what they are.
    assert machine_of(CUDA).segments_grow == ("expandable" in settings)


def test_segments_for_cuda_ipc_do_not_grow(gpu):
    run = costs_of(rollout={"generator": "vllm"})
    hold_reserve(CUDA, run.reserve, grows=run.generator != "vllm")
    assert gpu == {"settings": "expandable_segments:False", "share": pytest.approx((80e9 - 3e9 - ASLEEP) / 80e9)}


# A2, B12: prefill, flash-attn.


def test_prefill_holds_one_part_of_the_prompts():
    """64 prompts of 2,048 tokens at once took 41.5 GB on one GPU, 18.5 of 256."""
    run = costs_of(num_gpus=1, prompt=2048, rollout={"generator": "native", "prompts_per_step": 64})
    short, whole = (run.memory(tokens)["prefill"] for tokens in (16_384, 131_072))
    assert short["KV cache"] == whole["KV cache"] == pytest.approx(64 * 2048 * 57_344)
    assert whole["activations"] == pytest.approx(131_072 * 143e3, rel=0.02)
    assert short["activations"] == pytest.approx(whole["activations"] / 8)


@pytest.mark.parametrize(("truncation", "largest"), [({"top_p": 0.9}, 512), ({"top_k": 20}, 20), ({}, 0)])
def test_kept_sets_are_on_the_gpu_of_all_packs_at_once(truncation, largest):
    """4 bytes an id; and in the head another copy of a pack's, as logits."""
    run = costs_of(rollout={"generator": "native"} | truncation)
    run.foresees = False
    found = run.memory(8192)
    in_pack = 8192 * run.target_share
    assert {name: parts.get("kept sets, at most", 0.0) for name, parts in found.items()} == {
        **dict.fromkeys(("loss", "backward", "reduction"), pytest.approx(largest * (4 + 2) * in_pack)),
        **dict.fromkeys(("prefill", "rollout"), 0.0),
    }
    # A run does not know how many completions there will be; a plan is told.
    run.foresees = True
    assert run.targets > in_pack
    found = run.memory(8192)["loss"].get("kept sets, at most", 0.0)
    assert found == pytest.approx(largest * (4 * run.targets + 2 * in_pack))


def test_flash_attn_keeps_a_prompts_keys_for_each_completion():
    by_flash, by_triton = (
        costs_of(model={"path": "none", "attention_backend": backend}).memory(16_384)["loss"]["activations"]
        for backend in ("flash_attn", "triton")
    )
    assert 1.0 < by_flash / by_triton < 1.2


# A3: vLLM.


def test_an_engine_takes_its_share_of_the_card():
    by_engine, by_itself = (costs_of(rollout={"generator": name}).memory(8192) for name in ("vllm", "native"))
    rollout = by_engine["rollout"]
    assert rollout[costs.ENGINE] == 0.5 * 141e9 + ASLEEP
    assert rollout["weights on their way"] == 3 * 2 * 152_064 * 3584
    assert not {"KV cache", "sampler's weights", "sampled logits"} & rollout.keys()
    assert by_engine["loss"]["vLLM, asleep"] == ASLEEP
    assert "vLLM, asleep" not in by_itself["loss"]
    assert "prefill" not in by_engine


def test_sparse_syncs_take_20_bytes_more_for_each_weight_of_the_largest_tensor():
    servers = {"servers": ["http://node:8000"]}
    whole, sparse = (
        costs_of(rollout={"generator": "vllm_server"}, vllm=servers | more).memory(8192)["rollout"]
        for more in ({}, {"weight_transfer": "sparse_nccl"})
    )
    assert sparse["weights on their way"] - whole["weights on their way"] == 20 * 152_064 * 3584


def test_servers_take_nothing_here():
    run = costs_of(rollout={"generator": "vllm_server"}, vllm={"servers": ["http://node:8000"]})
    assert {*run.memory(8192)["rollout"]} == {*run.state(), "weights on their way", "lost between tensors", "reserve"}


def test_an_engine_does_not_pay_for_launches():
    seconds = {name: costs_of("Qwen2.5-1.5B", rollout={"generator": name}).generate_s() for name in ("vllm", "native")}
    assert seconds["vllm"] < seconds["native"] / 1.5


def test_a_start_that_vllm_would_refuse_is_refused():
    """7B on 2 H100s: 45.7 GB of state, 7.6 of a reference and half a card, which vLLM found out after minutes."""
    run = costs_of(num_gpus=2, gpu="h100", rollout={"generator": "vllm"})
    words = (
        r"needed \(rollout\).*largest are vLLM \(vllm.memory_share\) 41.0 GB.*sample with rollout.generator = native"
    )
    with pytest.raises(RecipeError, match=words):
        settle_budget(run, "auto", 1279)
    free = 80e9 - 3e9
    with pytest.raises(RecipeError, match=r"vLLM wants 40.0 GB \(vllm.memory_share = 0.5 of 80.0 GB\) free.*53.3 GB"):
        require_free(run, free)
    require_free(costs_of(num_gpus=8, gpu="h100", rollout={"generator": "vllm"}), free)


def test_an_engine_without_room_for_a_sequence_is_refused():
    run = costs_of(rollout={"generator": "vllm"}, vllm={"memory_share": 0.11})
    with pytest.raises(
        RecipeError, match=r"memory_share = 0.11 of 141.0 GB leaves 0.3 GB .* of 10,000 tokens needs 0.6"
    ):
        settle_budget(run, 16_384, 9999)
    settle_budget(run, 16_384, 4000)
    # Nor would vLLM start without room for the longest that it is told of.
    run = costs_of(rollout={"generator": "vllm"}, vllm={"memory_share": 0.11, "max_model_len": 10_000})
    with pytest.raises(RecipeError, match=r"a sequence of 10,000 tokens needs 0\.6"):
        settle_budget(run, 16_384, 4000)


# A6: the share of peak that training reaches follows from the width.


def test_narrow_models_wait_for_memory_more():
    """Elementwise work was 30% of a micro-batch at 0.5B and 13% at 7B, at equal rates."""
    found = []
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"):
        run = costs_of(name)
        useful = 3 * run.flops.forward(run.tokens, run.pairs, run.targets)
        found.append(useful / run.seconds(16_384)["train"] / run.peak_flops)
    assert found == sorted(found)
    assert found[2] - found[0] > 0.03
    assert found[2] < costs.MATMUL_SHARE


# train.token_budget = "auto".


def test_auto_is_the_most_that_fits_a_gpu():
    run = costs_of()
    chosen = settle_budget(run, "auto", 1279)
    assert run.largest_budget() - 256 < chosen <= run.largest_budget()
    assert max(map(total, run.memory(chosen).values())) <= 141e9
    # The same words as for a number that does not fit, with what is largest.
    with pytest.raises(RecipeError, match=r"GB a GPU are needed \(backward\), 141.0 GB.*largest are activations"):
        settle_budget(run, "auto", 200_000)


def test_auto_on_a_cpu_is_noted_and_kept_by_a_resume(recipe, capsys, monkeypatch):
    """Also where the machine, or what is measured of it, has become another one."""
    auto = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, token_budget="auto", steps=1))
    train(auto)
    assert f"train.token_budget = {CPU_BUDGET} (auto: enough for a CPU)" in capsys.readouterr().err
    stored = f"{auto.run.output}/recipe.toml"
    assert load_recipe(Recipe, stored).train.token_budget == CPU_BUDGET
    monkeypatch.setattr(costs, "CPU_BUDGET", 64)
    train(dataclasses.replace(auto, train=dataclasses.replace(auto.train, steps=2)), resume=True)
    assert load_recipe(Recipe, stored).train.token_budget == CPU_BUDGET
    assert "token_budget" not in capsys.readouterr().err


def test_auto_holds_the_longest_sequence(recipe, monkeypatch):
    monkeypatch.setattr(costs, "CPU_BUDGET", 4)
    auto = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, token_budget="auto", steps=1))
    train(auto)
    found = load_recipe(Recipe, f"{auto.run.output}/recipe.toml").train.token_budget
    assert found != "auto"
    assert 4 < found < 64


def test_a_run_refuses_what_does_not_fit_in_the_words_of_plan(recipe, monkeypatch, tmp_path, capsys):
    """Before it loads anything."""
    auto = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, token_budget="auto"))
    card = dataclasses.replace(MACHINES["h100"], memory=3.0005e9)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "machine_of", lambda device: card)
        patched.setattr(loop, "open_sharded_model", None)
        with pytest.raises(RecipeError, match="GB a GPU are needed") as refusal:
            train(auto)
    monkeypatch.setitem(machines.MACHINES, "h100", card)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_to_toml(auto))
    assert main(["plan", str(file), "--gpu", "h100"]) == 2
    assert str(refusal.value) in " ".join(capsys.readouterr().err.split())


def test_a_run_does_not_refuse_for_completions_that_may_stay_short():
    """Nobody knows how long they become, and no key of a recipe says it: a run that fits would not start."""
    foreseen = costs_of(gpu="h100", rollout={"generator": "native", "prompts_per_step": 256, "max_new_tokens": 8192})
    with pytest.raises(RecipeError, match=r"needed \(rollout\).*largest are KV cache"):
        settle_budget(foreseen, "auto", 8447)
    config, lengths = foreseen.config, foreseen.lengths
    run = Costs(foreseen.recipe, config, foreseen.machine, 8, lengths, foresees=False)
    chosen = settle_budget(run, "auto", 8447)
    assert chosen == run.largest_budget() // 256 * 256 > 8447
    # But that every row has a first token.
    many = dataclasses.replace(foreseen.recipe.rollout, prompts_per_step=8192)
    run = Costs(
        dataclasses.replace(foreseen.recipe, rollout=many), config, foreseen.machine, 8, lengths, foresees=False
    )
    with pytest.raises(RecipeError, match=r"needed \(rollout\).*largest are KV cache"):
        settle_budget(run, "auto", 8447)


def test_sampling_ahead_hides_behind_training():
    servers = {"generator": "vllm_server", "max_new_tokens": 512}
    together, apart = (
        costs_of(rollout=servers | {"max_staleness": ahead}, vllm={"devices": ["4,5", "6,7"]}) for ahead in (1, 0)
    )
    seconds = together.seconds(8192)
    assert apart.step_s(seconds) == pytest.approx(sum(seconds.values()))
    assert together.step_s(seconds) == max(seconds["generate"], sum(seconds.values()) - seconds["generate"])
    assert (together.num_engines, together.gpus_an_engine) == (2, 2)
