"""From an example to its tensors: decode, (augment,) mel, tokenise. This is all that a worker does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import LongAudio, SampleRecipe
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.examples import Clip, Example
from qwen2audio_train.data.prompts.render import Rendered
from qwen2audio_train.data.prompts.tokenize import tokenize, transcript_ids
from qwen2audio_train.data.samples.recipe import limits_of, remote_of, render_as
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.layout import MAX_SAMPLES, SAMPLING_RATE, window_samples

DURATION_TOLERANCE_S = 0.5
"""A clip may be so much (or 2 %) longer or shorter than its manifest says: encoders pad, and durations are rounded."""


@dataclass(frozen=True)
class Sample:
    """One example as arrays: T trunk tokens, n of them audio, and one mel per encoder window (30 s at most).

    Attributes:
        input_ids: (T,) int64, the trunk: everything, or the prompt of a preference.
        label_mask: (T,) bool, which of them are learnt.
        audio_slot: (n,) int64, where in the trunk the audio embeddings go.
        branches: (b,) int64 each, the answers of a preference, chosen first, or one alone; all of them are labels.
        mels: (num_mel_bins, family.mel_columns(L)) float32 each.
        clip_frames: L of every mel.
        transcript: (t,) int64, what is said in its only encoder window; empty where that is not known.
        weight: factor on the weight of every label (`batch.pack` explains the weightings).
        decode_s: seconds that reading and decoding its audio took.
        example: what it was made of, where answers to it are to be scored.
        position_ids: (T,) int64, where the family's are not simply 0 .. T - 1.
    """

    id: str
    source: str
    task: str
    input_ids: np.ndarray
    label_mask: np.ndarray
    audio_slot: np.ndarray
    branches: tuple[np.ndarray, ...] = ()
    mels: tuple[np.ndarray, ...] = ()
    clip_frames: tuple[int, ...] = ()
    transcript: np.ndarray = field(default_factory=partial(np.zeros, 0, dtype=np.int64))
    source_id: int = 0
    weight: float = 1.0
    decode_s: float = 0.0
    example: Example | None = None
    position_ids: np.ndarray | None = None

    @property
    def positions(self) -> np.ndarray:
        """(T,) int64 positions of the trunk; the tokens of a branch go on after the last one."""
        return np.arange(len(self.input_ids)) if self.position_ids is None else self.position_ids

    @property
    def num_tokens(self) -> int:
        """Tokens that the sample takes in a pack, branches included."""
        return len(self.input_ids) + sum(len(branch) for branch in self.branches)


def materialise(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SampleRecipe = SampleRecipe(),
    *,
    source_id: int = 0,
    weight: float = 1.0,
    for_generation: bool = False,
    audio_bytes: Sequence[bytes | None] | None = None,
    augment_waveform: Callable[[np.ndarray], np.ndarray] | None = None,
    augment_mel: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> Sample:
    """Render, decode and tokenise one example.

    Args:
        audio_bytes: contents of the clips' files, None for those that are to be read from where they lie.
        augment_waveform: (n,) float32 -> (n',) float32, applied to every clip.
        augment_mel: (mel, L) -> mel of the same shape, applied to every encoder window.

    Raises:
        ExampleError: without anything to learn, or a clip that is over 30 s where those are rejected, or not as long as
            its manifest says.
        AudioError: a clip cannot be read.
    """
    rendered = render_as(recipe, example, for_generation=for_generation)
    contents = audio_bytes if audio_bytes is not None else [None] * len(rendered.clips)
    began = time.perf_counter()
    waveforms = [load_clip(clip, recipe, data) for clip, data in zip(rendered.clips, contents, strict=True)]
    decode_s = time.perf_counter() - began
    _check_durations(rendered, waveforms)
    if augment_waveform is not None:
        waveforms = [augment_waveform(waveform) for waveform in waveforms]
    sample = build_sample(
        rendered, waveforms, tokenizer, recipe, source_id=source_id, weight=weight, augment_mel=augment_mel
    )
    return replace(sample, decode_s=decode_s)


def load_clip(clip: Clip, recipe: SampleRecipe, data: bytes | None = None) -> np.ndarray:
    """`load_audio` within the recipe's deadline, remote files read as it says. Raises AudioError."""
    return load_audio(clip, data, limits_of(recipe), remote_of(recipe))


def build_sample(
    rendered: Rendered,
    waveforms: Sequence[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    recipe: SampleRecipe = SampleRecipe(),
    *,
    source_id: int = 0,
    weight: float = 1.0,
    augment_mel: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> Sample:
    """A sample from what is rendered and from the clips' samples at 16 kHz (one waveform per clip, in order)."""
    _check_long_audio(rendered, waveforms, recipe)
    tokens = tokenize(rendered, tokenizer, [len(waveform) for waveform in waveforms])
    family = rendered.family
    windows = [window for waveform in waveforms for window in _windows(waveform)]
    features = [log_mel(window, recipe.num_mel_bins, family) for window in windows]
    if augment_mel is not None:
        features = [(augment_mel(mel, frames), frames) for mel, frames in features]
    return Sample(
        id=rendered.id,
        source=rendered.source,
        task=rendered.task,
        input_ids=tokens.input_ids,
        label_mask=tokens.label_mask,
        audio_slot=tokens.audio_slot,
        branches=tokens.branches,
        mels=tuple(mel for mel, _ in features),
        clip_frames=tuple(frames for _, frames in features),
        transcript=transcript_ids(rendered, tokenizer) if len(features) == 1 else np.zeros(0, dtype=np.int64),
        source_id=source_id,
        weight=weight,
        position_ids=family.positions(len(tokens.input_ids), tokens.audio_slot),
    )


def _windows(waveform: np.ndarray) -> list[np.ndarray]:
    """The encoder windows of a clip: itself up to 30 s, else consecutive pieces."""
    if len(waveform) <= MAX_SAMPLES:
        return [waveform]
    return np.split(waveform, np.cumsum(window_samples(len(waveform)))[:-1])


def _check_durations(rendered: Rendered, waveforms: Sequence[np.ndarray]) -> None:
    """Packs are planned, and transcripts were cut, by the durations of the manifest: a wrong one is a bad example."""
    for clip, waveform in zip(rendered.clips, waveforms, strict=True):
        found = len(waveform) / SAMPLING_RATE
        if clip.duration_s is None or abs(found - clip.duration_s) <= max(DURATION_TOLERANCE_S, 0.02 * clip.duration_s):
            continue
        raise ExampleError(
            f'example "{rendered.id}": {clip.path} is {found:.2f} s long, its manifest says {clip.duration_s:.2f} s; '
            "correct duration_s, or leave it out to have it read from the file"
        )


def _check_long_audio(rendered: Rendered, waveforms: Sequence[np.ndarray], recipe: SampleRecipe) -> None:
    if recipe.long_audio is LongAudio.split:
        return
    for clip, waveform in zip(rendered.clips, waveforms, strict=True):
        if len(waveform) > MAX_SAMPLES:
            raise ExampleError(
                f'example "{rendered.id}": {clip.path} is {len(waveform) / SAMPLING_RATE:.2f} s long and an encoder '
                "window takes 30 s; set data.long_audio=split, or cut it into slices"
            )
