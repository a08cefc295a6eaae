"""How long a clip is, whether or not its manifest says so."""

from __future__ import annotations

from qwen2audio_train.data.audio.decode import REMOTE, clip_duration
from qwen2audio_train.data.audio.files import LIMITS, AudioLimits
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.storage.remote import Remote


def clip_length(clip: Clip, data: bytes | None = None, limits: AudioLimits = LIMITS, remote: Remote = REMOTE) -> float:
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
    return clip_duration(clip, data, limits, remote)
