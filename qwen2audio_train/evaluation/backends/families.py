"""How other families of models are asked through transformers' classes: one entry each, by `model_type`.

An entry makes of one example what the family's `generate` takes. Nothing is padded to another example and nothing is
cut: a clip that a family's processor would not hear to its end is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Clip, Example
from qwen2audio_train.data.prompts.render import rendered_text
from qwen2audio_train.data.samples.recipe import render_as
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.evaluation.backends.answers import WORDS, turns_of
from qwen2audio_train.evaluation.scoring.items import Item
from qwen2audio_train.layout import SAMPLING_RATE

Ask = Callable[[Any, Example, Item, Sequence[np.ndarray]], tuple[Any, dict[str, Any]]]
"""(processor, example, its item, its waveforms) -> inputs of `generate`, and settings of it beyond greedy decoding."""


@dataclass(frozen=True)
class Asked:
    """One family.

    Attributes:
        model_class, processor_class: of transformers.
        ask: how an example becomes inputs.
        stamp: name and version of how it is asked, for every number; raised whenever a change can move one.
        tasks: what it does, where that is not everything that can be asked in words.
        cuts: its processor hears no more of a clip than `feature_extractor.n_samples`.
        answer: what of the decoded text is the answer.
    """

    model_class: str
    processor_class: str
    ask: Ask
    stamp: str
    tasks: tuple[str, ...] | None = None
    cuts: bool = False
    answer: Callable[[str], str] = str


def as_published(
    processor: Any, example: Example, item: Item, waveforms: Sequence[np.ndarray]
) -> tuple[Any, dict[str, Any]]:
    """Qwen2-Audio: the prompts of our own path, by the stock processor."""
    text = rendered_text(render_as(SampleRecipe(), example, for_generation=True))
    audio = {"audio": list(waveforms), "sampling_rate": SAMPLING_RATE} if waveforms else {}
    return processor(text=text, return_tensors="pt", **audio), {"min_new_tokens": 1}


def in_words(
    processor: Any, example: Example, item: Item, waveforms: Sequence[np.ndarray]
) -> tuple[Any, dict[str, Any]]:
    """Models of a chat: its turns, or a task's clip and first prompt, by the chat template of their processor."""
    turns = [
        {
            "role": role,
            "content": [
                {"type": "audio"} if isinstance(part, Clip) else {"type": "text", "text": part} for part in parts
            ],
        }
        for role, parts in turns_of(example)
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], audio=list(waveforms) or None, return_tensors="pt"), {}


def by_whisper(
    processor: Any, example: Example, item: Item, waveforms: Sequence[np.ndarray]
) -> tuple[Any, dict[str, Any]]:
    """Whisper: the language and the task as its own tokens; a clip over 30 s in windows, by its own timestamps."""
    known = processor.tokenizer.get_vocab()
    if item.language is not None and f"<|{item.language}|>" not in known:
        raise ExampleError(f'example "{example.id}": the model has no token for the language {item.language}')
    if item.task == "s2tt" and item.text_language != "en":
        raise ExampleError(f'example "{example.id}": Whisper translates into English alone, not {item.text_language}')
    (waveform,) = waveforms
    is_long = len(waveform) > processor.feature_extractor.n_samples
    whole = {"truncation": False, "padding": "longest"} if is_long else {}
    inputs = processor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt", return_attention_mask=True, **whole)
    task = "translate" if item.task == "s2tt" else "transcribe"
    return inputs, {"task": task, "language": item.language, "return_timestamps": is_long}


def by_qwen3_asr(
    processor: Any, example: Example, item: Item, waveforms: Sequence[np.ndarray]
) -> tuple[Any, dict[str, Any]]:
    """Qwen3-ASR: the clip alone in a chat; where it knows the language's name, the answer begins with it."""
    (waveform,) = waveforms
    return processor.apply_transcription_request(waveform, language=item.language), {}


def after_the_tag(text: str) -> str:
    """What Qwen3-ASR writes after `language NAME<asr_text>`."""
    return text.rpartition("<asr_text>")[2].strip()


_QWEN2_5 = Asked("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniProcessor", in_words, WORDS, cuts=True)
_QWEN3 = Asked("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeProcessor", in_words, WORDS)

FAMILIES: Mapping[str, Asked] = {
    "qwen2_audio": Asked("Qwen2AudioForConditionalGeneration", "Qwen2AudioProcessor", as_published, "", cuts=True),
    "whisper": Asked(
        "WhisperForConditionalGeneration", "WhisperProcessor", by_whisper, "whisper/1", tasks=("asr", "s2tt")
    ),
    "qwen2_5_omni": _QWEN2_5,
    "qwen2_5_omni_thinker": _QWEN2_5,
    "qwen3_omni_moe": _QWEN3,
    "qwen3_omni_moe_thinker": _QWEN3,
    "qwen3_asr": Asked(
        "Qwen3ASRForConditionalGeneration",
        "Qwen3ASRProcessor",
        by_qwen3_asr,
        "qwen3_asr/1",
        tasks=("asr",),
        answer=after_the_tag,
    ),
}
"""By the `model_type` of their config."""
