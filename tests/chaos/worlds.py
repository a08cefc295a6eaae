"""One run on one rank, then two, four and two, beside the same run on one:  python -m tests.chaos.worlds

Prints the largest difference of a step's loss, as a share of it; the steps, their order and their packs are the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.chaos.__main__ import digests  # first: it sets what has to be set before torch is imported
from tests.chaos.attempts import attempt
from tests.chaos.rank import Job
from tests.noise import write_noise

WORLDS = (1, 2, 4, 2)
STEPS_EACH = 3
TOLERANCE = 1e-5
"""Sums over ranks are added in another order: float32 differs in its last bits, and so do the weights after it."""


def run(folder: Path, corpus: Path, worlds: tuple[int, ...], steps_each: int) -> list[float]:
    """Losses of all steps of a run whose ranks change after so many steps."""
    for number, world in enumerate(worlds, 1):
        steps = ("trainer.lr_scheduler_type=constant_with_warmup", f"trainer.max_steps={number * steps_each}")
        outcome = attempt(Job("worlds", world, steps), corpus, folder, None)
        assert set(outcome.codes) == {0}, (folder / "rank0.log").read_text()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="worlds-") as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        corpus = write_noise(folder / "corpus")
        changing = run(folder / "changing", corpus, WORLDS, STEPS_EACH)
        alone = run(folder / "alone", corpus, (1,), len(WORLDS) * STEPS_EACH)
        assert len(digests(folder / "alone", 1)[0]) == len(alone) == len(changing) == len(WORLDS) * STEPS_EACH
    worst = max(abs(a - b) / b for a, b in zip(changing, alone, strict=True))
    print(json.dumps({"ranks": WORLDS, "steps": len(alone), "worst": worst, "tolerance": TOLERANCE}))
    sys.exit(0 if worst < TOLERANCE else 1)


if __name__ == "__main__":
    main()
