"""The self-made corpus of the demo: synthesised speech, sounds and music with exact labels.

`build` is the only entry point; it needs the extra `demo` (`pip install 'qwen2audio-train[demo]'`).
"""

from qwen2audio_train.selfmade.build import build

__all__ = ["build"]
