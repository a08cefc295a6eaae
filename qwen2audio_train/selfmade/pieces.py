"""A piece: one waveform of the corpus, told by what is in it; rendering it depends on (seed, piece) alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from qwen2audio_train.layout import SAMPLING_RATE
from qwen2audio_train.selfmade import sounds
from qwen2audio_train.selfmade.draw import generator
from qwen2audio_train.selfmade.effects import add_noise, coloured_noise, mix, reverberate, rms, set_level
from qwen2audio_train.selfmade.grammar import load_yaml
from qwen2audio_train.selfmade.piper import VOICE as PIPER
from qwen2audio_train.selfmade.piper import synthesise_piper
from qwen2audio_train.selfmade.speech import gender_of, synthesise

Kind = Literal["speech", "sound", "scene", "note", "beeps", "command", "quiet"]

SPOKEN = "spoken"
"""Fact of a piece: its text with the punctuation that the synthesiser is to hear."""


@dataclass(frozen=True)
class Piece:
    """What a clip holds.

    Attributes:
        id: its name, and its file: audio/<id>.wav.
        text, language, voice: what is said, in which language, by which voice of speech.VOICES.
        label: sound, scene, instrument or number of beeps; of a command: the sound that follows it.
        note: name of the note.
        origin: which part of the grammar the text is from.
        answer: the right answer to a spoken question or command.
        facts: what else is true of it: a text in another language ("text_de"), the animal that is named, ...
        other: of a command, what somebody else says before it.
    """

    id: str
    kind: Kind
    text: str = ""
    language: str = ""
    voice: str = ""
    label: str = ""
    note: str = ""
    origin: str = ""
    answer: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    other: Piece | None = None

    @property
    def gender(self) -> str:
        """`female` or `male`."""
        return "male" if self.voice == PIPER else gender_of(self.voice)

    @property
    def file(self) -> str:
        """Path of the waveform, relative to the corpus."""
        return f"audio/{self.id}.wav"


def _speech(piece: Piece, rng: np.random.Generator) -> np.ndarray:
    """Clean speech with a rate and a pitch of its own."""
    text = piece.facts.get(SPOKEN, piece.text)
    if piece.voice == PIPER:
        return synthesise_piper(text, pitch=rng.uniform(0.85, 1.15), tempo=rng.uniform(0.85, 1.25))
    rate, pitch, pitch_range = int(rng.integers(160, 201)), int(rng.integers(38, 63)), int(rng.integers(35, 66))
    return synthesise(text, piece.language, piece.voice, rate=rate, pitch=pitch, pitch_range=pitch_range)


def _recorded(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Through a room (one in three), with noise (one in three), at a level of its own."""
    if rng.random() < 1 / 3:
        waveform = reverberate(waveform, rng.uniform(0.12, 0.4), rng.uniform(-14, -5), rng)
    if rng.random() < 1 / 3:
        waveform = add_noise(waveform, rng.uniform(12, 30), rng.uniform(0, 2), rng)
    return set_level(waveform, rng.uniform(-27, -18))


def _background(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sound on its own: over a faint noise floor, so that pauses are not digital silence."""
    floor = coloured_noise(len(waveform), 1.0, rng) * np.float32(10 ** (rng.uniform(-55, -40) / 20))
    return set_level(waveform + floor, rng.uniform(-27, -18))


def _quiet(label: str, rng: np.random.Generator) -> np.ndarray:
    """1 to 5 s of noise, or of what a microphone gives in a silent room."""
    loudness_db = rng.uniform(-40, -20) if label == "noise" else rng.uniform(-75, -55)
    noise = coloured_noise(int(rng.uniform(1, 5) * SAMPLING_RATE), rng.uniform(0, 2), rng)
    return set_level(noise, loudness_db)


def _command(piece: Piece, rng: np.random.Generator) -> np.ndarray:
    """Somebody else speaks (where there is an `other`), then the command comes, all inside one sound."""
    command = set_level(_speech(piece, rng), -20)
    start = int(rng.uniform(0.1, 0.4) * SAMPLING_RATE)
    if piece.other is not None:
        talk = set_level(_speech(piece.other, rng), -20 - rng.uniform(6, 12))
        start += len(talk)
    length = start + len(command) + int(rng.uniform(0.1, 0.4) * SAMPLING_RATE)
    result = np.zeros(length, dtype=np.float32)
    if piece.other is not None:
        result[start - len(talk) : start] += talk
    result[start : start + len(command)] += command
    sound = sounds.sound(piece.label, length / SAMPLING_RATE + 0.01, rng)[:length]
    level_db = 20 * np.log10(rms(command) / rms(result)) - rng.uniform(6, 14)
    return set_level(mix(result, sound, 0, level_db), rng.uniform(-27, -20))


def waveform_of(piece: Piece, seed: int) -> np.ndarray:
    """Render a piece -> float32 (samples,) at 16 kHz."""
    rng = generator(seed, piece.id)
    if piece.kind == "speech":
        return _recorded(_speech(piece, rng), rng)
    if piece.kind == "command":
        return _command(piece, rng)
    if piece.kind == "quiet":
        return _quiet(piece.label, rng)
    if piece.kind == "sound":
        return _background(sounds.sound(piece.label, rng.uniform(1.0, 1.8), rng), rng)
    if piece.kind == "scene":
        return _background(sounds.scene(piece.label, rng.uniform(1.8, 2.6), rng), rng)
    if piece.kind == "beeps":
        return _background(sounds.beeps(int(piece.label), rng), rng)
    frequency = load_yaml("dialogues")["names"]["notes"][piece.note]
    return _background(sounds.note(piece.label, frequency, rng.uniform(0.6, 1.0), rng), rng)


def write_piece(piece: Piece, folder: Path, seed: int) -> float:
    """Render a piece into its file (16 kHz, 16 bit) below `folder`, and return its duration in seconds."""
    waveform = waveform_of(piece, seed)
    path = folder / piece.file
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, SAMPLING_RATE, subtype="PCM_16")
    return len(waveform) / SAMPLING_RATE
