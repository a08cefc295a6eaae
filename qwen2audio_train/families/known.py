"""The families by name."""

from __future__ import annotations

from qwen2audio_train.errors import UserError
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.families.qwen3_asr import QWEN3_ASR

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2_AUDIO, QWEN3_ASR)}

DEFAULT = QWEN2_AUDIO
"""What is meant where a recipe or a checkpoint names no family."""


def family_of(name: str) -> Family:
    """The family of a name, which is the `model_type` of its models.

    Raises:
        UserError: there is none of that name.
    """
    if name not in FAMILIES:
        raise UserError(f"model.family: found {name!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
