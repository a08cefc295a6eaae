"""Keys below `tracker`: where log lines go besides `log.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwen2audio_train.config.bounds import at_least


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class TrackerConfig:
    """Weights & Biases; `log.jsonl` is always written.

    Attributes:
        wandb: `auto` does as WANDB_MODE says, else is online when WANDB_API_KEY is set and off otherwise; `online`,
            `offline`, `off`.
        project: of Weights & Biases; unset: WANDB_PROJECT, else qwen2audio-train.
        entity: user or team there; unset: the key's own.
        peak_tflops: dense TFLOP/s of a device, which the log's MFU is a share of; unset: the data sheet's for bfloat16,
            where the device is known, and no MFU elsewhere.
        group: runs that are shown together; launch/recipe.py puts its stages in one of its name.
    """

    wandb: WandbMode = WandbMode.auto
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    peak_tflops: float | None = at_least(0, None)
