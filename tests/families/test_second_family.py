"""A second family (`echo`) from a manifest's example to a training step, a checkpoint and decoded texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, LlamaModel, PreTrainedTokenizerFast

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ConfigError, ModelConfig, ModelKind
from qwen2audio_train.data.examples import ChatExample, Clip, Message, PreferenceExample, TaskExample
from qwen2audio_train.data.prompts.render import render, rendered_text
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.data.samples.collate import pack, pack_preference
from qwen2audio_train.data.samples.recipe import save_inputs, saved_recipe
from qwen2audio_train.data.samples.sample import Sample, build_sample
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts
from qwen2audio_train.families.known import FAMILIES
from qwen2audio_train.model.build import MODELS, build_model
from qwen2audio_train.training.stages.policy import load_for_inference
from tests.families.echo import ECHO, PATCH, EchoConfig, EchoForConditionalGeneration
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, worst
from tests.runs import logged, pairs_recipe, recipe, train

BANDS = 16
SAMPLES = SampleRecipe(num_mel_bins=BANDS, family="echo")
ARCHITECTURE = {
    "audio_config": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48},
    "text_config": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}
CLIP = Clip("a.wav", None)
TASK = TaskExample("task", CLIP, "asr", "en", "hello there", "noise")
CHAT = ChatExample("chat", (Message("user", (CLIP, "Like", CLIP)), Message("assistant", ("No.",))), "noise")
PAIR = PreferenceExample("pair", (Message("user", (CLIP, "What?")),), "A dog.", ("A cat barks.",), "noise")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "echo", ECHO)
    monkeypatch.setitem(MODELS, "echo", EchoForConditionalGeneration)
    AutoConfig.register("echo", EchoConfig, exist_ok=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["hello there", "a dog barks"], 300, family=ECHO)


def sample_of(example: TaskExample | ChatExample | PreferenceExample, tokenizer: PreTrainedTokenizerFast) -> Sample:
    """On clips of 1 001, 1 100, ... frames' noise: lengths that no patch divides are among them."""
    rng = np.random.default_rng(len(example.id))
    rendered = render(example, family=ECHO)
    waveforms = [rng.normal(0, 0.1, 4001 + 330 * i).astype(np.float32) for i, _ in enumerate(rendered.clips)]
    return build_sample(rendered, waveforms, tokenizer, SAMPLES)


def build(tokenizer: PreTrainedTokenizerFast) -> EchoForConditionalGeneration:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(family="echo", kind=ModelKind.tiny, num_mel_bins=BANDS, architecture=ARCHITECTURE),
        tokenizer=tokenizer,
    )
    assert isinstance(model, EchoForConditionalGeneration)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4.0)
    return model


def test_the_layout_is_its_own() -> None:
    task = rendered_text(render(TASK, family=ECHO, for_generation=True))
    assert task.startswith("[CLIP][SOUND][/CLIP]")
    assert "<|audio_bos|>" not in task
    assert rendered_text(render(CHAT, family=ECHO)) == (
        "[TURN]user: [CLIP][SOUND][/CLIP]Like[CLIP][SOUND][/CLIP][END][TURN]assistant: No.[END]"
    )


def test_tokens_and_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = sample_of(CHAT, tokenizer)
    counts = [-(-frames // PATCH) for frames in sample.clip_frames]
    assert sample.clip_frames == (26, 28)
    assert counts == [7, 7]
    sounds = sample.input_ids == tokenizer.convert_tokens_to_ids("[SOUND]")
    assert np.flatnonzero(sounds).tolist() == sample.audio_slot.tolist()
    assert sounds.sum() == sum(counts)
    assert [mel.shape for mel in sample.mels] == [(BANDS, 28), (BANDS, 28)]
    first, second = sample.audio_slot[:7], sample.audio_slot[7:]
    assert len(set(sample.positions[first])) == len(set(sample.positions[second])) == 1
    assert sample.positions[-1] == len(sample.input_ids) - 1 - 6 - 6


def reference(model: EchoForConditionalGeneration, sample: Sample, branch: np.ndarray | None = None) -> Tensor:
    """Sum of the labels' negative log-likelihoods of one sample by itself, from plain operations."""
    text = model.config.text_config.__class__(**model.config.text_config.to_dict())
    text._attn_implementation = "eager"
    decoder = LlamaModel(text)
    tower, ids, slots = model.model.audio_tower, sample.input_ids, set(sample.audio_slot.tolist())
    heard = []
    for mel, frames in zip(sample.mels, sample.clip_frames, strict=True):
        columns = torch.from_numpy(mel)[:, :frames]
        columns = F.pad(columns, (0, -frames % PATCH))
        patches = torch.stack([columns[:, i : i + PATCH].flatten() for i in range(0, columns.size(1), PATCH)])
        hidden = tower.patch(patches)
        for layer in tower.layers:
            q, k, v = layer.qkv(hidden).chunk(3, dim=-1)
            hidden = hidden + layer.out((q @ k.T / q.size(1) ** 0.5).softmax(-1) @ v)
        heard.append(tower.project(hidden))
    labels = sample.label_mask
    if branch is not None:
        ids, labels = np.concatenate([ids, branch]), np.concatenate([labels, np.ones(len(branch), dtype=bool)])
    embeds = model.get_input_embeddings()(torch.from_numpy(ids))
    audio, rows, positions, place = iter(torch.cat(heard)), [], [], -1
    for index in range(len(ids)):
        place += not (index in slots and index - 1 in slots)
        rows.append(next(audio) if index in slots else embeds[index])
        positions.append(place)
    weights = dict(model.model.language_model.named_parameters())
    given = {
        "inputs_embeds": torch.stack(rows)[None],
        "position_ids": torch.tensor([positions]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),  # without one, a repeated position is a border
        "use_cache": False,
    }
    hidden = torch.func.functional_call(decoder, weights, (), given).last_hidden_state[0]
    learnt = np.flatnonzero(labels)
    return F.cross_entropy(model.lm_head(hidden[learnt - 1]), torch.from_numpy(ids[learnt]), reduction="sum")


def test_a_packed_row_is_its_samples_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(tokenizer)
    samples = [sample_of(TASK, tokenizer), sample_of(CHAT, tokenizer), sample_of(TASK, tokenizer)]
    out = model(**pack(samples, num_mel_bins=BANDS))
    loss, grads = gradients(model, out.nll_sum)
    expected, theirs = gradients(model, sum((reference(model, sample) for sample in samples), torch.zeros(())))
    assert torch.allclose(loss, expected, rtol=RELATIVE_TOLERANCE, atol=0.0)
    name, gap = worst(grads, theirs)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"


def test_the_answers_of_a_pair_go_on_at_the_prompts_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    model, sample = build(tokenizer), sample_of(PAIR, tokenizer)
    batch = pack_preference([sample], num_mel_bins=BANDS)
    inner = {name: value for name, value in batch.items() if name not in ("attention_mask", "completion_mask")}
    logits = model.lm_head(model.model(**inner).last_hidden_state[:, :-1]).float()
    nll = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    ours = (nll * batch["completion_mask"][:, 1:]).sum(dim=1)
    theirs = torch.stack([reference(model, sample, branch) for branch in sample.branches])
    assert torch.allclose(ours, theirs, rtol=RELATIVE_TOLERANCE, atol=0.0)


def overrides() -> list[str]:
    return ["model.family=echo", "trainer.max_steps=6", "trainer.save_strategy=steps", "trainer.save_steps=6"]


@pytest.mark.slow
def test_it_trains_is_saved_under_its_names_and_answers(noise: Path, tmp_path: Path) -> None:
    config = recipe(noise, tmp_path / "run", *overrides())
    trained = train(config)
    losses = [loss for (loss,) in logged(config, "loss")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    folder = tmp_path / "run" / "checkpoint-6" / "model"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "ears.project.weight" in names
    assert "mouth.weight" in names
    assert "mind.embed_tokens.weight" in names
    assert {name.split(".")[0] for name in names} == {"ears", "mind", "mouth"}
    assert json.loads((folder / "config.json").read_text())["architectures"] == [ECHO.model_class]
    loaded = load_for_inference(str(tmp_path / "run"))
    assert loaded.samples.family == "echo"
    assert not loaded.caveats
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name]), name
    prompts = [build_sample(render(e, family=ECHO, for_generation=True), [np.zeros(4000, np.float32)] * n,
                            loaded.tokenizer, loaded.samples) for e, n in ((TASK, 1), (CHAT, 2))]  # fmt: skip
    together = generate_texts(loaded.model, loaded.tokenizer, prompts, Decoding(max_new_tokens=5))
    alone = [generate_texts(loaded.model, loaded.tokenizer, [one], Decoding(max_new_tokens=5))[0] for one in prompts]
    assert together == alone


@pytest.mark.slow
def test_parts_adapters_and_preferences(noise: Path, tmp_path: Path) -> None:
    frozen = [f"model.freeze.{part}=true" for part in ("audio_tower", "language_model", "embed_tokens", "lm_head")]
    trained = train(recipe(noise, tmp_path / "projector", *overrides(), *frozen)).model
    assert {name for name, weight in trained.named_parameters() if weight.requires_grad} == {
        "model.audio_tower.project.weight",
        "model.audio_tower.project.bias",
    }
    lora = ["adapter.kind=lora", "adapter.modules=[language_model,audio_tower,multi_modal_projector]"]
    adapted = train(pairs_recipe(noise, tmp_path / "dpo", *overrides(), *lora)).model
    names = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any("audio_tower.layers.0.qkv.lora_A" in name for name in names)
    assert any("audio_tower.project.lora_B" in name for name in names)


def test_what_names_no_family_is_of_the_first_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_inputs(tokenizer, SAMPLES, tmp_path)
    file = tmp_path / "sample_recipe.json"
    values = json.loads(file.read_text())
    assert values.pop("family") == "echo"
    assert saved_recipe(tmp_path) == SAMPLES
    file.write_text(json.dumps(values))
    assert saved_recipe(tmp_path) == SampleRecipe(num_mel_bins=BANDS, family="qwen2_audio")


def test_a_family_is_asked_for_by_name(noise: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"model.family: 'qwen2audio' is no choice; did you mean qwen2_audio"):
        recipe(noise, tmp_path, "model.family=qwen2audio")
    build(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a model of type echo, expected qwen2_audio \(model.family\)"):
        build_model(ModelConfig(kind=ModelKind.released, path=str(tmp_path)), tokenizer=tokenizer)
