"""Checkpoint folders: which of them are whole, and which one a run goes on from. How they are written: `writing.py`.

A checkpoint holds `model/` or `adapter/` (safetensors, loadable by plain transformers or peft), `deepspeed/` or
`optimizer/`, `trainer_state.json`, `data_state.json`, `rng/`, `config.yaml`, `lineage.json` and, last, `MANIFEST.json`.
A folder without a manifest, or whose files differ from it, is never resumed from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from transformers.trainer import TRAINER_STATE_NAME

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.errors import UserError

MANIFEST = "MANIFEST.json"
MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
DAMAGED = ".damaged"
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


def fault_of(folder: Path, *, contents: bool = True) -> str | None:
    """Where a checkpoint first differs from its manifest, in names and sizes, and with `contents` in checksums."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{folder}: no {MANIFEST}, so the checkpoint was not finished"
    try:
        entries = read_manifest(manifest)
    except CheckpointError as error:
        return str(error)
    for name, (size, _) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: listed in {MANIFEST} but missing"
        if (found := path.stat().st_size) != size:
            return f"{path}: {found} bytes, {MANIFEST} says {size}"
    if contents:
        with ThreadPoolExecutor() as pool:
            sums = pool.map(checksum, [folder / name for name in entries])
            for (name, (_, sha256)), found_sha256 in zip(entries.items(), sums, strict=True):
                if found_sha256 != sha256:
                    return f"{folder / name}: differs from {MANIFEST} (damaged or edited)"
    return None


def verify(folder: Path, *, contents: bool = True) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    if fault := fault_of(folder, contents=contents):
        raise CheckpointError(f"{fault}; choose an earlier checkpoint")


def read_manifest(manifest: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file that a manifest lists. Raises CheckpointError when it cannot be read."""
    try:
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in read_json(manifest).items()}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{manifest}: damaged, it is no list of files") from error
    if outside := [name for name in entries if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise CheckpointError(f"{manifest}: damaged, it lists {outside[0]!r}, which lies outside")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file in a checkpoint. Raises CheckpointError when it holds none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, it holds no JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: damaged, it holds no JSON object")
    return found


@contextmanager
def only_tensors(path: Path) -> Iterator[None]:
    """For reading with `torch.load(weights_only=True)`. Raises CheckpointError where there is anything but tensors."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(
            f"{path}: holds something else than what is saved here, and is not read ({reason[0]})"
        ) from error


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders of a run that are named as checkpoints, whole or not, oldest first."""
    found = [
        (int(match[1]), f) for f in run_dir.glob("checkpoint-*") if (match := NAME.fullmatch(f.name)) and f.is_dir()
    ]
    return [folder for _, folder in sorted(found)]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run whose files are all there with their right sizes, oldest first."""
    return [folder for folder in checkpoints(run_dir) if fault_of(folder, contents=False) is None]


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Pass over the checkpoints of a run that are not whole, from the newest to the first that is, checksums included.

    One that has all its files, but not with their contents, is renamed to `checkpoint-N.damaged`, so that nothing takes
    it for whole. Those before it count for what their own checksums say.

    Returns:
        What was passed over and why, a line each.
    """
    notes = []
    for folder in reversed(checkpoints(run_dir)):
        if (fault := fault_of(folder)) is None:
            break
        notes.append(f"passing over {fault}")
        if fault_of(folder, contents=False) is None:
            aside = folder.with_name(folder.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            notes[-1] += f"; it is {aside.name} now"
    else:
        notes += ["no checkpoint is whole: starting from step 0"] if notes else []
    return notes


def resume_point(resume: str, run_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` means (`auto`, `never` or a folder), verified; None to start afresh.

    Returns:
        It, and what `auto` has passed over and why.

    Raises:
        CheckpointError: for a folder that is no complete checkpoint, and for a run folder with checkpoints of later
            steps: what this run will save would be mixed up with them.
    """
    notes = set_damaged_aside(run_dir) if resume == "auto" else []
    complete = complete_checkpoints(run_dir)
    point = None if resume == "never" else Path(resume)
    if resume == "auto":
        point = complete[-1] if complete else None
    elif point is not None and not point.is_dir():
        raise CheckpointError(f"resume={resume}: no such folder; expected auto, never or a checkpoint folder")
    elif point is not None:
        verify(point)
    start = 0 if point is None else step_of(point)
    if complete and step_of(complete[-1]) > start:
        raise CheckpointError(
            f"resume={resume} would go on from step {start}, and {complete[-1]} is of a later step: set resume=auto, "
            "move the later checkpoints away, or choose another run_dir"
        )
    return point, notes


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
    step = read_json(folder / TRAINER_STATE_NAME).get("global_step")
    if not isinstance(step, int):
        raise CheckpointError(f"{folder / TRAINER_STATE_NAME}: global_step is {step!r}, expected an integer")
    return step


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
    if Path(path).is_file():
        raise ConfigError(f"{path}: is a file; expected a folder of weights, a run folder or a hub id (owner/name)")
    owner, _, name = path.partition("/")
    if path.startswith((".", "/", "~")) or not name or "/" in name:
        raise ConfigError(f"{path}: no such folder, and not a hub id (owner/name); looked in {Path.cwd()}")
    if Path(owner).is_dir():
        there = [entry.name for entry in Path(owner).iterdir() if entry.is_dir()]
        hint = nearest(name, there, f"{owner}/") if there else "it holds no folders"
        raise ConfigError(f"no folder {path} here, and {owner}/ is a folder, so it is no hub id; {hint}")
    return path
