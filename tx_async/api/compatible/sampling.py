"""OpenAI's sampling fields as the operation that the SDK's samples also use."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tx_async.api import validation
from tx_async.api.compatible.fields import InvalidField
from tx_async.api.context import Call
from tx_async.errors import InvalidRequest
from tx_async.wire.openai import SamplingFields
from tx_async.wire.operations import Sample

LOGPROBS_MAX = 20
_RENAMED = {"num_samples": "n", "topk_sample_logprobs": "logprobs", "topk_prompt_logprobs": "logprobs"}
"""The fields of a sample that clients know under another name."""


def operation(call: Call, tokens: Any, request: SamplingFields, max_tokens: int | None, **more: Any) -> Sample:
    """The validated operation. max_tokens: at least 1 (`check_max_tokens`); what exceeds the context is cut off."""
    texts, ids = stops(request)
    top_k, top_p = _support(request)
    with _under_known_names():
        seed = validation.seed(request.seed)
    left = max(call.scheduler.base_model.max_context_length - len(tokens), 1)
    _check_grammar(more.get("grammar", ""), request)
    sample = Sample(
        sampling_session_id="",
        seq_id=0,
        prompt=np.asarray(tokens, "<i4").tobytes(),
        num_samples=_or(request.n, 1),
        max_tokens=min(_or(max_tokens, left), left),
        seed=seed,
        temperature=_or(request.temperature, 1.0),
        top_k=top_k,
        top_p=top_p,
        min_p=_or(request.min_p, 0.0),
        stop_strings=texts,
        stop_token_ids=ids,
        use_eos=not request.ignore_eos,
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        min_tokens=min(_or(request.min_tokens, 0), left),
        logit_bias=_logit_bias(request.logit_bias),
        **more,
    )
    return checked(call, sample)


def checked(call: Call, sample: Sample) -> Sample:
    """Raises `InvalidField`, with the names that clients know."""
    with _under_known_names():
        return validation.sample(sample, call.scheduler.base_model, call.api.config.sample_num_samples_max)


@contextmanager
def _under_known_names() -> Generator[None]:
    try:
        yield
    except InvalidRequest as error:
        field, _, what = error.message.partition(" ")
        name = _RENAMED.get(field, field)
        if isinstance(error, InvalidField) or name not in (*SamplingFields.__struct_fields__, "prompt"):
            raise
        raise InvalidField(name, f"it {what}" if what.startswith(("is ", "has ")) else what) from None


def stops(request: SamplingFields) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(texts, tokens) that end an answer."""
    given = [request.stop] if isinstance(request.stop, str) else request.stop or []
    texts = tuple(entry for entry in given if isinstance(entry, str))
    tokens = (*(entry for entry in given if isinstance(entry, int)), *(request.stop_token_ids or ()))
    if "" in texts:
        raise InvalidField("stop", "an empty text cannot end an answer.")
    return texts, tokens


def _support(request: SamplingFields) -> tuple[int, float]:
    """(top_k, top_p) of the operation. A top_p of 0 leaves the likeliest token alone, and so does a top_k of 1."""
    top_k, top_p = request.top_k or -1, _or(request.top_p, 1.0)
    if not 0 <= top_p <= 1:
        raise InvalidField("top_p", f"it is {top_p}; it must lie in [0, 1].")
    if top_p > 0:
        return top_k, top_p
    return (1 if top_k == -1 else min(top_k, 1)), 1.0


def check_max_tokens(field: str, value: int | None, unless: str = "") -> None:
    """unless: what else is allowed, and what that means."""
    if value is not None and value < 1:
        raise InvalidField(field, f"it is {value}; it must be at least 1{unless}.")


def check_top_logprobs(field: str, value: int | None) -> int:
    if value is not None and not 0 <= value <= LOGPROBS_MAX:
        raise InvalidField(field, f"it is {value}; allowed are 0 to {LOGPROBS_MAX}.")
    return value or 0


def check_stream_options(request: SamplingFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidField("stream_options", "they go only with stream.")


def includes_usage(request: SamplingFields) -> bool:
    """Whether a stream ends with what it used."""
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _check_grammar(grammar: str, request: SamplingFields) -> None:
    """A grammar says where an answer ends: there, and not before."""
    for name in ("ignore_eos", "min_tokens"):
        if grammar and getattr(request, name):
            raise InvalidField(name, "it does not go with response_format, grammar or a forced call.")


def _logit_bias(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for token, bias in (given or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise InvalidField("logit_bias", f"{token[:40]!r} is not a token id.")
        found[int(token)] = bias
    return tuple(found.items())


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
