"""The first Qwen's layout against that of Qwen2: every layer's output, and every id of its tokenizer."""

from __future__ import annotations

import base64
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen2audio_train.data.prompts.tokenizer import of_family, train_tokenizer
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.parts.ctranslate2 import ModelFileError
from qwen2audio_train.parts.fetch import PartsError, PartsOptions, bring
from qwen2audio_train.parts.qwen import _byte_names, qwen_tokenizer

WIDTH, HEADS, LAYERS, FFN, ROWS = 32, 4, 3, 96, 640
CONFIG = {
    "model_type": "qwen",
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": WIDTH // HEADS,
    "intermediate_size": FFN,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10_000,
    "rotary_pct": 1.0,
    "seq_length": 128,
    "max_position_embeddings": 512,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
TEXTS = [
    "the weather is fine today, isn't it?", "  two  spaces\n\nand lines\t", "Größe: 12345 km²", "今天天气很好",
    "naïve café e\u0301", "🎵 ok <|im_end|> x", "don't DON'T we'LL", "",
]  # fmt: skip


def ranks_of(texts: list[str]) -> dict[bytes, int]:
    """Byte strings by rank, fitted on some text."""
    names = {name: byte for byte, name in _byte_names().items()}
    fitted = train_tokenizer(texts, 600).backend_tokenizer.model
    vocab = json.loads(fitted.__getstate__())["vocab"]
    ordered = sorted(vocab, key=vocab.__getitem__)
    return {bytes(names[char] for char in text): rank for rank, text in enumerate(ordered)}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random first Qwen in two shards."""
    folder = tmp_path_factory.mktemp("old") / "Qwen-tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    state = {"transformer.wte.weight": random(ROWS, WIDTH), "transformer.ln_f.weight": 1 + random(WIDTH)}
    state["lm_head.weight"] = random(ROWS, WIDTH)
    for layer in range(LAYERS):
        inner = {
            "ln_1.weight": 1 + random(WIDTH),
            "attn.c_attn.weight": random(3 * WIDTH, WIDTH),
            "attn.c_attn.bias": random(3 * WIDTH),
            "attn.c_proj.weight": random(WIDTH, WIDTH),
            "ln_2.weight": 1 + random(WIDTH),
            "mlp.w1.weight": random(FFN // 2, WIDTH),
            "mlp.w2.weight": random(FFN // 2, WIDTH),
            "mlp.c_proj.weight": random(WIDTH, FFN // 2),
        }
        state |= {f"transformer.h.{layer}.{name}": tensor for name, tensor in inner.items()}
    names = sorted(state)
    for number in (0, 1):
        save_file({name: state[name] for name in names[number::2]}, folder / f"model-0000{number + 1}.safetensors")
    lines = [b"%s %d\n" % (base64.b64encode(text), rank) for text, rank in ranks_of(TEXTS * 3).items()]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    return folder


def hidden_states(state: dict[str, Tensor], ids: Tensor) -> list[Tensor]:
    """Of the first Qwen by its formulas: the embeddings, every layer's output, the last one after the final norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["layer_norm_epsilon"]) * state[name]

    steps, dim = ids.shape[0], WIDTH // HEADS
    angle = torch.arange(steps)[:, None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = torch.cat((angle, angle), 1).cos(), torch.cat((angle, angle), 1).sin()

    def rotated(x: Tensor) -> Tensor:  # (heads, steps, dim)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    x = state["transformer.wte.weight"][ids]
    found = [x]
    hidden_from = torch.full((steps, steps), -math.inf).triu(1)
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        joined = linear(norm(x, at + "ln_1.weight"), state[at + "attn.c_attn.weight"], state[at + "attn.c_attn.bias"])
        q, k, v = (part.view(steps, HEADS, dim).transpose(0, 1) for part in joined.split(WIDTH, -1))
        weights = (rotated(q) @ rotated(k).transpose(1, 2) / math.sqrt(dim) + hidden_from).softmax(-1)
        x = x + linear((weights @ v).transpose(0, 1).reshape(steps, WIDTH), state[at + "attn.c_proj.weight"])
        inner = norm(x, at + "ln_2.weight")
        gated = linear(inner, state[at + "mlp.w1.weight"]) * silu(linear(inner, state[at + "mlp.w2.weight"]))
        x = x + linear(gated, state[at + "mlp.c_proj.weight"])
        found.append(x)
    return [*found[:-1], norm(found[-1], "transformer.ln_f.weight")]


@pytest.fixture(scope="module")
def new(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    (folder,) = bring(PartsOptions(str(tmp_path_factory.mktemp("parts")), qwen_layout=str(old)), said.append)
    assert "in the layout of Qwen2" in said[0]
    return folder


def old_state(old: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for shard in sorted(old.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def test_every_layer_gives_what_the_first_qwen_gives(old: Path, new: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(new).eval()
    assert type(model).__name__ == "Qwen2ForCausalLM"
    ids = torch.arange(70) * 7 % ROWS
    state = old_state(old)
    wanted = hidden_states(state, ids)
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    for got, want in zip(output.hidden_states, wanted, strict=True):
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
    logits = linear(wanted[-1], state["lm_head.weight"])
    torch.testing.assert_close(output.logits[0], logits, atol=1e-5, rtol=1e-5)
    assert model.config.max_position_embeddings == 128


def by_ranks(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Ids of a word: the adjacent pair of the lowest rank is merged, again and again."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_the_tokenizer_gives_the_ids_of_its_ranks(old: Path, new: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(new)
    lines = (old / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(bytes.split, lines)}
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    for text in [*TEXTS, *(a + b for a in TEXTS for b in TEXTS)]:
        plain = text.replace("<|im_end|>", "")
        normal = tokenizer.backend_tokenizer.normalizer.normalize_str(plain)
        words = [normal[start:end].encode() for _, (start, end) in splitter.pre_tokenize_str(normal)]
        wanted = [number for word in words for number in by_ranks(word, ranks)]
        assert tokenizer(plain)["input_ids"] == wanted, text
        assert tokenizer.decode(wanted) == normal
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert ends == [len(ranks), len(ranks) + 1, len(ranks) + 2]
    assert of_family(tokenizer).convert_tokens_to_ids(QWEN2_AUDIO.audio_token) == len(ranks) + 3  # 151646 of 151643


def test_what_is_no_first_qwen_is_refused(old: Path, new: Path, tmp_path: Path) -> None:
    with pytest.raises(PartsError, match="is there already"):
        bring(PartsOptions(str(new.parent), qwen_layout=str(old)))
    with pytest.raises(PartsError, match=r"no folder; bring it with: hf download Qwen/Qwen-7B"):
        bring(PartsOptions(str(tmp_path), qwen_layout=str(tmp_path / "absent")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    with pytest.raises(ModelFileError, match="model_type is 'llama', expected 'qwen'"):
        bring(PartsOptions(str(tmp_path / "out"), qwen_layout=str(tmp_path / "other")))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in old.iterdir():
        if file.name != "model-00002.safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelFileError, match="weights are not there, the first is "):
        bring(PartsOptions(str(tmp_path / "out"), qwen_layout=str(broken)))
    assert not (tmp_path / "out" / "broken").exists()
    (tmp_path / "ranks").write_text("AAA= x\n")
    with pytest.raises(ModelFileError, match="no list of byte strings with their ranks"):
        qwen_tokenizer(tmp_path / "ranks")
