"""Reference log-probabilities on disk, so that preference training needs no reference model in memory.

A store is a folder of append-only parts, one per process that wrote to it: no locks, so ranks on several nodes
may share it over any file system. A part is a JSON header line followed by records of 28 bytes:

    pair key 2 x int64 | log-probability of the chosen, of the rejected answer 2 x float32 | CRC-32 of the rest

The pair key is a hash of the example's id, its rendered prompt and answers, and its spectrograms; the reference (its
weights and what else changes the figures) is in the header. A part of another reference is refused, a damaged record
is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from qwen2audio_train.errors import UserError

FORMAT = 1
RECORD = np.dtype([("key", "<i8", 2), ("logps", "<f4", 2), ("crc", "<u4")])


class ReferenceCacheError(UserError):
    """The stored reference log-probabilities cannot be used."""


class ReferenceCache:
    """A store of (chosen, rejected) log-probabilities under one reference.

    Args:
        folder: where the parts lie; made when the first record is written.
        reference: what the figures depend on besides the pair, see `reference_id`.
        rank: this process's rank, only for the name of its part.
    """

    def __init__(self, folder: str | Path, reference: str, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.reference = reference
        self.rank = rank
        self.num_damaged = 0
        self._part: int | None = None
        self._logps: dict[tuple[int, int], tuple[float, float]] = {}
        self.load()

    def __len__(self) -> int:
        return len(self._logps)

    def load(self) -> None:
        """Read every part, those of other processes too; `num_damaged` counts the records left out."""
        self.num_damaged = 0
        for path in sorted(self.folder.glob("*.part")):
            self._read_part(path)

    def _read_part(self, path: Path) -> None:
        line, _, body = path.read_bytes().partition(b"\n")
        header = _parse_header(path, line)
        if header["reference"] != self.reference:
            raise ReferenceCacheError(
                f"{path} holds log-probabilities of the reference {header['reference']}, this run's is "
                f"{self.reference}: name another folder for the reference cache, or delete this one"
            )
        whole = len(body) // RECORD.itemsize
        records = np.frombuffer(body, RECORD, count=whole)
        keys, logps = records["key"].tolist(), records["logps"].tolist()
        for record, key, pair in zip(records, keys, logps, strict=True):
            if zlib.crc32(record.tobytes()[:-4]) == record["crc"]:
                self._logps[tuple(key)] = tuple(pair)
            else:
                self.num_damaged += 1
        self.num_damaged += len(body) > whole * RECORD.itemsize

    def lookup(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored log-probabilities (B, 2) float32 of the pairs `keys` (B, 2) int64, and which of them
        were found (B,) bool. Columns of the first: chosen, rejected; zero where nothing is stored.
        """
        rows = [self._logps.get(tuple(key)) for key in keys.tolist()]
        found = torch.tensor([row is not None for row in rows], dtype=torch.bool)
        return torch.tensor([row or (0.0, 0.0) for row in rows], dtype=torch.float32).view(-1, 2), found

    def store(self, keys: torch.Tensor, logps: torch.Tensor) -> None:
        """Append the log-probabilities `logps` (B, 2) of the pairs `keys` (B, 2) int64."""
        records = np.zeros(len(keys), RECORD)
        records["key"] = keys.cpu().numpy()
        records["logps"] = logps.detach().float().cpu().numpy()
        records["crc"] = [zlib.crc32(record.tobytes()[:-4]) for record in records]
        if not np.isfinite(records["logps"]).all():
            raise ReferenceCacheError(
                "a reference log-probability is not finite: check the reference's weights and dtype"
            )
        if self._part is None:
            self._part = self._open_part()
        os.write(self._part, records.tobytes())
        for key, pair in zip(records["key"].tolist(), records["logps"].tolist(), strict=True):
            self._logps[tuple(key)] = tuple(pair)

    def _open_part(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.rank:05d}-{os.getpid()}-{time.time_ns()}.part"
        part = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        os.write(part, json.dumps({"format": FORMAT, "reference": self.reference}).encode() + b"\n")
        return part

    def close(self) -> None:
        """Bring this process's part to disk; a later `store` opens a new one."""
        if self._part is not None:
            os.fsync(self._part)
            os.close(self._part)
            self._part = None


def _parse_header(path: Path, line: bytes) -> dict[str, object]:
    try:
        header = json.loads(line)
        found = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReferenceCacheError(f"{path} is not a part of a reference cache: delete it") from error
    if found != FORMAT:
        raise ReferenceCacheError(
            f"{path} has format {found}, this version reads {FORMAT}: delete it and fill it again"
        )
    return header


def reference_id(weights: str, dtype: torch.dtype, ld_alpha: float | None) -> str:
    """Name of all that stored figures depend on besides the pair: weights, arithmetic, length weighting."""
    return f"{weights}/{str(dtype).removeprefix('torch.')}/ld_alpha={ld_alpha}"


def weights_digest(
    parameters: Iterable[tuple[str, torch.Tensor]],
    gathered: Callable[[torch.Tensor], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> str:
    """SHA-256 (hex) over names, shapes, types and bytes of the named tensors, in the order of their names.

    `gathered` makes a sharded tensor whole for the time of its context (ZeRO-3); all ranks take part and agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        with gathered(tensor):
            data = tensor.detach().contiguous().cpu()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
