"""Damaged and hostile inputs, each a clear error or a right reading:  python -m tests.chaos.fuzz --inputs 5000

Configs, manifest lines, tar archives and checkpoints are taken as they should be and changed at random: bytes flipped,
cut, repeated; values replaced by what nobody would write. What is not refused with a `UserError` has to be read as what
it is. An audit hook sees every file that is opened for writing, every process, connection and unpickled class. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen2audio_train.config.schema import StageConfig, load_config
from qwen2audio_train.data.manifests.manifest import parse_line
from qwen2audio_train.data.storage.blobs import BlobError, find_inside, list_members
from qwen2audio_train.data.storage.paths import expand_paths
from qwen2audio_train.errors import UserError
from qwen2audio_train.training.checkpoints import writing
from qwen2audio_train.training.checkpoints.bases import lineage_of
from qwen2audio_train.training.checkpoints.folder import fault_of, resume_point
from tests.runs import recipe

JUNK: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        2**63,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\0",
        "\ud800",
        "no",
        "1e3",
        "a=b",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": ""},
        {"_target_": "os.system"},
        "${oc.env:HOME}",
        "${..}",
        "${",
        "???",
        "!!python/name:os",
    ),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "ftp://x/y",
        "x" * 10_000,
        "<|AUDIO|>",
        "٣",
    ),
]
MEMORY_MIB = 256
"""By how much the process may grow over all inputs."""
CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"})
FORBIDDEN = frozenset(
    {
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.posix_spawn",
        "socket.connect",
        "pickle.find_class",
        "ctypes.dlopen",
    }
)


class Audit:
    """What the interpreter does meanwhile that no input may make it do."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        touched = [_placed(args[0], args[-1])] if writes or event in CHANGES else []
        if event in ("os.rename", "os.link", "os.symlink"):
            touched.append(_placed(args[1], args[-1]))
        if event in FORBIDDEN or any(not path.is_relative_to(self.allowed) for path in touched):
            self.seen.append(f"{event} {args}"[:200])

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Note what is done outside of `folder`."""
        self.allowed = folder
        try:
            yield
        finally:
            self.allowed = None


def _placed(path: Any, folder: Any) -> Path:
    """Where a path lies that is relative to an open folder's number, or to the working folder."""
    if isinstance(path, int):
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    open_folder = f"/proc/self/fd/{folder}"
    base = os.readlink(open_folder) if isinstance(folder, int) and os.path.isdir(open_folder) else os.getcwd()
    return Path(os.path.normpath(os.path.join(base, os.fsdecode(path))))


def mangled(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three changes: flipped, cut off, cut out, repeated, overwritten."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.randint(1, 64))
        kind = rng.randrange(5)
        if kind == 0 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[start:]
        elif kind == 2:
            del content[start:end]
        elif kind == 3:
            content[start:start] = content[start:end] * rng.randint(1, 50)
        else:
            content[start:end] = rng.choice([b"9", b"7", b"\0", b"\xff", b"[", b'{"a":']) * (end - start)
    return bytes(content)


def replaced(value: Any, rng: random.Random) -> Any:
    """A nested value in which one to three parts are junk, or stand under keys that are none."""
    found = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        place, junk = found, copy.deepcopy(rng.choice(JUNK))
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(place[key], (dict, list)) or rng.random() < 0.2:
                name = rng.choice([key, key, key, "_target_", "zz"]) if isinstance(place, dict) else key
                place[name] = junk
                break
            place = place[key]
    return found


def deep(rng: random.Random) -> str:
    """JSON nested far deeper than any reader goes."""
    return rng.choice(['{"id":', "["]) * rng.choice([100, 10_000, 200_000])


class Configs:
    """Recipes through the door."""

    def __init__(self, folder: Path) -> None:
        config = recipe(folder, folder / "run")
        self.right: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
        load_config(OmegaConf.create(self.right), StageConfig)

    def __call__(self, rng: random.Random) -> None:
        config = load_config(OmegaConf.create(replaced(self.right, rng)), StageConfig)
        for source in config.data.sources.values():
            for path in source.path:
                if not path.startswith("/dev"):
                    expand_paths([path], "data.sources")


class Manifests:
    """Lines of all four forms."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[bytes] = []
        for path in sorted(folder.glob("*.jsonl")):
            self.lines += path.read_bytes().splitlines()

    def __call__(self, rng: random.Random) -> None:
        line = rng.choice(self.lines)
        kind = rng.random()
        if kind < 0.45:
            line = mangled(line, rng)
        elif kind < 0.95:
            line = json.dumps(replaced(json.loads(line), rng)).encode("utf-8", "surrogatepass")
        else:
            line = deep(rng).encode()
        parse_line(line, "corpus.jsonl", 1)


class Archives:
    """Tar files of every dialect; members that lead outside are names and nothing more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.right = [self._made(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]

    def _made(self, form: int) -> bytes:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=form) as tar:
            for name in ("a.wav", "../../outside.wav", "/etc/outside", "long/" * 18 + "b.wav"):
                info = tarfile.TarInfo(name)
                info.size = 700
                info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(b"x" * 700))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        return content.getvalue()

    def __call__(self, rng: random.Random) -> None:
        data = mangled(rng.choice(self.right), rng)
        names = [member.name for member in list_members(io.BytesIO(data))]
        path = self.folder / f"{rng.randrange(2**32):08x}.tar"
        path.write_bytes(data)
        try:
            for name in [*names, "link", "none"]:
                with suppress(BlobError):
                    found = find_inside(f"{path}::{name}", 1000)
                    content = found if isinstance(found, bytes) else found.read(1000)
                    assert len(content) <= 1000
                    assert name in names, "a link, or what is not there, was read"
        finally:
            path.unlink()


class Checkpoints:
    """Files of a checkpoint damaged, or written by somebody else and sealed again."""

    READ = ("trainer_state.json", "lineage.json", "MANIFEST.json")

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"
        right = self.folder / "right"
        (right / "model").mkdir(parents=True)
        (right / "model" / "model.safetensors").write_bytes(os.urandom(500))
        (right / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": [{"loss": 1.0}]}))
        (right / "lineage.json").write_text(json.dumps({"stage": "pretrain", "base": {"a": "b"}}))
        (self.folder / "run").mkdir()
        writing.seal(right, self.folder / "run" / "checkpoint-3")

    def __call__(self, rng: random.Random) -> None:
        run_dir = self.folder / f"run{rng.randrange(2**32):08x}"
        shutil.copytree(self.folder / "run", run_dir)
        folder = run_dir / "checkpoint-3"
        try:
            self._harm(folder, rng)
            resume_point(str(folder), run_dir)
            lineage_of(folder)
            resume_point("auto", run_dir)
        finally:
            shutil.rmtree(run_dir)

    def _harm(self, folder: Path, rng: random.Random) -> None:
        path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        before = path.read_bytes()
        if path.name in self.READ and rng.random() < 0.5:
            content = json.dumps(replaced(json.loads(before), rng)).encode("utf-8", "surrogatepass")
        else:
            content = deep(rng).encode() if rng.random() < 0.05 else mangled(before, rng)
        path.write_bytes(content)
        if path.name != "MANIFEST.json" and rng.random() < 0.5:
            partial = folder.with_suffix(writing.PARTIAL)
            folder.rename(partial)
            (partial / "MANIFEST.json").unlink()
            writing.seal(partial, folder)
        elif path.name != "MANIFEST.json" and content != before:
            assert fault_of(folder) is not None, f"damage of {path} was not found"


KINDS: dict[str, Callable[[Path], Callable[[random.Random], None]]] = {
    "config": Configs,
    "manifest": Manifests,
    "archive": Archives,
    "checkpoint": Checkpoints,
}


def fuzz(folder: Path, inputs: int, seed: int, audit: Audit) -> dict[str, Any]:
    """Try so many inputs; `folder` holds a corpus of noise, and is the only place that may be written to."""
    tries = {name: make(folder) for name, make in KINDS.items()}
    for one in tries.values():  # what is imported at the first use is not the inputs' doing
        with suppress(Exception):
            one(random.Random(0))
    refused: Counter[str] = Counter()
    unclear: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(inputs):
        name = list(tries)[number % len(tries)]
        try:
            with audit.watching(folder):
                tries[name](random.Random(f"{seed} {number}"))
        except (UserError, OmegaConfBaseException, FileNotFoundError) as error:  # what launch scripts print
            refused[name] += 1
            if not str(error).strip():
                unclear.append(f"{name} {number}: no words")
        except Exception as error:
            unclear.append(f"{name} {number}: {error!r}"[:300])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found = {"inputs": inputs, "refused": dict(refused), "unclear": unclear, "forbidden": audit.seen}
    return found | {"grown_mib": round(grown, 1), "bounded": grown < MEMORY_MIB}


def main() -> None:
    from tests.noise import write_noise

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    audit = Audit()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        found = fuzz(write_noise(Path(folder)), args.inputs, args.seed, audit)
    print(json.dumps(found))
    sys.exit(0 if not found["unclear"] and not found["forbidden"] and found["bounded"] else 1)


if __name__ == "__main__":
    main()
