"""GRPO as a plain loop on a transformers model (4.57 or newer), a prompt computed once for all of its completions.

    python examples/hf_loop.py    # a tiny model from nothing, on a GPU where there is one; ten seconds on a CPU

transformers samples. For training, completions are packed behind one copy of their prompt, attention goes through
transformers' attention interface to flashgrpo's, and log-probs and loss are made of hidden states, so that at most a
chunk of logits exists. Of flashgrpo this needs kernels/ alone. For one process: DDP and FSDP want the loss made within
the model's forward pass, as `add_head` in trl_trainer.py does.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3Config, Qwen3ForCausalLM

from flashgrpo.kernels.attention import plan_attention, planned_attention
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, PAD, END = 512, 0, 1
NUM_PROMPTS, GROUP_SIZE, LONGEST_PROMPT, NEW_TOKENS = 4, 8, 96, 24
UPDATES = 2  # of a step: the second one's ratios are not 1
LOSS = LossConfig.preset("dapo")


class Pack(NamedTuple):
    input_ids: Tensor  # [1, total_tokens]: a prompt, its completions, the next prompt, ...
    position_ids: Tensor  # [1, total_tokens]; a completion's go on from its prompt's
    cu_seqlens: Tensor  # [num_segments + 1]; prompts and completions are segments
    prefix: Tensor  # [num_segments], the segment of a completion's prompt; -1: is a prompt
    predictors: Tensor  # [num_targets], the token whose hidden state predicts a target
    targets: Tensor  # [num_targets], the completions' tokens
    target_cu_seqlens: Tensor  # [num_completions + 1]


def pack(prompts: list[Tensor], groups: list[list[Tensor]]) -> Pack:
    """Every prompt in front of its group of completions."""
    segments, positions, prefix, predictors = [], [], [], []
    start = 0
    for prompt, group in zip(prompts, groups, strict=True):
        prompt_segment = len(segments)
        segments += [prompt, *group]
        positions.append(torch.arange(len(prompt)))
        prefix += [-1] + [prompt_segment] * len(group)
        start += len(prompt)
        last_of_prompt = start - 1
        for completion in group:
            positions.append(torch.arange(len(completion)) + len(prompt))
            predictors += [last_of_prompt, *range(start, start + len(completion) - 1)]
            start += len(completion)
    completions = [completion for group in groups for completion in group]
    return Pack(
        input_ids=torch.cat(segments)[None],
        position_ids=torch.cat(positions)[None].to(DEVICE),
        cu_seqlens=offsets(segments),
        prefix=torch.tensor(prefix, device=DEVICE),
        predictors=torch.tensor(predictors, device=DEVICE),
        targets=torch.cat(completions),
        target_cu_seqlens=offsets(completions),
    )


def offsets(pieces: list[Tensor]) -> Tensor:
    return torch.tensor([0, *map(len, pieces)], device=DEVICE).cumsum(0)


def attention(module, query, key, value, attention_mask, scaling=None, *, plan, **_) -> tuple[Tensor, None]:
    """As transformers calls it, with [1, heads, tokens, head_dim], and what its model is called with: `plan`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return planned_attention(q, k, v, plan, scale=scaling)[None], None


# Under a name with "flash" in it transformers would look for a kernel of the Hub.
AttentionInterface.register("packed_grpo", attention)
AttentionMaskInterface.register("packed_grpo", lambda *args, **options: None)


def predicting_rows(model: Any, batch: Pack) -> Tensor:  # [num_targets, hidden_size]
    """The hidden states that predict the targets."""
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim  # not every config has it
    heads = (config.num_attention_heads, config.num_key_value_heads, head_dim)
    plan = plan_attention(batch.cu_seqlens, batch.prefix, batch.input_ids.numel(), heads, model.dtype)
    model.set_attn_implementation("packed_grpo")
    output = model.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False, plan=plan)
    return output.last_hidden_state[0, batch.predictors]


@torch.no_grad()
def logprobs_of(model: Any, batch: Pack) -> Tensor:  # [num_targets]
    return linear_logprobs(predicting_rows(model, batch), model.lm_head.weight, batch.targets, entropy=False)[0]


def loss_of(model: Any, batch: Pack, rewards: Tensor, old_logprobs: Tensor) -> Tensor:
    """`rewards` is [num_prompts, GROUP_SIZE]; the loss compares those of a group."""
    loss, _ = linear_grpo_loss(
        predicting_rows(model, batch), model.lm_head.weight, batch.targets, batch.target_cu_seqlens, LOSS,
        denominator=float(len(batch.targets)), rewards=rewards, old_logprobs=old_logprobs,
    )  # fmt: skip
    return loss


def sample(model: Any, prompts: list[Tensor]) -> list[list[Tensor]]:
    """A group of completions for each prompt, up to and with the first END."""
    rows = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=PAD, padding_side="left")
    model.set_attn_implementation("sdpa")
    sampled = model.generate(
        rows, attention_mask=(rows != PAD).long(), max_new_tokens=NEW_TOKENS, num_return_sequences=GROUP_SIZE,
        do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=END,
    )[:, rows.shape[1] :]  # fmt: skip
    is_end = sampled == END
    lengths = (is_end.cumsum(1) - is_end.long() == 0).sum(1).tolist()
    completions = [row[:length] for row, length in zip(sampled, lengths, strict=True)]
    return [completions[i : i + GROUP_SIZE] for i in range(0, len(completions), GROUP_SIZE)]


def draw_prompts() -> list[Tensor]:
    lengths = torch.randint(LONGEST_PROMPT // 2, LONGEST_PROMPT + 1, (NUM_PROMPTS,)).tolist()
    return [torch.randint(2, VOCAB, (length,), device=DEVICE) for length in lengths]


def reward(completion: Tensor) -> float:
    """The share of even tokens."""
    return float((completion % 2 == 0).float().mean())


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(1, steps + 1):
        prompts = draw_prompts()
        groups = sample(model, prompts)
        rewards = torch.tensor([[reward(completion) for completion in group] for group in groups], device=DEVICE)
        batch = pack(prompts, groups)
        old_logprobs = logprobs_of(model, batch)
        for _ in range(UPDATES):
            optimizer.zero_grad()
            loss_of(model, batch, rewards, old_logprobs).backward()
            optimizer.step()
        repeated = sum(GROUP_SIZE * len(prompt) for prompt in prompts) + len(batch.targets)
        print(
            f"step {step:2} of {steps}: share of even tokens {float(rewards.mean()):.3f}, "
            f"{batch.input_ids.numel()} tokens through the layers in place of {repeated}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)  # of a CPU; the model is too small for more
    main()
