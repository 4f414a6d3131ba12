"""Client ⇄ server: OpenAI's chat completions and completions, under OpenAI's own names, with vLLM's additions.

Requests refuse unknown fields, and null is the same as absent. Responses omit nothing that clients declare.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class Request(Struct, kw_only=True, forbid_unknown_fields=True):
    """The base of structs that clients send."""


class Answer(Struct, kw_only=True):
    """The base of structs that clients get."""


# ---- requests


class StreamOptions(Request, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(Request, kw_only=True):
    """The fields that both kinds of completions take."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    stop_token_ids: list[int] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class FunctionCall(Request, kw_only=True):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Request, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(Request, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    """Fields of answers that are always null here: clients send them back."""


class JsonSchemaFormat(Request, kw_only=True):
    schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Answers obey the schema in any case."""


class ResponseFormat(Request, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class FunctionName(Request, kw_only=True):
    name: str


class NamedFunction(Request, kw_only=True):
    function: FunctionName
    type: Literal["function"]


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    """GBNF, or llguidance's Lark."""
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[Any]
    """A text, several texts, token ids, or several lists of token ids."""
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    """GBNF, or llguidance's Lark."""


# ---- answers


class PromptTokensDetails(Answer, kw_only=True):
    cached_tokens: int


class CompletionUsage(Answer, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer, kw_only=True):
    content: list[TokenLogprob]
    refusal: None = None


class AnsweredFunction(Answer, kw_only=True):
    name: str
    arguments: str


class AnsweredCall(Answer, kw_only=True):
    id: str
    function: AnsweredFunction
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET


class AnsweredChatMessage(Answer, kw_only=True):
    """The message of a whole answer; in a stream, the new part of it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(Answer, kw_only=True):
    index: int
    message: AnsweredChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Answer, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChunkChoice(Answer, kw_only=True):
    index: int
    delta: AnsweredChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Answer, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    prompt_token_ids: list[int] | UnsetType = UNSET
    """Set on the first one."""


class Logprobs(Answer, kw_only=True):
    """Log-probabilities of completions; `text_offset[i]` is where token i begins in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer, kw_only=True):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Answer, kw_only=True):
    """A whole completion, or a piece of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class Model(Answer, kw_only=True):
    id: str
    created: int
    owned_by: str
    object: Literal["model"] = "model"


class Models(Answer, kw_only=True):
    data: list[Model]
    object: Literal["list"] = "list"


class OpenaiError(Answer, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenaiErrorBody(Answer, kw_only=True):
    """The body of every answer that is not 2xx, and the last event of a stream that failed."""

    error: OpenaiError
