"""Renders chat templates to the same bytes as transformers' `apply_chat_template`, without transformers.

A template comes with a model, from a third party: it runs in jinja2's immutable sandbox and sees only plain data.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tx_async.errors import InvalidRequest

TemplateMessage = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's reasoning may have; templates read the first, gpt-oss's template the second."""
CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = ("first probe", "second probe")


class Template:
    """One template, compiled."""

    def __init__(self, source: str):
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"This model's chat template is broken: {error}. Use completions.") from None

    def __repr__(self) -> str:
        return f"<Template of {len(self.source)} characters>"

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it can render a message whose content is a list of parts; others take only text."""
        parts = [{"type": "text", "text": text} for text in _PROBE]
        try:
            text = self.render([{"role": "user", "content": parts}], special_tokens={})
        except InvalidRequest:
            return False
        return all(probe in text for probe in _PROBE) and "'type'" not in text and '"type"' not in text

    def render(
        self,
        messages: Sequence[TemplateMessage],
        *,
        special_tokens: Mapping[str, str],
        tools: Sequence[dict[str, Any]] | None = None,
        continues: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. continues: the answer goes on where the last message ends. Raises `InvalidRequest` with the
        template's objection to the messages."""
        messages = [_with_reasoning(_without_none(message)) for message in messages]
        if continues:
            messages[-1] = messages[-1] | {"content": messages[-1]["content"] + CONTINUE_HERE}
        values = {**special_tokens, "documents": None, **(options or {})}
        values |= {"messages": messages, "tools": tools, "add_generation_prompt": not continues}
        try:
            text = self._template.render(values)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from None
        except Exception as error:  # a template is a program: it fails in its own ways
            raise InvalidRequest(
                f"messages: the model's chat template cannot render them ({type(error).__name__}: {error})."
            ) from None
        return _cut_where_it_goes_on(text, messages[-1]["content"]) if continues else text


def _without_none(message: TemplateMessage) -> TemplateMessage:
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(message: TemplateMessage) -> TemplateMessage:
    reasoning = next((message[field] for field in REASONING_FIELDS if message.get(field) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _cut_where_it_goes_on(text: str, content: str) -> str:
    said, mark = content.removesuffix(CONTINUE_HERE).strip(), CONTINUE_HERE.strip()
    if mark not in text or said not in text:
        raise InvalidRequest("messages: the model's chat template cannot go on with the last message.")
    place = text.rindex(mark)
    is_whole = text[place : place + len(CONTINUE_HERE)] == CONTINUE_HERE
    return text[:place] if is_whole else text[:place].rstrip()  # the template has trimmed the message


# ---- the sandbox


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks a model's output; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 the library's own form

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

    def _say(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _Dict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[str, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[str, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without a way to Python's insides."""

    def __init__(*args: Any, **values: Any):
        self, args = args[0], args[1:]
        attributes = dict(*args, **values)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter, it leaves <, > and & alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Sandbox(ImmutableSandboxedEnvironment):
    # jinja2 leaves the types of these open.
    filters: dict[str, Any]
    globals: dict[str, Any]


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
