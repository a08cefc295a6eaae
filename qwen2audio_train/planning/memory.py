"""What a step holds in memory, from the architecture's numbers alone: weights, gradients, optimiser, activations.

The activations are those that autograd keeps of transformers' layers with flash attention, counted tensor by tensor; a
test holds them against what torch really saves. The estimate leaves out the allocator's fragmentation, buffers of
communication, and what CUDA itself takes (1 to 2 GB).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from qwen2audio_train.families.known import family_of
from qwen2audio_train.model.flops import Load, head_dim
from qwen2audio_train.model.loss import chunk_rows


@dataclass(frozen=True)
class Precision:
    """Bytes of what is stored and computed.

    Attributes:
        weight: bytes of a weight and of its gradient.
        stream: bytes of a value of the residual stream.
        matmul: bytes of a value that goes into a linear layer or comes out of one.
        rms_scaled: bytes of a value of an RMS norm before its weight.
        casts: every linear layer keeps a copy of its own of what it reads, in the type that it computes in.
    """

    weight: int
    stream: int
    matmul: int
    rms_scaled: int
    casts: bool = False


PRECISIONS = {
    "float32": Precision(4, 4, 4, rms_scaled=4),
    "bfloat16": Precision(2, 2, 2, rms_scaled=2),
    "autocast": Precision(4, 4, 2, rms_scaled=4, casts=True),
}
"""float32 weights computed in float32, bfloat16 ones in bfloat16, float32 ones in bfloat16 (`trainer.bf16`)."""


@dataclass(frozen=True)
class LowRank:
    """What low-rank adapters keep of what they read, which frozen layers themselves do not keep.

    Attributes:
        rank: of each.
        value: bytes of a value that they compute with: 2 under autocast or with weights in bfloat16, else 4.
        copies: each keeps a copy of its own of what it reads, as dropout and another type than the model's make.
        dropout: each keeps a mask too, a byte a value.
        dora: the gradient of each magnitude wants what the layer gives, once of itself and once of its adapter.
    """

    rank: int = 16
    value: int = 4
    copies: bool = True
    dropout: bool = False
    dora: bool = False


@dataclass(frozen=True)
class Layer:
    """Values that one layer keeps of one token or encoder frame, by who keeps them.

    Attributes:
        width: of the residual stream, and so of the input of each of its two norms.
        norm_bytes: of a value of such an input.
        rms: the norms scale by their weights values that these want again.
        inside: query, key, value and the attention's output, and what activation and gate keep.
        readers: linear layers that read what a norm gives.
        others: what the other linear layers read and nothing inside keeps.
        inputs, outputs: what all linear layers read and give, each counted for itself; `linears` is their number.
    """

    width: int
    norm_bytes: int
    rms: bool
    inside: int
    readers: int
    others: int
    inputs: int
    outputs: int
    linears: int

    def kept(self, precision: str, *, trained: bool = True, adapter: LowRank | None = None) -> int:
        """Bytes that a layer keeps: for the gradients of its inputs alone, and for those of its weights or adapters."""
        size = PRECISIONS[precision]
        total = 2 * self.norm_bytes * self.width + size.matmul * self.inside
        if trained:
            read = self.readers if size.casts else 2
            total += 2 * self.rms * size.rms_scaled * self.width + size.matmul * (read * self.width + self.others)
        if adapter is not None:
            shared = size.matmul * (2 * self.width + self.others)
            total += (adapter.value + adapter.dropout) * self.inputs if adapter.copies else shared
            total += adapter.value * (adapter.rank * self.linears + 2 * adapter.dora * self.outputs)
        return total


def encoder_layer(audio: Any, precision: str) -> Layer:
    """An encoder layer; attention's output is laid out anew for the layer that reads it."""
    d, f = audio.d_model, audio.encoder_ffn_dim
    stream = PRECISIONS[precision].stream
    return Layer(
        d, stream, rms=False, inside=4 * d + f, readers=4, others=d + f, inputs=5 * d + f, outputs=5 * d + f, linears=6
    )


def decoder_layer(text: Any) -> Layer:
    """A decoder layer, whose norms compute in float32 always; inside are gate, activation and up too."""
    d, f, width = text.hidden_size, text.intermediate_size, head_dim(text)
    queries, keys = text.num_attention_heads * width, text.num_key_value_heads * width
    inside = 2 * queries + 2 * keys + 3 * f
    read, given = 5 * d + queries + f, 2 * d + queries + 2 * keys + 2 * f
    return Layer(d, 4, rms=True, inside=inside, readers=5, others=f, inputs=read, outputs=given, linears=7)


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
    adapter: LowRank = LowRank()
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
    audio: Any = config.audio_config
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
    text: Any = config.text_config
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


def convolution_bytes(audio: Any, frames: int, precision: str = "bfloat16") -> int:
    """Bytes that both convolutions keep of `frames` mel frames: inputs and what the activations need."""
    values = audio.num_mel_bins + 2 * audio.d_model + audio.d_model // 2
    return int(frames * PRECISIONS[precision].matmul * values)


def encoder_product_bytes(audio: Any, precision: str = "bfloat16") -> int:
    """Bytes of what the products and the attention of one encoder layer give for one frame."""
    return int(PRECISIONS[precision].matmul * (6 * audio.d_model + audio.encoder_ffn_dim))


def decoder_product_bytes(text: Any, precision: str = "bfloat16") -> int:
    """Bytes of what the products and the attention of one decoder layer give for one token."""
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * head_dim(text)
    return int(PRECISIONS[precision].matmul * (heads + 2 * text.hidden_size + 2 * text.intermediate_size))


def head_bytes(config: PreTrainedConfig, labels: int, *, trained: bool, precision: str = "bfloat16") -> int:
    """Bytes of the scoring of labels: one chunk of logits, in float32 too, their gradient, and both gradients of it.

    That of the head is summed in float32.
    """
    text: Any = config.text_config
    matmul = PRECISIONS[precision].matmul
    rows = min(labels, chunk_rows(text.vocab_size))
    chunk = rows * text.vocab_size * (4 if matmul == 4 else 4 + 2 * matmul)
    return int(chunk + matmul * labels * text.hidden_size + 4 * text.hidden_size * text.vocab_size * trained)
