"""Answers of an API that misbehaves, and of a stand-in for vLLM."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import ChatExample, Clip, Message, TaskExample
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.evaluation.backends.api import ApiOptions, evaluate_api, messages_of
from qwen2audio_train.evaluation.backends.vllm import VllmOptions, evaluate_vllm
from qwen2audio_train.evaluation.judging import client as client_module
from qwen2audio_train.evaluation.judging.forms import FORMS
from qwen2audio_train.export import export
from tests.evaluation.judge_server import Judge, misbehaving_judge
from tests.evaluation.tiny import SAMPLES, noise, tiny_model, tiny_tokenizer


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i, seconds in enumerate((0.5, 0.7, 0.9, 31.0)):
        soundfile.write(tmp_path / f"{i}.wav", noise(rng, seconds), 16_000)
        example = TaskExample(f"e{i}", Clip(str(tmp_path / f"{i}.wav"), seconds), "asr", "en", f"the cat {i}", "dev")
        lines.append(json.dumps(to_record(example, tmp_path)) + "\n")
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(client_module.Client, "sleep", staticmethod(lambda seconds: None), raising=False)
    monkeypatch.setattr(client_module.time, "sleep", lambda seconds: None)
    with misbehaving_judge(Judge(answer=lambda content: "the cat")) as found:
        yield found


def options(manifest: Path, server: Judge, **given: Any) -> ApiOptions:
    api = {"base_url": server.url, "model": "m", "timeout_s": 10.0, **given}
    return ApiOptions({"dev": str(manifest)}, str(manifest.parent / "out"), bootstrap_samples=10, api=api, workers=2)


def test_every_example_is_answered_once_by_a_server_that_misbehaves(manifest: Path, server: Judge) -> None:
    server.misdeeds += [(429, {}), "drop", "truncated", "not json", (500, {}), "no choices"]
    found = evaluate_api(options(manifest, server))
    assert [record["id"] for record in found.texts] == ["e0", "e1", "e2", "e3"]
    assert (found.rows[0].score.value, found.rows[0].score.n, found.failed) == (1 / 3, 4, {})
    assert len(server.requests) == 4 + 6
    evaluate_api(options(manifest, server))
    assert len(server.requests) == 10, "all of it was kept"
    kept = "".join(path.read_text() for path in (manifest.parent / "out" / "api_cache").rglob("*.json"))
    assert len(kept) < 5000, "the audio is not kept with the replies"


def test_what_fails_for_good_is_left_out_by_name_and_asked_again(manifest: Path, server: Judge) -> None:
    server.misdeeds.append((401, {}))
    found = evaluate_api(options(manifest, server))
    (lost,) = found.failed
    assert "HTTP 401" in found.failed[lost]
    assert found.rows[0].score.n == 3
    again = evaluate_api(options(manifest, server))
    assert (again.failed, again.rows[0].score.n, len(server.requests)) == ({}, 4, 5)


def test_a_clip_goes_as_a_whole_with_the_prompt_of_the_task(manifest: Path, server: Judge) -> None:
    evaluate_api(options(manifest, server))
    heard = []
    for request in server.requests:
        audio, text = request["messages"][0]["content"]
        assert (audio["type"], audio["input_audio"]["format"]) == ("input_audio", "wav")
        assert text == {"type": "text", "text": "Detect the language and recognize the speech:"}
        heard.append(soundfile.info(io.BytesIO(base64.b64decode(audio["input_audio"]["data"]))).duration)
    assert sorted(heard) == [0.5, 0.7, 0.9, 31.0]


def test_refused_answers_are_counted(manifest: Path, server: Judge) -> None:
    server.answer = lambda content: {"message": {"content": "", "refusal": "no"}, "finish_reason": "stop"}
    found = evaluate_api(options(manifest, server))
    assert "4 of 4 were refused by the endpoint" in "".join(found.caveats)
    assert found.rows[0].score.value == 1.0


def test_a_chat_is_asked_with_its_turns() -> None:
    turns = [
        ("system", "Be short."),
        ("user", "Who?"),
        ("assistant", "a cat"),
        ("user", "Where?"),
        ("assistant", "mat"),
    ]
    example = ChatExample("c", tuple(Message(role, (text,)) for role, text in turns), "s")
    asked = messages_of(example)
    assert [(message["role"], message["content"]) for message in asked] == [(r, [t]) for r, t in turns[:-1]]


def test_geminis_form() -> None:
    form = FORMS["gemini"]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"wav": "QQ=="}, "Who?"]}]
    request = form.request("g", messages, 9)
    assert request["contents"] == [
        {"role": "user", "parts": [{"inline_data": {"mime_type": "audio/wav", "data": "QQ=="}}, {"text": "Who?"}]}
    ]
    assert request["systemInstruction"] == {"parts": [{"text": "Be short."}]}
    assert request["generationConfig"] == {"temperature": 0, "maxOutputTokens": 9}
    assert form.path("g") == "/models/g:generateContent"
    usage = {"promptTokenCount": 7, "candidatesTokenCount": 2}
    parts = {"content": {"parts": [{"text": "a "}, {"text": "cat"}]}, "finishReason": "STOP"}
    assert form.reply({"candidates": [parts], "usageMetadata": usage}) == ("a cat", False, 7, 2)
    assert form.reply({"promptFeedback": {"blockReason": "OTHER"}, "usageMetadata": usage}) == ("", True, 7, 2)
    assert form.reply({"candidates": [{"finishReason": "SAFETY"}]}) == ("", True, 0, 0)
    with pytest.raises(KeyError):
        form.reply({"candidates": [{"finishReason": "STOP"}]})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"form": "other"}, "api.form=other: expected one of openai, gemini"),
        ({"modle": "x"}, "did you mean api.model?"),
    ],
)
def test_an_endpoint_that_is_not_described_is_refused(
    given: dict[str, Any], says: str, manifest: Path, server: Judge
) -> None:
    with pytest.raises(ConfigError, match=says):
        evaluate_api(options(manifest, server, **given))


def stand_in(calls: list[Any]) -> ModuleType:
    module: Any = ModuleType("vllm")
    module.__version__ = "0.0"
    module.SamplingParams = SimpleNamespace

    class LLM:
        def __init__(self, **settings: Any) -> None:
            calls.append(settings)

        def generate(self, prompts: list[Any], params: Any) -> list[Any]:
            calls.append((prompts, params))
            return [SimpleNamespace(outputs=[SimpleNamespace(text=f"the cat {i}")]) for i in range(len(prompts))]

    module.LLM = LLM
    return module


@pytest.fixture
def exported(tmp_path: Path) -> str:
    return str(export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "exported"))


def test_vllm_answers_what_it_hears_to_the_end(manifest: Path, exported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "vllm", stand_in(calls))
    found = evaluate_vllm(VllmOptions({"dev": str(manifest)}, str(manifest.parent / "out"), checkpoint=exported))
    assert (found.rows[0].score.value, found.rows[0].score.n) == (0.0, 3)
    assert "over 30 s" in found.failed["e3"]
    settings, (prompts, params) = calls
    assert (settings["model"], settings["limit_mm_per_prompt"]) == (exported, {"audio": 1})
    assert (params.temperature, params.max_tokens, params.min_tokens) == (0.0, 256, 1)
    assert prompts[0]["prompt"].startswith("<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language")
    waveform, rate = prompts[0]["multi_modal_data"]["audio"][0]
    assert (len(waveform), rate) == (8000, 16_000)


def test_vllm_that_is_not_there_is_said(manifest: Path, exported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    chosen = VllmOptions({"dev": str(manifest)}, str(manifest.parent / "out"), checkpoint=exported)
    with pytest.raises(MissingLibraryError, match="vLLM is not installed"):
        evaluate_vllm(chosen)
    with pytest.raises(ConfigError, match=r"expected a folder that launch/export\.py wrote"):
        evaluate_vllm(VllmOptions({"dev": str(manifest)}, "out", checkpoint=str(manifest.parent)))
