"""The weights that a run builds on, told by their content: what it starts from, an adapter's base, a DPO reference.

A path alone would follow whatever comes to lie there: a rerun, or nothing once the checkpoint is rotated away. So the
checksums stand beside it, and a checkpoint that others build on is not rotated away while they are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from qwen2audio_train.config.schema import ConfigError, ModelKind, StageConfig
from qwen2audio_train.training.checkpoints import folder as folders

BASE_FILE = "base.json"
"""Beside an adapter: the checksums of its base's weights (none of a hub id)."""


def fingerprint(weights: str) -> dict[str, str]:
    """SHA-256 of every file of weights in a folder by its name; empty for a hub id."""
    files = [*Path(weights).glob("*.safetensors"), *Path(weights).glob("*.bin")] if Path(weights).is_dir() else []
    stamps = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda stamp: _checksum(*stamp), stamps))
    return {file.name: digest for (file, _, _), digest in zip(stamps, sums, strict=True)}


@cache
def _checksum(path: Path, size: int, changed_ns: int) -> str:
    """Read once by a process while size and time of change stay as they are."""
    return folders.checksum(path)


def check_weights(weights: str) -> None:
    """Compare the weights of a checkpoint with its manifest.

    Raises:
        CheckpointError: they are damaged.
    """
    manifest = Path(weights).parent / folders.MANIFEST
    if not manifest.is_file():
        return
    entries = folders.read_manifest(manifest)
    for name, digest in fingerprint(weights).items():
        if (listed := f"{Path(weights).name}/{name}") in entries and entries[listed][1] != digest:
            raise folders.CheckpointError(
                f"{weights}/{name}: differs from {folders.MANIFEST} (damaged or edited); choose an earlier checkpoint"
            )


def write_base(adapter: Path, base: str) -> None:
    """Say beside a saved adapter which weights it belongs to."""
    (adapter / BASE_FILE).write_text(json.dumps(fingerprint(base), indent=1))


def base_of(weights: str, *, check: bool = True) -> str:
    """Folder or hub id of the full model: the weights themselves, or what an adapter was trained on.

    Args:
        check: compare the checksums of the base with those that the adapter was trained on.

    Raises:
        ConfigError: the base is not there, or holds other weights.
    """
    adapter_config = Path(weights) / "adapter_config.json"
    if not adapter_config.is_file():
        return weights
    noted = Path(weights) / BASE_FILE
    known: dict[str, str] = json.loads(noted.read_text()) if noted.is_file() else {}
    named = json.loads(adapter_config.read_text()).get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{adapter_config}: names no base model (base_model_name_or_path)")
    try:
        base = folders.weights_folder(str(named))
    except ConfigError as error:
        raise ConfigError(
            f"{weights}: the weights that this adapter was trained on are gone ({error}); put them back, or name the "
            f"same weights elsewhere in {adapter_config}: base_model_name_or_path"
        ) from error
    if check and known and (found := fingerprint(base)) != known:
        raise ConfigError(
            f"{weights}: this adapter was trained on other weights than {base} holds now ("
            f"{_first_difference(known, found)}); put them back, or train the adapter again"
        )
    return base


def _first_difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    name = next(name for name in (*then, *now) if then.get(name) != now.get(name))
    return f"{name}: sha256 {then.get(name, 'none')[:12]} then, {now.get(name, 'none')[:12]} now"


def lineage_of(checkpoint: Path | None) -> dict[str, Any]:
    """What a checkpoint says of where it comes from; empty for none."""
    return folders.read_json(checkpoint / "lineage.json") if checkpoint else {}


def start_of(config: StageConfig) -> str | None:
    """Folder or hub id that `init_from` means; of a run that goes on, the very weights that it started from."""
    if config.init_from is None:
        return None
    saved = lineage_of(folders.newest(config.resume, Path(config.run_dir)))
    if saved.get("init_from") == config.init_from and Path(saved.get("start") or "").is_dir():
        return str(saved["start"])
    return folders.weights_folder(config.init_from)


def parts_of(config: StageConfig) -> dict[str, str]:
    """Folders or hub ids that the first weights of a run come from, by the key that names them."""
    model = config.model
    if (start := start_of(config)) is not None:
        return {"init_from": start}
    named = {"audio_encoder": model.audio_encoder} if model.kind is not ModelKind.released else {"path": model.path}
    if model.kind is ModelKind.assembled:
        named["language_model"] = model.language_model
    return {f"model.{key}": folders.weights_folder(value) for key, value in named.items() if value}


def content_of(config: StageConfig) -> dict[str, str] | None:
    """Checksums of the local weights that a run starts from, by file; None for hub ids and random weights.

    Raises:
        CheckpointError: they are damaged.
    """
    parts = parts_of(config)
    for weights in parts.values():
        check_weights(weights)
    sums = {
        (name if len(parts) == 1 else f"{key}/{name}"): digest
        for key, weights in parts.items()
        for name, digest in fingerprint(weights).items()
    }
    return sums or None


def mark_used(weights: str, run_dir: str) -> None:
    """Keep the checkpoint that `weights` lies in from being rotated away while `run_dir` is there."""
    checkpoint, user = Path(weights).parent, str(Path(run_dir).absolute())
    if (checkpoint / folders.MANIFEST).is_file():
        try:
            (checkpoint / folders.USERS).mkdir(exist_ok=True)
            (checkpoint / folders.USERS / hashlib.sha256(user.encode()).hexdigest()[:16]).write_text(user)
        except OSError as error:
            print(f"{checkpoint}: could not be marked as used ({error.strerror}); keep it, {user} builds on it")
