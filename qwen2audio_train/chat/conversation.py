"""A conversation with one or more checkpoints: what a turn may hold, and their answers as they grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import Any

import numpy as np

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.examples import NO_MARK, ChatExample, Clip, Message, mark_in
from qwen2audio_train.data.samples.sample import load_clip, materialise
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.evaluation.decoding.stream import stream_text
from qwen2audio_train.evaluation.reporting.charts import spectrogram_png
from qwen2audio_train.layout import MAX_SAMPLES, SAMPLING_RATE


class Mode(StrEnum):
    """`voice_chat`: what is said in the recording is the question. `analysis`: the question is written."""

    voice_chat = "voice chat"
    analysis = "audio analysis"


class NoTurn(UserError):
    """Something is missing in a turn; the message says what."""


@dataclass(frozen=True)
class Talker:
    """A checkpoint that answers."""

    model: Any
    tokenizer: Any
    samples: SampleRecipe


Conversation = tuple[Message, ...]


def user_turn(mode: Mode, clips: Sequence[str], text: str) -> Message:
    """What the user says: recordings by their paths, and what is written beside them.

    Raises:
        NoTurn: voice chat without a recording or with something written, or analysis without a question.
        AudioError: a recording cannot be read.
    """
    text = text.strip()
    if mode is Mode.voice_chat and not clips:
        raise NoTurn("voice chat: record or upload what you want to say")
    if mode is Mode.voice_chat and text:
        raise NoTurn("voice chat: the question is what is said; for a written one choose audio analysis")
    if mode is Mode.analysis and not text:
        raise NoTurn("audio analysis: write a question about the recording")
    if mark := mark_in(text):
        raise NoTurn(f"found {mark!r}, expected {NO_MARK}")
    heard = [Clip(path, len(load_clip(Clip(path, None), SampleRecipe())) / SAMPLING_RATE) for path in clips]
    return Message("user", (*heard, *([text] if text else [])))


def answers(
    talkers: Mapping[str, Talker], said: Mapping[str, Conversation], decoding: Decoding
) -> Iterator[dict[str, str]]:
    """Every talker's answer so far, a token of each at a time, until the last has ended.

    Args:
        said: what each talker has heard and answered, the user's turn last.
    """
    streams = [
        stream_text(talker.model, talker.tokenizer, prompt_of(talker, said[name]), decoding)
        for name, talker in talkers.items()
    ]
    found = dict.fromkeys(talkers, "")
    for texts in zip_longest(*streams):
        found |= {name: text for name, text in zip(talkers, texts, strict=True) if text is not None}
        yield dict(found)


def prompt_of(talker: Talker, said: Conversation) -> Any:
    """The sample that a talker answers."""
    example = ChatExample("page", said, "page")
    return materialise(example, talker.tokenizer, talker.samples, for_generation=True)


def spectrogram(path: str) -> str:
    """What the model hears of a recording, up to 30 s, as a picture (a data URI)."""
    waveform = load_clip(Clip(path, None), SampleRecipe())[:MAX_SAMPLES]
    mel, frames = log_mel(np.asarray(waveform))
    return spectrogram_png(mel[:, :frames])
