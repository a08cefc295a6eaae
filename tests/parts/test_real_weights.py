"""What random weights cannot show: large activations, real attention, a real tokenizer, on recordings of people.

`QWEN2AUDIO_PARTS` is the folder that `launch/parts.py` filled, `QWEN2AUDIO_CLIPS` one with recordings in it or below.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import PreTrainedTokenizerBase, Qwen2AudioForConditionalGeneration, WhisperModel

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import AdapterConfig, AdapterKind, ModelConfig, ModelKind
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.data.samples.sample import materialise
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts
from qwen2audio_train.export import check_export, export
from qwen2audio_train.families.qwen2_audio import num_audio_tokens
from qwen2audio_train.layout import MAX_FRAMES, MAX_SAMPLES, SAMPLING_RATE
from qwen2audio_train.model.adapters import apply_adapter, merge_adapter
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.encoder import encode_packed
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.training.stages.tokenizer import load_tokenizer, of_family
from tests.runs import logged, pairs_recipe, train

PARTS, CLIPS = (Path(os.environ.get(name, "")) for name in ("QWEN2AUDIO_PARTS", "QWEN2AUDIO_CLIPS"))
BANDS = 80
RECIPE = SampleRecipe(num_mel_bins=BANDS)
DECODING = Decoding(max_new_tokens=6)

pytestmark = [
    pytest.mark.parts,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(os.environ.get(name) for name in ("QWEN2AUDIO_PARTS", "QWEN2AUDIO_CLIPS")),
        reason="QWEN2AUDIO_PARTS and QWEN2AUDIO_CLIPS name no folders",
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return of_family(load_tokenizer("model.language_model", str(PARTS / "smollm2_135m_instruct")))


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PackedQwen2Audio:
    torch.manual_seed(0)
    found = {"audio_encoder": PARTS / "whisper_base", "language_model": PARTS / "smollm2_135m_instruct"}
    parts = {key: str(folder) for key, folder in found.items()}
    return build_model(ModelConfig(kind=ModelKind.assembled, **parts), tokenizer=tokenizer).eval()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """The first two to five seconds of four recordings, spread over the folder."""
    files = sorted(path for path in CLIPS.rglob("*") if path.suffix in {".wav", ".flac", ".ogg", ".mp3"})
    found, folder = [], tmp_path_factory.mktemp("clips")
    for index in range(4):
        waveform = load_audio(Clip(str(files[len(files) * index // 4]), None))
        soundfile.write(folder / f"{index}.wav", waveform[: (2 + index) * SAMPLING_RATE], SAMPLING_RATE)
        found.append(Clip(str(folder / f"{index}.wav"), None))
    return found


def examples(clips: list[Clip]) -> list[TaskExample]:
    return [TaskExample(f"{index}", clip, "asr", "en", "so it is", "real") for index, clip in enumerate(clips)]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def test_the_encoder_on_a_full_window_is_whisper(model: PackedQwen2Audio, clips: list[Clip]) -> None:
    """Up to the norm, which Whisper has before and Qwen2-Audio after the pooling. 30 s: Whisper masks no padding."""
    encoder = WhisperModel.from_pretrained(PARTS / "whisper_base").encoder
    waveform = np.concatenate([load_audio(clip) for clip in clips])
    mel, frames = log_mel(np.resize(waveform, MAX_SAMPLES), BANDS)
    features = torch.from_numpy(mel)
    caught: list[torch.Tensor] = []
    encoder.layer_norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    encoder(features[None, :, :MAX_FRAMES])
    expected = encoder.layer_norm(caught[0][0].view(750, 2, -1).mean(1))
    ours = encode_packed(model.model.audio_tower, features, torch.tensor([frames]))
    gap = relative(ours, expected)
    print(f"encoder, 30 s: {gap:.1e}")
    assert gap < 1e-5


@pytest.fixture(scope="module")
def exported(
    model: PackedQwen2Audio, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return export(model, tokenizer, RECIPE, tmp_path_factory.mktemp("export"))


@torch.no_grad()
def test_packed_clips_are_padded_clips(model: PackedQwen2Audio, exported: Path, clips: list[Clip]) -> None:
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(exported).eval()
    caught: list[torch.Tensor] = []
    stock.model.audio_tower.register_forward_hook(lambda _, inputs, out: caught.append(out.last_hidden_state))
    samples = [materialise(example, load_tokenizer("x", str(exported)), RECIPE) for example in examples(clips)]
    batch = pack(samples, num_mel_bins=BANDS)
    ours = encode_packed(model.model.audio_tower, batch["mel"], batch["clip_frames"])
    out = model(**batch)
    lengths = [num_audio_tokens(frames) for frames in batch["clip_frames"].tolist()]
    losses = []
    for sample, mine in zip(samples, ours.split(lengths), strict=True):
        ids, mask = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.label_mask)[None]
        features = torch.zeros(1, BANDS, MAX_FRAMES)
        features[0, :, : sample.mels[0].shape[1]] = torch.from_numpy(sample.mels[0])[:, :MAX_FRAMES]
        heard = (torch.arange(MAX_FRAMES) < sample.clip_frames[0]).long()[None]
        loss = stock(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features,
            feature_attention_mask=heard,
            labels=ids.masked_fill(~mask, -100),
        ).loss
        losses.append(float(loss) * int(mask.sum()))
        gap = relative(mine, caught[-1][0, : len(mine)])
        print(f"encoder, {sample.clip_frames[0] / 100:.1f} s: {gap:.1e}")
        assert gap < 1e-4
    print(f"loss: {float(out.nll_sum)} packed, {sum(losses)} padded")
    assert float(out.nll_sum) == pytest.approx(sum(losses), rel=1e-4)


def test_plain_transformers_decodes_the_export_alike(
    model: PackedQwen2Audio, tokenizer: PreTrainedTokenizerBase, exported: Path, clips: list[Clip]
) -> None:
    assert check_export(exported, model, tokenizer, RECIPE, examples(clips), decoding=DECODING) == []


def test_a_batch_of_sixteen_decodes_as_one_by_one(
    model: PackedQwen2Audio, tokenizer: PreTrainedTokenizerBase, clips: list[Clip]
) -> None:
    """Sixteen prompts on four recordings, of unlike lengths."""
    tasks = ("asr", "lid", "aac", "ser")
    prompts = [
        materialise(TaskExample(f"{task}{index}", clip, task, "en", "", "real"), tokenizer, RECIPE, for_generation=True)
        for task in tasks
        for index, clip in enumerate(clips)
    ]
    longest = max(len(prompt.input_ids) for prompt in prompts) + DECODING.max_new_tokens
    one = Decoding(max_new_tokens=DECODING.max_new_tokens, tokens_per_batch=1)
    many = Decoding(max_new_tokens=DECODING.max_new_tokens, tokens_per_batch=16 * longest)
    assert generate_texts(model, tokenizer, prompts, many) == generate_texts(model, tokenizer, prompts, one)


@pytest.fixture
def adapted(model: PackedQwen2Audio) -> torch.nn.Module:
    """The model with an adapter that changes it. Its only test is the last: afterwards the model is another one."""
    parts = ["language_model", "audio_tower", "multi_modal_projector"]
    adapted = apply_adapter(model, AdapterConfig(kind=AdapterKind.lora, r=8, modules=parts))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    return adapted.eval()


def test_the_first_loss_of_dpo_is_ln_2(tmp_path: Path, clips: list[Clip]) -> None:
    lines = [
        {"id": f"{index}", "prompt": [{"role": "user", "content": [{"type": "audio", "audio": clip.path}]}]}
        | {"chosen": "so it is said", "rejected": "I cannot hear that"}
        for index, clip in enumerate(clips)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [f"model.audio_encoder={PARTS}/whisper_base", f"model.language_model={PARTS}/smollm2_135m_instruct"]
    config = pairs_recipe(
        tmp_path,
        tmp_path / "run",
        "model.kind=assembled",
        "model.num_mel_bins=80",
        *parts,
        "adapter.kind=lora",
        "adapter.dropout=0.0",
        "data.tokens_per_pack=2000",
        "data.packs_per_step=1",
        "trainer.max_steps=1",
    )
    train(config)
    ((loss,),) = logged(config, "loss")
    print(f"first loss of DPO: {loss}")
    assert loss == pytest.approx(math.log(2), abs=1e-5)


@torch.no_grad()
def test_a_merged_adapter_is_the_unmerged_one(
    adapted: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, clips: list[Clip]
) -> None:
    batch = pack([materialise(example, tokenizer, RECIPE) for example in examples(clips)], num_mel_bins=BANDS)
    with adapted.disable_adapter():  # type: ignore[operator]
        plain = adapted(**batch).nll
    before = adapted(**batch).nll
    after = merge_adapter(adapted)(**batch).nll
    print(f"merged: {relative(after, before):.1e}, the adapter itself: {relative(plain, before):.1e}")
    assert relative(after, before) < 1e-4
    assert relative(plain, before) > 1e-2
