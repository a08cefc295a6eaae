"""Tokenizers of a family: one fitted on the text of a tiny model, and the processor folder for export."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT
from qwen2audio_train.layout import NUM_MEL_BINS

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer."""

MODEL_MAX_LENGTH = 8192

AUDIO_ATTRIBUTES = ("audio_token", "audio_bos_token", "audio_eos_token")
"""Attributes under which transformers' processors look for a placeholder and its brackets."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    extra_special_tokens: Sequence[str] = (),
    times: Sequence[str] = (),
    family: Family = DEFAULT,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE in Qwen2's manner, fitted on `texts` alone; the same texts give the same tokenizer.

    Args:
        vocab_size: bound of the vocabulary, added tokens included; at least 256 bytes and the added tokens.
        extra_special_tokens: such as the language tags of the prompts (`prompts.tag_tokens`).
        times: tokens that are part of answers (`timestamps.timestamp_tokens`).
    """
    special = list(dict.fromkeys([*family.special_tokens, *extra_special_tokens]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_added = len(special) + len(times)
    if vocab_size < len(alphabet) + num_added:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is too small: {len(alphabet)} bytes and {num_added} special tokens "
            f"need {len(alphabet) + num_added}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_added, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fitted = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    return of_family(fitted, family, times=times)


def of_family(
    tokenizer: PreTrainedTokenizerFast,
    family: Family = DEFAULT,
    tags: Sequence[str] = (),
    times: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Give a tokenizer what the family's have: their special tokens (added where missing), ends, and attributes.

    `tags` are added as special tokens, `times` as ordinary ones, which decoding keeps.
    """
    known = tokenizer.get_vocab()
    special = [token for token in dict.fromkeys([*family.special_tokens, *tags]) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in times if token not in known])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=family.turn_end,
        pad_token=family.text_end,
        padding_side="left",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(
            zip(AUDIO_ATTRIBUTES, (family.audio_token, *family.clip), strict=True)  # what the stock processors ask for
        ),
    )


def build_processor(
    tokenizer: PreTrainedTokenizerBase, num_mel_bins: int = NUM_MEL_BINS, family: Family = DEFAULT
) -> ProcessorMixin:
    """The stock processor around a tokenizer, with the published chat template."""
    processor_class: Any = getattr(transformers, family.processor_class)
    extractor_class: Any = getattr(transformers, family.extractor_class)
    extractor = extractor_class(feature_size=num_mel_bins, return_attention_mask=True, **family.extractor_options)
    processor: ProcessorMixin = processor_class(feature_extractor=extractor, tokenizer=tokenizer)
    if family.chat_template is not None:
        processor.chat_template = family.chat_template
    tokenizer.chat_template = processor.chat_template
    return processor


def save_processor(
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    num_mel_bins: int = NUM_MEL_BINS,
    family: Family = DEFAULT,
) -> None:
    """Write what the stock processor's `from_pretrained(folder)` reads."""
    build_processor(tokenizer, num_mel_bins, family).save_pretrained(str(folder))
