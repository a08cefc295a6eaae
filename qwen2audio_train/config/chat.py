"""The keys of launch/chat.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.schema import Dtype


@dataclass
class ChatConfig:
    """Who answers on the page, and where it is served.

    Attributes:
        checkpoints: checkpoint by the name that the page shows: a hub id, a run folder, a checkpoint, an adapter or an
            exported folder. With two of them each question is answered by both, side by side.
        host: address to serve on; `0.0.0.0` lets other machines in.
        port: to serve on.
        max_new_tokens: longest answer in tokens.
        dtype: of the weights; unset, as they were saved.
        num_threads: CPU threads; 0 leaves torch's choice.
    """

    checkpoints: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = at_least(0, 7860, 65535)
    max_new_tokens: int = at_least(1, 256)
    dtype: Dtype | None = None
    num_threads: int = at_least(0, 0)
