"""What a step holds in memory, from the architecture's numbers alone: weights, gradients, optimiser, activations.

The activations are those that autograd keeps of transformers' layers in bfloat16 with flash attention, counted tensor
by tensor; a test holds them against what torch really saves. The estimate leaves out the allocator's fragmentation and
what CUDA itself takes (1 to 2 GB).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Qwen2AudioConfig

from qwen2audio_train.layout import num_audio_tokens, num_encoder_frames
from qwen2audio_train.model.cost import Load, head_dim
from qwen2audio_train.model.loss import chunk_rows

ADAM_BYTES = {"mixed": 12, "float32": 8}
"""Optimiser bytes per trained value: two moments in float32, and a float32 copy of weights that are bfloat16."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the end of forward, which is where the peak lies."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def step_memory(
    config: Qwen2AudioConfig,
    load: Load,
    parameters: Mapping[str, int],
    *,
    trained: Collection[str],
    adapter_parameters: int = 0,
    adapted: Collection[str] = (),
    checkpointed: Collection[str] = (),
    stage: int = 0,
    ranks: int = 1,
    weight_bytes: int = 2,
) -> Memory:
    """Memory of a training step.

    Args:
        load: what one GPU runs in one forward.
        parameters: per part, as `build.parameter_counts` gives them.
        trained: parts whose weights are trained.
        adapter_parameters: size of the low-rank adapters, all of them; `adapted`: the parts that they lie in.
        checkpointed: parts whose layers recompute their activations.
        stage, ranks: of ZeRO.
        weight_bytes: 2 for bfloat16 weights with a float32 copy in the optimiser, 4 for float32 ones.
    """
    learned = sum(parameters[part] for part in trained) + adapter_parameters
    adam = ADAM_BYTES["mixed" if weight_bytes == 2 else "float32"]
    flows = set(trained) | set(adapted)
    return Memory(
        weights=weight_bytes * (sum(parameters.values()) + adapter_parameters) / (ranks if stage >= 3 else 1),
        gradients=weight_bytes * learned / (ranks if stage >= 2 else 1),
        optimizer=adam * learned / (ranks if stage >= 1 else 1),
        activations=activation_bytes(config, load, flows=flows, checkpointed=checkpointed),
        head=head_bytes(config, load.labels, trained="lm_head" in trained),
    )


def activation_bytes(
    config: Qwen2AudioConfig, load: Load, *, flows: Collection[str], checkpointed: Collection[str]
) -> int:
    """Bytes that backward needs of forward.

    Args:
        flows: parts with trained or adapted weights; the tower keeps nothing when it is not among them.
    """
    audio: Any = config.audio_config
    text: Any = config.text_config
    frames = sum(num_encoder_frames(f) for f in load.clip_frames)
    tower = 0
    if "audio_tower" in flows:
        layer = 2 * audio.d_model if "audio_tower" in checkpointed else encoder_layer_bytes(audio)
        one_layer = encoder_layer_bytes(audio) if "audio_tower" in checkpointed else 0
        tower = frames * (audio.encoder_layers * layer + one_layer) + convolution_bytes(audio, sum(load.clip_frames))
    layer = 2 * text.hidden_size if "language_model" in checkpointed else decoder_layer_bytes(text)
    one_layer = decoder_layer_bytes(text) if "language_model" in checkpointed else 0
    merged = 2 * text.hidden_size * (load.tokens + sum(num_audio_tokens(f) for f in load.clip_frames))
    return int(tower + merged + load.tokens * (text.num_hidden_layers * layer + one_layer))


def encoder_layer_bytes(audio: Any) -> int:
    """Bytes that one encoder layer keeps of one encoder frame (20 ms).

    Of width d: the inputs and outputs of both norms, query, key, value and the attention's output, the last one twice
    (9 d); and the feed-forward part's two inner values.
    """
    return int(2 * (9 * audio.d_model + 2 * audio.encoder_ffn_dim))


def convolution_bytes(audio: Any, frames: int) -> int:
    """Bytes that both convolutions keep of `frames` mel frames: inputs and what the activations need."""
    return int(frames * 2 * (audio.num_mel_bins + 2 * audio.d_model + audio.d_model // 2))


def decoder_layer_bytes(text: Any) -> int:
    """Bytes that one decoder layer keeps of one token.

    Of width d: each of the two norms its input in float32 and its output before and after the weight, and of the heads
    query, key, value and the attention's output; of the feed-forward part gate, activation, up and product.
    """
    width = head_dim(text)
    heads = 2 * (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * width
    return int(2 * (4 + 2 + 2) * text.hidden_size + heads + 2 * 4 * text.intermediate_size)


def head_bytes(config: Qwen2AudioConfig, labels: int, *, trained: bool) -> int:
    """Bytes of the scoring of labels: one chunk of logits in bfloat16 and float32, and both gradients."""
    text: Any = config.text_config
    rows = min(labels, chunk_rows(text.vocab_size))
    gradients = labels * text.hidden_size + (text.hidden_size * text.vocab_size if trained else 0)
    return int(rows * text.vocab_size * (2 + 4 + 2) + 2 * gradients)
