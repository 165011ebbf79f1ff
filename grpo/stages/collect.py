"""Examples for SFT from samples of a model and from given files, filtered and mixed; `flashgrpo collect RECIPE`, or on
many GPUs `torchrun --nproc_per_node 8 -m flashgrpo.grpo.cli collect RECIPE`.

The problems are the training problems of [data]; with the `run.seed` of the stages that train and
evaluate on it, none of their held-out ones is among them. `run.output` gets parts/part_N.parquet
with every sample of prompts_per_part problems and its scores, report.json, and data.parquet with
what is kept. A sample depends on the weights, the problem's number and run.seed alone: not on
ranks, parts or restarts. Filters read the parts, so that other ones cost no sampling. Samples and
given rows go one way: a row of what is known of a completion, which a part is a file of; the
`Sample` that filters ask; an example.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from flashgrpo.grpo.data.problems import load_completions, load_problems
from flashgrpo.grpo.data.prompts import encode, located, render_prompt, render_prompts
from flashgrpo.grpo.errors import DataError, GeneratorFailure, RewardFailure, RunInputError
from flashgrpo.grpo.recipe.load import CollectRecipe
from flashgrpo.grpo.recipe.schema import GivenSection, weights_of
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rollout.generator import Generator, open_generator, sample_seeds, settle_generator
from flashgrpo.grpo.run.folder import hold_output
from flashgrpo.grpo.run.ledger import Inputs, changed_keys, compare_inputs, write_made_from
from flashgrpo.grpo.run.policy import Policy
from flashgrpo.grpo.run.progress import Clock, StepBar, console, say, step_bar
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.stages.evaluate import open_for_sampling
from flashgrpo.grpo.stages.filters import FILTERS, Sample, Selection
from flashgrpo.grpo.stages.scores import solved_by
from flashgrpo.grpo.types import CompletionGroup, Problem, Prompt, Request, Sampling
from flashgrpo.model.checkpoint import read_config, weights_sha256
from flashgrpo.model.files import whole_file, write_text
from flashgrpo.model.hub import local_folder

_STREAM = 1 << 33  # keeps these seeds apart from those of training and evaluation
_AFTERWARDS = (  # sections and keys that samples and their scores do not depend on
    *("filters.", "given.", "write.", "vllm."),
    *("rewards.workers.", "rewards.timeout_s."),
    *("run.accept_changes.", "run.collective_timeout_s.", "run.output."),
)
# The columns of a part and of data.parquet, beside the prompt and the scores.
_PART = "prompt_id", "sample", "seed", "completion", "finish_reason", "num_tokens", "reward"
_ORIGIN = "source", "prompt_id", "sample", "seed", "model", "weights_sha256"
_EXAMPLE = "completion", "answer", *_ORIGIN, "num_tokens", "reward"
_NUMBERS = dict.fromkeys(("prompt_id", "sample", "num_tokens"), pa.int64()) | {
    "seed": pa.uint64(),
    "reward": pa.float64(),
}

Row = dict[str, Any]


def collect(recipe: CollectRecipe, resume: bool = False) -> Path:
    """Run a recipe, or continue it; returns the file of examples.

    Its columns are prompt (text; chat messages if any prompt is), completion, answer, and where
    they come from: source ("samples" or a name in [given]), prompt_id (the number of the training
    problem, or of the row), sample, seed (by vLLM, whose groups have one, that of the group and the
    number of the sample), model, weights_sha256, num_tokens, reward, and every score; null where
    that does not apply.

    Raises RecipeError, DataError, RewardError, CheckpointError and RunInputError before the first
    sample, then GeneratorFailure, RewardFailure, and DataError where a source has nothing that
    passes the filters. Ctrl-C keeps the parts that are whole.
    """
    with open_world(recipe) as world, contextlib.ExitStack() as stack:
        output = Path(recipe.run.output)
        recipe = settle_generator(recipe, world, resume)
        world.on_main(lambda: stack.enter_context(hold_output(output, resume)))

        # All that can be at fault in the data and the recipe is found before the first sample.
        read_config(recipe.model.path)
        problems = load_problems(recipe.data, recipe.run.seed)[0] if recipe.data.has_problems else []
        problems = problems[: recipe.rollout.prompts or None]
        given = {}
        for name, section in recipe.given.items():
            given[name] = load_completions(section, section.completion_column, section.answer_column)
        local_folder(recipe.model.path, with_weights=bool(problems))
        inputs = world.on_main(lambda: _compare(recipe, output))
        # By names, shapes and bytes: the same however the weights are split into files.
        sha256 = world.on_main(lambda: weights_sha256(recipe.model.path) if problems else None)
        say(f"loading {recipe.model.path}")
        policy = open_for_sampling(recipe, world.device, has_prompts=bool(problems))
        prompts = render_prompts(problems, policy, recipe.data)
        example = problems[0] if problems else next(iter(given.values()))[0][0]
        pool = stack.enter_context(_open_pool(recipe, example, has_samples=bool(problems)))
        sources: dict[str, Iterable[Sample]] = {}
        with world.interrupts:
            for name, rows in given.items():
                sources[name] = _given(rows, recipe.given[name], policy, pool, world)

        parts = _Parts(recipe, world, policy, pool, prompts)
        generator = None
        if parts.missing:
            longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
            generator = open_generator(recipe, policy, world, longest_prompt, loaded=True)
            stack.enter_context(contextlib.closing(generator))
        world.on_main(lambda: write_made_from(recipe, inputs))
        with world.interrupts:  # but not while the generator opens: Ctrl-C ends that at once
            if generator:
                parts.sample(generator)
        if prompts:
            sources = {"samples": parts.read(), **sources}
        return world.on_main(lambda: _write(recipe, output, sources, sha256))


class _Parts:
    """The samples of `prompts`, in files of prompts_per_part of them; `missing` has the numbers of those to be made."""

    def __init__(
        self, recipe: CollectRecipe, world: World, policy: Policy, pool: RewardPool, prompts: Sequence[Prompt]
    ):
        self.recipe, self.world, self.policy, self.pool, self.prompts = recipe, world, policy, pool, prompts
        self.size = recipe.rollout.prompts_per_part
        folder, number = Path(recipe.run.output) / "parts", -(-len(prompts) // self.size)
        self.files = [folder / f"part_{n:05}.parquet" for n in range(number)]
        # Rank 0 looks: a file that appears on another rank's disk later must not split the ranks' work in two.
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
            say(f"stopped after {done} of {total} parts; continue with --resume", style="yellow")
            raise

    def read(self) -> Iterator[Sample]:
        """All samples, in the order of problems. Raises RunInputError for a broken file."""
        for file in self.files:
            try:
                rows = pq.read_table(file).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise RunInputError(f"{file}: broken ({error}); remove it, and make it anew with --resume") from error
            for row in rows:
                yield _sample(row, self.prompts[row["prompt_id"]])

    def _make(self, number: int, generator: Generator, bar: StepBar) -> str:
        """Sample and score a part, each rank its share, and write it; returns its rates."""
        clock = Clock()
        # A part is written when all ranks have their share: Ctrl-C on one of them costs the part on all.
        shares = self.world.together(lambda: self._share(number, generator, bar))
        rows = sorted(chain.from_iterable(shares), key=itemgetter("prompt_id", "sample"))
        schema = _schema(_PART, scores=[name for name in rows[0] if name not in _PART])
        self.world.on_main(lambda: _write_parquet(rows, schema, self.files[number]))
        tokens = sum(row["num_tokens"] for row in rows)
        return f"{len(rows) / clock.total_s:,.1f} samples/s, {tokens / clock.total_s:,.0f} tokens/s"

    def _share(self, number: int, generator: Generator, bar: StepBar) -> list[Row]:
        """This rank's rows of a part; a group is scored while others are sampled."""
        rollout = self.recipe.rollout
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
        first = number * self.size
        requests = {}
        for i in range(first + self.world.rank, min(first + self.size, len(self.prompts)), self.world.size):
            seeds = sample_seeds(self.recipe.run.seed, _STREAM, i, rollout.group_size)
            requests[i] = Request(i, self.prompts[i].token_ids, seeds)
        groups: list[tuple[Request, CompletionGroup]] = []
        for rollouts in generator.generate([*requests.values()], sampling):
            request = requests[rollouts[0].group]
            group = CompletionGroup.of(self.prompts[request.group], rollouts, self.policy.decode)
            self.pool.submit(group)
            groups.append((request, group))
            bar.phase(f"{len(groups)} of {len(requests)} prompts")
        scored = self.pool.collect()
        self.pool.check_step(scored)
        rows = []
        for (request, group), scores in zip(groups, scored, strict=True):
            for sample, completion in enumerate(group.completions):
                row: Row = {
                    "prompt_id": request.group,
                    "sample": sample,
                    "seed": int(request.seeds[sample]),
                    "completion": completion,
                    "finish_reason": group.finish_reasons[sample],
                    "num_tokens": len(group.completion_ids[sample]),
                    "reward": float(scores.rewards[sample]),
                }
                for name, values in scores.by_function.items():
                    row[name] = math.nan if values[sample] is None else values[sample]
                rows.append(row)
        return rows


def _given(
    given: list[tuple[Problem, str]], section: GivenSection, policy: Policy, pool: RewardPool, world: World
) -> list[Sample]:
    """Given rows, and where they are to be filtered their scores, of which each rank computes a share."""
    prompts, groups = [], []
    for problem, text in given:
        with located(problem):
            ids = encode(text, policy.tokenizer)
            # What is not filtered needs no prompt in its template.
            prompt_ids = render_prompt(problem.prompt, section, policy.tokenizer) if section.filtered else []
        prompts.append(Prompt(problem, prompt_ids, policy.decode(prompt_ids)))
        groups.append(CompletionGroup(problem, prompts[-1].text, [text], [ids], ["stop"]))
    has_answer = section.answer_column is not None
    names = _scored(given[0][0], has_answer) if section.filtered else []

    def share() -> list[Row]:
        own = groups[world.rank :: world.size]
        columns = [pool.score(own, name).ravel().tolist() for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    shares, samples = world.together(share), []
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        scores = shares[i % world.size][i // world.size] if names else {}
        row = {"prompt_id": i, "completion": group.completions[0], "num_tokens": len(group.completion_ids[0])}
        samples.append(_sample(row | scores, prompt, has_answer))
    return samples


def _sample(row: Row, prompt: Prompt, has_answer: bool = True) -> Sample:
    """What filters ask of a row; what is beside the known columns is a score."""
    scores, columns = dict(row), prompt.problem.columns
    known = {name: scores.pop(name, None) for name in _PART}
    if solved_by(columns) != "code":
        scores.pop("code", None)  # it says nothing of a problem without tests
    answer = _text(columns.get("answer")) if has_answer else None
    return Sample(prompt.problem.prompt, prompt.text, answer=answer, scores=scores, **known)


def _write(recipe: CollectRecipe, output: Path, sources: Mapping[str, Iterable[Sample]], sha256: str | None) -> Path:
    """Filter and mix; data.parquet, report.json and a table of what was rejected. Raises DataError."""
    kept: dict[str, list[Sample]] = {}
    report: dict[str, dict[str, Any]] = {}
    selection, faults = None, []
    for number, (name, samples) in enumerate(sources.items()):
        section = recipe.given.get(name)
        if section and not section.filtered:
            found = [*samples]
            report[name] = {"seen": len(found), "kept": len(found)}
        else:
            # Duplicates are looked for in all sources, so that the order of sources decides which one stays.
            selection = Selection(recipe.filters, recipe.write, earlier=selection)
            found = selection.take_all(samples)
            report[name] = selection.report()
            faults += [] if found else [_all_rejected(name, selection)]
        if section and section.ratio:
            found = _drawn(found, name, round(section.ratio * len(kept["samples"])), [recipe.run.seed, number])
        kept[name] = found
        report[name]["written"] = len(found)
    # The report comes before the fault: it says what to change.
    write_text(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    _print_report(report)
    if faults:
        raise DataError(f"{faults[0]}; change [filters] and start again with --resume: {output / 'parts'} is kept")
    rows: list[Row] = []
    for name, found in kept.items():
        model = (recipe.model.path, sha256) if name == "samples" else (None, None)
        origin = {"source": name, "model": model[0], "weights_sha256": model[1]}
        rows += [_example(sample) | origin for sample in found]
    order = np.random.default_rng(recipe.run.seed).permutation(len(rows))
    _write_examples([rows[i] for i in order], output / "data.parquet")
    return output / "data.parquet"


def _drawn(found: list[Sample], name: str, wanted: int, seed: list[int]) -> list[Sample]:
    """As many as a ratio asks for, in their order; all, where there are no more."""
    if wanted > len(found):
        say(f"given.{name} has {len(found)} rows for the {wanted} that its ratio asks for", style="yellow")
    drawn = np.random.default_rng(seed).permutation(len(found))[:wanted]
    return [found[i] for i in sorted(drawn)]


def _compare(recipe: CollectRecipe, output: Path) -> Inputs:
    """What is read. Raises RunInputError where the samples in `output` are from anything else."""
    inputs, told = compare_inputs(recipe)
    if (output / "recipe.toml").exists():
        changed_keys(output / "recipe.toml", recipe, _is_fixed)
        for key, text in told.items():
            if not key.startswith("given."):  # it is read at the end, as the parts are
                raise RunInputError(f"{text}; restore it, or choose another run.output")
    return inputs


def _is_fixed(key: str) -> bool:
    """Whether samples and their scores depend on a key of the recipe."""
    return not f"{key}.".startswith(_AFTERWARDS)


def _open_pool(recipe: CollectRecipe, example: Problem, has_samples: bool) -> RewardPool:
    """The recipe's rewards for samples, and what filters ask for, which has no weight."""
    rewards = recipe.rewards
    weights = weights_of(rewards.functions, rewards.weights) if has_samples else {}
    for name in _scored(example, has_samples and "answer" in example.columns):
        weights.setdefault(name, 0.0)
    return RewardPool(
        {"data": weights},
        {"data": example},
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
    counts, examples = [], []
    for filter_name, number in selection.rejected.most_common():
        counts.append(f"{number} by {filter_name}")
    for each in selection.examples:
        examples.append(f"{each['prompt'][:60]!r} -> {each['completion'][:80]!r} ({each['filter']})")
    told = f"{', '.join(counts)}, such as {'; '.join(examples)}"
    return f"{name}: all {selection.num_seen} completions were rejected, {told}"


def _example(sample: Sample) -> Row:
    """A row of data.parquet, but for where it comes from."""
    row: Row = {**vars(sample), **sample.scores}
    for name in ("reward", *sample.scores):
        row[name] = None if row[name] is None or math.isnan(row[name]) else row[name]
    return row


def _write_examples(rows: list[Row], file: Path) -> None:
    if not all(isinstance(row["prompt"], str) for row in rows):  # a column has one type
        for row in rows:
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    scores = set().union(*(row["scores"] for row in rows))
    schema = _schema(_EXAMPLE, sorted(scores)).insert(
        0, pa.field("prompt", pa.array([row["prompt"] for row in rows]).type)
    )
    _write_parquet(rows, schema, file)


def _schema(columns: Iterable[str], scores: Iterable[str]) -> pa.Schema:
    types = {name: _NUMBERS.get(name, pa.string()) for name in columns}
    return pa.schema(types | dict.fromkeys(scores, pa.float64()))


def _write_parquet(rows: list[Row], schema: pa.Schema, file: Path) -> None:
    table = pa.Table.from_pylist(rows, schema)  # null where a row lacks a column
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as temporary:
        pq.write_table(table, temporary)


def _text(answer: Any) -> str | None:
    return answer if answer is None or isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def _print_report(report: dict[str, dict[str, Any]]) -> None:
    table = Table(title="collected", title_justify="left")
    table.add_column("completions")
    for name in report:
        table.add_column(name, justify="right")
    for key in ("seen", *FILTERS, "kept", "written"):
        cells = []
        for each in report.values():
            number = each.get("rejected", {}).get(key, 0) if key in FILTERS else each[key]
            cells.append(f"{number:,}")
        table.add_row(f"rejected by {key}" if key in FILTERS else key, *cells)
    console.print(table)
    for name, each in report.items():
        if "prompts_by_kept" in each:
            histogram = ", ".join(f"{kept}: {number:,}" for kept, number in each["prompts_by_kept"].items())
            none = f"{each['prompts_with_none']:.1%} with none"
            say(f"{name}: {each['prompts']:,} prompts, {none}; by completions kept: {histogram}")
