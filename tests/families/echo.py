"""A family of audio language models that nobody trained, made by following docs/adding.md: whatever a family may choose
is chosen otherwise than Qwen2-Audio does.

Markup is in brackets and no system message is put in. A patch of four mel frames is an audio token, the last one may be
short, and no token sees beyond its clip. The projector lies inside the tower, which has no table of positions, and in
the language model all tokens of a clip stand at the same position. Published weights have names of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, LlamaModel, PreTrainedConfig, WhisperConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import AutoConfig

from qwen2audio_train.families.family import Family
from qwen2audio_train.model.packed import PackedAudioLM, PackedBackbone

PATCH = 4


def num_audio_tokens(frames: int) -> int:
    return -(-frames // PATCH)


def one_place_per_clip(num_tokens: int, audio_slot: np.ndarray) -> np.ndarray:
    """An audio token that follows another one stays where that one is."""
    is_audio = np.zeros(num_tokens + 1, dtype=bool)
    is_audio[audio_slot] = True
    stays = is_audio[:-1] & is_audio[np.arange(num_tokens) - 1]
    return np.cumsum(~stays) - 1


ECHO = Family(
    name="echo",
    audio_token="[SOUND]",
    clip=("[CLIP]", "[/CLIP]"),
    chat_clip=("[CLIP]", "[/CLIP]"),
    system_prompt=None,
    turn_head="[TURN]{role}: ",
    turn_end="[END]",
    turn_tail="",
    text_end="[STOP]",
    special_tokens=("[STOP]", "[TURN]", "[END]", "[SOUND]", "[CLIP]", "[/CLIP]"),
    positions=one_place_per_clip,
    num_encoder_frames=num_audio_tokens,
    num_audio_tokens=num_audio_tokens,
    mel_columns=lambda frames: PATCH * num_audio_tokens(frames),
    lookahead_frames=0,
    model_class="EchoForConditionalGeneration",
    processor_class="Qwen2AudioProcessor",
    sub_configs={"audio_config": "whisper", "text_config": "llama"},
    audio_token_key="sound_token",
    published_names={
        r"^ears\.": "model.audio_tower.",
        r"^mind\.": "model.language_model.",
        r"^mouth\.": "lm_head.",
    },
    parts={
        "audio_tower": "model.audio_tower",
        "multi_modal_projector": "model.audio_tower.project",
        "language_model": "model.language_model",
        "embed_tokens": "model.language_model.embed_tokens",
        "lm_head": "lm_head",
    },
    fixed=(),
    encoder_layer=r"\baudio_tower\.layers\.(\d+)\.",
    encoder_stem=r"\.audio_tower\.patch\.",
    adapter_targets={
        "language_model": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "audio_tower": r"model\.audio_tower\.layers\.\d+\.(qkv|out)",
        "multi_modal_projector": r"model\.audio_tower\.project",
    },
    blocks=("EchoLayer", "LlamaDecoderLayer"),
)


@strict
class EchoConfig(PreTrainedConfig):
    model_type = "echo"
    sub_configs_defaults = {  # noqa: RUF012
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    sound_token: int = 0


class EchoLayer(GradientCheckpointingLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        return hidden + self.out(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0])


class EchoTower(nn.Module):
    """Patches of one or more clips in a row of columns; (n, width) before and (n, text width) after `project`."""

    def __init__(self, audio: WhisperConfig, text_width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * audio.num_mel_bins, audio.d_model)
        self.layers = nn.ModuleList(EchoLayer(audio.d_model) for _ in range(audio.encoder_layers))
        self.project = nn.Linear(audio.d_model, text_width)

    def forward(self, mel: Tensor, clip: Tensor) -> Tensor:
        """`clip` (n,): which clip each patch belongs to; it attends to that one alone."""
        patches = mel.unflatten(1, (-1, PATCH)).permute(1, 0, 2).flatten(1)
        hidden = self.patch(patches.to(self.patch.weight.dtype))
        for layer in self.layers:
            hidden = layer(hidden, clip[:, None] == clip)
        return hidden


class EchoModel(PackedBackbone):
    config_class = EchoConfig
    family = ECHO
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: EchoConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.audio_tower = EchoTower(config.audio_config, text.hidden_size)
        self.language_model = LlamaModel(text)
        self.post_init()

    def listen(self, mel: Tensor, clip_frames: Tensor, index: object = None) -> Tensor:
        counts = torch.tensor([num_audio_tokens(f) for f in clip_frames.tolist()])
        return self.audio_tower(mel, torch.arange(len(counts)).repeat_interleave(counts).to(mel.device))

    def project(self, audio: Tensor) -> Tensor:
        return self.audio_tower.project(audio)


class EchoForConditionalGeneration(PackedAudioLM, GenerationMixin):
    config_class = EchoConfig
    family = ECHO
    backbone = EchoModel
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
