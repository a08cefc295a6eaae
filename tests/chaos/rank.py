"""One rank of a run that tells where it is and counts its batches, and may fall at a border of a save."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from qwen2audio_train.errors import UserError
from qwen2audio_train.training.checkpoints import writing
from qwen2audio_train.training.stages.run import fit
from tests.chaos.faults import Fault
from tests.runs import build_trainer, recipe

STEPS, SAVE_STEPS = 12, 2
BORDERS = 23
"""About as many syncs and renames as a save has."""


@dataclass(frozen=True)
class Job:
    """A run on so many ranks."""

    name: str
    world: int
    overrides: tuple[str, ...] = ()


TRAINING = (
    f"trainer.max_steps={STEPS}",
    "trainer.save_strategy=steps",
    f"trainer.save_steps={SAVE_STEPS}",
    "trainer.save_total_limit=3",
)
LORA = ("adapter.kind=lora", "adapter.r=2", "adapter.dropout=0.3")
JOBS = {
    job.name: job
    for job in (
        Job("one", 1, ("data.num_workers=1",)),
        Job("two", 2, LORA),
        Job("zero2", 2, ("deepspeed.stage=2",)),
        Job("zero3", 2, ("deepspeed.stage=3",)),
    )
}

Tell = Callable[[str], None]


class Places(TrainerCallback):
    """Tells the parts of a step, and appends the digests of its batches to a file once it is taken."""

    def __init__(self, tell: Tell, digests: Path, taken: list[int]) -> None:
        self.tell, self.digests, self.taken = tell, digests, taken

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.tell("forward")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.tell("update")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell("step end")
        line = json.dumps([state.global_step, self.taken]) + "\n"
        number = os.open(self.digests, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(number, line.encode())
        os.close(number)
        self.taken.clear()


def digest(batch: dict[str, Any]) -> int:
    """A checksum of all of a batch."""
    return zlib.crc32(b"".join(np.asarray(batch[key]).tobytes() for key in sorted(batch)))


def hook(trainer: Any, tell: Tell, fault: Fault | None) -> None:
    """Tell the parts of a save; fall at a border, or run out of room, where the fault says so."""
    borders = [0]
    fatal = 1 + int(fault.when * 1.5 * BORDERS) if fault is not None and fault.kind == "kill_at_border" else 0
    full = 1 + int(fault.when * 2) if fault is not None and fault.kind == "full_disk" else 0
    fsync, rename, write = os.fsync, Path.rename, trainer._write_checkpoint

    def border(name: str) -> None:
        tell(name)
        borders[0] += 1
        if borders[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def told_fsync(number: int) -> None:
        border(f"sync of {Path(os.readlink(f'/proc/self/fd/{number}')).name.split('-')[0]}")
        fsync(number)

    def told_rename(path: Path, target: Path) -> Path:
        border("rename")
        return rename(path, target)

    def told_write(partial: Path) -> None:
        tell("write")
        with short_of_room(fault.when if fault and trainer.state.global_step >= full * SAVE_STEPS > 0 else None):
            write(partial)

    os.fsync, Path.rename = told_fsync, told_rename  # type: ignore[assignment, method-assign]
    trainer._write_checkpoint = told_write
    rotate = writing.rotate
    writing.rotate = lambda *args, **more: (tell("rotate"), rotate(*args, **more))[1]  # type: ignore[assignment]


@contextmanager
def short_of_room(share: float | None) -> Iterator[None]:
    """Every write beyond some size of a file fails, as on a full disk, whoever writes; None: no such limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if share is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(1 + share * 250_000), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train(job: Job, corpus: Path, run_dir: Path, rank: int, tell: Tell, fault: Fault | None, watchdog_s: float) -> None:
    """Train to the end, or from the newest checkpoint to the end."""
    config = recipe(corpus, run_dir, *TRAINING, *job.overrides, f"watchdog_s={watchdog_s}")
    trainer = build_trainer(config)
    taken: list[int] = []
    trainer.add_callback(Places(tell, run_dir / f"digests.rank{rank}", taken))
    get = trainer.get_batch_samples

    def told_get(*args: Any) -> Any:
        tell("batches")
        batches, weight = get(*args)
        taken[:] = map(digest, batches)
        return batches, weight

    trainer.get_batch_samples = told_get  # type: ignore[method-assign]
    hook(trainer, tell, fault if (fault is not None and fault.rank == rank) or job.world == 1 else None)
    fit(trainer, config)


def run(job: Job, corpus: Path, run_dir: Path, rank: int, port: int, log: Path, **more: Any) -> None:
    """The whole life of a forked rank: it never returns."""
    number = os.open(log, os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.__stderr__ = sys.stderr
    if job.world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.world, "LOCAL_WORLD_SIZE": job.world}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    status = 1
    try:
        train(job, corpus, run_dir, rank, **more)
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
