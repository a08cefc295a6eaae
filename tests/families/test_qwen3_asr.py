"""Qwen3-ASR beside transformers' own classes: layout, tokens, loss and gradients, training, export, decoded texts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ASRForConditionalGeneration

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ConfigError, ModelConfig, ModelKind, StageConfig
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.examples import ChatExample, Clip, Example, Message, TaskExample
from qwen2audio_train.data.prompts.render import render, rendered_text
from qwen2audio_train.data.prompts.tokenizer import build_processor, train_tokenizer
from qwen2audio_train.data.samples.collate import indexed, pack
from qwen2audio_train.data.samples.sample import Sample, build_sample
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.export import check_export, export
from qwen2audio_train.families.qwen3_asr import QWEN3_ASR, mel_columns, num_audio_tokens
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.qwen3_asr import PackedQwen3ASR
from qwen2audio_train.training.stages.policy import load_for_inference
from tests.noise import WORDS
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, worst
from tests.runs import logged, recipe, train

BANDS = 16
SAMPLES = SampleRecipe(num_mel_bins=BANDS, family="qwen3_asr")
ARCHITECTURE: dict[str, Any] = {
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "downsample_hidden_size": 8,
        "output_dim": 48,
    },
    "text_config": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 64,
    },
}
CLIP = Clip("a.wav", None)
TASK = TaskExample("task", CLIP, "asr", "en", "hello there", "noise")
CHAT = ChatExample("chat", (Message("user", (CLIP, "Like", CLIP)), Message("assistant", ("No.",))), "noise")
TEXT = ChatExample("text", (Message("user", ("Hello?",)), Message("assistant", ("Yes, hello.",))), "noise")
LENGTHS = (500, 1_281, 15_900, 16_000, 16_160, 21_333, 128_000, 131_111, 270_001, 480_000)
"""Samples: under one token, around a second, around the 8 s that attend to each other, and 30 s."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([*WORDS, "hello there", "Like"], 300, family=QWEN3_ASR)


def waveforms(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.normal(0, 0.1, length).astype(np.float32) for length in lengths]


def sample_of(example: Example, tokenizer: PreTrainedTokenizerFast, *lengths: int) -> Sample:
    return build_sample(render(example, family=QWEN3_ASR), waveforms(*lengths), tokenizer, SAMPLES)


def build(tokenizer: PreTrainedTokenizerFast) -> PackedQwen3ASR:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(family="qwen3_asr", kind=ModelKind.tiny, num_mel_bins=BANDS, architecture=ARCHITECTURE),
        tokenizer=tokenizer,
    )
    assert isinstance(model, PackedQwen3ASR)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(4.0)  # attention is far from uniform, and the best token clear of the second
    return model


def stock_of(model: PackedQwen3ASR, folder: Path) -> Qwen3ASRForConditionalGeneration:
    """The stock class with the weights as they are saved."""
    model.save_pretrained(folder)
    stock, report = Qwen3ASRForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return stock


def test_a_chat_is_that_of_the_saved_template(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = build_processor(tokenizer, BANDS, QWEN3_ASR)
    audio = {"type": "audio", "audio": "a.wav"}
    said = [{"role": "user", "content": [audio, {"type": "text", "text": "Like"}, audio]}]
    ours = rendered_text(render(CHAT, family=QWEN3_ASR, for_generation=True))
    assert ours == processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    sound = "<|audio_start|><|audio_pad|><|audio_end|>"
    assert ours == (
        f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{sound}Like{sound}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_clips_are_heard_as_the_stock_processor_hears_them(length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    processor: Any = build_processor(tokenizer, BANDS, QWEN3_ASR)
    (waveform,) = waveforms(length)
    text = rendered_text(render(TASK, family=QWEN3_ASR))
    theirs = processor(
        text=text, audio=[waveform], sampling_rate=16_000, return_tensors="pt", **QWEN3_ASR.processor_options
    )
    sample = sample_of(TASK, tokenizer, length)
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    (frames,) = sample.clip_frames
    assert frames == theirs["input_features_mask"].sum()
    assert len(sample.audio_slot) == num_audio_tokens(frames)
    mel, _ = log_mel(waveform, BANDS, QWEN3_ASR)
    seen = min(frames + QWEN3_ASR.lookahead_frames, mel_columns(frames))
    assert np.array_equal(mel[:, :seen], theirs["input_features"][0, :, :seen].numpy())


def stock_loss(stock: Qwen3ASRForConditionalGeneration, sample: Sample) -> Tensor:
    """Sum of the labels' negative log-likelihoods of one sample by itself, its clips padded to the longest."""
    ids = torch.from_numpy(sample.input_ids)
    labels = torch.where(torch.from_numpy(sample.label_mask), ids, -100)
    inputs: dict[str, Any] = {"input_ids": ids[None], "labels": labels[None], "num_items_in_batch": 1}
    if sample.mels:
        width = max(mel.shape[1] for mel in sample.mels)
        features, mask = torch.zeros(len(sample.mels), BANDS, width), torch.zeros(len(sample.mels), width)
        for i, (mel, frames) in enumerate(zip(sample.mels, sample.clip_frames, strict=True)):
            features[i, :, : mel.shape[1]] = torch.from_numpy(mel)
            mask[i, :frames] = 1
        inputs |= {"input_features": features, "input_features_mask": mask.long()}
    loss: Tensor = stock(**inputs).loss
    return loss


def test_a_packed_row_is_its_samples_one_by_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build(tokenizer)
    stock = stock_of(model, tmp_path)
    samples = [sample_of(TASK, tokenizer, length) for length in LENGTHS[:-2]]
    samples += [sample_of(CHAT, tokenizer, 9_000, 150_000), sample_of(TEXT, tokenizer)]
    batch = pack(samples, num_mel_bins=BANDS)
    loss, grads = gradients(model, model(**indexed(batch, QWEN3_ASR)).nll_sum)
    expected, theirs = gradients(stock, sum((stock_loss(stock, sample) for sample in samples), torch.zeros(())))
    assert torch.allclose(loss, expected, rtol=RELATIVE_TOLERANCE, atol=0.0)
    largest = max(float(grad.norm()) for grad in theirs.values())
    for name in [name for name in theirs if name.endswith("k_proj.bias")]:
        # What is added to every key alike changes no attention: this gradient is zero but for rounding.
        assert max(float(each.pop(name).norm()) for each in (grads, theirs)) < 1e-6 * largest
    name, gap = worst(grads, theirs)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"
    assert "lm_head.weight" not in theirs  # tied, as the published ones are
    with torch.no_grad():
        assert torch.equal(model(**batch).nll_sum, loss)  # where the clips lie is found out on the way


def test_other_windows_of_attention_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    audio = {**ARCHITECTURE["audio_config"], "n_window_infer": 400}
    config = ModelConfig(family="qwen3_asr", kind=ModelKind.tiny, architecture={**ARCHITECTURE, "audio_config": audio})
    with pytest.raises(ConfigError, match=r"are \(50, 400\), packed clips need \(50, 800\)"):
        build_model(config, tokenizer=tokenizer)


def test_the_stock_class_decodes_an_export_alike(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    clips = []
    for index, waveform in enumerate(waveforms(5_000, 17_000, 133_000)):
        soundfile.write(tmp_path / f"{index}.wav", waveform, 16_000)
        clips.append(Clip(str(tmp_path / f"{index}.wav"), None))
    examples: list[Example] = [
        *(TaskExample(f"task{index}", clip, "asr", "en", "", "noise") for index, clip in enumerate(clips)),
        ChatExample("chat", (Message("user", (clips[0], "What is said?")),), "noise"),
        ChatExample("text", (Message("user", ("What is the cat on?",)),), "noise"),
    ]
    model = build(tokenizer)
    export(model, tokenizer, SAMPLES, tmp_path / "export")
    decoding = Decoding(max_new_tokens=8)
    assert check_export(tmp_path / "export", model, tokenizer, SAMPLES, examples, decoding=decoding) == []


def stage(corpus: Path, folder: Path, *overrides: str) -> StageConfig:
    config = recipe(corpus, folder, "model.family=qwen3_asr", "data.tokens_per_pack=200", *overrides)
    config.model.architecture = ARCHITECTURE
    return config


SAVED = ("trainer.max_steps=6", "trainer.save_strategy=steps", "trainer.save_steps=3", "trainer.save_total_limit=2")


@pytest.mark.slow
def test_it_trains_resumes_and_takes_an_adapter(noise: Path, tmp_path: Path) -> None:
    """Stage one; stage two from it with an adapter; both broken off after three steps and gone on with."""
    for name, more in {
        "one": [],
        "two": ["stage=sft", f"init_from={tmp_path / 'one'}", "adapter.kind=lora",
                "adapter.modules=[language_model,audio_tower,multi_modal_projector]"],
    }.items():  # fmt: skip
        whole = stage(noise, tmp_path / name, *SAVED, *more)
        trained = train(whole).model
        losses = [loss for (loss,) in logged(whole, "loss")]
        assert len(losses) == 6
        assert losses[-1] < losses[0]
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-again", ignore=shutil.ignore_patterns("*-6", "log.jsonl"))
        again = train(stage(noise, tmp_path / f"{name}-again", *SAVED, *more)).model
        assert len(logged(stage(noise, tmp_path / f"{name}-again", *SAVED, *more), "loss")) == 3, "it did not go on"
        for key, weight in trained.state_dict().items():
            assert torch.equal(weight, again.state_dict()[key]), key
        names = {key for key, weight in trained.named_parameters() if weight.requires_grad}
        for part in ("audio_tower.layers.0.self_attn.q_proj", "multi_modal_projector.linear_1", "layers.1.mlp.up_proj"):
            assert any(part in key for key in names), part
        assert all("lora" in key for key in names) == (name == "two")
    loaded = load_for_inference(str(tmp_path / "one"))
    assert loaded.samples.family == "qwen3_asr"
    assert not loaded.caveats
