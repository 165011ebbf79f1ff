"""What a recipe costs a GPU: arithmetic on the recipe, a model's shape and a machine's rates, for plan and for runs.

Memory is counted from what the code keeps: FSDP2's shards and gathered weights, what the decoder
saves for its backward pass, the loss's chunk of logits and gradient of the head, and what the
generator takes of the card. It is counted at the moments that can be the worst, the first three with
the shards of gradients from the micro-batch before:

    loss       a full micro-batch is saved; the head's gradient exists beside a chunk of logits, or, where several
               chunks add up to it in fp32, a second time in the weight's type
    backward   the same, with the last block recomputed where it is checkpointed, and in its MLP's backward pass
    reduction  at its end: gradients of embedding and head, theirs and the first block's in fp32, and of these a shard
    score      a teacher on the policy's GPU: its gathered weights, and a micro-batch in its MLP or its head
    prefill    native: a copy of all weights, the prompts' keys and values, one part of the prompts in an MLP
    rollout    native: that copy, the KV cache, the sampled rows' logits; vllm: its share of the card, and weights on
               their way to it; servers: these alone

To a moment's tensors comes a share of them that the allocator cannot use.

Times are a roofline: the larger of computing at a share of the machine's rate and of moving the
bytes. The shares below are assumptions until a GPU has measured them. Not counted: rewards,
checkpoints, evaluation, dropped groups.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import Recipe, RewardModelRecipe, SftRecipe
from flashgrpo.grpo.run.machines import Machine
from flashgrpo.kernels.linear_grpo import most_chunk_tokens
from flashgrpo.model.checkpoint import read_config
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cost import Attention, BlockActivations, BlockPasses, ModelFlops, ModelSize

MATMUL_SHARE = 0.7  # of peak FLOP/s in products: assumed
ATTENTION_SHARE = 0.45  # of peak FLOP/s in attention: predicted from the kernels' issue cycles on sm_90
FP32_SHARE = 1 / 15  # fp32 FLOP/s of bf16's: 67 of 989 TFLOP/s on an H100
MEMORY_SHARE = 0.8  # of memory bandwidth in decoding and elementwise work: assumed
LINK_SHARE = 0.7  # of link bandwidth in collectives: assumed
IMBALANCE = 1.08  # slowest rank's work over the mean: what packing promises
# Bytes a weight that FSDP moves in the GPU's own memory for one gathering, and for one reduction: counted.
GATHER_BYTES, REDUCE_BYTES = 4, 16
SPARSE_BYTES = 20  # a weight of the largest tensor when changes are first sent: its places, values and a mask, counted
DECODE_KERNELS = 11  # of the native generator, a layer and step: counted on a fake GPU
KERNEL_S = 10e-6  # host time of one, which CUDA graphs would save: assumed
ENGINE_STEP_S = 1.5e-3  # host time of a step of vLLM's, whose kernels are in CUDA graphs: assumed
# Of a process' tensors, lost between them: simulated on recorded steps, with segments that grow and with fixed ones.
GROWING_LOSS, FIXED_LOSS = 0.1, 0.2
ASLEEP = 1e9  # bytes that a sleeping engine's process keeps, 0.5 to 1 GB: assumed
CPU_BUDGET = 1200  # tokens of a pack on a CPU: more took more memory and no less time

ENGINE = "vLLM (vllm.memory_share)"
_BUCKET_BYTES = 256 << 20  # of a weight sync, where no tensor is larger
_STEP = 256  # tokens that a budget is a multiple of, where it is chosen


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions. A completion is longer than t with probability (1 - t/longest)^tail, where
    the tail follows from the mean: longest / mean - 1, so 0 if all reach the limit and 3 if they use a quarter.
    """

    prompt: float
    response: float
    longest: int

    @classmethod
    def assumed(cls, recipe: Recipe, prompt: float | None = None, response: float | None = None) -> "Lengths":
        """Means that nobody has given: prompts of 256 tokens, completions of a quarter of the limit."""
        longest = recipe.rollout.max_new_tokens
        return cls(prompt or min(256, recipe.data.max_prompt_tokens), response or max(1.0, longest / 4), longest)

    @property
    def needed(self) -> int:
        """Tokens that are fed of a prompt and its longest completion."""
        return math.ceil(self.prompt) + self.longest - 1

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


class TrainCosts:
    """Training by a recipe of any kind, on a machine, and what is counted of it.

    Raises RecipeError where the ranks of a copy do not divide the GPUs.
    """

    generator = ""
    target_share = 1.0  # of a pack's tokens, at most: no lengths are known here
    group: tuple[float, float, int] | None = None  # tokens of a prompt and of a completion that are fed, completions

    def __init__(
        self, recipe: Recipe | SftRecipe | RewardModelRecipe, config: ModelConfig, machine: Machine, num_gpus: int
    ):
        self.config, self.machine, self.num_gpus = config, machine, num_gpus
        self.model, self.train = recipe.model, recipe.train
        self.size = ModelSize.of(config)

        # Bytes of the compute type.
        dtype = recipe.model.dtype
        self.itemsize = 4 if dtype == "float32" or (dtype == "auto" and machine.is_cpu) else 2

        # Ranks that hold one copy of the model.
        self.shard_ranks = recipe.train.shard_ranks or num_gpus
        if num_gpus % self.shard_ranks:
            raise RecipeError(
                f"train.shard_ranks = {self.shard_ranks} does not divide {num_gpus} GPUs; choose a divisor, or 0"
            )

    def memory(self, token_budget: int) -> dict[str, Parts]:
        """The parts of a GPU's memory at each moment of the docstring above, with micro-batches of `token_budget`."""
        moments = self.moments(token_budget)
        for parts in moments.values():
            self._add_losses(parts)
        return moments

    def state(self) -> Parts:
        """What is there at every moment."""
        shard = self.size.total / self.shard_ranks
        return {"parameters (fp32 shard)": 4 * shard, "optimizer (2 fp32 shards)": 8 * shard}

    def moments(self, token_budget: int) -> dict[str, Parts]:
        """Their tensors: of training `loss`, `backward` and `reduction`."""
        size, config, shard = self.itemsize, self.config, self.size.total / self.shard_ranks
        rows, blocks = token_budget * self.target_share, config.num_layers
        block = BlockActivations.of(config, self.model.activation_checkpointing, size, self.attention, self.group)
        # Outside of the blocks: the final norm's input and output, cos and sin.
        outside = 2 * size * config.hidden_size + 8 * config.head_dim
        saved = token_budget * (blocks * block.kept + outside)
        gathered, resharded = size * self.size.root, self.train.reshard_after_forward
        all_blocks, head = size * blocks * self.size.block, self.size.head
        most = most_chunk_tokens(config.vocab_size, size, not self.machine.is_cpu)
        logits = 0 if config.is_reward_model else min(rows, most) * config.vocab_size * size
        if self.machine.is_cpu:  # three in place of the logits; scaled into the weight's type, by way of fp32
            d_head = max(4 * head + 3 * logits, 8 * head + (size * head if size < 4 else 0))
        elif rows <= most or size == 4:  # made in the weight's type, and scaled there
            d_head = size * head + logits
        else:
            d_head = max(4 * head + logits, (4 + size) * head)
        trained = {**self.state(), "gradients (fp32 shard)": 4 * shard}
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
            "reduction": {
                **trained,
                unsharded: gathered,  # a block's are freed after its backward pass in any case
                reduced: (2 * size if size < 4 else size) * self.size.root
                + (4 + 4 / self.shard_ranks) * (self.size.root + self.size.block),
            },
        }

    @property
    def attention(self) -> Attention:
        """Whose tensors attention keeps."""
        if self.machine.is_cpu:
            return "cpu"
        return "flash" if self.model.attention_backend == "flash_attn" else "triton"

    @property
    def loss_share(self) -> float:
        """Of its tensors, what the allocator loses between them."""
        if self.machine.is_cpu:
            return 0.0
        # An engine on the same GPU is given tensors by CUDA IPC, which wants segments of a fixed size.
        grow = self.machine.segments_grow and self.generator != "vllm"
        return GROWING_LOSS if grow else FIXED_LOSS

    @property
    def reserve(self) -> float:
        """Bytes of a GPU that are not for the trainer's tensors while it trains: what else its process takes, and a
        sleeping engine's.
        """
        return self.machine.reserve + (ASLEEP if self.generator == "vllm" else 0)

    def _add_losses(self, parts: Parts) -> None:
        tensors = sum(size for name, size in parts.items() if name != ENGINE)
        if self.loss_share:
            parts["lost between tensors"] = self.loss_share * tensors
        parts["reserve"] = self.machine.reserve
        if self.generator == "vllm" and ENGINE not in parts:
            parts["vLLM, asleep"] = ASLEEP

    def largest_budget(self) -> int:
        """Most tokens of a micro-batch with which every moment fits, 0 for none."""

        def is_over(token_budget: int) -> bool:
            totals = [sum(parts.values()) for parts in self.memory(token_budget).values()]
            return max(totals) > self.machine.memory

        # Every part grows with the budget, so that halving finds the end in 40 looks.
        return bisect.bisect_left(range(1, 1 << 40), True, key=is_over)

    def choose_budget(self, needed: int) -> int:
        """What train.token_budget = "auto" is where the longest sequence has `needed` tokens: on a CPU CPU_BUDGET, or
        `needed`; else the largest that fits, or `needed`, which then does not.
        """
        if self.machine.is_cpu:
            return max(needed, CPU_BUDGET)
        return max(self.largest_budget() // _STEP * _STEP, needed)


class Costs(TrainCosts):
    """GRPO by a recipe on a machine: memory, and time. A generator "auto" is `native`: whoever asks has settled it.

    `foresees`: that completions become as long as `lengths` says, which a run cannot know. It must not refuse what may
    fit: of native's cache it counts what the first tokens take.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: ModelConfig,
        machine: Machine,
        num_gpus: int,
        lengths: Lengths,
        foresees: bool = True,
    ):
        super().__init__(recipe, config, machine, num_gpus)
        self.recipe, self.lengths, self.foresees, self.flops = recipe, lengths, foresees, ModelFlops.of(config)
        self.teacher = read_config(recipe.teacher.path) if recipe.teacher.path else None
        self.teacher_beside = self.teacher if recipe.teacher.device == "trainer" else None  # on the policy's GPU
        self.generator = recipe.rollout.generator
        rollout = recipe.rollout
        packed = lengths.group(rollout.group_size)
        self.target_share = packed[2] / packed[0]
        self.group = lengths.prompt, lengths.response - 1, rollout.group_size

        # What a GPU and its memory reach.
        self.peak_flops = machine.flops * (FP32_SHARE if self.itemsize == 4 and not machine.is_cpu else 1.0)
        self.product_rate = self.peak_flops * MATMUL_SHARE
        self.memory_rate = machine.memory_rate * MEMORY_SHARE

        # Keys and values of a token; and logits of a row, in fp32 too with their softmax, and its sums in float64.
        self.kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.itemsize
        self.sampled_bytes = config.vocab_size * (self.itemsize + 16)

        # A rank's share of a step: whole groups that it samples; packed tokens, query-key pairs and targets.
        self.num_engines, self.gpus_an_engine = self._samplers()
        self.groups_a_rank = -(-rollout.prompts_per_step // self.num_engines)
        groups = rollout.prompts_per_step / num_gpus
        self.tokens, self.pairs, self.targets = (count * groups for count in packed)

    def _samplers(self) -> tuple[int, int]:
        """Who share the prompts of a step, and the GPUs of each; a server at an address is taken for one."""
        vllm = self.recipe.vllm
        if self.generator != "vllm_server":
            return self.num_gpus, 1
        if vllm.devices:
            return len(vllm.devices), len(vllm.devices[0].split(","))
        return len(vllm.servers), 1

    def moments(self, token_budget: int) -> dict[str, Parts]:
        """As TrainCosts', and the moments of sampling and of a teacher."""
        moments = super().moments(token_budget)
        if self.teacher_beside:
            moments["score"] = self.scoring(self.teacher_beside, token_budget)
        if self.recipe.rollout.is_truncated:
            for parts in moments.values():
                parts["kept sets, at most"] = self.kept_bytes(token_budget)
        return moments | self.sampling(token_budget)

    def state(self) -> Parts:
        """With the reference."""
        found = super().state()
        if self.recipe.loss.kl_coef:
            found["reference (shard)"] = self.itemsize * self.size.total / self.shard_ranks
        if self.teacher_beside:
            found["teacher (shard)"] = self.itemsize * ModelSize.of(self.teacher_beside).total / self.shard_ranks
        return found

    def scoring(self, teacher: ModelConfig, token_budget: int) -> Parts:
        """The tensors while a teacher scores a micro-batch."""
        size, rows, found = self.itemsize, token_budget * self.target_share, ModelSize.of(teacher)
        most = most_chunk_tokens(teacher.vocab_size, size, not self.machine.is_cpu)
        logits = min(rows, most) * teacher.vocab_size * size * (3 if self.machine.is_cpu else 1)
        in_head = 2 * size * rows * teacher.hidden_size + logits
        return {
            **self.state(),
            # The policy's stay until the packs of an update are scored.
            "gathered weights": size * (self.size.root + found.root + min(2, teacher.num_layers) * found.block),
            "activations": max(token_budget * self.forward_bytes(teacher), in_head),
        }

    def forward_bytes(self, config: ModelConfig) -> float:
        """Of a token on its way through a block without a backward pass: three times the MLP's width, and the residual
        stream with its norm; cos and sin.
        """
        return self.itemsize * (3 * config.intermediate_size + 4 * config.hidden_size) + 8 * config.head_dim

    def kept_bytes(self, token_budget: int) -> float:
        """At most: the ids of the sets of a rank's targets, which it has until the step is over, and in the head logits
        of those of a micro-batch.
        """
        rollout, rows = self.recipe.rollout, token_budget * self.target_share
        targets = max(rows, self.targets) if self.foresees else rows
        return (rollout.top_k or rollout.kept_limit) * (4 * targets + self.itemsize * rows)

    def sampling(self, token_budget: int) -> dict[str, Parts]:
        """The moments of sampling."""
        state, size, config = self.state(), self.itemsize, self.config
        if self.generator in ("vllm", "vllm_server"):
            # The largest tensor's shards, the whole of it, and the buffer that it is sent in.
            state["weights on their way"] = 3 * max(size * self.size.head, _BUCKET_BYTES)
            if self.generator == "vllm":
                state[ENGINE] = self.engine_bytes + ASLEEP
            elif self.recipe.vllm.weight_transfer == "sparse_nccl":
                state["weights on their way"] += SPARSE_BYTES * self.size.head
            return {"rollout": state}
        prompts = self.groups_a_rank * self.lengths.prompt
        rows, room = self.rollout_peak()
        own = {**state, "sampler's weights": size * self.size.total * (2 if self.machine.is_cpu else 1)}  # oneDNN's
        return {
            "prefill": {
                **own,
                "KV cache": self.kv_bytes * prompts,
                "activations": min(token_budget, prompts) * self.forward_bytes(config),
            },
            "rollout": {
                **own,
                "KV cache": self.kv_bytes * (rows * room + prompts),
                "sampled logits": rows * self.sampled_bytes,
            },
        }

    @property
    def engine_bytes(self) -> float:
        """What vLLM takes of the card: it must be free when it starts."""
        return self.recipe.vllm.memory_share * self.machine.memory

    @property
    def cache_bytes(self) -> float:
        """Room for keys and values in an engine: what its weights leave, unless the recipe has it."""
        given, weights = self.recipe.vllm.kv_cache_gb * 1e9, self.itemsize * self.size.total
        return given or self.gpus_an_engine * self.engine_bytes - weights

    def rollout_peak(self) -> tuple[float, float]:
        """Rows and room a row of the native generator's cache, which doubles for all rows at once, at its largest."""
        first = 64 if self.machine.is_cpu else 128
        longest = self.lengths.longest if self.machine.is_cpu else -(-self.lengths.longest // first) * first
        rooms = np.minimum(first << np.arange(longest.bit_length()), longest)
        # No room is made before the last is full, and an eighth of the rows may be idle.
        filled = np.minimum(rooms / 2, self.lengths.longest)
        alive = np.minimum(self.lengths.alive(filled) * 8 / 7, 1.0)
        alive[0] = 1.0
        rows = alive * self.groups_a_rank * self.recipe.rollout.group_size
        worst = np.argmax(rows * (rooms + self.sampled_bytes / self.kv_bytes)) if self.foresees else 0
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

    def micro_batches(self, token_budget: int) -> int:
        """Of an update."""
        return math.ceil(self.tokens / self.recipe.train.mini_batches / token_budget)

    def work(self, config: ModelConfig, blocks: float, attention: float, head: float, passes: float) -> float:
        """Seconds of a rank's share of a step in a model of that shape: products, as multiples of a forward pass', and
        `passes` over memory, in bytes a token of a block.
        """
        per = ModelFlops.of(config)
        products = blocks * per.per_token * self.tokens + head * per.per_target * self.targets
        pairs_s = attention * per.per_pair * self.pairs / (self.peak_flops * ATTENTION_SHARE)
        passes_s = passes * config.num_layers * self.tokens / self.memory_rate
        return IMBALANCE * (products / self.product_rate + pairs_s + passes_s)

    def score_s(self, config: ModelConfig, micro_batches: int) -> float:
        """Of a forward pass over a rank's share of a step, which gathers the weights in every micro-batch while it
        computes.
        """
        size = ModelSize.of(config).total
        forward_s = self.work(config, 1, 1, 1, BlockPasses.of(config, self.itemsize).forward)
        forward_s += micro_batches * GATHER_BYTES * size / self.memory_rate
        return max(forward_s, micro_batches * self.collective_s(self.itemsize * size))

    def seconds(self, token_budget: int) -> dict[str, float]:
        """Of a step, by phase, with micro-batches of `token_budget`."""
        train, moved = self.recipe.train, self.itemsize * self.size.total
        micro_batches = train.mini_batches * self.micro_batches(token_budget)
        over = BlockPasses.of(self.config, self.itemsize)
        copied_s = self.size.total / self.memory_rate  # a byte of each weight
        # The first update's old log-probs are its own, but where a teacher's advantages are made of them.
        old = 1 if self.teacher else (train.mini_batches - 1) / train.mini_batches
        score = (old + (self.recipe.loss.kl_coef > 0)) * self.score_s(self.config, micro_batches)
        score += self.score_s(self.teacher, micro_batches) if self.teacher else 0
        # Attention: 2 products in a forward pass, 7 in a backward one.
        checkpointing = self.model.activation_checkpointing
        again, passed = checkpointing == "full", over.forward + over.backward
        if checkpointing != "none":
            passed += over.forward
        compute = self.work(self.config, 3 + again, 4.5 + again, 3 + self.recipe.loss.scores_first, passed)
        gathers = 2 if train.reshard_after_forward else 1
        compute += micro_batches * (gathers * GATHER_BYTES + REDUCE_BYTES) * copied_s
        exchange = gathers * self.collective_s(moved) + self.collective_s(4 * self.size.total)
        exchange = micro_batches * exchange + train.mini_batches * self.all_reduce_s()
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
        read_s = (weights + self.kv_bytes * read) / self.memory_rate / self.gpus_an_engine
        product_rate = self.product_rate * self.gpus_an_engine
        compute_s = self.flops.forward(live, live * (t + lengths.prompt), live) / product_rate
        is_native = self.generator not in ("vllm", "vllm_server")
        host_s = config.num_layers * DECODE_KERNELS * KERNEL_S if is_native else ENGINE_STEP_S
        slowest_s = np.maximum(np.maximum(read_s, compute_s), host_s)
        return prefill / product_rate + width * float(slowest_s.sum())

    def step_s(self, seconds: dict[str, float]) -> float:
        """Of a step whose phases take so long; sampling may go on while the step before trains."""
        others = sum(seconds.values()) - seconds["generate"]
        return max(seconds["generate"], others) if self.recipe.rollout.max_staleness else seconds["generate"] + others


def check_budget(token_budget: int, longest_prompt: int, longest_completion: int) -> int:
    """Tokens of the longest sequence that is fed. Raises RecipeError where a micro-batch does not hold it."""
    needed = longest_prompt + longest_completion - 1
    if token_budget < needed:
        raise RecipeError(
            f"train.token_budget = {token_budget} is below the longest prompt and completion together, "
            f"{longest_prompt} + {longest_completion} - 1 tokens; raise it to {needed} or more"
        )
    return needed


def settle_budget(run: TrainCosts, wanted: int | Literal["auto"], needed: int) -> int:
    """A train.token_budget as a number, which fits; `needed` are the tokens of the longest sequence.

    Raises RecipeError where a GPU does not hold such a budget, or an engine on it no such sequence. A CPU's memory is
    not looked at.
    """
    token_budget = run.choose_budget(needed) if wanted == "auto" else wanted
    if run.machine.is_cpu:
        return token_budget
    if isinstance(run, Costs) and run.generator == "vllm":
        _require_cache(run, max(needed + 1, run.recipe.vllm.max_model_len))
    largest = run.largest_budget()
    if token_budget > largest:
        raise RecipeError(_refusal(run, run.memory(token_budget), largest if largest >= needed else 0))
    return token_budget


def require_free(run: Costs, free: float) -> None:
    """Raises RecipeError where `free` bytes of a GPU do not hold the trainer's state and, beside it, what vLLM wants to
    find free when it starts.
    """
    state = sum(run.state().values())
    if free < state + run.engine_bytes:
        raise RecipeError(
            f"vLLM wants {run.engine_bytes / 1e9:,.1f} GB (vllm.memory_share = {run.recipe.vllm.memory_share:g} of "
            f"{run.machine.memory / 1e9:,.1f} GB) free beside the trainer's {state / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB are free; lower it, take more GPUs, or end what else runs there"
        )


def _require_cache(run: Costs, longest: int) -> None:
    """vLLM would refuse, after minutes of loading, a cache that does not hold the longest sequence."""
    if run.kv_bytes * longest > run.cache_bytes:
        share, weights = run.recipe.vllm.memory_share, run.itemsize * run.size.total
        raise RecipeError(
            f"vllm.memory_share = {share:g} of {run.machine.memory / 1e9:,.1f} GB leaves {run.cache_bytes / 1e9:,.1f} "
            f"GB for keys and values beside {weights / 1e9:,.1f} GB of weights, and a sequence of {longest:,} tokens "
            f"needs {run.kv_bytes * longest / 1e9:,.1f} GB; raise it"
        )


def _refusal(run: TrainCosts, memory: dict[str, Parts], enough: int) -> str:
    """What is largest, and a token budget that would be enough, which is the one change that costs no result."""
    moment = max(memory, key=lambda name: sum(memory[name].values()))
    largest = sorted(memory[moment].items(), key=lambda part: part[1], reverse=True)[:3]
    sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in largest)
    advice = "no token budget is small enough: make one of them smaller, or take more GPUs"
    if ENGINE in memory[moment]:
        advice = "lower vllm.memory_share, take more GPUs, or sample with rollout.generator = native"
    if enough:
        advice = f"--train.token_budget={enough} would be enough"
    return (
        f"{sum(memory[moment].values()) / 1e9:,.1f} GB a GPU are needed ({moment}), "
        f"{run.machine.memory / 1e9:,.1f} GB are there, on {run.num_gpus} GPUs; "
        f"the largest are {sizes}; {advice}"
    )
