"""How long a clip is whose manifest does not say so."""

from __future__ import annotations

from qwen2audio_train.data.audio.decode import AudioError, probe
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.layout import MIN_DURATION_S


def clip_length(clip: Clip, data: bytes | None = None) -> float:
    """Seconds of a clip, from its file's header where the clip itself does not say.

    Args:
        data: bytes of the clip's file, where they are at hand.

    Raises:
        AudioError: the file cannot be read, or nothing that can be heard is left of it from `start_s` on.
    """
    if clip.duration_s is not None:
        return clip.duration_s
    if clip.end_s is not None:
        return clip.end_s - clip.start_s
    whole = probe(clip.path, data).duration_s
    if whole - clip.start_s < MIN_DURATION_S:
        reason = f"is {whole:.3f} s long: from {clip.start_s:g} s on no clip of at least {MIN_DURATION_S:g} s is left"
        raise AudioError(clip.path, reason)
    return whole - clip.start_s
