"""Conversations in the forms that people bring become the example that our own form gives, or say what is wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.cache import find_manifests
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_record
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.data.tools.convert import ConvertOptions, convert

Tone = Callable[..., Path]
ASKED, ANSWER, WORSE = "What's that sound?", "It is glass.", "I cannot hear."


def turns(question: str, role: str = "role", content: str = "content", answer: str | None = ANSWER) -> list[Any]:
    """A question and its answer, under the names of a project."""
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    said = [(names[0], question)] + ([(names[1], answer)] if answer else [])
    return [{role: name, content: text} for name, text in said]


def audio(name: str = "a.wav") -> dict[str, Any]:
    return {"type": "audio", "audio": name}


SHAREGPT = turns(f"<audio>{ASKED}", "from", "value")
LIST_OF_PARTS = [audio(), {"type": "text", "text": ASKED}]
CHATS: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": turns(f"<audio>{ASKED}"), "audios": ["a.wav"]},
    "ms-swift without a mark": {"messages": turns(ASKED), "audios": ["a.wav"]},
    "ms-swift, query and response": {"query": f"<audio>{ASKED}", "response": ANSWER, "audios": ["a.wav"]},
    "LLaMA-Factory": {"conversations": SHAREGPT, "audios": ["a.wav"], "system": "", "tools": ""},
    "LLaMA-Factory, mark on a line of its own": {
        "conversations": turns(f"<audio>\n{ASKED}", "from", "value"),
        "audios": ["a.wav"],
    },
    "Alpaca": {"instruction": f"<audio>{ASKED}", "input": "", "output": ANSWER, "audios": ["a.wav"]},
    "ShareGPT with one clip": {"conversations": SHAREGPT, "audio": "a.wav"},
    "marks of the model": {
        "messages": turns(f"Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{ASKED}"),
        "audios": ["a.wav"],
    },
    "OpenAI, a URL": {
        "messages": [
            {"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "a.wav"}}, LIST_OF_PARTS[1]]},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "chat templates, url": {
        "messages": [
            {"role": "user", "content": [{"type": "audio", "url": "a.wav"}, LIST_OF_PARTS[1]]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
    },
    "chat templates, path": {
        "messages": [
            {"role": "user", "content": [{"type": "audio", "path": "a.wav"}, LIST_OF_PARTS[1]]},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "chat templates, audios beside": {
        "messages": [
            {"role": "user", "content": [{"type": "audio"}, LIST_OF_PARTS[1]]},
            {"role": "assistant", "content": ANSWER},
        ],
        "audios": ["a.wav"],
    },
}
OWN_CHAT = {"messages": [{"role": "user", "content": LIST_OF_PARTS}, {"role": "assistant", "content": ANSWER}]}
OWN_PROMPT = {"prompt": OWN_CHAT["messages"][:1]}
PAIRS: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": turns(f"<audio>{ASKED}"), "rejected_response": WORSE, "audios": ["a.wav"]},
    "LLaMA-Factory": {
        "conversations": SHAREGPT[:1],
        "chosen": {"from": "gpt", "value": ANSWER},
        "rejected": {"from": "gpt", "value": WORSE},
        "audios": ["a.wav"],
    },
    "Alpaca": {"instruction": f"<audio>{ASKED}", "chosen": ANSWER, "rejected": WORSE, "audios": ["a.wav"]},
    "TRL": {
        "prompt": turns(f"<audio>{ASKED}", answer=None),
        "chosen": [{"role": "assistant", "content": ANSWER}],
        "rejected": [{"role": "assistant", "content": WORSE}],
        "audios": ["a.wav"],
    },
    "TRL, prompt in both": {
        "chosen": turns(f"<audio>{ASKED}"),
        "rejected": turns(f"<audio>{ASKED}", answer=WORSE),
        "audios": ["a.wav"],
    },
}


def examples(tmp_path: Path, rows: list[Any], name: str = "c.jsonl") -> list[Example | ManifestError]:
    """The rows as a source reads them."""
    text = json.dumps(rows, indent=1) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    found = find_manifests("s", SourceConfig([str(tmp_path / name)]), Remote(str(tmp_path / "cache")))
    return [example for manifest in found for _, example in manifest.lines()]


def expected(record: dict[str, Any], tmp_path: Path, name: str = "c.jsonl", row: int = 1) -> Example:
    return parse_record({"id": f"{name}:{row}", **record}, str(tmp_path / name), row)


@pytest.mark.parametrize("form", CHATS)
def test_every_form_of_a_conversation(tmp_path: Path, form: str) -> None:
    assert examples(tmp_path, [CHATS[form]]) == [expected(OWN_CHAT, tmp_path)]


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_a_pair(tmp_path: Path, form: str) -> None:
    own = OWN_PROMPT | {"chosen": ANSWER, "rejected": WORSE}
    assert examples(tmp_path, [PAIRS[form]]) == [expected(own, tmp_path)]


def test_unpaired_answers_systems_histories_and_what_no_form_knows(tmp_path: Path) -> None:
    rows = [
        {"messages": turns(f"<audio>{ASKED}"), "label": False, "audios": ["a.wav"]},
        {"conversations": SHAREGPT, "kto_tag": True, "audios": ["a.wav"], "id": 17, "speaker": "s1"},
        {"conversations": SHAREGPT, "system": "Be brief.", "audios": ["a.wav"]},
        {"query": "And <audio>this?", "response": "Hm.", "history": [["<audio>Well?", "Yes."]], "audios": ["a", "b"]},
    ]
    unpaired = OWN_PROMPT | {"completion": ANSWER}
    second = [{"type": "text", "text": "And "}, audio("b"), {"type": "text", "text": "this?"}]
    first = [audio("a"), {"type": "text", "text": "Well?"}]
    assert examples(tmp_path, rows, "c.json") == [
        expected(unpaired | {"label": False}, tmp_path, "c.json", 1),
        expected(unpaired | {"label": True, "meta": {"speaker": "s1"}, "id": "17"}, tmp_path, "c.json", 2),
        expected(
            {"messages": [{"role": "system", "content": "Be brief."}, *OWN_CHAT["messages"]]}, tmp_path, "c.json", 3
        ),
        expected(
            {
                "messages": [
                    {"role": "user", "content": first},
                    {"role": "assistant", "content": "Yes."},
                    {"role": "user", "content": second},
                    {"role": "assistant", "content": "Hm."},
                ]
            },
            tmp_path,
            "c.json",
            4,
        ),
    ]


def test_recordings_in_base64_become_files(tmp_path: Path, write_tone: Tone) -> None:
    data = write_tone("a.wav", seconds=1.5).read_bytes()
    text = base64.b64encode(data).decode()
    part = {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
    url = {"type": "audio_url", "audio_url": {"url": f"data:audio/x-wav;base64,{text}"}}
    rows = [{"messages": [{"role": "user", "content": [part, url]}, {"role": "assistant", "content": ANSWER}]}]
    rows.append({"messages": [{"role": "user", "content": [part | {"input_audio": {"data": "%%%"}}]}]})
    good, bad = examples(tmp_path, rows)
    assert isinstance(bad, ManifestError)
    assert bad.field == "input_audio.data"
    first, second = good.messages[0].content  # type: ignore[union-attr]
    assert first == second
    assert Path(first.path).read_bytes() == data
    options = ConvertOptions(str(tmp_path / "c.jsonl"), str(tmp_path / "out" / "m.jsonl"), skip_bad=True, num_workers=1)
    assert convert(options).written == 1
    record = json.loads((tmp_path / "out" / "m.jsonl").read_text())
    clip = record["messages"][0]["content"][0]
    assert clip["duration_s"] == 1.5
    assert (tmp_path / "out" / clip["audio"]).read_bytes() == data
    assert record["id"] == "c.jsonl:1"


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"messages": turns("<audio><audio>?"), "audios": ["a"]}, "audios", "found 1 and 2"),
        ({"messages": turns(f"<audio>{ASKED}")}, "messages[0].content", "found '<audio>'"),
        ({"messages": turns("<|AUDIO|>?")}, "messages[0].content", "a clip is a part of the message"),
        ({"messages": turns("?", answer="<|audio_bos|>")}, "messages[1].content", "found '<|audio_bos|>'"),
        ({"messages": turns("?"), "images": ["a.png"]}, "images", "text and audio alone"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "conversations[0].from", "one of system, user"),
        ({"conversations": "x"}, "conversations", "a non-empty list of messages"),
        ({"messages": turns("?", answer=None), "rejected_response": "x"}, "messages", "ends with the preferred answer"),
    ],
)
def test_what_is_refused(tmp_path: Path, row: dict[str, Any], field: str, says: str) -> None:
    (error,) = examples(tmp_path, [row])
    assert isinstance(error, ManifestError)
    assert (error.field, error.line) == (field, 1)
    assert says in str(error)


def test_a_manifest_of_ours_is_taken_as_it_is(tmp_path: Path) -> None:
    """Nothing is written into the cache, and a key that is unknown stays an error."""
    own = {"id": "x", **OWN_CHAT}
    assert examples(tmp_path, [own]) == [expected(own, tmp_path)]
    assert not (tmp_path / "cache").exists()
    (error,) = examples(tmp_path, [own | {"speaker": "s"}])
    assert isinstance(error, ManifestError)
    (error,) = examples(tmp_path, [own | {"speaker": "s"}], "c.json")
    assert "an unknown key" in str(error)
