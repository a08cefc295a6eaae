"""From pieces to ids. Label borders are exact, and text of the data never becomes a special token.

Pieces of the same kind are joined before they are tokenised, so that the ids are those of the whole string wherever the
stock tokenizer sees the same text; a border between prompt and answer is a border between ids, as in generation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.prompts.render import Piece, Rendered, Text
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.families.family import Family
from qwen2audio_train.layout import num_samples_of

MOST_CACHED = 1024
"""Texts whose ids are kept."""


@dataclass(frozen=True)
class Tokens:
    """Ids of a sample: input_ids (T,) int64, label_mask (T,) bool, audio_slot (n,) int64 positions of the placeholders,
    branches of (b,) int64 each."""

    input_ids: np.ndarray
    label_mask: np.ndarray
    audio_slot: np.ndarray
    branches: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class TokenCount:
    """Lengths of a sample in tokens: the trunk (`audio` of them placeholders) and every branch."""

    trunk: int
    audio: int
    branches: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.trunk + sum(self.branches)


class TextEncoder:
    """Text to ids for one tokenizer: markup knows its added tokens, plain text goes through the bare BPE."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        stock: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer without the added tokens: thread-safe, where a flag on the shared one would not be.
        self._plain = Tokenizer(stock.model)
        if stock.normalizer is not None:
            self._plain.normalizer = stock.normalizer
        if stock.pre_tokenizer is not None:
            self._plain.pre_tokenizer = stock.pre_tokenizer
        self._special: dict[str, int] = dict(tokenizer.get_added_vocab())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._plain_ids = lru_cache(MOST_CACHED)(self._encoded)  # the same few prompts stand around every answer

    def audio_token_id(self, family: Family) -> int:
        """Id of the family's audio token. Raises ConfigError when the tokenizer is not one of the family."""
        if family.audio_token not in self._special:
            raise ConfigError(f"the tokenizer has no token {family.audio_token}: it is not one of {family.name}")
        return self._special[family.audio_token]

    def encode(self, texts: Sequence[Text]) -> list[int]:
        """Ids of pieces that belong together; plain stretches are joined over the border of pieces."""
        ids: list[int] = []
        plain = ""
        for text in texts:
            for part in self._split.split(text.text) if text.is_markup else [text.text]:
                special = self._special.get(part) if text.is_markup else None
                if special is None:
                    plain += part
                else:
                    ids += [*self._plain_ids(plain), special]
                    plain = ""
        return ids + self._plain_ids(plain)

    def _encoded(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids if text else []


_ENCODERS: WeakKeyDictionary[Any, TextEncoder] = WeakKeyDictionary()


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """The encoder of a tokenizer, built once."""
    if tokenizer not in _ENCODERS:
        _ENCODERS[tokenizer] = TextEncoder(tokenizer)
    return _ENCODERS[tokenizer]


def tokenize(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, num_samples: Sequence[int]) -> Tokens:
    """Ids of a rendered sample.

    Args:
        num_samples: length of every clip at 16 kHz, in order; it decides the number of audio tokens.

    Raises:
        ExampleError: there are placeholders that no clip stands for.
    """
    encoder, family = text_encoder(tokenizer), rendered.family
    audio_token_id = encoder.audio_token_id(family)
    lengths = iter([family.num_clip_tokens(length) for _, length in zip(rendered.clips, num_samples, strict=True)])
    ids: list[int] = []
    labels: list[bool] = []
    slots: list[int] = []
    for is_label, group in groupby(rendered.trunk, key=_label_flag):
        if is_label is None:
            count = sum(next(lengths) for _ in group)
            slots += range(len(ids), len(ids) + count)
            new = [audio_token_id] * count
        else:
            new = encoder.encode([piece for piece in group if isinstance(piece, Text)])
        ids += new
        labels += [bool(is_label)] * len(new)
    if (found := ids.count(audio_token_id)) != len(slots):
        raise ExampleError(
            f'example "{rendered.id}": {found} tokens {family.audio_token} where its clips have {len(slots)}: '
            "the prompt holds some of its own; leave them out, since they are put where the clips are"
        )
    branches = tuple(np.array(encoder.encode(branch), dtype=np.int64) for branch in rendered.branches)
    return Tokens(
        np.array(ids, dtype=np.int64), np.array(labels, dtype=bool), np.array(slots, dtype=np.int64), branches
    )


def transcript_ids(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids (t,) int64 of what is said, as plain text; none where that is not known."""
    return np.array(text_encoder(tokenizer).encode([Text(rendered.transcript)]), dtype=np.int64)


def count_tokens(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> TokenCount:
    """Lengths of a sample from the durations in the manifest, without opening its audio.

    Raises:
        ExampleError: a clip has no duration.
    """
    lengths = []
    for clip in rendered.clips:
        if clip.duration_s is None:
            raise ExampleError(f'example "{rendered.id}": {clip.path} has no duration_s; add it, or index the manifest')
        lengths.append(num_samples_of(clip.duration_s))
    tokens = tokenize(rendered, tokenizer, lengths)
    return TokenCount(len(tokens.input_ids), len(tokens.audio_slot), tuple(len(branch) for branch in tokens.branches))


def _label_flag(piece: Piece) -> bool | None:
    """Whether a text is label; None for a clip."""
    return None if isinstance(piece, Clip) else piece.is_label
