"""What may befall a run, and its draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen2audio_train.training.checkpoints.folder import complete_checkpoints


@dataclass(frozen=True)
class Fault:
    """One fault of one attempt to run to the end.

    Attributes:
        kind: one of `KINDS`.
        when: a share of the undisturbed run's way, after which it happens; of the border or size that is drawn, too.
        rank: the one that it befalls.
    """

    kind: str
    when: float
    rank: int


KINDS = {
    "kill_one": 3,  # SIGKILL to a rank at any moment
    "kill_all": 2,
    "kill_at_border": 4,  # before a sync or rename of a save
    "sigterm_one": 2,
    "sigstop_one": 1,
    "full_disk": 2,
    "truncated_file": 1,  # of the newest checkpoint, after SIGKILL to all
    "flipped_bit": 1,
}
"""How often each is drawn, of sixteen."""


def draw(seed: int, name: str, world: int) -> Iterator[Fault]:
    """Faults of a job without end. A rank that stands still is noticed by the others, so one alone is never stopped."""
    rng = random.Random(f"{seed} {name}")
    kinds = [kind for kind, times in KINDS.items() for _ in range(times) if world > 1 or kind != "sigstop_one"]
    while True:
        rng.shuffle(kinds)
        for kind in kinds:
            # Rank 0 seals what all have written.
            yield Fault(kind, rng.random(), 0 if kind == "kill_at_border" else rng.randrange(world))


def damage(run_dir: Path, fault: Fault) -> bool:
    """Change a file of the newest checkpoint; whether there was one."""
    newest = complete_checkpoints(run_dir)[-1:]
    files = sorted(path for folder in newest for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return False
    path = files[int(fault.when * len(files))]
    content = bytearray(path.read_bytes())
    place = int(fault.when * len(content))
    if fault.kind == "truncated_file":
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << int(8 * fault.when)
        path.write_bytes(content)
    return True
