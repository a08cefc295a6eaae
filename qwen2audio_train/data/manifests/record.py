"""From an example to its manifest line, the way back of manifest.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwen2audio_train.data.examples import (
    ChatExample,
    Clip,
    Example,
    Message,
    TaskExample,
    UnpairedExample,
    clips_of,
)


def to_record(example: Example, folder: str | Path) -> dict[str, Any]:
    """The manifest line of an example for a manifest in `folder`, which local paths are written relative to."""
    if isinstance(example, TaskExample):
        names = ("task", "language", "text_language", "question")
        clips = [_clip_fields(clip, folder) for clip in clips_of(example)]
        fields = _listed(clips) if example.others else clips[0]
        fields |= {name: getattr(example, name) for name in names} | _answer_field(example)
    elif isinstance(example, ChatExample):
        fields = {"mode": example.mode, "messages": _message_records(example.messages, folder)}
    elif isinstance(example, UnpairedExample):
        prompt = _message_records(example.prompt, folder)
        fields = {"prompt": prompt, "completion": example.completion, "label": example.label}
    else:
        rejected = example.rejected[0] if len(example.rejected) == 1 else list(example.rejected)
        prompt = _message_records(example.prompt, folder)
        fields = {"prompt": prompt, "chosen": example.chosen, "rejected": rejected}
    record = {"id": example.id, "source": example.source, **fields, "meta": dict(example.meta) or None}
    return {key: value for key, value in record.items() if value is not None}


def _answer_field(example: TaskExample) -> dict[str, Any]:
    if example.spans:
        return {"spans": [[span.start_s, span.end_s, span.text] for span in example.spans]}
    return {"target": example.target}


def _listed(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Several clips under one key, each an object with its length."""
    paths = [{"path": c["audio"]} if isinstance(c["audio"], str) else c["audio"] for c in clips]
    return {
        "audio": [path | {k: c[k] for k in ("duration_s",) if k in c} for path, c in zip(paths, clips, strict=True)]
    }


def _message_records(messages: tuple[Message, ...], folder: str | Path) -> list[dict[str, Any]]:
    def part(item: Clip | str) -> dict[str, Any]:
        if isinstance(item, str):
            return {"type": "text", "text": item}
        return {"type": "audio", **_clip_fields(item, folder)}

    return [{"role": message.role, "content": [part(item) for item in message.content]} for message in messages]


def _clip_fields(clip: Clip, folder: str | Path) -> dict[str, Any]:
    file, separator, member = clip.path.partition(".tar::")
    path = clip.path if "://" in clip.path else os.path.relpath(file, folder) + separator + member
    whole = clip.start_s == 0.0 and clip.end_s is None
    bounds = {"start_s": None if whole else clip.start_s, "end_s": clip.end_s, "channel": clip.channel}
    given = {key: value for key, value in bounds.items() if value is not None}
    length = {} if clip.duration_s is None else {"duration_s": clip.duration_s}
    return {"audio": {"path": path, **given} if given else path, **length}
