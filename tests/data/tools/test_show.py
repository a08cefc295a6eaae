"""What `launch/data.py show` prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.prompts.tokenizer import save_processor
from qwen2audio_train.data.tools.show import ShowOptions, show

TURN = {"role": "user", "content": [{"type": "audio", "audio": "a.wav", "duration_s": 1.0}]}
LINES = [
    {"id": "chat", "messages": [TURN, {"role": "assistant", "content": "Hi."}]},
    {"id": "pair", "prompt": [TURN], "chosen": "Good.", "rejected": "Bad."},
    {"id": "alone", "prompt": [TURN], "completion": "Bad.", "label": False},
]


@pytest.fixture
def manifest(write_tone: Callable[..., Path], write_manifest: Callable[[list[Any]], Path]) -> str:
    write_tone("a.wav")
    return str(write_manifest(LINES))


def test_labels_are_marked(manifest: str) -> None:
    text = show(ShowOptions(manifest, "chat"))
    assert text.splitlines()[0] == "chat  (source corpus, task chat)"
    assert "a.wav: 1.000 s, manifest 1 s, 100 frames, 25 tokens" in text
    assert text.endswith(
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|> x 25<|audio_eos|>\n<|im_end|>\n"
        "<|im_start|>assistant\n[[Hi.<|im_end|>]]\n"
    )
    assert show(ShowOptions(manifest, "0")) == text
    coloured = show(ShowOptions(manifest, "chat"), colour=True)
    assert "\033[32mHi." in coloured
    assert "[[" not in coloured
    assert show(ShowOptions(manifest, "chat", for_generation=True)).endswith("<|im_start|>assistant\n")


def test_an_answer_without_its_opposite_is_called_by_its_label(manifest: str) -> None:
    assert show(ShowOptions(manifest, "alone")).endswith("undesirable: [[Bad.<|im_end|>]]")


def test_tokens_answers_and_a_picture(manifest: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_processor(tokenizer, tmp_path / "processor")
    image = tmp_path / "mel.png"
    text = show(ShowOptions(manifest, "1", tokenizer=str(tmp_path / "processor"), image=str(image)))
    assert "chosen: [[Good.<|im_end|>]]\nrejected: [[Bad.<|im_end|>]]" in text
    audio = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert sum(f" {audio} " in line for line in text.splitlines()) == 1
    assert f" {audio} <|AUDIO|> x 25" in text
    assert text.count("'<|im_end|>'") == 4
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_bad_line_does_not_hide_the_others(manifest: str) -> None:
    Path(manifest).write_text("{bad\n" + Path(manifest).read_text())
    assert show(ShowOptions(manifest, "0")) == show(ShowOptions(manifest, "chat"))


def test_wrong_names(manifest: str) -> None:
    with pytest.raises(ConfigError, match=r"example=char: no such id; did you mean chat\?"):
        show(ShowOptions(manifest, "char"))
    with pytest.raises(ConfigError, match="example=3: the manifest has 3 examples"):
        show(ShowOptions(manifest, "3"))
