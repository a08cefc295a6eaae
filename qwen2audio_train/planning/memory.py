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


def step_memory(
    config: PreTrainedConfig,
    load: Load,
    parameters: Mapping[str, int],
    *,
    trained: Collection[str],
    adapter_parameters: int = 0,
    adapted: Collection[str] = (),
    adapter: LowRank | None = None,
    checkpointed: Collection[str] = (),
    selective: bool = False,
    stage: int = 0,
    ranks: int = 1,
    precision: str = "bfloat16",
    state_bytes: float = 12,
    gradient_bytes: int | None = None,
    copies: int = 1,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> Memory:
    """Memory of a training step.

    Args:
        load: what one GPU runs in one forward.
        parameters: per part, as `build.parameter_counts` gives them.
        trained: parts whose weights are trained.
        adapter_parameters: size of the low-rank adapters, all of them; `adapted`: the parts that they lie in.
        adapter: how they compute.
        checkpointed: parts whose layers recompute their activations; `selective`: but for products and attention.
        stage, ranks: of ZeRO.
        precision: a key of `PRECISIONS`.
        state_bytes: of `optimizer_bytes`; the default is AdamW's under DeepSpeed in bfloat16.
        gradient_bytes: of a trained weight, where its gradients are summed in another type than its own.
        copies: of the weights; two with a frozen reference model.
        offload_optimizer, offload_parameters: what lies on the host.
    """
    size = PRECISIONS[precision]
    learned, flows = sum(parameters[part] for part in trained), set(trained) | set(adapted)
    weights = float(size.weight * sum(parameters.values()) * copies + ADAPTER_BYTES * adapter_parameters)
    weights /= ranks if stage >= 3 else 1
    optimizer = state_bytes * learned + 2 * ADAPTER_BYTES * adapter_parameters
    optimizer /= ranks if stage >= 1 else 1
    gradients = (gradient_bytes or size.weight) * learned + ADAPTER_BYTES * adapter_parameters
    # Autocast casts a weight once per forward, and backward wants the copy again; DoRA behind dropout makes another.
    again = set(adapted) if adapter is not None and adapter.dora and adapter.dropout else set()
    cast = [*(flows & LINEAR_PARTS), *(again & LINEAR_PARTS)] if precision == "autocast" else []
    casts = 2 * sum(parameters[part] for part in cast)
    return Memory(
        weights=casts + (0 if offload_parameters else weights),
        gradients=gradients / (ranks if stage >= 2 else 1),
        optimizer=0 if offload_optimizer else optimizer,
        activations=activation_bytes(
            config,
            load,
            trained=trained,
            adapted=adapted,
            adapter=adapter,
            checkpointed=checkpointed,
            selective=selective,
            precision=precision,
        ),
        head=head_bytes(config, load.labels, trained="lm_head" in trained, precision=precision),
        host=optimizer * offload_optimizer + weights * offload_parameters,
    )


LINEAR_PARTS = {"audio_tower", "multi_modal_projector", "language_model", "lm_head"}
"""Parts whose weights are factors of matrix products, nearly all of them."""


def activation_bytes(
    config: PreTrainedConfig,
    load: Load,
    *,
    trained: Collection[str],
    adapted: Collection[str] = (),
    adapter: LowRank | None = None,
    checkpointed: Collection[str] = (),
    selective: bool = False,
    precision: str = "bfloat16",
) -> int:
    """Bytes that backward needs of forward.

    Args:
        trained: parts with trained weights; the tower keeps nothing where it is neither trained nor adapted.
        adapted: parts with low-rank adapters, all like `adapter`.
    """
    audio: Any = config.audio_config
    text: Any = config.text_config
    stream, family = PRECISIONS[precision].stream, family_of(config.model_type)
    frames = sum(family.num_encoder_frames(f) for f in load.clip_frames)
    adapters = {part: adapter or LowRank() for part in adapted}

    def per_layer(layer: Layer, part: str) -> int:
        return layer.kept(precision, trained=part in trained, adapter=adapters.get(part))

    tower, one_encoder_layer = 0, 0
    if "audio_tower" in trained or "audio_tower" in adapted:
        whole = frames * per_layer(encoder_layer(audio, precision), "audio_tower")
        recomputed = "audio_tower" in checkpointed
        products = selective * encoder_product_bytes(audio, precision)
        kept = frames * (stream * audio.d_model + products) if recomputed else whole
        tower = audio.encoder_layers * kept + convolution_bytes(audio, sum(load.clip_frames), precision)
        one_encoder_layer = whole * recomputed
    whole = load.tokens * per_layer(decoder_layer(text), "language_model")
    recomputed = "language_model" in checkpointed
    products = selective * decoder_product_bytes(text, precision)
    kept = load.tokens * (stream * text.hidden_size + products) if recomputed else whole
    merged = stream * text.hidden_size * (load.tokens + sum(family.num_audio_tokens(f) for f in load.clip_frames))
    language_model = merged + text.num_hidden_layers * kept + whole * recomputed
    # The tower's layers are computed again when nothing is left of the language model's.
    return int(tower + max(language_model, one_encoder_layer))


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
