"""Attempts to run a job to its end: ranks forked from one warm process, a fault, and what came of it.

Forking saves the ten seconds that a rank takes to import what it needs. As torchrun does, what is left of a job is
killed when one of its ranks has ended in any other way than well.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2audio_train.training.trainers.stop import STOPPED
from tests.chaos.faults import Fault, damage
from tests.chaos.rank import Job, run

LIMIT_S = 240.0
"""Until a run that neither ends nor goes on counts as hung: a stall is noticed after `STALLED_S` on a free machine."""
STALLED_S = 10.0
GRACE_S = 20.0
"""For the other ranks to end by themselves when one has; those of a stopped run have a save to finish."""
WIDTH = 64
"""Bytes in which a rank tells where it is: how many times it has told, then the name of the place."""


@dataclass
class Outcome:
    """How an attempt ended.

    Attributes:
        codes: of the ranks, negative for signals.
        place: where the rank was that the fault befell, empty where it came too late.
        hung: whether it had to be ended after `LIMIT_S`.
        told: how many places rank 0 has told.
    """

    codes: list[int]
    place: str = ""
    hung: bool = False
    seconds: float = 0.0
    told: int = 0


@dataclass
class Attempt:
    """A job's ranks, alive."""

    job: Job
    corpus: Path
    run_dir: Path
    fault: Fault | None
    places: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8 * WIDTH))

    def __post_init__(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        watchdog_s = STALLED_S if self.fault is not None and self.fault.kind == "sigstop_one" else LIMIT_S / 2
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pids = [self._fork(rank, port, watchdog_s) for rank in range(self.job.world)]
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int, port: int, watchdog_s: float) -> int:
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            more: dict[str, Any] = {"fault": self.fault, "watchdog_s": watchdog_s}
            more["tell"] = lambda name: self._tell(rank, name)
            run(self.job, self.corpus, self.run_dir, rank, port, log_of(self.run_dir, rank), **more)
        return pid

    def _tell(self, rank: int, name: str) -> None:
        line = f"{self.told(rank) + 1} {name}".encode()
        self.places[rank * WIDTH : (rank + 1) * WIDTH] = line[:WIDTH].ljust(WIDTH)

    def place(self, rank: int) -> str:
        """Where a rank is: the last that it told, empty before its first step."""
        return self._line(rank).partition(" ")[2]

    def told(self, rank: int) -> int:
        """How many places a rank has told."""
        return int(self._line(rank).partition(" ")[0] or 0)

    def _line(self, rank: int) -> str:
        return self.places[rank * WIDTH : (rank + 1) * WIDTH].rstrip(b" \0").decode()

    def living(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def send(self, number: int, ranks: list[int]) -> None:
        """Send a signal to those of the ranks that live."""
        for rank in set(ranks) & set(self.living()):
            os.kill(self.pids[rank], number)

    def wait(self, until: float, *, all_of_them: bool) -> bool:
        """Until a rank, or all of them, have ended; false when that is not before the moment `until`."""
        while self.living() if all_of_them else len(self.living()) == len(self.pids):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def end(self) -> list[int]:
        """Let the other ranks end, and kill what is left after a grace time."""
        if not self.wait(time.monotonic() + GRACE_S, all_of_them=True):
            self.send(signal.SIGKILL, self.living())
            self.wait(time.monotonic() + GRACE_S, all_of_them=True)
        return [self.codes.get(rank, -signal.SIGKILL) for rank in range(len(self.pids))]


def log_of(run_dir: Path, rank: int) -> Path:
    """What a rank has printed in its last attempt."""
    return run_dir / f"rank{rank}.log"


def attempt(job: Job, corpus: Path, run_dir: Path, fault: Fault | None, places: float = 0.0) -> Outcome:
    """Run a job from its newest checkpoint to its end, or to what a fault makes of it; rank 0 tells so many places."""
    ranks = Attempt(job, corpus, run_dir, fault)
    limit = time.monotonic() + LIMIT_S
    try:
        while not ranks.place(0) and ranks.living() and time.monotonic() < limit:
            time.sleep(0.005)
        began = time.monotonic()
        place = ""
        if fault is not None and fault.kind not in ("kill_at_border", "full_disk"):
            while ranks.told(0) < fault.when * places and len(ranks.living()) == job.world and time.monotonic() < limit:
                time.sleep(0.002)
            place = _strike(ranks, fault)
        hung = not ranks.wait(limit, all_of_them=False)
        if not hung and fault is None:
            hung = not ranks.wait(limit, all_of_them=True)
    finally:
        if time.monotonic() > limit:
            ranks.send(signal.SIGKILL, ranks.living())
        if fault is not None and fault.kind == "sigstop_one":
            ranks.send(signal.SIGKILL, [fault.rank])  # it would not hear anything else
        codes = ranks.end()
    seconds = time.monotonic() - began
    if fault is not None:
        place = _landed(ranks, fault, place, codes)
    return Outcome(codes, place, hung, seconds, ranks.told(0))


def _strike(ranks: Attempt, fault: Fault) -> str:
    everyone = list(range(len(ranks.pids)))
    struck = [fault.rank] if fault.kind.endswith("_one") else everyone
    if len(ranks.living()) < len(everyone):
        return ""
    signals = {"sigterm_one": signal.SIGTERM, "sigstop_one": signal.SIGSTOP}
    ranks.send(signals.get(fault.kind, signal.SIGKILL), struck)
    return ranks.place(fault.rank)


def _landed(ranks: Attempt, fault: Fault, place: str, codes: list[int]) -> str:
    """Where the fault was seen to land; empty where it was not."""
    texts = [log_of(ranks.run_dir, rank).read_text(errors="replace") for rank in range(len(codes))]
    others = [rank for rank in range(len(codes)) if rank != fault.rank]
    seen = {
        "kill_one": codes[fault.rank] == -signal.SIGKILL,
        "kill_all": set(codes) == {-signal.SIGKILL},
        "kill_at_border": codes[fault.rank] == -signal.SIGKILL,
        "sigterm_one": set(codes) == {STOPPED},
        "sigstop_one": any(codes[rank] == 1 and "Timeout (0:00:" in texts[rank] for rank in others),
        "full_disk": 2 in codes and any("could not be written" in text for text in texts),
    }
    if fault.kind not in seen:
        return "newest checkpoint" if set(codes) == {-signal.SIGKILL} and damage(ranks.run_dir, fault) else ""
    if not seen[fault.kind]:
        return ""
    return place or ranks.place(fault.rank)
