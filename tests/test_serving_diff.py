"""An endpoint is asked what the evaluation asked, and differences are named."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import soundfile

from benchmarks.serving_diff import differences
from tests.evaluation.judge_server import Judge, misbehaving_judge


def test_a_text_that_differs_is_named(noise: Path, tmp_path: Path) -> None:
    clip = noise / "a0.wav"
    user = {"role": "user", "content": [{"type": "audio", "audio": str(clip)}, {"type": "text", "text": "What?"}]}
    lines = [{"id": f"c{i}", "messages": [user, {"role": "assistant", "content": "x"}]} for i in range(2)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rest = dict.fromkeys(("language", "text_language", "question", "reference", "metric"))
    texts = [
        {"id": f"c{i}", "source": "s", "task": "chat", "meta": {}, **rest, "text": text} for i, text in enumerate("ab")
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    with misbehaving_judge(Judge(answer=lambda prompt: "a")) as server:
        found = differences(str(tmp_path / "chat.jsonl"), str(tmp_path), server.url, "mine")
    assert found == ([("c1", "b", "a")], 2)
    (sent,) = server.requests[0]["messages"]
    heard, asked = sent["content"]
    assert asked == {"type": "text", "text": "What?"}
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(heard["input_audio"]["data"])))
    assert (rate, len(samples)) == (16_000, soundfile.info(clip).frames)
