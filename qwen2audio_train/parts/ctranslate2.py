"""Whisper weights in CTranslate2's binary form, and what transformers calls them.

The file, little endian: uint32 version of the format, a string (the model's kind), uint32 revision, uint32 number of
variables. A string is its uint16 length, the final zero included, and its bytes. A variable is its name, uint8 rank,
uint32 sizes, uint8 type, uint32 number of bytes, and the bytes. Then uint32 number of aliases, each two strings
(CTranslate2, src/models/model.cc).

CTranslate2 joins the products of self-attention into one (query, key, value) and those of the keys and values that a
decoder takes from the encoder into another; Whisper's keys have no bias, so theirs in the file is zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig

from qwen2audio_train.errors import UserError

TYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""By the number in the file; 5 is bfloat16, which numpy lacks."""

VERSION = 6
"""Of the format; earlier ones store the types of variables in another way."""

Variables = Mapping[str, np.ndarray]


class ModelFileError(UserError):
    """A file of weights that is cut short, damaged or of another kind."""


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Variables of a `model.bin` by name, aliases among them.

    Raises:
        ModelFileError: it is cut short, damaged, of another version, or holds a type that is not read here.
    """
    try:
        return _Reader(path.read_bytes()).variables()
    except (struct.error, ValueError, KeyError, MemoryError) as error:
        raise ModelFileError(
            f"{path}: expected the weights of a CTranslate2 model, version {VERSION} of the format ({error}); "
            "it is damaged or cut short: delete it and fetch it again"
        ) from error


class _Reader:
    """A place in the bytes of a file."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(kind)
        return int(value)

    def taken(self, count: int) -> bytes:
        if self.at + count > len(self.content):
            raise ValueError(f"{count} bytes are announced at {self.at}, {len(self.content) - self.at} are left")
        self.at += count
        return self.content[self.at - count : self.at]

    def text(self) -> str:
        return self.taken(self.number("H")).removesuffix(b"\0").decode()

    def variables(self) -> dict[str, np.ndarray]:
        if (version := self.number("I")) != VERSION:
            raise ValueError(f"version {version}")
        self.text()
        self.number("I")
        found = dict(self.variable() for _ in range(self.number("I")))
        return found | {alias: found[name] for alias, name in self.aliases()}

    def variable(self) -> tuple[str, np.ndarray]:
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind = self.number("B")
        if kind not in TYPES:
            raise ValueError(f"{name} has type {kind}")
        return name, np.frombuffer(self.taken(self.number("I")), TYPES[kind]).reshape(shape)

    def aliases(self) -> Iterator[tuple[str, str]]:
        for _ in range(self.number("I")):
            yield self.text(), self.text()


def whisper_config(variables: Variables) -> WhisperConfig:
    """The architecture of a Whisper model, read off the shapes of its variables."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    layers, decoder_layers = (_layers(variables, part) for part in ("encoder", "decoder"))
    heads = int(variables["encoder/num_heads"])
    end = 50256 if vocabulary == 51864 else 50257  # the models of English alone have one token less
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end + 1,
    )


def whisper_state(variables: Variables) -> dict[str, Tensor]:
    """The weights under transformers' names, in float32."""
    state = {
        "model.decoder.embed_tokens.weight": _tensor(variables, "decoder/embeddings/weight"),
        "proj_out.weight": _tensor(variables, "decoder/projection/weight"),
    }
    for name in ("conv1", "conv2"):
        state |= _linear(variables, f"encoder/{name}", f"model.encoder.{name}")
    for part in ("encoder", "decoder"):
        positions = _tensor(variables, f"{part}/position_encodings/encodings")
        state[f"model.{part}.embed_positions.weight"] = positions
        state |= _norm(variables, f"{part}/layer_norm", f"model.{part}.layer_norm")
        for index in range(_layers(variables, part)):
            state |= _layer(variables, f"{part}/layer_{index}", f"model.{part}.layers.{index}", part == "decoder")
    return state


def _layers(variables: Variables, part: str) -> int:
    return sum(name.startswith(f"{part}/layer_") and name.endswith("/ffn/layer_norm/gamma") for name in variables)


def _layer(variables: Variables, old: str, new: str, crosses: bool) -> dict[str, Tensor]:
    state = _attention(variables, f"{old}/self_attention", f"{new}.self_attn", [("q", "k", "v"), ("out",)])
    if crosses:
        state |= _attention(variables, f"{old}/attention", f"{new}.encoder_attn", [("q",), ("k", "v"), ("out",)])
    state |= _norm(variables, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    for number in (0, 1):
        state |= _linear(variables, f"{old}/ffn/linear_{number}", f"{new}.fc{number + 1}")
    return state


def _attention(variables: Variables, old: str, new: str, products: list[tuple[str, ...]]) -> dict[str, Tensor]:
    """An attention with its norm; `products` says what each of its linear layers has joined."""
    state = _norm(variables, f"{old}/layer_norm", f"{new}_layer_norm")
    for number, names in enumerate(products):
        for kind in ("weight", "bias"):
            joined = _tensor(variables, f"{old}/linear_{number}/{kind}").chunk(len(names))
            state |= {f"{new}.{name}_proj.{kind}": piece.clone() for name, piece in zip(names, joined, strict=True)}
    if state.pop(f"{new}.k_proj.bias").any():
        raise ModelFileError(f"{old}: its keys have a bias, Whisper's have none; this is no Whisper model")
    return state


def _linear(variables: Variables, old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.{kind}": _tensor(variables, f"{old}/{kind}") for kind in ("weight", "bias")}


def _norm(variables: Variables, old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.weight": _tensor(variables, f"{old}/gamma"), f"{new}.bias": _tensor(variables, f"{old}/beta")}


def _tensor(variables: Variables, name: str) -> Tensor:
    found = variables[name]
    if not np.issubdtype(found.dtype, np.floating):
        raise ModelFileError(
            f"{name} is {found.dtype}, expected floating-point weights: take a file without quantisation"
        )
    return torch.from_numpy(found.astype(np.float32))
