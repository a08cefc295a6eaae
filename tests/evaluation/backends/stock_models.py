"""Tiny random models of other families, saved as their published folders are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.export import export
from tests.evaluation.tiny import SAMPLES, tiny_model, tiny_tokenizer

MEL_BINS = 16
NAMES = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %}{% if not (loop.last and continue_final_message) %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10_000.0}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
AUDIO = {
    "num_mel_bins": MEL_BINS,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": 32,
}
WHISPER = ("<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>")


def chat_tokenizer() -> PreTrainedTokenizerFast:
    trained = train_tokenizer(["the cat sat on the mat", "user assistant"], 300, list(NAMES.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMES,
    )


def write_omni(folder: Path, generation: int) -> None:
    """A thinker of Qwen2.5-Omni or Qwen3-Omni with what it hears by; it has seen no picture."""
    tokenizer = chat_tokenizer()
    ids: Any = {name: tokenizer.convert_tokens_to_ids(token) for name, token in NAMES.items()}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": ROPE}
    common = {
        "audio_start_token_id": ids["audio_bos_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
    }
    if generation == 2:
        places = {f"{kind}_token_index": ids[f"{kind}_token"] for kind in ("audio", "image", "video")}
        vision = {**VISION, "embed_dim": 32, "fullatt_block_indexes": [0]}
        kinds: Any = (t.Qwen2_5OmniThinkerConfig, t.Qwen2_5OmniThinkerForConditionalGeneration)
        audio = AUDIO
        common["audio_end_token_id"] = ids["audio_eos_token"]
    else:
        places = {f"{kind}_token_id": ids[f"{kind}_token"] for kind in ("audio", "image", "video")}
        vision = {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        kinds = (t.Qwen3OmniMoeThinkerConfig, t.Qwen3OmniMoeThinkerForConditionalGeneration)
        audio = {**AUDIO, "downsample_hidden_size": 8}
        text |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = kinds[0](audio_config=audio, vision_config=vision, text_config=text, **places, **common)
    save(kinds[1](config), tokenizer, folder, chunk_length=2)


def write_qwen3_asr(folder: Path) -> None:
    tokenizer = chat_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = t.Qwen3ASRConfig(
        audio_config={**AUDIO, "downsample_hidden_size": 8},
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        pad_token_id=end,
        eos_token_id=end,
    )
    save(t.Qwen3ASRForConditionalGeneration(config), tokenizer, folder)
    t.Qwen3ASRFeatureExtractor(feature_size=MEL_BINS).save_pretrained(folder)


def write_whisper(folder: Path) -> None:
    trained = train_tokenizer(["the cat sat on the mat"], 320, WHISPER)
    end = trained.convert_tokens_to_ids("<|endoftext|>")
    ids: Any = dict(zip(WHISPER, trained.convert_tokens_to_ids(list(WHISPER)), strict=True))
    config = t.WhisperConfig(
        num_mel_bins=MEL_BINS,
        d_model=24,
        encoder_layers=1,
        encoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_layers=1,
        decoder_attention_heads=3,
        decoder_ffn_dim=40,
        vocab_size=len(trained) + 1501,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    model = t.WhisperForConditionalGeneration(config)
    told = {
        "lang_to_id": {tag: ids[tag] for tag in ("<|en|>", "<|de|>")},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "no_timestamps_token_id": len(trained) - 1,
        "is_multilingual": True,
        "_from_model_config": False,
    }
    model.generation_config = t.GenerationConfig.from_dict({**model.generation_config.to_dict(), **told})
    save(model, trained, folder)


def write_qwen2_audio(folder: Path) -> None:
    export(tiny_model(), tiny_tokenizer(), SAMPLES, folder)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, chunk_length: int = 30) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "position" not in name:
                weight.mul_(6.0)  # so that the best token is clear of the second
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    t.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=chunk_length).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
