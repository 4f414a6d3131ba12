"""Turns Anthropic's messages and tools into OpenAI's, so that both take one way to the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tx_async.api.compatible.constraints import ForcedCall, check_tools, named_choice
from tx_async.api.compatible.conversation import CallWords, OpenCalls, text_of_part
from tx_async.api.compatible.fields import InvalidField, named
from tx_async.api.compatible.prompts import Chat
from tx_async.wire import anthropic, openai

FAILED = "Error: "
"""Put before a tool's result that has is_error."""
_WORDS = CallWords(
    "a tool_result must have the tool_use_id of a tool_use in the assistant's message before it.",
    "the tool_use {calls}{before} has no tool_result.",
)
_NOT_SERVED = ("image", "document", "search_result", "redacted_thinking", "server_tool_use", "web_search_tool_result")


def chat_of(request: anthropic.CountTokensRequest) -> Chat:
    """Raises `InvalidField` for a request that makes no sense, or asks for something not served."""
    if not request.messages:
        raise InvalidField("messages", "there are none. Send at least one.")
    if request.messages[0].role != "user":
        raise InvalidField("messages[0]", "the first message must be the user's.")
    messages = _system(request.system)
    calls = OpenCalls(_WORDS)
    for i, message in enumerate(request.messages):
        for made in _messages(message, f"messages[{i}]"):
            calls.follow(made, f"messages[{i}]")
            messages.append(made)
    calls.end()
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())]
    choice = request.tool_choice.type if request.tool_choice is not None else None
    tool_choice(request, tools)
    options, required = _thinking(request.thinking)
    continues = request.messages[-1].role == "assistant"
    if continues and not messages[-1].content:
        raise InvalidField("messages", "the last message must be the user's, or text for the answer to go on with.")
    return Chat(messages, () if choice == "none" else tools, options, required, continues)


def tool_choice(request: anthropic.CountTokensRequest, tools: Sequence[dict[str, Any]]) -> ForcedCall:
    """tools: the request's, in OpenAI's form. Raises `InvalidField`."""
    given = request.tool_choice
    if given is None or given.type == "none":
        return ForcedCall()
    if given.type == "tool":
        if not given.name:
            raise InvalidField("tool_choice.name", "it is missing.")
        return named_choice(given.name, tools)
    check_tools(True, tools)
    return ForcedCall(is_forced=given.type == "any")


def _system(system: str | list[dict[str, Any]] | None) -> list[openai.ChatMessage]:
    if not system:
        return []
    if isinstance(system, list):
        system = "\n".join(text_of_part(part, f"system[{i}]") for i, part in enumerate(system))
    return [openai.ChatMessage(role="system", content=system)]


def _messages(message: anthropic.Message, where: str) -> list[openai.ChatMessage]:
    """The OpenAI messages of one message: several when it has results of tools."""
    if isinstance(message.content, str):
        return [openai.ChatMessage(role=message.role, content=message.content)]
    if not message.content:
        raise InvalidField(f"{where}.content", "it is empty.")
    blocks = [_block(block, message.role, f"{where}.content[{i}]") for i, block in enumerate(message.content)]
    results = [
        _result(block, f"{where}.content[{i}]")
        for i, block in enumerate(blocks)
        if isinstance(block, anthropic.ToolResultBlock)
    ]
    texts = [{"type": "text", "text": block.text} for block in blocks if isinstance(block, anthropic.TextBlock)]
    if message.role == "assistant":
        return [_assistant(blocks, texts)]
    return [*results, *([openai.ChatMessage(role="user", content=_one_or_all(texts))] if texts else [])]


def _assistant(blocks: Sequence[anthropic.ContentBlock], texts: list[dict[str, Any]]) -> openai.ChatMessage:
    calls = [
        openai.ToolCall(id=block.id, function=openai.FunctionCall(name=block.name, arguments=block.input))
        for block in blocks
        if isinstance(block, anthropic.ToolUseBlock)
    ]
    thoughts = [block.thinking for block in blocks if isinstance(block, anthropic.ThinkingBlock)]
    return openai.ChatMessage(
        role="assistant",
        content="\n".join(part["text"] for part in texts) if texts else (None if calls else ""),
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) if thoughts else None,
    )


def _one_or_all(texts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    return texts[0]["text"] if len(texts) == 1 else texts


def _block(block: dict[str, Any], role: str, where: str) -> anthropic.ContentBlock:
    kind = block.get("type")
    if kind in _NOT_SERVED:
        raise InvalidField(where, f"{kind}: only text and tools are served here.")
    try:
        found = msgspec.convert(block, anthropic.ContentBlock)
    except msgspec.ValidationError as error:
        raise named(str(error), where) from None
    if role == "user" and isinstance(found, anthropic.ToolUseBlock | anthropic.ThinkingBlock):
        raise InvalidField(where, f"{kind} belongs in the assistant's messages.")
    if role == "assistant" and isinstance(found, anthropic.ToolResultBlock):
        raise InvalidField(where, "tool_result belongs in the user's messages.")
    return found


def _result(block: anthropic.ToolResultBlock, where: str) -> openai.ChatMessage:
    content = block.content
    if isinstance(content, list):
        texts = [text_of_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        content = "\n".join(texts)
    text = (FAILED if block.is_error else "") + (content or "")
    return openai.ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=text)


def _tool(given: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(kind := given.get("type"), str) and kind != "custom":
        raise InvalidField(f"{where}.type", f"{kind}: this server runs no tools of its own.")
    try:
        tool = msgspec.convert(given, anthropic.Tool)
    except msgspec.ValidationError as error:
        raise named(str(error), where) from None
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function | {"parameters": tool.input_schema}}


def _thinking(thinking: anthropic.Thinking | None) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """Values for the template, and which of them the template must know."""
    if thinking is None or thinking.type == "adaptive":
        return {}, ()
    if thinking.type == "enabled" and (thinking.budget_tokens or 0) < 1:
        raise InvalidField("thinking.budget_tokens", "it must be at least 1.")
    return {"enable_thinking": thinking.type == "enabled"}, (("enable_thinking", "thinking"),)
