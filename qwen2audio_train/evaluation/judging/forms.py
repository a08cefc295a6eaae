"""The two forms in which language models are asked over the network: OpenAI's chat completions and Gemini's.

Messages have a `role` and a `content`: a text, or a list of texts and of audio as `{"wav": base64}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Answer = tuple[str, bool, int, int]
"""Text, whether it is marked as refused, tokens of the prompt, tokens of the answer."""

TOKENS_PER_S = 50
"""More than any endpoint takes for a second of audio (OpenAI 10, Gemini 32)."""

BASE64_PER_S = 2 * 16_000 * 4 // 3


@dataclass(frozen=True)
class Form:
    """Where a request goes, what it holds, and what its reply says."""

    path: Callable[[str], str]
    headers: Callable[[str], dict[str, str]]
    request: Callable[[str, Sequence[Mapping[str, Any]], int], Json]
    reply: Callable[[Json], Answer]


def most_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """A bound of the tokens of a prompt, from its characters and the length of its audio."""
    return sum(
        len(part) // 2 if isinstance(part, str) else TOKENS_PER_S * (1 + len(part["wav"]) // BASE64_PER_S)
        for message in messages
        for part in _parts(message)
    )


def without_audio(request: Any) -> Any:
    """A request as it is kept beside its reply: long data go."""
    if isinstance(request, dict):
        return {key: "..." if key == "data" else without_audio(value) for key, value in request.items()}
    return [without_audio(value) for value in request] if isinstance(request, list) else request


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message["content"]
    return [content] if isinstance(content, str) else list(content)


def _openai_request(model: str, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Json:
    def part(piece: Any) -> Json:
        if isinstance(piece, str):
            return {"type": "text", "text": piece}
        return {"type": "input_audio", "input_audio": {"data": piece["wav"], "format": "wav"}}

    asked = [
        {**message, "content": content if isinstance(content := message["content"], str) else list(map(part, content))}
        for message in messages
    ]
    return {"model": model, "messages": asked, "temperature": 0, "max_tokens": max_tokens}


def _openai_reply(body: Json) -> Answer:
    choice, usage = body["choices"][0], body.get("usage") or {}
    text = choice["message"].get("content") or ""
    refused = bool(choice["message"].get("refusal")) or choice.get("finish_reason") == "content_filter"
    return text, refused, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)


def _gemini_request(model: str, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Json:
    def part(piece: Any) -> Json:
        if isinstance(piece, str):
            return {"text": piece}
        return {"inline_data": {"mime_type": "audio/wav", "data": piece["wav"]}}

    roles = {"assistant": "model"}
    contents = [
        {"role": roles.get(message["role"], message["role"]), "parts": list(map(part, _parts(message)))}
        for message in messages
        if message["role"] != "system"
    ]
    system = [part(piece) for message in messages if message["role"] == "system" for piece in _parts(message)]
    options = {"temperature": 0, "maxOutputTokens": max_tokens}
    return {"contents": contents, "generationConfig": options} | (
        {"systemInstruction": {"parts": system}} if system else {}
    )


def _gemini_reply(body: Json) -> Answer:
    usage = body.get("usageMetadata") or {}
    counts = usage.get("promptTokenCount", 0), usage.get("candidatesTokenCount", 0)
    if (body.get("promptFeedback") or {}).get("blockReason"):
        return "", True, *counts
    candidate = body["candidates"][0]
    refused = candidate.get("finishReason") in ("SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "RECITATION", "SPII")
    parts = (candidate.get("content") or {}).get("parts") or []
    if not parts and not refused and candidate.get("finishReason") != "MAX_TOKENS":
        raise KeyError(f"no parts in {json.dumps(body)[:200]}")
    return "".join(piece.get("text", "") for piece in parts), refused, *counts


FORMS = {
    "openai": Form(
        lambda model: "/chat/completions",
        lambda key: {"Authorization": f"Bearer {key}"},
        _openai_request,
        _openai_reply,
    ),
    "gemini": Form(
        lambda model: f"/models/{model}:generateContent",
        lambda key: {"x-goog-api-key": key},
        _gemini_request,
        _gemini_reply,
    ),
}
