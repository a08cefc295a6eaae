"""Checkpoints are whole or absent: written aside, synced, sealed with a manifest of checksums, then given their name.

A save needs room for one more checkpoint, as the oldest is dropped after the newest is whole. That is looked at before
anything is written; a disk that is full all the same leaves the checkpoints before, and says what would make room.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen2audio_train.training.checkpoints.folder import (
    MANIFEST,
    CheckpointError,
    checksum,
    complete_checkpoints,
    step_of,
    users,
)

PARTIAL = ".partial"
NO_MORE_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a disk says that is full, whose quota is used up, or that has been made read-only after an error."""


def seal(partial: Path, target: Path) -> None:
    """Write the manifest of a finished folder and move the folder to its final name.

    Files, folders and the manifest are on the disk before the rename, and the rename after it: a folder with the final
    name is complete, also after a power failure. One that has the name already is replaced.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(checksum, files))
        list(pool.map(sync, files))
    entries = {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, sums, strict=True)
    }
    (partial / MANIFEST).write_text(json.dumps(entries, indent=1))
    for path in (partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync(path)
    if target.exists():
        target.rename(target.with_name(f"{target.name}.old{PARTIAL}"))
    partial.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not sync folders
            raise
    finally:
        os.close(number)


def save_state(state: Any, path: Path) -> None:
    """`torch.save`, whose failures to write are RuntimeErrors, with an OSError instead."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"{path.name}: {error}") from error


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def least_size(model: nn.Module, optimizer: torch.optim.Optimizer | None, *, trained_only: bool) -> int:
    """Bytes of the weights that are saved and of the state of a torch optimizer: of a checkpoint, less small files."""
    saved = [p for p in model.parameters() if p.requires_grad or not trained_only]
    weights = sum(int(getattr(p, "ds_numel", p.numel())) * p.element_size() for p in saved)
    states = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
    return weights + sum(state.nbytes for state in states if isinstance(state, torch.Tensor))


def shortage(run_dir: Path, least: int) -> str | None:
    """Why a checkpoint will not fit on the disk: it takes what the newest one does, the first one `least` bytes."""
    complete = complete_checkpoints(run_dir)
    needed, free = size_of(complete[-1]) if complete else least, shutil.disk_usage(run_dir).free
    return None if needed <= free else f"it takes {_gib(needed)}"


def write_failure(target: Path, reason: str | Exception) -> CheckpointError:
    """What to say when a checkpoint could not be written; what was written of it is deleted."""
    shutil.rmtree(target.with_suffix(PARTIAL), ignore_errors=True)
    return CheckpointError(f"{target}: could not be written ({reason}; {_what_is_left(target.parent)}")


@contextmanager
def disk_failures_in_words(run_dir: Path) -> Iterator[None]:
    """For the writing of logs and the like into a run folder.

    Raises:
        CheckpointError: in place of the OSError of a disk that is full or read-only, or of a run folder that is gone.
    """
    try:
        yield
    except OSError as error:
        if not run_dir.is_dir():
            raise CheckpointError(f"run_dir={run_dir}: was deleted or moved away during the run ({error})") from error
        if error.errno not in NO_MORE_WRITES:
            raise
        raise CheckpointError(f"run_dir={run_dir}: cannot go on ({error}; {_what_is_left(run_dir)}") from error


def _what_is_left(run_dir: Path) -> str:
    free = _gib(shutil.disk_usage(run_dir).free)
    others = [f"{folder.name} ({_gib(size_of(folder))})" for folder in sorted(run_dir.glob("checkpoint-*"))]
    to_free = f"To make room: a lower trainer.save_total_limit; here lie {', '.join(others)}. " if others else ""
    complete = complete_checkpoints(run_dir)
    newest = f"{complete[-1]} is complete and will be resumed from" if complete else "there is no earlier checkpoint"
    return f"{free} are free). {to_free}{newest}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def drop(folders: Iterable[Path]) -> None:
    """Delete folders; one that is gone halfway is no checkpoint any longer, as its manifest goes first."""
    for folder in folders:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def drop_partials(run_dir: Path) -> None:
    """Delete what interrupted saves left."""
    drop(run_dir.glob(f"checkpoint-*{PARTIAL}"))


def rotate(run_dir: Path, keep: int | None, *, spare: int | None = None, every: int | None = None) -> None:
    """Delete what interrupted saves left, and the oldest checkpoints beyond `keep`.

    Those that another run builds on stay, that of step `spare`, and those of every `every` steps.
    """
    drop_partials(run_dir)
    beyond = complete_checkpoints(run_dir)[:-keep] if keep else []
    old = [folder for folder in beyond if step_of(folder) != spare and not (every and step_of(folder) % every == 0)]
    drop(folder for folder in old if not users(folder))
