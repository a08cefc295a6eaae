"""A language model in the layout of the first Qwen -> a plain transformers folder in that of Qwen2, shard by shard.

The two compute the same (Bai et al., arXiv:2309.16609; transformers' Qwen2). Names and cuts differ:

    transformer.h.N.attn.c_attn   weight and bias of queries, keys and values, one above the other
    transformer.h.N.mlp.w1, w2    y = c_proj(w1(x) * silu(w2(x))), so w1 is `up_proj` and w2 is `gate_proj`

and `intermediate_size` counts w1 and w2 together. Beyond `seq_length` tokens the first Qwen stretches its positions and
scales its queries; up to it neither happens, so it becomes `max_position_embeddings`. Its tokenizer is a list of byte
strings by rank, from which the merges follow. The 205 `<|extra_N|>` tokens, which nothing was trained on, are left out:
the audio tokens that `model=assembled` adds then get the ids that Qwen2-Audio has them under (151646 to 151648).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config

from qwen2audio_train.data.prompts.tokenizer import MODEL_MAX_LENGTH, QWEN2_WORDS
from qwen2audio_train.parts.ctranslate2 import ModelFileError

RANKS = "qwen.tiktoken"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""After the ranks, in this order."""

_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_PLAIN = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}


def convert_qwen(source: Path, folder: Path) -> None:
    """`config.json`, `*.safetensors` and `qwen.tiktoken` of a first Qwen -> `folder`, of the same type of numbers.

    Raises:
        ModelFileError: something is missing, or is no Qwen in this layout.
    """
    config = qwen2_config(source / "config.json")
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ModelFileError(f"{source}: no *.safetensors there; the weights of Qwen/Qwen-7B come in that form")
    places: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        state = dict(_converted(shard))
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(state, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(state, name)
        size += sum(tensor.nbytes for tensor in state.values())
    if missing := sorted(_expected(config) - places.keys()):
        raise ModelFileError(f"{source}: {len(missing)} weights are not there, the first is {missing[0]}")
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.save_pretrained(folder)
    qwen_tokenizer(source / RANKS).save_pretrained(folder)


def qwen2_config(path: Path) -> Qwen2Config:
    """The config of the same model as a Qwen2.

    Raises:
        ModelFileError: it is not that of a first Qwen, or of one whose attention differs.
    """
    old = _read_json(path)
    if old.get("model_type") != "qwen":
        raise ModelFileError(f"{path}: model_type is {old.get('model_type')!r}, expected 'qwen'")
    width, heads = old["hidden_size"], old["num_attention_heads"]
    if old.get("kv_channels", width // heads) * heads != width or old.get("rotary_pct", 1.0) != 1.0:
        raise ModelFileError(f"{path}: its heads do not fill its width, which no Qwen of this layout has")
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=old["vocab_size"],
        hidden_size=width,
        intermediate_size=old["intermediate_size"] // 2,
        num_hidden_layers=old["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=old.get("seq_length", old["max_position_embeddings"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(old.get("rotary_emb_base", 10_000))},
        rms_norm_eps=old["layer_norm_epsilon"],
        tie_word_embeddings=old.get("tie_word_embeddings", False),
    )


def qwen_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a list of byte strings by rank stands for, with the special tokens of Qwen's chats.

    Raises:
        ModelFileError: the file is missing, or is no such list.
    """
    names = _byte_names()
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise ModelFileError(f"{path}: no list of byte strings with their ranks ({error})") from error
    vocab = {"".join(names[byte] for byte in text): rank for text, rank in ranks.items()}
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ModelFileError(f"{path}: ranks 0 .. {len(ranks) - 1} and all single bytes were expected")
    merges = [
        ("".join(map(names.__getitem__, left)), "".join(map(names.__getitem__, right)))
        for left, right in _merges(ranks)
    ]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each longer string is merged from, in the order of the ranks: what is left of it when all merges of
    a lower rank have been made."""
    for text, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in text]
        while len(parts) > 2:
            found = [(ranks.get(a + b, rank), place) for place, (a, b) in enumerate(pairwise(parts))]
            lowest, place = min(found)
            if lowest >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _byte_names() -> dict[int, str]:
    """The character by which a byte-level BPE calls each byte (GPT-2's table): itself where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _converted(shard: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a file, not a dict)
                yield from _renamed(name, file.get_tensor(name), shard)
    except SafetensorError as error:
        raise ModelFileError(f"{shard}: cannot be read ({error})") from error


def _renamed(name: str, tensor: Tensor, shard: Path) -> Iterator[tuple[str, Tensor]]:
    """What a tensor is called in Qwen2's layout; the fused one becomes three."""
    if name in _PLAIN:
        yield _PLAIN[name], tensor
        return
    found = _LAYER.fullmatch(name)
    layer, inner = (f"model.layers.{found[1]}.", found[2]) if found else ("", "")
    if inner in _IN_LAYER:
        yield layer + _IN_LAYER[inner], tensor
    elif inner.startswith("attn.c_attn."):
        kind = inner.rpartition(".")[2]
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{layer}self_attn.{part}_proj.{kind}", piece.clone()
    elif not name.endswith("rotary_emb.inv_freq"):
        raise ModelFileError(f"{shard}: {name} is no weight of a first Qwen")


def _expected(config: Qwen2Config) -> set[str]:
    """Names of all weights."""
    attention = [f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    inner = [*_IN_LAYER.values(), *attention]
    layers = {f"model.layers.{number}.{name}" for number in range(config.num_hidden_layers) for name in inner}
    return layers | set(_PLAIN.values())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error})") from error
    return found
