"""Manifest lines (JSONL) and what they become: frozen examples, or an error that names file, line and field.

Four forms, told apart by their keys (data_manifests/README.md has the whole schema):

    {"id": "a1", "audio": "a1.flac", "duration_s": 3.2, "task": "asr", "language": "en", "target": "hello"}
    {"id": "b1", "messages": [{"role": "user", "content": [{"type": "audio", "audio": "b1.flac", "duration_s": 3.2},
                                                           {"type": "text", "text": "What is said?"}]},
                              {"role": "assistant", "content": "Hello."}]}
    {"id": "c1", "prompt": [{"role": "user", "content": [...]}], "chosen": "Hello.", "rejected": "Bye."}
    {"id": "d1", "prompt": [{"role": "user", "content": [...]}], "completion": "Bye.", "label": false}

A clip is a path, or an object {"path", "duration_s", "start_s", "end_s", "channel"}. A path is local (relative to the
manifest's folder; `..` is allowed, as audio often lies beside the manifests), a member of a tar file
(`shard.tar::a/b.flac`), or a URL.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen2audio_train.data.examples import (
    NO_MARK,
    ChatExample,
    Clip,
    Example,
    Message,
    PreferenceExample,
    TaskExample,
    UnpairedExample,
    clips_of,
    mark_in,
)
from qwen2audio_train.data.manifests.json_object import ManifestError, Record, as_record, load_record
from qwen2audio_train.data.manifests.spans import spans_of
from qwen2audio_train.data.prompts.pools import missing_fields, num_clips, task_names
from qwen2audio_train.data.prompts.timestamps import written
from qwen2audio_train.data.storage.paths import resolve
from qwen2audio_train.layout import MIN_DURATION_S

__all__ = [
    "ChatExample",
    "Clip",
    "Example",
    "ManifestError",
    "Message",
    "PreferenceExample",
    "TaskExample",
    "UnpairedExample",
    "clips_of",
    "parse_line",
    "parse_record",
    "read_manifest",
    "validate_manifest",
]

ROLES = ("system", "user", "assistant")
MODES = ("voice_chat", "analysis")
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")

COMMON_KEYS = ("id", "source", "meta")
CLIP_KEYS = ("path", "duration_s", "start_s", "end_s", "channel")
TASK_KEYS = ("audio", "duration_s", "task", "language", "target", "text_language", "question", "spans")
CHAT_KEYS = ("messages", "mode")
PREFERENCE_KEYS = ("prompt", "chosen", "rejected")
UNPAIRED_KEYS = ("prompt", "completion", "label")
AUDIO_KEYS = ("audio", "audio_url", "url", "path")
"""Where a part of a message may hold its clip: the names that chat templates of transformers know."""
A_CLIP = "a path, or an object with path"


def read_manifest(path: str | Path) -> list[Example]:
    """All examples of a manifest. Raises the ManifestError of the first bad line (`validate_manifest` finds all)."""
    examples: list[Example] = []
    for item in parse_manifest(Path(path)):
        if isinstance(item, ManifestError):
            raise item
        examples.append(item)
    return examples


def validate_manifest(path: str | Path) -> list[ManifestError]:
    """Every bad line of a manifest, in order; an empty list is a good manifest."""
    return [item for item in parse_manifest(Path(path)) if isinstance(item, ManifestError)]


def parse_manifest(path: str | Path) -> Iterator[Example | ManifestError]:
    """Every line's example or error; blank lines are passed over."""
    seen: dict[str, int] = {}
    empty = True
    with Path(path).open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            empty = False
            try:
                example = parse_line(raw, str(path), number)
            except ManifestError as error:
                yield error
                continue
            first = seen.setdefault(example.id, number)
            if first == number:
                yield example
            else:
                found = f'"{example.id}", as in line {first}'
                yield ManifestError(str(path), number, "id", "an id of its own", found)
    if empty:
        yield ManifestError(str(path), 1, "", "one JSON object per line", "an empty file")


def parse_line(text: str | bytes, file: str, line: int) -> Example:
    """One line as an example; relative clip paths are resolved against the folder of `file`. Raises ManifestError."""
    return _example(load_record(text, file, line))


def parse_record(values: Any, file: str, line: int) -> Example:
    """The same from the object that a line holds, for rows that never were text. Raises ManifestError."""
    record = as_record(values, file, line)
    if values.get("meta") is not None:
        try:
            json.dumps(values["meta"], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise record.error("meta", "plain values (text, numbers, lists, objects)", str(error)) from None
    return _example(record)


def _example(record: Record) -> Example:
    if "messages" in record.values:
        return _chat_example(record)
    if "completion" in record.values or {"prompt", "label"} <= record.values.keys():
        return _unpaired_example(record)
    if any(key in record.values for key in PREFERENCE_KEYS):
        return _preference_example(record)
    return _task_example(record)


def _common(record: Record, keys: tuple[str, ...]) -> dict[str, Any]:
    record.check_keys(COMMON_KEYS + keys)
    if not isinstance(record.get("meta"), (dict, type(None))):
        raise record.error("meta", "an object")
    source = record.optional_text("source") or _stem(record.file)
    return {"id": record.text("id"), "source": source, "meta": record.get("meta") or {}}


@lru_cache
def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]


def _task_example(record: Record) -> TaskExample:
    common = _common(record, TASK_KEYS)
    task = record.choice("task", task_names())
    clip, *others = _clips(record, num_clips(task))
    spans = spans_of(record, "spans", clip.duration_s)
    if spans and record.get("target") is not None:
        raise record.error("target", "no such key beside spans, which are the answer")
    example = TaskExample(
        **common,
        clip=clip,
        task=task,
        language=_language(record, "language"),
        target=written(spans) if spans else _spoken(record, "target"),
        text_language=_language(record, "text_language"),
        question=None if record.get("question") is None else _spoken(record, "question"),
        others=tuple(others),
        spans=spans,
    )
    for key in missing_fields(example.task, example):
        raise record.error(key, f'a value, which every prompt of the task "{example.task}" needs')
    return example


def _chat_example(record: Record) -> ChatExample:
    common = _common(record, CHAT_KEYS)
    messages = _messages(record, "messages")
    if not any(message.role == "user" for message in messages):
        raise record.error("messages", "at least one user message", "none")
    mode = record.choice("mode", MODES) if record.get("mode") is not None else None
    return ChatExample(**common, messages=messages, mode=mode)


def _preference_example(record: Record) -> PreferenceExample:
    common = _common(record, PREFERENCE_KEYS)
    prompt = _prompt(record)
    chosen = _spoken(record, "chosen")
    if isinstance(record.get("rejected"), list):
        answers = record.items("rejected", "text, or a non-empty list of texts")
        inner = Record({str(index): text for index, text in enumerate(answers)}, record.file, record.line, "rejected.")
        rejected = tuple(_spoken(inner, key) for key in inner.values)
    else:
        rejected = (_spoken(record, "rejected"),)
    if chosen in rejected:
        raise record.error("rejected", "an answer that differs from the chosen one")
    return PreferenceExample(**common, prompt=prompt, chosen=chosen, rejected=rejected)


def _unpaired_example(record: Record) -> UnpairedExample:
    common = _common(record, UNPAIRED_KEYS)
    label = record.get("label")
    if not isinstance(label, bool):
        raise record.error("label", "true for a desirable answer, false for an undesirable one")
    return UnpairedExample(**common, prompt=_prompt(record), completion=_spoken(record, "completion"), label=label)


def _spoken(record: Record, key: str) -> str:
    """Text that the model is to read or say."""
    text = record.text(key)
    if mark := mark_in(text):
        raise record.error(key, NO_MARK, f"{mark!r} in it")
    return text


def _prompt(record: Record) -> tuple[Message, ...]:
    prompt = _messages(record, "prompt")
    if prompt[-1].role != "user":
        raise record.error("prompt", "messages that end with a user message", f"a last one by the {prompt[-1].role}")
    return prompt


def _messages(record: Record, key: str) -> tuple[Message, ...]:
    messages = []
    for index, value in enumerate(record.items(key, "a non-empty list of messages")):
        item = record.child(f"{key}[{index}]", value, "an object with role and content")
        messages.append(_message(item, ROLES if index == 0 else ROLES[1:]))
    return tuple(messages)


def _message(record: Record, roles: tuple[str, ...]) -> Message:
    record.check_keys(("role", "content"))
    role = record.choice("role", roles)
    if isinstance(record.get("content"), str):
        return Message(role, (_spoken(record, "content"),))
    parts = []
    for index, value in enumerate(record.items("content", "text, or a non-empty list of parts")):
        part = record.child(f"content[{index}]", value, 'an object with type "audio" or "text"')
        parts.append(_part(part))
    if role != "user" and any(isinstance(part, Clip) for part in parts):
        raise record.error("content", f"text alone, since the {role} cannot send audio", "audio")
    return Message(role, tuple(parts))


def _part(record: Record) -> Clip | str:
    if record.choice("type", ("audio", "text")) == "text":
        record.check_keys(("type", "text"))
        return _spoken(record, "text")
    key = next((key for key in AUDIO_KEYS if key in record.values), "audio")
    record.check_keys(("type", key, "duration_s"))
    return _clip(record, key)


def _clips(record: Record, number: int) -> list[Clip]:
    """The recordings of a task example: one, or a list of those that it compares."""
    values = record.get("audio")
    if number == 1:
        return [_clip(record, "audio")]
    if not isinstance(values, list) or len(values) != number or record.get("duration_s") is not None:
        expected = f"a list of {number} recordings, each a path or an object with path (and its own duration_s)"
        raise record.error("audio", expected)
    return [_clip(Record({"audio": value}, record.file, record.line), "audio") for value in values]


def _clip(record: Record, key: str) -> Clip:
    """The clip below `key`; its duration may stand in its own object or beside it."""
    value = record.get(key)
    if isinstance(value, dict):
        inner = record.child(key, value, A_CLIP)
        inner.check_keys(CLIP_KEYS)
        path = inner.text("path")
    elif isinstance(value, str):
        inner = Record({}, record.file, record.line)
        path = record.text(key)
    else:
        raise record.error(key, A_CLIP)
    start = inner.seconds("start_s", 0.0) or 0.0
    end = inner.seconds("end_s", start + MIN_DURATION_S)
    outside, inside = record.seconds("duration_s", MIN_DURATION_S), inner.seconds("duration_s", MIN_DURATION_S)
    if outside is not None and inside is not None and outside != inside:
        raise record.error("duration_s", f"the clip's own {inside:g}, or one of the two")
    duration = inside if inside is not None else outside
    if end is not None:
        if duration is not None and abs(duration - (end - start)) > 1e-3:
            place = inner if inside is not None else record
            raise place.error("duration_s", f"end_s - start_s = {end - start:g}, the length of the slice")
        duration = end - start
    return Clip(_resolve(path, record, key), duration, start, end, _channel(inner))


def _channel(record: Record) -> int | None:
    channel = record.get("channel")
    if channel is not None and (not isinstance(channel, int) or isinstance(channel, bool) or channel < 0):
        raise record.error("channel", "the number of a channel, counted from 0")
    return channel


def _resolve(path: str, record: Record, key: str) -> str:
    if "\0" in path:
        raise record.error(key, "a path", "a zero byte in it")
    if "://" in path:
        return path
    file, separator, member = path.partition(".tar::")
    if separator and (not member or member.startswith("/") or ".." in member.split("/")):
        raise record.error(key, "a tar member's own path, without a leading / or ..", f'"{member}"')
    return resolve(file, record.file) + separator + member


def _language(record: Record, key: str) -> str | None:
    value = record.get(key)
    if value is None or (isinstance(value, str) and LANGUAGE.fullmatch(value)):
        return value
    raise record.error(key, 'a language code such as "en", "zh" or "yue"')
