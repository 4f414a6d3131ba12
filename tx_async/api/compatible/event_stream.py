"""Server-sent events: an answer that is sent while it grows."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import msgspec
from msgspec import Struct
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tx_async.api.compatible.samples import Samples
from tx_async.errors import TxError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
COMMENT = b": still waiting\n\n"

_encode = msgspec.json.Encoder().encode


def data_event(value: Struct) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def named_event(value: Struct) -> bytes:
    """An event of Anthropic's: its type is also its name."""
    name = str(type(value).__struct_config__.tag).encode()
    return b"event: " + name + b"\n" + data_event(value)


class EventStream(StreamingResponse):
    """A stream whose samples end with it, however that is: it was sent to its end, it failed, or its client left."""

    def __init__(
        self,
        samples: Samples,
        events: AsyncIterator[bytes],
        failed: Callable[[int, str], bytes],
        tell: Callable[[str], str],
    ):
        """failed: makes the event for an error from its status and message. tell: makes the text that clients see of a
        server failure."""
        self._samples, self._failed, self._tell = samples, failed, tell
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._guarded(events), media_type="text/event-stream", headers=headers)

    async def _guarded(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except TxError as error:
            message = error.message if error.category == "user" else self._tell(error.message)
            yield self._failed(error.status, message)
        except Exception:
            log.exception("A stream failed")
            yield self._failed(500, "The server failed on this request; its log says why. Try again.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._samples.close()
