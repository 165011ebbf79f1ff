"""GRPO as a plain loop on a transformers model, every prompt computed once for all of its completions.

    python examples/hf_loop.py    # a tiny model from nothing, on a GPU where there is one; ten seconds on a CPU

transformers samples. For training, completions are packed behind one copy of their prompt, attention goes through
transformers' attention interface to flashgrpo's, and log-probs and loss are made of hidden states, so that at most a
chunk of logits exists. At the end loss and gradients of a batch are compared with those of plain torch on padded rows.
Of flashgrpo this needs kernels/ alone.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from flashgrpo.kernels.attention import plan_attention, planned_attention
from flashgrpo.kernels.grpo_loss import LossConfig, group_advantages
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

    _ = PreTrainedModel.set_attn_implementation
except (ImportError, AttributeError) as error:
    sys.exit(f"hf_loop.py needs transformers 4.57 or newer; found {transformers.__version__} ({error})")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, PAD, END = 512, 0, 1
NUM_PROMPTS, GROUP_SIZE, LONGEST_PROMPT, NEW_TOKENS = 4, 8, 96, 24
UPDATES = 2  # of a step: the second one's ratios are not 1
LOSS = LossConfig.preset("dapo")

Completions = list[list[Tensor]]  # of each prompt


class Pack(NamedTuple):
    input_ids: Tensor  # [1, total_tokens]: a prompt, its completions, the next prompt, ...
    position_ids: Tensor  # [1, total_tokens]; a completion's go on from its prompt's
    cu_seqlens: Tensor  # [num_segments + 1]; prompts and completions are segments
    prefix: Tensor  # [num_segments], the segment of a completion's prompt; -1: is a prompt
    max_seqlen: int
    predictors: Tensor  # [num_targets], the token whose hidden state predicts a target
    targets: Tensor  # [num_targets], the completions' tokens
    target_cu_seqlens: Tensor  # [num_completions + 1]


class Batch(NamedTuple):
    pairs: list[tuple[Tensor, Tensor]]  # every completion behind its prompt
    pack: Pack
    rewards: Tensor  # [num_prompts, group_size]
    advantages: Tensor  # [num_completions]
    old_logprobs: Tensor  # [num_targets]


def pack(prompts: list[Tensor], completions: Completions) -> Pack:
    tokens, positions, prefix, predictors = [], [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        start, prompt_segment = sum(map(len, tokens)), len(tokens)
        tokens.append(prompt)
        positions.append(torch.arange(len(prompt)))
        prefix.append(-1)
        last_of_prompt = start + len(prompt) - 1
        start += len(prompt)
        for completion in group:
            tokens.append(completion)
            positions.append(torch.arange(len(completion)) + len(prompt))
            prefix.append(prompt_segment)
            predictors += [last_of_prompt, *range(start, start + len(completion) - 1)]
            start += len(completion)
    targets = [completion for group in completions for completion in group]
    return Pack(
        input_ids=torch.cat(tokens)[None],
        position_ids=torch.cat(positions)[None].to(DEVICE),
        cu_seqlens=offsets(tokens),
        prefix=torch.tensor(prefix, dtype=torch.int32, device=DEVICE),
        max_seqlen=max(map(len, tokens)),
        predictors=torch.tensor(predictors, device=DEVICE),
        targets=torch.cat(targets),
        target_cu_seqlens=offsets(targets),
    )


def offsets(pieces: list[Tensor]) -> Tensor:
    lengths = torch.tensor([0, *map(len, pieces)])
    return lengths.cumsum(0).to(DEVICE, torch.int32)


def attention(module, query, key, value, attention_mask, scaling=None, *, plan, **_) -> tuple[Tensor, None]:
    """As transformers calls it, with [1, heads, tokens, head_dim], and what its model is called with: `plan`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return planned_attention(q, k, v, plan, scale=scaling)[None], None


# Under a name with "flash" in it transformers would look for a kernel of the Hub.
AttentionInterface.register("packed_grpo", attention)
AttentionMaskInterface.register("packed_grpo", lambda *args, **options: None)


def sample(model: Any, prompts: list[Tensor]) -> Completions:
    model.set_attn_implementation("sdpa")
    longest = max(map(len, prompts))
    rows = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0), value=PAD) for prompt in prompts])
    sampled = model.generate(
        rows, attention_mask=(rows != PAD).long(), max_new_tokens=NEW_TOKENS, num_return_sequences=GROUP_SIZE,
        do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=END,
    )[:, longest:]  # fmt: skip
    return [[row[: num_tokens(row)] for row in group] for group in sampled.split(GROUP_SIZE)]


def num_tokens(row: Tensor) -> int:
    """Up to and with the first END."""
    ends = (row == END).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(row)


def reward(completion: Tensor) -> float:
    """The share of even tokens."""
    return float((completion % 2 == 0).float().mean())


def predicting_rows(model: Any, pack: Pack) -> Tensor:  # [num_targets, hidden_size]
    model.set_attn_implementation("packed_grpo")
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    plan = plan_attention(
        pack.cu_seqlens, pack.prefix, pack.input_ids.numel(), heads, model.dtype, max_seqlen=pack.max_seqlen
    )
    output = model.model(pack.input_ids, position_ids=pack.position_ids, use_cache=False, plan=plan)
    return output.last_hidden_state[0, pack.predictors]


@torch.no_grad()
def packed_logprobs(model: Any, pack: Pack) -> Tensor:  # [num_targets]
    return linear_logprobs(predicting_rows(model, pack), model.lm_head.weight, pack.targets, entropy=False)[0]


def packed_loss(model: Any, batch: Batch) -> Tensor:
    pack = batch.pack
    loss, _ = linear_grpo_loss(
        predicting_rows(model, pack), model.lm_head.weight, pack.targets, pack.target_cu_seqlens, LOSS,
        denominator=float(len(pack.targets)), advantages=batch.advantages, old_logprobs=batch.old_logprobs,
    )  # fmt: skip
    return loss


def padded_loss(model: Any, batch: Batch) -> Tensor:
    """The same by plain torch: a padded row a completion, with its prompt, and all logits."""
    model.set_attn_implementation("sdpa")
    rows = [torch.cat(pair) for pair in batch.pairs]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    places = torch.arange(padded.shape[1], device=DEVICE)
    first = torch.tensor([[len(prompt)] for prompt, _ in batch.pairs], device=DEVICE)
    end = torch.tensor([[len(row)] for row in rows], device=DEVICE)
    logits = model(padded, attention_mask=(places < end).long()).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, padded[:, 1:, None]).squeeze(-1)
    is_target = ((places >= first) & (places < end))[:, 1:]
    ratio = (logprobs[is_target] - batch.old_logprobs).exp()
    advantages = batch.advantages[:, None].expand_as(is_target)[is_target]
    bounded = ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high)
    return -torch.minimum(ratio * advantages, bounded * advantages).mean()


def rollout(model: Any) -> Batch:
    lengths = torch.randint(LONGEST_PROMPT // 2, LONGEST_PROMPT + 1, (NUM_PROMPTS,)).tolist()
    prompts = [torch.randint(2, VOCAB, (length,), device=DEVICE) for length in lengths]
    completions = sample(model, prompts)
    rewards = torch.tensor([[reward(completion) for completion in group] for group in completions], device=DEVICE)
    packed = pack(prompts, completions)
    return Batch(
        pairs=[
            (prompt, completion) for prompt, group in zip(prompts, completions, strict=True) for completion in group
        ],
        pack=packed,
        rewards=rewards,
        advantages=group_advantages(rewards).flatten(),
        old_logprobs=packed_logprobs(model, packed),
    )


class Measured(NamedTuple):
    loss: float
    gradients: Tensor
    seconds: float


def measure(model: Any, loss_of: Callable[[Any, Batch], Tensor], batch: Batch) -> Measured:
    """A forward and a backward pass; the least of three times."""
    times = []
    loss = torch.zeros(())
    for _ in range(3):
        model.zero_grad()
        start = time.perf_counter()
        loss = loss_of(model, batch)
        loss.backward()
        loss = loss.detach().cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    gradients = torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
    return Measured(float(loss), gradients, min(times))


def compare(model: Any) -> None:
    batch = rollout(model)
    # Old log-probs of other weights: ratios that are not 1, and some beyond their bounds.
    batch = batch._replace(old_logprobs=batch.old_logprobs + 0.2 * torch.randn_like(batch.old_logprobs))
    packed, padded = measure(model, packed_loss, batch), measure(model, padded_loss, batch)
    off = float((packed.gradients - padded.gradients).norm() / padded.gradients.norm())
    shared, repeated = batch.pack.input_ids.numel(), sum(len(torch.cat(pair)) for pair in batch.pairs)
    print(f"loss {packed.loss:.6f} packed, {padded.loss:.6f} padded; gradients differ by {off:.1e} of their norm")
    print(f"tokens through the layers: {shared} with shared prompts, {repeated} with repeated ones")
    print(f"forward and backward in this run on {DEVICE}: {packed.seconds:.3f} s packed, {padded.seconds:.3f} s padded")


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    print(f"{model.num_parameters():,} parameters on {DEVICE}; the reward is the share of even tokens")
    for step in range(1, steps + 1):
        batch = rollout(model)
        for _ in range(UPDATES):
            optimizer.zero_grad()
            packed_loss(model, batch).backward()
            optimizer.step()
        print(f"step {step:2} of {steps}: reward {float(batch.rewards.mean()):.3f}", flush=True)
    compare(model)


if __name__ == "__main__":
    torch.set_num_threads(1)  # of a CPU; the model is too small for more
    main()
