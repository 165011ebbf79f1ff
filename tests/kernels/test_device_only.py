"""What only a GPU can show: sizes past 2^31, races, waits for the device, recompilation, reads out of bounds, graphs.

As a script, which compute-sanitizer watches, it calls every public function once. `pack_padded` is left out: the size
of what it returns depends on values, so it waits for the device by nature.
"""

import os
import random
import shutil
import subprocess
import sys
from itertools import accumulate

import numpy as np
import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.types import Request, Sampling
from flashgrpo.kernels import attention, elementwise, logprob, loss_triton
from flashgrpo.kernels import decode_attention as decode_attention_module
from flashgrpo.kernels.attention import packed_attention
from flashgrpo.kernels.decode_attention import DecodeRows, decode_attention
from flashgrpo.kernels.elementwise import QKNorm, rms_norm, rope, swiglu, swiglu_backward
from flashgrpo.kernels.grpo_loss import LossConfig, group_advantages, grpo_loss, logits_grpo_loss, merge_stats
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs
from flashgrpo.kernels.logprob import gather_logprobs
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import Decoder

RUNS, ROWS, VOCAB = 1000, 70_000, 32_000
# Lengths of a prompt and its completions, by family. The queries of both large ones' prompts are cut into pieces.
SMALL = [[70, 40, 3], [33, 0, 90]]
LARGE = [[128, *[1024] * 24], [3000, *range(100, 1300, 50)]]
FUNCTIONS = [
    "packed_attention", "gather_logprobs", "group_advantages", "grpo_loss", "logits_grpo_loss", "linear_logprobs",
    "linear_grpo_loss", "grpo_loss of sequences", "linear_grpo_loss of sequences", "decode_attention",
    "rms_norm", "rope", "rope with norms", "swiglu",
]  # fmt: skip
WAITS = "linear_grpo_loss", "linear_grpo_loss of sequences"  # for the number of live rows, as it says
has_60_gb = torch.cuda.is_available() and torch.cuda.mem_get_info()[1] > 60e9
huge = pytest.mark.skipif(not has_60_gb, reason="the GPU has less than 60 GB")
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def index(families, device):
    """cu_seqlens and prefix of families packed one behind the other."""
    prefix = []
    for _, *completions in families:
        prefix += [-1] + [len(prefix)] * len(completions)
    return offsets([n for family in families for n in family], device), torch.tensor(prefix, device=device)


def offsets(lengths, device):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def make_calls(device, families, vocab=9001, dtype=torch.bfloat16):
    """By name: a public function as one of its leaves, and the leaves."""

    def noise(*shape, dtype=dtype):
        return torch.randn(shape, device=device, dtype=dtype)

    spans = [n for _, *completions in families for n in completions]
    total, n, (cu_seqlens, prefix) = sum(map(sum, families)), sum(spans), index(families, device)
    target_cu_seqlens, targets = offsets(spans, device), torch.randint(0, vocab, (n,), device=device)
    rewards = noise(len(families), len(families[0]) - 1, dtype=torch.float32)
    grpo, gspo = LossConfig.preset("grpo", behavior_cap=2.0), LossConfig.preset("gspo")
    given = {"rewards": rewards, "denominator": torch.full((), 64.0, device=device)}
    for name in ("old_logprobs", "ref_logprobs", "behavior_logprobs"):
        given[name] = -9 + noise(n, dtype=torch.float32)

    def loss(function, config, *inputs):
        def call(*leaves):
            value, stats = function(*leaves, *inputs, target_cu_seqlens, config, **given)
            return value, *merge_stats([stats, stats]).values()

        return call

    qkv, logits = [noise(total, heads, 64) for heads in (4, 2, 2)], [noise(n, vocab)]
    head, logprobs = [noise(n, 64), noise(vocab, 64) / 8], [-9 + noise(n, dtype=torch.float32)]
    qkv_product, gate_up, table = noise(total, 8, 64), noise(total, 352), noise(total, 1, 64, dtype=torch.float32)
    head_weights = [noise(64), noise(64)]

    def rotated(x, *weights):
        norm = QKNorm(*weights, 1e-6) if weights else None
        return rope(x * 1, table, table, 4, norm, overwrite=True)

    functions = [
        (lambda *x: [packed_attention(*x, cu_seqlens, prefix)], qkv),
        (lambda x: gather_logprobs(x, targets), logits),
        (lambda: [group_advantages(rewards)], []),
        (loss(grpo_loss, grpo), logprobs),
        (loss(logits_grpo_loss, grpo, targets), logits),
        (lambda *x: linear_logprobs(*x, targets), head),
        (loss(linear_grpo_loss, grpo, targets), head),
        (loss(grpo_loss, gspo), logprobs),
        (loss(linear_grpo_loss, gspo, targets), head),
        (decoding(families, noise, device), []),
        (lambda x, y, weight: rms_norm(x, weight, 1e-6, y), [noise(total, 48), noise(total, 48), noise(48)]),
        (rotated, [qkv_product]),
        (rotated, [qkv_product, *head_weights]),
        (lambda: [swiglu(gate_up), *swiglu_backward(gate_up.clone(), gate_up[:, :176].clone())], []),
    ]
    return dict(zip(FUNCTIONS, functions, strict=True))


def decoding(families, noise, device):
    """A step after each family's prompt and completions, which have 0 to 299 tokens."""

    def index(values):
        return torch.tensor([*values], dtype=torch.int32, device=device)

    sizes, prompts = [len(family) - 1 for family in families], [family[0] for family in families]
    lengths = [n % 300 for _, *completions in families for n in completions]
    rows = DecodeRows(
        index([0, *accumulate(sizes)]), index([0, *accumulate(prompts)][:-1]), index(prompts),
        index(group for group, size in enumerate(sizes) for _ in range(size)), index(range(len(lengths))),
        index(lengths), max(sizes), max(prompts),
    )  # fmt: skip
    shared, own = (noise(2, sum(prompts), 2, 64), noise(2, len(lengths), 384, 2, 64))
    q, k, v = (noise(len(lengths), heads, 64) for heads in (4, 2, 2))
    return lambda: [decode_attention(q, k, v, (shared[0], shared[1]), (own[0], own[1]), rows)]


def run(function, leaves, upstream=None):
    """Outputs and gradients; `upstream` is 1 by default."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    made = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(made, leaves, upstream or [torch.ones_like(x) for x in made]) if made else []
    return [x.detach() for x in (*outputs, *gradients)]


def assert_same_rows(whole, alone, rows):
    for x, y in zip(whole, alone, strict=True):
        assert torch.equal(x[rows], y)


@huge
def test_rows_past_2_to_the_31_are_what_they_are_alone(device):
    """More rows, too, than a grid's other axes hold programs."""
    logits = torch.randn(ROWS, VOCAB, device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCAB, (ROWS,), device=device)
    rows = torch.tensor([0, 1, ROWS // 2, ROWS - 2, ROWS - 1], device=device)
    whole = run(lambda x: gather_logprobs(x, targets), [logits])
    assert_same_rows(whole, run(lambda x: gather_logprobs(x, targets[rows]), [logits[rows]]), rows)
    in_place = run(lambda x: gather_logprobs(x * 1, targets, inplace_backward=True), [logits])
    assert_same_rows(in_place, [x[rows] for x in whole], rows)


@huge
@pytest.mark.parametrize(
    ("families", "heads", "head_dim"),
    [([[500, 1000, 1000, 1000]] * 155, 32, 128), ([[5, 3, 17]] * 24_000, 4, 64)],
    ids=["2^31 elements", "72,000 segments"],
)
def test_a_family_of_a_huge_pack_is_what_it_is_alone(families, heads, head_dim, device):
    """The last family lies beyond 2^31 elements; all tensors together take 40 GB."""

    def attend(families):
        longest = max(map(max, families))
        return lambda *x: [packed_attention(*x, *index(families, device), max_seqlen=longest)]

    shape = sum(map(sum, families)), heads, head_dim
    *qkv, d_out = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    whole = run(attend(families), qkv, [d_out])
    for i in (0, len(families) // 2, len(families) - 1):
        start = sum(map(sum, families[:i]))
        rows = slice(start, start + sum(families[i]))
        alone = run(attend(families[i : i + 1]), [x[rows] for x in qkv], [d_out[rows]])
        assert_same_rows(whole, alone, rows)


@every_function
def test_the_same_bits_in_every_run(name, device):
    call = make_calls(device, LARGE)[name]
    first = run(*call)
    differ = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(RUNS):
        for x, y in zip(run(*call), first, strict=True):
            differ |= (x != y).any()
    assert not differ


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in WAITS])
def test_no_function_waits_for_the_device(name, device):
    call = make_calls(device, SMALL)[name]
    run(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=device).item()
        run(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_batch_compiles_a_kernel_again(device, monkeypatch):
    """Heads, vocabulary and configuration are a model's own; all that changes from batch to batch does so here."""
    compiled, first, rng = [], [], random.Random(0)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, repr, **_: compiled.append(repr))
    modules = attention, decode_attention_module, elementwise, logprob, loss_triton
    for kernel in (x for module in modules for x in vars(module).values()):
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    for batch in range(1 + RUNS):
        size = rng.randint(1, 20)
        drawn = [[rng.randint(1, 90), *rng.choices(range(60), k=size)] for _ in range(rng.randint(1, 4))]
        for call in make_calls(device, drawn if batch else SMALL, vocab=1000).values():
            run(*call)
        first = first if batch else [*compiled]
    assert first
    assert compiled == first


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "decode_attention"])
def test_one_graph_without_a_break(name, device):
    torch.compiler.reset()
    function, leaves = make_calls(device, SMALL)[name]
    compiled = run(torch.compile(function, fullgraph=True), leaves)
    for x, y in zip(compiled, run(function, leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_decoding_by_kernels_and_by_graphs_samples_what_torch_does(device):
    """While the cache grows and rows leave. In fp32, whose rounding is too small to draw another token."""
    torch.manual_seed(0)
    config = {
        "model_type": "qwen3", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    model = Decoder(ModelConfig.from_dict(config)).to(device)
    asked = [Request(i, [5 + i] * (4 + i), np.arange(3, dtype=np.uint64) + 3 * i) for i in range(6)]

    def generate(backend, cuda_graphs=False):
        model.attention_backend = backend
        groups = NativeGenerator(model, [3], cuda_graphs=cuda_graphs).generate(asked, Sampling(150))
        return [rollout for group in sorted(groups, key=lambda group: group[0].group) for rollout in group]

    by_torch = generate("torch")
    assert len({len(rollout.completion_ids) for rollout in by_torch}) > 3
    for ours in (generate("triton"), generate("triton", cuda_graphs=True)):
        for a, b in zip(ours, by_torch, strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, atol=1e-4)


def test_a_second_use_of_overwritten_logits_is_refused(device):
    logits = torch.randn(4, 300, device=device, requires_grad=True) * 2
    logprobs, _ = gather_logprobs(logits, torch.arange(4, device=device), inplace_backward=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_no_error(tool):
    """Every tensor has an allocation of its own, so that a read beyond one shows."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = subprocess.run([*command, sys.executable, __file__], env=env, capture_output=True, text=True, timeout=100)
    if "Device not supported" in ran.stdout + ran.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert ran.returncode == 0, ran.stdout + ran.stderr


if __name__ == "__main__":
    for small_call in make_calls("cuda", SMALL).values():
        run(*small_call)
    torch.cuda.synchronize()
