"""gpt-oss's channels: analysis is reasoning, final is the answer, commentary to a function is a call.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json
<|message|>{…}<|call|>`
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tx_async.api.compatible.call_formats import call_of
from tx_async.api.compatible.parsing import Event, Reasoning, Text, overlap

MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
MARKS = (MESSAGE, *ENDS, "<|channel|>", "<|constrain|>")
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


class HarmonyParser:
    def __init__(self, with_tools: bool):
        self._with_tools = with_tools
        self._buffer = ""
        #: the channel of the message being read; None while its head is read
        self._channel: str | None = None
        self._function = ""
        self._body = ""

    def feed(self, text: str) -> Iterator[Event]:
        self._buffer += text
        goes_on = True
        while goes_on:
            if self._channel is None:
                goes_on = self._read_head()
            else:
                before, end = self._until_end()
                yield from self._say(before)
                if goes_on := bool(end):
                    yield from self._end()

    def _read_head(self) -> bool:
        head, found, rest = self._buffer.partition(MESSAGE)
        if not found:
            return False
        recipient = _RECIPIENT.search(head)
        self._function = recipient[1] if recipient and self._with_tools else ""
        channel = head.partition("<|channel|>")[2]
        self._channel = (re.findall(r"\w+", channel) or ["final"])[0]
        self._buffer, self._body = rest, ""
        return True

    def _until_end(self) -> tuple[str, str]:
        found = [(place, mark) for mark in ENDS if (place := self._buffer.find(mark)) >= 0]
        if found:
            place, mark = min(found)
            before, self._buffer = self._buffer[:place], self._buffer[place + len(mark) :]
            return before, mark
        kept = len(self._buffer) - overlap(self._buffer, list(ENDS))
        before, self._buffer = self._buffer[:kept], self._buffer[kept:]
        return before, ""

    def _say(self, text: str) -> Iterator[Event]:
        if self._function:
            self._body += text
        elif text:
            yield Reasoning(text) if self._channel == "analysis" else Text(text)

    def _end(self) -> Iterator[Event]:
        if self._function:
            yield call_of({"name": self._function, "arguments": self._body or "{}"}) or Text(self._body)
        self._channel, self._function = None, ""

    def finish(self) -> Iterator[Event]:
        rest, self._buffer = self._buffer, ""
        if self._channel is not None:
            yield from self._say(rest)
            yield from self._end()
        elif rest and "<|channel|>" not in rest and rest.strip() not in ("", "assistant"):
            yield Text(rest)  # the model does not keep to its format
