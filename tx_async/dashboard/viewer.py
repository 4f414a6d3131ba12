"""The viewers of the page, and what they may see and do.

Where there are keys the page asks for one, keeps it in the tab (`sessionStorage`) and sends it as `X-API-Key` with
every request: there is no cookie that a page from elsewhere could make a browser send. Where there are none, whoever
sits at this machine sees everything, as with `/metrics`; a browser there sends requests on behalf of any page, so
everything that changes something wants a token which only the page itself can read.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from msgspec import Struct

from tx_async.errors import Forbidden

if TYPE_CHECKING:
    from tx_async.api.context import Call

TOKEN_HEADER = "x-dashboard-token"


class Viewer(Struct, frozen=True):
    owner: str
    name: str
    sees_all: bool
    has_key: bool
    """The server has keys, and this is the owner of one."""

    def sees(self, owner: str) -> bool:
        return self.sees_all or owner == self.owner

    @classmethod
    def of(cls, call: Call) -> Viewer:
        """The viewer behind an authenticated call."""
        key = call.api.owners.find(call.key)
        if key is not None:
            return cls(call.owner, key.name, key.role == "admin", True)
        return cls(call.owner, "", call.api.gate.is_local(call.request.scope), False)


class Tokens:
    """Signs with a secret of this process: after a restart the page asks for a new one."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def token(self, viewer: Viewer) -> str:
        return hmac.digest(self._secret, viewer.owner.encode(), hashlib.sha256).hex()

    def check(self, call: Call, viewer: Viewer) -> None:
        """Raises `Forbidden` for a request that the page itself has not sent."""
        origin, host = call.header("origin"), call.header("host")
        is_foreign = bool(origin) and urlsplit(origin).netloc.lower() != host.lower()
        if is_foreign or call.header("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Forbidden("This can only be done from the server's own page.")
        if not hmac.compare_digest(call.header(TOKEN_HEADER).encode(), self.token(viewer).encode()):
            raise Forbidden("The page is older than the server: load it again, then try once more.")
