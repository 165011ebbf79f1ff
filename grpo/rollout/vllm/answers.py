"""A request as vLLM takes it and its answer, from an engine and from a server."""

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Annotated, Any, Literal, NotRequired, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from flashgrpo.grpo.types import Request, Rollout, Sampling

_NOT_FINITE = -9999.0  # what vLLM writes for a log-prob that is NaN or -inf
_ROUNDING = 1e-5  # by which a GPU's log-softmax may be above 0

T = TypeVar("T")


def sampling_fields(sampling: Sampling, request: Request, stop_token_ids: list[int]) -> dict[str, Any]:
    """vLLM's sampling parameters: token ids in, token ids out, one prompt for the whole group.

    vLLM seeds sample i of a group with `seed` + i. At temperature 0 it refuses n above 1: the likeliest token is then
    the only one to sample from.
    """
    is_greedy = sampling.temperature == 0
    return {
        "n": len(request.seeds),
        "seed": int(request.seeds[0] >> 1),  # signed there
        "max_tokens": sampling.max_new_tokens,
        "temperature": 1.0 if is_greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 1 if is_greedy else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": stop_token_ids,
        "logprobs": 0,
        "detokenize": False,
    }


def sampled_rollout(
    request: Request,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: Literal["stop", "length"],
    spans: Sequence[tuple[int, int, int]],  # (version of the weights, first token, end)
    kept_sets: Sequence[Sequence[int]] | None = None,  # each token's
) -> Rollout:
    """A completion as vLLM gives it. Raises AnswerError where a kept set lacks its token."""
    counts = ids = None
    if kept_sets is not None:
        _expect(len(kept_sets) == len(token_ids), f"{len(kept_sets)} kept sets for {len(token_ids)} tokens")
        for token, kept in zip(token_ids, kept_sets, strict=True):
            _expect(token in kept, f"the token {token}, drawn from {kept}")
        counts = np.array([len(kept) for kept in kept_sets], dtype=np.int32)
        ids = np.fromiter(chain.from_iterable(kept_sets), dtype=np.int32)
    return Rollout(
        request.prompt_ids,
        np.asarray(token_ids, dtype=np.int64),
        np.asarray(logprobs, dtype=np.float32),
        finish_reason,
        request.group,
        tuple((version, end - start) for version, start, end in spans),
        counts,
        ids,
    )


class AnswerError(ValueError):
    """An answer that is not what was asked for."""


class ServedModel(TypedDict):
    """What a server's workers say of their model."""

    weights: dict[str, list[int]]  # shape by name
    dtype: str
    weight_transfer: str
    max_model_len: int
    tells_kept_sets: bool


# Of all workers of a server.
NOTHING, SERVED_MODELS, DIGESTS = (
    TypeAdapter(list[None]),
    TypeAdapter(list[ServedModel]),
    TypeAdapter(list[dict[str, int]]),
)


_Whole = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]


class _Token(TypedDict):
    logprob: Annotated[float, Field(strict=True, gt=_NOT_FINITE, le=_ROUNDING, allow_inf_nan=False)]


class _Logprobs(TypedDict):
    content: list[_Token]


class _Span(TypedDict):
    version: Annotated[int, Field(ge=0)]  # as text
    start: _Whole
    end: _Whole


class _Choice(TypedDict):
    index: _Whole
    token_ids: Annotated[list[_Whole], Field(min_length=1)]
    logprobs: _Logprobs
    finish_reason: Literal["stop", "length"]
    weight_versions: list[_Span]
    sampling_mask: NotRequired[list[list[_Whole]] | None]


class _Answer(TypedDict):
    choices: list[_Choice]


_ANSWER = TypeAdapter(_Answer)


def parse(form: TypeAdapter[T], text: str | bytes) -> T:
    """JSON of this form. Raises AnswerError, with the first place that is not."""
    try:
        return form.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise AnswerError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_group(
    answer: str | bytes,
    request: Request,
    sampling: Sampling,
    vocab_size: int,
    stop_token_ids: Collection[int],
    versions: range,
) -> list[Rollout]:
    """The group that `request` asked for, sampled from weights of `versions`: whatever gets past here is trained on.

    Raises AnswerError where it is none.
    """
    choices = parse(_ANSWER, answer)["choices"]
    choices.sort(key=lambda choice: choice["index"])
    numbers, most = [choice["index"] for choice in choices], sampling.max_new_tokens
    _expect(numbers == [*range(len(request.seeds))], f"completions {numbers}, wanted {len(request.seeds)}")
    group = []
    for choice in choices:
        ids, reason = choice["token_ids"], choice["finish_reason"]
        _expect(len(ids) == most or (reason == "stop" and len(ids) < most), f"{len(ids)} tokens, cut at {most}")
        _expect(max(ids) < vocab_size, f"the token {max(ids)}, wanted 0 to {vocab_size - 1}")
        is_cut = reason == "stop" and ids[-1] not in stop_token_ids
        _expect(not is_cut, f"a stop at the token {ids[-1]}, wanted one of {stop_token_ids}")

        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        _expect(len(logprobs) == len(ids), f"{len(logprobs)} log-probs for {len(ids)} tokens")

        # Spans cover the tokens from the first to the last, and each has some.
        spans = [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"]]
        reached = 0
        for version, start, end in spans:
            found = f"{end - start} tokens of the weights {version}"
            _expect(version in versions, f"{found}, wanted {versions[0]} to {versions[-1]}")
            _expect(start == reached < end, f"weight versions of the tokens {spans}")
            reached = end
        _expect(reached == len(ids), f"weight versions of the tokens {spans} for {len(ids)} tokens")
        kept_sets = choice.get("sampling_mask") if sampling.kept_limit else None
        if sampling.kept_limit:
            _expect(kept_sets is not None, "no sampling_mask")
            largest = max(map(max, filter(None, kept_sets or [])), default=0)
            _expect(largest < vocab_size, f"the kept token {largest}, wanted 0 to {vocab_size - 1}")
        group.append(sampled_rollout(request, ids, logprobs, reason, spans, kept_sets))
    return group


def _expect(holds: bool, found: str) -> None:
    if not holds:
        raise AnswerError(found)
