"""Faults of every kind, in runs that end as the undisturbed one beside them:  python -m tests.chaos --minutes 5

Jobs on one rank and two, without DeepSpeed and under ZeRO-2 and ZeRO-3, are disturbed again and again, each time at
another moment, and started again each time. A fault counts when it was seen to land. Prints one line for every attempt,
and a last one with what all of it came to; ends with 1 unless nothing was lost, repeated or hung, and all weights are
those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import deepspeed  # noqa: F401  before the fork: a rank would take seconds for it
import torch
from safetensors.torch import load_file

from qwen2audio_train.training.checkpoints.folder import complete_checkpoints, step_of
from tests.chaos.attempts import Outcome, attempt
from tests.chaos.faults import Fault, draw
from tests.chaos.rank import JOBS, STEPS, Job
from tests.noise import write_noise

Digests = dict[int, list[list[int]]]
"""Step -> the digests of its batches on each rank."""


def digests(run_dir: Path, world: int) -> tuple[Digests, bool]:
    """What every step learned from when it was taken last, and whether that was the same each time it was taken."""
    found: Digests = {}
    same = True
    for rank in range(world):
        for line in (run_dir / f"digests.rank{rank}").read_text().splitlines():
            step, batches = json.loads(line)
            rows = found.setdefault(step, [])
            if len(rows) > rank:
                same &= rows[rank] == batches
                rows[rank] = batches
            else:
                rows.append(batches)
    return found, same


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    files = sorted((run_dir / f"checkpoint-{STEPS}").rglob("*.safetensors"))
    assert len(files) > 1
    return {f"{path.name} {name}": value for path in files for name, value in load_file(path).items()}


class Compared:
    """A job's undisturbed run, and what the others have come to beside it."""

    def __init__(self, job: Job, corpus: Path, folder: Path) -> None:
        self.job, self.corpus, self.folder = job, corpus, folder
        outcome = attempt(job, corpus, folder / "whole", None)
        if set(outcome.codes) != {0}:
            raise SystemExit(f"{job.name}: the undisturbed run failed\n{(folder / 'whole' / 'rank0.log').read_text()}")
        self.places = outcome.told
        self.batches, _ = digests(folder / "whole", job.world)
        self.state = state_of(folder / "whole")
        self.lost = self.repeated = 0
        self.equal = True

    def compare(self, run_dir: Path) -> None:
        """Count the examples of a run that has ended, and look at its weights."""
        batches, same = digests(run_dir, self.job.world)
        for step in self.batches.keys() | batches.keys():
            whole, run = (Counter(chain(*each.get(step, []))) for each in (self.batches, batches))
            self.lost += (whole - run).total()
            self.repeated += (run - whole).total()
        state = state_of(run_dir)
        self.equal &= same and state.keys() == self.state.keys()
        self.equal &= all(torch.equal(value, self.state[name]) for name, value in state.items())


def disturbed(job: Compared, seed: int) -> Iterator[tuple[Fault | None, Outcome]]:
    """Run after run, each disturbed until it is at its end."""
    faults = draw(seed, job.job.name, job.job.world)
    for number in count():
        run_dir = job.folder / f"run{number}"
        while not has_ended(run_dir):
            fault = next(faults)
            complete = complete_checkpoints(run_dir)
            left = 1 - (step_of(complete[-1]) / STEPS if complete else 0)
            yield fault, attempt(job.job, job.corpus, run_dir, fault, left * job.places)
        yield None, finish(job, run_dir)


def has_ended(run_dir: Path) -> bool:
    """Whether the last checkpoint of a run is there."""
    return (run_dir / f"checkpoint-{STEPS}" / "MANIFEST.json").is_file()


def finish(job: Compared, run_dir: Path) -> Outcome:
    """Let a run that was disturbed go on to its end, and compare it."""
    outcome = Outcome([0]) if has_ended(run_dir) else attempt(job.job, job.corpus, run_dir, None)
    if set(outcome.codes) != {0}:
        print((run_dir / "rank0.log").read_text()[-3000:], file=sys.stderr)
        job.equal = False
    else:
        job.compare(run_dir)
    shutil.rmtree(run_dir)
    return outcome


def chaos(names: list[str], folder: Path, *, seed: int, minutes: float, most: int) -> dict[str, Any]:
    """Disturb the jobs in turn until the time is over or so many faults have landed, then let all of them finish."""
    ends = time.monotonic() + 60 * minutes
    corpus = folder / "corpus"
    corpus.mkdir()
    write_noise(corpus)
    jobs = [Compared(JOBS[name], corpus, folder / name) for name in names]
    landed: Counter[str] = Counter()
    hung = 0
    streams = [disturbed(job, seed) for job in jobs]
    while time.monotonic() < ends and landed.total() < most:
        for job, stream in zip(jobs, streams, strict=True):
            fault, outcome = next(stream)
            hung += outcome.hung
            kind = fault.kind if fault else "none"
            if fault and outcome.place:
                landed[kind] += 1
            line = {"job": job.job.name, "fault": kind, "place": outcome.place, "codes": outcome.codes}
            print(json.dumps(line | {"seconds": round(outcome.seconds, 1)}), flush=True)
            if time.monotonic() > ends or landed.total() >= most:
                break
    for job in jobs:
        for run_dir in job.folder.glob("run*"):
            hung += finish(job, run_dir).hung
    totals = {"lost": sum(job.lost for job in jobs), "repeated": sum(job.repeated for job in jobs), "hung": hung}
    return {"faults": dict(sorted(landed.items())), **totals, "weights_equal": all(job.equal for job in jobs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no new fault is begun")
    parser.add_argument("--faults", type=int, default=10**9, help="after how many that have landed to stop")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        found = chaos(args.jobs, Path(folder), seed=args.seed, minutes=args.minutes, most=args.faults)
    print(json.dumps(found))
    good = {"lost": 0, "repeated": 0, "hung": 0, "weights_equal": True}
    sys.exit(0 if good.items() <= found.items() else 1)


if __name__ == "__main__":
    main()
