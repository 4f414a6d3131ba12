"""How much accepted, unfinished work there may be. Counters only: taking and giving back cost the same however much
there is."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from tx_async.config import ServerConfig
from tx_async.errors import Overloaded
from tx_async.wire.records import RequestRecord


class Share(Struct, frozen=True):
    """What one request counts."""

    owner: str
    num_bytes: int
    num_samples: int


class Quota:
    def __init__(self, config: ServerConfig):
        self.config = config
        #: accepted (or on their way to the journal) and unfinished, by request_id
        self._shares: dict[str, Share] = {}
        #: sums over them
        self.num_bytes = 0
        self.num_samples: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._shares)

    def check(self, request: RequestRecord) -> None:
        """Raises `Overloaded` when there is no room for the request."""
        if len(self._shares) >= self.config.queued_requests_max:
            raise Overloaded()
        if self.num_bytes + request.body_bytes > self.config.queued_bytes_max:
            raise Overloaded(
                "Too many bytes are queued (`queued_bytes_max`). Try again when some requests have finished."
            )
        samples = len(request.sample_sequence_ids)
        if samples and self.num_samples[request.owner] + samples > self.config.tenant_queued_samples_max:
            raise Overloaded(
                "This key has too many samples queued (`tenant_queued_samples_max`). Try again in a moment."
            )

    def take(self, request: RequestRecord) -> None:
        share = Share(request.owner, request.body_bytes, len(request.sample_sequence_ids))
        assert request.request_id not in self._shares
        self._shares[request.request_id] = share
        self.num_bytes += share.num_bytes
        self.num_samples[share.owner] += share.num_samples

    def give_back(self, request_id: str) -> None:
        """The request has ended, or was not accepted. Nothing happens the second time."""
        if share := self._shares.pop(request_id, None):
            self.num_bytes -= share.num_bytes
            self.num_samples[share.owner] -= share.num_samples
            if not self.num_samples[share.owner]:
                del self.num_samples[share.owner]
