"""When a sequence was admitted, began to decode and had its first token."""

from __future__ import annotations

from dataclasses import dataclass

from tx_async.wire.worker import SequenceTimes


@dataclass
class Times:
    """Times in monotonic seconds. No decision uses them: each host of a mesh has its own."""

    admitted_at: float = 0.0
    decode_began_at: float = 0.0
    """When the quantum that brought its first tokens began; 0 before."""
    first_token_at: float = 0.0

    def decoded(self, began_at: float, now: float) -> None:
        """Note that a quantum has brought tokens."""
        if not self.first_token_at:
            self.decode_began_at, self.first_token_at = max(began_at, self.admitted_at), now

    def until(self, now: float) -> SequenceTimes:
        """The times of a sequence whose last token has come."""
        return SequenceTimes(
            decode_began=1000 * (self.decode_began_at - self.admitted_at),
            first_token=1000 * (self.first_token_at - self.admitted_at),
            last_token=1000 * (now - self.admitted_at),
        )
