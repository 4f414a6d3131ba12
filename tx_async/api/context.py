"""What every handler gets: the server's parts, and the call that it answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from tx_async.api.budget import Bodies, Hold
from tx_async.api.compatible.grammar_check import GrammarCheck
from tx_async.api.compatible.tokenizer import TokenizerLoader
from tx_async.api.gate import Gate
from tx_async.api.links import Links
from tx_async.api.owner import Owners, key_of
from tx_async.api.redaction import Redaction
from tx_async.clock import Clock
from tx_async.config import ServerConfig
from tx_async.dashboard.news import News
from tx_async.dashboard.viewer import Tokens
from tx_async.health import Health
from tx_async.scheduler.interface import SchedulerApi


class StoredFile(Protocol):
    @property
    def key(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...


class CheckpointFiles(Protocol):
    """The part of `storage.store.Store` that downloads need."""

    async def list(self, prefix: str) -> Sequence[StoredFile]:
        """Everything below `prefix/`, sorted by key."""
        ...

    def stream(self, key: str) -> AsyncIterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Api:
    scheduler: SchedulerApi
    config: ServerConfig
    clock: Clock
    files: CheckpointFiles
    owners: Owners
    links: Links
    health: Health | None
    gate: Gate
    redact: Redaction
    """Removes the server's paths and addresses from what tenants are told about a failure."""
    tokenizer_id: str
    """The folder or hub name that clients load the tokenizer from."""
    bodies: Bodies
    tokenizer: TokenizerLoader
    grammars: GrammarCheck
    news: News
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Call:
    api: Api
    request: Request
    owner: str
    hold: Hold
    """The bytes of the budget that its body takes."""

    @property
    def scheduler(self) -> SchedulerApi:
        return self.api.scheduler

    @property
    def key(self) -> str | None:
        return key_of(self.request.headers)

    @property
    def is_admin(self) -> bool:
        """Whether the key has the role admin, which may see what belongs to others. Nobody has it where there are no
        keys."""
        return self.api.owners.is_admin(self.key)

    def path(self, name: str) -> str:
        return self.request.path_params[name]

    def query(self, name: str, default: str = "") -> str:
        return self.request.query_params.get(name, default)

    def header(self, name: str, default: str = "") -> str:
        return self.request.headers.get(name, default)
