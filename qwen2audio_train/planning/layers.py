"""What one layer of the encoder or the decoder keeps of one token for backward, counted tensor by tensor.

The tensors are those that autograd keeps of transformers' layers with flash attention, beside which a test holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2audio_train.model.flops import DecoderShape, EncoderShape, head_dim


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


def encoder_layer(audio: EncoderShape, precision: str) -> Layer:
    """An encoder layer; attention's output is laid out anew for the layer that reads it."""
    d, f = audio.d_model, audio.encoder_ffn_dim
    stream = PRECISIONS[precision].stream
    return Layer(
        d, stream, rms=False, inside=4 * d + f, readers=4, others=d + f, inputs=5 * d + f, outputs=5 * d + f, linears=6
    )


def decoder_layer(text: DecoderShape) -> Layer:
    """A decoder layer, whose norms compute in float32 always; inside are gate, activation and up too."""
    d, f, width = text.hidden_size, text.intermediate_size, head_dim(text)
    queries, keys = text.num_attention_heads * width, text.num_key_value_heads * width
    inside = 2 * queries + 2 * keys + 3 * f
    read, given = 5 * d + queries + f, 2 * d + queries + 2 * keys + 2 * f
    return Layer(d, 4, rms=True, inside=inside, readers=5, others=f, inputs=read, outputs=given, linears=7)


def encoder_product_bytes(audio: EncoderShape, precision: str = "bfloat16") -> int:
    """Bytes of what the products and the attention of one encoder layer give for one frame."""
    return int(PRECISIONS[precision].matmul * (6 * audio.d_model + audio.encoder_ffn_dim))


def decoder_product_bytes(text: DecoderShape, precision: str = "bfloat16") -> int:
    """Bytes of what the products and the attention of one decoder layer give for one token."""
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * head_dim(text)
    return int(PRECISIONS[precision].matmul * (heads + 2 * text.hidden_size + 2 * text.intermediate_size))
