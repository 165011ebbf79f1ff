"""Prompts as text and tokens: templates, what the tokenizer puts before a text, and the token that closes one."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.recipe.schema import DataSection, Template
from flashgrpo.grpo.run.policy import Policy
from flashgrpo.grpo.types import Problem, Prompt, PromptText
from flashgrpo.model.waits import word_for

# arXiv 2501.12948, table 1
_R1_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}\nAssistant:"
)


class Rendering(Protocol):
    """How a prompt becomes tokens, as a section of data or the card of a reward model says."""

    @property
    def template(self) -> Template: ...
    @property
    def template_options(self) -> Mapping[str, Any]: ...
    @property
    def system_prompt(self) -> str | None: ...


@contextlib.contextmanager
def located(problem: Problem) -> Iterator[None]:
    """What raises DataError inside is at the problem's place."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{problem.where}: {error}") from error


def render_prompt(prompt: PromptText, how: Rendering, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt in its template: "r1" (arXiv 2501.12948, table 1), "chat" (the
    tokenizer's) or "none".

    The chat template is given the options, and the system prompt before messages that have no
    system message; a last message of the assistant's is left open, for the model to continue.

    Raises:
        DataError: a tokenizer without chat template, messages or options that it refuses, messages in a template for
            text, a text that ends with the end-of-sequence token, or no tokens.
    """
    if how.template == "chat":
        ids = encode(_render_chat(prompt, how, tokenizer), tokenizer)
    else:
        ids = _encode_opened(render_text(prompt, how.template), tokenizer)
    if not ids:
        raise DataError(f"prompt {str(prompt)[:80]!r} has no tokens in template {how.template!r}")
    if ids[-1] == tokenizer.eos_token_id:
        raise DataError(f"the prompt ends with {tokenizer.eos_token}, after which nothing comes; remove it")
    return ids


def render_text(prompt: PromptText, template: Template) -> str:
    """A prompt in one of the templates that need no tokenizer, "r1" or "none". Raises DataError for chat messages."""
    if not isinstance(prompt, str):
        raise DataError(f'template {template!r} wants text, found chat messages; use template = "chat"')
    return _R1_TEMPLATE.format(prompt=prompt) if template == "r1" else prompt


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, and none that the tokenizer would add. Raises DataError for one that it refuses."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # tokenizers raises bare ones
        raise DataError(f"the tokenizer refuses {text[:80]!r}: {error}") from error


def _encode_opened(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text behind what the tokenizer puts before it, once.

    What it would put after it ends a text, which the model is to continue.
    """
    own = encode(text, tokenizer)
    if not own:
        return []
    # Its special tokens up to the first that is the text's own; a text may have them already.
    encoded = tokenizer(text, return_special_tokens_mask=True)
    opening = list(encoded["input_ids"][: encoded["special_tokens_mask"].index(0)])
    return own if own[: len(opening)] == opening else opening + own


def _render_chat(prompt: PromptText, how: Rendering, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            'the tokenizer has no chat template; use template = "r1" or "none", or a chat model\'s tokenizer'
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if how.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": how.system_prompt}, *messages]
    # What the assistant has begun is not closed, and no second turn of it is opened.
    is_continued = messages[-1]["role"] == "assistant"
    try:
        source = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            **how.template_options,
        )
    except Exception as error:  # a template is a program, and may raise anything
        raise DataError(f"the chat template refuses {str(prompt)[:80]!r}: {str(error)[:200]}") from error
    # Jinja leaves out in silence what a template does not read.
    for name in how.template_options:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise DataError(f"the chat template does not read template_options.{name}; remove it, or correct its name")
    return str(text)


@word_for("tokenizing the prompts")
def render_prompts(
    problems: Sequence[Problem], policy: Policy, data: DataSection, source: str = "data"
) -> list[Prompt]:
    """Every problem through the template. Raises DataError for an empty prompt, or one over data.max_prompt_tokens."""
    prompts = []
    for problem in problems:
        with located(problem):
            token_ids = render_prompt(problem.prompt, data, policy.tokenizer)
        if len(token_ids) > data.max_prompt_tokens:
            raise DataError(
                f"{problem.where}: a prompt has {len(token_ids)} tokens, data.max_prompt_tokens = "
                f"{data.max_prompt_tokens}; raise it or remove the prompt that begins {str(problem.prompt)[:60]!r}"
            )
        prompts.append(Prompt(problem, token_ids, policy.decode(token_ids), source))
    return prompts


def closed_ids(text: str, tokenizer: PreTrainedTokenizerBase, end: int) -> np.ndarray:
    """A completion's tokens, [num_tokens] int64; the last is `end`. Raises DataError."""
    ids = encode(text, tokenizer)
    return np.array(ids if ids[-1:] == [end] else [*ids, end], dtype=np.int64)
