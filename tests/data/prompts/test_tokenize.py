"""Ids: those of the stock processor, exact label borders, and no way from data text to a special token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast, Qwen2AudioProcessor

from qwen2audio_train.data.examples import ChatExample, Clip, Message, PreferenceExample
from qwen2audio_train.data.prompts.render import Rendered, Text, render, rendered_text
from qwen2audio_train.data.prompts.tokenize import count_tokens, tokenize
from qwen2audio_train.data.prompts.tokenizer import QWEN2_WORDS, of_family, save_processor, train_tokenizer
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO

PUBLISHED = Path(__file__).parents[4] / "shared" / "tokenizer"
SECOND = 16_000


def chat(text: str, answer: str = "Hello.", seconds: float = 1.0) -> ChatExample:
    messages = (Message("user", (Clip("a.wav", seconds), text)), Message("assistant", (answer,)))
    return ChatExample("b1", messages, "s")


def test_trained_tokenizer_is_deterministic_and_complete(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["hello world", "über 你好 123"]
    assert train_tokenizer(texts, 300).get_vocab() == train_tokenizer(texts, 300).get_vocab()
    ids = tokenizer.convert_tokens_to_ids([*QWEN2_AUDIO.special_tokens, "<|en|>"])
    assert ids == list(range(ids[0], ids[0] + 7))
    assert len(tokenizer) == ids[-1] + 1 <= 330
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
    assert tokenizer.decode(tokenizer("Ünknown 語, 42!").input_ids) == "Ünknown 語, 42!"
    with pytest.raises(ValueError, match=r"model\.vocab_size: 200 is too small"):
        train_tokenizer(texts, 200)


def test_processor_folder_loads_offline(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_processor(tokenizer, tmp_path, num_mel_bins=80)
    for cls in (AutoProcessor, Qwen2AudioProcessor):
        processor = cls.from_pretrained(tmp_path)
        assert isinstance(processor, Qwen2AudioProcessor)
        assert processor.audio_token_id == tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        assert processor.feature_extractor.feature_size == 80
        assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert processor.tokenizer.audio_token == "<|AUDIO|>"
        assert "<|im_start|>" in processor.chat_template


@pytest.mark.parametrize("seconds", [0.04, 1.0, 4.04])
def test_ids_are_those_of_the_stock_processor(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, seconds: float
) -> None:
    save_processor(tokenizer, tmp_path)
    processor = Qwen2AudioProcessor.from_pretrained(tmp_path)
    example = chat("\n What is said here, 123?\n\n")
    num_samples = round(seconds * SECOND)
    rendered = render(example, for_generation=True)
    stock = processor(
        text=rendered_text(rendered),
        audio=[np.zeros(num_samples, np.float32)],
        sampling_rate=SECOND,
        return_tensors="np",
    )
    np.testing.assert_array_equal(tokenize(rendered, tokenizer, [num_samples]).input_ids, stock["input_ids"][0])


@given(question=st.text(min_size=1), answer=st.text(min_size=1))
def test_label_border_is_exact_for_any_text(tokenizer: Any, question: str, answer: str) -> None:
    """Prompt ids are those of generation, answer ids those of the answer alone, whatever stands at the border."""
    example = chat(question, answer)
    asked = tokenize(render(example, for_generation=True), tokenizer, [SECOND])
    tokens = tokenize(render(example), tokenizer, [SECOND])
    border = len(asked.input_ids)
    np.testing.assert_array_equal(tokens.input_ids[:border], asked.input_ids)
    assert not tokens.label_mask[:border].any()
    assert tokens.label_mask[border:-1].all()
    assert not tokens.label_mask[-1]
    assert tokens.input_ids[-2] == tokenizer.eos_token_id
    plain = tokenizer(answer, split_special_tokens=True, add_special_tokens=False).input_ids
    np.testing.assert_array_equal(tokens.input_ids[border:-2], plain)


@pytest.mark.parametrize("token", [*QWEN2_AUDIO.special_tokens, "<|en|>"])
def test_data_text_never_becomes_a_special_token(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    """`render` refuses all but the tags of languages; what gets by it is characters."""
    special = tokenizer.convert_tokens_to_ids(token)
    clip, end = (Text("<|audio_bos|>", is_markup=True), Clip("a", 1.0)), Text("<|im_end|>", True, True)
    before, after = (
        tokenize(Rendered("x", "s", "chat", (*clip, Text(text), Text(text, True), end)), tokenizer, [SECOND]).input_ids
        for text in ("a", f"a{token}")
    )
    assert (before == special).sum() == (after == special).sum()
    assert len(after) > len(before)


def test_a_placeholder_of_a_prompt_is_no_clip(tokenizer: PreTrainedTokenizerFast) -> None:
    trunk = (Text("<|audio_bos|><|AUDIO|><|audio_eos|>What?", is_markup=True), Text("Glass.", True))
    with pytest.raises(ExampleError, match=r'"x": 1 tokens <\|AUDIO\|> where its clips have 0'):
        tokenize(Rendered("x", "s", "chat", trunk), tokenizer, [])
    with pytest.raises(ExampleError, match=r"26 tokens .* have 25"):
        tokenize(Rendered("x", "s", "chat", (Clip("a", 1.0), *trunk)), tokenizer, [SECOND])


def test_placeholders_and_their_places(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = Message("user", (Clip("a.wav", 1.0), Clip("b.wav", 31.0), "Which is longer?"))
    example = ChatExample("b", (turn, Message("assistant", ("The second.",))), "s")
    rendered = render(example)
    tokens = tokenize(rendered, tokenizer, [SECOND, 31 * SECOND])
    audio = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    np.testing.assert_array_equal(np.flatnonzero(tokens.input_ids == audio), tokens.audio_slot)
    assert len(tokens.audio_slot) == 25 + 750 + 25
    assert list(np.flatnonzero(np.diff(tokens.audio_slot) > 1)) == [24]  # both windows of the long clip in one run
    count = count_tokens(rendered, tokenizer)
    assert (count.trunk, count.audio, count.total) == (len(tokens.input_ids), 800, len(tokens.input_ids))
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        tokenize(rendered, tokenizer, [SECOND])


def test_branches_and_missing_durations(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = (Message("user", (Clip("a.wav", 1.0), "What?")),)
    rendered = render(PreferenceExample("c1", prompt, "Good.", ("Bad.",), "s"))
    tokens = tokenize(rendered, tokenizer, [SECOND])
    assert [tokenizer.decode(branch) for branch in tokens.branches] == ["Good.<|im_end|>", "Bad.<|im_end|>"]
    assert count_tokens(rendered, tokenizer).branches == tuple(len(branch) for branch in tokens.branches)
    with pytest.raises(ExampleError, match=r'"b1": a\.wav has no duration_s'):
        count_tokens(render(chat("x", seconds=None)), tokenizer)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_refused() -> None:
    words = Tokenizer(models.BPE())
    words.add_special_tokens(["<|x|>"])
    with pytest.raises(ValueError, match=r"no token <\|AUDIO\|>"):
        tokenize(render(chat("x")), PreTrainedTokenizerFast(tokenizer_object=words), [SECOND])


@cache
def published_tokenizer() -> PreTrainedTokenizerFast:
    vocab = json.loads((PUBLISHED / "vocab.json").read_text(encoding="utf-8"))
    lines = (PUBLISHED / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    return of_family(PreTrainedTokenizerFast(tokenizer_object=bpe))


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published vocabulary is not part of this repository")
def test_published_token_vector() -> None:
    special = json.loads((PUBLISHED / "qwen2_audio_special_tokens.json").read_text())
    tokenizer = published_tokenizer()
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN2_AUDIO.special_tokens} == special[
        "special_tokens"
    ]
    expected = []
    for item in special["test_vector"]["expected_ids"]:
        expected += [151646] * 101 if isinstance(item, str) else [item]
    example = chat("What's that sound?")
    tokens = tokenize(render(example, for_generation=True), tokenizer, [round(4.04 * SECOND)])
    assert tokens.input_ids.tolist() == expected
