"""What a recipe costs a GPU: arithmetic on the recipe, a model's shape and a machine's rates, for plan and for runs.

Memory is counted from what the code keeps: FSDP2's shards and gathered weights, what the decoder
saves for its backward pass, the loss's chunk of logits and fp32 gradient of the head, the sampler's
copy of the weights and its KV cache. It is counted at the three moments that can be the worst, with
the shards of gradients from the micro-batch before:

    loss       a full micro-batch is saved; the head's gradient exists twice in fp32, or once beside a chunk of logits
    backward   the same, with the last block recomputed where it is checkpointed, and in its MLP's backward pass
    rollout    no gradients; a copy of all weights, the KV cache, the sampled rows' logits

When embedding and head are reduced, at the end, nothing is saved any more: that is always less than
the loss held. Times are a roofline: the larger of computing at a share of the machine's rate and of
moving the bytes. The shares below are assumptions until a GPU has measured them. Not counted:
rewards, checkpoints, evaluation, dropped groups.
"""

import bisect
import math
from dataclasses import dataclass

import numpy as np

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import Recipe
from flashgrpo.grpo.run.machines import Machine
from flashgrpo.kernels.linear_grpo import default_chunk_tokens
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cost import BlockActivations, ModelFlops, ModelSize

MATMUL_SHARE = 0.6  # of peak FLOP/s in products, with the norms and RoPE between them: assumed
ATTENTION_SHARE = 0.45  # of peak FLOP/s in attention: predicted from the kernels' issue cycles on sm_90
FP32_SHARE = 1 / 15  # fp32 FLOP/s of bf16's: 67 of 989 TFLOP/s on an H100
MEMORY_SHARE = 0.8  # of memory bandwidth in decoding: assumed
LINK_SHARE = 0.7  # of link bandwidth in collectives: assumed
IMBALANCE = 1.08  # slowest rank's work over the mean: what packing promises
DECODE_OPERATORS = 33  # of the native generator, a layer and step: counted
OPERATOR_S = 6e-6  # host time of an eager operator, which CUDA graphs would save: assumed
FRAGMENTATION = 0.05  # of memory: assumed


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions. A completion is longer than t with probability (1 - t/longest)^tail, where
    the tail follows from the mean: longest / mean - 1, so 0 if all reach the limit and 3 if they use a quarter.
    """

    prompt: float
    response: float
    longest: int

    @property
    def tail(self) -> float:
        return self.longest / self.response - 1

    def alive(self, t: np.ndarray) -> np.ndarray:
        """Shares of completions with more than t tokens, fewer than the longest has."""
        return (1 - t / self.longest) ** self.tail

    def last(self, num_completions: float) -> float:
        """Length of the longest of so many."""
        return self.longest * (1 - num_completions ** (-1 / self.tail)) if self.tail else self.longest

    def group(self, group_size: int) -> tuple[float, float, float]:
        """Packed tokens, attention's query-key pairs and targets of a group, in expectation."""
        square = 2 * self.longest**2 / ((self.tail + 1) * (self.tail + 2))
        own = group_size * (self.prompt * self.response + (square + self.response) / 2)
        tokens = self.prompt + group_size * (self.response - 1)
        return tokens, self.prompt * (self.prompt + 1) / 2 + own, group_size * self.response


Parts = dict[str, float]  # bytes by name


class Costs:
    """A recipe on a machine, and what is counted of it.

    Raises RecipeError where the ranks of a copy do not divide the GPUs.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, machine: Machine, num_gpus: int, lengths: Lengths):
        self.recipe, self.config, self.machine = recipe, config, machine
        self.num_gpus, self.lengths = num_gpus, lengths
        self.size, self.flops = ModelSize.of(config), ModelFlops.of(config)

        # The compute type's bytes, and what a GPU and its memory reach in it.
        dtype = recipe.model.dtype
        self.itemsize = 4 if dtype == "float32" or (dtype == "auto" and machine.is_cpu) else 2
        self.peak_flops = machine.flops * (FP32_SHARE if self.itemsize == 4 and not machine.is_cpu else 1.0)
        self.product_rate = self.peak_flops * MATMUL_SHARE
        self.memory_rate = machine.memory_rate * MEMORY_SHARE

        # Ranks that hold one copy of the model.
        self.shard_ranks = recipe.train.shard_ranks or num_gpus
        if num_gpus % self.shard_ranks:
            raise RecipeError(
                f"train.shard_ranks = {self.shard_ranks} does not divide {num_gpus} GPUs; choose a divisor, or 0"
            )

        # Keys and values of a token; and logits of a row, in fp32 too with their softmax, and its sums in float64.
        self.kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.itemsize
        self.sampled_bytes = config.vocab_size * (self.itemsize + 16)

        # A rank's share of a step: whole groups that it samples; packed tokens, query-key pairs and targets.
        rollout, train = recipe.rollout, recipe.train
        self.groups_a_rank = -(-rollout.prompts_per_step // num_gpus)
        of_group, groups = lengths.group(rollout.group_size), rollout.prompts_per_step / num_gpus
        self.tokens, self.pairs, self.targets = (count * groups for count in of_group)
        # Of an update.
        self.micro_batches = math.ceil(self.tokens / train.mini_batches / train.token_budget)

    def memory(self, token_budget: int) -> dict[str, Parts]:
        """The parts of a GPU's memory at each moment of the docstring above, with micro-batches of `token_budget`."""
        size, config, shard = self.itemsize, self.config, self.size.total / self.shard_ranks
        # What is there at every moment.
        state = {
            "reserve": self.machine.reserve + FRAGMENTATION * self.machine.memory * (not self.machine.is_cpu),
            "parameters (fp32 shard)": 4 * shard,
            "optimizer (2 fp32 shards)": 8 * shard,
        }
        if self.recipe.loss.kl_coef:
            state["reference (shard)"] = size * shard
        group_size, blocks = self.recipe.rollout.group_size, config.num_layers
        tokens, _, targets = self.lengths.group(group_size)
        rows = token_budget * targets / tokens
        # A CPU's attention copies a prompt's keys for each completion; the kernel reads them in place.
        cpu_group = (self.lengths.prompt, self.lengths.response - 1, group_size) if self.machine.is_cpu else None
        block = BlockActivations.of(config, self.recipe.model.activation_checkpointing, size, cpu_group)
        # Outside of the blocks: the final norm's input and output, cos and sin.
        outside = 2 * size * config.hidden_size + 8 * config.head_dim
        saved = token_budget * (blocks * block.kept + outside)
        gathered, resharded = size * self.size.root, self.recipe.train.reshard_after_forward
        all_blocks, head = size * blocks * self.size.block, self.size.head
        trained = {**state, "gradients (fp32 shard)": 4 * shard}
        chunk = min(rows, default_chunk_tokens(config.vocab_size, size, not self.machine.is_cpu))
        logits = chunk * config.vocab_size * size * (3 if self.machine.is_cpu else 1)
        d_head = max(4 * head + logits, 8 * head + (size * head if size < 4 else 0))
        rollout_rows, room = self.rollout_peak()
        unsharded, reduced = "gathered weights", "gradients before reduction"
        return {
            "loss": {
                **trained,
                unsharded: gathered + (0 if resharded else all_blocks),
                "activations": saved + 2 * size * rows * config.hidden_size,
                "logits and head gradient": d_head,
            },
            "backward": {
                **trained,
                unsharded: gathered + (size * min(2, blocks) * self.size.block if resharded else all_blocks),
                reduced: size * head + (size + 4) * self.size.block,
                "activations": saved + token_budget * (block.recomputed + block.working),
            },
            "rollout": {
                **state,
                "sampler's weights": size * self.size.total * (2 if self.machine.is_cpu else 1),  # oneDNN's copy
                "KV cache": self.kv_bytes * (rollout_rows * room + self.groups_a_rank * self.lengths.prompt),
                "sampled logits": rollout_rows * self.sampled_bytes,
            },
        }

    def largest_budget(self) -> int:
        """Most tokens of a micro-batch with which every moment fits, 0 for none."""

        def is_over(token_budget: int) -> bool:
            totals = [sum(parts.values()) for parts in self.memory(token_budget).values()]
            return max(totals) > self.machine.memory

        # Every part grows with the budget, so that halving finds the end in 40 looks.
        return bisect.bisect_left(range(1, 1 << 40), True, key=is_over)

    def rollout_peak(self) -> tuple[float, float]:
        """Rows and room a row of the native generator's cache, which doubles for all rows at once, at its largest."""
        rooms = np.minimum(64 << np.arange(self.lengths.longest.bit_length()), self.lengths.longest)
        # No room is made before the last is full, and an eighth of the rows may be idle.
        alive = np.minimum(self.lengths.alive(rooms / 2) * 8 / 7, 1.0)
        alive[0] = 1.0
        rows = alive * self.groups_a_rank * self.recipe.rollout.group_size
        worst = np.argmax(rows * (rooms + self.sampled_bytes / self.kv_bytes))
        return float(rows[worst]), float(rooms[worst])

    def collective_s(self, num_bytes: float) -> float:
        """Of an all-gather or reduce-scatter of so many bytes in all over the ranks of a copy; nodes share the load."""
        local = min(self.shard_ranks, self.machine.gpus_per_node)
        nodes = -(-self.shard_ranks // local)
        inside, between = (local - 1) / local / self.machine.node_rate, (nodes - 1) / nodes / local
        return num_bytes * max(inside, between / self.machine.network_rate) / LINK_SHARE

    def all_reduce_s(self) -> float:
        """Of a rank's gradients with those of the other copies."""
        copies, crosses = self.num_gpus // self.shard_ranks, self.num_gpus > self.machine.gpus_per_node
        rate = self.machine.network_rate if crosses else self.machine.node_rate
        return 2 * (copies - 1) / copies * 4 * self.size.total / self.shard_ranks / rate / LINK_SHARE

    def work(self, blocks: float, attention: float, head: float) -> float:
        """Seconds of a rank's share of a step, as multiples of the forward pass' work."""
        per = self.flops
        products = blocks * per.per_token * self.tokens + head * per.per_target * self.targets
        pairs_s = attention * per.per_pair * self.pairs / (self.peak_flops * ATTENTION_SHARE)
        return IMBALANCE * (products / self.product_rate + pairs_s)

    def seconds(self) -> dict[str, float]:
        """Of a step, by phase."""
        train, moved = self.recipe.train, self.itemsize * self.size.total
        passes = (train.mini_batches - 1) / train.mini_batches + (self.recipe.loss.kl_coef > 0)
        # A pass gathers the weights in every micro-batch.
        gathering_s = train.mini_batches * self.micro_batches * self.collective_s(moved)
        score = passes * max(self.work(1, 1, 1), gathering_s)
        # Attention: 2 products in a forward pass, 7 in a backward one.
        again = self.recipe.model.activation_checkpointing == "full"
        compute = self.work(3 + again, 4.5 + again, 3 + (self.recipe.loss.ratio_level == "sequence"))
        gathers = 2 if train.reshard_after_forward else 1
        exchange = gathers * self.collective_s(moved) + self.collective_s(4 * self.size.total)
        exchange = train.mini_batches * (self.micro_batches * exchange + self.all_reduce_s())
        # AdamW reads 4 and writes 3 fp32 numbers a weight.
        adamw = 28 * self.size.total / self.shard_ranks / self.memory_rate
        epoch = max(compute, exchange) + train.mini_batches * adamw
        sync = self.collective_s(moved) + moved / self.memory_rate
        return {"generate": self.generate_s(), "score": score, "train": train.epochs * epoch, "sync": sync}

    def generate_s(self, num_points: int = 256) -> float:
        """Prompts once; then every step reads the weights and the live keys and values, until the last row ends."""
        config, lengths, size = self.config, self.lengths, self.recipe.rollout.group_size
        rows, prompts = self.groups_a_rank * size, self.groups_a_rank * lengths.prompt
        prefill = self.flops.forward(prompts, prompts * lengths.prompt / 2, self.groups_a_rank)
        weights = self.itemsize * (config.num_layers * self.size.block + self.size.head)
        width = lengths.last(self.recipe.rollout.prompts_per_step * size) / num_points
        t = (np.arange(num_points) + 0.5) * width
        alive = lengths.alive(t)
        live = rows * alive
        # A prompt is read once for its group, as long as one of its completions lives.
        read = live * t + prompts * (1 - (1 - alive) ** size)
        read_s = (weights + self.kv_bytes * read) / self.memory_rate
        compute_s = self.flops.forward(live, live * (t + lengths.prompt), live) / self.product_rate
        host_s = config.num_layers * DECODE_OPERATORS * OPERATOR_S
        slowest_s = np.maximum(np.maximum(read_s, compute_s), host_s)
        return prefill / self.product_rate + width * float(slowest_s.sum())


def require_fit(run: Costs, token_budget: int, needed: int) -> int:
    """The largest budget that fits, which `token_budget` does; `needed` are the tokens of the longest sequence.

    Raises RecipeError where the budget does not hold such a sequence, or a GPU not such a budget.
    """
    if token_budget < needed:
        raise RecipeError(
            f"train.token_budget = {token_budget} is below a prompt and its longest completion, {needed} "
            "tokens; raise it or lower rollout.max_new_tokens"
        )
    largest = run.largest_budget()
    if token_budget > largest:
        raise RecipeError(_refusal(run, run.memory(token_budget), largest if largest >= needed else 0))
    return largest


def _refusal(run: Costs, memory: dict[str, Parts], enough: int) -> str:
    """What is largest, and a token budget that would be enough, which is the one change that costs no result."""
    moment = max(memory, key=lambda name: sum(memory[name].values()))
    largest = sorted(memory[moment].items(), key=lambda part: part[1], reverse=True)[:3]
    sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in largest)
    advice = "no token budget is small enough: make one of them smaller, or take more GPUs"
    if enough:
        advice = f"--train.token_budget={enough} would be enough"
    return (
        f"{sum(memory[moment].values()) / 1e9:,.1f} GB a GPU are needed ({moment}), "
        f"{run.machine.memory / 1e9:,.1f} GB are there, on {run.num_gpus} GPUs; "
        f"the largest are {sizes}; {advice}"
    )
