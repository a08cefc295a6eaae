"""The prompt of an example: the same in every pass, or another with `data.prompt_per_pass`; and what is planned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import DataConfig
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.samples.maker import Maker, maker_of
from tests.data.corpora import fingerprint, small_config, two_sources


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return small_config(tmp_path, two_sources(tmp_path, 12, 5), prompt_per_pass=True)


def prompts(maker: Maker, example: Any, passes: range) -> list[str]:
    samples = (maker.make(example, 0, number) for number in passes)
    return [maker.tokenizer.decode(s.input_ids[~s.label_mask], skip_special_tokens=True) for s in samples]


def examples(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[Any]:
    loader: Any = build_batches(data, tokenizer)
    for index in loader.planner.indexes:
        yield from (index.read(number) for number in range(len(index)))


def test_every_pass_draws_a_prompt_of_its_own(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    maker = maker_of(data, tokenizer, 128)
    fixed = Maker(tokenizer, maker.recipe, maker.max_tokens)
    seen: set[str] = set()
    for example in examples(data, tokenizer):
        assert len(set(prompts(fixed, example, range(6)))) == 1
        found = prompts(maker, example, range(6))
        assert found == prompts(maker, example, range(6))
        assert found[0] == prompts(fixed, example, range(1))[0]  # the first pass is what it would be without
        assert len(set(found)) > 1
        seen |= set(found)
    assert len(seen) == 4  # the whole pool of asr


def test_packs_hold_the_longest_and_a_resume_goes_on(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    maker = maker_of(data, tokenizer, 128)
    for example in examples(data, tokenizer):
        planned = maker.measure(example)
        lengths = [maker.make(example, 0, number).num_tokens for number in range(40)]
        assert max(lengths) == planned.audio_tokens + planned.text_tokens > min(lengths)
    assert maker.measure_key != maker_of(small_config(Path("x"), data.sources), tokenizer, 128).measure_key
    whole: Any = build_batches(data, tokenizer)
    batches = [next(stream) for stream in [iter(whole)] for _ in range(30)]  # several passes
    assert all(batch["input_ids"].numel() <= data.tokens_per_pack for batch in batches)
    resumed: Any = build_batches(data, tokenizer)
    resumed.load_state_dict(whole.state_dict(7))
    again = [next(stream) for stream in [iter(resumed)] for _ in range(9)]
    assert [*map(fingerprint, again)] == [*map(fingerprint, batches[21:])]
