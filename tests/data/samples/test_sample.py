"""From a manifest line to tensors and back to the audio that it names."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import LabelledTurns, LongAudio, PromptStyle, SampleRecipe, Timestamps
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.examples import ChatExample, Clip, Message, PreferenceExample, TaskExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.prompts.render import render
from qwen2audio_train.data.prompts.tokenize import count_tokens
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.data.samples.maker import Maker, measure, with_duration
from qwen2audio_train.data.samples.sample import materialise
from qwen2audio_train.errors import ExampleError
from tests.data.file_server import Server

Tone = Callable[..., Path]


def asr(path: Path, seconds: float | None = 1.0) -> TaskExample:
    return TaskExample("a1", Clip(str(path), seconds), "asr", "en", "hello", "s")


def test_from_line_to_batch(
    write_tone: Tone, write_manifest: Callable[[list[Any]], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_tone("a.wav")
    line = {"id": "a1", "audio": "a.wav", "duration_s": 1.0, "task": "asr", "language": "en", "target": "hello"}
    [example] = read_manifest(write_manifest([line]))
    sample = materialise(example, tokenizer, source_id=3, weight=0.5)
    mel, frames = log_mel(load_audio(Clip(str(path), 1.0)))
    assert (sample.clip_frames, frames) == ((100,), 100)
    np.testing.assert_array_equal(sample.mels[0], mel)
    assert (sample.id, sample.source, sample.task, sample.source_id, sample.weight) == ("a1", "corpus", "asr", 3, 0.5)
    assert tokenizer.decode(sample.input_ids[sample.label_mask]).endswith("hello<|endoftext|>")
    assert sample.num_tokens == count_tokens(render(example), tokenizer).total
    batch = pack([sample, sample])
    assert batch["audio_slot"].tolist() == [*range(1, 26), *range(1 + sample.num_tokens, 26 + sample.num_tokens)]
    assert batch["weight"].unique().tolist() == [0.5]


def test_preference_and_generation(write_tone: Tone, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = (Message("user", (Clip(str(write_tone("a.wav")), 1.0), "What?")),)
    example = PreferenceExample("c1", prompt, "Good.", ("Bad.",), "s")
    sample = materialise(example, tokenizer)
    assert [tokenizer.decode(branch) for branch in sample.branches] == ["Good.<|im_end|>", "Bad.<|im_end|>"]
    asked = materialise(example, tokenizer, for_generation=True)
    assert asked.branches == ()
    np.testing.assert_array_equal(asked.input_ids, sample.input_ids)


def test_long_audio(write_tone: Tone, tokenizer: PreTrainedTokenizerFast) -> None:
    example = asr(write_tone("a.wav", seconds=61.0), 61.0)
    sample = materialise(example, tokenizer)
    assert sample.clip_frames == (3_000, 3_000, 100)
    assert len(sample.audio_slot) == 750 + 750 + 25
    with pytest.raises(ExampleError, match=r'"a1": .*a\.wav is 61\.00 s long .* data\.long_audio=split'):
        materialise(example, tokenizer, SampleRecipe(long_audio=LongAudio.reject))


def test_nothing_is_cut_off(write_tone: Tone, tokenizer: PreTrainedTokenizerFast) -> None:
    example = asr(write_tone("a.wav"))
    length = materialise(example, tokenizer).num_tokens
    assert Maker(tokenizer, SampleRecipe(), length).make(example, 0, 0).num_tokens == length
    with pytest.raises(
        ExampleError, match=rf'"a1": {length} tokens \(25 of them audio\) are beyond the limit of {length - 1}'
    ):
        Maker(tokenizer, SampleRecipe(), length - 1).make(example, 0, 0)


def test_options_and_augmentation(write_tone: Tone, tokenizer: PreTrainedTokenizerFast) -> None:
    example = asr(write_tone("a.wav"))
    samples = SampleRecipe(num_mel_bins=80, prompt_style=PromptStyle.hierarchical_tags)
    sample = materialise(
        example,
        tokenizer,
        samples,
        augment_waveform=lambda waveform: waveform[:8_000],
        augment_mel=lambda mel, frames: mel + frames,
    )
    mel, frames = log_mel(load_audio(example.clip)[:8_000], 80)
    assert sample.clip_frames == (frames,) == (50,)
    np.testing.assert_array_equal(sample.mels[0], mel + 50)
    assert len(sample.audio_slot) == 12
    assert "<|startoftranscript|>" in tokenizer.decode(sample.input_ids)


def test_remote_clips_are_read_as_the_recipe_says(
    write_tone: Tone, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, server: Server
) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(write_tone("a.wav"), "a.wav")
    server.files["/s.tar"] = (tmp_path / "s.tar").read_bytes()
    samples = SampleRecipe(cache_dir=str(tmp_path / "here"))
    example = TaskExample("a1", Clip(f"{server.url('/s.tar')}::a.wav", None), "asr", "en", "hello", "s")
    length = measure(example, tokenizer, samples)
    assert (length.duration_s, length.audio_tokens) == (1.0, 25)
    assert materialise(example, tokenizer, samples).num_tokens == length.audio_tokens + length.text_tokens
    assert [path.name[-5:] for path in (tmp_path / "here" / "shards").glob("*.tar")] == ["s.tar"]


def test_the_length_of_a_slice_without_duration(write_tone: Tone, tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(write_tone("a.wav"))
    lengths = [with_duration(Clip(path, None, *cut), SampleRecipe()).duration_s for cut in ((), (0.25,), (0.25, 0.75))]
    assert lengths == [1.0, 0.75, 0.5]


def test_clips_from_memory(write_tone: Tone, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_tone("a.wav")
    turn = Message("user", (Clip("x", 1.0), Clip("y", 1.0)))
    example = ChatExample("b", (turn, Message("assistant", ("ok",))), "s")
    sample = materialise(example, tokenizer, audio_bytes=[path.read_bytes()] * 2)
    assert sample.clip_frames == (100, 100)
    with pytest.raises(AudioError, match=r"^x: no such file"):
        materialise(example, tokenizer)


def test_wrong_durations(write_tone: Tone, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_tone("a.wav", seconds=2.0)
    for seconds in (None, 1.6, 2.4):
        assert materialise(asr(path, seconds), tokenizer).clip_frames == (200,)
    for seconds in (1.0, 20.0):
        with pytest.raises(ExampleError, match=rf"a\.wav is 2\.00 s long, its manifest says {seconds:.2f} s"):
            materialise(asr(path, seconds), tokenizer)


def test_the_key_of_an_index_holds_all_that_its_counts_depend_on(tokenizer: PreTrainedTokenizerFast) -> None:
    """A change of anything else finds the same index, and so does the recipe of a run from before some keys were."""
    plain = SampleRecipe()
    changes: dict[str, Any] = {
        "prompt_style": PromptStyle.hierarchical_tags,
        "prompt_seed": 1,
        "prompts_per_task": 1,
        "timestamps": Timestamps.tokens,
        "labelled_turns": LabelledTurns.last,
        "long_audio": next(way for way in LongAudio if way is not plain.long_audio),
        "family": "another",
    }
    keys = {Maker(tokenizer, replace(plain, **{key: value})).measure_key for key, value in changes.items()}
    others_at_hand = Maker(tokenizer, plain, for_generation=True), Maker(train_tokenizer(["a"], 330), plain)
    keys |= {maker.measure_key for maker in others_at_hand}
    assert len(keys) == len(changes) + 2
    assert Maker(tokenizer, plain).measure_key not in keys
    others = {"num_mel_bins", "cache_dir", "cache_max_gib", "network_retries", "network_timeout_s", "decode_timeout_s"}
    assert {field.name for field in fields(SampleRecipe)} == changes.keys() | others
