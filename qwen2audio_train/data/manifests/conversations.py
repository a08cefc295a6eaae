"""Conversations as other projects write them, in our form: ms-swift, LLaMA-Factory, ShareGPT, OpenAI, TRL.

    {"messages": [{"role": "user", "content": "<audio>What is said?"}, ...], "audios": ["a.wav"]}
    {"conversations": [{"from": "human", "value": "<audio>What is said?"}, ...], "audios": ["a.wav"], "system": "..."}
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ..., "format": "wav"}}]},
                  ...]}
    {"instruction": "<audio>What is said?", "input": "", "output": "Hello.", "audios": ["a.wav"]}

and the same with a rejected answer (`rejected_response`, or `chosen` and `rejected`) or with a `label` (`kto_tag`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2audio_train.data.manifests.json_object import Record
from qwen2audio_train.data.storage.files import write_bytes

Row = Mapping[str, Any]
Turn = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Names of other projects for our roles."""

MARK = re.compile(
    r"(?:Audio \d+: )?<\|audio_bos\|><\|AUDIO\|><\|audio_eos\|>\n?|<audio>\n?|<\|AUDIO\|>\n?", re.IGNORECASE
)
"""Where a clip of `audios` goes in a text."""

DATA_URL = re.compile(r"data:audio/(?P<kind>[\w.+-]+)[^,]*;base64,(?P<data>.*)", re.DOTALL)
KINDS = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav", "vnd.wave": "wav", "x-flac": "flac", "mp4": "m4a"}
"""Ending of a file by what follows `audio/` in its type, where the two differ."""

OTHER_KEYS = (
    *("audios", "conversations", "query", "response", "history", "instruction", "input", "output", "system"),
    *("rejected_response", "rejected_messages", "kto_tag"),
)
REJECTED = ("rejected_response", "rejected_messages", "rejected")
MEDIA = ("images", "videos", "image", "video", "tools", "objects")
OWN_KEYS = ("id", "source", "meta", "messages", "mode", "prompt", "chosen", "rejected", "completion", "label")
FOREIGN = re.compile(
    rb'"(?:audios|conversations|instruction|query|rejected_response|rejected_messages|kto_tag|input_audio)"\s*:|"audio_url"\s*[:,}]'
)
"""What only lines in another form hold, of those that are JSON."""


def is_conversation(row: Row) -> bool:
    """Whether a row holds a conversation, in our form or another."""
    return any(key in row for key in ("messages", "conversations", "prompt", "chosen", "instruction", "query"))


def own_form(row: Row, file: str, line: int, folder: Path) -> dict[str, Any]:
    """The record of ours that a conversation in any form stands for; what is in ours stays as it is.

    Keys that no form knows are kept under `meta`.

    Args:
        folder: where recordings that the row itself holds (base64) are written.

    Raises:
        ManifestError: a form that cannot be told, marks and clips of different number, images, tools.
    """
    record = Record(row, file, line)
    if not is_conversation(row) or "task" in row:
        return dict(row)
    for key in MEDIA:
        if row.get(key):
            raise record.error(key, "a conversation of text and audio alone")
    turns = _turns(record)
    answers = _answers(record, turns)
    messages = _with_clips(record, turns, _clips(record), folder)
    used = {*OWN_KEYS, *OTHER_KEYS, *MEDIA, "audio"}
    common = {key: row[key] for key in ("id", "source", "mode") if key in row}
    own = common | ({"prompt": messages, **answers} if answers else {"messages": messages})
    if own == {key: value for key, value in row.items() if key in OWN_KEYS and key != "meta"}:
        return dict(row)
    if isinstance(own.get("id"), int):
        own["id"] = str(own["id"])
    meta = {**(row.get("meta") or {}), **{key: value for key, value in row.items() if key not in used}}
    return own | ({"meta": meta} if meta else {})


def _turns(record: Record) -> list[Turn]:
    """The turns with our roles, their content as it stands."""
    row = record.values
    key = next((key for key in ("messages", "conversations", "prompt") if row.get(key)), None)
    turns: list[Turn] = []
    if key is None and (asked := row.get("instruction") or row.get("query")):
        for pair in row.get("history") or []:
            if not isinstance(pair, list) or len(pair) != 2:
                raise record.error("history", "a list of [question, answer]")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        turns.append({"role": "user", "content": "\n".join(filter(None, (asked, row.get("input"))))})
        if answer := row.get("output") or row.get("response"):
            turns.append({"role": "assistant", "content": answer})
    elif key is None:
        chosen = row.get("chosen")
        if not isinstance(chosen, list):
            raise record.error("messages", "the turns of a conversation")
        turns = [_turn(record, "chosen", index, turn) for index, turn in enumerate(chosen[:-1])]
    elif key == "prompt" and isinstance(row[key], str):
        turns = [{"role": "user", "content": row[key]}]
    else:
        listed = record.items(key, "a non-empty list of messages")
        turns = [_turn(record, key, index, turn) for index, turn in enumerate(listed)]
    system = row.get("system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _turn(record: Record, key: str, index: int, turn: Any) -> Turn:
    inner = record.child(f"{key}[{index}]", turn, "an object with role and content (or from and value)")
    role = turn.get("role", turn.get("from"))
    known = ("system", "user", "assistant")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in known:
        raise inner.error("role" if "role" in turn else "from", f"one of {', '.join((*known, *ROLES))}")
    return {"role": role, "content": turn.get("content", turn.get("value"))}


def _answers(record: Record, turns: list[Turn]) -> dict[str, Any]:
    """What stands in for the last answer in preference data; nothing in a plain conversation. Takes it off `turns`."""
    row = record.values
    rejected = next((row[key] for key in REJECTED if key in row), None)
    if rejected is not None:
        chosen = row["chosen"] if "chosen" in row else _last_answer(record, turns)
        return {"chosen": _text_of(chosen), "rejected": _text_of(rejected)}
    label = row.get("label", row.get("kto_tag"))
    if isinstance(label, bool):
        completion = row["completion"] if "completion" in row else _last_answer(record, turns)
        return {"completion": _text_of(completion), "label": label}
    return {key: _text_of(row[key]) for key in ("chosen", "rejected", "completion", "label") if key in row}


def _last_answer(record: Record, turns: list[Turn]) -> Any:
    if not turns or turns[-1]["role"] != "assistant":
        raise record.error("messages", "a conversation that ends with the preferred answer")
    return turns.pop()["content"]


def _text_of(answer: Any) -> Any:
    """The text of an answer that may be a message, or a conversation that ends with it; several answers stay a list."""
    if isinstance(answer, Mapping):
        return _text_of(answer.get("content", answer.get("value", answer.get("text"))))
    if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
        return _text_of(answer[-1])
    return answer


def _clips(record: Record) -> list[Any]:
    """What `audios` lists; one clip needs no list."""
    found = record.values.get("audios", record.values.get("audio")) or []
    return found if isinstance(found, list) else [found]


def _with_clips(record: Record, turns: Sequence[Turn], clips: list[Any], folder: Path) -> list[Turn]:
    """The turns with parts as content: every mark in a text of the user becomes the next clip.

    Without any mark the clips stand in front of the first question, as in ms-swift.
    """
    num_marks = sum(_num_marks(turn["content"]) for turn in turns if turn["role"] == "user")
    if clips and num_marks not in (0, len(clips)):
        found = f"{len(clips)} and {num_marks}"
        raise record.error("audios", "as many clips as there are marks (<audio>) in the texts of the user", found)
    waiting = iter(clips if num_marks else [])
    leading = [] if num_marks else [_audio_part(clip, record, folder) for clip in clips]

    def parts(turn: Turn) -> Any:
        content = turn["content"]
        if turn["role"] != "user" or not isinstance(content, str | list):
            return content
        listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found = [new for part in listed for new in _parts(part, waiting if clips else None, record, folder)]
        leading[:], found = [], [*leading, *found]
        return content if isinstance(content, str) and found == listed else found

    return [{"role": turn["role"], "content": parts(turn)} for turn in turns]


def _num_marks(content: Any) -> int:
    if isinstance(content, str):
        return len(MARK.findall(content))
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return sum(_num_marks(part.get("text")) + (part.keys() == {"type"} and part["type"] == "audio") for part in parts)


def _parts(part: Any, clips: Iterator[Any] | None, record: Record, folder: Path) -> Iterator[Any]:
    """Parts of ours from one of another form. `clips` are those that marks stand for, None where there are none."""
    if not isinstance(part, Mapping):
        yield part
        return
    kind = part.get("type")
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        if clips is None:
            yield {"type": "text", "text": part["text"]}
            return
        texts = MARK.split(part["text"])
        for index, text in enumerate(texts):
            if index:
                yield _audio_part(next(clips), record, folder)
            if text.strip():
                yield {"type": "text", "text": text}
    elif kind == "audio" and part.keys() == {"type"} and clips is not None:
        yield _audio_part(next(clips), record, folder)
    elif kind in ("input_audio", "audio_url"):
        yield _audio_part(part.get(kind), record, folder)
    else:
        yield part


def _audio_part(clip: Any, record: Record, folder: Path) -> dict[str, Any]:
    """A part of ours from a path, a URL, base64, or an object that holds one of them."""
    data, kind = None, "wav"
    if isinstance(clip, Mapping):
        data, kind = clip.get("data"), clip.get("format", "wav")
        clip = clip if "path" in clip else clip.get("url", clip)
    if isinstance(clip, str) and (match := DATA_URL.fullmatch(clip)):
        kind, data = match["kind"].lower(), match["data"]
    if not isinstance(data, str):
        return {"type": "audio", "audio": clip}
    try:
        contents = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise record.error("input_audio.data", "a recording in base64", str(error)) from None
    ending = KINDS.get(str(kind), str(kind))
    ending = ending if re.fullmatch("[a-z0-9]{1,5}", ending) else "audio"
    name = f"{hashlib.blake2b(contents, digest_size=16).hexdigest()}.{ending}"
    write_bytes(folder / name, contents)
    return {"type": "audio", "audio": str((folder / name).resolve())}
