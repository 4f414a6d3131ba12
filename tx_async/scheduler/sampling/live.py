"""Live requests: sample jobs whose tokens go piece by piece to a waiting client. Nothing about them is journaled.

When a worker dies, a sample runs again from its seed, and tokens that were sent are not sent twice. If the second run
gives other tokens (an accelerator rounds differently in another batch), the request ends and says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from tx_async.errors import ServerError
from tx_async.scheduler.core.fairness import Flow
from tx_async.scheduler.interface import LivePiece
from tx_async.scheduler.sampling.jobs import SampleJob
from tx_async.wire.results import SampledSequence, TopkLogprobs
from tx_async.wire.worker import SequencePiece

LIVE = "live"
"""Takes the client session's place in the flow of a live request: one class of work beside all others."""
TOKEN_BYTES = 4


def is_live(flow: Flow) -> bool:
    return flow[1] == LIVE


class LiveJob(SampleJob, eq=False, kw_only=True):
    told: dict[int, bytes] = msgspec.field(default_factory=dict[int, bytes])
    """Sample index -> its tokens that were sent."""

    @property
    def is_watched(self) -> bool:
        return True

    def piece(self, index: int, piece: SequencePiece, tensors: Sequence[np.ndarray]) -> LivePiece | None:
        """The tokens that a quantum brought, without those that were sent before; None when there are no others. Raises
        `ServerError` when they differ from those that were sent."""
        topk = None
        if piece.topk_token_ids_index >= 0:
            topk = TopkLogprobs.of(tensors[piece.topk_token_ids_index], tensors[piece.topk_logprobs_index])
        tokens = tensors[piece.tokens_index].astype(np.int32).tobytes()
        logprobs = tensors[piece.logprobs_index].astype(np.float32).tobytes()
        new = self._news(index, piece.start * TOKEN_BYTES, SampledSequence(tokens, logprobs, "length", topk))
        return new if new.tokens else None

    def last_piece(self, index: int) -> LivePiece:
        """The unsent tokens of a sample that has ended. Raises like `piece`."""
        sequence = self.done[index]
        prompt = dict(self.prompt) if index == 0 else {}
        prompt.pop("prompt_cache_hit_tokens", None)
        return msgspec.structs.replace(
            self._news(index, 0, sequence),
            stop_reason=sequence.stop_reason,
            cached_tokens=self.cached[index],
            prompt=prompt,
        )

    def _news(self, index: int, start: int, sequence: SampledSequence) -> LivePiece:
        """`sequence` stands at byte `start` of the answer's tokens."""
        told = self.told.get(index, b"")
        known = len(told) - start
        if known < 0 or told[start : start + len(sequence.tokens)] != sequence.tokens[:known]:
            raise ServerError("The answer was interrupted, and would go on differently.")
        topk = sequence.topk
        if topk is not None:
            row = known * topk.k
            topk = TopkLogprobs(topk.token_ids[row:], topk.logprobs[row:], topk.k)
        news = LivePiece(index=index, tokens=sequence.tokens[known:], logprobs=sequence.logprobs[known:], topk=topk)
        self.told[index] = told + news.tokens
        return news
