"""Which completions become examples for SFT (arXiv 2501.12948, sections 2.3.1 and 2.3.3), and how they are written.

`Selection.take` asks the filters in the order of `FILTERS`; the first one that rejects a completion is counted.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flashgrpo.grpo.recipe.schema import FilterSection, WriteSection
from flashgrpo.grpo.rewards.response import Response
from flashgrpo.grpo.rewards.rules import is_correct
from flashgrpo.grpo.types import PromptText

_EXAMPLES = 3


@dataclass(frozen=True)
class Sample:
    """A completion and what is known of it; None where that does not apply. `scores` has what was computed, by
    function; NaN is a score that could not be.
    """

    prompt: PromptText
    context: str  # the text that was continued: the prompt in its template
    completion: str
    answer: str | None
    prompt_id: int
    num_tokens: int
    scores: Mapping[str, float]
    sample: int | None = None
    seed: int | None = None
    finish_reason: str | None = None
    reward: float | None = None

    @property
    def response(self) -> Response:
        return Response(self.completion, self.context)


def is_right(sample: Sample) -> bool:
    """Whether `code` solved it, where there are tests, or else `accuracy`; true where there is neither."""
    score = sample.scores.get("code", sample.scores.get("accuracy"))
    return score is None or bool(is_correct(score))


def is_formatted(sample: Sample) -> bool:
    """Reasoning in `<think>` tags, then a summary, or an `<answer>` block that may have one before it."""
    tags, (before, *texts) = sample.response.parts()
    if tags == ["<think>", "</think>"]:
        return not before and all(texts)
    if tags == ["<think>", "</think>", "<answer>", "</answer>"]:
        reasoning, _, answer, after = texts
        return bool(reasoning and answer) and not (before or after)
    return False


def longest_paragraph(sample: Sample) -> int:
    """Words, by white space, of the longest paragraph of the reasoning."""
    paragraphs = re.split(r"\n\s*\n", sample.response.reasoning)
    return max(len(paragraph.split()) for paragraph in paragraphs)


def rewritten(sample: Sample, write: WriteSection) -> str | None:
    """The completion as write.completion has it, without the tags of its parts; None where a part is missing."""
    if not write.completion:
        return sample.completion
    response = sample.response
    parts = {"reasoning": response.reasoning.strip(), "summary": response.summary, "answer": response.answer()}
    return write.completion.format(**parts) if all(parts[field] for field in write.fields) else None


_CHECKS: dict[str, Callable[[Sample, FilterSection], bool]] = {
    "truncated": lambda s, f: s.finish_reason != "length",
    "correct": lambda s, f: not f.correct or is_right(s),
    "format": lambda s, f: not f.format or is_formatted(s),
    "language": lambda s, f: not f.min_language or s.scores["language_consistency"] >= f.min_language,
    "min_tokens": lambda s, f: s.num_tokens >= f.min_tokens,
    "max_tokens": lambda s, f: not f.max_tokens or s.num_tokens <= f.max_tokens,
    "repetition": lambda s, f: f.max_repetition == 1 or -s.scores["repetition"] <= f.max_repetition,
    "paragraphs": lambda s, f: not f.max_paragraph_words or longest_paragraph(s) <= f.max_paragraph_words,
    "code_blocks": lambda s, f: f.code_blocks or "```" not in s.response.reasoning,
}
FILTERS = *_CHECKS, "template", "duplicate", "max_per_prompt"


def rejected_by(sample: Sample, filters: FilterSection) -> str | None:
    """The first filter that rejects a completion by itself, whatever else there is."""
    return next((name for name, passes in _CHECKS.items() if not passes(sample, filters)), None)


class Selection:
    """The filters over a source's completions, in their order, beside what was kept of `earlier` sources."""

    def __init__(self, filters: FilterSection, write: WriteSection, earlier: "Selection | None" = None):
        self.filters, self.write = filters, write
        self._seen: set[bytes] = earlier._seen if earlier else set()
        self._per_prompt: Counter[str] = earlier._per_prompt if earlier else Counter()
        self.rejected: Counter[str] = Counter()
        self.kept: Counter[int] = Counter()  # by prompt_id, with those of which nothing was kept
        self.examples: list[dict[str, str]] = []  # of the rejected ones

    @property
    def num_seen(self) -> int:
        """Completions so far."""
        return self.kept.total() + self.rejected.total()

    def take_all(self, samples: Iterable[Sample]) -> list[Sample]:
        """What is kept, as it is to be written."""
        return [*filter(None, map(self.take, samples))]

    def take(self, sample: Sample) -> Sample | None:
        """The sample with the text to write, or None for one that is rejected."""
        # Two completions are duplicates as they are written, so that the text is made first.
        text = rewritten(sample, self.write)
        name = rejected_by(sample, self.filters) or ("template" if text is None else self._compare(sample.prompt, text))
        self.kept[sample.prompt_id] += name is None  # 0 counts, too: prompts with none
        if name is None:
            return dataclasses.replace(sample, completion=text)
        self.rejected[name] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"prompt": str(sample.prompt), "completion": sample.completion, "filter": name})
        return None

    def report(self) -> dict[str, Any]:
        """Counts: seen, kept, rejected by filter, prompts by how many completions were kept of them."""
        num_prompts = len(self.kept)
        return {
            "seen": self.num_seen,
            "kept": self.kept.total(),
            "rejected": {name: self.rejected[name] for name in FILTERS},
            "prompts": num_prompts,
            "prompts_by_kept": {str(kept): n for kept, n in sorted(Counter(self.kept.values()).items())},
            "prompts_with_none": sum(not kept for kept in self.kept.values()) / num_prompts if num_prompts else 0.0,
        }

    def _compare(self, prompt: PromptText, text: str) -> str | None:
        # What differs in white space and case alone is the same.
        key = hashlib.sha256(json.dumps([prompt, " ".join(text.casefold().split())]).encode()).digest()
        of_prompt = json.dumps(prompt)
        if key in self._seen:
            return "duplicate"
        if self.filters.max_per_prompt and self._per_prompt[of_prompt] >= self.filters.max_per_prompt:
            return "max_per_prompt"
        self._seen.add(key)
        self._per_prompt[of_prompt] += 1
        return None
