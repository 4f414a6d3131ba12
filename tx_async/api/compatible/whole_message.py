"""Llama 3's calls: the whole message is a JSON object, or several with `;` between them, perhaps after
`<|python_tag|>`."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tx_async.api.compatible.call_formats import call_of
from tx_async.api.compatible.parsing import Event, ParsedCall, Text, overlap

PYTHON_TAG = "<|python_tag|>"


class WholeMessageParser:
    def __init__(self, with_tools: bool):
        self._with_tools = with_tools
        #: text that may become a call; None once it is clear that the message is text
        self._held: str | None = "" if with_tools else None

    def feed(self, text: str) -> Iterator[Event]:
        if self._held is None:
            if text:
                yield Text(text)
            return
        self._held += text
        begin = self._held.lstrip()
        if begin and not begin.startswith(("{", PYTHON_TAG)) and overlap(begin, [PYTHON_TAG]) < len(begin):
            yield Text(self._held)
            self._held = None

    def finish(self) -> Iterator[Event]:
        held, self._held = self._held, None
        if held:
            yield from _calls(held) or [Text(held)]


def _calls(text: str) -> list[ParsedCall] | None:
    text = text.strip().removeprefix(PYTHON_TAG).strip()
    calls: list[ParsedCall] = []
    while text:
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        if (call := call_of(value)) is None:
            return None
        calls.append(call)
        text = text[end:].strip().removeprefix(";").strip()
    return calls
