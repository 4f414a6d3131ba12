"""The gate before every route: which proxies are trusted, and which Host names and Origins are answered.

A server without keys trusts whoever reaches its loopback address. A browser on this machine reaches it as well, on
behalf of any page: directly (the page's Origin shows it), or under a host name that the page's owner has pointed to
127.0.0.1 (the Host header shows it). Both are refused, unless the operator has named them. A server with keys needs
none of this: a page cannot send a key that it does not know.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tx_async.api import request_ids
from tx_async.api.errors import error_response
from tx_async.api.owner import is_loopback
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError, Forbidden

ANY = "*"
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
"""Headers that only a proxy sends."""
_SCHEMES = ("http", "https")


class Gate:
    """The rules, from the settings. Raises `ConfigError` for a `trusted_proxies` that is not an address."""

    def __init__(self, config: ServerConfig):
        self._is_open = bool(config.api_keys_file)
        self._hosts = _listed(config.allowed_hosts)
        self._origins = _listed(config.allowed_origins)
        self._proxies = [_network(text) for text in _listed(config.trusted_proxies)]

    def __repr__(self) -> str:
        return f"<Gate [{'keys' if self._is_open else 'loopback names only'} | {len(self._proxies)} proxies]>"

    def check(self, scope: Scope) -> None:
        """Raises `Forbidden` for a request that some page has made a browser send."""
        for name, value in () if self._is_open else scope["headers"]:
            if name == b"host" and not self._answers_to(value.decode("latin-1")):
                raise Forbidden(
                    "This server has no API keys and answers to names of loopback only: call it by 127.0.0.1 or "
                    "localhost, or let its operator name this host in allowed_hosts."
                )
            if name == b"origin" and not self._accepts(value.decode("latin-1")):
                raise Forbidden(
                    "This server has no API keys and takes no requests from other origins; its operator may name "
                    "this page's origin in allowed_origins."
                )

    def _answers_to(self, host: str) -> bool:
        name = _host_name(host)
        return ANY in self._hosts or _is_loopback_name(name) or name in self._hosts

    def _accepts(self, origin: str) -> bool:
        if ANY in self._origins or origin.lower().rstrip("/") in self._origins:
            return True
        scheme, _, host = origin.partition("://")
        return scheme.lower() in _SCHEMES and _is_loopback_name(_host_name(host))

    def believe(self, scope: Scope) -> Scope:
        """The request as the client sent it to a trusted proxy; as it came where none is trusted."""
        if not self._proxies or not self.is_trusted(_client_of(scope)):
            return scope
        headers = Headers(scope=scope)
        scope = dict(scope)
        if (scheme := _last(headers, "x-forwarded-proto").lower()) in _SCHEMES:
            scope["scheme"] = scheme
        if host := _last(headers, "x-forwarded-host"):
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [*others, (b"host", host.encode("latin-1"))]
        return scope

    def is_trusted(self, client: str) -> bool:
        try:
            address = ipaddress.ip_address(client)
        except ValueError:
            return False
        return any(address in network for network in self._proxies)

    def is_local(self, scope: Scope) -> bool:
        """Whether it was sent on this machine, and not through a proxy for somebody else."""
        client, headers = _client_of(scope), Headers(scope=scope)
        return (
            (not client or is_loopback(client))
            and not self.is_trusted(client)
            and not any(name in headers for name in FORWARDED)
            and all(_is_loopback_name(_host_name(host)) for host in headers.getlist("host"))
        )


class GateMiddleware:
    """Starlette middleware before every route; the app's `state.gate` has the rules once it has started."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            gate: Gate = scope["app"].state.gate
            scope = gate.believe(scope)
            try:
                gate.check(scope)
            except Forbidden as error:
                request_id = request_ids.begin(Headers(scope=scope))
                response = error_response(error, path=scope["path"])
                await request_ids.show(response, request_id)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _listed(text: str) -> list[str]:
    return [part.strip().lower().rstrip("/") for part in text.split(",") if part.strip()]


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"trusted_proxies: {text!r} is not an address or network, like 10.0.0.7 or 10.0.0.0/8."
        ) from error


def _host_name(host: str) -> str:
    """The host's name without the port; "" for text that is not a host."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_loopback_name(name: str) -> bool:
    return is_loopback(name) or name.endswith(".localhost")


def _client_of(scope: Scope) -> str:
    return (scope.get("client") or ("", 0))[0] or ""


def _last(headers: Headers, name: str) -> str:
    """The value that the nearest proxy wrote: earlier values may be the client's own."""
    values: Iterable[str] = headers.getlist(name)
    return ",".join(values).rpartition(",")[2].strip()
