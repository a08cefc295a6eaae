"""What a turn may hold, and answers that grow: without a page."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen2audio_train.chat.conversation import Mode, NoTurn, Talker, answers, prompt_of, spectrogram, user_turn
from qwen2audio_train.data.examples import Clip, Message
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts
from qwen2audio_train.evaluation.decoding.stream import stream_text
from tests.evaluation.tiny import SAMPLES, ending_model, mixed_samples, noise, tiny_model, tiny_tokenizer

SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "a.wav"
    soundfile.write(path, noise(np.random.default_rng(0), 0.7), 16_000)
    return str(path)


def test_a_streamed_answer_grows_to_the_decoded_one() -> None:
    model, tokenizer = ending_model(), tiny_tokenizer()
    samples = mixed_samples()
    for sample, whole in zip(samples, generate_texts(model, tokenizer, samples, SHORT), strict=True):
        texts = list(stream_text(model, tokenizer, sample, SHORT))
        assert texts[-1:] == ([whole] if texts else [])
        assert len(texts) <= 12
    assert any(len(list(stream_text(model, tokenizer, sample, SHORT))) < 12 for sample in samples)


def test_two_talkers_answer_a_token_at_a_time(clip: str) -> None:
    talkers = {name: Talker(tiny_model(seed), tiny_tokenizer(), SAMPLES) for seed, name in enumerate("ab")}
    turn = user_turn(Mode.analysis, [clip, clip], " What is heard? ")
    assert [type(part) for part in turn.content] == [Clip, Clip, str]
    assert turn.content[0].duration_s == pytest.approx(0.7)
    assert turn.content[2] == "What is heard?"
    grown = list(answers(talkers, {"a": (turn,), "b": (turn,)}, SHORT))
    assert len(grown) == 12
    for name, talker in talkers.items():
        (whole,) = generate_texts(talker.model, talker.tokenizer, [prompt_of(talker, (turn,))], SHORT)
        assert grown[-1][name] == whole
        assert [len(now[name]) for now in grown] == sorted(len(now[name]) for now in grown)
    assert grown[-1]["a"] != grown[-1]["b"]


def test_a_second_turn_hears_the_first(clip: str) -> None:
    talker = Talker(tiny_model(), tiny_tokenizer(), SAMPLES)
    first = user_turn(Mode.voice_chat, [clip], "")
    second = user_turn(Mode.analysis, [], "And what else?")
    both = prompt_of(talker, (first, Message("assistant", ("the cat",)), second))
    text = talker.tokenizer.decode(both.input_ids)
    assert text.count("<|audio_bos|>") == 1
    assert text.index("the cat") < text.index("And what else?")
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("mode", "with_clip", "text", "message"),
    [
        (Mode.voice_chat, False, "", "record or upload"),
        (Mode.voice_chat, True, "hello", "choose audio analysis"),
        (Mode.analysis, True, "  ", "write a question"),
        (Mode.analysis, True, "what <|AUDIO|>", "expected text alone"),
    ],
)
def test_what_is_missing_is_said(clip: str, mode: Mode, with_clip: bool, text: str, message: str) -> None:
    with pytest.raises(NoTurn, match=message):
        user_turn(mode, [clip] * with_clip, text)


def test_a_spectrogram_has_a_column_for_each_frame(clip: str, tmp_path: Path) -> None:
    data = base64.b64decode(spectrogram(clip).removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (70, 128)
    long = tmp_path / "long.wav"
    soundfile.write(long, noise(np.random.default_rng(1), 31), 16_000)
    assert spectrogram(str(long)).startswith("data:image/png")
