"""Checkpoint folders: written aside, sealed with a manifest of checksums, and only then given their name.

A checkpoint holds `model/` or `adapter/` (safetensors, loadable by plain transformers or peft), `deepspeed/` or
`optimizer/`, `trainer_state.json`, `data_state.json`, `rng/`, `config.yaml`, `lineage.json` and, last, `MANIFEST.json`.
A folder without a manifest, or whose files differ from it, is never resumed from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers.trainer import TRAINER_STATE_NAME

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.errors import UserError

MANIFEST = "MANIFEST.json"
MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
PARTIAL = ".partial"
USERS = "used_by"
"""Folder of a checkpoint whose files name the runs that build on its weights."""
NAME = re.compile(r"checkpoint-(\d+)")


_LOCKS: dict[Path, TextIO] = {}
"""Open lock files of the run folders that this process holds."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged or not there."""


def hold(run_dir: Path) -> None:
    """Make a run folder, and keep other processes out of it as long as this one lives.

    Raises:
        ConfigError: the folder cannot be written to, or another process is training in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _LOCKS[run_dir] = (run_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: cannot be written to ({error.strerror})") from error
    try:
        fcntl.lockf(_LOCKS[run_dir], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ConfigError(f"run_dir={run_dir}: another process is training there; choose another") from error
    except OSError:
        pass  # a file system without locks


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(partial: Path, target: Path) -> None:
    """Write the manifest of a finished folder and move the folder to its final name.

    The manifest is written to disk before the rename, so a folder with the final name is complete, whatever happens.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(checksum, files))
    entries = {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, sums, strict=True)
    }
    with (partial / MANIFEST).open("w") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def verify(folder: Path, *, contents: bool = True) -> None:
    """Compare a checkpoint with its manifest: names and sizes, and with `contents` the checksums too.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}, so the checkpoint was not finished; choose an earlier one")
    entries = read_manifest(manifest)
    for name, (size, _) in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: listed in {MANIFEST} but missing; choose an earlier checkpoint")
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path}: {found} bytes, {MANIFEST} says {size}; choose an earlier checkpoint")
    if contents:
        with ThreadPoolExecutor() as pool:
            sums = pool.map(checksum, [folder / name for name in entries])
            for (name, (_, sha256)), found_sha256 in zip(entries.items(), sums, strict=True):
                if found_sha256 != sha256:
                    raise CheckpointError(
                        f"{folder / name}: differs from {MANIFEST} (damaged or edited); choose an earlier checkpoint"
                    )


def read_manifest(manifest: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file that a manifest lists. Raises CheckpointError when it cannot be read."""
    try:
        return {name: (entry["size"], entry["sha256"]) for name, entry in json.loads(manifest.read_text()).items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{manifest}: damaged, it is no list of files; choose an earlier checkpoint") from error


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run whose files are all there with their right sizes, oldest first."""
    found = []
    for folder in run_dir.glob("checkpoint-*"):
        match = NAME.fullmatch(folder.name)
        if match is None or not folder.is_dir():
            continue
        try:
            verify(folder, contents=False)
        except CheckpointError:
            continue
        found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def resume_point(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `resume` means (`auto`, `never` or a folder), verified; None to start afresh.

    Raises:
        CheckpointError: for a folder that is no complete checkpoint, and for a run folder with checkpoints of later
            steps: what this run will save would be mixed up with them.
    """
    complete = complete_checkpoints(run_dir)
    point = None if resume == "never" else Path(resume)
    if resume == "auto":
        point = complete[-1] if complete else None
    if point is not None and not point.is_dir():
        raise CheckpointError(f"resume={resume}: no such folder; expected auto, never or a checkpoint folder")
    if point is not None:
        verify(point)
    start = 0 if point is None else step_of(point)
    if complete and step_of(complete[-1]) > start:
        raise CheckpointError(
            f"resume={resume} would go on from step {start}, and {complete[-1]} is of a later step: set resume=auto, "
            "move the later checkpoints away, or choose another run_dir"
        )
    return point


def newest(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `resume` means, not looked into; None to start afresh."""
    if resume == "never":
        return None
    if resume != "auto":
        return Path(resume) if Path(resume).is_dir() else None
    complete = complete_checkpoints(run_dir)
    return complete[-1] if complete else None


def step_of(folder: Path) -> int:
    """Optimiser steps taken before a checkpoint."""
    return int(json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"])


def save_state(state: Any, path: Path) -> None:
    """`torch.save`, whose failures to write are RuntimeErrors, with an OSError instead."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"{path.name}: {error}") from error


def write_failure(target: Path, error: Exception) -> CheckpointError:
    """What to say when a checkpoint could not be written; what was written of it is deleted."""
    shutil.rmtree(target.with_suffix(PARTIAL), ignore_errors=True)
    free = shutil.disk_usage(target.parent).free / 2**30
    complete = complete_checkpoints(target.parent)
    newest = f"{complete[-1]} is complete and will be resumed from" if complete else "there is no earlier checkpoint"
    return CheckpointError(f"{target}: could not be written ({error}; {free:.1f} GiB are free); {newest}")


def rotate(run_dir: Path, keep: int | None, *, spare: int | None = None) -> None:
    """Delete what interrupted saves left, and the oldest checkpoints beyond `keep`.

    Those that another run builds on stay, and that of step `spare`.
    """
    for partial in run_dir.glob(f"checkpoint-*{PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)
    if keep:
        for folder in complete_checkpoints(run_dir)[:-keep]:
            if folder.name != f"checkpoint-{spare}" and not users(folder):
                shutil.rmtree(folder)


def users(checkpoint: Path) -> list[str]:
    """Run folders, those that are still there, that build on the weights of a checkpoint."""
    return [user for note in (checkpoint / USERS).glob("*") if Path(user := note.read_text()).is_dir()]


def weights_folder(path: str) -> str:
    """Where the weights are that `init_from` or `checkpoint` means.

    A run folder stands for its newest complete checkpoint, a checkpoint for its `model/` or `adapter/`; a folder with
    a `config.json` or `adapter_config.json` stands for itself, and anything that is no folder is taken as a hub id.

    Raises:
        ConfigError: for a folder that holds none of these.
    """
    folder = Path(path)
    if not folder.is_dir():
        return hub_id(path)
    folder = folder.absolute()
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return str(folder)
    for name in (MODEL_FOLDER, ADAPTER_FOLDER):
        if (folder / name).is_dir():
            return str(folder / name)
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        raise ConfigError(
            f"{path}: no weights here; expected config.json, adapter_config.json, a checkpoint, or a run folder with a "
            "complete checkpoint"
        )
    return weights_folder(str(checkpoints[-1]))


def hub_id(path: str) -> str:
    """`path`, where it can be the name of a repository on the hub (owner/name).

    Raises:
        ConfigError: it looks like a folder's, or its first part is a folder here: better now than after a minute of
            asking the hub for it.
    """
    owner, _, name = path.partition("/")
    if path.startswith((".", "/", "~")) or not name or "/" in name:
        raise ConfigError(f"{path}: no such folder, and not a hub id (owner/name); looked in {Path.cwd()}")
    if Path(owner).is_dir():
        there = [entry.name for entry in Path(owner).iterdir() if entry.is_dir()]
        hint = nearest(name, there, f"{owner}/") if there else "it is empty"
        raise ConfigError(f"no folder {path} here, and {owner}/ is a folder, so it is no hub id; {hint}")
    return path
