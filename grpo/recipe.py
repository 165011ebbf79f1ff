"""A recipe: TOML (and `--section.key=value`) checked into frozen dataclasses. The text under each key is its help."""

import copy
import dataclasses
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flashgrpo.grpo.data import Template
from flashgrpo.grpo.rewards import nearest, resolve_reward
from flashgrpo.kernels.grpo_loss import LossConfig

_CHECKED = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_Positive = Annotated[int, Field(strict=True, ge=1)]
_Count = Annotated[int, Field(strict=True, ge=0)]
_Bool = Annotated[bool, Field(strict=True)]
_Share = Annotated[float, Field(strict=True, ge=0, le=1)]  # strict floats take integers, not text
_PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line that names the key."""


@dataclass(frozen=True, config=_CHECKED)
class ModelSection:
    path: str
    """Hugging Face folder: config.json, safetensors, tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; bfloat16 keeps fp32 master weights. auto: bfloat16 on CUDA, float32 on a CPU."""
    attention_backend: Literal["triton", "torch", "flash_attn"] = "triton"
    """Implementation of the packed attention; flash_attn needs CUDA, bfloat16 and the extra `flash`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping: nothing, all but matrix products, or whole blocks."""
    compile: _Bool = False
    """torch.compile each block (CUDA)."""


@dataclass(frozen=True, config=_CHECKED)
class SourceSection:
    path: str | None = None
    """JSONL or Parquet file, or Hugging Face dataset (folder or hub name)."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, as gsm8k's "main"."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages for the chat template."""
    template: Template = "r1"
    """How a prompt becomes tokens: R1-Zero's template, the tokenizer's chat template, or as it is."""


@dataclass(frozen=True, config=_CHECKED)
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
    max_prompt_tokens: _Positive = 2048
    """A longer prompt is an error."""

    def __post_init__(self) -> None:
        if (self.task is None) == (self.path is None):
            raise ValueError(f"found task={self.task!r} and path={self.path!r}, wanted exactly one of them")


@dataclass(frozen=True, config=_CHECKED)
class RewardsSection:
    functions: list[str] = dataclasses.field(default_factory=lambda: ["accuracy", "format"])
    """accuracy, exact_match, format, language_consistency, overlong, repetition, or "package.module:function"."""
    weights: list[_Finite] = dataclasses.field(default_factory=list)
    """One weight a function; empty: all 1."""
    timeout_s: _PositiveFloat = 10.0
    """Time limit of one call: one function on one group."""
    workers: _Positive = 2
    """Worker processes."""

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("functions is empty, wanted at least one reward function")
        if len(set(self.functions)) < len(self.functions):
            raise ValueError(f"found functions = {self.functions}, wanted each of them once")
        for name in self.functions:
            if ":" not in name:  # one of the user's own is imported when it is needed
                resolve_reward(name)
        if self.weights and len(self.weights) != len(self.functions):
            raise ValueError(f"found {len(self.weights)} weights for {len(self.functions)} functions, wanted one each")
        if self.weights and not any(self.weights):
            raise ValueError(f"found weights = {self.weights}, wanted one that is not 0")


@dataclass(frozen=True, config=_CHECKED)
class RolloutSection:
    generator: Literal["native", "vllm", "vllm_server"] = "native"
    """What samples the completions: the trainer itself, vLLM on the same devices, or `vllm serve` on others."""
    overlap: _Bool = False
    """With servers: sample a step's completions while the step before it trains, one step off-policy."""
    prompts_per_step: _Positive = 32
    """Prompts of one rollout; a step is one rollout and the updates made from it."""
    group_size: Annotated[int, Field(strict=True, ge=2)] = 16
    """Completions a prompt (G)."""
    max_new_tokens: _Positive = 1024
    """Longest completion."""
    temperature: _PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Nucleus sampling: smallest set of tokens with at least this probability."""
    top_k: _Count = 0
    """Sample among the k likeliest tokens; 0: all."""
    refill_limit: _Count = 0
    """Dynamic sampling (DAPO): most extra rounds of prompts that replace groups of equal rewards."""
    mask_overlong: _Bool = False
    """Completions cut at max_new_tokens give no gradient."""


@dataclass(frozen=True, config=_CHECKED)
class VllmSection:
    servers: list[str] = dataclasses.field(default_factory=list)
    """Addresses of servers that `flashgrpo serve` has started, as ["http://node2:8000"]."""
    devices: list[str] = dataclasses.field(default_factory=list)
    """Instead: start one server on each of these sets of GPUs, as ["4,5", "6,7"]; on a CPU ["cpu"]."""
    memory_share: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.5
    """Share of a GPU's memory for vLLM's weights and KV cache."""
    kv_cache_gb: _NonNegative = 0.0
    """KV cache of an engine in 10^9 bytes; 0: what memory_share leaves, on a CPU 1."""
    max_model_len: _Count = 0
    """Most tokens of a prompt and its completion; 0: data.max_prompt_tokens + rollout.max_new_tokens."""
    enforce_eager: _Bool = False
    """Run without CUDA graphs, as on a CPU."""
    sync_timeout_s: _PositiveFloat = 300.0
    """Longest wait for one step of a weight sync, and for a server's sign of life."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further engine arguments of vLLM's, as [vllm.options]."""


@dataclass(frozen=True, config=_CHECKED)
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
    token_budget: _Positive = 16_384
    """Most tokens of one micro-batch."""
    checkpoint_every: _Count = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: _Positive = 2
    """The newest that are kept."""


@dataclass(frozen=True, config=_CHECKED)
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
    """Warn when the sampler's log-probs are further off the trainer's on average; -log(top_p) is added."""


@dataclass(frozen=True, config=_CHECKED)
class EvalSection:
    every: _Count = 0
    """Steps between evaluations on held-out problems, also before the first and after the last step; 0: never."""
    samples: _Positive = 4
    """Completions a problem (k of pass@k and cons@k)."""
    problems: _Positive = 256
    """Held-out problems used."""
    temperature: _NonNegative = 0.6
    """Sampling temperature; 0: greedy."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.95
    """Nucleus sampling."""


@dataclass(frozen=True, config=_CHECKED)
class RunSection:
    output: str
    """Folder of the run."""
    seed: _Count = 0
    """Of the data order, the split and every sample."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one."""
    collective_timeout_s: _PositiveFloat = 1800.0
    """How long a rank waits for the others, as for the slowest one's rollout, before it gives up."""


@dataclass(frozen=True, config=_CHECKED)
class Recipe:
    """GRPO: `flashgrpo train`."""

    model: ModelSection
    data: DataSection
    run: RunSection
    rewards: RewardsSection = RewardsSection()
    rollout: RolloutSection = RolloutSection()
    loss: LossConfig = dataclasses.field(default_factory=lambda: LossConfig.preset("grpo"))
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    vllm: VllmSection = VllmSection()

    def __post_init__(self) -> None:
        if self.rollout.overlap and self.rollout.generator != "vllm_server":
            raise ValueError(f"rollout.overlap needs generator = vllm_server, found {self.rollout.generator}")
        if self.rollout.generator == "vllm_server" and bool(self.vllm.servers) == bool(self.vllm.devices):
            raise ValueError("rollout.generator = vllm_server wants either vllm.servers or vllm.devices")
        if self.rollout.prompts_per_step % self.train.mini_batches:
            raise ValueError(
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step} is not a multiple of "
                f"train.mini_batches = {self.train.mini_batches}"
            )
        if self.eval.every and not self.data.held_out:
            raise ValueError(f"eval.every = {self.eval.every}, but data.held_out = 0 leaves no problem to evaluate on")


@dataclass(frozen=True, config=_CHECKED)
class SftDataSection(SourceSection):
    completion_column: str = "completion"
    """Column with the text to learn; the end-of-sequence token is appended."""
    max_tokens: _Positive = 32_768
    """An example longer than this, prompt included, is an error."""

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("path is missing, and it has no default")


@dataclass(frozen=True, config=_CHECKED)
class SftTrainSection(OptimizerSection):
    epochs: _Positive = 2
    """Passes over the data."""
    batch_size: _Positive = 128
    """Examples of one optimizer update (a step)."""


@dataclass(frozen=True, config=_CHECKED)
class SftRecipe:
    """Supervised fine-tuning: `flashgrpo sft`."""

    model: ModelSection
    data: SftDataSection
    run: RunSection
    train: SftTrainSection = SftTrainSection()


_R = TypeVar("_R", Recipe, SftRecipe)


def load_recipe(kind: type[_R], path: str | Path, overrides: Sequence[str] = ()) -> _R:
    """Read a TOML recipe, lay `--section.key=value` overrides over it, check it.

    Raises RecipeError with one line: the file or option, the key, what was found and what was wanted.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error
    return build_recipe(kind, values, str(path), overrides)


def build_recipe(kind: type[_R], values: dict[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> _R:
    """A recipe from nested dictionaries, named `source` in errors, with `overrides` laid over them.

    Raises RecipeError as `load_recipe`.
    """
    _refuse_unknown_keys(kind, values, source)
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(kind, values, override)
    if "loss" in values:
        values = values | {"loss": _loss_config(values["loss"], _origin("loss", source, overrides))}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise RecipeError(f"{source}: {key}: missing, and it has no default") from None
        found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
        where = _origin(key, source, overrides)
        if first["type"] in ("list_type", "tuple_type"):
            items = [_parsed(item.strip()) for item in str(first["input"]).strip("[]").split(",")]
            quote = "'" if where != source else ""  # for the shell
            message += f", as {quote}{json.dumps(items, default=str)}{quote}"
        raise RecipeError(f"{where}: {key + ': ' if key else ''}{message}{found}") from None


def recipe_to_toml(recipe: Any) -> str:
    """The resolved recipe, every default written out; keys without a value are left out."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(recipe)))


def _loss_config(values: dict[str, Any], source: str) -> LossConfig:
    hints = get_type_hints(LossConfig)
    fields = {k: float(v) if type(v) is int and not _is_text(hints.get(k)) else v for k, v in values.items()}
    try:
        return LossConfig.preset(str(fields.pop("preset", "grpo")), **fields)
    except ValueError as error:
        raise RecipeError(f"{source}: loss: {error}") from None


def _origin(key: str, source: str, overrides: Sequence[str]) -> str:
    """The options that set `key` or what is below it, or else `source`."""
    return " ".join(o for o in overrides if o.removeprefix("--").startswith((f"{key}=", f"{key}."))) or source


def _refuse_unknown_keys(kind: type, values: dict[str, Any], source: str) -> None:
    sections = get_type_hints(kind)
    for name, section_values in values.items():
        if name not in sections:
            raise RecipeError(f"{source}: {name}: unknown section{nearest(name, sections)}")
        if not isinstance(section_values, dict):
            raise RecipeError(f"{source}: {name}: found {section_values!r}, wanted a section [{name}]")
        for key in section_values:
            if key not in _keys(sections[name]):
                hint = _elsewhere(kind, key) or nearest(key, _keys(sections[name]), f"{name}.")
                raise RecipeError(f"{source}: {name}.{key}: unknown key{hint}")


def _elsewhere(kind: type, key: str) -> str:
    """The tail of an error message: which sections have the key, if any."""
    names = [f"{name}.{key}" for name, section in get_type_hints(kind).items() if key in _keys(section)]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _apply_override(kind: type, values: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    section, dot, name = key.partition(".")
    if not (override.startswith("--") and equals and dot):
        raise RecipeError(f"{override}: wanted --section.key=value{_elsewhere(kind, key)}")
    name, nested, option = name.partition(".")
    _refuse_unknown_keys(kind, {section: {name: text}}, override)
    hint = get_type_hints(get_type_hints(kind)[section]).get(name, str)  # loss.preset is not a field
    target = values.setdefault(section, {})
    if nested:
        target = target.setdefault(name, {})
        if get_origin(hint) is not dict or not isinstance(target, dict):
            raise RecipeError(f"{override}: {section}.{name} is not a table; wanted --{section}.{name}=value")
        name = option
    target[name] = text if _is_text(hint) else _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _keys(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section)] + (["preset"] if section is LossConfig else [])


def _is_text(hint: Any) -> bool:
    return hint is str or (isinstance(hint, UnionType) and str in get_args(hint)) or get_origin(hint) is Literal


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value
