"""Answers with times, in the two forms that a model may learn, and how they are read again.

As text, which every tokenizer has and which goes on beyond 30 s:

    <0.32>hello<0.61> <0.75>world<1.10>

As tokens of their own, in steps of 10 ms up to 30 s: Qwen-Audio's `<|0.00|>` to `<|30.00|>` (arXiv:2311.07919), written
without a space in between:

    <|0.32|>hello<|0.61|><|0.75|>world<|1.10|>
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qwen2audio_train.data.examples import Span

LAST_TOKEN_S = 30.0
"""The latest time that has a token."""

_TOKEN = re.compile(r"<\|(\d+\.\d\d)\|>")
_SPAN = re.compile(r"<(\d+\.\d\d)>([^<>]+)<(\d+\.\d\d)>")


def timestamp_tokens() -> list[str]:
    """All 3 001 of them, the earliest first."""
    return [timestamp_token(step / 100) for step in range(round(LAST_TOKEN_S * 100) + 1)]


def timestamp_token(seconds: float) -> str:
    return f"<|{seconds:.2f}|>"


def written(spans: Sequence[Span]) -> str:
    """The spans as text."""
    return " ".join(f"<{span.start_s:.2f}>{span.text}<{span.end_s:.2f}>" for span in spans)


def spans_in(text: str) -> list[Span]:
    """The spans that an answer writes, in either form and in its order; what is no span is passed over."""
    return [Span(float(start), float(end), said.strip()) for start, said, end in _SPAN.findall(as_text(text))]


def as_text(answer: str) -> str:
    """An answer with its timestamp tokens in the form of text."""
    return _TOKEN.sub(r"<\1>", answer).replace("><", "> <") if "<|" in answer else answer


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of ids without special tokens, but with their times, which are special in some tokenizers."""
    if timestamp_token(0.0) not in tokenizer.get_added_vocab():
        return tokenizer.batch_decode(
            list(map(list, rows)), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    added = tokenizer.added_tokens_decoder
    dropped = {number for number, token in added.items() if token.special and not _TOKEN.fullmatch(token.content)}
    kept = [[number for number in map(int, row) if number not in dropped] for row in rows]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [as_text(text) for text in texts]
