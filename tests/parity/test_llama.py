"""A model put together from Whisper and a Llama: packed = padded, and plain transformers decodes its export alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import PreTrainedTokenizerBase, Qwen2AudioForConditionalGeneration

from qwen2audio_train.config.schema import ModelConfig, ModelKind
from qwen2audio_train.data.examples import ChatExample, Clip, Message, TaskExample
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.export import check_export, export
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.evaluation.tiny import MEL_BINS, SAMPLES, noise, tiny_tokenizer
from tests.model.rows import AUDIO_ID, pack, pad, random_row
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, worst
from tests.tiny_parts import write_language_model, write_whisper

MIXTURE = [((100,), 1), ((), 2), ((20, 33, 47), 2), ((3000,), 1), ((37,), 1)]
"""Mel frames of the clips, and turns, of every sample."""


def assembled(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PackedQwen2Audio:
    write_whisper(folder / "whisper", bands=MEL_BINS)
    write_language_model(folder / "llama", "llama", tokenizer)
    parts = {"audio_encoder": str(folder / "whisper"), "language_model": str(folder / "llama")}
    torch.manual_seed(2)
    return build_model(ModelConfig(kind=ModelKind.assembled, **parts), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedQwen2Audio:
    model = assembled(tmp_path_factory.mktemp("parts"), tiny_tokenizer())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed_positions" not in name:
                weight.mul_(4.0)  # the best token is clear of the second
    return model


def test_packed_row_equals_padded_rows(model: PackedQwen2Audio, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path)
    assert type(stock.model.language_model).__name__ == "LlamaModel"
    rng = torch.Generator().manual_seed(1)
    rows = [random_row(rng, frames, turns=turns) for frames, turns in MIXTURE]
    packed, padded = pack(rows), pad(rows, rng)
    for batch in (packed, padded):
        batch["input_ids"][batch["input_ids"] == AUDIO_ID] = model.config.audio_token_index
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(name in trained)
    loss, grads = gradients(stock, stock(**padded).loss)
    out = model.eval()(**packed)
    our_loss, our_grads = gradients(model, out.nll_sum / out.weight_sum)
    assert torch.allclose(our_loss, loss, rtol=RELATIVE_TOLERANCE, atol=0.0)
    name, gap = worst(our_grads, grads)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"


def test_plain_transformers_decodes_the_export_alike(model: PackedQwen2Audio, tmp_path: Path) -> None:
    rng, clips = np.random.default_rng(5), []
    for index in range(3):
        soundfile.write(tmp_path / f"{index}.wav", noise(rng, 0.5 + 0.6 * index), 16_000)
        clips.append(Clip(str(tmp_path / f"{index}.wav"), None))
    examples = [
        *(TaskExample(f"task{index}", clip, "asr", "en", "", "noise") for index, clip in enumerate(clips)),
        ChatExample("two", (Message("user", (clips[0], clips[1], "What is said in both?")),), "noise"),
        ChatExample("text", (Message("user", ("What is the cat on?",)),), "noise"),
    ]
    export(model, tiny_tokenizer(), SAMPLES, tmp_path / "export")
    decoding = Decoding(max_new_tokens=8)
    assert check_export(tmp_path / "export", model, tiny_tokenizer(), SAMPLES, examples, decoding=decoding) == []
