"""The fields of a family of audio language models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen2audio_train.layout import num_frames, window_samples


def nothing(clip_frames: Sequence[int]) -> dict[str, Any]:
    """No index: the tower finds out on the device."""
    return {}


def one_after_the_other(num_tokens: int, audio_slot: np.ndarray) -> np.ndarray:
    """Positions 0 .. num_tokens - 1, audio tokens among them: those of a rotary text model."""
    return np.arange(num_tokens, dtype=np.int64)


@dataclass(frozen=True)
class Family:
    """What data, model and plans have to know of a family.

    Attributes:
        name: `model_type` of transformers' config.
        audio_token: placeholder of one audio embedding.
        clip: markup before and after a clip in the task form.
        chat_clip: the same in a chat, where `{number}` counts the clips of the conversation.
        system_prompt: system message where a conversation starts without one; None: there is none.
        turn_head: markup before a message; `{role}` is system, user or assistant.
        turn_end: token that ends a message, learnt where the message is.
        turn_tail: markup after that token, never learnt.
        text_end: token that ends an answer in the task form; pads too.
        special_tokens: all that a tokenizer needs, in the order of their published ids.
        positions: tokens of a sample's trunk and the places of its audio tokens -> position of each (T,) int64. Answers
            of a preference go on after the last one.
        num_encoder_frames: mel frames of a clip -> frames that the encoder's layers run on.
        num_audio_tokens: mel frames of a clip -> embeddings that the language model gets for it, at least one for the
            shortest clip that is taken (`layout.MIN_FRAMES`).
        mel_columns: mel frames of a clip -> columns that it takes in a packed spectrogram.
        clip_index: mel frames of packed clips, at least one -> arrays and numbers that say where they lie, named
            `clip_...`; made in the workers, so that no forward has to wait for the device to tell it.
        lookahead_frames: frames after a clip's end that its last embedding sees (of the padding, as the stock extractor
            has it).
        model_class, processor_class, extractor_class: transformers' classes that read what is exported.
        extractor_options: what the extractor is made with.
        processor_options: what the stock processor has to be told at every call to hear what is heard here.
        chat_template: of the processor that is saved; None: the one that its class brings along.
        sub_configs: of the architecture, and the `model_type` that each is of when it names none.
        audio_token_key: the config's field for the id of `audio_token`.
        published_names: where weights of the published checkpoints lie in transformers' modules, as patterns.
        parts: part of the recipe's `freeze` -> full name of the module that holds its weights. Parts may lie in each
            other: a weight belongs to the innermost one.
        fixed: endings of the names of weights that are never trained.
        encoder_layer: pattern in the names of the weights of an encoder layer; its group is the layer's number.
        encoder_stem: pattern in the names of what lies below the first of these layers.
        adapter_targets: part -> pattern that the full names of its linear layers match.
        blocks: classes that are wrapped, compiled and checkpointed as a whole.
    """

    name: str
    audio_token: str
    clip: tuple[str, str]
    chat_clip: tuple[str, str]
    system_prompt: str | None
    turn_head: str
    turn_end: str
    turn_tail: str
    text_end: str
    special_tokens: tuple[str, ...]
    num_encoder_frames: Callable[[int], int]
    num_audio_tokens: Callable[[int], int]
    mel_columns: Callable[[int], int]
    lookahead_frames: int
    model_class: str
    processor_class: str
    sub_configs: Mapping[str, str]
    audio_token_key: str
    published_names: Mapping[str, str]
    parts: Mapping[str, str]
    fixed: tuple[str, ...]
    encoder_layer: str
    encoder_stem: str
    adapter_targets: Mapping[str, str]
    blocks: tuple[str, ...]
    extractor_class: str = "WhisperFeatureExtractor"
    extractor_options: Mapping[str, Any] = field(default_factory=dict)
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    clip_index: Callable[[Sequence[int]], dict[str, Any]] = nothing
    positions: Callable[[int, np.ndarray], np.ndarray] = one_after_the_other

    def num_clip_tokens(self, num_samples: int) -> int:
        """Audio tokens of a whole clip of `num_samples` at 16 kHz, over all of its encoder windows."""
        return sum(self.num_audio_tokens(num_frames(n)) for n in window_samples(num_samples))

    def part_of(self, name: str) -> str:
        """Part that a weight belongs to, whatever wraps the model that it is named in.

        Raises:
            ValueError: the name has no part in it.
        """
        name = f".{name}"
        ends = {part: name.rfind(f".{path}.") + len(path) for part, path in self.parts.items() if f".{path}." in name}
        if not ends:
            raise ValueError(f"parameter {name[1:]} belongs to none of {', '.join(self.parts)}")
        return max(ends, key=ends.__getitem__)

    def module_name(self, published: str) -> str:
        """Full name in transformers' modules of a weight that a published checkpoint names."""
        for pattern, path in self.published_names.items():
            name, found = re.subn(pattern, path, published)
            if found:
                return name
        return published
