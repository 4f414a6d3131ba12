"""vLLM's dialect of HTTP: `/v1/completions` by token ids, adapters by name, health. Written against vLLM 0.32.

Every sampling parameter is sent, whatever its value: vLLM takes those that a request leaves out from the model's
`generation_config.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, TypeVar

import httpx
import msgspec
import numpy as np
from msgspec import Meta, Struct

from tx_async.wire.results import EMPTY_LOGPROB
from tx_async.wire.worker import GREEDY_BELOW, SamplingLimits, SequenceSpec
from tx_async.worker.dialect import (
    CompletionPart,
    EncodedPrompt,
    EngineCompletion,
    OnPart,
    RejectedByEngine,
    Served,
    Unreachable,
)

TESTED_VERSION = "0.32"
TEMPERATURE_MIN = 0.01
"""vLLM silently raises smaller temperatures to this."""
TEMPERATURE_MAX = 2.0
TOPK_LOGPROBS_MAX = 128
"""The most that this server's API allows; `--max-logprobs` may be less."""
STOP_STRINGS_MAX = 4
CONNECT_S = 5.0
ANSWER_S = 20.0
"""Time for all calls but loads and samples, which take as long as they take: the watch notices when nothing moves."""
MESSAGE_CHARACTERS_MAX = 300
T = TypeVar("T")

COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


# One line for every request would drown everything else in a worker's log.
logging.getLogger("httpx").setLevel(logging.WARNING)


class _Logprobs(Struct):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Choice(Struct):
    finish_reason: str
    token_ids: list[int]
    logprobs: _Logprobs


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens_details: _PromptDetails | None = None


class _Metrics(Struct):
    generation_time_ms: float | None = None


class _Answer(Struct):
    choices: Annotated[list[_Choice], Meta(min_length=1)]
    usage: _Usage
    metrics: _Metrics | None = None
    """Of vLLM 0.25 and later with --enable-per-request-metrics."""


class _StreamedChoice(Struct):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None


class _Chunk(Struct):
    """One event of a stream: a choice with the tokens since the last one, at the end the usage alone, or an error."""

    choices: list[_StreamedChoice] = []
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: dict[str, Any] | None = None


class _Model(Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(Struct):
    data: list[_Model]


class _Version(Struct):
    version: str


_answers = msgspec.json.Decoder(_Answer)
_chunks = msgspec.json.Decoder(_Chunk)
_models = msgspec.json.Decoder(_Models)
_versions = msgspec.json.Decoder(_Version)


class VllmHttp:
    """Implements `dialect.Dialect`."""

    product = "vLLM"
    how_to_load_adapters = (
        "Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it can read that folder."
    )
    limits = SamplingLimits(
        temperature_min=TEMPERATURE_MIN,
        temperature_max=TEMPERATURE_MAX,
        topk_logprobs_max=TOPK_LOGPROBS_MAX,
        stop_strings_max=STOP_STRINGS_MAX,
    )

    def __init__(self, url: str, api_key: str = ""):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    # ---- what it is

    async def version(self) -> str:
        return _decoded(_versions, await self._get("/version")).version

    def why_untested(self, version: str) -> str:
        if version.startswith(f"{TESTED_VERSION}."):
            return ""
        return f"vLLM {version} was not tested, {TESTED_VERSION} was"

    async def check_health(self) -> None:
        await self._get("/health")

    async def served(self) -> Served:
        models = _decoded(_models, await self._get("/v1/models")).data
        base = next((model for model in models if model.parent is None and model.max_model_len), None)
        if base is None:
            raise RejectedByEngine(404, "no base model is served")
        adapters = {model.id: model.root or "" for model in models if model is not base and model.parent is not None}
        return Served(base.id, base.root or base.id, base.max_model_len or 0, adapters)

    async def num_tokens(self) -> float | None:
        lines = (await self._get("/metrics")).decode(errors="replace").splitlines()
        counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(COUNTERS)]
        return sum(counts) if counts else None

    # ---- adapters

    async def load_adapter(self, name: str, folder: str) -> None:
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    async def unload_adapter(self, name: str) -> None:
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    # ---- samples

    async def complete(
        self, model: str, prompt: EncodedPrompt, spec: SequenceSpec, on_part: OnPart | None = None
    ) -> EngineCompletion:
        prompt.encoded = prompt.encoded or msgspec.json.encode(prompt.tokens)
        body = completion_request(model, spec) | {"prompt": msgspec.Raw(prompt.encoded)}
        if on_part is None:
            return _completion(_decoded(_answers, await self._post("/v1/completions", body)), spec)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = _Answer([_Choice("", [], _Logprobs([], []))], _Usage())
        async for chunk in self._stream("/v1/completions", body):
            if part := _extended(answer, chunk, spec):
                on_part(part)
        if not answer.choices[0].finish_reason:
            raise Unreachable("a stream broke off")
        return _completion(answer, spec)

    # ---- HTTP

    async def _get(self, path: str) -> bytes:
        return await self._ask("GET", path, None, ANSWER_S)

    async def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return await self._ask("POST", path, msgspec.json.encode(body), None)

    async def _ask(self, method: str, path: str, content: bytes | None, answer_s: float | None) -> bytes:
        async with self._answered(method, path, content, answer_s) as response:
            return await response.aread()

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[_Chunk, None]:
        async with self._answered("POST", path, msgspec.json.encode(body), None) as response:
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk = _decoded(_chunks, data)
                if chunk.error:
                    raise RejectedByEngine(500, _cut(chunk.error.get("message")))
                yield chunk

    @contextlib.asynccontextmanager
    async def _answered(
        self, method: str, path: str, content: bytes | None, answer_s: float | None
    ) -> AsyncGenerator[httpx.Response, None]:
        """A response whose head has come, and is no refusal. What goes wrong while its body is read is raised alike."""
        headers = {"Content-Type": "application/json"} if content else {}
        timeout = httpx.Timeout(answer_s, connect=CONNECT_S)
        try:
            async with self._client.stream(method, path, content=content, headers=headers, timeout=timeout) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise RejectedByEngine(response.status_code, _message(response))
                yield response
        except httpx.TimeoutException as error:
            raise Unreachable(f"{path} was not answered in time") from error
        except httpx.HTTPError as error:
            raise Unreachable(f"{path}: {str(error) or type(error).__name__}") from error


def completion_request(model: str, spec: SequenceSpec) -> dict[str, Any]:
    """The body of `/v1/completions` except its prompt. End-of-sequence tokens are among the stop tokens, so vLLM's own
    are ignored."""
    return {
        "model": model,
        "n": 1,
        "max_tokens": spec.max_tokens,
        "temperature": 0.0 if spec.temperature < GREEDY_BELOW else spec.temperature,
        "top_k": max(spec.top_k, 0),
        "top_p": spec.top_p,
        "min_p": spec.min_p,
        "repetition_penalty": spec.repetition_penalty,
        "presence_penalty": spec.presence_penalty,
        "frequency_penalty": spec.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in spec.logit_bias} or None,
        "min_tokens": spec.min_tokens,
        "seed": seed_of(spec.seed, spec.sample_index),
        "cache_salt": _salt_of(spec.adapter_version),
        "stop": list(spec.stop_strings),
        "stop_token_ids": list(spec.stop_token_ids),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": max(spec.topk_logprobs, spec.head_tokens),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _salt_of(namespace: str) -> str | None:
    """Tenants share no prefix in vLLM's cache, either."""
    return hashlib.blake2b(namespace.encode(), digest_size=16).hexdigest() if namespace else None


def seed_of(seed: int, index: int) -> int:
    """63 bits that depend on both: sample i of a request draws from its own stream, the same after every restart."""
    digest = hashlib.blake2b(b"%d %d" % (seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _extended(answer: _Answer, chunk: _Chunk, spec: SequenceSpec) -> CompletionPart | None:
    """Add what a stream says next to `answer`; -> the new tokens, where it adds some."""
    answer.usage, answer.metrics = chunk.usage or answer.usage, chunk.metrics or answer.metrics
    if not chunk.choices:
        return None
    whole, new = answer.choices[0], chunk.choices[0]
    start = len(whole.token_ids)
    whole.token_ids += new.token_ids
    whole.logprobs.token_logprobs += new.logprobs.token_logprobs
    whole.logprobs.top_logprobs += new.logprobs.top_logprobs
    whole.finish_reason = new.finish_reason or ""
    if not new.token_ids or new.finish_reason:
        return None
    return CompletionPart(
        start,
        np.array(new.token_ids, np.int32),
        np.array(new.logprobs.token_logprobs, np.float32),
        *_topk(new.logprobs.top_logprobs, spec.topk_logprobs),
    )


def _completion(answer: _Answer, spec: SequenceSpec) -> EngineCompletion:
    choice = answer.choices[0]
    if choice.finish_reason not in ("stop", "length"):
        raise RejectedByEngine(500, f"a sample ended with finish_reason {choice.finish_reason!r}")
    ids, values = _topk(choice.logprobs.top_logprobs, spec.topk_logprobs)
    head_ids, head_values = _topk(choice.logprobs.top_logprobs, spec.head_tokens)
    details = answer.usage.prompt_tokens_details
    return EngineCompletion(
        stop_reason=choice.finish_reason,  # type: ignore[arg-type]
        tokens=np.array(choice.token_ids, np.int32),
        logprobs=np.array(choice.logprobs.token_logprobs, np.float32),
        topk_token_ids=ids,
        topk_logprobs=values,
        head_token_ids=head_ids,
        head_probabilities=None if head_values is None else np.exp(head_values),
        num_cached_tokens=(details.cached_tokens or 0) if details else 0,
        generation_ms=answer.metrics.generation_time_ms if answer.metrics else None,
    )


def _topk(positions: Sequence[dict[str, float]], k: int) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """int32 and float32 [T, k], best first; None where none were asked for. Each position lists the sampled token
    too, where it is not among them."""
    if not k:
        return None, None
    ids = np.zeros((len(positions), k), np.int32)
    values = np.full((len(positions), k), EMPTY_LOGPROB, np.float32)
    for row, candidates in enumerate(positions):
        best = sorted((-logprob, int(token.removeprefix("token_id:"))) for token, logprob in candidates.items())[:k]
        ids[row, : len(best)] = [token for _, token in best]
        values[row, : len(best)] = [-logprob for logprob, _ in best]
    return ids, values


def _decoded(decoder: msgspec.json.Decoder[T], content: bytes | str) -> T:
    """Whatever listens there answers, and it may not be vLLM."""
    try:
        return decoder.decode(content)
    except msgspec.MsgspecError as error:
        raise RejectedByEngine(502, f"this is no answer of vLLM's: {error}") from None


def _message(response: httpx.Response) -> str:
    try:
        body = msgspec.json.decode(response.content)
        text = body["error"]["message"] if "error" in body else body["detail"]
    except (msgspec.DecodeError, KeyError, TypeError):
        text = response.text
    return _cut(text)


def _cut(text: object) -> str:
    return " ".join(str(text).split())[:MESSAGE_CHARACTERS_MAX]
