"""What a step holds in memory, from the architecture's numbers alone: weights, gradients, optimiser, activations.

The activations are those of the layers (`layers.py`), of the convolutions and of the scoring of labels. The estimate
leaves out the allocator's fragmentation, buffers of communication, and what CUDA itself takes (1 to 2 GB).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from qwen2audio_train.families.known import family_of
from qwen2audio_train.model.flops import DecoderShape, EncoderShape, Load
from qwen2audio_train.model.loss import chunk_rows
from qwen2audio_train.planning.layers import (
    PRECISIONS,
    Layer,
    LowRank,
    decoder_layer,
    decoder_product_bytes,
    encoder_layer,
    encoder_product_bytes,
)

OPTIMIZER_STATES = {
    "adamw_torch": (0, 2),
    "adamw_torch_fused": (0, 2),
    "adamw_bf16_kahan": (0, 3),
    "adamw_bf16_stochastic": (0, 2),
    "adamw_bnb_8bit": (2 * (1 + 4 / 256), 0),
    "paged_adamw_8bit": (2 * (1 + 4 / 256), 0),
    "adafactor": (0, 0),
    "sgd": (0, 0),
}
"""State per trained value: bytes, and further values of the weight's own type. The 8-bit ones have a float32 scale for
every 256 values. What Adafactor keeps of a matrix, a row and a column, is left out."""

ADAPTER_BYTES = 4
"""Adapters are trained in float32."""


def optimizer_bytes(optim: str, weight_bytes: int, *, float32_copy: bool = False) -> float:
    """Optimiser bytes per trained value, with a float32 copy of its weight where DeepSpeed keeps one."""
    fixed, values = OPTIMIZER_STATES[optim]
    return fixed + values * (4 if float32_copy else weight_bytes) + 4 * float32_copy


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the end of a forward that finds gradients of an earlier one, which is where the peak lies.

    `host` is what was moved to the host, and not part of the total.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


@dataclass(frozen=True)
class Trained:
    """What of a model is trained, and what its forward computes in and keeps for backward.

    Attributes:
        parts: those whose weights are trained, such as `language_model`.
        adapted: parts with low-rank adapters, all like `adapter`.
        adapter: how the adapters compute.
        adapter_parameters: size of all of them together.
        checkpointed: parts whose layers recompute their activations.
        selective: they recompute all but the results of products and attention.
        precision: a key of `PRECISIONS`.
    """

    parts: Collection[str] = ()
    adapted: Collection[str] = ()
    adapter: LowRank = field(default_factory=LowRank)
    adapter_parameters: int = 0
    checkpointed: Collection[str] = ()
    selective: bool = False
    precision: str = "bfloat16"

    def gradients_reach(self, part: str) -> bool:
        """Whether backward runs through the part's layers."""
        return part in self.parts or part in self.adapted


@dataclass(frozen=True)
class Sharding:
    """Where weights, gradients and the optimiser's state lie: ZeRO's stage, its ranks, and what is on the host."""

    stage: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def share(self, from_stage: int) -> int:
        """Over how many ranks a kind of state is cut up that ZeRO cuts up from a stage on."""
        return self.ranks if self.stage >= from_stage else 1


def step_memory(
    config: PreTrainedConfig,
    load: Load,
    parameters: Mapping[str, int],
    trained: Trained,
    sharding: Sharding = Sharding(),
    *,
    state_bytes: float = 12,
    gradient_bytes: int | None = None,
    copies: int = 1,
) -> Memory:
    """Memory of a training step.

    Args:
        load: what one GPU runs in one forward.
        parameters: per part, as `build.parameter_counts` gives them.
        state_bytes: of `optimizer_bytes`; the default is AdamW's under DeepSpeed in bfloat16.
        gradient_bytes: of a trained weight, where its gradients are summed in another type than its own.
        copies: of the weights; two with a frozen reference model.
    """
    size, adapters = PRECISIONS[trained.precision], trained.adapter_parameters
    learned = sum(parameters[part] for part in trained.parts)
    # ZeRO cuts up the optimiser's state from stage 1 on, gradients from 2, weights from 3 (arXiv:1910.02054)
    weights = float(size.weight * sum(parameters.values()) * copies + ADAPTER_BYTES * adapters) / sharding.share(3)
    optimizer = (state_bytes * learned + 2 * ADAPTER_BYTES * adapters) / sharding.share(1)
    gradients = ((gradient_bytes or size.weight) * learned + ADAPTER_BYTES * adapters) / sharding.share(2)
    cast: list[str] = []
    if trained.precision == "autocast":
        # It casts a weight once per forward, and backward wants the copy again; DoRA after dropout makes another.
        again = trained.adapted if trained.adapter.dora and trained.adapter.dropout else ()
        cast = [p for p in LINEAR_PARTS if trained.gradients_reach(p)] + [p for p in LINEAR_PARTS if p in again]
    casts = 2 * sum(parameters[part] for part in cast)
    return Memory(
        weights=casts + (0 if sharding.offload_parameters else weights),
        gradients=gradients,
        optimizer=0 if sharding.offload_optimizer else optimizer,
        activations=activation_bytes(config, load, trained),
        head=head_bytes(config, load.labels, trained="lm_head" in trained.parts, precision=trained.precision),
        host=optimizer * sharding.offload_optimizer + weights * sharding.offload_parameters,
    )


LINEAR_PARTS = ("audio_tower", "multi_modal_projector", "language_model", "lm_head")
"""Parts whose weights are factors of matrix products, nearly all of them."""


def activation_bytes(config: PreTrainedConfig, load: Load, trained: Trained) -> int:
    """Bytes that backward needs of forward.

    Layers that recompute keep their inputs, and one of them at a time all of its activations. Backward reaches the
    tower when nothing is left of the language model's, so only the larger of the two counts.
    """
    tower, one_encoder_layer = _tower_bytes(config, load, trained)
    return int(tower + max(_language_model_bytes(config, load, trained), one_encoder_layer))


def _tower_bytes(config: PreTrainedConfig, load: Load, trained: Trained) -> tuple[float, float]:
    """Bytes that the tower keeps, none where no gradient reaches it, and those of one layer that is recomputed."""
    audio: EncoderShape = config.audio_config
    if not trained.gradients_reach("audio_tower"):
        return 0, 0
    precision, family = trained.precision, family_of(config.model_type)
    frames = sum(family.num_encoder_frames(f) for f in load.clip_frames)
    whole = frames * _layer_bytes(encoder_layer(audio, precision), "audio_tower", trained)
    recomputed = "audio_tower" in trained.checkpointed
    products = trained.selective * encoder_product_bytes(audio, precision)
    kept = frames * (PRECISIONS[precision].stream * audio.d_model + products) if recomputed else whole
    convolutions = convolution_bytes(audio, sum(load.clip_frames), precision)
    return audio.encoder_layers * kept + convolutions, whole * recomputed


def _language_model_bytes(config: PreTrainedConfig, load: Load, trained: Trained) -> float:
    """Bytes that the language model keeps, with the embeddings into which audio is merged."""
    text: DecoderShape = config.text_config
    stream, family = PRECISIONS[trained.precision].stream, family_of(config.model_type)
    whole = load.tokens * _layer_bytes(decoder_layer(text), "language_model", trained)
    recomputed = "language_model" in trained.checkpointed
    products = trained.selective * decoder_product_bytes(text, trained.precision)
    kept = load.tokens * (stream * text.hidden_size + products) if recomputed else whole
    merged = stream * text.hidden_size * (load.tokens + sum(family.num_audio_tokens(f) for f in load.clip_frames))
    return merged + text.num_hidden_layers * kept + whole * recomputed


def _layer_bytes(layer: Layer, part: str, trained: Trained) -> int:
    adapter = trained.adapter if part in trained.adapted else None
    return layer.kept(trained.precision, trained=part in trained.parts, adapter=adapter)


def convolution_bytes(audio: EncoderShape, frames: int, precision: str = "bfloat16") -> int:
    """Bytes that both convolutions keep of `frames` mel frames: inputs and what the activations need."""
    values = audio.num_mel_bins + 2 * audio.d_model + audio.d_model // 2
    return int(frames * PRECISIONS[precision].matmul * values)


def head_bytes(config: PreTrainedConfig, labels: int, *, trained: bool, precision: str = "bfloat16") -> int:
    """Bytes of the scoring of labels: one chunk of logits, in float32 too, their gradient, and both gradients of it.

    That of the head is summed in float32.
    """
    text: DecoderShape = config.text_config
    matmul = PRECISIONS[precision].matmul
    rows = min(labels, chunk_rows(text.vocab_size))
    chunk = rows * text.vocab_size * (4 if matmul == 4 else 4 + 2 * matmul)
    return int(chunk + matmul * labels * text.hidden_size + 4 * text.hidden_size * text.vocab_size * trained)
