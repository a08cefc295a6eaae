"""What the tests of the data room share: a small tokenizer, tones on disk, manifests, and a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from tests.data.file_server import Server

TEXTS = [
    "hello world, what is said here?",
    "Recognize the English speech:",
    "You are a helpful assistant.",
    "über 你好 123",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 330, ["<|en|>"])


@pytest.fixture
def write_tone(tmp_path: Path) -> Callable[..., Path]:
    """write_tone("a.wav", seconds, rate=..., channels=...) -> its path; a 440 Hz tone, louder on the first channel."""

    def write(name: str, seconds: float = 1.0, rate: int = 16_000, channels: int = 1, **kwargs: Any) -> Path:
        times = np.arange(round(seconds * rate)) / rate
        tone = np.sin(2 * np.pi * 440 * times).astype(np.float32)
        levels = 0.5 / np.arange(1, channels + 1)
        soundfile.write(tmp_path / name, tone[:, None] * levels, rate, **kwargs)
        return tmp_path / name

    return write


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[[list[Any]], Path]:
    """write_manifest(lines) -> path of a manifest; a line is an object or raw text."""

    def write(lines: list[Any], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
