"""The sections of recipes, as frozen dataclasses; the text under each key is its help.

A section that inherits a key may give it another default, and has its help from where the key is first declared.
"""

import dataclasses
import math
import os
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass

Template = Literal["r1", "chat", "none"]

CHECKED = ConfigDict(extra="forbid", use_attribute_docstrings=True)
WRITE_FIELDS = "reasoning", "summary", "answer"
TRACKERS = "tensorboard", "trackio", "wandb"
_Positive = Annotated[int, Field(strict=True, ge=1)]
_Count = Annotated[int, Field(strict=True, ge=0)]
_Bool = Annotated[bool, Field(strict=True)]
# A strict float takes an integer, but neither "1e-5" nor true.
_Share = Annotated[float, Field(strict=True, ge=0, le=1)]
_PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
_PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
_Place = Annotated[str, Field(pattern=r"^(trainer|cpu|cuda:\d+)$")]  # of a model beside the policy


def expanded(path: str) -> str:
    """A path with the home folder in place of ~, which TOML and `--key=~/x` keep. Raises ValueError for no user's."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError("no user of that name has a home folder")
    return found


def _budget(found: Any) -> int | Literal["auto"]:
    if found == "auto" or (type(found) is int and found >= 1):
        return found
    raise ValueError('wanted a number of tokens, 1 or more, or "auto"')


def _logger(name: str) -> str:
    if name in TRACKERS or ":" in name:
        return name
    raise ValueError(f'wanted {", ".join(TRACKERS)} or "package.module:function"')


# Every path of a person's own is one of these two, or ~ would be the name of a folder.
_Path = Annotated[str, AfterValidator(expanded)]
_PathOrNone = Annotated[str | None, AfterValidator(lambda path: path and expanded(path))]
Models = dict[str, _Path]  # folders by their labels


@dataclass(frozen=True, config=CHECKED)
class ModelSection:
    path: _Path
    """Hugging Face folder: config.json, safetensors, tokenizer; or a name on the hub, as Qwen/Qwen2.5-1.5B, or
    Qwen/Qwen2.5-1.5B@REVISION, which is downloaded into the hub's cache at its first use."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; bfloat16 keeps fp32 master weights. auto: bfloat16 on CUDA, float32 on a CPU."""
    attention_backend: Literal["triton", "torch", "flash_attn", "gluon", "auto"] = "triton"
    """Implementation of the packed attention. flash_attn, flash-attn's or torch's, needs CUDA and bfloat16; gluon, a
    Hopper; auto: gluon where `flashgrpo bench attention --qualify` has found it right and faster, else triton."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping: nothing, all but matrix products, or whole blocks."""
    compile: _Bool = False
    """torch.compile each block (CUDA). Beside the kernels a block's last sum is all it could fuse: about 1%."""


@dataclass(frozen=True, config=CHECKED)
class SourceSection:
    path: _PathOrNone = None
    """JSONL or Parquet file, or Hugging Face dataset (folder or hub name)."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, as gsm8k's "main"."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages for the chat template."""
    template: Template = "r1"
    """How a prompt becomes tokens: R1-Zero's template, the tokenizer's chat template, or as it is."""
    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template is given besides messages, as { enable_thinking = false }."""
    system_prompt: str | None = None
    """For the chat template: the system message of prompts that have none."""

    def __post_init__(self) -> None:
        if self.template != "chat" and (self.template_options or self.system_prompt):
            raise ValueError(f"template_options and system_prompt want template = chat, found {self.template}")


@dataclass(frozen=True, config=CHECKED)
class DataSection(SourceSection):
    task: str | None = None
    """Instead of a path: a reasoning-gym task, as "reasoning_gym:chain_sum"."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Parameters of the task, as [data.options]."""
    size: _Positive = 20_000
    """Problems to make of the task, held-out ones included."""
    answer_column: str | None = None
    """Column with the reference answer; by default "answer", if the data has it."""
    held_out: _Count = 256
    """Problems set aside for evaluation, chosen by run.seed."""
    curriculum: str | None = None
    """Column with a number, as "level": every pass over the problems begins with those where it is lowest."""
    max_prompt_tokens: _Positive = 2048
    """A longer prompt is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.task is None) == (self.path is None):
            raise ValueError(f"found task={self.task!r} and path={self.path!r}, wanted exactly one of them")


def weights_of(functions: list[str], weights: list[float]) -> dict[str, float]:
    """The weight of each function. Raises ValueError for one that stands twice, or weights that do not fit."""
    if len(set(functions)) < len(functions):
        raise ValueError(f"found functions = {functions}, wanted each of them once")
    if weights and len(weights) != len(functions):
        raise ValueError(f"found {len(weights)} weights for {len(functions)} functions, wanted one each")
    return dict(zip(functions, weights, strict=True)) if weights else dict.fromkeys(functions, 1.0)


def first_step(start: float, steps: int) -> int:
    """The first step after a share of them."""
    # As floats 0.29 * 100 is just below 29.
    return math.floor(round(start * steps, 6)) + 1


@dataclass(frozen=True, config=CHECKED)
class MixedSection(DataSection):
    share: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    """Of a step's prompts; what the sources leave over comes from [data]."""
    start: _Share = 0.0
    """Share of the run's steps after which its prompts come."""
    rewards: list[str] = dataclasses.field(default_factory=list)
    """Reward functions for its completions; empty: rewards.functions."""
    weights: list[_Finite] = dataclasses.field(default_factory=list)
    """One weight a function; empty: all 1."""
    held_out: _Count = 0
    """Problems set aside, as [data] has them; evaluations are on [data] alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights_of(self.rewards, self.weights)


# In limits of processor time: how long a program may last that others keep from its core.
_PROGRAM_WALL = 10


@dataclass(frozen=True, config=CHECKED)
class ProgramsSection:
    time_s: _PositiveFloat = 6.0
    """Most processor time of a program, all its processes and test cases together; sleeping counts, waiting for a core
    does not. After ten times that by the clock it has no score."""
    memory_mb: _Positive = 512
    """Address space of a process, and resident memory of all processes of a program, in 2^20 bytes."""
    processes: _Positive = 16
    """Most processes and threads of a program."""
    isolation: Literal["bubblewrap", "none: run programs unprotected"] = "bubblewrap"
    """none: only where bubblewrap cannot be had; programs then read and do what you may, and processes is not held."""

    @property
    def longest_s(self) -> float:
        """Seconds by the clock within which a program ends, whatever it does and however busy the machine is."""
        return _PROGRAM_WALL * self.time_s


@dataclass(frozen=True, config=CHECKED)
class RewardsSection:
    functions: list[str] = dataclasses.field(default_factory=lambda: ["accuracy", "format"])
    """accuracy, code, exact_match, format, language_consistency, overlong, repetition, a name of [reward_models], or
    "package.module:function"; with a [teacher] there may be none."""
    weights: list[_Finite] = dataclasses.field(default_factory=list)
    """One weight a function, 0 for what is watched only; empty: all 1."""
    start: dict[str, _Share] = dataclasses.field(default_factory=dict)
    """Share of the run's steps from which a function counts, as { safety = 0.75 }; before, it is not computed."""
    timeout_s: _PositiveFloat = 10.0
    """Longest that one function may take for one group; waits for a busy processor and imports do not count. For an
    answer that takes accuracy half of what is left of it, the score is 0."""
    workers: _Positive = 2
    """Worker processes."""
    programs: ProgramsSection = ProgramsSection()

    def __post_init__(self) -> None:
        weights_of(self.functions, self.weights)


@dataclass(frozen=True, config=CHECKED)
class PreferenceSection:
    path: _Path
    """Folder that `flashgrpo reward-model` has made; its name in [reward_models] is that of a reward function."""
    device: _Place = "trainer"
    """trainer: on the policy's device, loaded for the reward step and moved to the host after it; "cuda:6" or "cpu": a
    process of its own on that device, one a rank."""
    batch_tokens: _Positive = 16_384
    """Most tokens of one pass."""


@dataclass(frozen=True, config=CHECKED)
class TeacherSection:
    path: _Path = ""
    """Model with the policy's tokenizer, folder or name, which scores each sampled token (on-policy distillation)."""
    coef: _PositiveFloat = 1.0
    """Weight of its log-prob less the policy's in a token's advantage, to which that of the rewards is added."""
    device: _Place = "trainer"
    """trainer: on the policy's device, sharded as the reference is; "cuda:6" or "cpu": on that device, whole, once a
    rank."""

    def __post_init__(self) -> None:
        if not self.path and (self.coef, self.device) != (1.0, "trainer"):
            raise ValueError(f"found coef = {self.coef:g} and device = {self.device}, but no path of a teacher")


@dataclass(frozen=True, config=CHECKED)
class SamplingSection:
    generator: Literal["auto", "native", "vllm", "vllm_server"] = "auto"
    """What samples the completions: the trainer itself, vLLM on the same devices, or `vllm serve` on others. auto: vllm
    on CUDA where it is installed, else native."""
    group_size: Annotated[int, Field(strict=True, ge=2)] = 16
    """Completions a prompt (G)."""
    max_new_tokens: _Positive = 1024
    """Longest completion."""
    temperature: _PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same."""
    top_p: _PositiveShare = 1.0
    """Nucleus sampling: smallest set of tokens with at least this probability."""
    top_k: _Count = 0
    """Sample among the k likeliest tokens; 0: all."""
    cuda_graphs: _Bool = False
    """native on CUDA: replay each decoding step as a CUDA graph; no GPU has run it yet."""

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are never sampled."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, config=CHECKED)
class RolloutSection(SamplingSection):
    max_staleness: _Count = 0
    """With servers: how many steps are sampled ahead of the one that trains, and so by how many versions of the weights
    a token may be older than those that it trains. Above 1 set loss.behavior_cap or loss.off_policy_threshold."""
    prompts_per_step: _Positive = 32
    """Prompts of one rollout; a step is one rollout and the updates made from it."""
    refill_limit: _Count = 0
    """Dynamic sampling (DAPO): most extra rounds of prompts that replace groups which nothing is learnt from."""
    keep_mean_reward: tuple[_Finite, _Finite] | None = None
    """Least and most mean reward of a group that is learnt from, as [0.1, 0.9]: others are too hard or too easy, and
    replaced within refill_limit, or else left out of the training alone."""
    mask_overlong: _Bool = False
    """Completions cut at max_new_tokens give no gradient."""
    kept_limit: _Positive = 512
    """With top_p or top_k: most tokens of a kept set, over which training takes its log-probs, 4 bytes each on every
    host and on the GPU that trains on it. A token drawn from more is of the whole vocabulary to both sides
    (kept/whole); vLLM draws from no more."""

    def __post_init__(self) -> None:
        if self.top_k > self.kept_limit:
            raise ValueError(
                f"top_k = {self.top_k} is above kept_limit = {self.kept_limit}, so that no set would be kept; raise it"
            )
        if self.keep_mean_reward and self.keep_mean_reward[0] > self.keep_mean_reward[1]:
            raise ValueError(f"keep_mean_reward = {[*self.keep_mean_reward]}, wanted the least first")


@dataclass(frozen=True, config=CHECKED)
class VllmSection:
    servers: list[str] = dataclasses.field(default_factory=list)
    """Addresses of servers that `flashgrpo serve` has started, as ["http://node2:8000"]."""
    devices: list[str] = dataclasses.field(default_factory=list)
    """Instead: start one server on each of these sets of GPUs, as ["4,5", "6,7"]; on a CPU ["cpu"]."""
    memory_share: _PositiveShare = 0.5
    """Share of a GPU's memory for vLLM's weights and KV cache."""
    kv_cache_gb: _NonNegative = 0.0
    """KV cache of an engine in 10^9 bytes; 0: what memory_share leaves, on a CPU 1."""
    max_model_len: _Count = 0
    """Most tokens of a prompt and its completion; 0: data.max_prompt_tokens + rollout.max_new_tokens."""
    weight_transfer: Literal["auto", "sparse_nccl"] = "auto"
    """How weights reach servers on GPUs. auto: all of them, over NCCL; sparse_nccl: those that have changed since the
    last sync, for slow networks: 6 bytes each in bfloat16, and a copy of all weights on the first rank's host."""
    sync_timeout_s: _PositiveFloat = 300.0
    """Longest wait for one step of a weight sync, and for the next token of a server, or an engine, that samples."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further engine arguments of vLLM's, as { enforce_eager = true }, which is to run without CUDA graphs."""


@dataclass(frozen=True, config=CHECKED)
class OptimizerSection:
    lr: _PositiveFloat = 1e-6
    """Peak learning rate (AdamW)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    lr_end_share: _Share = 0.1
    """Cosine only: share of the peak at the last update."""
    warmup_steps: _Count = 0
    """Steps of linear warm-up from 0."""
    weight_decay: _NonNegative = 0.0
    """AdamW's; matrices only, not norms and biases."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """AdamW's."""
    grad_clip: _PositiveFloat = 1.0
    """Largest gradient norm."""
    shard_ranks: _Count = 0
    """Ranks that hold one copy of the model together, as those of a node; 0: all. Copies are kept equal (HSDP)."""
    reshard_after_forward: _Bool = True
    """Free a block's gathered weights after the forward pass and gather them again for the backward."""
    token_budget: Annotated[int | Literal["auto"], PlainValidator(_budget)] = "auto"
    """Most tokens of one micro-batch. auto: on CUDA the most that fit, by the arithmetic of `flashgrpo plan`; on a CPU
    1,200, or what the longest sequence needs; noted in the run's recipe.toml."""
    checkpoint_every: _Count = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: _Positive = 2
    """The newest that are kept."""


@dataclass(frozen=True, config=CHECKED)
class TrainSection(OptimizerSection):
    steps: _Positive = 100
    """Rollouts in all."""
    mini_batches: _Positive = 1
    """Optimizer updates that a rollout is split into."""
    epochs: _Positive = 1
    """Passes over a rollout."""
    ref_refresh_every: _Count = 0
    """Steps between replacements of the reference by the policy; 0: never."""
    mismatch_alarm: _PositiveFloat = 0.1
    """Warn when the sampler's log-probs are further off the trainer's on average, or not finite."""


@dataclass(frozen=True, config=CHECKED)
class EvalSection:
    every: _Count = 0
    """Steps between evaluations on held-out problems, also before the first and after the last step; 0: never."""
    samples: _Positive = 4
    """Completions a problem (k of pass@k and cons@k)."""
    problems: _Positive = 256
    """Held-out problems used."""
    temperature: _NonNegative = 0.6
    """Sampling temperature; 0: greedy."""
    top_p: _PositiveShare = 0.95
    """Nucleus sampling."""
    benchmarks: list[_Path] = dataclasses.field(default_factory=list)
    """Apart from training: JSONL or Parquet files with the columns of AIME, MATH-500, GPQA or GSM8K, in place of
    held-out problems; all of their problems."""


@dataclass(frozen=True, config=CHECKED)
class RunSection:
    output: _Path
    """Folder of the run."""
    seed: _Count = 0
    """Of the data order, the split and every sample."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one."""
    collective_timeout_s: _PositiveFloat = 1800.0
    """How long a rank waits for the others, as for the slowest one's rollout, before it gives up."""
    loggers: list[Annotated[str, AfterValidator(_logger)]] = dataclasses.field(default_factory=lambda: ["tensorboard"])
    """Who gets the numbers of each step beside metrics.jsonl: tensorboard, trackio, wandb, which get samples and the
    recipe, too, or "package.module:function", called with each row. One that fails is switched off."""
    accept_changes: _Bool = False
    """Whether --resume goes on where a model's folder or a data file holds something else than when the run began."""


@dataclass(frozen=True, config=CHECKED)
class SftDataSection(SourceSection):
    # Required here, where no task can stand for it.
    path: _Path = Field()
    completion_column: str = "completion"
    """Column with the text to learn; the end-of-sequence token is appended."""
    max_tokens: _Positive = 32_768
    """An example longer than this, prompt included, is an error."""


@dataclass(frozen=True, config=CHECKED)
class SftTrainSection(OptimizerSection):
    epochs: _Positive = 2
    """Passes over the data."""
    batch_size: _Positive = 128
    """Examples of one optimizer update (a step)."""


@dataclass(frozen=True, config=CHECKED)
class PairDataSection(SftDataSection):
    chosen_column: str = "chosen"
    """Column with the better completion of a pair."""
    rejected_column: str = "rejected"
    """Column with the worse one."""
    label_column: str = "label"
    """Pointwise: column with 1 or true where the completion is good, 0 or false where it is not."""
    held_out: _Count = 64
    """Rows set aside to measure the accuracy on, chosen by run.seed."""


@dataclass(frozen=True, config=CHECKED)
class PreferenceTrainSection(SftTrainSection):
    objective: Literal["pairwise", "pointwise"] = "pairwise"
    """Bradley-Terry on pairs, or cross-entropy on single labelled completions."""
    scores: Literal["answer", "whole"] = "whole"
    """What it reads of a completion: the text after the reasoning (helpfulness), or all of it (safety)."""
    lr: _PositiveFloat = 6e-6
    epochs: _Positive = 1
    batch_size: _Positive = 256


@dataclass(frozen=True, config=CHECKED)
class CollectDataSection(DataSection):
    path: _PathOrNone = None
    """JSONL or Parquet file, or Hugging Face dataset; without it and a task, nothing is sampled: [given] alone."""

    @property
    def has_problems(self) -> bool:
        """Whether there is anything to sample."""
        return self.path is not None or self.task is not None

    def __post_init__(self) -> None:
        if self.has_problems:
            super().__post_init__()
        if self.curriculum:
            raise ValueError("curriculum is for training runs; problems are sampled in the order of the data")


@dataclass(frozen=True, config=CHECKED)
class CollectSection(SamplingSection):
    group_size: _Positive = 16
    prompts_per_part: _Positive = 256
    """Prompts sampled between two parts written to the disk, which are what an interrupted run keeps."""
    prompts: _Count = 0
    """Prompts to sample, from the first training problem on; 0: all."""


@dataclass(frozen=True, config=CHECKED)
class FilterSection:
    correct: _Bool = True
    """Keep only right answers, by `accuracy` or, for rows with tests, `code`; rows without an answer pass."""
    format: _Bool = True
    """Keep only <think>..</think> followed by a summary or <answer>..</answer>."""
    min_language: _Share = 0.0
    """Least share of the reasoning's words in the target language."""
    min_tokens: _Count = 0
    """Fewest tokens of a completion."""
    max_tokens: _Count = 0
    """Most tokens of a completion; 0: no limit. One that was cut at max_new_tokens is never kept."""
    max_repetition: _Share = 1.0
    """Largest share of 8-token sequences that occurred before in the completion."""
    max_paragraph_words: _Count = 0
    """Most words of a paragraph of the reasoning; 0: no limit."""
    code_blocks: _Bool = True
    """Whether reasoning with code blocks is kept."""
    max_per_prompt: _Count = 0
    """Most completions kept of a prompt, the first sampled ones; 0: all."""


@dataclass(frozen=True, config=CHECKED)
class GivenSection(SourceSection):
    # Required here, where no task can stand for it.
    path: _Path = Field()
    completion_column: str = "completion"
    """Column with the completion."""
    answer_column: str | None = None
    """Column with the reference answer, for the filter on right answers; without one, rows are not checked for it."""
    ratio: _NonNegative = 0.0
    """Rows for each sampled one that was kept, drawn by run.seed; 0: all rows."""
    filtered: _Bool = True
    """Whether its rows go through [filters] and [write]; what has no reasoning, as general data, should not."""


@dataclass(frozen=True, config=CHECKED)
class WriteSection:
    completion: str = ""
    """Rewrites what is kept: text with {reasoning}, {summary} (what follows the reasoning) and {answer}, as
    "<think>{reasoning}</think>{summary}"; what lacks one of those used is rejected. Empty: as it is."""

    def __post_init__(self) -> None:
        if unknown := [field for field in self.fields if field not in WRITE_FIELDS]:
            raise ValueError(f"completion: unknown field {{{unknown[0]}}}; known: {', '.join(WRITE_FIELDS)}")

    @property
    def fields(self) -> list[str]:
        """Those that the text uses."""
        return [field for _, field, _, _ in string.Formatter().parse(self.completion) if field is not None]
