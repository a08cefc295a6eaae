"""Task examples as conversations: the prompt becomes the written question, the target the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2audio_train.data.examples import ChatExample, Clip, Message, TaskExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.prompts.render import render, rendered_text
from qwen2audio_train.data.tools.chat import ChatOptions, chats_of, write_chats, written_question
from qwen2audio_train.errors import ExampleError

EXAMPLE = TaskExample("a/1", Clip("a.wav", 1.5), "ser", "de", "anger", "emodb", meta={"actor": 3})


def test_the_conversation_of_an_example() -> None:
    [chat] = chats_of([EXAMPLE], seed=0)
    question = written_question(EXAMPLE, 0)
    assert chat.messages == (Message("user", (EXAMPLE.clip, question)), Message("assistant", ("anger",)))
    assert (chat.id, chat.source, chat.mode) == ("a/1", "emodb", "analysis")
    assert chat.meta == {"actor": 3, "task": "ser", "language": "de"}
    assert f"<|audio_eos|>\n{question}<|im_end|>" in rendered_text(render(chat))


def test_questions_are_those_of_the_pool_by_seed_and_id() -> None:
    examples = [TaskExample(str(i), EXAMPLE.clip, "ser", "de", "anger", "emodb") for i in range(200)]
    asked = [[written_question(example, seed) for example in examples] for seed in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2]
    expected = {"Recognize the emotion with keywords in English:", "How does the speaker feel?"}
    assert set(asked[0]) == expected | {"Name the emotion in this voice:"}
    assert min(asked[0].count(question) for question in expected) > 40


def test_a_question_has_neither_tags_nor_loose_ends() -> None:
    speech = [TaskExample(str(i), EXAMPLE.clip, "asr", "de", "Hallo.", "s") for i in range(50)]
    assert not [q for q in (written_question(example, 0) for example in speech) if "<|" in q or q != q.rstrip()]
    asked = TaskExample("q", EXAMPLE.clip, "aqa", None, "Two.", "s", question="How many birds {sing}?")
    assert written_question(asked, 0) == "How many birds {sing}?"


def test_written_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    line = {"id": "1", "audio": "a.wav", "duration_s": 1.5, "task": "sec", "target": "dog bark", "source": "esc10"}
    manifests = [tmp_path / "in" / name for name in ("a.jsonl", "b.jsonl")]
    for number, path in enumerate(manifests):
        path.write_text(json.dumps({**line, "id": str(number)}) + "\n")
    output = tmp_path / "out" / "chat.jsonl"
    assert write_chats(ChatOptions([str(path) for path in manifests], str(output))) == 2
    chats = read_manifest(output)
    assert [chat.id for chat in chats] == ["0", "1"]
    assert isinstance(chats[0], ChatExample)
    assert chats[0].messages[0].content[0] == Clip(str(tmp_path / "in" / "a.wav"), 1.5)
    with pytest.raises(ExampleError, match='example "0" is there twice: give each its own id'):
        write_chats(ChatOptions([str(manifests[0])] * 2, str(output)))
    with pytest.raises(ExampleError, match='example "0" is not in task form'):
        write_chats(ChatOptions([str(output)], str(tmp_path / "again.jsonl")))
    assert not (tmp_path / "again.jsonl").exists()
