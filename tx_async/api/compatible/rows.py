"""The routes of both APIs: under the hosted service's prefixes, and under those that tools expect on any host."""

from __future__ import annotations

from dataclasses import replace

from tx_async.api.compatible.chat_completions import chat_completions
from tx_async.api.compatible.completions import completions
from tx_async.api.compatible.forms import ANTHROPIC_PREFIXES, OPENAI_PREFIXES
from tx_async.api.compatible.messages import count_tokens, messages
from tx_async.api.compatible.models import get_model, list_models
from tx_async.api.endpoint import Row
from tx_async.wire import anthropic, openai

_STREAM = ("text/event-stream",)
_OPENAI = (
    Row("GET", "/models", list_models, "The base model, and one's own checkpoints (OpenAI)"),
    Row("GET", "/models/{model:path}", get_model, "Describe a model (OpenAI)"),
    Row(
        "POST",
        "/chat/completions",
        chat_completions,
        "Answer messages, streamed where asked (OpenAI)",
        request=openai.ChatRequest,
        answer=openai.ChatCompletion,
        media_types=_STREAM,
    ),
    Row(
        "POST",
        "/completions",
        completions,
        "Go on with a text, streamed where asked (OpenAI)",
        request=openai.CompletionRequest,
        answer=openai.Completion,
        media_types=_STREAM,
    ),
)
_ANTHROPIC = (
    Row(
        "POST",
        "/messages",
        messages,
        "Answer messages, streamed where asked (Anthropic)",
        request=anthropic.MessagesRequest,
        answer=anthropic.AnsweredMessage,
        media_types=_STREAM,
    ),
    Row(
        "POST",
        "/messages/count_tokens",
        count_tokens,
        "Count a prompt's tokens (Anthropic)",
        request=anthropic.CountTokensRequest,
    ),
)

ROWS = (
    *(
        replace(row, path=prefix + row.path, error=openai.OpenaiErrorBody)
        for prefix in OPENAI_PREFIXES
        for row in _OPENAI
    ),
    *(
        replace(row, path=prefix.removesuffix("/messages") + row.path, error=anthropic.AnthropicErrorBody)
        for prefix in ANTHROPIC_PREFIXES
        for row in _ANTHROPIC
    ),
)
