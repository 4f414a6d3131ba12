"""What an external inference engine must be able to say over HTTP, apart from how it says it.

`external.py` is the worker and knows no HTTP; `vllm_http.py` speaks vLLM's HTTP and knows no worker. Another engine
with the same kind of interface is one more file like that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from tx_async.wire.worker import SamplingLimits, SequenceSpec


class Unreachable(Exception):
    """The engine did not answer: the connection failed or broke, or timed out."""


class RejectedByEngine(Exception):
    """The engine answered with a refusal. `status` is the HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message

    @property
    def is_unknown_model(self) -> bool:
        return self.status == 404

    @property
    def is_failure(self) -> bool:
        """True when the fault is the engine's, not the request's."""
        return self.status >= 500


@dataclass(frozen=True)
class Served:
    """What the engine serves, by its own account."""

    name: str
    """The base model's name in requests."""
    root: str
    """The folder or hub name that it was loaded from."""
    max_context_length: int
    adapters: dict[str, str]
    """Name -> folder."""


@dataclass(frozen=True)
class EngineCompletion:
    """One sampled sequence."""

    stop_reason: Literal["stop", "length"]
    tokens: np.ndarray
    """int32 [T]"""
    logprobs: np.ndarray
    """float32 [T], of the untempered model."""
    topk_token_ids: np.ndarray | None
    topk_logprobs: np.ndarray | None
    """int32 / float32 [T, k], best first."""
    head_token_ids: np.ndarray | None
    head_probabilities: np.ndarray | None
    """int32 / float32 [T, head_tokens], likeliest first; only of untempered sequences without top-k and top-p."""
    num_cached_tokens: int
    generation_ms: float | None = None
    """From its first token to its last; None where the engine does not say."""


@dataclass(frozen=True)
class CompletionPart:
    """What the engine has added to a watched sequence, as in `EngineCompletion`."""

    start: int
    """How many tokens come before these."""
    tokens: np.ndarray
    logprobs: np.ndarray
    topk_token_ids: np.ndarray | None
    topk_logprobs: np.ndarray | None


OnPart = Callable[[CompletionPart], None]


class Dialect(Protocol):
    """Every call raises `Unreachable` or `RejectedByEngine`. All run on one event loop; a call that is cancelled closes
    its connection, which ends what the engine does for it."""

    url: str
    product: str
    """For messages: "vLLM"."""
    how_to_load_adapters: str
    """What an operator must do so that the engine loads adapters."""
    limits: SamplingLimits
    """Limits of every engine of this kind; `topk_logprobs_max` is the most that is worth asking for."""

    async def version(self) -> str: ...

    def why_untested(self, version: str) -> str:
        """What to tell the operator; "" for a version that this dialect was tested with."""
        ...

    async def check_health(self) -> None: ...

    async def served(self) -> Served: ...

    async def num_tokens(self) -> float | None:
        """Tokens that the engine has computed since its start, to tell slow from stuck; None when it does not count
        them."""
        ...

    async def load_adapter(self, name: str, folder: str) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def complete(
        self, model: str, prompt: EncodedPrompt, spec: SequenceSpec, on_part: OnPart | None = None
    ) -> EngineCompletion:
        """`on_part` is told what has come while there is more to come; the completion has all of it again."""
        ...

    async def close(self) -> None: ...


class EncodedPrompt:
    """A prompt's tokens, encoded once for all its samples."""

    def __init__(self, tokens: np.ndarray):
        self.tokens: list[int] = tokens.tolist()
        #: as the dialect writes it; made by whoever needs it first
        self.encoded: bytes | None = None

    def __len__(self) -> int:
        return len(self.tokens)
