"""Examples for SFT from samples of a model and from given files, filtered and mixed; `flashgrpo collect RECIPE`, or on
many GPUs `torchrun --nproc_per_node 8 -m flashgrpo.grpo.cli collect RECIPE`.

The problems are the training problems of [data]; with the `run.seed` of the stages that train and evaluate on it, none
of their held-out ones is among them. `run.output` gets parts/part_N.parquet with every sample of prompts_per_part
problems and its scores, report.json, and data.parquet with what is kept. A sample depends on the weights, the problem's
number and run.seed alone: not on ranks, parts or restarts. Filters read the parts, so that other ones cost no sampling.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table

from flashgrpo.grpo.data.problems import load_completions, load_problems
from flashgrpo.grpo.data.prompts import encode, located, render_problem, render_prompts
from flashgrpo.grpo.errors import DataError, GeneratorFailure, RewardFailure, RunInputError
from flashgrpo.grpo.recipe.load import CollectRecipe, recipe_to_toml
from flashgrpo.grpo.recipe.schema import GivenSection
from flashgrpo.grpo.rewards.pool import CompletionGroup, RewardPool
from flashgrpo.grpo.rewards.table import RewardSet
from flashgrpo.grpo.rollout.generator import Generator, open_generator, sample_seeds
from flashgrpo.grpo.run.folder import changed_inputs, changed_keys, hash_inputs, hold_output, write_made_from
from flashgrpo.grpo.run.policy import Policy, open_policy
from flashgrpo.grpo.run.progress import Clock, StepBar, console, step_bar
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.stages.evaluate import completion_group
from flashgrpo.grpo.stages.filters import FILTERS, Sample, Selection
from flashgrpo.grpo.types import Problem, Prompt, Request, Sampling
from flashgrpo.model.checkpoint import empty_decoder, read_config, weights_sha256
from flashgrpo.model.files import whole_file, write_text

_STREAM = 1 << 33  # keeps these seeds apart from those of training and evaluation
_PART = {
    "prompt_id": pa.int64(),
    "sample": pa.int64(),
    "seed": pa.uint64(),
    "completion": pa.string(),
    "finish_reason": pa.string(),
    "num_tokens": pa.int64(),
    "reward": pa.float64(),
}
_PROVENANCE = {"source": pa.string(), "prompt_id": pa.int64(), "sample": pa.int64(), "seed": pa.uint64()}
_PROVENANCE |= {"model": pa.string(), "weights_sha256": pa.string(), "num_tokens": pa.int64(), "reward": pa.float64()}

Row = dict[str, Any]


def collect(recipe: CollectRecipe, resume: bool = False) -> Path:
    """Run a recipe, or continue it; returns the file of examples.

    Its columns are prompt (text; chat messages if any prompt is), completion, answer, and where they come from: source
    ("samples" or a name in [given]), prompt_id (the number of the training problem, or of the row), sample, seed (by
    vLLM, whose groups have one, that of the group and the number of the sample), model, weights_sha256, num_tokens,
    reward, and every score; null where that does not apply.

    Raises RecipeError, DataError, RewardError, CheckpointError and RunInputError before the first sample, then
    GeneratorFailure, RewardFailure, and DataError where a source has nothing that passes the filters. Ctrl-C keeps the
    parts that are whole.
    """
    with open_world(recipe) as world, contextlib.ExitStack() as stack:
        output = Path(recipe.run.output)
        world.on_main(lambda: stack.enter_context(hold_output(output, resume)))
        read_config(recipe.model.path)
        problems = load_problems(recipe.data, recipe.run.seed)[0] if recipe.data.has_problems else []
        problems = problems[: recipe.rollout.prompts or None]
        made_from = world.on_main(lambda: _compare(recipe, output))
        sha256 = world.on_main(lambda: weights_sha256(recipe.model.path) if problems else None)
        console.print(f"loading {recipe.model.path}", markup=False, highlight=False, soft_wrap=True)
        policy = _open_policy(recipe, world, has_samples=bool(problems))
        given = {name: _given_groups(section, policy) for name, section in recipe.given.items()}
        prompts = render_prompts(problems, policy, recipe.data)
        example = problems[0] if problems else next(iter(given.values()))[0].problem
        pool = stack.enter_context(_open_pool(recipe, example, has_samples=bool(problems)))
        parts = _Parts(recipe, world, policy, pool, prompts)
        generator = None
        if parts.missing:
            longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
            generator = open_generator(recipe, policy, world, longest_prompt, loaded=True)
            stack.enter_context(contextlib.closing(generator))
        world.on_main(lambda: _begin(recipe, output, made_from))
        with world.interrupts:
            if generator:
                parts.sample(generator)
            named = {name: _given_samples(groups, recipe.given[name], parts) for name, groups in given.items()}
        return world.on_main(lambda: _write(recipe, output, parts, named, sha256))


class _Parts:
    """The samples of `prompts`, in files of prompts_per_part of them; `missing` has the numbers of those to be made."""

    def __init__(
        self, recipe: CollectRecipe, world: World, policy: Policy, pool: RewardPool, prompts: Sequence[Prompt]
    ):
        self.recipe, self.world, self.policy, self.pool, self.prompts = recipe, world, policy, pool, prompts
        self.size = recipe.rollout.prompts_per_part
        folder, number = Path(recipe.run.output) / "parts", -(-len(prompts) // self.size)
        self.files = [folder / f"part_{n:05}.parquet" for n in range(number)]
        self.missing = world.on_main(lambda: [n for n, file in enumerate(self.files) if not file.exists()])

    def sample(self, generator: Generator) -> None:
        """Make what is missing."""
        total = len(self.files)
        done = total - len(self.missing)
        try:
            with step_bar("collect", done, total) as bar:
                for number in self.missing:
                    rates = self._make(number, generator, bar)
                    done += 1
                    bar.advance(done, rates)
        except (KeyboardInterrupt, RewardFailure, GeneratorFailure):
            console.print(f"[yellow]stopped after {done} of {total} parts; continue with --resume[/yellow]")
            raise

    def read(self) -> Iterator[Sample]:
        """All samples, in the order of problems. Raises RunInputError for a broken file."""
        for file in self.files:
            try:
                rows = pq.read_table(file).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise RunInputError(f"{file}: broken ({error}); remove it, and make it anew with --resume") from error
            for row in rows:
                prompt = self.prompts[row["prompt_id"]]
                columns = prompt.problem.columns
                scores = {name: score for name, score in row.items() if name not in _PART}
                if not columns.get("tests"):
                    scores.pop("code", None)
                known = {name: row[name] for name in _PART}
                yield Sample(
                    prompt.problem.prompt, prompt.text, answer=_text(columns.get("answer")), scores=scores, **known
                )

    def _make(self, number: int, generator: Generator, bar: StepBar) -> str:
        """Sample and score a part, each rank its share, and write it; returns its rates."""
        clock = Clock()
        shares = self.world.together(lambda: self._share(number, generator, bar))
        rows = sorted((row for share in shares for row in share), key=lambda row: (row["prompt_id"], row["sample"]))
        scores = {name: pa.float64() for name in rows[0] if name not in _PART}
        table = pa.Table.from_pylist(rows, pa.schema(_PART | scores))
        self.world.on_main(lambda: _write_parquet(table, self.files[number]))
        tokens = sum(row["num_tokens"] for row in rows)
        return f"{len(rows) / clock.total_s:,.1f} samples/s, {tokens / clock.total_s:,.0f} tokens/s"

    def _share(self, number: int, generator: Generator, bar: StepBar) -> list[Row]:
        """This rank's rows of a part; a group is scored while others are sampled."""
        rollout, seed = self.recipe.rollout, self.recipe.run.seed
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
        first = number * self.size
        own = range(first + self.world.rank, min(first + self.size, len(self.prompts)), self.world.size)
        seeds = {i: sample_seeds(seed, _STREAM, i, rollout.group_size) for i in own}
        requests = [Request(i, self.prompts[i].token_ids, seeds[i]) for i in own]
        groups = []
        for rollouts in generator.generate(requests, sampling):
            i = rollouts[0].group
            group = completion_group(self.prompts[i], rollouts, self.policy)
            self.pool.submit(group)
            groups.append((i, group))
            bar.phase(f"{len(groups)} of {len(own)} prompts")
        table = self.pool.collect()
        self.pool.check_step(table)
        return [
            {
                "prompt_id": i,
                "sample": sample,
                "seed": int(seeds[i][sample]),
                "completion": group.completions[sample],
                "finish_reason": group.finish_reasons[sample],
                "num_tokens": len(group.completion_ids[sample]),
                "reward": float(table.rewards[row, sample]),
                **{name: float(scores[row, sample]) for name, scores in table.scores.items()},
            }
            for row, (i, group) in enumerate(groups)
            for sample in range(rollout.group_size)
        ]


def _given_groups(section: GivenSection, policy: Policy) -> list[CompletionGroup]:
    """Given rows as groups of one; what is not filtered needs no prompt in its template. Raises DataError."""
    groups = []
    for problem, text in load_completions(section, section.completion_column, section.answer_column):
        with located(problem):
            ids = encode(text, policy.tokenizer)
            context = policy.decode(render_problem(problem, section, policy.tokenizer)) if section.filtered else ""
        groups.append(CompletionGroup(problem, context, [text], [ids], ["stop"]))
    return groups


def _given_samples(groups: list[CompletionGroup], section: GivenSection, parts: _Parts) -> list[Sample]:
    """Given rows, and where they are to be filtered their scores, of which each rank computes a share."""
    world, has_answer = parts.world, section.answer_column is not None
    names = _scored(groups[0].problem, has_answer) if section.filtered else []

    def share() -> list[dict[str, float]]:
        own = groups[world.rank :: world.size]
        scores = {name: parts.pool.score(own, name).ravel().tolist() for name in names}
        return [{name: scores[name][row] for name in names} for row in range(len(own))]

    shares = world.together(share)
    return [
        Sample(
            group.problem.prompt,
            group.prompt,
            group.completions[0],
            _text(group.problem.columns["answer"]) if has_answer else None,
            prompt_id=i,
            num_tokens=len(group.completion_ids[0]),
            scores=shares[i % world.size][i // world.size],
        )
        for i, group in enumerate(groups)
    ]


def _write(
    recipe: CollectRecipe, output: Path, parts: _Parts, given: dict[str, list[Sample]], sha256: str | None
) -> Path:
    """Filter and mix; data.parquet, report.json and a table of what was rejected. Raises DataError."""
    seen: set[bytes] = set()
    per_prompt: Counter[str] = Counter()
    written: dict[str, list[tuple[Sample, str]]] = {}
    report: dict[str, dict[str, Any]] = {}
    faults = []
    sources: dict[str, Iterable[Sample]] = {"samples": parts.read()} if parts.files else {}
    for number, (name, samples) in enumerate((sources | given).items()):
        section = recipe.given.get(name)
        if section and not section.filtered:
            kept = [(sample, sample.completion) for sample in samples]
            report[name] = {"seen": len(kept), "kept": len(kept)}
        else:
            selection = Selection(recipe.filters, recipe.write, seen, per_prompt)
            kept = [(sample, text) for sample in samples if (text := selection.take(sample)) is not None]
            report[name] = selection.report()
            faults += [] if kept else [_all_rejected(name, selection)]
        if section and section.ratio:
            wanted = round(section.ratio * len(written["samples"]))
            if wanted > len(kept):
                console.print(
                    f"[yellow]given.{name} has {len(kept)} rows for the {wanted} that its ratio asks for[/yellow]"
                )
            drawn = np.random.default_rng([recipe.run.seed, number]).permutation(len(kept))[:wanted]
            kept = [kept[i] for i in sorted(drawn)]
        written[name] = kept
        report[name]["written"] = len(kept)
    write_text(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    _print_report(report)
    if faults:
        raise DataError(f"{faults[0]}; change [filters] and start again with --resume: {output / 'parts'} is kept")
    rows = [
        _row(
            sample, text, name, recipe.model.path if name == "samples" else None, sha256 if name == "samples" else None
        )
        for name, kept in written.items()
        for sample, text in kept
    ]
    order = np.random.default_rng(recipe.run.seed).permutation(len(rows))
    _write_parquet(_data_table([rows[i] for i in order]), output / "data.parquet")
    return output / "data.parquet"


def _compare(recipe: CollectRecipe, output: Path) -> dict[str, str]:
    """Hashes of what the samples are made from. Raises RunInputError where those in `output` are from anything else."""
    made_from = hash_inputs(recipe)
    if (output / "recipe.toml").exists():
        changed_keys(output / "recipe.toml", recipe_to_toml(recipe), _is_fixed)
        told = [text for key, text in changed_inputs(recipe, made_from).items() if not key.startswith("given.")]
        if told:  # [given] is read at the end, as the parts are
            raise RunInputError(f"{told[0]}; restore it, or choose another run.output")
    return made_from


def _is_fixed(section: str, key: str) -> bool:
    """Whether samples and their scores depend on a key of the recipe."""
    return section not in ("filters", "given", "write", "vllm") and (section, key) not in (
        ("rewards", "workers"),
        ("rewards", "timeout_s"),
        ("run", "accept_changes"),
        ("run", "collective_timeout_s"),
        ("run", "output"),
    )


def _begin(recipe: CollectRecipe, output: Path, made_from: dict[str, str]) -> None:
    (output / "parts").mkdir(exist_ok=True)
    write_made_from(recipe, made_from)


def _open_policy(recipe: CollectRecipe, world: World, has_samples: bool) -> Policy:
    """The tokenizer, and where this process samples, the weights."""
    is_native = has_samples and recipe.rollout.generator == "native"
    model = None if is_native else empty_decoder(read_config(recipe.model.path), torch.float32)
    return open_policy(recipe.model, world.device, model)


def _open_pool(recipe: CollectRecipe, example: Problem, has_samples: bool) -> RewardPool:
    """The recipe's rewards for samples, and what filters ask for, which has no weight."""
    rewards = recipe.rewards
    functions = rewards.functions if has_samples else []
    weights = rewards.weights or [1.0] * len(functions)
    others = [name for name in _scored(example, has_samples and "answer" in example.columns) if name not in functions]
    weight_of = dict(zip([*functions, *others], [*weights[: len(functions)], *[0.0] * len(others)], strict=True))
    return RewardPool(
        {"data": RewardSet(weight_of, example)},
        max_new_tokens=recipe.rollout.max_new_tokens,
        timeout_s=rewards.timeout_s,
        programs=rewards.programs,
        num_workers=rewards.workers,
    )


def _scored(example: Problem, has_answer: bool) -> list[str]:
    """Functions that the filters ask for on data like `example`."""
    found = ["accuracy"] if has_answer else []
    found += ["code"] if "tests" in example.columns else []
    return [*found, "format", "language_consistency", "repetition"]


def _all_rejected(name: str, selection: Selection) -> str:
    counts = ", ".join(f"{number} by {filter_name}" for filter_name, number in selection.rejected.most_common())
    examples = "; ".join(
        f"{each['prompt'][:60]!r} -> {each['completion'][:80]!r} ({each['filter']})" for each in selection.examples
    )
    return f"{name}: all {selection.num_seen} completions were rejected, {counts}, such as {examples}"


def _row(sample: Sample, text: str, source: str, model: str | None, sha256: str | None) -> Row:
    """A row of data.parquet."""
    known = {name: getattr(sample, name) for name in ("prompt", "answer", "prompt_id", "sample", "seed", "num_tokens")}
    numbers = {"reward": sample.reward, **sample.scores}
    return {
        **known,
        "completion": text,
        "source": source,
        "model": model,
        "weights_sha256": sha256,
        **{name: None if score is None or math.isnan(score) else score for name, score in numbers.items()},
    }


def _data_table(rows: list[Row]) -> pa.Table:
    prompts = [row["prompt"] for row in rows]
    if not all(isinstance(prompt, str) for prompt in prompts):  # a column has one type
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    types = {"completion": pa.string(), "answer": pa.string(), **_PROVENANCE}
    scores = dict.fromkeys(sorted({name for row in rows for name in row} - types.keys() - {"prompt"}), pa.float64())
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in (types | scores).items()}
    return pa.table({"prompt": pa.array(prompts), **columns})


def _write_parquet(table: pa.Table, file: Path) -> None:
    with whole_file(file) as temporary:
        pq.write_table(table, temporary)


def _text(answer: Any) -> str | None:
    return answer if answer is None or isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def _print_report(report: dict[str, dict[str, Any]]) -> None:
    table = Table(title="collected", title_justify="left")
    table.add_column("completions")
    for name in report:
        table.add_column(name, justify="right")
    cells = {name: {**each, **each.get("rejected", {})} for name, each in report.items()}
    for key in ("seen", *FILTERS, "kept", "written"):
        table.add_row(f"rejected by {key}" if key in FILTERS else key, *(f"{c.get(key, 0):,}" for c in cells.values()))
    console.print(table)
    for name, each in report.items():
        if "prompts_by_kept" in each:
            histogram = ", ".join(f"{kept}: {number:,}" for kept, number in each["prompts_by_kept"].items())
            none = f"{each['prompts_with_none']:.1%} with none"
            console.print(
                f"{name}: {each['prompts']:,} prompts, {none}; by completions kept: {histogram}", highlight=False
            )
