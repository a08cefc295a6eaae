"""The four forms of a line, and what every kind of bad line is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2audio_train.data.manifests.manifest import (
    ChatExample,
    Clip,
    ManifestError,
    Message,
    PreferenceExample,
    TaskExample,
    UnpairedExample,
    clips_of,
    parse_line,
    read_manifest,
    validate_manifest,
)
from qwen2audio_train.data.manifests.record import to_record

TASK = {"id": "a1", "audio": "a1.flac", "duration_s": 3.2, "task": "asr", "language": "en", "target": "hello"}
PROMPT = [{"role": "user", "content": [{"type": "audio", "audio": "b.wav", "duration_s": 1.5}]}]
CHAT = {"id": "b1", "messages": [*PROMPT, {"role": "assistant", "content": "Hello."}]}
PREFERENCE = {"id": "c1", "prompt": PROMPT, "chosen": "Hello.", "rejected": "Bye."}
UNPAIRED = {"id": "d1", "prompt": PROMPT, "completion": "Bye.", "label": False}


def parse(record: Any) -> Any:
    return parse_line(json.dumps(record), "/corpora/speech/train.jsonl", 7)


def refused(record: Any) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        parse(record)
    assert (caught.value.file, caught.value.line) == ("/corpora/speech/train.jsonl", 7)
    return caught.value


def test_task_form() -> None:
    assert parse(TASK) == TaskExample(
        id="a1",
        clip=Clip("/corpora/speech/a1.flac", 3.2),
        task="asr",
        language="en",
        target="hello",
        source="train",
    )


def test_chat_form() -> None:
    message = Message("user", (Clip("/corpora/speech/b.wav", 1.5),))
    expected = ChatExample("b1", (message, Message("assistant", ("Hello.",))), source="sft", mode="voice_chat")
    assert parse(CHAT | {"source": "sft", "mode": "voice_chat"}) == expected


def test_preference_form_with_one_and_with_several_rejected_answers() -> None:
    prompt = (Message("user", (Clip("/corpora/speech/b.wav", 1.5),)),)
    assert parse(PREFERENCE) == PreferenceExample("c1", prompt, "Hello.", ("Bye.",), source="train")
    assert parse(PREFERENCE | {"rejected": ["Bye.", "No."]}).rejected == ("Bye.", "No.")


def test_meta_is_kept_and_examples_can_be_hashed() -> None:
    example = parse(TASK | {"meta": {"speaker": "s1", "tags": [1, 2]}})
    assert example.meta == {"speaker": "s1", "tags": [1, 2]}
    assert hash(example) == hash(parse(TASK | {"meta": {"speaker": "s1", "tags": [1, 2]}}))


@pytest.mark.parametrize(
    ("path", "resolved"),
    [
        ("/audio/a.wav", "/audio/a.wav"),
        ("x/./a.wav", "/corpora/speech/x/a.wav"),
        ("../audio/a.wav", "/corpora/audio/a.wav"),
        ("shard.tar::x/a.wav", "/corpora/speech/shard.tar::x/a.wav"),
        ("https://example.org/a.wav", "https://example.org/a.wav"),
    ],
)
def test_paths(path: str, resolved: str) -> None:
    assert parse(TASK | {"audio": path}).clip.path == resolved


def test_slices() -> None:
    clip = {"path": "a.wav", "start_s": 2.0, "end_s": 3.5}
    record = {key: value for key, value in TASK.items() if key != "duration_s"}
    assert parse(record | {"audio": clip}).clip == Clip("/corpora/speech/a.wav", 1.5, 2.0, 3.5)
    assert parse(record | {"audio": {"path": "a.wav"}}).clip.duration_s is None
    error = refused(TASK | {"audio": clip})
    assert error.field == "duration_s"
    assert "end_s - start_s = 1.5" in error.expected


def test_clips_in_the_order_of_hearing() -> None:
    part = {"type": "audio", "audio": "b1.wav"}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "and"}, part | {"audio": "b2.wav"}]}
    example = parse({"id": "d", "messages": [turn, {"role": "assistant", "content": "ok"}, *PROMPT]})
    assert [clip.path.rsplit("/", 1)[1] for clip in clips_of(example)] == ["b1.wav", "b2.wav", "b.wav"]


def test_unpaired_form_has_the_names_of_trl() -> None:
    prompt = (Message("user", (Clip("/corpora/speech/b.wav", 1.5),)),)
    assert parse(UNPAIRED) == UnpairedExample("d1", prompt, "Bye.", False, source="train")
    assert parse(UNPAIRED | {"label": True}).label is True
    assert clips_of(parse(UNPAIRED)) == (Clip("/corpora/speech/b.wav", 1.5),)


@pytest.mark.parametrize(
    "record",
    [
        TASK | {"meta": {"speaker": "s1"}, "text_language": "de", "question": "What?"},
        TASK | {"duration_s": None, "audio": {"path": "../b.tar::x/a.flac", "start_s": 1.5, "end_s": 2.25}},
        TASK | {"audio": "https://example.org/a.flac"},
        CHAT | {"mode": "analysis", "source": "other"},
        PREFERENCE,
        PREFERENCE | {"rejected": ["Bye.", "No."]},
        UNPAIRED,
    ],
)
def test_examples_can_be_written_back_into_another_folder(record: dict[str, Any]) -> None:
    example = parse(record)
    line = json.dumps(to_record(example, "/corpora/elsewhere"))
    assert "/corpora/" not in line
    assert parse_line(line, "/corpora/elsewhere/x.jsonl", 1) == example


@pytest.mark.parametrize(
    ("record", "field", "says"),
    [
        (TASK | {"targt": "x"}, "targt", 'did you mean "target"?'),
        (TASK | {"task": "ast"}, "task", 'did you mean "asr"?'),
        (TASK | {"task": None}, "task", "expected one of asr"),
        (TASK | {"target": "  "}, "target", "non-empty text"),
        (TASK | {"target": "\ud800"}, "target", "surrogate"),
        (TASK | {"target": "a\0b"}, "target", "a zero byte"),
        (TASK | {"target": 5}, "target", "non-empty text, found 5"),
        (TASK | {"id": ""}, "id", "non-empty text"),
        (
            TASK | {"duration_s": "3.2"},
            "duration_s",
            'a number of seconds, at least 0.04 and at most 100000, found "3.2"',
        ),
        (TASK | {"duration_s": 0.02}, "duration_s", "found 0.02"),
        (TASK | {"duration_s": 10**400}, "duration_s", "at most 100000, found 1000"),
        (TASK | {"duration_s": 1e300}, "duration_s", "at most 100000"),
        (TASK | {"duration_s": True}, "duration_s", "found true"),
        (TASK | {"language": "English"}, "language", 'a language code such as "en"'),
        (TASK | {"audio": 3}, "audio", "a path, or an object with path, found 3"),
        (TASK | {"audio": {"path": "a.wav", "start": 1}}, "audio.start", 'did you mean "start_s"?'),
        (TASK | {"audio": {"path": "a.wav", "duration_s": 1}}, "duration_s", "the clip's own 1"),
        (TASK | {"audio": "a.tar::../b.wav"}, "audio", "tar member"),
        (TASK | {"audio": "a.tar::"}, "audio", "tar member"),
        (TASK | {"audio": "a\0.wav"}, "audio", "zero byte"),
        (TASK | {"task": "aqa"}, "question", 'every prompt of the task "aqa"'),
        (TASK | {"task": "s2tt"}, "text_language", 'every prompt of the task "s2tt"'),
        (TASK | {"meta": []}, "meta", "an object"),
        ({key: TASK[key] for key in TASK if key != "audio"}, "audio", "no such key"),
        (CHAT | {"messages": []}, "messages", "a non-empty list"),
        (CHAT | {"messages": ["hi"]}, "messages[0]", "an object with role and content"),
        (CHAT | {"messages": [{"role": "assistant", "content": "x"}]}, "messages", "at least one user message"),
        (
            CHAT | {"messages": [{"role": "human", "content": "x"}]},
            "messages[0].role",
            "one of system, user, assistant",
        ),
        (CHAT | {"messages": [*PROMPT, {"role": "system", "content": "x"}]}, "messages[1].role", "one of user"),
        (
            CHAT | {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0].audio",
            "path",
        ),
        (
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type",
            "audio",
        ),
        (
            CHAT | {"messages": [*PROMPT, {"role": "assistant", "content": PROMPT[0]["content"]}]},
            "messages[1].content",
            "the assistant cannot send audio",
        ),
        (CHAT | {"mode": "voice"}, "mode", 'did you mean "voice_chat"?'),
        (PREFERENCE | {"prompt": CHAT["messages"]}, "prompt", "end with a user message"),
        (PREFERENCE | {"rejected": []}, "rejected", "a non-empty list of texts"),
        (PREFERENCE | {"rejected": ["a", ""]}, "rejected.1", "non-empty text"),
        (PREFERENCE | {"rejected": "Hello."}, "rejected", "differs from the chosen one"),
        ({"id": "x", "chosen": "a", "rejected": "b"}, "prompt", "no such key"),
        (UNPAIRED | {"label": 1}, "label", "true for a desirable answer, false for an undesirable one, found 1"),
        (UNPAIRED | {"label": None}, "label", "found null"),
        (UNPAIRED | {"completion": " "}, "completion", "non-empty text"),
        (UNPAIRED | {"prompt": CHAT["messages"]}, "prompt", "end with a user message"),
        (UNPAIRED | {"chosen": "Hello."}, "chosen", "an unknown key"),
        ({key: UNPAIRED[key] for key in UNPAIRED if key != "completion"}, "completion", "no such key"),
        (PREFERENCE | {"lable": True}, "lable", "an unknown key"),
    ],
)
def test_bad_fields(record: dict[str, Any], field: str, says: str) -> None:
    error = refused(record)
    assert error.field == field
    assert says in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id": "a1", "aud', "is the file cut off?"),
        ("[1]", "found a list of 1"),
        ('{"id": "a", "id": "b"}', 'the key "id" twice'),
        ('{"id": NaN}', "NaN"),
        ('{"id": 1e400}', "1e400, which is beyond the numbers that there are: put it into quotes if it is text"),
        ('{"id": ' + "9" * 5000 + "}", "a number of thousands of digits: put it into quotes if it is text"),
        (b'{"id": "\xff"}', "byte 0xff"),
        ("[" * 100_000, "one JSON object"),
    ],
)
def test_bad_lines(text: str | bytes, says: str) -> None:
    with pytest.raises(ManifestError, match="one JSON object per line") as caught:
        parse_line(text, "m.jsonl", 3)
    assert says in str(caught.value)


def test_all_bad_lines_are_reported(write_manifest: Callable[[list[Any]], Path]) -> None:
    path = write_manifest([TASK, "", TASK, TASK | {"id": "a2", "target": ""}, "{", TASK | {"id": "a3"}])
    errors = validate_manifest(path)
    assert [(error.line, error.field) for error in errors] == [(3, "id"), (4, "target"), (5, "")]
    assert "as in line 1" in str(errors[0])
    with pytest.raises(ManifestError, match=r"corpus\.jsonl:3"):
        read_manifest(path)


def test_good_empty_and_marked_manifests(write_manifest: Callable[[list[Any]], Path]) -> None:
    path = write_manifest([TASK, CHAT, PREFERENCE, UNPAIRED])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [example.id for example in read_manifest(path)] == ["a1", "b1", "c1", "d1"]
    assert validate_manifest(path) == []
    path.write_text("\n")
    assert "an empty file" in str(validate_manifest(path)[0])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    form=st.sampled_from([TASK, CHAT, PREFERENCE, UNPAIRED]),
    key=st.sampled_from([*TASK, *CHAT, *PREFERENCE, *UNPAIRED, "mode", "meta", "source", "question"]),
    value=JSON,
)
def test_whatever_a_field_holds_gives_an_example_or_a_manifest_error(form: Any, key: str, value: Any) -> None:
    with suppress(ManifestError):
        parse(form | {key: value})
