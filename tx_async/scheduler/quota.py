"""How much accepted, unfinished work there may be, and how much of it one key may have. It only counts: taking and
giving back cost the same however much work there is."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from tx_async.config import ServerConfig
from tx_async.errors import Overloaded
from tx_async.scheduler.core.holdings import Holdings
from tx_async.wire.records import (
    ModelRecord,
    RequestRecord,
    SamplerRecord,
    SessionRecord,
    encode_record,
    type_of,
)

UNSHARED_REQUESTS = 4
"""A key may always have this many requests in a queue that has room."""
UNSHARED_BYTES = 2**20


class Queue:
    """How much of one limit (requests, or their bytes) is in use, and by whom.

    All keys together stay within the limit, and there is always room for a newcomer. A key may have as much as it
    leaves free. Beyond that it may have up to an equal part, counting all keys that have something queued and one that
    may come, as long as half a part stays free.
    """

    def __init__(self, limit: int, unshared: int):
        self.limit = limit
        self.unshared = unshared
        self.total = 0
        #: owner -> its part; without zeros
        self.parts: Counter[str] = Counter()

    def is_full(self, amount: int) -> bool:
        return self.total + amount > self.limit

    def exceeds_share(self, owner: str, amount: int) -> bool:
        part, free = self.parts[owner] + amount, self.limit - self.total - amount
        if part <= max(self.unshared, free):
            return False
        equal = self.limit // (len(self.parts) + (owner not in self.parts) + 1)
        return part > equal or free < equal // 2

    def add(self, owner: str, amount: int) -> None:
        self.total += amount
        if part := self.parts[owner] + amount:
            self.parts[owner] = part
        else:
            del self.parts[owner]


class Share(Struct, frozen=True):
    """What one request counts towards the limits."""

    owner: str
    num_bytes: int
    num_samples: int


class Quota:
    def __init__(self, config: ServerConfig):
        self.config = config
        #: accepted (or on their way to the journal) and unfinished, by request_id
        self._shares: dict[str, Share] = {}
        #: their sums
        self.requests = Queue(config.queued_requests_max, UNSHARED_REQUESTS)
        self.bytes = Queue(config.queued_bytes_max, UNSHARED_BYTES)
        self.num_samples: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._shares)

    @property
    def num_bytes(self) -> int:
        return self.bytes.total

    def check(self, request: RequestRecord) -> None:
        """Raises `Overloaded` when there is no room for the request."""
        for queue, amount, what in (
            (self.requests, 1, "requests are queued (`queued_requests_max`)"),
            (self.bytes, request.body_bytes, "bytes are queued (`queued_bytes_max`)"),
        ):
            if queue.is_full(amount):
                raise Overloaded(f"Too many {what}. Try again when some requests have finished.")
            if queue.exceeds_share(request.owner, amount):
                raise Overloaded(f"Too many {what} by this key: the rest is for others. Try again in a moment.")
        samples = len(request.sample_sequence_ids)
        if samples and self.num_samples[request.owner] + samples > self.config.tenant_queued_samples_max:
            raise Overloaded(
                "This key has too many samples queued (`tenant_queued_samples_max`). Try again in a moment."
            )

    def check_record(self, holdings: Holdings, record: SessionRecord | ModelRecord | SamplerRecord) -> None:
        """Raises `Overloaded` when its owner has made as many as a key may have."""
        self.check_number(holdings, record.owner, type_of(record))
        bytes_max = self.config.tenant_records_bytes_max
        if holdings.num_bytes[record.owner] + len(encode_record(record)) > bytes_max:
            raise Overloaded(
                f"The sessions, models and samplers of this key take {bytes_max} bytes, as many as they may "
                "(`tenant_records_bytes_max`)."
            )

    def check_number(self, holdings: Holdings, owner: str, table: str) -> None:
        limit = f"tenant_{table}s_max"
        if holdings.numbers[owner, table] >= getattr(self.config, limit):
            raise Overloaded(f"This key has {getattr(self.config, limit)} {table}s, as many as it may (`{limit}`).")

    def take(self, request: RequestRecord) -> None:
        share = Share(request.owner, request.body_bytes, len(request.sample_sequence_ids))
        assert request.request_id not in self._shares
        self._shares[request.request_id] = share
        self._count(share, 1)

    def give_back(self, request_id: str) -> None:
        """The request has ended, or was not accepted. A second call does nothing."""
        if share := self._shares.pop(request_id, None):
            self._count(share, -1)

    def _count(self, share: Share, sign: int) -> None:
        self.requests.add(share.owner, sign)
        self.bytes.add(share.owner, sign * share.num_bytes)
        if share.num_samples:
            self.num_samples[share.owner] += sign * share.num_samples
            if not self.num_samples[share.owner]:
                del self.num_samples[share.owner]
