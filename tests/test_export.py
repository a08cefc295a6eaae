from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.config.tools import ExportConfig
from qwen2audio_train.data.examples import ChatExample, Clip, Message, TaskExample
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.prompts.render import render, rendered_text
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import Decoding, stop_ids
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.export import as_heard, check_export, export, export_adapter, repeated
from qwen2audio_train.model.adapters import adapter_has_learnt, apply_adapter, load_adapter, merge_adapter
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.evaluation.tiny import MEL_BINS, SAMPLES, noise, tiny_model, tiny_tokenizer
from tests.launch.scripts import script

DECODING = Decoding(max_new_tokens=8)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A clip in the task form, a voice chat, two clips, several turns, and text alone."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(5)
    clips = []
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", noise(rng, 0.5 + 0.6 * i), 16_000)
        clips.append(Clip(str(folder / f"{i}.wav"), None))
    turns = (Message("user", (clips[2], "Who?")), Message("assistant", ("the cat",)))
    return [
        *(TaskExample(f"task{i}", clip, "asr", "en", "", "noise") for i, clip in enumerate(clips)),
        ChatExample("voice", (Message("user", (clips[0],)),), "noise"),
        ChatExample("two", (Message("user", (clips[0], clips[1], "What is said in both?")),), "noise"),
        ChatExample("turns", (*turns, Message("user", (clips[1], "And here?"))), "noise"),
        ChatExample("text", (Message("user", ("What is the cat on?",)),), "noise"),
    ]


def adapted(seed: int = 0):
    """A model with an adapter that changes its answers."""
    cfg = AdapterConfig(kind=AdapterKind.lora, r=4, modules=["language_model", "audio_tower", "multi_modal_projector"])
    model = apply_adapter(tiny_model(seed), cfg)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model.eval()


def test_plain_transformers_decodes_the_same_texts(examples, tmp_path):
    model = tiny_model()
    export(model, tiny_tokenizer(), SAMPLES, tmp_path)
    assert check_export(tmp_path, model, tiny_tokenizer(), SAMPLES, examples, decoding=DECODING) == []
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2AudioForConditionalGeneration"]
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path)
    assert stock.generation_config.eos_token_id == stop_ids(tiny_tokenizer())
    assert not stock.generation_config.do_sample


def test_a_merged_adapter_decodes_the_same_texts(examples, tmp_path):
    model = adapted()
    merged = merge_adapter(adapted())
    export(merged, tiny_tokenizer(), SAMPLES, tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    assert check_export(tmp_path, model, tiny_tokenizer(), SAMPLES, examples, decoding=DECODING) == []
    assert check_export(tmp_path, tiny_model(), tiny_tokenizer(), SAMPLES, examples, decoding=DECODING) != []


def test_an_adapter_alone_decodes_the_same_texts_on_its_base(examples, tmp_path):
    base = str(export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "base"))
    model = adapted()
    export(model, tiny_tokenizer(), SAMPLES, tmp_path / "adapter", base=base)
    assert not list((tmp_path / "adapter").glob("model*"))
    found = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == base
    check = partial(check_export, base=base, decoding=DECODING)
    assert check(tmp_path / "adapter", model, tiny_tokenizer(), SAMPLES, examples) == []
    again = load_adapter(PackedQwen2Audio.from_pretrained(base), str(tmp_path / "adapter"), trainable=False)
    assert check(tmp_path / "adapter", again, tiny_tokenizer(), SAMPLES, examples) == []


def test_what_a_server_cannot_adapt_is_merged_and_the_rest_stays_an_adapter(examples, tmp_path):
    base = str(export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "plain"))
    own = export_adapter(adapted(), tiny_tokenizer(), SAMPLES, tmp_path / "adapter", base)
    assert own == str(tmp_path / "adapter" / "base")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert all("language_model" in name for name in file.keys())  # noqa: SIM118
    check = partial(check_export, base=own, decoding=DECODING)
    assert check(tmp_path / "adapter", adapted(), tiny_tokenizer(), SAMPLES, examples) == []
    assert check(tmp_path / "adapter", tiny_model(), tiny_tokenizer(), SAMPLES, examples) != []


def test_an_adapter_of_the_language_model_keeps_its_base(tmp_path):
    base = str(export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "plain"))
    model = apply_adapter(tiny_model(), AdapterConfig(kind=AdapterKind.lora, r=2))
    assert export_adapter(model, tiny_tokenizer(), SAMPLES, tmp_path / "new", base) == base
    assert not (tmp_path / "new" / "base").exists()
    assert not adapter_has_learnt(tmp_path / "new"), "as it starts"
    export_adapter(adapted(), tiny_tokenizer(), SAMPLES, tmp_path / "trained", base)
    assert adapter_has_learnt(tmp_path / "trained")


def test_the_config_says_on_both_levels_that_nothing_is_tied(tmp_path):
    export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False


def test_an_adapter_needs_its_base(tmp_path):
    with pytest.raises(ValueError, match="hub id or folder"):
        export(adapted(), tiny_tokenizer(), SAMPLES, tmp_path)


def test_the_processor_writes_the_prompts_that_we_write(examples, tmp_path):
    export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.feature_extractor.feature_size == MEL_BINS
    conversation = [
        {"role": "user", "content": [{"type": "audio", "audio_url": "a"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "the cat"}]},
        {"role": "user", "content": [{"type": "audio", "audio_url": "b"}, {"type": "text", "text": "And here?"}]},
    ]
    written = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    turns = next(example for example in examples if example.id == "turns")
    assert written == rendered_text(render(turns, for_generation=True))


def test_the_script_refuses_an_adapter_that_has_learnt_nothing(tmp_path):
    base = str(export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "plain"))
    model = apply_adapter(tiny_model(), AdapterConfig(kind=AdapterKind.lora, r=2))
    export(model, tiny_tokenizer(), SAMPLES, tmp_path / "new", base=base)
    config = ExportConfig(checkpoint=str(tmp_path / "new"), output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="every B of the adapter is zero"):
        script("export").main(config)
    assert not (tmp_path / "out").exists()


def test_of_a_clip_over_30_s_both_hear_the_first_30_s(examples, tmp_path):
    model = tiny_model()
    export(model, tiny_tokenizer(), SAMPLES, tmp_path / "out")
    long = repeated(examples[0], SAMPLES, 31.0, tmp_path)
    assert check_export(tmp_path / "out", model, tiny_tokenizer(), SAMPLES, [long], decoding=DECODING) == []
    whole = LazySamples([long, as_heard(long, SAMPLES)], tiny_tokenizer(), SAMPLES, for_generation=True)
    assert [sum(sample.clip_frames) for sample in whole] == [3100, 3000], "our own path hears all of it elsewhere"


@pytest.mark.parametrize("merge", [True, False])
def test_the_script_exports_what_was_trained(merge, examples, tmp_path, capsys):
    base = str(export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "plain"))
    export(adapted(), tiny_tokenizer(), SAMPLES, tmp_path / "trained", base=base)
    manifest = tmp_path / "check.jsonl"
    manifest.write_text("".join(json.dumps(to_record(example, tmp_path)) + "\n" for example in examples[3:5]))
    options = {"check_manifest": str(manifest), "merge": merge}
    script("export").main(ExportConfig(str(tmp_path / "trained"), str(tmp_path / "out"), **options))
    assert "3 of 3 texts are the same by the stock classes" in capsys.readouterr().out
    assert (tmp_path / "out" / "base").exists() != merge
