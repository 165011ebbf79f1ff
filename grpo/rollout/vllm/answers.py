"""What a server answers to a request for completions, checked: whatever gets past here is trained on."""

from collections.abc import Collection
from typing import Any

import numpy as np

from flashgrpo.grpo.types import Request, Rollout, Sampling

_NOT_FINITE = -9999.0  # what vLLM writes for a log-prob that is NaN or -inf
_ROUNDING = 1e-5  # by which a GPU's log-softmax may be above 0


class AnswerError(ValueError):
    """An answer that is not what was asked for."""


def read_group(
    answer: dict[str, Any],
    request: Request,
    sampling: Sampling,
    vocab_size: int,
    stop_token_ids: Collection[int],
    versions: range,
) -> list[Rollout]:
    """The group that `request` asked for, sampled from weights of `versions`. Raises AnswerError where it is none."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        numbers = [choice["index"] for choice in choices]
        _expect(numbers == [*range(len(request.seeds))], f"completions {numbers}, wanted {len(request.seeds)}")
        rollouts = [_rollout(request, choice) for choice in choices]
    except (LookupError, TypeError, OverflowError) as error:
        raise AnswerError(f"{type(error).__name__}: {error}") from error
    except ValueError as error:  # of NumPy's, and int's
        raise AnswerError(str(error)) from error
    for rollout in rollouts:
        _check(rollout, sampling, vocab_size, versions)
        is_cut = rollout.finish_reason == "stop" and rollout.completion_ids[-1] not in stop_token_ids
        _expect(not is_cut, f"a stop at the token {rollout.completion_ids[-1]}, wanted one of {stop_token_ids}")
    return rollouts


def _rollout(request: Request, choice: dict[str, Any]) -> Rollout:
    """As it came, in arrays."""
    ids = np.asarray(choice["token_ids"])
    found = [token["logprob"] for token in choice["logprobs"]["content"]]
    _expect(not any(isinstance(value, str | bool) for value in found), "log-probs that are no numbers")
    logprobs = np.asarray(found, dtype=np.float64)
    spans = choice["weight_versions"]
    starts, ends = ([span[side] for span in spans] for side in ("start", "end"))
    _expect(len(ids) > 0, "no tokens")
    _expect(ids.dtype.kind == "i" and ids.ndim == 1, "token ids that are no whole numbers")
    _expect([*starts, len(ids)] == [0, *ends], f"weight versions from {starts} to {ends} for {len(ids)} tokens")
    return Rollout(
        request.prompt_ids,
        ids.astype(np.int64),
        np.maximum(logprobs, _NOT_FINITE).astype(np.float32),
        choice["finish_reason"],
        request.group,
        tuple((int(str(span["version"])), span["end"] - span["start"]) for span in spans),
    )


def _check(rollout: Rollout, sampling: Sampling, vocab_size: int, versions: range) -> None:
    ids, logprobs, reason = rollout.completion_ids, rollout.behavior_logprobs, rollout.finish_reason
    most, first, last = sampling.max_new_tokens, ids.min(), ids.max()
    _expect(reason in ("stop", "length"), f"an end by {reason!r}, wanted stop or length")
    _expect(len(ids) == most or (reason == "stop" and len(ids) < most), f"{len(ids)} tokens, cut at {most}")
    _expect(first >= 0 and last < vocab_size, f"tokens from {first} to {last}, wanted 0 to {vocab_size - 1}")
    _expect(logprobs.shape == ids.shape, f"{len(logprobs)} log-probs for {len(ids)} tokens")
    _expect(np.isfinite(logprobs).all() and logprobs.min() > _NOT_FINITE, "a log-prob that is not finite")
    _expect(logprobs.max() <= _ROUNDING, f"a log-prob of {logprobs.max():g}, wanted at most 0")
    for version, num_tokens in rollout.weight_versions:
        found = f"{num_tokens} tokens of the weights {version}"
        _expect(num_tokens > 0 and version in versions, f"{found}, wanted {versions[0]} to {versions[-1]}")


def _expect(holds: Any, found: str) -> None:
    if not holds:
        raise AnswerError(found)
