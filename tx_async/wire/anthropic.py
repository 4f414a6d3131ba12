"""Client ⇄ server: Anthropic's messages, under Anthropic's own names. Requests refuse unknown fields, and null is the
same as absent."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct


class Request(Struct, kw_only=True, forbid_unknown_fields=True):
    """The base of structs that clients send."""


class Answer(Struct, kw_only=True):
    """The base of structs that clients get."""


# ---- requests


class TextBlock(Request, tag="text", kw_only=True):
    text: str
    citations: None = None


class ToolUseBlock(Request, tag="tool_use", kw_only=True):
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ToolResultBlock(Request, tag="tool_result", kw_only=True):
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None


class ThinkingBlock(Request, tag="thinking", kw_only=True):
    thinking: str
    signature: str | None = None


ContentBlock = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock
BLOCK_TYPES = ("text", "tool_use", "tool_result", "thinking")


class Message(Request, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class Tool(Request, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: str | None = None


class ToolChoice(Request, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Request, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    """It is accepted, but not enforced."""


class OutputFormat(Request, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Request, kw_only=True):
    format: OutputFormat | None = None


class CountTokensRequest(Request, kw_only=True):
    model: str
    messages: list[Message]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    """`Tool`s; a dict because Anthropic's own tools, which are refused by name, have fields of their own."""
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


# ---- answers


class CountTokens(Answer, kw_only=True):
    input_tokens: int


class AnsweredText(Answer, tag="text", kw_only=True):
    text: str
    citations: None = None


class AnsweredThinking(Answer, tag="thinking", kw_only=True):
    thinking: str
    signature: str = ""


class AnsweredToolUse(Answer, tag="tool_use", kw_only=True):
    id: str
    name: str
    input: dict[str, Any]


AnsweredBlock = AnsweredText | AnsweredThinking | AnsweredToolUse
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Usage(Answer, kw_only=True):
    input_tokens: int
    """Tokens of the whole prompt, whether cached or not."""
    output_tokens: int


class AnsweredMessage(Answer, kw_only=True):
    id: str
    model: str
    content: list[AnsweredBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class MessageStart(Answer, tag="message_start", kw_only=True):
    message: AnsweredMessage


class Ping(Answer, tag="ping", kw_only=True):
    pass


class BlockStart(Answer, tag="content_block_start", kw_only=True):
    index: int
    content_block: AnsweredBlock


class TextDelta(Answer, tag="text_delta", kw_only=True):
    text: str


class ThinkingDelta(Answer, tag="thinking_delta", kw_only=True):
    thinking: str


class SignatureDelta(Answer, tag="signature_delta", kw_only=True):
    signature: str = ""


class InputJsonDelta(Answer, tag="input_json_delta", kw_only=True):
    partial_json: str


ContentDelta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockDelta(Answer, tag="content_block_delta", kw_only=True):
    index: int
    delta: ContentDelta


class BlockStop(Answer, tag="content_block_stop", kw_only=True):
    index: int


class StopDelta(Answer, kw_only=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Answer, tag="message_delta", kw_only=True):
    delta: StopDelta
    usage: Usage


class MessageStop(Answer, tag="message_stop", kw_only=True):
    pass


class AnthropicError(Answer, kw_only=True):
    type: str
    message: str


class AnthropicErrorBody(Answer, tag="error", kw_only=True):
    """The body of every answer that is not 2xx, and the last event of a stream that failed."""

    error: AnthropicError
    request_id: str | None = None
