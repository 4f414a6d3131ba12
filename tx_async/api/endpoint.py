"""One route as an ASGI application: authenticate, decode, call the handler, encode; and every error as JSON."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tx_async.api import body, request_ids
from tx_async.api.context import Api, Call
from tx_async.api.errors import error_response, internal_error_response, json_response
from tx_async.api.owner import key_of, reached_at
from tx_async.errors import NotReady, Overloaded, TxError
from tx_async.wire import tinker

LEFTOVERS_S = 1.0
"""How long a request whose answer is known may take to send what is left of its body."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of the route table.

    A handler takes the call, and a struct when the endpoint is to decode the body for it; its annotations name that
    struct and the answer's. `request` names the body of handlers that decode it themselves: a struct, or a text about
    it.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    summary: str
    request: type[msgspec.Struct] | str | None = None
    public: bool = False
    """Whether it needs no API key."""
    media_types: tuple[str, ...] = ()
    """What it may answer other than JSON."""
    answer: type[msgspec.Struct] | None = None
    """What it answers, where the handler makes the response itself."""
    error: type[msgspec.Struct] = tinker.ErrorBody
    """What it answers when it fails."""

    @property
    def decodes(self) -> type[msgspec.Struct] | None:
        """What the endpoint decodes the body to before it calls the handler."""
        return get_type_hints(self.handler).get("request") if "request" in _parameters(self.handler) else None

    @property
    def response(self) -> type:
        """The struct of its JSON, where it has one."""
        annotation = get_type_hints(self.handler)["return"]
        return self.answer or next((kind for kind in get_args(annotation) if kind is not Response), annotation)


class Endpoint:
    def __init__(self, row: Row, api: Api):
        self.row = row
        self._api = api
        self._decodes = row.decodes

    def __repr__(self) -> str:
        return f"<Endpoint {self.row.method} {self.row.path}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        request_id = request_ids.begin(request.headers)
        scope.get("tx_async.route", []).append(self.row.path)
        try:
            response = await self._respond(request)
        except TxError as error:
            if error.category != "user":
                # "Try later" is no failure: a client that sends too much would fill the log with it.
                level = logging.DEBUG if isinstance(error, Overloaded | NotReady) else logging.WARNING
                logger.log(level, "%s %s failed: %s", self.row.method, self.row.path, error.message)
            response = error_response(error, self._api.redact, request.url.path)
        except ClientDisconnect:
            return
        except Exception:
            logger.exception("%s %s failed", self.row.method, self.row.path)
            response = internal_error_response(request.url.path)
        request_ids.show(response, request_id)
        if isinstance(response, StreamingResponse):  # it listens for the client's end itself
            await response(scope, receive, send)
            await _read_to_the_end(request)
        elif response.headers.get("connection") != "close" and await _read_to_the_end(request):
            await response(scope, receive, send)
        else:
            # A connection on which the rest of a body may still come cannot be used again, and its client must know.
            response.headers["connection"] = "close"
            # Both at once: sending does not end while the connection's reader waits for somebody to take its data.
            await asyncio.gather(response(scope, receive, send), _read_to_the_end(request))

    async def _respond(self, request: Request) -> Response:
        owner = "" if self.row.public else self._authenticate(request)
        async with self._api.bodies.hold(owner) as hold:
            call = Call(self._api, request, owner, hold)
            if self._decodes is None:
                answer = await self.row.handler(call)
            else:
                content = await body.read(request, body.CONTROL_BYTES_MAX, hold)
                decoded = body.decode_json(content, self._decodes, self._api.config.json_depth_max)
                hold.release()  # a long poll may follow
                answer = await self.row.handler(call, decoded)
        return answer if isinstance(answer, Response) else json_response(answer)

    def _authenticate(self, request: Request) -> str:
        return self._api.owners.authenticate(key_of(request.headers), reached_at(request.scope))


async def _read_to_the_end(request: Request) -> bool:
    """Read the rest of a body that is no longer wanted: the connection's reader waits until its data is taken. Returns
    whether that was all of it."""
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(LEFTOVERS_S):
            while not request._stream_consumed:  # no public name  # pyright: ignore[reportPrivateUsage]
                message = await request.receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
            return True
    return False


def _parameters(handler: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(handler).parameters)
